// The gated activation of an MLP, act(gate) * up, and its gradient. fourbit.h has the equations.
//
// The backward pass recomputes act(gate), so that only gate and up are kept between the passes. Intermediate results
// are rounded where the separate operations would have stored them.
//
// Cost: 3 elements moved per element forward, 5 backward, one exponential each.

#include "../rows.h"

FB_BEGIN

namespace {

enum { kSilu = 0, kGeluTanh = 1 };

constexpr float kSqrt2OverPi = 0.797884561f, kCubic = 0.044715f;

// Both activations are x * sigmoid(s(x)): s = x for SiLU, and 0.5 (1 + tanh u) = sigmoid(2u) for the tanh form of GELU.
struct Silu {
    static inline float share(float x) { return sigmoid(x); }
    static inline float slope(float) { return 1.0f; }
};

struct GeluTanh {
    static inline float share(float x) { return sigmoid(2.0f * kSqrt2OverPi * (x + kCubic * x * x * x)); }
    static inline float slope(float x) { return 2.0f * kSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x); }
};

template <class T, class Act>
void forward_row(const T* gate, const T* up, int64_t cols, T* out) {
    float g[kBlock], u[kBlock];
    for (int64_t i = 0; i < cols; i += kBlock) {
        const int64_t n = smaller(kBlock, cols - i);
        widen(gate + i, g, n);
        widen(up + i, u, n);
        for (int64_t j = 0; j < n; j++) g[j] = g[j] * Act::share(g[j]);
        round_to<T>(g, n);
        for (int64_t j = 0; j < n; j++) g[j] *= u[j];
        narrow(g, out + i, n);
    }
}

// du = dy act(g);  dg = dy u (s + g s (1 - s) slope), s the share.
template <class T, class Act>
void backward_row(const T* grad, const T* gate, const T* up, int64_t cols, T* grad_gate, T* grad_up) {
    float dy[kBlock], g[kBlock], u[kBlock], derivative[kBlock];
    for (int64_t i = 0; i < cols; i += kBlock) {
        const int64_t n = smaller(kBlock, cols - i);
        widen(grad + i, dy, n);
        widen(gate + i, g, n);
        widen(up + i, u, n);
        for (int64_t j = 0; j < n; j++) {
            const float s = Act::share(g[j]);
            derivative[j] = s * (1.0f + g[j] * (1.0f - s) * Act::slope(g[j]));
            g[j] *= s;
        }
        round_to<T>(g, n);
        for (int64_t j = 0; j < n; j++) {
            g[j] *= dy[j];
            u[j] *= dy[j];
        }
        narrow(g, grad_up + i, n);
        round_to<T>(u, n);
        for (int64_t j = 0; j < n; j++) u[j] *= derivative[j];
        narrow(u, grad_gate + i, n);
    }
}

template <class T>
int32_t forward(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int64_t rows, int64_t cols,
                int32_t activation, void* out, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(worthwhile(threads, rows* cols))
    for (int64_t row = 0; row < rows; row++) {
        const T* g = (const T*)gate + row * gate_stride;
        const T* u = (const T*)up + row * up_stride;
        T* to = (T*)out + row * cols;
        activation == kSilu ? forward_row<T, Silu>(g, u, cols, to) : forward_row<T, GeluTanh>(g, u, cols, to);
    }
    return FB_OK;
}

template <class T>
int32_t backward(const void* grad, const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                 int64_t rows, int64_t cols, int32_t activation, void* grad_gate, void* grad_up, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(worthwhile(threads, rows* cols))
    for (int64_t row = 0; row < rows; row++) {
        const T* dy = (const T*)grad + row * cols;
        const T* g = (const T*)gate + row * gate_stride;
        const T* u = (const T*)up + row * up_stride;
        T* dg = (T*)grad_gate + row * cols;
        T* du = (T*)grad_up + row * cols;
        activation == kSilu ? backward_row<T, Silu>(dy, g, u, cols, dg, du)
                            : backward_row<T, GeluTanh>(dy, g, u, cols, dg, du);
    }
    return FB_OK;
}

}  // namespace

int32_t swiglu(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int32_t dtype, int64_t rows,
               int64_t cols, int32_t activation, void* out, int32_t threads) {
    if (rows < 0 || cols < 0 || activation < kSilu || activation > kGeluTanh) return FB_BAD_ARGUMENT;
    FB_BY_DTYPE(dtype, forward, gate, gate_stride, up, up_stride, rows, cols, activation, out, threads)
}

int32_t swiglu_backward(const void* grad, const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                        int32_t dtype, int64_t rows, int64_t cols, int32_t activation, void* grad_gate, void* grad_up,
                        int32_t threads) {
    if (rows < 0 || cols < 0 || activation < kSilu || activation > kGeluTanh) return FB_BAD_ARGUMENT;
    FB_BY_DTYPE(dtype, backward, grad, gate, gate_stride, up, up_stride, rows, cols, activation, grad_gate, grad_up,
                threads)
}

FB_END
