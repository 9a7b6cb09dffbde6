/* The training step (see trainer.h).
 *
 *   teacher forward (no states, activations of one layer at a time) -> its final hidden rows
 *   student forward, keeping what backward reads -> fused output product and loss -> gradient of the rows
 *   backward layer by layer, last first; the residual stream's gradient is one array added to in place
 *
 * Preference pairs take the loss twice: once for the log-probabilities, once for the gradient that they decide
 * (preference.c).
 *
 * With checkpointing only each layer's input is kept ([rows, hidden] a layer), and its forward runs once more in
 * backward: about a third more work for memory of one layer's activations instead of all.
 */
#include "distill/trainer.h"

#include <math.h>
#include <string.h>

/* Everything of one layer that backward reads. */
typedef struct layer_saved {
    void *input;  /* [rows, hidden] */
    void *middle; /* after the mixer */
    mil_mixer_saved mixer;
    mil_mlp_saved mlp;
} layer_saved;

/* ---- life ----------------------------------------------------------------------------------------------- */

static mil_status
zeros(int64_t count, float **out)
{
    *out = mil_alloc((size_t)count, sizeof(float));
    if (*out == NULL) {
        return mil_fail(MIL_ERR_MEMORY,
                        "trainer: out of memory for %lld more bytes of gradients, moments or masters",
                        (long long)count * 4);
    }
    memset(*out, 0, (size_t)count * sizeof(float));
    return MIL_OK;
}

static float
widen(const mil_parameter *p, int64_t i)
{
    const uint16_t *half = p->data;
    return p->dtype == MIL_BF16 ? mil_bf16_to_float(half[i]) : mil_f16_to_float(half[i]);
}

static mil_status
init_parameter(mil_trainer *trainer, int64_t index)
{
    const mil_parameter *p = &trainer->student->parameters[index];
    MIL_TRY(zeros(p->count, &trainer->gradients.of[index]));
    MIL_TRY(zeros(p->count, &trainer->m[index]));
    MIL_TRY(zeros(p->count, &trainer->v[index]));
    if (p->dtype == MIL_F32) {
        trainer->master[index] = p->data;
        return MIL_OK;
    }
    MIL_TRY(zeros(p->count, &trainer->master[index]));
    for (int64_t i = 0; i < p->count; i++) {
        trainer->master[index][i] = widen(p, i);
    }
    return MIL_OK;
}

mil_status
mil_trainer_init(mil_trainer *trainer, mil_model *student, const mil_model *teacher, const bool *trainable,
                 bool checkpointing)
{
    *trainer = (mil_trainer){.student = student, .teacher = teacher, .checkpointing = checkpointing};
    if (student->ops != &mil_cpu_ops || (teacher != NULL && teacher->ops != &mil_cpu_ops)) {
        return mil_fail(MIL_ERR_DEVICE,
                        "training runs on the CPU: load student and teacher with device=\"cpu\"");
    }
    size_t count = (size_t)student->parameter_count;
    float ***tables[4] = {&trainer->gradients.of, &trainer->m, &trainer->v, &trainer->master};
    mil_status status = MIL_OK;
    for (int i = 0; i < 4 && status == MIL_OK; i++) {
        *tables[i] = mil_alloc(count, sizeof(float *));
        if (*tables[i] == NULL) {
            status = mil_fail(MIL_ERR_MEMORY, "trainer: out of memory");
            break;
        }
        memset(*tables[i], 0, count * sizeof(float *));
    }
    for (size_t i = 0; i < count && status == MIL_OK; i++) {
        if (trainable[i] && student->parameters[i].data != NULL) {
            status = init_parameter(trainer, (int64_t)i);
        }
    }
    if (status != MIL_OK) {
        mil_trainer_release(trainer);
    }
    return status;
}

static void
release_table(float ***table, int64_t count)
{
    if (*table != NULL) {
        for (int64_t i = 0; i < count; i++) {
            mil_free((*table)[i]);
        }
    }
    mil_free(*table);
    *table = NULL;
}

void
mil_trainer_release(mil_trainer *trainer)
{
    if (trainer->student == NULL) {
        return;
    }
    int64_t count = trainer->student->parameter_count;
    for (int64_t i = 0; i < count && trainer->master != NULL; i++) {
        if (trainer->student->parameters[i].dtype == MIL_F32) {
            trainer->master[i] = NULL; /* the parameter itself: its owner's */
        }
    }
    release_table(&trainer->gradients.of, count);
    release_table(&trainer->m, count);
    release_table(&trainer->v, count);
    release_table(&trainer->master, count);
    *trainer = (mil_trainer){0};
}

/* ---- forward with saved activations ------------------------------------------------------------------------ */

static mil_status
copy_rows(const mil_pass *pass, void *to, const void *from)
{
    size_t bytes = (size_t)(pass->rows.rows * pass->model->config.hidden) *
                   mil_dtype_size(pass->context->ops->activation_dtype);
    return pass->context->ops->copy(pass->context, to, from, bytes);
}

/* output [rows, hidden] = the layer's output; saved gets what backward reads, in the arena. */
static mil_status
layer_forward(mil_pass *pass, int64_t layer, void *input, layer_saved *saved, void *output)
{
    int64_t rows = pass->rows.rows, hidden = pass->model->config.hidden;
    bool has_mlp = pass->model->layers[layer].config.intermediate > 0;
    saved->input = input;
    saved->middle = output;
    if (has_mlp) {
        MIL_TRY(mil_act_push(pass->context, rows, hidden, &saved->middle));
    }
    MIL_TRY(copy_rows(pass, saved->middle, input));
    MIL_TRY(mil_mixer_forward(pass, layer, input, saved->middle, true, &saved->mixer));
    if (!has_mlp) {
        return MIL_OK;
    }
    MIL_TRY(copy_rows(pass, output, saved->middle));
    return mil_mlp_forward(pass, layer, saved->middle, output, true, &saved->mlp);
}

/* ---- losses --------------------------------------------------------------------------------------------- */

/* What the teacher leaves for one micro-step. */
typedef struct teacher_rows {
    void *final;   /* [rows, teacher hidden] or NULL */
    void **hidden; /* [layers] each [rows, hidden], or NULL */
} teacher_rows;

static mil_status
run_teacher(mil_context *context, const mil_model *teacher, const mil_micro_step *step, bool want_hidden,
            teacher_rows *out)
{
    *out = (teacher_rows){0};
    if (teacher == NULL) {
        return MIL_OK;
    }
    int64_t rows = step->offsets[step->sequences], hidden = teacher->config.hidden,
            layers = teacher->config.layer_count;
    mil_capture *captures;
    MIL_TRY(MIL_PUSH(context->host, layers + 1, mil_capture, &captures));
    MIL_TRY(mil_act_push(context, rows, hidden, &out->final));
    captures[0] = (mil_capture){.kind = MIL_CAPTURE_FINAL, .out = out->final};
    if (want_hidden) {
        MIL_TRY(MIL_PUSH(context->host, layers, void *, &out->hidden));
        for (int64_t i = 0; i < layers; i++) {
            MIL_TRY(mil_act_push(context, rows, hidden, &out->hidden[i]));
            captures[i + 1] = (mil_capture){.kind = MIL_CAPTURE_HIDDEN, .layer = i, .out = out->hidden[i]};
        }
    }
    mil_forward forward = {
        .tokens = step->tokens,
        .sequences = step->sequences,
        .offsets = step->offsets,
        .captures = captures,
        .capture_count = want_hidden ? layers + 1 : 1,
        .fast = true,
    };
    return mil_model_forward(context, teacher, &forward);
}

static mil_status
output_loss(mil_context *context, const mil_model *student, const mil_model *teacher, mil_micro_step *step,
            const void *x, const teacher_rows *target, void *grad_x, float *grad_weight)
{
    mil_linear_loss loss = {
        .rows = step->offsets[step->sequences],
        .vocab = student->config.vocab,
        .hidden = student->config.hidden,
        .x = x,
        .x_stride = student->config.hidden,
        .weight = student->output->data,
        .dtype = student->output->dtype,
        .logit_scale = student->config.logit_scale,
        .labels = step->labels,
        .row_weight = step->row_weight,
        .kl_weight = step->kl_weight,
        .ce_weight = step->ce_weight,
        .temperature = step->temperature,
        .scale = step->scale,
        .direction = step->direction,
        .mix = step->mix,
        .top = step->top,
        .top_tokens = step->top_tokens,
        .top_logprobs = step->top_logprobs,
        .row_ce = step->row_ce,
        .grad_x = grad_x,
        .grad_x_stride = student->config.hidden,
        .grad_weight = grad_weight,
    };
    if (teacher != NULL) {
        loss.vocab = teacher->config.vocab < loss.vocab ? teacher->config.vocab : loss.vocab;
        loss.teacher_hidden = teacher->config.hidden;
        loss.teacher_x = target->final;
        loss.teacher_x_stride = teacher->config.hidden;
        loss.teacher_weight = teacher->output->data;
        loss.teacher_dtype = teacher->output->dtype;
        loss.teacher_logit_scale = teacher->config.logit_scale;
    }
    MIL_TRY(context->ops->linear_loss(context, &loss));
    step->kl = loss.sums.kl;
    step->ce = loss.sums.ce;
    step->teacher_ce = loss.sums.teacher_ce;
    step->kl_rows = loss.sums.kl_rows;
    step->ce_rows = loss.sums.ce_rows;
    step->agree = loss.sums.agree;
    step->correct = loss.sums.correct;
    return MIL_OK;
}

/* As output_loss, of preference pairs. A NULL grad_x evaluates only. */
static mil_status
pairs_loss(mil_context *context, const mil_model *student, mil_micro_step *step, const void *x, void *grad_x,
           float *grad_weight)
{
    int64_t rows = step->offsets[step->sequences];
    mil_arena_mark mark = mil_arena_get_mark(context->host);
    double *row_ce;
    float *row_factor;
    MIL_TRY(MIL_PUSH(context->host, rows, double, &row_ce));
    MIL_TRY(MIL_PUSH(context->host, rows, float, &row_factor));
    mil_micro_step read = *step;
    read.row_ce = row_ce;
    MIL_TRY(output_loss(context, student, NULL, &read, x, NULL, NULL, NULL));
    mil_preference_loss(step, row_ce, row_factor);
    if (grad_x != NULL) {
        mil_micro_step write = *step;
        write.row_weight = row_factor;
        write.ce_weight = 1;
        MIL_TRY(output_loss(context, student, NULL, &write, x, NULL, grad_x, grad_weight));
    }
    step->ce = read.ce;
    step->ce_rows = read.ce_rows;
    step->correct = read.correct;
    mil_arena_rewind(context->host, mark);
    return MIL_OK;
}

/* grad_x += gradient of weight * (relative squared error of x against target); value is added to *sum. */
static mil_status
match_rows(const mil_pass *pass, const void *x, const void *target, double weight, void *grad_x, double *sum)
{
    int64_t hidden = pass->model->config.hidden;
    mil_relative_mse arguments = {
        .rows = pass->rows.rows,
        .width = hidden,
        .x = x,
        .x_stride = hidden,
        .target = target,
        .target_stride = hidden,
        .weight = (float)weight,
        .grad_x = grad_x,
        .grad_x_stride = hidden,
    };
    MIL_TRY(pass->context->ops->relative_mse(pass->context, &arguments));
    *sum += arguments.value;
    return MIL_OK;
}

/* ---- end to end ----------------------------------------------------------------------------------------- */

/* The final norm and the loss: value into step, the residual stream's gradient into grad. */
static mil_status
head_backward(mil_pass *pass, mil_trainer *trainer, mil_micro_step *step, const void *x,
              const teacher_rows *target, void *grad)
{
    mil_context *context = pass->context;
    const mil_model *model = pass->model;
    int64_t rows = pass->rows.rows, hidden = model->config.hidden;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    void *u, *grad_u;
    MIL_TRY(mil_act_push(context, rows, hidden, &u));
    MIL_TRY(mil_act_push(context, rows, hidden, &grad_u));
    mil_norm norm = mil_stream_norm(pass, model->final_norm, rows, x, u);
    MIL_TRY(context->ops->norm_forward(context, &norm));
    float *grad_output = trainer->gradients.of[model->output - model->parameters];
    if (step->preference != NULL) {
        MIL_TRY(pairs_loss(context, model, step, u, grad_u, grad_output));
    }
    else {
        MIL_TRY(output_loss(context, model, trainer->teacher, step, u, target, grad_u, grad_output));
    }
    mil_norm_grad norm_grad = {
        .forward = norm,
        .grad_y = grad_u,
        .grad_y_stride = hidden,
        .grad_x = grad,
        .grad_x_stride = hidden,
        .grad_weight = trainer->gradients.of[model->final_norm - model->parameters],
    };
    MIL_TRY(context->ops->norm_backward(context, &norm_grad));
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}

static mil_status
layer_backward(mil_pass *pass, int64_t layer, layer_saved *saved, bool rerun, void *grad,
               mil_gradients *gradients)
{
    mil_context *context = pass->context;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    if (rerun) {
        void *output;
        MIL_TRY(mil_act_push(context, pass->rows.rows, pass->model->config.hidden, &output));
        MIL_TRY(layer_forward(pass, layer, saved->input, saved, output));
    }
    if (pass->model->layers[layer].config.intermediate > 0) {
        MIL_TRY(mil_mlp_backward(pass, layer, saved->middle, &saved->mlp, grad, grad, true, gradients));
    }
    MIL_TRY(mil_mixer_backward(pass, layer, saved->input, &saved->mixer, grad, grad, true, gradients));
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}

static mil_status
end_to_end(mil_context *context, mil_trainer *trainer, mil_micro_step *step)
{
    mil_model *model = trainer->student;
    int64_t layers = model->config.layer_count, rows = step->offsets[step->sequences],
            hidden = model->config.hidden;
    bool match_hidden = step->hidden_weight > 0;
    teacher_rows target;
    MIL_TRY(run_teacher(context, trainer->teacher, step, match_hidden, &target));

    mil_pass pass;
    MIL_TRY(mil_pass_begin(&pass, context, model, step->sequences, step->offsets, NULL, true));
    layer_saved *saved;
    void **stream; /* [layers + 1] the residual stream before each layer, and after the last */
    MIL_TRY(MIL_PUSH(context->host, layers, layer_saved, &saved));
    MIL_TRY(MIL_PUSH(context->host, layers + 1, void *, &stream));
    for (int64_t i = 0; i <= layers; i++) {
        MIL_TRY(mil_act_push(context, rows, hidden, &stream[i]));
    }
    MIL_TRY(mil_embed(&pass, step->tokens, stream[0]));
    for (int64_t i = 0; i < layers; i++) {
        mil_arena_mark mark = mil_arena_get_mark(context->scratch);
        MIL_TRY(layer_forward(&pass, i, stream[i], &saved[i], stream[i + 1]));
        if (trainer->checkpointing) {
            mil_arena_rewind(context->scratch, mark);
        }
    }
    void *grad;
    MIL_TRY(mil_act_push(context, rows, hidden, &grad));
    MIL_TRY(head_backward(&pass, trainer, step, stream[layers], &target, grad));
    for (int64_t i = layers - 1; i >= 0; i--) {
        if (match_hidden) {
            MIL_TRY(match_rows(&pass, stream[i + 1], target.hidden[i], step->hidden_weight / (double)layers,
                               grad, &step->hidden));
        }
        MIL_TRY(layer_backward(&pass, i, &saved[i], trainer->checkpointing, grad, &trainer->gradients));
    }
    step->hidden /= (double)layers;
    float *grad_table = trainer->gradients.of[model->embedding - model->parameters];
    if (grad_table == NULL) {
        return MIL_OK;
    }
    mil_embedding_grad embedding = {
        .rows = rows,
        .hidden = hidden,
        .vocab = model->config.vocab,
        .tokens = step->tokens,
        .scale = model->config.embedding_scale,
        .grad_y = grad,
        .grad_y_stride = hidden,
        .grad_table = grad_table,
    };
    return context->ops->embedding_backward(context, &embedding);
}

/* ---- layerwise alignment ---------------------------------------------------------------------------------- */

/* One mixer on the teacher's hidden states: value added to step->align, parameter gradients added. */
static mil_status
align_layer(mil_pass *pass, mil_trainer *trainer, mil_micro_step *step, int64_t layer, const void *input,
            const void *target, double weight)
{
    mil_context *context = pass->context;
    int64_t rows = pass->rows.rows, hidden = pass->model->config.hidden;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    void *y, *grad_y, *grad_x;
    mil_mixer_saved saved;
    MIL_TRY(mil_act_push(context, rows, hidden, &y));
    MIL_TRY(mil_act_push(context, rows, hidden, &grad_y));
    MIL_TRY(mil_act_push(context, rows, hidden, &grad_x));
    MIL_TRY(mil_mixer_forward(pass, layer, input, y, false, &saved));
    size_t bytes = (size_t)(rows * hidden) * mil_dtype_size(context->ops->activation_dtype);
    MIL_TRY(context->ops->zero(context, grad_y, bytes));
    MIL_TRY(match_rows(pass, y, target, weight, step->evaluate ? NULL : grad_y, &step->align));
    if (!step->evaluate) {
        MIL_TRY(mil_mixer_backward(pass, layer, input, &saved, grad_y, grad_x, false, &trainer->gradients));
    }
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}

static mil_status
align(mil_context *context, mil_trainer *trainer, mil_micro_step *step)
{
    const mil_model *student = trainer->student, *teacher = trainer->teacher;
    int64_t layers = student->config.layer_count, rows = step->offsets[step->sequences],
            hidden = student->config.hidden;
    mil_capture *captures;
    MIL_TRY(MIL_PUSH(context->host, 2 * layers, mil_capture, &captures));
    int64_t converted = 0;
    for (int64_t i = 0; i < layers; i++) {
        if (student->layers[i].config.mixer == teacher->layers[i].config.mixer) {
            continue;
        }
        mil_capture *pair = &captures[2 * converted];
        pair[0] = (mil_capture){.kind = MIL_CAPTURE_INPUT, .layer = i};
        pair[1] = (mil_capture){.kind = MIL_CAPTURE_MIXER, .layer = i};
        MIL_TRY(MIL_PUSH(context->scratch, rows * hidden, float, &pair[0].out));
        MIL_TRY(MIL_PUSH(context->scratch, rows * hidden, float, &pair[1].out));
        converted++;
    }
    if (converted == 0) {
        return mil_fail(
            MIL_ERR_VALUE,
            "trainer: no layer of the student differs from the teacher's; there is nothing to align");
    }
    mil_forward forward = {
        .tokens = step->tokens,
        .sequences = step->sequences,
        .offsets = step->offsets,
        .captures = captures,
        .capture_count = 2 * converted,
        .fast = true,
    };
    MIL_TRY(mil_model_forward(context, teacher, &forward));
    mil_pass pass;
    MIL_TRY(mil_pass_begin(&pass, context, student, step->sequences, step->offsets, NULL, true));
    double weight = step->align_weight / (double)converted;
    for (int64_t i = 0; i < converted; i++) {
        mil_capture *pair = &captures[2 * i];
        MIL_TRY(align_layer(&pass, trainer, step, pair[0].layer, pair[0].out, pair[1].out, weight));
    }
    step->align /= (double)converted;
    return MIL_OK;
}

/* ---- public ----------------------------------------------------------------------------------------------- */

static mil_status
check_pairs(const mil_model *teacher, const mil_micro_step *step)
{
    const mil_preference *p = step->preference;
    if (teacher != NULL || step->labels == NULL || step->sequences % 2 != 0 || step->top > 0) {
        return mil_fail(MIL_ERR_VALUE,
                        "trainer: preference pairs need labels, two sequences a pair, and no teacher");
    }
    if (!(p->beta > 0) || !(p->label_smoothing >= 0 && p->label_smoothing <= 0.5)) {
        return mil_fail(MIL_ERR_VALUE,
                        "trainer: beta = %g, label_smoothing = %g; expected above 0, and from 0 to 0.5",
                        p->beta, p->label_smoothing);
    }
    return MIL_OK;
}

static mil_status
check_step(const mil_model *student, const mil_model *teacher, const mil_micro_step *step)
{
    bool matches = step->hidden_weight > 0 || step->align_weight > 0;
    bool compares = matches || (step->kl_weight != 0 && step->top == 0);
    if (compares && teacher == NULL && !step->evaluate && step->preference == NULL) {
        return mil_fail(MIL_ERR_VALUE, "trainer: KL, hidden-state and alignment losses need a teacher");
    }
    if (step->top > 0 && teacher != NULL) {
        return mil_fail(MIL_ERR_VALUE,
                        "trainer: stored likeliest tokens stand in a teacher's place, give one of both");
    }
    if (step->preference != NULL) {
        MIL_TRY(check_pairs(teacher, step));
    }
    if (matches && (teacher->config.layer_count != student->config.layer_count ||
                    teacher->config.hidden != student->config.hidden)) {
        return mil_fail(MIL_ERR_SHAPE,
                        "trainer: matching hidden states needs the same layers and width; teacher %lld x "
                        "%lld, student %lld x %lld",
                        (long long)teacher->config.layer_count, (long long)teacher->config.hidden,
                        (long long)student->config.layer_count, (long long)student->config.hidden);
    }
    if (!(step->temperature > 0) || !isfinite(step->temperature)) {
        return mil_fail(MIL_ERR_VALUE, "trainer: temperature = %g is not above 0", (double)step->temperature);
    }
    MIL_TRY(mil_check_tokens(student, step->tokens, step->sequences, step->offsets));
    if (teacher != NULL) {
        MIL_TRY(mil_check_tokens(teacher, step->tokens, step->sequences, step->offsets));
    }
    int64_t vocab = student->config.vocab;
    if (teacher != NULL && teacher->config.vocab < vocab) {
        vocab = teacher->config.vocab;
    }
    for (int64_t i = 0; step->labels != NULL && i < step->offsets[step->sequences]; i++) {
        if (step->labels[i] >= vocab) {
            return mil_fail(MIL_ERR_VALUE, "trainer: label %d at row %lld is outside the vocabulary of %lld",
                            step->labels[i], (long long)i, (long long)vocab);
        }
    }
    return MIL_OK;
}

static void
clear_results(mil_micro_step *step)
{
    step->kl = step->ce = step->teacher_ce = step->kl_rows = step->ce_rows = 0;
    step->agree = step->correct = step->hidden = step->align = 0;
    mil_preference *p = step->preference;
    if (p != NULL) {
        p->loss = p->margin = p->chosen_reward = p->rejected_reward = 0;
        p->chosen_logprob = p->rejected_logprob = p->correct = 0;
    }
}

static mil_status
evaluate(mil_context *context, const mil_model *student, const mil_model *teacher, mil_micro_step *step)
{
    teacher_rows own, target;
    MIL_TRY(run_teacher(context, student, step, false, &own));
    if (step->preference != NULL) {
        return pairs_loss(context, student, step, own.final, NULL, NULL);
    }
    MIL_TRY(run_teacher(context, teacher, step, false, &target));
    return output_loss(context, student, teacher, step, own.final, &target, NULL, NULL);
}

mil_status
mil_evaluate(mil_context *context, const mil_model *student, const mil_model *teacher, mil_micro_step *step)
{
    step->evaluate = true;
    step->hidden_weight = step->align_weight = 0;
    clear_results(step);
    MIL_TRY(check_step(student, teacher, step));
    mil_arena_mark mark = mil_arena_get_mark(context->scratch), host_mark = mil_arena_get_mark(context->host);
    mil_status status = evaluate(context, student, teacher, step);
    mil_arena_rewind(context->scratch, mark);
    mil_arena_rewind(context->host, host_mark);
    return status;
}

mil_status
mil_trainer_backward(mil_context *context, mil_trainer *trainer, mil_micro_step *step)
{
    clear_results(step);
    MIL_TRY(check_step(trainer->student, trainer->teacher, step));
    mil_arena_mark mark = mil_arena_get_mark(context->scratch), host_mark = mil_arena_get_mark(context->host);
    mil_status status;
    if (step->align_weight > 0) {
        status = align(context, trainer, step);
    }
    else if (step->evaluate) {
        status = evaluate(context, trainer->student, trainer->teacher, step);
    }
    else {
        status = end_to_end(context, trainer, step);
    }
    mil_arena_rewind(context->scratch, mark);
    mil_arena_rewind(context->host, host_mark);
    return status;
}

static mil_status
gradient_norm(mil_context *context, const mil_trainer *trainer, double *norm)
{
    double sum = 0;
    for (int64_t i = 0; i < trainer->student->parameter_count; i++) {
        if (trainer->gradients.of[i] != NULL) {
            double part;
            MIL_TRY(context->ops->sum_squares(context, trainer->gradients.of[i],
                                              trainer->student->parameters[i].count, &part));
            sum += part;
        }
    }
    *norm = sqrt(sum);
    return MIL_OK;
}

static mil_status
clear_gradients(mil_context *context, mil_trainer *trainer)
{
    for (int64_t i = 0; i < trainer->student->parameter_count; i++) {
        if (trainer->gradients.of[i] != NULL) {
            size_t bytes = (size_t)trainer->student->parameters[i].count * sizeof(float);
            MIL_TRY(context->ops->zero(context, trainer->gradients.of[i], bytes));
        }
    }
    return MIL_OK;
}

/* Row counts of the unlike projections that one matrix stacks: their updates are made orthogonal apart. */
static int64_t
stacked_parts(const mil_model *model, const mil_parameter *p, int64_t parts[5])
{
    const mil_layer_config *c = &model->layers[p->layer].config;
    int64_t B = c->B_groups * c->state_dim, C = c->C_groups * c->state_dim;
    if (p->id == MIL_P_IN && c->mixer == MIL_MAMBA2) {
        memcpy(parts, (int64_t[5]){c->inner, c->x_width, B, C, c->heads}, 5 * sizeof *parts);
        return 5;
    }
    if (p->id == MIL_P_IN) {
        memcpy(parts, (int64_t[2]){c->inner, c->inner}, 2 * sizeof *parts);
        return 2;
    }
    if (p->id == MIL_P_X_PROJ) {
        memcpy(parts, (int64_t[3]){c->dt_rank, B, C}, 3 * sizeof *parts);
        return 3;
    }
    return 0;
}

static mil_status
apply_muon(mil_context *context, mil_trainer *trainer, const mil_optimizer_step *step, int64_t index,
           float grad_scale)
{
    const mil_parameter *p = &trainer->student->parameters[index];
    int64_t parts[5];
    mil_muon muon = {
        .rows = p->shape[0],
        .columns = p->shape[1],
        .parts = parts,
        .part_count = stacked_parts(trainer->student, p, parts),
        .master = trainer->master[index],
        .weight = p->data,
        .dtype = p->dtype,
        .grad = trainer->gradients.of[index],
        .m = trainer->m[index],
        .learning_rate = step->muon_rate,
        .momentum = step->muon_momentum,
        .weight_decay = step->weight_decay,
        .grad_scale = grad_scale,
    };
    return context->ops->muon(context, &muon);
}

static mil_status
apply_adamw(mil_context *context, mil_trainer *trainer, const mil_optimizer_step *step, int64_t index,
            float grad_scale)
{
    const mil_parameter *p = &trainer->student->parameters[index];
    mil_adamw adamw = {
        .count = p->count,
        .master = trainer->master[index],
        .weight = p->data,
        .dtype = p->dtype,
        .grad = trainer->gradients.of[index],
        .m = trainer->m[index],
        .v = trainer->v[index],
        .learning_rate = step->learning_rate * (p->matrix ? 1 : step->vector_rate),
        .beta1 = step->beta1,
        .beta2 = step->beta2,
        .eps = step->eps,
        .weight_decay = p->matrix ? step->weight_decay : 0,
        .grad_scale = grad_scale,
        .step = trainer->step,
    };
    return context->ops->adamw(context, &adamw);
}

mil_status
mil_trainer_apply(mil_context *context, mil_trainer *trainer, mil_optimizer_step *step)
{
    MIL_TRY(gradient_norm(context, trainer, &step->grad_norm));
    if (!isfinite(step->grad_norm)) {
        MIL_TRY(clear_gradients(context, trainer));
        return mil_fail(MIL_ERR_NONFINITE,
                        "trainer: the gradient is not finite at step %lld; the weights were left as they are",
                        (long long)trainer->step + 1);
    }
    bool clip = step->max_grad_norm > 0 && step->grad_norm > step->max_grad_norm;
    float grad_scale = clip ? (float)(step->max_grad_norm / step->grad_norm) : 1;
    trainer->step++;
    for (int64_t i = 0; i < trainer->student->parameter_count; i++) {
        const mil_parameter *p = &trainer->student->parameters[i];
        if (trainer->gradients.of[i] == NULL) {
            continue;
        }
        bool muon = step->muon_rate > 0 && p->matrix && p->layer >= 0;
        MIL_TRY((muon ? apply_muon : apply_adamw)(context, trainer, step, i, grad_scale));
    }
    return clear_gradients(context, trainer);
}
