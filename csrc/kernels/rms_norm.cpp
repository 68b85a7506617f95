// Root-mean-square norm and its gradient. fourbit.h has the equations.
//
// A row is read twice, the second time from cache: once for its sums, once for its result. Nothing is kept between the
// passes; the backward pass finds 1/rms again from x, which it has to read anyway.
//
// Cost: 2 elements moved per element forward, 3 backward; bound by memory.

#include "../rows.h"

FB_BEGIN

namespace {

// What a row is scaled by: 1 / sqrt(mean(x^2) + eps).
template <class T>
float inverse_rms(const T* x, int64_t cols, float eps) {
    float buffer[kBlock];
    double sum = 0;
    for (int64_t i = 0; i < cols; i += kBlock) {
        const int64_t n = smaller(kBlock, cols - i);
        widen(x + i, buffer, n);
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t j = 0; j < n; j++) part += buffer[j] * buffer[j];
        sum += part;
    }
    return 1.0f / sqrtf((float)(sum / (double)cols) + eps);
}

template <class T>
void norm_row(const T* x, const T* weight, int64_t cols, float eps, float offset, bool round_first, T* y) {
    float value[kBlock], scale[kBlock];
    const float r = inverse_rms(x, cols, eps);
    for (int64_t i = 0; i < cols; i += kBlock) {
        const int64_t n = smaller(kBlock, cols - i);
        widen(x + i, value, n);
        widen(weight + i, scale, n);
        for (int64_t j = 0; j < n; j++) value[j] *= r;
        if (round_first) round_to<T>(value, n);
        for (int64_t j = 0; j < n; j++) value[j] *= scale[j] + offset;
        narrow(value, y + i, n);
    }
}

template <class T>
int32_t norm(const void* x, const void* weight, int64_t rows, int64_t cols, float eps, float offset,
             int32_t round_first, void* y, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(worthwhile(threads, rows* cols))
    for (int64_t row = 0; row < rows; row++) {
        norm_row((const T*)x + row * cols, (const T*)weight, cols, eps, offset, round_first != 0, (T*)y + row * cols);
    }
    return FB_OK;
}

// dx = r (g w - x r mean(g w x r));  dweight += g x r.
template <class T>
void norm_backward_row(const T* grad, const T* x, const T* weight, int64_t cols, float eps, float offset, T* grad_x,
                       float* grad_weight) {
    float g[kBlock], value[kBlock], scale[kBlock];
    double squares = 0, products = 0;
    for (int64_t i = 0; i < cols; i += kBlock) {
        const int64_t n = smaller(kBlock, cols - i);
        widen(grad + i, g, n);
        widen(x + i, value, n);
        widen(weight + i, scale, n);
        float square = 0, product = 0;
#pragma omp simd reduction(+ : square, product)
        for (int64_t j = 0; j < n; j++) {
            square += value[j] * value[j];
            product += g[j] * (scale[j] + offset) * value[j];
        }
        squares += square;
        products += product;
    }
    const float r = 1.0f / sqrtf((float)(squares / (double)cols) + eps);
    const float pull = (float)(products / (double)cols) * r * r;
    for (int64_t i = 0; i < cols; i += kBlock) {
        const int64_t n = smaller(kBlock, cols - i);
        widen(grad + i, g, n);
        widen(x + i, value, n);
        widen(weight + i, scale, n);
        if (grad_weight) {
            for (int64_t j = 0; j < n; j++) grad_weight[i + j] += g[j] * value[j] * r;
        }
        for (int64_t j = 0; j < n; j++) value[j] = r * (g[j] * (scale[j] + offset) - value[j] * pull);
        narrow(value, grad_x + i, n);
    }
}

template <class T>
int32_t norm_backward(const void* grad, const void* x, const void* weight, int64_t rows, int64_t cols, float eps,
                      float offset, void* grad_x, float* grad_weight, int32_t parts, int32_t threads) {
    // Each part has its own row of grad_weight, which the caller adds up in order.
#pragma omp parallel for schedule(static) num_threads(worthwhile(threads, rows* cols))
    for (int32_t part = 0; part < parts; part++) {
        const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
        float* sums = grad_weight ? grad_weight + part * cols : nullptr;
        if (sums) memset(sums, 0, sizeof(float) * (size_t)cols);
        for (int64_t row = begin; row < end; row++) {
            norm_backward_row((const T*)grad + row * cols, (const T*)x + row * cols, (const T*)weight, cols, eps,
                              offset, (T*)grad_x + row * cols, sums);
        }
    }
    return FB_OK;
}

}  // namespace

int32_t rms_norm(const void* x, const void* weight, int32_t dtype, int64_t rows, int64_t cols, float eps, float offset,
                 int32_t round_first, void* y, int32_t threads) {
    if (rows < 0 || cols < 1) return FB_BAD_ARGUMENT;
    FB_BY_DTYPE(dtype, norm, x, weight, rows, cols, eps, offset, round_first, y, threads)
}

int32_t rms_norm_backward(const void* grad, const void* x, const void* weight, int32_t dtype, int64_t rows,
                          int64_t cols, float eps, float offset, void* grad_x, float* grad_weight, int32_t parts,
                          int32_t threads) {
    if (rows < 0 || cols < 1 || parts < 1) return FB_BAD_ARGUMENT;
    FB_BY_DTYPE(dtype, norm_backward, grad, x, weight, rows, cols, eps, offset, grad_x, grad_weight, parts, threads)
}

FB_END
