// A few rows times a weight that is not quantized: an output head, for the next token of each row of a batch.
//
//     y[m, n] = sum_k x[m, k] w[n, k] + bias[n]        summed in fp32, rounded once
//
// The head is the largest matrix of a small model and stays in 16 bits, so that one token costs reading all of it. A
// general matrix product packs its operands first, which for a few rows costs more than the product: this reads each
// weight once, in order, four rows of it side by side, and keeps their sums in registers. Four rows of x at a time; for
// more, the four rows of the weight come out of the first-level cache again.
//
// Cost: N K weights read, 2 M N K flops; bound by memory up to some eight rows.

#include "../lanes.h"
#include "../rows.h"

FB_BEGIN

namespace {

constexpr int kRows = 4;    // of the weight, side by side
constexpr int kTokens = 4;  // rows of x, at most

template <class T>
struct Reader {  // how many numbers are taken at once, and their products summed
    using Part = Lanes::Floats;
    static constexpr int step = Lanes::lanes;
    static Part load(const T* from) {
        float wide[step];
        for (int i = 0; i < step; i++) wide[i] = to_float(from[i]);
        return Lanes::load(wide);
    }
    static Lanes::Floats add(Lanes::Floats sum, Part a, Part b) { return Lanes::fma(a, b, sum); }
};

template <>
struct Reader<float> {
    using Part = Lanes::Floats;
    static constexpr int step = Lanes::lanes;
    static Part load(const float* from) { return Lanes::load(from); }
    static Lanes::Floats add(Lanes::Floats sum, Part a, Part b) { return Lanes::fma(a, b, sum); }
};

#if FB_AVX512
template <>
struct Reader<f16> {
    using Part = __m512;
    static constexpr int step = 16;
    static Part load(const f16* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
    static __m512 add(__m512 sum, Part a, Part b) { return _mm512_fmadd_ps(a, b, sum); }
};
#elif FB_AVX2
template <>
struct Reader<f16> {
    using Part = __m256;
    static constexpr int step = 8;
    static Part load(const f16* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
    static __m256 add(__m256 sum, Part a, Part b) { return _mm256_fmadd_ps(a, b, sum); }
};
#endif

#if FB_AVX512BF16
template <>
struct Reader<bf16> {
    using Part = __m512i;
    static constexpr int step = 32;
    static Part load(const bf16* from) { return _mm512_loadu_si512(from); }
    static __m512 add(__m512 sum, Part a, Part b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#elif FB_AVX512
template <>
struct Reader<bf16> {
    using Part = __m512;
    static constexpr int step = 16;
    static Part load(const bf16* from) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static __m512 add(__m512 sum, Part a, Part b) { return _mm512_fmadd_ps(a, b, sum); }
};
#elif FB_AVX2
template <>
struct Reader<bf16> {
    using Part = __m256;
    static constexpr int step = 8;
    static Part load(const bf16* from) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static __m256 add(__m256 sum, Part a, Part b) { return _mm256_fmadd_ps(a, b, sum); }
};
#endif

// y[0..M, 0..rows] of `rows` (1 to kRows) rows of the weight; those that are missing are read from the last.
template <class T, int M>
void multiply(const T* x, const T* weight, int64_t n, int64_t k, int rows, const T* bias, T* y) {
    using Read = Reader<T>;
    const T* w[kRows];
    for (int r = 0; r < kRows; r++) w[r] = weight + (r < rows ? r : rows - 1) * k;
    Lanes::Floats sums[M][kRows];
    for (int m = 0; m < M; m++)
        for (int r = 0; r < kRows; r++) sums[m][r] = Lanes::zero();
    int64_t i = 0;
    for (; i + Read::step <= k; i += Read::step) {
        typename Read::Part part[kRows];
        for (int r = 0; r < kRows; r++) part[r] = Read::load(w[r] + i);
        for (int m = 0; m < M; m++) {
            const typename Read::Part given = Read::load(x + m * k + i);
            for (int r = 0; r < kRows; r++) sums[m][r] = Read::add(sums[m][r], part[r], given);
        }
    }
    for (int m = 0; m < M; m++) {
        float total[kRows];
        Lanes::sum(sums[m], total);
        for (int r = 0; r < rows; r++) {
            for (int64_t j = i; j < k; j++) total[r] += to_float(w[r][j]) * to_float(x[m * k + j]);
            from_float(total[r] + (bias ? to_float(bias[r]) : 0.0f), y + m * n + r);
        }
    }
}

template <class T>
int32_t run(const T* x, const T* weight, int64_t m, int64_t n, int64_t k, const T* bias, T* y, int32_t threads) {
    const int64_t groups = (n + kRows - 1) / kRows;
#pragma omp parallel for schedule(static) num_threads(worthwhile(threads, n* k))
    for (int64_t group = 0; group < groups; group++) {
        const int64_t first = group * kRows;
        const int rows = (int)(n - first < kRows ? n - first : kRows);
        const T* shift = bias ? bias + first : nullptr;
        for (int64_t token = 0; token < m; token += kTokens) {
            const T* given = x + token * k;
            T* out = y + token * n + first;
            switch (m - token < kTokens ? (int)(m - token) : kTokens) {
                case 1:
                    multiply<T, 1>(given, weight + first * k, n, k, rows, shift, out);
                    break;
                case 2:
                    multiply<T, 2>(given, weight + first * k, n, k, rows, shift, out);
                    break;
                case 3:
                    multiply<T, 3>(given, weight + first * k, n, k, rows, shift, out);
                    break;
                default:
                    multiply<T, 4>(given, weight + first * k, n, k, rows, shift, out);
                    break;
            }
        }
    }
    return FB_OK;
}

}  // namespace

int32_t dense(const void* x, const void* weight, int32_t dtype, int64_t m, int64_t n, int64_t k, const void* bias,
              void* y, int32_t threads) {
    switch (dtype) {
        case FB_F32:
            return run((const float*)x, (const float*)weight, m, n, k, (const float*)bias, (float*)y, threads);
        case FB_F16:
            return run((const f16*)x, (const f16*)weight, m, n, k, (const f16*)bias, (f16*)y, threads);
        case FB_BF16:
            return run((const bf16*)x, (const bf16*)weight, m, n, k, (const bf16*)bias, (bf16*)y, threads);
        default:
            return FB_BAD_ARGUMENT;
    }
}

FB_END
