/* A whole Mamba-1 mixer on the device (mil_scan_mixer) against the CPU's operators, against the device's own operators one
 * by one, and its bits in any company. */
#include "mixers.h"

typedef struct scan_mixer_case {
    int64_t inner, state_dim, B_groups, C_groups, repeat; /* repeat: of conv inputs, in runs of state_dim */
    int64_t taps, rank;
    bool x_proj, norms, gate, conv_bias;
} scan_mixer_case;

typedef struct scan_mixer_parameters {
    scan_mixer_case size;
    bool apart; /* CUDA's operators one by one */
    harness_array dt_bias, A_log, D, conv, conv_bias, W_x, W_dt, norm[3];
} scan_mixer_parameters;

static mil_linear
product(const harness *h, bool gpu, int64_t rows, const void *x, int64_t x_stride,
        const harness_array *weight, int64_t in, int64_t out, void *y)
{
    mil_linear p = {};
    p.rows = rows;
    p.in = in;
    p.out = out;
    p.x = x;
    p.x_stride = x_stride;
    p.weight = mixer_side(weight, gpu);
    p.dtype = gpu ? h->act : MIL_F32;
    p.y = y;
    p.y_stride = out;
    return p;
}

/* A row of inputs is [raw | z | low | B | C], without the last three where they come from x. */
static void
run(harness *h, const mixer_case *c, bool gpu, const mil_rows *rows, const void *inputs, void *y,
    const mil_mixer_state *states)
{
    const scan_mixer_parameters *p = (const scan_mixer_parameters *)c->arguments;
    const scan_mixer_case *s = &p->size;
    mil_context *context = gpu ? &h->gpu : &h->cpu;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    const size_t size = gpu ? mil_dtype_size(h->act) : 4;
    const int64_t n = rows->rows, raw = s->inner / s->repeat, B = s->B_groups * s->state_dim;
    const int64_t C = s->C_groups * s->state_dim, width = s->rank + B + C;
    void *x, *dt, *projected, *normed;
    harness_need(mil_arena_push(context->scratch, (size_t)(n * s->inner), size, &x));
    harness_need(mil_arena_push(context->scratch, (size_t)(n * s->inner), size, &dt));
    harness_need(mil_arena_push(context->scratch, (size_t)(n * width), size, &projected));
    harness_need(mil_arena_push(context->scratch, (size_t)(n * width), size, &normed));
    const void *z = mixer_at(h, gpu, inputs, raw), *low = mixer_at(h, gpu, inputs, raw + s->inner);
    int64_t stride = c->width;
    if (s->x_proj) {
        low = s->norms ? normed : projected;
        stride = width;
    }
    mil_scan_mixer m = {};
    m.conv.rows = *rows;
    m.conv.channels = s->inner;
    m.conv.width = s->taps;
    m.conv.repeat = s->repeat;
    m.conv.repeat_group = s->repeat == 1 ? 1 : s->state_dim;
    m.conv.x = inputs;
    m.conv.x_stride = c->width;
    m.conv.weight = (const float *)mixer_side(&p->conv, gpu);
    m.conv.bias = s->conv_bias ? (const float *)mixer_side(&p->conv_bias, gpu) : NULL;
    m.conv.silu = true;
    m.conv.y = x;
    m.conv.y_stride = s->inner;
    m.conv.states = states;
    if (s->x_proj) {
        m.x_proj = product(h, gpu, n, x, s->inner, &p->W_x, s->inner, width, projected);
    }
    const int64_t at[4] = {0, s->rank, s->rank + B, width};
    m.norm_count = s->norms ? 3 : 0;
    for (int i = 0; i < m.norm_count; i++) {
        m.norms[i].rows = n;
        m.norms[i].width = m.norms[i].group = at[i + 1] - at[i];
        m.norms[i].x = mixer_at(h, gpu, projected, at[i]);
        m.norms[i].weight = i == 1 ? NULL : (const float *)mixer_side(&p->norm[i], gpu);
        m.norms[i].eps = 1e-5f;
        m.norms[i].y = (void *)mixer_at(h, gpu, normed, at[i]);
        m.norms[i].x_stride = m.norms[i].y_stride = width;
    }
    m.dt = product(h, gpu, n, low, stride, &p->W_dt, s->rank, s->inner, dt);
    m.scan.rows = *rows;
    m.scan.inner = s->inner;
    m.scan.state_dim = s->state_dim;
    m.scan.B_groups = s->B_groups;
    m.scan.C_groups = s->C_groups;
    m.scan.x_repeat = m.scan.x_repeat_group = 1;
    m.scan.x = x;
    m.scan.x_stride = s->inner;
    m.scan.dt = dt;
    m.scan.dt_stride = s->inner;
    m.scan.B = mixer_at(h, gpu, low, s->rank);
    m.scan.C = mixer_at(h, gpu, low, s->rank + B);
    m.scan.B_stride = m.scan.C_stride = stride;
    m.scan.z = s->gate ? z : NULL;
    m.scan.z_stride = c->width;
    m.scan.dt_bias = (const float *)mixer_side(&p->dt_bias, gpu);
    m.scan.A_log = (const float *)mixer_side(&p->A_log, gpu);
    m.scan.D = (const float *)mixer_side(&p->D, gpu);
    m.scan.dt_bias_scale = 2;
    m.scan.dt_max = 1e4f;
    m.scan.y = y;
    m.scan.y_stride = c->y_width;
    m.scan.states = states;
    harness_check(h, gpu && !p->apart ? mil_cuda_scan_mixer(context, &m) : mil_scan_mixer_apart(context, &m));
    mil_arena_rewind(context->scratch, mark);
}

static mixer_case
make_case(harness *h, const scan_mixer_case *size, scan_mixer_parameters *p)
{
    mixer_case c = {};
    const scan_mixer_case *s = size;
    const int64_t B = s->B_groups * s->state_dim, C = s->C_groups * s->state_dim, width = s->rank + B + C;
    memset(p, 0, sizeof *p);
    p->size = *size;
    p->dt_bias = mixer_parameters(h, s->inner, -3, 0);
    p->A_log = mixer_parameters(h, s->inner * s->state_dim, -3, 2.8f);
    p->D = mixer_parameters(h, s->inner, -1, 1);
    p->conv = mixer_parameters(h, s->inner * s->taps, -1, 1);
    p->conv_bias = mixer_parameters(h, s->inner, -1, 1);
    p->W_x = harness_random(h, s->inner * width, 3.0f / sqrtf((float)s->inner));
    p->W_dt = harness_random(h, s->inner * s->rank, 1.0f / sqrtf((float)s->rank));
    for (int i = 0; i < 3; i++) {
        p->norm[i] = mixer_parameters(h, i == 0 ? s->rank : i == 1 ? B : C, 0.5f, 1.5f);
    }
    snprintf(c.name, sizeof c.name, "scan mixer %lld x %lld, B %lld, C %lld, repeat %lld, rank %lld%s%s",
             (long long)s->inner, (long long)s->state_dim, (long long)s->B_groups, (long long)s->C_groups,
             (long long)s->repeat, (long long)s->rank, s->x_proj ? ", x_proj" : "",
             s->norms ? ", norms" : "");
    c.conv = s->inner / s->repeat;
    c.conv_rows = s->taps - 1 + MIL_TAIL;
    c.x = s->inner;
    c.B = B;
    c.dt = s->inner;
    c.width = c.conv + s->inner + (s->x_proj ? 0 : width);
    c.width += (8 - c.width % 8) % 8;
    c.y_width = s->inner;
    c.state = s->inner * s->state_dim;
    c.tolerance = (s->x_proj ? 6 : 4) * mixer_tolerance(h);
    c.tail_tolerance = h->act == MIL_F32 ? 2e-5 : c.tolerance;
    c.arguments = p;
    c.run = run;
    return c;
}

int
main(void)
{
    static const scan_mixer_case cases[] = {
        {160, 16, 1, 1, 1, 4, 160, true, false, true, true},
        {64, 16, 1, 1, 1, 4, 48, true, true, true, true},
        {512, 8, 1, 1, 1, 2, 32, true, false, true, false},
        {96, 32, 1, 1, 1, 3, 24, true, true, false, true},
        {64, 64, 1, 1, 1, 4, 16, true, true, true, true},
        {288, 20, 1, 1, 1, 3, 296, true, false, true, true},
        {5120, 16, 1, 1, 1, 4, 160, true, false, true, true},
        {1536, 16, 1, 1, 1, 4, 48, true, false, true, true},
        {2048, 16, 1, 1, 1, 4, 64, true, true, true, true},
        {768, 20, 1, 1, 1, 3, 24, true, true, false, false},
        {256, 64, 1, 1, 1, 2, 8, true, false, true, true},
        {256, 16, 4, 16, 4, 4, 256, false, false, true, true},
        {128, 16, 2, 8, 4, 4, 64, false, false, true, false},
        {64, 16, 4, 4, 1, 8, 8, false, false, true, true},
        {96, 60, 1, 3, 1, 4, 520, false, false, false, true},
        {512, 16, 16, 32, 2, 4, 32, false, false, true, true},
        {4096, 16, 64, 256, 4, 4, 256, false, false, true, true},
    };
    static const mil_dtype types[] = {MIL_BF16, MIL_F16};
    static harness h;
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        harness_begin(&h, types[t]);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            scan_mixer_parameters p;
            mixer_case c = make_case(&h, &cases[i], &p);
            mixer_test_thin_parity(&h, &c);
            c = make_case(&h, &cases[i], &p);
            mixer_test_thin_bits(&h, &c,
                                 p.size.x_proj ? NULL : &p.apart); /* W_x is summed in its own order */
        }
        harness_close(&h);
    }
    return harness_end(&h, "scan mixer");
}
