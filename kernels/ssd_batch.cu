/* Mamba-2's selective scan of one row each of many sequences (device.h: mil_ssd; ssd_step.cu has the formulas).
 *
 * In a batch the bytes of the states decide: 64 KB for a head of 128 x 128, and little arithmetic for them.  A block has one
 * head of one sequence and asks for all of its H at once (bulk copies into shared memory, before the kernel before has
 * ended); while it comes, the block reads the tail and computes the scores of its one row.  Three blocks share a
 * multiprocessor: two wait for memory while one multiplies.
 *
 *   H     pieces of 32 rows, each with a barrier of its own, in the order in which they are needed
 *   y     thread (r, q) has columns 4q .. 4q + 3 and of every piece rows 4r .. 4r + 3
 *
 * All sums are in ssd_step.cu's order, so a row is the same bits there and here.  Bytes: H once (and written where a window is
 * folded, every 16th token), the tail (8 KB a token for eight groups), and the row.
 */
#include "ssd_batch.cuh"

#include "wgmma.cuh"

#define WINDOW MIL_WINDOW
#define ROWS_R 8        /* threads that share a column */
#define PIECE 32        /* rows of H */
#define MANY_BLOCKS 256 /* from here on a head a block fills the chip */

template <int WIDTH, int STATE>
struct batch_memory {
    union {
        alignas(128) float H[STATE][WIDTH];
        float B[WINDOW][STATE];       /* of a window that is folded, while the first piece is in registers */
        float partial[ROWS_R][WIDTH]; /* after H */
    };
    float x[WINDOW][WIDTH];
    float C[STATE];
    float weight[WINDOW]; /* W dt (C . B) of the row */
    float dt[WINDOW], decay[WINDOW];
    float to_end[WINDOW];        /* W[last, s] dt_s */
    float from_start, from_fold; /* h_i of the row, and of a folded window's last one */
    uint64_t arrived[STATE / PIECE];
};

/* What a block works on. */
struct batch_place {
    int head;
    int64_t x_width, B_width, x_column, B_column, C_column;
};

/* Rows first .. first + count of the tail of x on their way into the window's first places; dt comes at once. */
template <int WIDTH, int STATE>
static __device__ __forceinline__ void
ask_for_tail(const ssd_arguments &a, const batch_place &p, const mil_tails &tails, int first, int count,
             float exponent, batch_memory<WIDTH, STATE> &m)
{
    constexpr int THREADS = ROWS_R * WIDTH / 4;
    for (int i = threadIdx.x; i < count * (WIDTH / 4); i += THREADS) {
        int s = i / (WIDTH / 4), c = i % (WIDTH / 4) * 4;
        mil_copy_16(&m.x[s][c], tails.x + (first + s) * p.x_width + p.x_column + c);
    }
    const int s = threadIdx.x;
    if (s < WINDOW) {
        float dt[1] = {0.0f};
        if (s < count) {
            mil_load_settled<1>(tails.dt + (first + s) * a.heads + p.head, dt);
        }
        m.dt[s] = dt[0];
        m.decay[s] = exp2f(dt[0] * exponent);
    }
}

/* A thread's share of B for the scores: PAIR_LANES threads have a row of the window, quads of it in turn. */
template <int WIDTH, int STATE>
struct batch_scores {
    static constexpr int APART = ROWS_R * WIDTH / 4 / PAIR_LANES, ROWS = WINDOW / APART,
                         QUADS = STATE / (4 * PAIR_LANES);
    float B[ROWS][QUADS][4];

    /* Rows first .. first + count of the tail; they are the window's first. */
    __device__ __forceinline__ void
    load_tail(const batch_place &p, const mil_tails &tails, int first, int count)
    {
        const int n = threadIdx.x % PAIR_LANES * 4;
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            const int s = threadIdx.x / PAIR_LANES + k * APART;
#pragma unroll
            for (int j = 0; j < QUADS; j++) {
                if (s < count) {
                    mil_load_settled<4>(
                        tails.B + (first + s) * p.B_width + p.B_column + n + j * 4 * PAIR_LANES, B[k][j]);
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

/* What one piece of H becomes; x and B of the window are in shared memory. */
template <int WIDTH, int STATE>
static __device__ __forceinline__ void
fold_piece(const batch_memory<WIDTH, STATE> &m, int j, float (&H)[4][4])
{
    const int quad = threadIdx.x % (WIDTH / 4), r = threadIdx.x / (WIDTH / 4);
    const float last = m.from_fold;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        H[i / 4][i % 4] *= last;
    }
#pragma unroll 2
    for (int s = 0; s < WINDOW; s++) {
        float x[4], B[4], weight = m.to_end[s];
        mil_load<4>(&m.x[s][quad * 4], x);
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

/* The window of 16 rows of the tail goes into H, in shared memory and, where it is to stay, in `state`. */
template <int WIDTH, int STATE>
static __device__ __forceinline__ void
fold(const batch_place &p, const mil_tails &tails, float *state, bool stays, batch_memory<WIDTH, STATE> &m)
{
    constexpr int THREADS = ROWS_R * WIDTH / 4;
    const int quad = threadIdx.x % (WIDTH / 4), r = threadIdx.x / (WIDTH / 4);
    float first[4][4], H[4][4];
    phase_wait(&m.arrived[0], 0);
#pragma unroll
    for (int l = 0; l < 4; l++) {
        mil_load<4>(&m.H[r * 4 + l][quad * 4], first[l]);
    }
    __syncthreads(); /* the first piece's place is free */
    for (int i = threadIdx.x; i < WINDOW * (STATE / 4); i += THREADS) {
        int s = i / (STATE / 4), n = i % (STATE / 4) * 4;
        mil_copy_16(&m.B[s][n], tails.B + s * p.B_width + p.B_column + n);
    }
    for (int s = threadIdx.x / PAIR_LANES; s < WINDOW; s += THREADS / PAIR_LANES) {
        const float product = multiply_decays(m.decay, s, WINDOW - 1);
        if (threadIdx.x % PAIR_LANES == 0) {
            m.to_end[s] = product * m.dt[s];
            if (s == 0) {
                m.from_fold = m.decay[0] * product;
            }
        }
    }
    mil_await_copies();
    __syncthreads();
    auto keep = [&](int j, const float (&piece)[4][4]) {
#pragma unroll
        for (int l = 0; l < 4; l++) {
            mil_store<4>(&m.H[j * PIECE + r * 4 + l][quad * 4], piece[l]);
            if (stays) {
                mil_store<4>(state + (int64_t)(j * PIECE + r * 4 + l) * WIDTH + quad * 4, piece[l]);
            }
        }
    };
    fold_piece(m, 0, first);
#pragma unroll 1
    for (int j = 1; j < STATE / PIECE; j++) {
        phase_wait(&m.arrived[j], 0);
#pragma unroll
        for (int l = 0; l < 4; l++) {
            mil_load<4>(&m.H[j * PIECE + r * 4 + l][quad * 4], H[l]);
        }
        fold_piece(m, j, H);
        keep(j, H);
    }
    __syncthreads(); /* B has been read */
    keep(0, first);
}

/* The row's weights, row i of the window. */
template <int WIDTH, int STATE>
static __device__ __forceinline__ void
fill_weights(int i, const batch_scores<WIDTH, STATE> &scores, batch_memory<WIDTH, STATE> &m)
{
    using all = batch_scores<WIDTH, STATE>;
    const int lane = threadIdx.x % PAIR_LANES;
#pragma unroll
    for (int k = 0; k < all::ROWS; k++) {
        const int s = threadIdx.x / PAIR_LANES + k * all::APART;
        const float product = multiply_decays(m.decay, s, i);
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < all::QUADS; j++) {
            float C[4];
            mil_load<4>(&m.C[lane * 4 + j * 4 * PAIR_LANES], C);
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
            m.weight[s] = product * m.dt[s] * dot;
            if (s == 0) {
                m.from_start = m.decay[0] * product;
            }
        }
    }
}

/* C . H of the threads' columns and rows. */
template <int WIDTH, int STATE>
static __device__ __forceinline__ void
multiply_state(batch_memory<WIDTH, STATE> &m)
{
    const int quad = threadIdx.x % (WIDTH / 4), r = threadIdx.x / (WIDTH / 4);
    float sum[4][4] = {};
#pragma unroll
    for (int j = 0; j < STATE / PIECE; j++) {
        float C[4];
        mil_load<4>(&m.C[j * PIECE + r * 4], C);
        phase_wait(&m.arrived[j], 0);
#pragma unroll
        for (int l = 0; l < 4; l++) {
            float row[4];
            mil_load<4>(&m.H[j * PIECE + r * 4 + l][quad * 4], row);
#pragma unroll
            for (int v = 0; v < 4; v++) {
                sum[l][v] = fmaf(C[l], row[v], sum[l][v]);
            }
        }
    }
#pragma unroll
    for (int v = 0; v < 4; v++) {
        sum[0][v] = (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
    }
    __syncthreads(); /* H has been read */
    mil_store<4>(&m.partial[r][quad * 4], sum[0]);
}

template <typename T, int WIDTH, int STATE>
static __device__ __forceinline__ void
write_row(const ssd_arguments &a, const batch_place &p, int64_t row, int i, float D,
          const batch_memory<WIDTH, STATE> &m)
{
    const int c = threadIdx.x;
    if (c >= WIDTH) {
        return;
    }
    const float parts = ((m.partial[0][c] + m.partial[1][c]) + (m.partial[2][c] + m.partial[3][c])) +
                        ((m.partial[4][c] + m.partial[5][c]) + (m.partial[6][c] + m.partial[7][c]));
    float y = m.from_start * parts;
#pragma unroll
    for (int s = 0; s < WINDOW; s++) {
        y = s <= i ? fmaf(m.weight[s], m.x[s][c], y) : y;
    }
    y = fmaf(D, m.x[i][c], y);
    ((T *)a.y)[row * a.y_stride + (int64_t)p.head * WIDTH + c] = mil_round<T>(y);
}

/* The row goes to the tails: where no fold moves them, from the first block of those that share columns; else what remains is
 * moved by the last of them to have read it. */
template <typename T, int WIDTH, int STATE>
static __device__ __forceinline__ void
leave_row(const ssd_arguments &a, const batch_place &p, const mil_span &span, const mil_tails &tails, int i,
          const T *B, const batch_memory<WIDTH, STATE> &m)
{
    const int of_x = a.heads / a.x_heads, of_B = a.heads / a.B_groups;
    unsigned mine = (unsigned)(p.head % of_x == 0) | (unsigned)(p.head % of_B == 0) << 1 | 4;
    if (span.after != span.boundary) {
        mine = mil_last_of({{mil_slot(tails.x, p.x_width, p.x_column),
                             mil_slot(tails.B, p.B_width, p.B_column), mil_slot(tails.dt, a.heads, p.head)},
                            {(unsigned)of_x, (unsigned)of_B, 1}});
    }
    if (mine & 1) {
        mil_tail_move(tails.x, p.x_width, p.x_column, WIDTH, span,
                      [&](int64_t, int column) { return m.x[i][column]; });
    }
    if (mine & 2) {
        mil_tail_move(tails.B, p.B_width, p.B_column, STATE, span,
                      [&](int64_t, int column) { return mil_float(B[column]); });
    }
    if (mine & 4) {
        mil_tail_move(tails.dt, a.heads, p.head, 1, span, [&](int64_t, int) { return m.dt[i]; });
    }
}

/* Grid: heads, sequences. */
template <typename T, int WIDTH, int STATE>
static __global__ void
__launch_bounds__(ROWS_R *WIDTH / 4, WIDTH == 128 ? 3 : 4)
    ssd_batch_kernel(const __grid_constant__ ssd_arguments a, const __grid_constant__ mil_states states)
{
    extern __shared__ __align__(128) char shared[];
    auto &m = *reinterpret_cast<batch_memory<WIDTH, STATE> *>(shared);
    constexpr int PIECES = STATE / PIECE;
    const mil_tails tails = states.of[blockIdx.y];
    batch_place p;
    p.head = blockIdx.x;
    p.x_width = (int64_t)a.x_heads * WIDTH;
    p.B_width = (int64_t)a.B_groups * STATE;
    p.x_column = (int64_t)(p.head / (a.heads / a.x_heads)) * WIDTH;
    p.B_column = (int64_t)(p.head / (a.heads / a.B_groups)) * STATE;
    p.C_column = (int64_t)(p.head / (a.heads / a.C_groups)) * STATE;
    float *const state = tails.state + (int64_t)p.head * STATE * WIDTH;
    mil_trigger();
    const float exponent = get_exponent(a, p.head), bias = a.dt_bias[p.head], D = a.D[p.head];
    mil_wait_for_states(a.rows);
    if (threadIdx.x == 0) {
        for (int j = 0; j < PIECES; j++) {
            phase_init(&m.arrived[j], 1);
        }
        wgmma_publish();
        for (int j = 0; j < PIECES; j++) {
            phase_expect(&m.arrived[j], PIECE * WIDTH * sizeof(float));
            copy_bulk(m.H[j * PIECE], state + j * PIECE * WIDTH, PIECE * WIDTH * sizeof(float),
                      &m.arrived[j]);
        }
    }
    const mil_span span = mil_span_of(a.rows, a.first + blockIdx.y);
    const bool folds = span.before >= WINDOW;
    const int i = folds ? span.before - WINDOW : span.before; /* of the row in its window */
    batch_scores<WIDTH, STATE> scores;
    ask_for_tail(a, p, tails, 0, folds ? WINDOW : i, exponent, m);
    scores.load_tail(p, tails, span.before - i, i);
    mil_wait();
    const T *const B = (const T *)a.B + span.row * a.B_stride + p.B_column;
    const int vector = threadIdx.x % (2 * MIL_WARP) * 4, part = threadIdx.x / (2 * MIL_WARP);
    float C[4], x[4];
    if (part == 0 && vector < STATE) {
        mil_load<4>((const T *)a.C + span.row * a.C_stride + p.C_column + vector, C);
    }
    if (part == 1 && vector < WIDTH) {
        mil_load<4>((const T *)a.x + span.row * a.x_stride + p.x_column + vector, x);
    }
    scores.load_row(B, i);
    const float dt = threadIdx.x == 0 ? get_time_step<T>(a, span.row, p.head, bias) : 0.0f;
    if (folds) {
        mil_await_copies();
        __syncthreads();
        fold(p, tails, state, span.boundary + WINDOW <= span.after, m);
        ask_for_tail(a, p, tails, WINDOW, i, exponent, m); /* all have read the window */
    }
    mil_await_copies();
    if (part == 0 && vector < STATE) {
        mil_store<4>(&m.C[vector], C);
    }
    if (part == 1 && vector < WIDTH) {
        mil_store<4>(&m.x[i][vector], x);
    }
    __syncthreads(); /* dt and decay of place i were another thread's */
    if (threadIdx.x == 0) {
        m.dt[i] = dt;
        m.decay[i] = exp2f(dt * exponent);
    }
    __syncthreads();
    fill_weights(i, scores, m);
    multiply_state(m);
    __syncthreads();
    write_row<T>(a, p, span.row, i, D, m);
    leave_row<T>(a, p, span, tails, i, B, m);
}

/* ---- launches --------------------------------------------------------------------------------------------------- */

template <typename T, int WIDTH, int STATE>
static mil_status
launch(mil_context *context, const ssd_arguments &a, const mil_states &states, int64_t sequences)
{
    return mil_launch(context, "ssd (batch)", ssd_batch_kernel<T, WIDTH, STATE>,
                      dim3((unsigned)a.heads, (unsigned)sequences), dim3(ROWS_R * WIDTH / 4),
                      sizeof(batch_memory<WIDTH, STATE>), a, states);
}

template <typename T>
static mil_status
choose_sizes(mil_context *context, const ssd_arguments &a, const mil_states &states, int64_t sequences)
{
    return a.head_dim == 64
               ? (a.state_dim == 64 ? launch<T, 64, 64> : launch<T, 64, 128>)(context, a, states, sequences)
               : (a.state_dim == 64 ? launch<T, 128, 64> : launch<T, 128, 128>)(context, a, states,
                                                                                sequences);
}

template <typename T>
static bool
is_aligned(const ssd_arguments &a, const mil_states &states, int64_t sequences)
{
    uintptr_t all = 0;
    for (int64_t i = 0; i < sequences; i++) {
        const mil_tails *t = &states.of[i];
        all |= (uintptr_t)t->state | (uintptr_t)t->x | (uintptr_t)t->B;
    }
    return all % 16 == 0 && mil_is_aligned<T>(a.x, a.x_stride) && mil_is_aligned<T>(a.B, a.B_stride) &&
           mil_is_aligned<T>(a.C, a.C_stride);
}

mil_status
mil_ssd_batch(mil_context *context, const ssd_arguments *a, const mil_states *states, int64_t sequences,
              bool *done)
{
    int major = 0;
    MIL_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, context->ops->device));
    *done = major == 9 && states->given && sequences * a->heads >= MANY_BLOCKS &&
            (a->head_dim == 64 || a->head_dim == 128) && (a->state_dim == 64 || a->state_dim == 128) &&
            MIL_FOR_ACT(context, is_aligned, *a, *states, sequences);
    return *done ? MIL_FOR_ACT(context, choose_sizes, context, *a, *states, sequences) : MIL_OK;
}
