/* The mixer of one layer, forward and backward: y (+)= mixer(norm(x)) on packed rows.
 *
 *   attention   u -> q, k, v -> (norms) -> RoPE -> causal attention -> o
 *   Mamba-2     u -> [z | x B C | dt] -> convolution of x B C -> SSD -> norm(y silu(z)) -> out
 *   Mamba-1     u -> x, B, C, z, dt_low -> convolution of x -> scan with dt = W dt_low, gate z -> out
 *               original Mamba: u -> [x | z] -> convolution -> [dt_low B C] from x -> scan -> out
 *
 * One function a kind and direction; forward fills `saved`, whose arrays backward reads.  In training they stay in the
 * arena until backward has used them; in inference the caller rewinds the arena after each layer.  Mixers and
 * gates recompute what is cheap (convolution's pre-activation, decays, norm statistics), so that per row
 * about two rows of each projection are kept.
 */
#include "model/block.h"
#include "model/parameters.h"

/* ---- helpers ---------------------------------------------------------------------------------------- */

mil_status
mil_act_push(mil_context *context, int64_t rows, int64_t width, void **out)
{
    return mil_arena_push(context->scratch, (size_t)rows * (size_t)width,
                          mil_dtype_size(context->ops->activation_dtype), out);
}

static const float *
vector_of(const mil_parameter *p)
{
    return p == NULL ? NULL : p->data;
}

/* The gradient of a parameter, NULL where it is absent or frozen. */
static float *
gradient_of(const mil_pass *pass, const mil_gradients *gradients, const mil_parameter *p)
{
    return p == NULL ? NULL : gradients->of[p - pass->model->parameters];
}

/* y = x W^T + bias, dense y. */
static mil_linear
product(const mil_pass *pass, const mil_parameter *weight, const mil_parameter *bias, const void *x,
        int64_t x_stride, void *y)
{
    return (mil_linear){
        .rows = pass->rows.rows,
        .in = weight->shape[1],
        .out = weight->shape[0],
        .x = x,
        .x_stride = x_stride,
        .weight = weight->data,
        .dtype = weight->dtype,
        .scale = weight->scale,
        .bias = vector_of(bias),
        .y = y,
        .y_stride = weight->shape[0],
        .fast = pass->fast,
    };
}

mil_status
mil_project(const mil_pass *pass, const mil_norm *norm, const mil_linear *products, int64_t count,
            const mil_glu *gate, const mil_conv1d *conv)
{
    const mil_ops *ops = pass->context->ops;
    if (pass->lean && ops->project != NULL) {
        return ops->project(pass->context, norm, products, count, gate, conv);
    }
    MIL_TRY(ops->norm_forward(pass->context, norm));
    MIL_TRY(ops->linear_forward(pass->context, products, count));
    MIL_TRY(gate == NULL ? MIL_OK : ops->glu_forward(pass->context, gate));
    return conv == NULL ? MIL_OK : ops->conv1d_forward(pass->context, conv);
}

/* The output product of a mixer or MLP: y (+)= x W^T + bias into the residual stream. */
static mil_status
output_product(const mil_pass *pass, const mil_parameter *weight, const mil_parameter *bias, const void *x,
               void *y, bool accumulate)
{
    mil_linear out = product(pass, weight, bias, x, weight->shape[1], y);
    out.accumulate = accumulate;
    return pass->context->ops->linear_forward(pass->context, &out, 1);
}

/* Backward of product(): parameter gradients added, grad_x (NULL: not wanted) written or added to. */
static mil_status
product_backward(const mil_pass *pass, const mil_gradients *gradients, const mil_parameter *weight,
                 const mil_parameter *bias, const void *x, int64_t x_stride, const void *grad_y,
                 int64_t grad_y_stride, void *grad_x, int64_t grad_x_stride, bool accumulate)
{
    mil_linear_grad arguments = {
        .rows = pass->rows.rows,
        .in = weight->shape[1],
        .out = weight->shape[0],
        .x = x,
        .x_stride = x_stride,
        .weight = weight->data,
        .dtype = weight->dtype,
        .grad_y = grad_y,
        .grad_y_stride = grad_y_stride,
        .grad_x = grad_x,
        .grad_x_stride = grad_x_stride,
        .accumulate = accumulate,
        .grad_weight = gradient_of(pass, gradients, weight),
        .grad_bias = gradient_of(pass, gradients, bias),
    };
    return pass->context->ops->linear_backward(pass->context, &arguments);
}

mil_norm
mil_stream_norm(const mil_pass *pass, const mil_parameter *weight, int64_t rows, const void *x, void *y)
{
    int64_t hidden = pass->model->config.hidden;
    return (mil_norm){
        .rows = rows,
        .width = hidden,
        .group = hidden,
        .x = x,
        .x_stride = hidden,
        .weight = vector_of(weight),
        .eps = pass->model->config.norm_eps,
        .y = y,
        .y_stride = hidden,
    };
}

static mil_status
block_norm_backward(const mil_pass *pass, const mil_gradients *gradients, const mil_parameter *weight,
                    const void *x, const void *grad_u, void *grad_x, bool accumulate)
{
    int64_t hidden = pass->model->config.hidden;
    mil_norm_grad arguments = {
        .forward = mil_stream_norm(pass, weight, pass->rows.rows, x, NULL),
        .grad_y = grad_u,
        .grad_y_stride = hidden,
        .grad_x = grad_x,
        .grad_x_stride = hidden,
        .accumulate = accumulate,
        .grad_weight = gradient_of(pass, gradients, weight),
    };
    return pass->context->ops->norm_backward(pass->context, &arguments);
}

/* The mixers' (or caches') states of all sequences in one layer, or NULL. */
static mil_status
layer_mixer_states(const mil_pass *pass, int64_t layer, mil_mixer_state **out)
{
    *out = NULL;
    if (pass->states == NULL) {
        return MIL_OK;
    }
    MIL_TRY(MIL_PUSH(pass->context->host, pass->rows.sequences, mil_mixer_state, out));
    for (int64_t i = 0; i < pass->rows.sequences; i++) {
        (*out)[i] = pass->states[i]->layers[layer].mixer;
    }
    return MIL_OK;
}

static mil_status
layer_caches(const mil_pass *pass, int64_t layer, mil_kv_cache **out)
{
    *out = NULL;
    if (pass->states == NULL) {
        return MIL_OK;
    }
    MIL_TRY(MIL_PUSH(pass->context->host, pass->rows.sequences, mil_kv_cache, out));
    for (int64_t i = 0; i < pass->rows.sequences; i++) {
        (*out)[i] = pass->states[i]->layers[layer].kv;
    }
    return MIL_OK;
}

/* Sizes of Mamba-2's projected row [z | x B C | dt] and the offsets in it. */
typedef struct mamba2_row {
    int64_t conv, xbc, dt, width;
} mamba2_row;

static mamba2_row
mamba2_layout(const mil_layer_config *c)
{
    int64_t conv = mil_conv_channels(c);
    return (mamba2_row){
        .conv = conv, .xbc = c->inner, .dt = c->inner + conv, .width = c->inner + conv + c->heads};
}

/* ---- attention -------------------------------------------------------------------------------------- */

/* RMS norm of each head of q or k (Qwen 3), from raw to normed. */
static mil_norm
head_norm(const mil_pass *pass, const mil_parameter *weight, int64_t heads, int64_t head_dim, const void *raw,
          void *normed)
{
    return (mil_norm){
        .rows = pass->rows.rows,
        .width = heads * head_dim,
        .group = head_dim,
        .x = raw,
        .x_stride = heads * head_dim,
        .weight = vector_of(weight),
        .weight_per_group = true,
        .eps = pass->model->config.norm_eps,
        .y = normed,
        .y_stride = heads * head_dim,
    };
}

static mil_rope
rotation(const mil_pass *pass, const mil_layer_config *c, void *x, int64_t heads, bool inverse)
{
    return (mil_rope){
        .rows = pass->rows.rows,
        .heads = heads,
        .head_dim = c->head_dim,
        .rotary = c->rotary,
        .table = pass->rope_table,
        .inverse = inverse,
        .x = x,
        .x_stride = heads * c->head_dim,
    };
}

static mil_status
rotate(const mil_pass *pass, const mil_layer_config *c, void *x, int64_t heads, bool inverse)
{
    if (c->rotary == 0) {
        return MIL_OK;
    }
    mil_rope arguments = rotation(pass, c, x, heads, inverse);
    return pass->context->ops->rope(pass->context, &arguments);
}

/* q and k turned to their positions, k and v into the caches where there are any. */
static mil_status
rotate_and_append(const mil_pass *pass, const mil_layer_config *c, const mil_mixer_saved *saved,
                  const mil_kv_cache *caches)
{
    const mil_ops *ops = pass->context->ops;
    mil_kv_append append = {
        .rows = pass->rows,
        .kv_heads = c->kv_heads,
        .head_dim = c->head_dim,
        .k = saved->k,
        .v = saved->v,
        .kv_stride = c->kv_heads * c->head_dim,
        .caches = caches,
    };
    if (pass->lean && caches != NULL && c->rotary > 0 && ops->rope_append != NULL) {
        mil_rope q = rotation(pass, c, saved->q, c->heads, false);
        mil_rope k = rotation(pass, c, saved->k, c->kv_heads, false);
        return ops->rope_append(pass->context, &q, &k, &append);
    }
    MIL_TRY(rotate(pass, c, saved->q, c->heads, false));
    MIL_TRY(rotate(pass, c, saved->k, c->kv_heads, false));
    return caches == NULL ? MIL_OK : ops->kv_append(pass->context, &append);
}

static mil_attention
attention_arguments(const mil_pass *pass, const mil_layer_config *c, const mil_mixer_saved *saved,
                    const mil_kv_cache *caches)
{
    return (mil_attention){
        .rows = pass->rows,
        .heads = c->heads,
        .kv_heads = c->kv_heads,
        .head_dim = c->head_dim,
        .window = c->window,
        .scale = c->attention_scale,
        .q = saved->q,
        .q_stride = c->heads * c->head_dim,
        .k = saved->k,
        .v = saved->v,
        .kv_stride = c->kv_heads * c->head_dim,
        .caches = caches,
        .y = saved->features,
        .y_stride = c->heads * c->head_dim,
        .log_sum_exp = saved->log_sum_exp,
    };
}

static mil_status
attention_mixer_forward(mil_pass *pass, int64_t layer, mil_mixer_saved *saved)
{
    mil_context *context = pass->context;
    const mil_layer *l = &pass->model->layers[layer];
    const mil_layer_config *c = &l->config;
    int64_t rows = pass->rows.rows, hidden = pass->model->config.hidden;
    int64_t q_width = c->heads * c->head_dim, kv_width = c->kv_heads * c->head_dim;

    MIL_TRY(mil_act_push(context, rows, q_width, &saved->q));
    MIL_TRY(mil_act_push(context, rows, kv_width, &saved->k));
    MIL_TRY(mil_act_push(context, rows, kv_width, &saved->v));
    MIL_TRY(mil_act_push(context, rows, q_width, &saved->features));
    saved->q_raw = saved->q;
    saved->k_raw = saved->k;
    if (l->p[MIL_P_Q_NORM] != NULL) {
        MIL_TRY(mil_act_push(context, rows, q_width, &saved->q_raw));
    }
    if (l->p[MIL_P_K_NORM] != NULL) {
        MIL_TRY(mil_act_push(context, rows, kv_width, &saved->k_raw));
    }
    if (pass->states == NULL) {
        MIL_TRY(MIL_PUSH(context->scratch, rows * c->heads, float, &saved->log_sum_exp));
    }
    mil_linear qkv[3] = {
        product(pass, l->p[MIL_P_Q], l->p[MIL_P_Q_BIAS], saved->u, hidden, saved->q_raw),
        product(pass, l->p[MIL_P_K], l->p[MIL_P_K_BIAS], saved->u, hidden, saved->k_raw),
        product(pass, l->p[MIL_P_V], l->p[MIL_P_V_BIAS], saved->u, hidden, saved->v),
    };
    MIL_TRY(mil_project(pass, &saved->norm, qkv, 3, NULL, NULL));
    if (l->p[MIL_P_Q_NORM] != NULL) {
        mil_norm norm = head_norm(pass, l->p[MIL_P_Q_NORM], c->heads, c->head_dim, saved->q_raw, saved->q);
        MIL_TRY(context->ops->norm_forward(context, &norm));
    }
    if (l->p[MIL_P_K_NORM] != NULL) {
        mil_norm norm = head_norm(pass, l->p[MIL_P_K_NORM], c->kv_heads, c->head_dim, saved->k_raw, saved->k);
        MIL_TRY(context->ops->norm_forward(context, &norm));
    }
    mil_kv_cache *caches;
    MIL_TRY(layer_caches(pass, layer, &caches));
    MIL_TRY(rotate_and_append(pass, c, saved, caches));
    mil_attention attention = attention_arguments(pass, c, saved, caches);
    return context->ops->attention_forward(context, &attention);
}

static mil_status
head_norm_backward(const mil_pass *pass, const mil_gradients *gradients, const mil_parameter *weight,
                   int64_t heads, int64_t head_dim, const void *raw, void *grad)
{
    if (weight == NULL) {
        return MIL_OK;
    }
    mil_norm_grad arguments = {
        .forward = head_norm(pass, weight, heads, head_dim, raw, NULL),
        .grad_y = grad,
        .grad_y_stride = heads * head_dim,
        .grad_x = grad,
        .grad_x_stride = heads * head_dim,
        .grad_weight = gradient_of(pass, gradients, weight),
    };
    return pass->context->ops->norm_backward(pass->context, &arguments);
}

static mil_status
attention_mixer_backward(mil_pass *pass, int64_t layer, const mil_mixer_saved *saved,
                         const void *grad_features, void *grad_u, mil_gradients *gradients)
{
    mil_context *context = pass->context;
    const mil_layer *l = &pass->model->layers[layer];
    const mil_layer_config *c = &l->config;
    int64_t rows = pass->rows.rows, hidden = pass->model->config.hidden;
    int64_t q_width = c->heads * c->head_dim, kv_width = c->kv_heads * c->head_dim;

    void *grad_q, *grad_k, *grad_v;
    MIL_TRY(mil_act_push(context, rows, q_width, &grad_q));
    MIL_TRY(mil_act_push(context, rows, kv_width, &grad_k));
    MIL_TRY(mil_act_push(context, rows, kv_width, &grad_v));
    mil_attention_grad attention = {
        .forward = attention_arguments(pass, c, saved, NULL),
        .grad_y = grad_features,
        .grad_y_stride = q_width,
        .grad_q = grad_q,
        .grad_k = grad_k,
        .grad_v = grad_v,
        .grad_q_stride = q_width,
        .grad_kv_stride = kv_width,
    };
    MIL_TRY(context->ops->attention_backward(context, &attention));
    MIL_TRY(rotate(pass, c, grad_q, c->heads, true));
    MIL_TRY(rotate(pass, c, grad_k, c->kv_heads, true));
    MIL_TRY(
        head_norm_backward(pass, gradients, l->p[MIL_P_Q_NORM], c->heads, c->head_dim, saved->q_raw, grad_q));
    MIL_TRY(head_norm_backward(pass, gradients, l->p[MIL_P_K_NORM], c->kv_heads, c->head_dim, saved->k_raw,
                               grad_k));
    MIL_TRY(product_backward(pass, gradients, l->p[MIL_P_Q], l->p[MIL_P_Q_BIAS], saved->u, hidden, grad_q,
                             q_width, grad_u, hidden, false));
    MIL_TRY(product_backward(pass, gradients, l->p[MIL_P_K], l->p[MIL_P_K_BIAS], saved->u, hidden, grad_k,
                             kv_width, grad_u, hidden, true));
    return product_backward(pass, gradients, l->p[MIL_P_V], l->p[MIL_P_V_BIAS], saved->u, hidden, grad_v,
                            kv_width, grad_u, hidden, true);
}

/* ---- Mamba-2 ---------------------------------------------------------------------------------------- */

static mil_conv1d
mamba2_conv(const mil_pass *pass, const mil_layer *l, const mil_mixer_saved *saved,
            const mil_mixer_state *states)
{
    mamba2_row row = mamba2_layout(&l->config);
    return (mil_conv1d){
        .rows = pass->rows,
        .channels = row.conv,
        .width = l->config.conv_width,
        .repeat = 1,
        .repeat_group = 1,
        .x = mil_act_at(pass->context, saved->projected, row.xbc),
        .x_stride = row.width,
        .weight = l->p[MIL_P_CONV]->data,
        .bias = vector_of(l->p[MIL_P_CONV_BIAS]),
        .silu = true,
        .y = saved->conv,
        .y_stride = row.conv,
        .states = states,
    };
}

static mil_ssd
mamba2_ssd(const mil_pass *pass, const mil_layer *l, const mil_mixer_saved *saved,
           const mil_mixer_state *states)
{
    const mil_layer_config *c = &l->config;
    mamba2_row row = mamba2_layout(c);
    return (mil_ssd){
        .rows = pass->rows,
        .heads = c->heads,
        .head_dim = c->head_dim,
        .state_dim = c->state_dim,
        .x_heads = c->x_width / c->head_dim,
        .B_groups = c->B_groups,
        .C_groups = c->C_groups,
        .x = saved->conv,
        .x_stride = row.conv,
        .B = mil_act_at(pass->context, saved->conv, c->x_width),
        .B_stride = row.conv,
        .C = mil_act_at(pass->context, saved->conv, c->x_width + c->B_groups * c->state_dim),
        .C_stride = row.conv,
        .dt = mil_act_at(pass->context, saved->projected, row.dt),
        .dt_stride = row.width,
        .dt_bias = l->p[MIL_P_DT_BIAS]->data,
        .A_log = l->p[MIL_P_A_LOG]->data,
        .D = l->p[MIL_P_D]->data,
        .dt_min = c->dt_min,
        .dt_max = c->dt_max,
        .y = saved->scanned,
        .y_stride = c->inner,
        .states = states,
    };
}

static mil_norm
mamba2_norm(const mil_pass *pass, const mil_layer *l, const mil_mixer_saved *saved)
{
    const mil_layer_config *c = &l->config;
    return (mil_norm){
        .rows = pass->rows.rows,
        .width = c->inner,
        .group = c->norm_group,
        .x = saved->scanned,
        .x_stride = c->inner,
        .z = saved->projected,
        .z_stride = mamba2_layout(c).width,
        .norm_before_gate = c->norm_before_gate,
        .weight = vector_of(l->p[MIL_P_MIXER_NORM]),
        .eps = c->mixer_norm_eps,
        .y = saved->features,
        .y_stride = c->inner,
    };
}

/* Without a norm the gate alone: features = silu(z) * scanned. */
static mil_glu
mamba2_gate(const mil_pass *pass, const mil_layer *l, const mil_mixer_saved *saved)
{
    const mil_layer_config *c = &l->config;
    return (mil_glu){
        .rows = pass->rows.rows,
        .width = c->inner,
        .activation = MIL_SILU,
        .gate = saved->projected,
        .gate_stride = mamba2_layout(c).width,
        .up = saved->scanned,
        .up_stride = c->inner,
        .y = saved->features,
        .y_stride = c->inner,
    };
}

static mil_status
mamba2_mixer_forward(mil_pass *pass, int64_t layer, mil_mixer_saved *saved)
{
    mil_context *context = pass->context;
    const mil_layer *l = &pass->model->layers[layer];
    int64_t rows = pass->rows.rows;
    mamba2_row row = mamba2_layout(&l->config);

    MIL_TRY(mil_act_push(context, rows, row.width, &saved->projected));
    MIL_TRY(mil_act_push(context, rows, row.conv, &saved->conv));
    MIL_TRY(mil_act_push(context, rows, l->config.inner, &saved->scanned));
    MIL_TRY(mil_act_push(context, rows, l->config.inner, &saved->features));
    mil_mixer_state *states;
    MIL_TRY(layer_mixer_states(pass, layer, &states));

    mil_linear in = product(pass, l->p[MIL_P_IN], l->p[MIL_P_IN_BIAS], saved->u, pass->model->config.hidden,
                            saved->projected);
    mil_conv1d conv = mamba2_conv(pass, l, saved, states);
    MIL_TRY(mil_project(pass, &saved->norm, &in, 1, NULL, &conv));
    mil_ssd ssd = mamba2_ssd(pass, l, saved, states);
    MIL_TRY(context->ops->ssd_forward(context, &ssd));
    if (l->config.norm_group == 0) {
        mil_glu gate = mamba2_gate(pass, l, saved);
        return context->ops->glu_forward(context, &gate);
    }
    mil_norm norm = mamba2_norm(pass, l, saved);
    return context->ops->norm_forward(context, &norm);
}

static mil_status
mamba2_mixer_backward(mil_pass *pass, int64_t layer, const mil_mixer_saved *saved, const void *grad_features,
                      void *grad_u, mil_gradients *gradients)
{
    mil_context *context = pass->context;
    const mil_ops *ops = context->ops;
    const mil_layer *l = &pass->model->layers[layer];
    const mil_layer_config *c = &l->config;
    int64_t rows = pass->rows.rows;
    mamba2_row row = mamba2_layout(c);

    void *grad_projected, *grad_conv, *grad_scanned;
    MIL_TRY(mil_act_push(context, rows, row.width, &grad_projected));
    MIL_TRY(mil_act_push(context, rows, row.conv, &grad_conv));
    MIL_TRY(mil_act_push(context, rows, c->inner, &grad_scanned));
    if (c->norm_group == 0) {
        mil_glu_grad gate = {
            .forward = mamba2_gate(pass, l, saved),
            .grad_y = grad_features,
            .grad_y_stride = c->inner,
            .grad_gate = grad_projected,
            .grad_gate_stride = row.width,
            .grad_up = grad_scanned,
            .grad_up_stride = c->inner,
        };
        MIL_TRY(ops->glu_backward(context, &gate));
    }
    else {
        mil_norm_grad norm = {
            .forward = mamba2_norm(pass, l, saved),
            .grad_y = grad_features,
            .grad_y_stride = c->inner,
            .grad_x = grad_scanned,
            .grad_x_stride = c->inner,
            .grad_z = grad_projected,
            .grad_z_stride = row.width,
            .grad_weight = gradient_of(pass, gradients, l->p[MIL_P_MIXER_NORM]),
        };
        MIL_TRY(ops->norm_backward(context, &norm));
    }
    mil_ssd_grad ssd = {
        .forward = mamba2_ssd(pass, l, saved, NULL),
        .grad_y = grad_scanned,
        .grad_y_stride = c->inner,
        .grad_x = grad_conv,
        .grad_x_stride = row.conv,
        .grad_B = mil_act_at(context, grad_conv, c->x_width),
        .grad_B_stride = row.conv,
        .grad_C = mil_act_at(context, grad_conv, c->x_width + c->B_groups * c->state_dim),
        .grad_C_stride = row.conv,
        .grad_dt = mil_act_at(context, grad_projected, row.dt),
        .grad_dt_stride = row.width,
        .grad_dt_bias = gradient_of(pass, gradients, l->p[MIL_P_DT_BIAS]),
        .grad_A_log = gradient_of(pass, gradients, l->p[MIL_P_A_LOG]),
        .grad_D = gradient_of(pass, gradients, l->p[MIL_P_D]),
    };
    MIL_TRY(ops->ssd_backward(context, &ssd));
    mil_conv1d_grad conv = {
        .forward = mamba2_conv(pass, l, saved, NULL),
        .grad_y = grad_conv,
        .grad_y_stride = row.conv,
        .grad_x = mil_act_at(context, grad_projected, row.xbc),
        .grad_x_stride = row.width,
        .grad_weight = gradient_of(pass, gradients, l->p[MIL_P_CONV]),
        .grad_bias = gradient_of(pass, gradients, l->p[MIL_P_CONV_BIAS]),
    };
    MIL_TRY(ops->conv1d_backward(context, &conv));
    int64_t hidden = pass->model->config.hidden;
    return product_backward(pass, gradients, l->p[MIL_P_IN], l->p[MIL_P_IN_BIAS], saved->u, hidden,
                            grad_projected, row.width, grad_u, hidden, false);
}

/* ---- Mamba-1 ---------------------------------------------------------------------------------------- */

/* Where x, z, dt_low, B and C of a row lie: arrays of their own in hybrids, slices in the original Mamba. */
typedef struct mamba1_view {
    void *x, *z, *dt_low, *B, *C;
    int64_t x_stride, z_stride, dt_low_stride, B_stride, C_stride;
} mamba1_view;

static mamba1_view
mamba1_slices(const mil_context *context, const mil_layer_config *c, void *projected, void *x_projected)
{
    int64_t width = mil_x_proj_width(c);
    return (mamba1_view){
        .x = projected,
        .z = mil_act_at(context, projected, c->inner),
        .dt_low = x_projected,
        .B = mil_act_at(context, x_projected, c->dt_rank),
        .C = mil_act_at(context, x_projected, c->dt_rank + c->B_groups * c->state_dim),
        .x_stride = 2 * c->inner,
        .z_stride = 2 * c->inner,
        .dt_low_stride = width,
        .B_stride = width,
        .C_stride = width,
    };
}

static mamba1_view
mamba1_arrays(const mil_layer_config *c, void *x, void *B, void *C, void *z, void *dt_low)
{
    return (mamba1_view){
        .x = x,
        .z = z,
        .dt_low = dt_low,
        .B = B,
        .C = C,
        .x_stride = c->x_width,
        .z_stride = c->inner,
        .dt_low_stride = c->dt_rank,
        .B_stride = c->B_groups * c->state_dim,
        .C_stride = c->C_groups * c->state_dim,
    };
}

static mamba1_view
mamba1_saved_view(const mil_pass *pass, const mil_layer_config *c, const mil_mixer_saved *saved)
{
    if (c->x_proj) {
        return mamba1_slices(pass->context, c, saved->projected, saved->x_normed);
    }
    return mamba1_arrays(c, saved->x, saved->B, saved->C, saved->z, saved->dt_low);
}

static mil_conv1d
mamba1_conv(const mil_pass *pass, const mil_layer *l, const mil_mixer_saved *saved,
            const mil_mixer_state *states)
{
    const mil_layer_config *c = &l->config;
    mamba1_view view = mamba1_saved_view(pass, c, saved);
    int64_t channels = mil_conv_channels(c);
    return (mil_conv1d){
        .rows = pass->rows,
        .channels = channels,
        .width = c->conv_width,
        .repeat = channels / c->x_width,
        .repeat_group = channels == c->x_width ? 1 : c->state_dim,
        .x = view.x,
        .x_stride = view.x_stride,
        .weight = l->p[MIL_P_CONV]->data,
        .bias = vector_of(l->p[MIL_P_CONV_BIAS]),
        .silu = true,
        .y = saved->conv,
        .y_stride = channels,
        .states = states,
    };
}

static mil_scan
mamba1_scan(const mil_pass *pass, const mil_layer *l, const mil_mixer_saved *saved,
            const mil_mixer_state *states)
{
    const mil_layer_config *c = &l->config;
    mamba1_view view = mamba1_saved_view(pass, c, saved);
    int64_t channels = mil_conv_channels(c);
    return (mil_scan){
        .rows = pass->rows,
        .inner = c->inner,
        .state_dim = c->state_dim,
        .B_groups = c->B_groups,
        .C_groups = c->C_groups,
        .x_repeat = c->inner / channels,
        .x_repeat_group = c->inner == channels ? 1 : c->state_dim,
        .x = saved->conv,
        .x_stride = channels,
        .dt = saved->dt,
        .dt_stride = c->inner,
        .B = view.B,
        .B_stride = view.B_stride,
        .C = view.C,
        .C_stride = view.C_stride,
        .z = view.z,
        .z_stride = view.z_stride,
        .dt_bias = l->p[MIL_P_DT_BIAS]->data,
        .A_log = l->p[MIL_P_A_LOG]->data,
        .D = l->p[MIL_P_D]->data,
        .dt_bias_scale = c->dt_bias_scale,
        .dt_min = c->dt_min,
        .dt_max = c->dt_max,
        .y = saved->features,
        .y_stride = c->inner,
        .states = states,
    };
}

/* The RMS norms of dt_low, B and C (Falcon-Mamba without weights, Jamba with), as three column ranges. */
static void
bcdt_norms(const mil_pass *pass, const mil_layer *l, const mil_mixer_saved *saved, mil_norm norms[3])
{
    const mil_layer_config *c = &l->config;
    mamba1_view from = mamba1_slices(pass->context, c, saved->projected, saved->x_projected);
    mamba1_view to = mamba1_slices(pass->context, c, saved->projected, saved->x_normed);
    const void *sources[3] = {from.dt_low, from.B, from.C};
    void *targets[3] = {to.dt_low, to.B, to.C};
    int64_t widths[3] = {c->dt_rank, c->B_groups * c->state_dim, c->C_groups * c->state_dim};
    static const mil_parameter_id weights[3] = {MIL_P_DT_NORM, MIL_P_B_NORM, MIL_P_C_NORM};
    for (int i = 0; i < 3; i++) {
        norms[i] = (mil_norm){
            .rows = pass->rows.rows,
            .width = widths[i],
            .group = widths[i],
            .x = sources[i],
            .x_stride = from.B_stride,
            .weight = vector_of(l->p[weights[i]]),
            .eps = c->bcdt_eps,
            .y = targets[i],
            .y_stride = to.B_stride,
        };
    }
}

/* Original Mamba: [x | z] from u; [dt | B | C] follow from x, which is convolved. */
static mil_status
mamba1_project_from_x(mil_pass *pass, const mil_layer *l, mil_mixer_saved *saved,
                      const mil_mixer_state *states)
{
    mil_context *context = pass->context;
    const mil_layer_config *c = &l->config;
    int64_t rows = pass->rows.rows;
    MIL_TRY(mil_act_push(context, rows, 2 * c->inner, &saved->projected));
    MIL_TRY(mil_act_push(context, rows, mil_x_proj_width(c), &saved->x_projected));
    saved->x_normed = saved->x_projected;
    if (c->bcdt_norm) {
        MIL_TRY(mil_act_push(context, rows, mil_x_proj_width(c), &saved->x_normed));
    }
    mil_linear in = product(pass, l->p[MIL_P_IN], l->p[MIL_P_IN_BIAS], saved->u, pass->model->config.hidden,
                            saved->projected);
    mil_conv1d conv = mamba1_conv(pass, l, saved, states);
    return mil_project(pass, &saved->norm, &in, 1, NULL, &conv);
}

/* Hybrids: x, B, C, z and dt_low all from u. */
static mil_status
mamba1_project_from_u(mil_pass *pass, const mil_layer *l, mil_mixer_saved *saved)
{
    mil_context *context = pass->context;
    const mil_layer_config *c = &l->config;
    int64_t rows = pass->rows.rows, hidden = pass->model->config.hidden;
    MIL_TRY(mil_act_push(context, rows, c->x_width, &saved->x));
    MIL_TRY(mil_act_push(context, rows, c->B_groups * c->state_dim, &saved->B));
    MIL_TRY(mil_act_push(context, rows, c->C_groups * c->state_dim, &saved->C));
    MIL_TRY(mil_act_push(context, rows, c->inner, &saved->z));
    MIL_TRY(mil_act_push(context, rows, c->dt_rank, &saved->dt_low));
    mil_linear products[5] = {
        product(pass, l->p[MIL_P_X], NULL, saved->u, hidden, saved->x),
        product(pass, l->p[MIL_P_B], NULL, saved->u, hidden, saved->B),
        product(pass, l->p[MIL_P_C], NULL, saved->u, hidden, saved->C),
        product(pass, l->p[MIL_P_Z], NULL, saved->u, hidden, saved->z),
        product(pass, l->p[MIL_P_DT_DOWN], NULL, saved->u, hidden, saved->dt_low),
    };
    return mil_project(pass, &saved->norm, products, 5, NULL, NULL);
}

static mil_status
mamba1_mixer_forward(mil_pass *pass, int64_t layer, mil_mixer_saved *saved)
{
    mil_context *context = pass->context;
    const mil_layer *l = &pass->model->layers[layer];
    const mil_layer_config *c = &l->config;
    int64_t rows = pass->rows.rows;
    MIL_TRY(mil_act_push(context, rows, mil_conv_channels(c), &saved->conv));
    MIL_TRY(mil_act_push(context, rows, c->inner, &saved->dt));
    MIL_TRY(mil_act_push(context, rows, c->inner, &saved->features));
    mil_mixer_state *states;
    MIL_TRY(layer_mixer_states(pass, layer, &states));
    MIL_TRY(c->x_proj ? mamba1_project_from_x(pass, l, saved, states)
                      : mamba1_project_from_u(pass, l, saved));
    mamba1_view view = mamba1_saved_view(pass, c, saved);
    mil_scan_mixer mixer = {
        .dt = product(pass, l->p[MIL_P_DT], NULL, view.dt_low, view.dt_low_stride, saved->dt),
        .scan = mamba1_scan(pass, l, saved, states),
    };
    if (!c->x_proj) { /* shared inputs are convolved for each channel that reads them */
        mixer.conv = mamba1_conv(pass, l, saved, states);
    }
    else {
        mixer.x_proj = product(pass, l->p[MIL_P_X_PROJ], NULL, saved->conv, c->inner, saved->x_projected);
    }
    if (c->x_proj && c->bcdt_norm) {
        mixer.norm_count = 3;
        bcdt_norms(pass, l, saved, mixer.norms);
    }
    return pass->lean && context->ops->scan_mixer != NULL ? context->ops->scan_mixer(context, &mixer)
                                                          : mil_scan_mixer_apart(context, &mixer);
}

/* Backward of [dt | B | C] = norms(x_proj(x)): from grad (in place) into grad_conv, added. */
static mil_status
mamba1_x_proj_backward(const mil_pass *pass, const mil_layer *l, const mil_mixer_saved *saved, void *grad,
                       void *grad_conv, mil_gradients *gradients)
{
    const mil_layer_config *c = &l->config;
    int64_t width = mil_x_proj_width(c);
    if (c->bcdt_norm) {
        static const mil_parameter_id weights[3] = {MIL_P_DT_NORM, MIL_P_B_NORM, MIL_P_C_NORM};
        mil_norm norms[3];
        bcdt_norms(pass, l, saved, norms);
        mamba1_view slices = mamba1_slices(pass->context, c, saved->projected, grad);
        void *grads[3] = {slices.dt_low, slices.B, slices.C};
        for (int i = 0; i < 3; i++) {
            mil_norm_grad arguments = {
                .forward = norms[i],
                .grad_y = grads[i],
                .grad_y_stride = width,
                .grad_x = grads[i],
                .grad_x_stride = width,
                .grad_weight = gradient_of(pass, gradients, l->p[weights[i]]),
            };
            MIL_TRY(pass->context->ops->norm_backward(pass->context, &arguments));
        }
    }
    return product_backward(pass, gradients, l->p[MIL_P_X_PROJ], NULL, saved->conv, c->inner, grad, width,
                            grad_conv, c->inner, true);
}

static mil_status
mamba1_mixer_backward(mil_pass *pass, int64_t layer, const mil_mixer_saved *saved, const void *grad_features,
                      void *grad_u, mil_gradients *gradients)
{
    mil_context *context = pass->context;
    const mil_layer *l = &pass->model->layers[layer];
    const mil_layer_config *c = &l->config;
    int64_t rows = pass->rows.rows, hidden = pass->model->config.hidden, channels = mil_conv_channels(c);

    void *grad_conv, *grad_dt;
    MIL_TRY(mil_act_push(context, rows, channels, &grad_conv));
    MIL_TRY(mil_act_push(context, rows, c->inner, &grad_dt));
    mamba1_view grad;
    void *grad_projected = NULL, *grad_x_projected = NULL;
    if (c->x_proj) {
        MIL_TRY(mil_act_push(context, rows, 2 * c->inner, &grad_projected));
        MIL_TRY(mil_act_push(context, rows, mil_x_proj_width(c), &grad_x_projected));
        grad = mamba1_slices(context, c, grad_projected, grad_x_projected);
    }
    else {
        void *x, *B, *C, *z, *dt_low;
        MIL_TRY(mil_act_push(context, rows, c->x_width, &x));
        MIL_TRY(mil_act_push(context, rows, c->B_groups * c->state_dim, &B));
        MIL_TRY(mil_act_push(context, rows, c->C_groups * c->state_dim, &C));
        MIL_TRY(mil_act_push(context, rows, c->inner, &z));
        MIL_TRY(mil_act_push(context, rows, c->dt_rank, &dt_low));
        grad = mamba1_arrays(c, x, B, C, z, dt_low);
    }
    mil_scan_grad scan = {
        .forward = mamba1_scan(pass, l, saved, NULL),
        .grad_y = grad_features,
        .grad_y_stride = c->inner,
        .grad_x = grad_conv,
        .grad_x_stride = channels,
        .grad_dt = grad_dt,
        .grad_dt_stride = c->inner,
        .grad_B = grad.B,
        .grad_B_stride = grad.B_stride,
        .grad_C = grad.C,
        .grad_C_stride = grad.C_stride,
        .grad_z = grad.z,
        .grad_z_stride = grad.z_stride,
        .grad_dt_bias = gradient_of(pass, gradients, l->p[MIL_P_DT_BIAS]),
        .grad_A_log = gradient_of(pass, gradients, l->p[MIL_P_A_LOG]),
        .grad_D = gradient_of(pass, gradients, l->p[MIL_P_D]),
    };
    MIL_TRY(context->ops->scan_backward(context, &scan));
    mamba1_view view = mamba1_saved_view(pass, c, saved);
    MIL_TRY(product_backward(pass, gradients, l->p[MIL_P_DT], NULL, view.dt_low, view.dt_low_stride, grad_dt,
                             c->inner, grad.dt_low, grad.dt_low_stride, false));
    if (c->x_proj) {
        MIL_TRY(mamba1_x_proj_backward(pass, l, saved, grad_x_projected, grad_conv, gradients));
    }
    mil_conv1d_grad conv = {
        .forward = mamba1_conv(pass, l, saved, NULL),
        .grad_y = grad_conv,
        .grad_y_stride = channels,
        .grad_x = grad.x,
        .grad_x_stride = grad.x_stride,
        .grad_weight = gradient_of(pass, gradients, l->p[MIL_P_CONV]),
        .grad_bias = gradient_of(pass, gradients, l->p[MIL_P_CONV_BIAS]),
    };
    MIL_TRY(context->ops->conv1d_backward(context, &conv));
    if (c->x_proj) {
        return product_backward(pass, gradients, l->p[MIL_P_IN], l->p[MIL_P_IN_BIAS], saved->u, hidden,
                                grad_projected, 2 * c->inner, grad_u, hidden, false);
    }
    const mil_parameter_id ids[5] = {MIL_P_X, MIL_P_B, MIL_P_C, MIL_P_Z, MIL_P_DT_DOWN};
    const void *grads[5] = {grad.x, grad.B, grad.C, grad.z, grad.dt_low};
    for (int i = 0; i < 5; i++) {
        const mil_parameter *weight = l->p[ids[i]];
        MIL_TRY(product_backward(pass, gradients, weight, NULL, saved->u, hidden, grads[i], weight->shape[0],
                                 grad_u, hidden, i > 0));
    }
    return MIL_OK;
}

/* ---- any mixer ---------------------------------------------------------------------------------------- */

/* The product that ends a mixer. */
static void
output_parameters(const mil_layer *l, const mil_parameter **weight, const mil_parameter **bias)
{
    bool attention = l->config.mixer == MIL_ATTENTION;
    *weight = l->p[attention ? MIL_P_O : MIL_P_OUT];
    *bias = l->p[attention ? MIL_P_O_BIAS : MIL_P_OUT_BIAS];
}

mil_status
mil_mixer_forward(mil_pass *pass, int64_t layer, const void *x, void *y, bool accumulate,
                  mil_mixer_saved *saved)
{
    const mil_layer *l = &pass->model->layers[layer];
    *saved = (mil_mixer_saved){0};
    MIL_TRY(mil_act_push(pass->context, pass->rows.rows, pass->model->config.hidden, &saved->u));
    saved->norm = mil_stream_norm(pass, l->p[MIL_P_INPUT_NORM], pass->rows.rows, x, saved->u);
    switch (l->config.mixer) {
        case MIL_ATTENTION:
            MIL_TRY(attention_mixer_forward(pass, layer, saved));
            break;
        case MIL_MAMBA1:
            MIL_TRY(mamba1_mixer_forward(pass, layer, saved));
            break;
        case MIL_MAMBA2:
            MIL_TRY(mamba2_mixer_forward(pass, layer, saved));
            break;
    }
    const mil_parameter *weight, *bias;
    output_parameters(l, &weight, &bias);
    return output_product(pass, weight, bias, saved->features, y, accumulate);
}

mil_status
mil_mixer_backward(mil_pass *pass, int64_t layer, const void *x, const mil_mixer_saved *saved,
                   const void *grad_y, void *grad_x, bool accumulate, mil_gradients *gradients)
{
    mil_context *context = pass->context;
    const mil_layer *l = &pass->model->layers[layer];
    int64_t rows = pass->rows.rows, hidden = pass->model->config.hidden, features = mil_features(&l->config);
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);

    void *grad_u, *grad_features;
    MIL_TRY(mil_act_push(context, rows, hidden, &grad_u));
    MIL_TRY(mil_act_push(context, rows, features, &grad_features));
    const mil_parameter *weight, *bias;
    output_parameters(l, &weight, &bias);
    MIL_TRY(product_backward(pass, gradients, weight, bias, saved->features, features, grad_y, hidden,
                             grad_features, features, false));
    switch (l->config.mixer) {
        case MIL_ATTENTION:
            MIL_TRY(attention_mixer_backward(pass, layer, saved, grad_features, grad_u, gradients));
            break;
        case MIL_MAMBA1:
            MIL_TRY(mamba1_mixer_backward(pass, layer, saved, grad_features, grad_u, gradients));
            break;
        case MIL_MAMBA2:
            MIL_TRY(mamba2_mixer_backward(pass, layer, saved, grad_features, grad_u, gradients));
            break;
    }
    MIL_TRY(block_norm_backward(pass, gradients, l->p[MIL_P_INPUT_NORM], x, grad_u, grad_x, accumulate));
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}

/* ---- MLP ---------------------------------------------------------------------------------------------- */

static mil_glu
mlp_glu(const mil_pass *pass, const mil_layer_config *c, const mil_mlp_saved *saved)
{
    return (mil_glu){
        .rows = pass->rows.rows,
        .width = c->intermediate,
        .activation = c->activation,
        .gate = c->gated ? saved->gate : saved->up,
        .gate_stride = c->intermediate,
        .up = c->gated ? saved->up : NULL,
        .up_stride = c->intermediate,
        .y = saved->product,
        .y_stride = c->intermediate,
    };
}

mil_status
mil_mlp_forward(mil_pass *pass, int64_t layer, const void *x, void *y, bool accumulate, mil_mlp_saved *saved)
{
    mil_context *context = pass->context;
    const mil_layer *l = &pass->model->layers[layer];
    const mil_layer_config *c = &l->config;
    int64_t rows = pass->rows.rows, hidden = pass->model->config.hidden;
    *saved = (mil_mlp_saved){0};
    MIL_TRY(mil_act_push(context, rows, hidden, &saved->u));
    MIL_TRY(mil_act_push(context, rows, c->intermediate, &saved->up));
    MIL_TRY(mil_act_push(context, rows, c->intermediate, &saved->product));
    mil_norm norm = mil_stream_norm(pass, l->p[MIL_P_POST_NORM], rows, x, saved->u);
    mil_linear products[2] = {
        product(pass, l->p[MIL_P_UP], l->p[MIL_P_UP_BIAS], saved->u, hidden, saved->up)};
    if (c->gated) {
        MIL_TRY(mil_act_push(context, rows, c->intermediate, &saved->gate));
        products[1] = product(pass, l->p[MIL_P_GATE], l->p[MIL_P_GATE_BIAS], saved->u, hidden, saved->gate);
    }
    mil_glu glu = mlp_glu(pass, c, saved);
    MIL_TRY(mil_project(pass, &norm, products, c->gated ? 2 : 1, &glu, NULL));
    return output_product(pass, l->p[MIL_P_DOWN], l->p[MIL_P_DOWN_BIAS], saved->product, y, accumulate);
}

mil_status
mil_mlp_backward(mil_pass *pass, int64_t layer, const void *x, const mil_mlp_saved *saved, const void *grad_y,
                 void *grad_x, bool accumulate, mil_gradients *gradients)
{
    mil_context *context = pass->context;
    const mil_layer *l = &pass->model->layers[layer];
    const mil_layer_config *c = &l->config;
    int64_t rows = pass->rows.rows, hidden = pass->model->config.hidden, width = c->intermediate;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);

    void *grad_product, *grad_gate, *grad_up = NULL, *grad_u;
    MIL_TRY(mil_act_push(context, rows, width, &grad_product));
    MIL_TRY(mil_act_push(context, rows, hidden, &grad_u));
    grad_gate = grad_product; /* in place: the product's gradient is not read again */
    if (c->gated) {
        MIL_TRY(mil_act_push(context, rows, width, &grad_up));
    }
    MIL_TRY(product_backward(pass, gradients, l->p[MIL_P_DOWN], l->p[MIL_P_DOWN_BIAS], saved->product, width,
                             grad_y, hidden, grad_product, width, false));
    mil_glu_grad glu = {
        .forward = mlp_glu(pass, c, saved),
        .grad_y = grad_product,
        .grad_y_stride = width,
        .grad_gate = grad_gate,
        .grad_gate_stride = width,
        .grad_up = grad_up,
        .grad_up_stride = width,
    };
    MIL_TRY(context->ops->glu_backward(context, &glu));
    const void *grad_of_up = c->gated ? grad_up : grad_gate;
    MIL_TRY(product_backward(pass, gradients, l->p[MIL_P_UP], l->p[MIL_P_UP_BIAS], saved->u, hidden,
                             grad_of_up, width, grad_u, hidden, false));
    if (c->gated) {
        MIL_TRY(product_backward(pass, gradients, l->p[MIL_P_GATE], l->p[MIL_P_GATE_BIAS], saved->u, hidden,
                                 grad_gate, width, grad_u, hidden, true));
    }
    MIL_TRY(block_norm_backward(pass, gradients, l->p[MIL_P_POST_NORM], x, grad_u, grad_x, accumulate));
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}
