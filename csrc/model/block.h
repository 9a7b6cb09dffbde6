/* Inside of the model: one mixer and one MLP, forward and backward, as the forward pass, the training
 * step and the alignment loss use them.  Everything here works on packed rows. */
#ifndef MIL_MODEL_BLOCK_H
#define MIL_MODEL_BLOCK_H

#include "model/model.h"

/* What all layers of one pass share. */
typedef struct mil_pass {
    mil_context *context;
    const mil_model *model;
    mil_rows rows;
    const float *rope_table; /* [rows, rotary / 2, 2] or NULL */
    mil_state *const *states;
    bool fast;
    bool lean; /* nobody reads arrays that only pass between operators: fused ones may skip them */
} mil_pass;

/* Activations of one mixer that its backward reads; memory from the context's arena. */
typedef struct mil_mixer_saved {
    mil_norm norm;       /* of the input, into u; done by the first products */
    void *u;             /* [rows, hidden] normed input */
    void *q, *k, *v;     /* attention, q and k after norm and RoPE */
    void *q_raw, *k_raw; /* before the q and k norms, where there are any */
    float *log_sum_exp;  /* [rows, heads] */
    void *projected;     /* Mamba-2 [rows, z|x|B|C|dt]; Mamba-1 [x | z] with x_proj */
    void *x, *B, *C, *z; /* Mamba-1: products of u (x before the convolution) */
    void *conv;          /* [rows, conv channels] after convolution and silu */
    void *x_projected;   /* Mamba-1 with x_proj: [rows, dt_rank | B | C] */
    void *x_normed;      /* the same after the RMS norms */
    void *dt_low, *dt;   /* Mamba-1: [rows, dt_rank], [rows, inner] */
    void *scanned;       /* Mamba-2 [rows, inner] before the gated norm */
    void *features;      /* [rows, inner] what the output product reads */
} mil_mixer_saved;

typedef struct mil_mlp_saved {
    void *u, *gate, *up, *product;
} mil_mlp_saved;

/* Gradients of one model's parameters, by mil_parameter index; NULL = frozen. */
typedef struct mil_gradients {
    float **of; /* [parameter_count] */
} mil_gradients;

/* Sets up a pass: rows with past and boundary from the states, RoPE table in the arena. */
mil_status
mil_pass_begin(mil_pass *pass, mil_context *context, const mil_model *model, int64_t sequences,
               const int64_t *offsets, mil_state *const *states, bool fast) MIL_MUST_CHECK;

/* The embedding rows of `tokens` (host memory) into x [rows, hidden]. */
mil_status
mil_embed(mil_pass *pass, const int32_t *tokens, void *x) MIL_MUST_CHECK;

/* Arguments of the RMSNorm of rows of the residual stream: before mixers and MLPs, and the final one. */
mil_norm
mil_stream_norm(const mil_pass *pass, const mil_parameter *weight, int64_t rows, const void *x, void *y);

/* norm, then products of its output, then their gated activation and a convolution of one, where they are given. */
mil_status
mil_project(const mil_pass *pass, const mil_norm *norm, const mil_linear *products, int64_t count,
            const mil_glu *gate, const mil_conv1d *conv) MIL_MUST_CHECK;

/* y (+)= mixer(norm(x)). Fills `saved`. */
mil_status
mil_mixer_forward(mil_pass *pass, int64_t layer, const void *x, void *y, bool accumulate,
                  mil_mixer_saved *saved) MIL_MUST_CHECK;
/* grad_x (+)= d/dx of mixer(norm(x)) . grad_y; parameter gradients added. */
mil_status
mil_mixer_backward(mil_pass *pass, int64_t layer, const void *x, const mil_mixer_saved *saved,
                   const void *grad_y, void *grad_x, bool accumulate,
                   mil_gradients *gradients) MIL_MUST_CHECK;
mil_status
mil_mlp_forward(mil_pass *pass, int64_t layer, const void *x, void *y, bool accumulate,
                mil_mlp_saved *saved) MIL_MUST_CHECK;
mil_status
mil_mlp_backward(mil_pass *pass, int64_t layer, const void *x, const mil_mlp_saved *saved, const void *grad_y,
                 void *grad_x, bool accumulate, mil_gradients *gradients) MIL_MUST_CHECK;

/* `elements` act values into an act array. */
static inline void *
mil_act_at(const mil_context *context, const void *array, int64_t elements)
{
    return (char *)(uintptr_t)array + elements * (int64_t)mil_dtype_size(context->ops->activation_dtype);
}
/* [rows, width] act from the arena. */
mil_status
mil_act_push(mil_context *context, int64_t rows, int64_t width, void **out) MIL_MUST_CHECK;

#endif
