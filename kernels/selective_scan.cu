/* Mamba-1's selective scan (device.h: mil_scan, csrc/cpu/selective_scan.c).
 *
 *   dt_t = clamp(softplus(dt[t] + dt_bias_scale dt_bias))
 *   H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t[n],   y_t = (D x_t + sum_n C_t[n] H_t[n]) silu(z_t)
 *
 * A block has COLUMNS neighbouring channels of one sequence.  A thread has V of them and the states n = lane + 16 j,
 * so that a state of inner = 4096 x 16 is 16,384 threads' work and is read with 16-byte loads; it keeps H and A in
 * registers and runs the recurrence from the boundary on: over the tail (8 tokens on the average in decoding), which
 * costs registers' time only, then over the rows of the call.  H is written where a window has been folded.
 *
 * Tokens pass through shared memory, `stage` at a time.  The sum over n is a chain over j in a thread, a tree over the
 * 16 lanes (shuffles, then shared memory), so a row's bits depend on nothing but its sequence's tokens.
 */
#include "tail.cuh"
#include "table.h"

#define QUADS 8    /* threads side by side */
#define LANES_N 16 /* threads that share a channel */
#define THREADS (QUADS * LANES_N)
#define WARPS (THREADS / MIL_WARP)
#define STAGE 16 /* tokens at a time, at most */

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
    int stage;             /* tokens at a time */
    int B_width, C_width;  /* of B and C in shared memory: all groups that a block may need */
};

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
    return mil_time_step(mil_float(((const T *)a.dt)[row * a.dt_stride + channel]) + bias, a.dt_min, a.dt_max);
}

/* ---- step by step ------------------------------------------------------------------------------------------------ */

/* Shared memory of a block: [stage, COLUMNS] each of x, dt, dt x, then B, C and partial sums. */
template <int COLUMNS> struct scan_memory {
    float *x, *dt, *input; /* [stage, COLUMNS] */
    float *partial;        /* [stage, WARPS, COLUMNS] */
    float *B, *C;          /* [stage, width] */
};

template <int COLUMNS>
static __host__ __device__ inline size_t
scan_memory_floats(int stage, int B_width, int C_width)
{
    return (size_t)stage * ((3 + WARPS) * COLUMNS + B_width + C_width);
}

template <int COLUMNS>
static __device__ __forceinline__ scan_memory<COLUMNS>
cut_memory(const scan_arguments &a, float *shared)
{
    scan_memory<COLUMNS> m;
    m.x = shared;
    m.dt = m.x + a.stage * COLUMNS;
    m.input = m.dt + a.stage * COLUMNS;
    m.partial = m.input + a.stage * COLUMNS;
    m.B = m.partial + a.stage * WARPS * COLUMNS;
    m.C = m.B + a.stage * a.B_width;
    return m;
}

/* Tokens start .. start + length after the boundary; C only of this call's rows. */
template <typename T, int COLUMNS>
static __device__ __forceinline__ void
load_stage(const scan_arguments &a, const mil_span &span, const mil_states &states, int channel, int B_at, int C_at,
           int64_t start, int length, const scan_memory<COLUMNS> &m)
{
    const int sequence = blockIdx.y, B_columns = a.B_groups * a.state_dim, C_columns = a.C_groups * a.state_dim;
    const int x_columns = a.inner / a.x_repeat;
    const int B_count = min(a.B_width, B_columns - B_at), C_count = min(a.C_width, C_columns - C_at);
    for (int e = threadIdx.x; e < length * COLUMNS; e += THREADS) {
        int s = e / COLUMNS, c = channel + e % COLUMNS;
        int64_t token = start + s, row = span.row + token - span.before;
        float x = 0.0f, dt = 0.0f;
        if (c < a.inner && token < span.before) {
            x = states.x[sequence][token * x_columns + source_of(a, c)];
            dt = states.dt[sequence][token * a.inner + c];
        }
        else if (c < a.inner) {
            x = mil_float(((const T *)a.x)[row * a.x_stride + source_of(a, c)]);
            dt = get_time_step<T>(a, row, c, a.dt_bias_scale * a.dt_bias[c]);
        }
        m.x[e] = x;
        m.dt[e] = dt;
        m.input[e] = dt * x;
    }
    for (int s = threadIdx.x / MIL_WARP; s < length; s += WARPS) {
        int64_t token = start + s, row = span.row + token - span.before;
        for (int i = threadIdx.x % MIL_WARP; i < B_count; i += MIL_WARP) {
            m.B[s * a.B_width + i] = token < span.before
                                         ? states.B[sequence][token * B_columns + B_at + i]
                                         : mil_float(((const T *)a.B)[row * a.B_stride + B_at + i]);
        }
        for (int i = threadIdx.x % MIL_WARP; token >= span.before && i < C_count; i += MIL_WARP) {
            m.C[s * a.C_width + i] = mil_float(((const T *)a.C)[row * a.C_stride + C_at + i]);
        }
    }
}

/* One token: H moves on. */
template <int V, int J>
static __device__ __forceinline__ void
step(const float (&dt)[V], const float (&input)[V], const float (&exponent)[J][V], const float (&B)[J],
     float (&H)[J][V])
{
#pragma unroll
    for (int j = 0; j < J; j++) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            H[j][v] = fmaf(exp2f(dt[v] * exponent[j][v]), H[j][v], input[v] * B[j]);
        }
    }
}

/* The thread's part of sum_n C H, summed over the lanes of its warp, into partial [WARPS, COLUMNS]. */
template <int V, int J>
static __device__ __forceinline__ void
store_partial(const float (&C)[J], const float (&H)[J][V], float *partial)
{
    float sum[V] = {};
#pragma unroll
    for (int j = 0; j < J; j++) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            sum[v] = fmaf(C[j], H[j][v], sum[v]);
        }
    }
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int lanes = QUADS; lanes < MIL_WARP; lanes *= 2) {
            sum[v] += __shfl_xor_sync(MIL_ALL_LANES, sum[v], lanes);
        }
    }
    if (threadIdx.x % MIL_WARP < QUADS) {
        mil_store<V>(partial + threadIdx.x / MIL_WARP * QUADS * V + threadIdx.x % QUADS * V, sum);
    }
}

/* y of a stage's rows, from row `first` of the stage on. */
template <typename T, int COLUMNS>
static __device__ __forceinline__ void
finish_rows(const scan_arguments &a, const mil_span &span, int channel, int64_t start, int first, int length,
            const scan_memory<COLUMNS> &m)
{
    for (int e = first * COLUMNS + threadIdx.x; e < length * COLUMNS; e += THREADS) {
        int s = e / COLUMNS, c = channel + e % COLUMNS;
        if (c >= a.inner) {
            continue;
        }
        int64_t row = span.row + start + s - span.before;
        const float *partial = m.partial + s * WARPS * COLUMNS + e % COLUMNS;
        float y = (partial[0] + partial[COLUMNS]) + (partial[2 * COLUMNS] + partial[3 * COLUMNS]);
        y = fmaf(a.D[c], m.x[e], y);
        if (a.z != NULL) {
            float z = mil_float(((const T *)a.z)[row * a.z_stride + c]);
            y *= z / (1.0f + (sizeof(T) == 4 ? expf(-z) : __expf(-z)));
        }
        ((T *)a.y)[row * a.y_stride + c] = mil_round<T>(y);
    }
}

/* The block's share of the tails. x and dt are its own; B, and x that several channels read, are everybody's. */
template <typename T, int COLUMNS>
static __device__ __forceinline__ void
move_tails(const scan_arguments &a, const mil_span &span, const mil_states &states, int channel)
{
    const int sequence = blockIdx.y, columns = min(COLUMNS, a.inner - channel), B_columns = a.B_groups * a.state_dim;
    const int x_columns = a.inner / a.x_repeat;
    auto x = [&](int64_t row, int64_t column) {
        return mil_float(((const T *)a.x)[(span.row + row) * a.x_stride + column]);
    };
    __syncthreads();
    mil_tail_move(states.dt[sequence], a.inner, channel, columns, span, [&](int64_t row, int i) {
        return get_time_step<T>(a, span.row + row, channel + i, a.dt_bias_scale * a.dt_bias[channel + i]);
    });
    if (a.x_repeat == 1) {
        mil_tail_move(states.x[sequence], x_columns, channel, columns, span,
                      [&](int64_t row, int i) { return x(row, channel + i); });
    }
    else {
        mil_tail_share(states.x[sequence], x_columns, 0, x_columns, span, gridDim.x, blockIdx.x == 0,
                       [&](int64_t row, int i) { return x(row, i); });
    }
    mil_tail_share(states.B[sequence], B_columns, 0, B_columns, span, gridDim.x, blockIdx.x == 0,
                   [&](int64_t row, int i) {
                       return mil_float(((const T *)a.B)[(span.row + row) * a.B_stride + i]);
                   });
}

/* Moves H between registers and `state` [state_dim, inner]; c: the thread's first channel. */
template <int V, int J>
static __device__ __forceinline__ void
load_H(const scan_arguments &a, const float *state, int c, int lane_n, float (&H)[J][V])
{
#pragma unroll
    for (int j = 0; j < J; j++) {
        int n = lane_n + j * LANES_N;
        if (state != NULL && n < a.state_dim && c < a.inner) {
            mil_load<V>(state + (int64_t)n * a.inner + c, H[j]);
        }
        else {
#pragma unroll
            for (int v = 0; v < V; v++) {
                H[j][v] = 0.0f;
            }
        }
    }
}

template <int V, int J>
static __device__ __forceinline__ void
store_H(const scan_arguments &a, const float (&H)[J][V], int c, int lane_n, float *state)
{
#pragma unroll
    for (int j = 0; j < J; j++) {
        int n = lane_n + j * LANES_N;
        if (n < a.state_dim && c < a.inner) {
            mil_store<V>(state + (int64_t)n * a.inner + c, H[j]);
        }
    }
}

/* A log2(e), finite so that 0 * A is 0; 0 where there is no state. */
template <int V, int J>
static __device__ __forceinline__ void
load_exponent(const scan_arguments &a, int c, int lane_n, float (&exponent)[J][V])
{
#pragma unroll
    for (int j = 0; j < J; j++) {
        int n = lane_n + j * LANES_N;
#pragma unroll
        for (int v = 0; v < V; v++) {
            exponent[j][v] = n < a.state_dim && c < a.inner
                                 ? -log2_e * fminf(expf(a.A_log[(int64_t)(c + v) * a.state_dim + n]), 1e30f)
                                 : 0.0f;
        }
    }
}

/* Grid: blocks of channels, sequences. */
template <typename T, int V, int J>
static __global__ void __launch_bounds__(THREADS)
scan_steps_kernel(const __grid_constant__ scan_arguments a, const __grid_constant__ mil_states states)
{
    constexpr int COLUMNS = V * QUADS;
    extern __shared__ __align__(16) float shared[];
    const scan_memory<COLUMNS> m = cut_memory<COLUMNS>(a, shared);
    const int channel = blockIdx.x * COLUMNS, c = channel + threadIdx.x % QUADS * V, lane_n = threadIdx.x / QUADS;
    const int B_first = channel / (a.inner / a.B_groups), C_first = channel / (a.inner / a.C_groups);
    const int inside = min(c, a.inner - 1);
    const int B_own = (inside / (a.inner / a.B_groups) - B_first) * a.state_dim;
    const int C_own = (inside / (a.inner / a.C_groups) - C_first) * a.state_dim;
    float *state = states.given ? states.state[blockIdx.y] : NULL;
    float H[J][V], exponent[J][V];
    mil_trigger();
    load_exponent<V, J>(a, c, lane_n, exponent);
    mil_wait();
    const mil_span span = mil_span_of(a.rows, a.first + blockIdx.y);
    load_H<V, J>(a, state, c, lane_n, H);
    const int64_t total = span.before + span.count;
    for (int64_t start = 0; start < total; start += a.stage) {
        const int length = (int)min((int64_t)a.stage, total - start);
        const int first = (int)min((int64_t)length, max((int64_t)0, span.before - start));
        load_stage<T, COLUMNS>(a, span, states, channel, B_first * a.state_dim, C_first * a.state_dim, start, length,
                               m);
        __syncthreads();
#pragma unroll 2
        for (int s = 0; s < length; s++) {
            float dt[V], input[V], B[J];
            mil_load<V>(m.dt + s * COLUMNS + threadIdx.x % QUADS * V, dt);
            mil_load<V>(m.input + s * COLUMNS + threadIdx.x % QUADS * V, input);
#pragma unroll
            for (int j = 0; j < J; j++) {
                int n = lane_n + j * LANES_N;
                B[j] = n < a.state_dim ? m.B[s * a.B_width + B_own + n] : 0.0f;
            }
            step<V, J>(dt, input, exponent, B, H);
            if (s >= first) {
                float C[J];
#pragma unroll
                for (int j = 0; j < J; j++) {
                    int n = lane_n + j * LANES_N;
                    C[j] = n < a.state_dim ? m.C[s * a.C_width + C_own + n] : 0.0f;
                }
                store_partial<V, J>(C, H, m.partial + s * WARPS * COLUMNS);
            }
            if (state != NULL && span.after > span.boundary && span.boundary + start + s + 1 == span.after) {
                store_H<V, J>(a, H, c, lane_n, state);
            }
        }
        __syncthreads();
        finish_rows<T, COLUMNS>(a, span, channel, start, first, length, m);
        __syncthreads();
    }
    if (state != NULL) {
        move_tails<T, COLUMNS>(a, span, states, channel);
    }
}

/* ---- launches ----------------------------------------------------------------------------------------------------- */

/* Columns of B or C that a block of COLUMNS channels may read: all groups that it may touch. */
static int
group_columns(int inner, int groups, int state_dim, int columns)
{
    int run = inner / groups;
    int touched = run % columns == 0 ? 1 : columns % run == 0 ? columns / run : (columns - 1) / run + 2;
    return (touched < groups ? touched : groups) * state_dim;
}

template <typename T, int V, int J>
static mil_status
launch_steps(mil_context *context, scan_arguments a, const mil_states &states, int64_t sequences)
{
    constexpr int COLUMNS = V * QUADS;
    const size_t most = 96 * 1024;
    a.B_width = group_columns(a.inner, a.B_groups, a.state_dim, COLUMNS);
    a.C_width = group_columns(a.inner, a.C_groups, a.state_dim, COLUMNS);
    for (a.stage = STAGE;
         a.stage > 1 && scan_memory_floats<COLUMNS>(a.stage, a.B_width, a.C_width) * sizeof(float) > most;
         a.stage /= 2) {
    }
    return mil_launch(context, "scan", scan_steps_kernel<T, V, J>,
                      dim3((unsigned)mil_ceil_div(a.inner, COLUMNS), (unsigned)sequences), dim3(THREADS),
                      scan_memory_floats<COLUMNS>(a.stage, a.B_width, a.C_width) * sizeof(float), a, states);
}

template <typename T, int V>
static mil_status
choose_rows(mil_context *context, const scan_arguments &a, const mil_states &states, int64_t sequences)
{
    return a.state_dim <= 1 * LANES_N   ? launch_steps<T, V, 1>(context, a, states, sequences)
           : a.state_dim <= 2 * LANES_N ? launch_steps<T, V, 2>(context, a, states, sequences)
           : a.state_dim <= 4 * LANES_N ? launch_steps<T, V, 4>(context, a, states, sequences)
           : a.state_dim <= 8 * LANES_N ? launch_steps<T, V, 8>(context, a, states, sequences)
                                        : launch_steps<T, V, 16>(context, a, states, sequences);
}

/* Four channels a thread where they share B and C and lie side by side in the state. */
static bool
takes_vectors(const scan_arguments &a)
{
    return a.inner % 4 == 0 && a.inner / a.B_groups % 4 == 0 && a.inner / a.C_groups % 4 == 0;
}

template <typename T>
static mil_status
scan(mil_context *context, const mil_scan *s)
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
    for (; a.first < s->rows.sequences; a.first += MIL_SEQUENCES) {
        int64_t count = s->rows.sequences - a.first;
        count = count < MIL_SEQUENCES ? count : MIL_SEQUENCES;
        mil_states states = mil_states_of(s->states, a.first, count);
        MIL_TRY((takes_vectors(a) ? choose_rows<T, 4> : choose_rows<T, 1>)(context, a, states, count));
    }
    return MIL_OK;
}

mil_status
mil_cuda_scan_forward(mil_context *context, const mil_scan *arguments)
{
    const mil_scan *a = arguments;
    if (a->inner < 1 || a->inner >= (int64_t)1 << 24 || a->state_dim < 1 || a->state_dim > 16 * LANES_N) {
        return mil_fail(MIL_ERR_SHAPE,
                        "scan_forward: inner = %lld, state_dim = %lld; CUDA takes states of 1 to %d",
                        (long long)a->inner, (long long)a->state_dim, 16 * LANES_N);
    }
    if (a->B_groups < 1 || a->inner % a->B_groups != 0 || a->C_groups < 1 || a->inner % a->C_groups != 0) {
        return mil_fail(MIL_ERR_SHAPE,
                        "scan_forward: inner = %lld is not a multiple of B_groups = %lld and C_groups = %lld",
                        (long long)a->inner, (long long)a->B_groups, (long long)a->C_groups);
    }
    if (a->x_repeat < 1 || a->inner % a->x_repeat != 0 ||
        (a->x_repeat > 1 && (a->x_repeat_group < 1 || a->inner / a->x_repeat % a->x_repeat_group != 0))) {
        return mil_fail(MIL_ERR_SHAPE,
                        "scan_forward: inner = %lld is not a multiple of x_repeat = %lld times x_repeat_group = %lld",
                        (long long)a->inner, (long long)a->x_repeat, (long long)a->x_repeat_group);
    }
    return MIL_FOR_ACT(context, scan, context, a);
}
