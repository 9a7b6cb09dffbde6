/* Products with 1 to 8 rows on Hopper: every multiprocessor streams its share of the weights through shared memory.
 *
 * thin_product.cu tells how tensor cores take rows of W for a few rows of x.  This is the same arithmetic, chunk for chunk and
 * hence bit for bit; what differs is who computes what, and how weights come:
 *
 *   share     a multiprocessor has one block, and each block the same number of outputs to within one: 2,560 outputs are 19 or
 *             20 for each of 132, where tiles of 16 would give some two tiles and most one.  They are taken in groups of at
 *             most 16
 *   a warp    copies a group's rows, some KB of each at a time, into a ring by bulk copies, as far ahead as the ring is
 *             long, past the ends of groups.  Such copies take nothing of the multiprocessor's load units, so that what has
 *             come while x was not there yet is multiplied several times as fast as memory could bring it
 *   8 warps   share a row's inputs by chunks of 64 bytes: chunk 8 j + w is warp w's
 *
 *   stage     row 0: | segment of the row | 64 bytes free, so that rows do not share banks |
 *             row 1: ...
 *
 * The ring takes most of the shared memory on purpose: a second block on the same multiprocessor would be one of the next
 * kernel on some and none on others, and the shares uneven.  What has been copied leaves the second-level cache first: no token
 * reads it twice, and activations stay.  Weights of 8 bits become pairs of values in registers, on the way to the tensor cores.
 * Small matrices and short rows are faster in blocks that come and go (thin_product.cu).  Figures: docs/performance-log.md.
 */
#include "phase.cuh"
#include "thin_tile.cuh"

#define BLOCK (THREADS + MIL_WARP)
#define UNIT (WARPS * 64) /* bytes of a row in a chunk of every warp */
#define MOST_UNITS 5      /* of a segment */
#define RING_BYTES (172 << 10)
#define FEWEST_BYTES (6 << 20) /* of the weights of a launch */
#define SHORTEST_ROW 2048      /* bytes */
#define MOST_ROWS 8
#define MOST_X_BYTES (32 << 10) /* of rows of x that are copied; of normed ones half as much again */
#define MOST_STAGES 8
#define ROW_GAP 64   /* bytes between rows of a stage */
#define X_PAD 32     /* elements between rows of x, likewise */
#define NORM_STEPS 4 /* columns of a normed row are at most this many vectors a thread */

enum x_source { X_IN_PLACE, X_COPIED, X_NORMED };

struct stream_arguments {
    thin_arguments thin; /* first_tile: the first output of a product, when all stand one behind another */
    int each, more;      /* outputs (or pairs of up and gate) of a block; blocks that have one more */
    int units, stages;   /* of a segment; of the ring */
};

/* The multiplying warps meet. */
static __device__ __forceinline__ void
meet()
{
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

/* ---- rows of x ------------------------------------------------------------------------------------------------------ */

template <typename T>
static __device__ __forceinline__ void
copy_rows(const thin_arguments &a, T *rows, int stride)
{
    for (int row = 0; row < a.rows; row++) {
        for (int i = (int)threadIdx.x * 8; i < a.in; i += THREADS * 8) {
            *(uint4 *)(rows + row * stride + i) = *(const uint4 *)((const T *)a.x + row * a.x_stride + i);
        }
    }
}

/* Four weights, here and not where they are first used. */
static __device__ __forceinline__ void
load_now(const float *from, float *to)
{
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "l"(from));
}

/* A thread's columns of a normed row: narrow rows are a warp's, wide ones the block's. */
struct norm_columns {
    int first, step, end;
    float weight[NORM_STEPS][8];

    __device__ __forceinline__ norm_columns(const thin_arguments &a, bool narrow)
    {
        first = (int)threadIdx.x % (narrow ? MIL_WARP : MIL_NORM_THREADS) * 8;
        step = narrow ? MIL_WARP * 8 : MIL_NORM_THREADS * 8;
        end = a.in;
#pragma unroll
        for (int i = 0; i < NORM_STEPS; i++) {
            if (first + i * step < end) {
                load_now(a.norm.weight + first + i * step, &weight[i][0]);
                load_now(a.norm.weight + first + i * step + 4, &weight[i][4]);
            }
        }
    }
};

/* One row; the bits of norm.cu.  `partial` has WARPS floats. */
template <typename T>
static __device__ __forceinline__ void
norm_row(const norm_arguments &n, int row, const norm_columns &columns, bool narrow, T *y, float *partial)
{
    const T *x = (const T *)n.x + row * n.x_stride;
    int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP;
    mil_vector<T, 8> raw[NORM_STEPS];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < NORM_STEPS; i++) {
        int column = columns.first + i * columns.step;
        if (column < columns.end) {
            raw[i] = *(const mil_vector<T, 8> *)(x + column);
        }
    }
#pragma unroll
    for (int i = 0; i < NORM_STEPS; i++) {
        if (columns.first + i * columns.step < columns.end) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float v = mil_float(raw[i].at[j]);
                squares = fmaf(v, v, squares);
            }
        }
    }
    squares = mil_warp_sum(squares);
    if (!narrow) {
        if (lane == 0) {
            partial[warp] = squares;
        }
        meet();
        squares = mil_warp_sum(lane < WARPS ? partial[lane] : 0.0f);
    }
    float scale = 1.0f / sqrtf(squares / (float)n.group + n.eps);
#pragma unroll
    for (int i = 0; i < NORM_STEPS; i++) {
        int column = columns.first + i * columns.step;
        if (column < columns.end) {
            float value[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                value[j] = mil_float(raw[i].at[j]) * scale;
                value[j] *= columns.weight[i][j];
            }
            mil_store<8>(y + column, value);
        }
    }
}

/* One wide row by one warp: every lane plays the part of one thread of each warp of the block, so that the bits are the same. */
template <typename T>
static __device__ __forceinline__ void
norm_row_by_warp(const norm_arguments &n, int row, int in, T *y)
{
    const T *x = (const T *)n.x + row * n.x_stride;
    const int lane = (int)threadIdx.x % MIL_WARP;
    float squares[WARPS] = {}, value[8], weight[8];
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int column = (warp * MIL_WARP + lane) * 8 + i * MIL_NORM_THREADS * 8;
            if (column < in) {
                mil_load<8>(x + column, value);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    squares[warp] = fmaf(value[j], value[j], squares[warp]);
                }
            }
        }
    }
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        squares[warp] = mil_warp_sum(squares[warp]);
    }
    static_assert(WARPS == 8, "the tree of mil_warp_sum over eight sums and zeros");
    const float sum = ((squares[0] + squares[4]) + (squares[2] + squares[6])) +
                      ((squares[1] + squares[5]) + (squares[3] + squares[7]));
    const float scale = 1.0f / sqrtf(sum / (float)n.group + n.eps);
#pragma unroll 2
    for (int column = lane * 8; column < in; column += MIL_WARP * 8) {
        mil_load<8>(x + column, value);
        load_now(n.weight + column, &weight[0]);
        load_now(n.weight + column + 4, &weight[4]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            value[j] *= scale;
            value[j] *= weight[j];
        }
        mil_store<8>(y + column, value);
    }
}

/* ---- the stream ------------------------------------------------------------------------------------------------------- */

/* A block's outputs, cut into groups of `size`. */
struct share {
    int first, count, groups, size;

    __device__ __forceinline__ share(const stream_arguments &s)
    {
        const int block = (int)blockIdx.x;
        first = block * s.each + min(block, s.more);
        count = s.each + (block < s.more ? 1 : 0);
        groups = (count + TILE - 1) / TILE;
        size = (count + groups - 1) / groups;
    }

    __device__ __forceinline__ int in_group(int group) const
    {
        return min(size, count - group * size);
    }
};

struct ring {
    uint64_t *full, *empty; /* [stages] */
    uint8_t *memory;        /* [stages][TILE][row_bytes] */
    int stages, row_bytes, stage, parity;

    __device__ __forceinline__ uint8_t *row(int i) const
    {
        return memory + (stage * TILE + i) * row_bytes;
    }

    __device__ __forceinline__ void next()
    {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/* Warp 8: lane l copies row l of each group's segments. */
template <typename W, bool GATED>
static __device__ __forceinline__ void
produce(const stream_arguments &s, const share &mine, ring r, int lane)
{
    constexpr int MATRICES = GATED ? 2 : 1;
    const thin_arguments &a = s.thin;
    const int row_bytes = a.in * (int)sizeof(W), segment = s.units * UNIT;
    for (int group = 0; group < mine.groups; group++) {
        const int count = mine.in_group(group), output = mine.first + group * mine.size + lane;
        const char *from[MATRICES] = {};
        if (lane < count) {
            const thin_output &o = GATED ? a.outputs[0] : output_of(a, output);
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                const char *weight = (const char *)(m == 0 ? o.weight : a.outputs[1].weight);
                from[m] = weight + (int64_t)(output - o.first_tile) * row_bytes;
            }
        }
#pragma unroll 1
        for (int at = 0; at < row_bytes; at += segment) {
            const uint32_t bytes = (uint32_t)min(segment, row_bytes - at);
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                phase_wait(&r.empty[r.stage], r.parity ^ 1);
                if (lane == 0) {
                    phase_expect(&r.full[r.stage], bytes * (uint32_t)count);
                }
                __syncwarp();
                if (lane < count) {
                    copy_bulk<true>(r.row(lane), from[m] + at, bytes, &r.full[r.stage]);
                }
                r.next();
            }
        }
    }
}

/* The warps' partial sums of one output, in order; partial: [WARPS][TILE][rows]. */
static __device__ __forceinline__ float
add_partial(const thin_output &o, int out, const float *partial, int at, int rows)
{
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        sum += partial[warp * TILE * rows + at];
    }
    sum *= o.scale == NULL ? 1.0f : o.scale[out];
    return sum + (o.bias == NULL ? 0.0f : o.bias[out]);
}

/* What belongs to `units` of a lane's chunks, of a row of x that begins there. */
template <typename T, typename W>
static __device__ __forceinline__ void
load_inputs(const T *x, int units, uint4 (&inputs)[MOST_UNITS][1][X_LOADS<T, W>])
{
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) {
#pragma unroll
        for (int i = 0; i < X_LOADS<T, W>; i++) {
            inputs[u][0][i] = u < units ? *(const uint4 *)(x + u * (UNIT / (int)sizeof(W)) + 8 * i)
                                        : make_uint4(0, 0, 0, 0);
        }
    }
}

/* The same chunks of a stage, of which a segment may have `most`; weights beyond the row's end are what was there before. */
template <typename T, typename W>
static __device__ __forceinline__ void
consume(const uint8_t *weights, int row_bytes, int units, int most,
        const uint4 (&x)[MOST_UNITS][1][X_LOADS<T, W>], float (&c)[CHAINS<W>][1][4])
{
    const uint4 zero = make_uint4(0, 0, 0, 0);
    uint4 low[MOST_UNITS], high[MOST_UNITS];
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) {
        low[u] = u < units ? *(const uint4 *)(weights + u * UNIT) : zero;
        high[u] = u < units ? *(const uint4 *)(weights + 8 * row_bytes + u * UNIT) : zero;
    }
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) {
        if (u < most) {
            multiply_load<T, W, 1>(c, low[u], high[u], x[u]);
        }
    }
}

/* W: of the weights, T or 8 bits.  GATED: outputs[0] is up, outputs[1] the gate, and only their gated activation is written. */
template <typename T, typename W, x_source X, bool GATED>
static __global__ void
__launch_bounds__(BLOCK, 1) stream_kernel(const __grid_constant__ stream_arguments s)
{
    constexpr int MATRICES = GATED ? 2 : 1, INPUTS = UNIT / (int)sizeof(W);
    __shared__ uint64_t full[MOST_STAGES], empty[MOST_STAGES];
    extern __shared__ __align__(128) uint8_t memory[]; /* the ring, partial sums, rows of x */
    const thin_arguments &a = s.thin;
    if (threadIdx.x < (unsigned)s.stages) {
        phase_init(&full[threadIdx.x], 1);
        phase_init(&empty[threadIdx.x], WARPS);
    }
    phase_publish(); /* copies see the barriers */
    const share mine(s);
    __syncthreads();
    mil_trigger();
    ring r = {full, empty, memory, s.stages, s.units * UNIT + ROW_GAP, 0, 0};
    if (threadIdx.x >= THREADS) {
        produce<W, GATED>(s, mine, r, (int)threadIdx.x % MIL_WARP); /* weights, which nobody writes */
        return;
    }
    const int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP, g = lane / 4,
              t = lane % 4;
    float *const partials = (float *)(memory + s.stages * TILE * r.row_bytes);
    const int partial_floats = MATRICES * WARPS * TILE * a.rows; /* of one of two buffers */
    T *const rows = (T *)(partials + 2 * partial_floats);
    if constexpr (X == X_NORMED) {
        const bool narrow = a.in <= MIL_NORM_WIDEST_FOR_WARP;
        const norm_columns columns(a, narrow);
        mil_wait();
        if (narrow || a.rows == 1) {
            for (int row = narrow ? warp : 0; row < a.rows; row += narrow ? WARPS : 1) {
                norm_row<T>(a.norm, row, columns, narrow, rows + row * (a.in + X_PAD), partials);
            }
        }
        else {
            for (int row = warp; row < a.rows; row += WARPS) {
                norm_row_by_warp<T>(a.norm, row, a.in, rows + row * (a.in + X_PAD));
            }
        }
        meet();
    }
    else {
        mil_wait();
        if constexpr (X == X_COPIED) {
            copy_rows<T>(a, rows, a.in + X_PAD);
            meet();
        }
    }
    const T *const x = X == X_IN_PLACE ? (const T *)a.x : rows;
    const int64_t x_stride = X == X_IN_PLACE ? a.x_stride : a.in + X_PAD;

    for (int group = 0; group < mine.groups; group++) {
        const int count = mine.in_group(group), first = mine.first + group * mine.size;
        /* What this thread will write, so that the sum it may go to is there in time. */
        const bool writes = (int)threadIdx.x % TILE < count && (int)threadIdx.x / TILE < a.rows;
        const int column = writes ? (int)threadIdx.x % TILE : 0, row = writes ? (int)threadIdx.x / TILE : 0;
        const thin_output &o = GATED ? a.outputs[0] : output_of(a, first + column);
        const int out = first + column - o.first_tile;
        float before = 0.0f;
        if (!GATED && writes && o.accumulate) {
            before = mil_float(((const T *)o.y)[row * o.y_stride + out]);
        }
        float c[MATRICES][CHAINS<W>][1][4] = {};
#pragma unroll 1
        for (int segment = 0; segment < a.in; segment += s.units * INPUTS) {
            const int from = segment + warp * CHUNK<W> + t * PER_LOAD<W>;
            uint4 inputs[MOST_UNITS][1][X_LOADS<T, W>];
            const int units = min(s.units, (a.in - from + INPUTS - 1) / INPUTS);
            load_inputs<T, W>(x + g * x_stride + from, g < a.rows ? units : 0, inputs);
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                phase_wait(&r.full[r.stage], r.parity);
                consume<T, W>(r.row(g) + warp * 64 + t * 16, r.row_bytes, units, s.units, inputs, c[m]);
                __syncwarp();
                if (lane == 0) {
                    phase_arrive(&r.empty[r.stage]);
                }
                r.next();
            }
        }
        float *const partial = partials + group % 2 * partial_floats;
#pragma unroll
        for (int i = 0; i < MATRICES * 4; i++) {
            const int m = i / 4, j = i % 4, to = 2 * t + j % 2;
            if (to < a.rows) {
                partial[((m * WARPS + warp) * TILE + g + j / 2 * 8) * a.rows + to] =
                    add_chains<W, 1>(c[m], 0, j);
            }
        }
        meet(); /* once a group: who still reads a buffer has not come to the next meeting */
        if (writes) {
            const int at = column * a.rows + row;
            const float sum = add_partial(o, out, partial, at, a.rows);
            if constexpr (GATED) {
                const float up = mil_float(mil_round<T>(sum));
                const float gate = mil_float(mil_round<T>(
                    add_partial(a.outputs[1], out, partial + WARPS * TILE * a.rows, at, a.rows)));
                ((T *)a.gated)[row * a.gated_stride + out] =
                    mil_round<T>(mil_activate(a.activation, gate) * up);
            }
            else if (o.float_output) {
                ((float *)o.y)[row * o.y_stride + out] = sum;
            }
            else {
                ((T *)o.y)[row * o.y_stride + out] = mil_round<T>(o.accumulate ? before + sum : sum);
            }
        }
    }
}

/* ---- launches ------------------------------------------------------------------------------------------------------------ */

/* Stages of the ring, and shared memory in all. */
static size_t
size_ring(stream_arguments *s, size_t row_bytes, size_t fixed, size_t most)
{
    const int64_t units = mil_ceil_div((int64_t)row_bytes, UNIT);
    s->units = (int)mil_ceil_div(units, mil_ceil_div(units, MOST_UNITS));
    const size_t stage = (size_t)TILE * (s->units * UNIT + ROW_GAP), room = most - fixed;
    const size_t stages = (room < RING_BYTES ? room : RING_BYTES) / stage;
    s->stages = (int)(stages > MOST_STAGES ? MOST_STAGES : stages);
    return s->stages * stage + fixed;
}

template <typename T, typename W, bool GATED>
static mil_status
launch_stream(mil_context *context, stream_arguments s, bool normed, int blocks, size_t most_shared)
{
    const thin_arguments &a = s.thin;
    const size_t partial = 2 * (GATED ? 2 : 1) * WARPS * TILE * (size_t)a.rows * sizeof(float);
    const size_t x_bytes = (size_t)a.rows * (size_t)(a.in + X_PAD) * sizeof(T);
    const bool copied = normed || x_bytes <= MOST_X_BYTES;
    const size_t shared = size_ring(&s, a.in * sizeof(W), partial + (copied ? x_bytes : 0), most_shared);
    auto kernel = normed   ? stream_kernel<T, W, X_NORMED, GATED>
                  : copied ? stream_kernel<T, W, X_COPIED, GATED>
                           : stream_kernel<T, W, X_IN_PLACE, GATED>;
    return mil_launch(context, "thin product", kernel, dim3((unsigned)blocks), dim3(BLOCK), shared, s);
}

template <typename T>
static mil_status
launch(mil_context *context, mil_dtype weights, const stream_arguments &s, bool normed, bool gated,
       int blocks, size_t most_shared)
{
    auto function =
        weights == MIL_F8   ? gated ? launch_stream<T, mil_f8, true> : launch_stream<T, mil_f8, false>
        : weights == MIL_I8 ? gated ? launch_stream<T, mil_i8, true> : launch_stream<T, mil_i8, false>
        : gated             ? launch_stream<T, T, true>
                            : launch_stream<T, T, false>;
    return function(context, s, normed, blocks, most_shared);
}

/* Whether rows of x can be normed on the way. */
static bool
norm_has_room(const thin_arguments &a)
{
    const int widest = a.rows == 1 ? NORM_STEPS * MIL_NORM_THREADS * 8 : 2 * MIL_NORM_THREADS * 8;
    return a.in <= widest && (int64_t)a.rows * (a.in + X_PAD) * 2 <= MOST_X_BYTES + MOST_X_BYTES / 2;
}

mil_status
mil_thin_stream(mil_context *context, mil_dtype weights, const thin_arguments &thin, bool normed, bool gated,
                bool *done)
{
    int device = context->ops->device, major, multiprocessors, shared;
    stream_arguments s = {};
    s.thin = thin;
    int total = 0;
    for (int i = 0; i < thin.count; i++) {
        s.thin.outputs[i].first_tile = total;
        total += thin.outputs[i].out;
    }
    const int64_t row_bytes = thin.in * (int64_t)mil_dtype_size(weights);
    *done = false;
    if (thin.rows > MOST_ROWS || row_bytes < SHORTEST_ROW ||
        total * row_bytes * (gated ? 2 : 1) < FEWEST_BYTES || (normed && !norm_has_room(thin))) {
        return MIL_OK;
    }
    MIL_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    MIL_CUDA_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    MIL_CUDA_TRY(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (major < 9 || shared < (int)RING_BYTES || total < multiprocessors) {
        return MIL_OK;
    }
    s.each = total / multiprocessors;
    s.more = total % multiprocessors;
    *done = true;
    return (context->ops->activation_dtype == MIL_BF16
                ? launch<__nv_bfloat16>
                : launch<__half>)(context, weights, s, normed, gated, multiprocessors, (size_t)shared - 1024);
}
