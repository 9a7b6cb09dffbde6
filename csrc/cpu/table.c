/* The operator table of the CPU, and its memory members: host memory is the device's memory. */
#include "cpu/cpu.h"

#include <string.h>

mil_status
mil_cpu_alloc(mil_context *context, size_t bytes, void **out)
{
    (void)context;
    *out = mil_alloc(1, bytes);
    if (*out == NULL) {
        return mil_fail(MIL_ERR_MEMORY, "out of memory: %zu bytes", bytes);
    }
    return MIL_OK;
}

void
mil_cpu_free(mil_context *context, void *pointer)
{
    (void)context;
    mil_free(pointer);
}

mil_status
mil_cpu_copy(mil_context *context, void *to, const void *from, size_t bytes)
{
    (void)context;
    if (bytes != 0) {
        memmove(to, from, bytes);
    }
    return MIL_OK;
}

mil_status
mil_cpu_zero(mil_context *context, void *pointer, size_t bytes)
{
    (void)context;
    if (bytes != 0) {
        memset(pointer, 0, bytes);
    }
    return MIL_OK;
}

mil_status
mil_cpu_upload(mil_context *context, const void *from, size_t bytes, const void **out)
{
    (void)context;
    (void)bytes;
    *out = from;
    return MIL_OK;
}

const mil_ops mil_cpu_ops = {
    .version = MIL_OPS_VERSION,
    .size = sizeof(mil_ops),
    .name = "cpu",
    .activation_dtype = MIL_F32,
    .keeps_current = true,
    .prefill_rows = 512,
    .alloc = mil_cpu_alloc,
    .free = mil_cpu_free,
    .copy = mil_cpu_copy,
    .zero = mil_cpu_zero,
    .upload = mil_cpu_upload,
    .linear_forward = mil_cpu_linear_forward,
    .linear_backward = mil_cpu_linear_backward,
    .norm_forward = mil_cpu_norm_forward,
    .norm_backward = mil_cpu_norm_backward,
    .rope_table = mil_cpu_rope_table,
    .rope = mil_cpu_rope,
    .attention_forward = mil_cpu_attention_forward,
    .attention_backward = mil_cpu_attention_backward,
    .kv_append = mil_cpu_kv_append,
    .conv1d_forward = mil_cpu_conv1d_forward,
    .conv1d_backward = mil_cpu_conv1d_backward,
    .scan_forward = mil_cpu_scan_forward,
    .scan_backward = mil_cpu_scan_backward,
    .ssd_forward = mil_cpu_ssd_forward,
    .ssd_backward = mil_cpu_ssd_backward,
    .glu_forward = mil_cpu_glu_forward,
    .glu_backward = mil_cpu_glu_backward,
    .embedding_forward = mil_cpu_embedding_forward,
    .embedding_backward = mil_cpu_embedding_backward,
    .linear_loss = mil_cpu_linear_loss,
    .relative_mse = mil_cpu_relative_mse,
    .adamw = mil_cpu_adamw,
    .muon = mil_cpu_muon,
    .sum_squares = mil_cpu_sum_squares,
    .add = mil_cpu_add,
    .gather_rows = mil_cpu_gather_rows,
    .widen = mil_cpu_widen,
};
