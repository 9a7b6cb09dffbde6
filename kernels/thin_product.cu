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
 * The first loads of W do not wait for the kernel before (nobody writes weights), so they are on their way
 * while it drains.  float32 weights, which only comparisons with the CPU use, take plain multiply-adds in a
 * kernel of the same shape.
 */
#include "thin_product.cuh"

#define WARPS 8
#define THREADS (WARPS * MIL_WARP)
#define TILE 16  /* outputs of a block */
#define CHUNK 32 /* inputs of a warp's step */
#define UNROLL 4 /* steps whose loads are under way together */

struct thin_output {
    const void *weight;
    const float *bias;
    void *y;
    int64_t y_stride;
    int out, first_tile;
    bool accumulate, float_output;
};

struct thin_arguments {
    int rows, in, count;
    const void *x;
    int64_t x_stride;
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

/* The product that a block's tile belongs to. */
static __device__ __forceinline__ const thin_output &
output_of(const thin_arguments &a, int tile)
{
    int i = 0;
    while (i + 1 < a.count && tile >= a.outputs[i + 1].first_tile) {
        i++;
    }
    return a.outputs[i];
}

/* Adds the warps' partial sums [WARPS][outputs of the tile][rows] in order and writes them. */
template <typename T, int ROWS>
static __device__ __forceinline__ void
write_tile(const thin_arguments &a, const thin_output &o, int first,
           const float (&partial)[WARPS][TILE][ROWS])
{
    for (int i = (int)threadIdx.x; i < TILE * a.rows; i += THREADS) {
        int column = i % TILE, row = i / TILE, out = first + column;
        if (out >= o.out) {
            continue;
        }
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) {
            sum += partial[warp][column][row];
        }
        sum += o.bias == NULL ? 0.0f : o.bias[out];
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

template <typename T, int GROUPS> /* of 8 rows */
static __global__ void
__launch_bounds__(THREADS, GROUPS == 1 ? 3 : 2) thin_kernel(const __grid_constant__ thin_arguments a)
{
    __shared__ float partial[WARPS][TILE][GROUPS * 8];
    const thin_output &o = output_of(a, (int)blockIdx.x);
    int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP, g = lane / 4, t = lane % 4;
    int first = ((int)blockIdx.x - o.first_tile) * TILE;
    int low = min(first + g, o.out - 1), high = min(first + g + 8, o.out - 1);
    const T *w_low = (const T *)o.weight + (int64_t)low * a.in,
            *w_high = (const T *)o.weight + (int64_t)high * a.in;
    const T *x = (const T *)a.x;
    int k = warp * CHUNK + 8 * t;
    const uint4 zero = make_uint4(0, 0, 0, 0);

    uint4 wl[UNROLL], wh[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
        int at = k + u * WARPS * CHUNK;
        wl[u] = at < a.in ? load_once(w_low + at) : zero;
        wh[u] = at < a.in ? load_once(w_high + at) : zero;
    }
    mil_trigger();
    mil_wait();

    float c[GROUPS][4] = {};
    /* The whole warp stays in the loop until its last chunk: products take all its threads. */
    for (int chunk = warp * CHUNK; chunk < a.in; chunk += UNROLL * WARPS * CHUNK) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int at = k + u * WARPS * CHUNK;
            uint4 l = wl[u], h = wh[u];
            int next = at + UNROLL * WARPS * CHUNK;
            uint4 xv[GROUPS];
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                int row = group * 8 + g;
                xv[group] = at < a.in && row < a.rows ? *(const uint4 *)(x + row * a.x_stride + at) : zero;
            }
            wl[u] = next < a.in ? load_once(w_low + next) : zero;
            wh[u] = next < a.in ? load_once(w_high + next) : zero;
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                multiply(c[group], l.x, h.x, l.y, h.y, xv[group].x, xv[group].y, T());
                multiply(c[group], l.z, h.z, l.w, h.w, xv[group].z, xv[group].w, T());
            }
        }
        k += UNROLL * WARPS * CHUNK;
    }
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        int row = group * 8 + 2 * t;
        partial[warp][g][row] = c[group][0];
        partial[warp][g][row + 1] = c[group][1];
        partial[warp][g + 8][row] = c[group][2];
        partial[warp][g + 8][row + 1] = c[group][3];
    }
    __syncthreads();
    write_tile<T>(a, o, first, partial);
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
    if (p->rows > MIL_THIN_ROWS || p->dtype != context->ops->activation_dtype || p->in > INT32_MAX / 2 ||
        p->out > INT32_MAX / 2) {
        return false;
    }
    return p->dtype == MIL_F32 || (p->in % 8 == 0 && (uintptr_t)p->weight % 16 == 0 &&
                                   (uintptr_t)p->x % 16 == 0 && p->x_stride % 8 == 0);
}

mil_status
mil_thin_product(mil_context *context, const mil_linear *products, int64_t count)
{
    thin_arguments a = {};
    a.rows = (int)products->rows;
    a.in = (int)products->in;
    a.count = (int)count;
    a.x = products->x;
    a.x_stride = products->x_stride;
    int tiles = 0;
    for (int64_t i = 0; i < count; i++) {
        const mil_linear *p = &products[i];
        a.outputs[i] = {p->weight,   p->bias, p->y,          p->y_stride,
                        (int)p->out, tiles,   p->accumulate, p->float_output};
        tiles += (int)mil_ceil_div(p->out, TILE);
    }
    dim3 grid((unsigned)tiles), block(THREADS);
    if (products->dtype == MIL_F32) {
        return mil_launch(context, "thin product", thin_kernel_float, grid, block, 0, a);
    }
    bool bf16 = products->dtype == MIL_BF16;
    if (a.rows <= 8) {
        return mil_launch(context, "thin product",
                          bf16 ? thin_kernel<__nv_bfloat16, 1> : thin_kernel<__half, 1>, grid, block, 0, a);
    }
    return mil_launch(context, "thin product", bf16 ? thin_kernel<__nv_bfloat16, 2> : thin_kernel<__half, 2>,
                      grid, block, 0, a);
}
