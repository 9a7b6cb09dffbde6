/* Every operator with workspace, in small: it repeats bit for bit, does not depend on threads where device.h says
 * so, survives the failure of any allocation, and runs from several threads at once.
 *
 * Values are judged against NumPy references in tests/; here it is memory that is on trial.
 */
#include "harness.h"

#include <math.h>
#include <pthread.h>
#include <string.h>

enum {
    ROWS = 37, /* more than two windows, no multiple of one */
    WIDTH = 24,
    OUT = 19,
    HEADS = 4,
    DIM = 6,
    STATE = 8,
    GROUPS = 2,
    TAPS = 4,
    VOCAB = 29,
    RESULT = 4096,
};

enum { LARGEST_TEAM = TEST_TEAM == 1 ? 1 : 5 };

/* Inputs that all cases share, and one case's outputs. */
typedef struct data {
    float *x, *y, *w, *v, *p, *q, *out, *grad;
    uint16_t *half;
    int32_t labels[ROWS];
} data;

static const int64_t offsets[] = {0, 5, ROWS};
static const mil_rows rows = {.rows = ROWS, .sequences = 2, .offsets = offsets};

static data
data_new(void)
{
    data d = {
        .x = random_floats(ROWS * 128, 1),
        .y = random_floats(ROWS * 128, 2),
        .w = random_floats(VOCAB * 128, 3),
        .v = random_floats(ROWS * 128, 4),
        .p = random_floats(1024, 5),
        .q = random_floats(1024, 6),
        .out = random_floats(RESULT, 7),
        .grad = random_floats(4 * RESULT, 8),
        .half = (uint16_t *)random_floats(VOCAB * 64, 9),
    };
    for (int i = 0; i < VOCAB * 128; i++) {
        d.half[i] = mil_float_to_bf16(d.w[i]);
    }
    for (int i = 0; i < ROWS; i++) {
        d.labels[i] = i * 7 % VOCAB;
    }
    return d;
}

/* Outputs start at zero each time: gradients of parameters are added to. */
static void
data_clear(data *d)
{
    memset(d->out, 0, RESULT * sizeof *d->out);
    memset(d->grad, 0, 4 * RESULT * sizeof *d->grad);
}

static void
data_release(data *d)
{
    float *all[] = {d->x, d->y, d->w, d->v, d->p, d->q, d->out, d->grad, (float *)d->half};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        mil_free(all[i]);
    }
}

/* ---- one function a case ----------------------------------------------------------------------------- */

static mil_status
linear_f32(mil_context *context, data *d)
{
    return mil_cpu_ops.linear_forward(context,
                                      &(mil_linear){.rows = ROWS,
                                                    .in = WIDTH,
                                                    .out = OUT,
                                                    .x = d->x,
                                                    .x_stride = WIDTH,
                                                    .weight = d->w,
                                                    .bias = d->p,
                                                    .y = d->out,
                                                    .y_stride = OUT},
                                      1);
}

static mil_status
linear_bf16(mil_context *context, data *d)
{
    mil_linear products[2];
    for (int i = 0; i < 2; i++) {
        products[i] = (mil_linear){.rows = ROWS,
                                   .in = WIDTH,
                                   .out = OUT,
                                   .x = d->x,
                                   .x_stride = WIDTH,
                                   .weight = d->half + i * OUT * WIDTH,
                                   .dtype = MIL_BF16,
                                   .y = d->out + i * OUT,
                                   .y_stride = 2 * OUT};
    }
    return mil_cpu_ops.linear_forward(context, products, 2);
}

static mil_status
linear_back(mil_context *context, data *d)
{
    return mil_cpu_ops.linear_backward(context, &(mil_linear_grad){.rows = ROWS,
                                                                   .in = WIDTH,
                                                                   .out = OUT,
                                                                   .x = d->x,
                                                                   .x_stride = WIDTH,
                                                                   .weight = d->half,
                                                                   .dtype = MIL_BF16,
                                                                   .grad_y = d->y,
                                                                   .grad_y_stride = OUT,
                                                                   .grad_x = d->out,
                                                                   .grad_x_stride = WIDTH,
                                                                   .grad_weight = d->grad,
                                                                   .grad_bias = d->grad + RESULT});
}

static mil_norm
norm_arguments(data *d)
{
    return (mil_norm){.rows = ROWS,
                      .width = WIDTH,
                      .group = WIDTH / 2,
                      .x = d->x,
                      .x_stride = WIDTH,
                      .z = d->v,
                      .z_stride = WIDTH,
                      .weight = d->p,
                      .eps = 1e-5f,
                      .y = d->out,
                      .y_stride = WIDTH};
}

static mil_status
norm(mil_context *context, data *d)
{
    mil_norm a = norm_arguments(d);
    return mil_cpu_ops.norm_forward(context, &a);
}

static mil_status
norm_back(mil_context *context, data *d)
{
    return mil_cpu_ops.norm_backward(context, &(mil_norm_grad){.forward = norm_arguments(d),
                                                               .grad_y = d->y,
                                                               .grad_y_stride = WIDTH,
                                                               .grad_x = d->out,
                                                               .grad_x_stride = WIDTH,
                                                               .grad_z = d->out + RESULT / 2,
                                                               .grad_z_stride = WIDTH,
                                                               .grad_weight = d->grad});
}

static mil_attention
attention_arguments(data *d)
{
    return (mil_attention){.rows = rows,
                           .heads = HEADS,
                           .kv_heads = GROUPS,
                           .head_dim = DIM,
                           .scale = 0.4f,
                           .q = d->x,
                           .q_stride = HEADS * DIM,
                           .k = d->y,
                           .v = d->v,
                           .kv_stride = GROUPS * DIM,
                           .y = d->out,
                           .y_stride = HEADS * DIM,
                           .log_sum_exp = d->grad};
}

static mil_status
attention(mil_context *context, data *d)
{
    mil_attention a = attention_arguments(d);
    return mil_cpu_ops.attention_forward(context, &a);
}

static mil_status
attention_back(mil_context *context, data *d)
{
    mil_attention_grad a = {.forward = attention_arguments(d),
                            .grad_y = d->w,
                            .grad_y_stride = HEADS * DIM,
                            .grad_q = d->grad + RESULT,
                            .grad_k = d->grad + 2 * RESULT,
                            .grad_v = d->grad + 3 * RESULT,
                            .grad_q_stride = HEADS * DIM,
                            .grad_kv_stride = GROUPS * DIM};
    MIL_TRY(mil_cpu_ops.attention_forward(context, &a.forward));
    return mil_cpu_ops.attention_backward(context, &a);
}

static mil_conv1d
conv1d_arguments(data *d)
{
    return (mil_conv1d){.rows = rows,
                        .channels = WIDTH,
                        .width = TAPS,
                        .repeat = 1,
                        .repeat_group = 1,
                        .x = d->x,
                        .x_stride = WIDTH,
                        .weight = d->p,
                        .bias = d->q,
                        .silu = true,
                        .y = d->out,
                        .y_stride = WIDTH};
}

static mil_status
conv1d(mil_context *context, data *d)
{
    mil_conv1d a = conv1d_arguments(d);
    return mil_cpu_ops.conv1d_forward(context, &a);
}

static mil_status
conv1d_back(mil_context *context, data *d)
{
    return mil_cpu_ops.conv1d_backward(context, &(mil_conv1d_grad){.forward = conv1d_arguments(d),
                                                                   .grad_y = d->y,
                                                                   .grad_y_stride = WIDTH,
                                                                   .grad_x = d->out,
                                                                   .grad_x_stride = WIDTH,
                                                                   .grad_weight = d->grad,
                                                                   .grad_bias = d->grad + RESULT});
}

static mil_scan
scan_arguments(data *d)
{
    return (mil_scan){.rows = rows,
                      .inner = WIDTH,
                      .state_dim = STATE,
                      .B_groups = GROUPS,
                      .C_groups = GROUPS,
                      .x_repeat = 1,
                      .x_repeat_group = 1,
                      .x = d->x,
                      .x_stride = WIDTH,
                      .dt = d->y,
                      .dt_stride = WIDTH,
                      .B = d->v,
                      .B_stride = GROUPS * STATE,
                      .C = d->w,
                      .C_stride = GROUPS * STATE,
                      .z = d->v,
                      .z_stride = WIDTH,
                      .dt_bias = d->q,
                      .A_log = d->p,
                      .D = d->q + WIDTH,
                      .dt_bias_scale = 1.0f,
                      .dt_max = INFINITY,
                      .y = d->out,
                      .y_stride = WIDTH};
}

static mil_status
scan(mil_context *context, data *d)
{
    mil_scan a = scan_arguments(d);
    return mil_cpu_ops.scan_forward(context, &a);
}

static mil_status
scan_back(mil_context *context, data *d)
{
    return mil_cpu_ops.scan_backward(context, &(mil_scan_grad){.forward = scan_arguments(d),
                                                               .grad_y = d->y,
                                                               .grad_y_stride = WIDTH,
                                                               .grad_x = d->out,
                                                               .grad_x_stride = WIDTH,
                                                               .grad_dt = d->out + RESULT / 2,
                                                               .grad_dt_stride = WIDTH,
                                                               .grad_B = d->grad,
                                                               .grad_B_stride = GROUPS * STATE,
                                                               .grad_C = d->grad + RESULT / 2,
                                                               .grad_C_stride = GROUPS * STATE,
                                                               .grad_z = d->grad + RESULT,
                                                               .grad_z_stride = WIDTH,
                                                               .grad_dt_bias = d->grad + 2 * RESULT,
                                                               .grad_A_log = d->grad + 3 * RESULT,
                                                               .grad_D = d->grad + 3 * RESULT + RESULT / 2});
}

static mil_ssd
ssd_arguments(data *d)
{
    return (mil_ssd){.rows = rows,
                     .heads = HEADS,
                     .head_dim = DIM,
                     .state_dim = STATE,
                     .x_heads = GROUPS,
                     .B_groups = GROUPS,
                     .C_groups = 1,
                     .x = d->x,
                     .x_stride = GROUPS * DIM,
                     .B = d->v,
                     .B_stride = GROUPS * STATE,
                     .C = d->w,
                     .C_stride = STATE,
                     .dt = d->y,
                     .dt_stride = HEADS,
                     .dt_bias = d->q,
                     .A_log = d->p,
                     .D = d->q + HEADS,
                     .dt_max = INFINITY,
                     .y = d->out,
                     .y_stride = HEADS * DIM};
}

static mil_status
ssd(mil_context *context, data *d)
{
    mil_ssd a = ssd_arguments(d);
    return mil_cpu_ops.ssd_forward(context, &a);
}

static mil_status
ssd_back(mil_context *context, data *d)
{
    return mil_cpu_ops.ssd_backward(context, &(mil_ssd_grad){.forward = ssd_arguments(d),
                                                             .grad_y = d->y,
                                                             .grad_y_stride = HEADS * DIM,
                                                             .grad_x = d->out,
                                                             .grad_x_stride = GROUPS * DIM,
                                                             .grad_B = d->grad,
                                                             .grad_B_stride = GROUPS * STATE,
                                                             .grad_C = d->grad + RESULT,
                                                             .grad_C_stride = STATE,
                                                             .grad_dt = d->grad + 2 * RESULT,
                                                             .grad_dt_stride = HEADS,
                                                             .grad_dt_bias = d->grad + 3 * RESULT,
                                                             .grad_A_log = d->grad + 3 * RESULT + 64,
                                                             .grad_D = d->grad + 3 * RESULT + 128});
}

static mil_status
loss(mil_context *context, data *d)
{
    mil_linear_loss a = {.rows = ROWS,
                         .vocab = VOCAB,
                         .hidden = WIDTH,
                         .x = d->x,
                         .x_stride = WIDTH,
                         .weight = d->half,
                         .dtype = MIL_BF16,
                         .logit_scale = 1.0f,
                         .teacher_hidden = WIDTH,
                         .teacher_x = d->y,
                         .teacher_x_stride = WIDTH,
                         .teacher_weight = d->w,
                         .teacher_logit_scale = 1.0f,
                         .labels = d->labels,
                         .kl_weight = 1.0f,
                         .ce_weight = 0.5f,
                         .temperature = 2.0f,
                         .scale = 0.1f,
                         .grad_x = d->out,
                         .grad_x_stride = WIDTH,
                         .grad_weight = d->grad};
    return mil_cpu_ops.linear_loss(context, &a);
}

/* Stored likeliest tokens in the teacher's place, rows of either sign, and their cross-entropy. */
static mil_status
loss_top(mil_context *context, data *d)
{
    enum { TOP = 3 };
    int32_t tokens[ROWS * TOP];
    float logprobs[ROWS * (TOP + 1)], sign[ROWS];
    double ce[ROWS];
    for (int i = 0; i < ROWS; i++) {
        sign[i] = i % 3 == 0 ? -1.0f : 1.0f;
        for (int k = 0; k <= TOP; k++) {
            logprobs[i * (TOP + 1) + k] = -1.0f - (float)k;
            if (k < TOP) {
                tokens[i * TOP + k] = (i + 5 * k) % VOCAB;
            }
        }
    }
    mil_linear_loss a = {.rows = ROWS,
                         .vocab = VOCAB,
                         .hidden = WIDTH,
                         .x = d->x,
                         .x_stride = WIDTH,
                         .weight = d->half,
                         .dtype = MIL_BF16,
                         .logit_scale = 1.0f,
                         .top = TOP,
                         .top_tokens = tokens,
                         .top_logprobs = logprobs,
                         .labels = d->labels,
                         .row_weight = sign,
                         .kl_weight = 1.0f,
                         .ce_weight = 0.5f,
                         .temperature = 1.0f,
                         .scale = 0.1f,
                         .direction = MIL_KL_JSD,
                         .mix = 0.5f,
                         .row_ce = ce,
                         .grad_x = d->out,
                         .grad_x_stride = WIDTH,
                         .grad_weight = d->grad};
    MIL_TRY(mil_cpu_ops.linear_loss(context, &a));
    double sum = 0;
    for (int i = 0; i < ROWS; i++) {
        sum += (double)sign[i] * ce[i];
    }
    CHECK(fabs(sum - a.sums.ce) < 1e-9);
    return MIL_OK;
}

/* `any_threads`: the outputs are the same bits whatever the size of the team. */
static const struct {
    const char *name;
    mil_status (*run)(mil_context *context, data *d);
    bool any_threads;
} cases[] = {
    {"linear_f32", linear_f32, true},
    {"linear_bf16", linear_bf16, true},
    {"linear_back", linear_back, false},
    {"norm", norm, true},
    {"norm_back", norm_back, true},
    {"attention", attention, true},
    {"attention_back", attention_back, true},
    {"conv1d", conv1d, true},
    {"conv1d_back", conv1d_back, true},
    {"scan", scan, true},
    {"scan_back", scan_back, true},
    {"ssd", ssd, true},
    {"ssd_back", ssd_back, true},
    {"loss", loss, false},
    {"loss_top", loss_top, false},
};
enum { CASES = sizeof cases / sizeof cases[0] };

/* ---- the trials ---------------------------------------------------------------------------------------- */

/* Runs one case into cleared outputs. */
static mil_status
run_case(int i, data *d, mil_arena *arena, int threads)
{
    data_clear(d);
    mil_context context = {.ops = &mil_cpu_ops, .scratch = arena, .host = arena, .threads = threads};
    return cases[i].run(&context, d);
}

static bool
same_outputs(const data *a, const data *b)
{
    return memcmp(a->out, b->out, RESULT * sizeof *a->out) == 0 &&
           memcmp(a->grad, b->grad, 4 * RESULT * sizeof *a->grad) == 0;
}

void
test_operators_repeat(void)
{
    data first = data_new(), second = data_new();
    mil_arena arena = {0};
    for (int i = 0; i < CASES; i++) {
        check_status(run_case(i, &first, &arena, TEST_TEAM), MIL_OK, cases[i].name, __FILE__, __LINE__);
        CHECK(arena.in_use == 0); /* workspace was rewound */
        mil_arena_rewind(&arena, (mil_arena_mark){0});
        check_status(run_case(i, &second, &arena, TEST_TEAM), MIL_OK, cases[i].name, __FILE__, __LINE__);
        mil_arena_rewind(&arena, (mil_arena_mark){0});
        check(same_outputs(&first, &second), cases[i].name, __FILE__, __LINE__);
    }
    mil_arena_release(&arena);
    data_release(&first);
    data_release(&second);
}

void
test_operators_threads(void)
{
    data one = data_new(), many = data_new();
    mil_arena arena = {0};
    for (int i = 0; i < CASES; i++) {
        for (int threads = 2; threads <= LARGEST_TEAM && cases[i].any_threads; threads++) {
            CHECK_OK(run_case(i, &one, &arena, 1));
            CHECK_OK(run_case(i, &many, &arena, threads));
            check(same_outputs(&one, &many), cases[i].name, __FILE__, __LINE__);
        }
    }
    mil_arena_release(&arena);
    data_release(&one);
    data_release(&many);
}

/* Makes the n-th allocation fail for n = 0, 1, 2 ... until the operator gets through. */
void
test_operators_without_memory(void)
{
    data whole = data_new(), d = data_new();
    for (int i = 0; i < CASES; i++) {
        mil_arena arena = {0};
        check_status(run_case(i, &whole, &arena, TEST_TEAM), MIL_OK, cases[i].name, __FILE__, __LINE__);
        mil_arena_release(&arena);
        mil_status status = MIL_ERR_MEMORY;
        for (int allocations = 0; allocations < 100 && status != MIL_OK; allocations++) {
            int64_t blocks = mil_memory_blocks();
            mil_memory_fail_after(allocations);
            status = run_case(i, &d, &arena, TEST_TEAM);
            mil_memory_fail_after(-1);
            check(status == MIL_OK || status == MIL_ERR_MEMORY, cases[i].name, __FILE__, __LINE__);
            CHECK(arena.in_use == 0); /* rewound on failure, too */
            mil_arena_release(&arena);
            CHECK(mil_memory_blocks() == blocks);
        }
        check_status(status, MIL_OK, cases[i].name, __FILE__, __LINE__);
        check(same_outputs(&whole, &d), cases[i].name, __FILE__, __LINE__);
    }
    data_release(&whole);
    data_release(&d);
}

static void *
run_all(void *argument)
{
    data *d = argument;
    mil_arena arena = {0};
    for (int i = 0; i < CASES; i++) {
        check_status(run_case(i, d, &arena, 1), MIL_OK, cases[i].name, __FILE__, __LINE__);
    }
    mil_arena_release(&arena);
    return NULL;
}

void
test_operators_concurrently(void)
{
    enum { THREADS = 3 };
    pthread_t threads[THREADS];
    data own[THREADS];
    for (int i = 0; i < THREADS; i++) {
        own[i] = data_new();
        CHECK(pthread_create(&threads[i], NULL, run_all, &own[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    for (int i = 1; i < THREADS; i++) {
        CHECK(same_outputs(&own[0], &own[i]));
    }
    for (int i = 0; i < THREADS; i++) {
        data_release(&own[i]);
    }
}
