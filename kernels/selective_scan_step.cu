/* Mamba-1's selective scan of a few rows a sequence (device.h: mil_scan, csrc/cpu/selective_scan.c).
 *
 *   dt_t = clamp(softplus(dt[t] + dt_bias_scale dt_bias))
 *   H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t[n],   y_t = (D x_t + sum_n C_t[n] H_t[n]) silu(z_t)
 *
 * A block has COLUMNS neighbouring channels of one sequence.  A thread has V of them and the states n = lane + 16 j,
 * so that a state of inner = 4096 x 16 is 16,384 threads' work and is read with 16-byte loads; it keeps H and A in
 * registers and runs the recurrence from the boundary on: over the tail (8 tokens on the average in decoding) before the
 * kernel before has ended (mil_rows.settled), then over the rows of the call.  H is written where a window has been
 * folded.
 *
 * Tokens pass through shared memory, `stage` at a time.  The sum over n is a chain over j in a thread, a tree over the
 * 16 lanes (shuffles, then shared memory), so a row's bits depend on nothing but its sequence's tokens.
 */
#include "selective_scan.cuh"

#define QUADS 8    /* threads side by side */
#define LANES_N 16 /* threads that share a channel */
#define THREADS (QUADS * LANES_N)
#define WARPS (THREADS / MIL_WARP)
#define STAGE 16 /* tokens at a time, at most */

/* ---- a thread's part: V channels side by side, every sixteenth state -------------------------------------------- */

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
            H[j][v] = fmaf(mil_exp2(dt[v] * exponent[j][v]), H[j][v], input[v] * B[j]);
        }
    }
}

/* Sums over the lanes of a warp that have the same channels. */
template <int V>
static __device__ __forceinline__ void
add_lanes(float (&sum)[V])
{
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int lanes = QUADS; lanes < MIL_WARP; lanes *= 2) {
            sum[v] += __shfl_xor_sync(MIL_ALL_LANES, sum[v], lanes);
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
    add_lanes<V>(sum);
    if (threadIdx.x % MIL_WARP < QUADS) {
        mil_store<V>(partial + threadIdx.x / MIL_WARP * QUADS * V + threadIdx.x % QUADS * V, sum);
    }
}

/* Moves H between registers and `state` [state_dim, inner], or NULL; c: the thread's first channel. */
template <int V, int J>
static __device__ __forceinline__ void
load_H(const scan_arguments &a, const float *state, int c, int lane_n, float (&H)[J][V])
{
    mil_load_state<LANES_N>(state, c, a.state_dim, a.inner, c < a.inner, lane_n, H);
}

template <int V, int J>
static __device__ __forceinline__ void
store_H(const scan_arguments &a, const float (&H)[J][V], int c, int lane_n, float *state)
{
    mil_store_state<LANES_N>(H, state, c, a.state_dim, a.inner, c < a.inner, lane_n);
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

/* ---- step by step ------------------------------------------------------------------------------------------------ */

/* Shared memory of a block: [stage, COLUMNS] each of x, z, dt and dt x, then partial sums, B and C. */
template <int COLUMNS>
struct scan_memory {
    float *x, *z, *dt, *input; /* [stage, COLUMNS] */
    float *partial;            /* [stage, WARPS, COLUMNS] */
    float *B, *C;              /* [stage, width] */
};

template <int COLUMNS>
static inline size_t
scan_memory_floats(int stage, int B_width, int C_width)
{
    return (size_t)stage * ((4 + WARPS) * COLUMNS + B_width + C_width);
}

template <int COLUMNS>
static __device__ __forceinline__ scan_memory<COLUMNS>
cut_memory(const scan_arguments &a, float *shared)
{
    scan_memory<COLUMNS> m;
    m.x = shared;
    m.z = m.x + a.stage * COLUMNS;
    m.dt = m.z + a.stage * COLUMNS;
    m.input = m.dt + a.stage * COLUMNS;
    m.partial = m.input + a.stage * COLUMNS;
    m.B = m.partial + a.stage * WARPS * COLUMNS;
    m.C = m.B + a.stage * a.B_width;
    return m;
}

/* Where a block is. */
struct scan_place {
    int channel, B_at, C_at; /* first channel; first columns of B and C that it may need */
};

/* Vector e of a stage's B (or C): its token, and its column after the block's first. */
struct column_place {
    int s, at;
    bool there;
};

template <int V>
static __device__ __forceinline__ column_place
place_column(int e, int width, int at, int columns, int length)
{
    const int vectors = width / V;
    column_place place = {e / vectors, e % vectors * V, false};
    place.there = place.s < length && at + place.at < columns;
    return place;
}

#define SHARE 2 /* vectors of B, and of C, that a thread has under way; what more there is comes later */

/* `length` tokens of earlier calls, from tail row `start` on, into shared memory. */
template <int V>
static __device__ __forceinline__ void
take_tail(const scan_arguments &a, const scan_place &p, const mil_tails &tails, int start, int length,
          const scan_memory<V * QUADS> &m)
{
    const int s = threadIdx.x / QUADS, c = p.channel + threadIdx.x % QUADS * V;
    const int B_columns = a.B_groups * a.state_dim, vectors = length * a.B_width / V;
    float x[V] = {}, dt[V] = {}, B[SHARE][V];
    if (s < length && c < a.inner) {
        mil_load_settled<V>(tails.x + (start + s) * (a.inner / a.x_repeat) + source_of(a, c), x);
        mil_load_settled<V>(tails.dt + (start + s) * a.inner + c, dt);
    }
#pragma unroll 1
    for (int e = threadIdx.x; e < vectors; e += SHARE * THREADS) {
#pragma unroll
        for (int k = 0; k < SHARE; k++) {
            const column_place b = place_column<V>(e + k * THREADS, a.B_width, p.B_at, B_columns, length);
            if (b.there) {
                mil_load_settled<V>(tails.B + (start + b.s) * B_columns + p.B_at + b.at, B[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < SHARE; k++) {
            if (e + k * THREADS < vectors) {
                mil_store<V>(m.B + (e + k * THREADS) * V, B[k]);
            }
        }
    }
    if (s < length) {
        const int at = s * V * QUADS + threadIdx.x % QUADS * V;
        float input[V];
#pragma unroll
        for (int v = 0; v < V; v++) {
            input[v] = dt[v] * x[v];
        }
        mil_store<V>(m.dt + at, dt);
        mil_store<V>(m.input + at, input);
    }
}

/* A thread's share of a stage of this call's rows on its way to shared memory: one token's x, dt and z of its V channels,
 * and some of B and C. All of it is asked for before the first value is waited for. */
template <typename T, int V>
struct scan_inputs {
    mil_vector<T, V> x, dt, z, B[SHARE], C[SHARE];
};

/* `row`: the stage's first. */
template <typename T, int V>
static __device__ __forceinline__ void
ask_for_rows(const scan_arguments &a, const scan_place &p, int64_t row, int length, scan_inputs<T, V> &in)
{
    const int s = threadIdx.x / QUADS, c = p.channel + threadIdx.x % QUADS * V;
    const int B_columns = a.B_groups * a.state_dim, C_columns = a.C_groups * a.state_dim;
    if (s < length && c < a.inner) {
        in.x = *(const mil_vector<T, V> *)((const T *)a.x + (row + s) * a.x_stride + source_of(a, c));
        in.dt = *(const mil_vector<T, V> *)((const T *)a.dt + (row + s) * a.dt_stride + c);
        if (a.z != NULL) {
            in.z = *(const mil_vector<T, V> *)((const T *)a.z + (row + s) * a.z_stride + c);
        }
    }
#pragma unroll
    for (int k = 0; k < SHARE; k++) {
        const int e = threadIdx.x + k * THREADS;
        const column_place b = place_column<V>(e, a.B_width, p.B_at, B_columns, length);
        if (b.there) {
            in.B[k] = *(const mil_vector<T, V> *)((const T *)a.B + (row + b.s) * a.B_stride + p.B_at + b.at);
        }
        const column_place d = place_column<V>(e, a.C_width, p.C_at, C_columns, length);
        if (d.there) {
            in.C[k] = *(const mil_vector<T, V> *)((const T *)a.C + (row + d.s) * a.C_stride + p.C_at + d.at);
        }
    }
}

/* Columns of B or C for which the share above has no room: many groups, or many states. */
template <typename T, int V>
static __device__ __forceinline__ void
take_more_columns(const T *rows, int64_t stride, int width, int at, int columns, int length, float *to)
{
    float value[V];
#pragma unroll 1
    for (int e = threadIdx.x + SHARE * THREADS; e < length * width / V; e += THREADS) {
        const column_place place = place_column<V>(e, width, at, columns, length);
        if (place.there) {
            mil_load<V>(rows + place.s * stride + at + place.at, value);
            mil_store<V>(to + e * V, value);
        }
    }
}

/* Puts the stage into shared memory. */
template <typename T, int V>
static __device__ __forceinline__ void
take_rows(const scan_arguments &a, const scan_place &p, int64_t row, int length, const float (&bias)[V],
          const scan_inputs<T, V> &in, const scan_memory<V * QUADS> &m)
{
    const int s = threadIdx.x / QUADS, c = p.channel + threadIdx.x % QUADS * V;
    if (s < length) {
        const int at = s * V * QUADS + threadIdx.x % QUADS * V;
        float x[V] = {}, dt[V] = {}, z[V] = {}, input[V];
        if (c < a.inner) {
            mil_widen<T, V>(in.x, x);
            mil_widen<T, V>(in.dt, dt);
#pragma unroll
            for (int v = 0; v < V; v++) {
                dt[v] = mil_time_step(dt[v] + bias[v], a.dt_min, a.dt_max);
            }
            if (a.z != NULL) {
                mil_widen<T, V>(in.z, z);
            }
        }
#pragma unroll
        for (int v = 0; v < V; v++) {
            input[v] = dt[v] * x[v];
        }
        mil_store<V>(m.x + at, x);
        mil_store<V>(m.z + at, z);
        mil_store<V>(m.dt + at, dt);
        mil_store<V>(m.input + at, input);
    }
#pragma unroll
    for (int k = 0; k < SHARE; k++) {
        const int e = threadIdx.x + k * THREADS;
        float value[V];
        if (e < length * a.B_width / V) {
            mil_widen<T, V>(in.B[k], value);
            mil_store<V>(m.B + e * V, value);
        }
        if (e < length * a.C_width / V) {
            mil_widen<T, V>(in.C[k], value);
            mil_store<V>(m.C + e * V, value);
        }
    }
    take_more_columns<T, V>((const T *)a.B + row * a.B_stride, a.B_stride, a.B_width, p.B_at,
                            a.B_groups * a.state_dim, length, m.B);
    take_more_columns<T, V>((const T *)a.C + row * a.C_stride, a.C_stride, a.C_width, p.C_at,
                            a.C_groups * a.state_dim, length, m.C);
}

/* The stage's rows to the tails, from tail row `start` on, where no fold moves them: the block's own channels of dt, of x
 * those that no channel before has, and B, all groups of it, by the first block. */
template <typename T, int V>
static __device__ __forceinline__ void
append_rows(const scan_arguments &a, const scan_place &p, const mil_tails &tails, int64_t row, int start,
            int length, const scan_memory<V * QUADS> &m)
{
    const int s = threadIdx.x / QUADS, c = p.channel + threadIdx.x % QUADS * V;
    float value[V];
    if (s < length && c < a.inner) {
        const int at = s * V * QUADS + threadIdx.x % QUADS * V;
        if (a.x_repeat == 1 || c % (a.x_repeat_group * a.x_repeat) < a.x_repeat_group) {
            mil_load<V>(m.x + at, value);
            mil_store<V>(tails.x + (start + s) * (a.inner / a.x_repeat) + source_of(a, c), value);
        }
        mil_load<V>(m.dt + at, value);
        mil_store<V>(tails.dt + (start + s) * a.inner + c, value);
    }
    const int columns = a.B_groups * a.state_dim;
#pragma unroll 1
    for (int e = threadIdx.x; blockIdx.x == 0 && e < length * columns; e += THREADS) {
        tails.B[start * columns + e] =
            mil_float(((const T *)a.B)[(row + e / columns) * a.B_stride + e % columns]);
    }
}

/* y of a stage's rows. D is that of the thread's column. */
template <typename T, int COLUMNS>
static __device__ __forceinline__ void
finish_rows(const scan_arguments &a, const scan_place &p, int64_t row, int length, float D,
            const scan_memory<COLUMNS> &m)
{
    static_assert(THREADS % COLUMNS == 0, "a thread's column is always the same");
    const int column = threadIdx.x % COLUMNS, c = p.channel + column;
    for (int s = threadIdx.x / COLUMNS; s < length && c < a.inner; s += THREADS / COLUMNS) {
        const float *partial = m.partial + s * WARPS * COLUMNS + column;
        float y = (partial[0] + partial[COLUMNS]) + (partial[2 * COLUMNS] + partial[3 * COLUMNS]);
        y = fmaf(D, m.x[s * COLUMNS + column], y);
        if (a.z != NULL) {
            float z = m.z[s * COLUMNS + column];
            y *= sizeof(T) == 4 ? z / (1.0f + expf(-z)) : __fdividef(z, 1.0f + __expf(-z));
        }
        ((T *)a.y)[(row + s) * a.y_stride + c] = mil_round<T>(y);
    }
}

/* The stage's tokens, of which the last is the `end`-th after the boundary; where OUTPUT, their sums as well.  `fold`:
 * tokens to be in the state, which goes to `state` then. */
template <int V, int J, bool OUTPUT>
static __device__ __forceinline__ void
run_stage(const scan_arguments &a, int B_own, int C_own, int c, int start, int length, int fold, float *state,
          const float (&exponent)[J][V], float (&H)[J][V], const scan_memory<V * QUADS> &m)
{
    constexpr int COLUMNS = V * QUADS;
    const int lane_n = threadIdx.x / QUADS;
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
        if constexpr (OUTPUT) {
            float C[J];
#pragma unroll
            for (int j = 0; j < J; j++) {
                int n = lane_n + j * LANES_N;
                C[j] = n < a.state_dim ? m.C[s * a.C_width + C_own + n] : 0.0f;
            }
            store_partial<V, J>(C, H, m.partial + s * WARPS * COLUMNS);
        }
        if (start + s + 1 == fold) {
            store_H<V, J>(a, H, c, lane_n, state);
        }
    }
}

/* Grid: blocks of channels, sequences. */
template <typename T, int V, int J>
static __global__ void
__launch_bounds__(THREADS)
    scan_steps_kernel(const __grid_constant__ scan_arguments a, const __grid_constant__ mil_states states)
{
    constexpr int COLUMNS = V * QUADS;
    extern __shared__ __align__(16) float shared[];
    mil_trigger();
    const scan_memory<COLUMNS> m = cut_memory<COLUMNS>(a, shared);
    const mil_tails tails = states.of[blockIdx.y];
    const int channel = blockIdx.x * COLUMNS, c = channel + threadIdx.x % QUADS * V,
              lane_n = threadIdx.x / QUADS;
    const int B_run = a.inner / a.B_groups, C_run = a.inner / a.C_groups, inside = min(c, a.inner - V);
    const scan_place p = {channel, channel / B_run * a.state_dim, channel / C_run * a.state_dim};
    const int B_own = inside / B_run * a.state_dim - p.B_at, C_own = inside / C_run * a.state_dim - p.C_at;
    float H[J][V], exponent[J][V], bias[V];
    load_exponent<V, J>(a, c, lane_n, exponent);
#pragma unroll
    for (int v = 0; v < V; v++) {
        bias[v] = a.dt_bias_scale * a.dt_bias[inside + v];
    }
    const float D = a.D[min(channel + (int)threadIdx.x % COLUMNS, a.inner - 1)];
    mil_wait_for_states(a.rows);
    load_H<V, J>(a, states.given ? tails.state : NULL, c, lane_n, H);
    const mil_span span = mil_share_span(a.rows, a.first + blockIdx.y);
    if (span.count < a.least || span.count > a.most) {
        mil_wait();
        return;
    }
    const int count = (int)span.count;
    const int fold = states.given ? (int)(span.after - span.boundary) : 0; /* tokens; 0: nothing moves */
    for (int start = 0; start < span.before; start += a.stage) {
        const int length = min(a.stage, span.before - start);
        __syncthreads(); /* the stage before is done with */
        take_tail<V>(a, p, tails, start, length, m);
        __syncthreads();
        run_stage<V, J, false>(a, B_own, C_own, c, start, length, fold, tails.state, exponent, H, m);
    }
    mil_wait();
    for (int start = 0; start < count; start += a.stage) {
        const int length = min(a.stage, count - start), at = span.before + start;
        const int64_t row = span.row + start;
        scan_inputs<T, V> in;
        ask_for_rows<T, V>(a, p, row, length, in);
        __syncthreads(); /* the stage before is done with */
        take_rows<T, V>(a, p, row, length, bias, in, m);
        __syncthreads();
        run_stage<V, J, true>(a, B_own, C_own, c, at, length, fold, tails.state, exponent, H, m);
        __syncthreads();
        finish_rows<T, COLUMNS>(a, p, row, length, D, m);
        if (states.given && fold == 0) {
            append_rows<T, V>(a, p, tails, row, at, length, m);
        }
    }
    if (fold > 0) {
        move_tails<T, COLUMNS>(a, span, tails, channel);
    }
}

/* ---- launches ----------------------------------------------------------------------------------------------------- */

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
    const size_t shared = scan_memory_floats<COLUMNS>(a.stage, a.B_width, a.C_width) * sizeof(float);
    return mil_launch(context, "scan", scan_steps_kernel<T, V, J>,
                      dim3((unsigned)mil_ceil_div(a.inner, COLUMNS), (unsigned)sequences), dim3(THREADS),
                      shared, a, states);
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

/* Whether everything can be read 4 elements at a time, and 4 neighbouring channels share B, C and a run of x. */
template <typename T>
static bool
takes_vectors(const scan_arguments &a)
{
    return a.inner % 4 == 0 && a.inner / a.B_groups % 4 == 0 && a.inner / a.C_groups % 4 == 0 &&
           a.state_dim % 4 == 0 && (a.x_repeat == 1 || a.x_repeat_group % 4 == 0) &&
           mil_is_aligned<T>(a.x, a.x_stride) && mil_is_aligned<T>(a.dt, a.dt_stride) &&
           mil_is_aligned<T>(a.B, a.B_stride) && mil_is_aligned<T>(a.C, a.C_stride) &&
           (a.z == NULL || mil_is_aligned<T>(a.z, a.z_stride));
}

template <typename T>
static mil_status
steps(mil_context *context, const scan_arguments &a, const mil_states &states, int64_t sequences)
{
    return (takes_vectors<T>(a) ? choose_rows<T, 4> : choose_rows<T, 1>)(context, a, states, sequences);
}

mil_status
mil_scan_steps(mil_context *context, const scan_arguments *arguments, const mil_states *states,
               int64_t sequences)
{
    return MIL_FOR_ACT(context, steps, context, *arguments, *states, sequences);
}
