/* Mamba-1's selective scan of a few rows a sequence (device.h: mil_scan, csrc/cpu/selective_scan.c).
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
#include "scan_step.cuh"

#define STAGE 16 /* tokens at a time, at most */

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

/* Which of the tails' columns this block appends to, where no fold moves them. */
struct scan_owner {
    bool x, B, dt;
};

/* A thread's share of a stage on its way to shared memory: one token's x, dt and z of its V channels, and some of B
 * and C. All of it is asked for before the first value is waited for. */
template <typename T, int V>
struct scan_inputs {
    mil_either<T, V> x, dt;
    mil_vector<T, V> z;
    static constexpr int SHARE = 2; /* vectors of B, and of C; what more there is comes later */
    mil_either<T, V> B[SHARE];
    mil_vector<T, V> C[SHARE];
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

template <typename T, int V>
static __device__ __forceinline__ void
ask_for_stage(const scan_arguments &a, const scan_place &p, const mil_span &span, const mil_tails &tails,
              int64_t start, int first, int length, scan_inputs<T, V> &in)
{
    using inputs = scan_inputs<T, V>;
    const int64_t row =
        span.row + start - span.before; /* of the stage's first token, if it is of this call */
    const int s = threadIdx.x / QUADS, c = p.channel + threadIdx.x % QUADS * V;
    const int B_columns = a.B_groups * a.state_dim, C_columns = a.C_groups * a.state_dim;
    if (s < length && c < a.inner) {
        const int source = source_of(a, c);
        in.x.load(s < first, tails.x + (start + s) * (a.inner / a.x_repeat) + source, s >= first,
                  (const T *)a.x + (row + s) * a.x_stride + source);
        in.dt.load(s < first, tails.dt + (start + s) * a.inner + c, s >= first,
                   (const T *)a.dt + (row + s) * a.dt_stride + c);
        if (s >= first && a.z != NULL) {
            in.z = *(const mil_vector<T, V> *)((const T *)a.z + (row + s) * a.z_stride + c);
        }
    }
#pragma unroll
    for (int k = 0; k < inputs::SHARE; k++) {
        column_place b = place_column<V>(threadIdx.x + k * THREADS, a.B_width, p.B_at, B_columns, length);
        in.B[k].load(b.there && b.s < first, tails.B + (start + b.s) * B_columns + p.B_at + b.at,
                     b.there && b.s >= first, (const T *)a.B + (row + b.s) * a.B_stride + p.B_at + b.at);
        column_place d = place_column<V>(threadIdx.x + k * THREADS, a.C_width, p.C_at, C_columns, length);
        if (d.there && d.s >= first) {
            in.C[k] = *(const mil_vector<T, V> *)((const T *)a.C + (row + d.s) * a.C_stride + p.C_at + d.at);
        }
    }
}

/* Columns of B and C for which the share above has no room: many groups, or many states. */
template <typename T, int V>
static __device__ __forceinline__ void
take_more_columns(const scan_arguments &a, const scan_place &p, const mil_span &span, const mil_tails &tails,
                  int64_t start, int first, int length, float *B, float *C)
{
    const int64_t row = span.row + start - span.before;
    const int B_columns = a.B_groups * a.state_dim, C_columns = a.C_groups * a.state_dim;
    float value[V];
    for (int e = threadIdx.x + scan_inputs<T, V>::SHARE * THREADS; e < length * a.B_width / V; e += THREADS) {
        column_place b = place_column<V>(e, a.B_width, p.B_at, B_columns, length);
        if (b.there && b.s < first) {
            mil_load<V>(tails.B + (start + b.s) * B_columns + p.B_at + b.at, value);
            mil_store<V>(B + e * V, value);
        }
        else if (b.there) {
            mil_load<V>((const T *)a.B + (row + b.s) * a.B_stride + p.B_at + b.at, value);
            mil_store<V>(B + e * V, value);
        }
    }
    for (int e = threadIdx.x + scan_inputs<T, V>::SHARE * THREADS; e < length * a.C_width / V; e += THREADS) {
        column_place d = place_column<V>(e, a.C_width, p.C_at, C_columns, length);
        if (d.there && d.s >= first) {
            mil_load<V>((const T *)a.C + (row + d.s) * a.C_stride + p.C_at + d.at, value);
            mil_store<V>(C + e * V, value);
        }
    }
}

/* Puts the stage into shared memory, and rows of this call that the block owns into the tails. */
template <typename T, int V>
static __device__ __forceinline__ void
take_stage(const scan_arguments &a, const scan_place &p, const mil_span &span, const mil_tails &tails,
           const scan_owner &owner, int64_t start, int first, int length, const float (&bias)[V],
           const scan_inputs<T, V> &in, const scan_memory<V * QUADS> &m)
{
    using inputs = scan_inputs<T, V>;
    const int s = threadIdx.x / QUADS, c = p.channel + threadIdx.x % QUADS * V;
    if (s < length) {
        const int at = s * V * QUADS + threadIdx.x % QUADS * V;
        float x[V] = {}, dt[V] = {}, input[V];
        if (c < a.inner) {
            in.x.get(x);
            in.dt.get(dt);
        }
#pragma unroll
        for (int v = 0; v < V; v++) {
            if (s >= first && c < a.inner) {
                dt[v] = mil_time_step(dt[v] + bias[v], a.dt_min, a.dt_max);
                m.z[at + v] = a.z == NULL ? 0.0f : mil_float(in.z.at[v]);
            }
            input[v] = dt[v] * x[v];
        }
        mil_store<V>(m.x + at, x);
        mil_store<V>(m.dt + at, dt);
        mil_store<V>(m.input + at, input);
        if (s >= first && c < a.inner && owner.x) {
            mil_store<V>(tails.x + (start + s) * a.inner + c, x);
        }
        if (s >= first && c < a.inner && owner.dt) {
            mil_store<V>(tails.dt + (start + s) * a.inner + c, dt);
        }
    }
#pragma unroll
    for (int k = 0; k < inputs::SHARE; k++) {
        const int e = threadIdx.x + k * THREADS;
        float value[V];
        if (e < length * a.B_width / V) {
            in.B[k].get(value);
            mil_store<V>(m.B + e * V, value);
        }
        if (e < length * a.C_width / V) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                value[v] = mil_float(in.C[k].at[v]);
            }
            mil_store<V>(m.C + e * V, value);
        }
    }
    take_more_columns<T, V>(a, p, span, tails, start, first, length, m.B, m.C);
    if (owner.B) { /* all groups, whichever the block itself needs */
        const int columns = a.B_groups * a.state_dim;
        const int64_t row = span.row + start - span.before;
        for (int e = threadIdx.x; e < (length - first) * columns; e += THREADS) {
            int i = first + e / columns, column = e % columns;
            tails.B[(start + i) * columns + column] =
                mil_float(((const T *)a.B)[(row + i) * a.B_stride + column]);
        }
    }
}

/* y of a stage's rows, from row `first` of the stage on. D is that of the thread's column. */
template <typename T, int COLUMNS>
static __device__ __forceinline__ void
finish_rows(const scan_arguments &a, const scan_place &p, const mil_span &span, int64_t start, int first,
            int length, float D, const scan_memory<COLUMNS> &m)
{
    static_assert(THREADS % COLUMNS == 0, "a thread's column is always the same");
    const int column = threadIdx.x % COLUMNS, c = p.channel + column;
    for (int s = first + threadIdx.x / COLUMNS; s < length && c < a.inner; s += THREADS / COLUMNS) {
        const float *partial = m.partial + s * WARPS * COLUMNS + column;
        float y = (partial[0] + partial[COLUMNS]) + (partial[2 * COLUMNS] + partial[3 * COLUMNS]);
        y = fmaf(D, m.x[s * COLUMNS + column], y);
        if (a.z != NULL) {
            float z = m.z[s * COLUMNS + column];
            y *= sizeof(T) == 4 ? z / (1.0f + expf(-z)) : __fdividef(z, 1.0f + __expf(-z));
        }
        ((T *)a.y)[(span.row + start + s - span.before) * a.y_stride + c] = mil_round<T>(y);
    }
}

/* Asks for the state and the tails' first window. */
template <int V, int J>
static __device__ __forceinline__ void
prefetch_state(const scan_arguments &a, const mil_tails &tails, int channel)
{
    const int lane_n = threadIdx.x / QUADS;
    if (threadIdx.x % QUADS == 0) {
        for (int n = lane_n; n < a.state_dim; n += LANES_N) {
            mil_prefetch(tails.state + (int64_t)n * a.inner + channel);
        }
    }
    else if (threadIdx.x % QUADS == 1) {
        mil_prefetch(tails.dt + lane_n * a.inner + channel);
    }
    else if (threadIdx.x % QUADS == 2) {
        mil_prefetch(tails.x + lane_n * (a.inner / a.x_repeat) + source_of(a, channel));
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
    const scan_memory<COLUMNS> m = cut_memory<COLUMNS>(a, shared);
    const mil_tails tails = states.of[blockIdx.y];
    const int channel = blockIdx.x * COLUMNS, c = channel + threadIdx.x % QUADS * V,
              lane_n = threadIdx.x / QUADS;
    const int B_run = a.inner / a.B_groups, C_run = a.inner / a.C_groups, inside = min(c, a.inner - V);
    const scan_place p = {channel, channel / B_run * a.state_dim, channel / C_run * a.state_dim};
    const int B_own = inside / B_run * a.state_dim - p.B_at, C_own = inside / C_run * a.state_dim - p.C_at;
    float H[J][V], exponent[J][V], bias[V];
    mil_trigger();
    if (states.given) {
        prefetch_state<V, J>(a, tails, channel);
    }
    load_exponent<V, J>(a, c, lane_n, exponent);
#pragma unroll
    for (int v = 0; v < V; v++) {
        bias[v] = a.dt_bias_scale * a.dt_bias[inside + v];
    }
    const float D = a.D[min(channel + (int)threadIdx.x % COLUMNS, a.inner - 1)];
    mil_wait();
    load_H<V, J>(a, states.given ? tails.state : NULL, c, lane_n, H);
    const mil_span span = mil_span_of(a.rows, a.first + blockIdx.y);
    if (span.count < a.least || span.count > a.most) {
        return;
    }
    const bool appends = states.given && span.after == span.boundary && a.x_repeat == 1; /* nothing moves */
    const scan_owner owner = {appends, appends && blockIdx.x == 0, appends};
    const int64_t total = span.before + span.count;
    for (int64_t start = 0; start < total; start += a.stage) {
        const int length = (int)min((int64_t)a.stage, total - start);
        const int first = (int)min((int64_t)length, max((int64_t)0, span.before - start));
        scan_inputs<T, V> in;
        ask_for_stage<T, V>(a, p, span, tails, start, first, length, in);
        __syncthreads(); /* the stage before is done with */
        take_stage<T, V>(a, p, span, tails, owner, start, first, length, bias, in, m);
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
            if (states.given && span.after > span.boundary && span.boundary + start + s + 1 == span.after) {
                store_H<V, J>(a, H, c, lane_n, tails.state);
            }
        }
        __syncthreads();
        finish_rows<T, COLUMNS>(a, p, span, start, first, length, D, m);
    }
    if (states.given && !appends) {
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
