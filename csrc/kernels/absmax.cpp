// Double quantization: the scales of a weight in 8 bits, and back. fourbit.h has the equations.
//
// The code of a value is looked up by bin, as bitsandbytes' CPU kernel does it. That kernel rounds
// u * 0.5 * 65535 + 0.5 once, with a fused multiply-add; here the product is rounded first. Over all possible sums
// u + 1 (25 million) the bin is the same.

#include "../weight.h"

FB_BEGIN

namespace {

constexpr int64_t block_size = 256;

void quantize_block(const float* absmax, int64_t n, float offset, const uint8_t* bins, uint8_t* codes, float* nested) {
    float largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float magnitude = fabsf(absmax[i] - offset);
        largest = magnitude > largest ? magnitude : largest;
    }
    *nested = largest;
    const float scale = 1.0f / largest;
    int32_t bin[block_size];
    for (int64_t i = 0; i < n; ++i) {
        // Written so that NaN, which is 0 * inf, goes to -1 and so to bin 0.
        float value = (absmax[i] - offset) * scale;
        value = value >= -1.0f ? value : -1.0f;
        value = value <= 1.0f ? value : 1.0f;
        bin[i] = (int32_t)((value + 1.0f) * 0.5f * 65535.0f + 0.5f);
    }
    for (int64_t i = 0; i < n; ++i) codes[i] = bins[bin[i]];
}

int64_t block_count(int64_t n) { return (n + block_size - 1) / block_size; }

int64_t length_of(int64_t block, int64_t n) {
    const int64_t rest = n - block * block_size;
    return rest < block_size ? rest : block_size;
}

// A block takes about a microsecond: fewer than sixteen are not worth waking a thread for.
int32_t worthwhile(int32_t threads, int64_t blocks) {
    const int64_t most = blocks / 16 + 1;
    return threads < most ? threads : (int32_t)most;
}

}  // namespace

int32_t quantize_absmax(const float* absmax, int64_t n, const float* offset, const uint8_t* bins, uint8_t* codes,
                        float* nested_absmax, int32_t threads) {
    if (n < 0) return FB_BAD_ARGUMENT;
    const int64_t blocks = block_count(n);
#pragma omp parallel for schedule(static) num_threads(worthwhile(threads, blocks))
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * block_size;
        quantize_block(absmax + first, length_of(block, n), *offset, bins, codes + first, nested_absmax + block);
    }
    return FB_OK;
}

int32_t dequantize_absmax(const uint8_t* codes, int64_t n, const float* nested_absmax, const float* offset,
                          const float* map, float* absmax, int32_t threads) {
    if (n < 0) return FB_BAD_ARGUMENT;
    const int64_t blocks = block_count(n);
#pragma omp parallel for schedule(static) num_threads(worthwhile(threads, blocks))
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * block_size, length = length_of(block, n);
        decode_scales(codes + first, length, nested_absmax[block], *offset, map, absmax + first);
    }
    return FB_OK;
}

FB_END
