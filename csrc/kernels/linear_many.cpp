// LinearMany: y = x W^T + bias straight from 4 bits, for more than a few rows of x.
//
// Strips of W of as many rows as the tile of csrc/tile.h is wide are decoded, 128 elements of each row at a time, into
// a buffer that stays in the first-level cache, and all rows of x are multiplied with it there. W itself is never
// written to memory. In the strip the rows of W are the lanes: 8 codes lie in 32 bits, so `lanes` rows are turned by a
// transposition of 32-bit words, two shuffles for 64 codes, and a shift and a look-up give one unit of `lanes` rows.
// The units hold the bare levels. The sum over a segment, which lies within one block of every row, is scaled as it is
// added to the total. With AVX-512 BF16 and bf16 x a unit holds two bf16 for vdpbf16ps, otherwise one fp32. Units come
// in the order of the nibbles; x is brought into that order once per call.
//
// K must be a multiple of 32: then every row starts with a whole byte, and blocks start at multiples of 32 in each row.
//
// Error of y against the exact product of x with level * scale, for S the elements of a segment, 32 to 128:
//     |y - y*| <= (e + (S + K / S + 1) u) sum |x||w| + d |y*|,    u = 2^-24
// with e and d as in linear.cpp: S roundings of a sum within the segment, one for each segment. vdpbf16ps also takes
// subnormal x, and sums below 2^-126, for zero: at most 2^-125 K scale more.
//
// Each y is summed in the same order whatever the rows of x and the threads.
//
// Cost: N K (1/2 + 4 / block_size) bytes read for every `x_bytes` of x, 2 M N K flops. Decoding takes as long as some 6
// rows of x do.

#include "../lanes.h"
#include "../tile.h"
#include "../weight.h"

#include <stdlib.h>

FB_BEGIN

namespace {

constexpr int64_t words = 16;         // of 8 codes, of one row, that are decoded together: a cache line
constexpr int64_t chunk = 8 * words;  // elements of it
constexpr int64_t chunk_bytes = chunk / 2;
constexpr int64_t strip = tile_columns * lanes;  // rows of W that are decoded together
constexpr int64_t least_segment = 32;
constexpr int most_rows = tile_rows;    // of x that are multiplied together
constexpr int64_t x_bytes = 768 << 10;  // of arranged x at a time: every strip passes over it, so it should stay in L2

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Units of one fp32, eight to a word of codes.
struct InFloat {
    using Product = Single;
    static constexpr int64_t units = 8;
    using Levels = Lanes::Levels;

    static Levels levels(const float* from) { return Lanes::levels(from); }

    // One word of each of `lanes` rows -> units [8], `ld` apart.
    static void decode(const Levels& levels, const uint32_t* from, uint32_t* to, int64_t ld) {
        Lanes::Codes codes = Lanes::load_codes((const uint8_t*)from);
        for (int64_t unit = 0; unit < units; ++unit, to += ld) {
            const Lanes::Floats level = Lanes::lookup(levels, codes);
            memcpy(to, &level, sizeof level);
            codes = Lanes::next(codes);
        }
    }

    // The even element is the high nibble of its byte.
    template <typename T>
    static void arrange(const T* x, int64_t cols, uint32_t* to) {
        for (int64_t i = 0; i < cols; ++i) to[i] = bits_of(to_float(x[i ^ 1]));
    }
};

#if FB_AVX512BF16

// Units of two bf16, four to a word of codes: nibble i of its lower half, and nibble i of its upper one.
struct InBf16 {
    using Product = Pairs;
    static constexpr int64_t units = 4;
    using Levels = __m512i;

    static Levels levels(const float* from) {
        alignas(64) bf16 table[32];
        for (int i = 0; i < 32; ++i) from_float(from[i % 16], &table[i]);
        return _mm512_load_si512(table);
    }

    // The table is doubled, so the bit above the nibble does not matter.
    static void decode(const Levels& levels, const uint32_t* from, uint32_t* to, int64_t ld) {
        __m512i codes = _mm512_loadu_si512(from);
        for (int64_t unit = 0; unit < units; ++unit, to += ld) {
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(codes, levels));
            codes = _mm512_srli_epi16(codes, 4);
        }
    }

    static void arrange(const bf16* x, int64_t cols, uint32_t* to) {
        const __m512i order = _mm512_set_epi16(30, 26, 31, 27, 28, 24, 29, 25, 22, 18, 23, 19, 20, 16, 21, 17, 14, 10,
                                               15, 11, 12, 8, 13, 9, 6, 2, 7, 3, 4, 0, 5, 1);
        for (int64_t i = 0; i < cols; i += 32, to += 16) {
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, _mm512_loadu_si512(x + i)));
        }
    }
};

#endif

// Sizes that follow from a weight.
struct Sizes {
    int64_t rows, cols;
    int64_t row_bytes;
    int64_t segment, segments;  // elements of a row under one scale, and how many such there are
    int64_t scales;             // room for those of a row, in multiples of `lanes`
    int shift;                  // log2 of the block size

    explicit Sizes(const FbWeight& weight) : rows(weight.rows), cols(weight.cols), row_bytes(cols / 2), shift(0) {
        segment = least_segment;
        while (segment < chunk && 2 * segment <= weight.block_size && cols % (2 * segment) == 0) segment *= 2;
        segments = cols / segment;
        scales = round_up(segments, lanes);
        while (1 << shift < weight.block_size) ++shift;
    }
};

// What one thread works in.
struct Workspace {
    float* totals;    // [rows of x][strip]
    uint32_t* units;  // [chunk][strip]
    uint32_t* codes;  // [lanes][words], then [words][lanes]
    float* scales;    // [segments][strip]
    float* by_row;    // [lanes][segments]

    static int64_t size(const Sizes& sizes, int64_t m) {
        return (m + chunk) * strip + 2 * words * lanes + sizes.scales * (strip + lanes) + lanes;
    }

    Workspace(const Sizes& sizes, int64_t m, float* memory) {
        totals = memory;
        units = (uint32_t*)(totals + m * strip);
        codes = units + chunk * strip;
        scales = (float*)(codes + 2 * words * lanes);
        by_row = scales + sizes.scales * strip;
    }
};

// Scales of `lanes` rows of W from n on, of which those beyond the last repeat it -> scales [segments], `ld` apart.
void scales_of_rows(const FbWeight& weight, const Sizes& sizes, int64_t n, float* by_row, float* scales, int64_t ld) {
    for (int64_t r = 0; r < lanes; ++r) {
        const int64_t begin = smaller_of(n + r, sizes.rows - 1) * sizes.cols;
        const int64_t block = begin >> sizes.shift, last = (begin + sizes.cols - 1) >> sizes.shift;
        float* to = by_row + r * sizes.scales;
        scales_of(weight, block, last - block + 1, to);
        if (last - block + 1 == sizes.segments) continue;
        // Backwards, as no segment comes before its block.
        for (int64_t s = sizes.segments - 1; s >= 0; --s)
            to[s] = to[((begin + s * sizes.segment) >> sizes.shift) - block];
    }
    transpose((const uint32_t*)by_row, sizes.scales, lanes, sizes.scales, (uint32_t*)scales, ld);
}

// `count` words of each of `lanes` rows of W from n on, those beyond the last repeating it -> codes [words][lanes].
void turn_codes(const FbWeight& weight, const Sizes& sizes, int64_t n, int64_t word, int64_t count, uint32_t* codes) {
    const uint8_t* from = weight.packed + n * sizes.row_bytes + 4 * word;
    for (int64_t r = 0; r < lanes; ++r) {
        __builtin_prefetch(from + r * sizes.row_bytes + chunk_bytes);
        __builtin_prefetch(from + (r + strip) * sizes.row_bytes, 0, 2);
    }
    if (n + lanes <= sizes.rows && count == words && (uintptr_t)from % 4 == 0) {
        transpose((const uint32_t*)from, sizes.row_bytes / 4, lanes, words, codes, lanes);
        return;
    }
    uint32_t* copied = codes + words * lanes;
    for (int64_t r = 0; r < lanes; ++r) {
        const int64_t row = smaller_of(n + r, sizes.rows - 1);
        memcpy(copied + r * words, weight.packed + row * sizes.row_bytes + 4 * word, (size_t)(4 * count));
    }
    transpose(copied, words, lanes, words, codes, lanes);
}

// Adds the products of R rows of x with a chunk of a strip of N * lanes rows of W to totals [R][N * lanes].
template <typename In, int R, int N>
void multiply_chunk(const uint32_t* x, int64_t x_row, const uint32_t* units, const float* scales, int64_t segments,
                    int64_t per_segment, float* totals) {
    constexpr int64_t width = N * lanes;
    for (int64_t s = 0; s < segments; ++s, x += per_segment, units += per_segment * width, scales += width) {
        Vec sum[R][N] = {};
        multiply<typename In::Product>(sum, per_segment, x, x_row, 1, units, width);
        FB_UNROLL for (int j = 0; j < N; ++j) {
            const Vec scale = load(scales + j * lanes);
            FB_UNROLL for (int r = 0; r < R; ++r) {
                float* total = totals + r * width + j * lanes;
                store(total, madd(sum[r][j], scale, load(total)));
            }
        }
    }
}

template <typename In, int N, int R = most_rows>
auto multiply_chunk_for(int64_t rows) {
    if constexpr (R == 1) {
        return multiply_chunk<In, 1, N>;
    } else {
        return rows == R ? multiply_chunk<In, R, N> : multiply_chunk_for<In, N, R - 1>(rows);
    }
}

// m rows of x with the N * lanes rows of W from n on.
template <typename In, int N, typename T>
void multiply_strip(const FbWeight& weight, const Sizes& sizes, const typename In::Levels& levels, const uint32_t* x,
                    int64_t x_row, int64_t m, const T* bias, T* y, int64_t n, const Workspace& space) {
    constexpr int64_t width = N * lanes;
    for (int64_t j = 0; j < N; ++j) {
        scales_of_rows(weight, sizes, n + j * lanes, space.by_row, space.scales + j * lanes, width);
    }
    memset(space.totals, 0, (size_t)(m * width) * sizeof(float));
    const int64_t tiles = (m + most_rows - 1) / most_rows;
    for (int64_t k = 0; k < sizes.cols; k += chunk) {
        const int64_t elements = smaller_of(chunk, sizes.cols - k), count = elements / 8;
        for (int64_t j = 0; j < N; ++j) {
            turn_codes(weight, sizes, n + j * lanes, k / 8, count, space.codes);
            for (int64_t w = 0; w < count; ++w) {
                In::decode(levels, space.codes + w * lanes, space.units + w * In::units * width + j * lanes, width);
            }
        }
        const uint32_t* from_x = x + k / 8 * In::units;
        const float* scales = space.scales + k / sizes.segment * width;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = m * tile / tiles, rows = m * (tile + 1) / tiles - first;
            multiply_chunk_for<In, N>(rows)(from_x + first * x_row, x_row, space.units, scales,
                                            elements / sizes.segment, sizes.segment / 8 * In::units,
                                            space.totals + first * width);
        }
    }
    const int64_t kept = smaller_of(width, sizes.rows - n);
    for (int64_t i = 0; i < m; ++i) {
        const float* total = space.totals + i * width;
        T* to = y + i * sizes.rows + n;
        for (int64_t j = 0; j < kept; ++j) from_float(bias ? total[j] + to_float(bias[n + j]) : total[j], to + j);
    }
}

// m rows of x with rows [begin, end) of W; `begin` is a multiple of lanes.
template <typename In, typename T>
void multiply_rows(const FbWeight& weight, const Sizes& sizes, const uint32_t* x, int64_t x_row, int64_t m,
                   const T* bias, T* y, int64_t begin, int64_t end, const Workspace& space) {
    const typename In::Levels levels = In::levels(weight.levels);
    by_width(round_up(end - begin, lanes), [&](int64_t offset, auto width) {
        constexpr int N = decltype(width)::value;
        multiply_strip<In, N>(weight, sizes, levels, x, x_row, m, bias, y, begin + offset, space);
    });
}

constexpr int64_t least_per_thread = 1 << 14;  // elements of W for which waking a thread pays

template <typename In, typename T>
int32_t multiply_all(const FbWeight& weight, const T* x, int64_t m, const T* bias, T* y, int32_t threads) {
    const Sizes sizes(weight);
    // Rows of x end at different places in the sets of a cache.
    const int64_t x_row = sizes.cols / 8 * In::units + 16;
    int64_t rows = x_bytes / (x_row * 4) / most_rows * most_rows;
    rows = smaller_of(m, rows < 2 * most_rows ? 2 * most_rows : rows);
    const int64_t groups = (sizes.rows + lanes - 1) / lanes;
    int64_t parts = smaller_of(smaller_of(threads, groups), sizes.rows * sizes.cols / least_per_thread);
    if (parts < 1) parts = 1;

    const int64_t space = round_up(Workspace::size(sizes, rows), 32), x_size = round_up(rows * x_row, 32);
    float* memory = (float*)malloc((size_t)(x_size + parts * space) * sizeof(float) + 128);
    if (!memory) return FB_NO_MEMORY;
    float* aligned = memory + (128 - (uintptr_t)memory % 128) / sizeof(float);
    uint32_t* arranged = (uint32_t*)aligned;
    for (int64_t first = 0; first < m; first += rows) {
        const int64_t count = smaller_of(rows, m - first);
        for (int64_t i = 0; i < count; ++i) In::arrange(x + (first + i) * sizes.cols, sizes.cols, arranged + i * x_row);
#pragma omp parallel for schedule(static) num_threads((int)parts)
        for (int64_t part = 0; part < parts; ++part) {
            const Workspace own(sizes, rows, aligned + x_size + part * space);
            multiply_rows<In>(weight, sizes, arranged, x_row, count, bias, y + first * sizes.rows,
                              groups * part / parts * lanes,
                              smaller_of(groups * (part + 1) / parts * lanes, sizes.rows), own);
        }
    }
    free(memory);
    return FB_OK;
}

}  // namespace

int32_t linear_many(const FbWeight* weight, const void* x, int32_t dtype, int64_t m, const void* bias, void* y,
                    int32_t threads) {
    if (!is_valid(*weight) || weight->cols % least_segment != 0 || m < 0 || threads < 1) return FB_BAD_ARGUMENT;
    if (m == 0 || weight->rows == 0) return FB_OK;
    switch (dtype) {
        case FB_F32:
            return multiply_all<InFloat>(*weight, (const float*)x, m, (const float*)bias, (float*)y, threads);
        case FB_F16:
            return multiply_all<InFloat>(*weight, (const f16*)x, m, (const f16*)bias, (f16*)y, threads);
        case FB_BF16:
#if FB_AVX512BF16
            return multiply_all<InBf16>(*weight, (const bf16*)x, m, (const bf16*)bias, (bf16*)y, threads);
#else
            return multiply_all<InFloat>(*weight, (const bf16*)x, m, (const bf16*)bias, (bf16*)y, threads);
#endif
        default:
            return FB_BAD_ARGUMENT;
    }
}

FB_END
