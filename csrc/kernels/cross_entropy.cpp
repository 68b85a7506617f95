// Cross-entropy over rows of logits, and its gradient in their place. fourbit.h has the equations.
//
// A row is read three times: for its largest logit, for the sum of exponentials, and for the gradient, which computes
// the exponentials anew because storing them in 16 bits would cost precision. A row of 32,000 bf16 logits takes 64 KB,
// so that the second and third time come from the second-level cache.
//
// Cost: 1 element read from memory and 1 written per logit; 2 exponentials.

#include "../rows.h"

FB_BEGIN

namespace {

// What becomes of a raw logit before the softmax: z = scale * x, then cap * tanh(z / cap) if there is a cap.
struct Shape {
    float scale, cap;
};

void shape_logits(float* z, int64_t n, Shape shape) {
    if (shape.scale != 1.0f) {
        for (int64_t j = 0; j < n; j++) z[j] *= shape.scale;
    }
    if (shape.cap > 0) {
        // tanh(v) = 1 - 2 / (e^(2v) + 1), within 2^-23 of 1: for a logit an absolute error of cap * 2^-23
        const float twice = 2.0f / shape.cap;
        for (int64_t j = 0; j < n; j++) z[j] = shape.cap * (1.0f - 2.0f / (exp_of(twice * z[j]) + 1.0f));
    }
}

template <class T>
float softmax_row(T* logits, int64_t label, int64_t vocabulary, Shape shape, bool want_grad) {
    float z[kBlock], derivative[kBlock];
    float top = -INFINITY;
    for (int64_t i = 0; i < vocabulary; i += kBlock) {
        const int64_t n = smaller(kBlock, vocabulary - i);
        widen(logits + i, z, n);
        shape_logits(z, n, shape);
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < n; j++) top = z[j] > top ? z[j] : top;
    }
    double sum = 0;
    for (int64_t i = 0; i < vocabulary; i += kBlock) {
        const int64_t n = smaller(kBlock, vocabulary - i);
        widen(logits + i, z, n);
        shape_logits(z, n, shape);
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t j = 0; j < n; j++) part += exp_of(z[j] - top);
        sum += part;
    }
    z[0] = to_float(logits[label]);
    shape_logits(z, 1, shape);
    const float nll = (float)log(sum) + (top - z[0]);
    if (!want_grad) return nll;

    const float inverse = (float)(1.0 / sum), cap_squared = shape.cap * shape.cap;
    for (int64_t i = 0; i < vocabulary; i += kBlock) {
        const int64_t n = smaller(kBlock, vocabulary - i);
        widen(logits + i, z, n);
        shape_logits(z, n, shape);
        if (shape.cap > 0) {
            for (int64_t j = 0; j < n; j++) derivative[j] = shape.scale * (1.0f - z[j] * z[j] / cap_squared);
        } else {
            for (int64_t j = 0; j < n; j++) derivative[j] = shape.scale;
        }
        for (int64_t j = 0; j < n; j++) z[j] = exp_of(z[j] - top) * inverse;
        if (label >= i && label < i + n) z[label - i] -= 1.0f;
        for (int64_t j = 0; j < n; j++) z[j] *= derivative[j];
        narrow(z, logits + i, n);
    }
    return nll;
}

template <class T>
int32_t softmax(void* logits, const int64_t* labels, int64_t rows, int64_t vocabulary, Shape shape, int32_t want_grad,
                float* nll, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(worthwhile(threads, rows* vocabulary))
    for (int64_t row = 0; row < rows; row++) {
        nll[row] = softmax_row((T*)logits + row * vocabulary, labels[row], vocabulary, shape, want_grad != 0);
    }
    return FB_OK;
}

}  // namespace

int32_t cross_entropy(void* logits, int32_t dtype, const int64_t* labels, int64_t rows, int64_t vocabulary, float scale,
                      float cap, int32_t want_grad, float* nll, int32_t threads) {
    if (rows < 0 || vocabulary < 1 || cap < 0) return FB_BAD_ARGUMENT;
    for (int64_t row = 0; row < rows; row++) {
        if (labels[row] < 0 || labels[row] >= vocabulary) return FB_BAD_ARGUMENT;
    }
    const Shape shape = {scale, cap};
    FB_BY_DTYPE(dtype, softmax, logits, labels, rows, vocabulary, shape, want_grad, nll, threads)
}

FB_END
