// One token of each row of a batch through all layers of a decoder of LLaMA's build. fourbit.h has the equations.
//
// Nothing is computed here: it is the kernels of the other files that run one after the other, in the same order and
// with the same bits as when each is called by itself. What is saved is everything between them (Python took a quarter
// of a token's time), and two or three products with one input share a parallel region and their arranged input.
//
// Cost: that of the kernels.

#include "../attention.h"
#include "../weight.h"

FB_BEGIN

#define FB_KERNEL(name, parameters, arguments) int32_t name parameters;
#include "../kernels.def"
#undef FB_KERNEL

namespace {

// Where the parts of the workspace lie. Over a null workspace it only counts.
struct Buffers {
    char *normed, *q, *k, *v, *attended, *gate, *up, *xa, *attention;
    float* lse;
    int64_t bytes;

    Buffers(const FbDecoder& d, int64_t attention_bytes) {
        Arena arena{(char*)d.workspace};
        const int64_t size = d.dtype == FB_F32 ? 4 : 2, wide = larger(d.hidden, d.heads * d.head);
        int64_t rank = 1;
        for (int64_t i = 0; i < d.layers; ++i) {
            const FbDecoderLayer& layer = d.layer[i];
            const FbProduct* all[] = {&layer.q, &layer.k, &layer.v, &layer.out, &layer.gate, &layer.up, &layer.down};
            for (const FbProduct* product : all) rank = larger(rank, product->rank);
        }
        const auto take = [&](int64_t width) { return arena.take<char>(d.batch * width * size); };
        normed = take(wide), q = take(d.heads * d.head), k = take(d.kv_heads * d.head), v = take(d.kv_heads * d.head);
        attended = take(wide), gate = take(d.inner), up = take(d.inner), xa = take(rank);
        lse = arena.take<float>(d.batch * d.heads);
        attention = arena.take<char>(attention_bytes);
        bytes = arena.used;
    }
};

template <class T>
void add(const T* more, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) from_float(to_float(to[i]) + to_float(more[i]), to + i);
}

template <class T>
int32_t add_rows(const void* more, int64_t count, void* to) {
    add((const T*)more, count, (T*)to);
    return FB_OK;
}

int32_t add_to(int32_t dtype, const void* more, int64_t count, void* to) {
    FB_BY_DTYPE(dtype, add_rows, more, count, to)
}

// Rows of v to their place among the cached ones: [batch][heads][head] to strides.
void put(const char* from, const FbDecoder& d, int64_t place, void* cache) {
    const int64_t bytes = d.head * (d.dtype == FB_F32 ? 4 : 2);
    for (int64_t row = 0; row < d.batch * d.kv_heads; ++row) {
        memcpy((char*)cache + (row * d.capacity + place) * bytes, from + row * bytes, (size_t)bytes);
    }
}

// Runs kernel after kernel; none after one that failed.
class Walk {
    const FbDecoder& d;
    const Buffers at;
    const int32_t threads;
    int32_t status = FB_OK;

  public:
    Walk(const FbDecoder& d_, const Buffers& at_, int32_t threads_) : d(d_), at(at_), threads(threads_) {}

    int32_t run(int64_t place, const void* cosine, const void* sine, int64_t table_stride, void* x) {
        for (int64_t i = 0; i < d.layers; ++i) {
            const FbDecoderLayer& layer = d.layer[i];
            norm(layer.norm, x, d.batch, d.hidden, at.normed);
            const FbProduct* inputs[] = {&layer.q, &layer.k, &layer.v};
            char* outputs[] = {at.q, at.k, at.v};
            multiply(inputs, outputs, 3, at.normed);
            attend(layer, place, cosine, sine, table_stride);
            multiply(layer.out, at.attended, at.normed);
            add(at.normed, x);
            norm(layer.mlp_norm, x, d.batch, d.hidden, at.normed);
            const FbProduct* gated[] = {&layer.gate, &layer.up};
            char* halves[] = {at.gate, at.up};
            multiply(gated, halves, 2, at.normed);
            step([&] {
                return swiglu(at.gate, d.inner, at.up, d.inner, d.dtype, d.batch, d.inner, d.activation, at.gate,
                              threads);
            });
            multiply(layer.down, at.gate, at.normed);
            add(at.normed, x);
        }
        norm(d.norm, x, d.batch, d.hidden, x);
        return status;
    }

  private:
    template <class Kernel>
    void step(Kernel kernel) {
        if (status == FB_OK) status = kernel();
    }

    void norm(const FbNorm& by, const void* x, int64_t rows, int64_t cols, void* y) {
        step(
            [&] { return rms_norm(x, by.weight, d.dtype, rows, cols, by.eps, by.offset, by.round_first, y, threads); });
    }

    void add(const void* more, void* to) {
        step([&] { return add_to(d.dtype, more, d.batch * d.hidden, to); });
    }

    void multiply(const FbProduct& product, const void* x, char* y) {
        const FbProduct* one[] = {&product};
        multiply(one, &y, 1, x);
    }

    // Several products with one x; together where all are for a few rows, in blocks of one size.
    void multiply(const FbProduct* const* by, char* const* y, int64_t count, const void* x) {
        Product products[3];
        bool alike = true;
        for (int64_t i = 0; i < count; ++i) {
            const FbWeight& weight = by[i]->weight;
            products[i] = {&weight, by[i]->bias, y[i]};
            alike = alike && !by[i]->many && weight.block_size == by[0]->weight.block_size;
        }
        if (alike) {
            step([&] { return linear_group(products, count, x, d.dtype, d.batch, threads); });
        } else {
            for (int64_t i = 0; i < count; ++i) {
                const auto run = by[i]->many ? linear_many : linear;
                step([&] { return run(&by[i]->weight, x, d.dtype, d.batch, by[i]->bias, y[i], threads); });
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            const FbProduct& p = *by[i];
            if (!p.a) continue;
            step([&] {
                return lora_add(x, d.dtype, d.batch, p.weight.cols, p.a, p.b, p.adapter_dtype, p.rank, p.weight.rows,
                                p.scaling, at.xa, y[i], threads);
            });
        }
    }

    void attend(const FbDecoderLayer& layer, int64_t place, const void* cosine, const void* sine,
                int64_t table_stride) {
        if (layer.q_norm.weight) norm(layer.q_norm, at.q, d.batch * d.heads, d.head, at.q);
        if (layer.k_norm.weight) norm(layer.k_norm, at.k, d.batch * d.kv_heads, d.head, at.k);
        const int64_t size = d.dtype == FB_F32 ? 4 : 2;
        const auto rotate = [&](const char* from, int64_t heads, char* to, int64_t head_stride) {
            const int64_t before[] = {heads * d.head, d.head, heads * d.head};
            const int64_t after[] = {heads * head_stride, head_stride, d.head};
            return rotary(from, before, cosine, sine, table_stride, d.dtype, d.batch, heads, 1, d.head, d.rotated, 0,
                          to, after, threads);
        };
        step([&] { return rotate(at.q, d.heads, at.normed, d.head); });
        step([&] { return rotate(at.k, d.kv_heads, (char*)layer.keys + place * d.head * size, d.capacity * d.head); });
        put(at.v, d, place, layer.values);
        const FbAttention args = attention_of(d, at, place + 1, layer.keys, layer.values);
        step([&] { return attention(&args, threads); });
    }

  public:
    static FbAttention attention_of(const FbDecoder& d, const Buffers& at, int64_t tokens, void* keys, void* values) {
        const int64_t heads = d.heads * d.head, cached = d.capacity * d.head;
        FbAttention args = {};
        args.dtype = d.dtype, args.scale = d.scale, args.lse = at.lse, args.workspace = at.attention;
        args.batch = d.batch, args.heads = d.heads, args.kv_heads = d.kv_heads;
        args.q_length = 1, args.k_length = tokens, args.qk_size = args.v_size = d.head;
        args.q = {at.normed, heads, d.head, heads};
        args.k = {keys, d.kv_heads * cached, cached, d.head};
        args.v = {values, d.kv_heads * cached, cached, d.head};
        args.out = {at.attended, heads, d.head, heads};
        if (d.visible) {
            args.mask = {(void*)d.visible, d.capacity, 0, 0};
            args.mask_dtype = FB_BOOL;
        }
        return args;
    }
};

bool fits(const FbProduct& p, int64_t cols, int64_t rows) {
    return is_valid(p.weight) && p.weight.cols == cols && p.weight.rows == rows && rows > 0 && !p.a == !p.b &&
           p.rank >= 0;
}

bool is_walkable(const FbDecoder& d) {
    if (d.dtype < FB_F32 || d.dtype > FB_BF16 || d.batch < 1 || d.kv_heads < 1 || d.heads % d.kv_heads) return false;
    if (d.rotated > d.head || d.head < 1 || d.hidden < 1) return false;
    for (int64_t i = 0; i < d.layers; ++i) {
        const FbDecoderLayer& layer = d.layer[i];
        const int64_t heads = d.heads * d.head, kv_heads = d.kv_heads * d.head;
        if (!fits(layer.q, d.hidden, heads) || !fits(layer.k, d.hidden, kv_heads) ||
            !fits(layer.v, d.hidden, kv_heads) || !fits(layer.out, heads, d.hidden) ||
            !fits(layer.gate, d.hidden, d.inner) || !fits(layer.up, d.hidden, d.inner) ||
            !fits(layer.down, d.inner, d.hidden)) {
            return false;
        }
    }
    return true;
}

}  // namespace

int32_t decoder_workspace(const FbDecoder* decoder, int64_t* bytes, int32_t threads) {
    if (!is_walkable(*decoder) || threads < 1) return FB_BAD_ARGUMENT;
    FbDecoder counted = *decoder;
    counted.workspace = nullptr;
    const FbAttention longest =
        Walk::attention_of(counted, Buffers(counted, 0), larger(decoder->capacity, 1), nullptr, nullptr);
    *bytes = Buffers(counted, attention_forward_bytes(longest, threads)).bytes;
    return FB_OK;
}

int32_t decoder_step(const FbDecoder* decoder, int64_t place, const void* cosine, const void* sine,
                     int64_t table_stride, void* x, int32_t threads) {
    if (!is_walkable(*decoder) || threads < 1 || place < 0 || place >= decoder->capacity) return FB_BAD_ARGUMENT;
    return Walk(*decoder, Buffers(*decoder, 0), threads).run(place, cosine, sine, table_stride, x);
}

FB_END
