// Rows of fp32, fp16 or bf16 numbers, worked on in fp32.
//
// Kernels that are bound by memory share one shape: widen a block of a row into a buffer that stays in the first-level
// cache, compute there with plain loops over fp32, which the compiler vectorises at every level, and narrow the block
// back. Only the conversions, which compilers do not vectorise for fp16, need instructions of a level.

#pragma once

#include "level.h"

FB_BEGIN

constexpr int64_t kBlock = 512;  // fp32 elements of a buffer: four of them take 8 KiB

template <class T>
static inline void widen(const T* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}

template <class T>
static inline void narrow(const float* from, T* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) from_float(from[i], to + i);
}

#if FB_AVX512
static inline void widen(const f16* from, float* to, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + i))));
    for (; i < n; i++) to[i] = to_float(from[i]);
}

static inline void narrow(const float* from, f16* to, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < n; i++) from_float(from[i], to + i);
}
#elif FB_AVX2
static inline void widen(const f16* from, float* to, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
    for (; i < n; i++) to[i] = to_float(from[i]);
}

static inline void narrow(const float* from, f16* to, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < n; i++) from_float(from[i], to + i);
}
#endif

// Rounds a buffer to what T can hold, where the operation that is being fused would have stored its result.
template <class T>
static inline void round_to(float* x, int64_t n) {
    T rounded[kBlock];
    narrow(x, rounded, n);
    widen((const T*)rounded, x, n);
}

template <>
inline void round_to<float>(float*, int64_t) {}

// a * b + c, rounded once where the level has such an instruction.
static inline float multiply_add(float a, float b, float c) {
#if FB_AVX2 || FB_NEON
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x within 2 ulp; 0 below -104, infinity above 88.8, NaN for NaN.
//
// x = n ln2 + r with |r| <= ln2 / 2; e^r by a polynomial (Cephes); 2^n in two factors, so that neither leaves the
// range of normal numbers before the product does.
static inline float exp_of(float x) {
    const float round_by_adding = 12582912.0f;  // 1.5 * 2^23: the unit of its neighbours is 1
    x = x < -105.0f ? -105.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const float shifted = multiply_add(x, 1.44269504f, round_by_adding);
    const int32_t n = (int32_t)(bits_of(shifted) - bits_of(round_by_adding));
    const float n_float = shifted - round_by_adding;
    float r = multiply_add(n_float, -0.693359375f, x);
    r = multiply_add(n_float, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = multiply_add(p, r, 1.3981999507e-3f);
    p = multiply_add(p, r, 8.3334519073e-3f);
    p = multiply_add(p, r, 4.1665795894e-2f);
    p = multiply_add(p, r, 1.6666665459e-1f);
    p = multiply_add(p, r, 5.0000001201e-1f);
    p = multiply_add(p, r * r, r) + 1.0f;
    const int32_t half = n >> 1;
    return p * float_of((uint32_t)(half + 127) << 23) * float_of((uint32_t)(n - half + 127) << 23);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One thread where there is too little work to share: starting a second one costs some microseconds.
static inline int32_t worthwhile(int32_t threads, int64_t elements) {
    return elements < 16384 || threads < 1 ? 1 : threads;
}

// Calls KERNEL<T>(arguments) for the dtype; a kernel that returns nothing cannot fail.
#define FB_BY_DTYPE(dtype, KERNEL, ...)        \
    switch (dtype) {                           \
        case FB_F32:                           \
            return KERNEL<float>(__VA_ARGS__); \
        case FB_F16:                           \
            return KERNEL<f16>(__VA_ARGS__);   \
        case FB_BF16:                          \
            return KERNEL<bf16>(__VA_ARGS__);  \
        default:                               \
            return FB_BAD_ARGUMENT;            \
    }

FB_END
