/* Mamba-1's selective scan on the device against the CPU's, and its bits in any company. */
#include "mixers.h"

typedef struct scan_case {
    int64_t inner, state_dim, B_groups, C_groups, x_repeat, x_repeat_group;
    bool gate;
    float A_log, dt_bias; /* the largest */
} scan_case;

typedef struct scan_parameters {
    scan_case size;
    harness_array dt_bias, A_log, D;
} scan_parameters;

static void
run(harness *h, const mixer_case *c, bool gpu, const mil_rows *rows, const void *inputs, void *y,
    const mil_mixer_state *states)
{
    const scan_parameters *p = (const scan_parameters *)c->arguments;
    const scan_case *s = &p->size;
    int64_t at[5] = {0, c->x, c->x + c->dt, c->x + c->dt + c->B};
    at[4] = at[3] + s->C_groups * s->state_dim;
    mil_scan a = {};
    a.rows = *rows;
    a.inner = s->inner;
    a.state_dim = s->state_dim;
    a.B_groups = s->B_groups;
    a.C_groups = s->C_groups;
    a.x_repeat = s->x_repeat;
    a.x_repeat_group = s->x_repeat_group;
    a.x = mixer_at(h, gpu, inputs, at[0]);
    a.dt = mixer_at(h, gpu, inputs, at[1]);
    a.B = mixer_at(h, gpu, inputs, at[2]);
    a.C = mixer_at(h, gpu, inputs, at[3]);
    a.z = s->gate ? mixer_at(h, gpu, inputs, at[4]) : NULL;
    a.x_stride = a.dt_stride = a.B_stride = a.C_stride = a.z_stride = c->width;
    a.dt_bias = (const float *)mixer_side(&p->dt_bias, gpu);
    a.A_log = (const float *)mixer_side(&p->A_log, gpu);
    a.D = (const float *)mixer_side(&p->D, gpu);
    a.dt_bias_scale = 2;
    a.dt_min = 0;
    a.dt_max = 1e4f;
    a.y = y;
    a.y_stride = c->y_width;
    a.states = states;
    mil_context *context = gpu ? &h->gpu : &h->cpu;
    harness_check(h, context->ops->scan_forward(context, &a));
}

static mixer_case
make_case(harness *h, const scan_case *size, scan_parameters *p)
{
    mixer_case c = {};
    p->size = *size;
    p->dt_bias = mixer_parameters(h, size->inner, -3, size->dt_bias);
    p->A_log = mixer_parameters(h, size->inner * size->state_dim, -3, size->A_log);
    p->D = mixer_parameters(h, size->inner, -1, 1);
    snprintf(c.name, sizeof c.name, "scan %lld x %lld, B %lld, C %lld, repeat %lld", (long long)size->inner,
             (long long)size->state_dim, (long long)size->B_groups, (long long)size->C_groups,
             (long long)size->x_repeat);
    c.x = size->inner / size->x_repeat;
    c.B = size->B_groups * size->state_dim;
    c.dt = size->inner;
    c.width = c.x + c.dt + c.B + size->C_groups * size->state_dim + (size->gate ? size->inner : 0);
    c.width += size->inner % 8 == 0 ? (8 - c.width % 8) % 8 : 1;
    c.y_width = size->inner;
    c.state = size->inner * size->state_dim;
    c.tolerance = 2 * mixer_tolerance(h);
    c.arguments = p;
    c.run = run;
    return c;
}

int
main(void)
{
    static const scan_case cases[] = {
        {64, 16, 1, 1, 1, 1, true, 2.8f, 0},      {256, 16, 4, 16, 4, 16, true, 2.8f, 0},
        {48, 16, 2, 4, 1, 1, false, 2.8f, 0},     {50, 5, 2, 5, 1, 1, true, 2.8f, 0},
        {96, 64, 3, 1, 2, 16, true, 2.8f, 0},     {32, 200, 1, 1, 1, 1, false, 2.8f, 0},
        {2048, 16, 16, 128, 1, 1, true, 2.8f, 0}, {128, 8, 1, 1, 1, 1, true, 2.8f, 0},
        {64, 16, 1, 1, 1, 1, true, 7, 80},        {64, 16, 1, 1, 1, 1, true, -2, -2.9f},
        {36, 32, 12, 36, 1, 1, true, 2.8f, 0},    {6144, 16, 96, 384, 1, 1, true, 2.8f, 0},
        {6144, 32, 2, 1, 1, 1, false, 2.8f, 0}, /* 16 channels a warp */
        {64, 64, 8, 8, 1, 1, true, 2.8f, 0},    /* too many columns of B and C for a block */
    };
    static const mil_dtype types[] = {MIL_F32, MIL_BF16, MIL_F16};
    static harness h;
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        harness_begin(&h, types[t]);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            scan_parameters p;
            mixer_case c = make_case(&h, &cases[i], &p);
            mixer_test_parity(&h, &c);
            c = make_case(&h, &cases[i], &p);
            mixer_test_bits(&h, &c);
        }
        harness_close(&h);
    }
    return harness_end(&h, "scan");
}
