/* Mamba-2's selective scan of a few rows a sequence (device.h: mil_ssd, csrc/cpu/ssd.c), in its dual form.
 *
 * With H the state before a window of MIL_WINDOW tokens, W[i, s] = decay_{s+1} .. decay_i, h_i = decay_0 .. decay_i:
 *
 *   y_i = h_i H^T C_i + sum_{s <= i} W[i, s] dt_s (C_i . B_s) x_s + D x_i
 *   H'  = h_last H + sum_s W[last, s] dt_s B_s (outer) x_s
 *
 * A block has one head of one sequence and holds a slice of COLUMNS of its head_dim of H in registers while it goes
 * through the windows from the boundary on: H is read once for all rows of the call, and written where a window is
 * folded (every 16th token in decoding).  Where there are many sequences a block does several slices of its head one
 * after another, with the same scores.
 *
 *   thread      V = 4 neighbouring columns, and rows n = lane + 32 j of H; 8 threads side by side make the slice, 32
 *               of them (in n) a column: 16 KB of H for a state of 128 x 128, so that one sequence of a model spreads
 *               over the whole chip
 *   C_i . H     a chain over j in each thread, then a fixed tree over the 32: shuffles, then shared memory
 *   C_i . B_s   16 threads each, a row of them at once; decays multiplied up in a fixed tree, never exponents of
 *               differences
 *
 * So a row is the same bits in any call of at most MIL_WINDOW rows a sequence; longer ones (prompts) take tensor cores
 * (ssd.cu) where types and shapes allow.  One row is a matter of latency: whatever earlier calls left is taken before the
 * kernel before has ended (mil_rows.settled): H, the tails' rows, and the fold of a window of nothing else.  What
 * remains is one trip to this call's rows, all asked for at once, and some 500 cycles.  The tails grow when y is
 * out.  Bytes of a decoding step: heads * state_dim * head_dim * 4 for H; the tail, 8 tokens on the average, is some
 * hundredths of that.
 */
#include "ssd.cuh"

#define WINDOW MIL_WINDOW
#define QUADS 8    /* threads side by side */
#define LANES_N 32 /* threads that share a column */
#define GROUP 4    /* rows whose partial sums are in shared memory at once */

#define THREADS (QUADS * LANES_N)
#define WARPS (THREADS / MIL_WARP)

/* What a block keeps of one window. ROWS = rows of H that it has room for. */
template <int COLUMNS, int ROWS>
struct window_memory {
    float B[WINDOW][ROWS], C[WINDOW][ROWS], x[WINDOW][COLUMNS];
    float partial[GROUP][WARPS][COLUMNS];
    float weight[WINDOW][WINDOW]; /* W dt (C . B) of rows to be computed */
    float dt[WINDOW], decay[WINDOW];
    float from_start[WINDOW]; /* h_i */
    float to_end[WINDOW];     /* W[last, s] dt_s */
};

/* Where a thread's vectors of B and C are in a window: rows s, columns n. */
template <int V, int J>
struct window_share {
    static constexpr int VECTORS = LANES_N * J / V;          /* of a row of B */
    static constexpr int COUNT = WINDOW * VECTORS / THREADS; /* of B, and of C */

    static __device__ __forceinline__ int row(int k)
    {
        return (threadIdx.x + k * THREADS) / VECTORS;
    }

    static __device__ __forceinline__ int column(int k)
    {
        return (threadIdx.x + k * THREADS) % VECTORS * V;
    }
};

/* The window's rows of earlier calls, its first `first`, and what rows of no token or columns of no state hold, into
 * shared memory (if not `whole`, x only). */
template <int V, int J>
static __device__ __forceinline__ void
take_tail(const ssd_arguments &a, const window_place &p, const mil_tails &tails, int start, int first,
          int length, bool whole, float exponent, window_memory<V * QUADS, LANES_N * J> &m)
{
    using share = window_share<V, J>;
    const int64_t x_width = (int64_t)a.x_heads * a.head_dim, B_width = (int64_t)a.B_groups * a.state_dim;
    const int x_row = threadIdx.x / QUADS, x_column = threadIdx.x % QUADS * V, s = threadIdx.x;
    const bool has_x = x_row < first && x_column < p.columns, has_dt = whole && s < first;
    float B[share::COUNT][V], x[V], dt[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < share::COUNT; k++) {
        if (whole && share::row(k) < first && share::column(k) < a.state_dim) {
            mil_load_settled<V>(tails.B + (start + share::row(k)) * B_width + p.B_column + share::column(k),
                                B[k]);
        }
    }
    if (has_x) {
        mil_load_settled<V>(tails.x + (start + x_row) * x_width + p.x_column + x_column, x);
    }
    if (has_dt) {
        mil_load_settled<1>(tails.dt + (start + s) * a.heads + p.head, dt);
    }
#pragma unroll
    for (int k = 0; k < share::COUNT; k++) {
        const float zeros[V] = {};
        const int row = share::row(k), n = share::column(k);
        if (whole && row < length && n >= a.state_dim) {
            mil_store<V>(&m.B[row][n], zeros);
            mil_store<V>(&m.C[row][n], zeros);
        }
        else if (whole && row < first) {
            mil_store<V>(&m.B[row][n], B[k]);
        }
    }
    if (has_x) {
        mil_store<V>(&m.x[x_row][x_column], x);
    }
    if (whole && (s < first || (s >= length && s < WINDOW))) {
        m.dt[s] = dt[0];
        m.decay[s] = exp2f(dt[0] * exponent);
    }
}

/* A window's rows of this call on their way to shared memory: each thread's share. */
template <typename T, int V, int J>
struct window_rows {
    mil_vector<T, V> B[window_share<V, J>::COUNT], C[window_share<V, J>::COUNT], x;
    T dt;
};

/* Where a thread's share of them begins: at hand when the kernel before has ended. */
template <typename T>
struct window_sources {
    const T *B, *C, *x, *dt;
};

/* `row`: of the window's first token, if it is of this call. */
template <typename T, int V, int J>
static __device__ __forceinline__ window_sources<T>
find_sources(const ssd_arguments &a, const window_place &p, int64_t row)
{
    using share = window_share<V, J>;
    window_sources<T> from = {
        (const T *)a.B + (row + share::row(0)) * a.B_stride + p.B_column + share::column(0),
        (const T *)a.C + (row + share::row(0)) * a.C_stride + p.C_column + share::column(0),
        (const T *)a.x + (row + threadIdx.x / QUADS) * a.x_stride + p.x_column + threadIdx.x % QUADS * V,
        (const T *)a.dt + (row + threadIdx.x) * a.dt_stride + p.head,
    };
    asm volatile("" : "+l"(from.B), "+l"(from.C), "+l"(from.x), "+l"(from.dt)); /* now, not later */
    return from;
}

template <typename T, int V, int J>
static __device__ __forceinline__ void
ask_for_rows(const ssd_arguments &a, const window_place &p, const window_sources<T> &from, int first,
             int length, bool whole, window_rows<T, V, J> &in)
{
    using share = window_share<V, J>;
    const int s = threadIdx.x / QUADS, c = threadIdx.x % QUADS * V;
#pragma unroll
    for (int k = 0; k < share::COUNT; k++) {
        const int i = share::row(k);
        if (whole && i >= first && i < length && share::column(k) < a.state_dim) {
            in.B[k] = *(const mil_vector<T, V> *)(from.B + (i - share::row(0)) * a.B_stride);
            in.C[k] = *(const mil_vector<T, V> *)(from.C + (i - share::row(0)) * a.C_stride);
        }
    }
    if (s >= first && s < length && c < p.columns) {
        in.x = *(const mil_vector<T, V> *)from.x;
    }
    if ((int)threadIdx.x >= first && (int)threadIdx.x < length) {
        in.dt = *from.dt;
    }
}

template <typename T, int V, int J>
static __device__ __forceinline__ void
take_rows(const ssd_arguments &a, const window_place &p, int first, int length, bool whole, float exponent,
          float bias, const window_rows<T, V, J> &in, window_memory<V * QUADS, LANES_N * J> &m)
{
    using share = window_share<V, J>;
    const int x_row = threadIdx.x / QUADS, x_column = threadIdx.x % QUADS * V, s = threadIdx.x;
    float value[V];
    if (whole && s >= first && s < length) {
        const float dt = mil_time_step(mil_float(in.dt) + bias, a.dt_min, a.dt_max);
        m.dt[s] = dt;
        m.decay[s] = exp2f(dt * exponent);
    }
#pragma unroll
    for (int k = 0; k < share::COUNT; k++) {
        const int row = share::row(k), n = share::column(k);
        if (whole && row >= first && row < length && n < a.state_dim) {
            mil_widen<T, V>(in.B[k], value);
            mil_store<V>(&m.B[row][n], value);
            mil_widen<T, V>(in.C[k], value);
            mil_store<V>(&m.C[row][n], value);
        }
    }
    if (x_row >= first && x_row < length && x_column < p.columns) {
        mil_widen<T, V>(in.x, value);
        mil_store<V>(&m.x[x_row][x_column], value);
    }
}

/* One row of this call, the whole of which the block's threads fetch with a load each, from and to addresses that they have
 * before it is there. */
template <typename T, int V, int J>
struct window_row {
    static constexpr int VECTORS = window_share<V, J>::VECTORS;
    static constexpr bool FITS = 2 * VECTORS + QUADS < THREADS;
    const T *from;
    float *to;
    bool mine, is_dt;

    /* `row`: of the call; it is the window's `s`-th. */
    __device__ __forceinline__ window_row(const ssd_arguments &a, const window_place &p, int64_t row, int s,
                                          bool whole, window_memory<V * QUADS, LANES_N * J> &m)
    {
        const int at = threadIdx.x, n = at % VECTORS * V, c = (at - 2 * VECTORS) * V;
        const bool is_B = at < VECTORS, is_C = at >= VECTORS && at < 2 * VECTORS;
        is_dt = at == THREADS - 1;
        from = is_B    ? (const T *)a.B + row * a.B_stride + p.B_column + n
               : is_C  ? (const T *)a.C + row * a.C_stride + p.C_column + n
               : is_dt ? (const T *)a.dt + row * a.dt_stride + p.head
                       : (const T *)a.x + row * a.x_stride + p.x_column + c;
        to = is_B    ? &m.B[s][n]
             : is_C  ? &m.C[s][n]
             : is_dt ? &m.dt[s]
                     : &m.x[s][min(max(c, 0), V * QUADS - V)];
        mine = is_B || is_C ? whole && n < a.state_dim : at < 2 * VECTORS + QUADS && c < p.columns;
        is_dt = is_dt && whole;
        asm volatile("" : "+l"(from), "+l"(to)); /* now, not later */
    }

    __device__ __forceinline__ void
    take(const ssd_arguments &a, float exponent, float bias, float *decay) const
    {
        if (mine) {
            float value[V];
            mil_load<V>(from, value);
            mil_store<V>(to, value);
        }
        if (is_dt) {
            const float dt = mil_time_step(mil_float(*from) + bias, a.dt_min, a.dt_max);
            *to = dt;
            *decay = exp2f(dt * exponent);
        }
    }
};

/* Which of the tails' columns this block appends to, where no fold moves them. */
struct window_owner {
    bool x, B, dt;
};

/* The window's rows of this call to the tails, as far as the block owns the columns. */
template <int V, int J>
static __device__ __forceinline__ void
append_rows(const ssd_arguments &a, const window_place &p, const mil_tails &tails, const window_owner &owner,
            int start, int first, int length, const window_memory<V * QUADS, LANES_N * J> &m)
{
    using share = window_share<V, J>;
    const int x_row = threadIdx.x / QUADS, x_column = threadIdx.x % QUADS * V, s = threadIdx.x;
    float value[V];
    if (owner.x && x_row >= first && x_row < length && x_column < p.columns) {
        mil_load<V>(&m.x[x_row][x_column], value);
        mil_store<V>(tails.x + (start + x_row) * a.x_heads * a.head_dim + p.x_column + x_column, value);
    }
    if (owner.dt && s >= first && s < length) {
        tails.dt[(start + s) * a.heads + p.head] = m.dt[s];
    }
#pragma unroll
    for (int k = 0; k < share::COUNT; k++) {
        const int row = share::row(k), n = share::column(k);
        if (owner.B && row >= first && row < length && n < a.state_dim) {
            mil_load<V>(&m.B[row][n], value);
            mil_store<V>(tails.B + (start + row) * a.B_groups * a.state_dim + p.B_column + n, value);
        }
    }
}

/* Weights of rows first .. length, AT_ONCE at a time. */
template <int V, int AT_ONCE, int COLUMNS, int ROWS>
static __device__ __forceinline__ void
fill_weights(int first, int length, window_memory<COLUMNS, ROWS> &m)
{
    const int lane = threadIdx.x % PAIR_LANES, s = threadIdx.x / PAIR_LANES % WINDOW;
    constexpr int ROWS_AT_ONCE = THREADS / PAIR_LANES / WINDOW;
    static_assert(ROWS_AT_ONCE == 1, "a block computes a row of weights at a time");
#pragma unroll 1
    for (int i = first; i < length; i += AT_ONCE) {
        float dot[AT_ONCE] = {}, product[AT_ONCE];
#pragma unroll
        for (int r = 0; r < AT_ONCE; r++) {
            product[r] = multiply_decays(m.decay, s, min(i + r, WINDOW - 1));
        }
#pragma unroll
        for (int n = lane * V; n < ROWS; n += PAIR_LANES * V) {
            float B[V];
            mil_load<V>(&m.B[s][n], B); /* beyond the rows it may be anything, and is not used */
#pragma unroll
            for (int r = 0; r < AT_ONCE; r++) {
                float C[V];
                mil_load<V>(&m.C[min(i + r, WINDOW - 1)][n], C);
#pragma unroll
                for (int v = 0; v < V; v++) {
                    dot[r] = fmaf(C[v], B[v], dot[r]);
                }
            }
        }
#pragma unroll
        for (int step = PAIR_LANES / 2; step > 0; step /= 2) {
#pragma unroll
            for (int r = 0; r < AT_ONCE; r++) {
                dot[r] += __shfl_xor_sync(MIL_ALL_LANES, dot[r], step);
            }
        }
#pragma unroll
        for (int r = 0; r < AT_ONCE; r++) {
            if (lane == 0 && s <= i + r && i + r < length) {
                m.weight[i + r][s] = product[r] * m.dt[s] * dot[r];
                if (s == 0) {
                    m.from_start[i + r] = m.decay[0] * product[r];
                }
            }
        }
    }
}

/* What the fold of a window needs. `has_rows`: of this call. */
template <int COLUMNS, int ROWS>
static __device__ __forceinline__ void
fill_fold(bool has_rows, window_memory<COLUMNS, ROWS> &m)
{
    const int s = threadIdx.x / PAIR_LANES % WINDOW;
    const float product = multiply_decays(m.decay, s, WINDOW - 1);
    if (threadIdx.x % PAIR_LANES == 0) {
        m.to_end[s] = product * m.dt[s];
        if (s == 0 && !has_rows) { /* else it is there, as a row's */
            m.from_start[WINDOW - 1] = m.decay[0] * product;
        }
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
template <typename T, int V, int J>
static __device__ __forceinline__ void
compute_rows(const ssd_arguments &a, const window_place &p, int64_t row, int i, int count, float D,
             const float (&H)[J][V], window_memory<V * QUADS, LANES_N * J> &m)
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
#pragma unroll 1
    for (int e = threadIdx.x; e < count * COLUMNS; e += THREADS) {
        int r = e / COLUMNS, c = e % COLUMNS;
        float y = m.from_start[i + r] * add_tree<WARPS>(&m.partial[r][0][c], COLUMNS);
#pragma unroll
        for (int s = 0; s < WINDOW; s++) {
            y = s <= i + r ? fmaf(m.weight[i + r][s], m.x[s][c], y) : y;
        }
        y = fmaf(D, m.x[i + r][c], y);
        if (c < p.columns) {
            ((T *)a.y)[(row + r) * a.y_stride + (int64_t)p.head * a.head_dim + p.column + c] =
                mil_round<T>(y);
        }
    }
}

/* H' of the window. */
template <int V, int J>
static __device__ __forceinline__ void
fold(const window_memory<V * QUADS, LANES_N * J> &m, float (&H)[J][V])
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
#pragma unroll 2
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

/* Moves the slice of H between registers and memory; `state` is the head's [state_dim, head_dim], or NULL. */
template <int V, int J>
static __device__ __forceinline__ void
load_H(const ssd_arguments &a, const window_place &p, const float *state, float (&H)[J][V])
{
    const int c = threadIdx.x % QUADS * V;
    mil_load_state<LANES_N>(state, p.column + c, a.state_dim, a.head_dim, c < p.columns, threadIdx.x / QUADS,
                            H);
}

template <int V, int J>
static __device__ __forceinline__ void
store_H(const ssd_arguments &a, const window_place &p, const float (&H)[J][V], float *state)
{
    const int c = threadIdx.x % QUADS * V;
    mil_store_state<LANES_N>(H, state, p.column + c, a.state_dim, a.head_dim, c < p.columns,
                             threadIdx.x / QUADS);
}

/* Asks for the columns of H after the first slice. */
static __device__ __forceinline__ void
prefetch_slices(const ssd_arguments &a, const window_place &p, int first, int columns, const float *state)
{
    constexpr int LINE = 32; /* floats */
#pragma unroll 1
    for (int c = first + threadIdx.x % QUADS * LINE; c < columns; c += QUADS * LINE) {
#pragma unroll 1
        for (int n = threadIdx.x / QUADS; n < a.state_dim; n += LANES_N) {
            mil_prefetch(state + (int64_t)n * a.head_dim + p.column + c);
        }
    }
}

/* All windows of one slice, whose H is at hand. Where there is but one window, what `m` has of it besides x is good for the
 * next slice.  Where nothing of earlier calls is read any more, `leave` is called. */
template <typename T, int V, int J, typename Leave>
static __device__ __forceinline__ void
run_slice(const ssd_arguments &a, const window_place &p, const mil_span &span, const mil_tails &tails,
          const window_owner &owner, bool is_first, float *state, float exponent, float bias, float D,
          float (&H)[J][V], window_memory<V * QUADS, LANES_N * J> &m, Leave leave)
{
    const int total = span.before + (int)span.count;
    const bool whole = is_first || total > WINDOW;
    bool asked = false;
    window_rows<T, V, J> in;
#pragma unroll 1
    for (int start = 0; start < total; start += WINDOW) {
        const int length = min(WINDOW, total - start);
        const int first = min(length, max(0, span.before - start));
        const int64_t row = span.row + start - span.before; /* of the first token, if it is of this call */
        const bool kept = state != NULL && span.boundary + start + WINDOW <= span.after;
        const bool folds = kept || start + WINDOW < total;
        __syncthreads(); /* the window before is done with */
        take_tail<V, J>(a, p, tails, start, first, length, whole, exponent, m);
        if (start + WINDOW >= span.before && (start == 0 || start < span.before)) {
            leave();
        }
        if (first < length) {
            if (window_row<T, V, J>::FITS && length - first == 1 && !asked) {
                const window_row<T, V, J> one(a, p, row + first, first, whole, m);
                mil_wait();
                one.take(a, exponent, bias, &m.decay[first]);
            }
            else {
                if (!asked) {
                    const window_sources<T> from = find_sources<T, V, J>(a, p, row);
                    mil_wait();
                    ask_for_rows<T, V, J>(a, p, from, first, length, whole, in);
                }
                take_rows<T, V, J>(a, p, first, length, whole, exponent, bias, in, m);
            }
        }
        __syncthreads();
        if (first < length && start + WINDOW < total) { /* on their way while this window is computed */
            ask_for_rows<T, V, J>(a, p, find_sources<T, V, J>(a, p, row + WINDOW), 0,
                                  min(WINDOW, total - start - WINDOW), whole, in);
            asked = true;
        }
        if (whole && length - first == 1) {
            fill_weights<V, 1>(first, length, m);
        }
        else if (whole) {
            fill_weights<V, GROUP>(first, length, m);
        }
        if (whole && folds) {
            fill_fold(first < length, m);
        }
#pragma unroll 1
        for (int i = first; i < length; i += GROUP) {
            if (i > first) {
                __syncthreads();
            }
            compute_rows<T, V, J>(a, p, row + i, i, min(GROUP, length - i), D, H, m);
        }
        append_rows<V, J>(a, p, tails, owner, start, first, length, m);
        if (folds) {
            __syncthreads();
            fold<V, J>(m, H);
        }
        if (kept && start + 2 * WINDOW + span.boundary > span.after) {
            store_H<V, J>(a, p, H, state);
        }
    }
}

/* Grid: groups of slices of a head, heads, sequences. */
template <typename T, int V, int J>
static __global__ void
__launch_bounds__(THREADS, J <= 4 ? 2 : 1)
    ssd_windows_kernel(const __grid_constant__ ssd_arguments a, const __grid_constant__ mil_states states)
{
    extern __shared__ __align__(128) char shared[];
    auto &m = *reinterpret_cast<window_memory<V * QUADS, LANES_N * J> *>(shared);
    mil_trigger();
    const int of_x = a.heads / a.x_heads, of_B = a.heads / a.B_groups;
    const mil_tails tails = states.of[blockIdx.z];
    const int slice = blockIdx.x * a.slices_a_block, slices = min(a.slices_a_block, a.slices - slice);
    window_place p;
    p.head = blockIdx.y;
    p.column = slice * V * QUADS;
    p.x_column = (int64_t)(p.head / of_x) * a.head_dim + p.column;
    p.B_column = (int64_t)(p.head / of_B) * a.state_dim;
    p.C_column = (int64_t)(p.head / (a.heads / a.C_groups)) * a.state_dim;
    p.is_first_of_group = p.head % of_B == 0 && blockIdx.x == 0;
    float *state = states.given ? tails.state + (int64_t)p.head * a.state_dim * a.head_dim : NULL;
    const float exponent = get_exponent(a, p.head), bias = a.dt_bias[p.head], D = a.D[p.head];
    mil_wait_for_states(a.rows);
    const mil_span span = mil_share_span(a.rows, a.first + blockIdx.z);
    if (span.count < a.least || span.count > a.most) {
        mil_wait();
        return;
    }
    const bool appends = state != NULL && span.after == span.boundary; /* no rows of the tails move */
    window_owner owner = {appends && p.head % of_x == 0, appends && p.is_first_of_group,
                          appends && blockIdx.x == 0};
    unsigned last = 0; /* the tails that this block is to move, as the last to have read them */
    if (state != NULL && slices > 1) {
        prefetch_slices(a, p, V * QUADS, min(slices * V * QUADS, a.head_dim - p.column), state);
    }
    const int first_column = p.column;
#pragma unroll 1
    for (int k = 0; k < slices; k++) {
        p.columns = min(V * QUADS, a.head_dim - p.column);
        float H[J][V];
        load_H<V, J>(a, p, state, H);
        run_slice<T, V, J>(a, p, span, tails, owner, k == 0, state, exponent, bias, D, H, m, [&]() {
            if (state != NULL && !appends && k == slices - 1) {
                last = come_for_tails(a, p, tails, gridDim.x);
            }
        });
        owner.B = owner.dt = false;
        p.column += V * QUADS;
        p.x_column += V * QUADS;
    }
    if (state != NULL && !appends) {
        p.x_column -= p.column - first_column; /* all columns of the block */
        p.columns = min(p.column, a.head_dim) - first_column;
        p.column = first_column;
        move_tails<T>(a, p, span, tails, last, bias);
    }
    mil_wait();
}

/* ---- launches --------------------------------------------------------------------------------------------------- */

template <typename T, int V, int J>
static mil_status
launch_windows(mil_context *context, ssd_arguments a, const mil_states &states, int64_t sequences)
{
    const int64_t enough = 512; /* blocks */
    a.slices = (int)mil_ceil_div(a.head_dim, V * QUADS);
    const int64_t at_once = sequences * a.heads * a.slices / enough;
    a.slices_a_block = (int)(at_once < 1 ? 1 : at_once > a.slices ? a.slices : at_once);
    dim3 grid((unsigned)mil_ceil_div(a.slices, a.slices_a_block), (unsigned)a.heads, (unsigned)sequences);
    return mil_launch(context, "ssd", ssd_windows_kernel<T, V, J>, grid, dim3(THREADS),
                      sizeof(window_memory<V * QUADS, LANES_N * J>), a, states);
}

template <typename T, int V>
static mil_status
choose_rows(mil_context *context, const ssd_arguments &a, const mil_states &states, int64_t sequences)
{
    return a.state_dim <= 4 * LANES_N             ? launch_windows<T, V, 4>(context, a, states, sequences)
           : a.state_dim <= 8 * LANES_N && V == 4 ? launch_windows<T, 4, 8>(context, a, states, sequences)
                                                  : launch_windows<T, V, 16>(context, a, states, sequences);
}

/* Whether everything can be read 4 elements at a time. */
template <typename T>
static bool
takes_vectors(const ssd_arguments &a)
{
    return a.head_dim % 4 == 0 && a.state_dim % 4 == 0 && mil_is_aligned<T>(a.x, a.x_stride) &&
           mil_is_aligned<T>(a.B, a.B_stride) && mil_is_aligned<T>(a.C, a.C_stride);
}

template <typename T>
static mil_status
windows(mil_context *context, const ssd_arguments &a, const mil_states &states, int64_t sequences)
{
    return (takes_vectors<T>(a) ? choose_rows<T, 4> : choose_rows<T, 1>)(context, a, states, sequences);
}

mil_status
mil_ssd_windows(mil_context *context, const ssd_arguments *arguments, const mil_states *states,
                int64_t sequences)
{
    return MIL_FOR_ACT(context, windows, context, *arguments, *states, sequences);
}
