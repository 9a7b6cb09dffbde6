/* Products of few rows on Hopper: weights stream through shared memory, past the ends of tiles and kernels.
 *
 * thin_product.cu keeps its loads in registers, so what a block has under way dwindles towards the end of its tile and a
 * kernel's first loads wait for a place on the multiprocessor.  That costs 2 us a kernel, 4 us where weights of 8
 * bits have to be unpacked first, and a product of a 1B model lasts only 3 to 20 us.  Here one block a multiprocessor
 * goes through its tiles in one stream:
 *
 *   warps 8 to 11    copy segments (16 outputs, 1 KB of each row) into a ring by bulk copies, as far ahead as
 *                    the ring is long, the next tiles' included; they wait for nobody but the ring. One thread of
 *                    each issues four rows, because the instruction takes a thread at a time and some 100 ns
 *   warps 0 to 7     take each a chunk w and w + 8 of a segment, in the order and with the instructions of
 *                    thin_product.cu, hence the same bits
 *
 * A block takes half of a multiprocessor: the next kernel's block stands beside it and fills its ring while this one
 * ends.  Rows of x lie in shared memory, normed there where a norm comes first (all rows at once), or are read in place
 * where they are too long.
 *
 *   segment   row 0: | chunk 0 | chunk 1 | ... | chunk 15 | 64 bytes free, so that two rows do not share banks
 *             row 1: ...
 */
#include "thin_tile.cuh"

#include <stdlib.h>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HAS_BULK_COPIES 1
#else
#define HAS_BULK_COPIES 0
#endif

#define PRODUCERS 4 /* warps */
#define RING_THREADS (THREADS + PRODUCERS * MIL_WARP)
#define SEGMENT 1024 /* bytes of a row */
#define ROW_BYTES (SEGMENT + 64)
#define STAGE_BYTES (TILE * ROW_BYTES)
#define MOST_STAGES 10
#define X_PAD 32 /* elements between rows of x, likewise */
#define BLOCK_BYTES (104 << 10)

enum x_source { X_IN_PLACE, X_COPIED, X_NORMED };

/* ---- barriers and copies ----------------------------------------------------------------------------------------- */

[[maybe_unused]] static __device__ __forceinline__ uint32_t
shared_address(const void *at)
{
    return (uint32_t)__cvta_generic_to_shared(at);
}

static __device__ __forceinline__ void
barrier_init(uint64_t *barrier, int arrivals)
{
#if HAS_BULK_COPIES
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
#endif
}

static __device__ __forceinline__ void
barrier_arrive(uint64_t *barrier)
{
#if HAS_BULK_COPIES
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

/* Arrives, and holds the phase open until so many bytes have been copied. */
static __device__ __forceinline__ void
barrier_expect(uint64_t *barrier, uint32_t bytes)
{
#if HAS_BULK_COPIES
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
#endif
}

/* Until the phase of this parity has ended; of a new barrier, that of parity 1 has. */
static __device__ __forceinline__ void
barrier_wait(uint64_t *barrier, int parity)
{
#if HAS_BULK_COPIES
    uint32_t done = 0;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (done == 0);
#endif
}

static __device__ __forceinline__ void
copy_bulk(void *to, const void *from, uint32_t bytes, uint64_t *barrier)
{
#if HAS_BULK_COPIES
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
#endif
}

/* The eight multiplying warps meet. */
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
    meet();
}

/* The bits of norm.cu: narrow rows by a warp each, wide ones by all, whose sums meet once for all rows. */
template <typename T>
static __device__ __forceinline__ void
norm_all_rows(const thin_arguments &a, T *rows, int stride, float (&partial)[MIL_THIN_ROWS][WARPS])
{
    int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP;
    float value[8], gate[8];
    if (a.in <= MIL_NORM_WIDEST_FOR_WARP) {
        for (int row = warp; row < a.rows; row += WARPS) {
            norm_group<T, 8>(a.norm, row, 0, a.norm.weight, rows + row * stride, lane, MIL_WARP,
                             [](float sum) { return mil_warp_sum(sum); });
        }
        meet();
        return;
    }
    for (int row = 0; row < a.rows; row++) {
        const T *x = (const T *)a.norm.x + row * a.norm.x_stride;
        float squares = 0.0f;
        for (int column = (int)threadIdx.x * 8; column < a.in; column += THREADS * 8) {
            load_input<T, 8>(a.norm, x, NULL, column, value, gate);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                squares = fmaf(value[i], value[i], squares);
            }
        }
        squares = mil_warp_sum(squares);
        if (lane == 0) {
            partial[row][warp] = squares;
        }
    }
    meet();
    for (int row = 0; row < a.rows; row++) {
        const T *x = (const T *)a.norm.x + row * a.norm.x_stride;
        float sum = mil_warp_sum(lane < WARPS ? partial[row][lane] : 0.0f);
        float scale = 1.0f / sqrtf(sum / (float)a.norm.group + a.norm.eps);
        for (int column = (int)threadIdx.x * 8; column < a.in; column += THREADS * 8) {
            load_input<T, 8>(a.norm, x, NULL, column, value, gate);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                value[i] *= scale;
                value[i] *= a.norm.weight[column + i];
            }
            mil_store<8>(rows + row * stride + column, value);
        }
    }
    meet();
}

/* ---- the two roles ---------------------------------------------------------------------------------------------------- */

struct ring {
    uint64_t *full, *empty; /* [stages] */
    uint8_t *memory;        /* [stages][TILE][ROW_BYTES] */
    int stages, stage, parity;

    __device__ __forceinline__ void next()
    {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/* One thread of a producer warp: its share of the rows of each segment. */
template <typename W, bool GATED>
static __device__ __forceinline__ void
produce(const thin_arguments &a, ring r, int producer)
{
    constexpr int MATRICES = GATED ? 2 : 1, ROWS = TILE / PRODUCERS;
    int64_t row_bytes = (int64_t)a.in * (int)sizeof(W);
    for (int tile = (int)blockIdx.x; tile < a.tiles; tile += (int)gridDim.x) {
        const thin_output &o = GATED ? a.outputs[0] : output_of(a, tile);
        int first = (tile - o.first_tile) * TILE + producer * ROWS;
        for (int64_t at = 0; at < row_bytes; at += SEGMENT) {
            uint32_t bytes = (uint32_t)min((int64_t)SEGMENT, row_bytes - at);
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                const char *weight = (const char *)(m == 0 ? o.weight : a.outputs[1].weight) + at;
                uint8_t *to = r.memory + r.stage * STAGE_BYTES + producer * ROWS * ROW_BYTES;
                barrier_wait(&r.empty[r.stage], r.parity ^ 1);
                barrier_expect(&r.full[r.stage], bytes * ROWS);
#pragma unroll
                for (int i = 0; i < ROWS; i++) {
                    int64_t row = min(first + i, o.out - 1);
                    copy_bulk(to + i * ROW_BYTES, weight + row * row_bytes, bytes, &r.full[r.stage]);
                }
                r.next();
            }
        }
    }
}

/* The sums of one load of each of two rows of weights (outputs g and g + 8) with x. */
template <typename T, typename W, int GROUPS>
static __device__ __forceinline__ void
multiply_load(float (&c)[GROUPS][4], uint4 l, uint4 h, const uint4 (&x)[GROUPS][sizeof(T) / sizeof(W)])
{
    if constexpr (sizeof(T) == sizeof(W)) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const uint4 &v = x[group][0];
            multiply(c[group], l.x, h.x, l.y, h.y, v.x, v.y, T());
            multiply(c[group], l.z, h.z, l.w, h.w, v.z, v.w, T());
        }
    }
    else {
        const uint32_t lows[4] = {l.x, l.y, l.z, l.w}, highs[4] = {h.x, h.y, h.z, h.w};
#pragma unroll
        for (int word = 0; word < 4; word++) {
            uint32_t a0 = mil_expand(lows[word], 0, W(), T()), a1 = mil_expand(highs[word], 0, W(), T());
            uint32_t a2 = mil_expand(lows[word], 1, W(), T()), a3 = mil_expand(highs[word], 1, W(), T());
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                const uint4 &v = x[group][word / 2];
                multiply(c[group], a0, a1, a2, a3, word % 2 ? v.z : v.x, word % 2 ? v.w : v.y, T());
            }
        }
    }
}

/* A warp's two chunks of x of the segment that begins at input `at`. */
template <typename T, typename W, int GROUPS>
static __device__ __forceinline__ void
load_x(const thin_arguments &a, const T *rows, int64_t stride, int at, int g,
       uint4 (&x)[2][GROUPS][sizeof(T) / sizeof(W)])
{
    constexpr int X_LOADS = (int)(sizeof(T) / sizeof(W));
#pragma unroll
    for (int i = 0; i < 2 * GROUPS * X_LOADS; i++) {
        int half = i / (GROUPS * X_LOADS), group = i / X_LOADS % GROUPS, part = i % X_LOADS;
        int column = at + half * WARPS * CHUNK<W>, row = group * 8 + g;
        bool real = column < a.in && row < a.rows;
        x[half][group][part] =
            real ? *(const uint4 *)(rows + row * stride + column + part * 8) : make_uint4(0, 0, 0, 0);
    }
}

/* Warps 0 to 7. */
template <typename T, typename W, int GROUPS, bool GATED>
static __device__ __forceinline__ void
consume(const thin_arguments &a, ring r, const T *rows, int64_t stride,
        float (&partial)[2][GATED ? 2 : 1][WARPS][TILE][GROUPS * 8])
{
    constexpr int MATRICES = GATED ? 2 : 1, INPUTS = SEGMENT / (int)sizeof(W);
    int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP, g = lane / 4, t = lane % 4;
    int buffer = 0;
    for (int tile = (int)blockIdx.x; tile < a.tiles; tile += (int)gridDim.x) {
        const thin_output &o = GATED ? a.outputs[0] : output_of(a, tile);
        float c[MATRICES][GROUPS][4];
#pragma unroll
        for (int i = 0; i < MATRICES * GROUPS * 4; i++) {
            c[i / (GROUPS * 4)][i / 4 % GROUPS][i % 4] = 0.0f;
        }
        for (int segment = 0; segment < a.in; segment += INPUTS) {
            int at = segment + warp * CHUNK<W> + t * PER_LOAD<W>;
            uint4 x[2][GROUPS][sizeof(T) / sizeof(W)];
            load_x<T, W>(a, rows, stride, at, g, x);
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                barrier_wait(&r.full[r.stage], r.parity);
                const uint8_t *from = r.memory + r.stage * STAGE_BYTES + g * ROW_BYTES + warp * 64 + t * 16;
                uint4 w[2][2];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    /* Beyond the row's end lies what was there before. */
                    bool real = at + half * WARPS * CHUNK<W> < a.in;
                    const uint4 zero = make_uint4(0, 0, 0, 0);
                    w[half][0] = real ? *(const uint4 *)(from + half * WARPS * 64) : zero;
                    w[half][1] = real ? *(const uint4 *)(from + half * WARPS * 64 + 8 * ROW_BYTES) : zero;
                }
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(&r.empty[r.stage]);
                }
                r.next();
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    multiply_load<T, W, GROUPS>(c[m], w[half][0], w[half][1], x[half]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < MATRICES * GROUPS; i++) {
            int m = i / GROUPS, group = i % GROUPS, row = group * 8 + 2 * t;
            partial[buffer][m][warp][g][row] = c[m][group][0];
            partial[buffer][m][warp][g][row + 1] = c[m][group][1];
            partial[buffer][m][warp][g + 8][row] = c[m][group][2];
            partial[buffer][m][warp][g + 8][row + 1] = c[m][group][3];
        }
        meet(); /* once a tile: who still reads a buffer has not come to the next meeting */
        int first = (tile - o.first_tile) * TILE;
        if constexpr (GATED) {
            write_gated<T>(a, first, partial[buffer][0], partial[buffer][1]);
        }
        else {
            write_tile<T>(a, o, first, partial[buffer][0]);
        }
        buffer ^= 1;
    }
}

template <typename T, typename W, int GROUPS, x_source X, bool GATED>
static __global__ void
__launch_bounds__(RING_THREADS, 2) ring_kernel(const __grid_constant__ thin_arguments a, int stages)
{
    __shared__ float partial[2][GATED ? 2 : 1][WARPS][TILE][GROUPS * 8];
    __shared__ uint64_t full[MOST_STAGES], empty[MOST_STAGES];
    extern __shared__ __align__(128) uint8_t memory[]; /* the ring, then rows of x */
    if (threadIdx.x < (unsigned)stages) {
        barrier_init(&full[threadIdx.x], PRODUCERS);
        barrier_init(&empty[threadIdx.x], WARPS);
    }
#if HAS_BULK_COPIES
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); /* copies see the barriers */
#endif
    __syncthreads();
    mil_trigger();
    ring r = {full, empty, memory, stages, 0, 0};
    if (threadIdx.x >= THREADS) {
        if (threadIdx.x % MIL_WARP == 0) { /* weights, which nobody writes */
            produce<W, GATED>(a, r, ((int)threadIdx.x - THREADS) / MIL_WARP);
        }
        return;
    }
    mil_wait();
    T *rows = (T *)(memory + stages * STAGE_BYTES);
    if constexpr (X == X_NORMED) {
        norm_all_rows<T>(a, rows, a.in + X_PAD, *(float (*)[MIL_THIN_ROWS][WARPS]) & partial);
    }
    if constexpr (X == X_COPIED) {
        copy_rows<T>(a, rows, a.in + X_PAD);
    }
    if constexpr (X == X_IN_PLACE) {
        consume<T, W, GROUPS, GATED>(a, r, (const T *)a.x, a.x_stride, partial);
    }
    else {
        consume<T, W, GROUPS, GATED>(a, r, rows, a.in + X_PAD, partial);
    }
}

/* ---- launches ------------------------------------------------------------------------------------------------------------ */

static int
experiment(const char *name, int usual)
{
    const char *word = getenv(name);
    return word == NULL ? usual : atoi(word);
}

template <typename T, typename W, x_source X, bool GATED>
static mil_status
launch_rows(mil_context *context, const thin_arguments &a, int blocks, int stages, size_t shared)
{
    auto kernel = a.rows <= 8 ? ring_kernel<T, W, 1, X, GATED> : ring_kernel<T, W, 2, X, GATED>;
    return mil_launch(context, "thin product", kernel, dim3((unsigned)blocks), dim3(RING_THREADS), shared, a,
                      stages);
}

template <typename T, x_source X, bool GATED>
static mil_status
launch_weights(mil_context *context, mil_dtype weights, const thin_arguments &a, int blocks, int stages,
               size_t shared)
{
    return weights == MIL_F8   ? launch_rows<T, mil_f8, X, GATED>(context, a, blocks, stages, shared)
           : weights == MIL_I8 ? launch_rows<T, mil_i8, X, GATED>(context, a, blocks, stages, shared)
                               : launch_rows<T, T, X, GATED>(context, a, blocks, stages, shared);
}

template <x_source X, bool GATED>
static mil_status
launch(mil_context *context, mil_dtype weights, const thin_arguments &a, int blocks, int stages,
       size_t shared)
{
    return context->ops->activation_dtype == MIL_BF16
               ? launch_weights<__nv_bfloat16, X, GATED>(context, weights, a, blocks, stages, shared)
               : launch_weights<__half, X, GATED>(context, weights, a, blocks, stages, shared);
}

mil_status
mil_thin_ring(mil_context *context, mil_dtype weights, const thin_arguments &a, bool normed, bool gated,
              bool *done)
{
    static int on = experiment("MIL_RING", 0), per = experiment("MIL_RING_PER", 1);
    static int most = experiment("MIL_RING_KB", BLOCK_BYTES >> 10) << 10;
    static int longest = experiment("MIL_RING_ROW", 1 << 20), rows = experiment("MIL_RING_ROWS", 16);
    int major = 0, multiprocessors = 0;
    *done = false;
    MIL_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, context->ops->device));
    MIL_CUDA_TRY(
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, context->ops->device));
    if (!on || major < 9 || a.rows > rows || a.in * (int64_t)mil_dtype_size(weights) > longest) {
        return MIL_OK;
    }
    size_t x_bytes = (size_t)a.rows * (size_t)(a.in + X_PAD) * 2;
    size_t fixed = (size_t)(gated ? 2 : 1) * 2 * WARPS * TILE * (a.rows <= 8 ? 8 : 16) * sizeof(float) + 1024;
    bool fits = fixed + x_bytes + 3 * STAGE_BYTES <= (size_t)most;
    if ((normed && !fits) || fixed + 2 * STAGE_BYTES > (size_t)most) {
        return MIL_OK;
    }
    size_t left = (size_t)most - fixed - (fits ? x_bytes : 0);
    int stages = (int)(left / STAGE_BYTES < MOST_STAGES ? left / STAGE_BYTES : MOST_STAGES);
    size_t shared = (size_t)stages * STAGE_BYTES + (fits ? x_bytes : 0);
    int blocks = a.tiles < per * multiprocessors ? a.tiles : per * multiprocessors;
    *done = true;
    if (gated) {
        return normed ? launch<X_NORMED, true>(context, weights, a, blocks, stages, shared)
               : fits ? launch<X_COPIED, true>(context, weights, a, blocks, stages, shared)
                      : launch<X_IN_PLACE, true>(context, weights, a, blocks, stages, shared);
    }
    return normed ? launch<X_NORMED, false>(context, weights, a, blocks, stages, shared)
           : fits ? launch<X_COPIED, false>(context, weights, a, blocks, stages, shared)
                  : launch<X_IN_PLACE, false>(context, weights, a, blocks, stages, shared);
}
