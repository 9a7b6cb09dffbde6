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
    a.weight = gpu ? (const float *)p->weight.gpu : p->weight.cpu;
    a.bias = !p->size.bias ? NULL : gpu ? (const float *)p->bias.gpu : p->bias.cpu;
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
        harness_close(&h);
    }
    return harness_end(&h, "conv1d");
}
