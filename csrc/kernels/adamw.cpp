// A step of AdamW with moments in 8 bits. fourbit.h has the equations.
//
// A block of 256 elements is decoded, updated and encoded in the first-level cache. Its codes are found without a
// search, by the upper bits of the number (formats/dynamic8.py); of the tables of 64 KiB only the lines of numbers
// that occur are touched, about 24 powers of two with 128 entries each.
//
// Cost: per element 4 bytes of moments, and 3 times the parameter's size, moved; four look-ups.

#include "../rows.h"

FB_BEGIN

namespace {

constexpr int64_t kStateBlock = 256;

// Through integers, whose order is that of magnitudes, with NaN above infinity: one in a block shows in its scale.
inline float largest_of(const float* x, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return float_of(largest);
}

inline void decode(const uint8_t* codes, const float* levels, float scale, float* x, int64_t n) {
    int64_t i = 0;
#if FB_AVX512
    const __m512 scales = _mm512_set1_ps(scale);
    for (; i + 16 <= n; i += 16) {
        const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
        _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_i32gather_ps(code, levels, 4), scales));
    }
#elif FB_AVX2
    const __m256 scales = _mm256_set1_ps(scale);
    for (; i + 8 <= n; i += 8) {
        const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + i)));
        _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_i32gather_ps(levels, code, 4), scales));
    }
#endif
    for (; i < n; i++) x[i] = levels[codes[i]] * scale;
}

void encode(float* x, int64_t n, const uint8_t* first, const float* middle, uint8_t* codes, float* scale) {
    *scale = largest_of(x, n);
    const float divisor = *scale == 0 ? 1.0f : *scale;
    int32_t code[kStateBlock];
    for (int64_t i = 0; i < n; i++) x[i] /= divisor;
    // Bytes are not gathered, and four bytes from the last ones on would be read past the end.
    for (int64_t i = 0; i < n; i++) code[i] = first[bits_of(x[i]) >> 16];
    int64_t i = 0;
#if FB_AVX512
    for (; i + 16 <= n; i += 16) {
        const __m512i lower = _mm512_loadu_si512(code + i);
        const __m512 between = _mm512_i32gather_ps(lower, middle, 4);
        const __mmask16 above = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), between, _CMP_GT_OQ);
        const __m512i nearest = _mm512_mask_add_epi32(lower, above, lower, _mm512_set1_epi32(1));
        _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtepi32_epi8(nearest));
    }
#endif
    for (; i < n; i++) codes[i] = (uint8_t)(code[i] + (x[i] > middle[code[i]]));
}

template <class T>
void update_block(const FbAdamw& a, T* param, const T* grad, int64_t first, int64_t n) {
    float m[kStateBlock], v[kStateBlock], g[kStateBlock], p[kStateBlock];
    float *m_scale = a.exp_avg_absmax + first / kStateBlock, *v_scale = a.exp_avg_sq_absmax + first / kStateBlock;
    decode(a.exp_avg + first, a.signed_levels, *m_scale, m, n);
    decode(a.exp_avg_sq + first, a.unsigned_levels, *v_scale, v, n);
    widen(grad, g, n);
    widen((const T*)param, p, n);
    for (int64_t i = 0; i < n; i++) {
        m[i] = m[i] * a.beta1 + g[i] * a.rest1;
        v[i] = v[i] * a.beta2 + g[i] * g[i] * a.rest2;
        p[i] = p[i] * a.kept + m[i] / (sqrtf(v[i]) / a.correction + a.eps) * a.step_size;
    }
    narrow((const float*)p, param, n);
    encode(m, n, a.signed_first, a.signed_middle, a.exp_avg + first, m_scale);
    encode(v, n, a.unsigned_first, a.unsigned_middle, a.exp_avg_sq + first, v_scale);
}

// The blocks of all segments are numbered through and shared evenly; a thread finds its first by counting.
template <class T>
int32_t update(const FbAdamw& a, int32_t threads) {
    int64_t blocks = 0;
    for (int64_t s = 0; s < a.segments; s++) blocks += (a.counts[s] + kStateBlock - 1) / kStateBlock;
    const int32_t parts = worthwhile(threads, blocks * kStateBlock);
#pragma omp parallel for schedule(static) num_threads(parts)
    for (int32_t part = 0; part < parts; part++) {
        const int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
        int64_t before = 0;
        for (int64_t s = 0; s < a.segments && before < end; s++) {
            const int64_t count = a.counts[s], own = (count + kStateBlock - 1) / kStateBlock;
            const int64_t last = smaller(own, end - before);
            for (int64_t block = begin > before ? begin - before : 0; block < last; block++) {
                const int64_t at = block * kStateBlock;
                update_block<T>(a, (T*)a.params[s] + at, (const T*)a.grads[s] + at, a.offsets[s] + at,
                                smaller(kStateBlock, count - at));
            }
            before += own;
        }
    }
    return FB_OK;
}

}  // namespace

int32_t adamw_blockwise(const FbAdamw* args, int32_t threads) {
    if (args->segments < 0) return FB_BAD_ARGUMENT;
    FB_BY_DTYPE(args->dtype, update, *args, threads)
}

FB_END
