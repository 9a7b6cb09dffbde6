/* Which parameters a model has: names, shapes and roles, from the configuration alone.
 *
 * The names are those of the published hybrid layout (method.md, "Files"; Llama's own names elsewhere),
 * so most files need no mapping.  Matrices keep their file's dtype; vectors (norms, biases, convolutions,
 * A_log, D, dt biases) are small, are read by float32 arithmetic, and are float32 in memory.
 */
#include <stdio.h>

#include "model/parameters.h"

#define MATRIX true
#define VECTOR false
#define REQUIRED true
#define OPTIONAL false

/* Where parameters go as they are listed; with list == NULL they are only counted. */
typedef struct sink {
    mil_parameter *list;
    int64_t count;
    int64_t layer;
} sink;

static void
add(sink *to, mil_parameter_id id, const char *suffix, bool matrix, bool required, int64_t d0, int64_t d1,
    int64_t d2)
{
    if (to->list != NULL) {
        mil_parameter *p = &to->list[to->count];
        *p = (mil_parameter){
            .id = id,
            .layer = to->layer,
            .shape = {d0, d1, d2},
            .dims = d2 > 0   ? 3
                    : d1 > 0 ? 2
                             : 1,
            .count = d0 * (d1 > 0 ? d1 : 1) * (d2 > 0 ? d2 : 1),
            .matrix = matrix,
            .required = required,
        };
        if (to->layer < 0) {
            snprintf(p->name, sizeof p->name, "%s", suffix);
        }
        else {
            snprintf(p->name, sizeof p->name, "model.layers.%lld.%s", (long long)to->layer, suffix);
        }
    }
    to->count++;
}

static void
matrix(sink *to, mil_parameter_id id, const char *suffix, int64_t rows, int64_t columns)
{
    add(to, id, suffix, MATRIX, REQUIRED, rows, columns, 0);
}

static void
vector(sink *to, mil_parameter_id id, const char *suffix, bool required, int64_t count)
{
    add(to, id, suffix, VECTOR, required, count, 0, 0);
}

static void
attention_parameters(sink *to, const mil_layer_config *c, int64_t hidden)
{
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    matrix(to, MIL_P_Q, "self_attn.q_proj.weight", q, hidden);
    vector(to, MIL_P_Q_BIAS, "self_attn.q_proj.bias", OPTIONAL, q);
    matrix(to, MIL_P_K, "self_attn.k_proj.weight", kv, hidden);
    vector(to, MIL_P_K_BIAS, "self_attn.k_proj.bias", OPTIONAL, kv);
    matrix(to, MIL_P_V, "self_attn.v_proj.weight", kv, hidden);
    vector(to, MIL_P_V_BIAS, "self_attn.v_proj.bias", OPTIONAL, kv);
    matrix(to, MIL_P_O, "self_attn.o_proj.weight", hidden, q);
    vector(to, MIL_P_O_BIAS, "self_attn.o_proj.bias", OPTIONAL, hidden);
    vector(to, MIL_P_Q_NORM, "self_attn.q_norm.weight", OPTIONAL, c->head_dim);
    vector(to, MIL_P_K_NORM, "self_attn.k_norm.weight", OPTIONAL, c->head_dim);
}

static void
mamba1_parameters(sink *to, const mil_layer_config *c, int64_t hidden)
{
    int64_t conv = mil_conv_channels(c);
    if (c->x_proj) {
        matrix(to, MIL_P_IN, "mamba.in_proj.weight", 2 * c->inner, hidden);
        vector(to, MIL_P_IN_BIAS, "mamba.in_proj.bias", OPTIONAL, 2 * c->inner);
        matrix(to, MIL_P_X_PROJ, "mamba.x_proj.weight", mil_x_proj_width(c), c->inner);
    }
    else {
        matrix(to, MIL_P_X, "mamba.in_proj_x.weight", c->x_width, hidden);
        matrix(to, MIL_P_B, "mamba.B_proj.weight", c->B_groups * c->state_dim, hidden);
        matrix(to, MIL_P_C, "mamba.C_proj.weight", c->C_groups * c->state_dim, hidden);
        matrix(to, MIL_P_Z, "mamba.in_proj_z.weight", c->inner, hidden);
        matrix(to, MIL_P_DT_DOWN, "mamba.dt_proj_down.weight", c->dt_rank, hidden);
    }
    if (c->bcdt_norm) {
        vector(to, MIL_P_DT_NORM, "mamba.dt_layernorm.weight", OPTIONAL, c->dt_rank);
        vector(to, MIL_P_B_NORM, "mamba.b_layernorm.weight", OPTIONAL, c->B_groups * c->state_dim);
        vector(to, MIL_P_C_NORM, "mamba.c_layernorm.weight", OPTIONAL, c->C_groups * c->state_dim);
    }
    add(to, MIL_P_CONV, "mamba.conv1d.weight", VECTOR, REQUIRED, conv, 1, c->conv_width);
    vector(to, MIL_P_CONV_BIAS, "mamba.conv1d.bias", OPTIONAL, conv);
    matrix(to, MIL_P_DT, "mamba.dt_proj.weight", c->inner, c->dt_rank);
    vector(to, MIL_P_DT_BIAS, "mamba.dt_proj.bias", REQUIRED, c->inner);
    add(to, MIL_P_A_LOG, "mamba.A_log", VECTOR, REQUIRED, c->inner, c->state_dim, 0);
    vector(to, MIL_P_D, "mamba.D", REQUIRED, c->inner);
    matrix(to, MIL_P_OUT, "mamba.out_proj.weight", hidden, c->inner);
    vector(to, MIL_P_OUT_BIAS, "mamba.out_proj.bias", OPTIONAL, hidden);
}

static void
mamba2_parameters(sink *to, const mil_layer_config *c, int64_t hidden)
{
    int64_t conv = mil_conv_channels(c);
    matrix(to, MIL_P_IN, "mamba.in_proj.weight", c->inner + conv + c->heads, hidden);
    vector(to, MIL_P_IN_BIAS, "mamba.in_proj.bias", OPTIONAL, c->inner + conv + c->heads);
    add(to, MIL_P_CONV, "mamba.conv1d.weight", VECTOR, REQUIRED, conv, 1, c->conv_width);
    vector(to, MIL_P_CONV_BIAS, "mamba.conv1d.bias", OPTIONAL, conv);
    vector(to, MIL_P_DT_BIAS, "mamba.dt_bias", REQUIRED, c->heads);
    vector(to, MIL_P_A_LOG, "mamba.A_log", REQUIRED, c->heads);
    vector(to, MIL_P_D, "mamba.D", REQUIRED, c->heads);
    if (c->norm_group > 0) {
        vector(to, MIL_P_MIXER_NORM, "mamba.norm.weight", REQUIRED, c->inner);
    }
    matrix(to, MIL_P_OUT, "mamba.out_proj.weight", hidden, c->inner);
    vector(to, MIL_P_OUT_BIAS, "mamba.out_proj.bias", OPTIONAL, hidden);
}

static void
mlp_parameters(sink *to, const mil_layer_config *c, int64_t hidden)
{
    vector(to, MIL_P_POST_NORM, "post_attention_layernorm.weight", REQUIRED, hidden);
    if (c->gated) {
        matrix(to, MIL_P_GATE, "mlp.gate_proj.weight", c->intermediate, hidden);
        vector(to, MIL_P_GATE_BIAS, "mlp.gate_proj.bias", OPTIONAL, c->intermediate);
    }
    matrix(to, MIL_P_UP, "mlp.up_proj.weight", c->intermediate, hidden);
    vector(to, MIL_P_UP_BIAS, "mlp.up_proj.bias", OPTIONAL, c->intermediate);
    matrix(to, MIL_P_DOWN, "mlp.down_proj.weight", hidden, c->intermediate);
    vector(to, MIL_P_DOWN_BIAS, "mlp.down_proj.bias", OPTIONAL, hidden);
}

int64_t
mil_list_parameters(const mil_model_config *config, mil_parameter *list)
{
    sink to = {.list = list, .layer = -1};
    matrix(&to, MIL_P_EMBEDDING, "model.embed_tokens.weight", config->vocab, config->hidden);
    for (int64_t i = 0; i < config->layer_count; i++) {
        const mil_layer_config *c = &config->layers[i];
        to.layer = i;
        vector(&to, MIL_P_INPUT_NORM, "input_layernorm.weight", REQUIRED, config->hidden);
        switch (c->mixer) {
            case MIL_ATTENTION:
                attention_parameters(&to, c, config->hidden);
                break;
            case MIL_MAMBA1:
                mamba1_parameters(&to, c, config->hidden);
                break;
            case MIL_MAMBA2:
                mamba2_parameters(&to, c, config->hidden);
                break;
        }
        if (c->intermediate > 0) {
            mlp_parameters(&to, c, config->hidden);
        }
    }
    to.layer = -1;
    vector(&to, MIL_P_FINAL_NORM, "model.norm.weight", REQUIRED, config->hidden);
    if (!config->tied) {
        matrix(&to, MIL_P_OUTPUT, "lm_head.weight", config->vocab, config->hidden);
    }
    return to.count;
}
