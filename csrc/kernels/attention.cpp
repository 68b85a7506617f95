// Attention, forward: out = softmax(scale * q k^T + mask) v without the [T, T] matrix.
//
// A task is one head and up to 256 of its query rows. It walks over the keys in blocks that fit the L1 cache; each
// block is copied and packed once, then every four query rows take their scores against it (4 x 64 at a time in
// registers), raise their running maximum, turn the scores into probabilities of the product's type, and add their
// share to an fp32 output kept in the workspace (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., FlashAttention,
// arXiv:2205.14135). Keys that causality or a mask hides from all four rows are skipped in steps of one register.
//
// Cost: 4 D flops and one exp2 per visible (query, key); reads q once, k and v once per 256 rows; writes out and lse.
// A row's result does not depend on how rows are split into tasks, so nor on the number of threads.

#include "../attention.h"

FB_BEGIN

namespace {

constexpr int64_t largest_task = 256;
constexpr int64_t cache_bytes = 32 << 10;  // packed keys and values of one block

template <class Element>
class Forward {
    using Product = typename ProductOf<Element>::type;
    static constexpr int64_t G = Product::group;

    const FbAttention& args;
    const Sight sight;
    const Dim<Product> qk, v;
    const int64_t block, capacity;  // keys of a block; rows of a task
    const float c;
    const bool scaled;  // scores are stored times c: needed where a bias is added or c would turn the order around

    uint32_t *queries, *natural, *keys, *values, *weights;
    float *scores, *bias, *best, *out, *top, *sum;
    uint8_t* fresh;

  public:
    static int64_t block_keys(const FbAttention& args) {
        const int64_t bytes = (args.qk_size + args.v_size) * 4 / G, unit = tile_columns * lanes;
        const int64_t fitting = larger(cache_bytes / bytes / unit * unit, unit);
        return smaller(fitting, round_up(larger(args.k_length, 1), unit));
    }

    Forward(const FbAttention& args_, int64_t capacity_, Arena& arena)
        : args(args_),
          sight(args_),
          qk(args_.qk_size),
          v(args_.v_size),
          block(block_keys(args_)),
          capacity(round_up(capacity_, tile_rows)),
          c(args_.scale * log2_e),
          scaled(sight.masked || !(c > 0)) {
        queries = arena.take<uint32_t>(capacity * qk.units);
        natural = arena.take<uint32_t>(block * larger(qk.units, v.units));
        keys = arena.take<uint32_t>(block * qk.units);
        values = arena.take<uint32_t>(block * larger(v.units, v.width));
        weights = arena.take<uint32_t>(tile_rows * block);
        scores = arena.take<float>(tile_rows * block);
        bias = arena.take<float>(tile_rows * block);
        best = arena.take<float>(block);
        out = arena.take<float>(capacity * v.width);
        top = arena.take<float>(capacity);
        sum = arena.take<float>(capacity * lanes);
        fresh = arena.take<uint8_t>(capacity / tile_rows);
    }

    void run(int64_t batch, int64_t head, int64_t row, int64_t rows) {
        const int64_t kv_head = head / (args.heads / args.kv_heads);
        copy_rows(row_of<Element>(args.q, batch, head, row), args.q.row_stride, rows, round_up(rows, tile_rows), qk,
                  queries);
        for (int64_t r = 0; r < round_up(rows, tile_rows); r++) top[r] = hidden;
        memset(sum, 0, (size_t)(round_up(rows, tile_rows) * lanes) * sizeof(float));
        memset(fresh, 1, (size_t)(round_up(rows, tile_rows) / tile_rows));
        const int64_t end = sight.limit(row + rows - 1);
        for (int64_t key = 0; key < end; key += block) {
            bool packed = false;
            for (int64_t r = 0; r < rows; r += tile_rows) {
                const View view = sight.look(batch, head, row + r, key, block, bias, best);
                if (view.low >= view.high) continue;
                if (!packed) pack(batch, kv_head, key);
                packed = true;
                attend(r, view);
            }
        }
        for (int64_t r = 0; r < rows; r++) finish(batch, head, row, r);
    }

  private:
    void pack(int64_t batch, int64_t head, int64_t key) {
        const int64_t present = smaller(block, args.k_length - key);
        copy_rows(row_of<Element>(args.k, batch, head, key), args.k.row_stride, present, block, qk, natural);
        transpose(natural, qk.units, block, qk.units, keys, block);
        uint32_t* rows = G == 1 ? values : natural;
        copy_rows(row_of<Element>(args.v, batch, head, key), args.v.row_stride, present, block, v, rows);
        by_rows(rows, block, v, values);
    }

    // Takes one block of keys into account for rows r .. r + 3 of the task.
    void attend(int64_t r, const View& view) {
        score(r, view);
        const Vec scale = soften(r, view);
        const bool first = fresh[r / tile_rows];
        fresh[r / tile_rows] = 0;
        by_width(v.width, [&](int64_t offset, auto width) {
            constexpr int N = decltype(width)::value;
            float* target = out + r * v.width + offset;
            Vec o[tile_rows][N];
            each<N>([&](int i, int j) {
                o[i][j] = first ? Vec{} : load(target + i * v.width + j * lanes) * splat(scale[i]);
            });
            multiply<Product>(o, (view.high - view.low) / G, weights + view.low / G, block / G, 1,
                              values + view.low / G * v.width + offset, v.width);
            each<N>([&](int i, int j) { store(target + i * v.width + j * lanes, o[i][j]); });
        });
    }

    void score(int64_t r, const View& view) {
        by_width(view.high - view.low, [&](int64_t offset, auto width) {
            constexpr int N = decltype(width)::value;
            const int64_t at = view.low + offset;
            Vec s[tile_rows][N];
            clear(s);
            multiply<Product>(s, qk.steps, queries + r * qk.units, qk.units, 1, keys + at, block);
            each<N>([&](int i, int j) {
                const int64_t place = i * block + at + j * lanes;
                Vec value = s[i][j];
                if (scaled) value = value * splat(c);
                if (view.biased) value = value + load(bias + place);
                store(scores + place, value);
            });
        });
        if (view.limit(0) < view.high)
            for (int64_t i = 0; i < tile_rows; i++)
                for (int64_t j = larger(view.limit(i), view.low); j < view.high; j++) scores[i * block + j] = hidden;
    }

    // Turns scores into weights 2^(score - maximum) and adds them to the sums. The factor for what was added before.
    Vec soften(int64_t r, const View& view) {
        const float unit = scaled ? 1.0f : c;
        float shift[tile_rows];
        Vec scale = {};
        for (int64_t i = 0; i < tile_rows; i++) {
            const float* line = scores + i * block;
            Vec most = load(line + view.low);
            for (int64_t j = view.low + lanes; j < view.high; j += lanes) most = larger(most, load(line + j));
            const float before = top[r + i], now = largest(most);
            const float raised = now > before ? now : before;
            const float base = raised == hidden ? 0.0f : raised;
            shift[i] = -base * unit;
            scale[i] = (before - base) * unit;
            top[r + i] = raised;
        }
        scale = exp2(scale);
        for (int64_t i = 0; i < tile_rows; i++) {
            const float* line = scores + i * block;
            uint32_t* weight = weights + i * block / G;
            float* sums = sum + (r + i) * lanes;
            Vec more = load(sums) * splat(scale[i]);
            for (int64_t j = view.low; j < view.high; j += lanes) {
                const Vec p = exp2(madd(load(line + j), splat(unit), splat(shift[i])));
                more = more + p;
                Product::store_row(weight + j / G, p);
            }
            store(sums, more);
        }
        return scale;
    }

    void finish(int64_t batch, int64_t head, int64_t row, int64_t r) {
        const float all = total(load(sum + r * lanes));
        Element* target = (Element*)row_of<Element>(args.out, batch, head, row + r);
        const bool visible = all > 0;
        if (visible || all != all)
            write_row(out + r * v.width, v.size, 1.0f / all, target);
        else
            memset(target, 0, (size_t)v.size * sizeof(Element));
        const float unit = scaled ? ln_2 : args.scale;
        args.lse[(batch * args.heads + head) * args.q_length + row + r] = visible ? top[r] * unit + logf(all) : hidden;
    }
};

// A single query per head sees all keys; the heads that share keys then are rows of one head.
FbAttention grouped(FbAttention args) {
    const int64_t group = args.heads / args.kv_heads;
    if (args.q_length != 1 || group == 1) return args;
    FbRows* const turned[] = {&args.q, &args.out, &args.mask};
    for (FbRows* rows : turned) {
        rows->row_stride = rows->head_stride;
        rows->head_stride *= group;
    }
    args.heads = args.kv_heads;
    args.q_length = group;
    args.causal = 0;
    return args;
}

// Fewer rows per task where there would be too few tasks to share out.
int64_t task_rows(const FbAttention& args, int32_t threads) {
    int64_t rows = smaller(largest_task, round_up(args.q_length, tile_rows));
    while (rows > 32 && args.batch * args.heads * ((args.q_length + rows - 1) / rows) < 2 * threads) rows /= 2;
    return round_up(rows, tile_rows);
}

template <class Element>
int64_t bytes(const FbAttention& args, int32_t threads) {
    Arena arena{nullptr};
    Forward<Element>(args, task_rows(args, threads), arena);
    return arena.used;
}

template <class Element>
int32_t forward(const FbAttention& args, int32_t threads) {
    const int64_t rows = task_rows(args, threads), per_thread = bytes<Element>(args, threads);
    const int64_t pieces = (args.q_length + rows - 1) / rows, heads = args.batch * args.heads;
#pragma omp parallel num_threads(threads)
    {
        Arena arena{(char*)args.workspace + thread_number() * per_thread};
        Forward<Element> task(args, rows, arena);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < heads * pieces; i++) {
            const int64_t head = i / pieces, row = (pieces - 1 - i % pieces) * rows;  // the longest first, if causal
            task.run(head / args.heads, head % args.heads, row, smaller(rows, args.q_length - row));
        }
    }
    return FB_OK;
}

}  // namespace

int64_t attention_forward_bytes(const FbAttention& given, int32_t threads) {
    const FbAttention args = grouped(given);
    const int32_t dtype = args.dtype;
    return threads * (dtype == FB_F32   ? bytes<float>(args, threads)
                      : dtype == FB_F16 ? bytes<f16>(args, threads)
                                        : bytes<bf16>(args, threads));
}

int32_t attention_workspace(const FbAttention* args, int32_t backward, int64_t* bytes, int32_t threads) {
    if (!acceptable(*args)) return FB_BAD_ARGUMENT;
    *bytes = backward ? attention_backward_bytes(*args, threads) : attention_forward_bytes(*args, threads);
    return FB_OK;
}

int32_t attention(const FbAttention* args, int32_t threads) {
    if (!acceptable(*args)) return FB_BAD_ARGUMENT;
    switch (args->dtype) {
        case FB_F32:
            return forward<float>(grouped(*args), threads);
        case FB_F16:
            return forward<f16>(grouped(*args), threads);
        default:
            return forward<bf16>(grouped(*args), threads);
    }
}

FB_END
