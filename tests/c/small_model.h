/* A model with a layer of each mixer, values by formula, for tests of the engine. */
#ifndef MIL_TEST_SMALL_MODEL_H
#define MIL_TEST_SMALL_MODEL_H

#include <math.h>
#include <stdlib.h>

#include "model/model.h"

enum { VOCAB = 29, HIDDEN = 16 };

static const float frequencies[] = {1.0f, 0.1f};

static const mil_layer_config layers[] = {
    {.mixer = MIL_ATTENTION,
     .heads = 4,
     .kv_heads = 2,
     .head_dim = 4,
     .rotary = 4,
     .attention_scale = 0.5f,
     .intermediate = 24,
     .gated = true},
    {.mixer = MIL_MAMBA1,
     .inner = 16,
     .state_dim = 4,
     .conv_width = 4,
     .dt_rank = 3,
     .x_width = 8,
     .B_groups = 2,
     .C_groups = 4,
     .repeat_before_conv = true,
     .dt_bias_scale = 2.0f,
     .dt_max = 1e30f,
     .intermediate = 24,
     .gated = true},
    {.mixer = MIL_MAMBA2,
     .heads = 4,
     .head_dim = 4,
     .inner = 16,
     .state_dim = 4,
     .conv_width = 4,
     .x_width = 8,
     .B_groups = 2,
     .C_groups = 4,
     .norm_group = 8,
     .mixer_norm_eps = 1e-5f,
     .dt_bias_scale = 1.0f,
     .dt_max = 1e30f},
};

/* A model and the values that it borrows; `noise` makes it another one that often agrees. */
typedef struct small_model {
    mil_model model;
    float *values;
} small_model;

static void
small_model_release(small_model *m)
{
    mil_model_release(&m->model);
    free(m->values);
}

static inline mil_status
small_model_init_of(small_model *m, float noise, int64_t vocab)
{
    *m = (small_model){0};
    mil_model_config config = {
        .vocab = vocab,
        .hidden = HIDDEN,
        .layer_count = sizeof layers / sizeof *layers,
        .layers = layers,
        .tied = true,
        .norm_eps = 1e-5f,
        .embedding_scale = 1.0f,
        .logit_scale = 1.0f,
        .rope = {.inv_freq = frequencies, .rotary = 4, .scale = 1.0f, .theta = 1e4f},
    };
    MIL_TRY(mil_model_init(&m->model, &config));
    m->model.ops = &mil_cpu_ops;
    int64_t total = 0;
    for (int64_t i = 0; i < m->model.parameter_count; i++) {
        total += m->model.parameters[i].count;
    }
    m->values = malloc((size_t)total * sizeof(float));
    if (m->values == NULL) {
        abort();
    }
    for (int64_t i = 0; i < total; i++) {
        m->values[i] = 0.6f * sinf(1.7f * (float)i) + noise * sinf(0.31f * (float)i);
    }
    float *at = m->values;
    for (int64_t i = 0; i < m->model.parameter_count; i++) {
        m->model.parameters[i].data = at;
        m->model.parameters[i].dtype = MIL_F32;
        at += m->model.parameters[i].count;
    }
    return mil_model_bind(&m->model);
}

static inline mil_status
small_model_init(small_model *m, float noise)
{
    return small_model_init_of(m, noise, VOCAB);
}

#endif
