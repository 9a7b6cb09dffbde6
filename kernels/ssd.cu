/* Mamba-2's selective scan of prompts in its dual form, chunk by chunk (device.h: mil_ssd, csrc/cpu/ssd.c).
 * Sequences of at most a window of rows, and shapes that tensor cores do not take, are in ssd_step.cu.
 *
 * With H the state before a window of MIL_WINDOW tokens, W[i, s] = decay_{s+1} .. decay_i, h_i = decay_0 .. decay_i:
 *
 *   y_i = h_i H^T C_i + sum_{s <= i} W[i, s] dt_s (C_i . B_s) x_s + D x_i
 *   H'  = h_last H + sum_s W[last, s] dt_s B_s (outer) x_s
 *
 * Sequences of more than a window, in 16-bit types.  The same formulas with chunks of 64 tokens instead of windows:
 *
 *   flops a token and head   2 N P (C . H) + 2 N P (fold) + 64 P + 64 N (scores and their product with x, half of them
 *                            above the diagonal and left out): 0.09 M for N = P = 128
 *   bytes                    x and y once; B and C once a head, from the second-level cache where a group has several
 *
 * A block has one head (or a slice of it) of one sequence, and goes through its chunks with H in registers, as the
 * transposed float32 accumulators H^T [P, N] of four warps, each with 16 * M_TILES rows.  Rounded to 16 bits they are
 * already the left operand of Y^T = H^T C^T: H never goes through shared memory.  The other products read it:
 *
 *   scores   S[i, s] = W[i, s] dt_s (C_i . B_s), 16 rows a warp, rounded and shared by all warps
 *   output   Y^T = h (H^T C^T) + x^T S^T + D x^T, half a chunk at a time; written through x's place in shared memory
 *   fold     H^T = h_last H^T + (to_end x)^T B
 *
 * The inputs of the next chunk arrive (cp.async) while one is computed; two blocks share a multiprocessor.  Decays are
 * exponents of differences of sums over the chunk, in double precision and kept as two floats each: so that a large dt
 * costs the small ones after it nothing.
 *
 * Few long sequences are cut into segments, so that there are blocks enough: a first launch runs the folds alone from
 * H = 0 in each segment, a second one chains them, and then every segment starts from its true state.
 */
#include "mma.cuh"
#include "ssd_batch.cuh"
#include "ssd_chunks.cuh"

#define CHUNK_THREADS 128
#define SEGMENT_THREADS 128 /* four states each: N * P is a multiple of 64 * 64 */

/* Element of a tile in shared memory whose rows are `units` times 16 bytes: units are permuted by row, so that eight
 * rows of one unit, and eight units of one row, lie in different banks. */
template <typename T>
static __device__ __forceinline__ T *
unit_at(T *tile, int units, int row, int unit)
{
    return tile + (row * units + (unit ^ (row & 7))) * 8;
}

/* Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8. */
static __device__ __forceinline__ void
load_matrices(const void *row, uint32_t (&to)[4])
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}

/* ---- decays ---------------------------------------------------------------------------------------------------- */

#define DECAY_WARPS 8

/* The warp's head's dt of two tokens, from the tail as they are or from the activations; 0 after the last token. */
template <typename T>
static __device__ __forceinline__ void
load_dt(const ssd_arguments &a, const mil_span &span, const float *tail, int head, int64_t start,
        float (&dt)[2])
{
    const float bias = a.dt_bias[head];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int64_t token = start + 2 * (threadIdx.x % MIL_WARP) + k;
        dt[k] = token < span.before ? tail[token * a.heads + head]
                : token < span.before + span.count
                    ? get_time_step<T>(a, span.row + token - span.before, head, bias)
                    : 0.0f;
    }
}

/* Decays to and from the blocks of a chunk. `sums`: of the lane's two tokens. */
static __device__ __forceinline__ void
fill_blocks(const float (&dt)[2], float4 sums, chunk_decays *out)
{
    constexpr int LANES = BLOCK / 2; /* of a block */
    const int lane = threadIdx.x % MIL_WARP;
    const float2 first = make_float2(sums.x, sums.y), second = make_float2(sums.z, sums.w);
    float2 own = make_float2(0, 0); /* of the token before the lane's block */
#pragma unroll
    for (int b = 1; b < CHUNK / BLOCK; b++) {
        const float2 before = make_float2(__shfl_sync(MIL_ALL_LANES, second.x, b * LANES - 1),
                                          __shfl_sync(MIL_ALL_LANES, second.y, b * LANES - 1));
        own = lane / LANES == b ? before : own;
        if (lane < b * LANES) {
            ((float2 *)(out->to_block + find_to_block(b)))[lane] =
                make_float2(decay_between(first, before) * dt[0], decay_between(second, before) * dt[1]);
        }
    }
    ((float2 *)out->from_block)[lane] = make_float2(decay_between(own, first), decay_between(own, second));
}

/* Sums, decays and weights of a chunk from its dt, by one warp. `folded`: tokens of the chunk that a fold takes. */
static __device__ __forceinline__ void
fill_decays(const float (&dt)[2], float exponent, int folded, chunk_decays *out)
{
    const int lane = threadIdx.x % MIL_WARP;
    const double least = -1e4; /* 2^least is 0, and sums of it are far from overflow */
    double sum[2] = {fmax((double)(dt[0] * exponent), least), fmax((double)(dt[1] * exponent), least)};
    sum[1] += sum[0];
    double running = sum[1];
#pragma unroll
    for (int step = 1; step < MIL_WARP; step *= 2) {
        double below = __shfl_up_sync(MIL_ALL_LANES, running, step);
        running += lane >= step ? below : 0.0;
    }
    double before = running - sum[1];
    sum[0] += before;
    sum[1] += before;
    double end = __shfl_sync(MIL_ALL_LANES, folded % 2 == 0 ? sum[1] : sum[0], max(0, (folded - 1) / 2));
    float high[2], low[2], to_end[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        high[k] = (float)sum[k];
        low[k] = (float)(sum[k] - (double)high[k]);
        to_end[k] = 2 * lane + k < folded ? mil_exp2((float)(end - sum[k])) * dt[k] : 0.0f;
    }
    ((float4 *)out->sum)[lane] = make_float4(high[0], low[0], high[1], low[1]);
    ((float2 *)out->dt)[lane] = make_float2(dt[0], dt[1]);
    ((float2 *)out->from_start)[lane] = make_float2(mil_exp2(high[0]), mil_exp2(high[1]));
    ((float2 *)out->to_end)[lane] = make_float2(to_end[0], to_end[1]);
    fill_blocks(dt, make_float4(high[0], low[0], high[1], low[1]), out);
    if (lane == 0) {
        out->last = folded > 0 ? mil_exp2((float)end) : 1.0f;
    }
}

/* Grid: chunks, heads by DECAY_WARPS, sequences. */
template <typename T>
static __global__ void
__launch_bounds__(DECAY_WARPS *MIL_WARP)
    ssd_decays_kernel(const __grid_constant__ chunk_arguments c, const __grid_constant__ mil_states states)
{
    const ssd_arguments &a = c.ssd;
    const int head = blockIdx.y * DECAY_WARPS + threadIdx.x / MIL_WARP;
    const int64_t start = (int64_t)blockIdx.x * CHUNK;
    mil_trigger();
    mil_wait();
    const mil_span span = mil_share_span(a.rows, a.first + blockIdx.z);
    const int64_t total = span.before + span.count,
                  folded = states.given ? span.after - span.boundary : total; /* tokens to be in the state */
    if (head >= a.heads || span.count < a.least || start >= total) {
        return;
    }
    float dt[2];
    load_dt<T>(a, span, states.of[blockIdx.z].dt, head, start, dt);
    fill_decays(dt, get_exponent(a, head), (int)max((int64_t)0, min((int64_t)CHUNK, folded - start)),
                find_decays(c, head, blockIdx.x));
}

/* ---- chunks ------------------------------------------------------------------------------------------------------ */

/* A chunk's inputs. */
template <typename T, int P, int N>
struct alignas(128) chunk_inputs {
    T x[CHUNK * P], B[CHUNK * N], C[CHUNK * N];
    chunk_decays decays;
};

template <typename T, int P, int N>
struct chunk_memory {
    chunk_inputs<T, P, N> inputs[2];
    T scores[CHUNK * CHUNK];
};

/* One of a chunk's tiles [CHUNK, WIDTH]: tokens from `start` after the boundary on. */
template <typename T, int WIDTH>
static __device__ __forceinline__ void
ask_for_tile(T *tile, const T *rows, int64_t stride, const float *tail, int64_t tail_stride, int64_t start,
             int64_t before, int64_t total)
{
    constexpr int UNITS = WIDTH / 8, STEP = CHUNK_THREADS / UNITS;
    const int unit = threadIdx.x % UNITS;
#pragma unroll
    for (int s = threadIdx.x / UNITS; s < CHUNK; s += STEP) {
        int64_t token = start + s;
        T *to = unit_at(tile, UNITS, s, unit);
        if (token < before && tail != NULL) {
            float low[4], high[4];
            mil_load<4>(tail + token * tail_stride + unit * 8, low);
            mil_load<4>(tail + token * tail_stride + unit * 8 + 4, high);
            mil_store<4>(to, low);
            mil_store<4>(to + 4, high);
        }
        else {
            bool there = token >= before && token < total;
            copy_unit(to, there ? rows + (token - before) * stride + unit * 8 : rows, there);
        }
    }
}

static __device__ __forceinline__ void
ask_for_decays(const chunk_decays *from, chunk_decays *to)
{
    static_assert(sizeof *to / 16 <= CHUNK_THREADS, "at once");
    if (threadIdx.x < sizeof *to / 16) {
        copy_unit((uint4 *)to + threadIdx.x, (const uint4 *)from + threadIdx.x, true);
    }
}

/* 16 rows of scores from `row` on, weighted and rounded, into `scores`. */
template <typename T, int P, int N>
static __device__ __forceinline__ void
fill_scores(const chunk_inputs<T, P, N> &in, int row, T *scores)
{
    const int lane = threadIdx.x % MIL_WARP,
              pairs = row / 16 + 1; /* of tiles of 8 columns, up to the diagonal */
    float sum[CHUNK / 8][4] = {};
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        uint32_t C[4], B[4];
        load_matrices(unit_at(in.C, N / 8, row + lane % 16, 2 * k + lane / 16), C);
#pragma unroll
        for (int t = 0; t < CHUNK / 16; t++) {
            if (t < pairs) {
                load_matrices(unit_at(in.B, N / 8, 16 * t + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2),
                              B);
                mil_multiply_add<T>(sum[2 * t], C, B[0], B[1]);
                mil_multiply_add<T>(sum[2 * t + 1], C, B[2], B[3]);
            }
        }
    }
    const float2 top = in.decays.sum[row + lane / 4], bottom = in.decays.sum[row + lane / 4 + 8];
#pragma unroll
    for (int t = 0; t < CHUNK / 8; t++) {
        if (t < 2 * pairs) {
            float value[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int i = row + lane / 4 + e / 2 * 8, s = 8 * t + lane % 4 * 2 + e % 2;
                float2 own = e < 2 ? top : bottom, other = in.decays.sum[s];
                float decay = mil_exp2((own.x - other.x) + (own.y - other.y));
                value[e] = s <= i ? decay * in.decays.dt[s] * sum[t][e] : 0.0f;
            }
            *(uint32_t *)(unit_at(scores, CHUNK / 8, row + lane / 4, t) + lane % 4 * 2) =
                pack<T>(value[0], value[1]);
            *(uint32_t *)(unit_at(scores, CHUNK / 8, row + lane / 4 + 8, t) + lane % 4 * 2) =
                pack<T>(value[2], value[3]);
        }
    }
}

/* Columns of Y^T at once: half a chunk, so that they and H^T fit into a thread's registers. */
#define PART (CHUNK / 2)

/* 16 * k .. of the chunk's x^T for the warp's rows, from `row` on: left operands. */
template <typename T, int P, int M_TILES>
static __device__ __forceinline__ void
load_x(const T *tile, int row, int k, uint32_t (&x)[M_TILES][4])
{
    const int lane = threadIdx.x % MIL_WARP;
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
        load_matrices_transposed(
            unit_at(tile, P / 8, 16 * k + lane % 8 + lane / 16 * 8, row / 8 + 2 * m + lane / 8 % 2), x[m]);
    }
}

/* Columns `part` * PART .. of Y^T = h (H^T C^T) + x^T S^T + D x^T for the warp's rows, rounded in pairs of columns. */
template <typename T, int P, int N, int M_TILES>
static __device__ __forceinline__ void
compute_output(const chunk_inputs<T, P, N> &in, const T *scores, int row, int part, float D,
               const float (&H)[M_TILES][N / 8][4], uint32_t (&rounded)[M_TILES][PART / 8][2])
{
    const int lane = threadIdx.x % MIL_WARP, first = part * PART / 16; /* tile of 16 tokens */
    const int r8 = lane % 8 + lane / 16 * 8, half = lane / 8 % 2; /* of right operands: row, unit of two */
    float Y[M_TILES][PART / 8][4] = {};
    uint32_t left[M_TILES][4], right[4];
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const float (&h)[4] = H[m][2 * k + q / 2];
                left[m][q] = pack<T>(h[q % 2 * 2], h[q % 2 * 2 + 1]);
            }
        }
#pragma unroll
        for (int t = 0; t < PART / 16; t++) {
            load_matrices(unit_at(in.C, N / 8, 16 * (first + t) + r8, 2 * k + half), right);
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                mil_multiply_add<T>(Y[m][2 * t], left[m], right[0], right[1]);
                mil_multiply_add<T>(Y[m][2 * t + 1], left[m], right[2], right[3]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < PART / 8; t++) {
        float2 h = *(const float2 *)(in.decays.from_start + part * PART + 8 * t + lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                Y[m][t][e] *= e % 2 == 0 ? h.x : h.y;
            }
        }
    }
#pragma unroll
    for (int k = 0; k < PART / 16 * (part + 1); k++) {
        load_x<T, P, M_TILES>(in.x, row, k, left);
#pragma unroll
        for (int t = 0; t < PART / 16; t++) {
            if (first + t < k) {
                continue;
            }
            load_matrices(unit_at(scores, CHUNK / 8, 16 * (first + t) + r8, 2 * k + half), right);
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                mil_multiply_add<T>(Y[m][2 * t], left[m], right[0], right[1]);
                mil_multiply_add<T>(Y[m][2 * t + 1], left[m], right[2], right[3]);
                if (first + t > k) {
                    continue;
                }
#pragma unroll
                for (int q = 0; q < 4; q++) { /* the left operand's layout is that of two tiles of Y^T */
                    float2 value = unpack<T>(left[m][q]);
                    float (&y)[4] = Y[m][2 * t + q / 2];
                    y[q % 2 * 2] = fmaf(D, value.x, y[q % 2 * 2]);
                    y[q % 2 * 2 + 1] = fmaf(D, value.y, y[q % 2 * 2 + 1]);
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int t = 0; t < PART / 8; t++) {
            rounded[m][t][0] = pack<T>(Y[m][t][0], Y[m][t][1]);
            rounded[m][t][1] = pack<T>(Y[m][t][2], Y[m][t][3]);
        }
    }
}

/* H^T = h_last H^T + (to_end x)^T B for the warp's rows. */
template <typename T, int P, int N, int M_TILES>
static __device__ __forceinline__ void
fold_chunk(const chunk_inputs<T, P, N> &in, int row, float (&H)[M_TILES][N / 8][4])
{
    const int lane = threadIdx.x % MIL_WARP;
    const float last = in.decays.last;
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                H[m][n][e] *= last;
            }
        }
    }
#pragma unroll
    for (int k = 0; k < CHUNK / 16; k++) {
        uint32_t x[M_TILES][4], B[4];
        load_x<T, P, M_TILES>(in.x, row, k, x);
#pragma unroll
        for (int q = 0; q < 4; q++) {
            float2 weight = *(const float2 *)(in.decays.to_end + 16 * k + q / 2 * 8 + lane % 4 * 2);
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                float2 value = unpack<T>(x[m][q]);
                x[m][q] = pack<T>(weight.x * value.x, weight.y * value.y);
            }
        }
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            load_matrices_transposed(unit_at(in.B, N / 8, 16 * k + lane % 16, 2 * n + lane / 16), B);
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                mil_multiply_add<T>(H[m][2 * n], x[m], B[0], B[1]);
                mil_multiply_add<T>(H[m][2 * n + 1], x[m], B[2], B[3]);
            }
        }
    }
}

/* Columns `part` * PART .. of Y^T into the warp's columns of x's tile. */
template <typename T, int P, int M_TILES>
static __device__ __forceinline__ void
place_output(const uint32_t (&rounded)[M_TILES][PART / 8][2], int row, int part, T *tile)
{
    const int lane = threadIdx.x % MIL_WARP;
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int t = 0; t < PART / 8; t += 2) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
            T *at = unit_at(tile, P / 8, part * PART + 8 * t + lane % 8 + lane / 16 * 8,
                            row / 8 + 2 * m + lane / 8 % 2);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                             shared_address(at)),
                         "r"(rounded[m][t][0]), "r"(rounded[m][t][1]), "r"(rounded[m][t + 1][0]),
                         "r"(rounded[m][t + 1][1])
                         : "memory");
#else
#pragma unroll
            for (int e = 0; e < 8; e++) {
                mil_vector<T, 2> pair =
                    *reinterpret_cast<const mil_vector<T, 2> *>(&rounded[m][t + e / 4][e / 2 % 2]);
                unit_at(tile, P / 8, part * PART + 8 * (t + e / 4) + lane % 4 * 2 + e % 2,
                        row / 8 + 2 * m + e / 2 % 2)[lane / 4] = pair.at[e % 2];
            }
#endif
        }
    }
}

/* The warp's columns of a chunk from its tile to y, 16 bytes at a time. */
template <typename T, int P, int M_TILES>
static __device__ __forceinline__ void
store_output(const ssd_arguments &a, const mil_span &span, int64_t start, int64_t total, int row,
             int64_t column, const T *tile)
{
    constexpr int UNITS = 2 * M_TILES; /* of the warp */
    const int lane = threadIdx.x % MIL_WARP;
#pragma unroll
    for (int s = lane / UNITS; s < CHUNK; s += MIL_WARP / UNITS) {
        int64_t token = start + s;
        int unit = row / 8 + lane % UNITS;
        if (token >= span.before && token < total) {
            *(uint4 *)((T *)a.y + (span.row + token - span.before) * a.y_stride + column + unit * 8) =
                *(const uint4 *)unit_at(tile, P / 8, s, unit);
        }
    }
}

/* The warp's rows of H^T from or to `state` [N, head_dim], at the block's first column. */
template <int N, int M_TILES, typename Move>
static __device__ __forceinline__ void
each_of_H(int64_t head_dim, int row, float (&H)[M_TILES][N / 8][4], Move move)
{
    const int lane = threadIdx.x % MIL_WARP;
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                move((int64_t)(8 * n + lane % 4 * 2 + e % 2) * head_dim + row + 16 * m + e / 2 * 8 + lane / 4,
                     H[m][n][e]);
            }
        }
    }
}

/* Grid: (segments, slices of a head), heads, sequences. */
template <typename T, int N, int M_TILES, bool OUTPUT>
static __global__ void
__launch_bounds__(CHUNK_THREADS, N > 128 ? 1 : 2)
    ssd_chunks_kernel(const __grid_constant__ chunk_arguments c, const __grid_constant__ mil_states states)
{
    constexpr int P = 64 * M_TILES;
    extern __shared__ __align__(128) char shared[];
    auto &m = *reinterpret_cast<chunk_memory<T, P, N> *>(shared);
    const ssd_arguments &a = c.ssd;
    const mil_tails tails = states.of[blockIdx.z];
    const int slice = blockIdx.x % a.slices, segment = blockIdx.x / a.slices, warp = threadIdx.x / MIL_WARP;
    const int row = warp * 16 * M_TILES,
              score_row = (warp + blockIdx.y) % 4 * 16; /* work is even over schedulers */
    const bool given = states.given;
    window_place p = {};
    p.head = blockIdx.y;
    p.column = slice * P;
    p.columns = P;
    p.x_column = (int64_t)(p.head / (a.heads / a.x_heads)) * a.head_dim + p.column;
    p.B_column = (int64_t)(p.head / (a.heads / a.B_groups)) * a.state_dim;
    p.C_column = (int64_t)(p.head / (a.heads / a.C_groups)) * a.state_dim;
    const float D = a.D[p.head];
    mil_wait();
    const mil_span span = mil_share_span(a.rows, a.first + blockIdx.z);
    const int64_t total = span.before + span.count, chunks = (total + CHUNK - 1) / CHUNK;
    const int64_t folded = given ? span.after - span.boundary : total; /* tokens to be in the state */
    const int64_t first = (int64_t)segment * c.segment_chunks, end = min(chunks, first + c.segment_chunks);
    if (span.count < a.least || first >= chunks || (!OUTPUT && end == chunks)) {
        return; /* nothing follows the last segment's own state */
    }
    const int64_t index = find_segment(c, p.head, segment);
    const int64_t size = (int64_t)N * a.head_dim;
    float *state = given ? tails.state + p.head * size + p.column : NULL;
    const float *from = !OUTPUT ? NULL : c.segments == 1 ? state : c.segment_states + index * size + p.column;

    auto ask = [&](int64_t chunk) {
        if (chunk < end) {
            chunk_inputs<T, P, N> &in = m.inputs[chunk % 2];
            const int64_t start = chunk * CHUNK;
            ask_for_decays(find_decays(c, p.head, chunk), &in.decays);
            ask_for_tile<T, P>(in.x, (const T *)a.x + span.row * a.x_stride + p.x_column, a.x_stride,
                               given ? tails.x + p.x_column : NULL, (int64_t)a.x_heads * a.head_dim, start,
                               span.before, total);
            ask_for_tile<T, N>(in.B, (const T *)a.B + span.row * a.B_stride + p.B_column, a.B_stride,
                               given ? tails.B + p.B_column : NULL, (int64_t)a.B_groups * N, start,
                               span.before, total);
            if constexpr (OUTPUT) {
                ask_for_tile<T, N>(in.C, (const T *)a.C + span.row * a.C_stride + p.C_column, a.C_stride,
                                   NULL, 0, start, span.before, total);
            }
        }
        asm volatile("cp.async.commit_group;");
    };
    ask(first);
    ask(first + 1);
    float decay = 1.0f; /* of the segment */
    float H[M_TILES][N / 8][4];
    each_of_H<N>(a.head_dim, row, H, [&](int64_t at, float &h) { h = from == NULL ? 0.0f : from[at]; });
    for (int64_t chunk = first; chunk < end; chunk++) {
        chunk_inputs<T, P, N> &in = m.inputs[chunk % 2];
        const bool folds = folded > chunk * CHUNK;
        asm volatile("cp.async.wait_group 1;");
        __syncthreads();
        decay *= in.decays.last;
        uint32_t Y[2][M_TILES][PART / 8][2]; /* of Y^T, rounded */
        if constexpr (OUTPUT) {
            fill_scores<T, P, N>(in, score_row, m.scores);
            __syncthreads();
            compute_output<T, P, N, M_TILES>(in, m.scores, row, 0, D, H, Y[0]);
            compute_output<T, P, N, M_TILES>(in, m.scores, row, 1, D, H, Y[1]);
        }
        if (folds) {
            fold_chunk<T, P, N, M_TILES>(in, row, H);
        }
        if constexpr (OUTPUT) {
            __syncwarp(); /* the warp alone has read these columns of x, and is done with them */
            place_output<T, P, M_TILES>(Y[0], row, 0, in.x);
            place_output<T, P, M_TILES>(Y[1], row, 1, in.x);
            __syncwarp();
            store_output<T, P, M_TILES>(a, span, chunk * CHUNK, total, row,
                                        (int64_t)p.head * a.head_dim + p.column, in.x);
            if (state != NULL && folds && chunk * CHUNK + CHUNK >= folded) {
                each_of_H<N>(a.head_dim, row, H, [&](int64_t at, float &h) { state[at] = h; });
            }
        }
        __syncthreads();
        ask(chunk + 2);
    }
    if constexpr (!OUTPUT) {
        float *to = c.segment_states + index * size + p.column;
        each_of_H<N>(a.head_dim, row, H, [&](int64_t at, float &h) { to[at] = h; });
        if (threadIdx.x == 0) {
            c.segment_decays[index] = decay;
        }
    }
    else if (state != NULL && segment == 0) {
        move_tails<T>(a, p, span, tails, come_for_tails(a, p, tails, a.slices), a.dt_bias[p.head]);
    }
}

/* Turns what each segment adds into what each starts from, four values a thread. Grid: parts of N * P, heads, sequences. */
static __global__ void
__launch_bounds__(SEGMENT_THREADS)
    ssd_segments_kernel(const __grid_constant__ chunk_arguments c, const __grid_constant__ mil_states states)
{
    const ssd_arguments &a = c.ssd;
    const int64_t size = (int64_t)a.state_dim * a.head_dim,
                  i = ((int64_t)blockIdx.x * SEGMENT_THREADS + threadIdx.x) * 4;
    mil_trigger();
    mil_wait();
    const mil_span span = mil_share_span(a.rows, a.first + blockIdx.z);
    if (span.count < a.least) {
        return;
    }
    const int chunks = (int)((span.before + span.count + CHUNK - 1) / CHUNK);
    const int segments = (chunks + c.segment_chunks - 1) / c.segment_chunks;
    const int64_t first = find_segment(c, blockIdx.y, 0);
    constexpr int AT_ONCE = 4; /* loads under way */
    float H[4] = {};
    if (states.given) {
        mil_load<4>(states.of[blockIdx.z].state + blockIdx.y * size + i, H);
    }
    for (int segment = 0; segment < segments; segment += AT_ONCE) {
        float added[AT_ONCE][4] = {}, decay[AT_ONCE] = {};
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (segment + k + 1 < segments) { /* the last segment's are nobody's */
                mil_load<4>(c.segment_states + (first + segment + k) * size + i, added[k]);
                decay[k] = c.segment_decays[first + segment + k];
            }
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (segment + k < segments) {
                mil_store<4>(c.segment_states + (first + segment + k) * size + i, H);
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                H[e] = fmaf(decay[k], H[e], added[k][e]);
            }
        }
    }
}

/* ---- launches --------------------------------------------------------------------------------------------------- */

/* How many segments of how many chunks: as many as fill the chip with `enough` blocks, but no short ones. */
static void
cut_segments(chunk_arguments *c, int64_t blocks, int64_t enough, int64_t longest)
{
    const int64_t shortest = 8; /* chunks */
    int64_t chunks = mil_ceil_div(longest + MIL_TAIL, CHUNK), segments = enough / blocks;
    segments = segments < chunks / shortest ? segments : chunks / shortest;
    segments = segments < 1 ? 1 : segments;
    c->segment_chunks = (int)mil_ceil_div(chunks, segments);
    c->segments = (int)mil_ceil_div(chunks, c->segment_chunks);
}

template <typename T, int N, int M_TILES>
static mil_status
launch_chunks(mil_context *context, const chunk_arguments *c, const mil_states *states, int64_t sequences,
              bool outputs)
{
    const dim3 grid((unsigned)(c->segments * c->ssd.slices), (unsigned)c->ssd.heads, (unsigned)sequences);
    return mil_launch(
        context, "ssd",
        outputs ? ssd_chunks_kernel<T, N, M_TILES, true> : ssd_chunks_kernel<T, N, M_TILES, false>, grid,
        dim3(CHUNK_THREADS), sizeof(chunk_memory<T, 64 * M_TILES, N>), *c, *states);
}

typedef mil_status (*chunk_launcher)(mil_context *context, const chunk_arguments *c, const mil_states *states,
                                     int64_t sequences, bool outputs);

/* Whether tensor cores can take the shape. */
template <typename T>
static bool
takes_chunks(const mil_context *context, const ssd_arguments &a)
{
    return sizeof(T) == 2 && a.head_dim % 64 == 0 &&
           (a.state_dim == 64 || a.state_dim == 128 ||
            (a.state_dim == 256 && mil_device_has_shared(context, sizeof(chunk_memory<T, 64, 256>)))) &&
           mil_is_aligned<T>(a.x, a.x_stride) && mil_is_aligned<T>(a.B, a.B_stride) &&
           mil_is_aligned<T>(a.C, a.C_stride) && mil_is_aligned<T>(a.y, a.y_stride);
}

/* Decays; where there are segments, what each adds and what each starts from; and then the outputs. */
template <typename T>
static mil_status
run_segments(mil_context *context, chunk_arguments *c, const mil_states &states, int64_t sequences,
             chunk_launcher launch)
{
    const ssd_arguments &a = c->ssd;
    const int64_t chunks = (int64_t)c->segments * c->segment_chunks;
    MIL_TRY(MIL_PUSH(context->scratch, sequences * a.heads * chunks, chunk_decays, &c->decays));
    MIL_TRY(
        mil_launch(context, "ssd", ssd_decays_kernel<T>,
                   dim3((unsigned)chunks, (unsigned)mil_ceil_div(a.heads, DECAY_WARPS), (unsigned)sequences),
                   dim3(DECAY_WARPS * MIL_WARP), 0, *c, states));
    if (c->segments > 1) {
        const int64_t count = sequences * a.heads * c->segments, size = (int64_t)a.state_dim * a.head_dim;
        MIL_TRY(MIL_PUSH(context->scratch, count * size, float, &c->segment_states));
        MIL_TRY(MIL_PUSH(context->scratch, count, float, &c->segment_decays));
        MIL_TRY(launch(context, c, &states, sequences, false));
        MIL_TRY(
            mil_launch(context, "ssd", ssd_segments_kernel,
                       dim3((unsigned)(size / (4 * SEGMENT_THREADS)), (unsigned)a.heads, (unsigned)sequences),
                       dim3(SEGMENT_THREADS), 0, *c, states));
    }
    return launch(context, c, &states, sequences, true);
}

template <typename T>
static mil_status
run_chunks(mil_context *context, const ssd_arguments &a, const mil_states &states, int64_t sequences,
           int64_t longest)
{
    const bool wide = a.head_dim % 128 == 0 && a.state_dim == 128 &&
                      mil_device_has_shared(context, sizeof(chunk_memory<T, 128, 128>));
    chunk_launcher launch = wide                 ? launch_chunks<T, 128, 2>
                            : a.state_dim == 64  ? launch_chunks<T, 64, 1>
                            : a.state_dim == 128 ? launch_chunks<T, 128, 1>
                                                 : launch_chunks<T, 256, 1>;
    chunk_blocks blocks = {false, a.head_dim / (wide ? 128 : 64), 256}; /* two on a multiprocessor */
    if (mil_ssd_hopper_takes(context, &a, &blocks)) {
        launch = mil_ssd_hopper;
    }
    chunk_arguments c = {};
    c.ssd = a;
    c.ssd.slices = blocks.slices;
    cut_segments(&c, sequences * a.heads * blocks.slices / (blocks.pairs ? 2 : 1), blocks.enough, longest);
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_status status = run_segments<T>(context, &c, states, sequences, launch);
    mil_arena_rewind(context->scratch, mark);
    return status;
}

template <typename T>
static mil_status
ssd(mil_context *context, const mil_ssd *s)
{
    ssd_arguments a = ssd_arguments_of(s);
    const int64_t sequences = s->rows.sequences;
    if (mil_longest(s->rows, 0, sequences) == 1 && mil_shortest(s->rows, 0, sequences) == 1) {
        bool done;
        MIL_TRY(mil_ssd_batch(context, &a, s->states, sequences, &done));
        if (done) {
            return MIL_OK;
        }
    }
    for (; a.first < sequences; a.first += MIL_SEQUENCES) {
        int64_t count = sequences - a.first;
        count = count < MIL_SEQUENCES ? count : MIL_SEQUENCES;
        mil_states states = mil_states_of(s->states, a.first, count);
        const int64_t longest = mil_longest(s->rows, a.first, count);
        const bool chunks = takes_chunks<T>(context, a) && longest > MIL_WINDOW;
        a.least = 0;
        a.most = chunks ? MIL_WINDOW : INT64_MAX;
        if (!chunks || mil_shortest(s->rows, a.first, count) <= MIL_WINDOW) {
            MIL_TRY(mil_ssd_windows(context, &a, &states, count));
        }
        if constexpr (sizeof(T) == 2) {
            a.least = MIL_WINDOW + 1;
            MIL_TRY(chunks ? run_chunks<T>(context, a, states, count, longest) : MIL_OK);
        }
    }
    return MIL_OK;
}

mil_status
mil_cuda_ssd_forward(mil_context *context, const mil_ssd *arguments)
{
    const mil_ssd *a = arguments;
    if (a->heads < 1 || a->heads > 65535 || a->head_dim < 1 || a->state_dim < 1 ||
        a->state_dim > MIL_SSD_STATES) {
        return mil_fail(
            MIL_ERR_SHAPE,
            "ssd_forward: heads = %lld, head_dim = %lld, state_dim = %lld; CUDA takes 1 to 65535 heads "
            "and states of 1 to %d",
            (long long)a->heads, (long long)a->head_dim, (long long)a->state_dim, MIL_SSD_STATES);
    }
    if (a->x_heads < 1 || a->heads % a->x_heads != 0 || a->B_groups < 1 || a->heads % a->B_groups != 0 ||
        a->C_groups < 1 || a->heads % a->C_groups != 0) {
        return mil_fail(MIL_ERR_SHAPE,
                        "ssd_forward: heads = %lld is not a multiple of x_heads = %lld, B_groups = %lld and "
                        "C_groups = %lld",
                        (long long)a->heads, (long long)a->x_heads, (long long)a->B_groups,
                        (long long)a->C_groups);
    }
    return MIL_FOR_ACT(context, ssd, context, a);
}
