/* Checks of a configuration, and the life of a model (see model.h).
 *
 * A configuration comes from files, so every number is checked before anything is computed from it: sizes
 * are bounded (their products then fit int64_t), divisibility that the operators rely on is asserted
 * here once, and the message names the layer and the number.
 */
#include <math.h>
#include <string.h>

#include "model/parameters.h"

#define MAX_SIZE ((int64_t)1 << 24)
#define MAX_LAYERS 4096

static mil_status
check_size(int64_t layer, const char *name, int64_t value, int64_t minimum)
{
    if (value < minimum || value > MAX_SIZE) {
        return mil_fail(MIL_ERR_VALUE, "model: layer %lld: %s = %lld is not between %lld and %lld",
                        (long long)layer, name, (long long)value, (long long)minimum, (long long)MAX_SIZE);
    }
    return MIL_OK;
}

static mil_status
check_multiple(int64_t layer, const char *name, int64_t value, const char *divisor_name, int64_t divisor)
{
    if (value % divisor != 0) {
        return mil_fail(MIL_ERR_VALUE, "model: layer %lld: %s = %lld is not a multiple of %s = %lld",
                        (long long)layer, name, (long long)value, divisor_name, (long long)divisor);
    }
    return MIL_OK;
}

static mil_status
check_attention(int64_t layer, const mil_layer_config *c, const mil_rope_config *rope)
{
    MIL_TRY(check_size(layer, "heads", c->heads, 1));
    MIL_TRY(check_size(layer, "kv_heads", c->kv_heads, 1));
    MIL_TRY(check_size(layer, "head_dim", c->head_dim, 1));
    MIL_TRY(check_size(layer, "heads * head_dim", c->heads * c->head_dim, 1));
    MIL_TRY(check_multiple(layer, "heads", c->heads, "kv_heads", c->kv_heads));
    if (c->rotary != 0 && (c->rotary != rope->rotary || c->rotary > c->head_dim || c->rotary % 2 != 0)) {
        return mil_fail(
            MIL_ERR_VALUE,
            "model: layer %lld: rotary = %lld does not fit head_dim = %lld and %lld rope frequencies",
            (long long)layer, (long long)c->rotary, (long long)c->head_dim, (long long)(rope->rotary / 2));
    }
    if (c->window < 0 || !isfinite(c->attention_scale)) {
        return mil_fail(MIL_ERR_VALUE, "model: layer %lld: bad sliding window or attention scale",
                        (long long)layer);
    }
    return MIL_OK;
}

static mil_status
check_mamba(int64_t layer, const mil_layer_config *c)
{
    MIL_TRY(check_size(layer, "inner", c->inner, 1));
    MIL_TRY(check_size(layer, "state_dim", c->state_dim, 1));
    MIL_TRY(check_size(layer, "x_width", c->x_width, 1));
    MIL_TRY(check_size(layer, "B_groups", c->B_groups, 1));
    MIL_TRY(check_size(layer, "C_groups", c->C_groups, 1));
    MIL_TRY(check_size(layer, "inner * state_dim", c->inner * c->state_dim, 1));
    MIL_TRY(check_size(layer, "(B_groups + C_groups) * state_dim", (c->B_groups + c->C_groups) * c->state_dim,
                       1));
    MIL_TRY(check_multiple(layer, "inner", c->inner, "x_width", c->x_width));
    if (c->conv_width < 2 || c->conv_width > 8) {
        return mil_fail(MIL_ERR_VALUE, "model: layer %lld: conv_width = %lld is not between 2 and 8",
                        (long long)layer, (long long)c->conv_width);
    }
    if (!(c->dt_min >= 0) || !(c->dt_max > c->dt_min) || !isfinite(c->dt_bias_scale)) {
        return mil_fail(MIL_ERR_VALUE, "model: layer %lld: dt limits %g to %g are not an interval",
                        (long long)layer, (double)c->dt_min, (double)c->dt_max);
    }
    if (c->mixer == MIL_MAMBA2) {
        MIL_TRY(check_size(layer, "heads", c->heads, 1));
        MIL_TRY(check_size(layer, "head_dim", c->head_dim, 1));
        if (c->heads * c->head_dim != c->inner) {
            return mil_fail(
                MIL_ERR_VALUE, "model: layer %lld: inner = %lld is not heads * head_dim = %lld * %lld",
                (long long)layer, (long long)c->inner, (long long)c->heads, (long long)c->head_dim);
        }
        MIL_TRY(check_multiple(layer, "x_width", c->x_width, "head_dim", c->head_dim));
        MIL_TRY(check_multiple(layer, "heads", c->heads, "B_groups", c->B_groups));
        MIL_TRY(check_multiple(layer, "heads", c->heads, "C_groups", c->C_groups));
        if (c->norm_group != 0) {
            MIL_TRY(check_size(layer, "norm_group", c->norm_group, 1));
            MIL_TRY(check_multiple(layer, "inner", c->inner, "norm_group", c->norm_group));
        }
        return MIL_OK;
    }
    MIL_TRY(check_size(layer, "dt_rank", c->dt_rank, 1));
    MIL_TRY(check_multiple(layer, "inner", c->inner, "B_groups", c->B_groups));
    MIL_TRY(check_multiple(layer, "inner", c->inner, "C_groups", c->C_groups));
    if (c->x_width != c->inner) { /* grouped heads: runs of state_dim channels are repeated */
        MIL_TRY(check_multiple(layer, "x_width", c->x_width, "state_dim", c->state_dim));
        if (c->x_proj) {
            return mil_fail(MIL_ERR_VALUE, "model: layer %lld: x_proj needs x_width = inner",
                            (long long)layer);
        }
    }
    return MIL_OK;
}

static mil_status
check_config(const mil_model_config *config)
{
    if (config->layer_count < 1 || config->layer_count > MAX_LAYERS) {
        return mil_fail(MIL_ERR_VALUE, "model: %lld layers; 1 to %d are possible",
                        (long long)config->layer_count, MAX_LAYERS);
    }
    if (config->vocab < 1 || config->vocab > MAX_SIZE || config->hidden < 1 || config->hidden > MAX_SIZE) {
        return mil_fail(MIL_ERR_VALUE, "model: vocab = %lld and hidden = %lld must be between 1 and %lld",
                        (long long)config->vocab, (long long)config->hidden, (long long)MAX_SIZE);
    }
    const mil_rope_config *rope = &config->rope;
    if (rope->rotary < 0 || rope->rotary % 2 != 0 || rope->rotary > MAX_SIZE ||
        (rope->rotary > 0 && rope->inv_freq == NULL)) {
        return mil_fail(MIL_ERR_VALUE, "model: rope: rotary = %lld is not an even size with frequencies",
                        (long long)rope->rotary);
    }
    if (rope->long_after < 0 || (rope->dynamic_factor > 0 && (rope->rotary <= 2 || rope->long_after < 1))) {
        return mil_fail(MIL_ERR_VALUE,
                        "model: rope: scaling for long sequences needs their length and rotary > 2");
    }
    for (int64_t i = 0; i < config->layer_count; i++) {
        const mil_layer_config *c = &config->layers[i];
        MIL_TRY(c->mixer == MIL_ATTENTION ? check_attention(i, c, rope) : check_mamba(i, c));
        if (c->intermediate != 0) {
            MIL_TRY(check_size(i, "intermediate", c->intermediate, 1));
        }
    }
    return MIL_OK;
}

/* A copy of `count` elements, or NULL: nothing to copy or no memory (told apart by *status). */
static void *
copy_array(const void *from, int64_t count, size_t size, mil_status *status)
{
    if (from == NULL || *status != MIL_OK) {
        return NULL;
    }
    void *to = mil_alloc((size_t)count, size);
    if (to == NULL) {
        *status = mil_fail(MIL_ERR_MEMORY, "model: out of memory for its configuration");
        return NULL;
    }
    memcpy(to, from, (size_t)count * size);
    return to;
}

mil_status
mil_model_init(mil_model *model, const mil_model_config *config)
{
    *model = (mil_model){0};
    MIL_TRY(check_config(config));
    mil_status status = MIL_OK;
    mil_model_config *own = &model->config;
    *own = *config;
    own->layers = copy_array(config->layers, config->layer_count, sizeof *config->layers, &status);
    own->rope.inv_freq = copy_array(config->rope.inv_freq, config->rope.rotary / 2, sizeof(float), &status);
    own->rope.long_inv_freq =
        copy_array(config->rope.long_inv_freq, config->rope.rotary / 2, sizeof(float), &status);
    if (status == MIL_OK) {
        model->parameter_count = mil_list_parameters(own, NULL);
        model->parameters = mil_alloc((size_t)model->parameter_count, sizeof *model->parameters);
        model->layers = mil_alloc((size_t)own->layer_count, sizeof *model->layers);
        if (model->parameters == NULL || model->layers == NULL) {
            status = mil_fail(MIL_ERR_MEMORY, "model: out of memory for its configuration");
        }
    }
    if (status != MIL_OK) {
        mil_model_release(model);
        return status;
    }
    mil_list_parameters(own, model->parameters);
    for (int64_t i = 0; i < own->layer_count; i++) {
        model->layers[i] = (mil_layer){.config = own->layers[i]};
    }
    return MIL_OK;
}

mil_status
mil_model_bind(mil_model *model)
{
    for (int64_t i = 0; i < model->parameter_count; i++) {
        mil_parameter *p = &model->parameters[i];
        if (p->data == NULL) {
            if (p->required) {
                return mil_fail(MIL_ERR_VALUE, "model: parameter %s is missing", p->name);
            }
            continue;
        }
        if (!p->matrix && p->dtype != MIL_F32) {
            return mil_fail(MIL_ERR_DTYPE, "model: %s must be float32, not %s", p->name,
                            mil_dtype_name(p->dtype));
        }
        if (p->layer >= 0) {
            model->layers[p->layer].p[p->id] = p;
        }
        else if (p->id == MIL_P_EMBEDDING) {
            model->embedding = p;
        }
        else if (p->id == MIL_P_FINAL_NORM) {
            model->final_norm = p;
        }
        else {
            model->output = p;
        }
    }
    if (model->config.tied) {
        model->output = model->embedding;
    }
    model->cache_dtype = model->output->dtype;
    if (mil_dtype_is_scaled(model->cache_dtype)) {
        model->cache_dtype = model->ops->activation_dtype;
    }
    return MIL_OK;
}

void
mil_model_release(mil_model *model)
{
    mil_free((void *)(uintptr_t)model->config.layers);
    mil_free((void *)(uintptr_t)model->config.rope.inv_freq);
    mil_free((void *)(uintptr_t)model->config.rope.long_inv_freq);
    mil_free(model->parameters);
    mil_free(model->layers);
    *model = (mil_model){0};
}
