/* Products with 1 to 16 rows: y [rows, out] (+)= x [rows, in] W^T + bias, at the speed of reading W.
 *
 * One token of an 8B model reads 16 GB of weights and multiplies each once, so only the reading counts.  16-bit
 * weights go through the tensor cores even for one row: m16n8k16 takes 16 rows of W as its A and 8 rows of x
 * as its B, so up to 8 rows cost what one costs, and a row's sum is the same bits whatever stands beside it,
 * because every column of B is reduced by itself in one order:
 *
 *   chunk of 32 inputs: thread (g, t) of a warp holds W[g][8 t .. 8 t + 7], W[g + 8][8 t ..] and x[g][8 t ..],
 *   each one 16-byte load straight from memory.  The sum over inputs does not mind their order, so those eight
 *   values serve as the fragments of two products (values 0 to 3, then 4 to 7): no shuffle, no shared memory.
 *   A warp w of the block's 8 takes chunks w, w + 8, ... in ascending order; the 8 partial sums are added in
 *   order of w.
 *
 * Weights of 8 bits (quantized.cuh) take the same way: 16 codes a load, so a chunk has 64 inputs, become four
 * fragments in registers, and the scale of an output's row multiplies the finished sum.
 *
 * A norm before the products and the gated activation after them need no kernels of their own: every block
 * norms the few rows for itself in the order of norm.cu, and a block that has summed a tile of both gate and up
 * writes only their product.  Both give the bits of the separate kernels.
 *
 * The first loads of W do not wait for the kernel before (nobody writes weights), so they are on their way
 * while it drains.  float32 weights, which only comparisons with the CPU use, take plain multiply-adds in a
 * kernel of the same shape.
 */
#include "thin_product.cuh"

#include "activate.cuh"
#include "cluster.cuh"
#include "norm.cuh"
#include "quantized.cuh"

#include <stdlib.h>

#define WARPS 8
#define THREADS (WARPS * MIL_WARP)
#define TILE 16        /* outputs of a block */
#define CHUNK_BYTES 64 /* of a row of weights: a warp's step */
#define LOADS 8        /* 16-byte loads of weights that a thread has under way */
#define NORMED_BYTES (64 << 10)
#define SPLIT 4 /* blocks that share the inputs of a tile where tiles are few */
#define FEW_TILES few_tiles()

/* Inputs in a load of 16 bytes, and in a step of a warp, which is four such loads of each row. */
template <typename W>
constexpr int PER_LOAD = 16 / (int)sizeof(W);
template <typename W>
constexpr int CHUNK = CHUNK_BYTES / (int)sizeof(W);

struct thin_output {
    const void *weight;
    const float *scale, *bias;
    void *y;
    int64_t y_stride;
    int out, first_tile;
    bool accumulate, float_output;
};

struct thin_arguments {
    int rows, in, count;
    const void *x;
    int64_t x_stride;
    norm_arguments norm; /* where x is the output of a norm */
    void *gated;         /* where the first two outputs are a gate's */
    int64_t gated_stride;
    mil_activation activation;
    bool ahead;       /* ask for the whole tile at once */
    const void *next; /* what is read after this, and how much of it a block asks for */
    int64_t next_bytes, next_total;
    thin_output outputs[MIL_THIN_PRODUCTS];
};

static __device__ __forceinline__ uint4
load_once(const void *from)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

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

/* The product that a tile belongs to. */
static __device__ __forceinline__ const thin_output &
output_of(const thin_arguments &a, int tile)
{
    int i = 0;
    while (i + 1 < a.count && tile >= a.outputs[i + 1].first_tile) {
        i++;
    }
    return a.outputs[i];
}

/* Partial sums of one output, in order. */
template <int PARTS, int ROWS>
static __device__ __forceinline__ float
add_parts(const float (&partial)[PARTS][TILE][ROWS], int column, int row)
{
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        sum += partial[part][column][row];
    }
    return sum;
}

template <int PARTS, int ROWS>
static __device__ __forceinline__ float
add_partial(const thin_output &o, int out, const float (&partial)[PARTS][TILE][ROWS], int column, int row)
{
    float sum = add_parts(partial, column, row);
    sum *= o.scale == NULL ? 1.0f : o.scale[out];
    return sum + (o.bias == NULL ? 0.0f : o.bias[out]);
}

template <typename T, int PARTS, int ROWS>
static __device__ __forceinline__ void
write_tile(const thin_arguments &a, const thin_output &o, int first,
           const float (&partial)[PARTS][TILE][ROWS])
{
    for (int i = (int)threadIdx.x; i < TILE * a.rows; i += THREADS) {
        int column = i % TILE, row = i / TILE, out = first + column;
        if (out >= o.out) {
            continue;
        }
        float sum = add_partial(o, out, partial, column, row);
        int64_t at = row * o.y_stride + out;
        if (o.float_output) {
            ((float *)o.y)[at] = sum;
        }
        else {
            T *y = (T *)o.y + at;
            *y = mil_round<T>(o.accumulate ? sum + mil_float(*y) : sum);
        }
    }
}

/* act(gate) * up of both products as they would have been stored. */
template <typename T, int ROWS>
static __device__ __forceinline__ void
write_gated(const thin_arguments &a, int first, const float (&up)[WARPS][TILE][ROWS],
            const float (&gate)[WARPS][TILE][ROWS])
{
    const thin_output &o = a.outputs[0];
    for (int i = (int)threadIdx.x; i < TILE * a.rows; i += THREADS) {
        int column = i % TILE, row = i / TILE, out = first + column;
        if (out < o.out) {
            float u = mil_float(mil_round<T>(add_partial(o, out, up, column, row)));
            float v = mil_float(mil_round<T>(add_partial(a.outputs[1], out, gate, column, row)));
            ((T *)a.gated)[row * a.gated_stride + out] = mil_round<T>(mil_activate(a.activation, v) * u);
        }
    }
}

/* Starts copying the norm's weights, which nobody writes, into shared memory. */
static __device__ __forceinline__ void
fetch_norm_weight(const thin_arguments &a, float *weight)
{
    for (int i = (int)threadIdx.x * 4; i < a.in; i += THREADS * 4) {
        asm volatile(
            "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(weight + i)),
            "l"(a.norm.weight + i));
    }
}

/* The normed rows of x into shared memory, by the whole block; the bits of norm.cu. */
template <typename T>
static __device__ __forceinline__ void
norm_rows(const thin_arguments &a, const float *weight, T *normed, float *partial)
{
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP;
    if (a.in <= MIL_NORM_WIDEST_FOR_WARP) {
        for (int row = warp; row < a.rows; row += WARPS) {
            norm_group<T, 8>(a.norm, row, 0, weight, normed + row * a.in, lane, MIL_WARP,
                             [](float value) { return mil_warp_sum(value); });
        }
    }
    else {
        for (int row = 0; row < a.rows; row++) {
            norm_group<T, 8>(a.norm, row, 0, weight, normed + row * a.in, (int)threadIdx.x, MIL_NORM_THREADS,
                             [&](float value) { return mil_block_sum(value, partial); });
        }
    }
    __syncthreads();
}

/* Asks for bytes that will be read soon to come as far as the second-level cache; both multiples of 16. */
static __device__ __forceinline__ void
fetch_ahead(const void *from, int64_t bytes)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (bytes > 0) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"((uint32_t)bytes)
                     : "memory");
    }
#endif
}

/* One matrix's share of a block: 16 rows of weights on their way, and their sums with GROUPS * 8 rows of x. TEAM warps
 * share the inputs. */
template <typename T, typename W, int GROUPS, int UNROLL, int TEAM>
struct tile_sums {
    static constexpr int STEP = UNROLL * TEAM * CHUNK<W>, X_LOADS = (int)(sizeof(T) / sizeof(W));
    const W *low, *high;
    uint4 wl[UNROLL], wh[UNROLL];
    float c[GROUPS][4];

    __device__ __forceinline__ void begin(const void *weight, int first, int out, int in, int g, int k)
    {
        low = (const W *)weight + (int64_t)min(first + g, out - 1) * in;
        high = (const W *)weight + (int64_t)min(first + g + 8, out - 1) * in;
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            fetch(u, k + u * TEAM * CHUNK<W>, in);
        }
#pragma unroll
        for (int i = 0; i < GROUPS * 4; i++) {
            c[i / 4][i % 4] = 0.0f;
        }
    }

    /* What follows the first step, on its way without waiting for registers. */
    __device__ __forceinline__ void fetch_rest(const void *weight, int first, int out, int in) const
    {
        if (threadIdx.x < TILE) {
            int row = min(first + (int)threadIdx.x, out - 1);
            fetch_ahead((const W *)weight + (int64_t)row * in + STEP, (in - STEP) * (int)sizeof(W));
        }
    }

    __device__ __forceinline__ void fetch(int u, int at, int in)
    {
        const uint4 zero = make_uint4(0, 0, 0, 0);
        wl[u] = at < in ? load_once(low + at) : zero;
        wh[u] = at < in ? load_once(high + at) : zero;
    }

    /* Takes chunk `u` and fetches the one that will lie in its place. */
    __device__ __forceinline__ void take(int u, int next, int in, const uint4 (&x)[GROUPS][X_LOADS])
    {
        uint4 l = wl[u], h = wh[u];
        fetch(u, next, in);
        if constexpr (X_LOADS == 1) {
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

    __device__ __forceinline__ void end(float (&partial)[TILE][GROUPS * 8], int g, int t) const
    {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            int row = group * 8 + 2 * t;
            partial[g][row] = c[group][0];
            partial[g][row + 1] = c[group][1];
            partial[g + 8][row] = c[group][2];
            partial[g + 8][row + 1] = c[group][3];
        }
    }
};

/* W: of the weights, T or 8 bits; GROUPS of 8 rows; NORMED: x is the norm of a.norm.x; GATED: outputs[0] is up, outputs[1]
 * the gate, and only their gated activation is written; PARTS blocks of a cluster share the inputs of a tile. */
template <typename T, typename W, int GROUPS, bool NORMED, bool GATED, int PARTS>
static __global__ void
__launch_bounds__(THREADS, GROUPS == 1 ? 3 : 2) MIL_CLUSTER(PARTS)
    thin_kernel(const __grid_constant__ thin_arguments a)
{
    constexpr int MATRICES = GATED ? 2 : 1, UNROLL = LOADS / 2 / MATRICES, TEAM = PARTS * WARPS;
    using sums_type = tile_sums<T, W, GROUPS, UNROLL, TEAM>;
    __shared__ float partial[MATRICES][WARPS][TILE][GROUPS * 8];
    __shared__ float gathered[PARTS][TILE][GROUPS * 8]; /* of the cluster's blocks; rank 0's is used */
    extern __shared__ uint4 normed_rows[];              /* the rows, then the norm's weights */
    int tile = (int)blockIdx.x / PARTS, rank = (int)blockIdx.x % PARTS;
    const thin_output &o = GATED ? a.outputs[0] : output_of(a, tile);
    int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP, g = lane / 4, t = lane % 4;
    int first = (tile - o.first_tile) * TILE, begin = (rank * WARPS + warp) * CHUNK<W>;
    int k = begin + PER_LOAD<W> * t;
    if constexpr (PARTS > 1) {
        mil_cluster_arrive();
    }

    sums_type sums[MATRICES];
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
        sums[m].begin(m == 0 ? o.weight : a.outputs[1].weight, first, o.out, a.in, g, k);
    }
    if (a.ahead && rank == 0) {
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            sums[m].fetch_rest(m == 0 ? o.weight : a.outputs[1].weight, first, o.out, a.in);
        }
    }
    float *norm_weights = (float *)((T *)normed_rows + a.rows * a.in);
    if constexpr (NORMED) {
        fetch_norm_weight(a, norm_weights);
    }
    mil_trigger();
    mil_wait();
    const T *x = (const T *)a.x;
    int64_t x_stride = a.x_stride;
    if constexpr (NORMED) {
        norm_rows<T>(a, norm_weights, (T *)normed_rows, &partial[0][0][0][0]);
        x = (const T *)normed_rows;
        x_stride = a.in;
    }

    /* The whole warp stays in the loop until its last chunk: products take all its threads. */
    for (int chunk = begin; chunk < a.in; chunk += sums_type::STEP) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int at = k + u * TEAM * CHUNK<W>, next = at + sums_type::STEP;
            uint4 xv[GROUPS][sums_type::X_LOADS];
#pragma unroll
            for (int i = 0; i < GROUPS * sums_type::X_LOADS; i++) {
                int row = i / sums_type::X_LOADS * 8 + g, part = i % sums_type::X_LOADS;
                bool real = at < a.in && row < a.rows;
                xv[i / sums_type::X_LOADS][part] =
                    real ? *(const uint4 *)(x + row * x_stride + at + 8 * part) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                sums[m].take(u, next, a.in, xv);
            }
        }
        k += sums_type::STEP;
    }
    if (threadIdx.x == 0 && a.next_bytes > 0) {
        int64_t from = blockIdx.x * a.next_bytes;
        fetch_ahead((const char *)a.next + from, min(a.next_bytes, a.next_total - from));
    }
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
        sums[m].end(partial[m][warp], g, t);
    }
    __syncthreads();
    if constexpr (GATED) {
        write_gated<T>(a, first, partial[0], partial[1]);
    }
    else if constexpr (PARTS > 1) {
        mil_cluster_wait(); /* all blocks have begun: their memory is theirs */
        for (int i = (int)threadIdx.x; i < TILE * a.rows; i += THREADS) {
            *mil_cluster_at(&gathered[rank][i % TILE][i / TILE], 0) =
                add_parts(partial[0], i % TILE, i / TILE);
        }
        mil_cluster_sync();
        if (rank == 0) {
            write_tile<T>(a, o, first, gathered);
        }
    }
    else {
        write_tile<T>(a, o, first, partial[0]);
    }
}

/* float32: a warp takes inputs of its chunks for all outputs of the tile; lane (j, t) sums outputs j and j + 8 over every
 * fourth input. */
static __global__ void
__launch_bounds__(THREADS) thin_kernel_float(const __grid_constant__ thin_arguments a)
{
    __shared__ float partial[WARPS][TILE][MIL_THIN_ROWS];
    const thin_output &o = output_of(a, (int)blockIdx.x);
    int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP;
    int first = ((int)blockIdx.x - o.first_tile) * TILE;
    const float *x = (const float *)a.x;
    mil_trigger();
    mil_wait();
    for (int row = 0; row < a.rows; row++) {
        for (int j = 0; j < TILE; j++) {
            const float *w = (const float *)o.weight + (int64_t)min(first + j, o.out - 1) * a.in;
            float sum = 0.0f;
            for (int k = warp * MIL_WARP + lane; k < a.in; k += THREADS) {
                sum = fmaf(w[k], x[row * a.x_stride + k], sum);
            }
            sum = mil_warp_sum(sum);
            if (lane == 0) {
                partial[warp][j][row] = sum;
            }
        }
    }
    __syncthreads();
    write_tile<float>(a, o, first, partial);
}

bool
mil_thin_product_fits(const mil_context *context, const mil_linear *p)
{
    mil_dtype act = context->ops->activation_dtype;
    bool scaled = mil_dtype_is_scaled(p->dtype);
    if (p->rows > MIL_THIN_ROWS || (p->dtype != act && !(scaled && act != MIL_F32)) ||
        p->in > INT32_MAX / 2 || p->out > INT32_MAX / 2) {
        return false;
    }
    return p->dtype == MIL_F32 || (p->in % (scaled ? 16 : 8) == 0 && (uintptr_t)p->weight % 16 == 0 &&
                                   (uintptr_t)p->x % 16 == 0 && p->x_stride % 8 == 0);
}

static thin_output
output_of(const mil_linear *p, int first_tile)
{
    return {p->weight,   p->scale,   p->bias,       p->y,           p->y_stride,
            (int)p->out, first_tile, p->accumulate, p->float_output};
}

static thin_arguments
arguments_of(const mil_linear *products, int64_t count, int *tiles)
{
    thin_arguments a = {};
    a.rows = (int)products->rows;
    a.in = (int)products->in;
    a.count = (int)count;
    a.x = products->x;
    a.x_stride = products->x_stride;
    *tiles = 0;
    for (int64_t i = 0; i < count; i++) {
        a.outputs[i] = output_of(&products[i], *tiles);
        *tiles += (int)mil_ceil_div(products[i].out, TILE);
    }
    static int ahead = -1;
    if (ahead < 0) {
        const char *word = getenv("MIL_THIN_AHEAD");
        ahead = word == NULL ? 0 : atoi(word);
    }
    a.ahead = ahead & 1;
    if (products->next != NULL && (ahead & 2)) {
        a.next = products->next;
        const char *most = getenv("MIL_THIN_NEXT");
        int64_t limit = (int64_t)(most == NULL ? 24 : atoi(most)) << 20;
        a.next_total = (products->next_bytes < limit ? products->next_bytes : limit) / 16 * 16;
        a.next_bytes = mil_ceil_div(a.next_total, *tiles * 16) * 16;
    }
    return a;
}

template <typename T, typename W, bool NORMED, bool GATED, int PARTS>
static mil_status
launch_rows(mil_context *context, const thin_arguments &a, int tiles, size_t shared)
{
    dim3 grid((unsigned)(tiles * PARTS)), block(THREADS);
    return a.rows <= 8 ? mil_launch(context, "thin product", thin_kernel<T, W, 1, NORMED, GATED, PARTS>, grid,
                                    block, shared, a)
                       : mil_launch(context, "thin product", thin_kernel<T, W, 2, NORMED, GATED, PARTS>, grid,
                                    block, shared, a);
}

static int
few_tiles()
{
    static int most = -1;
    if (most < 0) {
        const char *word = getenv("MIL_THIN_FEW");
        most = word == NULL ? 0 : atoi(word);
    }
    return most;
}

/* Tiles that are few leave most of the chip idle, so a cluster shares the inputs of each.  Shapes alone decide: the order of
 * sums must not depend on rows. */
static bool
is_split(const mil_context *context, mil_dtype weights, int tiles, int64_t in)
{
    return tiles <= FEW_TILES && in * (int64_t)mil_dtype_size(weights) >= 2 * WARPS * CHUNK_BYTES &&
           mil_device_has_clusters(context);
}

template <typename T, typename W, bool NORMED, bool GATED>
static mil_status
launch_parts(mil_context *context, mil_dtype weights, const thin_arguments &a, int tiles, size_t shared)
{
    if constexpr (!GATED) {
        if (is_split(context, weights, tiles, a.in)) {
            return launch_rows<T, W, NORMED, GATED, SPLIT>(context, a, tiles, shared);
        }
    }
    return launch_rows<T, W, NORMED, GATED, 1>(context, a, tiles, shared);
}

template <typename T, bool NORMED, bool GATED>
static mil_status
launch_weights(mil_context *context, mil_dtype weights, const thin_arguments &a, int tiles, size_t shared)
{
    return weights == MIL_F8   ? launch_parts<T, mil_f8, NORMED, GATED>(context, weights, a, tiles, shared)
           : weights == MIL_I8 ? launch_parts<T, mil_i8, NORMED, GATED>(context, weights, a, tiles, shared)
                               : launch_parts<T, T, NORMED, GATED>(context, weights, a, tiles, shared);
}

template <bool NORMED, bool GATED>
static mil_status
launch(mil_context *context, mil_dtype weights, const thin_arguments &a, int tiles, size_t shared)
{
    return context->ops->activation_dtype == MIL_BF16
               ? launch_weights<__nv_bfloat16, NORMED, GATED>(context, weights, a, tiles, shared)
               : launch_weights<__half, NORMED, GATED>(context, weights, a, tiles, shared);
}

mil_status
mil_thin_product(mil_context *context, const mil_linear *products, int64_t count)
{
    int tiles;
    thin_arguments a = arguments_of(products, count, &tiles);
    if (products->dtype == MIL_F32) {
        return mil_launch(context, "thin product", thin_kernel_float, dim3((unsigned)tiles), dim3(THREADS), 0,
                          a);
    }
    return launch<false, false>(context, products->dtype, a, tiles, 0);
}

/* ---- with the norm before and the gate after ------------------------------------------------------------------- */

/* Shared memory for the rows after the norm and for its weights. */
static size_t
norm_bytes(const mil_norm *n)
{
    return (size_t)(n->rows * n->width) * 2 + (size_t)n->width * sizeof(float);
}

/* Whether a norm can go along: in blocks of which three share a multiprocessor. */
static bool
norm_fits(const mil_norm *n, const mil_linear *products, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (products[i].x != n->y || products[i].dtype == MIL_F32) {
            return false;
        }
    }
    return n->group == n->width && n->z == NULL && n->width == products->in && n->width % 8 == 0 &&
           (uintptr_t)n->x % 16 == 0 && n->x_stride % 8 == 0 && n->weight != NULL &&
           (uintptr_t)n->weight % 16 == 0 && norm_bytes(n) <= NORMED_BYTES;
}

/* Whether the gate can go along. Few tiles are better split. */
static bool
gate_fits(const mil_context *context, const mil_linear *products, int64_t count, const mil_glu *gate)
{
    int tiles = count == 2 ? 2 * (int)mil_ceil_div(products->out, TILE) : 0;
    return count == 2 && !is_split(context, products->dtype, tiles, products->in) &&
           products[0].out == products[1].out && gate->up == products[0].y && gate->gate == products[1].y &&
           !products[0].accumulate && !products[1].accumulate && products->dtype != MIL_F32;
}

mil_status
mil_thin_project(mil_context *context, const mil_norm *norm, const mil_linear *products, int64_t count,
                 const mil_glu *gate)
{
    int tiles;
    bool normed = norm_fits(norm, products, count),
         gated = gate != NULL && gate_fits(context, products, count, gate);
    thin_arguments a = arguments_of(products, gated ? 1 : count, &tiles);
    if (!normed) {
        MIL_TRY(context->ops->norm_forward(context, norm));
    }
    if (!normed && !gated) {
        MIL_TRY(mil_thin_product(context, products, count));
    }
    else {
        a.norm = norm_arguments_of(norm);
        if (gated) {
            a.outputs[1] = output_of(&products[1], 0);
            a.gated = gate->y;
            a.gated_stride = gate->y_stride;
            a.activation = gate->activation;
        }
        size_t shared = normed ? norm_bytes(norm) : 0;
        mil_dtype weights = products->dtype;
        mil_status status = !normed ? launch<false, true>(context, weights, a, tiles, 0)
                            : gated ? launch<true, true>(context, weights, a, tiles, shared)
                                    : launch<true, false>(context, weights, a, tiles, shared);
        MIL_TRY(status);
    }
    return gate == NULL || gated ? MIL_OK : context->ops->glu_forward(context, gate);
}
