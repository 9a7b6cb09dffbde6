/* The operator table: every operation that a model, a loss or an optimizer needs, forward and backward.
 *
 * One instance per device: mil_cpu_ops (csrc/cpu) and mil_cuda_ops (kernels).  Model code is written once
 * against this table.  A NULL member means that the device does not offer it; only members documented as
 * optional may be NULL.
 *
 * Conventions
 * - Arrays are row-major.  A comment gives each pointer's shape.  `<name>_stride` is the distance between
 *   rows in elements, so that slices of a wider array (z, x, B, C, dt of one projection) are read in place.
 * - `act` marks activations: float32 on the CPU; the table's activation_dtype on other devices.  Everything
 *   else says its type.  Accumulation is float32; norms, softmax, losses, dt, decays and SSM states are
 *   always float32.
 * - Rows of several sequences are packed one after another (mil_rows); no operator ever sees padding.
 * - Forward operators overwrite their outputs.  Backward operators overwrite gradients of activations
 *   unless `accumulate` says otherwise, and always ADD to gradients of parameters (named so below).
 *   An output may alias an input only where a comment says so.
 * - Operators keep nothing, print nothing, and take workspace from context->scratch, rewound on return.
 *   They validate and take memory before any parallel region, so workers cannot fail.
 * - Reduction order: an output element is reduced in an order that depends on neither the number of
 *   rows, nor their grouping into sequences and calls, nor the thread count.  So a token's result is the same bits
 *   alone, in a verify window, in a batch, and in prefill.  The exception is a product with `fast` set
 *   (training), whose order is that of the BLAS; it still repeats for the same shapes and threads.
 *   Parameter gradients are summed over fixed blocks of rows added in a fixed order.
 */
#ifndef MIL_DEVICE_H
#define MIL_DEVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/memory.h"
#include "base/status.h"

typedef struct mil_ops mil_ops;

/* Everything an operator may use besides its arguments. One per running call; none is global. */
typedef struct mil_context {
    const mil_ops *ops;
    mil_arena *scratch; /* operators' workspace and model activations, on the device */
    mil_arena *host;    /* model code's small arrays (offsets, states), in host memory */
    mil_arena *kept;    /* what is uploaded during a recording stays here as long as that; else NULL */
    int threads;        /* CPU team size, at least 1 */
    void *stream;       /* CUDA stream; NULL on the CPU */
} mil_context;

/* ---- packed rows and the state of a sequence ------------------------------------------------------- */

/* Mixers fold their inputs into the SSM state once a window; windows start at multiples of MIL_WINDOW
 * tokens of the sequence, however the tokens arrive.  The inputs since the last fold are the tail: dropping its
 * last rows takes tokens back exactly, as from a KV cache.  A call of at most MIL_WINDOW rows a
 * sequence folds only tokens of earlier calls, so all of its rows can be taken back.
 *
 *   tokens   0 ........ boundary ........ past ........ past + count
 *            | in state | in the tail     | rows of this call
 */
#define MIL_WINDOW 16
#define MIL_TAIL (2 * MIL_WINDOW)
/* Added to a sequence's boundary: this call leaves it where it is.  A draft model's tokens come one a pass; with a held
 * boundary such passes can be taken back like one pass of as many rows, as long as the tail has room. */
#define MIL_HOLD 1

typedef struct mil_rows {
    int64_t rows;            /* of all sequences */
    int64_t sequences;       /* at least 1 */
    const int64_t *offsets;  /* [sequences + 1] first row of each sequence; offsets[0] = 0 */
    const int64_t *past;     /* [sequences] tokens before these rows; NULL = none */
    const int64_t *boundary; /* [sequences] tokens folded into the states on entry; NULL = none */
    const int64_t
        *device; /* [3, sequences + 1] offsets, past and boundary again, where the device's kernels can
                                read them (model code uploads them once a pass); the CPU does not look */
    bool
        settled; /* what `device`, the states and the caches hold on entry was written before this pass began:
                     the embedding lies between (a device may read it ahead of its turn) */
} mil_rows;

/* The boundary after a call: what operators with state leave behind. */
static inline int64_t
mil_boundary_after(int64_t past, int64_t count)
{
    int64_t folded = count > MIL_WINDOW ? past + count : past;
    return folded - folded % MIL_WINDOW;
}

/* One sequence's attention cache in one layer; keys are stored after RoPE. */
typedef struct mil_kv_cache {
    void *k, *v; /* [capacity, kv_heads, head_dim] of `dtype` */
    mil_dtype dtype;
    int64_t capacity;
} mil_kv_cache;

/* One sequence's mixer state in one layer, float32. Index of token t in a tail array: t - boundary. The last row of
 * x, B and dt is never a token's: it is 0 between calls, and CUDA's blocks count themselves there. */
typedef struct mil_mixer_state {
    float *
        state; /* Mamba-2 [heads, state_dim, head_dim], Mamba-1 [state_dim, inner]: after `boundary` tokens */
    float *
        conv; /* [conv_width - 1 + MIL_TAIL, conv inputs] raw conv inputs; token t at t - boundary + conv_width - 1;
                     zeros stand for tokens before the first */
    float *x;       /* [MIL_TAIL, x_heads * head_dim] or [MIL_TAIL, inner / x_repeat]: rows as given */
    float *B;       /* [MIL_TAIL, B_groups * state_dim] */
    float *dt;      /* [MIL_TAIL, heads] or [MIL_TAIL, inner]: after bias, softplus and clamp */
    float *current; /* Mamba-1, may be NULL: the state after *current_tokens tokens, so that plain */
    int64_t *current_tokens; /* decoding need not replay the tail; used only where it equals `past` */
} mil_mixer_state;

/* ---- products --------------------------------------------------------------------------------------- */

/* y = x W^T + bias, or y += where accumulate. */
typedef struct mil_linear {
    int64_t rows, in, out;
    const void *x; /* [rows, in] act; all products of one call share x */
    int64_t x_stride;
    const void *weight; /* [out, in] of `dtype`; a 16-bit product rounds x to that type once (CPU) */
    mil_dtype dtype;    /* float8 and int8: not on the CPU */
    const float *scale; /* [out] of float8 and int8: row j of W is scale[j] * weight[j]; else NULL */
    const float *bias;  /* [out] or NULL */
    void *y;            /* [rows, out] act */
    int64_t y_stride;
    bool accumulate;
    bool fast;         /* training: any reduction order, x not rounded */
    bool float_output; /* y is float32 whatever act is (logits); not with accumulate */
} mil_linear;

/* Codes of 8 bits for weights, with one scale a row: value = code * scale, rounded to nearest even.
 *   float8  e4m3; scale is the least power of two that keeps the row within 448, so values are exact in 16 bits
 *   int8    -127 .. 127; scale = largest magnitude / 127
 * A row of zeros has the scale 1. */
typedef struct mil_quantize {
    int64_t rows, columns;
    const void *values; /* [rows, columns] of `from`: float32, bfloat16 or float16 */
    mil_dtype from, dtype;
    void *codes;  /* [rows, columns] of `dtype` */
    float *scale; /* [rows] */
    int32_t *bad; /* [1] set where a value is not finite, else left */
} mil_quantize;

/* Either gradient may be NULL. Reduction order is free, as with `fast`. */
typedef struct mil_linear_grad {
    int64_t rows, in, out;
    const void *x; /* [rows, in] act */
    int64_t x_stride;
    const void *weight; /* [out, in] of `dtype` */
    mil_dtype dtype;
    const void *grad_y; /* [rows, out] act */
    int64_t grad_y_stride;
    void *grad_x; /* [rows, in] act; overwritten, added to where accumulate */
    int64_t grad_x_stride;
    bool accumulate;
    float *grad_weight; /* [out, in] float32, added to */
    float *grad_bias;   /* [out], added to */
} mil_linear_grad;

/* ---- norms ------------------------------------------------------------------------------------------ */

/* y = x / sqrt(mean(x^2) + eps) * weight over each group of `group` columns; with a gate z
 * x is first multiplied by silu(z) (Mamba-2), or y afterwards where norm_before_gate. */
typedef struct mil_norm {
    int64_t rows, width, group; /* group divides width; plain RMSNorm: group = width */
    const void *x;              /* [rows, width] act */
    int64_t x_stride;
    const void *z; /* [rows, width] act or NULL */
    int64_t z_stride;
    bool norm_before_gate;
    const float *weight;   /* [width], or NULL: none */
    bool weight_per_group; /* weight is [group], shared by all groups (query and key norms of attention) */
    float eps;
    void *y; /* [rows, width] act; may be x (forward only) */
    int64_t y_stride;
} mil_norm;

typedef struct mil_norm_grad {
    mil_norm forward; /* its y is not read */
    const void *grad_y;
    int64_t grad_y_stride;
    void *grad_x; /* [rows, width] act; may be grad_y; overwritten, added to where accumulate */
    int64_t grad_x_stride;
    bool accumulate;
    void *grad_z; /* [rows, width] act; where forward.z is set */
    int64_t grad_z_stride;
    float *grad_weight; /* as weight, added to; may be NULL */
} mil_norm_grad;

/* ---- attention -------------------------------------------------------------------------------------- */

/* cos and sin of position * inv_freq, times scale: table [rows, rotary / 2, 2] float32. */
typedef struct mil_rope_table {
    mil_rows rows;
    int64_t rotary;          /* rotated part of head_dim, even */
    const float *inv_freq;   /* host memory: [rotary / 2], or one such row a sequence */
    int64_t inv_freq_stride; /* 0: the same for all sequences */
    float scale;             /* attention factor of YaRN and LongRoPE, else 1 */
    float *table;
} mil_rope_table;

/* Rotates the first `rotary` entries of each head in place, entry i with i + rotary / 2 (Hugging Face order);
 * inverse = backward. */
typedef struct mil_rope {
    int64_t rows, heads, head_dim, rotary;
    const float *table; /* [rows, rotary / 2, 2] */
    bool inverse;
    void *x; /* [rows, heads, head_dim] act */
    int64_t x_stride;
} mil_rope;

/* Causal softmax(q k^T * scale) v within each sequence; query head i reads key head i * kv_heads / heads.
 * With caches the keys are caches[i][0 .. past + count), these rows' own having been appended before; without
 * them k and v hold the rows' own and past must be NULL. window > 0: only the last `window` keys, own included. */
typedef struct mil_attention {
    mil_rows rows;
    int64_t heads, kv_heads, head_dim;
    int64_t window;
    float scale;
    const void *q; /* [rows, heads, head_dim] act */
    int64_t q_stride;
    const void *k, *v; /* [rows, kv_heads, head_dim] act, without caches */
    int64_t kv_stride;
    const mil_kv_cache *caches; /* [sequences] or NULL */
    void *y;                    /* [rows, heads, head_dim] act */
    int64_t y_stride;
    float *log_sum_exp; /* [rows, heads] for backward, or NULL */
} mil_attention;

typedef struct mil_attention_grad {
    mil_attention forward; /* without caches; y and log_sum_exp are read */
    const void *grad_y;    /* [rows, heads, head_dim] act */
    int64_t grad_y_stride;
    void *grad_q, *grad_k, *grad_v; /* as q, k, v; overwritten */
    int64_t grad_q_stride, grad_kv_stride;
} mil_attention_grad;

/* Writes rows' k and v at their positions past .. past + count of the caches, rounding to the cache's dtype. */
typedef struct mil_kv_append {
    mil_rows rows;
    int64_t kv_heads, head_dim;
    const void *k, *v; /* [rows, kv_heads, head_dim] act */
    int64_t kv_stride;
    const mil_kv_cache *caches; /* [sequences]; capacity is checked by the caller */
} mil_kv_append;

/* ---- mixers ----------------------------------------------------------------------------------------- */

/* Depthwise causal convolution, y[t, c] = act(bias[c] + sum_j weight[c, j] x[t - width + 1 + j, source(c)]).
 * repeat > 1 reads each run of `repeat_group` inputs `repeat` times in a row (grouped heads):
 * source(c) = c / (repeat_group * repeat) * repeat_group + c % repeat_group. */
typedef struct mil_conv1d {
    mil_rows rows;
    int64_t channels; /* of y; x has channels / repeat */
    int64_t width;    /* taps, 2 to 8 */
    int64_t repeat, repeat_group;
    const void *x; /* [rows, channels / repeat] act */
    int64_t x_stride;
    const float *weight; /* [channels, width] */
    const float *bias;   /* [channels] or NULL */
    bool silu;
    void *y; /* [rows, channels] act */
    int64_t y_stride;
    const mil_mixer_state *states; /* [sequences] or NULL: sequences start here and leave nothing */
} mil_conv1d;

typedef struct mil_conv1d_grad {
    mil_conv1d forward; /* without states; y is not read */
    const void *grad_y;
    int64_t grad_y_stride;
    void *grad_x; /* [rows, channels / repeat] act */
    int64_t grad_x_stride;
    float *grad_weight, *grad_bias; /* added to; may be NULL */
} mil_conv1d_grad;

/* Mamba-1 (Gu & Dao 2023, section 3.2), per channel c and state n:
 *   dt_t = clamp(softplus(dt[t, c] + dt_bias_scale * dt_bias[c]))
 *   H_t = exp(dt_t A[c, n]) H_{t-1} + dt_t x_t B[t, g(c), n],   y_t = sum_n C[t, g'(c), n] H_t[n] + D[c] x_t
 *   y_t *= silu(z[t, c]) where z is given
 * with A = -exp(A_log); channel c reads B group c * B_groups / inner and C group c * C_groups / inner.
 * x_repeat > 1: x has inner / x_repeat channels, read as the convolution's `repeat` does. */
typedef struct mil_scan {
    mil_rows rows;
    int64_t inner, state_dim, B_groups, C_groups, x_repeat, x_repeat_group;
    const void *x; /* [rows, inner / x_repeat] act */
    int64_t x_stride;
    const void *dt; /* [rows, inner] act, before bias and softplus */
    int64_t dt_stride;
    const void *B; /* [rows, B_groups, state_dim] act */
    int64_t B_stride;
    const void *C; /* [rows, C_groups, state_dim] act */
    int64_t C_stride;
    const void *z; /* [rows, inner] act or NULL */
    int64_t z_stride;
    const float *dt_bias, *A_log, *D; /* [inner], [inner, state_dim], [inner] */
    float dt_bias_scale;              /* 2 in MambaInLlama checkpoints (method.md), else 1 */
    float dt_min, dt_max;             /* 0 and INFINITY unless the checkpoint gives limits */
    void *y;                          /* [rows, inner] act */
    int64_t y_stride;
    const mil_mixer_state *states; /* [sequences] or NULL */
} mil_scan;

/* A Mamba-1 mixer between its first products and its last one (see scan_mixer). */
typedef struct mil_scan_mixer {
    mil_conv1d conv; /* its y is the scan's x; channels = 0: x has been convolved */
    mil_linear
        x_proj; /* [dt_low | B | C] of the scan's x, in one row; out = 0: they came from the first products */
    mil_norm norms[3]; /* of dt_low, B and C out of x_proj.y */
    int64_t norm_count;
    mil_linear dt; /* of dt_low; its y is the scan's dt */
    mil_scan scan;
} mil_scan_mixer;

typedef struct mil_scan_grad {
    mil_scan forward; /* without states; y is not read */
    const void *grad_y;
    int64_t grad_y_stride;
    void *grad_x, *grad_dt, *grad_B, *grad_C, *grad_z; /* as the inputs; grad_z NULL without z */
    int64_t grad_x_stride, grad_dt_stride, grad_B_stride, grad_C_stride, grad_z_stride;
    float *grad_dt_bias, *grad_A_log, *grad_D; /* added to; each may be NULL */
} mil_scan_grad;

/* Mamba-2, state space duality (Dao & Gu 2024, section 6), per head h with A = -exp(A_log[h]):
 *   dt_t = clamp(softplus(dt[t, h] + dt_bias[h]))
 *   H_t = exp(dt_t A) H_{t-1} + dt_t x_t (outer) B_t,   y_t = H_t C_t + D[h] x_t
 * head h reads x head h * x_heads / heads, B group h * B_groups / heads, C group h * C_groups / heads.
 * Computed window by window in the dual form (see csrc/cpu/ssd.c). */
typedef struct mil_ssd {
    mil_rows rows;
    int64_t heads, head_dim, state_dim, x_heads, B_groups, C_groups;
    const void *x; /* [rows, x_heads, head_dim] act */
    int64_t x_stride;
    const void *B; /* [rows, B_groups, state_dim] act */
    int64_t B_stride;
    const void *C; /* [rows, C_groups, state_dim] act */
    int64_t C_stride;
    const void *dt; /* [rows, heads] act, before bias and softplus */
    int64_t dt_stride;
    const float *dt_bias, *A_log, *D; /* [heads] */
    float dt_min, dt_max;
    void *y; /* [rows, heads, head_dim] act */
    int64_t y_stride;
    const mil_mixer_state *states; /* [sequences] or NULL */
} mil_ssd;

typedef struct mil_ssd_grad {
    mil_ssd forward; /* without states; y is not read */
    const void *grad_y;
    int64_t grad_y_stride;
    void *grad_x, *grad_B, *grad_C, *grad_dt; /* as the inputs */
    int64_t grad_x_stride, grad_B_stride, grad_C_stride, grad_dt_stride;
    float *grad_dt_bias, *grad_A_log, *grad_D; /* [heads], added to; each may be NULL */
} mil_ssd_grad;

/* ---- MLP, embedding, elementwise ------------------------------------------------------------------------ */

typedef enum mil_activation { MIL_SILU = 0, MIL_GELU, MIL_GELU_TANH, MIL_RELU, MIL_RELU2 } mil_activation;

/* y = act(gate) * up, or act(gate) where up is NULL. y may be gate. */
typedef struct mil_glu {
    int64_t rows, width;
    mil_activation activation;
    const void *gate, *up; /* [rows, width] act */
    int64_t gate_stride, up_stride;
    void *y;
    int64_t y_stride;
} mil_glu;

typedef struct mil_glu_grad {
    mil_glu forward; /* y is not read */
    const void *grad_y;
    int64_t grad_y_stride;
    void *grad_gate, *grad_up; /* grad_gate may be grad_y */
    int64_t grad_gate_stride, grad_up_stride;
} mil_glu_grad;

/* y[r] = table[tokens[r]] * scale; tokens were checked against vocab by the caller. */
typedef struct mil_embedding {
    int64_t rows, hidden, vocab;
    const int32_t *tokens; /* [rows] */
    const void *table;     /* [vocab, hidden] of `dtype` */
    mil_dtype dtype;
    const float *row_scale; /* [vocab] of float8 and int8, as in mil_linear; else NULL */
    float scale;
    void *y; /* [rows, hidden] act */
    int64_t y_stride;
} mil_embedding;

typedef struct mil_embedding_grad {
    int64_t rows, hidden, vocab;
    const int32_t *tokens;
    float scale;
    const void *grad_y; /* [rows, hidden] act */
    int64_t grad_y_stride;
    float *grad_table; /* [vocab, hidden], added to, in row order */
} mil_embedding_grad;

/* ---- losses ----------------------------------------------------------------------------------------- */

typedef enum mil_kl_direction { MIL_KL_FORWARD = 0, MIL_KL_REVERSE = 1, MIL_KL_JSD = 2 } mil_kl_direction;

/* The output product fused with the loss, in blocks of rows, so that no [rows, vocab] array exists for the whole batch.
 * With s, t the softmax of (student, teacher logits) / temperature, for each row r with row_weight[r] != 0:
 *   kl_r = sum t (log t - log s)  (forward: KL(t || s))  or  sum s (log s - log t)  (reverse)
 *          or  mix KL(t || m) + (1 - mix) KL(s || m),  m = mix t + (1 - mix) s  (jsd)
 *   ce_r = -log softmax(student logits)[labels[r]]   where labels[r] >= 0 (temperature 1)
 *   loss = scale * sum_r row_weight[r] * (kl_weight * temperature^2 * kl_r + ce_weight * ce_r)
 * Gradients are those of `loss`.  The sums below are unscaled, float64, in row order.
 * In a teacher's place a row may have its stored likeliest tokens (top > 0, temperature 1): s and t are then
 * distributions over those tokens and one bucket of all others (csrc/cpu/loss.c). */
typedef struct mil_linear_loss {
    int64_t rows, vocab; /* rows of weight beyond vocab (padding) are left out */
    int64_t hidden;      /* student */
    const void *x;       /* [rows, hidden] act: after the final norm */
    int64_t x_stride;
    const void *weight; /* [vocab, hidden] of `dtype` */
    mil_dtype dtype;
    float logit_scale;      /* logits = logit_scale * x W^T */
    int64_t teacher_hidden; /* 0: no teacher */
    const void *teacher_x;  /* [rows, teacher_hidden] act */
    int64_t teacher_x_stride;
    const void *teacher_weight; /* [vocab, teacher_hidden] */
    mil_dtype teacher_dtype;
    float teacher_logit_scale;
    int64_t top;               /* 0: none; else, with teacher_hidden = 0: */
    const int32_t *top_tokens; /* [rows, top], different ones */
    const float *top_logprobs; /* [rows, top + 1]: of those tokens, last of all others together */
    const int32_t *labels;     /* [rows], negative = none; NULL = none at all */
    const float *row_weight;   /* [rows], of either sign; NULL = all 1 */
    float kl_weight, ce_weight, temperature, scale;
    mil_kl_direction direction;
    float mix;    /* of MIL_KL_JSD, between 0 and 1 */
    void *grad_x; /* [rows, hidden] act, or NULL: evaluate only */
    int64_t grad_x_stride;
    float *grad_weight; /* [vocab, hidden], added to; NULL: frozen */
    double *row_ce;     /* [rows] ce_r, 0 where there is none; host memory, or NULL */
    struct {
        double kl, ce,
            teacher_ce; /* sums of row_weight * value; kl at `temperature`; teacher_ce not with top */
        double kl_rows, ce_rows; /* sums of row_weight over the rows that counted */
        double agree, correct;   /* sums of row_weight: student's argmax = teacher's; = label */
    } sums;                      /* out, host memory */
} mil_linear_loss;

/* Mean squared error of hidden states relative to the target's mean square, with gradient:
 *   value = sum |x - target|^2 / sum |target|^2, grad_x += weight * d value / d x. */
typedef struct mil_relative_mse {
    int64_t rows, width;
    const void *x, *target; /* [rows, width] act */
    int64_t x_stride, target_stride;
    float weight;
    void *grad_x; /* [rows, width] act, added to; may be NULL */
    int64_t grad_x_stride;
    double value; /* out */
} mil_relative_mse;

/* ---- optimizer -------------------------------------------------------------------------------------- */

/* Decoupled weight decay (Loshchilov & Hutter 2019): with g = grad * grad_scale, t = step from 1,
 *   m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
 *   master -= lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * master); weight = round(master). */
typedef struct mil_adamw {
    int64_t count;
    float *master; /* [count]; is `weight` itself where dtype is float32 */
    void *weight;  /* [count] of `dtype` */
    mil_dtype dtype;
    const float *grad;
    float *m, *v;
    float learning_rate, beta1, beta2, eps, weight_decay, grad_scale;
    int64_t step;
} mil_adamw;

/* Muon (see csrc/cpu/muon.c): the momentum of a matrix made orthogonal; part by part of its rows where parts are given.
 * m is the momentum; master, weight and dtype as for AdamW. */
typedef struct mil_muon {
    int64_t rows, columns;
    const int64_t *parts; /* [part_count] rows of each part, host memory; part_count = 0: one part */
    int64_t part_count;
    float *master; /* [rows, columns] */
    void *weight;
    mil_dtype dtype;
    const float *grad;
    float *m;
    float learning_rate, momentum, weight_decay, grad_scale;
} mil_muon;

/* ---- sampling --------------------------------------------------------------------------------------- */

/* How one row is sampled; the meaning and order of the filters are those of decode/sampler.h. */
typedef struct mil_sample_options {
    float temperature; /* 0 = greedy */
    float top_p;       /* in (0, 1], 1 = off */
    float min_p;       /* in [0, 1], 0 = off */
    int64_t top_k;     /* 0 = off */
    uint64_t seed;
} mil_sample_options;

/* A filtered distribution over a row of logits without an array for it: token i with score s has the weight
 * w = exp((s - best_score) * inverse) where s >= least_score and (w > least_weight, or w = least_weight and
 * i <= last), else 0.  Where `certain`, all of it is on `best`. */
typedef struct mil_filter {
    double total; /* sum of weights */
    float best_score, inverse, least_score, least_weight;
    int32_t best, last;
    int32_t certain;
} mil_filter;

/* The streams of random numbers, as in decode/sampler.h. */
typedef enum mil_sample_stream {
    MIL_SAMPLE_TARGET = 0,
    MIL_SAMPLE_DRAFT = 1,
    MIL_SAMPLE_ACCEPT = 2
} mil_sample_stream;

/* Draws a token for each row of logits: a function of logits, options and (seed, position, stream). All pointers are
 * of the device. */
typedef struct mil_sample {
    int64_t rows, vocab; /* vocab at most 2^19 */
    const float *logits; /* [rows, vocab] */
    int64_t logits_stride;
    const mil_sample_options *options; /* [rows] */
    const int64_t *position;           /* [rows] of the token that is drawn, in its text */
    mil_sample_stream stream;
    int32_t *token;     /* [rows] or NULL: no draw */
    int32_t *bad;       /* [rows] 1 where a logit is NaN or infinite, else 0 */
    mil_filter *filter; /* [rows] or NULL */
    /* A draft's draw belongs to one of several rows of a later pass: where spread > 0, filter is written at row * spread,
     * and the token once more at placed[row * spread] where placed is given. */
    int64_t spread;
    int32_t *placed;
} mil_sample;

/* Verdicts on drafts (decode/speculate.c has the rule).  Sequence i has rows offsets[i] .. offsets[i + 1] of logits, those
 * after its last token and after each of its drafts; drafts[r] is the draft that row r decides.  Draft j stands with
 * probability min(1, p(x) / q(x)); the first that does not is replaced from max(0, p - q), and after the last one
 * that stands comes a draw from p.  All pointers are of the device. */
typedef struct mil_accept {
    int64_t sequences, vocab;
    const int64_t *offsets; /* [sequences + 1] */
    const float *logits;    /* [rows, vocab] */
    int64_t logits_stride;
    const mil_filter *filter;          /* [rows] of these logits: mil_sample */
    const mil_sample_options *options; /* [sequences]; only seed is read */
    const int64_t *position;           /* [sequences] of the first draft */
    const int32_t *drafts;             /* [rows]; of each sequence all but the last are read */
    const int32_t *drafted;            /* [sequences] drafts at hand, at most rows - 1; NULL: rows - 1 */
    const float *draft_logits; /* [rows, draft_vocab] that drafts were drawn from; NULL: each was certain */
    int64_t draft_logits_stride, draft_vocab;
    const mil_filter *draft_filter; /* [rows] */
    double
        forced; /* > 0: a draft stands with this probability whatever p and q say (to time models without sense) */
    int32_t *accepted; /* [sequences] out: drafts that stand */
    int32_t *tokens;   /* [rows] out: of each sequence those drafts and the one token after them */
} mil_accept;

/* Ends a decoding step of one row a sequence inside a recording: what was drawn becomes the next step's input, rows and
 * positions move on, and the draw is written down.  All pointers are of the device. */
typedef struct mil_advance {
    int64_t sequences;
    const int32_t *drawn; /* [sequences] */
    const int32_t *bad;   /* [sequences] of mil_sample */
    int32_t *tokens;      /* [sequences] out: the next step's */
    int64_t *rows;        /* [3, sequences + 1] mil_rows.device: past and boundary move on by one token */
    int64_t *position;    /* [sequences] moves on by one */
    int64_t *steps;       /* [1] moves on by one */
    int32_t *history;     /* [any, sequences]: row *steps gets `drawn` */
    int32_t *failed;      /* [sequences] set where bad is, else left */
} mil_advance;

/* Drafts from the text itself, as mil_ngram_propose (decode/ngram.c) finds them. All pointers are of the device. */
typedef struct mil_propose {
    int64_t sequences, drafts; /* most drafts of a sequence */
    const int32_t *texts;      /* [sequences, texts_stride] */
    int64_t texts_stride;
    const int64_t *count; /* [sequences] tokens of each text, at least 1 */
    int64_t longest, shortest;
    int32_t *
        tokens; /* [sequences, drafts + 1] out: the text's last token, then drafts (or any token of the text) */
    int32_t *drafted; /* [sequences] drafts allowed; out: 0 where there are none */
} mil_propose;

/* Ends a speculative round inside a recording, after mil_accept: what was accepted enters the texts, everything that the
 * next round reads moves on, and the round is written down.  With c the tokens of a text, rounds read
 *
 *   draft model   pass 0: tokens c - 2 and c - 1; pass j: the draft before, at c + j - 1 (boundaries held)
 *   model         one pass: token c - 1 and all drafts
 *
 * so a draft's state has read c - 2 tokens when a round begins, and the model's c - 1: what was read beyond is taken back by
 * the numbers alone.  All pointers are of the device. */
typedef struct mil_settle {
    int64_t sequences, drafts; /* drafts of each sequence in a round, as recorded */
    const int32_t *accepted;   /* [sequences] */
    const int32_t *verdict;    /* [sequences, drafts + 1] tokens of mil_accept */
    const int32_t *bad;        /* [sequences, drafts + 1] of the model's rows */
    const int32_t *draft_bad;  /* [drafts, sequences] of the draft model's, or NULL: n-gram drafts */
    int64_t draft_vocab;       /* a text with a token from here on is drafted for no more */
    const int32_t *wanted;     /* [sequences] drafts a round */
    const int64_t *end;        /* [sequences] a text's length at which it ends */
    int32_t *barred;           /* [sequences] set where no more drafts are to be offered */
    int32_t *drafted;      /* [sequences] in: drafts offered; out: the most that the next round may offer */
    int64_t *position;     /* [drafts, sequences] of each draft in its text: row 0 is c */
    int64_t *rows;         /* [3, sequences + 1] mil_rows.device of the model's pass */
    int64_t *draft_rows;   /* [drafts, 3, sequences + 1] of the draft model's, or NULL */
    int32_t *tokens;       /* [sequences, drafts + 1] that the model reads: column 0 is written */
    int32_t *draft_tokens; /* [sequences, 2] that the draft model's first pass reads, or NULL */
    int32_t *texts;        /* [sequences, texts_stride] or NULL */
    int64_t texts_stride;
    int64_t *rounds; /* [1] moves on by one */
    int32_t *
        history; /* [any, sequences, drafts + 3]: row *rounds gets drafts offered, accepted, and the verdict */
    int32_t *failed; /* [sequences] set where a row that counts is bad, else left */
} mil_settle;

/* ---- the table -------------------------------------------------------------------------------------- */

#define MIL_OPS_VERSION 4
#define MIL_OPS_CAPSULE "mambainllama.ops" /* name of a PyCapsule that holds a table */

struct mil_ops {
    uint32_t version; /* MIL_OPS_VERSION: _core refuses a table of another build */
    uint32_t size;    /* sizeof(mil_ops) */
    const char *name; /* "cpu", "cuda" */
    mil_dtype activation_dtype;
    bool keeps_current;   /* uses mil_mixer_state.current */
    int device;           /* which of several devices of this kind */
    int64_t prefill_rows; /* prompt rows that fill it: what a round takes unless told otherwise */

    /* A call's queue of work: open sets context->stream and makes the device the calling thread's, finish waits
     * for all that was queued, close gives the queue back. NULL where operators return when they are done (CPU). */
    mil_status (*open)(mil_context *context);
    mil_status (*finish)(mil_context *context);
    void (*close)(mil_context *context);
    /* What is queued on `after` from now on waits for what is on `before` now, both streams of this device (CUDA's
     * numbers). NULL where there are no streams. */
    mil_status (*order)(mil_context *context, void *before, void *after);

    /* Memory of the device. copy works between host and device in either direction, in stream order; what it
     * writes into host memory is there when it returns. Without a stream (NULL) all of it is done on return. */
    mil_status (*alloc)(mil_context *context, size_t bytes, void **out);
    void (*free)(mil_context *context, void *pointer);
    mil_status (*copy)(mil_context *context, void *to, const void *from, size_t bytes);
    mil_status (*zero)(mil_context *context, void *pointer, size_t bytes);
    /* Host memory that kernels are to read: *out is `from` itself where they can (CPU), else a copy in
     * context->scratch, complete in stream order; `from` may change after the call. */
    mil_status (*upload)(mil_context *context, const void *from, size_t bytes, const void **out);

    /* `count` products that share x, rows, in and fast: one pass over x, one parallel region. */
    mil_status (*linear_forward)(mil_context *context, const mil_linear *products, int64_t count);
    mil_status (*linear_backward)(mil_context *context, const mil_linear_grad *arguments);
    mil_status (*norm_forward)(mil_context *context, const mil_norm *arguments);
    mil_status (*norm_backward)(mil_context *context, const mil_norm_grad *arguments);
    mil_status (*rope_table)(mil_context *context, const mil_rope_table *arguments);
    mil_status (*rope)(mil_context *context, const mil_rope *arguments);
    mil_status (*attention_forward)(mil_context *context, const mil_attention *arguments);
    mil_status (*attention_backward)(mil_context *context, const mil_attention_grad *arguments);
    mil_status (*kv_append)(mil_context *context, const mil_kv_append *arguments);
    mil_status (*conv1d_forward)(mil_context *context, const mil_conv1d *arguments);
    mil_status (*conv1d_backward)(mil_context *context, const mil_conv1d_grad *arguments);
    mil_status (*scan_forward)(mil_context *context, const mil_scan *arguments);
    mil_status (*scan_backward)(mil_context *context, const mil_scan_grad *arguments);
    mil_status (*ssd_forward)(mil_context *context, const mil_ssd *arguments);
    mil_status (*ssd_backward)(mil_context *context, const mil_ssd_grad *arguments);
    mil_status (*glu_forward)(mil_context *context, const mil_glu *arguments);
    mil_status (*glu_backward)(mil_context *context, const mil_glu_grad *arguments);
    mil_status (*embedding_forward)(mil_context *context, const mil_embedding *arguments);
    mil_status (*embedding_backward)(mil_context *context, const mil_embedding_grad *arguments);
    mil_status (*linear_loss)(mil_context *context, mil_linear_loss *arguments);
    mil_status (*relative_mse)(mil_context *context, mil_relative_mse *arguments);
    mil_status (*adamw)(mil_context *context, const mil_adamw *arguments);
    mil_status (*muon)(mil_context *context, const mil_muon *arguments);
    mil_status (*sum_squares)(mil_context *context, const float *x, int64_t count, double *out);
    /* y += x over [rows, width] act. */
    mil_status (*add)(mil_context *context, int64_t rows, int64_t width, const void *x, int64_t x_stride,
                      void *y, int64_t y_stride);
    /* y[i] = x[index[i]] over rows of [*, width] act; index is on the device (see upload). */
    mil_status (*gather_rows)(mil_context *context, int64_t count, int64_t width, const int64_t *index,
                              const void *x, int64_t x_stride, void *y, int64_t y_stride);
    /* y [rows, width] float32, on the device, = scale * x, which is of `dtype`: act or float32. y may be x where that is
     * dense float32. */
    mil_status (*widen)(mil_context *context, int64_t rows, int64_t width, mil_dtype dtype, const void *x,
                        int64_t x_stride, float scale, float *y);
    /* Optional: what a device does in one go, the same bits as the calls one after another; arrays that only pass
     * between them may stay unwritten.
     *   project       norm_forward, linear_forward of products whose x is its y, and, where they are given, glu_forward of the
     *                 first two products' outputs (gate) and conv1d_forward of columns of one of them (conv)
     *   rope_append   rope of q and of k, kv_append of that k
     *   scan_mixer    conv1d_forward, where there is any, linear_forward of x_proj (which may be summed in an order of its
     *                 own), norm_forward of the norms, linear_forward of dt, scan_forward */
    mil_status (*project)(mil_context *context, const mil_norm *norm, const mil_linear *products,
                          int64_t count, const mil_glu *gate, const mil_conv1d *conv);
    mil_status (*rope_append)(mil_context *context, const mil_rope *q, const mil_rope *k,
                              const mil_kv_append *append);
    mil_status (*scan_mixer)(mil_context *context, const mil_scan_mixer *arguments);
    /* Optional: weights into 8 bits, all pointers of the device. */
    mil_status (*quantize)(mil_context *context, const mil_quantize *arguments);
    /* Optional: tokens from logits without the host. */
    mil_status (*sample)(mil_context *context, const mil_sample *arguments);
    mil_status (*accept)(mil_context *context, const mil_accept *arguments);
    mil_status (*advance)(mil_context *context, const mil_advance *arguments);
    mil_status (*propose)(mil_context *context, const mil_propose *arguments);
    mil_status (*settle)(mil_context *context, const mil_settle *arguments);
    /* Optional: operators called between record_begin and record_end run only when the recording is replayed, any
     * number of times, with the arguments that they had.  Their memory must then be there (no arena may grow while
     * recording: run the same once before), and nothing may be copied to or from the host. *recording is NULL or
     * an earlier one, of whatever work, which is made over where that can be done and freed where not: its replays that
     * were queued before stay what they were.  There is one even where an operator in between failed; it is NULL where
     * record_end fails itself. */
    mil_status (*record_begin)(mil_context *context);
    mil_status (*record_end)(mil_context *context, void **recording);
    mil_status (*replay)(mil_context *context, void *recording);
    void (*record_free)(mil_context *context, void *recording);
};

/* scan_mixer, operator by operator. */
static inline mil_status
mil_scan_mixer_apart(mil_context *context, const mil_scan_mixer *m)
{
    const mil_ops *ops = context->ops;
    if (m->conv.channels > 0) {
        MIL_TRY(ops->conv1d_forward(context, &m->conv));
    }
    if (m->x_proj.out > 0) {
        MIL_TRY(ops->linear_forward(context, &m->x_proj, 1));
    }
    for (int64_t i = 0; i < m->norm_count; i++) {
        MIL_TRY(ops->norm_forward(context, &m->norms[i]));
    }
    MIL_TRY(ops->linear_forward(context, &m->dt, 1));
    return ops->scan_forward(context, &m->scan);
}

extern const mil_ops mil_cpu_ops;

#endif
