/* Where a decoding step's time goes: a recorded step of a model in a real shape, and what it costs without each operator.
 *
 * Kernels of one graph overlap, so durations measured one by one do not add up.  This program records the step with one
 * operator after another left out: the difference is what that operator really costs.  Weights are random, sampling is
 * not included.
 *
 *   step [hidden layers heads kv_heads intermediate vocab [mixer: 0 attention, 1 Mamba-1, 2 Mamba-2
 *        [weights: 1 bfloat16, 3 float8, 4 int8 [1: the whole step alone]]]]
 */
#include "timing.h"

extern "C" {
#include "model/model.h"
}

enum { PAST = 512, REPLAYS = 60 };

static mil_status
skip_project(mil_context *, const mil_norm *, const mil_linear *, int64_t, const mil_glu *)
{
    return MIL_OK;
}

static mil_status
skip_linear(mil_context *, const mil_linear *, int64_t)
{
    return MIL_OK;
}

template <typename Arguments>
static mil_status
skip(mil_context *, const Arguments *)
{
    return MIL_OK;
}

static mil_status
skip_rope_append(mil_context *, const mil_rope *, const mil_rope *, const mil_kv_append *)
{
    return MIL_OK;
}

static mil_layer_config
layer_of(int64_t mixer, int64_t hidden, int64_t heads, int64_t kv_heads, int64_t intermediate)
{
    mil_layer_config c = {};
    int64_t head_dim = hidden / heads;
    c.mixer = (mil_mixer_kind)mixer;
    c.heads = heads;
    c.kv_heads = kv_heads;
    c.head_dim = head_dim;
    c.rotary = mixer == 0 ? head_dim : 0;
    c.attention_scale = 1.0f / sqrtf((float)head_dim);
    c.inner = hidden;
    c.x_width = kv_heads * head_dim;
    c.conv_width = 4;
    c.state_dim = mixer == 1 ? 16 : head_dim;
    c.dt_rank = hidden / 16;
    c.B_groups = mixer == 1 ? kv_heads * head_dim / 16 : kv_heads;
    c.C_groups = mixer == 1 ? hidden / 16 : heads;
    c.repeat_before_conv = true;
    c.norm_group = head_dim;
    c.mixer_norm_eps = 1e-5f;
    c.dt_bias_scale = 1.0f;
    c.dt_max = INFINITY;
    c.intermediate = intermediate;
    c.gated = true;
    c.activation = MIL_SILU;
    return c;
}

static __global__ void
fill(uint32_t *to, size_t count, bool codes)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x) {
        uint32_t v = (uint32_t)i * 2654435761u;
        v ^= v >> 15;
        v *= 2246822519u;
        to[i] = codes ? v & 0xbfbfbfbfu : (v & 0x807f807fu) | 0x3c003c00u;
    }
}

/* Seconds of one replay of the step, back to back as a burst has them. */
static double
time_step(mil_context *context, const mil_model *model, const mil_step *step)
{
    cudaStream_t stream = mil_stream(context);
    void *recording;
    harness_need(mil_model_step(context, model, step));
    harness_need(context->ops->finish(context));
    harness_need(context->ops->record_begin(context));
    harness_need(mil_model_step(context, model, step));
    harness_need(context->ops->record_end(context, &recording));
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    double best = INFINITY;
    for (int round = 0; round < 4; round++) {
        float ms;
        cudaEventRecord(begin, stream);
        for (int i = 0; i < REPLAYS; i++) {
            harness_need(context->ops->replay(context, recording));
        }
        cudaEventRecord(end, stream);
        cudaEventSynchronize(end);
        cudaEventElapsedTime(&ms, begin, end);
        best = ms * 1e-3 / REPLAYS < best ? ms * 1e-3 / REPLAYS : best;
    }
    context->ops->record_free(context, recording);
    return best;
}

int
main(int argc, char **argv)
{
    int64_t n[9] = {4096, 32, 32, 8, 14336, 128256, 2, MIL_BF16, 0};
    for (int i = 1; i < argc && i <= 9; i++) {
        n[i - 1] = atoll(argv[i]);
    }
    static harness h;
    harness_begin(&h, MIL_BF16);
    mil_layer_config *layers = (mil_layer_config *)calloc((size_t)n[1], sizeof *layers);
    for (int64_t i = 0; i < n[1]; i++) {
        layers[i] = layer_of(i % 2 ? 0 : n[6], n[0], n[2], n[3], n[4]);
    }
    float inv_freq[256];
    for (int i = 0; i < 256; i++) {
        inv_freq[i] = powf(500000.0f, -(float)i / 64.0f);
    }
    mil_model_config config = {};
    config.vocab = n[5];
    config.hidden = n[0];
    config.layer_count = n[1];
    config.layers = layers;
    config.norm_eps = 1e-5f;
    config.embedding_scale = config.logit_scale = 1.0f;
    config.rope.inv_freq = inv_freq;
    config.rope.rotary = n[0] / n[2];
    config.rope.scale = 1.0f;
    mil_model model;
    harness_need(mil_model_init(&model, &config));
    mil_ops ops = *h.gpu.ops;
    model.ops = &ops;
    h.gpu.ops = &ops;
    size_t weight_bytes = 0;
    for (int64_t i = 0; i < model.parameter_count; i++) {
        mil_parameter *p = &model.parameters[i];
        p->dtype = p->matrix ? (mil_dtype)n[7] : MIL_F32;
        if (!p->required) {
            continue;
        }
        size_t bytes = (size_t)p->count * mil_dtype_size(p->dtype);
        weight_bytes += bytes;
        harness_need(ops.alloc(&h.gpu, bytes, &p->data));
        bool codes = mil_dtype_is_scaled(p->dtype);
        fill<<<1024, 256, 0, mil_stream(&h.gpu)>>>((uint32_t *)p->data, bytes / 4, codes);
        p->scale = codes ? (float *)timing_array(&h, p->shape[0], MIL_F32, 0.001f) : NULL;
    }
    harness_need(mil_model_bind(&model));
    mil_state state;
    harness_need(mil_state_init(&state, &model, PAST + 64));
    state.length = PAST;
    state.boundary = PAST - PAST % MIL_WINDOW - MIL_WINDOW;
    int64_t rows[6] = {0, 1, PAST + 7, 0, PAST, 0};
    int32_t token = 1;
    mil_state *states[1] = {&state};
    mil_arena kept = {};
    kept.allocator = &h.allocator;
    mil_context context = h.gpu;
    context.kept = &kept;
    harness_array logits = harness_empty_of(&h, n[5], MIL_F32);
    mil_step step = {};
    step.sequences = 1;
    step.states = states;
    step.tokens = (const int32_t *)harness_bytes(&h, &token, sizeof token);
    step.rows = (const int64_t *)harness_bytes(&h, rows, sizeof rows);
    step.logits = (float *)logits.gpu;
    double whole = time_step(&context, &model, &step);
    printf("%.2f GB of weights: %.1f us a step, %.2f TB/s\n", (double)weight_bytes * 1e-9, whole * 1e6,
           (double)weight_bytes / whole * 1e-12);
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
        double without = time_step(&context, &model, &step);
        printf("without %-24s %8.1f us: it costs %7.1f us\n", names[i], without * 1e6,
               (whole - without) * 1e6);
    }
    ops = all;
    ops.project = NULL;
    ops.rope_append = NULL;
    printf("one kernel an operator: %.1f us\n", time_step(&context, &model, &step) * 1e6);
    ops = all;
    printf("again, whole: %.1f us\n", time_step(&context, &model, &step) * 1e6);
    return 0;
}
