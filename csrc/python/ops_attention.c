/* Bindings of RoPE, attention and the KV cache; docstrings in mambainllama/ops.py. */
#include "python/ops.h"

static PyObject *
rope_table(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_rope_table a = {0};
    int64_t half = 0, two = 2;
    call_begin(&call, module, "rope_table", args, count, names);
    call_on_devices(&call);
    int64_t rows = call_int(&call, "rows", 0);
    if (!call.failed && rows < 1) {
        call_fail(&call, MIL_ERR_VALUE, "rope_table: rows = %lld; expected at least 1", (long long)rows);
    }
    call_rows(&call, &a.rows, rows);
    if (call_has(&call, "inv_freq") && call_array_dims(&call, "inv_freq") == 2) {
        a.inv_freq = call_host_floats(&call, "inv_freq", &a.inv_freq_stride, "sequences rotary/2",
                                      &a.rows.sequences, &half);
    }
    else {
        a.inv_freq = call_host_floats(&call, "inv_freq", NULL, "rotary/2", &half);
        a.inv_freq_stride = 0;
    }
    a.rotary = 2 * half;
    a.scale = (float)call_float(&call, "scale", 1.0);
    a.table = call_float_output(&call, "table", "rows rotary/2 2", &rows, &half, &two);
    if (call_ready(&call)) {
        CALL_RUN(&call, call.context.ops->rope_table(&call.context, &a));
    }
    return call_end(&call);
}

static PyObject *
rope(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_rope a = {0};
    int64_t half = 0, two = 2, x_stride = 0;
    call_begin(&call, module, "rope", args, count, names);
    call_on_devices(&call);
    const void *x = call_input(&call, "x", &x_stride, "rows heads head_dim", &a.rows, &a.heads, &a.head_dim);
    a.table = call_floats(&call, "table", true, "rows rotary/2 2", &a.rows, &half, &two);
    a.rotary = 2 * half;
    a.inverse = call_bool(&call, "inverse", false);
    if (!call.failed && a.rotary > a.head_dim) {
        call_fail(&call, MIL_ERR_SHAPE, "rope: table rotates %lld entries; head_dim = %lld",
                  (long long)a.rotary, (long long)a.head_dim);
    }
    a.x = call_output(&call, "y", &a.x_stride, "rows heads head_dim", &a.rows, &a.heads, &a.head_dim);
    if (call_ready(&call)) {
        call_copy_rows(&call, a.rows, a.heads * a.head_dim, x, x_stride, a.x, a.x_stride);
        CALL_RUN(&call, call.context.ops->rope(&call.context, &a));
    }
    return call_end(&call);
}

/* q, and k and v as rows or as caches. */
static void
bind_attention(core_call *call, mil_attention *a, bool caches_allowed)
{
    int64_t rows = 0, v_stride = 0;
    a->q = call_input(call, "q", &a->q_stride, "rows heads head_dim", &rows, &a->heads, &a->head_dim);
    call_rows(call, &a->rows, rows);
    if (caches_allowed) {
        a->caches = call_caches(call, &a->rows, &a->kv_heads, &a->head_dim, false, false);
    }
    if (a->caches == NULL) {
        a->k =
            call_input(call, "k", &a->kv_stride, "rows kv_heads head_dim", &rows, &a->kv_heads, &a->head_dim);
        a->v = call_input(call, "v", &v_stride, "rows kv_heads head_dim", &rows, &a->kv_heads, &a->head_dim);
        if (!call->failed && v_stride != a->kv_stride) {
            call_fail(call, MIL_ERR_VALUE,
                      "%s: rows of k are %lld elements apart and rows of v %lld; they must agree",
                      call->operator,(long long) a->kv_stride, (long long)v_stride);
        }
        for (int64_t i = 0; i < a->rows.sequences && a->rows.past != NULL && !call->failed; i++) {
            if (a->rows.past[i] != 0) {
                call_fail(call, MIL_ERR_VALUE,
                          "%s: past[%lld] = %lld, but without caches there are no earlier keys",
                          call->operator,(long long) i, (long long)a->rows.past[i]);
            }
        }
        a->rows.past = NULL;
    }
    else if (call_has(call, "k") || call_has(call, "v")) {
        call_fail(call, MIL_ERR_VALUE, "%s: give either caches or k and v (append them with kv_append first)",
                  call->operator);
    }
    a->window = call_int(call, "window", 0);
    a->scale = (float)call_float(call, "scale", 1.0);
    if (!call->failed && (a->window < 0 || a->heads % a->kv_heads != 0)) {
        call_fail(call, a->window < 0 ? MIL_ERR_VALUE : MIL_ERR_SHAPE,
                  a->window < 0 ? "%s: window is negative; 0 means none (heads = %lld, kv_heads = %lld)"
                                : "%s: heads = %lld is not a multiple of kv_heads = %lld",
                  call->operator,(long long) a->heads, (long long)a->kv_heads);
    }
}

static PyObject *
attention_forward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_attention a = {0};
    call_begin(&call, module, "attention_forward", args, count, names);
    call_on_devices(&call);
    bind_attention(&call, &a, true);
    a.y = call_output(&call, "y", &a.y_stride, "rows heads head_dim", &a.rows.rows, &a.heads, &a.head_dim);
    if (call_bool(&call, "log_sum_exp", false)) {
        a.log_sum_exp = call_fresh(&call, "log_sum_exp", "rows heads", &a.rows.rows, &a.heads);
    }
    if (call_ready(&call)) {
        CALL_RUN(&call, call.context.ops->attention_forward(&call.context, &a));
    }
    return call_end(&call);
}

static PyObject *
attention_backward(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_attention_grad a = {0};
    mil_attention *f = &a.forward;
    int64_t v_stride = 0;
    call_begin(&call, module, "attention_backward", args, count, names);
    bind_attention(&call, f, false);
    f->y = (void *)call_input(&call, "y", &f->y_stride, "rows heads head_dim", &f->rows.rows, &f->heads,
                              &f->head_dim);
    f->log_sum_exp = (float *)call_input(&call, "log_sum_exp", NULL, "rows heads", &f->rows.rows, &f->heads);
    a.grad_y = call_input(&call, "grad_y", &a.grad_y_stride, "rows heads head_dim", &f->rows.rows, &f->heads,
                          &f->head_dim);
    a.grad_q = call_gradient(&call, "grad_q", false, false, &a.grad_q_stride, "rows heads head_dim",
                             &f->rows.rows, &f->heads, &f->head_dim);
    a.grad_k = call_gradient(&call, "grad_k", false, false, &a.grad_kv_stride, "rows kv_heads head_dim",
                             &f->rows.rows, &f->kv_heads, &f->head_dim);
    a.grad_v = call_gradient(&call, "grad_v", false, false, &v_stride, "rows kv_heads head_dim",
                             &f->rows.rows, &f->kv_heads, &f->head_dim);
    if (!call.failed && v_stride != a.grad_kv_stride) {
        call_fail(&call, MIL_ERR_VALUE, "attention_backward: grad_k and grad_v have different row strides");
    }
    if (call_ready(&call)) {
        CALL_RUN(&call, mil_cpu_ops.attention_backward(&call.context, &a));
    }
    return call_end_dict(&call);
}

static PyObject *
kv_append(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    core_call call;
    mil_kv_append a = {0};
    int64_t rows = 0, v_stride = 0;
    call_begin(&call, module, "kv_append", args, count, names);
    call_on_devices(&call);
    a.k = call_input(&call, "k", &a.kv_stride, "rows kv_heads head_dim", &rows, &a.kv_heads, &a.head_dim);
    a.v = call_input(&call, "v", &v_stride, "rows kv_heads head_dim", &rows, &a.kv_heads, &a.head_dim);
    if (!call.failed && v_stride != a.kv_stride) {
        call_fail(&call, MIL_ERR_VALUE, "kv_append: rows of k are %lld elements apart and rows of v %lld",
                  (long long)a.kv_stride, (long long)v_stride);
    }
    call_rows(&call, &a.rows, rows);
    a.caches = call_caches(&call, &a.rows, &a.kv_heads, &a.head_dim, true, true);
    if (call_ready(&call)) {
        CALL_RUN(&call, call.context.ops->kv_append(&call.context, &a));
    }
    return call_end(&call);
}

PyMethodDef core_attention_methods[] = {
    CORE_OPERATOR(rope_table),         CORE_OPERATOR(rope),      CORE_OPERATOR(attention_forward),
    CORE_OPERATOR(attention_backward), CORE_OPERATOR(kv_append), {NULL, NULL, 0, NULL},
};
