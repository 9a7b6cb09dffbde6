/* Inside of the model: the list of parameters that a configuration asks for, and widths derived from it. */
#ifndef MIL_MODEL_PARAMETERS_H
#define MIL_MODEL_PARAMETERS_H

#include "model/model.h"

/* Fills list (NULL: only counts) with names, shapes and roles; data stays NULL. Returns the count. */
int64_t
mil_list_parameters(const mil_model_config *config, mil_parameter *list);

/* Channels that leave the convolution, and those that enter it. */
static inline int64_t
mil_conv_channels(const mil_layer_config *c)
{
    if (c->mixer == MIL_MAMBA2) {
        return c->x_width + (c->B_groups + c->C_groups) * c->state_dim;
    }
    return c->repeat_before_conv ? c->inner : c->x_width;
}

static inline int64_t
mil_conv_inputs(const mil_layer_config *c)
{
    return c->mixer == MIL_MAMBA2 ? mil_conv_channels(c) : c->x_width;
}

/* Mamba-1: [dt | B | C] of the original model's x_proj. */
static inline int64_t
mil_x_proj_width(const mil_layer_config *c)
{
    return c->dt_rank + (c->B_groups + c->C_groups) * c->state_dim;
}

/* Columns that the mixer's output product reads. */
static inline int64_t
mil_features(const mil_layer_config *c)
{
    return c->mixer == MIL_ATTENTION ? c->heads * c->head_dim : c->inner;
}

#endif
