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
 *   scan      a block has 32 channels of one sequence.  Its first four warps hold the state and go through the tail;
 *             meanwhile the other four add up the partial sums, convolve, and multiply by the block's 32 rows of W_dt.
 *             Then the first four take the rows of this call.  The last block to read what several share (B; inputs of
 *             repeated channels) moves it where a window is folded; all else is the block's own.
 *
 * Weights, and what else no kernel writes, are loaded before the kernel before has ended; states and tails are asked for into
 * the second-level cache.  While the chip waits for these kernels' latency it fetches the weights that follow them
 * (`next`) into that cache.
 *
 * The convolution, W_dt and the scan give the bits of conv1d.cu, thin_product.cu and selective_scan_step.cu; sums of W_x
 * are cut by their length alone.  So a row's bits do not depend on what stands beside it.
 */
#include "ahead.cuh"
#include "conv1d.cuh"
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
#define MOST_TAPS 8
#define MOST_BYTES (160 << 10) /* of shared memory */

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
    int normed;          /* parts of x_width that are normed */
    struct {
        int at, width;
        const float *weight;
        float eps;
    } norms[3];
    const void *next;
    int64_t next_bytes;
};

/* c += a b: 16 x 16 by 16 x 8. */
static __device__ __forceinline__ void
multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
         __nv_bfloat16)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ void
multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, __half)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ uint4
load_weight(const void *from)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

/* 16 bytes on their way to shared memory. */
static __device__ __forceinline__ void
copy_16(void *to, const void *from)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
                 "l"(from)
                 : "memory");
}

static __device__ __forceinline__ void
await_copies()
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* A barrier of the four warps of one role. */
static __device__ __forceinline__ void
meet(int role)
{
    asm volatile("bar.sync %0, %1;" ::"r"(role + 1), "n"(THREADS) : "memory");
}

/* ---- W_x -------------------------------------------------------------------------------------------------------- */

#define MOST_CHUNKS 8 /* of a warp at a time */

/* A warp's inputs in shared memory, of `chunks` chunks: the convolution's, then its outputs. */
struct project_memory {
    float *weight; /* [chunks CHUNK, taps] */
    float *tail;   /* [sequences, taps - 1, chunks CHUNK] */
    void *raw;     /* [rows, chunks CHUNK] */
    void *x;       /* [rows, chunks CHUNK + 8] */
    size_t bytes;
};

static __host__ __device__ __forceinline__ project_memory
cut_project_memory(char *memory, int chunks, int rows, int sequences, int taps)
{
    const size_t wide = (size_t)chunks * CHUNK;
    project_memory p;
    p.weight = (float *)memory;
    p.tail = p.weight + wide * taps;
    p.raw = p.tail + sequences * (taps - 1) * wide;
    p.x = (char *)p.raw + rows * wide * 2;
    p.bytes = wide * taps * 4 + sequences * (taps - 1) * wide * 4 + rows * (2 * wide + 8) * 2;
    return p;
}

/* Chunk `i` of the warp's, or -1. */
static __device__ __forceinline__ int
chunk_of(const mixer_arguments &m, int i)
{
    const int all = m.scan.inner / CHUNK, a_slice = (all + SLICES - 1) / SLICES;
    const int first = blockIdx.y * a_slice, chunk = first + (int)threadIdx.x / MIL_WARP + i * WARPS;
    return chunk < min(all, first + a_slice) ? chunk : -1;
}

/* The taps of the warp's chunks, which nobody writes, on their way. */
static __device__ __forceinline__ void
fetch_taps(const mixer_arguments &m, int first, int chunks, const project_memory &memory)
{
    const int vectors = CHUNK * m.taps / 4;
    for (int e = threadIdx.x % MIL_WARP; e < chunks * vectors; e += MIL_WARP) {
        const int chunk = chunk_of(m, first + e / vectors);
        if (chunk >= 0) {
            copy_16(memory.weight + e * 4, m.conv_weight + (int64_t)chunk * CHUNK * m.taps + e % vectors * 4);
        }
    }
}

/* Asks for the rows of the convolution's tail that these are likely to need, before it is known which they are. */
static __device__ __forceinline__ void
prefetch_inputs(const mixer_arguments &m, const mil_states &states, int chunks)
{
    const int lead = m.taps - 1;
    for (int e = threadIdx.x % MIL_WARP; e < m.scan.rows.sequences * lead * chunks; e += MIL_WARP) {
        const int sequence = e / (lead * chunks), row = e / chunks % lead, chunk = chunk_of(m, e % chunks);
        const int64_t at = mil_guess_before(m.scan.rows, sequence) + row;
        if (chunk >= 0) {
            mil_prefetch(states.of[sequence].conv + at * m.inputs + chunk * CHUNK);
        }
    }
}

/* The convolution's inputs of the warp's chunks, on their way. */
template <typename T>
static __device__ __forceinline__ void
fetch_inputs(const mixer_arguments &m, const mil_states &states, int first, int chunks,
             const project_memory &memory)
{
    const int lane = threadIdx.x % MIL_WARP, wide = chunks * CHUNK, lead = m.taps - 1;
    const int raw_vectors = wide / 8, tail_vectors = wide / 4;
    for (int e = lane; e < m.total * raw_vectors; e += MIL_WARP) {
        const int row = e / raw_vectors, at = e % raw_vectors * 8, chunk = chunk_of(m, first + at / CHUNK);
        if (chunk >= 0) {
            copy_16((T *)memory.raw + row * wide + at,
                    (const T *)m.raw + row * m.raw_stride + chunk * CHUNK + at % CHUNK);
        }
    }
    for (int sequence = 0; sequence < m.scan.rows.sequences; sequence++) {
        const int64_t before = mil_span_of(m.scan.rows, sequence).before;
        const float *tail = states.of[sequence].conv + before * m.inputs;
        for (int e = lane; e < lead * tail_vectors; e += MIL_WARP) {
            const int row = e / tail_vectors, at = e % tail_vectors * 4;
            const int chunk = chunk_of(m, first + at / CHUNK);
            if (chunk >= 0) {
                copy_16(memory.tail + (sequence * lead + row) * wide + at,
                        tail + (int64_t)row * m.inputs + chunk * CHUNK + at % CHUNK);
            }
        }
    }
}

/* The convolution of a lane's channel of chunk `i` for all rows. */
template <typename T>
static __device__ __forceinline__ void
convolve_chunk(const mixer_arguments &m, int i, int chunks, float bias, const project_memory &memory)
{
    const int at = i * CHUNK + threadIdx.x % MIL_WARP, wide = chunks * CHUNK, lead = m.taps - 1;
    float weight[MOST_TAPS], window[MOST_TAPS];
#pragma unroll
    for (int j = 0; j < MOST_TAPS; j++) {
        weight[j] = j < m.taps ? memory.weight[at * m.taps + j] : 0.0f;
    }
    for (int sequence = 0; sequence < m.scan.rows.sequences; sequence++) {
#pragma unroll
        for (int j = 0; j < MOST_TAPS; j++) {
            window[j] = j < lead ? memory.tail[(sequence * lead + j) * wide + at] : 0.0f;
        }
        for (int row = m.begin[sequence]; row < m.begin[sequence + 1]; row++) {
            const float fresh = mil_float(((const T *)memory.raw)[row * wide + at]);
#pragma unroll
            for (int j = 0; j < MOST_TAPS; j++) {
                window[j] = j == lead ? fresh : window[j];
            }
            const float y = mil_convolve<T, MOST_TAPS>(weight, window, bias, m.taps, true);
            ((T *)memory.x)[row * (wide + 8) + at] = mil_round<T>(y);
#pragma unroll
            for (int j = 0; j + 1 < MOST_TAPS; j++) {
                window[j] = window[j + 1];
            }
        }
    }
}

/* Grid: tiles of OUTPUTS, SLICES. GROUPS of 8 rows. */
template <typename T, int GROUPS>
static __global__ void
__launch_bounds__(THREADS)
    mixer_project_kernel(const __grid_constant__ mixer_arguments m, const __grid_constant__ mil_states states)
{
    extern __shared__ __align__(16) char shared[];
    __shared__ float sums[WARPS][OUTPUTS][GROUPS * 8];
    const int warp = threadIdx.x / MIL_WARP, lane = threadIdx.x % MIL_WARP, g = lane / 4, t = lane % 4;
    const int first_output = blockIdx.x * OUTPUTS, inner = m.scan.inner;
    const int a_slice = (inner / CHUNK + SLICES - 1) / SLICES, a_warp = (a_slice + WARPS - 1) / WARPS;
    const int at_once = min(a_warp, MOST_CHUNKS);
    const size_t bytes = cut_project_memory(NULL, at_once, m.total, m.scan.rows.sequences, m.taps).bytes;
    const project_memory memory =
        cut_project_memory(shared + warp * bytes, at_once, m.total, m.scan.rows.sequences, m.taps);
    const T *low = (const T *)m.x_weight + (int64_t)min(first_output + g, m.x_width - 1) * inner + 8 * t;
    const T *high = (const T *)m.x_weight + (int64_t)min(first_output + g + 8, m.x_width - 1) * inner + 8 * t;
    float c[GROUPS][4] = {};
    for (int first = 0; first < a_warp; first += MOST_CHUNKS) {
        uint4 wl[MOST_CHUNKS], wh[MOST_CHUNKS];
        float bias[MOST_CHUNKS];
#pragma unroll
        for (int i = 0; i < MOST_CHUNKS; i++) {
            const int chunk = chunk_of(m, first + i);
            if (chunk >= 0) {
                wl[i] = load_weight(low + chunk * CHUNK);
                wh[i] = load_weight(high + chunk * CHUNK);
                bias[i] = m.conv_bias == NULL ? 0.0f : m.conv_bias[chunk * CHUNK + lane];
            }
        }
        fetch_taps(m, first, at_once, memory);
        if (first == 0) {
            mil_trigger();
            prefetch_inputs(m, states, at_once);
            mil_wait();
        }
        fetch_inputs<T>(m, states, first, at_once, memory);
        if (first == 0 &&
            warp == 0) { /* not earlier: behind all of it, what the scan asks for now would be late */
            mil_fetch_ahead(m.next, m.next_bytes);
        }
        await_copies();
        __syncwarp();
#pragma unroll
        for (int i = 0; i < MOST_CHUNKS; i++) {
            if (chunk_of(m, first + i) >= 0) {
                convolve_chunk<T>(m, i, at_once, bias[i], memory);
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < MOST_CHUNKS; i++) {
            if (chunk_of(m, first + i) < 0) {
                continue;
            }
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                const int row = group * 8 + g;
                const T *x = (const T *)memory.x + row * (at_once * CHUNK + 8) + i * CHUNK + 8 * t;
                const uint4 v = row < m.total ? *(const uint4 *)x : make_uint4(0, 0, 0, 0);
                multiply(c[group], wl[i].x, wh[i].x, wl[i].y, wh[i].y, v.x, v.y, T());
                multiply(c[group], wl[i].z, wh[i].z, wl[i].w, wh[i].w, v.z, v.w, T());
            }
        }
        __syncwarp();
    }
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        const int row = group * 8 + 2 * t;
        sums[warp][g][row] = c[group][0];
        sums[warp][g][row + 1] = c[group][1];
        sums[warp][g + 8][row] = c[group][2];
        sums[warp][g + 8][row + 1] = c[group][3];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < OUTPUTS * m.total; e += THREADS) {
        const int out = e % OUTPUTS, row = e / OUTPUTS;
        if (first_output + out < m.x_width) {
            float sum = (sums[0][out][row] + sums[1][out][row]) + (sums[2][out][row] + sums[3][out][row]);
            m.partial[((int64_t)blockIdx.y * m.total + row) * m.x_width + first_output + out] = sum;
        }
    }
}

/* ---- the scan ----------------------------------------------------------------------------------------------------- */

/* What a block of the scan keeps in shared memory. */
struct mixer_memory {
    float *tail_x, *tail_dt; /* [MIL_TAIL, COLUMNS] */
    float *tail_B;           /* [MIL_TAIL, B_width] */
    float *x, *dt;           /* [ROWS, COLUMNS] of this call */
    float *B, *C;            /* [ROWS, width] */
    float *sums;             /* [ROWS, WARPS, COLUMNS] of C . H */
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
    s.x = take(ROWS * COLUMNS);
    s.dt = take(ROWS * COLUMNS);
    s.B = take(ROWS * m.scan.B_width);
    s.C = take(ROWS * m.scan.C_width);
    s.sums = take(ROWS * WARPS * COLUMNS);
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
    const int B_columns = a.B_groups * a.state_dim, wide = a.B_width / V;
    for (int e = threadIdx.x; e < before * QUADS; e += THREADS) {
        const int token = e / QUADS, at = e % QUADS * V;
        copy_16(s.tail_x + token * COLUMNS + at, tails.x + (int64_t)token * a.inner + p.channel + at);
        copy_16(s.tail_dt + token * COLUMNS + at, tails.dt + (int64_t)token * a.inner + p.channel + at);
    }
    for (int e = threadIdx.x; e < before * wide; e += THREADS) {
        const int token = e / wide, at = e % wide * V;
        if (p.B_at + at < B_columns) {
            copy_16(s.tail_B + token * a.B_width + at, tails.B + (int64_t)token * B_columns + p.B_at + at);
        }
    }
}

/* Token `s` of a stretch: H moves on; B is the stretch's. */
template <int J>
static __device__ __forceinline__ void
take_token(const scan_arguments &a, const float *x, const float *dt, const float *B, int token, int B_own,
           const float (&exponent)[J][V], float (&H)[J][V])
{
    const int column = threadIdx.x % QUADS * V, lane_n = threadIdx.x / QUADS;
    float dt_own[V], input[V], B_of[J];
    mil_load<V>(dt + token * COLUMNS + column, dt_own);
    mil_load<V>(x + token * COLUMNS + column, input);
#pragma unroll
    for (int v = 0; v < V; v++) {
        input[v] *= dt_own[v];
    }
#pragma unroll
    for (int j = 0; j < J; j++) {
        const int n = lane_n + j * LANES_N;
        B_of[j] = n < a.state_dim ? B[token * a.B_width + B_own + n] : 0.0f;
    }
    step<V, J>(dt_own, input, exponent, B_of, H);
}

/* Rows of [low | B | C]: sums of the partial sums, rounded as the product's output would be. */
template <typename T>
static __device__ __forceinline__ void
add_slices(const mixer_arguments &m, const mil_span &span, int thread, const mixer_memory &s)
{
    const int vectors = m.x_width / V;
    for (int e = thread; e < (int)span.count * vectors; e += THREADS) {
        const int row = e / vectors, at = e % vectors * V;
        const float *from = m.partial + (span.row + row) * m.x_width + at;
        float4 part[SLICES];
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            part[slice] = *(const float4 *)(from + (int64_t)slice * m.total * m.x_width);
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
static __device__ __forceinline__ void
norm_parts(const mixer_arguments &m, const mil_span &span, int thread, const mixer_memory &s)
{
    for (int e = thread / MIL_WARP; e < (int)span.count * m.normed; e += WARPS) {
        const int row = e / m.normed, part = e % m.normed;
        norm_arguments n = {};
        T *at = (T *)s.low + row * s.low_stride + m.norms[part].at;
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

/* B or C of this call's rows into shared memory: columns [at, at + width) of `columns`. */
template <typename T>
static __device__ __forceinline__ void
take_columns(const T *from, int64_t stride, int at, int width, int columns, int count, int thread, float *to)
{
    for (int e = thread; e < count * width; e += THREADS) {
        const int row = e / width, column = e % width;
        if (at + column < columns) {
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

/* A channel's taps. */
struct conv_taps {
    float weight[MOST_TAPS], bias;
};

static __device__ __forceinline__ conv_taps
load_taps(const mixer_arguments &m, int channel)
{
    conv_taps w;
#pragma unroll
    for (int j = 0; j < MOST_TAPS; j++) {
        w.weight[j] = j < m.taps ? m.conv_weight[(int64_t)channel * m.taps + j] : 0.0f;
    }
    w.bias = m.conv_bias == NULL ? 0.0f : m.conv_bias[channel];
    return w;
}

/* The convolution of the block's channels, `before` tokens after the boundary: every fourth row of a thread's channel. */
template <typename T>
static __device__ __forceinline__ void
convolve_rows(const mixer_arguments &m, const mixer_place &p, int before, const mil_tails &tails, int thread,
              const conv_taps &w, const mixer_memory &s)
{
    const int column = thread % COLUMNS, lead = m.taps - 1, input = input_of(m, p.channel + column);
    const int first = m.begin[blockIdx.y], count = m.begin[blockIdx.y + 1] - first;
    const T *rows = (const T *)m.raw + first * m.raw_stride + input;
    const float *tail = tails.conv + (int64_t)(before + lead) * m.inputs + input;
#pragma unroll 2
    for (int row = thread / COLUMNS; row < count; row += WARPS) {
        float window[MOST_TAPS];
#pragma unroll
        for (int j = 0; j < MOST_TAPS; j++) {
            const int token = row - lead + j;
            window[j] = j > lead     ? 0.0f
                        : token >= 0 ? mil_float(rows[token * m.raw_stride])
                                     : tail[(int64_t)token * m.inputs];
        }
        const float y = mil_convolve<T, MOST_TAPS>(w.weight, window, w.bias, m.taps, true);
        s.x[row * COLUMNS + column] = mil_float(mil_round<T>(y));
    }
}

/* A warp's part of W_dt: tile and chain of each of its tensor products, their first weights. */
struct dt_weights {
    static constexpr int PAIRS = COLUMNS / OUTPUTS * CHAINS / WARPS;
    uint4 low[PAIRS], high[PAIRS];
};

template <typename T>
static __device__ __forceinline__ void
load_dt_weights(const mixer_arguments &m, int channel, int chain, int tile, int k, uint4 &low, uint4 &high)
{
    const int lane = threadIdx.x % MIL_WARP, at = k + lane % 4 * 8;
    const T *from = (const T *)m.dt_weight + (int64_t)(channel + tile * OUTPUTS + lane / 4) * m.rank + at;
    const bool there = at < m.rank;
    low = there ? load_weight(from) : make_uint4(0, 0, 0, 0);
    high = there ? load_weight(from + 8 * (int64_t)m.rank) : make_uint4(0, 0, 0, 0);
}

/* W_dt low in the order of thin_product.cu: chain w takes chunks w, w + 8, ... */
template <typename T, int GROUPS>
static __device__ __forceinline__ void
multiply_dt(const mixer_arguments &m, const mixer_place &p, int count, int thread, dt_weights &weights,
            const mixer_memory &s)
{
    const int warp = thread / MIL_WARP, lane = thread % MIL_WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < dt_weights::PAIRS; i++) {
        const int tile = (warp * dt_weights::PAIRS + i) / CHAINS,
                  chain = (warp * dt_weights::PAIRS + i) % CHAINS;
        float c[GROUPS][4] = {};
        for (int k = chain * CHUNK; k < m.rank; k += CHAINS * CHUNK) {
            if (k >= CHAINS * CHUNK) {
                load_dt_weights<T>(m, p.channel, chain, tile, k, weights.low[i], weights.high[i]);
            }
            const uint4 l = weights.low[i], h = weights.high[i];
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                const int row = group * 8 + g, at = k + 8 * t;
                const bool real = row < count && at < m.rank;
                const uint4 v = real ? *(const uint4 *)((const T *)s.low + row * s.low_stride + at)
                                     : make_uint4(0, 0, 0, 0);
                multiply(c[group], l.x, h.x, l.y, h.y, v.x, v.y, T());
                multiply(c[group], l.z, h.z, l.w, h.w, v.z, v.w, T());
            }
        }
        float *to = s.chains + (chain * COLUMNS + tile * OUTPUTS) * 8 * GROUPS;
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const int row = group * 8 + 2 * t;
            to[g * 8 * GROUPS + row] = c[group][0];
            to[g * 8 * GROUPS + row + 1] = c[group][1];
            to[(g + 8) * 8 * GROUPS + row] = c[group][2];
            to[(g + 8) * 8 * GROUPS + row + 1] = c[group][3];
        }
    }
}

/* dt after bias, softplus and clamp. */
template <typename T, int GROUPS>
static __device__ __forceinline__ void
finish_dt(const mixer_arguments &m, const mixer_place &p, const mil_span &span, int thread, float bias,
          const mixer_memory &s)
{
    const scan_arguments &a = m.scan;
    const int column = thread % COLUMNS;
    for (int row = thread / COLUMNS; row < (int)span.count; row += WARPS) {
        float value;
        if (m.dt_weight != NULL) {
            value = 0.0f;
#pragma unroll
            for (int chain = 0; chain < CHAINS; chain++) {
                value += s.chains[(chain * COLUMNS + column) * 8 * GROUPS + row];
            }
            value = mil_float(mil_round<T>(value));
        }
        else {
            value = mil_float(((const T *)a.dt)[(span.row + row) * a.dt_stride + p.channel + column]);
        }
        s.dt[row * COLUMNS + column] = mil_time_step(value + bias, a.dt_min, a.dt_max);
    }
}

/* The second four warps, from the kernel before's results to x, dt, B and C of this call's rows. */
template <typename T, int GROUPS>
static __device__ __forceinline__ void
prepare_rows(const mixer_arguments &m, const mixer_place &p, int guess, const mil_span &span,
             const mil_tails &tails, dt_weights &weights, const conv_taps &taps, float bias,
             const mixer_memory &s)
{
    const scan_arguments &a = m.scan;
    const int thread = threadIdx.x - THREADS, count = (int)span.count;
    const int B_columns = a.B_groups * a.state_dim, C_columns = a.C_groups * a.state_dim;
    if (m.x_weight != NULL) {
        add_slices<T>(m, span, thread, s);
    }
    else {
        const int vectors = m.dt_weight != NULL ? m.rank / 8 : 0;
        for (int e = thread; e < count * vectors; e += THREADS) {
            const int row = e / vectors, at = e % vectors * 8;
            copy_16((T *)s.low + row * s.low_stride + at,
                    (const T *)m.low + (span.row + row) * m.low_stride + at);
        }
        take_columns<T>((const T *)a.B + span.row * a.B_stride, a.B_stride, p.B_at, a.B_width, B_columns,
                        count, thread, s.B);
        take_columns<T>((const T *)a.C + span.row * a.C_stride, a.C_stride, p.C_at, a.C_width, C_columns,
                        count, thread, s.C);
    }
    convolve_rows<T>(m, p, guess, tails, thread, taps, s);
    if (span.before != guess) {
        convolve_rows<T>(m, p, span.before, tails, thread, taps, s);
    }
    await_copies();
    meet(1);
    if (m.normed > 0) {
        norm_parts<T>(m, span, thread, s);
        meet(1);
    }
    if (m.x_weight != NULL) {
        take_columns<T>((const T *)s.low + m.B_at, s.low_stride, p.B_at, a.B_width, B_columns, count, thread,
                        s.B);
        take_columns<T>((const T *)s.low + m.C_at, s.low_stride, p.C_at, a.C_width, C_columns, count, thread,
                        s.C);
    }
    if (m.dt_weight != NULL) {
        multiply_dt<T, GROUPS>(m, p, count, thread, weights, s);
        meet(1);
    }
    finish_dt<T, GROUPS>(m, p, span, thread, bias, s);
}

/* This call's rows of `columns` of the convolution's inputs into its tail. */
template <typename T>
static __device__ __forceinline__ void
append_inputs(const mixer_arguments &m, const mil_span &span, const mil_tails &tails, int input, int columns,
              int base)
{
    for (int e = threadIdx.x; e < (int)span.count * columns; e += BLOCK) {
        const int row = e / columns, at = input + e % columns;
        tails.conv[(int64_t)(base + m.taps - 1 + row) * m.inputs + at] =
            mil_float(((const T *)m.raw)[(span.row + row) * m.raw_stride + at]);
    }
}

/* One group's columns of B: what the tail keeps, where it is folded, and this call's rows. */
static __device__ __forceinline__ void
write_B(const scan_arguments &a, const mixer_place &p, const mil_span &span, const mil_tails &tails,
        int group, int shift, const mixer_memory &s)
{
    const int64_t B_columns = (int64_t)a.B_groups * a.state_dim;
    const int at = group * a.state_dim - p.B_at, kept = shift > 0 ? span.before - shift : 0;
    const int base = span.before - shift;
    for (int e = threadIdx.x; e < (kept + (int)span.count) * a.state_dim; e += BLOCK) {
        const int row = e / a.state_dim, n = e % a.state_dim;
        const float *from =
            row < kept ? s.tail_B + (shift + row) * a.B_width : s.B + (row - kept) * a.B_width;
        tails.B[(row < kept ? row : base + row - kept) * B_columns + group * a.state_dim + n] = from[at + n];
    }
}

/* Tails where nothing is folded: rows of this call behind those that are there, each by one block. */
template <typename T>
static __device__ __forceinline__ void
append_tails(const mixer_arguments &m, const mixer_place &p, const mil_span &span, const mil_tails &tails,
             const mixer_memory &s)
{
    const scan_arguments &a = m.scan;
    const int B_run = a.inner / a.B_groups;
    for (int e = threadIdx.x; e < (int)span.count * COLUMNS; e += BLOCK) {
        const int row = e / COLUMNS, column = e % COLUMNS, c = p.channel + column;
        const int64_t at = (int64_t)(span.before + row) * a.inner + c;
        tails.x[at] = s.x[e];
        tails.dt[at] = s.dt[e];
        if (m.repeat == 1 || c / m.repeat_group % m.repeat == 0) {
            const int input = input_of(m, c);
            tails.conv[(int64_t)(span.before + m.taps - 1 + row) * m.inputs + input] =
                mil_float(((const T *)m.raw)[(span.row + row) * m.raw_stride + input]);
        }
    }
    for (int group = p.channel / B_run; group * B_run < p.channel + COLUMNS; group++) {
        if (group * B_run >= p.channel) {
            write_B(a, p, span, tails, group, 0, s);
        }
    }
}

/* Tails where a window is folded: `shift` rows go, and what is left moves to the beginning. */
template <typename T>
static __device__ __forceinline__ void
fold_tails(const mixer_arguments &m, const mixer_place &p, const mil_span &span, const mil_tails &tails,
           int shift, const mixer_memory &s)
{
    const scan_arguments &a = m.scan;
    const int B_run = a.inner / a.B_groups, input_run = m.repeat > 1 ? m.repeat * m.repeat_group : 1;
    const int kept = span.before - shift, lead = m.taps - 1;
    const int B_group = p.channel / B_run, run = p.channel / input_run;
    const int64_t B_columns = (int64_t)a.B_groups * a.state_dim;
    const mil_slots slots = {{mil_slot(tails.B, B_columns, (int64_t)B_group * a.state_dim),
                              mil_slot(tails.x, a.inner, (int64_t)run * input_run), NULL},
                             {B_run > COLUMNS ? (unsigned)(B_run / COLUMNS) : 1u,
                              input_run > COLUMNS ? (unsigned)(input_run / COLUMNS) : 1u, 0u}};
    const unsigned last = mil_last_of(slots);
    for (int e = threadIdx.x; e < (kept + (int)span.count) * COLUMNS; e += BLOCK) {
        const int row = e / COLUMNS, column = e % COLUMNS;
        const int64_t at = (int64_t)row * a.inner + p.channel + column;
        const int from = row < kept ? (shift + row) * COLUMNS + column : (row - kept) * COLUMNS + column;
        tails.x[at] = row < kept ? s.tail_x[from] : s.x[from];
        tails.dt[at] = row < kept ? s.tail_dt[from] : s.dt[from];
    }
    if (last & 1) {
        for (int group = B_group; group * B_run < p.channel + COLUMNS; group++) {
            write_B(a, p, span, tails, group, shift, s);
        }
    }
    if (last & 2) {
        const int columns = max(input_run, COLUMNS) / m.repeat, input = input_of(m, run * input_run);
        mil_tail_shift<BLOCK>(tails.conv + input, m.inputs, columns, shift, lead + kept);
        append_inputs<T>(m, span, tails, input, columns, kept);
    }
}

/* y of all rows; D and z are those of the thread's column and rows. */
template <typename T>
static __device__ __forceinline__ void
finish_rows(const scan_arguments &a, const mixer_place &p, const mil_span &span, float D, const float (&z)[2],
            const mixer_memory &s)
{
    const int column = threadIdx.x % COLUMNS;
#pragma unroll
    for (int k = 0; k < ROWS / (BLOCK / COLUMNS); k++) {
        const int row = threadIdx.x / COLUMNS + k * (BLOCK / COLUMNS);
        if (row < (int)span.count) {
            const float *sums = s.sums + row * WARPS * COLUMNS + column;
            float y = (sums[0] + sums[COLUMNS]) + (sums[2 * COLUMNS] + sums[3 * COLUMNS]);
            y = fmaf(D, s.x[row * COLUMNS + column], y);
            if (a.z != NULL) {
                y *= __fdividef(z[k], 1.0f + __expf(-z[k]));
            }
            ((T *)a.y)[(span.row + row) * a.y_stride + p.channel + column] = mil_round<T>(y);
        }
    }
}

/* Grid: blocks of COLUMNS channels, sequences. */
template <typename T, int J, int GROUPS>
static __global__ void
__launch_bounds__(BLOCK)
    mixer_scan_kernel(const __grid_constant__ mixer_arguments m, const __grid_constant__ mil_states states)
{
    extern __shared__ __align__(16) char shared[];
    const scan_arguments &a = m.scan;
    const mixer_memory s = cut_mixer_memory(m, shared, GROUPS);
    const mil_tails tails = states.of[blockIdx.y];
    const bool scans = threadIdx.x < THREADS;
    const int channel = blockIdx.x * COLUMNS, own = channel + (int)threadIdx.x % COLUMNS;
    const int B_run = a.inner / a.B_groups, C_run = a.inner / a.C_groups;
    const mixer_place p = {channel, channel / B_run * a.state_dim, channel / C_run * a.state_dim};
    const int c = channel + (int)threadIdx.x % QUADS * V, lane_n = (int)threadIdx.x / QUADS;
    const int B_own = c / B_run * a.state_dim - p.B_at, C_own = c / C_run * a.state_dim - p.C_at;
    const float D = a.D[own], bias = a.dt_bias_scale * a.dt_bias[own];
    float H[J][V], exponent[J][V];
    dt_weights weights;
    conv_taps taps;
    mil_trigger();
    if (scans) {
        if (threadIdx.x % QUADS < 2) { /* a row of 32 channels is a line */
            const float *tail = threadIdx.x % QUADS == 0 ? tails.x : tails.dt;
            mil_prefetch(tail + (int64_t)lane_n * a.inner + channel);
        }
        else if (threadIdx.x % QUADS == 2) {
            for (int n = lane_n; n < a.state_dim; n += LANES_N) {
                mil_prefetch(tails.state + (int64_t)n * a.inner + channel);
            }
        }
        load_exponent<V, J>(a, c, lane_n, exponent);
    }
    else {
        const int warp = threadIdx.x / MIL_WARP - WARPS;
        taps = load_taps(m, own);
#pragma unroll
        for (int i = 0; i < dt_weights::PAIRS && m.dt_weight != NULL; i++) {
            const int pair = warp * dt_weights::PAIRS + i;
            load_dt_weights<T>(m, channel, pair % CHAINS, pair / CHAINS, pair % CHAINS * CHUNK,
                               weights.low[i], weights.high[i]);
        }
    }
    const int sequence = blockIdx.y, guess = mil_guess_before(a.rows, sequence);
    const int first = m.begin[sequence], count = m.begin[sequence + 1] - first;
    mil_wait();
    const int64_t past = __ldcg(a.rows.past + sequence), boundary = __ldcg(a.rows.boundary + sequence);
    if (scans) {
        load_H<V, J>(a, tails.state, c, lane_n, H);
        fetch_tails(a, p, guess, tails, s);
    }
    else if (m.x_weight == NULL && threadIdx.x < THREADS + MIL_WARP) {
        mil_fetch_ahead(m.next, m.next_bytes);
    }
    float z[ROWS / (BLOCK / COLUMNS)];
#pragma unroll
    for (int k = 0; k < ROWS / (BLOCK / COLUMNS); k++) {
        const int row = (int)threadIdx.x / COLUMNS + k * (BLOCK / COLUMNS);
        z[k] =
            a.z != NULL && row < count ? mil_float(((const T *)a.z)[(first + row) * a.z_stride + own]) : 0.0f;
    }
    const mil_span span = mil_span_from(first, first + count, past, boundary);
    const int shift = (int)(span.after - span.boundary);
    if (scans) {
        await_copies();
        if (span.before != guess) {
            fetch_tails(a, p, span.before, tails, s);
            await_copies();
        }
        meet(0);
        for (int token = 0; token < span.before; token++) {
            take_token<J>(a, s.tail_x, s.tail_dt, s.tail_B, token, B_own, exponent, H);
            if (token + 1 == shift) {
                store_H<V, J>(a, H, c, lane_n, tails.state);
            }
        }
    }
    else {
        prepare_rows<T, GROUPS>(m, p, guess, span, tails, weights, taps, bias, s);
    }
    __syncthreads();
    if (scans) {
        for (int row = 0; row < count; row++) {
            take_token<J>(a, s.x, s.dt, s.B, row, B_own, exponent, H);
            float C[J];
#pragma unroll
            for (int j = 0; j < J; j++) {
                const int n = lane_n + j * LANES_N;
                C[j] = n < a.state_dim ? s.C[row * a.C_width + C_own + n] : 0.0f;
            }
            store_partial<V, J>(C, H, s.sums + row * WARPS * COLUMNS);
        }
    }
    __syncthreads();
    finish_rows<T>(a, p, span, D, z, s);
    if (shift == 0) {
        append_tails<T>(m, p, span, tails, s);
    }
    else {
        fold_tails<T>(m, p, span, tails, shift, s);
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

/* Shared memory of a block of the kernel for W_x. */
static size_t
project_bytes(const mixer_arguments &a)
{
    const int64_t chunks = mil_ceil_div(mil_ceil_div(a.scan.inner / CHUNK, SLICES), WARPS);
    return WARPS * cut_project_memory(NULL, (int)(chunks < MOST_CHUNKS ? chunks : MOST_CHUNKS), a.total,
                                      a.scan.rows.sequences, a.taps)
                       .bytes;
}

template <typename T, int GROUPS>
static mil_status
launch(mil_context *context, const mixer_arguments &a, const mil_states &states)
{
    if (a.x_weight != NULL) {
        const dim3 grid((unsigned)mil_ceil_div(a.x_width, OUTPUTS), SLICES);
        MIL_TRY(mil_launch(context, "scan mixer", mixer_project_kernel<T, GROUPS>, grid, dim3(THREADS),
                           project_bytes(a), a, states));
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
    mil_set_ahead(m->next, m->next_bytes, &a.next, &a.next_bytes);
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
            project_bytes(a) > MOST_BYTES) {
            return mil_scan_mixer_apart(context, m);
        }
    }
    if (cut_mixer_memory(a, NULL, (int)mil_ceil_div(a.total, 8)).bytes > MOST_BYTES) {
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
