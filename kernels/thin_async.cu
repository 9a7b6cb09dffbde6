/* Products of few rows: weights stream through shared memory, past the ends of tiles.
 *
 * thin_product.cu keeps its loads in registers, so what a block has under way dwindles towards the end of its tile and a
 * kernel's first loads wait for a place on the multiprocessor.  That costs 2 us a kernel, 4 us where weights of 8
 * bits have to be unpacked, too, and a product of a 1B model lasts only 3 to 20 us.  Here a block goes through several
 * tiles in one stream, and what a thread has asked for lies in shared memory:
 *
 *   every thread copies (cp.async) those 16 bytes of two rows that it will multiply itself, DEPTH chunks
 *   ahead, the next tiles' included, into places of its own; so it waits for nobody but its own copies
 *
 * Chunks, their order and the instructions are those of thin_product.cu, hence the same bits.  Rows of x lie in shared
 * memory, normed there where a norm comes first (all rows at once), or are read in place where they are too long.
 */
#include "thin_tile.cuh"

#include <stdlib.h>

#define X_PAD 32     /* elements between rows of x in shared memory, so that two rows do not share banks */
#define CHUNK_ROW 64 /* bytes of a row in a chunk */

enum x_source { X_IN_PLACE, X_COPIED, X_NORMED };

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
    __syncthreads();
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
        __syncthreads();
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
    __syncthreads();
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
    __syncthreads();
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

/* ---- the stream --------------------------------------------------------------------------------------------------------- */

/* 16 bytes into shared memory, zeros where `real` is not. */
static __device__ __forceinline__ void
copy_ahead(uint4 *to, const void *from, bool real)
{
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(real ? 16 : 0)
                 : "memory");
}

/* Where a thread's copies are: rows g and g + 8 of each matrix's tile. */
template <typename W, int MATRICES>
struct stream {
    const char *low[MATRICES], *high[MATRICES];
    int tile, at; /* input of the next chunk */

    __device__ __forceinline__ void aim(const thin_arguments &a, int g, int begin)
    {
        at = begin;
        const thin_output &o = MATRICES == 2 ? a.outputs[0] : output_of(a, tile < a.tiles ? tile : 0);
        int first = ((tile < a.tiles ? tile : 0) - o.first_tile) * TILE;
        int64_t row_bytes = (int64_t)a.in * (int)sizeof(W), offset = (int64_t)begin * (int)sizeof(W);
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            const char *weight = (const char *)(m == 0 ? o.weight : a.outputs[1].weight) + offset;
            low[m] = weight + min(first + g, o.out - 1) * row_bytes;
            high[m] = weight + min(first + g + 8, o.out - 1) * row_bytes;
        }
    }

    /* One chunk of each matrix into `places` ([2 * MATRICES][THREADS]), and on to the next. */
    __device__ __forceinline__ void fetch(const thin_arguments &a, uint4 *places, int g, int begin, int end)
    {
        bool real = tile < a.tiles && at < a.in;
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            copy_ahead(places + (2 * m) * THREADS, real ? low[m] : a.outputs[0].weight, real);
            copy_ahead(places + (2 * m + 1) * THREADS, real ? high[m] : a.outputs[0].weight, real);
            low[m] += WARPS * CHUNK_ROW;
            high[m] += WARPS * CHUNK_ROW;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        at += WARPS * CHUNK<W>;
        if (at - begin >= end) {
            tile += (int)gridDim.x;
            aim(a, g, begin);
        }
    }
};

template <typename T, typename W, int GROUPS, x_source X, bool GATED, int DEPTH>
static __global__ void
__launch_bounds__(THREADS, 3) async_kernel(const __grid_constant__ thin_arguments a)
{
    constexpr int MATRICES = GATED ? 2 : 1, X_LOADS = (int)(sizeof(T) / sizeof(W));
    __shared__ float partial[2][MATRICES][WARPS][TILE][GROUPS * 8];
    extern __shared__ uint4 memory[]; /* [DEPTH][2 * MATRICES][THREADS], then rows of x */
    int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP, g = lane / 4, t = lane % 4;
    const int begin = warp * CHUNK<W> + t * PER_LOAD<W>, step = WARPS * CHUNK<W>;
    const int end = (a.in + step - 1) / step * step; /* of a tile's chunks */

    uint4 *mine = memory + threadIdx.x;
    stream<W, MATRICES> ahead;
    ahead.tile = (int)blockIdx.x;
    ahead.aim(a, g, begin);
#pragma unroll 1
    for (int i = 0; i < DEPTH; i++) { /* weights, which nobody writes */
        ahead.fetch(a, mine + i * 2 * MATRICES * THREADS, g, begin, end);
    }
    mil_trigger();
    mil_wait();
    T *rows = (T *)(memory + DEPTH * 2 * MATRICES * THREADS);
    if constexpr (X == X_NORMED) {
        norm_all_rows<T>(a, rows, a.in + X_PAD, *(float (*)[MIL_THIN_ROWS][WARPS]) & partial);
    }
    if constexpr (X == X_COPIED) {
        copy_rows<T>(a, rows, a.in + X_PAD);
    }
    const T *x = X == X_IN_PLACE ? (const T *)a.x : rows;
    const int64_t x_stride = X == X_IN_PLACE ? a.x_stride : a.in + X_PAD;

    int place = 0, buffer = 0;
    for (int tile = (int)blockIdx.x; tile < a.tiles; tile += (int)gridDim.x) {
        float c[MATRICES][GROUPS][4];
#pragma unroll
        for (int i = 0; i < MATRICES * GROUPS * 4; i++) {
            c[i / (GROUPS * 4)][i / 4 % GROUPS][i % 4] = 0.0f;
        }
        for (int at = begin; at - begin < end; at += step) {
            uint4 xv[GROUPS][X_LOADS];
#pragma unroll
            for (int i = 0; i < GROUPS * X_LOADS; i++) {
                int row = i / X_LOADS * 8 + g, part = i % X_LOADS;
                bool real = at < a.in && row < a.rows;
                xv[i / X_LOADS][part] =
                    real ? *(const uint4 *)(x + row * x_stride + at + 8 * part) : make_uint4(0, 0, 0, 0);
            }
            asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
            uint4 *here = mine + place * 2 * MATRICES * THREADS, w[MATRICES][2];
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                w[m][0] = here[2 * m * THREADS];
                w[m][1] = here[(2 * m + 1) * THREADS];
            }
            ahead.fetch(a, here, g, begin, end);
            place = place + 1 == DEPTH ? 0 : place + 1;
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                multiply_load<T, W, GROUPS>(c[m], w[m][0], w[m][1], xv);
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
        __syncthreads(); /* once a tile: who still reads a buffer has not come to the next barrier */
        const thin_output &o = GATED ? a.outputs[0] : output_of(a, tile);
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

/* ---- launches ------------------------------------------------------------------------------------------------------------ */

static int
experiment(const char *name, int usual)
{
    const char *word = getenv(name);
    return word == NULL ? usual : atoi(word);
}

static int
depth_of()
{
    static int depth = experiment("MIL_ASYNC_DEPTH", 8);
    return depth;
}

template <typename T, typename W, x_source X, bool GATED>
static mil_status
launch_rows(mil_context *context, const thin_arguments &a, int blocks, size_t x_bytes)
{
    constexpr int MATRICES = GATED ? 2 : 1;
    int depth = depth_of() / MATRICES;
    size_t shared = x_bytes + (size_t)depth * 2 * MATRICES * THREADS * sizeof(uint4);
    auto few = depth_of() == 12  ? async_kernel<T, W, 1, X, GATED, 12 / MATRICES>
               : depth_of() == 6 ? async_kernel<T, W, 1, X, GATED, 6 / MATRICES>
                                 : async_kernel<T, W, 1, X, GATED, 8 / MATRICES>;
    auto many = depth_of() == 12  ? async_kernel<T, W, 2, X, GATED, 12 / MATRICES>
                : depth_of() == 6 ? async_kernel<T, W, 2, X, GATED, 6 / MATRICES>
                                  : async_kernel<T, W, 2, X, GATED, 8 / MATRICES>;
    return mil_launch(context, "thin product", a.rows <= 8 ? few : many, dim3((unsigned)blocks),
                      dim3(THREADS), shared, a);
}

template <typename T, x_source X, bool GATED>
static mil_status
launch_weights(mil_context *context, mil_dtype weights, const thin_arguments &a, int blocks, size_t x_bytes)
{
    return weights == MIL_F8   ? launch_rows<T, mil_f8, X, GATED>(context, a, blocks, x_bytes)
           : weights == MIL_I8 ? launch_rows<T, mil_i8, X, GATED>(context, a, blocks, x_bytes)
                               : launch_rows<T, T, X, GATED>(context, a, blocks, x_bytes);
}

template <x_source X, bool GATED>
static mil_status
launch(mil_context *context, mil_dtype weights, const thin_arguments &a, int blocks, size_t x_bytes)
{
    return context->ops->activation_dtype == MIL_BF16
               ? launch_weights<__nv_bfloat16, X, GATED>(context, weights, a, blocks, x_bytes)
               : launch_weights<__half, X, GATED>(context, weights, a, blocks, x_bytes);
}

mil_status
mil_thin_async(mil_context *context, mil_dtype weights, const thin_arguments &a, bool normed, bool gated,
               bool *done)
{
    static int on = experiment("MIL_ASYNC", 0), per = experiment("MIL_ASYNC_PER", 2);
    static int longest = experiment("MIL_ASYNC_ROW", 1 << 20), rows = experiment("MIL_ASYNC_ROWS", 16);
    static int most = experiment("MIL_ASYNC_X", 32) << 10;
    int multiprocessors = 0;
    *done = false;
    if (!on || a.rows > rows || a.in * (int64_t)mil_dtype_size(weights) > longest) {
        return MIL_OK;
    }
    MIL_CUDA_TRY(
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, context->ops->device));
    size_t x_bytes = (size_t)a.rows * (size_t)(a.in + X_PAD) * 2;
    bool fits = x_bytes <= (size_t)most;
    if (normed && !fits) {
        return MIL_OK;
    }
    int blocks = a.tiles < per * multiprocessors ? a.tiles : per * multiprocessors;
    *done = true;
    if (gated) {
        return normed ? launch<X_NORMED, true>(context, weights, a, blocks, x_bytes)
               : fits ? launch<X_COPIED, true>(context, weights, a, blocks, x_bytes)
                      : launch<X_IN_PLACE, true>(context, weights, a, blocks, 0);
    }
    return normed ? launch<X_NORMED, false>(context, weights, a, blocks, x_bytes)
           : fits ? launch<X_COPIED, false>(context, weights, a, blocks, x_bytes)
                  : launch<X_IN_PLACE, false>(context, weights, a, blocks, 0);
}
