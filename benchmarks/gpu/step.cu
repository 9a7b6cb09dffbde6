/* Where a decoding step's time goes: a recorded step of a model in a real shape, and what it costs without each operator.
 *
 * Kernels of one graph overlap, so durations measured one by one do not add up.  This program records the step with one
 * operator after another left out: the difference is what that operator really costs.  Weights are random, sampling is
 * not included.
 *
 *   step [hidden layers heads kv_heads intermediate vocab [mixer: 0 attention, 1 Mamba-1, 2 Mamba-2
 *        [weights: 1 bfloat16, 3 float8, 4 int8 [1: the whole step alone [sequences [tokens before]]]]]]
 */
#include "random_model.h"

enum { NUMBERS = 11 };

/* What a step must read of states: those of mixers, and keys and values. */
static double
state_bytes(const model_shape *s, int64_t past)
{
    int64_t head_dim = s->hidden / s->heads, odd = s->layers / 2, even = s->layers - odd;
    double keys = 2.0 * 2 * (double)(s->kv_heads * head_dim * past);
    double mixer = s->mixer == 1   ? 4.0 * 16 * (double)s->hidden
                   : s->mixer == 2 ? 4.0 * (double)(s->hidden * head_dim)
                                   : keys;
    return keys * (double)odd + mixer * (double)even;
}

int
main(int argc, char **argv)
{
    int64_t n[NUMBERS] = {4096, 32, 32, 8, 14336, 128256, 2, MIL_BF16, 0, 1, 512};
    for (int i = 1; i < argc && i <= NUMBERS; i++) {
        n[i - 1] = atoll(argv[i]);
    }
    static harness h;
    harness_begin(&h, MIL_BF16);
    mil_ops ops = *h.gpu.ops;
    h.gpu.ops = &ops;
    const model_shape shape = {n[0], n[1], n[2], n[3], n[4], n[5], n[6]};
    mil_model *model = model_random(&h, &shape, (mil_dtype)n[7], &ops);
    /* The embedding, of which a token reads one row, is not counted. */
    const mil_parameter *embedding = model->embedding;
    const double bytes = model_bytes(model, false) -
                         (double)embedding->count * mil_dtype_size(embedding->dtype) +
                         (double)n[9] * state_bytes(&shape, n[10]);
    mil_arena kept = {};
    kept.allocator = &h.allocator;
    mil_context context = h.gpu;
    context.kept = &kept;
    const mil_step step = model_step_of(&h, model, n[9], n[10]);
    double whole = model_step_seconds(&context, model, &step);
    printf("%.2f GB of weights and states: %.1f us a step, %.2f TB/s, %.0f tokens/s\n", bytes * 1e-9,
           whole * 1e6, bytes / whole * 1e-12, (double)n[9] / whole);
    if (n[8] != 0) {
        return 0;
    }
    const mil_ops all = ops;
    static const char *const names[] = {"project",     "linear", "attention",
                                        "rope_append", "conv1d", "ssd",
                                        "scan",        "norm",   "everything but products"};
    for (int i = 0; i < 9; i++) {
        ops = all;
        if (i == 0) {
            ops.project = skip_project;
        }
        if (i == 1) {
            ops.linear_forward = skip_linear;
        }
        if (i == 2 || i == 8) {
            ops.attention_forward = skip<mil_attention>;
        }
        if (i == 3 || i == 8) {
            ops.rope_append = skip_rope_append;
        }
        if (i == 4 || i == 8) {
            ops.conv1d_forward = skip<mil_conv1d>;
        }
        if (i == 5 || i == 8) {
            ops.ssd_forward = skip<mil_ssd>;
        }
        if (i == 6 || i == 8) {
            ops.scan_forward = skip<mil_scan>;
        }
        if (i == 7 || i == 8) {
            ops.norm_forward = skip<mil_norm>;
        }
        double without = model_step_seconds(&context, model, &step);
        printf("without %-24s %8.1f us: it costs %7.1f us\n", names[i], without * 1e6,
               (whole - without) * 1e6);
    }
    ops = all;
    ops.project = NULL;
    ops.rope_append = NULL;
    printf("one kernel an operator: %.1f us\n", model_step_seconds(&context, model, &step) * 1e6);
    ops = all;
    printf("again, whole: %.1f us\n", model_step_seconds(&context, model, &step) * 1e6);
    return 0;
}
