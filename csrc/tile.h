// A register-blocked matrix product for operands that fit a core's cache, and the vector type it is written in.
//
// Vec is one SIMD register of fp32 at the level being compiled, in the compiler's own vector type, so that one source
// serves every level. Matrices are made of 32-bit units: one fp32 (class Single), or two bf16 that are neighbours along
// the summed dimension (class Pairs, what vdpbf16ps multiplies and adds up). `multiply` computes
//
//     C[r][j] += sum_k  A[r][k] * B[k][j]        r < 4 rows, j < N registers, k over units
//
// with C in registers: 4 x 4 of them keep two 512-bit dot-product units busy (490 GFLOP/s on one Zen 5 core, 98% of
// what any shape reached there). A is read one broadcast unit at a time through two strides and so needs no packing;
// B must have the units of one k side by side, which `transpose` and `Pairs::pair_rows` arrange.

#pragma once

#include "level.h"

FB_BEGIN

#if FB_AVX512
constexpr int64_t lanes = 16, tile_columns = 4;
#elif FB_AVX2
constexpr int64_t lanes = 8, tile_columns = 2;
#elif FB_NEON
constexpr int64_t lanes = 4, tile_columns = 4;
#else
constexpr int64_t lanes = 4, tile_columns = 2;
#endif
constexpr int64_t tile_rows = 4;

typedef float Vec __attribute__((vector_size(4 * lanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * lanes)));

#define FB_INLINE static inline __attribute__((always_inline))
#define FB_UNROLL _Pragma("GCC unroll 16")

FB_INLINE Vec load(const void* from) {
    Vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

FB_INLINE void store(void* to, Vec value) { memcpy(to, &value, sizeof value); }

FB_INLINE Vec splat(float value) { return (Vec)(IntVec{} + (int32_t)bits_of(value)); }

FB_INLINE Vec splat_unit(uint32_t unit) { return (Vec)(IntVec{} + (int32_t)unit); }

// a * b + c, rounded once where the level has such an instruction.
FB_INLINE Vec madd(Vec a, Vec b, Vec c) {
#if FB_AVX512
    return _mm512_fmadd_ps(a, b, c);
#elif FB_AVX2
    return _mm256_fmadd_ps(a, b, c);
#elif FB_NEON
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

FB_INLINE Vec larger(Vec a, Vec b) {
#if FB_AVX512
    return _mm512_max_ps(a, b);
#elif FB_AVX2
    return _mm256_max_ps(a, b);
#elif FB_NEON
    return vmaxq_f32(a, b);
#else
    return a > b ? a : b;
#endif
}

FB_INLINE float largest(Vec value) {
#if FB_AVX512
    return _mm512_reduce_max_ps(value);
#else
    float top = value[0];
    for (int64_t i = 1; i < lanes; i++) top = value[i] > top ? value[i] : top;
    return top;
#endif
}

FB_INLINE float total(Vec value) {
    float sum = 0;
    for (int64_t i = 0; i < lanes; i++) sum += value[i];
    return sum;
}

// The first `count` lanes of a vector, zero in the others.
FB_INLINE Vec first_lanes(int64_t count, Vec value) {
    IntVec index;
    FB_UNROLL for (int i = 0; i < lanes; i++) index[i] = i;
    const int32_t bound = count < 0 ? 0 : count > lanes ? (int32_t)lanes : (int32_t)count;
    return index < bound ? value : Vec{};
}

// 2^x for x <= 127, within 1.5e-7 of relative error; 2^0 = 1 exactly; 0 for -inf, and below 2^-126 where the level has
// no scaling instruction. The polynomial is the minimax one of degree 5 for 2^f, 0 <= f < 1, that passes through 1.
FB_INLINE Vec exp2(Vec x) {
#if FB_AVX512
    const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    const Vec bounded = larger(x, splat(-127.0f));
    IntVec n = __builtin_convertvector(bounded, IntVec);
    n += __builtin_convertvector(n, Vec) > bounded;  // true is -1: truncation becomes floor
    const Vec f = bounded - __builtin_convertvector(n, Vec);
#endif
    Vec p = madd(splat(0.00186713005f), f, splat(0.00901703071f));
    p = madd(p, f, splat(0.0557999127f));
    p = madd(p, f, splat(0.240164444f));
    p = madd(p, f, splat(0.693151295f));
    p = madd(p, f, splat(1.0f));
#if FB_AVX512
    return _mm512_scalef_ps(p, x);
#else
    const Vec scaled = (Vec)((IntVec)p + (n << 23));
    return x < splat(-126.0f) ? Vec{} : scaled;
#endif
}

// Units of one fp32.
struct Single {
    static constexpr int64_t group = 1;
    FB_INLINE Vec accumulate(Vec c, Vec a, Vec b) { return madd(a, b, c); }

    // One row of a left operand.
    FB_INLINE void store_row(uint32_t* to, Vec value) { store(to, value); }

    // Two rows, `ld` apart, of a matrix that will be summed over its rows (`columns`) and over its columns (`rows`).
    FB_INLINE void store_columns(uint32_t* columns, int64_t ld, Vec first, Vec second) {
        store(columns, first);
        store(columns + ld, second);
    }
    FB_INLINE void store_both(uint32_t* columns, uint32_t*, int64_t ld, Vec first, Vec second) {
        store_columns(columns, ld, first, second);
    }
};

#if FB_AVX512BF16
// Units of two bf16. Products are exact in fp32 and summed there; subnormals count as zero.
struct Pairs {
    static constexpr int64_t group = 2;
    FB_INLINE Vec accumulate(Vec c, Vec a, Vec b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

    FB_INLINE void store_row(uint32_t* to, Vec value) {
        _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(value));
    }
    FB_INLINE __m512i interleave(__m256i first, __m256i second) {
        return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
    }
    FB_INLINE void store_columns(uint32_t* columns, int64_t, Vec first, Vec second) {
        _mm512_storeu_si512(columns,
                            interleave((__m256i)_mm512_cvtneps_pbh(first), (__m256i)_mm512_cvtneps_pbh(second)));
    }
    // `ld` counts columns: rows of units are ld / 2 apart.
    FB_INLINE void store_both(uint32_t* columns, uint32_t* rows, int64_t ld, Vec first, Vec second) {
        const __m256i low = (__m256i)_mm512_cvtneps_pbh(first), high = (__m256i)_mm512_cvtneps_pbh(second);
        _mm256_storeu_si256((__m256i*)rows, low);
        _mm256_storeu_si256((__m256i*)(rows + ld / 2), high);
        _mm512_storeu_si512(columns, interleave(low, high));
    }
    // [rows] natural rows of `ld` units -> [rows / 2] rows of `width` units, each unit of one column.
    static void pair_rows(const uint32_t* from, int64_t ld, int64_t rows, int64_t width, uint32_t* to) {
        for (int64_t r = 0; r < rows; r += 2, from += 2 * ld, to += width) {
            for (int64_t j = 0; j < width; j += lanes) {
                const __m256i first = _mm256_loadu_si256((const __m256i*)(from + j / 2));
                const __m256i second = _mm256_loadu_si256((const __m256i*)(from + ld + j / 2));
                _mm512_storeu_si512(to + j, interleave(first, second));
            }
        }
    }
};
#endif

// C[r][j] += sum over k < steps of A * B; strides in units, b_step between the rows of B.
template <class Product, int R, int N>
FB_INLINE void multiply(Vec (&c)[R][N], int64_t steps, const uint32_t* a, int64_t a_row, int64_t a_step,
                        const uint32_t* b, int64_t b_step) {
    for (int64_t k = 0; k < steps; k++, a += a_step, b += b_step) {
        Vec right[N];
        FB_UNROLL for (int j = 0; j < N; j++) right[j] = load(b + j * lanes);
        FB_UNROLL for (int r = 0; r < R; r++) {
            const Vec left = splat_unit(a[r * a_row]);
            FB_UNROLL for (int j = 0; j < N; j++) c[r][j] = Product::accumulate(c[r][j], left, right[j]);
        }
    }
}

// Calls body(r, j) for every register of a tile.
template <int N, class Body>
FB_INLINE void each(Body body) {
    FB_UNROLL for (int r = 0; r < tile_rows; r++) { FB_UNROLL for (int j = 0; j < N; j++) body(r, j); }
}

template <int N>
FB_INLINE void clear(Vec (&c)[tile_rows][N]) {
    each<N>([&](int r, int j) { c[r][j] = Vec{}; });
}

template <int N>
struct Width {
    static constexpr int value = N;
};

// Calls body(offset, Width<N>) over `columns`, a multiple of lanes, in pieces of N <= tile_columns registers.
template <class Body>
FB_INLINE void by_width(int64_t columns, Body body) {
    int64_t j = 0;
    for (; j + tile_columns * lanes <= columns; j += tile_columns * lanes) body(j, Width<tile_columns>());
    switch ((columns - j) / lanes) {
        case 1:
            return body(j, Width<1>());
        case 2:
            if constexpr (tile_columns > 2) return body(j, Width<2>());
            break;
        case 3:
            if constexpr (tile_columns > 2) return body(j, Width<3>());
    }
}

// C += A * B in memory: 4 rows of `columns` fp32, `ld` apart.
template <class Product>
static void accumulate_rows(float* c, int64_t ld, int64_t columns, int64_t steps, const uint32_t* a, int64_t a_row,
                            int64_t a_step, const uint32_t* b, int64_t b_step) {
    by_width(columns, [&](int64_t offset, auto width) {
        constexpr int N = decltype(width)::value;
        Vec sum[tile_rows][N];
        each<N>([&](int r, int j) { sum[r][j] = load(c + r * ld + offset + j * lanes); });
        multiply<Product>(sum, steps, a, a_row, a_step, b + offset, b_step);
        each<N>([&](int r, int j) { store(c + r * ld + offset + j * lanes, sum[r][j]); });
    });
}

// [rows][columns] units, `ld` apart -> [columns][rows], `to_ld` apart; both sizes multiples of lanes.
static void transpose(const uint32_t* from, int64_t ld, int64_t rows, int64_t columns, uint32_t* to, int64_t to_ld) {
    for (int64_t r = 0; r < rows; r += lanes) {
        for (int64_t c = 0; c < columns; c += lanes) {
            const uint32_t* source = from + r * ld + c;
            uint32_t* target = to + c * to_ld + r;
#if FB_AVX512
            __m512i x[16], y[16];
            FB_UNROLL for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(source + i * ld);
            FB_UNROLL for (int i = 0; i < 16; i += 2) {
                y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
                y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
            }
            FB_UNROLL for (int i = 0; i < 16; i += 4) {
                FB_UNROLL for (int h = 0; h < 2; h++) {
                    x[i + 2 * h] = _mm512_unpacklo_epi64(y[i + h], y[i + h + 2]);
                    x[i + 2 * h + 1] = _mm512_unpackhi_epi64(y[i + h], y[i + h + 2]);
                }
            }
            FB_UNROLL for (int i = 0; i < 4; i++) {
                y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
                y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
                y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
                y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
            }
            FB_UNROLL for (int i = 0; i < 4; i++) {
                _mm512_storeu_si512(target + i * to_ld, _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88));
                _mm512_storeu_si512(target + (i + 4) * to_ld, _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88));
                _mm512_storeu_si512(target + (i + 8) * to_ld, _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd));
                _mm512_storeu_si512(target + (i + 12) * to_ld, _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd));
            }
#else
            for (int64_t i = 0; i < lanes; i++)
                for (int64_t j = 0; j < lanes; j++) target[j * to_ld + i] = source[i * ld + j];
#endif
        }
    }
}

FB_END
