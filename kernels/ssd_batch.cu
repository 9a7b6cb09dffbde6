/* Mamba-2's selective scan of one row each of many sequences (device.h: mil_ssd; ssd_step.cu has the formulas).
 *
 * In a batch the bytes of the states decide: 64 KB for a head of 128 x 128, and little arithmetic for them.  A block has up to
 * four heads of one sequence that read the same B, and their H passes through a ring in shared memory, piece after
 * piece, asked for by bulk copies from before the kernel before has ended until the last head's is there.  So while a head's
 * sums meet and its row is written, the next one's H comes, and what heads share is read once.  Two blocks share a
 * multiprocessor.
 *
 *   H     pieces of 32 rows, STAGES of them under way
 *   y     thread (r, q) has columns 4q .. 4q + 3 and of every piece rows 4r .. 4r + 3
 *   fold  (where the row begins a window: every 16th) a piece is folded in registers, on its way to the sums and back
 *
 * All sums are in ssd_step.cu's order, so a row is the same bits there and here.  Bytes: H once (and written where a window is
 * folded), the tail (8 KB a token for eight groups), and the row.
 */
#include "ssd_batch.cuh"

#include "phase.cuh"

#define WINDOW MIL_WINDOW
#define ROWS_R 8        /* threads that share a column */
#define PIECE 32        /* rows of H */
#define STAGES 4        /* pieces under way */
#define MOST_HEADS 4    /* of a block */
#define MOST_X 256      /* columns of x of a block */
#define MANY_BLOCKS 256 /* from here on they fill the chip */
#define SEQUENCES 256   /* of one launch, whose states travel as kernel parameters */

struct batch_states {
    struct {
        float *state, *x, *B, *dt;
    } of[SEQUENCES];
};

struct batch_arguments {
    ssd_arguments ssd;
    int heads;             /* of a block */
    int x_columns, x_step; /* theirs; from a head's to the next one's: 0 where they share them */
    int of_x, of_B;        /* heads that read the same x; the same B */
};

/* Time steps of a window for each head, and what follows from them. */
struct batch_steps {
    float dt[MOST_HEADS][WINDOW], decay[MOST_HEADS][WINDOW];
    float weight[MOST_HEADS]
                [WINDOW]; /* the row's window: W dt (C . B) of the row; a folded one: W[last, s] dt_s */
    float from_start[MOST_HEADS]; /* h_i of the row, or of the last token */
};

template <int WIDTH, int STATE>
struct batch_memory {
    static constexpr int THREADS = ROWS_R * WIDTH / 4, PIECES = STATE / PIECE;
    alignas(128) float H[STAGES][PIECE][WIDTH];
    float B[WINDOW][STATE]; /* of a window that is folded */
    float partial[2][ROWS_R][WIDTH];
    float C[MOST_HEADS][STATE];
    batch_steps row, folded;
    float D[MOST_HEADS];
    uint64_t full[STAGES], empty[STAGES];
    alignas(16) float x[1]; /* [MIL_TAIL, x_columns]: the tail's rows, then the row of this call */
};

/* What a block works on. */
struct batch_place {
    int head; /* the first one */
    int x_width, B_width, x_column, B_column;
    int before, first,
        i; /* tokens in the tail; those of them before the row's window; the row in its window */
};

/* ---- what comes before H ---------------------------------------------------------------------------------------- */

/* The block's columns of the tail on their way. */
template <int WIDTH, int STATE>
static __device__ __forceinline__ void
ask_for_tails(const batch_arguments &a, const batch_place &p, const float *x, const float *B,
              batch_memory<WIDTH, STATE> &m)
{
    constexpr int THREADS = batch_memory<WIDTH, STATE>::THREADS;
    const int quads = a.x_columns / 4, column = (int)threadIdx.x % quads * 4;
#pragma unroll 4
    for (int s = (int)threadIdx.x / quads; s < p.before; s += THREADS / quads) {
        mil_copy_16(m.x + s * a.x_columns + column, x + s * p.x_width + p.x_column + column);
    }
    if (p.first > 0) {
#pragma unroll
        for (int i = threadIdx.x; i < WINDOW * (STATE / 4); i += THREADS) {
            const int s = i / (STATE / 4), n = i % (STATE / 4) * 4;
            mil_copy_16(&m.B[s][n], B + s * p.B_width + p.B_column + n);
        }
    }
}

/* Time steps of rows first .. first + count of the tail, and their decays; thread (head, s). */
static __device__ __forceinline__ void
fill_steps(const batch_arguments &a, const batch_place &p, const float *tail, int first, int count,
           batch_steps &steps)
{
    const int h = (int)threadIdx.x / WINDOW, s = (int)threadIdx.x % WINDOW;
    if (h < a.heads) {
        float dt[1] = {0.0f};
        if (s < count) {
            mil_load_settled<1>(tail + (first + s) * a.ssd.heads + p.head + h, dt);
        }
        steps.dt[h][s] = dt[0];
        steps.decay[h][s] = exp2f(dt[0] * get_exponent(a.ssd, p.head + h));
    }
}

/* A thread's share of B for the scores: PAIR_LANES threads have a row of the window, quads of it in turn. */
template <int WIDTH, int STATE>
struct batch_scores {
    static constexpr int APART = ROWS_R * WIDTH / 4 / PAIR_LANES, ROWS = WINDOW / APART,
                         QUADS = STATE / (4 * PAIR_LANES);
    float B[ROWS][QUADS][4];

    /* Rows first .. first + count of the tail; they are the window's first. */
    __device__ __forceinline__ void load_tail(const batch_place &p, const float *tail)
    {
        const int n = threadIdx.x % PAIR_LANES * 4;
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            const int s = threadIdx.x / PAIR_LANES + k * APART;
#pragma unroll
            for (int j = 0; j < QUADS; j++) {
                if (s < p.i) {
                    mil_load_settled<4>(
                        tail + (p.first + s) * p.B_width + p.B_column + n + j * 4 * PAIR_LANES, B[k][j]);
                }
            }
        }
    }

    /* The row of this call as row i. */
    template <typename T>
    __device__ __forceinline__ void load_row(const T *row, int i)
    {
        const int n = threadIdx.x % PAIR_LANES * 4;
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            if ((int)threadIdx.x / PAIR_LANES + k * APART == i) {
#pragma unroll
                for (int j = 0; j < QUADS; j++) {
                    mil_load<4>(row + n + j * 4 * PAIR_LANES, B[k][j]);
                }
            }
        }
    }
};

/* C, x and the time steps of the row of this call. */
template <typename T, int WIDTH, int STATE>
static __device__ __forceinline__ void
load_row(const batch_arguments &a, const batch_place &p, int64_t row, batch_memory<WIDTH, STATE> &m)
{
    constexpr int THREADS = batch_memory<WIDTH, STATE>::THREADS;
    const T *C = (const T *)a.ssd.C + row * a.ssd.C_stride, *x = (const T *)a.ssd.x + row * a.ssd.x_stride;
    const int of_C = a.ssd.heads / a.ssd.C_groups;
    float value[4];
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < a.heads * STATE; i += THREADS * 4) {
        const int h = i / STATE, n = i % STATE;
        mil_load<4>(C + (p.head + h) / of_C * STATE + n, value);
        mil_store<4>(&m.C[h][n], value);
    }
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < a.x_columns; i += THREADS * 4) {
        mil_load<4>(x + p.x_column + i, value);
        mil_store<4>(m.x + p.before * a.x_columns + i, value);
    }
    const int h = (int)threadIdx.x / WINDOW, s = (int)threadIdx.x % WINDOW;
    if (h < a.heads && s == p.i) {
        const float dt = get_time_step<T>(a.ssd, row, p.head + h, a.ssd.dt_bias[p.head + h]);
        m.row.dt[h][s] = dt;
        m.row.decay[h][s] = exp2f(dt * get_exponent(a.ssd, p.head + h));
    }
}

/* The row's weights for each head. */
template <int WIDTH, int STATE>
static __device__ __forceinline__ void
fill_weights(int heads, int i, const batch_scores<WIDTH, STATE> &scores, batch_memory<WIDTH, STATE> &m)
{
    using all = batch_scores<WIDTH, STATE>;
    const int lane = threadIdx.x % PAIR_LANES;
#pragma unroll 1
    for (int h = 0; h < heads; h++) {
#pragma unroll
        for (int k = 0; k < all::ROWS; k++) {
            const int s = threadIdx.x / PAIR_LANES + k * all::APART;
            const float product = multiply_decays(m.row.decay[h], s, i);
            float dot = 0.0f;
#pragma unroll
            for (int j = 0; j < all::QUADS; j++) {
                float C[4];
                mil_load<4>(&m.C[h][lane * 4 + j * 4 * PAIR_LANES], C);
#pragma unroll
                for (int v = 0; v < 4; v++) {
                    dot = fmaf(C[v], scores.B[k][j][v], dot); /* beyond the row of anything, and not used */
                }
            }
#pragma unroll
            for (int step = PAIR_LANES / 2; step > 0; step /= 2) {
                dot += __shfl_xor_sync(MIL_ALL_LANES, dot, step);
            }
            if (lane == 0 && s <= i) {
                m.row.weight[h][s] = product * m.row.dt[h][s] * dot;
                if (s == 0) {
                    m.row.from_start[h] = m.row.decay[h][0] * product;
                }
            }
        }
    }
}

/* What each token of a folded window adds to H. */
template <int THREADS>
static __device__ __forceinline__ void
fill_fold(int heads, batch_steps &steps)
{
#pragma unroll 1
    for (int pair = (int)threadIdx.x / PAIR_LANES; pair < heads * WINDOW; pair += THREADS / PAIR_LANES) {
        const int h = pair / WINDOW, s = pair % WINDOW;
        const float product = multiply_decays(steps.decay[h], s, WINDOW - 1);
        if (threadIdx.x % PAIR_LANES == 0) {
            steps.weight[h][s] = product * steps.dt[h][s];
            if (s == 0) {
                steps.from_start[h] = steps.decay[h][0] * product;
            }
        }
    }
}

/* ---- H ------------------------------------------------------------------------------------------------------------ */

/* Asks for piece `index` of all heads' `state`, whose place is free. */
template <int WIDTH, int STATE>
static __device__ __forceinline__ void
ask_for_piece(const float *state, int index, batch_memory<WIDTH, STATE> &m)
{
    constexpr int FLOATS = PIECE * WIDTH, BYTES = FLOATS * (int)sizeof(float);
    uint64_t *barrier = &m.full[index % STAGES];
    phase_expect(barrier, BYTES);
    copy_bulk<true>(m.H[index % STAGES], state + index * FLOATS, BYTES, barrier);
}

/* A piece of head h in registers becomes what it is after the folded window; x and B of that are in shared memory. */
template <int WIDTH, int STATE>
static __device__ __forceinline__ void
fold_piece(const batch_arguments &a, const batch_memory<WIDTH, STATE> &m, int h, int j, float (&H)[4][4])
{
    const int quad = threadIdx.x % (WIDTH / 4), r = threadIdx.x / (WIDTH / 4);
    const float last = m.folded.from_start[h];
    const float *at = m.x + h * a.x_step + quad * 4;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        H[i / 4][i % 4] *= last;
    }
#pragma unroll 2
    for (int s = 0; s < WINDOW; s++) {
        float x[4], B[4], weight = m.folded.weight[h][s];
        mil_load<4>(at + s * a.x_columns, x);
        mil_load<4>(&m.B[s][j * PIECE + r * 4], B);
#pragma unroll
        for (int l = 0; l < 4; l++) {
            const float weighted = weight * B[l];
#pragma unroll
            for (int v = 0; v < 4; v++) {
                H[l][v] = fmaf(weighted, x[v], H[l][v]);
            }
        }
    }
}

/* C . H of head h for the threads' columns and rows, as the pieces come.  `keep`: where folded ones go, or NULL. */
template <int WIDTH, int STATE>
static __device__ __forceinline__ void
multiply_state(const batch_arguments &a, const float *state, int h, bool folds, float *keep,
               batch_memory<WIDTH, STATE> &m)
{
    constexpr int PIECES = batch_memory<WIDTH, STATE>::PIECES;
    const int quad = threadIdx.x % (WIDTH / 4), r = threadIdx.x / (WIDTH / 4);
    float sum[4][4] = {};
#pragma unroll 1
    for (int j = 0; j < PIECES; j++) {
        const int index = h * PIECES + j, at = index % STAGES;
        float C[4], H[4][4];
        mil_load<4>(&m.C[h][j * PIECE + r * 4], C);
        phase_wait(&m.full[at], index / STAGES % 2);
#pragma unroll
        for (int l = 0; l < 4; l++) {
            mil_load<4>(&m.H[at][r * 4 + l][quad * 4], H[l]);
        }
        __syncwarp();
        if (threadIdx.x % MIL_WARP == 0) {
            phase_arrive(&m.empty[at]);
        }
        if (threadIdx.x == 0 && index > 0 && index - 1 + STAGES < a.heads * PIECES) {
            phase_wait(&m.empty[(index - 1) % STAGES], (index - 1) / STAGES % 2);
            ask_for_piece(state, index - 1 + STAGES, m);
        }
        if (folds) {
            fold_piece(a, m, h, j, H);
        }
#pragma unroll
        for (int l = 0; l < 4; l++) {
            if (keep != NULL) {
                mil_store<4>(keep + ((h * STATE + j * PIECE + r * 4 + l) * WIDTH + quad * 4), H[l]);
            }
#pragma unroll
            for (int v = 0; v < 4; v++) {
                sum[l][v] = fmaf(C[l], H[l][v], sum[l][v]);
            }
        }
    }
#pragma unroll
    for (int v = 0; v < 4; v++) {
        sum[0][v] = (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
    }
    mil_store<4>(&m.partial[h % 2][r][quad * 4], sum[0]);
}

/* Head h's y, by one half of the threads while the other goes on. */
template <typename T, int WIDTH, int STATE>
static __device__ __forceinline__ void
write_row(const batch_arguments &a, const batch_place &p, int64_t row, int h,
          const batch_memory<WIDTH, STATE> &m)
{
    const int c = (int)threadIdx.x % WIDTH;
    if ((int)threadIdx.x / WIDTH != h % 2) {
        return;
    }
    const auto &part = m.partial[h % 2];
    const float parts = ((part[0][c] + part[1][c]) + (part[2][c] + part[3][c])) +
                        ((part[4][c] + part[5][c]) + (part[6][c] + part[7][c]));
    const float *x = m.x + p.first * a.x_columns + h * a.x_step + c;
    float y = m.row.from_start[h] * parts;
#pragma unroll
    for (int s = 0; s < WINDOW; s++) {
        y = s <= p.i ? fmaf(m.row.weight[h][s], x[s * a.x_columns], y) : y;
    }
    y = fmaf(m.D[h], x[p.i * a.x_columns], y);
    ((T *)a.ssd.y)[row * a.ssd.y_stride + (int64_t)(p.head + h) * WIDTH + c] = mil_round<T>(y);
}

/* ---- the row's way into the tails -------------------------------------------------------------------------------- */

/* Where no fold moves them, from the first block of those that share columns; else what remains is moved by the last
 * of them to have read it. */
template <typename T, int WIDTH, int STATE>
static __device__ __forceinline__ void
leave_row(const batch_arguments &a, const batch_place &p, const mil_span &span, float *x, float *B, float *dt,
          const batch_memory<WIDTH, STATE> &m)
{
    const int x_sharers = a.x_step == 0 ? a.of_x / a.heads : 1, B_sharers = a.of_B / a.heads;
    unsigned mine =
        (unsigned)(x_sharers == 1 || p.head % a.of_x == 0) | (unsigned)(p.head % a.of_B == 0) << 1 | 4;
    if (span.after != span.boundary) {
        mine = mil_last_of({{mil_slot(x, p.x_width, p.x_column), mil_slot(B, p.B_width, p.B_column),
                             mil_slot(dt, a.ssd.heads, p.head)},
                            {(unsigned)x_sharers, (unsigned)B_sharers, 1}});
    }
    if (mine & 1) {
        mil_tail_move(x, p.x_width, p.x_column, a.x_columns, span,
                      [&](int64_t, int column) { return m.x[p.before * a.x_columns + column]; });
    }
    if (mine & 2) {
        const T *row = (const T *)a.ssd.B + span.row * a.ssd.B_stride + p.B_column;
        mil_tail_move(B, p.B_width, p.B_column, STATE, span,
                      [&](int64_t, int column) { return mil_float(row[column]); });
    }
    if (mine & 4) {
        mil_tail_move(dt, a.ssd.heads, p.head, a.heads, span,
                      [&](int64_t, int h) { return m.row.dt[h][p.i]; });
    }
}

/* ---- the kernel --------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ batch_place
find_place(const batch_arguments &a, int width, int state_dim)
{
    batch_place p = {};
    p.head = (int)blockIdx.x * a.heads;
    p.x_width = a.ssd.x_heads * width;
    p.B_width = a.ssd.B_groups * state_dim;
    p.x_column = p.head / a.of_x * width;
    p.B_column = p.head / a.of_B * state_dim;
    return p;
}

/* Barriers, and the first pieces on their way. */
template <int WIDTH, int STATE>
static __device__ __forceinline__ void
begin_ring(const float *state, int heads, batch_memory<WIDTH, STATE> &m)
{
    using memory = batch_memory<WIDTH, STATE>;
    for (int i = 0; i < STAGES; i++) {
        phase_init(&m.full[i], 1);
        phase_init(&m.empty[i], memory::THREADS / MIL_WARP);
    }
    phase_publish();
    for (int i = 0; i < min(STAGES, heads * memory::PIECES); i++) {
        ask_for_piece(state, i, m);
    }
}

/* Grid: heads by those of a block, sequences. */
template <typename T, int WIDTH, int STATE>
static __global__ void
__launch_bounds__(ROWS_R *WIDTH / 4, WIDTH == 128 ? 2 : 3)
    ssd_batch_kernel(const __grid_constant__ batch_arguments a, const __grid_constant__ batch_states states)
{
    extern __shared__ __align__(128) char shared[];
    using memory = batch_memory<WIDTH, STATE>;
    memory &m = *reinterpret_cast<memory *>(shared);
    const auto &tails = states.of[blockIdx.y];
    batch_place p = find_place(a, WIDTH, STATE);
    float *const state = tails.state + (int64_t)p.head * STATE * WIDTH;
    mil_trigger();
    mil_wait_for_states(a.ssd.rows);
    if (threadIdx.x == 0) {
        begin_ring(state, a.heads, m);
    }
    const mil_span span = mil_share_span(a.ssd.rows, a.ssd.first + blockIdx.y);
    p.before = span.before;
    p.first = span.before >= WINDOW ? WINDOW : 0;
    p.i = p.before - p.first;
    const bool folds = p.first > 0;
    ask_for_tails(a, p, tails.x, tails.B, m);
    batch_scores<WIDTH, STATE> scores;
    scores.load_tail(p, tails.B);
    fill_steps(a, p, tails.dt, p.first, p.i, m.row);
    if (folds) {
        fill_steps(a, p, tails.dt, 0, WINDOW, m.folded);
    }
    if ((int)threadIdx.x < a.heads) {
        m.D[threadIdx.x] = a.ssd.D[p.head + threadIdx.x];
    }
    mil_wait();
    scores.load_row((const T *)a.ssd.B + span.row * a.ssd.B_stride + p.B_column, p.i);
    load_row<T>(a, p, span.row, m);
    mil_await_copies();
    __syncthreads();
    fill_weights(a.heads, p.i, scores, m);
    if (folds) {
        fill_fold<memory::THREADS>(a.heads, m.folded);
    }
    __syncthreads();
    float *const keep = folds && span.boundary + WINDOW <= span.after ? state : NULL;
#pragma unroll 1
    for (int h = 0; h < a.heads; h++) {
        multiply_state(a, state, h, folds, keep, m);
        __syncthreads();
        write_row<T>(a, p, span.row, h, m);
    }
    leave_row<T>(a, p, span, tails.x, tails.B, tails.dt, m);
}

/* ---- launches --------------------------------------------------------------------------------------------------- */

template <typename T, int WIDTH, int STATE>
static mil_status
launch(mil_context *context, const batch_arguments &a, const batch_states &states, int64_t sequences)
{
    const size_t shared = sizeof(batch_memory<WIDTH, STATE>) + (size_t)MIL_TAIL * a.x_columns * sizeof(float);
    return mil_launch(context, "ssd (batch)", ssd_batch_kernel<T, WIDTH, STATE>,
                      dim3((unsigned)(a.ssd.heads / a.heads), (unsigned)sequences), dim3(ROWS_R * WIDTH / 4),
                      shared, a, states);
}

template <typename T>
static mil_status
choose_sizes(mil_context *context, const batch_arguments &a, const batch_states &states, int64_t sequences)
{
    const ssd_arguments &s = a.ssd;
    return s.head_dim == 64
               ? (s.state_dim == 64 ? launch<T, 64, 64> : launch<T, 64, 128>)(context, a, states, sequences)
               : (s.state_dim == 64 ? launch<T, 128, 64> : launch<T, 128, 128>)(context, a, states,
                                                                                sequences);
}

template <typename T>
static bool
is_aligned(const ssd_arguments &a, const mil_mixer_state *states, int64_t sequences)
{
    uintptr_t all = 0;
    for (int64_t i = 0; i < sequences; i++) {
        all |= (uintptr_t)states[i].state | (uintptr_t)states[i].x | (uintptr_t)states[i].B;
    }
    return all % 16 == 0 && mil_is_aligned<T>(a.x, a.x_stride) && mil_is_aligned<T>(a.B, a.B_stride) &&
           mil_is_aligned<T>(a.C, a.C_stride);
}

/* As many heads a block as read the same B, and the same x or little of it, while the blocks fill the chip. */
static batch_arguments
choose_heads(const ssd_arguments &s, int64_t sequences)
{
    batch_arguments a = {};
    a.ssd = s;
    a.of_x = s.heads / s.x_heads;
    a.of_B = s.heads / s.B_groups;
    for (a.heads = MOST_HEADS; a.heads > 1; a.heads /= 2) {
        const bool shared = a.of_x % a.heads == 0, few = a.of_x == 1 && a.heads * s.head_dim <= MOST_X;
        if (a.of_B % a.heads == 0 && (shared || few) && sequences * s.heads / a.heads >= MANY_BLOCKS) {
            break;
        }
    }
    const bool own = a.heads > 1 && a.of_x == 1;
    a.x_columns = own ? a.heads * s.head_dim : s.head_dim;
    a.x_step = own ? s.head_dim : 0;
    return a;
}

mil_status
mil_ssd_batch(mil_context *context, const ssd_arguments *arguments, const mil_mixer_state *states,
              int64_t sequences, bool *done)
{
    const ssd_arguments &s = *arguments;
    *done = mil_device_major(context) == 9 && states != NULL && sequences * s.heads >= MANY_BLOCKS &&
            (s.head_dim == 64 || s.head_dim == 128) && (s.state_dim == 64 || s.state_dim == 128) &&
            MIL_FOR_ACT(context, is_aligned, s, states, sequences);
    if (!*done) {
        return MIL_OK;
    }
    batch_arguments a = choose_heads(s, sequences);
    for (int64_t first = 0; first < sequences; first += SEQUENCES) {
        const int64_t count = sequences - first < SEQUENCES ? sequences - first : SEQUENCES;
        batch_states some = {};
        for (int64_t i = 0; i < count; i++) {
            const mil_mixer_state *from = states + first + i;
            some.of[i] = {from->state, from->x, from->B, from->dt};
        }
        a.ssd.first = first;
        MIL_TRY(MIL_FOR_ACT(context, choose_sizes, context, a, some, count));
    }
    return MIL_OK;
}
