/* Models of random weights in real shapes, their recorded steps, and operators that do nothing: to time whole passes, and
 * them without one operator. */
#ifndef MIL_BENCHMARKS_GPU_RANDOM_MODEL_H
#define MIL_BENCHMARKS_GPU_RANDOM_MODEL_H

#include "timing.h"

extern "C" {
#include "model/model.h"
}

typedef struct model_shape {
    int64_t hidden, layers, heads, kv_heads, intermediate, vocab;
    int64_t mixer; /* of even layers: 0 attention, 1 Mamba-1, 2 Mamba-2; the odd ones are attention */
} model_shape;

static inline mil_layer_config
model_layer(const model_shape *s, int64_t mixer)
{
    mil_layer_config c = {};
    int64_t head_dim = s->hidden / s->heads, kv_width = s->kv_heads * head_dim;
    c.mixer = (mil_mixer_kind)mixer;
    c.heads = s->heads;
    c.kv_heads = s->kv_heads;
    c.head_dim = head_dim;
    c.rotary = mixer == 0 ? head_dim : 0;
    c.attention_scale = 1.0f / sqrtf((float)head_dim);
    c.inner = s->hidden;
    c.x_width = kv_width;
    c.conv_width = 4;
    c.state_dim = mixer == 1 ? 16 : head_dim;
    c.dt_rank = s->hidden / 16;
    c.B_groups = mixer == 1 ? kv_width / 16 : s->kv_heads;
    c.C_groups = mixer == 1 ? s->hidden / 16 : s->heads;
    c.repeat_before_conv = true;
    c.norm_group = head_dim;
    c.mixer_norm_eps = 1e-5f;
    c.dt_bias_scale = 1.0f;
    c.dt_max = INFINITY;
    c.intermediate = s->intermediate;
    c.gated = true;
    c.activation = MIL_SILU;
    return c;
}

static __global__ void
model_fill_codes(uint32_t *to, int64_t words)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < words;
         i += (int64_t)gridDim.x * blockDim.x) {
        uint32_t v = (uint32_t)i * 2654435761u;
        v ^= v >> 15;
        v *= 2246822519u;
        to[i] = v & 0xbfbfbfbfu; /* no NaN in either format */
    }
}

/* A model on the device, through `ops`, which is the caller's copy of the device's table: matrices of `weights`, the
 * parameters that need not be there with `optional`. */
static inline mil_model *
model_of(harness *h, const mil_model_config *config, mil_dtype weights, bool optional, mil_ops *ops)
{
    mil_model *model = (mil_model *)calloc(1, sizeof *model);
    harness_need(mil_model_init(model, config));
    model->ops = ops;
    for (int64_t i = 0; i < model->parameter_count; i++) {
        mil_parameter *p = &model->parameters[i];
        p->dtype = p->matrix ? weights : MIL_F32;
        if (!p->required && !optional) {
            continue;
        }
        if (mil_dtype_is_scaled(p->dtype)) {
            harness_need(ops->alloc(&h->gpu, (size_t)p->count, &p->data));
            model_fill_codes<<<1024, 256, 0, mil_stream(&h->gpu)>>>((uint32_t *)p->data, p->count / 4);
            p->scale = (float *)timing_array(h, p->shape[0], MIL_F32, 0.001f);
        }
        else {
            p->data = timing_array(h, p->count, p->dtype, 0.02f);
        }
    }
    harness_need(mil_model_bind(model));
    return model;
}

/* The hybrid of a shape. */
static inline mil_model *
model_random(harness *h, const model_shape *s, mil_dtype weights, mil_ops *ops)
{
    mil_layer_config *layers = (mil_layer_config *)calloc((size_t)s->layers, sizeof *layers);
    for (int64_t i = 0; i < s->layers; i++) {
        layers[i] = model_layer(s, i % 2 ? 0 : s->mixer);
    }
    float inv_freq[256];
    for (int i = 0; i < 256; i++) {
        inv_freq[i] = powf(500000.0f, -(float)i / 64.0f);
    }
    mil_model_config config = {};
    config.vocab = s->vocab;
    config.hidden = s->hidden;
    config.layer_count = s->layers;
    config.layers = layers;
    config.norm_eps = 1e-5f;
    config.embedding_scale = config.logit_scale = 1.0f;
    config.rope.inv_freq = inv_freq;
    config.rope.rotary = s->hidden / s->heads;
    config.rope.scale = 1.0f;
    mil_model *model = model_of(h, &config, weights, false, ops);
    free(layers);
    return model;
}

/* Bytes of the parameters that are there; of matrices alone. */
static inline double
model_bytes(const mil_model *model, bool matrices)
{
    double bytes = 0;
    for (int64_t i = 0; i < model->parameter_count; i++) {
        const mil_parameter *p = &model->parameters[i];
        bytes +=
            p->data != NULL && (p->matrix || !matrices) ? (double)p->count * mil_dtype_size(p->dtype) : 0;
    }
    return bytes;
}

/* A step of `sequences` states that have read `past` tokens and a few, and its block of numbers.  Many are at different places
 * of their windows, so that one in 16 folds, as in texts of any lengths. */
static inline mil_step
model_step_of(harness *h, const mil_model *model, int64_t sequences, int64_t past)
{
    const int64_t columns = sequences + 1;
    int64_t *rows = (int64_t *)calloc((size_t)(3 * columns), sizeof *rows);
    int32_t *tokens = (int32_t *)calloc((size_t)sequences, sizeof *tokens);
    mil_step step = {};
    mil_state **states = (mil_state **)calloc((size_t)sequences, sizeof *states);
    for (int64_t i = 0; i < sequences; i++) {
        states[i] = (mil_state *)calloc(1, sizeof **states);
        harness_need(mil_state_init(states[i], model, past + 64));
        states[i]->length = past;
        states[i]->boundary = past - past % MIL_WINDOW - MIL_WINDOW;
        rows[i] = i;
        rows[columns + i] = past + 1 + (i + 6) % MIL_WINDOW;
        rows[2 * columns + i] = past;
        tokens[i] = (int32_t)(i + 1);
    }
    rows[sequences] = sequences;
    step.sequences = sequences;
    step.states = states;
    step.tokens = (const int32_t *)harness_bytes(h, tokens, (size_t)sequences * sizeof *tokens);
    step.rows = (const int64_t *)harness_bytes(h, rows, (size_t)(3 * columns) * sizeof *rows);
    step.logits = (float *)timing_array(h, sequences * model->config.vocab, MIL_F32, 0.0f);
    free(rows);
    free(tokens);
    return step;
}

/* Seconds of one replay of a recorded step, back to back as a burst has them: the best of some rounds of about
 * 0.1 s each, after a short one. */
static inline double
model_step_seconds(mil_context *context, const mil_model *model, const mil_step *step)
{
    enum { ROUNDS = 4 };
    int replays = 5;
    cudaStream_t stream = mil_stream(context);
    void *recording = NULL;
    harness_need(mil_model_step(context, model, step));
    harness_need(context->ops->finish(context));
    harness_need(context->ops->record_begin(context));
    harness_need(mil_model_step(context, model, step));
    harness_need(context->ops->record_end(context, &recording));
    cudaEvent_t begin, end;
    timing_need(cudaEventCreate(&begin));
    timing_need(cudaEventCreate(&end));
    double best = INFINITY;
    for (int round = 0; round < ROUNDS; round++) {
        float milliseconds;
        timing_need(cudaEventRecord(begin, stream));
        for (int i = 0; i < replays; i++) {
            harness_need(context->ops->replay(context, recording));
        }
        timing_need(cudaEventRecord(end, stream));
        timing_need(cudaEventSynchronize(end));
        timing_need(cudaEventElapsedTime(&milliseconds, begin, end));
        best = fmin(best, milliseconds * 1e-3 / replays);
        replays = best > 0.1 / 60 ? (int)(0.1 / best) + 1 : 60;
    }
    timing_need(cudaEventDestroy(begin));
    timing_need(cudaEventDestroy(end));
    context->ops->record_free(context, recording);
    return best;
}

/* ---- operators that do nothing -------------------------------------------------------------------------------- */

template <typename Arguments>
static mil_status
skip(mil_context *, const Arguments *)
{
    return MIL_OK;
}

static inline mil_status
skip_project(mil_context *, const mil_norm *, const mil_linear *, int64_t, const mil_glu *,
             const mil_conv1d *)
{
    return MIL_OK;
}

static inline mil_status
skip_linear(mil_context *, const mil_linear *, int64_t)
{
    return MIL_OK;
}

static inline mil_status
skip_rope_append(mil_context *, const mil_rope *, const mil_rope *, const mil_kv_append *)
{
    return MIL_OK;
}

#endif
