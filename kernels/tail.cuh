/* Where a sequence's tokens are in a mixer call, and how several blocks move its tails on (csrc/cpu/tail.h says
 * what a tail is).
 *
 * Blocks of one sequence share columns of its tails: the heads of a group read the same B.  Rows of this call are
 * read from the activations and appended where no token was, so any one block may write them.  Only a fold moves
 * rows that other blocks may still be reading; then the last block to have read them does it.  The blocks count
 * themselves in the tail's last row, which never holds a token: between calls it is 0.
 */
#ifndef MIL_KERNELS_TAIL_CUH
#define MIL_KERNELS_TAIL_CUH

#include "cuda.cuh"

/* ---- states of the sequences --------------------------------------------------------------------------------- */

/* Sequences of one launch: their states travel as kernel parameters, so that nothing is uploaded. */
#define MIL_SEQUENCES 64

struct mil_tails {
    float *state, *conv, *x, *B, *dt;
};

struct mil_states {
    mil_tails of[MIL_SEQUENCES];
    bool given; /* else every sequence begins here and leaves nothing */
};

/* The states of sequences `first` .. `first` + `count`. */
static inline mil_states
mil_states_of(const mil_mixer_state *states, int64_t first, int64_t count)
{
    mil_states s = {};
    s.given = states != NULL;
    for (int64_t i = 0; s.given && i < count; i++) {
        const mil_mixer_state *from = states + first + i;
        s.of[i] = {from->state, from->conv, from->x, from->B, from->dt};
    }
    return s;
}

/* The most rows that one of the sequences brings: host numbers, constant within a graph. */
static inline int64_t
mil_longest(const mil_rows &rows, int64_t first, int64_t count)
{
    int64_t longest = 0;
    for (int64_t i = first; i < first + count; i++) {
        int64_t length = rows.offsets[i + 1] - rows.offsets[i];
        longest = length > longest ? length : longest;
    }
    return longest;
}

static inline int64_t
mil_shortest(const mil_rows &rows, int64_t first, int64_t count)
{
    int64_t shortest = INT64_MAX;
    for (int64_t i = first; i < first + count; i++) {
        int64_t length = rows.offsets[i + 1] - rows.offsets[i];
        shortest = length < shortest ? length : shortest;
    }
    return shortest;
}

/* ---- spans ---------------------------------------------------------------------------------------------------- */

struct mil_span {
    int64_t row; /* first row of this call */
    int64_t past, boundary,
        after; /* tokens before the rows; in the states on entry; in the states on return */
    int64_t count;
    int before; /* tokens in the tails on entry: past - boundary */
};

/* From the numbers of mil_rows. */
static __device__ __forceinline__ mil_span
mil_span_from(int64_t row, int64_t end, int64_t past, int64_t boundary)
{
    mil_span span;
    const bool held = boundary % MIL_WINDOW == MIL_HOLD;
    span.row = row;
    span.past = past;
    span.boundary = held ? boundary - MIL_HOLD : boundary;
    span.count = end - row;
    span.after = span.count > MIL_WINDOW ? past + span.count : past; /* mil_boundary_after */
    span.after = held ? span.boundary : span.after - span.after % MIL_WINDOW;
    span.before = (int)(past - span.boundary);
    return span;
}

/* Sequence `index` of the whole call, after mil_wait_for_states. */
static __device__ __forceinline__ mil_span
mil_span_of(const mil_device_rows &rows, int64_t index)
{
    return mil_span_from(mil_row_of(rows, index), mil_row_of(rows, index + 1),
                         mil_load_number(rows.past + index), mil_load_number(rows.boundary + index));
}

/* Those of sequences first .. first + N - 1, but none after `last`, by a thread each for the whole block: the second-level cache
 * serves those who ask for a line one after another, 0.4 ns each, over the whole device.  All of the block's threads come. */
template <int N>
static __device__ __forceinline__ void
mil_share_spans(const mil_device_rows &rows, int64_t first, int64_t last, mil_span (&out)[N])
{
    __shared__ mil_span spans[N];
    if (threadIdx.x < N) {
        spans[threadIdx.x] = mil_span_of(rows, min(first + threadIdx.x, last));
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < N; k++) {
        out[k] = spans[k];
    }
}

static __device__ __forceinline__ mil_span
mil_share_span(const mil_device_rows &rows, int64_t index)
{
    mil_span span[1];
    mil_share_spans(rows, index, index, span);
    return span[0];
}

/* ---- tails ---------------------------------------------------------------------------------------------------- */

/* Asks the second-level cache for the line at `address`, whatever is in it. Only that cache is told, so it is no
 * reading: what comes to be there by the time of one is what will be read. */
static __device__ __forceinline__ void
mil_prefetch(const void *address)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

/* Whether this block is the last of `sharers` to come here with the same slot, for up to MIL_SLOTS slots at once: one
 * bit each, the same in every thread.  What the others read before they came they have read. */
#define MIL_SLOTS 3

struct mil_slots {
    float *slot[MIL_SLOTS];
    unsigned sharers[MIL_SLOTS]; /* 0: not asked */
};

static __device__ __forceinline__ unsigned
mil_last_of(const mil_slots &slots)
{
    __shared__ unsigned last;
    __syncthreads();
    if (threadIdx.x < MIL_WARP) {
        bool is_last = false;
#pragma unroll
        for (int i = 0; i < MIL_SLOTS; i++) {
            if (threadIdx.x == i && slots.sharers[i] > 0) {
                unsigned most = slots.sharers[i] - 1; /* the count is back to 0 with the last */
                __threadfence();
                is_last = most == 0 || atomicInc((unsigned *)slots.slot[i], most) == most;
                __threadfence();
            }
        }
        unsigned bits = __ballot_sync(MIL_ALL_LANES, is_last);
        if (threadIdx.x == 0) {
            last = bits;
        }
    }
    __syncthreads();
    return last;
}

/* The same for one slot. */
static __device__ __forceinline__ bool
mil_is_last(float *slot, unsigned sharers)
{
    __shared__ unsigned arrived;
    __syncthreads();
    if (sharers == 1) {
        return true;
    }
    if (threadIdx.x == 0) {
        __threadfence();
        arrived = atomicInc((unsigned *)slot, sharers - 1); /* back to 0 with the last */
        __threadfence();
    }
    __syncthreads();
    bool last = arrived == sharers - 1;
    __syncthreads();
    return last;
}

/* Rows of earlier calls that stay in a tail of `width` after a fold, `columns` columns from `column` on: to its beginning,
 * by one block. */
static __device__ __forceinline__ void
mil_tail_keep(float *tail, int64_t width, int64_t column, int columns, const mil_span &span)
{
    int64_t shift = span.after - span.boundary, kept = span.past - span.after;
    float *at = tail + column;
    if (shift <= 0 || kept <= 0) {
        return;
    }
    constexpr int AT_ONCE = 8; /* loads under way */
    float value[AT_ONCE][1];
    int count = (int)kept * columns; /* by at least a window, and fewer rows: none is read and written */
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += AT_ONCE * blockDim.x) {
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            int e = i + k * (int)blockDim.x;
            if (e < count) {
                mil_load_settled<1>(&at[(e / columns + shift) * width + e % columns], value[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            int e = i + k * (int)blockDim.x;
            if (e < count) {
                at[e / columns * width + e % columns] = value[k][0];
            }
        }
    }
    __syncthreads();
}

/* Rows of this call that stay in the tail; `value` (row of this call, column from 0) gives them. */
template <typename Value>
static __device__ __forceinline__ void
mil_tail_append(float *tail, int64_t width, int64_t column, int columns, const mil_span &span, Value value)
{
    int64_t first = span.after > span.past ? span.after : span.past;
    int fresh = (int)(span.past + span.count - first) * columns;
#pragma unroll 1
    for (int i = threadIdx.x; i < fresh; i += blockDim.x) {
        int row = i / columns, j = i % columns;
        tail[column + (first - span.after + row) * width + j] = value(first - span.past + row, j);
    }
}

template <typename Value>
static __device__ __forceinline__ void
mil_tail_move(float *tail, int64_t width, int64_t column, int columns, const mil_span &span, Value value)
{
    mil_tail_keep(tail, width, column, columns, span);
    mil_tail_append(tail, width, column, columns, span, value);
}

/* The same for columns that `sharers` blocks read, all of which call this: the last one moves them. */
template <typename Value>
static __device__ __forceinline__ void
mil_tail_share(float *tail, int64_t width, int64_t column, int columns, const mil_span &span,
               unsigned sharers, Value value)
{
    if (mil_is_last(tail + (MIL_TAIL - 1) * width + column, sharers)) {
        mil_tail_move(tail, width, column, columns, span, value);
    }
}

/* Rows from `shift` on, `count` of them (a tail's most and a convolution's lead), to the beginning of a tail, by a whole
 * block of BLOCK threads.  All of 64 columns are loaded before any is stored: the rows may overlap. */
template <int BLOCK>
static __device__ __noinline__ void
mil_tail_shift(float *tail, int width, int columns, int shift, int count)
{
    constexpr int WIDE = 64, APART = BLOCK / WIDE, AT_ONCE = (MIL_WINDOW + 8 + APART - 1) / APART;
    const int row = threadIdx.x / WIDE, column = threadIdx.x % WIDE;
#pragma unroll 1
    for (int at = column; at - column < columns; at += WIDE) {
        float value[AT_ONCE][1];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int r = row + k * APART;
            if (r < count && at < columns) {
                mil_load_settled<1>(&tail[(shift + r) * width + at], value[k]);
            }
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int r = row + k * APART;
            if (r < count && at < columns) {
                tail[r * width + at] = value[k][0];
            }
        }
    }
}

/* The slot of columns that begin at `column`: in the row that no token has. */
static __device__ __forceinline__ float *
mil_slot(float *tail, int64_t width, int64_t column)
{
    return tail + (MIL_TAIL - 1) * width + column;
}

/* ---- states in registers ---------------------------------------------------------------------------------------- */

/* V neighbouring columns of every LANES-th of a state's `rows` rows, the first of which is `lane`; zeros beyond them, and where
 * there are no such columns.  `state`: where they begin in row 0, of `width`; or NULL. */
template <int LANES, int V, int J>
static __device__ __forceinline__ void
mil_load_state(const float *state, int64_t column, int rows, int width, bool there, int lane,
               float (&H)[J][V])
{
#pragma unroll
    for (int j = 0; j < J; j++) {
        int n = lane + j * LANES;
        if (state != NULL && n < rows && there) {
            mil_load_settled<V>(state + (int64_t)n * width + column, H[j]);
        }
        else {
#pragma unroll
            for (int v = 0; v < V; v++) {
                H[j][v] = 0.0f;
            }
        }
    }
}

/* And back. */
template <int LANES, int V, int J>
static __device__ __forceinline__ void
mil_store_state(const float (&H)[J][V], float *state, int64_t column, int rows, int width, bool there,
                int lane)
{
#pragma unroll
    for (int j = 0; j < J; j++) {
        int n = lane + j * LANES;
        if (n < rows && there) {
            mil_store<V>(state + (int64_t)n * width + column, H[j]);
        }
    }
}

/* A vector's elements as float32. */
template <typename T, int N>
static __device__ __forceinline__ void
mil_widen(const mil_vector<T, N> &from, float (&out)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        out[i] = mil_float(from.at[i]);
    }
}

/* dt after bias, softplus and clamp. */
static __device__ __forceinline__ float
mil_time_step(float raw, float least, float most)
{
    float value = mil_softplus(raw); /* comparisons, not fminf: a NaN stays one */
    value = value < least ? least : value;
    return value > most ? most : value;
}

#endif
