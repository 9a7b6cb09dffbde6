/* A Mamba-2 mixer's convolution and scan in one launch (mil_ssd_mixer) against the CPU's operators, against the device's own
 * operators one by one, and its bits in any company. */
#include "mixers.h"

typedef struct ssd_mixer_case {
    int64_t heads, head_dim, state_dim, x_heads, B_groups, C_groups, taps;
    bool conv_bias;
} ssd_mixer_case;

typedef struct ssd_mixer_parameters {
    ssd_mixer_case size;
    bool apart; /* CUDA's operators one by one */
    harness_array dt_bias, A_log, D, conv, conv_bias;
} ssd_mixer_parameters;

static const float *
of(const harness_array *a, bool gpu)
{
    return gpu ? (const float *)a->gpu : a->cpu;
}

/* A row of inputs is [z | x | B | C | dt]. */
static void
run(harness *h, const mixer_case *c, bool gpu, const mil_rows *rows, const void *inputs, void *y,
    const mil_mixer_state *states)
{
    const ssd_mixer_parameters *p = (const ssd_mixer_parameters *)c->arguments;
    const ssd_mixer_case *s = &p->size;
    mil_context *context = gpu ? &h->gpu : &h->cpu;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    const size_t size = gpu ? mil_dtype_size(h->act) : 4;
    const int64_t n = rows->rows, inner = s->heads * s->head_dim;
    void *convolved;
    harness_need(mil_arena_push(context->scratch, (size_t)(n * c->conv), size, &convolved));
    mil_ssd_mixer m = {};
    m.conv.rows = *rows;
    m.conv.channels = c->conv;
    m.conv.width = s->taps;
    m.conv.repeat = m.conv.repeat_group = 1;
    m.conv.x = mixer_at(h, gpu, inputs, inner);
    m.conv.x_stride = c->width;
    m.conv.weight = of(&p->conv, gpu);
    m.conv.bias = s->conv_bias ? of(&p->conv_bias, gpu) : NULL;
    m.conv.silu = true;
    m.conv.y = convolved;
    m.conv.y_stride = c->conv;
    m.conv.states = states;
    m.ssd.rows = *rows;
    m.ssd.heads = s->heads;
    m.ssd.head_dim = s->head_dim;
    m.ssd.state_dim = s->state_dim;
    m.ssd.x_heads = s->x_heads;
    m.ssd.B_groups = s->B_groups;
    m.ssd.C_groups = s->C_groups;
    m.ssd.x = convolved;
    m.ssd.B = mixer_at(h, gpu, convolved, c->x);
    m.ssd.C = mixer_at(h, gpu, convolved, c->x + c->B);
    m.ssd.x_stride = m.ssd.B_stride = m.ssd.C_stride = c->conv;
    m.ssd.dt = mixer_at(h, gpu, inputs, inner + c->conv);
    m.ssd.dt_stride = c->width;
    m.ssd.dt_bias = of(&p->dt_bias, gpu);
    m.ssd.A_log = of(&p->A_log, gpu);
    m.ssd.D = of(&p->D, gpu);
    m.ssd.dt_max = 1e4f;
    m.ssd.y = y;
    m.ssd.y_stride = c->y_width;
    m.ssd.states = states;
    harness_check(h, gpu && !p->apart ? mil_cuda_ssd_mixer(context, &m) : mil_ssd_mixer_apart(context, &m));
    mil_arena_rewind(context->scratch, mark);
}

static mixer_case
make_case(harness *h, const ssd_mixer_case *s, ssd_mixer_parameters *p)
{
    mixer_case c = {};
    const int64_t inner = s->heads * s->head_dim;
    memset(p, 0, sizeof *p);
    p->size = *s;
    c.x = s->x_heads * s->head_dim;
    c.B = s->B_groups * s->state_dim;
    c.dt = s->heads;
    c.conv = c.x + c.B + s->C_groups * s->state_dim;
    c.conv_rows = s->taps - 1 + MIL_TAIL;
    c.width = inner + c.conv + c.dt;
    c.width += (8 - c.width % 8) % 8;
    c.y_width = inner;
    c.state = inner * s->state_dim;
    c.tolerance = 4 * mixer_tolerance(h);
    c.tail_tolerance = c.tolerance;
    p->dt_bias = mixer_parameters(h, s->heads, -3, 0);
    p->A_log = mixer_parameters(h, s->heads, -3, 2.8f);
    p->D = mixer_parameters(h, s->heads, -1, 1);
    p->conv = mixer_parameters(h, c.conv * s->taps, -1, 1);
    p->conv_bias = mixer_parameters(h, c.conv, -1, 1);
    snprintf(c.name, sizeof c.name, "ssd mixer %lld x %lld x %lld, x %lld, B %lld, C %lld",
             (long long)s->heads, (long long)s->head_dim, (long long)s->state_dim, (long long)s->x_heads,
             (long long)s->B_groups, (long long)s->C_groups);
    c.arguments = p;
    c.run = run;
    return c;
}

/* Calls of at most 16 rows in all, some with rows taken back, and prompts in between. */
static const mixer_call calls[] = {
    {{1, 5, 10}, {0, 2, 0}}, {{4, 8, 3}, {0, 0, 3}}, {{20, 12, 16}, {0, 5, 15}},
    {{9, 6, 1}, {4, 6, 0}},  {{16, 0, 0}, {}},       {{0, 16, 0}, {}},
    {{0, 0, 16}, {0, 0, 1}}, {{5, 5, 5}, {0, 1, 2}}, {{1, 1, 1}, {}},
    {{130, 16, 1}, {}},      {{3, 9, 0}, {1, 9, 0}}, {{2, 3, 11}, {}},
    {{8, 7, 1}, {}},         {{1, 1, 14}, {}},       {{12, 2, 2}, {}},
    {{1, 1, 1}, {}},         {{9, 3, 4}, {}},        {{1, 1, 1}, {}},
    {{5, 5, 5}, {}},         {{1, 15, 0}, {}},
};

static void
test_parity(harness *h, const mixer_case *c)
{
    static const int64_t streams[] = {1, 2, 3};
    if (harness_turn(h)) {
        mixer_session(h, c, 3, streams, calls, sizeof calls / sizeof *calls, false, true, NULL);
        harness_reset(h);
    }
}

/* One by one, in a batch and operator by operator. */
static void
test_bits(harness *h, const mixer_case *c, ssd_mixer_parameters *p)
{
    enum { TOKENS = 75 };
    if (!harness_turn(h)) {
        return;
    }
    static const int64_t first[] = {7}, batch[] = {4, 7, 5};
    static const mixer_call one = {{1}, {}};
    static const mixer_call windows[] = {
        {{5}, {3}},  {{16}, {0}}, {{4}, {0}},  {{16}, {14}}, {{16}, {6}},
        {{16}, {0}}, {{2}, {0}},  {{16}, {0}}, {{15}, {}},
    }; /* keeps 2, 18, 22, 24, 34, 50, 52, 68, 83 tokens */
    static const mixer_call batched[] = {
        {{1, 4, 8}, {}}, {{3, 12, 1}, {}}, {{2, 9, 5}, {0, 0, 5}}, {{1, 14, 1}, {}}, {{1, 4, 1}, {}},
        {{6, 9, 1}, {}}, {{3, 3, 3}, {}},  {{1, 9, 1}, {}},        {{2, 13, 1}, {}},
    }; /* the second: 77 tokens */
    mixer_call single[TOKENS];
    for (int i = 0; i < TOKENS; i++) {
        single[i] = one;
    }
    float *y[4];
    for (int i = 0; i < 4; i++) {
        y[i] = (float *)malloc(4 * TOKENS * (size_t)c->y_width * sizeof(float));
    }
    mixer_session(h, c, 1, first, single, TOKENS, false, false, y);
    mixer_session(h, c, 1, first, windows, sizeof windows / sizeof *windows, false, false, y + 1);
    mixer_same_rows(h, c, "in windows", y[1], y[0], TOKENS);
    mixer_session(h, c, 3, batch, batched, sizeof batched / sizeof *batched, false, false, y + 1);
    mixer_same_rows(h, c, "second of a batch", y[2], y[0], TOKENS);
    p->apart = true;
    mixer_session(h, c, 1, first, windows, sizeof windows / sizeof *windows, false, false, y + 1);
    mixer_same_rows(h, c, "operator by operator", y[1], y[0], TOKENS);
    for (int i = 0; i < 4; i++) {
        free(y[i]);
    }
    harness_reset(h);
}

int
main(void)
{
    static const ssd_mixer_case cases[] = {
        {4, 64, 128, 4, 1, 1, 4, true}, {8, 128, 128, 2, 2, 8, 4, true},  {6, 36, 60, 3, 2, 6, 3, false},
        {2, 32, 256, 2, 1, 2, 4, true}, {80, 64, 128, 80, 1, 1, 4, true}, {4, 100, 20, 1, 4, 1, 2, true},
    };
    static const mil_dtype types[] = {MIL_BF16, MIL_F16};
    static harness h;
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        harness_begin(&h, types[t]);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            ssd_mixer_parameters p;
            mixer_case c = make_case(&h, &cases[i], &p);
            test_parity(&h, &c);
            c = make_case(&h, &cases[i], &p);
            test_bits(&h, &c, &p);
        }
        harness_close(&h);
    }
    return harness_end(&h, "ssd mixer");
}
