/* Bindings of products, norms, MLP, embedding, loss, optimizer and the small operators.
 *
 * Each function fills the struct of device.h field by field under the fields' own names; docstrings with shapes
 * and formulas stand in mambainllama/ops.py.
 */
#include "python/ops.h"

/* ---- products ------------------------------------------------------------------------------------------ */

/* What a device's libraries ask of a product's arrays beyond what the CPU does. */
static void
check_device_product(core_call *call, const mil_linear *a)
{
    if (call->failed || call->place < 0) {
        return;
    }
    mil_dtype act = call->act == CORE_BF16 ? MIL_BF16 : call->act == CORE_F16 ? MIL_F16 : MIL_F32;
    if (a->dtype != act) {
        call_fail(call, MIL_ERR_DTYPE, "%s: weight has dtype %s and x %s; on a CUDA device they must agree",
                  call->operator, mil_dtype_name(a->dtype), mil_dtype_name(act));
    }
    const void *pointers[] = {a->x, a->weight, a->y};
    static const char *const names[] = {"x", "weight", "out"};
    for (int i = 0; i < 3; i++) {
        call_check_begin(call, pointers[i], names[i]);
    }
}

static PyObject *
linear_forward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_linear a = {0};
    call_begin(&call, module, "linear_forward", args, count, names);
    call_on_devices(&call);
    a.x = call_input(&call, "x", &a.x_stride, "rows in", &a.rows, &a.in);
    a.weight = call_weight(&call, "weight", "dtype", &a.dtype, "out in", &a.out, &a.in);
    a.bias = call_floats(&call, "bias", false, "out", &a.out);
    a.accumulate = call_bool(&call, "accumulate", false);
    a.fast = call_bool(&call, "fast", false);
    if (a.accumulate && !call_has(&call, "out")) {
        call_fail(&call, MIL_ERR_VALUE, "linear_forward: accumulate adds to out, which is missing");
    }
    a.y = call_output(&call, "y", &a.y_stride, "rows out", &a.rows, &a.out);
    check_device_product(&call, &a);
    if (call_ready(&call)) {
        CALL_RUN(&call, call.context.ops->linear_forward(&call.context, &a, 1));
    }
    return call_end(&call);
}

/* Several products of one x: the table's `count`. */
static PyObject *
linear_group(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    enum { MOST = CALL_MAX_RESULTS };
    static const char *const keys[MOST] = {"0", "1", "2",  "3",  "4",  "5",  "6",  "7",
                                           "8", "9", "10", "11", "12", "13", "14", "15"};
    core_call call;
    mil_linear products[MOST] = {0};
    mil_linear *first = &products[0];
    call_begin(&call, module, "linear_group", args, count, names);
    call_on_devices(&call);
    first->x = call_input(&call, "x", &first->x_stride, "rows in", &first->rows, &first->in);
    first->fast = call_bool(&call, "fast", false);
    int64_t weights = call_list_size(&call, "weights");
    if (weights < 1 || weights > MOST) {
        call_fail(&call, MIL_ERR_VALUE, "linear_group: weights has %lld entries; expected 1 to %d",
                  (long long)weights, MOST);
    }
    for (int64_t i = 0; i < weights && !call.failed; i++) {
        mil_linear *a = &products[i];
        *a = (mil_linear){.rows = first->rows,
                          .in = first->in,
                          .x = first->x,
                          .x_stride = first->x_stride,
                          .fast = first->fast};
        a->weight = call_list_weight(&call, "weights", i, "dtype", &a->dtype, "out in", &a->out, &a->in);
        a->y = call_output(&call, keys[i], &a->y_stride, "rows out", &a->rows, &a->out);
        check_device_product(&call, a);
    }
    if (call_ready(&call)) {
        CALL_RUN(&call, call.context.ops->linear_forward(&call.context, products, weights));
    }
    return call_end_dict(&call);
}

static PyObject *
linear_backward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_linear_grad a = {0};
    call_begin(&call, module, "linear_backward", args, count, names);
    a.x = call_input(&call, "x", &a.x_stride, "rows in", &a.rows, &a.in);
    a.weight = call_weight(&call, "weight", "dtype", &a.dtype, "out in", &a.out, &a.in);
    a.grad_y = call_input(&call, "grad_y", &a.grad_y_stride, "rows out", &a.rows, &a.out);
    a.accumulate = call_bool(&call, "accumulate", false);
    bool bias = call_bool(&call, "bias", false);
    a.grad_x = call_gradient(&call, "grad_x", true, true, &a.grad_x_stride, "rows in", &a.rows, &a.in);
    a.grad_weight = call_gradient(&call, "grad_weight", true, true, NULL, "out in", &a.out, &a.in);
    if (bias) {
        a.grad_bias = call_gradient(&call, "grad_bias", true, true, NULL, "out", &a.out);
    }
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.linear_backward(&call.context, &a));
    }
    return call_end_dict(&call);
}

/* ---- norms --------------------------------------------------------------------------------------------- */

static void
bind_norm(core_call *call, mil_norm *a)
{
    a->x = call_input(call, "x", &a->x_stride, "rows width", &a->rows, &a->width);
    a->z = call_optional(call, "z", &a->z_stride, "rows width", &a->rows, &a->width);
    a->norm_before_gate = call_bool(call, "norm_before_gate", false);
    a->group = call_int(call, "group", a->width);
    a->weight_per_group = call_bool(call, "weight_per_group", false);
    a->eps = (float)call_float(call, "eps", 1e-5);
    if (!call->failed && (a->group < 1 || a->width % a->group != 0)) {
        call_fail(call, MIL_ERR_SHAPE, "%s: group = %lld does not divide width = %lld",
                  call->operator,(long long) a->group, (long long)a->width);
    }
    a->weight = a->weight_per_group ? call_floats(call, "weight", false, "group", &a->group)
                                    : call_floats(call, "weight", false, "width", &a->width);
}

static PyObject *
norm_forward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_norm a = {0};
    call_begin(&call, module, "norm_forward", args, count, names);
    call_on_devices(&call);
    bind_norm(&call, &a);
    a.y = call_output(&call, "y", &a.y_stride, "rows width", &a.rows, &a.width);
    if (call_ready(&call)) {
        CALL_RUN(&call, call.context.ops->norm_forward(&call.context, &a));
    }
    return call_end(&call);
}

static PyObject *
norm_backward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_norm_grad a = {0};
    mil_norm *forward = &a.forward;
    call_begin(&call, module, "norm_backward", args, count, names);
    bind_norm(&call, forward);
    a.grad_y = call_input(&call, "grad_y", &a.grad_y_stride, "rows width", &forward->rows, &forward->width);
    a.accumulate = call_bool(&call, "accumulate", false);
    a.grad_x = call_gradient(&call, "grad_x", false, true, &a.grad_x_stride, "rows width", &forward->rows,
                             &forward->width);
    if (forward->z != NULL) {
        a.grad_z = call_gradient(&call, "grad_z", false, false, &a.grad_z_stride, "rows width",
                                 &forward->rows, &forward->width);
    }
    if (forward->weight != NULL) {
        int64_t *size = forward->weight_per_group ? &forward->group : &forward->width;
        a.grad_weight = call_gradient(&call, "grad_weight", true, true, NULL, "width", size);
    }
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.norm_backward(&call.context, &a));
    }
    return call_end_dict(&call);
}

/* ---- MLP and embedding --------------------------------------------------------------------------------- */

static const char *const activations[] = {
    [MIL_SILU] = "silu", [MIL_GELU] = "gelu",   [MIL_GELU_TANH] = "gelu_tanh",
    [MIL_RELU] = "relu", [MIL_RELU2] = "relu2", [MIL_RELU2 + 1] = NULL,
};

static void
bind_glu(core_call *call, mil_glu *a)
{
    a->gate = call_input(call, "gate", &a->gate_stride, "rows width", &a->rows, &a->width);
    a->up = call_optional(call, "up", &a->up_stride, "rows width", &a->rows, &a->width);
    a->activation = (mil_activation)call_choice(call, "activation", MIL_SILU, activations);
}

static PyObject *
glu_forward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_glu a = {0};
    call_begin(&call, module, "glu_forward", args, count, names);
    call_on_devices(&call);
    bind_glu(&call, &a);
    a.y = call_output(&call, "y", &a.y_stride, "rows width", &a.rows, &a.width);
    if (call_ready(&call)) {
        CALL_RUN(&call, call.context.ops->glu_forward(&call.context, &a));
    }
    return call_end(&call);
}

static PyObject *
glu_backward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_glu_grad a = {0};
    mil_glu *forward = &a.forward;
    call_begin(&call, module, "glu_backward", args, count, names);
    bind_glu(&call, forward);
    a.grad_y = call_input(&call, "grad_y", &a.grad_y_stride, "rows width", &forward->rows, &forward->width);
    a.grad_gate = call_gradient(&call, "grad_gate", false, false, &a.grad_gate_stride, "rows width",
                                &forward->rows, &forward->width);
    if (forward->up != NULL) {
        a.grad_up = call_gradient(&call, "grad_up", false, false, &a.grad_up_stride, "rows width",
                                  &forward->rows, &forward->width);
    }
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.glu_backward(&call.context, &a));
    }
    return call_end_dict(&call);
}

/* Operators trust their tokens, so each is looked at here. */
static void
check_tokens(core_call *call, const char *name, const int32_t *tokens, int64_t rows, int64_t vocab,
             bool negative_allowed)
{
    for (int64_t i = 0; i < rows && tokens != NULL && !call->failed; i++) {
        if (tokens[i] >= vocab || (tokens[i] < 0 && !negative_allowed)) {
            call_fail(call, MIL_ERR_VALUE, "%s: %s[%lld] = %d; expected %sless than vocab = %lld",
                      call->operator, name, (long long)i, (int)tokens[i],
                      negative_allowed ? "" : "at least 0 and ", (long long)vocab);
        }
    }
}

static PyObject *
embedding_forward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_embedding a = {0};
    call_begin(&call, module, "embedding_forward", args, count, names);
    call_on_devices(&call);
    a.tokens = call_int32(&call, "tokens", true, "rows", &a.rows);
    a.table = call_weight(&call, "table", "dtype", &a.dtype, "vocab hidden", &a.vocab, &a.hidden);
    a.scale = (float)call_float(&call, "scale", 1.0);
    check_tokens(&call, "tokens", a.tokens, a.rows, a.vocab, false);
    if (call.place >= 0 && !call_has(&call, "out")) { /* nothing else says what the rows are to be */
        call.act = a.dtype == MIL_BF16 ? CORE_BF16 : a.dtype == MIL_F16 ? CORE_F16 : CORE_F32;
    }
    a.y = call_output(&call, "y", &a.y_stride, "rows hidden", &a.rows, &a.hidden);
    if (call_ready(&call)) {
        a.tokens = call_upload(&call, a.tokens, (size_t)a.rows * sizeof *a.tokens);
        CALL_RUN(&call, call.context.ops->embedding_forward(&call.context, &a));
    }
    return call_end(&call);
}

static PyObject *
embedding_backward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_embedding_grad a = {0};
    call_begin(&call, module, "embedding_backward", args, count, names);
    a.tokens = call_int32(&call, "tokens", true, "rows", &a.rows);
    a.grad_y = call_input(&call, "grad_y", &a.grad_y_stride, "rows hidden", &a.rows, &a.hidden);
    a.vocab = call_int(&call, "vocab", 0);
    a.scale = (float)call_float(&call, "scale", 1.0);
    if (!call.failed && a.vocab < 1) {
        call_fail(&call, MIL_ERR_VALUE, "embedding_backward: vocab = %lld; expected at least 1",
                  (long long)a.vocab);
    }
    check_tokens(&call, "tokens", a.tokens, a.rows, a.vocab, false);
    a.grad_table = call_gradient(&call, "grad_table", false, true, NULL, "vocab hidden", &a.vocab, &a.hidden);
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.embedding_backward(&call.context, &a));
    }
    return call_end_dict(&call);
}

/* ---- losses -------------------------------------------------------------------------------------------- */

/* Stored likeliest tokens in a teacher's place, if given. */
static void
bind_top(core_call *call, mil_linear_loss *a)
{
    int64_t entries = 0;
    if (call_has(call, "top_tokens") != call_has(call, "top_logprobs")) {
        call_fail(call, MIL_ERR_VALUE, "linear_loss: top_tokens and top_logprobs belong together: give both");
    }
    a->top_tokens = call_int32(call, "top_tokens", false, "rows top", &a->rows, &a->top);
    a->top_logprobs = call_optional(call, "top_logprobs", NULL, "rows entries", &a->rows, &entries);
    if (!call->failed && a->top_logprobs != NULL && entries != a->top + 1) {
        call_fail(call, MIL_ERR_SHAPE,
                  "linear_loss: top_logprobs has %lld columns; expected %lld: the tokens and all others",
                  (long long)entries, (long long)a->top + 1);
    }
}

/* Returns the rows of weight, padding beyond the vocabulary included. */
static int64_t
bind_loss(core_call *call, mil_linear_loss *a)
{
    static const char *const directions[] = {"forward", "reverse", "jsd", NULL};
    int64_t stored = 0, teacher_stored = 0;
    a->x = call_input(call, "x", &a->x_stride, "rows hidden", &a->rows, &a->hidden);
    a->weight = call_weight(call, "weight", "dtype", &a->dtype, "vocab hidden", &stored, &a->hidden);
    a->vocab = call_int(call, "vocab", stored);
    a->logit_scale = (float)call_float(call, "logit_scale", 1.0);
    if (call_has(call, "teacher_x")) {
        a->teacher_x = call_input(call, "teacher_x", &a->teacher_x_stride, "rows teacher_hidden", &a->rows,
                                  &a->teacher_hidden);
        a->teacher_weight = call_weight(call, "teacher_weight", "teacher_dtype", &a->teacher_dtype,
                                        "vocab teacher_hidden", &teacher_stored, &a->teacher_hidden);
    }
    else if (call_has(call, "teacher_weight")) {
        call_fail(call, MIL_ERR_VALUE, "linear_loss: teacher_weight is given but teacher_x is missing");
    }
    bool teacher_fits = a->teacher_x == NULL || a->vocab <= teacher_stored;
    if (!call->failed && (a->vocab < 1 || a->vocab > stored || !teacher_fits)) {
        call_fail(call, MIL_ERR_SHAPE, "linear_loss: vocab = %lld; expected 1 to %lld, the rows of %s",
                  (long long)a->vocab, (long long)(teacher_fits ? stored : teacher_stored),
                  teacher_fits ? "weight" : "teacher_weight");
    }
    call_object(call, "teacher_dtype");
    a->teacher_logit_scale = (float)call_float(call, "teacher_logit_scale", 1.0);
    a->labels = call_int32(call, "labels", false, "rows", &a->rows);
    check_tokens(call, "labels", a->labels, a->rows, a->vocab, true);
    a->row_weight = call_optional(call, "row_weight", NULL, "rows", &a->rows);
    bind_top(call, a);
    bool compares = a->teacher_x != NULL || a->top > 0;
    a->kl_weight = (float)call_float(call, "kl_weight", compares ? 1.0 : 0.0);
    a->ce_weight = (float)call_float(call, "ce_weight", 0.0);
    a->temperature = (float)call_float(call, "temperature", 1.0);
    a->scale = (float)call_float(call, "scale", 1.0);
    a->direction = (mil_kl_direction)call_choice(call, "direction", MIL_KL_FORWARD, directions);
    a->mix = (float)call_float(call, "mix", 0.5);
    if (!call->failed && !(a->temperature > 0.0f)) {
        call_fail(call, MIL_ERR_VALUE, "linear_loss: temperature = %d; expected more than 0",
                  (int)a->temperature);
    }
    if (!call->failed && a->kl_weight != 0.0f && !compares) {
        call_fail(call, MIL_ERR_VALUE, "linear_loss: kl_weight is not 0, but teacher_x is missing");
    }
    return stored;
}

static PyObject *
linear_loss(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_linear_loss a = {0};
    call_begin(&call, module, "linear_loss", args, count, names);
    int64_t stored = bind_loss(&call, &a);
    if (call_bool(&call, "gradients", true)) {
        a.grad_x =
            call_gradient(&call, "grad_x", true, false, &a.grad_x_stride, "rows hidden", &a.rows, &a.hidden);
        a.grad_weight =
            call_gradient(&call, "grad_weight", true, true, NULL, "vocab hidden", &stored, &a.hidden);
    }
    else {
        call_object(&call, "out");
    }
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.linear_loss(&call.context, &a));
    }
    call_number(&call, "kl", a.sums.kl);
    call_number(&call, "ce", a.sums.ce);
    call_number(&call, "teacher_ce", a.sums.teacher_ce);
    call_number(&call, "kl_rows", a.sums.kl_rows);
    call_number(&call, "ce_rows", a.sums.ce_rows);
    call_number(&call, "agree", a.sums.agree);
    call_number(&call, "correct", a.sums.correct);
    return call_end_dict(&call);
}

static PyObject *
relative_mse(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_relative_mse a = {0};
    call_begin(&call, module, "relative_mse", args, count, names);
    a.x = call_input(&call, "x", &a.x_stride, "rows width", &a.rows, &a.width);
    a.target = call_input(&call, "target", &a.target_stride, "rows width", &a.rows, &a.width);
    a.weight = (float)call_float(&call, "weight", 1.0);
    a.grad_x = call_gradient(&call, "grad_x", true, true, &a.grad_x_stride, "rows width", &a.rows, &a.width);
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.relative_mse(&call.context, &a));
    }
    call_number(&call, "value", a.value);
    return call_end_dict(&call);
}

/* ---- optimizer ----------------------------------------------------------------------------------------- */

static PyObject *
adamw(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_adamw a = {0};
    call_begin(&call, module, "adamw", args, count, names);
    a.master = call_flat_inout(&call, "master", &a.count);
    a.grad = call_flat(&call, "grad", &a.count);
    a.m = call_flat_inout(&call, "m", &a.count);
    a.v = call_flat_inout(&call, "v", &a.count);
    a.weight = a.master;
    a.dtype = MIL_F32;
    if (call_has(&call, "weight")) {
        a.weight = call_flat_weight(&call, "weight", "dtype", &a.dtype, &a.count);
        if (!call.failed && a.dtype == MIL_F32 && a.weight != (void *)a.master) {
            call_fail(&call, MIL_ERR_VALUE,
                      "adamw: a float32 weight is its own master: pass the same array twice");
        }
    }
    call_object(&call, "dtype");
    a.learning_rate = (float)call_float(&call, "learning_rate", 1e-3);
    a.beta1 = (float)call_float(&call, "beta1", 0.9);
    a.beta2 = (float)call_float(&call, "beta2", 0.95);
    a.eps = (float)call_float(&call, "eps", 1e-8);
    a.weight_decay = (float)call_float(&call, "weight_decay", 0.0);
    a.grad_scale = (float)call_float(&call, "grad_scale", 1.0);
    a.step = call_int(&call, "step", 1);
    if (!call.failed && a.step < 1) {
        call_fail(&call, MIL_ERR_VALUE, "adamw: step = %lld; expected at least 1", (long long)a.step);
    }
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.adamw(&call.context, &a));
    }
    return call_end(&call);
}

static PyObject *
muon(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_muon a = {0};
    int64_t elements = 0;
    call_begin(&call, module, "muon", args, count, names);
    a.grad = call_input(&call, "grad", NULL, "rows columns", &a.rows, &a.columns);
    elements = a.rows * a.columns;
    a.master = call_flat_inout(&call, "master", &elements);
    a.m = call_flat_inout(&call, "m", &elements);
    a.weight = a.master;
    a.dtype = MIL_F32;
    if (call_has(&call, "weight")) {
        a.weight = call_flat_weight(&call, "weight", "dtype", &a.dtype, &elements);
    }
    call_object(&call, "dtype");
    a.parts = call_int64(&call, "parts", false, "parts", &a.part_count);
    a.learning_rate = (float)call_float(&call, "learning_rate", 1e-2);
    a.momentum = (float)call_float(&call, "momentum", 0.95);
    a.weight_decay = (float)call_float(&call, "weight_decay", 0.0);
    a.grad_scale = (float)call_float(&call, "grad_scale", 1.0);
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.muon(&call.context, &a));
    }
    return call_end(&call);
}

static PyObject *
sum_squares(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    int64_t elements = 0;
    double sum = 0.0;
    call_begin(&call, module, "sum_squares", args, count, names);
    const float *x = call_flat(&call, "x", &elements);
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.sum_squares(&call.context, x, elements, &sum));
    }
    call_number(&call, "sum", sum);
    return call_end(&call);
}

/* ---- small --------------------------------------------------------------------------------------------- */

static PyObject *
add(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    int64_t rows = 0, width = 0, x_stride = 0, y_stride = 0, out_stride = 0;
    call_begin(&call, module, "add", args, count, names);
    call_on_devices(&call);
    const void *x = call_input(&call, "x", &x_stride, "rows width", &rows, &width);
    const void *y = call_input(&call, "y", &y_stride, "rows width", &rows, &width);
    void *out = call_output(&call, "sum", &out_stride, "rows width", &rows, &width);
    if (call_ready(&call)) {
        call_copy_rows(&call, rows, width, y, y_stride, out, out_stride);
        CALL_RUN(&call, call.context.ops->add(&call.context, rows, width, x, x_stride, out, out_stride));
    }
    return call_end(&call);
}

static PyObject *
gather_rows(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    int64_t rows = 0, width = 0, picked = 0, x_stride = 0, y_stride = 0;
    call_begin(&call, module, "gather_rows", args, count, names);
    call_on_devices(&call);
    const void *x = call_input(&call, "x", &x_stride, "rows width", &rows, &width);
    const int64_t *index = call_int64(&call, "index", true, "count", &picked);
    for (int64_t i = 0; i < picked && !call.failed; i++) {
        if (index[i] < 0 || index[i] >= rows) {
            call_fail(&call, MIL_ERR_VALUE, "gather_rows: index[%lld] = %lld; x has %lld rows", (long long)i,
                      (long long)index[i], (long long)rows);
        }
    }
    void *y = call_output(&call, "y", &y_stride, "count width", &picked, &width);
    if (call_ready(&call)) {
        index = call_upload(&call, index, (size_t)picked * sizeof *index);
        CALL_RUN(&call, call.context.ops->gather_rows(&call.context, picked, width, index, x, x_stride, y,
                                                      y_stride));
    }
    return call_end(&call);
}

PyMethodDef core_dense_methods[] = {
    CORE_OPERATOR(linear_forward),
    CORE_OPERATOR(linear_group),
    CORE_OPERATOR(linear_backward),
    CORE_OPERATOR(norm_forward),
    CORE_OPERATOR(norm_backward),
    CORE_OPERATOR(glu_forward),
    CORE_OPERATOR(glu_backward),
    CORE_OPERATOR(embedding_forward),
    CORE_OPERATOR(embedding_backward),
    CORE_OPERATOR(linear_loss),
    CORE_OPERATOR(relative_mse),
    CORE_OPERATOR(adamw),
    CORE_OPERATOR(muon),
    CORE_OPERATOR(sum_squares),
    CORE_OPERATOR(add),
    CORE_OPERATOR(gather_rows),
    {NULL, NULL, 0, NULL},
};
