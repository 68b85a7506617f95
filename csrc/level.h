// What every kernel file starts with: the SIMD level it is being compiled for, and the small number types.
//
// Each file under kernels/ is compiled once per level with -DFB_LEVEL=<level> and the level's compiler flags, and puts
// everything it defines into namespace fb::<level>:
//
//     #include "../level.h"
//     FB_BEGIN
//     int32_t my_kernel(...) { ... }
//     FB_END
//
// Code for one level stands under `#if FB_AVX512` and so on; a level implies the ones below it. A file without such
// code is compiled as it stands, and vectorised by the compiler, at every level.
//
// A function from a standard header that the compiler does not inline (std::vector, std::sort) would be emitted once
// per level under one name, and the linker would keep any of them: AVX-512 code would then run on a machine without
// it. So kernels use no templates or inline functions from outside this namespace; a test reads the symbol table.

#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "fourbit.h"

#ifndef FB_LEVEL
#error "Compile with -DFB_LEVEL=scalar, avx2, avx512, avx512bf16 or neon; setup.py does."
#endif

#define FB_RANK_scalar 0
#define FB_RANK_avx2 1
#define FB_RANK_avx512 2
#define FB_RANK_avx512bf16 3
#define FB_RANK_neon 16
#define FB_JOIN_(a, b) a##b
#define FB_JOIN(a, b) FB_JOIN_(a, b)
#define FB_RANK FB_JOIN(FB_RANK_, FB_LEVEL)

#define FB_AVX2 (FB_RANK >= 1 && FB_RANK <= 3)
#define FB_AVX512 (FB_RANK == 2 || FB_RANK == 3)
#define FB_AVX512BF16 (FB_RANK == 3)
#define FB_NEON (FB_RANK == 16)

#if FB_AVX2
#include <immintrin.h>
#elif FB_NEON
#include <arm_neon.h>
#endif

#define FB_BEGIN   \
    namespace fb { \
    namespace FB_LEVEL {
#define FB_END \
    }          \
    }

FB_BEGIN

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float to_float(float value) { return value; }

static inline float to_float(bf16 value) { return float_of((uint32_t)value.bits << 16); }

static inline float to_float(f16 value) {
#if FB_AVX2
    return _cvtsh_ss(value.bits);
#elif FB_NEON
    __fp16 half;
    memcpy(&half, &value.bits, sizeof half);
    return half;
#else
    // The exponent is moved to fp32's place and rebased by a product, which is exact and normalises subnormals.
    const uint32_t magnitude = (uint32_t)(value.bits & 0x7fff) << 13;
    const uint32_t sign = (uint32_t)(value.bits & 0x8000) << 16;
    if (magnitude >= 0x0f800000u) return float_of(sign | 0x7f800000u | (magnitude & 0x007fffffu));
    return float_of(sign | bits_of(float_of(magnitude) * float_of(0x77800000u)));  // 2^112
#endif
}

// Conversions from fp32 round to nearest, ties to even; overflow gives infinity; subnormal results are kept.

static inline void from_float(float value, float* out) { *out = value; }

static inline void from_float(float value, bf16* out) {
    // On the integer bits: vcvtneps2bf16 would flush subnormals.
    const uint32_t bits = bits_of(value);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out->bits = nan ? (uint16_t)0x7fc0 : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void from_float(float value, f16* out) {
#if FB_AVX2
    out->bits = (uint16_t)_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#elif FB_NEON
    const __fp16 half = (__fp16)value;
    memcpy(&out->bits, &half, sizeof half);
#else
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        magnitude = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
        magnitude = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: let an addition at the subnormal's unit, 2^-24, round it
        magnitude = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    } else {
        magnitude += 0xfffu + ((magnitude >> 13) & 1u);
        magnitude = (magnitude - 0x38000000u) >> 13;
    }
    out->bits = (uint16_t)(sign | magnitude);
#endif
}

FB_END
