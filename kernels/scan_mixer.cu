/* A Mamba-1 mixer for a few rows: all that lies between its first products and its last one (device.h: mil_scan_mixer).
 *
 *   x = silu(conv(raw)),   [low | B | C] = norms(W_x x)   or from the first products
 *   dt = W_dt low,   y = scan(x, dt, B, C) silu(z)
 *
 * One token's work here is next to nothing, but each kernel of a chain costs 2 to 5 us of latency while the memory
 * rests: five kernels a layer were a third of Mamba 2.8B's step.  Every output of W_x needs all channels, so that two
 * launches remain, and one where there is no W_x:
 *
 *   project   a block has 16 outputs and an eighth of the channels, whose convolution it computes for itself; eight partial
 *             sums an output go to memory
 *   scan      a block has 32 channels of one sequence.  Its first four warps hold the state and go through the tail.  Then
 *             all add up the partial sums; the other four convolve, and multiply by the block's 32 rows of W_dt; and the
 *             first four take the rows of this call.  The last block to read what several share (B; inputs of repeated
 *             channels) moves it where a window is folded; all else is the block's own.
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
#include "scan_step.cuh"
#include "thin_product.cuh"

#define V 4 /* channels of a thread */
#define COLUMNS (V * QUADS)
#define BLOCK (2 * THREADS)
#define ROWS MIL_THIN_ROWS
#define CHUNK 32   /* inputs of two tensor products */
#define OUTPUTS 16 /* of a tensor product */
#define CHAINS 8   /* of thin_product.cu: partial sums of W_dt */
#define SLICES 8   /* of W_x's inputs */
#define MOST_TAPS 4
#define MOST_BYTES ((size_t)160 << 10) /* of shared memory */

struct mixer_arguments {
    scan_arguments scan; /* its x is not read, its dt where dt_weight is NULL */
    const void *raw;     /* [rows, inputs] before the convolution */
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

/* A barrier of the scan's warps. */
static __device__ __forceinline__ void
meet()
{
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

/* ---- W_x -------------------------------------------------------------------------------------------------------- */

#define MOST_CHUNKS 8 /* of a warp at a time */

/* A warp's inputs in shared memory, of `chunks` chunks. */
struct project_memory {
    float *tail; /* [sequences, taps - 1, chunks CHUNK] */
    void *x;     /* [rows, chunks CHUNK + 8]: the convolution's inputs, which become its outputs */
    size_t bytes;
};

static __host__ __device__ __forceinline__ project_memory
cut_project_memory(char *memory, int chunks, int rows, int sequences, int taps)
{
    const int wide = chunks * CHUNK;
    project_memory p;
    p.tail = (float *)memory;
    p.x = p.tail + sequences * (taps - 1) * wide;
    p.bytes = sequences * (taps - 1) * wide * 4 + rows * (wide + 8) * 2;
    return p;
}

/* The chunks of a warp: first, first + WARPS, ..., below end. */
struct warp_chunks {
    int first, end;

    __device__ __forceinline__ int at(int i) const
    {
        return first + i * WARPS;
    }
};

/* The tails of the convolution's inputs, of the warp's chunks, on their way: a lane has 16 bytes of a row. */
static __device__ __forceinline__ void
fetch_input_tails(const mixer_arguments &m, const mil_states &states, const warp_chunks &own, int chunks,
                  const project_memory &memory)
{
    const int lane = threadIdx.x % MIL_WARP, wide = chunks * CHUNK;
#pragma unroll 1
    for (int sequence = 0; sequence < m.scan.rows.sequences; sequence++) {
        const int64_t past = __ldcg(m.scan.rows.past + sequence);
        const int64_t boundary = __ldcg(m.scan.rows.boundary + sequence);
        const int before = mil_span_from(0, 0, past, boundary).before;
        const float *tail = states.of[sequence].conv + (int64_t)before * m.inputs;
        float *to = memory.tail + sequence * (m.taps - 1) * wide;
#pragma unroll 1
        for (int row = 0; row < m.taps - 1; row++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = (lane + half * MIL_WARP) * 4, from = own.at(at / CHUNK);
                if (at < wide && from < own.end) {
                    mil_copy_16(to + row * wide + at, tail + row * m.inputs + from * CHUNK + at % CHUNK);
                }
            }
        }
    }
}

/* The same of this call's inputs. */
template <typename T>
static __device__ __forceinline__ void
fetch_inputs(const mixer_arguments &m, const warp_chunks &own, int chunks, const project_memory &memory)
{
    static_assert(MOST_CHUNKS * CHUNK / 8 <= MIL_WARP, "a row of inputs is one access of a warp");
    const int lane = threadIdx.x % MIL_WARP, wide = chunks * CHUNK;
    const int chunk = own.at(lane / (CHUNK / 8));
    const bool there = lane < wide / 8 && chunk < own.end;
    const T *raw = (const T *)m.raw + chunk * CHUNK + lane % (CHUNK / 8) * 8;
#pragma unroll 1
    for (int row = 0; row < m.total && there; row++) {
        mil_copy_16((T *)memory.x + row * (wide + 8) + lane * 8, raw + row * m.raw_stride);
    }
}

/* A lane's channels, one of each chunk: their taps, the oldest first, behind those that do not exist. */
template <int CHUNKS>
struct chunk_taps {
    float weight[CHUNKS][MOST_TAPS], bias[CHUNKS];
};

/* The convolution of the warp's chunks for all rows; what is beyond the last chunk is computed from anything. */
template <typename T, int CHUNKS>
static __device__ __forceinline__ void
convolve_chunks(const mixer_arguments &m, const chunk_taps<CHUNKS> &taps, const project_memory &memory)
{
    constexpr int wide = CHUNKS * CHUNK;
    const int lane = threadIdx.x % MIL_WARP, missing = MOST_TAPS - m.taps;
#pragma unroll 1
    for (int sequence = 0; sequence < m.scan.rows.sequences; sequence++) {
        float window[CHUNKS][MOST_TAPS];
        const float *tail = memory.tail + sequence * (m.taps - 1) * wide + lane;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
#pragma unroll
            for (int j = 1; j < MOST_TAPS; j++) {
                window[i][j] = j > missing ? tail[(j - 1 - missing) * wide + i * CHUNK] : 0.0f;
            }
        }
#pragma unroll 4
        for (int row = m.begin[sequence]; row < m.begin[sequence + 1]; row++) {
            T *x = (T *)memory.x + row * (wide + 8) + lane;
            float y[CHUNKS];
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
#pragma unroll
                for (int j = 0; j + 1 < MOST_TAPS; j++) {
                    window[i][j] = window[i][j + 1];
                }
                window[i][MOST_TAPS - 1] = mil_float(x[i * CHUNK]);
                y[i] = mil_convolve<T, MOST_TAPS>(taps.weight[i], window[i], taps.bias[i], missing, true);
            }
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                x[i * CHUNK] = mil_round<T>(y[i]);
            }
        }
    }
}

/* Grid: tiles of OUTPUTS, SLICES. GROUPS of 8 rows; CHUNKS of a warp at a time. */
template <typename T, int GROUPS, int CHUNKS>
static __global__ void
__launch_bounds__(THREADS, 3)
    mixer_project_kernel(const __grid_constant__ mixer_arguments m, const __grid_constant__ mil_states states)
{
    extern __shared__ __align__(16) char shared[]; /* sums, then the warps' inputs */
    float *sums = (float *)shared;                 /* [WARPS, OUTPUTS, 8 GROUPS] */
    const int warp = threadIdx.x / MIL_WARP, lane = threadIdx.x % MIL_WARP, g = lane / 4, t = lane % 4;
    const int first_output = blockIdx.x * OUTPUTS, inner = m.scan.inner, all = inner / CHUNK;
    const int a_slice = (all + SLICES - 1) / SLICES, a_warp = (a_slice + WARPS - 1) / WARPS;
    const int missing = MOST_TAPS - m.taps;
    const int bytes = (int)cut_project_memory(NULL, CHUNKS, m.total, m.scan.rows.sequences, m.taps).bytes;
    const project_memory memory =
        cut_project_memory(shared + WARPS * OUTPUTS * 8 * GROUPS * sizeof(float) + warp * bytes, CHUNKS,
                           m.total, m.scan.rows.sequences, m.taps);
    const T *low = (const T *)m.x_weight + (int64_t)min(first_output + g, m.x_width - 1) * inner + 8 * t;
    const T *high = (const T *)m.x_weight + (int64_t)min(first_output + g + 8, m.x_width - 1) * inner + 8 * t;
    float c[GROUPS][4] = {};
#pragma unroll 1
    for (int first = 0; first < a_warp; first += CHUNKS) {
        const warp_chunks own = {(int)blockIdx.y * a_slice + warp + first * WARPS,
                                 min(all, ((int)blockIdx.y + 1) * a_slice)};
        uint4 wl[CHUNKS], wh[CHUNKS];
        chunk_taps<CHUNKS> taps;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int chunk = own.at(i), channel = chunk * CHUNK + lane;
            const bool there = chunk < own.end;
            wl[i] = there ? load_weight(low + chunk * CHUNK) : make_uint4(0, 0, 0, 0);
            wh[i] = there ? load_weight(high + chunk * CHUNK) : make_uint4(0, 0, 0, 0);
            taps.bias[i] = there && m.conv_bias != NULL ? m.conv_bias[channel] : 0.0f;
#pragma unroll
            for (int j = 0; j < MOST_TAPS; j++) {
                taps.weight[i][j] =
                    there && j >= missing ? m.conv_weight[channel * m.taps + j - missing] : 0.0f;
            }
        }
        if (first == 0) {
            mil_trigger();
            mil_wait_for_states(m.scan.rows);
        }
        fetch_input_tails(m, states, own, CHUNKS, memory);
        if (first == 0) {
            mil_wait();
        }
        fetch_inputs<T>(m, own, CHUNKS, memory);
        mil_await_copies();
        __syncwarp();
        convolve_chunks<T, CHUNKS>(m, taps, memory);
        __syncwarp();
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const int row = group * 8 + g;
            const T *x = (const T *)memory.x + row * (CHUNKS * CHUNK + 8) + 8 * t;
#pragma unroll
            for (int i = 0; i < CHUNKS;
                 i++) { /* chunks beyond the end have weights of 0, and inputs of any kind */
                const bool there = row < m.total && own.at(i) < own.end;
                const uint4 v = there ? *(const uint4 *)(x + i * CHUNK) : make_uint4(0, 0, 0, 0);
                mil_multiply_add<T>(c[group], wl[i].x, wh[i].x, wl[i].y, wh[i].y, v.x, v.y);
                mil_multiply_add<T>(c[group], wl[i].z, wh[i].z, wl[i].w, wh[i].w, v.z, v.w);
            }
        }
        __syncwarp();
    }
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        float *to = sums + (warp * OUTPUTS + g) * 8 * GROUPS + group * 8 + 2 * t;
        to[0] = c[group][0];
        to[1] = c[group][1];
        to[8 * 8 * GROUPS] = c[group][2];
        to[8 * 8 * GROUPS + 1] = c[group][3];
    }
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < OUTPUTS * m.total; e += THREADS) {
        const int out = e % OUTPUTS, row = e / OUTPUTS, next = OUTPUTS * 8 * GROUPS;
        const float *from = sums + out * 8 * GROUPS + row;
        if (first_output + out < m.x_width) {
            m.partial[((int)blockIdx.y * m.total + row) * m.x_width + first_output + out] =
                (from[0] + from[next]) + (from[2 * next] + from[3 * next]);
        }
    }
}

/* ---- the scan ----------------------------------------------------------------------------------------------------- */

/* What a block of the scan keeps in shared memory. */
struct mixer_memory {
    float *tail_x, *tail_dt; /* [MIL_TAIL, COLUMNS] */
    float *tail_B;           /* [MIL_TAIL, B_width] */
    float *x, *dt;           /* [rows, COLUMNS] of this call */
    float *B, *C;            /* [rows, width] */
    float *sums;             /* [rows, WARPS, COLUMNS] of C . H */
    float *chains;           /* [CHAINS, COLUMNS, 8 GROUPS] of W_dt low */
    void *low;               /* [8 GROUPS, low_stride]: low, or [low | B | C] */
    int low_stride;
    size_t bytes;
};

static __host__ __device__ __forceinline__ mixer_memory
cut_mixer_memory(const mixer_arguments &m, char *memory, int groups)
{
    mixer_memory s;
    float *at = (float *)memory;
    auto take = [&](int floats) {
        float *from = at;
        at += floats;
        return from;
    };
    s.tail_x = take(MIL_TAIL * COLUMNS);
    s.tail_dt = take(MIL_TAIL * COLUMNS);
    s.tail_B = take(MIL_TAIL * m.scan.B_width);
    s.x = take(m.total * COLUMNS);
    s.dt = take(m.total * COLUMNS);
    s.B = take(m.total * m.scan.B_width);
    s.C = take(m.total * m.scan.C_width);
    s.sums = take(m.total * WARPS * COLUMNS);
    s.chains = take(CHAINS * COLUMNS * 8 * groups);
    s.low = at;
    s.low_stride = (m.x_weight != NULL ? (m.x_width + 7) / 8 * 8 : m.rank) + 8;
    s.bytes = (char *)at - memory + (size_t)8 * groups * s.low_stride * 2;
    return s;
}

/* Where a block is. */
struct mixer_place {
    int channel, B_at, C_at; /* first channel; first columns of B and C that it may need */
};

/* The tails into shared memory, by the scan's warps. */
static __device__ __forceinline__ void
fetch_tails(const scan_arguments &a, const mixer_place &p, int before, const mil_tails &tails,
            const mixer_memory &s)
{
    const int B_columns = a.B_groups * a.state_dim, column = threadIdx.x % QUADS * V;
#pragma unroll 1
    for (int token = threadIdx.x / QUADS; token < before; token += LANES_N) {
        const int at = token * a.inner + p.channel + column;
        mil_copy_16(s.tail_x + token * COLUMNS + column, tails.x + at);
        mil_copy_16(s.tail_dt + token * COLUMNS + column, tails.dt + at);
#pragma unroll 1
        for (int n = column; n < a.B_width; n += COLUMNS) {
            if (p.B_at + n < B_columns) {
                mil_copy_16(s.tail_B + token * a.B_width + n, tails.B + token * B_columns + p.B_at + n);
            }
        }
    }
}

/* Tokens that are computed side by side, as far as they do not depend on each other. */
template <int J>
constexpr int AT_ONCE = J == 1 ? 4 : 1;

/* R tokens of a stretch from `token` on, of which those from `end` on do not exist and leave H as it is: H moves on, and
 * `then` is told after each.  B is the stretch's. */
template <int J, int R, typename Then>
static __device__ __forceinline__ void
take_tokens(const scan_arguments &a, const float *x, const float *dt, const float *B, int token, int end,
            int B_own, const float (&exponent)[J][V], float (&H)[J][V], Then then)
{
    const int column = threadIdx.x % QUADS * V, lane_n = threadIdx.x / QUADS;
    float power[R][J][V], input[R][J][V];
#pragma unroll
    for (int r = 0; r < R; r++) {
        const bool there = token + r < end;
        const int at = there ? token + r : token;
        float dt_own[V], x_own[V];
        mil_load<V>(dt + at * COLUMNS + column, dt_own);
        mil_load<V>(x + at * COLUMNS + column, x_own);
#pragma unroll
        for (int j = 0; j < J; j++) {
            const int n = lane_n + j * LANES_N;
            const float B_of = n < a.state_dim ? B[at * a.B_width + B_own + n] : 0.0f;
#pragma unroll
            for (int v = 0; v < V; v++) {
                const float taken = dt_own[v] * x_own[v] * B_of;
                power[r][j][v] = there ? fast_power(dt_own[v] * exponent[j][v]) : 1.0f;
                input[r][j][v] = there ? taken : 0.0f;
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int j = 0; j < J; j++) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                H[j][v] = fmaf(power[r][j][v], H[j][v], input[r][j][v]);
            }
        }
        then(r);
    }
}

/* The tail's tokens; the state after `shift` of them goes to memory. */
template <int J>
static __device__ __forceinline__ void
walk_tail(const scan_arguments &a, const mixer_memory &s, int before, int shift, int B_own, int c, int lane_n,
          const float (&exponent)[J][V], float *state, float (&H)[J][V])
{
#pragma unroll 1
    for (int token = 0; token < before; token += AT_ONCE<J>) {
        take_tokens<J, AT_ONCE<J>>(a, s.tail_x, s.tail_dt, s.tail_B, token, before, B_own, exponent, H,
                                   [](int) {});
        static_assert(MIL_WINDOW % AT_ONCE<J> == 0, "a fold comes between two turns");
        if (token + AT_ONCE<J> == shift) {
            store_H<V, J>(a, H, c, lane_n, state);
        }
    }
}

/* This call's rows from `row` on, R of them: C . H into s.sums. */
template <int J, int R>
static __device__ __forceinline__ void
scan_rows(const scan_arguments &a, const mixer_memory &s, int row, int count, int B_own, int C_own,
          const float (&exponent)[J][V], float (&H)[J][V])
{
    const int lane_n = threadIdx.x / QUADS;
    float sum[R][V];
    take_tokens<J, R>(a, s.x, s.dt, s.B, row, count, B_own, exponent, H, [&](int r) {
        const int at = min(row + r, count - 1);
#pragma unroll
        for (int v = 0; v < V; v++) {
            sum[r][v] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < J; j++) {
            const int n = lane_n + j * LANES_N;
            const float C = n < a.state_dim ? s.C[at * a.C_width + C_own + n] : 0.0f;
#pragma unroll
            for (int v = 0; v < V; v++) {
                sum[r][v] = fmaf(C, H[j][v], sum[r][v]);
            }
        }
    });
#pragma unroll
    for (int r = 0; r < R; r++) {
        add_lanes<V>(sum[r]);
    }
    if (threadIdx.x % MIL_WARP < QUADS) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            if (row + r < count) {
                mil_store<V>(s.sums + (row + r) * WARPS * COLUMNS + threadIdx.x / MIL_WARP * COLUMNS +
                                 threadIdx.x % QUADS * V,
                             sum[r]);
            }
        }
    }
}

/* Rows of [low | B | C]: sums of the partial sums, rounded as the product's output would be.  By the whole block. */
template <typename T>
static __device__ __forceinline__ void
add_slices(const mixer_arguments &m, int first, int count, const mixer_memory &s)
{
    const int quads = m.x_width / V, apart = m.total * m.x_width;
#pragma unroll 1
    for (int item = threadIdx.x; item < count * quads; item += BLOCK) {
        const int row = item / quads, at = item % quads * V;
        const float *from = m.partial + (first + row) * m.x_width + at;
        float4 part[SLICES];
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            part[slice] = *(const float4 *)(from + slice * apart);
        }
        float sum[V] = {};
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            sum[0] += part[slice].x;
            sum[1] += part[slice].y;
            sum[2] += part[slice].z;
            sum[3] += part[slice].w;
        }
        mil_store<V>((T *)s.low + row * s.low_stride + at, sum);
    }
}

/* The norms of parts of those rows, in place: a warp each. */
template <typename T>
static __device__ __noinline__ void
norm_parts(const mixer_arguments &m, int count, int thread, T *low, int low_stride)
{
#pragma unroll 1
    for (int row = thread / MIL_WARP; row < count; row += WARPS) {
#pragma unroll 1
        for (int part = 0; part < m.normed; part++) {
            norm_arguments n = {};
            T *at = low + row * low_stride + m.norms[part].at;
            n.group = m.norms[part].width;
            n.x = at;
            n.eps = m.norms[part].eps;
            auto sum = [](float value) { return mil_warp_sum(value); };
            if (m.norms[part].at % 8 == 0 && m.norms[part].width % 8 == 0) {
                norm_group<T, 8>(n, 0, 0, m.norms[part].weight, at, thread % MIL_WARP, MIL_WARP, sum);
            }
            else {
                norm_group<T, 1>(n, 0, 0, m.norms[part].weight, at, thread % MIL_WARP, MIL_WARP, sum);
            }
        }
    }
}

/* B or C of this call's rows into shared memory: columns [at, at + width) of `columns`. */
template <typename T>
static __device__ __forceinline__ void
take_columns(const T *from, int64_t stride, int at, int width, int columns, int count, int thread, float *to)
{
    const int inside = min(width, columns - at);
#pragma unroll 1
    for (int row = thread / MIL_WARP; row < count; row += WARPS) {
#pragma unroll 1
        for (int column = thread % MIL_WARP; column < inside; column += MIL_WARP) {
            to[row * width + column] = mil_float(from[row * stride + at + column]);
        }
    }
}

/* Input of the convolution that channel c reads. */
static __device__ __forceinline__ int
input_of(const mixer_arguments &m, int c)
{
    return m.repeat > 1 ? c / (m.repeat_group * m.repeat) * m.repeat_group + c % m.repeat_group : c;
}

/* A channel's taps, the oldest first, behind those that do not exist, and its input. */
struct conv_taps {
    float weight[MOST_TAPS], bias;
    int input;
    bool owns; /* appends it to the tail */
};

static __device__ __forceinline__ conv_taps
load_taps(const mixer_arguments &m, int channel)
{
    conv_taps w;
#pragma unroll
    for (int j = 0; j < MOST_TAPS; j++) {
        const int missing = MOST_TAPS - m.taps;
        w.weight[j] = j < missing ? 0.0f : m.conv_weight[channel * m.taps + j - missing];
    }
    w.bias = m.conv_bias == NULL ? 0.0f : m.conv_bias[channel];
    w.input = input_of(m, channel);
    w.owns = m.repeat == 1 || channel / m.repeat_group % m.repeat == 0;
    return w;
}

/* The inputs before this call's first row that a thread's channel needs, the oldest first. */
static __device__ __forceinline__ void
load_lead(const mixer_arguments &m, int before, const mil_tails &tails, const conv_taps &w,
          float (&lead)[MOST_TAPS - 1])
{
    const float *tail = tails.conv + (before + m.taps - 1) * m.inputs + w.input;
#pragma unroll
    for (int j = 0; j < MOST_TAPS - 1; j++) {
        const int missing = MOST_TAPS - m.taps;
        lead[j] = j < missing ? 0.0f : __ldcg(tail + (j - (MOST_TAPS - 1)) * m.inputs);
    }
}

/* The convolution of the block's channels: a quarter of the rows of a thread's channel, all of whose inputs are on their way
 * at once. */
template <typename T>
static __device__ __forceinline__ void
convolve_rows(const mixer_arguments &m, int first, int count, int thread, const conv_taps &w,
              const float (&lead)[MOST_TAPS - 1], const mixer_memory &s)
{
    constexpr int MOST = ROWS / WARPS; /* rows of a thread */
    const T *rows = (const T *)m.raw + first * m.raw_stride + w.input;
    const int each = (count + WARPS - 1) / WARPS, from = thread / COLUMNS * each,
              end = min(from + each, count);
    float input[MOST_TAPS - 1 + MOST];
#pragma unroll
    for (int j = 0; j < MOST_TAPS - 1 + MOST; j++) {
        const int token = from + j - (MOST_TAPS - 1);
        const bool wanted = j >= MOST_TAPS - m.taps && token < end;
        input[j] = wanted && token >= 0 ? mil_float(rows[token * m.raw_stride]) : 0.0f;
#pragma unroll
        for (int l = j; l < MOST_TAPS - 1; l++) { /* lead[l] is of token l - (MOST_TAPS - 1) */
            input[j] = wanted && from + j == l ? lead[l] : input[j];
        }
    }
#pragma unroll
    for (int k = 0; k < MOST; k++) {
        if (from + k < end) {
            float window[MOST_TAPS];
#pragma unroll
            for (int j = 0; j < MOST_TAPS; j++) {
                window[j] = j < MOST_TAPS - m.taps ? 0.0f : input[k + j];
            }
            const float y = mil_convolve<T, MOST_TAPS>(w.weight, window, w.bias, MOST_TAPS - m.taps, true);
            s.x[(from + k) * COLUMNS + thread % COLUMNS] = mil_float(mil_round<T>(y));
        }
    }
}

/* A warp's part of W_dt: tile and chain of each of its tensor products, their first weights. */
struct dt_weights {
    static constexpr int PAIRS = COLUMNS / OUTPUTS * CHAINS / WARPS;
    uint4 low[PAIRS], high[PAIRS];
};

template <typename T>
static __device__ __forceinline__ void
load_dt_weights(const mixer_arguments &m, int channel, int tile, int k, uint4 &low, uint4 &high)
{
    const int lane = threadIdx.x % MIL_WARP, at = k + lane % 4 * 8;
    const T *from = (const T *)m.dt_weight + (channel + tile * OUTPUTS + lane / 4) * m.rank + at;
    const bool there = m.dt_weight != NULL && at < m.rank;
    low = there ? load_weight(from) : make_uint4(0, 0, 0, 0);
    high = there ? load_weight(from + 8 * m.rank) : make_uint4(0, 0, 0, 0);
}

/* A chunk of low, from input `k` on, times the weights of a warp's products that have such a chunk. */
template <typename T, int GROUPS>
static __device__ __forceinline__ void
multiply_chunk(const mixer_arguments &m, int count, int k, const uint4 &l, const uint4 &h,
               const mixer_memory &s, float (&c)[GROUPS][4])
{
    const int lane = threadIdx.x % MIL_WARP, g = lane / 4, t = lane % 4;
    const T *low = (const T *)s.low + g * s.low_stride + k + 8 * t;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        const bool real = group * 8 + g < count && k + 8 * t < m.rank;
        const uint4 v = real ? *(const uint4 *)(low + group * 8 * s.low_stride) : make_uint4(0, 0, 0, 0);
        mil_multiply_add<T>(c[group], l.x, h.x, l.y, h.y, v.x, v.y);
        mil_multiply_add<T>(c[group], l.z, h.z, l.w, h.w, v.z, v.w);
    }
}

/* W_dt low in the order of thin_product.cu: chain w takes chunks w, w + 8, ...  The first chunks, often the only ones, of all
 * of a warp's products are under way at once. */
template <typename T, int GROUPS>
static __device__ __forceinline__ void
multiply_dt(const mixer_arguments &m, const mixer_place &p, int count, int thread, const dt_weights &weights,
            const mixer_memory &s)
{
    const int warp = thread / MIL_WARP, lane = thread % MIL_WARP, g = lane / 4, t = lane % 4;
    float c[dt_weights::PAIRS][GROUPS][4] = {};
#pragma unroll
    for (int i = 0; i < dt_weights::PAIRS; i++) {
        const int chain = (warp * dt_weights::PAIRS + i) % CHAINS;
        multiply_chunk<T, GROUPS>(m, count, chain * CHUNK, weights.low[i], weights.high[i], s, c[i]);
    }
#pragma unroll
    for (int i = 0; i < dt_weights::PAIRS; i++) {
        const int pair = warp * dt_weights::PAIRS + i, tile = pair / CHAINS, chain = pair % CHAINS;
#pragma unroll 1
        for (int k = (chain + CHAINS) * CHUNK; k < m.rank; k += CHAINS * CHUNK) {
            uint4 l, h;
            load_dt_weights<T>(m, p.channel, tile, k, l, h);
            multiply_chunk<T, GROUPS>(m, count, k, l, h, s, c[i]);
        }
        float *to = s.chains + (chain * COLUMNS + tile * OUTPUTS + g) * 8 * GROUPS + 2 * t;
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            to[group * 8] = c[i][group][0];
            to[group * 8 + 1] = c[i][group][1];
            to[8 * 8 * GROUPS + group * 8] = c[i][group][2];
            to[8 * 8 * GROUPS + group * 8 + 1] = c[i][group][3];
        }
    }
}

/* dt after bias, softplus and clamp, by the whole block. */
template <typename T, int GROUPS>
static __device__ __forceinline__ void
finish_dt(const mixer_arguments &m, const mixer_place &p, int first, int count, float bias,
          const mixer_memory &s)
{
    const scan_arguments &a = m.scan;
    const int column = threadIdx.x % COLUMNS;
#pragma unroll 1
    for (int row = threadIdx.x / COLUMNS; row < count; row += BLOCK / COLUMNS) {
        float value = 0.0f;
        if (m.dt_weight != NULL) {
#pragma unroll
            for (int chain = 0; chain < CHAINS; chain++) {
                value += s.chains[(chain * COLUMNS + column) * 8 * GROUPS + row];
            }
            value = mil_float(mil_round<T>(value));
        }
        else {
            value = mil_float(((const T *)a.dt)[(first + row) * a.dt_stride + p.channel + column]);
        }
        s.dt[row * COLUMNS + column] = mil_time_step(value + bias, a.dt_min, a.dt_max);
    }
}

/* low of this call's rows, where it comes from the first products, on its way. */
template <typename T>
static __device__ __forceinline__ void
fetch_low(const mixer_arguments &m, int first, int count, int thread, const mixer_memory &s)
{
#pragma unroll 1
    for (int row = thread / MIL_WARP; row < count && m.dt_weight != NULL; row += WARPS) {
#pragma unroll 1
        for (int at = thread % MIL_WARP * 8; at < m.rank; at += MIL_WARP * 8) {
            mil_copy_16((T *)s.low + row * s.low_stride + at,
                        (const T *)m.low + (first + row) * m.low_stride + at);
        }
    }
}

/* B and C of this call's rows, from the first products or from [low | B | C]. */
template <typename T>
static __device__ __forceinline__ void
take_B_and_C(const mixer_arguments &m, const mixer_place &p, int first, int count, const mixer_memory &s)
{
    const scan_arguments &a = m.scan;
    const int thread = threadIdx.x % THREADS, B_columns = a.B_groups * a.state_dim;
    const int C_columns = a.C_groups * a.state_dim;
    if (m.x_weight != NULL) {
        const T *low = (const T *)s.low;
        take_columns<T>(low + m.B_at, s.low_stride, p.B_at, a.B_width, B_columns, count, thread, s.B);
        take_columns<T>(low + m.C_at, s.low_stride, p.C_at, a.C_width, C_columns, count, thread, s.C);
    }
    else {
        take_columns<T>((const T *)a.B + first * a.B_stride, a.B_stride, p.B_at, a.B_width, B_columns, count,
                        thread, s.B);
        take_columns<T>((const T *)a.C + first * a.C_stride, a.C_stride, p.C_at, a.C_width, C_columns, count,
                        thread, s.C);
    }
}

/* One group's columns of B: what the tail keeps, where it is folded, and this call's rows. */
static __device__ __forceinline__ void
write_B(const scan_arguments &a, const mixer_place &p, int before, int count, const mil_tails &tails,
        int group, int shift, const mixer_memory &s)
{
    const int B_columns = a.B_groups * a.state_dim, at = group * a.state_dim - p.B_at;
    const int kept = shift > 0 ? before - shift : 0, base = before - shift;
#pragma unroll 1
    for (int row = threadIdx.x / MIL_WARP; row < kept + count; row += BLOCK / MIL_WARP) {
        const float *from =
            row < kept ? s.tail_B + (shift + row) * a.B_width : s.B + (row - kept) * a.B_width;
        float *to = tails.B + (row < kept ? row : base + row - kept) * B_columns + group * a.state_dim;
#pragma unroll 1
        for (int n = threadIdx.x % MIL_WARP; n < a.state_dim; n += MIL_WARP) {
            to[n] = from[at + n];
        }
    }
}

/* Tails where nothing is folded: rows of this call behind those that are there, each by one block. */
template <typename T>
static __device__ __forceinline__ void
append_tails(const mixer_arguments &m, const mixer_place &p, int first, int count, int before,
             const mil_tails &tails, const conv_taps &taps, const mixer_memory &s)
{
    const scan_arguments &a = m.scan;
    const int column = threadIdx.x % COLUMNS;
#pragma unroll 1
    for (int row = threadIdx.x / COLUMNS; row < count; row += BLOCK / COLUMNS) {
        const int at = (before + row) * a.inner + p.channel + column;
        tails.x[at] = s.x[row * COLUMNS + column];
        tails.dt[at] = s.dt[row * COLUMNS + column];
        if (taps.owns) {
            tails.conv[(before + m.taps - 1 + row) * m.inputs + taps.input] =
                mil_float(((const T *)m.raw)[(first + row) * m.raw_stride + taps.input]);
        }
    }
#pragma unroll 1
    for (int group = p.B_at / a.state_dim; group * m.B_run < p.channel + COLUMNS; group++) {
        if (group * m.B_run >= p.channel) {
            write_B(a, p, before, count, tails, group, 0, s);
        }
    }
}

/* Tails where a window is folded: `shift` rows go, and what is left moves to the beginning. */
template <typename T>
static __device__ __noinline__ void
fold_tails(const mixer_arguments &m, const mil_tails &tails, int channel, int first, int count, int before,
           int shift, int groups)
{
    extern __shared__ __align__(16) char shared[];
    const scan_arguments &a = m.scan;
    const mixer_memory s = cut_mixer_memory(m, shared, groups);
    const int input_run = m.repeat > 1 ? m.repeat * m.repeat_group : 1;
    const int kept = before - shift, lead = m.taps - 1, column = threadIdx.x % COLUMNS;
    const int B_group = channel / m.B_run, run = channel / input_run;
    const mixer_place p = {channel, B_group * a.state_dim, 0};
    const mil_slots slots = {{mil_slot(tails.B, a.B_groups * a.state_dim, p.B_at),
                              mil_slot(tails.x, a.inner, run * input_run), NULL},
                             {m.B_run > COLUMNS ? (unsigned)(m.B_run / COLUMNS) : 1u,
                              input_run > COLUMNS ? (unsigned)(input_run / COLUMNS) : 1u, 0u}};
    const unsigned last = mil_last_of(slots);
#pragma unroll 1
    for (int row = threadIdx.x / COLUMNS; row < kept + count; row += BLOCK / COLUMNS) {
        const int at = row * a.inner + channel + column;
        const int from = (row < kept ? shift + row : row - kept) * COLUMNS + column;
        tails.x[at] = row < kept ? s.tail_x[from] : s.x[from];
        tails.dt[at] = row < kept ? s.tail_dt[from] : s.dt[from];
    }
    if (last & 1) {
#pragma unroll 1
        for (int group = B_group; group * m.B_run < channel + COLUMNS; group++) {
            write_B(a, p, before, count, tails, group, shift, s);
        }
    }
    if (last & 2) {
        const int columns = max(input_run, COLUMNS) / m.repeat, input = input_of(m, run * input_run);
        mil_tail_shift<BLOCK>(tails.conv + input, m.inputs, columns, shift, lead + kept);
#pragma unroll 1
        for (int row = threadIdx.x / COLUMNS; row < count; row += BLOCK / COLUMNS) {
#pragma unroll 1
            for (int at = input + column; at < input + columns; at += COLUMNS) {
                tails.conv[(kept + lead + row) * m.inputs + at] =
                    mil_float(((const T *)m.raw)[(first + row) * m.raw_stride + at]);
            }
        }
    }
}

/* y of all rows; D and z are those of the thread's column and rows. */
template <typename T>
static __device__ __forceinline__ void
finish_rows(const scan_arguments &a, const mixer_place &p, int first, int count, float D, const float (&z)[2],
            const mixer_memory &s)
{
    const int column = threadIdx.x % COLUMNS;
#pragma unroll
    for (int k = 0; k < ROWS / (BLOCK / COLUMNS); k++) {
        const int row = threadIdx.x / COLUMNS + k * (BLOCK / COLUMNS);
        if (row < count) {
            const float *sums = s.sums + row * WARPS * COLUMNS + column;
            float y = (sums[0] + sums[COLUMNS]) + (sums[2 * COLUMNS] + sums[3 * COLUMNS]);
            y = fmaf(D, s.x[row * COLUMNS + column], y);
            if (a.z != NULL) {
                y *= __fdividef(z[k], 1.0f + __expf(-z[k]));
            }
            ((T *)a.y)[(first + row) * a.y_stride + p.channel + column] = mil_round<T>(y);
        }
    }
}

/* Grid: blocks of COLUMNS channels, sequences.  What depends on the state and its tail alone is done before the kernel
 * before has ended (mil_rows.settled). */
template <typename T, int J, int GROUPS>
static __global__ void
__launch_bounds__(BLOCK, 2)
    mixer_scan_kernel(const __grid_constant__ mixer_arguments m, const __grid_constant__ mil_states states)
{
    extern __shared__ __align__(16) char shared[];
    const scan_arguments &a = m.scan;
    const mixer_memory s = cut_mixer_memory(m, shared, GROUPS);
    const mil_tails tails = states.of[blockIdx.y];
    const bool scans = threadIdx.x < THREADS;
    const int thread = threadIdx.x % THREADS; /* of its role */
    const int channel = blockIdx.x * COLUMNS, own = channel + (int)threadIdx.x % COLUMNS;
    const mixer_place p = {channel, channel / m.B_run * a.state_dim, channel / m.C_run * a.state_dim};
    const int c = channel + thread % QUADS * V, lane_n = thread / QUADS;
    const int B_own = c / m.B_run * a.state_dim - p.B_at, C_own = c / m.C_run * a.state_dim - p.C_at;
    const float D = a.D[own], bias = a.dt_bias_scale * a.dt_bias[own];
    const conv_taps taps = load_taps(m, own);
    const int first = m.begin[blockIdx.y], count = m.begin[blockIdx.y + 1] - first;
    float H[J][V], exponent[J][V], lead[MOST_TAPS - 1];
    dt_weights weights;
    mil_trigger();
    if (!scans) {
#pragma unroll
        for (int i = 0; i < dt_weights::PAIRS; i++) {
            const int pair = thread / MIL_WARP * dt_weights::PAIRS + i;
            load_dt_weights<T>(m, channel, pair / CHAINS, pair % CHAINS * CHUNK, weights.low[i],
                               weights.high[i]);
        }
    }
    mil_wait_for_states(a.rows);
    const mil_span span = mil_span_from(first, first + count, __ldcg(a.rows.past + blockIdx.y),
                                        __ldcg(a.rows.boundary + blockIdx.y));
    const int before = span.before, shift = (int)(span.after - span.boundary);
    if (scans) {
        fetch_tails(a, p, before, tails, s);
        load_H<V, J>(a, tails.state, c, lane_n, H);
        load_exponent<V, J>(a, c, lane_n, exponent);
        mil_await_copies();
        meet();
        walk_tail<J>(a, s, before, shift, B_own, c, lane_n, exponent, tails.state, H);
    }
    else {
        load_lead(m, before, tails, taps, lead);
    }
    mil_wait();
    float z[ROWS / (BLOCK / COLUMNS)];
#pragma unroll
    for (int k = 0; k < ROWS / (BLOCK / COLUMNS); k++) {
        const int row = (int)threadIdx.x / COLUMNS + k * (BLOCK / COLUMNS);
        z[k] =
            a.z != NULL && row < count ? mil_float(((const T *)a.z)[(first + row) * a.z_stride + own]) : 0.0f;
    }
    if (m.x_weight != NULL) {
        add_slices<T>(m, first, count, s);
    }
    else if (!scans) {
        fetch_low<T>(m, first, count, thread, s);
    }
    if (!scans) {
        convolve_rows<T>(m, first, count, thread, taps, lead, s);
        mil_await_copies();
    }
    __syncthreads();
    if (m.normed > 0) {
        if (!scans) {
            norm_parts<T>(m, count, thread, (T *)s.low, s.low_stride);
        }
        __syncthreads();
    }
    if (scans) {
        take_B_and_C<T>(m, p, first, count, s);
    }
    else if (m.dt_weight != NULL) {
        multiply_dt<T, GROUPS>(m, p, count, thread, weights, s);
    }
    __syncthreads();
    finish_dt<T, GROUPS>(m, p, first, count, bias, s);
    __syncthreads();
    if (scans) {
        int row = 0;
#pragma unroll 1
        for (; row + AT_ONCE<J> <= count; row += AT_ONCE<J>) {
            scan_rows<J, AT_ONCE<J>>(a, s, row, count, B_own, C_own, exponent, H);
        }
#pragma unroll 1
        for (; row < count; row++) {
            scan_rows<J, 1>(a, s, row, count, B_own, C_own, exponent, H);
        }
    }
    __syncthreads();
    finish_rows<T>(a, p, first, count, D, z, s);
    if (shift == 0) {
        append_tails<T>(m, p, first, count, before, tails, taps, s);
    }
    else {
        fold_tails<T>(m, tails, channel, first, count, before, shift, GROUPS);
    }
}

/* ---- launches ----------------------------------------------------------------------------------------------------- */

/* Whether runs of channels that share something and blocks of channels nest. */
static bool
nests(int64_t run)
{
    return run % COLUMNS == 0 || COLUMNS % run == 0;
}

/* Whether the kernels here can take what model code asks for. */
static bool
fits(const mil_context *context, const mil_scan_mixer *m)
{
    const mil_scan *s = &m->scan;
    const mil_conv1d *c = &m->conv;
    const mil_dtype act = context->ops->activation_dtype;
    if (act == MIL_F32 || s->rows.rows > ROWS || s->rows.sequences > ROWS || s->states == NULL ||
        s->inner < COLUMNS || s->inner % COLUMNS != 0 || s->inner >= 1 << 24 || s->state_dim % V != 0 ||
        s->state_dim > 4 * LANES_N || s->x_repeat != 1 || s->B_groups < 1 || s->C_groups < 1 ||
        s->inner % s->B_groups != 0 || s->inner % s->C_groups != 0 || s->x != c->y) {
        return false;
    }
    const int64_t B_run = s->inner / s->B_groups, C_run = s->inner / s->C_groups;
    if (B_run % V != 0 || C_run % V != 0 || !nests(B_run) || c->channels != s->inner || c->repeat < 1 ||
        c->channels % c->repeat != 0 || c->width < 2 || c->width > MOST_TAPS || !c->silu ||
        c->states != s->states || (c->repeat > 1 && !nests(c->repeat * c->repeat_group))) {
        return false;
    }
    return m->x_proj.out == 0 || c->repeat == 1;
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
        p->out % V != 0 || (m->norm_count == 0 && m->dt.x != p->y)) {
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
    return mil_launch(context, "scan mixer", mixer_scan_kernel<T, J, GROUPS>, grid, dim3(BLOCK),
                      cut_mixer_memory(a, NULL, GROUPS).bytes, a, states);
}

/* Chunks of W_x that a warp takes at a time: all of them, where they are few. */
static int
chunks_at_once(const mixer_arguments &a)
{
    const int64_t chunks = mil_ceil_div(mil_ceil_div(a.scan.inner / CHUNK, SLICES), WARPS);
    return chunks <= 2 ? 2 : chunks <= 5 ? 5 : MOST_CHUNKS;
}

/* Shared memory of a block of the kernel for W_x. */
static size_t
project_bytes(const mixer_arguments &a)
{
    return WARPS * OUTPUTS * mil_ceil_div(a.total, 8) * 8 * sizeof(float) +
           WARPS * cut_project_memory(NULL, chunks_at_once(a), a.total, a.scan.rows.sequences, a.taps).bytes;
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
        MIL_TRY(mil_launch(context, "scan mixer", kernel, grid, dim3(THREADS), project_bytes(a), a, states));
    }
    return a.scan.state_dim <= 1 * LANES_N   ? launch_scan<T, 1, GROUPS>(context, a, states)
           : a.scan.state_dim <= 2 * LANES_N ? launch_scan<T, 2, GROUPS>(context, a, states)
                                             : launch_scan<T, 4, GROUPS>(context, a, states);
}

template <typename T>
static mil_status
mixer(mil_context *context, const mil_scan_mixer *m)
{
    const mil_conv1d *c = &m->conv;
    mixer_arguments a = {};
    a.scan = scan_arguments_of(&m->scan);
    a.scan.B_width = group_columns(a.scan.inner, a.scan.B_groups, a.scan.state_dim, COLUMNS);
    a.scan.C_width = group_columns(a.scan.inner, a.scan.C_groups, a.scan.state_dim, COLUMNS);
    a.B_run = a.scan.inner / a.scan.B_groups;
    a.C_run = a.scan.inner / a.scan.C_groups;
    a.raw = c->x;
    a.raw_stride = c->x_stride;
    a.inputs = (int)(c->channels / c->repeat);
    a.taps = (int)c->width;
    a.repeat = (int)c->repeat;
    a.repeat_group = (int)c->repeat_group;
    a.conv_weight = c->weight;
    a.conv_bias = c->bias;
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
        if (!takes_product(context, &m->x_proj) || a.dt_weight == NULL || !find_parts<T>(m, &a) ||
            !mil_is_aligned<T>(c->x, c->x_stride) || !mil_is_aligned<float>(c->weight, 0) ||
            !has_room(context, project_bytes(a))) {
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
    if (!fits(context, arguments)) {
        return mil_scan_mixer_apart(context, arguments);
    }
    return context->ops->activation_dtype == MIL_BF16 ? mixer<__nv_bfloat16>(context, arguments)
                                                      : mixer<__half>(context, arguments);
}
