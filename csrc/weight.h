// What the kernels that read an FbWeight share: its scales, and whether it is one.

#pragma once

#include "level.h"

FB_BEGIN

// Outputs from this size on are written past the caches: no last-level cache that a few cores share keeps them for the
// next reader. The size is not asked for, as under virtualisation the C library and the kernel disagree about it.
constexpr int64_t stream_bytes = 32 << 20;

// One of several weights that meet the same x.
struct Product {
    const FbWeight* weight;
    const void* bias;
    void* y;
};

// `linear` of each, in one go: valid weights, not all without rows, of the same columns and block size.
int32_t linear_group(const Product* products, int64_t count, const void* x, int32_t dtype, int64_t m, int32_t threads);

static inline float scale_of(const FbWeight& weight, int64_t block) {
    if (weight.absmax) return weight.absmax[block];
    const float scale = weight.nested_map[weight.absmax_codes[block]] * weight.nested_absmax[block >> 8];
    return scale + *weight.nested_offset;
}

// Eight-bit scale codes, all under one second-level scale, to scales.
static inline void decode_scales(const uint8_t* codes, int64_t count, float nested_absmax, float offset,
                                 const float* map, float* scales) {
    int64_t i = 0;
#if FB_AVX512
    // A look-up in 256 entries: eight in 32 of them, and the upper three bits of the code choose.
    const __m512 by = _mm512_set1_ps(nested_absmax), plus = _mm512_set1_ps(offset);
    for (; i < count; i += 16) {
        const __mmask16 left = count - i < 16 ? (__mmask16)((1u << (count - i)) - 1) : (__mmask16)0xffff;
        const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(left, codes + i));
        const __mmask16 bit5 = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32));
        const __mmask16 bit6 = _mm512_test_epi32_mask(code, _mm512_set1_epi32(64));
        const __mmask16 bit7 = _mm512_test_epi32_mask(code, _mm512_set1_epi32(128));
        __m512 level[8];
        for (int k = 0; k < 8; ++k) {
            level[k] = _mm512_permutex2var_ps(_mm512_loadu_ps(map + 32 * k), code, _mm512_loadu_ps(map + 32 * k + 16));
        }
        for (int k = 0; k < 8; k += 2) level[k] = _mm512_mask_mov_ps(level[k], bit5, level[k + 1]);
        for (int k = 0; k < 8; k += 4) level[k] = _mm512_mask_mov_ps(level[k], bit6, level[k + 2]);
        level[0] = _mm512_mask_mov_ps(level[0], bit7, level[4]);
        _mm512_mask_storeu_ps(scales + i, left, _mm512_add_ps(_mm512_mul_ps(level[0], by), plus));
    }
#else
    for (; i < count; ++i) scales[i] = map[codes[i]] * nested_absmax + offset;
#endif
}

// The scales of `count` blocks from `first` on.
static inline void scales_of(const FbWeight& weight, int64_t first, int64_t count, float* scales) {
    if (weight.absmax) {
        memcpy(scales, weight.absmax + first, (size_t)count * sizeof(float));
        return;
    }
    for (const int64_t end = first + count; first < end;) {
        const int64_t nested = first >> 8, next = (nested + 1) << 8, some = (next < end ? next : end) - first;
        decode_scales(weight.absmax_codes + first, some, weight.nested_absmax[nested], *weight.nested_offset,
                      weight.nested_map, scales);
        first += some;
        scales += some;
    }
}

static inline bool is_valid(const FbWeight& weight) {
    const int64_t block = weight.block_size;
    if (weight.rows < 0 || weight.cols < 0 || block < 32 || block > 4096 || (block & (block - 1))) return false;
    const bool nested = weight.absmax_codes && weight.nested_absmax && weight.nested_offset && weight.nested_map;
    const bool empty = weight.rows == 0 || weight.cols == 0;  // an empty array may have no address
    return empty || (weight.packed && weight.levels && (weight.absmax || nested));
}

FB_END
