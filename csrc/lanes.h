// A vector of fp32 numbers as wide as the level has them, for kernels written once for all levels.
//
// `Lanes` also decodes: eight 4-bit codes lie in 32 bits, so a vector of `lanes` 32-bit words holds 8 * lanes of them,
// and lane k holds the codes of elements 8 k to 8 k + 7. Taking nibble j of every lane costs a shift and a look-up; a
// kernel that puts its other operand in the same order needs nothing else.

#pragma once

#include "level.h"

FB_BEGIN

#if FB_AVX512

struct Lanes {
    using Floats = __m512;
    using Codes = __m512i;
    struct Levels {
        __m512 table;
    };
    static constexpr int lanes = 16;

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    // The sums of four vectors, each over the lanes in the same order.
    static void sum(const Floats (&a)[4], float* sums) {
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
        const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }

    static Levels levels(const float* from) { return {_mm512_loadu_ps(from)}; }
    static Codes load_codes(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static Codes next(Codes codes) { return _mm512_srli_epi32(codes, 4); }
    // Only the low four bits of an index count.
    static Floats lookup(Levels levels, Codes codes) { return _mm512_permutexvar_ps(codes, levels.table); }

    // Lane k takes element (offset + 8 k) >> shift of what it is given.
    using Spread = __m512i;
    static Spread spread(int offset, int shift) {
        const __m512i lane = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
        return _mm512_srl_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(offset)), _mm_cvtsi32_si128(shift));
    }
    static Floats pick(const float* from, Spread spread) { return _mm512_permutexvar_ps(spread, load(from)); }
};

#elif FB_AVX2

struct Lanes {
    using Floats = __m256;
    using Codes = __m256i;
    struct Levels {
        __m256 low, high;
    };
    static constexpr int lanes = 8;

    static Floats zero() { return _mm256_setzero_ps(); }
    static Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static void sum(const Floats (&a)[4], float* sums) {
        const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a[0], a[1]), _mm256_unpackhi_ps(a[0], a[1]));
        const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(a[2], a[3]), _mm256_unpackhi_ps(a[2], a[3]));
        const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
        _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
    }

    static Levels levels(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    static Codes load_codes(const uint8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
    static Codes next(Codes codes) { return _mm256_srli_epi32(codes, 4); }
    // A permutation looks at three bits of an index; the fourth, moved to the sign, chooses between two of them.
    static Floats lookup(Levels levels, Codes codes) {
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(levels.low, codes),
                                _mm256_permutevar8x32_ps(levels.high, codes), upper);
    }

    using Spread = __m256i;
    static Spread spread(int offset, int shift) {
        const __m256i lane = _mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56);
        return _mm256_srl_epi32(_mm256_add_epi32(lane, _mm256_set1_epi32(offset)), _mm_cvtsi32_si128(shift));
    }
    static Floats pick(const float* from, Spread spread) { return _mm256_permutevar8x32_ps(load(from), spread); }
};

#elif FB_NEON

struct Lanes {
    using Floats = float32x4_t;
    using Codes = uint32x4_t;
    using Levels = uint8x16x4_t;
    static constexpr int lanes = 4;

    static Floats zero() { return vdupq_n_f32(0); }
    static Floats load(const float* from) { return vld1q_f32(from); }
    static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static void sum(const Floats (&a)[4], float* sums) {
        vst1q_f32(sums, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
    }

    static Levels levels(const float* from) { return vld1q_u8_x4((const uint8_t*)from); }
    static Codes load_codes(const uint8_t* from) { return vreinterpretq_u32_u8(vld1q_u8(from)); }
    static Codes next(Codes codes) { return vshrq_n_u32(codes, 4); }
    // The table has 64 bytes; level c is bytes 4 c to 4 c + 3.
    static Floats lookup(Levels levels, Codes codes) {
        const uint32x4_t code = vandq_u32(codes, vdupq_n_u32(15));
        const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), code, 0x04040404);
        return vreinterpretq_f32_u8(vqtbl4q_u8(levels, vreinterpretq_u8_u32(bytes)));
    }

    struct Spread {
        int offset, shift;
    };
    static Spread spread(int offset, int shift) { return {offset, shift}; }
    static Floats pick(const float* from, Spread spread) {
        float lane[lanes];
        for (int k = 0; k < lanes; ++k) lane[k] = from[(spread.offset + 8 * k) >> spread.shift];
        return vld1q_f32(lane);
    }
};

#else

struct Lanes {
    static constexpr int lanes = 4;
    struct Floats {
        float lane[lanes];
    };
    struct Codes {
        uint32_t lane[lanes];
    };
    struct Levels {
        float table[16];
    };

    static Floats zero() { return {}; }
    static Floats load(const float* from) {
        Floats a;
        memcpy(a.lane, from, sizeof a.lane);
        return a;
    }
    static Floats fma(Floats a, Floats b, Floats c) {
        for (int k = 0; k < lanes; ++k) c.lane[k] += a.lane[k] * b.lane[k];
        return c;
    }
    static void sum(const Floats (&a)[4], float* sums) {
        for (int i = 0; i < 4; ++i) sums[i] = (a[i].lane[0] + a[i].lane[1]) + (a[i].lane[2] + a[i].lane[3]);
    }

    static Levels levels(const float* from) {
        Levels levels;
        memcpy(levels.table, from, sizeof levels.table);
        return levels;
    }
    static Codes load_codes(const uint8_t* from) {
        Codes codes;
        memcpy(codes.lane, from, sizeof codes.lane);  // little-endian, as every level's machine is
        return codes;
    }
    static Codes next(Codes codes) {
        for (int k = 0; k < lanes; ++k) codes.lane[k] >>= 4;
        return codes;
    }
    static Floats lookup(const Levels& levels, Codes codes) {
        Floats a;
        for (int k = 0; k < lanes; ++k) a.lane[k] = levels.table[codes.lane[k] & 15];
        return a;
    }

    struct Spread {
        int offset, shift;
    };
    static Spread spread(int offset, int shift) { return {offset, shift}; }
    static Floats pick(const float* from, Spread spread) {
        Floats a;
        for (int k = 0; k < lanes; ++k) a.lane[k] = from[(spread.offset + 8 * k) >> spread.shift];
        return a;
    }
};

#endif

FB_END
