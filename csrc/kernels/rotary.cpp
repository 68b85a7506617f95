// Rotary position embedding. fourbit.h has the equations.
//
// Heads are read and written where they lie, through strides, so that the transposed view an attention layer makes of
// its projections needs no copy. The gradient is the same rotation, the other way round.
//
// Cost: 2 elements moved per element; bound by memory.

#include "../rows.h"

FB_BEGIN

namespace {

constexpr int64_t kMaxRotated = 1024;

// One head at one position: halves a and b of the rotated part, the rest copied.
template <class T>
void rotate(const T* x, int64_t head, int64_t half, const float* cosine, const float* sine, T* y) {
    float a[kBlock], b[kBlock], left[kBlock], right[kBlock];
    for (int64_t i = 0; i < half; i += kBlock) {
        const int64_t n = smaller(kBlock, half - i);
        widen(x + i, a, n);
        widen(x + half + i, b, n);
        const float *cos_a = cosine + i, *cos_b = cosine + half + i, *sin_a = sine + i, *sin_b = sine + half + i;
        for (int64_t j = 0; j < n; j++) left[j] = a[j] * cos_a[j], right[j] = b[j] * sin_a[j];
        round_to<T>(left, n);
        round_to<T>(right, n);
        for (int64_t j = 0; j < n; j++) left[j] -= right[j];
        narrow(left, y + i, n);
        for (int64_t j = 0; j < n; j++) left[j] = b[j] * cos_b[j], right[j] = a[j] * sin_b[j];
        round_to<T>(left, n);
        round_to<T>(right, n);
        for (int64_t j = 0; j < n; j++) left[j] += right[j];
        narrow(left, y + half + i, n);
    }
    if (head > 2 * half) memcpy(y + 2 * half, x + 2 * half, sizeof(T) * (size_t)(head - 2 * half));
}

template <class T>
int32_t rotate_all(const void* x, const int64_t* x_strides, const void* cosine, const void* sine, int64_t table_stride,
                   int64_t batch, int64_t heads, int64_t tokens, int64_t head, int64_t rotated, int32_t inverse,
                   void* y, const int64_t* y_strides, int32_t threads) {
    const int64_t half = rotated / 2;
#pragma omp parallel for collapse(2) schedule(static) num_threads(worthwhile(threads, batch* heads* tokens* head))
    for (int64_t b = 0; b < batch; b++) {
        for (int64_t t = 0; t < tokens; t++) {
            float cos_row[kMaxRotated], sin_row[kMaxRotated];
            const int64_t table = b * table_stride + t * rotated;
            widen((const T*)cosine + table, cos_row, rotated);
            if (inverse) {  // the transpose: the halves of the sine change places and sign
                widen((const T*)sine + table + half, sin_row, half);
                widen((const T*)sine + table, sin_row + half, half);
                for (int64_t j = 0; j < rotated; j++) sin_row[j] = -sin_row[j];
            } else {
                widen((const T*)sine + table, sin_row, rotated);
            }
            const T* from = (const T*)x + b * x_strides[0] + t * x_strides[2];
            T* to = (T*)y + b * y_strides[0] + t * y_strides[2];
            for (int64_t h = 0; h < heads; h++) {
                rotate(from + h * x_strides[1], head, half, cos_row, sin_row, to + h * y_strides[1]);
            }
        }
    }
    return FB_OK;
}

}  // namespace

int32_t rotary(const void* x, const int64_t* x_strides, const void* cosine, const void* sine, int64_t table_stride,
               int32_t dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t head, int64_t rotated,
               int32_t inverse, void* y, const int64_t* y_strides, int32_t threads) {
    if (batch < 0 || heads < 0 || tokens < 0 || rotated < 0 || rotated % 2 || rotated > head || rotated > kMaxRotated) {
        return FB_BAD_ARGUMENT;
    }
    FB_BY_DTYPE(dtype, rotate_all, x, x_strides, cosine, sine, table_stride, batch, heads, tokens, head, rotated,
                inverse, y, y_strides, threads)
}

FB_END
