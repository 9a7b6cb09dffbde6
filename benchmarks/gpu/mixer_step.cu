/* Decoding with a Mamba model without attention: a recorded step of 1, 5 and 9 rows, and what it costs without each operator.
 *
 * As step.cu has it, for the shapes whose layers are a mixer and nothing else: Mamba 2.8B, Mamba-2 2.7B, and a draft of 130M.
 * The limit is the bytes of the weights at this run's own copy rate.
 *
 *   mixer_step [hidden layers vocab mixer (1 or 2) [quick]]
 */
#include "random_model.h"

enum { PAST = 512, MOST_ROWS = 16 };

static mil_layer_config
layer_of(int64_t mixer, int64_t hidden)
{
    mil_layer_config c = {};
    c.mixer = (mil_mixer_kind)mixer;
    c.inner = c.x_width = 2 * hidden;
    c.conv_width = 4;
    c.state_dim = mixer == 1 ? 16 : 128;
    c.dt_rank = hidden / 16;
    c.B_groups = c.C_groups = 1;
    c.x_proj = mixer == 1;
    c.head_dim = 64;
    c.heads = c.inner / 64;
    c.norm_group = mixer == 1 ? 0 : c.inner;
    c.mixer_norm_eps = 1e-5f;
    c.dt_bias_scale = 1.0f;
    c.dt_max = INFINITY;
    return c;
}

static void
leave_out(mil_context *context, mil_ops *ops, const mil_model *model, const mil_step *step, double whole)
{
    const mil_ops all = *ops;
    static const char *const names[] = {"norm and products", "products",    "convolution",
                                        "scan mixer",        "scan or SSD", "gated norm"};
    for (int i = 0; i < 6; i++) {
        *ops = all;
        ops->project = i == 0 ? skip_project : all.project;
        ops->linear_forward = i == 1 ? skip_linear : all.linear_forward;
        ops->conv1d_forward = i == 2 ? skip<mil_conv1d> : all.conv1d_forward;
        ops->scan_mixer = i == 3 && all.scan_mixer != NULL ? skip<mil_scan_mixer> : all.scan_mixer;
        ops->scan_forward = i == 4 ? skip<mil_scan> : all.scan_forward;
        ops->ssd_forward = i == 4 ? skip<mil_ssd> : all.ssd_forward;
        ops->norm_forward = i == 5 ? skip<mil_norm> : all.norm_forward;
        double without = model_step_seconds(context, model, step);
        printf("  without %-20s %8.1f us: it costs %7.1f us\n", names[i], without * 1e6,
               (whole - without) * 1e6);
    }
    *ops = all;
}

int
main(int argc, char **argv)
{
    int64_t n[5] = {2560, 64, 50280, 1, 0};
    for (int i = 1; i < argc && i <= 5; i++) {
        n[i - 1] = atoll(argv[i]);
    }
    static harness h;
    harness_begin(&h, MIL_BF16);
    double rate = timing_copy_rate(&h);
    mil_layer_config *layers = (mil_layer_config *)calloc((size_t)n[1], sizeof *layers);
    for (int64_t i = 0; i < n[1]; i++) {
        layers[i] = layer_of(n[3], n[0]);
    }
    mil_model_config config = {};
    config.vocab = n[2];
    config.hidden = n[0];
    config.layer_count = n[1];
    config.layers = layers;
    config.tied = true;
    config.norm_eps = 1e-5f;
    config.embedding_scale = config.logit_scale = 1.0f;
    mil_ops ops = *h.gpu.ops;
    h.gpu.ops = &ops;
    mil_model *model = model_of(&h, &config, MIL_BF16, true, &ops);
    double weight_bytes = model_bytes(model, true);
    mil_state state;
    harness_need(mil_state_init(&state, model, PAST + 64));
    mil_state *states[1] = {&state};
    mil_arena kept = {};
    kept.allocator = &h.allocator;
    mil_context context = h.gpu;
    context.kept = &kept;
    harness_array logits = harness_empty_of(&h, MOST_ROWS * n[2], MIL_F32);
    int32_t tokens[MOST_ROWS] = {1, 2, 3, 4, 5};
    printf("%lld x %lld, mixer %lld: %.2f GB of weights, copy %.2f TB/s: limit %.1f us\n", (long long)n[0],
           (long long)n[1], (long long)n[3], weight_bytes * 1e-9, rate * 1e-12, weight_bytes / rate * 1e6);
    static const int64_t counts[][2] = {{1, 7}, {1, 16}, {5, 7}, {5, 18}, {9, 7}, {9, 18}};
    double one = 0;
    for (int i = 0; i < 6; i++) {
        const int64_t count = counts[i][0], tail = counts[i][1];
        state.length = PAST + tail % MIL_WINDOW;
        state.boundary = state.length - tail;
        int64_t rows[6] = {0, count, state.length, 0, state.boundary, 0};
        mil_step step = {};
        step.sequences = 1;
        step.count = count;
        step.states = states;
        step.tokens = (const int32_t *)harness_bytes(&h, tokens, sizeof tokens);
        step.rows = (const int64_t *)harness_bytes(&h, rows, sizeof rows);
        step.logits = (float *)logits.gpu;
        double whole = model_step_seconds(&context, model, &step);
        one = i == 0 ? whole : one;
        printf("rows %lld, tail of %2lld: %8.1f us, %.3f of the limit, %.3f of one row\n", (long long)count,
               (long long)tail, whole * 1e6, whole * rate / weight_bytes, whole / one);
        if (i == 0 && n[4] == 0) {
            leave_out(&context, &ops, model, &step, whole);
            const mil_ops all = ops;
            ops.scan_mixer = NULL; /* as where it is off */
            printf("  operator by operator        %8.1f us\n",
                   model_step_seconds(&context, model, &step) * 1e6);
            ops = all;
        }
    }
    return 0;
}
