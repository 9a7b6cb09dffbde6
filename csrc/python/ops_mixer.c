/* Bindings of the causal convolution, the Mamba-1 scan and Mamba-2's SSD; docstrings in mambainllama/ops.py. */
#include "python/ops.h"

#include <math.h>

#include "cpu/tail.h"

/* heads must be a whole number of groups: "ssd_forward: B has 6 groups; heads = 32 is not a multiple of 6". */
static void
check_groups(core_call *call, const char *name, int64_t groups, const char *of, int64_t total)
{
    if (!call->failed && total % groups != 0) {
        call_fail(call, MIL_ERR_SHAPE, "%s: %s has %lld groups; %s = %lld is not a multiple of %lld",
                  call->operator, name, (long long)groups, of, (long long)total, (long long)groups);
    }
}

/* Channels that are read `repeat` times in runs of `repeat_group`; returns the number of stored ones. */
static int64_t
repeated_channels(core_call *call, const char *prefix, int64_t channels, int64_t repeat, int64_t repeat_group)
{
    if (!call->failed && (repeat < 1 || repeat_group < 1 || repeat > channels || repeat_group > channels ||
                          channels % repeat != 0 || channels / repeat % repeat_group != 0)) {
        call_fail(call, MIL_ERR_SHAPE,
                  "%s: %srepeat = %lld of runs of %srepeat_group = %lld does not divide %lld channels",
                  call->operator, prefix, (long long)repeat, prefix, (long long)repeat_group,
                  (long long)channels);
    }
    return call->failed ? 0 : channels / repeat;
}

static void
bind_dt_limits(core_call *call, float *dt_min, float *dt_max)
{
    *dt_min = (float)call_float(call, "dt_min", 0.0);
    *dt_max = (float)call_float(call, "dt_max", INFINITY);
    if (!call->failed && !(*dt_min >= 0.0f && *dt_max >= *dt_min)) {
        call_fail(call, MIL_ERR_VALUE, "%s: dt_min and dt_max must be 0 <= dt_min <= dt_max", call->operator);
    }
}

/* The CPU's operators look at past and boundary themselves; a device's kernels would read beyond a tail. */
static bool
rows_fit(core_call *call, const mil_rows *rows, bool has_states)
{
    if (call->place >= 0) {
        call->status = mil_check_rows(call->operator, rows, has_states);
    }
    return call->status == MIL_OK;
}

/* ---- causal convolution ---------------------------------------------------------------------------------- */

static int64_t
bind_conv1d(core_call *call, mil_conv1d *a)
{
    int64_t rows = 0;
    a->weight = call_floats(call, "weight", true, "channels width", &a->channels, &a->width);
    a->bias = call_floats(call, "bias", false, "channels", &a->channels);
    a->repeat = call_int(call, "repeat", 1);
    a->repeat_group = call_int(call, "repeat_group", 1);
    a->silu = call_bool(call, "silu", true);
    if (!call->failed && (a->width < 2 || a->width > 8)) {
        call_fail(call, MIL_ERR_SHAPE, "%s: weight has %lld taps; expected 2 to 8",
                  call->operator,(long long) a->width);
    }
    int64_t inputs = repeated_channels(call, "", a->channels, a->repeat, a->repeat_group);
    a->x = call_input(call, "x", &a->x_stride, "rows channels/repeat", &rows, &inputs);
    call_rows(call, &a->rows, rows);
    return inputs;
}

static PyObject *
conv1d_forward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_conv1d a = {0};
    call_begin(&call, module, "conv1d_forward", args, count, names);
    call_on_devices(&call);
    int64_t inputs = bind_conv1d(&call, &a);
    a.states = call_states(&call, a.rows.sequences,
                           &(call_state_sizes){.conv = inputs, .conv_rows = a.width - 1 + MIL_TAIL});
    a.y = call_output(&call, "y", &a.y_stride, "rows channels", &a.rows.rows, &a.channels);
    if (call_ready(&call) && rows_fit(&call, &a.rows, a.states != NULL)) {
        CALL_RUN(&call, call.context.ops->conv1d_forward(&call.context, &a));
    }
    return call_end(&call);
}

static PyObject *
conv1d_backward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_conv1d_grad a = {0};
    mil_conv1d *f = &a.forward;
    call_begin(&call, module, "conv1d_backward", args, count, names);
    int64_t inputs = bind_conv1d(&call, f);
    a.grad_y = call_input(&call, "grad_y", &a.grad_y_stride, "rows channels", &f->rows.rows, &f->channels);
    a.grad_x = call_gradient(&call, "grad_x", false, false, &a.grad_x_stride, "rows channels/repeat",
                             &f->rows.rows, &inputs);
    a.grad_weight =
        call_gradient(&call, "grad_weight", true, true, NULL, "channels width", &f->channels, &f->width);
    if (f->bias != NULL) {
        a.grad_bias = call_gradient(&call, "grad_bias", true, true, NULL, "channels", &f->channels);
    }
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.conv1d_backward(&call.context, &a));
    }
    return call_end_dict(&call);
}

/* ---- Mamba-1 --------------------------------------------------------------------------------------------- */

static int64_t
bind_scan(core_call *call, mil_scan *a)
{
    int64_t rows = 0;
    a->dt = call_input(call, "dt", &a->dt_stride, "rows inner", &rows, &a->inner);
    a->x_repeat = call_int(call, "x_repeat", 1);
    a->x_repeat_group = call_int(call, "x_repeat_group", 1);
    int64_t inputs = repeated_channels(call, "x_", a->inner, a->x_repeat, a->x_repeat_group);
    a->x = call_input(call, "x", &a->x_stride, "rows inner/x_repeat", &rows, &inputs);
    a->B = call_input(call, "B", &a->B_stride, "rows B_groups state_dim", &rows, &a->B_groups, &a->state_dim);
    a->C = call_input(call, "C", &a->C_stride, "rows C_groups state_dim", &rows, &a->C_groups, &a->state_dim);
    a->z = call_optional(call, "z", &a->z_stride, "rows inner", &rows, &a->inner);
    a->dt_bias = call_floats(call, "dt_bias", true, "inner", &a->inner);
    a->A_log = call_floats(call, "A_log", true, "inner state_dim", &a->inner, &a->state_dim);
    a->D = call_floats(call, "D", true, "inner", &a->inner);
    a->dt_bias_scale = (float)call_float(call, "dt_bias_scale", 1.0);
    bind_dt_limits(call, &a->dt_min, &a->dt_max);
    check_groups(call, "B", a->B_groups, "inner", a->inner);
    check_groups(call, "C", a->C_groups, "inner", a->inner);
    call_rows(call, &a->rows, rows);
    return inputs;
}

static PyObject *
scan_forward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_scan a = {0};
    call_begin(&call, module, "scan_forward", args, count, names);
    call_on_devices(&call);
    int64_t inputs = bind_scan(&call, &a);
    a.states = call_states(&call, a.rows.sequences,
                           &(call_state_sizes){.state = a.state_dim * a.inner,
                                               .x = inputs,
                                               .B = a.B_groups * a.state_dim,
                                               .dt = a.inner,
                                               .current = true});
    a.y = call_output(&call, "y", &a.y_stride, "rows inner", &a.rows.rows, &a.inner);
    if (call_ready(&call) && rows_fit(&call, &a.rows, a.states != NULL)) {
        CALL_RUN(&call, call.context.ops->scan_forward(&call.context, &a));
    }
    return call_end(&call);
}

static PyObject *
scan_backward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_scan_grad a = {0};
    mil_scan *f = &a.forward;
    int64_t *rows = &f->rows.rows;
    call_begin(&call, module, "scan_backward", args, count, names);
    int64_t inputs = bind_scan(&call, f);
    a.grad_y = call_input(&call, "grad_y", &a.grad_y_stride, "rows inner", rows, &f->inner);
    a.grad_x =
        call_gradient(&call, "grad_x", false, false, &a.grad_x_stride, "rows inner/x_repeat", rows, &inputs);
    a.grad_dt =
        call_gradient(&call, "grad_dt", false, false, &a.grad_dt_stride, "rows inner", rows, &f->inner);
    a.grad_B = call_gradient(&call, "grad_B", false, false, &a.grad_B_stride, "rows B_groups state_dim", rows,
                             &f->B_groups, &f->state_dim);
    a.grad_C = call_gradient(&call, "grad_C", false, false, &a.grad_C_stride, "rows C_groups state_dim", rows,
                             &f->C_groups, &f->state_dim);
    if (f->z != NULL) {
        a.grad_z =
            call_gradient(&call, "grad_z", false, false, &a.grad_z_stride, "rows inner", rows, &f->inner);
    }
    a.grad_dt_bias = call_gradient(&call, "grad_dt_bias", true, true, NULL, "inner", &f->inner);
    a.grad_A_log =
        call_gradient(&call, "grad_A_log", true, true, NULL, "inner state_dim", &f->inner, &f->state_dim);
    a.grad_D = call_gradient(&call, "grad_D", true, true, NULL, "inner", &f->inner);
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.scan_backward(&call.context, &a));
    }
    return call_end_dict(&call);
}

/* ---- Mamba-2 --------------------------------------------------------------------------------------------- */

static void
bind_ssd(core_call *call, mil_ssd *a)
{
    int64_t rows = 0;
    a->dt = call_input(call, "dt", &a->dt_stride, "rows heads", &rows, &a->heads);
    a->x = call_input(call, "x", &a->x_stride, "rows x_heads head_dim", &rows, &a->x_heads, &a->head_dim);
    a->B = call_input(call, "B", &a->B_stride, "rows B_groups state_dim", &rows, &a->B_groups, &a->state_dim);
    a->C = call_input(call, "C", &a->C_stride, "rows C_groups state_dim", &rows, &a->C_groups, &a->state_dim);
    a->dt_bias = call_floats(call, "dt_bias", true, "heads", &a->heads);
    a->A_log = call_floats(call, "A_log", true, "heads", &a->heads);
    a->D = call_floats(call, "D", true, "heads", &a->heads);
    bind_dt_limits(call, &a->dt_min, &a->dt_max);
    if (!call->failed && a->heads % a->x_heads != 0) {
        call_fail(call, MIL_ERR_SHAPE, "%s: x has %lld heads; heads = %lld is not a multiple of %lld",
                  call->operator,(long long) a->x_heads, (long long)a->heads, (long long)a->x_heads);
    }
    check_groups(call, "B", a->B_groups, "heads", a->heads);
    check_groups(call, "C", a->C_groups, "heads", a->heads);
    call_rows(call, &a->rows, rows);
}

static PyObject *
ssd_forward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_ssd a = {0};
    call_begin(&call, module, "ssd_forward", args, count, names);
    call_on_devices(&call);
    bind_ssd(&call, &a);
    a.states = call_states(&call, a.rows.sequences,
                           &(call_state_sizes){.state = a.heads * a.state_dim * a.head_dim,
                                               .x = a.x_heads * a.head_dim,
                                               .B = a.B_groups * a.state_dim,
                                               .dt = a.heads});
    a.y = call_output(&call, "y", &a.y_stride, "rows heads head_dim", &a.rows.rows, &a.heads, &a.head_dim);
    if (call_ready(&call) && rows_fit(&call, &a.rows, a.states != NULL)) {
        CALL_RUN(&call, call.context.ops->ssd_forward(&call.context, &a));
    }
    return call_end(&call);
}

static PyObject *
ssd_backward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_ssd_grad a = {0};
    mil_ssd *f = &a.forward;
    int64_t *rows = &f->rows.rows;
    call_begin(&call, module, "ssd_backward", args, count, names);
    bind_ssd(&call, f);
    a.grad_y =
        call_input(&call, "grad_y", &a.grad_y_stride, "rows heads head_dim", rows, &f->heads, &f->head_dim);
    a.grad_x = call_gradient(&call, "grad_x", false, false, &a.grad_x_stride, "rows x_heads head_dim", rows,
                             &f->x_heads, &f->head_dim);
    a.grad_B = call_gradient(&call, "grad_B", false, false, &a.grad_B_stride, "rows B_groups state_dim", rows,
                             &f->B_groups, &f->state_dim);
    a.grad_C = call_gradient(&call, "grad_C", false, false, &a.grad_C_stride, "rows C_groups state_dim", rows,
                             &f->C_groups, &f->state_dim);
    a.grad_dt =
        call_gradient(&call, "grad_dt", false, false, &a.grad_dt_stride, "rows heads", rows, &f->heads);
    a.grad_dt_bias = call_gradient(&call, "grad_dt_bias", true, true, NULL, "heads", &f->heads);
    a.grad_A_log = call_gradient(&call, "grad_A_log", true, true, NULL, "heads", &f->heads);
    a.grad_D = call_gradient(&call, "grad_D", true, true, NULL, "heads", &f->heads);
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.ssd_backward(&call.context, &a));
    }
    return call_end_dict(&call);
}

PyMethodDef core_mixer_methods[] = {
    CORE_OPERATOR(conv1d_forward), CORE_OPERATOR(conv1d_backward), CORE_OPERATOR(scan_forward),
    CORE_OPERATOR(scan_backward),  CORE_OPERATOR(ssd_forward),     CORE_OPERATOR(ssd_backward),
    {NULL, NULL, 0, NULL},
};
