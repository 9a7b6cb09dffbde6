/* Mamba-2's operator as tests and benchmarks set it up: sizes, and rows that hold x, B, C and dt one behind another. */
#ifndef MIL_TESTS_GPU_SSD_SIZES_H
#define MIL_TESTS_GPU_SSD_SIZES_H

#include "harness.h"

typedef struct ssd_sizes {
    int64_t heads, head_dim, state_dim, x_heads, B_groups, C_groups;
} ssd_sizes;

/* Columns of x, B and C. */
static inline int64_t
ssd_width(const ssd_sizes *s)
{
    return s->x_heads * s->head_dim + (s->B_groups + s->C_groups) * s->state_dim;
}

/* Of rows at `inputs`, `stride` elements of `size` bytes apart; parameters, y and states are the caller's to set. */
static inline mil_ssd
ssd_of(const ssd_sizes *s, const void *inputs, int64_t stride, int64_t size)
{
    const int64_t B_at = s->x_heads * s->head_dim, C_at = B_at + s->B_groups * s->state_dim;
    mil_ssd a = {};
    a.heads = s->heads;
    a.head_dim = s->head_dim;
    a.state_dim = s->state_dim;
    a.x_heads = s->x_heads;
    a.B_groups = s->B_groups;
    a.C_groups = s->C_groups;
    a.x = inputs;
    a.B = (const char *)inputs + B_at * size;
    a.C = (const char *)inputs + C_at * size;
    a.dt = (const char *)inputs + ssd_width(s) * size;
    a.x_stride = a.B_stride = a.C_stride = a.dt_stride = stride;
    a.dt_max = INFINITY;
    a.y_stride = s->heads * s->head_dim;
    return a;
}

#endif
