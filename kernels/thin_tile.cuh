/* What the kernels for products of few rows share (thin_product.cu tells how they work): arguments, the tensor core's
 * instruction, and the sums' way out.  A tile is 16 outputs; 8 warps share its inputs by chunks of 64 bytes of a row. */
#ifndef MIL_KERNELS_THIN_TILE_CUH
#define MIL_KERNELS_THIN_TILE_CUH

#include "activate.cuh"
#include "mma.cuh"
#include "norm.cuh"
#include "quantized.cuh"
#include "thin_product.cuh"

#define WARPS 8
#define THREADS (WARPS * MIL_WARP)
#define TILE 16 /* outputs of a block */

/* Inputs in a load of 16 bytes, and in a step of a warp: four such loads of each row. */
template <typename W>
constexpr int PER_LOAD = 16 / (int)sizeof(W);
template <typename W>
constexpr int CHUNK = 4 * PER_LOAD<W>;

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
    int tiles;
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

/* The product that a tile belongs to, or whatever else first_tile counts. */
static __device__ __forceinline__ int
product_of(const thin_arguments &a, int tile)
{
    int i = 0;
    while (i + 1 < a.count && tile >= a.outputs[i + 1].first_tile) {
        i++;
    }
    return i;
}

static __device__ __forceinline__ const thin_output &
output_of(const thin_arguments &a, int tile)
{
    return a.outputs[product_of(a, tile)];
}

/* Sums that a warp keeps of each output: codes make twice as many products of a load, which would wait for one another. */
template <typename W>
constexpr int CHAINS = sizeof(W) == 1 ? 2 : 1;

/* Loads of x that go with one of weights. */
template <typename T, typename W>
constexpr int X_LOADS = (int)(sizeof(T) / sizeof(W));

/* A lane's 16 bytes of outputs g and g + 8 times the values of x that belong to them, for GROUPS of 8 rows. */
template <typename T, typename W, int GROUPS>
static __device__ __forceinline__ void
multiply_load(float (&c)[CHAINS<W>][GROUPS][4], const uint4 &low, const uint4 &high,
              const uint4 (&x)[GROUPS][X_LOADS<T, W>])
{
    if constexpr (X_LOADS<T, W> == 1) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const uint4 &v = x[group][0];
            mil_multiply_add<T>(c[0][group], low.x, high.x, low.y, high.y, v.x, v.y);
            mil_multiply_add<T>(c[0][group], low.z, high.z, low.w, high.w, v.z, v.w);
        }
    }
    else {
        const uint32_t lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
        for (int word = 0; word < 4; word++) {
            const uint32_t a0 = mil_expand(lows[word], 0, W(), T()),
                           a1 = mil_expand(highs[word], 0, W(), T());
            const uint32_t a2 = mil_expand(lows[word], 1, W(), T()),
                           a3 = mil_expand(highs[word], 1, W(), T());
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                const uint4 &v = x[group][word / 2];
                const uint32_t first = word % 2 ? v.z : v.x, second = word % 2 ? v.w : v.y;
                mil_multiply_add<T>(c[word % 2][group], a0, a1, a2, a3, __byte_perm(first, second, 0x5410),
                                    __byte_perm(first, second, 0x7632));
            }
        }
    }
}

/* What the chains have of one sum. */
template <typename W, int GROUPS>
static __device__ __forceinline__ float
add_chains(const float (&c)[CHAINS<W>][GROUPS][4], int group, int i)
{
    return CHAINS<W> == 1 ? c[0][group][i] : c[0][group][i] + c[CHAINS<W> - 1][group][i];
}

/* The warps' partial sums of one output, in order. */
template <int ROWS>
static __device__ __forceinline__ float
add_partial(const thin_output &o, int out, const float (&partial)[WARPS][TILE][ROWS], int column, int row)
{
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        sum += partial[warp][column][row];
    }
    sum *= o.scale == NULL ? 1.0f : o.scale[out];
    return sum + (o.bias == NULL ? 0.0f : o.bias[out]);
}

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

/* The same by thin_stream.cu, where that is possible (*done): x is in place, or the norm is to come first. */
mil_status
mil_thin_stream(mil_context *context, mil_dtype weights, const thin_arguments &a, bool normed, bool gated,
                bool *done);

#endif
