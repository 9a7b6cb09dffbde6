/* RMSNorm (Zhang & Sennrich 2019), over groups of columns, with or without a gate; forward and backward.
 *
 *   plain              y = u r w             with u = x,  r = 1 / sqrt(mean(u^2) + eps) over each group
 *   gate first         y = u r w             with u = x silu(z)  (Mamba-2 as published)
 *   norm_before_gate   y = u r w silu(z)     with u = x
 *
 * mean is over the `group` columns that share r; w is [width], one [group] for all groups, or absent.
 *
 * Backward recomputes r and silu(z) from the inputs instead of saving them: a group is read twice
 * anyway and stays in the first-level cache between the readings.  With g the gradient of u r w and h = g w,
 *   grad_u = r h - u r^3 mean(u h),     grad_w += g u r (summed over rows)
 *   gate first:        grad_x = grad_u silu(z),  grad_z = grad_u x silu'(z)
 *   norm_before_gate:  g = grad_y silu(z),       grad_z = grad_y u r w silu'(z)
 *
 * Order: sums over a group run in LANES lanes, lane i taking columns i, i + LANES, ..., then the lanes
 * in order.  So a row's bits depend on nothing but the row.  grad_weight is summed over fixed blocks of
 * BLOCK rows and the blocks in order, so threads do not change it either.
 */
#include "cpu/cpu.h"
#include "cpu/vector.h"

#include <math.h>
#include <omp.h>

enum { GRAIN = 32768, BLOCK = 32, LANES = 16 };

/* One group of one row; pointers are at its first column. */
typedef struct span {
    int64_t width;
    const float *x, *z, *weight; /* z and weight may be NULL */
    bool norm_before_gate;
    float eps;
} span;

static span
get_span(const mil_norm *a, int64_t row, int64_t first)
{
    return (span){
        .width = a->group,
        .x = (const float *)a->x + row * a->x_stride + first,
        .z = a->z != NULL ? (const float *)a->z + row * a->z_stride + first : NULL,
        .weight = a->weight == NULL ? NULL : a->weight + (a->weight_per_group ? 0 : first),
        .norm_before_gate = a->norm_before_gate,
        .eps = a->eps,
    };
}

MIL_INLINE float
add_lanes(const float *lanes)
{
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) {
        sum += lanes[lane];
    }
    return sum;
}

/* sum of a[i] * b[i] in the order that the file's head describes. */
MIL_INLINE float
dot(const float *a, const float *b, int64_t width)
{
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
#pragma omp simd
        for (int lane = 0; lane < LANES; lane++) {
            lanes[lane] += a[i + lane] * b[i + lane];
        }
    }
    for (int lane = 0; i + lane < width; lane++) {
        lanes[lane] += a[i + lane] * b[i + lane];
    }
    return add_lanes(lanes);
}

/* y may be s.x. Where the gate comes first y holds u between the two passes. */
MIL_VECTORISE static void
forward_span(span s, float *y)
{
    const float *u = s.x;
    if (s.z != NULL && !s.norm_before_gate) {
#pragma omp simd
        for (int64_t i = 0; i < s.width; i++) {
            y[i] = s.x[i] * mil_siluf(s.z[i]);
        }
        u = y;
    }
    float r = 1.0f / sqrtf(dot(u, u, s.width) / (float)s.width + s.eps);
    if (s.weight != NULL) {
#pragma omp simd
        for (int64_t i = 0; i < s.width; i++) {
            y[i] = u[i] * r * s.weight[i];
        }
    }
    else {
#pragma omp simd
        for (int64_t i = 0; i < s.width; i++) {
            y[i] = u[i] * r;
        }
    }
    if (s.z != NULL && s.norm_before_gate) {
#pragma omp simd
        for (int64_t i = 0; i < s.width; i++) {
            y[i] *= mil_siluf(s.z[i]);
        }
    }
}

static mil_status
check_args(const char *name, const mil_norm *a)
{
    if (a->group < 1 || a->width % a->group != 0) {
        return mil_fail(MIL_ERR_SHAPE, "%s: group = %lld does not divide width = %lld", name,
                        (long long)a->group, (long long)a->width);
    }
    return MIL_OK;
}

mil_status
mil_cpu_norm_forward(mil_context *context, const mil_norm *arguments)
{
    const mil_norm *a = arguments;
    MIL_TRY(check_args("norm_forward", a));
#pragma omp parallel for num_threads(context->threads) schedule(static) if (a->rows * a->width >= GRAIN)
    for (int64_t row = 0; row < a->rows; row++) {
        for (int64_t first = 0; first < a->width; first += a->group) {
            forward_span(get_span(a, row, first), (float *)a->y + row * a->y_stride + first);
        }
    }
    return MIL_OK;
}

/* Where the gradients of one group of one row go. */
typedef struct span_grad {
    const float *grad_y;
    float *grad_x, *grad_z, *grad_weight; /* grad_weight is added to */
    bool accumulate;
    float *u, *h, *gate, *slope; /* [width] workspace; gate = silu(z), slope = silu'(z) */
} span_grad;

/* gate and slope of the row; 1 and 0 stand for no gate. */
MIL_INLINE void
fill_gate(const span *s, const span_grad *g)
{
#pragma omp simd
    for (int64_t i = 0; i < s->width; i++) {
        float sigmoid = mil_sigmoidf(s->z[i]);
        g->gate[i] = s->z[i] * sigmoid;
        g->slope[i] = sigmoid + g->gate[i] * (1.0f - sigmoid);
    }
}

/* 1  u, and the gradient h of u r, so that the sums over the group come from two plain arrays. */
MIL_INLINE void
fill_inputs(const span *s, const span_grad *g)
{
    bool gate_first = s->z != NULL && !s->norm_before_gate, gate_last = s->z != NULL && s->norm_before_gate;
#pragma omp simd
    for (int64_t i = 0; i < s->width; i++) {
        g->u[i] = gate_first ? s->x[i] * g->gate[i] : s->x[i];
        g->h[i] = gate_last ? g->grad_y[i] * g->gate[i] : g->grad_y[i];
    }
}

MIL_VECTORISE static void
backward_span(span s, span_grad g)
{
    if (s.z != NULL) {
        fill_gate(&s, &g);
    }
    fill_inputs(&s, &g);
    float r = 1.0f / sqrtf(dot(g.u, g.u, s.width) / (float)s.width + s.eps);

    /* 2  gradients of what multiplies u r from the right: the weight and, where it comes last, the gate. */
    if (s.z != NULL && s.norm_before_gate) {
#pragma omp simd
        for (int64_t i = 0; i < s.width; i++) {
            float weight = s.weight != NULL ? s.weight[i] : 1.0f;
            g.grad_z[i] = g.grad_y[i] * g.u[i] * r * weight * g.slope[i];
        }
    }
    if (g.grad_weight != NULL) {
#pragma omp simd
        for (int64_t i = 0; i < s.width; i++) {
            g.grad_weight[i] += g.h[i] * g.u[i] * r;
        }
    }
    if (s.weight != NULL) {
#pragma omp simd
        for (int64_t i = 0; i < s.width; i++) {
            g.h[i] *= s.weight[i];
        }
    }

    /* 3  through the normalisation, 4  through a gate that came first. */
    float mean = dot(g.u, g.h, s.width) / (float)s.width * r * r * r;
#pragma omp simd
    for (int64_t i = 0; i < s.width; i++) {
        g.h[i] = r * g.h[i] - g.u[i] * mean;
    }
    if (s.z != NULL && !s.norm_before_gate) {
#pragma omp simd
        for (int64_t i = 0; i < s.width; i++) {
            g.grad_z[i] = g.h[i] * s.x[i] * g.slope[i];
            g.h[i] *= g.gate[i];
        }
    }
    if (g.accumulate) {
#pragma omp simd
        for (int64_t i = 0; i < s.width; i++) {
            g.grad_x[i] += g.h[i];
        }
    }
    else {
#pragma omp simd
        for (int64_t i = 0; i < s.width; i++) {
            g.grad_x[i] = g.h[i];
        }
    }
}

/* One block of rows; grad_weight is this block's own partial sum, or NULL. */
static void
backward_block(const mil_norm_grad *a, int64_t first_row, int64_t last_row, float *grad_weight,
               float *workspace)
{
    const mil_norm *f = &a->forward;
    for (int64_t row = first_row; row < last_row; row++) {
        for (int64_t first = 0; first < f->width; first += f->group) {
            span_grad g = {
                .grad_y = (const float *)a->grad_y + row * a->grad_y_stride + first,
                .grad_x = (float *)a->grad_x + row * a->grad_x_stride + first,
                .grad_z = f->z != NULL ? (float *)a->grad_z + row * a->grad_z_stride + first : NULL,
                .grad_weight = grad_weight == NULL ? NULL : grad_weight + (f->weight_per_group ? 0 : first),
                .accumulate = a->accumulate,
                .u = workspace,
                .h = workspace + f->group,
                .gate = workspace + 2 * f->group,
                .slope = workspace + 3 * f->group,
            };
            backward_span(get_span(f, row, first), g);
        }
    }
}

mil_status
mil_cpu_norm_backward(mil_context *context, const mil_norm_grad *arguments)
{
    const mil_norm_grad *a = arguments;
    const mil_norm *f = &a->forward;
    MIL_TRY(check_args("norm_backward", f));
    int64_t blocks = (f->rows + BLOCK - 1) / BLOCK;
    int64_t weights = f->weight_per_group ? f->group : f->width;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    float *partial = NULL, *workspace; /* [blocks, weights], [threads, 4, group] */
    MIL_TRY(MIL_PUSH(context->scratch, (int64_t)context->threads * 4 * f->group, float, &workspace));
    if (a->grad_weight != NULL) {
        mil_status status = MIL_PUSH(context->scratch, blocks * weights, float, &partial);
        if (status != MIL_OK) {
            mil_arena_rewind(context->scratch, mark);
            return status;
        }
    }
#pragma omp parallel num_threads(context->threads) if (f -> rows * f->width >= GRAIN)
    {
        float *own = workspace + omp_get_thread_num() * 4 * f->group;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            float *sum = partial == NULL ? NULL : partial + block * weights;
            for (int64_t i = 0; sum != NULL && i < weights; i++) {
                sum[i] = 0;
            }
            int64_t last = (block + 1) * BLOCK < f->rows ? (block + 1) * BLOCK : f->rows;
            backward_block(a, block * BLOCK, last, sum, own);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (partial == NULL ? 0 : weights); i++) {
            float sum = 0;
            for (int64_t block = 0; block < blocks; block++) {
                sum += partial[block * weights + i];
            }
            a->grad_weight[i] += sum;
        }
    }
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}
