// Attention, backward: gradients of q, k and v from the rows' log-sum-exp, with the probabilities computed anew.
//
//     p = exp(scale * q k^T + mask - lse)     dv = p^T do
//     dp = do v^T                             ds = p * (dp - delta),  delta = sum(do * out) per row
//     dq = scale * ds k                       dk = scale * ds^T q
//
// (Dao et al., FlashAttention, arXiv:2205.14135, algorithm 4.) A task is the heads that share one key head: it walks
// over blocks of keys, and for each over blocks of 64 query rows. p and ds of a block pair are kept in the product's
// type, ds in both orders that its two sums need. dk and dv of the block and dq of all rows are summed in fp32 in the
// workspace.
//
// With too few key heads for the threads, a task is instead a run of key blocks (for dk and dv) or of query blocks (for
// dq), which takes the scores twice: 7 products in place of 5. Every sum runs over the same blocks in the same order
// either way, so the result depends neither on the number of threads nor on chance.
//
// Cost: 10 D flops and one exp2 per visible (query, key); 14 D where split.

#include "../attention.h"

FB_BEGIN

namespace {

constexpr int64_t block_rows = 64;
constexpr int64_t strip = tile_columns * lanes;  // keys whose scores are in registers at once
constexpr int64_t block_keys = strip > 128 ? strip : 128;

// What a task computes: dk and dv of some key blocks from all rows, or dq of some rows from all key blocks, or both.
struct Share {
    int64_t first_key, last_key, first_row, last_row;
    bool keys, rows;
};

template <class Element>
class Backward {
    using Product = typename ProductOf<Element>::type;
    static constexpr int64_t G = Product::group;
    static constexpr int64_t ld = block_keys + lanes;  // not a power of two: columns would share cache sets

    const FbAttention& args;
    const Sight sight;
    const Dim<Product> qk, v;
    const int64_t group;     // query heads per key head
    const int64_t capacity;  // rows of a head, rounded up to blocks
    const float c;

    uint32_t *keys, *key_lanes, *key_rows_, *values, *value_lanes;
    uint32_t *queries, *query_rows_, *grads, *grad_rows_;
    uint32_t *p_columns, *ds_columns, *ds_rows;
    float *strip_p, *bias, *best, *shift, *delta, *dq, *dk, *dv;
    const uint32_t *key_rows, *query_rows, *grad_rows;
    int64_t spans[block_rows / tile_rows][2];  // keys of the block that each four rows see
    int64_t runs[block_keys / lanes][2];       // rows of the block that see each register of keys

  public:
    Backward(const FbAttention& args_, Arena& arena)
        : args(args_),
          sight(args_),
          qk(args_.qk_size),
          v(args_.v_size),
          group(args_.heads / args_.kv_heads),
          capacity(round_up(args_.q_length, block_rows)),
          c(args_.scale * log2_e) {
        keys = arena.take<uint32_t>(block_keys * qk.units);
        key_lanes = arena.take<uint32_t>(block_keys * qk.units);
        key_rows_ = arena.take<uint32_t>(block_keys / G * qk.width);
        values = arena.take<uint32_t>(block_keys * v.units);
        value_lanes = arena.take<uint32_t>(block_keys * v.units);
        queries = arena.take<uint32_t>(block_rows * larger(qk.units, v.units));  // holds rows of out as well
        query_rows_ = arena.take<uint32_t>(block_rows / G * qk.width);
        grads = arena.take<uint32_t>(block_rows * v.units);
        grad_rows_ = arena.take<uint32_t>(block_rows / G * v.width);
        p_columns = arena.take<uint32_t>(block_rows / G * ld);
        ds_columns = arena.take<uint32_t>(block_rows / G * ld);
        ds_rows = G == 1 ? ds_columns : arena.take<uint32_t>(block_rows * ld / G);
        strip_p = arena.take<float>(tile_rows * strip);
        bias = arena.take<float>(tile_rows * strip);
        best = arena.take<float>(strip);
        shift = arena.take<float>(group * capacity);
        delta = arena.take<float>(group * capacity);
        dq = arena.take<float>(group * capacity * qk.width);
        dk = arena.take<float>(block_keys * qk.width);
        dv = arena.take<float>(block_keys * v.width);
    }

    void run(int64_t batch, int64_t kv_head, const Share& share) {
        prepare_rows(batch, kv_head * group, share);
        for (int64_t key = share.first_key; key < share.last_key; key += block_keys) {
            bool packed = false;
            memset(dk, 0, (size_t)(block_keys * qk.width) * sizeof(float));
            memset(dv, 0, (size_t)(block_keys * v.width) * sizeof(float));
            for (int64_t g = 0; g < group; g++) {
                for (int64_t row = share.first_row; row < share.last_row; row += block_rows) {
                    if (sight.limit(smaller(row + block_rows, args.q_length) - 1) <= key) continue;
                    if (!packed) pack_keys(batch, kv_head, key);
                    packed = true;
                    visit(batch, kv_head * group + g, g, row, key, share);
                }
            }
            if (share.keys) write_keys(batch, kv_head, key);
        }
        if (share.rows) write_rows(batch, kv_head * group, share);
    }

  private:
    // Shift and delta of the task's rows. Rows that see nothing, or do not exist, get a shift that makes every p zero.
    void prepare_rows(int64_t batch, int64_t head, const Share& share) {
        const int64_t padded = round_up(share.last_row - share.first_row, block_rows);
        for (int64_t g = 0; g < group; g++) {
            const float* lse = args.lse + (batch * args.heads + head + g) * args.q_length;
            if (share.rows)
                memset(dq + (g * capacity + share.first_row) * qk.width, 0,
                       (size_t)(padded * qk.width) * sizeof(float));
            for (int64_t row = share.first_row; row < share.first_row + padded; row += block_rows) {
                const int64_t count = smaller(block_rows, args.q_length - row);
                copy_rows(row_of<Element>(args.out, batch, head + g, row), args.out.row_stride, count, count, v,
                          queries);
                copy_rows(row_of<Element>(args.grad_out, batch, head + g, row), args.grad_out.row_stride, count, count,
                          v, grads);
                for (int64_t r = 0; r < block_rows; r++) {
                    const bool sees = r < count && lse[row + r] != hidden;
                    shift[g * capacity + row + r] = sees ? -lse[row + r] * log2_e : hidden;
                    delta[g * capacity + row + r] = r < count ? dot(queries + r * v.units, grads + r * v.units) : 0;
                }
            }
        }
    }

    float dot(const uint32_t* a, const uint32_t* b) const {
        Vec sum = {};
        for (int64_t u = 0; u < v.units; u += lanes) sum = Product::accumulate(sum, load(a + u), load(b + u));
        return total(sum);
    }

    void pack_keys(int64_t batch, int64_t head, int64_t key) {
        const int64_t present = smaller(block_keys, args.k_length - key);
        copy_rows(row_of<Element>(args.k, batch, head, key), args.k.row_stride, present, block_keys, qk, keys);
        transpose(keys, qk.units, block_keys, qk.units, key_lanes, block_keys);
        key_rows = by_rows(keys, block_keys, qk, key_rows_);
        copy_rows(row_of<Element>(args.v, batch, head, key), args.v.row_stride, present, block_keys, v, values);
        transpose(values, v.units, block_keys, v.units, value_lanes, block_keys);
    }

    void pack_rows(int64_t batch, int64_t head, int64_t row) {
        const int64_t count = smaller(block_rows, args.q_length - row);
        copy_rows(row_of<Element>(args.q, batch, head, row), args.q.row_stride, count, block_rows, qk, queries);
        query_rows = by_rows(queries, block_rows, qk, query_rows_);
        copy_rows(row_of<Element>(args.grad_out, batch, head, row), args.grad_out.row_stride, count, block_rows, v,
                  grads);
        grad_rows = by_rows(grads, block_rows, v, grad_rows_);
    }

    // Adds what one block of rows and one block of keys have to do with each other.
    void visit(int64_t batch, int64_t head, int64_t g, int64_t row, int64_t key, const Share& share) {
        const int64_t tiles = round_up(smaller(block_rows, args.q_length - row), tile_rows) / tile_rows;
        bool packed = false;
        for (auto& span : spans) span[0] = block_keys, span[1] = 0;
        for (auto& run : runs) run[0] = block_rows, run[1] = 0;
        for (int64_t at = 0; at < block_keys; at += strip) {
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t r = tile * tile_rows;
                const View view = sight.look(batch, head, row + r, key + at, strip, bias, best);
                if (view.low >= view.high) {
                    zero(r, at, at + strip);
                    continue;
                }
                if (!packed) pack_rows(batch, head, row);
                packed = true;
                zero(r, at, at + view.low);
                take(r, at, view, shift + g * capacity + row + r, delta + g * capacity + row + r);
                zero(r, at + view.high, at + strip);
                spans[tile][0] = smaller(spans[tile][0], at + view.low);
                spans[tile][1] = larger(spans[tile][1], at + view.high);
                for (int64_t i = (at + view.low) / lanes; i < (at + view.high) / lanes; i++) {
                    runs[i][0] = smaller(runs[i][0], r);
                    runs[i][1] = r + tile_rows;  // rows come in order
                }
            }
        }
        if (!packed) return;
        if (share.rows) add_to_rows(dq + (g * capacity + row) * qk.width, tiles);
        if (share.keys) add_to_keys();
    }

    void zero(int64_t r, int64_t from, int64_t to) {
        if (from >= to) return;
        for (int64_t i = r; i < r + tile_rows; i += G) {
            memset(p_columns + i / G * ld + from, 0, (size_t)(to - from) * 4);
            memset(ds_columns + i / G * ld + from, 0, (size_t)(to - from) * 4);
        }
        if (G == 1) return;
        for (int64_t i = r; i < r + tile_rows; i++)
            memset(ds_rows + (i * ld + from) / G, 0, (size_t)((to - from) / G) * 4);
    }

    // p and ds of four rows and the keys of a strip that they see.
    void take(int64_t r, int64_t strip_at, const View& view, const float* shifts, const float* deltas) {
        const bool limited = view.limit(0) < view.high;
        by_width(view.high - view.low, [&](int64_t offset, auto width) {
            constexpr int N = decltype(width)::value;
            const int64_t in_strip = view.low + offset, at = strip_at + in_strip;
            Vec p[tile_rows][N], ds[tile_rows][N];
            clear(p);
            multiply<Product>(p, qk.steps, queries + r * qk.units, qk.units, 1, key_lanes + at, block_keys);
            each<N>([&](int i, int j) {
                Vec x = p[i][j] * splat(c);
                if (view.biased) x = x + load(bias + i * strip + in_strip + j * lanes);
                p[i][j] = exp2(x + splat(shifts[i]));
                if (limited) p[i][j] = first_lanes(view.limit(i) - in_strip - j * lanes, p[i][j]);
                store(strip_p + (i * N + j) * lanes, p[i][j]);
            });
            const int64_t column = r / G * ld + at;
            each<N>([&](int i, int j) {
                if (i % 2 == 0)
                    Product::store_columns(p_columns + column + i / G * ld + j * lanes, ld, p[i][j], p[i + 1][j]);
            });
            clear(ds);
            multiply<Product>(ds, v.steps, grads + r * v.units, v.units, 1, value_lanes + at, block_keys);
            each<N>(
                [&](int i, int j) { ds[i][j] = load(strip_p + (i * N + j) * lanes) * (ds[i][j] - splat(deltas[i])); });
            uint32_t* const row = ds_rows + (r * ld + at) / G;
            each<N>([&](int i, int j) {
                if (i % 2 == 0)
                    Product::store_both(ds_columns + column + i / G * ld + j * lanes, row + (i * ld + j * lanes) / G,
                                        ld, ds[i][j], ds[i + 1][j]);
            });
        });
    }

    void add_to_rows(float* target, int64_t tiles) {
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t low = spans[tile][0], high = spans[tile][1];
            if (low >= high) continue;
            accumulate_rows<Product>(target + tile * tile_rows * qk.width, qk.width, qk.width, (high - low) / G,
                                     ds_rows + (tile * tile_rows * ld + low) / G, ld / G, 1,
                                     key_rows + low / G * qk.width, qk.width);
        }
    }

    void add_to_keys() {
        for (int64_t key = 0; key < block_keys; key += tile_rows) {
            const int64_t low = runs[key / lanes][0], steps = (runs[key / lanes][1] - low) / G;
            if (steps <= 0) continue;
            accumulate_rows<Product>(dv + key * v.width, v.width, v.width, steps, p_columns + low / G * ld + key, 1, ld,
                                     grad_rows + low / G * v.width, v.width);
            accumulate_rows<Product>(dk + key * qk.width, qk.width, qk.width, steps, ds_columns + low / G * ld + key, 1,
                                     ld, query_rows + low / G * qk.width, qk.width);
        }
    }

    void write_keys(int64_t batch, int64_t head, int64_t key) {
        for (int64_t i = 0; i < smaller(block_keys, args.k_length - key); i++) {
            write_row(dk + i * qk.width, qk.size, args.scale,
                      (Element*)row_of<Element>(args.grad_k, batch, head, key + i));
            write_row(dv + i * v.width, v.size, 1.0f, (Element*)row_of<Element>(args.grad_v, batch, head, key + i));
        }
    }

    void write_rows(int64_t batch, int64_t head, const Share& share) {
        for (int64_t g = 0; g < group; g++)
            for (int64_t row = share.first_row; row < share.last_row; row++)
                write_row(dq + (g * capacity + row) * qk.width, qk.size, args.scale,
                          (Element*)row_of<Element>(args.grad_q, batch, head + g, row));
    }
};

template <class Element>
int64_t bytes(const FbAttention& args) {
    Arena arena{nullptr};
    Backward<Element>(args, arena);
    return arena.used;
}

template <class Element>
int32_t backward(const FbAttention& args, int32_t threads) {
    const int64_t heads = args.batch * args.kv_heads, per_thread = bytes<Element>(args);
    const int64_t rounds = (heads + threads - 1) / threads;
    const bool split = 5 * rounds * threads > 7 * heads;
    const int64_t run_rows = 4 * block_rows;
    const int64_t key_tasks = split ? (args.k_length + block_keys - 1) / block_keys : 0;
    const int64_t tasks = split ? key_tasks + (args.q_length + run_rows - 1) / run_rows : 1;
#pragma omp parallel num_threads(threads)
    {
        Arena arena{(char*)args.workspace + thread_number() * per_thread};
        Backward<Element> task(args, arena);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < heads * tasks; i++) {
            const int64_t head = i / tasks, part = i % tasks, row = (part - key_tasks) * run_rows;
            Share share = {0, args.k_length, 0, args.q_length, !split, !split};
            if (split && part < key_tasks) {
                share.first_key = part * block_keys;
                share.last_key = smaller(share.first_key + block_keys, args.k_length);
                share.keys = true;
            } else if (split) {
                share.first_row = row;
                share.last_row = smaller(row + run_rows, args.q_length);
                share.rows = true;
            }
            task.run(head / args.kv_heads, head % args.kv_heads, share);
        }
    }
    return FB_OK;
}

}  // namespace

int64_t attention_backward_bytes(const FbAttention& args, int32_t threads) {
    const int32_t dtype = args.dtype;
    return threads * (dtype == FB_F32 ? bytes<float>(args) : dtype == FB_F16 ? bytes<f16>(args) : bytes<bf16>(args));
}

int32_t attention_backward(const FbAttention* args, int32_t threads) {
    if (!acceptable(*args)) return FB_BAD_ARGUMENT;
    switch (args->dtype) {
        case FB_F32:
            return backward<float>(*args, threads);
        case FB_F16:
            return backward<f16>(*args, threads);
        default:
            return backward<bf16>(*args, threads);
    }
}

FB_END
