/* Mamba-1's selective scan (device.h: mil_scan, csrc/cpu/selective_scan.c).
 *
 *   dt_t = clamp(softplus(dt[t] + dt_bias_scale dt_bias))
 *   H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t[n],   y_t = (D x_t + sum_n C_t[n] H_t[n]) silu(z_t)
 *
 * Here are prompts; sequences of at most a window of rows are in selective_scan_step.cu.
 *
 * Sequences of more than a window, in 16-bit types: what counts is exponentials, inner * state_dim of them a token (and
 * 4 more a channel for softplus and gate), at 16 a cycle and multiprocessor.  So a thread has SIZE states of one channel
 * and per state and token five instructions, one of them the exponential; LANES threads share a channel, as few as keep
 * the chip busy.  The sum over n costs little because LANES tokens are summed at once, each lane ending with one of
 * them.
 *
 * Tokens go through shared memory in pieces of ELEMENTS / COLUMNS: pairs (dt, dt x), of which the first is then
 * overwritten by sum_n C H. A thread loads and finishes 8 neighbouring channels of a token with 16-byte accesses; those of
 * the next piece are on their way while this one is computed.  Pieces begin at multiples of 16 tokens, so the state to
 * be kept is always that between two groups of 16.
 */
#include "selective_scan.cuh"

#define THREADS 128
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
            MIL_TRY(mil_scan_steps(context, &a, &states, count));
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
