/* Mamba-2's selective scan in its dual form, window by window (device.h: mil_ssd, csrc/cpu/ssd.c).
 *
 * With H the state before a window of MIL_WINDOW tokens, W[i, s] = decay_{s+1} .. decay_i, h_i = decay_0 .. decay_i:
 *
 *   y_i = h_i H^T C_i + sum_{s <= i} W[i, s] dt_s (C_i . B_s) x_s + D x_i
 *   H'  = h_last H + sum_s W[last, s] dt_s B_s (outer) x_s
 *
 * A block has one head of one sequence and a slice of COLUMNS of its head_dim, and holds that slice of H in
 * registers while it goes through the windows from the boundary on: H is read once for all rows of the call, and
 * written where a window is folded (every 16th token in decoding).
 *
 *   thread      V = 4 neighbouring columns, and rows n = lane + 32 j of H; QUADS threads side by side make the
 *               slice, 32 of them (in n) a column
 *   C_i . H     a chain over j in each thread, then a fixed tree over the 32: shuffles, then shared memory
 *   the rest    C_i . B_s by a warp each; decays multiplied up in a fixed tree, never exponents of differences
 *
 * So a row is the same bits in any call of at most MIL_WINDOW rows a sequence, and whichever width of slice is taken:
 * narrow ones (16 KB of H for a state of 128 x 128) for few sequences, so that one of them already spreads over the
 * whole chip.  Bytes of a decoding step: heads * state_dim * head_dim * 4 for H; the rest of the tail, 8 tokens on the
 * average, is some hundredths of that.
 */
#include "tail.cuh"
#include "table.h"

#define WINDOW MIL_WINDOW
#define LANES_N 32 /* threads that share a column */
#define GROUP 2    /* rows whose partial sums are in shared memory at once */

static const float log2_e = 1.442695041f;

struct ssd_arguments {
    mil_device_rows rows;
    int64_t first; /* sequence of blockIdx.z = 0 */
    int heads, head_dim, state_dim, x_heads, B_groups, C_groups;
    const void *x, *B, *C, *dt;
    int64_t x_stride, B_stride, C_stride, dt_stride;
    const float *dt_bias, *A_log, *D;
    float dt_min, dt_max;
    void *y;
    int64_t y_stride;
};

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

/* ---- windows with fused multiply-adds -------------------------------------------------------------------------- */

/* What a block keeps of one window. ROWS = rows of H that it has room for. */
template <int COLUMNS, int ROWS, int WARPS> struct window_memory {
    float B[WINDOW][ROWS], C[WINDOW][ROWS], x[WINDOW][COLUMNS];
    float partial[GROUP][WARPS][COLUMNS];
    float dt[WINDOW], decay[WINDOW];
    float weight[WINDOW][WINDOW]; /* W dt (C . B) of rows to be computed */
    float from_start[WINDOW];     /* h_i */
    float to_end[WINDOW];         /* W[last, s] dt_s */
};

/* Where a block is. */
struct window_place {
    int head, column; /* first column in the head */
    int columns;      /* of the slice: fewer at the head's end */
    int64_t x_column, B_column, C_column;
};

/* The product of the decays after s up to i (s = -1: from the window's start), by a whole warp. */
static __device__ __forceinline__ float
multiply_decays(const float *decay, int s, int i)
{
    int lane = threadIdx.x % MIL_WARP;
    float value = lane > s && lane <= i ? decay[lane] : 1.0f; /* i < WINDOW <= 32 */
#pragma unroll
    for (int step = WINDOW / 2; step > 0; step /= 2) {
        value *= __shfl_xor_sync(MIL_ALL_LANES, value, step);
    }
    return __shfl_sync(MIL_ALL_LANES, value, 0);
}

/* Tokens of the window at `start` (tokens after the boundary), a warp a token. C only from row `first` on. */
template <typename T, int COLUMNS, int ROWS, int WARPS>
static __device__ __forceinline__ void
load_window(const ssd_arguments &a, const window_place &p, const mil_span &span, const mil_states &states,
            int start, int first, int length, float exponent, float bias, window_memory<COLUMNS, ROWS, WARPS> &m)
{
    const int lane = threadIdx.x % MIL_WARP, sequence = blockIdx.z;
    for (int s = threadIdx.x / MIL_WARP; s < length; s += WARPS) {
        int token = start + s;
        int64_t row = span.row + token - span.before;
        bool old = token < span.before;
        const float *tail_B = old ? states.B[sequence] + (int64_t)token * a.B_groups * a.state_dim + p.B_column : NULL;
        const float *tail_x = old ? states.x[sequence] + (int64_t)token * a.x_heads * a.head_dim + p.x_column : NULL;
        const T *B = (const T *)a.B + row * a.B_stride + p.B_column;
        const T *C = (const T *)a.C + row * a.C_stride + p.C_column;
        const T *x = (const T *)a.x + row * a.x_stride + p.x_column;
#pragma unroll
        for (int j = 0; j < ROWS / MIL_WARP; j++) {
            int n = lane + j * MIL_WARP;
            bool inside = n < a.state_dim;
            m.B[s][n] = !inside ? 0.0f : old ? tail_B[n] : mil_float(B[n]);
            if (s >= first) {
                m.C[s][n] = inside ? mil_float(C[n]) : 0.0f;
            }
        }
#pragma unroll
        for (int c = lane; c < COLUMNS; c += MIL_WARP) {
            m.x[s][c] = c >= p.columns ? 0.0f : old ? tail_x[c] : mil_float(x[c]);
        }
    }
    if (threadIdx.x < WINDOW) {
        int s = threadIdx.x, token = start + s;
        float dt = 0.0f;
        if (s < length) {
            dt = token < span.before ? states.dt[sequence][(int64_t)token * a.heads + p.head]
                                     : get_time_step<T>(a, span.row + token - span.before, p.head, bias);
        }
        m.dt[s] = dt;
        m.decay[s] = exp2f(dt * exponent);
    }
}

/* Weights of rows first .. length, and what a fold needs. */
template <int COLUMNS, int ROWS, int WARPS>
static __device__ __forceinline__ void
fill_weights(int first, int length, bool folds, window_memory<COLUMNS, ROWS, WARPS> &m)
{
    const int lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
    for (int task = warp; task < (length - first) * (WINDOW + 1); task += WARPS) {
        int i = first + task / (WINDOW + 1), s = task % (WINDOW + 1) - 1;
        if (s > i) {
            continue;
        }
        float product = multiply_decays(m.decay, s, i);
        if (s < 0) {
            m.from_start[i] = product;
            continue;
        }
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < ROWS / MIL_WARP; j++) {
            dot = fmaf(m.C[i][lane + j * MIL_WARP], m.B[s][lane + j * MIL_WARP], dot);
        }
        dot = mil_warp_sum(dot);
        if (lane == 0) {
            m.weight[i][s] = product * m.dt[s] * dot;
        }
    }
    for (int s = warp; folds && s < WINDOW; s += WARPS) {
        m.to_end[s] = multiply_decays(m.decay, s, WINDOW - 1) * m.dt[s];
    }
    if (folds && first == length && warp == WARPS - 1) { /* else it is there as a row's */
        m.from_start[WINDOW - 1] = multiply_decays(m.decay, -1, WINDOW - 1);
    }
}

/* sum over COUNT values that lie `step` apart: a tree that joins neighbours first. */
template <int COUNT>
static __device__ __forceinline__ float
add_tree(const float *values, int step)
{
    if constexpr (COUNT == 1) {
        return values[0];
    }
    else {
        return add_tree<COUNT / 2>(values, step) + add_tree<COUNT / 2>(values + COUNT / 2 * step, step);
    }
}

/* Up to GROUP rows from i on: C_i . H into m.partial, then y. */
template <typename T, int V, int QUADS, int J>
static __device__ __forceinline__ void
compute_rows(const ssd_arguments &a, const window_place &p, int64_t row, int i, int count, float D,
             const float (&H)[J][V], window_memory<V * QUADS, LANES_N * J, QUADS> &m)
{
    constexpr int COLUMNS = V * QUADS;
    const int quad = threadIdx.x % QUADS, lane_n = threadIdx.x / QUADS, warp = threadIdx.x / MIL_WARP;
#pragma unroll
    for (int r = 0; r < GROUP; r++) {
        if (r < count) {
            float sum[V] = {};
#pragma unroll
            for (int j = 0; j < J; j++) {
                float C = m.C[i + r][lane_n + j * LANES_N];
#pragma unroll
                for (int v = 0; v < V; v++) {
                    sum[v] = fmaf(C, H[j][v], sum[v]);
                }
            }
#pragma unroll
            for (int v = 0; v < V; v++) {
#pragma unroll
                for (int step = QUADS; step < MIL_WARP; step *= 2) {
                    sum[v] += __shfl_xor_sync(MIL_ALL_LANES, sum[v], step);
                }
            }
            if (threadIdx.x % MIL_WARP < QUADS) {
                mil_store<V>(&m.partial[r][warp][quad * V], sum);
            }
        }
    }
    __syncthreads(); /* also the weights are there now */
    for (int e = threadIdx.x; e < count * COLUMNS; e += QUADS * LANES_N) {
        int r = e / COLUMNS, c = e % COLUMNS;
        float y = m.from_start[i + r] * add_tree<QUADS>(&m.partial[r][0][c], COLUMNS);
        for (int s = 0; s <= i + r; s++) {
            y = fmaf(m.weight[i + r][s], m.x[s][c], y);
        }
        y = fmaf(D, m.x[i + r][c], y);
        if (c < p.columns) {
            ((T *)a.y)[(row + r) * a.y_stride + (int64_t)p.head * a.head_dim + p.column + c] = mil_round<T>(y);
        }
    }
}

/* H' of the window. */
template <int V, int QUADS, int J>
static __device__ __forceinline__ void
fold(const window_memory<V * QUADS, LANES_N * J, QUADS> &m, float (&H)[J][V])
{
    const int quad = threadIdx.x % QUADS, lane_n = threadIdx.x / QUADS;
    float last = m.from_start[WINDOW - 1];
#pragma unroll
    for (int j = 0; j < J; j++) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            H[j][v] *= last;
        }
    }
#pragma unroll 4
    for (int s = 0; s < WINDOW; s++) {
        float x[V], weight = m.to_end[s];
        mil_load<V>(&m.x[s][quad * V], x);
#pragma unroll
        for (int j = 0; j < J; j++) {
            float B = weight * m.B[s][lane_n + j * LANES_N];
#pragma unroll
            for (int v = 0; v < V; v++) {
                H[j][v] = fmaf(B, x[v], H[j][v]);
            }
        }
    }
}

/* Moves the slice of H between registers and memory; `state` is the head's [state_dim, head_dim]. */
template <int V, int QUADS, int J>
static __device__ __forceinline__ void
load_H(const ssd_arguments &a, const window_place &p, const float *state, float (&H)[J][V])
{
    const int c = threadIdx.x % QUADS * V, lane_n = threadIdx.x / QUADS;
#pragma unroll
    for (int j = 0; j < J; j++) {
        int n = lane_n + j * LANES_N;
        if (state != NULL && n < a.state_dim && c < p.columns) {
            mil_load<V>(state + (int64_t)n * a.head_dim + p.column + c, H[j]);
        }
        else {
#pragma unroll
            for (int v = 0; v < V; v++) {
                H[j][v] = 0.0f;
            }
        }
    }
}

template <int V, int QUADS, int J>
static __device__ __forceinline__ void
store_H(const ssd_arguments &a, const window_place &p, const float (&H)[J][V], float *state)
{
    const int c = threadIdx.x % QUADS * V, lane_n = threadIdx.x / QUADS;
#pragma unroll
    for (int j = 0; j < J; j++) {
        int n = lane_n + j * LANES_N;
        if (n < a.state_dim && c < p.columns) {
            mil_store<V>(state + (int64_t)n * a.head_dim + p.column + c, H[j]);
        }
    }
}

/* Asks for the slice of H, whatever is in it: only the second-level cache is told, so it need not be final. */
template <int V, int QUADS, int J>
static __device__ __forceinline__ void
prefetch_H(const ssd_arguments &a, const window_place &p, const float *state)
{
    const int c = threadIdx.x % QUADS * V, lane_n = threadIdx.x / QUADS;
#pragma unroll
    for (int j = 0; j < J; j++) {
        int n = lane_n + j * LANES_N;
        if (n < a.state_dim && c < p.columns && c % 32 == 0) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(state + (int64_t)n * a.head_dim + p.column + c));
        }
    }
}

/* This head's and slice's part of the tails, with those that share it. */
template <typename T>
static __device__ __forceinline__ void
move_tails(const ssd_arguments &a, const window_place &p, const mil_span &span, const mil_states &states, float bias)
{
    const int sequence = blockIdx.z, slices = gridDim.x;
    const int of_x = a.heads / a.x_heads, of_B = a.heads / a.B_groups;
    mil_tail_share(states.x[sequence], (int64_t)a.x_heads * a.head_dim, p.x_column, p.columns, span, of_x,
                   p.head % of_x == 0, [&](int64_t row, int column) {
                       return mil_float(((const T *)a.x)[(span.row + row) * a.x_stride + p.x_column + column]);
                   });
    mil_tail_share(states.B[sequence], (int64_t)a.B_groups * a.state_dim, p.B_column, a.state_dim, span,
                   of_B * slices, p.head % of_B == 0 && blockIdx.x == 0, [&](int64_t row, int column) {
                       return mil_float(((const T *)a.B)[(span.row + row) * a.B_stride + p.B_column + column]);
                   });
    mil_tail_share(states.dt[sequence], a.heads, p.head, 1, span, slices, blockIdx.x == 0,
                   [&](int64_t row, int) { return get_time_step<T>(a, span.row + row, p.head, bias); });
}

/* Grid: slices of a head, heads, sequences. */
template <typename T, int V, int QUADS, int J>
static __global__ void __launch_bounds__(QUADS *LANES_N, V *J <= 32 ? 32 / QUADS : 1)
ssd_windows_kernel(const __grid_constant__ ssd_arguments a, const __grid_constant__ mil_states states)
{
    extern __shared__ __align__(16) char shared[];
    auto &m = *reinterpret_cast<window_memory<V * QUADS, LANES_N * J, QUADS> *>(shared);
    window_place p;
    p.head = blockIdx.y;
    p.column = blockIdx.x * V * QUADS;
    p.columns = min(V * QUADS, a.head_dim - p.column);
    p.x_column = (int64_t)(p.head / (a.heads / a.x_heads)) * a.head_dim + p.column;
    p.B_column = (int64_t)(p.head / (a.heads / a.B_groups)) * a.state_dim;
    p.C_column = (int64_t)(p.head / (a.heads / a.C_groups)) * a.state_dim;
    float *state = states.given ? states.state[blockIdx.z] + (int64_t)p.head * a.state_dim * a.head_dim : NULL;
    mil_trigger();
    if (state != NULL) {
        prefetch_H<V, QUADS, J>(a, p, state);
    }
    const float exponent = get_exponent(a, p.head), bias = a.dt_bias[p.head], D = a.D[p.head];
    mil_wait();
    const mil_span span = mil_span_of(a.rows, a.first + blockIdx.z);
    float H[J][V];
    load_H<V, QUADS, J>(a, p, state, H);
    const int64_t total = span.before + span.count;
    for (int64_t start = 0; start < total; start += WINDOW) {
        int length = (int)min((int64_t)WINDOW, total - start);
        int first = (int)min((int64_t)length, max((int64_t)0, span.before - start));
        bool kept = state != NULL && span.boundary + start + WINDOW <= span.after;
        bool folds = kept || start + WINDOW < total;
        __syncthreads(); /* the window before is done with */
        load_window<T>(a, p, span, states, (int)start, first, length, exponent, bias, m);
        __syncthreads();
        fill_weights(first, length, folds, m);
        for (int i = first; i < length; i += GROUP) {
            if (i > first) {
                __syncthreads();
            }
            compute_rows<T, V, QUADS, J>(a, p, span.row + start + i - span.before, i, min(GROUP, length - i), D, H,
                                         m);
        }
        if (folds) {
            __syncthreads();
            fold<V, QUADS, J>(m, H);
        }
        if (kept && start + 2 * WINDOW + span.boundary > span.after) {
            store_H<V, QUADS, J>(a, p, H, state);
        }
    }
    if (state != NULL) {
        move_tails<T>(a, p, span, states, bias);
    }
}

/* ---- launches --------------------------------------------------------------------------------------------------- */

template <typename T, int V, int QUADS, int J>
static mil_status
launch_windows(mil_context *context, const ssd_arguments &a, const mil_states &states, int64_t sequences)
{
    dim3 grid((unsigned)mil_ceil_div(a.head_dim, V * QUADS), (unsigned)a.heads, (unsigned)sequences);
    return mil_launch(context, "ssd", ssd_windows_kernel<T, V, QUADS, J>, grid, dim3(QUADS * LANES_N),
                      sizeof(window_memory<V * QUADS, LANES_N * J, QUADS>), a, states);
}

/* Slices of 64 columns read the tail less often; of 32 they keep more of the chip busy. */
template <typename T, int V, int J>
static mil_status
choose_slice(mil_context *context, const ssd_arguments &a, const mil_states &states, int64_t sequences)
{
    const int64_t enough = 256; /* blocks */
    if constexpr (V == 4) {
        if (a.head_dim > 32 && sequences * a.heads * mil_ceil_div(a.head_dim, 16 * V) >= enough) {
            return launch_windows<T, V, 16, J>(context, a, states, sequences);
        }
    }
    return launch_windows<T, V, 8, J>(context, a, states, sequences);
}

template <typename T, int V>
static mil_status
choose_rows(mil_context *context, const ssd_arguments &a, const mil_states &states, int64_t sequences)
{
    return a.state_dim <= 1 * LANES_N   ? choose_slice<T, V, 1>(context, a, states, sequences)
           : a.state_dim <= 2 * LANES_N ? choose_slice<T, V, 2>(context, a, states, sequences)
           : a.state_dim <= 4 * LANES_N ? choose_slice<T, V, 4>(context, a, states, sequences)
           : a.state_dim <= 8 * LANES_N ? choose_slice<T, V, 8>(context, a, states, sequences)
                                        : choose_slice<T, V, 16>(context, a, states, sequences);
}

template <typename T>
static mil_status
ssd(mil_context *context, const mil_ssd *s)
{
    ssd_arguments a = {};
    a.rows = mil_rows_of(s->rows);
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
    for (; a.first < s->rows.sequences; a.first += MIL_SEQUENCES) {
        int64_t count = s->rows.sequences - a.first;
        count = count < MIL_SEQUENCES ? count : MIL_SEQUENCES;
        mil_states states = mil_states_of(s->states, a.first, count);
        MIL_TRY((a.head_dim % 4 == 0 ? choose_rows<T, 4> : choose_rows<T, 1>)(context, a, states, count));
    }
    return MIL_OK;
}

mil_status
mil_cuda_ssd_forward(mil_context *context, const mil_ssd *arguments)
{
    const mil_ssd *a = arguments;
    if (a->heads < 1 || a->heads > 65535 || a->head_dim < 1 || a->state_dim < 1 || a->state_dim > 16 * LANES_N) {
        return mil_fail(MIL_ERR_SHAPE,
                        "ssd_forward: heads = %lld, head_dim = %lld, state_dim = %lld; CUDA takes 1 to 65535 heads "
                        "and states of 1 to %d",
                        (long long)a->heads, (long long)a->head_dim, (long long)a->state_dim, 16 * LANES_N);
    }
    if (a->x_heads < 1 || a->heads % a->x_heads != 0 || a->B_groups < 1 || a->heads % a->B_groups != 0 ||
        a->C_groups < 1 || a->heads % a->C_groups != 0) {
        return mil_fail(MIL_ERR_SHAPE,
                        "ssd_forward: heads = %lld is not a multiple of x_heads = %lld, B_groups = %lld and "
                        "C_groups = %lld",
                        (long long)a->heads, (long long)a->x_heads, (long long)a->B_groups, (long long)a->C_groups);
    }
    return MIL_FOR_ACT(context, ssd, context, a);
}
