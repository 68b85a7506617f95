/* fourbit's CPU kernels: the C interface.
 *
 * Plain C types only; no torch, no Python. Every pointer is to memory of the caller, contiguous, aligned to its
 * element type, and may be NULL only where said. Kernels return a status; sizes are in elements unless named bytes;
 * `threads` is the number of OpenMP threads to use. A kernel keeps no state and may run on several threads at once.
 *
 * A 4-bit weight: its elements, row-major, in blocks of `block_size`, a power of two from 32 to 4096; the last block
 * may be shorter. Byte i of `packed` is (code[2i] << 4) | code[2i + 1]. value = level of the code * scale of the block.
 */
#ifndef FOURBIT_H
#define FOURBIT_H

#include <stdint.h>

#if defined(_WIN32)
#define FB_EXPORT __declspec(dllexport)
#else
#define FB_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised with every change to a struct or to the parameters of a function; library.py expects the same number. */
#define FB_ABI_VERSION 2

enum { FB_F32 = 0, FB_F16 = 1, FB_BF16 = 2, FB_BOOL = 3 };

enum {
    FB_OK = 0,
    FB_BAD_ARGUMENT = -1, /* a size, dtype or pointer that the kernel does not take */
    FB_NON_FINITE = -2,   /* the input holds NaN or infinity; outputs are undefined */
    FB_NO_MEMORY = -3,
    FB_UNSUPPORTED = -4 /* a level that is not compiled in or that the CPU lacks */
};

/* A 4-bit weight [rows, cols]. Its scales are either `absmax`, or 8-bit codes of them:
 * scale[g] = fp32(nested_map[absmax_codes[g]] * nested_absmax[g / 256]) + nested_offset, each step rounded to fp32. */
typedef struct FbWeight {
    const uint8_t* packed;       /* [ceil(rows * cols / 2)] */
    const float* absmax;         /* [G], G = ceil(rows * cols / block_size); NULL where the scales are nested */
    const uint8_t* absmax_codes; /* [G]; this and the next three are NULL where they are not */
    const float* nested_absmax;  /* [ceil(G / 256)] */
    const float* nested_offset;  /* [1] */
    const float* nested_map;     /* [256] */
    const float* levels;         /* [16], by code */
    int64_t rows, cols, block_size;
} FbWeight;

/* A tensor [batch, heads, length, size]: strides in elements, the elements of a row side by side. */
typedef struct FbRows {
    void* data;
    int64_t batch_stride, head_stride, row_stride;
} FbRows;

/* softmax(scale * q k^T + mask) v, and its gradients.
 *
 * Sizes: q, out [batch, heads, q_length], k, v [batch, kv_heads, k_length]; rows of q and k have qk_size elements,
 * those of v and out v_size; heads is a multiple of kv_heads, query head h reads key head h / (heads / kv_heads).
 * causal: query t sees keys up to t + k_length - q_length.
 * mask (data may be NULL): [batch, heads, q_length, k_length], FB_BOOL: nonzero is visible, else: added to the scores,
 * and -1e30 or less hides the key.
 * lse [batch, heads, q_length], contiguous: log of the sum of exp of a row's scores; -inf for a row that sees no key,
 * whose out and gradients are 0. */
typedef struct FbAttention {
    int32_t dtype; /* of all rows but the mask's; with FB_BF16 sizes are even */
    int32_t mask_dtype;
    int32_t causal;
    float scale;
    int64_t batch, heads, kv_heads, q_length, k_length, qk_size, v_size;
    FbRows q, k, v, mask, out;
    float* lse;
    FbRows grad_out, grad_q, grad_k, grad_v; /* backward only */
    void* workspace;                         /* of the size below, aligned to 64 bytes */
} FbAttention;

/* A 4-bit linear layer, with a low-rank adapter or none (a and b NULL); see fb_linear and fb_lora_add. */
typedef struct FbProduct {
    FbWeight weight;
    const void *bias, *a, *b;
    int64_t rank;
    int32_t adapter_dtype;
    float scaling;
    int32_t many; /* fb_linear_many in place of fb_linear */
} FbProduct;

/* See fb_rms_norm. */
typedef struct FbNorm {
    const void* weight; /* NULL: none */
    float eps, offset;
    int32_t round_first;
} FbNorm;

typedef struct FbDecoderLayer {
    FbNorm norm, mlp_norm, q_norm, k_norm; /* the last two of each head, or none */
    FbProduct q, k, v, out, gate, up, down;
    void *keys, *values; /* [batch, kv_heads, capacity, head] */
} FbDecoderLayer;

/* A decoder of LLaMA's build:
 *
 *     x = x + out(attend(rotate(q(norm x)), rotate(k(norm x)), v(norm x)));   x = x + down(act(gate(n x)) * up(n x))
 *
 * for each layer with n its mlp_norm, and x = norm(x) at the end; all of `dtype`, each step rounded. */
typedef struct FbDecoder {
    int32_t dtype, activation; /* see fb_swiglu */
    float scale;               /* of attention */
    int64_t layers, batch, hidden, inner, heads, kv_heads, head, rotated, capacity;
    const FbDecoderLayer* layer;
    FbNorm norm;
    const uint8_t* visible; /* [batch, capacity]: nonzero is seen; NULL: all is */
    void* workspace;        /* of the size below, aligned to 64 bytes */
} FbDecoder;

/* ---- the library ---- */

FB_EXPORT int32_t fb_abi_version(void);

/* The SIMD level in use: scalar, avx2, avx512, avx512bf16 or neon. FOURBIT_CPU chooses it when the library loads. */
FB_EXPORT const char* fb_level_name(void);

/* Why FOURBIT_CPU could not be honoured; NULL if it could. */
FB_EXPORT const char* fb_level_error(void);

/* The levels this CPU can run, ascending, separated by spaces. */
FB_EXPORT const char* fb_supported_levels(void);

/* Changes the level; for tests. FB_OK or FB_UNSUPPORTED. */
FB_EXPORT int32_t fb_set_level(const char* name);

/* Tells the C library to keep freed memory for the next allocation instead of returning it to the system, whose fresh
 * pages fill an order of magnitude slower. For the whole process, for good. 1 if done, 0 where there is no way to. */
FB_EXPORT int32_t fb_keep_freed_memory(void);

/* ---- quantize ---- */

/* weight [n] of `dtype` -> packed [ceil(n/2)], absmax [ceil(n/block_size)].
 *
 * rank(v) = number of thresholds strictly below v; code = codes[rank].
 * thresholds: [15] ascending, padded with +inf. codes: [16].
 * A whole block: absmax = max |w|, v = clamp(w * fp32(1 / max(absmax, 1e-38)), -1, 1).
 * A shorter last block: absmax = max(max |w|, 1e-38), v = clamp(w / absmax, -1, 1).
 * With n odd the low nibble of the last byte is the code of 0. */
FB_EXPORT int32_t fb_quantize(const void* weight, int32_t dtype, int64_t n, int64_t block_size, const float* thresholds,
                              const uint8_t* codes, uint8_t* packed, float* absmax, int32_t threads);

/* ---- dequantize ---- */

/* Elements first, ..., first + count - 1 of the weight -> out [count] of `dtype`.
 *
 * value = fp32(level * scale), rounded once to `dtype`: nearest, ties to even, overflow to infinity, subnormals kept.
 * `first` must be a multiple of the block size. A large `out` is written past the caches where it is aligned to 64
 * bytes. */
FB_EXPORT int32_t fb_dequantize(const FbWeight* weight, int64_t first, int64_t count, void* out, int32_t dtype,
                                int32_t threads);

/* ---- absmax ---- */

/* absmax [n] -> codes [n], nested_absmax [ceil(n/256)]: double quantization.
 *
 * v = absmax - offset[0]; nested = max |v| over a block of 256; code = bins[int((u + 1) * 0.5 * 65535 + 0.5)] with
 * u = clamp(v * fp32(1 / nested), -1, 1); NaN, which is 0 * inf, takes bins[0]. bins: [65536]. */
FB_EXPORT int32_t fb_quantize_absmax(const float* absmax, int64_t n, const float* offset, const uint8_t* bins,
                                     uint8_t* codes, float* nested_absmax, int32_t threads);

/* codes [n] -> absmax [n]: fp32(map[code] * nested_absmax[g / 256]) + offset[0]. map: [256]. */
FB_EXPORT int32_t fb_dequantize_absmax(const uint8_t* codes, int64_t n, const float* nested_absmax, const float* offset,
                                       const float* map, float* absmax, int32_t threads);

/* ---- linear ---- */

/* x [m, K] of `dtype` -> y [m, N] of `dtype`: y = x W^T + bias, for W [N, K] and bias [N] of `dtype` or NULL.
 *
 * Meant for small m: the weight is decoded in registers and never written. A row of y does not depend on m or on
 * `threads`. linear.cpp gives the error bound. */
FB_EXPORT int32_t fb_linear(const FbWeight* weight, const void* x, int32_t dtype, int64_t m, const void* bias, void* y,
                            int32_t threads);

/* The same for larger m, and only where K is a multiple of 32: the weight is decoded piece by piece into a core's
 * cache. A row of y does not depend on m or on `threads`. linear_many.cpp gives the error bound. */
FB_EXPORT int32_t fb_linear_many(const FbWeight* weight, const void* x, int32_t dtype, int64_t m, const void* bias,
                                 void* y, int32_t threads);

/* ---- lora ---- */

/* xa [m, R] = x A^T and y [m, N] += scaling * xa B^T, for x [m, K], A [R, K], B [N, R]; for small m.
 *
 * x, xa and y are of `dtype`; A and B of `adapter_dtype`, and rounded to `dtype` first. Sums are fp32;
 * y is rounded once more. A row does not depend on m or on `threads`. */
FB_EXPORT int32_t fb_lora_add(const void* x, int32_t dtype, int64_t m, int64_t cols, const void* a, const void* b,
                              int32_t adapter_dtype, int64_t rank, int64_t rows, float scaling, void* xa, void* y,
                              int32_t threads);

/* ---- decoder ---- */

/* The bytes of workspace that steps need with so many threads, whatever the number of tokens. */
FB_EXPORT int32_t fb_decoder_workspace(const FbDecoder* decoder, int64_t* bytes, int32_t threads);

/* x [batch, hidden] -> x: one token of each row, which is number `place` of its keys and values, through all layers.
 * cosine and sine [batch or 1, rotated], `table_stride` elements apart (0 for one row). The same bits as kernel after
 * kernel; they do not depend on `threads`. */
FB_EXPORT int32_t fb_decoder_step(const FbDecoder* decoder, int64_t place, const void* cosine, const void* sine,
                                  int64_t table_stride, void* x, int32_t threads);

/* ---- attention ---- */

/* The bytes of workspace a pass needs. The pointers need not be set. */
FB_EXPORT int32_t fb_attention_workspace(const FbAttention* args, int32_t backward, int64_t* bytes, int32_t threads);

/* Reads q, k, v, mask; writes out, lse. */
FB_EXPORT int32_t fb_attention(const FbAttention* args, int32_t threads);

/* Reads q, k, v, mask, out, lse, grad_out; writes grad_q, grad_k, grad_v. The result does not depend on `threads`. */
FB_EXPORT int32_t fb_attention_backward(const FbAttention* args, int32_t threads);

/* ---- dense ---- */

/* y [m, n] = x [m, k] weight [n, k]^T + bias [n] (or NULL), all of `dtype`, summed in fp32. Made for a few rows: reads
 * the weight once for up to four. */
FB_EXPORT int32_t fb_dense(const void* x, const void* weight, int32_t dtype, int64_t m, int64_t n, int64_t k,
                           const void* bias, void* y, int32_t threads);

/* ---- rms_norm ---- */

/* x [rows, cols], weight [cols], y [rows, cols], all of `dtype`:
 *
 *     r = 1 / sqrt(mean(x^2) + eps);   y = x r (weight + offset)
 *
 * in fp32; with round_first x r is rounded to `dtype` before the product. */
FB_EXPORT int32_t fb_rms_norm(const void* x, const void* weight, int32_t dtype, int64_t rows, int64_t cols, float eps,
                              float offset, int32_t round_first, void* y, int32_t threads);

/* grad_x = r (g w - x r mean(g w x r)) with w = weight + offset. grad_weight, unless NULL, is [parts, cols] fp32: part
 * p holds the sum of g x r over rows [rows p / parts, rows (p + 1) / parts). */
FB_EXPORT int32_t fb_rms_norm_backward(const void* grad, const void* x, const void* weight, int32_t dtype, int64_t rows,
                                       int64_t cols, float eps, float offset, void* grad_x, float* grad_weight,
                                       int32_t parts, int32_t threads);

/* ---- swiglu ---- */

/* out [rows, cols] = act(gate) * up. gate and up are [rows, cols] with their rows so many elements apart, all of
 * `dtype`; act(gate) is rounded to `dtype` before the product. activation: 0 SiLU, 1 GELU in its tanh form. */
FB_EXPORT int32_t fb_swiglu(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int32_t dtype,
                            int64_t rows, int64_t cols, int32_t activation, void* out, int32_t threads);

/* grad, grad_gate and grad_up are [rows, cols] without gaps. */
FB_EXPORT int32_t fb_swiglu_backward(const void* grad, const void* gate, int64_t gate_stride, const void* up,
                                     int64_t up_stride, int32_t dtype, int64_t rows, int64_t cols, int32_t activation,
                                     void* grad_gate, void* grad_up, int32_t threads);

/* ---- rotary ---- */

/* x and y [batch, heads, tokens, head], the last dimension without gaps, the others through strides[3] in elements;
 * cosine and sine [batch or 1, tokens, rotated], `table_stride` elements from one batch to the next (0 for one table);
 * all of `dtype`. With a and b the halves of the first `rotated` elements of a head, and cos and sin split likewise:
 *
 *     y_a = a cos_a - b sin_a;   y_b = b cos_b + a sin_b;   the rest of the head is copied
 *
 * each product rounded to `dtype`. `inverse` applies the transposed rotation, which is the gradient. */
FB_EXPORT int32_t fb_rotary(const void* x, const int64_t* x_strides, const void* cosine, const void* sine,
                            int64_t table_stride, int32_t dtype, int64_t batch, int64_t heads, int64_t tokens,
                            int64_t head, int64_t rotated, int32_t inverse, void* y, const int64_t* y_strides,
                            int32_t threads);

/* ---- cross_entropy ---- */

/* logits [rows, vocabulary] of `dtype`, labels [rows] in [0, vocabulary), nll [rows]:
 *
 *     z = scale * logits, then cap * tanh(z / cap) if cap > 0;   nll = log(sum(exp(z))) - z[label]
 *
 * With want_grad the logits are overwritten by d nll / d logits, else they are left alone. */
FB_EXPORT int32_t fb_cross_entropy(void* logits, int32_t dtype, const int64_t* labels, int64_t rows, int64_t vocabulary,
                                   float scale, float cap, int32_t want_grad, float* nll, int32_t threads);

/* ---- adamw ---- */

/* A step of AdamW over `segments` stretches of parameters, whose moments are 8-bit codes with an fp32 scale for each
 * block of 256:
 *
 *     m = beta1 m + rest1 g;   v = beta2 v + rest2 g^2;   p = kept p + step_size m / (sqrt(v) / correction + eps)
 *
 * in fp32, then m and v are encoded anew. The code of a value u in [-1, 1], with h the upper 16 bits of u:
 *
 *     code = first[h];   code += u > middle[code]
 */
typedef struct FbAdamw {
    void* const* params;      /* [segments] addresses */
    const void* const* grads; /* [segments] addresses */
    const int64_t* counts;    /* [segments] elements */
    const int64_t* offsets;   /* [segments] where the moments begin, a multiple of 256 */
    int64_t segments;
    int32_t dtype; /* of params and grads */
    uint8_t* exp_avg;
    float* exp_avg_absmax;
    uint8_t* exp_avg_sq;
    float* exp_avg_sq_absmax;
    const float *signed_levels, *unsigned_levels; /* [256], of the codes of m and of v */
    const uint8_t *signed_first, *unsigned_first; /* [65536] */
    const float *signed_middle, *unsigned_middle; /* [256] */
    float beta1, rest1, beta2, rest2, kept, step_size, correction, eps;
} FbAdamw;

FB_EXPORT int32_t fb_adamw_blockwise(const FbAdamw* args, int32_t threads);

/* ---- elo ---- */

/* Tournaments of two-player matches, each played in `orders` random orders -> ratings [tournaments, orders, players].
 *
 * Tournament t has matches[ends[t - 1]], ..., matches[ends[t] - 1], each a | b << 15 | (2 * points of a) << 30, with
 * players a != b below `players`, at most 32768, and points 0, 1/2 or 1. Everyone starts with `start`; a match does
 *
 *     d = k * (points - 1 / (1 + 10^((r_b - r_a) / 400)));   r_a += d;   r_b -= d
 *
 * An order plays `length` matches drawn without replacement, or all where there are fewer. What order o draws depends
 * on the seed, t and first_order + o alone: not on `threads`, and not on how many calls share the orders out. */
FB_EXPORT int32_t fb_elo(const uint32_t* matches, const int64_t* ends, int64_t tournaments, int64_t players,
                         int64_t orders, int64_t first_order, int64_t length, uint64_t seed, double k, double start,
                         double* ratings, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
