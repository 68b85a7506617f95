// What the two passes of attention share: sizes, masks, and how rows of tensors become operands of `multiply`.
//
// Scores live in base 2: with c = scale * log2(e), exp(scale * s - lse) = exp2(c * s - lse * log2(e)).

#pragma once

#include "rows.h"
#include "tile.h"

#ifdef _OPENMP
#include <omp.h>
#endif

FB_BEGIN

constexpr float log2_e = 1.44269504f, ln_2 = 0.693147181f;
constexpr float hidden = -INFINITY;
// An additive mask hides a key with its dtype's lowest number as often as with -inf.
constexpr float hidden_below = -1e30f;

static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Which product a tensor's elements are multiplied with: bf16 directly where the level can, else after widening.
template <class Element>
struct ProductOf {
    using type = Single;
};
#if FB_AVX512BF16
template <>
struct ProductOf<bf16> {
    using type = Pairs;
};
#endif

// Hands out pieces of a workspace, each on a cache line of its own. Over a null workspace it only counts.
struct Arena {
    char* base;
    int64_t used = 0;

    template <class T>
    T* take(int64_t count) {
        T* piece = base ? (T*)(base + used) : nullptr;
        used += round_up(count * (int64_t)sizeof(T), 64);
        return piece;
    }
};

// The sizes of one head's operands. `units` is the length of a natural row (elements as they come, widened if need be,
// zeros at the end), `width` that of a row of fp32 results.
template <class Product>
struct Dim {
    int64_t size, steps, units, width;

    explicit Dim(int64_t size_)
        : size(size_), steps(size_ / Product::group), units(round_up(steps, lanes)), width(round_up(size_, lanes)) {}
};

template <class Element>
FB_INLINE const Element* row_of(const FbRows& rows, int64_t batch, int64_t head, int64_t row) {
    return (const Element*)rows.data + batch * rows.batch_stride + head * rows.head_stride + row * rows.row_stride;
}

// `count` rows of a tensor, `stride` elements apart -> `padded` natural rows, those beyond `count` zero.
template <class Product, class Element>
static void copy_rows(const Element* from, int64_t stride, int64_t count, int64_t padded, const Dim<Product>& dim,
                      uint32_t* to) {
    for (int64_t r = 0; r < count; r++, from += stride, to += dim.units) {
        if constexpr (Product::group == 2 || sizeof(Element) == 4) {
            memcpy(to, from, (size_t)dim.size * sizeof(Element));
        } else {
            widen(from, (float*)to, dim.size);
        }
        memset(to + dim.steps, 0, (size_t)(dim.units - dim.steps) * 4);
    }
    memset(to, 0, (size_t)((padded - count) * dim.units) * 4);
}

// Natural rows as the right operand of a sum over rows: [rows / group][width] units. Single needs no rearranging.
template <class Product>
static const uint32_t* by_rows(const uint32_t* natural, int64_t rows, const Dim<Product>& dim, uint32_t* scratch) {
    if constexpr (Product::group == 2) {
        Product::pair_rows(natural, dim.units, rows, dim.width, scratch);
        return scratch;
    } else {
        return natural;
    }
}

// fp32 results, which are multiplied by a factor in place, as a row of a tensor.
template <class Element>
static void write_row(float* from, int64_t size, float factor, Element* to) {
    for (int64_t i = 0; i < size; i++) from[i] *= factor;
    narrow(from, to, size);
}

// What four query rows see of a run of keys.
struct View {
    int64_t low, high;  // multiples of lanes; outside of them nothing is visible
    int64_t first;      // keys visible to the first row as far as causality and the end of the keys go,
    int64_t step;       // and how many more each next row sees; rows beyond `rows` see what the last one does
    int64_t rows;
    bool biased;  // the bias rows hold what to add to the scores

    int64_t limit(int64_t row) const { return first + step * (row < rows ? row : rows - 1); }
};

struct Sight {
    const FbAttention& args;
    bool masked;

    explicit Sight(const FbAttention& args_) : args(args_), masked(args_.mask.data != nullptr) {}

    // How many keys query `row` may see if no mask forbids it.
    int64_t limit(int64_t row) const {
        if (!args.causal) return args.k_length;
        const int64_t visible = row + 1 + args.k_length - args.q_length;
        return visible < 0 ? 0 : smaller(visible, args.k_length);
    }

    // The view of rows `row` .. `row` + 3 on keys `key` .. `key` + `keys`, a multiple of lanes; fills bias
    // [4][keys] (and `best` [keys], its column-wise maximum) if there is a mask. Empty if low >= high.
    View look(int64_t batch, int64_t head, int64_t row, int64_t key, int64_t keys, float* bias, float* best) const {
        View view;
        view.rows = smaller(tile_rows, args.q_length - row);
        view.step = args.causal ? 1 : 0;
        view.first = args.causal ? row + 1 + args.k_length - args.q_length - key : args.k_length - key;
        view.low = 0;
        view.high = smaller(limit(row + view.rows - 1) - key, keys);
        view.biased = false;
        if (view.high > 0 && masked) {
            switch (args.mask_dtype) {
                case FB_BOOL:
                    read<uint8_t>(view, batch, head, row, key, keys, bias, best);
                    break;
                case FB_F32:
                    read<float>(view, batch, head, row, key, keys, bias, best);
                    break;
                case FB_F16:
                    read<f16>(view, batch, head, row, key, keys, bias, best);
                    break;
                default:
                    read<bf16>(view, batch, head, row, key, keys, bias, best);
            }
        }
        if (view.high > view.low) {
            view.low = view.low / lanes * lanes;
            view.high = round_up(view.high, lanes);
        }
        return view;
    }

  private:
    FB_INLINE float bias_of(uint8_t visible) { return visible ? 0.0f : hidden; }
    template <class Element>
    FB_INLINE float bias_of(Element value) {
        const float added = to_float(value);
        return added > hidden_below ? added * log2_e : hidden;
    }

    template <class Element>
    void read(View& view, int64_t batch, int64_t head, int64_t row, int64_t key, int64_t keys, float* bias,
              float* best) const {
        const int64_t present = view.high;
        int32_t plain = 1;
        for (int64_t r = 0; r < tile_rows; r++) {
            const Element* mask = row_of<Element>(args.mask, batch, head, row + smaller(r, view.rows - 1)) + key;
            float* line = bias + r * keys;
            int32_t zero = 1;
            for (int64_t j = 0; j < present; j++) {
                line[j] = bias_of(mask[j]);
                zero &= line[j] == 0;
            }
            for (int64_t j = 0; j < present; j++) best[j] = r && best[j] > line[j] ? best[j] : line[j];
            for (int64_t j = present; j < round_up(present, lanes); j++) line[j] = hidden;
            plain &= zero;
        }
        view.biased = !plain;
        while (view.high > 0 && best[view.high - 1] == hidden) view.high--;
        while (view.low < view.high && best[view.low] == hidden) view.low++;
    }
};

// Whether a kernel takes these arguments; pointers are trusted.
static inline bool acceptable(const FbAttention& args) {
    const int64_t even = args.dtype == FB_BF16 ? 2 : 1;
    return args.dtype >= FB_F32 && args.dtype <= FB_BF16 && args.mask_dtype >= FB_F32 && args.mask_dtype <= FB_BOOL &&
           args.kv_heads > 0 && args.heads % args.kv_heads == 0 && args.qk_size > 0 && args.v_size > 0 &&
           args.qk_size % even == 0 && args.v_size % even == 0;
}

int64_t attention_forward_bytes(const FbAttention& args, int32_t threads);
int64_t attention_backward_bytes(const FbAttention& args, int32_t threads);

static inline int32_t thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

FB_END
