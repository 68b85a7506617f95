// LoRA, few rows: y += s (x A^T) B^T. fourbit.h has the equation.
//
// For a few rows of x the two products of an adapter are so small that a GEMM's set-up and the casts around it take
// longer than they do. Rows of A, then of B, are widened to fp32 four at a time and meet every row of x there.
//
// Error: with xa in place of x A^T, each of the two sums passes at most (n / lanes + 6) roundings of fp32, n the
// elements summed; xa and y are rounded to `dtype` once, and elements of A and B too.
//
// Each element is summed in the same order whatever the rows of x and the threads.
//
// Cost: 4 or 2 bytes for each of the R (N + K) elements read, 2 M R (N + K) flops.

#include "../lanes.h"
#include "../rows.h"

#include <stdlib.h>

FB_BEGIN

namespace {

constexpr int64_t lanes = Lanes::lanes;
constexpr int64_t together = 4;                // rows of A or B, as many as Lanes::sum adds up
constexpr int64_t least_per_thread = 1 << 15;  // products for which waking a thread pays

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename A, typename B>
constexpr bool are_same = false;
template <typename A>
constexpr bool are_same<A, A> = true;

// fp32 copies of `count` elements, rounded to T where they are of another type; zero up to the next multiple of lanes.
template <typename T, typename From>
void take(const From* from, int64_t count, float* to) {
    widen(from, to, count);
    if (!are_same<T, From>) {
        for (int64_t i = 0; i < count; i += kBlock) round_to<T>(to + i, smaller(kBlock, count - i));
    }
    for (int64_t i = count; i < round_up(count, lanes); ++i) to[i] = 0;
}

// Four rows of fp32, `ld` apart, with one vector; `ld` is a multiple of lanes.
void multiply_four(const float* rows, int64_t ld, const float* x, float* sums) {
    Lanes::Floats four[together];
    for (int64_t r = 0; r < together; ++r) four[r] = Lanes::zero();
    for (int64_t i = 0; i < ld; i += lanes) {
        const Lanes::Floats vector = Lanes::load(x + i);
        for (int64_t r = 0; r < together; ++r) four[r] = Lanes::fma(Lanes::load(rows + r * ld + i), vector, four[r]);
    }
    Lanes::sum(four, sums);
}

// x [m][ld] times matrix [rows][cols]; calls put(row of x, row of the matrix, sum) for every sum.
template <typename T, typename Adapter, typename Put>
void multiply_matrix(const float* x, int64_t m, const Adapter* matrix, int64_t rows, int64_t cols, float* wide,
                     int32_t threads, Put put) {
    const int64_t ld = round_up(cols, lanes), groups = (rows + together - 1) / together;
    int64_t parts = smaller(smaller(threads, groups), m * rows * cols / least_per_thread);
    if (parts < 1) parts = 1;
#pragma omp parallel for schedule(static) num_threads((int)parts) if (parts > 1)
    for (int64_t part = 0; part < parts; ++part) {
        float* own = wide + part * together * ld;
        for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
            const int64_t first = group * together, count = smaller(together, rows - first);
            for (int64_t r = 0; r < together; ++r) {
                take<T>(matrix + (first + smaller(r, count - 1)) * cols, cols, own + r * ld);
            }
            for (int64_t i = 0; i < m; ++i) {
                float sums[together];
                multiply_four(own, ld, x + i * ld, sums);
                for (int64_t r = 0; r < count; ++r) put(i, first + r, sums[r]);
            }
        }
    }
}

struct Sizes {
    int64_t m, cols, rank, rows;
};

template <typename T, typename Adapter>
int32_t add_all(const Sizes& sizes, const T* x, const Adapter* a, const Adapter* b, float scaling, T* xa, T* y,
                int32_t threads) {
    const int64_t x_ld = round_up(sizes.cols, lanes), xa_ld = round_up(sizes.rank, lanes);
    const int64_t wide_size = threads * together * (x_ld > xa_ld ? x_ld : xa_ld);
    float* memory = (float*)malloc((size_t)(sizes.m * (x_ld + xa_ld) + wide_size) * sizeof(float));
    if (!memory) return FB_NO_MEMORY;
    float *wide_x = memory, *wide_xa = wide_x + sizes.m * x_ld, *wide = wide_xa + sizes.m * xa_ld;
    for (int64_t i = 0; i < sizes.m; ++i) take<T>(x + i * sizes.cols, sizes.cols, wide_x + i * x_ld);
    memset(wide_xa, 0, (size_t)(sizes.m * xa_ld) * sizeof(float));
    multiply_matrix<T>(wide_x, sizes.m, a, sizes.rank, sizes.cols, wide, threads, [&](int64_t i, int64_t r, float sum) {
        T* to = xa + i * sizes.rank + r;
        from_float(sum, to);
        wide_xa[i * xa_ld + r] = to_float(*to);
    });
    multiply_matrix<T>(wide_xa, sizes.m, b, sizes.rows, sizes.rank, wide, threads,
                       [&](int64_t i, int64_t n, float sum) {
                           T* to = y + i * sizes.rows + n;
                           from_float(to_float(*to) + scaling * sum, to);
                       });
    free(memory);
    return FB_OK;
}

template <typename T>
int32_t add_by_adapter(const Sizes& sizes, const void* x, const void* a, const void* b, int32_t adapter_dtype,
                       float scaling, void* xa, void* y, int32_t threads) {
    switch (adapter_dtype) {
        case FB_F32:
            return add_all(sizes, (const T*)x, (const float*)a, (const float*)b, scaling, (T*)xa, (T*)y, threads);
        case FB_F16:
            return add_all(sizes, (const T*)x, (const f16*)a, (const f16*)b, scaling, (T*)xa, (T*)y, threads);
        case FB_BF16:
            return add_all(sizes, (const T*)x, (const bf16*)a, (const bf16*)b, scaling, (T*)xa, (T*)y, threads);
        default:
            return FB_BAD_ARGUMENT;
    }
}

}  // namespace

int32_t lora_add(const void* x, int32_t dtype, int64_t m, int64_t cols, const void* a, const void* b,
                 int32_t adapter_dtype, int64_t rank, int64_t rows, float scaling, void* xa, void* y, int32_t threads) {
    if (m < 0 || cols < 0 || rank < 0 || rows < 0 || threads < 1) return FB_BAD_ARGUMENT;
    const Sizes sizes{m, cols, rank, rows};
    FB_BY_DTYPE(dtype, add_by_adapter, sizes, x, a, b, adapter_dtype, scaling, xa, y, threads)
}

FB_END
