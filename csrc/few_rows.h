// How the rows of a weight are read by a product with few rows of x (kernels/linear.cpp): in groups of codes, with
// their scales in reach.

#pragma once

#include "lanes.h"
#include "weight.h"

FB_BEGIN

namespace {

using Floats = Lanes::Floats;
constexpr int lanes = Lanes::lanes;
constexpr int group = 8 * lanes;  // elements of a row of W that are decoded together
constexpr int group_bytes = group / 2;
constexpr int prefetch_bytes = 8192;  // ahead in W, where rows read side by side defeat the hardware's prefetcher
constexpr int rows_together = FB_AVX512 ? 4 : 1;  // rows of W that share a loaded x, as registers allow
constexpr int64_t strip_scales = 1024;  // about so many scales are decoded in one go, into a first-level cache
constexpr int64_t beyond = 2 * lanes;   // scales that may be read behind those of a row

// One row of W as the inner loop sees it: groups of codes, the last of them where it can be read whole, and the scales
// of its blocks, which begin `offset` elements before the first lane.
struct Row {
    const uint8_t* packed;
    const uint8_t* last;
    const float* scales;
    int offset;
};

// Sizes that follow from a weight and the number of rows of x.
struct Sizes {
    int64_t rows, cols, m;
    int64_t packed_bytes, blocks;
    int64_t phases;  // places in a lane at which rows of W begin: multiples of 8 / phases
    int64_t groups;
    int64_t scales;  // that may be read for a row: those of its groups and a vector more
    int64_t whole;   // blocks of a row, where every row holds whole ones; else 0
    int64_t strip;   // rows of these whose scales are decoded in one go
    int shift;       // log2 of the block size

    Sizes(const FbWeight& weight, int64_t m) : rows(weight.rows), cols(weight.cols), m(m), phases(1), shift(0) {
        packed_bytes = (rows * cols + 1) / 2;
        blocks = (rows * cols + weight.block_size - 1) / weight.block_size;
        while (cols * phases % 8) phases *= 2;
        groups = (cols + 8 - 8 / phases + group - 1) / group;
        while (1 << shift < weight.block_size) ++shift;
        scales = groups * group / weight.block_size + 2 + lanes;
        whole = cols % weight.block_size == 0 ? cols / weight.block_size : 0;
        strip = whole && whole < strip_scales / rows_together ? strip_scales / whole : 1;
        strip = (strip + rows_together - 1) / rows_together * rows_together;
    }

    // Room for the scales of one thread: of rows one by one, or of a strip. No cache line is written by two threads.
    int64_t scale_room() const {
        const int64_t single = scales * rows_together, together = strip * whole + beyond;
        return ((single > together ? single : together) + 31) / 32 * 32;
    }

    int64_t x_size() const { return phases * m * groups * group; }
    int phase_of(int64_t row) const { return (int)(row * cols % 8); }
};

// Describes row n of W, whose scales may be `decoded`. What else cannot be read in place, because it would be read
// beyond its end or is to be decoded, goes to `scales` and `last`. (A row that is returned is copied as one vector out
// of parts that were stored just now: a wait as long as a tenth of the row's product.)
void describe(const FbWeight& weight, const Sizes& sizes, int64_t n, const float* decoded, float* scales, uint8_t* last,
              Row& row) {
    const int64_t begin = n * sizes.cols, end = begin + sizes.cols, first = begin - sizes.phase_of(n);
    const int64_t block = begin >> sizes.shift;
    row.offset = (int)(first - (block << sizes.shift));
    row.packed = weight.packed + first / 2;
    row.last = row.packed + (sizes.groups - 1) * group_bytes;
    const int64_t left = weight.packed + sizes.packed_bytes - row.last;
    if (left < group_bytes) {
        memset(last, 0, group_bytes);
        if (left > 0) memcpy(last, row.last, (size_t)left);
        row.last = last;
    }
    if (decoded) {
        row.scales = decoded;
    } else if (weight.absmax && block + sizes.scales <= sizes.blocks) {
        row.scales = weight.absmax + block;
    } else {
        const int64_t count = ((end - 1) >> sizes.shift) - block + 1;
        scales_of(weight, block, count, scales);
        memset(scales + count, 0, (size_t)(sizes.scales - count) * sizeof(float));
        row.scales = scales;
    }
}

// The scales of whole rows [begin, end) side by side, and zeros behind them.
void take_strip(const FbWeight& weight, const Sizes& sizes, int64_t begin, int64_t end, float* scales) {
    const int64_t first = begin * sizes.whole, count = (end - begin) * sizes.whole;
    scales_of(weight, first, count, scales);
    memset(scales + count, 0, beyond * sizeof(float));
    // The codes of the next strip are too far off for the hardware to guess.
    const int64_t left = sizes.blocks - first - count, next = left < count ? left : count;
    for (int64_t i = 0; i < next; i += 64) __builtin_prefetch(weight.absmax_codes + first + count + i);
}

}  // namespace

FB_END
