/* The forward pass: embedding, layers, final norm, output product, over packed rows of several sequences.
 *
 * All activations come from the context's arena; after each layer it is rewound to the residual stream, so
 * memory is one layer's activations whatever the depth.  Logits are computed only for the rows asked for, in
 * blocks of LOGIT_ROWS rows, so that a [rows, vocab] array exists only where the caller brings it.
 */
#include <math.h>
#include <string.h>

#include "model/block.h"

#define LOGIT_ROWS 64

mil_status
mil_check_tokens(const mil_model *model, const int32_t *tokens, int64_t sequences, const int64_t *offsets)
{
    if (sequences < 1 || offsets[0] != 0) {
        return mil_fail(MIL_ERR_VALUE, "forward: at least one sequence is needed, and offsets start at 0");
    }
    for (int64_t i = 0; i < sequences; i++) {
        if (offsets[i + 1] <= offsets[i]) {
            return mil_fail(MIL_ERR_VALUE, "forward: sequence %lld is empty (offsets %lld to %lld)",
                            (long long)i, (long long)offsets[i], (long long)offsets[i + 1]);
        }
        for (int64_t t = offsets[i]; t < offsets[i + 1]; t++) {
            if (tokens[t] < 0 || tokens[t] >= model->config.vocab) {
                return mil_fail(
                    MIL_ERR_VALUE,
                    "forward: token %d at position %lld of sequence %lld is outside the vocabulary of %lld",
                    tokens[t], (long long)(t - offsets[i]), (long long)i, (long long)model->config.vocab);
            }
        }
    }
    return MIL_OK;
}

/* ---- rotary positions --------------------------------------------------------------------------------- */

/* The frequencies for a sequence of `length` tokens, into out [rotary / 2] (see mil_rope_config). */
static void
rope_frequencies(const mil_rope_config *rope, int64_t length, float *out)
{
    int64_t half = rope->rotary / 2;
    bool beyond = length > rope->long_after;
    if (rope->dynamic_factor > 0 && beyond) {
        double stretch = (double)rope->dynamic_factor * (double)length / (double)rope->long_after -
                         ((double)rope->dynamic_factor - 1);
        double exponent = (double)rope->rotary / (double)(rope->rotary - 2);
        double base = (double)rope->theta * pow(stretch, exponent);
        for (int64_t i = 0; i < half; i++) {
            out[i] = (float)(1.0 / pow(base, (double)(2 * i) / (double)rope->rotary));
        }
        return;
    }
    const float *from = rope->long_inv_freq != NULL && beyond ? rope->long_inv_freq : rope->inv_freq;
    memcpy(out, from, (size_t)half * sizeof(float));
}

static mil_status
push_rope_table(mil_pass *pass)
{
    const mil_rope_config *rope = &pass->model->config.rope;
    mil_context *context = pass->context;
    pass->rope_table = NULL;
    if (rope->rotary == 0) {
        return MIL_OK;
    }
    int64_t half = rope->rotary / 2;
    float *table, *frequencies;
    MIL_TRY(MIL_PUSH(context->scratch, pass->rows.rows * half * 2, float, &table));
    MIL_TRY(MIL_PUSH(context->host, pass->rows.sequences * half, float, &frequencies));
    for (int64_t i = 0; i < pass->rows.sequences; i++) {
        int64_t past = pass->rows.past == NULL ? 0 : pass->rows.past[i];
        rope_frequencies(rope, past + pass->rows.offsets[i + 1] - pass->rows.offsets[i],
                         frequencies + i * half);
    }
    mil_rope_table arguments = {
        .rows = pass->rows,
        .rotary = rope->rotary,
        .inv_freq = frequencies,
        .inv_freq_stride = half,
        .scale = rope->scale,
        .table = table,
    };
    pass->rope_table = table;
    return context->ops->rope_table(context, &arguments);
}

/* The rows' numbers where the device's kernels can read them, unless they are there. */
static mil_status
upload_rows(mil_pass *pass)
{
    mil_rows *rows = &pass->rows;
    if (rows->device != NULL) {
        return MIL_OK;
    }
    int64_t *numbers, columns = rows->sequences + 1;
    MIL_TRY(MIL_PUSH(pass->context->host, 3 * columns, int64_t, &numbers));
    memset(numbers, 0, (size_t)(3 * columns) * sizeof *numbers);
    memcpy(numbers, rows->offsets, (size_t)columns * sizeof *numbers);
    if (rows->past != NULL) {
        memcpy(numbers + columns, rows->past, (size_t)rows->sequences * sizeof *numbers);
        memcpy(numbers + 2 * columns, rows->boundary, (size_t)rows->sequences * sizeof *numbers);
    }
    const void *device;
    MIL_TRY(
        pass->context->ops->upload(pass->context, numbers, (size_t)(3 * columns) * sizeof *numbers, &device));
    rows->device = device;
    return MIL_OK;
}

/* The embedding rows of `tokens` (on the device) into x [rows, hidden]. */
static mil_status
embed_uploaded(mil_pass *pass, const int32_t *tokens, void *x)
{
    const mil_model *model = pass->model;
    mil_embedding embedding = {
        .rows = pass->rows.rows,
        .hidden = model->config.hidden,
        .vocab = model->config.vocab,
        .tokens = tokens,
        .table = model->embedding->data,
        .dtype = model->embedding->dtype,
        .row_scale = model->embedding->scale,
        .scale = model->config.embedding_scale,
        .y = x,
        .y_stride = model->config.hidden,
    };
    MIL_TRY(pass->context->ops->embedding_forward(pass->context, &embedding));
    pass->rows.settled = true;
    return MIL_OK;
}

/* The same from host memory. */
mil_status
mil_embed(mil_pass *pass, const int32_t *tokens, void *x)
{
    const void *uploaded;
    MIL_TRY(pass->context->ops->upload(pass->context, tokens, (size_t)pass->rows.rows * sizeof *tokens,
                                       &uploaded));
    return embed_uploaded(pass, uploaded, x);
}

/* held: sequences whose boundary stays, or NULL; device_rows: mil_rows.device where the numbers are there already, or
 * NULL. */
static mil_status
begin_pass(mil_pass *pass, mil_context *context, const mil_model *model, int64_t sequences,
           const int64_t *offsets, mil_state *const *states, const bool *held, bool fast,
           const int64_t *device_rows)
{
    *pass = (mil_pass){
        .context = context,
        .model = model,
        .rows = {.rows = offsets[sequences],
                 .sequences = sequences,
                 .offsets = offsets,
                 .device = device_rows},
        .states = states,
        .fast = fast,
    };
    if (model->ops != context->ops) {
        return mil_fail(
            MIL_ERR_DEVICE, "forward: the model lives on %s:%d as %s, the call runs on %s:%d as %s",
            model->ops->name, model->ops->device, mil_dtype_name(model->ops->activation_dtype),
            context->ops->name, context->ops->device, mil_dtype_name(context->ops->activation_dtype));
    }
    if (states != NULL) {
        int64_t *past, *boundary;
        MIL_TRY(MIL_PUSH(context->host, sequences, int64_t, &past));
        MIL_TRY(MIL_PUSH(context->host, sequences, int64_t, &boundary));
        for (int64_t i = 0; i < sequences; i++) {
            if (states[i]->model != model) {
                return mil_fail(MIL_ERR_VALUE, "forward: state %lld belongs to another model", (long long)i);
            }
            MIL_TRY(mil_state_check(states[i]));
            past[i] = states[i]->length;
            boundary[i] = states[i]->boundary + (held != NULL && held[i] ? MIL_HOLD : 0);
            MIL_TRY(mil_state_reserve(states[i], past[i] + offsets[i + 1] - offsets[i]));
            for (int64_t j = 0; j < i; j++) {
                if (states[j] == states[i]) {
                    return mil_fail(MIL_ERR_VALUE,
                                    "forward: sequences %lld and %lld share one state; fork it with copy()",
                                    (long long)j, (long long)i);
                }
            }
        }
        pass->rows.past = past;
        pass->rows.boundary = boundary;
    }
    MIL_TRY(upload_rows(pass));
    return push_rope_table(pass);
}

mil_status
mil_pass_begin(mil_pass *pass, mil_context *context, const mil_model *model, int64_t sequences,
               const int64_t *offsets, mil_state *const *states, bool fast)
{
    return begin_pass(pass, context, model, sequences, offsets, states, NULL, fast, NULL);
}

/* ---- layers ------------------------------------------------------------------------------------------- */

/* Copies `from` [rows, width] to every capture of this kind and layer. */
static mil_status
capture(const mil_pass *pass, const mil_forward *arguments, mil_capture_kind kind, int64_t layer,
        const void *from, int64_t width)
{
    mil_context *context = pass->context;
    for (int64_t i = 0; i < arguments->capture_count; i++) {
        const mil_capture *wanted = &arguments->captures[i];
        if (wanted->kind == kind && (wanted->layer == layer || kind == MIL_CAPTURE_FINAL)) {
            mil_arena_mark mark = mil_arena_get_mark(context->scratch);
            float *wide;
            MIL_TRY(MIL_PUSH(context->scratch, pass->rows.rows * width, float, &wide));
            MIL_TRY(context->ops->widen(context, pass->rows.rows, width, context->ops->activation_dtype, from,
                                        width, 1.0f, wide));
            MIL_TRY(context->ops->copy(context, wanted->out, wide,
                                       (size_t)(pass->rows.rows * width) * sizeof *wide));
            mil_arena_rewind(context->scratch, mark);
        }
    }
    return MIL_OK;
}

static bool
is_captured(const mil_forward *arguments, mil_capture_kind kind, int64_t layer)
{
    for (int64_t i = 0; i < arguments->capture_count; i++) {
        if (arguments->captures[i].kind == kind &&
            (arguments->captures[i].layer == layer || kind == MIL_CAPTURE_FINAL)) {
            return true;
        }
    }
    return false;
}

/* x = x + mixer(norm(x)), by way of an array of its own where somebody wants the mixer's output alone. */
static mil_status
run_mixer(mil_pass *pass, const mil_forward *arguments, int64_t layer, void *x)
{
    mil_context *context = pass->context;
    int64_t rows = pass->rows.rows, hidden = pass->model->config.hidden;
    const mil_layer_config *c = &pass->model->layers[layer].config;
    mil_mixer_saved saved;
    MIL_TRY(capture(pass, arguments, MIL_CAPTURE_INPUT, layer, x, hidden));
    if (is_captured(arguments, MIL_CAPTURE_MIXER, layer)) {
        void *y;
        MIL_TRY(mil_act_push(context, rows, hidden, &y));
        MIL_TRY(mil_mixer_forward(pass, layer, x, y, false, &saved));
        MIL_TRY(capture(pass, arguments, MIL_CAPTURE_MIXER, layer, y, hidden));
        MIL_TRY(context->ops->add(context, rows, hidden, y, hidden, x, hidden));
    }
    else {
        MIL_TRY(mil_mixer_forward(pass, layer, x, x, true, &saved));
    }
    MIL_TRY(capture(pass, arguments, MIL_CAPTURE_NORMED, layer, saved.u, hidden));
    int64_t features = c->mixer == MIL_ATTENTION ? c->heads * c->head_dim : c->inner;
    return capture(pass, arguments, MIL_CAPTURE_FEATURES, layer, saved.features, features);
}

static mil_status
run_layers(mil_pass *pass, const mil_forward *arguments, void *x)
{
    mil_context *context = pass->context;
    for (int64_t layer = 0; layer < pass->model->config.layer_count; layer++) {
        mil_arena_mark mark = mil_arena_get_mark(context->scratch);
        mil_arena_mark host_mark = mil_arena_get_mark(context->host);
        MIL_TRY(run_mixer(pass, arguments, layer, x));
        mil_arena_rewind(context->scratch, mark);
        if (pass->model->layers[layer].config.intermediate > 0) {
            mil_mlp_saved saved;
            MIL_TRY(mil_mlp_forward(pass, layer, x, x, true, &saved));
            mil_arena_rewind(context->scratch, mark);
        }
        mil_arena_rewind(context->host, host_mark);
        MIL_TRY(capture(pass, arguments, MIL_CAPTURE_HIDDEN, layer, x, pass->model->config.hidden));
    }
    return MIL_OK;
}

/* Logits, on the device, of rows of the residual stream by way of `normed`, after the final norm. */
static mil_status
logits_of(const mil_pass *pass, const mil_norm *norm, float *logits, int64_t logits_stride)
{
    mil_context *context = pass->context;
    const mil_parameter *output = pass->model->output;
    int64_t count = norm->rows, hidden = pass->model->config.hidden, vocab = pass->model->config.vocab;
    float scale = pass->model->config.logit_scale;
    mil_linear product = {
        .rows = count,
        .in = hidden,
        .out = vocab,
        .x = norm->y,
        .x_stride = norm->y_stride,
        .weight = output->data,
        .dtype = output->dtype,
        .scale = output->scale,
        .y = logits,
        .y_stride = logits_stride,
        .fast = pass->fast,
        .float_output = true,
    };
    MIL_TRY(mil_project(pass, norm, &product, 1, NULL, NULL));
    if (scale == 1.0f) {
        return MIL_OK;
    }
    bool dense = logits_stride == vocab; /* scaling in place wants dense rows */
    for (int64_t i = 0; i < (dense ? 1 : count); i++) {
        float *at = logits + i * logits_stride;
        MIL_TRY(context->ops->widen(context, dense ? count : 1, vocab, MIL_F32, at, vocab, scale, at));
    }
    return MIL_OK;
}

/* Logits, on the device, of up to LOGIT_ROWS wanted rows of the residual stream x: *block is [count, vocab]. */
static mil_status
logits_block(const mil_pass *pass, const void *x, const int64_t *wanted, int64_t count, float **block)
{
    mil_context *context = pass->context;
    int64_t hidden = pass->model->config.hidden, vocab = pass->model->config.vocab;
    void *picked, *normed;
    const void *index;
    MIL_TRY(mil_act_push(context, count, hidden, &picked));
    MIL_TRY(mil_act_push(context, count, hidden, &normed));
    MIL_TRY(MIL_PUSH(context->scratch, count * vocab, float, block));
    MIL_TRY(context->ops->upload(context, wanted, (size_t)count * sizeof *wanted, &index));
    MIL_TRY(context->ops->gather_rows(context, count, hidden, index, x, hidden, picked, hidden));
    const mil_norm norm = mil_stream_norm(pass, pass->model->final_norm, count, picked, normed);
    return logits_of(pass, &norm, *block, vocab);
}

/* Logits to the caller. */
static mil_status
fetch_logits(const mil_pass *pass, const mil_forward *arguments, const void *x, int64_t first, int64_t count)
{
    mil_context *context = pass->context;
    int64_t vocab = pass->model->config.vocab;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    float *block;
    MIL_TRY(logits_block(pass, x, arguments->logit_rows + first, count, &block));
    MIL_TRY(context->ops->copy(context, arguments->logits + first * vocab, block,
                               (size_t)(count * vocab) * sizeof *block));
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}

/* Draws from logits to the caller. */
static mil_status
fetch_draws(const mil_pass *pass, const mil_draws *draws, const void *x, int64_t first, int64_t count)
{
    mil_context *context = pass->context;
    const mil_ops *ops = context->ops;
    int64_t vocab = pass->model->config.vocab;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    const void *options, *position;
    int32_t *token, *bad;
    float *block;
    size_t bytes = (size_t)count * sizeof *token;
    MIL_TRY(MIL_PUSH(context->scratch, count, int32_t, &token));
    MIL_TRY(MIL_PUSH(context->scratch, count, int32_t, &bad));
    MIL_TRY(logits_block(pass, x, draws->rows + first, count, &block));
    MIL_TRY(ops->upload(context, draws->options + first, (size_t)count * sizeof *draws->options, &options));
    MIL_TRY(
        ops->upload(context, draws->position + first, (size_t)count * sizeof *draws->position, &position));
    const mil_sample sample = {
        .rows = count,
        .vocab = vocab,
        .logits = block,
        .logits_stride = vocab,
        .options = options,
        .position = position,
        .stream = MIL_SAMPLE_TARGET,
        .token = token,
        .bad = bad,
    };
    MIL_TRY(ops->sample(context, &sample));
    MIL_TRY(ops->copy(context, draws->token + first, token, bytes));
    MIL_TRY(ops->copy(context, draws->bad + first, bad, bytes));
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}

static int64_t
rows_of_block(int64_t count, int64_t first)
{
    return count - first < LOGIT_ROWS ? count - first : LOGIT_ROWS;
}

/* Layer after layer moves its boundary; a failure in between leaves those at two places. */
static void
mark_torn(const mil_forward *arguments)
{
    for (int64_t i = 0; arguments->states != NULL && i < arguments->sequences; i++) {
        mil_state *state = arguments->states[i];
        int64_t count = arguments->offsets[i + 1] - arguments->offsets[i];
        bool held = arguments->held != NULL && arguments->held[i];
        state->torn =
            state->mixer_bytes > 0 && !held && mil_boundary_after(state->length, count) != state->boundary;
    }
}

static mil_status
run_model(mil_context *context, const mil_model *model, const mil_forward *arguments)
{
    int64_t rows = arguments->offsets[arguments->sequences], hidden = model->config.hidden;
    mil_pass pass;
    MIL_TRY(begin_pass(&pass, context, model, arguments->sequences, arguments->offsets, arguments->states,
                       arguments->held, arguments->fast, NULL));
    pass.lean = arguments->capture_count == 0;
    void *x;
    MIL_TRY(mil_act_push(context, rows, hidden, &x));
    MIL_TRY(mil_embed(&pass, arguments->tokens, x));
    mark_torn(arguments);
    MIL_TRY(run_layers(&pass, arguments, x));
    for (int64_t i = 0; i < arguments->logit_count; i += LOGIT_ROWS) {
        MIL_TRY(fetch_logits(&pass, arguments, x, i, rows_of_block(arguments->logit_count, i)));
    }
    for (int64_t i = 0; i < arguments->draws.count; i += LOGIT_ROWS) {
        MIL_TRY(fetch_draws(&pass, &arguments->draws, x, i, rows_of_block(arguments->draws.count, i)));
    }
    if (is_captured(arguments, MIL_CAPTURE_FINAL, 0)) {
        mil_norm norm = mil_stream_norm(&pass, model->final_norm, rows, x, x);
        MIL_TRY(context->ops->norm_forward(context, &norm));
        MIL_TRY(capture(&pass, arguments, MIL_CAPTURE_FINAL, 0, x, hidden));
    }
    return MIL_OK;
}

mil_status
mil_model_forward(mil_context *context, const mil_model *model, const mil_forward *arguments)
{
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_arena_mark host_mark = mil_arena_get_mark(context->host);
    mil_status status = run_model(context, model, arguments);
    mil_arena_rewind(context->scratch, mark);
    mil_arena_rewind(context->host, host_mark);
    if (status == MIL_OK && arguments->states != NULL) {
        for (int64_t i = 0; i < arguments->sequences; i++) {
            mil_state *state = arguments->states[i];
            int64_t count = arguments->offsets[i + 1] - arguments->offsets[i];
            if (arguments->held == NULL || !arguments->held[i]) {
                state->boundary = mil_boundary_after(state->length, count);
            }
            state->length += count;
            state->torn = false;
        }
    }
    return status;
}

/* ---- a step on the device --------------------------------------------------------------------------------- */

static mil_status
run_step(mil_context *context, const mil_model *model, const mil_step *step)
{
    int64_t *offsets, sequences = step->sequences, hidden = model->config.hidden;
    int64_t count = step->count > 0 ? step->count : 1, skipped = step->last_only ? count - 1 : 0;
    int64_t logit_rows = sequences * (count - skipped);
    int64_t logits_stride = step->logits_stride > 0 ? step->logits_stride : model->config.vocab;
    MIL_TRY(MIL_PUSH(context->host, sequences + 1, int64_t, &offsets));
    for (int64_t i = 0; i <= sequences; i++) {
        offsets[i] = i * count;
    }
    mil_pass pass;
    mil_forward plain = {.sequences = sequences};
    void *x, *normed;
    MIL_TRY(begin_pass(&pass, context, model, sequences, offsets, step->states, NULL, false, step->rows));
    pass.lean = true;
    MIL_TRY(mil_act_push(context, sequences * count, hidden, &x));
    MIL_TRY(mil_act_push(context, logit_rows, hidden, &normed));
    MIL_TRY(embed_uploaded(&pass, step->tokens, x));
    MIL_TRY(run_layers(&pass, &plain, x));
    mil_norm norm = mil_stream_norm(&pass, model->final_norm, logit_rows,
                                    mil_act_at(context, x, skipped * hidden), normed);
    norm.x_stride = (1 + skipped) * hidden;
    return logits_of(&pass, &norm, step->logits, logits_stride);
}

mil_status
mil_model_step(mil_context *context, const mil_model *model, const mil_step *step)
{
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_arena_mark host_mark = mil_arena_get_mark(context->host);
    mil_status status = run_step(context, model, step);
    mil_arena_rewind(context->scratch, mark);
    mil_arena_rewind(context->host, host_mark);
    return status;
}
