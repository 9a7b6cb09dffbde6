/* Mamba-2's selective scan: what the kernels for a few rows a sequence (ssd_step.cu) and for prompts (ssd.cu) share. */
#ifndef MIL_KERNELS_SSD_CUH
#define MIL_KERNELS_SSD_CUH

#include "table.h"
#include "tail.cuh"

#define MIL_SSD_STATES 512 /* most states of a head */
#define PAIR_LANES 16      /* threads of one C_i . B_s, in decoding */

static const float log2_e = 1.442695041f;

struct ssd_arguments {
    mil_device_rows rows;
    int64_t first;      /* sequence of blockIdx.z = 0 */
    int64_t rows_count; /* of all sequences */
    int heads, head_dim, state_dim, x_heads, B_groups, C_groups;
    const void *x, *B, *C, *dt;
    int64_t x_stride, B_stride, C_stride, dt_stride;
    const float *dt_bias, *A_log, *D;
    float dt_min, dt_max;
    void *y;
    int64_t y_stride;
    int64_t least, most;        /* rows of the sequences that this launch is for */
    int slices, slices_a_block; /* of a head */
};

static inline ssd_arguments
ssd_arguments_of(const mil_ssd *s)
{
    ssd_arguments a = {};
    a.rows = mil_rows_of(s->rows);
    a.rows_count = s->rows.rows;
    a.heads = (int)s->heads;
    a.head_dim = (int)s->head_dim;
    a.state_dim = (int)s->state_dim;
    a.x_heads = (int)s->x_heads;
    a.B_groups = (int)s->B_groups;
    a.C_groups = (int)s->C_groups;
    a.x = s->x;
    a.B = s->B;
    a.C = s->C;
    a.dt = s->dt;
    a.x_stride = s->x_stride;
    a.B_stride = s->B_stride;
    a.C_stride = s->C_stride;
    a.dt_stride = s->dt_stride;
    a.dt_bias = s->dt_bias;
    a.A_log = s->A_log;
    a.D = s->D;
    a.dt_min = s->dt_min;
    a.dt_max = s->dt_max;
    a.y = s->y;
    a.y_stride = s->y_stride;
    return a;
}

/* The product of the decays after s up to i, by PAIR_LANES threads side by side. */
static __device__ __forceinline__ float
multiply_decays(const float *decay, int s, int i)
{
    int lane = threadIdx.x % PAIR_LANES;
    float value = lane > s && lane <= i ? decay[lane] : 1.0f;
#pragma unroll
    for (int step = MIL_WINDOW / 2; step > 0; step /= 2) {
        value *= __shfl_xor_sync(MIL_ALL_LANES, value, step);
    }
    return value;
}

/* -exp(A_log) log2(e), finite so that 0 * A is 0. */
static __device__ __forceinline__ float
get_exponent(const ssd_arguments &a, int head)
{
    return -log2_e * fminf(expf(a.A_log[head]), 1e30f);
}

template <typename T>
static __device__ __forceinline__ float
get_time_step(const ssd_arguments &a, int64_t row, int head, float bias)
{
    return mil_time_step(mil_float(((const T *)a.dt)[row * a.dt_stride + head]) + bias, a.dt_min, a.dt_max);
}

/* Where a block is. */
struct window_place {
    int head, column; /* first column in the head */
    int columns;      /* of the slice: fewer at the head's end */
    int64_t x_column, B_column, C_column;
    bool is_first_of_group; /* of the blocks that read the same B */
};

/* Which of the tails' columns that this block has read (bits: x, B, dt) it is the last of all blocks to come for.
 * `sharers`: blocks a head. */
static __device__ __forceinline__ unsigned
come_for_tails(const ssd_arguments &a, const window_place &p, const mil_tails &tails, int sharers)
{
    const int64_t x_width = (int64_t)a.x_heads * a.head_dim, B_width = (int64_t)a.B_groups * a.state_dim;
    return mil_last_of(
        {{mil_slot(tails.x, x_width, p.x_column), mil_slot(tails.B, B_width, p.B_column),
          mil_slot(tails.dt, a.heads, p.head)},
         {(unsigned)(a.heads / a.x_heads), (unsigned)(a.heads / a.B_groups * sharers), (unsigned)sharers}});
}

/* Moves those columns on after a fold. */
template <typename T>
static __device__ __forceinline__ void
move_tails(const ssd_arguments &a, const window_place &p, const mil_span &span, const mil_tails &tails,
           unsigned last, float bias)
{
    const int64_t x_width = (int64_t)a.x_heads * a.head_dim, B_width = (int64_t)a.B_groups * a.state_dim;
    if (last & 1) {
        mil_tail_move(tails.x, x_width, p.x_column, p.columns, span, [&](int64_t row, int column) {
            return mil_float(((const T *)a.x)[(span.row + row) * a.x_stride + p.x_column + column]);
        });
    }
    if (last & 2) {
        mil_tail_move(tails.B, B_width, p.B_column, a.state_dim, span, [&](int64_t row, int column) {
            return mil_float(((const T *)a.B)[(span.row + row) * a.B_stride + p.B_column + column]);
        });
    }
    if (last & 4) {
        mil_tail_move(tails.dt, a.heads, p.head, 1, span,
                      [&](int64_t row, int) { return get_time_step<T>(a, span.row + row, p.head, bias); });
    }
}

/* The rows of all sequences that bring least .. most of them, window by window. */
mil_status
mil_ssd_windows(mil_context *context, const ssd_arguments *arguments, const mil_states *states,
                int64_t sequences);

#endif
