/* Mamba-1's selective scan (device.h: mil_scan, csrc/cpu/selective_scan.c).
 *
 *   dt_t = clamp(softplus(dt[t] + dt_bias_scale dt_bias))
 *   H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t[n],   y_t = (D x_t + sum_n C_t[n] H_t[n]) silu(z_t)
 *
 * Here are prompts; sequences of at most a window of rows are in selective_scan_step.cu.
 *
 * Sequences of more than a window, in 16-bit types.  There are inner * state_dim exponentials a token, and 4 more a channel
 * for softplus and gate.  The unit for them makes 16 a cycle and multiprocessor, a warp's in 8 cycles, and everything else
 * must fit beside it: in the same 8 cycles a scheduler issues 8 instructions.  Therefore
 *
 *   update   multiply, exponential, multiply, multiply-add: nothing else a state.  A warp has 8 * HALVES channels and all
 *            of their states; a lane has 4 of each 16 states of the channels g and g + 8, g = lane / 4, and reads
 *            (dt, dt x) and B of a token with two loads
 *   output   sum_n C H is a tensor core's: the lanes' states are, as they lie in registers, a left operand of 16 channels by
 *            8 states of mma.m16n8k8 (tf32: 10 bits behind the point, all of float32's range, no conversion).  The right
 *            operand is C of 8 tokens; only the column of the token at hand is kept.  One instruction in 4 states
 *            instead of a multiply-add each and a sum over lanes
 *   powers   a token's are made while the token before is added up, for they take long to come
 *
 * Tokens go through shared memory in pieces of TOKENS: pairs (dt, dt x), of which the first is then
 * overwritten by sum_n C H.  A thread copies (cp.async), prepares and finishes 8 neighbouring channels of a token; those of
 * the next piece are on their way while this one is computed, in places that no other thread uses.  Pieces begin at
 * multiples of 16 tokens, so the state to be kept is always that between two groups of 16.
 */
#include "selective_scan.cuh"

#define THREADS 128
#define WARPS (THREADS / MIL_WARP)
#define VECTOR 8 /* channels of a 16-byte access */
#define TILE 16  /* states that a quad of lanes has of a channel */
#define OWN 4    /* of them a lane */

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
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + mil_exp2(-log2_e * x)));
    return x * y;
}

/* log(1 + e^x) without a branch; where e^x is small 1 + e^x would lose its digits. */
static __device__ __forceinline__ float
fast_softplus(float x)
{
    float e = mil_exp2(log2_e * x), series = e * fmaf(e, fmaf(e, 1.0f / 3, -0.5f), 1.0f);
    float value = e < 0x1p-6f ? series : 0.6931471806f * fast_log2(1.0f + e);
    return x > 20.0f ? x : value;
}

/* mil_exp2 in its place among other such and mma: batches of it are under way while something else is done. */
static __device__ __forceinline__ float
ordered_power(float x)
{
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* d += a b: 16 x 8 by 8 x 8, float32 of which the last 13 bits do not count. */
static __device__ __forceinline__ void
multiply_add(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
          "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

/* 16 bytes on their way from memory, or zeros. */
static __device__ __forceinline__ void
copy_vector(void *to, const void *from, bool there)
{
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
        "l"(from), "r"(there ? 16 : 0)
        : "memory");
}

/* A block's sizes. Pairs: 2 more a warp, so that stores of several warps' and tokens' vectors meet no bank twice. */
template <int HALVES>
struct piece_shape {
    static constexpr int COLUMNS = WARPS * 8 * HALVES, ACROSS = COLUMNS / VECTOR;
    static constexpr int TOKENS = 64 / HALVES;              /* of a piece: whole groups of 16 */
    static constexpr int SHARE = TOKENS * ACROSS / THREADS; /* vectors of a piece that are a thread's */
    static constexpr int WARP_PAIRS = 8 * HALVES + 2, TOKEN_PAIRS = WARPS * WARP_PAIRS;
};

/* Two pieces' inputs in turns; each thread has its own vectors of them. */
template <typename T, int SHARE>
struct raw_piece {
    mil_vector<T, VECTOR> x[2][SHARE][THREADS], z[2][SHARE][THREADS], dt[SHARE][THREADS];
};

template <typename T, int HALVES>
struct piece_memory {
    raw_piece<T, piece_shape<HALVES>::SHARE> *raw;
    float2 *pairs;                  /* [TOKENS, TOKEN_PAIRS] */
    float *B, *C;                   /* [groups, TOKENS, state_dim] */
    mil_vector<T, VECTOR> *columns; /* B and C as given */
};

template <typename T, int HALVES>
static inline size_t
piece_bytes(int B_width, int C_width)
{
    using shape = piece_shape<HALVES>;
    return sizeof(raw_piece<T, shape::SHARE>) +
           shape::TOKENS *
               (shape::TOKEN_PAIRS * sizeof(float2) + (B_width + C_width) * (sizeof(float) + sizeof(T)));
}

template <typename T, int HALVES>
static __device__ __forceinline__ piece_memory<T, HALVES>
cut_memory(const scan_arguments &a, char *shared)
{
    using shape = piece_shape<HALVES>;
    piece_memory<T, HALVES> m;
    m.raw = (raw_piece<T, shape::SHARE> *)shared;
    m.pairs = (float2 *)(m.raw + 1);
    m.B = (float *)(m.pairs + shape::TOKENS * shape::TOKEN_PAIRS);
    m.C = m.B + shape::TOKENS * a.B_width;
    m.columns = (mil_vector<T, VECTOR> *)(m.C + shape::TOKENS * a.C_width);
    return m;
}

/* ---- pieces ---------------------------------------------------------------------------------------------------------- */

/* The call's rows of the block's sequence. */
struct piece_rows {
    int64_t first;
    int count;
};

/* What a thread loads and finishes: channels `channel` .. + VECTOR of tokens `token` + k * `apart` of a piece. */
struct piece_place {
    int channel, source; /* source: its first column of x */
    int token, apart;
    int pair;       /* of its first channel, in a token's */
    int B_at, C_at; /* the block's first columns */
};

/* B or C of a piece that starts at `start`: for each group that the block needs TOKENS times WIDTH columns. `inside`: groups
 * that there are. */
template <typename T, int TOKENS, int WIDTH>
static __device__ __forceinline__ void
ask_for_columns(const T *from, int64_t stride, int groups, int inside, const piece_rows &rows, int start,
                mil_vector<T, VECTOR> *to)
{
    constexpr int ACROSS = WIDTH / VECTOR, VECTORS = TOKENS * ACROSS;
    for (int group = 0; group < groups; group++) {
#pragma unroll
        for (int k = 0; k < (VECTORS + THREADS - 1) / THREADS; k++) {
            const int e = threadIdx.x + k * THREADS;
            if (VECTORS % THREADS != 0 && e >= VECTORS) {
                break;
            }
            const int token = start + e / ACROSS;
            const bool there = (unsigned)token < (unsigned)rows.count && group < inside;
            const T *at = from + (rows.first + token) * stride + group * WIDTH + e % ACROSS * VECTOR;
            copy_vector(to + group * VECTORS + e, there ? at : from, there);
        }
    }
}

/* What the same thread asked for, as float32. */
template <typename T, int TOKENS, int WIDTH>
static __device__ __forceinline__ void
widen_columns(const mil_vector<T, VECTOR> *from, int groups, float *to)
{
    constexpr int VECTORS = TOKENS * WIDTH / VECTOR;
    for (int group = 0; group < groups; group++) {
#pragma unroll
        for (int k = 0; k < (VECTORS + THREADS - 1) / THREADS; k++) {
            const int e = threadIdx.x + k * THREADS;
            if (VECTORS % THREADS != 0 && e >= VECTORS) {
                break;
            }
            float value[VECTOR];
            mil_load<VECTOR>((const T *)(from + group * VECTORS + e), value);
            float4 *at = (float4 *)(to + (group * VECTORS + e) * VECTOR);
            at[0] = make_float4(value[0], value[1], value[2], value[3]);
            at[1] = make_float4(value[4], value[5], value[6], value[7]);
        }
    }
}

template <typename T, int K, int HALVES>
static __device__ __forceinline__ void
ask_for_piece(const scan_arguments &a, const piece_rows &rows, const piece_place &p, int start, int turn,
              const piece_memory<T, HALVES> &m)
{
    constexpr int TOKENS = piece_shape<HALVES>::TOKENS;
    constexpr int SHARE = piece_shape<HALVES>::SHARE;
    if (start < rows.count) {
#pragma unroll
        for (int k = 0; k < SHARE; k++) {
            const int token = start + p.token + k * p.apart;
            const bool there = (unsigned)token < (unsigned)rows.count && p.channel < a.inner;
            const int64_t row = there ? rows.first + token : 0;
            const int column = there ? p.channel : 0, source = there ? p.source : 0;
            copy_vector(&m.raw->x[turn][k][threadIdx.x], (const T *)a.x + row * a.x_stride + source, there);
            copy_vector(&m.raw->dt[k][threadIdx.x], (const T *)a.dt + row * a.dt_stride + column, there);
            if (a.z != NULL) {
                copy_vector(&m.raw->z[turn][k][threadIdx.x], (const T *)a.z + row * a.z_stride + column,
                            there);
            }
        }
        const int B_groups = a.B_width / (TILE * K), C_groups = a.C_width / (TILE * K);
        ask_for_columns<T, TOKENS, TILE * K>((const T *)a.B + p.B_at, a.B_stride, B_groups,
                                             a.B_groups - p.B_at / (TILE * K), rows, start, m.columns);
        ask_for_columns<T, TOKENS, TILE * K>((const T *)a.C + p.C_at, a.C_stride, C_groups,
                                             a.C_groups - p.C_at / (TILE * K), rows, start,
                                             m.columns + TOKENS * a.B_width / VECTOR);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

static __device__ __forceinline__ void
load_vector(const float *from, float (&to)[VECTOR])
{
    float4 low = __ldg((const float4 *)from), high = __ldg((const float4 *)from + 1);
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

/* Pairs (dt, dt x) of the thread's part of a piece, zeros where there is no token: those leave H as it is. */
template <typename T, int HALVES>
static __device__ __forceinline__ void
store_pairs(const scan_arguments &a, const piece_rows &rows, const piece_place &p, int start, int turn,
            const piece_memory<T, HALVES> &m)
{
    constexpr int SHARE = piece_shape<HALVES>::SHARE;
    float bias[VECTOR];
    load_vector(a.dt_bias + min(p.channel, a.inner - VECTOR), bias);
#pragma unroll
    for (int k = 0; k < SHARE; k++) {
        const int token = start + p.token + k * p.apart;
        const bool inside = (unsigned)token < (unsigned)rows.count;
        float x[VECTOR], dt[VECTOR];
        mil_load<VECTOR>(m.raw->x[turn][k][threadIdx.x].at, x);
        mil_load<VECTOR>(m.raw->dt[k][threadIdx.x].at, dt);
        float2 *to = m.pairs + (p.token + k * p.apart) * piece_shape<HALVES>::TOKEN_PAIRS + p.pair;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            dt[i] = fast_softplus(fmaf(a.dt_bias_scale, bias[i], dt[i]));
        }
        if (a.dt_min > 0.0f || a.dt_max < INFINITY) {
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                dt[i] = dt[i] < a.dt_min ? a.dt_min : dt[i];
                dt[i] = dt[i] > a.dt_max ? a.dt_max : dt[i];
            }
        }
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            const float step = inside ? dt[i] : 0.0f;
            to[i * HALVES] = make_float2(step, step * x[i]);
        }
    }
}

/* y of the thread's part of a piece from the sums and what it had loaded. */
template <typename T, int HALVES>
static __device__ __forceinline__ void
finish_piece(const scan_arguments &a, const piece_rows &rows, const piece_place &p, int start, int turn,
             const piece_memory<T, HALVES> &m)
{
    constexpr int SHARE = piece_shape<HALVES>::SHARE;
    float D[VECTOR];
    load_vector(a.D + min(p.channel, a.inner - VECTOR), D);
#pragma unroll
    for (int k = 0; k < SHARE; k++) {
        const int token = start + p.token + k * p.apart;
        if ((unsigned)token >= (unsigned)rows.count || p.channel >= a.inner) {
            continue;
        }
        const float2 *from = m.pairs + (p.token + k * p.apart) * piece_shape<HALVES>::TOKEN_PAIRS + p.pair;
        float x[VECTOR], y[VECTOR];
        mil_load<VECTOR>(m.raw->x[turn][k][threadIdx.x].at, x);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            y[i] = fmaf(D[i], x[i], from[i * HALVES].x);
        }
        if (a.z != NULL) {
            float z[VECTOR];
            mil_load<VECTOR>(m.raw->z[turn][k][threadIdx.x].at, z);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                y[i] *= fast_silu(z[i]);
            }
        }
        mil_store<VECTOR>((T *)a.y + (rows.first + token) * a.y_stride + p.channel, y);
    }
}

/* ---- the recurrence ------------------------------------------------------------------------------------------------- */

/* A lane's states of its channels (one of each half): state TILE * k + OWN * (lane % 4) + j is number OWN * k + j. */
template <int K, int HALVES>
struct lane_states {
    float exponent[HALVES][OWN * K]; /* A log2(e) */
    float H[HALVES][OWN * K];
};

/* What a token does to a lane's states: H is multiplied by the powers, and dt x B is added. */
template <int K, int HALVES>
struct lane_step {
    float power[HALVES][OWN * K], u[HALVES];

    __device__ __forceinline__ void prepare(const float2 *pairs, const lane_states<K, HALVES> &s)
    {
        float dt[HALVES];
        if constexpr (HALVES == 2) {
            const float4 both = *(const float4 *)pairs;
            dt[0] = both.x, u[0] = both.y, dt[HALVES - 1] = both.z, u[HALVES - 1] = both.w;
        }
        else {
            const float2 pair = *pairs;
            dt[0] = pair.x, u[0] = pair.y;
        }
#pragma unroll
        for (int i = 0; i < OWN * K; i++) {
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                power[h][i] = ordered_power(dt[h] * s.exponent[h][i]);
            }
        }
    }
};

/* Eight tokens. pairs: the lane's of the first token; B, C: of the lane's first state and the first token.  A token's powers
 * are made while the one before is added up, for they take long to come. */
template <int K, int HALVES>
static __device__ __forceinline__ void
run_tokens(float2 *pairs, const float *B, const float *C, lane_states<K, HALVES> &s)
{
    constexpr int STRIDE = piece_shape<HALVES>::TOKEN_PAIRS, GROUP = 8;
    const int g = threadIdx.x % MIL_WARP / 4, q = threadIdx.x % 4;
    float right[OWN * K], y[4] = {};
    lane_step<K, HALVES> steps[2];
    steps[0].prepare(pairs, s);
#pragma unroll
    for (int k = 0; k < K; k++) {
        const float4 c = *(const float4 *)(C + (g * K + k) * TILE);
        right[OWN * k] = c.x, right[OWN * k + 1] = c.y, right[OWN * k + 2] = c.z, right[OWN * k + 3] = c.w;
    }
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
        const lane_step<K, HALVES> &step = steps[t % 2];
        float sum[4] = {}, b[OWN * K];
#pragma unroll
        for (int k = 0; k < K; k++) {
            const float4 four = *(const float4 *)(B + (t * K + k) * TILE);
            b[OWN * k] = four.x, b[OWN * k + 1] = four.y, b[OWN * k + 2] = four.z, b[OWN * k + 3] = four.w;
        }
        if (t + 1 < GROUP) {
            steps[(t + 1) % 2].prepare(pairs + (t + 1) * STRIDE, s);
        }
#pragma unroll
        for (int i = 0; i < OWN * K; i++) {
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                s.H[h][i] = fmaf(step.power[h][i], s.H[h][i], step.u[h] * b[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < OWN * K; i += 2) {
            multiply_add(sum, s.H[0][i], HALVES == 2 ? s.H[HALVES - 1][i] : 0.0f, s.H[0][i + 1],
                         HALVES == 2 ? s.H[HALVES - 1][i + 1] : 0.0f, right[i], right[i + 1]);
        }
        if (q == t / 2) { /* the token's column */
            y[t % 2] = sum[t % 2];
            y[2 + t % 2] = sum[2 + t % 2];
        }
    }
    __syncwarp(); /* all lanes have read these pairs */
    float2 *to = pairs + 2 * q * STRIDE;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        to[h].x = y[2 * h];
        to[STRIDE + h].x = y[2 * h + 1];
    }
}

/* Tail tokens of earlier calls. first: the lane's first state; B_at: column of its B. */
template <int K, int HALVES>
static __device__ __forceinline__ void
replay_tail(const scan_arguments &a, const mil_span &span, const mil_tails &tails, const int (&c)[HALVES],
            int B_at, lane_states<K, HALVES> &s)
{
    for (int token = 0; token < span.before; token++) {
        const float *B = tails.B + (int64_t)token * a.B_groups * a.state_dim + B_at;
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            const float dt = tails.dt[(int64_t)token * a.inner + c[h]];
            const float x = tails.x[(int64_t)token * (a.inner / a.x_repeat) + source_of(a, c[h])];
#pragma unroll
            for (int i = 0; i < OWN * K; i++) {
                s.H[h][i] =
                    fmaf(mil_exp2(dt * s.exponent[h][i]), s.H[h][i], dt * x * B[i / OWN * TILE + i % OWN]);
            }
        }
    }
}

/* Grid: blocks of channels, sequences. TILE * K is state_dim. */
template <typename T, int K, int HALVES>
static __global__ void
__launch_bounds__(THREADS, K == 4                  ? 2
                           : K == 2 || HALVES == 1 ? 4
                                                   : 5)
    scan_pieces_kernel(const __grid_constant__ scan_arguments a, const __grid_constant__ mil_states states)
{
    using shape = piece_shape<HALVES>;
    constexpr int TOKENS = shape::TOKENS;
    extern __shared__ __align__(16) char shared[];
    const piece_memory<T, HALVES> m = cut_memory<T, HALVES>(a, shared);
    const int lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP, n = lane % 4 * OWN;
    const int channel = blockIdx.x * shape::COLUMNS,
              own = min(channel + warp * 8 * HALVES, a.inner - 8 * HALVES);
    const int B_run = a.inner / a.B_groups, C_run = a.inner / a.C_groups;
    const mil_tails tails = states.of[blockIdx.y];
    float *state = states.given ? tails.state : NULL;
    piece_place p;
    p.token = threadIdx.x / shape::ACROSS;
    p.apart = THREADS / shape::ACROSS;
    const int column = threadIdx.x % shape::ACROSS * VECTOR, in_warp = column % (8 * HALVES);
    p.channel = channel + column;
    p.source = source_of(a, min(p.channel, a.inner - VECTOR));
    p.pair = column / (8 * HALVES) * shape::WARP_PAIRS + in_warp % 8 * HALVES + in_warp / 8;
    p.B_at = channel / B_run * a.state_dim;
    p.C_at = channel / C_run * a.state_dim;
    const int B_groups = a.B_width / (TILE * K), C_groups = a.C_width / (TILE * K);
    const int B_group = own / B_run - channel / B_run, C_group = own / C_run - channel / C_run;
    const float *B = m.B + B_group * TOKENS * TILE * K + n, /* the lane's */
        *C = m.C + C_group * TOKENS * TILE * K + n;
    float2 *pairs = m.pairs + warp * shape::WARP_PAIRS + lane / 4 * HALVES;
    int c[HALVES];
    lane_states<K, HALVES> s;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        c[h] = own + 8 * h + lane / 4;
#pragma unroll
        for (int i = 0; i < OWN * K; i++) {
            const float *A_log = a.A_log + (int64_t)c[h] * a.state_dim + n;
            s.exponent[h][i] = -log2_e * fminf(expf(A_log[i / OWN * TILE + i % OWN]), 1e30f);
            s.H[h][i] = 0.0f;
        }
    }
    mil_wait();
    mil_span span = mil_span_of(a.rows, a.first + blockIdx.y);
    if (span.count < a.least) {
        return;
    }
    const piece_rows rows = {span.row, (int)span.count};
    const int kept = (int)(span.after - span.past); /* token before which the state is to be kept */
    int start = -(span.before % MIL_WINDOW);        /* token at which the piece begins */
    ask_for_piece<T, K, HALVES>(a, rows, p, start, 0, m);
    auto each_state = [&](auto move) {
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
#pragma unroll
            for (int i = 0; i < OWN * K; i++) {
                move(state[(int64_t)(i / OWN * TILE + n + i % OWN) * a.inner + c[h]], s.H[h][i]);
            }
        }
    };
    if (state != NULL) {
        each_state([](float &kept, float &H) { H = kept; });
        replay_tail<K, HALVES>(a, span, tails, c, p.B_at + B_group * TILE * K + n, s);
    }
    for (int turn = 0; start < rows.count; start += TOKENS, turn ^= 1) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        widen_columns<T, TOKENS, TILE * K>(m.columns, B_groups, m.B);
        widen_columns<T, TOKENS, TILE * K>(m.columns + TOKENS * a.B_width / VECTOR, C_groups, m.C);
        store_pairs<T, HALVES>(a, rows, p, start, turn, m);
        ask_for_piece<T, K, HALVES>(a, rows, p, start + TOKENS, turn ^ 1, m);
        __syncthreads();
#pragma unroll 1
        for (int t = 0; t < TOKENS; t += 8) {
            run_tokens<K, HALVES>(pairs + t * shape::TOKEN_PAIRS, B + t * TILE * K, C + t * TILE * K, s);
            if (state != NULL && start + t + 8 == kept && channel + warp * 8 * HALVES < a.inner) {
                each_state([](float &kept, float &H) { kept = H; });
            }
        }
        __syncthreads();
        finish_piece<T, HALVES>(a, rows, p, start, turn,
                                m); /* what it reads it writes in the next round itself */
    }
    mil_trigger();
    if (state != NULL) {
        span = mil_span_of(a.rows, a.first + blockIdx.y); /* again: registers are scarce above */
        move_tails<T, shape::COLUMNS>(a, span, tails, channel);
    }
}

/* ---- launches ----------------------------------------------------------------------------------------------------- */

template <typename T, int K, int HALVES>
static mil_status
launch_pieces(mil_context *context, scan_arguments a, const mil_states &states, int64_t sequences)
{
    constexpr int COLUMNS = piece_shape<HALVES>::COLUMNS;
    a.B_width = group_columns(a.inner, a.B_groups, a.state_dim, COLUMNS);
    a.C_width = group_columns(a.inner, a.C_groups, a.state_dim, COLUMNS);
    return mil_launch(context, "scan", scan_pieces_kernel<T, K, HALVES>,
                      dim3((unsigned)mil_ceil_div(a.inner, COLUMNS), (unsigned)sequences), dim3(THREADS),
                      piece_bytes<T, HALVES>(a.B_width, a.C_width), a, states);
}

/* Whether a warp of that many channels has one B and one C. */
static bool
shares_columns(const scan_arguments &a, int channels)
{
    return a.inner / a.B_groups % channels == 0 && a.inner / a.C_groups % channels == 0;
}

/* Whether the columns of B and C that a block needs leave room: many small groups may not. */
template <typename T, int HALVES>
static bool
fits(const scan_arguments &a)
{
    constexpr int COLUMNS = piece_shape<HALVES>::COLUMNS;
    return piece_bytes<T, HALVES>(group_columns(a.inner, a.B_groups, a.state_dim, COLUMNS),
                                  group_columns(a.inner, a.C_groups, a.state_dim, COLUMNS)) <= 96 * 1024;
}

/* Many channels: 16 a warp. Few: 8, for twice the warps. */
template <typename T>
static mil_status
choose_halves(mil_context *context, const scan_arguments &a, const mil_states &states, int64_t sequences)
{
    const int64_t enough = 1 << 10; /* warps: two on each scheduler */
    if (!shares_columns(a, 16) || !fits<T, 2>(a) || sequences * a.inner / 16 < enough) {
        return a.state_dim == 16   ? launch_pieces<T, 1, 1>(context, a, states, sequences)
               : a.state_dim == 32 ? launch_pieces<T, 2, 1>(context, a, states, sequences)
                                   : launch_pieces<T, 4, 1>(context, a, states, sequences);
    }
    return a.state_dim == 16   ? launch_pieces<T, 1, 2>(context, a, states, sequences)
           : a.state_dim == 32 ? launch_pieces<T, 2, 2>(context, a, states, sequences)
                               : launch_pieces<T, 4, 2>(context, a, states, sequences);
}

/* Whether states divide among lanes, warps have one B and C, and all rows can be read and written 16 bytes at a time. */
template <typename T>
static bool
takes_pieces(const scan_arguments &a)
{
    const bool divides = a.state_dim == TILE || a.state_dim == 2 * TILE || a.state_dim == 4 * TILE;
    return sizeof(T) == 2 && divides && shares_columns(a, 8) && fits<T, 1>(a) &&
           (a.x_repeat == 1 || a.x_repeat_group % VECTOR == 0) && mil_is_aligned<T>(a.x, a.x_stride) &&
           mil_is_aligned<T>(a.dt, a.dt_stride) && mil_is_aligned<T>(a.y, a.y_stride) &&
           mil_is_aligned<T>(a.B, a.B_stride) && mil_is_aligned<T>(a.C, a.C_stride) &&
           (a.z == NULL || mil_is_aligned<T>(a.z, a.z_stride)) && mil_is_aligned<float>(a.dt_bias, 0) &&
           mil_is_aligned<float>(a.D, 0);
}

template <typename T>
static mil_status
scan(mil_context *context, const mil_scan *s)
{
    scan_arguments a = scan_arguments_of(s);
    for (; a.first < s->rows.sequences; a.first += MIL_SEQUENCES) {
        int64_t count = s->rows.sequences - a.first;
        count = count < MIL_SEQUENCES ? count : MIL_SEQUENCES;
        mil_states states = mil_states_of(s->states, a.first, count);
        const bool pieces = takes_pieces<T>(a) && mil_longest(s->rows, a.first, count) > MIL_WINDOW;
        a.least = 0;
        a.most = pieces ? MIL_WINDOW : INT64_MAX;
        if (!pieces || mil_shortest(s->rows, a.first, count) <= MIL_WINDOW) {
            MIL_TRY(mil_scan_steps(context, &a, &states, count));
        }
        if constexpr (sizeof(T) == 2) {
            a.least = MIL_WINDOW + 1;
            MIL_TRY(pieces ? choose_halves<T>(context, a, states, count) : MIL_OK);
        }
    }
    return MIL_OK;
}

mil_status
mil_cuda_scan_forward(mil_context *context, const mil_scan *arguments)
{
    const mil_scan *a = arguments;
    if (a->inner < 1 || a->inner >= (int64_t)1 << 24 || a->state_dim < 1 || a->state_dim > MIL_SCAN_STATES) {
        return mil_fail(MIL_ERR_SHAPE,
                        "scan_forward: inner = %lld, state_dim = %lld; CUDA takes states of 1 to %d",
                        (long long)a->inner, (long long)a->state_dim, MIL_SCAN_STATES);
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
