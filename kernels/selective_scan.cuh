/* Mamba-1's selective scan: what the kernels for a few rows a sequence (selective_scan_step.cu) and for prompts
 * (selective_scan.cu) share. */
#ifndef MIL_KERNELS_SELECTIVE_SCAN_CUH
#define MIL_KERNELS_SELECTIVE_SCAN_CUH

#include "table.h"
#include "tail.cuh"

#define MIL_SCAN_STATES 256 /* most states of a channel */

static const float log2_e = 1.442695041f;

struct scan_arguments {
    mil_device_rows rows;
    int64_t first; /* sequence of blockIdx.y = 0 */
    int inner, state_dim, B_groups, C_groups, x_repeat, x_repeat_group;
    const void *x, *dt, *B, *C, *z;
    int64_t x_stride, dt_stride, B_stride, C_stride, z_stride;
    const float *dt_bias, *A_log, *D;
    float dt_bias_scale, dt_min, dt_max;
    void *y;
    int64_t y_stride;
    int stage;            /* tokens at a time */
    int B_width, C_width; /* of B and C in shared memory: all groups that a block may need */
    int64_t least, most;  /* rows of the sequences that this launch is for */
};

static inline scan_arguments
scan_arguments_of(const mil_scan *s)
{
    scan_arguments a = {};
    a.rows = mil_rows_of(s->rows);
    a.inner = (int)s->inner;
    a.state_dim = (int)s->state_dim;
    a.B_groups = (int)s->B_groups;
    a.C_groups = (int)s->C_groups;
    a.x_repeat = (int)s->x_repeat;
    a.x_repeat_group = (int)s->x_repeat_group;
    a.x = s->x;
    a.dt = s->dt;
    a.B = s->B;
    a.C = s->C;
    a.z = s->z;
    a.x_stride = s->x_stride;
    a.dt_stride = s->dt_stride;
    a.B_stride = s->B_stride;
    a.C_stride = s->C_stride;
    a.z_stride = s->z_stride;
    a.dt_bias = s->dt_bias;
    a.A_log = s->A_log;
    a.D = s->D;
    a.dt_bias_scale = s->dt_bias_scale;
    a.dt_min = s->dt_min;
    a.dt_max = s->dt_max;
    a.y = s->y;
    a.y_stride = s->y_stride;
    return a;
}

/* Column of x that channel c reads. */
static __device__ __forceinline__ int
source_of(const scan_arguments &a, int c)
{
    return a.x_repeat > 1 ? c / (a.x_repeat_group * a.x_repeat) * a.x_repeat_group + c % a.x_repeat_group : c;
}

template <typename T>
static __device__ __forceinline__ float
get_time_step(const scan_arguments &a, int64_t row, int channel, float bias)
{
    return mil_time_step(mil_float(((const T *)a.dt)[row * a.dt_stride + channel]) + bias, a.dt_min,
                         a.dt_max);
}

/* The block's share of the tails where rows of them move, or where several blocks read the same x. x and dt are its own;
 * B, and x that several channels read, are everybody's. */
template <typename T, int COLUMNS>
static __device__ __forceinline__ void
move_tails(const scan_arguments &a, const mil_span &span, const mil_tails &tails, int channel)
{
    const int columns = min(COLUMNS, a.inner - channel), B_columns = a.B_groups * a.state_dim;
    const int x_columns = a.inner / a.x_repeat;
    auto x = [&](int64_t row, int64_t column) {
        return mil_float(((const T *)a.x)[(span.row + row) * a.x_stride + column]);
    };
    __syncthreads();
    mil_tail_move(tails.dt, a.inner, channel, columns, span, [&](int64_t row, int i) {
        return get_time_step<T>(a, span.row + row, channel + i, a.dt_bias_scale * a.dt_bias[channel + i]);
    });
    if (a.x_repeat == 1) {
        mil_tail_move(tails.x, x_columns, channel, columns, span,
                      [&](int64_t row, int i) { return x(row, channel + i); });
    }
    else {
        mil_tail_share(tails.x, x_columns, 0, x_columns, span, gridDim.x,
                       [&](int64_t row, int i) { return x(row, i); });
    }
    mil_tail_share(tails.B, B_columns, 0, B_columns, span, gridDim.x, [&](int64_t row, int i) {
        return mil_float(((const T *)a.B)[(span.row + row) * a.B_stride + i]);
    });
}

/* Columns of B or C that a block of COLUMNS channels may read: all groups that it may touch. */
static inline int
group_columns(int inner, int groups, int state_dim, int columns)
{
    int run = inner / groups;
    int touched = run % columns == 0 ? 1 : columns % run == 0 ? columns / run : (columns - 1) / run + 2;
    return (touched < groups ? touched : groups) * state_dim;
}

/* The rows of all sequences that bring least .. most of them, one after another. */
mil_status
mil_scan_steps(mil_context *context, const scan_arguments *arguments, const mil_states *states,
               int64_t sequences);

#endif
