/* Where a prompt's time goes: a pass of a model in a real shape over several prompts, and what it costs without each
 * operator, beside the rate of the largest products alone.
 *
 * Account for 8 prompts of 2,048 tokens through an 8B hybrid (32 layers of 4096, 14336; half of them Mamba-2), bfloat16:
 *
 *   products    2 x 7.25e9 weights x 16,384 rows = 238 Tflop: 340 ms at 700 Tflop/s
 *   attention   4 x 128 x 32 heads x 16.8 M visible pairs x 16 layers = 4.4 Tflop: 9 ms at 480 Tflop/s
 *   glu         32 x 1.41 GB, the two halves read and one written: 18.8 ms at 2.4 TB/s
 *   norms       64 x 0.27 GB and 16 gated x 0.40 GB: 9.8 ms
 *   rotation    16 x 0.40 GB: 2.7 ms
 *   conv        16 x 0.40 GB: 2.7 ms
 *   SSD         16 x 0.36 GB, 16 x 45 Gflop: 5.7 ms measured
 *
 * so that everything but products is some 13 % of the pass, and 75 % of the products' rate needs products at 86 % of it.
 * A pass returns the logits of each prompt's last token.
 *
 *   prefill [prompts tokens [hidden layers heads kv_heads intermediate vocab [mixer: 0 attention, 1 Mamba-1, 2 Mamba-2]]]
 */
#include "random_model.h"

#include <time.h>

static double
now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct prompts {
    int64_t count, tokens;
    int32_t *token; /* [count, tokens] */
    mil_state *states;
    float *logits;
} prompts;

/* All prompts, `at_once` of them in one pass. */
static void
read_prompts(mil_context *context, const mil_model *model, const prompts *p, int64_t at_once)
{
    int64_t offsets[65], rows[64];
    mil_state *states[64];
    for (int64_t first = 0; first < p->count; first += at_once) {
        mil_forward forward = {};
        forward.sequences = at_once;
        for (int64_t i = 0; i < at_once; i++) {
            offsets[i] = i * p->tokens;
            rows[i] = (i + 1) * p->tokens - 1;
            states[i] = &p->states[first + i];
        }
        offsets[at_once] = at_once * p->tokens;
        forward.tokens = p->token + first * p->tokens;
        forward.offsets = offsets;
        forward.states = states;
        forward.logit_rows = rows;
        forward.logit_count = at_once;
        forward.logits = p->logits + first * model->config.vocab;
        harness_need(mil_model_forward(context, model, &forward));
    }
}

/* Seconds of all prompts from empty states: the best of some. */
static double
time_prompts(mil_context *context, const mil_model *model, const prompts *p, int64_t at_once, int repeats)
{
    double best = INFINITY;
    for (int k = 0; k <= repeats; k++) { /* the first one grows arenas and asks for algorithms */
        for (int64_t i = 0; i < p->count; i++) {
            harness_need(mil_state_clear(&p->states[i]));
        }
        harness_need(context->ops->finish(context));
        double begin = now();
        read_prompts(context, model, p, at_once);
        harness_need(context->ops->finish(context));
        double seconds = now() - begin;
        best = k > 0 && seconds < best ? seconds : best;
    }
    return best;
}

/* Flops a second of the MLP's products, back to back for as long as a pass takes. */
static double
product_rate(harness *h, int64_t rows, int64_t hidden, int64_t intermediate)
{
    enum { CALLS = 64 };
    mil_linear up = {}, down = {};
    up.rows = down.rows = rows;
    up.in = down.out = up.x_stride = down.y_stride = hidden;
    up.out = down.in = up.y_stride = down.x_stride = intermediate;
    up.dtype = down.dtype = h->act;
    up.x = timing_array(h, rows * hidden, h->act, 1);
    up.weight = timing_array(h, hidden * intermediate, h->act, 0.02f);
    up.y = timing_array(h, rows * intermediate, h->act, 1);
    down.x = timing_array(h, rows * intermediate, h->act, 1);
    down.weight = up.weight;
    down.y = timing_array(h, rows * hidden, h->act, 1);
    const mil_linear *both[2] = {&up, &down};
    double seconds =
        timing_of(h, CALLS, [&](int i) { return h->gpu.ops->linear_forward(&h->gpu, both[i % 2], 1); });
    const void *arrays[] = {up.x, up.weight, up.y, down.x, down.y};
    for (int i = 0; i < 5; i++) {
        timing_need(cudaFree((void *)arrays[i]));
    }
    return 2.0 * (double)rows * (double)hidden * (double)intermediate / seconds;
}

static double
product_flops(const mil_model *model, int64_t rows)
{
    double weights = 0;
    for (int64_t i = 0; i < model->parameter_count; i++) {
        const mil_parameter *p = &model->parameters[i];
        weights += p->matrix && p->layer >= 0 && p->data != NULL ? (double)p->count : 0.0;
    }
    return 2.0 * weights * (double)rows;
}

/* The table without operator `i`, its name; NULL after the last. */
static const char *
leave_out(int i, const mil_ops *all, mil_ops *ops)
{
    static const char *const names[] = {"linear", "attention", "rope_append", "conv1d",
                                        "ssd",    "scan",      "norm",        "glu"};
    enum { COUNT = sizeof names / sizeof *names };
    *ops = *all;
    if (i == 0) {
        ops->linear_forward = skip_linear;
        ops->project = NULL;
    }
    ops->attention_forward = i == 1 ? skip<mil_attention> : ops->attention_forward;
    ops->rope_append = i == 2 ? skip_rope_append : ops->rope_append;
    ops->conv1d_forward = i == 3 ? skip<mil_conv1d> : ops->conv1d_forward;
    ops->ssd_forward = i == 4 ? skip<mil_ssd> : ops->ssd_forward;
    ops->scan_forward = i == 5 ? skip<mil_scan> : ops->scan_forward;
    ops->norm_forward = i == 6 ? skip<mil_norm> : ops->norm_forward;
    ops->glu_forward = i == 7 ? skip<mil_glu> : ops->glu_forward;
    return i < COUNT ? names[i] : NULL;
}

int
main(int argc, char **argv)
{
    int64_t n[9] = {8, 2048, 4096, 32, 32, 8, 14336, 128256, 2};
    for (int i = 1; i < argc && i <= 9; i++) {
        n[i - 1] = atoll(argv[i]);
    }
    if (n[0] < 1 || n[0] > 64 || n[1] < 1) {
        printf("prefill: 1 to 64 prompts of at least one token\n");
        return 2;
    }
    static harness h;
    harness_begin(&h, MIL_BF16);
    const mil_ops all = *h.gpu.ops;
    mil_ops ops = all;
    h.gpu.ops = &ops;
    const model_shape shape = {n[2], n[3], n[4], n[5], n[6], n[7], n[8]};
    mil_model *model = model_random(&h, &shape, h.act, &ops);
    prompts p = {n[0], n[1], NULL, NULL, NULL};
    const int64_t rows = p.count * p.tokens;
    p.token = (int32_t *)malloc((size_t)rows * sizeof *p.token);
    p.states = (mil_state *)calloc((size_t)p.count, sizeof *p.states);
    p.logits = (float *)malloc((size_t)(p.count * shape.vocab) * sizeof *p.logits);
    for (int64_t i = 0; i < rows; i++) {
        p.token[i] = (int32_t)((uint64_t)i * 2654435761u % (uint64_t)shape.vocab);
    }
    for (int64_t i = 0; i < p.count; i++) {
        harness_need(mil_state_init(&p.states[i], model, p.tokens));
    }
    double rate = product_rate(&h, rows, shape.hidden, shape.intermediate),
           flops = product_flops(model, rows);
    printf("mixer %lld, %lld x %lld: products alone %.0f Tflop/s\n", (long long)shape.mixer,
           (long long)p.count, (long long)p.tokens, rate * 1e-12);
    for (int64_t at_once = 1; at_once <= p.count; at_once++) {
        if (p.count % at_once == 0) {
            double seconds = time_prompts(&h.gpu, model, &p, at_once, 2);
            printf("%6lld rows a pass %8.1f ms %9.0f tokens/s  products at %5.1f %% of their rate\n",
                   (long long)(at_once * p.tokens), seconds * 1e3, (double)rows / seconds,
                   100 * flops / seconds / rate);
        }
    }
    double whole = time_prompts(&h.gpu, model, &p, p.count, 2);
    const char *name;
    for (int i = 0; (name = leave_out(i, &all, &ops)) != NULL; i++) {
        double without = time_prompts(&h.gpu, model, &p, p.count, 1);
        printf("without %-12s %8.1f ms: it costs %7.1f ms\n", name, without * 1e3, (whole - without) * 1e3);
    }
    printf("products alone, again: %.0f Tflop/s\n",
           product_rate(&h, rows, shape.hidden, shape.intermediate) * 1e-12);
    return 0;
}
