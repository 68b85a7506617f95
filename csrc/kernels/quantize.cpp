// Quantize: numbers to 4-bit codes and one scale per block. fourbit.h has the equations.
//
// Each block is read twice: for its largest magnitude, which for finite numbers is an integer maximum over the bits
// without the sign, and for the codes. The rank of a value among the 15 thresholds is a binary search without branches:
// four steps, each a permutation of a table of 1, 2, 4 or 8 thresholds by the rank so far, a comparison, and
// rank = 2 rank + (threshold < value). Ranks become codes by a byte shuffle, because FP4's codes are not in order.
//
// Cost: 4 n (fp32) or 2 n bytes read, n/2 + 4 n/block_size written; bound by arithmetic, not by memory.

#include "../level.h"

FB_BEGIN

namespace {

constexpr float smallest_absmax = 1e-38f;
constexpr int64_t elements_per_task = 16384;  // a multiple of every block size
constexpr int group = 32;                     // every block size is a multiple of it

// The thresholds in the order of the search: tree[2^s - 1 + r] is what step s compares with after rank r so far.
struct Codebook {
    float tree[16];
    uint8_t codes[16];
};

Codebook make_codebook(const float* thresholds, const uint8_t* codes) {
    Codebook book;
    for (int step = 0; step < 4; ++step) {
        const int width = 16 >> step;
        for (int rank = 0; rank < 1 << step; ++rank) {
            book.tree[(1 << step) - 1 + rank] = thresholds[rank * width + width / 2 - 1];
        }
    }
    book.tree[15] = 0;
    memcpy(book.codes, codes, 16);
    return book;
}

uint8_t code_of(float value, const Codebook& book) {
    int rank = 0;
    for (int step = 0; step < 4; ++step) rank = 2 * rank + (book.tree[(1 << step) - 1 + rank] < value);
    return book.codes[rank];
}

float clamp(float value) { return value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value; }

uint32_t magnitude_bits(float value) { return bits_of(value) & 0x7fffffffu; }

// The largest magnitude of n numbers, and whether one of them is NaN or infinite.
struct Largest {
    float absmax;
    bool finite;
};

Largest largest_of(const float* x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t bits = (int32_t)magnitude_bits(x[i]);
        most = bits > most ? bits : most;
    }
    return {float_of((uint32_t)most), most < 0x7f800000};
}

template <typename Half>
Largest largest_of(const Half* x, int64_t n, int16_t infinity) {
    int16_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int16_t bits = (int16_t)(x[i].bits & 0x7fff);
        most = bits > most ? bits : most;
    }
    return {to_float(Half{(uint16_t)most}), most < infinity};
}

Largest largest_of(const bf16* x, int64_t n) { return largest_of(x, n, 0x7f80); }

Largest largest_of(const f16* x, int64_t n) { return largest_of(x, n, 0x7c00); }

// 32 numbers, scaled, to 16 packed bytes.
#if FB_AVX512

__m512 load16(const float* x) { return _mm512_loadu_ps(x); }

__m512 load16(const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

__m512 load16(const f16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }

__m128i ranks(__m512 value, const Codebook& book) {
    value = _mm512_min_ps(_mm512_max_ps(value, _mm512_set1_ps(-1.0f)), _mm512_set1_ps(1.0f));
    const __m512 tree = _mm512_loadu_ps(book.tree);
    // node: the tree's index; the children of node i are 2 i + 1 and 2 i + 2.
    const __m512i one = _mm512_set1_epi32(1);
    __m512i node = _mm512_setzero_si512();
    for (int step = 0; step < 4; ++step) {
        const __mmask16 above = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(node, tree), value, _CMP_LT_OQ);
        node = _mm512_add_epi32(_mm512_add_epi32(node, node), one);
        node = _mm512_mask_add_epi32(node, above, node, one);
    }
    return _mm512_cvtepi32_epi8(_mm512_sub_epi32(node, _mm512_set1_epi32(15)));
}

template <typename T>
void pack_group(const T* x, float scale, const Codebook& book, uint8_t* packed) {
    const __m512 by = _mm512_set1_ps(scale);
    const __m128i low = ranks(_mm512_mul_ps(load16(x), by), book);
    const __m128i high = ranks(_mm512_mul_ps(load16(x + 16), by), book);
    const __m256i codes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)book.codes)),
                                              _mm256_set_m128i(high, low));
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // 16 even + odd
    _mm_storeu_si128((__m128i*)packed, _mm256_cvtepi16_epi8(pairs));
}

#elif FB_AVX2

__m256 load8(const float* x) { return _mm256_loadu_ps(x); }

__m256 load8(const bf16* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
}

__m256 load8(const f16* x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)); }

__m256i ranks(__m256 value, const Codebook& book) {
    value = _mm256_min_ps(_mm256_max_ps(value, _mm256_set1_ps(-1.0f)), _mm256_set1_ps(1.0f));
    // A permutation has 8 entries, so each step has its own table: the tree from that step's first node on.
    __m256i rank = _mm256_castps_si256(_mm256_cmp_ps(_mm256_set1_ps(book.tree[0]), value, _CMP_LT_OQ));
    rank = _mm256_sub_epi32(_mm256_setzero_si256(), rank);
    for (int step = 1; step < 4; ++step) {
        const __m256 table = _mm256_loadu_ps(book.tree + (1 << step) - 1);
        const __m256 above = _mm256_cmp_ps(_mm256_permutevar8x32_ps(table, rank), value, _CMP_LT_OQ);
        rank = _mm256_sub_epi32(_mm256_add_epi32(rank, rank), _mm256_castps_si256(above));
    }
    return rank;
}

template <typename T>
void pack_group(const T* x, float scale, const Codebook& book, uint8_t* packed) {
    const __m256 by = _mm256_set1_ps(scale);
    __m256i rank[4];
    for (int i = 0; i < 4; ++i) rank[i] = ranks(_mm256_mul_ps(load8(x + 8 * i), by), book);
    // The packs work within 128-bit halves; the permutation puts the groups of four back in order.
    const __m256i words = _mm256_packs_epi32(rank[0], rank[1]);
    const __m256i bytes = _mm256_packus_epi16(words, _mm256_packs_epi32(rank[2], rank[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i codes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)book.codes)),
                                              _mm256_permutevar8x32_epi32(bytes, order));
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // 16 even + odd
    const __m128i result = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128((__m128i*)packed, result);
}

#else

template <typename T>
void pack_group(const T* x, float scale, const Codebook& book, uint8_t* packed) {
    // Counting the thresholds below, level by level of the loop, is what a compiler vectorises.
    float value[group];
    int32_t rank[group] = {};
    for (int i = 0; i < group; ++i) value[i] = clamp(to_float(x[i]) * scale);
    for (int t = 0; t < 15; ++t) {
        for (int i = 0; i < group; ++i) rank[i] += book.tree[t] < value[i];
    }
    for (int i = 0; i < group / 2; ++i) {
        packed[i] = (uint8_t)(book.codes[rank[2 * i]] << 4 | book.codes[rank[2 * i + 1]]);
    }
}

#endif

template <typename T>
bool quantize_block(const T* x, int64_t block_size, const Codebook& book, uint8_t* packed, float* absmax) {
    const Largest largest = largest_of(x, block_size);
    *absmax = largest.absmax;
    const float scale = 1.0f / (largest.absmax < smallest_absmax ? smallest_absmax : largest.absmax);
    for (int64_t i = 0; i < block_size; i += group) pack_group(x + i, scale, book, packed + i / 2);
    return largest.finite;
}

template <typename T>
bool quantize_tail(const T* x, int64_t n, const Codebook& book, uint8_t* packed, float* absmax) {
    const Largest largest = largest_of(x, n);
    *absmax = largest.absmax < smallest_absmax ? smallest_absmax : largest.absmax;
    for (int64_t i = 0; i < n; i += 2) {
        const uint8_t even = code_of(clamp(to_float(x[i]) / *absmax), book);
        const uint8_t odd = code_of(i + 1 < n ? clamp(to_float(x[i + 1]) / *absmax) : 0.0f, book);
        packed[i / 2] = (uint8_t)(even << 4 | odd);
    }
    return largest.finite;
}

template <typename T>
int32_t quantize_all(const T* weight, int64_t n, int64_t block_size, const Codebook& book, uint8_t* packed,
                     float* absmax, int32_t threads) {
    const int64_t tasks = (n + elements_per_task - 1) / elements_per_task;
    if (threads > tasks) threads = (int32_t)(tasks > 0 ? tasks : 1);
    bool finite = true;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : finite)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t begin = task * elements_per_task;
        const int64_t end = begin + elements_per_task < n ? begin + elements_per_task : n;
        for (int64_t i = begin; i < end; i += block_size) {
            const bool whole = i + block_size <= n;
            finite &= whole ? quantize_block(weight + i, block_size, book, packed + i / 2, absmax + i / block_size)
                            : quantize_tail(weight + i, n - i, book, packed + i / 2, absmax + i / block_size);
        }
    }
    return finite ? FB_OK : FB_NON_FINITE;
}

}  // namespace

int32_t quantize(const void* weight, int32_t dtype, int64_t n, int64_t block_size, const float* thresholds,
                 const uint8_t* codes, uint8_t* packed, float* absmax, int32_t threads) {
    if (n < 0 || block_size < group || block_size > 4096 || (block_size & (block_size - 1))) return FB_BAD_ARGUMENT;
    const Codebook book = make_codebook(thresholds, codes);
    switch (dtype) {
        case FB_F32:
            return quantize_all((const float*)weight, n, block_size, book, packed, absmax, threads);
        case FB_F16:
            return quantize_all((const f16*)weight, n, block_size, book, packed, absmax, threads);
        case FB_BF16:
            return quantize_all((const bf16*)weight, n, block_size, book, packed, absmax, threads);
        default:
            return FB_BAD_ARGUMENT;
    }
}

FB_END
