/* Products of one or two rows with rows of weights of 2 to 4 KB: on Hopper they stream through shared memory.
 *
 * thin_product.cu keeps its loads in registers, so what a block has under way dwindles towards the end of its tile.  A
 * tile whose rows have 4 KB (a 1B model's bfloat16, an 8B model's 8 bits) ends after two rounds of loads, and a
 * kernel lasts only 3 to 20 us.  Here blocks go through their tiles in one stream:
 *
 *   warp 8           copies segments (16 outputs, 1 KB of each row) into a ring by bulk copies, as far ahead as
 *                    the ring is long, the next tiles' included; it waits for nobody but the ring
 *   warps 0 to 7     take each a chunk w and w + 8 of a segment, in the order and with the instructions of
 *                    thin_product.cu, hence the same bits
 *
 * Rows of x lie in shared memory, normed there where a norm comes first.  Other lengths, more rows of x and products
 * without a tile for each multiprocessor are faster the other way (figures: docs/performance-log.md).
 *
 *   segment   row 0: | chunk 0 | chunk 1 | ... | chunk 15 | 64 bytes free, so that two rows do not share banks
 *             row 1: ...
 */
#include "thin_tile.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HAS_BULK_COPIES 1
#else
#define HAS_BULK_COPIES 0
#endif

#define RING_THREADS (THREADS + MIL_WARP)
#define SEGMENT 1024 /* bytes of a row */
#define ROW_BYTES (SEGMENT + 64)
#define STAGE_BYTES (TILE * ROW_BYTES)
#define MOST_STAGES 6
#define X_PAD 32                /* elements between rows of x, likewise */
#define BLOCKS_EACH 2           /* of a multiprocessor */
#define BLOCK_BYTES (104 << 10) /* of its shared memory */
#define MOST_ROWS 2
#define SHORTER_ROW_BYTES 2048 /* rows of weights are longer than this, */
#define MOST_ROW_BYTES 4096    /* and at most this */

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
norm_all_rows(const thin_arguments &a, T *rows, int stride, float (&partial)[MOST_ROWS][WARPS])
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

/* Warp 8: lane l copies row l of each segment. */
template <typename W, bool GATED>
static __device__ __forceinline__ void
produce(const thin_arguments &a, ring r, int lane)
{
    constexpr int MATRICES = GATED ? 2 : 1;
    int64_t row_bytes = (int64_t)a.in * (int)sizeof(W);
    for (int tile = (int)blockIdx.x; tile < a.tiles; tile += (int)gridDim.x) {
        const thin_output &o = GATED ? a.outputs[0] : output_of(a, tile);
        int64_t row = min((tile - o.first_tile) * TILE + lane % TILE, o.out - 1);
        for (int64_t at = 0; at < row_bytes; at += SEGMENT) {
            uint32_t bytes = (uint32_t)min((int64_t)SEGMENT, row_bytes - at);
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                const char *weight = (const char *)(m == 0 ? o.weight : a.outputs[1].weight);
                barrier_wait(&r.empty[r.stage], r.parity ^ 1);
                if (lane == 0) {
                    barrier_expect(&r.full[r.stage], bytes * TILE);
                }
                __syncwarp();
                if (lane < TILE) {
                    copy_bulk(r.memory + r.stage * STAGE_BYTES + lane * ROW_BYTES,
                              weight + row * row_bytes + at, bytes, &r.full[r.stage]);
                }
                r.next();
            }
        }
    }
}

/* The sums of one load of each of two rows of weights (outputs g and g + 8) with x. */
template <typename T, typename W>
static __device__ __forceinline__ void
multiply_load(float (&c)[4], uint4 l, uint4 h, const uint4 (&x)[sizeof(T) / sizeof(W)])
{
    if constexpr (sizeof(T) == sizeof(W)) {
        mil_multiply_add<T>(c, l.x, h.x, l.y, h.y, x[0].x, x[0].y);
        mil_multiply_add<T>(c, l.z, h.z, l.w, h.w, x[0].z, x[0].w);
    }
    else {
        const uint32_t lows[4] = {l.x, l.y, l.z, l.w}, highs[4] = {h.x, h.y, h.z, h.w};
#pragma unroll
        for (int word = 0; word < 4; word++) {
            const uint4 &v = x[word / 2];
            mil_multiply_add<T>(c, mil_expand(lows[word], 0, W(), T()), mil_expand(highs[word], 0, W(), T()),
                                mil_expand(lows[word], 1, W(), T()), mil_expand(highs[word], 1, W(), T()),
                                word % 2 ? v.z : v.x, word % 2 ? v.w : v.y);
        }
    }
}

/* Warps 0 to 7. */
template <typename T, typename W, bool GATED>
static __device__ __forceinline__ void
consume(const thin_arguments &a, ring r, const T *rows, int stride,
        float (&partial)[2][GATED ? 2 : 1][WARPS][TILE][8])
{
    constexpr int MATRICES = GATED ? 2 : 1, INPUTS = SEGMENT / (int)sizeof(W);
    constexpr int X_LOADS = (int)(sizeof(T) / sizeof(W));
    const uint4 zero = make_uint4(0, 0, 0, 0);
    int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP, g = lane / 4, t = lane % 4;
    int buffer = 0;
    for (int tile = (int)blockIdx.x; tile < a.tiles; tile += (int)gridDim.x) {
        const thin_output &o = GATED ? a.outputs[0] : output_of(a, tile);
        float c[MATRICES][4] = {};
        for (int segment = 0; segment < a.in; segment += INPUTS) {
            int at = segment + warp * CHUNK<W> + t * PER_LOAD<W>;
            uint4 x[2][X_LOADS];
#pragma unroll
            for (int i = 0; i < 2 * X_LOADS; i++) {
                int column = at + i / X_LOADS * WARPS * CHUNK<W>;
                bool real = column < a.in && g < a.rows;
                x[i / X_LOADS][i % X_LOADS] =
                    real ? *(const uint4 *)(rows + g * stride + column + i % X_LOADS * 8) : zero;
            }
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                barrier_wait(&r.full[r.stage], r.parity);
                const uint8_t *from = r.memory + r.stage * STAGE_BYTES + g * ROW_BYTES + warp * 64 + t * 16;
                uint4 w[2][2];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    bool real = at + half * WARPS * CHUNK<W> < a.in; /* beyond lies what was there before */
                    w[half][0] = real ? *(const uint4 *)(from + half * WARPS * 64) : zero;
                    w[half][1] = real ? *(const uint4 *)(from + half * WARPS * 64 + 8 * ROW_BYTES) : zero;
                }
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(&r.empty[r.stage]);
                }
                r.next();
                multiply_load<T, W>(c[m], w[0][0], w[0][1], x[0]);
                multiply_load<T, W>(c[m], w[1][0], w[1][1], x[1]);
            }
        }
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            partial[buffer][m][warp][g][2 * t] = c[m][0];
            partial[buffer][m][warp][g][2 * t + 1] = c[m][1];
            partial[buffer][m][warp][g + 8][2 * t] = c[m][2];
            partial[buffer][m][warp][g + 8][2 * t + 1] = c[m][3];
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

/* W: of the weights, T or 8 bits; NORMED: x is the norm of a.norm.x; GATED: outputs[0] is up, outputs[1] the gate, and
 * only their gated activation is written. */
template <typename T, typename W, bool NORMED, bool GATED>
static __global__ void
__launch_bounds__(RING_THREADS, BLOCKS_EACH) ring_kernel(const __grid_constant__ thin_arguments a, int stages)
{
    __shared__ float partial[2][GATED ? 2 : 1][WARPS][TILE][8];
    __shared__ uint64_t full[MOST_STAGES], empty[MOST_STAGES];
    extern __shared__ __align__(128) uint8_t memory[]; /* the ring, then rows of x */
    if (threadIdx.x < (unsigned)stages) {
        barrier_init(&full[threadIdx.x], 1);
        barrier_init(&empty[threadIdx.x], WARPS);
    }
#if HAS_BULK_COPIES
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); /* copies see the barriers */
#endif
    __syncthreads();
    mil_trigger();
    ring r = {full, empty, memory, stages, 0, 0};
    if (threadIdx.x >= THREADS) {
        produce<W, GATED>(a, r, (int)threadIdx.x % MIL_WARP); /* weights, which nobody writes */
        return;
    }
    mil_wait();
    T *rows = (T *)(memory + stages * STAGE_BYTES);
    if constexpr (NORMED) {
        norm_all_rows<T>(a, rows, a.in + X_PAD, *(float (*)[MOST_ROWS][WARPS]) & partial);
    }
    else {
        copy_rows<T>(a, rows, a.in + X_PAD);
    }
    consume<T, W, GATED>(a, r, rows, a.in + X_PAD, partial);
}

/* ---- launches ------------------------------------------------------------------------------------------------------------ */

template <typename T, bool NORMED, bool GATED>
static mil_status
launch_weights(mil_context *context, mil_dtype weights, const thin_arguments &a, dim3 grid)
{
    size_t x_bytes = (size_t)a.rows * (size_t)(a.in + X_PAD) * sizeof(T);
    size_t fixed = (GATED ? 2 : 1) * 2 * WARPS * TILE * 8 * sizeof(float) + 1024;
    size_t room = (BLOCK_BYTES - fixed - x_bytes) / STAGE_BYTES;
    int stages = room < MOST_STAGES ? (int)room : MOST_STAGES;
    auto kernel = weights == MIL_F8   ? ring_kernel<T, mil_f8, NORMED, GATED>
                  : weights == MIL_I8 ? ring_kernel<T, mil_i8, NORMED, GATED>
                                      : ring_kernel<T, T, NORMED, GATED>;
    return mil_launch(context, "thin product", kernel, grid, dim3(RING_THREADS),
                      (size_t)stages * STAGE_BYTES + x_bytes, a, stages);
}

template <bool NORMED, bool GATED>
static mil_status
launch(mil_context *context, mil_dtype weights, const thin_arguments &a, dim3 grid)
{
    return context->ops->activation_dtype == MIL_BF16
               ? launch_weights<__nv_bfloat16, NORMED, GATED>(context, weights, a, grid)
               : launch_weights<__half, NORMED, GATED>(context, weights, a, grid);
}

mil_status
mil_thin_ring(mil_context *context, mil_dtype weights, const thin_arguments &a, bool normed, bool gated,
              bool *done)
{
    int device = context->ops->device, major, multiprocessors, shared;
    int64_t row_bytes = a.in * (int64_t)mil_dtype_size(weights);
    *done = false;
    if (a.rows > MOST_ROWS || row_bytes <= SHORTER_ROW_BYTES || row_bytes > MOST_ROW_BYTES ||
        !mil_takes_new_kernels()) {
        return MIL_OK;
    }
    MIL_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    MIL_CUDA_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    MIL_CUDA_TRY(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    if (major < 9 || shared < BLOCKS_EACH * (BLOCK_BYTES + 1024) || a.tiles < multiprocessors) {
        return MIL_OK;
    }
    int most = BLOCKS_EACH * multiprocessors;
    dim3 grid((unsigned)(a.tiles < most ? a.tiles : most));
    *done = true;
    if (normed) {
        return gated ? launch<true, true>(context, weights, a, grid)
                     : launch<true, false>(context, weights, a, grid);
    }
    return gated ? launch<false, true>(context, weights, a, grid)
                 : launch<false, false>(context, weights, a, grid);
}
