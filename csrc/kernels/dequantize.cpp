// Dequantize: 4-bit codes and scales to numbers. fourbit.h has the equation.
//
// A block has only 16 possible values. They are computed and rounded once, and each code picks one by a permutation:
// rounding costs 16 elements per block, whatever its size, and a vector of 32 bf16 takes three instructions with
// AVX-512 VBMI: spread 2 bytes over 8, move each nibble to its word, vpermw. AVX2 and NEON look up single bytes, so
// there the table is split into byte planes and the planes of the result are interleaved.
//
// Cost: n/2 + 4 n/block_size bytes read, 2 n or 4 n written; bound by memory. An ordinary store first reads the line it
// replaces, so an output that no cache can hold is written past them.

#include "../weight.h"

FB_BEGIN

namespace {

constexpr int64_t elements_per_task = 32768;  // a multiple of every block size
constexpr int group = 32;                     // elements decoded at once; every block size is a multiple of it

#if FB_AVX512

template <bool stream>
void put(void* out, __m512i value) {
    if (stream) {
        _mm512_stream_si512((__m512i*)out, value);
    } else {
        _mm512_storeu_si512(out, value);
    }
}

__m256i rounded(__m512 value, bf16) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

__m256i rounded(__m512 value, f16) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

// The 16 values of a block, twice, because vpermw picks from 32.
template <typename Half>
struct Table {
    __m512i values;

    Table(const float* levels, float scale) {
        const __m512 products = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
        values = _mm512_broadcast_i64x4(rounded(products, Half()));
    }

    template <bool stream>
    void decode(const uint8_t* packed, Half* out) const {
        // Only the low five bits of an index count, and the fifth does not matter: no masks.
#if FB_AVX512BF16
        const __m512i pairs = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)packed));
        const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0008000c00000004), pairs);
#else
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)packed));
        const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
#endif
        put<stream>(out, _mm512_permutexvar_epi16(codes, values));
    }
};

template <>
struct Table<float> {
    __m512 values;

    Table(const float* levels, float scale) { values = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale)); }

    template <bool stream>
    void decode(const uint8_t* packed, float* out) const {
        for (int half = 0; half < 2; ++half) {
            const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(packed + 8 * half)));
            const __m512i codes = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
            put<stream>(out + 16 * half, _mm512_castps_si512(_mm512_permutexvar_ps(codes, values)));
        }
    }
};

#elif FB_AVX2

template <bool stream>
void put(void* out, __m256i value) {
    if (stream) {
        _mm256_stream_si256((__m256i*)out, value);
    } else {
        _mm256_storeu_si256((__m256i*)out, value);
    }
}

__m256i rounded_bits(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
}

__m256i rounded(__m256 low, __m256 high, bf16) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded_bits(low), rounded_bits(high)), 0xd8);
}

__m256i rounded(__m256 low, __m256 high, f16) {
    return _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
}

// 32 codes, one per byte, in order.
__m256i codes32(const uint8_t* packed) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)packed), nibble = _mm_set1_epi8(0x0f);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), odd = _mm_and_si128(bytes, nibble);
    return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

// The low and the high bytes of the 16 values, each plane in both halves of a vector.
template <typename Half>
struct Table {
    __m256i low, high;

    Table(const float* levels, float scale) {
        const __m256 by = _mm256_set1_ps(scale);
        const __m256i words =
            rounded(_mm256_mul_ps(_mm256_loadu_ps(levels), by), _mm256_mul_ps(_mm256_loadu_ps(levels + 8), by), Half());
        const __m256i mixed =
            _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(words, 8));
        low = _mm256_permute4x64_epi64(mixed, 0x88);
        high = _mm256_permute4x64_epi64(mixed, 0xdd);
    }

    template <bool stream>
    void decode(const uint8_t* packed, Half* out) const {
        const __m256i codes = codes32(packed);
        const __m256i lows = _mm256_shuffle_epi8(low, codes), highs = _mm256_shuffle_epi8(high, codes);
        const __m256i first = _mm256_unpacklo_epi8(lows, highs), second = _mm256_unpackhi_epi8(lows, highs);
        put<stream>(out, _mm256_permute2x128_si256(first, second, 0x20));
        put<stream>(out + 16, _mm256_permute2x128_si256(first, second, 0x31));
    }
};

template <>
struct Table<float> {
    __m256 low, high;

    Table(const float* levels, float scale) {
        low = _mm256_mul_ps(_mm256_loadu_ps(levels), _mm256_set1_ps(scale));
        high = _mm256_mul_ps(_mm256_loadu_ps(levels + 8), _mm256_set1_ps(scale));
    }

    template <bool stream>
    void decode(const uint8_t* packed, float* out) const {
        uint8_t codes[group];
        _mm256_storeu_si256((__m256i*)codes, codes32(packed));
        for (int i = 0; i < group; i += 8) {
            const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + i)));
            const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
            const __m256 value =
                _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), upper);
            put<stream>(out + i, _mm256_castps_si256(value));
        }
    }
};

#else

template <typename T>
struct Table {
    T values[16];

    Table(const float* levels, float scale) {
        for (int code = 0; code < 16; ++code) from_float(levels[code] * scale, &values[code]);
    }

    template <bool stream>
    void decode(const uint8_t* packed, T* out) const {
        decode(packed, out, sizeof(T));
    }

#if FB_NEON
    // vld2 and vld4 split the table into its byte planes, vst2 and vst4 put the planes of the result together.
    void decode(const uint8_t* packed, T* out, int bytes_per_value) const {
        const uint8x16_t bytes = vld1q_u8(packed);
        const uint8x16_t even = vshrq_n_u8(bytes, 4), odd = vandq_u8(bytes, vdupq_n_u8(0x0f));
        const uint8x16_t codes[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
        for (int half = 0; half < 2; ++half) {
            uint8_t* to = (uint8_t*)(out + 16 * half);
            if (bytes_per_value == 2) {
                uint8x16x2_t plane = vld2q_u8((const uint8_t*)values);
                for (int i = 0; i < 2; ++i) plane.val[i] = vqtbl1q_u8(plane.val[i], codes[half]);
                vst2q_u8(to, plane);
            } else {
                uint8x16x4_t plane = vld4q_u8((const uint8_t*)values);
                for (int i = 0; i < 4; ++i) plane.val[i] = vqtbl1q_u8(plane.val[i], codes[half]);
                vst4q_u8(to, plane);
            }
        }
    }
#else
    void decode(const uint8_t* packed, T* out, int) const {
        for (int i = 0; i < group / 2; ++i) {
            out[2 * i] = values[packed[i] >> 4];
            out[2 * i + 1] = values[packed[i] & 0x0f];
        }
    }
#endif
};

#endif

// Elements begin, ..., end - 1; begin is a multiple of the block size.
template <bool stream, typename T>
void decode_range(const FbWeight& weight, int64_t begin, int64_t end, T* out) {
    const int64_t block_size = weight.block_size;
    for (int64_t first = begin; first < end; first += block_size) {
        const int64_t last = first + block_size < end ? first + block_size : end;
        const float scale = scale_of(weight, first / block_size);
        const Table<T> table(weight.levels, scale);
        const uint8_t* packed = weight.packed;
        int64_t i = first;
        for (; i + group <= last; i += group) table.template decode<stream>(packed + i / 2, out + (i - begin));
        for (; i < last; ++i) {
            const int code = i & 1 ? packed[i / 2] & 0x0f : packed[i / 2] >> 4;
            from_float(weight.levels[code] * scale, out + (i - begin));
        }
    }
#if FB_AVX2
    if (stream) _mm_sfence();
#endif
}

template <typename T>
int32_t decode_all(const FbWeight& weight, int64_t first, int64_t count, T* out, int32_t threads) {
    const int64_t tasks = (count + elements_per_task - 1) / elements_per_task;
    if (threads > tasks) threads = (int32_t)(tasks > 0 ? tasks : 1);
    const bool stream = count * (int64_t)sizeof(T) >= stream_bytes && (uintptr_t)out % 64 == 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t from = task * elements_per_task;
        const int64_t to = from + elements_per_task < count ? from + elements_per_task : count;
        if (stream) {
            decode_range<true>(weight, first + from, first + to, out + from);
        } else {
            decode_range<false>(weight, first + from, first + to, out + from);
        }
    }
    return FB_OK;
}

}  // namespace

int32_t dequantize(const FbWeight* weight, int64_t first, int64_t count, void* out, int32_t dtype, int32_t threads) {
    if (!is_valid(*weight) || first < 0 || count < 0 || first % weight->block_size != 0 ||
        first + count > weight->rows * weight->cols) {
        return FB_BAD_ARGUMENT;
    }
    switch (dtype) {
        case FB_F32:
            return decode_all(*weight, first, count, (float*)out, threads);
        case FB_F16:
            return decode_all(*weight, first, count, (f16*)out, threads);
        case FB_BF16:
            return decode_all(*weight, first, count, (bf16*)out, threads);
        default:
            return FB_BAD_ARGUMENT;
    }
}

FB_END
