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
 * Sequences of more than a window (prompts) have a kernel of their own below.
 *
 * Tokens pass through shared memory, `stage` at a time.  The sum over n is a chain over j in a thread, a tree over the
 * 16 lanes (shuffles, then shared memory), so a row's bits depend on nothing but its sequence's tokens.
 */
#include "table.h"
#include "tail.cuh"

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
    int stage;            /* tokens at a time */
    int B_width, C_width; /* of B and C in shared memory: all groups that a block may need */
    int64_t least, most;  /* rows of the sequences that this launch is for */
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
    return mil_time_step(mil_float(((const T *)a.dt)[row * a.dt_stride + channel]) + bias, a.dt_min,
                         a.dt_max);
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

/* 2^x; below 2^-126 it is 0. */
static __device__ __forceinline__ float
fast_power(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
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
            H[j][v] = fmaf(fast_power(dt[v] * exponent[j][v]), H[j][v], input[v] * B[j]);
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

/* ---- prompts ------------------------------------------------------------------------------------------------------- */

/* Sequences of more than a window, in 16-bit types: what counts is exponentials, inner * state_dim of them a token (and
 * 4 more a channel for softplus and gate), at 16 a cycle and multiprocessor.  So a thread has SIZE states of one channel
 * and per state and token five instructions, one of them the exponential; LANES threads share a channel, as few as keep
 * the chip busy.  The sum over n costs little because LANES tokens are summed at once, each lane ending with one of
 * them.
 *
 * Tokens go through shared memory in pieces of ELEMENTS / COLUMNS: pairs (dt, dt x), of which the first is then
 * overwritten by sum_n C H. A thread loads and finishes 8 neighbouring channels of a token with 16-byte accesses; those of
 * the next piece are on their way while this one is computed.  Pieces begin at multiples of 16 tokens, so the state to
 * be kept is always that between two groups of 16. */

#define ELEMENTS 2048 /* of a piece */
#define VECTOR 8      /* channels of a 16-byte access */

static __device__ __forceinline__ float
fast_log2(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float
fast_silu(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + fast_power(-log2_e * x)));
    return x * y;
}

/* What a thread has of two tokens: raw rows of x, dt and z. */
template <typename T>
struct raw_piece {
    mil_vector<T, VECTOR> x[2], dt[2], z[2];
};

/* Where a thread loads: channels `channel` .. + VECTOR of tokens `token` and `token` + `apart` of a piece. */
struct piece_place {
    int channel, source; /* source: its first column of x */
    int token, apart;
    int column; /* the first of its channels within the block */
};

template <typename T>
static __device__ __forceinline__ void
load_raw(const scan_arguments &a, const mil_span &span, const piece_place &p, int64_t start,
         raw_piece<T> &raw)
{
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int64_t token = start + p.token + k * p.apart, row = span.row + token;
        if (token >= 0 && token < span.count && p.channel < a.inner) {
            raw.x[k] = *(const mil_vector<T, VECTOR> *)((const T *)a.x + row * a.x_stride + p.source);
            raw.dt[k] = *(const mil_vector<T, VECTOR> *)((const T *)a.dt + row * a.dt_stride + p.channel);
            if (a.z != NULL) {
                raw.z[k] = *(const mil_vector<T, VECTOR> *)((const T *)a.z + row * a.z_stride + p.channel);
            }
        }
    }
}

/* log(1 + e^x) without a branch; where e^x is small 1 + e^x would lose its digits. */
static __device__ __forceinline__ float
fast_softplus(float x)
{
    float e = fast_power(log2_e * x), series = e * fmaf(e, fmaf(e, 1.0f / 3, -0.5f), 1.0f);
    float value = e < 0x1p-6f ? series : 0.6931471806f * fast_log2(1.0f + e);
    return x > 20.0f ? x : value;
}

static __device__ __forceinline__ void
load_vector(const float *from, float (&to)[VECTOR])
{
    float4 low = __ldg((const float4 *)from), high = __ldg((const float4 *)from + 1);
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

/* Pairs (dt, dt x) of the thread's part of a piece, zeros where there is no token: those leave H as it is. */
template <typename T, int COLUMNS>
static __device__ __forceinline__ void
store_pairs(const scan_arguments &a, const mil_span &span, const piece_place &p, int64_t start,
            const raw_piece<T> &raw, float2 *pairs)
{
    float bias[VECTOR];
    load_vector(a.dt_bias + min(p.channel, a.inner - VECTOR), bias);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int64_t token = start + p.token + k * p.apart;
        bool inside = token >= 0 && token < span.count && p.channel < a.inner;
        float pair[2 * VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            float dt = fast_softplus(fmaf(a.dt_bias_scale, bias[i], mil_float(raw.dt[k].at[i])));
            dt = dt < a.dt_min ? a.dt_min : dt;
            dt = dt > a.dt_max ? a.dt_max : dt;
            pair[2 * i] = inside ? dt : 0.0f;
            pair[2 * i + 1] = inside ? dt * mil_float(raw.x[k].at[i]) : 0.0f;
        }
        float4 *to = (float4 *)(pairs + (p.token + k * p.apart) * COLUMNS + p.column);
#pragma unroll
        for (int i = 0; i < VECTOR / 2; i++) {
            to[i] = make_float4(pair[4 * i], pair[4 * i + 1], pair[4 * i + 2], pair[4 * i + 3]);
        }
    }
}

/* y of the thread's part of a piece from the sums and what it had loaded. */
template <typename T, int COLUMNS>
static __device__ __forceinline__ void
finish_piece(const scan_arguments &a, const mil_span &span, const piece_place &p, int64_t start,
             const raw_piece<T> &raw, const float2 *pairs)
{
    float D[VECTOR];
    load_vector(a.D + min(p.channel, a.inner - VECTOR), D);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int64_t token = start + p.token + k * p.apart;
        if (token < 0 || token >= span.count || p.channel >= a.inner) {
            continue;
        }
        const float4 *from = (const float4 *)(pairs + (p.token + k * p.apart) * COLUMNS + p.column);
        float y[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR / 2; i++) {
            float4 two = from[i];
            y[2 * i] = two.x;
            y[2 * i + 1] = two.z;
        }
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            y[i] = fmaf(D[i], mil_float(raw.x[k].at[i]), y[i]);
            y[i] *= a.z != NULL ? fast_silu(mil_float(raw.z[k].at[i])) : 1.0f;
        }
        mil_store<VECTOR>((T *)a.y + (span.row + token) * a.y_stride + p.channel, y);
    }
}

/* B or C of a piece as float32 [tokens, width], zeros where there is no token; only `inside` columns exist. */
template <typename T>
static __device__ __forceinline__ void
load_columns(const T *from, int64_t stride, int width, int inside, int tokens, const mil_span &span,
             int64_t start, float *to)
{
    const int rows = max(1, THREADS / width), first = threadIdx.x / width; /* rows at a time; the thread's */
    if (first >= rows) {
        return;
    }
    for (int c = threadIdx.x % width; c < width; c += THREADS) {
#pragma unroll 4
        for (int row = first; row < tokens; row += rows) {
            int64_t token = start + row;
            bool is_there = token >= 0 && token < span.count && c < inside;
            to[row * width + c] = is_there ? mil_float(from[(span.row + token) * stride + c]) : 0.0f;
        }
    }
}

/* From LANES tokens' parts in every lane to one token's sum in each: lane l gets token l's. */
template <int LANES>
static __device__ __forceinline__ float
add_lanes(float (&y)[LANES], int lane)
{
#pragma unroll
    for (int half = LANES / 2; half > 0; half /= 2) {
        bool upper = lane & half;
#pragma unroll
        for (int u = 0; u < half; u++) {
            float sent = upper ? y[u] : y[u + half], own = upper ? y[u + half] : y[u];
            y[u] = own + __shfl_xor_sync(MIL_ALL_LANES, sent, half);
        }
    }
    return y[0];
}

/* The recurrence over LANES tokens. B and C: the thread's SIZE columns of the first token. */
template <int SIZE, int LANES, int COLUMNS>
static __device__ __forceinline__ void
run_tokens(float2 *pairs, const float *B, int B_width, const float *C, int C_width, int lane,
           const float (&exponent)[SIZE], float (&H)[SIZE])
{
    constexpr int AT_ONCE = SIZE < 4 ? SIZE : 4;
    float y[LANES];
#pragma unroll
    for (int u = 0; u < LANES; u++) {
        const float2 pair = pairs[u * COLUMNS];
        y[u] = 0.0f;
#pragma unroll
        for (int first = 0; first < SIZE; first += AT_ONCE) {
            float b[AT_ONCE], c[AT_ONCE];
            mil_load<AT_ONCE>(B + u * B_width + first, b);
            mil_load<AT_ONCE>(C + u * C_width + first, c);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int n = first + i;
                H[n] = fmaf(fast_power(pair.x * exponent[n]), H[n], pair.y * b[i]);
                y[u] = fmaf(c[i], H[n], y[u]);
            }
        }
    }
    pairs[lane * COLUMNS].x = add_lanes<LANES>(y, lane); /* all lanes of the channel have read it */
}

/* Tail tokens of earlier calls. */
template <int SIZE>
static __device__ __forceinline__ void
replay_tail(const scan_arguments &a, const mil_span &span, const mil_tails &tails, int c, int B_at,
            int n_first, const float (&exponent)[SIZE], float (&H)[SIZE])
{
    for (int token = 0; token < span.before; token++) {
        float dt = tails.dt[(int64_t)token * a.inner + c];
        float x = tails.x[(int64_t)token * (a.inner / a.x_repeat) + source_of(a, c)];
        const float *B = tails.B + (int64_t)token * a.B_groups * a.state_dim + B_at;
#pragma unroll
        for (int n = 0; n < SIZE; n++) {
            H[n] = fmaf(fast_power(dt * exponent[n]), H[n], dt * x * B[n_first + n]);
        }
    }
}

/* Grid: blocks of channels, sequences. SIZE * LANES is state_dim. */
template <typename T, int SIZE, int LANES>
static __global__ void
__launch_bounds__(THREADS, SIZE <= 8 ? 4 : 2)
    scan_pieces_kernel(const __grid_constant__ scan_arguments a, const __grid_constant__ mil_states states)
{
    constexpr int COLUMNS = THREADS / LANES, TOKENS = ELEMENTS / COLUMNS, ACROSS = COLUMNS / VECTOR;
    static_assert(TOKENS % MIL_WINDOW == 0 && MIL_WINDOW % LANES == 0,
                  "pieces are whole groups of 16 tokens");
    extern __shared__ __align__(16) float shared[];
    float2 *pairs = (float2 *)shared;
    float *B_piece = shared + 2 * ELEMENTS, *C_piece = B_piece + TOKENS * a.B_width;
    const int column = threadIdx.x / LANES, lane = threadIdx.x % LANES, n_first = lane * SIZE;
    const int channel = blockIdx.x * COLUMNS, c = channel + column, c_inside = min(c, a.inner - 1);
    const int B_run = a.inner / a.B_groups, C_run = a.inner / a.C_groups;
    const int B_at = channel / B_run * a.state_dim, C_at = channel / C_run * a.state_dim;
    const int B_own = c_inside / B_run * a.state_dim - B_at, C_own = c_inside / C_run * a.state_dim - C_at;
    const mil_tails tails = states.of[blockIdx.y];
    float *state = states.given ? tails.state : NULL;
    piece_place p;
    p.token = threadIdx.x / ACROSS;
    p.apart = THREADS / ACROSS;
    p.column = threadIdx.x % ACROSS * VECTOR;
    p.channel = channel + p.column;
    p.source = source_of(a, min(p.channel, a.inner - VECTOR));
    float H[SIZE], exponent[SIZE];
#pragma unroll
    for (int n = 0; n < SIZE; n++) {
        exponent[n] = -log2_e * fminf(expf(a.A_log[(int64_t)c_inside * a.state_dim + n_first + n]), 1e30f);
        H[n] = 0.0f;
    }
    mil_wait();
    const mil_span span = mil_span_of(a.rows, a.first + blockIdx.y);
    if (span.count < a.least) {
        return;
    }
    int64_t start = -(int64_t)(span.before % MIL_WINDOW); /* token of this call at which the piece begins */
    raw_piece<T> raw, next;
    load_raw(a, span, p, start, raw);
    if (state != NULL) {
#pragma unroll
        for (int n = 0; n < SIZE; n++) {
            H[n] = state[(int64_t)(n_first + n) * a.inner + c_inside];
        }
        replay_tail<SIZE>(a, span, tails, c_inside, B_at + B_own, n_first, exponent, H);
    }
    for (; start < span.count; start += TOKENS) {
        __syncthreads(); /* the piece before is finished */
        load_columns((const T *)a.B + B_at, a.B_stride, a.B_width, a.B_groups * a.state_dim - B_at, TOKENS,
                     span, start, B_piece);
        load_columns((const T *)a.C + C_at, a.C_stride, a.C_width, a.C_groups * a.state_dim - C_at, TOKENS,
                     span, start, C_piece);
        store_pairs<T, COLUMNS>(a, span, p, start, raw, pairs);
        __syncthreads();
        load_raw(a, span, p, start + TOKENS, next);
        for (int group = 0; group < TOKENS; group += MIL_WINDOW) {
            for (int s = group; s < group + MIL_WINDOW; s += LANES) {
                run_tokens<SIZE, LANES, COLUMNS>(
                    pairs + s * COLUMNS + column, B_piece + s * a.B_width + B_own + n_first, a.B_width,
                    C_piece + s * a.C_width + C_own + n_first, a.C_width, lane, exponent, H);
            }
            if (state != NULL && span.past + start + group + MIL_WINDOW == span.after && c < a.inner) {
#pragma unroll
                for (int n = 0; n < SIZE; n++) {
                    state[(int64_t)(n_first + n) * a.inner + c] = H[n];
                }
            }
        }
        __syncthreads();
        finish_piece<T, COLUMNS>(a, span, p, start, raw, pairs);
        raw = next;
    }
    mil_trigger();
    if (state != NULL) {
        move_tails<T, COLUMNS>(a, span, tails, channel);
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

template <typename T, int SIZE, int LANES>
static mil_status
launch_pieces(mil_context *context, scan_arguments a, const mil_states &states, int64_t sequences)
{
    constexpr int COLUMNS = THREADS / LANES, TOKENS = ELEMENTS / COLUMNS;
    a.B_width = group_columns(a.inner, a.B_groups, a.state_dim, COLUMNS);
    a.C_width = group_columns(a.inner, a.C_groups, a.state_dim, COLUMNS);
    size_t floats = 2 * ELEMENTS + (size_t)TOKENS * (a.B_width + a.C_width);
    return mil_launch(context, "scan", scan_pieces_kernel<T, SIZE, LANES>,
                      dim3((unsigned)mil_ceil_div(a.inner, COLUMNS), (unsigned)sequences), dim3(THREADS),
                      floats * sizeof(float), a, states);
}

/* Many channels: two threads a channel. Few: as many as make the most of one sequence. */
template <typename T>
static mil_status
choose_lanes(mil_context *context, const scan_arguments &a, const mil_states &states, int64_t sequences)
{
    const int64_t enough = 1 << 15; /* threads: 8 warps on each multiprocessor */
    const bool many = 2 * sequences * a.inner >= enough;
    return a.state_dim == 16   ? (many ? launch_pieces<T, 8, 2>(context, a, states, sequences)
                                       : launch_pieces<T, 2, 8>(context, a, states, sequences))
           : a.state_dim == 32 ? launch_pieces<T, 8, 4>(context, a, states, sequences)
                               : launch_pieces<T, 8, 8>(context, a, states, sequences);
}

/* Whether states divide among threads, and all rows can be read and written 16 bytes at a time. */
template <typename T>
static bool
takes_pieces(const scan_arguments &a)
{
    const bool divides = a.state_dim == 16 || a.state_dim == 32 || a.state_dim == 64;
    return sizeof(T) == 2 && divides && a.inner % VECTOR == 0 &&
           (a.x_repeat == 1 || a.x_repeat_group % VECTOR == 0) && mil_is_aligned<T>(a.x, a.x_stride) &&
           mil_is_aligned<T>(a.dt, a.dt_stride) && mil_is_aligned<T>(a.y, a.y_stride) &&
           (a.z == NULL || mil_is_aligned<T>(a.z, a.z_stride)) && mil_is_aligned<float>(a.dt_bias, 0) &&
           mil_is_aligned<float>(a.D, 0);
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
        const bool pieces = takes_pieces<T>(a) && mil_longest(s->rows, a.first, count) > MIL_WINDOW;
        a.least = 0;
        a.most = pieces ? MIL_WINDOW : INT64_MAX;
        if (!pieces || mil_shortest(s->rows, a.first, count) <= MIL_WINDOW) {
            MIL_TRY((takes_vectors<T>(a) ? choose_rows<T, 4> : choose_rows<T, 1>)(context, a, states, count));
        }
        if constexpr (sizeof(T) == 2) {
            a.least = MIL_WINDOW + 1;
            MIL_TRY(pieces ? choose_lanes<T>(context, a, states, count) : MIL_OK);
        }
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
        return mil_fail(
            MIL_ERR_SHAPE,
            "scan_forward: inner = %lld is not a multiple of x_repeat = %lld times x_repeat_group = %lld",
            (long long)a->inner, (long long)a->x_repeat, (long long)a->x_repeat_group);
    }
    return MIL_FOR_ACT(context, scan, context, a);
}
