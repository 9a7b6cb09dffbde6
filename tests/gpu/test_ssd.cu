/* Mamba-2's SSD on the device against the CPU's, and its bits in any company. */
#include "mixers.h"
#include "ssd_sizes.h"

typedef struct ssd_case {
    ssd_sizes sizes;
    float A_log, dt_bias; /* the largest */
} ssd_case;

typedef struct ssd_parameters {
    ssd_sizes sizes;
    harness_array dt_bias, A_log, D;
} ssd_parameters;

static void
run(harness *h, const mixer_case *c, bool gpu, const mil_rows *rows, const void *inputs, void *y,
    const mil_mixer_state *states)
{
    const ssd_parameters *p = (const ssd_parameters *)c->arguments;
    mil_ssd a = ssd_of(&p->sizes, inputs, c->width, (int64_t)mil_dtype_size(gpu ? h->act : MIL_F32));
    a.rows = *rows;
    a.dt_bias = (const float *)mixer_side(&p->dt_bias, gpu);
    a.A_log = (const float *)mixer_side(&p->A_log, gpu);
    a.D = (const float *)mixer_side(&p->D, gpu);
    a.dt_min = 0.001f;
    a.y = y;
    a.states = states;
    mil_context *context = gpu ? &h->gpu : &h->cpu;
    harness_check(h, context->ops->ssd_forward(context, &a));
}

static mixer_case
make_case(harness *h, const ssd_case *given, ssd_parameters *p)
{
    const ssd_sizes *size = &given->sizes;
    mixer_case c = {};
    p->sizes = *size;
    p->dt_bias = mixer_parameters(h, size->heads, -4, given->dt_bias);
    p->A_log = mixer_parameters(h, size->heads, -3, given->A_log);
    p->D = mixer_parameters(h, size->heads, -1, 1);
    snprintf(c.name, sizeof c.name, "ssd %lld x %lld x %lld, x %lld, B %lld, C %lld", (long long)size->heads,
             (long long)size->head_dim, (long long)size->state_dim, (long long)size->x_heads,
             (long long)size->B_groups, (long long)size->C_groups);
    c.x = size->x_heads * size->head_dim;
    c.B = size->B_groups * size->state_dim;
    c.dt = size->heads;
    c.width = ssd_width(size) + size->heads;
    c.width += c.x % 8 == 0 ? (8 - c.width % 8) % 8 : 1;
    c.y_width = size->heads * size->head_dim;
    c.state = size->heads * size->head_dim * size->state_dim;
    c.tolerance = 2 * mixer_tolerance(h);
    c.arguments = p;
    c.run = run;
    return c;
}

/* Prompts of several segments, and one of one; behind states with tails, and alone. */
static void
test_segments(harness *h, const mixer_case *c)
{
    if (!harness_turn(h)) {
        return;
    }
    static const int64_t streams[] = {1, 2, 3};
    static const mixer_call calls[] = {{{5, 1, 0}, {}}, {{1100, 1400, 500}, {}}, {{3, 4, 1}, {}}};
    mixer_session(h, c, 3, streams, calls, sizeof calls / sizeof *calls, false, true, NULL);
    mixer_session(h, c, 3, streams, calls + 1, 1, true, true, NULL);
    harness_reset(h);
}

int
main(void)
{
    static const ssd_case cases[] = {
        {{4, 64, 128, 4, 1, 1}, 2.5f, 1},  {{8, 128, 128, 2, 2, 8}, 2.5f, 1},
        {{3, 128, 64, 3, 3, 3}, 2.5f, 1},  {{6, 20, 16, 3, 2, 6}, 2.5f, 1},
        {{2, 7, 33, 1, 1, 2}, 2.5f, 1},    {{2, 64, 256, 2, 1, 1}, 2.5f, 1},
        {{2, 128, 300, 2, 2, 1}, 2.5f, 1}, {{32, 128, 128, 8, 8, 32}, 2.5f, 1},
        {{4, 64, 64, 4, 1, 1}, 6, 60},     {{2, 128, 128, 2, 1, 1}, -2, -3.9f},
    };
    static const mil_dtype types[] = {MIL_F32, MIL_BF16, MIL_F16};
    static harness h;
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        harness_begin(&h, types[t]);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            ssd_parameters p;
            mixer_case c = make_case(&h, &cases[i], &p);
            mixer_test_parity(&h, &c);
            c = make_case(&h, &cases[i], &p);
            mixer_test_bits(&h, &c);
            if (types[t] != MIL_F32) {
                c = make_case(&h, &cases[i], &p);
                test_segments(&h, &c);
            }
        }
        harness_close(&h);
    }
    return harness_end(&h, "ssd");
}
