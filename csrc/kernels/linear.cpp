// Linear: y = x W^T + bias straight from 4 bits, for few rows of x.
//
// A row of W is read once, in groups of 8 * lanes codes, and never written: a group's levels are looked up in
// registers, multiplied with several rows of x, and the sum of each lane is scaled as it is added to the total. A lane
// of a group is 8 elements of one block, so one scale per lane is exact. The codes come out of a group in the order of
// their nibbles; x is brought into that order once per call. Rows of W start at any element: K need not be a multiple
// of the block size. Where K is no multiple of 8 a row's first lane also holds the end of the row before it; x is then
// laid out once for each of the at most 8 phases, with zeros there.
//
// With AVX-512 BF16 and bf16 x, levels and x meet in vdpbf16ps, 32 products an instruction; otherwise in fp32. Where
// rows hold whole blocks of 64 or more, a register holds the 16 levels of two blocks already scaled, and the scaling of
// sums falls away.
//
// Error of y against the exact product of x with level * scale, for g = 8 * lanes:
//     |y - y*| <= (e + (K / g + 16) u) sum |x||w| + d |y*|,    u = 2^-24
// A product passes at most 8 roundings within its group, one when scaled, one for each later group of its row and 5
// between the lanes. d rounds the result (2^-8 bf16, 2^-11 fp16, u fp32) and e the levels: 0 in fp32, 2^-8 in bf16.
// That is the order of multiplying by the decoded bf16 weight, which rounds level * scale instead; so does the kernel
// with scaled levels, which sums a row in one go: (e + (K / 16 + 5) u). vdpbf16ps also takes subnormal x and weights,
// and sums below 2^-126, for zero: at most 2^-125 K scale more.
//
// Each y is summed in the same order whatever the rows of x and the threads.
//
// Cost: N K (1/2 + 4 / block_size) bytes read, 2 M N K flops. Bound by memory up to about 4 rows, then by arithmetic;
// from 8 or 9 rows on linear_many.cpp is faster.

#include "../few_rows.h"

#include <stdlib.h>

FB_BEGIN

namespace {

// How levels and x meet: `steps` vectors of levels per group, and as many of x.
struct InFloat {
    using X = float;
    using Levels = Lanes::Levels;
    using Vector = Floats;
    static constexpr int steps = 8, most_rows = 4;

    static Levels levels(const float* from) { return Lanes::levels(from); }

    static void decode(const Levels& levels, const uint8_t* packed, Vector* out) {
        Lanes::Codes codes = Lanes::load_codes(packed);
        for (int step = 0; step < steps; ++step) {
            out[step] = Lanes::lookup(levels, codes);
            codes = Lanes::next(codes);
        }
    }

    template <typename T>
    static X take(T x) {
        return to_float(x);
    }
    static Vector load(const X* x) { return Lanes::load(x); }
    static Floats dot(Vector level, Vector x, Floats sum) { return Lanes::fma(level, x, sum); }
};

#if FB_AVX512BF16

struct InBf16 {
    using X = bf16;
    using Levels = __m512i;
    using Vector = __m512bh;
    static constexpr int steps = 4, most_rows = 8;

    static Levels levels(const float* from) {
        alignas(64) bf16 table[32];
        for (int i = 0; i < 32; ++i) from_float(from[i % 16], &table[i]);
        return _mm512_load_si512(table);
    }

    // Words of four nibbles; the table is doubled, so the bit above the nibble does not matter.
    static void decode(const Levels& levels, const uint8_t* packed, Vector* out) {
        __m512i codes = _mm512_loadu_si512(packed);
        for (int step = 0; step < steps; ++step) {
            out[step] = (__m512bh)_mm512_permutexvar_epi16(codes, levels);
            codes = _mm512_srli_epi16(codes, 4);
        }
    }

    static X take(bf16 x) { return x; }
    static Vector load(const X* x) { return (__m512bh)_mm512_loadu_si512(x); }
    static Floats dot(Vector level, Vector x, Floats sum) { return _mm512_dpbf16_ps(sum, level, x); }
};

#endif

// Sums of `Rows` rows of W with `M` rows of x, which lie as [groups][M][group]; to sums [M][Rows].
template <typename In, int Rows, int M>
void multiply(const Row* row, const typename In::Levels& levels, int64_t groups, int shift, const typename In::X* x,
              float* sums) {
    const int mask = (1 << shift) - 1;
    const bool same_for_all = mask < group;  // whether the lanes of every group lie in its blocks as in the first
    Floats total[M][Rows];
    Lanes::Spread spread[Rows];
    for (int r = 0; r < Rows; ++r) {
        spread[r] = Lanes::spread(row[r].offset & mask, shift);
        for (int m = 0; m < M; ++m) total[m][r] = Lanes::zero();
    }
    for (int64_t g = 0; g < groups; ++g) {
        typename In::Vector level[Rows][In::steps];
        Floats scale[Rows];
        for (int r = 0; r < Rows; ++r) {
            __builtin_prefetch(row[r].packed + g * group_bytes + prefetch_bytes);
            In::decode(levels, g + 1 < groups ? row[r].packed + g * group_bytes : row[r].last, level[r]);
            const int64_t at = row[r].offset + g * group;
            if (!same_for_all) spread[r] = Lanes::spread((int)at & mask, shift);
            scale[r] = Lanes::pick(row[r].scales + (at >> shift), spread[r]);
        }
        for (int m = 0; m < M; ++m) {
            Floats sum[Rows];
            for (int r = 0; r < Rows; ++r) sum[r] = Lanes::zero();
            for (int step = 0; step < In::steps; ++step) {
                const auto from_x = In::load(x + step * (group / In::steps));
                for (int r = 0; r < Rows; ++r) sum[r] = In::dot(level[r][step], from_x, sum[r]);
            }
            for (int r = 0; r < Rows; ++r) total[m][r] = Lanes::fma(sum[r], scale[r], total[m][r]);
            x += group;
        }
    }
    for (int m = 0; m < M; ++m) {
        Floats four[4];
        for (int r = 0; r < 4; ++r) four[r] = r < Rows ? total[m][r] : Lanes::zero();
        float sum[4];
        Lanes::sum(four, sum);
        memcpy(sums + m * Rows, sum, Rows * sizeof(float));
    }
}

#if FB_AVX512BF16

// The same where every half of a group lies within one block, as it does with whole blocks of 64 and more in every row:
// a look-up of 32 entries then takes the levels of both halves already scaled, and the totals are all that is summed.
struct InScaledBf16 : InBf16 {
    using Levels = __m512;
    static constexpr int most_rows = 4;

    static Levels levels(const float* from) { return _mm512_loadu_ps(from); }

    static bool takes(const FbWeight& weight) {
        return weight.cols % (group / 2) == 0 && weight.block_size >= group / 2;
    }

    // Levels by the scale of the lower half, then by that of the upper one. Subnormal products become zero.
    static __m512i table(Levels levels, float lower, float upper) {
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(levels, _mm512_set1_ps(upper)),
                                            _mm512_mul_ps(levels, _mm512_set1_ps(lower)));
    }

    // The nibble, and in the upper half of the group the bit above it.
    static Vector lookup(__m512i table, __m512i codes) {
        const __m512i nibble = _mm512_set1_epi16(15);
        const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        const __m512i index = _mm512_ternarylogic_epi32(codes, nibble, half, 0xea);  // (codes & nibble) | half
        return (__m512bh)_mm512_permutexvar_epi16(index, table);
    }
};

template <int Rows, int M>
void multiply_scaled(const Row* row, const __m512& levels, int64_t groups, int shift, const bf16* x, float* sums) {
    Floats total[M][Rows];
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < Rows; ++r) total[m][r] = Lanes::zero();
    }
    for (int64_t g = 0; g < groups; ++g, x += M * group) {
        __m512i codes[Rows], table[Rows];
        for (int r = 0; r < Rows; ++r) {
            __builtin_prefetch(row[r].packed + g * group_bytes + prefetch_bytes);
            codes[r] = Lanes::load_codes(g + 1 < groups ? row[r].packed + g * group_bytes : row[r].last);
            const int64_t at = row[r].offset + g * group;
            table[r] =
                InScaledBf16::table(levels, row[r].scales[at >> shift], row[r].scales[(at + group / 2) >> shift]);
        }
        for (int step = 0; step < InBf16::steps; ++step) {
            __m512bh level[Rows];
            for (int r = 0; r < Rows; ++r) {
                level[r] = InScaledBf16::lookup(table[r], codes[r]);
                codes[r] = _mm512_srli_epi16(codes[r], 4);
            }
            for (int m = 0; m < M; ++m) {
                const auto from_x = InBf16::load(x + m * group + step * (group / InBf16::steps));
                for (int r = 0; r < Rows; ++r) total[m][r] = InBf16::dot(level[r], from_x, total[m][r]);
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        Floats four[4];
        for (int r = 0; r < 4; ++r) four[r] = r < Rows ? total[m][r] : Lanes::zero();
        float sum[4];
        Lanes::sum(four, sum);
        memcpy(sums + m * Rows, sum, Rows * sizeof(float));
    }
}

#endif

template <typename In>
using Multiply = void (*)(const Row*, const typename In::Levels&, int64_t, int, const typename In::X*, float*);

template <int Rows, int M, typename In>
Multiply<In> multiply_by(In) {
    return multiply<In, Rows, M>;
}

#if FB_AVX512BF16
template <int Rows, int M>
Multiply<InScaledBf16> multiply_by(InScaledBf16) {
    return multiply_scaled<Rows, M>;
}
#endif

template <typename In, int Rows, int M = In::most_rows>
Multiply<In> multiply_for(int64_t m) {
    if constexpr (M == 1) {
        return multiply_by<Rows, 1>(In());
    } else {
        return m == M ? multiply_by<Rows, M>(In()) : multiply_for<In, Rows, M - 1>(m);
    }
}

// x [m, cols] in the order of the look-ups: [phases][blocks of rows][groups][rows of the block][group].
template <typename In, typename T>
void arrange(const T* x, const Sizes& sizes, typename In::X* arranged) {
    constexpr int width = group / In::steps;
    const int64_t row_size = sizes.groups * group;
    for (int64_t phase = 0; phase < sizes.phases; ++phase) {
        const int64_t shifted = phase * 8 / sizes.phases;
        for (int64_t m = 0; m < sizes.m; ++m) {
            const int64_t first = m / In::most_rows * In::most_rows;
            const int64_t rows = sizes.m - first < In::most_rows ? sizes.m - first : In::most_rows;
            const T* from = x + m * sizes.cols;
            typename In::X* to = arranged + (phase * sizes.m + first) * row_size + (m - first) * group;
            for (int64_t begin = -shifted; begin < sizes.cols; begin += group, to += rows * group) {
                typename In::X plain[group] = {};
                const int64_t head = begin < 0 ? -begin : 0;
                const int64_t tail = sizes.cols - begin < group ? sizes.cols - begin : group;
                for (int64_t i = head; i < tail; ++i) plain[i] = In::take(from[begin + i]);
                // The even element is the high nibble of its byte.
                for (int step = 0; step < In::steps; ++step) {
                    for (int i = 0; i < width; ++i) to[step * width + i] = plain[i * In::steps + (step ^ 1)];
                }
            }
            // A row whose phase is smaller may need one group less.
            const int64_t done = (sizes.cols + shifted + group - 1) / group;
            if (done < sizes.groups) memset(to, 0, group * sizeof *to);
        }
    }
}

// Rows [begin, end) of W.
template <typename In, typename T>
void multiply_rows(const FbWeight& weight, const Sizes& sizes, const typename In::X* x, const T* bias, T* y,
                   int64_t begin, int64_t end, float* scales) {
    const typename In::Levels levels = In::levels(weight.levels);
    uint8_t last[rows_together][group_bytes];
    float sums[rows_together * In::most_rows];
    const bool in_strips = sizes.whole && !weight.absmax;
    int64_t together = 1, strip = begin, strip_end = begin;
    for (int64_t n = begin; n < end; n += together) {
        // Rows that begin at different phases meet different layouts of x.
        together = sizes.phases == 1 && n + rows_together <= end ? rows_together : 1;
        if (in_strips && n == strip_end) {
            strip = n, strip_end = n + sizes.strip < end ? n + sizes.strip : end;
            take_strip(weight, sizes, strip, strip_end, scales);
        }
        Row row[rows_together];
        for (int64_t r = 0; r < together; ++r) {
            const float* decoded = in_strips ? scales + (n + r - strip) * sizes.whole : nullptr;
            describe(weight, sizes, n + r, decoded, scales + r * sizes.scales, last[r], row[r]);
        }
        const int64_t phase = sizes.phase_of(n) * sizes.phases / 8;
        for (int64_t m = 0; m < sizes.m; m += In::most_rows) {
            const int64_t rows = sizes.m - m < In::most_rows ? sizes.m - m : In::most_rows;
            const auto run = together == 1 ? multiply_for<In, 1>(rows) : multiply_for<In, rows_together>(rows);
            run(row, levels, sizes.groups, sizes.shift, x + (phase * sizes.m + m) * sizes.groups * group, sums);
            const float* sum = sums;
            for (int64_t i = m; i < m + rows; ++i) {
                for (int64_t to = n; to < n + together; ++to, ++sum) {
                    from_float(bias ? *sum + to_float(bias[to]) : *sum, &y[i * sizes.rows + to]);
                }
            }
        }
    }
}

constexpr int64_t least_per_thread = 1 << 16;  // elements of W for which waking a thread pays
constexpr int64_t most_x_bytes = 512 << 10;    // of arranged x at a time: every row of W passes over it

int64_t tiles_of(int64_t rows) { return (rows + rows_together - 1) / rows_together; }

// The rows of x to take at a time.
template <typename In>
int64_t rows_at_once(const FbWeight& weight, int64_t m) {
    const Sizes one(weight, 1);
    int64_t blocks = most_x_bytes / (one.x_size() * (int64_t)sizeof(typename In::X) + 1) / In::most_rows;
    if (blocks < 1) blocks = 1;
    return m < blocks * In::most_rows ? m : blocks * In::most_rows;
}

// Tiles [begin, end), counted through all products.
template <typename In, typename T>
void multiply_tiles(const Product* products, int64_t m, const typename In::X* x, int64_t first_row, int64_t begin,
                    int64_t end, float* scales) {
    for (const Product* product = products; begin < end; ++product) {
        const Sizes sizes(*product->weight, m);
        const int64_t tiles = tiles_of(sizes.rows), stop = end < tiles ? end : tiles;
        if (begin < stop) {
            const int64_t last = stop * rows_together;
            T* y = (T*)product->y + first_row * sizes.rows;
            multiply_rows<In>(*product->weight, sizes, x, (const T*)product->bias, y, begin * rows_together,
                              last < sizes.rows ? last : sizes.rows, scales);
        }
        begin = begin < tiles ? 0 : begin - tiles;
        end -= tiles;
    }
}

template <typename In, typename T>
int32_t multiply_all(const Product* products, int64_t count, const T* x, int64_t m, int32_t threads) {
    const FbWeight& weight = *products->weight;
    const int64_t rows = rows_at_once<In>(weight, m);
    const Sizes most(weight, rows);
    int64_t tiles = 0;
    for (int64_t i = 0; i < count; ++i) tiles += tiles_of(products[i].weight->rows);
    int64_t parts = tiles * rows_together * most.cols / least_per_thread;
    parts = parts < 1 ? 1 : parts > threads ? threads : parts;

    const size_t x_bytes = ((size_t)most.x_size() * sizeof(typename In::X) + 127) / 128 * 128;
    const size_t scale_bytes = (size_t)most.scale_room() * sizeof(float);
    char* memory = (char*)malloc(128 + x_bytes + (size_t)parts * scale_bytes);
    if (!memory) return FB_NO_MEMORY;
    char* aligned = memory + (128 - (uintptr_t)memory % 128);
    auto* arranged = (typename In::X*)aligned;
    float* scales = (float*)(aligned + x_bytes);

    for (int64_t first = 0; first < m; first += rows) {
        const int64_t some = m - first < rows ? m - first : rows;
        arrange<In>(x + first * most.cols, Sizes(weight, some), arranged);
#pragma omp parallel for schedule(static) num_threads((int)parts)
        for (int64_t part = 0; part < parts; ++part) {
            multiply_tiles<In, T>(products, some, arranged, first, tiles * part / parts, tiles * (part + 1) / parts,
                                  scales + part * most.scale_room());
        }
    }
    free(memory);
    return FB_OK;
}

}  // namespace

int32_t linear_group(const Product* products, int64_t count, const void* x, int32_t dtype, int64_t m, int32_t threads) {
    switch (dtype) {
        case FB_F32:
            return multiply_all<InFloat>(products, count, (const float*)x, m, threads);
        case FB_F16:
            return multiply_all<InFloat>(products, count, (const f16*)x, m, threads);
        case FB_BF16:
#if FB_AVX512BF16
            if (InScaledBf16::takes(*products->weight)) {
                return multiply_all<InScaledBf16>(products, count, (const bf16*)x, m, threads);
            }
            return multiply_all<InBf16>(products, count, (const bf16*)x, m, threads);
#else
            return multiply_all<InFloat>(products, count, (const bf16*)x, m, threads);
#endif
        default:
            return FB_BAD_ARGUMENT;
    }
}

int32_t linear(const FbWeight* weight, const void* x, int32_t dtype, int64_t m, const void* bias, void* y,
               int32_t threads) {
    if (!is_valid(*weight) || m < 0 || threads < 1) return FB_BAD_ARGUMENT;
    if (m == 0 || weight->rows == 0) return FB_OK;
    const Product product{weight, bias, y};
    return linear_group(&product, 1, x, dtype, m, threads);
}

FB_END
