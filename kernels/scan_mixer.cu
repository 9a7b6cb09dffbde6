/* A Mamba-1 mixer for a few rows: all that lies between its first products and its last one (device.h: mil_scan_mixer).
 *
 *   [low | B | C] = norms(W_x x)   or x = silu(conv(raw)), and they come from the first products
 *   dt = W_dt low,   y = scan(x, dt, B, C) silu(z)
 *
 * One token's work here is next to nothing, but each kernel of a chain costs 2 to 5 us of latency while the memory
 * rests: five kernels a layer were a third of Mamba 2.8B's step.  Every output of W_x needs all channels, so that two
 * launches remain, and one where there is no W_x:
 *
 *   project   a block has 16 outputs and an eighth of the channels; eight partial sums an output go to memory
 *   scan      a block has 32 channels of one sequence: a lane has a channel, a warp two of every sixteen states and one of
 *             every eight rows.  All go through the tail.  Then they add up the partial sums, or convolve; multiply by
 *             the block's 32 rows of W_dt, a chain of thin_product.cu's a warp; take the rows of this call; and finish y.  What
 *             the tails keep of these rows leaves as soon as it is known.  The last block to have read what several share
 *             (B; inputs of repeated channels) moves it where a window is folded; all else is the block's own.
 *
 * Weights, and states and tails where they are settled (mil_rows), are read, and the tail is gone through, before the kernel
 * before has ended.
 *
 * The convolution, W_dt and the scan give the bits of conv1d.cu, thin_product.cu and selective_scan_step.cu; sums of W_x
 * are cut by their length alone.  So a row's bits do not depend on what stands beside it.
 */
#include "conv1d.cuh"
#include "mma.cuh"
#include "norm.cuh"
#include "selective_scan.cuh"
#include "thin_product.cuh"

#define V 4              /* columns that move at once */
#define COLUMNS MIL_WARP /* channels of a block: a lane has one */
#define BLOCK_WARPS 8
#define BLOCK (BLOCK_WARPS * MIL_WARP)
#define LANES_N 16 /* states from one of a thread's to its next but one */
#define PAIR 2     /* states of each sixteen that a warp has */
#define ROWS MIL_THIN_ROWS
#define CHUNK 32   /* inputs of two tensor products */
#define OUTPUTS 16 /* of a tensor product */
#define CHAINS 8   /* of thin_product.cu: partial sums of W_dt */
#define CHAIN_PITCH (COLUMNS + 4)
#define SLICES 8 /* of W_x's inputs */
#define MOST_TAPS 4
#define MOST_BYTES ((size_t)160 << 10) /* of shared memory */

struct mixer_arguments {
    scan_arguments scan; /* its x is not read where it is convolved here, its dt where dt_weight is NULL */
    const void *raw;     /* [rows, inputs] before the convolution that is done here; or NULL */
    int64_t raw_stride;
    int inputs, taps, repeat, repeat_group;
    const float *conv_weight, *conv_bias;
    const void *dt_weight; /* [inner, rank] */
    int rank;
    const void *low; /* [rows, rank], where there is no W_x */
    int64_t low_stride;
    const void *x_weight; /* [x_width, inner] or NULL */
    int x_width, B_at, C_at;
    float *partial;      /* [SLICES, rows, x_width] */
    int total;           /* rows */
    int begin[ROWS + 1]; /* first row of each sequence */
    int B_run, C_run;    /* channels that share a group */
    int normed;          /* parts of x_width that are normed */
    struct {
        int at, width;
        const float *weight;
        float eps;
    } norms[3];
};

static __device__ __forceinline__ uint4
load_weight(const void *from)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

/* ---- W_x -------------------------------------------------------------------------------------------------------- */

#define THREADS 128
#define WARPS (THREADS / MIL_WARP)
#define MOST_CHUNKS 8 /* of a warp at a time */

/* Grid: tiles of OUTPUTS, SLICES. GROUPS of 8 rows; CHUNKS of a warp at a time. */
template <typename T, int GROUPS, int CHUNKS>
static __global__ void
__launch_bounds__(THREADS, 3) mixer_project_kernel(const __grid_constant__ mixer_arguments m)
{
    __shared__ float sums[WARPS][OUTPUTS][8 * GROUPS];
    const int warp = threadIdx.x / MIL_WARP, lane = threadIdx.x % MIL_WARP, g = lane / 4, t = lane % 4;
    const int first_output = blockIdx.x * OUTPUTS, inner = m.scan.inner, all = inner / CHUNK;
    const int a_slice = (all + SLICES - 1) / SLICES, a_warp = (a_slice + WARPS - 1) / WARPS;
    const int end = min(all, ((int)blockIdx.y + 1) * a_slice);
    int chunk = (int)blockIdx.y * a_slice + warp; /* and every WARPS-th from there */
    const int64_t column = chunk * CHUNK + 8 * t;
    const T *low = (const T *)m.x_weight + (int64_t)min(first_output + g, m.x_width - 1) * inner + column;
    const T *high =
        (const T *)m.x_weight + (int64_t)min(first_output + g + 8, m.x_width - 1) * inner + column;
    const T *x = (const T *)m.scan.x + g * m.scan.x_stride + column;
    const int rows = m.total - g; /* from the lane's first one on */
    float c[2][GROUPS][4] = {};   /* of even and odd chunks: half as many products wait for each other */
#pragma unroll 1
    for (int taken = 0; taken < a_warp; taken += CHUNKS) {
        constexpr int STEP = WARPS * CHUNK;
        uint4 wl[CHUNKS], wh[CHUNKS], v[GROUPS][CHUNKS];
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const bool there = chunk + i * WARPS < end;
            wl[i] = there ? load_weight(low + i * STEP) : make_uint4(0, 0, 0, 0);
            wh[i] = there ? load_weight(high + i * STEP) : make_uint4(0, 0, 0, 0);
        }
        if (taken == 0) {
            mil_trigger();
            mil_wait_knowing(mil_known(x) ^ rows);
        }
#pragma unroll
        for (int i = 0; i < GROUPS * CHUNKS; i++) {
            const bool there = chunk + i % CHUNKS * WARPS < end && i / CHUNKS * 8 < rows;
            const T *from = x + i / CHUNKS * 8 * m.scan.x_stride + i % CHUNKS * STEP;
            v[i / CHUNKS][i % CHUNKS] = there ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < GROUPS * CHUNKS; i++) {
            float (&sum)[4] = c[i % CHUNKS % 2][i / CHUNKS];
            const uint4 &l = wl[i % CHUNKS], &h = wh[i % CHUNKS], &u = v[i / CHUNKS][i % CHUNKS];
            mil_multiply_add<T>(sum, l.x, h.x, l.y, h.y, u.x, u.y);
            mil_multiply_add<T>(sum, l.z, h.z, l.w, h.w, u.z, u.w);
        }
        chunk += CHUNKS * WARPS;
        low += CHUNKS * STEP;
        high += CHUNKS * STEP;
        x += CHUNKS * STEP;
    }
#pragma unroll
    for (int i = 0; i < GROUPS * 4; i++) {
        sums[warp][g + i % 4 / 2 * 8][i / 4 * 8 + 2 * t + i % 2] = c[0][i / 4][i % 4] + c[1][i / 4][i % 4];
    }
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < OUTPUTS * m.total; e += THREADS) {
        const int out = e % OUTPUTS, row = e / OUTPUTS;
        if (first_output + out < m.x_width) {
            m.partial[((int)blockIdx.y * m.total + row) * m.x_width + first_output + out] =
                (sums[0][out][row] + sums[1][out][row]) + (sums[2][out][row] + sums[3][out][row]);
        }
    }
}

/* ---- the scan ----------------------------------------------------------------------------------------------------- */

/* What the kernel needs of a channel: its taps, the oldest first, behind those that do not exist, and more. */
enum channel_part { TAPS_PART, CONV_BIAS_PART = MOST_TAPS, DT_BIAS_PART, D_PART, CHANNEL_PARTS };

/* What a block of the scan keeps in shared memory. */
struct mixer_memory {
    int *numbers;            /* tokens in the tail, and of them those that are folded */
    float *tail_x, *tail_dt; /* [MIL_TAIL, COLUMNS] */
    float *x, *dt;           /* [8 GROUPS, COLUMNS] of this call's rows */
    float *channels;         /* [CHANNEL_PARTS, COLUMNS]: what the kernel needs of each channel */
    float *chains; /* chunks of W_dt, [COLUMNS, CHUNK] each, chunk_floats apart; in the place of a chain's
                                first chunk its sums [8 GROUPS, CHAIN_PITCH], and in that of all */
    float *sums;   /* [rows, BLOCK_WARPS, COLUMNS] of C . H */
    float *tail_B; /* [MIL_TAIL, B_width] */
    float *B, *C;  /* [rows, width] */
    void *low;     /* [rows, low_stride]: low, or [low | B | C] */
    int low_stride, chunks;
    size_t bytes;
};

/* Floats from chunk to chunk of W_dt. */
static __host__ __device__ __forceinline__ int
chunk_floats(int groups)
{
    const int weights = COLUMNS * CHUNK / 2, sums = 8 * groups * CHAIN_PITCH;
    return weights > sums ? weights : sums;
}

static __host__ __device__ __forceinline__ mixer_memory
cut_mixer_memory(const mixer_arguments &m, char *memory, int groups)
{
    const int width = m.x_weight != NULL ? m.x_width : m.rank;
    mixer_memory s;
    float *at = (float *)memory;
    auto take = [&](int floats) {
        float *from = at;
        at += floats;
        return from;
    };
    s.chunks = (m.rank + CHUNK - 1) / CHUNK;
    s.numbers = (int *)take(4);
    s.tail_x = take(MIL_TAIL * COLUMNS);
    s.tail_dt = take(MIL_TAIL * COLUMNS);
    s.x = take(8 * groups * COLUMNS);
    s.dt = take(8 * groups * COLUMNS);
    s.channels = take(CHANNEL_PARTS * COLUMNS);
    const int weights = s.chunks * chunk_floats(groups), sums = m.total * BLOCK_WARPS * COLUMNS;
    s.chains = s.sums = take(weights > sums ? weights : sums);
    s.tail_B = take(MIL_TAIL * m.scan.B_width);
    s.B = take(m.total * m.scan.B_width);
    s.C = take(m.total * m.scan.C_width);
    s.low = at;
    s.low_stride = (width + 31) / 64 * 64 + 32; /* neighbouring rows in the two halves of the banks */
    s.bytes = (char *)at - memory + (size_t)m.total * s.low_stride * 2;
    return s;
}

/* Where a block is, and a thread in it: a lane has a channel, a warp two of every sixteen states, and one of every eight
 * rows of this call. */
struct mixer_place {
    int channel, B_at, C_at;  /* the block's first channel; first columns of B and C that it may need */
    int warp, lane, own;      /* the lane's channel */
    int B_own, C_own;         /* its first columns of B and C, from B_at and C_at on */
    int first, count, before; /* rows of the sequence in this call; tokens in its tail */
    bool owns_B;              /* the block appends those columns of B to the tail */
};

static __device__ __forceinline__ mixer_place
place_thread(const mixer_arguments &m)
{
    mixer_place p;
    p.channel = (int)blockIdx.x * COLUMNS;
    p.warp = (int)threadIdx.x / MIL_WARP;
    p.lane = (int)threadIdx.x % MIL_WARP;
    p.own = p.channel + p.lane;
    p.B_at = p.channel / m.B_run * m.scan.state_dim;
    p.C_at = p.channel / m.C_run * m.scan.state_dim;
    p.B_own = p.own / m.B_run * m.scan.state_dim - p.B_at;
    p.C_own = p.own / m.C_run * m.scan.state_dim - p.C_at;
    p.first = m.begin[blockIdx.y];
    p.count = m.begin[blockIdx.y + 1] - p.first;
    p.owns_B = p.channel % m.B_run == 0;
    return p;
}

/* Where a kernel has x, and [low | B | C] from: the first products; or x from there and the others from W_x, normed or not. */
enum mixer_kind { CONVOLVES, PROJECTED, PROJECTED_AND_NORMED };

/* ---- the state */

/* The first of the two states j of a thread. */
static __device__ __forceinline__ int
state_of(const mixer_place &p, int j)
{
    return p.warp * PAIR + j * LANES_N;
}

/* A log2(e) of a thread's states, finite so that 0 * A is 0; 0 where there is no state.  First A_log is on its way. */
template <int J>
static __device__ __forceinline__ void
load_exponents(const scan_arguments &a, const mixer_place &p, float (&exponent)[J][PAIR])
{
#pragma unroll
    for (int j = 0; j < J; j++) {
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
            const int n = state_of(p, j) + i;
            exponent[j][i] = n < a.state_dim ? a.A_log[p.own * a.state_dim + n] : 0.0f;
        }
    }
}

template <int J>
static __device__ __forceinline__ void
finish_exponents(const scan_arguments &a, const mixer_place &p, float (&exponent)[J][PAIR])
{
#pragma unroll
    for (int j = 0; j < J; j++) {
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
            const bool there = state_of(p, j) + i < a.state_dim;
            exponent[j][i] = there ? -log2_e * fminf(expf(exponent[j][i]), 1e30f) : 0.0f;
        }
    }
}

template <int J>
static __device__ __forceinline__ void
load_states(const scan_arguments &a, const mixer_place &p, const float *state, float (&H)[J][PAIR])
{
#pragma unroll
    for (int j = 0; j < J; j++) {
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
            const int n = state_of(p, j) + i;
            H[j][i] = n < a.state_dim ? __ldcg(state + n * a.inner + p.own) : 0.0f;
        }
    }
}

template <int J>
static __device__ __forceinline__ void
store_states(const scan_arguments &a, const mixer_place &p, const float (&H)[J][PAIR], float *state)
{
#pragma unroll
    for (int j = 0; j < J; j++) {
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
            const int n = state_of(p, j) + i;
            if (n < a.state_dim) {
                state[n * a.inner + p.own] = H[j][i];
            }
        }
    }
}

/* A thread's columns of a row of B or C. */
template <int J>
static __device__ __forceinline__ void
load_pairs(const scan_arguments &a, const mixer_place &p, const float *row, float (&value)[J][PAIR])
{
#pragma unroll
    for (int j = 0; j < J; j++) {
        const int n = state_of(p, j);
        value[j][0] = value[j][1] = 0.0f;
        if (n < a.state_dim) {
            mil_load<PAIR>(row + n, value[j]);
        }
    }
}

/* Tokens that are computed side by side, as far as they do not depend on each other. */
template <int J>
constexpr int AT_ONCE = J == 1 ? 4 : 1;

/* R tokens from `token` on, of which x and dt have rows of COLUMNS, and B of B_width: H moves on, and `then` is told after
 * each. */
template <int J, int R, typename Then>
static __device__ __forceinline__ void
take_tokens(const scan_arguments &a, const mixer_place &p, const float *x, const float *dt, const float *B,
            int token, const float (&exponent)[J][PAIR], float (&H)[J][PAIR], Then then)
{
    float power[R][J][PAIR], input[R][J][PAIR];
#pragma unroll
    for (int r = 0; r < R; r++) {
        const float dt_own = dt[(token + r) * COLUMNS + p.lane];
        const float taken = dt_own * x[(token + r) * COLUMNS + p.lane];
        load_pairs<J>(a, p, B + (token + r) * a.B_width + p.B_own, input[r]);
#pragma unroll
        for (int j = 0; j < J; j++) {
#pragma unroll
            for (int i = 0; i < PAIR; i++) {
                power[r][j][i] = mil_exp2(dt_own * exponent[j][i]);
                input[r][j][i] = taken * input[r][j][i];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int j = 0; j < J; j++) {
#pragma unroll
            for (int i = 0; i < PAIR; i++) {
                H[j][i] = fmaf(power[r][j][i], H[j][i], input[r][j][i]);
            }
        }
        then(r);
    }
}

/* The sequence's numbers, as one warp asks for them: all blocks read the same line. Lane 0 has `past`, lane 1 the boundary. */
static __device__ __forceinline__ int64_t
ask_for_numbers(const scan_arguments &a)
{
    const int64_t *from = threadIdx.x == 0 ? a.rows.past : a.rows.boundary;
    return threadIdx.x < 2 ? mil_load_number(from + blockIdx.y) : 0;
}

static __device__ __forceinline__ void
share_numbers(int64_t number, const mixer_place &p, const mixer_memory &s)
{
    if (p.warp == 0) {
        const int64_t past = __shfl_sync(MIL_ALL_LANES, number, 0),
                      boundary = __shfl_sync(MIL_ALL_LANES, number, 1);
        const mil_span span = mil_span_from(0, p.count, past, boundary);
        s.numbers[0] = span.before;
        s.numbers[1] = (int)(span.after - span.boundary);
    }
}

/* The tails into shared memory. */
static __device__ __forceinline__ void
fetch_tails(const scan_arguments &a, const mixer_place &p, const mil_tails &tails, const mixer_memory &s)
{
    static_assert(BLOCK / (COLUMNS / V) >= MIL_TAIL, "a vector of each token and thread");
    const int token = (int)threadIdx.x / (COLUMNS / V), column = (int)threadIdx.x % (COLUMNS / V) * V;
    if (token < p.before) {
        const int at = token * a.inner + p.channel + column;
        mil_copy_16(s.tail_x + token * COLUMNS + column, tails.x + at);
        mil_copy_16(s.tail_dt + token * COLUMNS + column, tails.dt + at);
        const float *B = tails.B + token * a.B_groups * a.state_dim + p.B_at;
#pragma unroll 1
        for (int n = column; n < a.B_width; n += COLUMNS) {
            mil_copy_16(s.tail_B + token * a.B_width + n, B + n);
        }
    }
}

/* The tail's tokens; the state after `shift` of them goes to memory. */
template <int J>
static __device__ __forceinline__ void
walk_tail(const scan_arguments &a, const mixer_place &p, const mixer_memory &s, int shift,
          const float (&exponent)[J][PAIR], float *state, float (&H)[J][PAIR])
{
    static_assert(MIL_WINDOW % AT_ONCE<J> == 0, "a fold comes between two turns");
    int token = 0;
#pragma unroll 1
    for (; token + AT_ONCE<J> <= p.before; token += AT_ONCE<J>) {
        take_tokens<J, AT_ONCE<J>>(a, p, s.tail_x, s.tail_dt, s.tail_B, token, exponent, H, [](int) {});
        if (token + AT_ONCE<J> == shift) {
            store_states<J>(a, p, H, state);
        }
    }
#pragma unroll 1
    for (; token < p.before; token++) {
        take_tokens<J, 1>(a, p, s.tail_x, s.tail_dt, s.tail_B, token, exponent, H, [](int) {});
    }
}

/* Inputs of the convolution that channels share with others, and channels that do. */
static __device__ __forceinline__ int
input_run(const mixer_arguments &m)
{
    return m.repeat > 1 ? m.repeat * m.repeat_group : 1;
}

/* Whether this block is the last to have read what it shares, of B (1) and, where channels share them, of the convolution's
 * inputs (2). */
static __device__ __forceinline__ unsigned
count_readers(const mixer_arguments &m, const mixer_place &p, const mil_tails &tails)
{
    const scan_arguments &a = m.scan;
    const int inputs = input_run(m);
    const unsigned sharers = m.repeat > 1 ? (unsigned)max(inputs / COLUMNS, 1) : 0u;
    const mil_slots slots = {{mil_slot(tails.B, a.B_groups * a.state_dim, p.B_at),
                              mil_slot(tails.x, a.inner, p.channel / inputs * inputs), NULL},
                             {(unsigned)max(m.B_run / COLUMNS, 1), sharers, 0u}};
    return mil_last_of(slots);
}

/* Where a window is folded: rows of x, dt and B that the tails keep move to their beginning, those of B by the last block to
 * have read them.  The convolution's are still being read by the kernel before. */
static __device__ __forceinline__ unsigned
keep_tails(const mixer_arguments &m, const mixer_place &p, const mil_tails &tails, int shift,
           const mixer_memory &s)
{
    const scan_arguments &a = m.scan;
    const unsigned last = count_readers(m, p, tails);
#pragma unroll 1
    for (int row = p.warp; row < p.before - shift; row += BLOCK_WARPS) {
        const int from = (shift + row) * COLUMNS + p.lane;
        tails.x[row * a.inner + p.own] = s.tail_x[from];
        tails.dt[row * a.inner + p.own] = s.tail_dt[from];
#pragma unroll 1
        for (int n = p.lane; n < a.B_width && last & 1; n += MIL_WARP) {
            tails.B[row * a.B_groups * a.state_dim + p.B_at + n] = s.tail_B[(shift + row) * a.B_width + n];
        }
    }
    return last;
}

/* This call's rows from `row` on, R of them: C . H into s.sums. */
template <int J, int R>
static __device__ __forceinline__ void
scan_rows(const scan_arguments &a, const mixer_place &p, const mixer_memory &s, int row,
          const float (&exponent)[J][PAIR], float (&H)[J][PAIR])
{
    float C[R][J][PAIR], sum[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        load_pairs<J>(a, p, s.C + (row + r) * a.C_width + p.C_own, C[r]);
    }
    take_tokens<J, R>(a, p, s.x, s.dt, s.B, row, exponent, H, [&](int r) {
        float part[PAIR] = {};
#pragma unroll
        for (int j = 0; j < J; j++) {
#pragma unroll
            for (int i = 0; i < PAIR; i++) {
                part[i] = fmaf(C[r][j][i], H[j][i], part[i]);
            }
        }
        sum[r] = part[0] + part[1];
    });
#pragma unroll
    for (int r = 0; r < R; r++) {
        s.sums[((row + r) * BLOCK_WARPS + p.warp) * COLUMNS + p.lane] = sum[r];
    }
}

/* ---- low, B and C */

/* V columns of a row of [low | B | C]: their partial sums, and where they go in s.low, s.B and s.C; below 0: nowhere. */
struct sum_place {
    int from, low, B, C;
};

static __device__ __forceinline__ sum_place
place_sum(const mixer_arguments &m, const mixer_place &p, int item, const mixer_memory &s)
{
    const int quads = max(m.x_width / V, 1); /* there may be no W_x */
    const int row = item / quads, at = item % quads * V;
    const int B = at - m.B_at - p.B_at, C = at - m.C_at - p.C_at;
    sum_place place;
    place.from = (p.first + row) * m.x_width + at;
    place.low = row * s.low_stride + at;
    place.B = B >= 0 && B < m.scan.B_width ? row * m.scan.B_width + B : -1;
    place.C = C >= 0 && C < m.scan.C_width ? row * m.scan.C_width + C : -1;
    return place;
}

static __device__ __forceinline__ __nv_bfloat162
round_pair(float low, float high, __nv_bfloat16)
{
    return __floats2bfloat162_rn(low, high);
}

static __device__ __forceinline__ __half2
round_pair(float low, float high, __half)
{
    return __floats2half2_rn(low, high);
}

/* A sum as the product's output would be rounded: into s.low, and as float32 where B and C are kept. */
template <typename T>
static __device__ __forceinline__ void
keep_sum(const float (&sum)[V], const sum_place &place, const mixer_memory &s)
{
    auto low = round_pair(sum[0], sum[1], T()), high = round_pair(sum[2], sum[3], T());
    const float4 value = {mil_float(low.x), mil_float(low.y), mil_float(high.x), mil_float(high.y)};
    *(uint2 *)((T *)s.low + place.low) = make_uint2(*(const uint32_t *)&low, *(const uint32_t *)&high);
    if (place.B >= 0) {
        *(float4 *)(s.B + place.B) = value;
    }
    if (place.C >= 0) {
        *(float4 *)(s.C + place.C) = value;
    }
}

/* A thread's first sum of a row of [low | B | C]: the last warps begin, as the first ones have the first rows' convolution. */
static __device__ __forceinline__ int
first_sum()
{
    return BLOCK - 1 - (int)threadIdx.x;
}

/* Rows of [low | B | C]: sums of the partial sums, by the whole block.  `place` is that of the thread's first sum. */
template <typename T>
static __device__ __forceinline__ void
add_slices(const mixer_arguments &m, const mixer_place &p, sum_place place, const mixer_memory &s)
{
    const int items = p.count * (m.x_width / V), apart = m.total * m.x_width;
#pragma unroll 1
    for (int item = first_sum(); item < items; item += BLOCK) {
        if (item >= BLOCK) {
            place = place_sum(m, p, item, s);
        }
        float4 part[SLICES];
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            part[slice] = *(const float4 *)(m.partial + place.from + slice * apart);
        }
        float sum[V] = {};
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            sum[0] += part[slice].x;
            sum[1] += part[slice].y;
            sum[2] += part[slice].z;
            sum[3] += part[slice].w;
        }
        keep_sum<T>(sum, place, s);
    }
}

/* B and C of this call's rows into shared memory; `B` and `C` are where the block's first row and columns are.  Of a row's
 * columns of both a lane has every 32nd, two of which are under way at once. */
template <typename T, int TURNS>
static __device__ __forceinline__ void
take_B_and_C(const scan_arguments &a, const mixer_place &p, const T *B, int64_t B_stride, const T *C,
             int64_t C_stride, const mixer_memory &s)
{
    const int width = a.B_width + min(a.C_width, a.C_groups * a.state_dim - p.C_at);
    T value[TURNS][2];
#pragma unroll 1
    for (int at = p.lane; at < width; at += 2 * MIL_WARP) {
#pragma unroll
        for (int k = 0; k < 2 * TURNS; k++) {
            const int row = p.warp + k / 2 * BLOCK_WARPS, column = at + k % 2 * MIL_WARP;
            if (row < p.count && column < width) {
                value[k / 2][k % 2] =
                    column < a.B_width ? B[row * B_stride + column] : C[row * C_stride + column - a.B_width];
            }
        }
#pragma unroll
        for (int k = 0; k < 2 * TURNS; k++) {
            const int row = p.warp + k / 2 * BLOCK_WARPS, column = at + k % 2 * MIL_WARP;
            if (row < p.count && column < width) {
                float *to = column < a.B_width ? s.B + row * a.B_width + column
                                               : s.C + row * a.C_width + column - a.B_width;
                *to = mil_float(value[k / 2][k % 2]);
            }
        }
    }
}

/* low of this call's rows, where it comes from the first products, on its way. */
template <typename T>
static __device__ __forceinline__ void
fetch_low(const mixer_arguments &m, const mixer_place &p, const mixer_memory &s)
{
#pragma unroll 1
    for (int row = p.warp; row < p.count && m.dt_weight != NULL; row += BLOCK_WARPS) {
#pragma unroll 1
        for (int at = p.lane * 8; at < m.rank; at += MIL_WARP * 8) {
            mil_copy_16((T *)s.low + row * s.low_stride + at,
                        (const T *)m.low + (p.first + row) * m.low_stride + at);
        }
    }
}

/* The norms of parts of [low | B | C], in place, a warp a row; and B and C of what has come of it. */
template <typename T, int TURNS>
static __device__ __noinline__ void
norm_parts(const mixer_arguments &m)
{
    extern __shared__ __align__(16) char shared[];
    const mixer_memory s = cut_mixer_memory(m, shared, TURNS);
    const mixer_place p = place_thread(m);
    T *const low = (T *)s.low;
#pragma unroll 1
    for (int row = p.warp; row < p.count; row += BLOCK_WARPS) {
#pragma unroll 1
        for (int part = 0; part < m.normed; part++) {
            norm_arguments n = {};
            T *at = low + row * s.low_stride + m.norms[part].at;
            n.group = m.norms[part].width;
            n.x = at;
            n.eps = m.norms[part].eps;
            auto sum = [](float value) { return mil_warp_sum(value); };
            if (m.norms[part].at % 8 == 0 && m.norms[part].width % 8 == 0) {
                norm_group<T, 8>(n, 0, 0, m.norms[part].weight, at, p.lane, MIL_WARP, sum);
            }
            else {
                norm_group<T, 1>(n, 0, 0, m.norms[part].weight, at, p.lane, MIL_WARP, sum);
            }
        }
    }
    __syncthreads();
    take_B_and_C<T, TURNS>(m.scan, p, low + m.B_at + p.B_at, s.low_stride, low + m.C_at + p.C_at,
                           s.low_stride, s);
}

/* ---- rows of this call */

/* Input of the convolution that channel c reads. */
static __device__ __forceinline__ int
input_of(const mixer_arguments &m, int c)
{
    return m.repeat > 1 ? c / (m.repeat_group * m.repeat) * m.repeat_group + c % m.repeat_group : c;
}

/* A warp's part of the lane's channel. */
static __device__ __forceinline__ float
load_channel(const mixer_arguments &m, const mixer_place &p)
{
    const int tap = p.warp - (MOST_TAPS - m.taps);
    const float *from = p.warp == DT_BIAS_PART     ? m.scan.dt_bias + p.own
                        : p.warp == D_PART         ? m.scan.D + p.own
                        : p.warp == CONV_BIAS_PART ? m.conv_bias + (m.conv_bias == NULL ? 0 : p.own)
                                                   : m.conv_weight + p.own * m.taps + tap;
    const bool there = p.warp <= CONV_BIAS_PART && m.raw == NULL ? false
                       : p.warp < MOST_TAPS                      ? tap >= 0
                       : p.warp == CONV_BIAS_PART                ? m.conv_bias != NULL
                                                                 : p.warp < CHANNEL_PARTS;
    return there ? *from : 0.0f;
}

/* Most rows of inputs that a tail keeps where a window is folded, of a warp. */
#define KEPT_TURNS ((MIL_TAIL - MIL_WINDOW + MOST_TAPS + BLOCK_WARPS - 1) / BLOCK_WARPS)

/* A thread's rows of the lane's channel, number `warp` and `warp` + 8 of the call. */
template <typename T, int TURNS, mixer_kind KIND>
struct thread_rows {
    static constexpr bool convolved = KIND != CONVOLVES; /* by the first products */
    int raw_at, z_at, y_at, tail_at, conv_at;            /* where the first one is, and is to be */
    bool owns;                                           /* its input, and so appends it to the tail */
    float lead[MOST_TAPS - 1]; /* inputs of the first that were there before this call, the oldest first */
    T raw[TURNS][MOST_TAPS], z[TURNS]; /* the inputs that a row needs, as far as they are of this call */
    float x[TURNS], gate[TURNS];
    float kept[KEPT_TURNS]; /* where a window is folded, rows of the lane's input that its tail keeps */
};

template <typename T, int TURNS, mixer_kind KIND>
static __device__ __forceinline__ void
place_rows(const mixer_arguments &m, const mixer_place &p, int shift, thread_rows<T, TURNS, KIND> &rows)
{
    const int row = p.first + p.warp, input = input_of(m, p.own);
    rows.owns = !rows.convolved && (m.repeat == 1 || p.own / m.repeat_group % m.repeat == 0);
    rows.raw_at = rows.convolved ? row * (int)m.scan.x_stride + p.own : row * (int)m.raw_stride + input;
    rows.z_at = row * (int)m.scan.z_stride + p.own;
    rows.y_at = row * (int)m.scan.y_stride + p.own;
    rows.tail_at = (p.before - shift + p.warp) * m.scan.inner + p.own;
    rows.conv_at = (p.before + m.taps - 1 + p.warp) * m.inputs + input;
}

/* The inputs before this call that a thread's first row needs. */
template <typename T, int TURNS, mixer_kind KIND>
static __device__ __forceinline__ void
load_lead(const mixer_arguments &m, const mixer_place &p, const mil_tails &tails,
          thread_rows<T, TURNS, KIND> &rows)
{
#pragma unroll
    for (int j = 0; j < MOST_TAPS - 1; j++) {
        const int back = j - (MOST_TAPS - 1);
        const bool there = !rows.convolved && p.warp + back < 0 && j >= MOST_TAPS - m.taps;
        float value[1] = {0.0f};
        if (there) {
            mil_load_settled<1>(tails.conv + rows.conv_at + back * m.inputs, value);
        }
        rows.lead[j] = value[0];
    }
}

/* Rows of inputs that a tail keeps where `shift` of them go. */
static __device__ __forceinline__ int
kept_inputs(const mixer_arguments &m, const mixer_place &p, int shift)
{
    return p.before - shift + m.taps - 1;
}

/* The lane's input of those, where no other channel reads it. */
template <typename T, int TURNS, mixer_kind KIND>
static __device__ __forceinline__ void
load_kept(const mixer_arguments &m, const mixer_place &p, const mil_tails &tails, int shift,
          thread_rows<T, TURNS, KIND> &rows)
{
#pragma unroll
    for (int k = 0; k < KEPT_TURNS; k++) {
        const int row = p.warp + k * BLOCK_WARPS;
        float value[1] = {0.0f};
        if (!rows.convolved && shift > 0 && m.repeat == 1 && row < kept_inputs(m, p, shift)) {
            mil_load_settled<1>(tails.conv + (shift + row) * m.inputs + p.own, value);
        }
        rows.kept[k] = value[0];
    }
}

template <typename T, int TURNS, mixer_kind KIND>
static __device__ __forceinline__ void
store_kept(const mixer_arguments &m, const mixer_place &p, const mil_tails &tails, int shift,
           const thread_rows<T, TURNS, KIND> &rows)
{
#pragma unroll
    for (int k = 0; k < KEPT_TURNS; k++) {
        const int row = p.warp + k * BLOCK_WARPS;
        if (row < kept_inputs(m, p, shift)) {
            tails.conv[row * m.inputs + p.own] = rows.kept[k];
        }
    }
}

/* What the first products have for the thread's rows, all under way at once. */
template <typename T, int TURNS, mixer_kind KIND>
static __device__ __forceinline__ void
ask_for_rows(const mixer_arguments &m, const mixer_place &p, thread_rows<T, TURNS, KIND> &rows)
{
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
        const int row = k * BLOCK_WARPS;
        if (p.warp + row < p.count) {
#pragma unroll
            for (int j = 0; j < MOST_TAPS; j++) {
                const int back = j - (MOST_TAPS - 1);
                if (rows.convolved ? back == 0 : p.warp + row + back >= 0) {
                    rows.raw[k][j] = rows.convolved
                                         ? ((const T *)m.scan.x)[rows.raw_at + row * (int)m.scan.x_stride]
                                         : ((const T *)m.raw)[rows.raw_at + (row + back) * (int)m.raw_stride];
                }
            }
            if (m.scan.z != NULL) {
                rows.z[k] = ((const T *)m.scan.z)[rows.z_at + row * (int)m.scan.z_stride];
            }
        }
    }
}

/* x, convolved or to be convolved, which goes to shared memory too, and what y is multiplied with. */
template <typename T, int TURNS, mixer_kind KIND>
static __device__ __forceinline__ void
take_rows(const mixer_arguments &m, const mixer_place &p, const mixer_memory &s,
          thread_rows<T, TURNS, KIND> &rows)
{
    const float *channel = s.channels + p.lane;
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
        const int row = p.warp + k * BLOCK_WARPS;
        if (row < p.count) {
            if constexpr (KIND == CONVOLVES) {
                float taps[MOST_TAPS], window[MOST_TAPS];
#pragma unroll
                for (int j = 0; j < MOST_TAPS; j++) {
                    const bool before = k == 0 && j < MOST_TAPS - 1 && row + j - (MOST_TAPS - 1) < 0;
                    taps[j] = channel[(TAPS_PART + j) * COLUMNS];
                    window[j] = before ? rows.lead[j] : mil_float(rows.raw[k][j]);
                }
                rows.x[k] = mil_float(mil_round<T>(mil_convolve<T, MOST_TAPS>(
                    taps, window, channel[CONV_BIAS_PART * COLUMNS], MOST_TAPS - m.taps, true)));
            }
            else {
                rows.x[k] = mil_float(rows.raw[k][MOST_TAPS - 1]);
            }
            const float z = mil_float(rows.z[k]);
            rows.gate[k] = m.scan.z != NULL ? __fdividef(z, 1.0f + __expf(-z)) : 1.0f;
            s.x[row * COLUMNS + p.lane] = rows.x[k];
        }
    }
}

/* ---- W_dt */

/* The block's rows of W_dt, on their way into shared memory chunk by chunk; zeros behind the last input. */
template <typename T, int GROUPS>
static __device__ __forceinline__ void
fetch_dt_weights(const mixer_arguments &m, const mixer_place &p, const mixer_memory &s)
{
    const int row = (int)threadIdx.x / BLOCK_WARPS, first = (int)threadIdx.x % BLOCK_WARPS;
    const T *from = (const T *)m.dt_weight + (p.channel + row) * m.rank;
#pragma unroll 1
    for (int vector = first; vector < s.chunks * 4 && m.dt_weight != NULL; vector += BLOCK / COLUMNS) {
        T *to = (T *)(s.chains + vector / 4 * chunk_floats(GROUPS)) + row * CHUNK + vector % 4 * 8;
        if (vector * 8 < m.rank) {
            mil_copy_16(to, from + vector * 8);
        }
        else {
            *(uint4 *)to = make_uint4(0, 0, 0, 0);
        }
    }
}

/* W_dt low in the order of thin_product.cu: chain w, which is warp w's, takes chunks w, w + 8, ...; there is rarely more than
 * one. */
template <typename T, int GROUPS>
static __device__ __forceinline__ void
multiply_dt(const mixer_arguments &m, const mixer_place &p, const mixer_memory &s)
{
    static_assert(CHAINS == BLOCK_WARPS, "a chain a warp");
    constexpr int TILES = COLUMNS / OUTPUTS;
    const int g = p.lane / 4, t = p.lane % 4;
    float c[GROUPS][TILES][4] = {};
    if (p.warp >= s.chunks) {
        return;
    }
#pragma unroll 1
    for (int chunk = p.warp; chunk < s.chunks; chunk += CHAINS) {
        const T *weights = (const T *)(s.chains + chunk * chunk_floats(GROUPS)) + g * CHUNK + 8 * t;
        const T *low = (const T *)s.low + g * s.low_stride + chunk * CHUNK + 8 * t;
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const bool real = group * 8 + g < p.count && chunk * CHUNK + 8 * t < m.rank;
            const uint4 v = real ? *(const uint4 *)(low + group * 8 * s.low_stride) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const uint4 l = *(const uint4 *)(weights + tile * OUTPUTS * CHUNK);
                const uint4 h = *(const uint4 *)(weights + (tile * OUTPUTS + 8) * CHUNK);
                mil_multiply_add<T>(c[group][tile], l.x, h.x, l.y, h.y, v.x, v.y);
                mil_multiply_add<T>(c[group][tile], l.z, h.z, l.w, h.w, v.z, v.w);
            }
        }
    }
    __syncwarp(); /* other lanes' weights have been there */
    float *const to = s.chains + p.warp * chunk_floats(GROUPS) + 2 * t * CHAIN_PITCH + g;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            float *at = to + group * 8 * CHAIN_PITCH + tile * OUTPUTS;
            at[0] = c[group][tile][0];
            at[CHAIN_PITCH] = c[group][tile][1];
            at[8] = c[group][tile][2];
            at[CHAIN_PITCH + 8] = c[group][tile][3];
        }
    }
}

/* dt of a row before its bias. */
template <typename T, int GROUPS>
static __device__ __forceinline__ float
raw_dt(const mixer_arguments &m, const mixer_place &p, int row, const mixer_memory &s)
{
    if (m.dt_weight == NULL) {
        return mil_float(((const T *)m.scan.dt)[(p.first + row) * m.scan.dt_stride + p.own]);
    }
    float value = 0.0f;
#pragma unroll
    for (int chain = 0; chain < CHAINS; chain++) { /* those without inputs are zeros */
        if (chain < s.chunks) {
            value += s.chains[chain * chunk_floats(GROUPS) + row * CHAIN_PITCH + p.lane];
        }
    }
    return mil_float(mil_round<T>(value));
}

/* dt after bias, softplus and clamp of the thread's rows. */
template <typename T, int GROUPS>
static __device__ __forceinline__ void
finish_dt(const mixer_arguments &m, const mixer_place &p, const mixer_memory &s)
{
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        const int row = p.warp + k * BLOCK_WARPS;
        if (row < p.count) {
            const float raw = raw_dt<T, GROUPS>(m, p, row, s),
                        bias = s.channels[DT_BIAS_PART * COLUMNS + p.lane];
            s.dt[row * COLUMNS + p.lane] = mil_time_step(raw + bias, m.scan.dt_min, m.scan.dt_max);
        }
    }
}

/* The thread's rows of x and dt to the tails, and of inputs with those that are kept; inputs that several channels read by one
 * of them, and only where nothing is folded. */
template <typename T, int GROUPS, mixer_kind KIND>
static __device__ __forceinline__ void
store_tails(const mixer_arguments &m, const mixer_place &p, int shift, const mil_tails &tails,
            const thread_rows<T, GROUPS, KIND> &rows, const mixer_memory &s)
{
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        const int row = p.warp + k * BLOCK_WARPS;
        if (row < p.count) {
            tails.x[rows.tail_at + k * BLOCK_WARPS * m.scan.inner] = rows.x[k];
            tails.dt[rows.tail_at + k * BLOCK_WARPS * m.scan.inner] = s.dt[row * COLUMNS + p.lane];
            if (rows.owns && (shift == 0 || m.repeat == 1)) {
                tails.conv[rows.conv_at + (k * BLOCK_WARPS - shift) * m.inputs] =
                    mil_float(rows.raw[k][MOST_TAPS - 1]);
            }
        }
    }
    if (!rows.convolved && shift > 0 && m.repeat == 1) {
        store_kept(m, p, tails, shift, rows);
    }
}

/* ---- what is left */

/* y of the thread's rows: the sum over the states is a tree, as in selective_scan_step.cu. */
template <typename T, int TURNS, mixer_kind KIND>
static __device__ __forceinline__ void
finish_rows(const scan_arguments &a, const mixer_place &p, const thread_rows<T, TURNS, KIND> &rows,
            const mixer_memory &s)
{
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
        const int row = p.warp + k * BLOCK_WARPS;
        if (row < p.count) {
            const float *sums = s.sums + row * BLOCK_WARPS * COLUMNS + p.lane;
            float sum[BLOCK_WARPS];
#pragma unroll
            for (int i = 0; i < BLOCK_WARPS; i++) {
                sum[i] = sums[i * COLUMNS];
            }
#pragma unroll
            for (int apart = 1; apart < BLOCK_WARPS; apart *= 2) {
#pragma unroll
                for (int i = 0; i < BLOCK_WARPS; i += 2 * apart) {
                    sum[i] += sum[i + apart];
                }
            }
            ((T *)a.y)[rows.y_at + k * BLOCK_WARPS * (int)a.y_stride] =
                mil_round<T>(fmaf(s.channels[D_PART * COLUMNS + p.lane], rows.x[k], sum[0]) * rows.gate[k]);
        }
    }
}

/* The block's columns of B of this call's rows, by warps that have the fewest rows of y, into the tail from row `at` on. */
static __device__ __forceinline__ void
append_B(const scan_arguments &a, const mixer_place &p, const mil_tails &tails, int at, const mixer_memory &s)
{
    const int B_columns = a.B_groups * a.state_dim;
    float *const to = tails.B + at * B_columns + p.B_at;
#pragma unroll 1
    for (int row = BLOCK_WARPS - 1 - p.warp; row < p.count; row += BLOCK_WARPS) {
#pragma unroll 1
        for (int n = p.lane; n < a.B_width; n += MIL_WARP) {
            to[row * B_columns + n] = s.B[row * a.B_width + n];
        }
    }
}

/* Tails of the convolution's inputs that channels share, where a window is folded: `shift` rows go, what is left moves to the
 * beginning, and this call's rows come behind it. */
template <typename T>
static __device__ __noinline__ void
fold_inputs(const mixer_arguments &m, const mil_tails &tails, int before, int shift)
{
    const mixer_place p = place_thread(m);
    const int columns = max(input_run(m), COLUMNS) / m.repeat, kept = before - shift + m.taps - 1;
    const int input = input_of(m, p.channel / input_run(m) * input_run(m));
    mil_tail_shift<BLOCK>(tails.conv + input, m.inputs, columns, shift, kept);
#pragma unroll 1
    for (int row = p.warp; row < p.count; row += BLOCK_WARPS) {
#pragma unroll 1
        for (int at = input + p.lane; at < input + columns; at += COLUMNS) {
            tails.conv[(kept + row) * m.inputs + at] =
                mil_float(((const T *)m.raw)[(p.first + row) * m.raw_stride + at]);
        }
    }
}

/* The rows of this call, from x, dt, B and C in shared memory. */
template <int J>
static __device__ __forceinline__ void
scan_call(const scan_arguments &a, const mixer_place &p, const mixer_memory &s,
          const float (&exponent)[J][PAIR], float (&H)[J][PAIR])
{
    const int alone = p.count % AT_ONCE<J>;
#pragma unroll 1
    for (int row = 0; row < alone; row++) {
        scan_rows<J, 1>(a, p, s, row, exponent, H);
    }
#pragma unroll 1
    for (int row = alone; row < p.count; row += AT_ONCE<J>) {
        scan_rows<J, AT_ONCE<J>>(a, p, s, row, exponent, H);
    }
}

/* Grid: blocks of COLUMNS channels, sequences.  What depends on the state and its tail alone is done before the kernel
 * before has ended (mil_rows.settled): numbers of the sequence, which one warp asks for, as all blocks read one line, then the
 * tail. */
template <typename T, int J, int GROUPS, mixer_kind KIND>
static __global__ void
__launch_bounds__(BLOCK, 2)
    mixer_scan_kernel(const __grid_constant__ mixer_arguments m, const __grid_constant__ mil_states states)
{
    extern __shared__ __align__(16) char shared[];
    const scan_arguments &a = m.scan;
    mil_trigger();
    mil_wait_for_states(a.rows);
    const int64_t number = ask_for_numbers(a);
    const mixer_memory s = cut_mixer_memory(m, shared, GROUPS);
    const mil_tails tails = states.of[blockIdx.y];
    mixer_place p = place_thread(m);
    float H[J][PAIR], exponent[J][PAIR];
    thread_rows<T, GROUPS, KIND> rows;
    load_states<J>(a, p, tails.state, H);
    load_exponents<J>(a, p, exponent);
    const float channel_part = load_channel(m, p);
    fetch_dt_weights<T, GROUPS>(m, p, s);
    const sum_place sums = place_sum(m, p, first_sum(), s);
    share_numbers(number, p, s);
    __syncthreads();
    p.before = s.numbers[0];
    const int shift = s.numbers[1];
    fetch_tails(a, p, tails, s);
    place_rows(m, p, shift, rows);
    load_lead(m, p, tails, rows);
    load_kept(m, p, tails, shift, rows);
    finish_exponents<J>(a, p, exponent);
    if (p.warp < CHANNEL_PARTS) {
        s.channels[p.warp * COLUMNS + p.lane] =
            channel_part * (p.warp == DT_BIAS_PART ? a.dt_bias_scale : 1.0f);
    }
    mil_await_copies();
    __syncthreads();
    walk_tail<J>(a, p, s, shift, exponent, tails.state, H);
    unsigned last = 0;
    if (shift > 0) {
        last = keep_tails(m, p, tails, shift, s);
        p.owns_B = last & 1;
    }
    mil_wait_knowing(sums.from ^ sums.low ^ sums.B ^ sums.C ^ rows.raw_at ^ rows.z_at ^ rows.y_at ^
                     rows.tail_at ^ rows.conv_at);
    ask_for_rows(m, p, rows);
    if (m.x_weight == NULL) {
        fetch_low<T>(m, p, s);
        take_B_and_C<T, GROUPS>(a, p, (const T *)a.B + p.first * a.B_stride + p.B_at, a.B_stride,
                                (const T *)a.C + p.first * a.C_stride + p.C_at, a.C_stride, s);
        mil_await_copies();
    }
    else {
        add_slices<T>(m, p, sums, s);
    }
    take_rows(m, p, s, rows);
    __syncthreads();
    if constexpr (KIND == PROJECTED_AND_NORMED) {
        norm_parts<T, GROUPS>(m);
    }
    if (m.dt_weight != NULL) {
        multiply_dt<T, GROUPS>(m, p, s);
        __syncthreads();
    }
    finish_dt<T, GROUPS>(m, p, s);
    __syncthreads();
    store_tails(m, p, shift, tails, rows, s); /* nobody waits for that, so it is not before */
    scan_call<J>(a, p, s, exponent, H);
    __syncthreads();
    finish_rows(a, p, rows, s);
    if (p.owns_B) {
        append_B(a, p, tails, p.before - shift, s);
    }
    if (last & 2) {
        fold_inputs<T>(m, states.of[blockIdx.y], p.before, shift);
    }
}

/* ---- launches ----------------------------------------------------------------------------------------------------- */

/* Whether runs of channels that share something and blocks of channels nest. */
static bool
nests(int64_t run)
{
    return run % COLUMNS == 0 || COLUMNS % run == 0;
}

/* Whether they can convolve for themselves. */
static bool
convolution_fits(const mil_scan_mixer *m)
{
    const mil_conv1d *c = &m->conv;
    return m->x_proj.out == 0 && c->repeat >= 1 && c->channels == m->scan.inner &&
           c->channels % c->repeat == 0 && c->width >= 2 && c->width <= MOST_TAPS && c->silu &&
           c->states == m->scan.states && m->scan.x == c->y &&
           (c->repeat == 1 || nests(c->repeat * c->repeat_group));
}

/* Whether the kernels here can take what model code asks for. */
static bool
fits(const mil_context *context, const mil_scan_mixer *m)
{
    const mil_scan *s = &m->scan;
    const mil_dtype act = context->ops->activation_dtype;
    if (act == MIL_F32 || s->rows.rows > ROWS || s->rows.sequences > ROWS || s->states == NULL ||
        s->inner < COLUMNS || s->inner % COLUMNS != 0 || s->inner >= 1 << 24 || s->state_dim % V != 0 ||
        s->state_dim > 4 * LANES_N || s->x_repeat != 1 || s->B_groups < 1 || s->C_groups < 1 ||
        s->inner % s->B_groups != 0 || s->inner % s->C_groups != 0) {
        return false;
    }
    const int64_t B_run = s->inner / s->B_groups, C_run = s->inner / s->C_groups;
    return B_run % V == 0 && C_run % V == 0 && nests(B_run) &&
           (m->x_proj.out == 0 || (m->x_proj.x == s->x && m->x_proj.x_stride == s->x_stride));
}

/* Whether a product of theirs can be taken along. */
static bool
takes_product(const mil_context *context, const mil_linear *p)
{
    return p->dtype == context->ops->activation_dtype && p->bias == NULL && !p->accumulate &&
           !p->float_output && p->in % 8 == 0 && p->in < 1 << 24 && p->out < 1 << 24 &&
           (uintptr_t)p->weight % 16 == 0 && (uintptr_t)p->x % 16 == 0 && p->x_stride % 8 == 0;
}

/* Where B, C and the normed parts are in a row of W_x's output; false: somewhere else. */
template <typename T>
static bool
find_parts(const mil_scan_mixer *m, mixer_arguments *a)
{
    const mil_linear *p = &m->x_proj;
    const T *row = (const T *)m->dt.x;
    const int64_t B_at = (const T *)m->scan.B - row, C_at = (const T *)m->scan.C - row;
    const int64_t B_columns = m->scan.B_groups * m->scan.state_dim;
    const int64_t C_columns = m->scan.C_groups * m->scan.state_dim;
    if (B_at < 0 || B_at + B_columns > p->out || C_at < 0 || C_at + C_columns > p->out || m->dt.in > p->out ||
        m->dt.x_stride != p->y_stride || m->scan.B_stride != p->y_stride || m->scan.C_stride != p->y_stride ||
        p->out % V != 0 || B_at % V != 0 || C_at % V != 0 || (m->norm_count == 0 && m->dt.x != p->y)) {
        return false;
    }
    a->B_at = (int)B_at;
    a->C_at = (int)C_at;
    a->normed = (int)m->norm_count;
    for (int i = 0; i < a->normed; i++) {
        const mil_norm *n = &m->norms[i];
        const int64_t at = (const T *)n->x - (const T *)p->y;
        if (at < 0 || at + n->width > p->out || (const T *)n->y - row != at || n->group != n->width ||
            n->width > MIL_NORM_WIDEST_FOR_WARP || n->z != NULL || n->y_stride != p->y_stride) {
            return false;
        }
        a->norms[i] = {(int)at, (int)n->width, n->weight, n->eps};
    }
    return true;
}

template <typename T, int J, int GROUPS>
static mil_status
launch_scan(mil_context *context, const mixer_arguments &a, const mil_states &states)
{
    const dim3 grid((unsigned)(a.scan.inner / COLUMNS), (unsigned)a.scan.rows.sequences);
    auto kernel = a.raw != NULL  ? mixer_scan_kernel<T, J, GROUPS, CONVOLVES>
                  : a.normed > 0 ? mixer_scan_kernel<T, J, GROUPS, PROJECTED_AND_NORMED>
                                 : mixer_scan_kernel<T, J, GROUPS, PROJECTED>;
    return mil_launch(context, "scan mixer", kernel, grid, dim3(BLOCK),
                      cut_mixer_memory(a, NULL, GROUPS).bytes, a, states);
}

/* Chunks of W_x that a warp takes at a time: all of them, where they are few. */
static int
chunks_at_once(const mixer_arguments &a)
{
    const int64_t chunks = mil_ceil_div(mil_ceil_div(a.scan.inner / CHUNK, SLICES), WARPS);
    return chunks <= 2 ? 2 : chunks <= 5 ? 5 : MOST_CHUNKS;
}

/* Whether a block of so much shared memory can be had, and leaves room for others. */
static bool
has_room(const mil_context *context, size_t bytes)
{
    return bytes <= MOST_BYTES && mil_device_has_shared(context, bytes);
}

template <typename T, int GROUPS>
static mil_status
launch(mil_context *context, const mixer_arguments &a, const mil_states &states)
{
    if (a.x_weight != NULL) {
        const dim3 grid((unsigned)mil_ceil_div(a.x_width, OUTPUTS), SLICES);
        const int chunks = chunks_at_once(a);
        auto kernel = chunks == 2   ? mixer_project_kernel<T, GROUPS, 2>
                      : chunks == 5 ? mixer_project_kernel<T, GROUPS, 5>
                                    : mixer_project_kernel<T, GROUPS, MOST_CHUNKS>;
        MIL_TRY(mil_launch(context, "scan mixer", kernel, grid, dim3(THREADS), 0, a));
    }
    return a.scan.state_dim <= 1 * LANES_N   ? launch_scan<T, 1, GROUPS>(context, a, states)
           : a.scan.state_dim <= 2 * LANES_N ? launch_scan<T, 2, GROUPS>(context, a, states)
                                             : launch_scan<T, 4, GROUPS>(context, a, states);
}

template <typename T>
static mil_status
mixer(mil_context *context, const mil_scan_mixer *m, bool convolves)
{
    const mil_conv1d *c = &m->conv;
    mixer_arguments a = {};
    a.scan = scan_arguments_of(&m->scan);
    a.scan.B_width = group_columns(a.scan.inner, a.scan.B_groups, a.scan.state_dim, COLUMNS);
    a.scan.C_width = group_columns(a.scan.inner, a.scan.C_groups, a.scan.state_dim, COLUMNS);
    a.B_run = a.scan.inner / a.scan.B_groups;
    a.C_run = a.scan.inner / a.scan.C_groups;
    a.repeat = 1;
    if (convolves) {
        a.raw = c->x;
        a.raw_stride = c->x_stride;
        a.inputs = (int)(c->channels / c->repeat);
        a.taps = (int)c->width;
        a.repeat = (int)c->repeat;
        a.repeat_group = (int)c->repeat_group;
        a.conv_weight = c->weight;
        a.conv_bias = c->bias;
    }
    a.total = (int)m->scan.rows.rows;
    for (int64_t i = 0; i <= m->scan.rows.sequences; i++) {
        a.begin[i] = (int)m->scan.rows.offsets[i];
    }
    if (takes_product(context, &m->dt)) {
        a.dt_weight = m->dt.weight;
        a.rank = (int)m->dt.in;
        a.low = m->dt.x;
        a.low_stride = m->dt.x_stride;
    }
    if (m->x_proj.out > 0) {
        a.x_weight = m->x_proj.weight;
        a.x_width = (int)m->x_proj.out;
        if (!takes_product(context, &m->x_proj) || a.dt_weight == NULL || !find_parts<T>(m, &a)) {
            return mil_scan_mixer_apart(context, m);
        }
    }
    if (!has_room(context, cut_mixer_memory(a, NULL, (int)mil_ceil_div(a.total, 8)).bytes)) {
        return mil_scan_mixer_apart(context, m);
    }
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    if (a.x_weight != NULL) {
        MIL_TRY(MIL_PUSH(context->scratch, (int64_t)SLICES * a.total * a.x_width, float, &a.partial));
    }
    else if (a.dt_weight == NULL) {
        MIL_TRY(context->ops->linear_forward(context, &m->dt, 1));
    }
    const mil_states states = mil_states_of(m->scan.states, 0, m->scan.rows.sequences);
    mil_status status = (a.total <= 8 ? launch<T, 1> : launch<T, 2>)(context, a, states);
    mil_arena_rewind(context->scratch, mark);
    return status;
}

mil_status
mil_cuda_scan_mixer(mil_context *context, const mil_scan_mixer *arguments)
{
    const mil_scan_mixer *m = arguments;
    if (!fits(context, m)) {
        return mil_scan_mixer_apart(context, m);
    }
    mil_scan_mixer rest = *m;
    const bool convolves = m->conv.channels > 0 && convolution_fits(m);
    if (m->conv.channels > 0 && !convolves) {
        MIL_TRY(context->ops->conv1d_forward(context, &m->conv));
        rest.conv.channels = 0;
    }
    return context->ops->activation_dtype == MIL_BF16 ? mixer<__nv_bfloat16>(context, &rest, convolves)
                                                      : mixer<__half>(context, &rest, convolves);
}
