/* The causal convolution on the device against the CPU's, and its bits in any company. */
#include "mixers.h"

typedef struct conv_case {
    int64_t inputs, width, repeat, repeat_group;
    bool silu, bias;
} conv_case;

typedef struct conv_parameters {
    conv_case size;
    harness_array weight, bias;
} conv_parameters;

static void
run(harness *h, const mixer_case *c, bool gpu, const mil_rows *rows, const void *inputs, void *y,
    const mil_mixer_state *states)
{
    const conv_parameters *p = (const conv_parameters *)c->arguments;
    mil_conv1d a = {};
    a.rows = *rows;
    a.channels = p->size.inputs * p->size.repeat;
    a.width = p->size.width;
    a.repeat = p->size.repeat;
    a.repeat_group = p->size.repeat_group;
    a.x = inputs;
    a.x_stride = c->width;
    a.weight = (const float *)mixer_side(&p->weight, gpu);
    a.bias = !p->size.bias ? NULL : (const float *)mixer_side(&p->bias, gpu);
    a.silu = p->size.silu;
    a.y = y;
    a.y_stride = c->y_width;
    a.states = states;
    mil_context *context = gpu ? &h->gpu : &h->cpu;
    harness_check(h, context->ops->conv1d_forward(context, &a));
}

static mixer_case
make_case(harness *h, const conv_case *size, conv_parameters *p)
{
    mixer_case c = {};
    int64_t channels = size->inputs * size->repeat;
    p->size = *size;
    p->weight = mixer_parameters(h, channels * size->width, -1, 1);
    p->bias = mixer_parameters(h, channels, -1, 1);
    snprintf(c.name, sizeof c.name, "conv1d %lld x %lld repeat %lld", (long long)size->inputs,
             (long long)size->width, (long long)size->repeat);
    c.width = size->inputs + (size->inputs % 8 == 0 ? 8 : 1);
    c.y_width = channels;
    c.conv_rows = size->width - 1 + MIL_TAIL;
    c.conv = size->inputs;
    c.tolerance = mixer_tolerance(h);
    c.arguments = p;
    c.run = run;
    return c;
}

/* One row each of many sequences, wherever in their windows they are: the bits of each alone, of y and of the tails. */
static void
test_rows(harness *h, int64_t inputs, int64_t repeat, int64_t repeat_group)
{
    enum { SEQUENCES = 270, WIDTH = 4, STEPS = 3 };
    const int64_t tail = (WIDTH - 1 + MIL_TAIL) * inputs, channels = inputs * repeat;
    const int64_t size = (int64_t)mil_dtype_size(h->act);
    harness_array weight = harness_random_of(h, channels * WIDTH, 1.0f, MIL_F32), tails[2];
    mil_mixer_state states[2][SEQUENCES] = {};
    int64_t offsets[SEQUENCES + 1], past[SEQUENCES], boundary[SEQUENCES], one[2] = {0, 1};
    for (int run = 0; run < 2; run++) {
        h->random = 7;
        tails[run] = harness_random_of(h, SEQUENCES * tail, 1.0f, MIL_F32);
    }
    for (int64_t i = 0; i < SEQUENCES; i++) {
        for (int run = 0; run < 2; run++) {
            states[run][i].conv = (float *)tails[run].gpu + i * tail;
        }
        boundary[i] = i % 7 * MIL_WINDOW;
        past[i] = boundary[i] + i % MIL_TAIL;
        offsets[i] = i;
    }
    offsets[SEQUENCES] = SEQUENCES;
    for (int step = 0; step < STEPS; step++) {
        harness_array x = harness_random(h, SEQUENCES * inputs, 1.0f), y[2];
        y[0] = harness_empty(h, SEQUENCES * channels);
        y[1] = harness_empty(h, SEQUENCES * channels);
        for (int64_t i = -1; i < SEQUENCES; i++) { /* -1: all */
            const int64_t row = i < 0 ? 0 : i;
            mil_conv1d a = {};
            a.rows = i < 0 ? harness_rows(h, SEQUENCES, offsets, past, boundary)
                           : harness_rows(h, 1, one, past + i, boundary + i);
            a.channels = channels;
            a.width = WIDTH;
            a.repeat = repeat;
            a.repeat_group = repeat_group;
            a.x = (const char *)x.gpu + row * inputs * size;
            a.x_stride = inputs;
            a.weight = (const float *)weight.gpu;
            a.silu = true;
            a.y = (char *)y[i >= 0].gpu + row * channels * size;
            a.y_stride = channels;
            a.states = states[i >= 0] + row;
            harness_check(h, h->gpu.ops->conv1d_forward(&h->gpu, &a));
        }
        harness_same_bits(h, "conv1d rows", y[0], 0, y[1], 0, y[0].count);
        harness_same_bits(h, "conv1d rows: tails", tails[0], 0, tails[1], 0, tails[0].count);
        for (int64_t i = 0; i < SEQUENCES; i++) {
            boundary[i] = past[i] - past[i] % MIL_WINDOW;
            past[i]++;
        }
    }
    harness_reset(h);
}

int
main(void)
{
    static const conv_case cases[] = {
        {64, 4, 1, 1, true, true},  {37, 4, 1, 1, true, true},  {256, 2, 1, 1, false, true},
        {96, 3, 1, 1, true, false}, {40, 8, 1, 1, true, true},  {64, 5, 1, 1, false, false},
        {64, 4, 4, 16, true, true}, {24, 4, 3, 12, true, true}, {4352, 4, 1, 1, true, true},
    };
    static const mil_dtype types[] = {MIL_F32, MIL_BF16, MIL_F16};
    static harness h;
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        harness_begin(&h, types[t]);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            conv_parameters p;
            mixer_case c = make_case(&h, &cases[i], &p);
            mixer_test_parity(&h, &c);
            c = make_case(&h, &cases[i], &p);
            mixer_test_bits(&h, &c);
        }
        test_rows(&h, 1032, 1, 1);
        test_rows(&h, 1024, 2, 256);
        harness_close(&h);
    }
    return harness_end(&h, "conv1d");
}
