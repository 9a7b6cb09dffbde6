/* Models: configuration, parameters, the forward pass on packed rows, and the state of a sequence.
 *
 * One description serves Transformers, hybrids and pure Mamba models: a model is a list of layers, each
 *
 *     x = x + mixer(norm(x))          mixer: attention, Mamba-1 or Mamba-2
 *     x = x + mlp(norm(x))            absent in pure Mamba models
 *
 * between an embedding and a final norm with an output product.  Families differ by numbers in these
 * structs and by tensor names; the names are mapped in mambainllama/families.py, so that a file's words
 * never reach this code.  Parameters are borrowed: the owner (Python) keeps their memory alive.
 *
 * The forward pass is one function for prefill, decoding, verification, scoring and training: rows of several
 * sequences packed one after another, with or without states.
 */
#ifndef MIL_MODEL_MODEL_H
#define MIL_MODEL_MODEL_H

#include "device.h"

/* ---- configuration ---------------------------------------------------------------------------------- */

typedef enum mil_mixer_kind { MIL_ATTENTION = 0, MIL_MAMBA1 = 1, MIL_MAMBA2 = 2 } mil_mixer_kind;

typedef struct mil_layer_config {
    mil_mixer_kind mixer;
    /* attention, and the heads of Mamba-2 */
    int64_t heads, kv_heads, head_dim;
    int64_t window;        /* sliding window, 0 = none */
    int64_t rotary;        /* rotated part of head_dim, 0 = no RoPE */
    float attention_scale; /* 1 / sqrt(head_dim) by custom */
    /* Mamba */
    int64_t inner, state_dim, conv_width, dt_rank;
    int64_t x_width;            /* channels of x before they are repeated to inner */
    int64_t B_groups, C_groups; /* of state_dim each */
    bool repeat_before_conv;    /* Mamba-1 with x_width < inner: conv has inner channels (else x_width) */
    bool x_proj;    /* Mamba-1: B, C, dt from x after the convolution (original Mamba); else from u */
    bool bcdt_norm; /* Mamba-1 with x_proj: RMS norms on dt, B, C (Falcon-Mamba, Jamba) */
    float bcdt_eps;
    int64_t norm_group;    /* Mamba-2: columns of one group of the gated norm; 0 = no norm, gate only */
    bool norm_before_gate; /* Mamba-2 */
    float mixer_norm_eps;
    float dt_bias_scale, dt_min, dt_max;
    /* MLP */
    int64_t intermediate; /* 0 = no MLP */
    bool gated;
    mil_activation activation;
} mil_layer_config;

/* Frequencies come from Python, which knows the rope types (rope.py); what depends on the length of a
 * sequence is here.  A sequence of `length` tokens (past + count of a call) uses
 *   long_inv_freq where long_inv_freq is set and length > long_after (LongRoPE), or
 *   inv_freq of base' = theta * (factor * length / long_after - (factor - 1))^(rotary / (rotary - 2)) where
 *   dynamic_factor > 0 and length > long_after (dynamic NTK). */
typedef struct mil_rope_config {
    const float *inv_freq;      /* [rotary / 2], owned by the model after mil_model_init */
    const float *long_inv_freq; /* [rotary / 2] or NULL */
    int64_t rotary, long_after;
    float scale; /* of cos and sin: attention factor of YaRN and LongRoPE, else 1 */
    float theta, dynamic_factor;
} mil_rope_config;

typedef struct mil_model_config {
    int64_t vocab, hidden, layer_count;
    const mil_layer_config *layers; /* [layer_count], copied by mil_model_init */
    bool tied;                      /* the output product uses the embedding */
    float norm_eps;
    float embedding_scale, logit_scale; /* 1 by custom */
    mil_rope_config rope;
} mil_model_config;

/* ---- parameters ------------------------------------------------------------------------------------- */

/* Name suffixes and shapes stand in parameters.c, in this order. */
typedef enum mil_parameter_id {
    MIL_P_INPUT_NORM,
    MIL_P_Q,
    MIL_P_Q_BIAS,
    MIL_P_K,
    MIL_P_K_BIAS,
    MIL_P_V,
    MIL_P_V_BIAS,
    MIL_P_O,
    MIL_P_O_BIAS,
    MIL_P_Q_NORM,
    MIL_P_K_NORM,
    MIL_P_X,
    MIL_P_B,
    MIL_P_C,
    MIL_P_Z, /* Mamba-1 hybrids: one product each */
    MIL_P_IN,
    MIL_P_IN_BIAS, /* Mamba-1 [x | z], Mamba-2 [z | x | B | C | dt] */
    MIL_P_CONV,
    MIL_P_CONV_BIAS,
    MIL_P_X_PROJ,
    MIL_P_DT_DOWN,
    MIL_P_DT,
    MIL_P_DT_BIAS,
    MIL_P_DT_NORM,
    MIL_P_B_NORM,
    MIL_P_C_NORM,
    MIL_P_A_LOG,
    MIL_P_D,
    MIL_P_MIXER_NORM,
    MIL_P_OUT,
    MIL_P_OUT_BIAS,
    MIL_P_POST_NORM,
    MIL_P_GATE,
    MIL_P_GATE_BIAS,
    MIL_P_UP,
    MIL_P_UP_BIAS,
    MIL_P_DOWN,
    MIL_P_DOWN_BIAS,
    MIL_P_LAYER_COUNT,
    MIL_P_EMBEDDING = MIL_P_LAYER_COUNT,
    MIL_P_FINAL_NORM,
    MIL_P_OUTPUT,
    MIL_P_COUNT
} mil_parameter_id;

#define MIL_NAME_SIZE 96

typedef struct mil_parameter {
    char name[MIL_NAME_SIZE]; /* "model.layers.3.mamba.in_proj.weight": the published hybrid layout's names */
    mil_parameter_id id;
    int64_t layer; /* -1: of the model */
    int64_t shape[3];
    int dims;
    int64_t count;
    bool matrix;     /* stored in the model's dtype; the others are always float32 in memory */
    bool required;   /* else data may stay NULL (biases, q and k norms) */
    mil_dtype given; /* of the owner's array */
    mil_dtype dtype; /* of data: `given`, or 8 bits */
    void *data;      /* borrowed, on the model's device */
    float *scale;    /* [shape[0]] where dtype is float8 or int8, beside data; else NULL */
} mil_parameter;

typedef struct mil_layer {
    mil_layer_config config;
    mil_parameter *p[MIL_P_LAYER_COUNT]; /* NULL where this layer has no such parameter or no data for it */
} mil_layer;

typedef struct mil_model {
    mil_model_config config;
    const mil_ops *ops; /* the device that holds the parameters; set by the owner before mil_model_bind */
    mil_layer *layers;
    mil_parameter *parameters; /* [parameter_count], in file order: embedding, layers, final norm, output */
    int64_t parameter_count;
    mil_parameter *embedding, *final_norm, *output; /* output = embedding where tied */
    mil_dtype cache_dtype;                          /* of KV caches: that of the output product's weight */
} mil_model;

/* Checks the configuration, copies it and lays out the parameters, their data still NULL.
 * On failure nothing is held. */
mil_status
mil_model_init(mil_model *model, const mil_model_config *config) MIL_MUST_CHECK;
/* After the owner has set data and dtype of the parameters: checks that the required ones are there, and
 * prepares the layers' views. */
mil_status
mil_model_bind(mil_model *model) MIL_MUST_CHECK;
void
mil_model_release(mil_model *model);

/* ---- the state of a sequence -------------------------------------------------------------------------- */

typedef struct mil_layer_state {
    mil_kv_cache kv;       /* attention */
    mil_mixer_state mixer; /* mamba */
    int64_t current_tokens;
} mil_layer_state;

typedef struct mil_state {
    const mil_model *model;
    int64_t length;   /* tokens seen */
    int64_t boundary; /* tokens folded into the mixers' states */
    int64_t capacity; /* tokens that the KV caches hold */
    int64_t expected; /* tokens that will ever be asked for, as far as known: growth ends there; 0: unknown */
    mil_layer_state *layers; /* [layer_count] */
    void *mixer_memory;      /* one block for all mixers, on the model's device like the caches */
    size_t mixer_bytes;
    void *cache_memory; /* one block for the caches of all layers: a device's blocks are rounded up to MiBs */
    bool torn; /* a pass that moves the boundary failed when some layers had done so: see mil_state_check */
} mil_state;

#define MIL_MOST_TOKENS ((int64_t)1 << 36) /* of one sequence: more are a mistake, and would overflow sizes */

/* Empty, with room for `capacity` tokens in the caches (grown by mil_state_reserve). */
mil_status
mil_state_init(mil_state *state, const mil_model *model, int64_t capacity) MIL_MUST_CHECK;
void
mil_state_release(mil_state *state); /* twice is safe */
/* Room for at least `capacity` tokens; grows by half as much again at least, but not beyond what is expected. On failure
 * nothing has changed. */
mil_status
mil_state_reserve(mil_state *state, int64_t capacity) MIL_MUST_CHECK;
mil_status
mil_state_clear(mil_state *state) MIL_MUST_CHECK; /* back to no tokens; memory is kept */
/* Fails (MIL_ERR_STATE) where a failed pass has left layers at different tokens; only clearing mends that. */
mil_status
mil_state_check(const mil_state *state) MIL_MUST_CHECK;
/* An independent copy (fork) of `from` in the uninitialised `to`. */
mil_status
mil_state_copy(mil_state *to, const mil_state *from) MIL_MUST_CHECK;
/* Takes the last `count` tokens back. Exact. Fails (MIL_ERR_STATE) where mixers have folded them: tokens
 * of the last call of at most MIL_WINDOW rows can always be taken back. */
mil_status
mil_state_rollback(mil_state *state, int64_t count) MIL_MUST_CHECK;
/* Bytes held: in all, and those that `length` tokens really need (caches + mixers). */
int64_t
mil_state_bytes(const mil_state *state);
int64_t
mil_state_bytes_at(const mil_model *model, int64_t length);
/* A flat image: header, then per layer what is in use. `write` needs mil_state_image_bytes(state) bytes;
 * `read` checks everything against the model (a hostile image is a MIL_ERR_FORMAT). */
int64_t
mil_state_image_bytes(const mil_state *state);
mil_status
mil_state_write(const mil_state *state, void *image) MIL_MUST_CHECK;
mil_status
mil_state_read(mil_state *state, const mil_model *model, const void *image, int64_t bytes) MIL_MUST_CHECK;

/* ---- forward ---------------------------------------------------------------------------------------- */

/* Where a forward pass leaves copies of its inner activations (calibration, alignment, tests). */
typedef enum mil_capture_kind {
    MIL_CAPTURE_INPUT,    /* [rows, hidden] residual stream that enters the layer */
    MIL_CAPTURE_NORMED,   /* [rows, hidden] the mixer's input u */
    MIL_CAPTURE_FEATURES, /* [rows, inner] what the mixer's output product reads */
    MIL_CAPTURE_MIXER,    /* [rows, hidden] the mixer's output, before it is added */
    MIL_CAPTURE_HIDDEN,   /* [rows, hidden] residual stream after the layer */
    MIL_CAPTURE_FINAL     /* [rows, hidden] after the final norm (layer is ignored) */
} mil_capture_kind;

typedef struct mil_capture {
    mil_capture_kind kind;
    int64_t layer;
    float *out; /* [rows, width], caller's, of the host or the device */
} mil_capture;

/* Rows of which only a draw is wanted: their logits stay on the device (one that has mil_ops.sample). All pointers are of
 * host memory. */
typedef struct mil_draws {
    int64_t count;
    const int64_t *rows;               /* [count] */
    const mil_sample_options *options; /* [count] */
    const int64_t *position;           /* [count] of the token that is drawn, in its text */
    int32_t *token;                    /* [count] out */
    int32_t *bad;                      /* [count] out: 1 where a logit is NaN or infinite, else 0 */
} mil_draws;

typedef struct mil_forward {
    const int32_t *tokens; /* [rows], host memory; checked by mil_check_tokens beforehand */
    int64_t sequences;
    const int64_t *offsets;   /* [sequences + 1] */
    mil_state *const *states; /* [sequences] with room for their rows, or NULL: every sequence starts fresh */
    const bool *held;         /* [sequences] whose boundary stays (device.h: MIL_HOLD), or NULL: none */
    const int64_t *logit_rows; /* [logit_count] rows whose logits are wanted */
    int64_t logit_count;
    float *logits; /* [logit_count, vocab] host memory, or NULL */
    mil_draws draws;
    const mil_capture *captures;
    int64_t capture_count;
    bool fast; /* training and evaluation: products in any order */
} mil_forward;

/* tokens are in [0, vocab) and offsets ascend from 0; the message names the first culprit. */
mil_status
mil_check_tokens(const mil_model *model, const int32_t *tokens, int64_t sequences,
                 const int64_t *offsets) MIL_MUST_CHECK;

/* A few rows of each sequence with everything on the device, so that it can be recorded and replayed: tokens and rows are
 * read there when it runs, nothing returns to the host, and the states' own counters do not move. */
typedef struct mil_step {
    int64_t sequences;
    int64_t count;            /* rows of each sequence, at most MIL_WINDOW; 0: one */
    mil_state *const *states; /* [sequences], with room for the rows of all replays */
    const int32_t *tokens;    /* [sequences, count], device */
    const int64_t *rows;      /* [3, sequences + 1], device: mil_rows.device */
    bool last_only;           /* logits of each sequence's last row alone */
    float *logits;            /* [sequences * count or sequences, vocab], device */
    int64_t logits_stride;    /* 0: vocab */
} mil_step;

mil_status
mil_model_step(mil_context *context, const mil_model *model, const mil_step *step) MIL_MUST_CHECK;

/* Runs the model over packed rows; states advance by their rows. On failure they are as before, or torn where their
 * boundaries were moving. */
mil_status
mil_model_forward(mil_context *context, const mil_model *model, const mil_forward *arguments) MIL_MUST_CHECK;

#endif
