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

#define CONV_TAPS 4

/* A convolution of what a product gives (thin_conv.cuh). */
struct thin_conv {
    int product, first, channels; /* the product's columns from `first` on; 0 channels: there is none */
    int taps;                     /* at most CONV_TAPS */
    bool whole;                   /* CONV_TAPS of them, to be read at once */
    bool mixes;                   /* whether a sequence brings several rows */
    mil_device_rows rows;
    uint8_t sequence[MIL_THIN_ROWS], index[MIL_THIN_ROWS]; /* of each row; its number there */
    const float *weight, *bias;
    void *y;
    int y_stride;
    float *tails[MIL_THIN_ROWS]; /* of each sequence */
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
    thin_conv conv;
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

/* What a thread writes of a tile: one output of one row, whose sums the warps leave in partial[WARPS][TILE][pitch].  All that
 * it takes besides is read by find() and read(), which come before the products: after them it would be waited for, by
 * everybody. */
template <typename T, typename W, bool GATED>
struct place {
    static constexpr int MATRICES = GATED ? 2 : 1;
    static constexpr bool SCALED = sizeof(W) == 1;

    void *to; /* NULL if nothing */
    /* What the sum is added to, of type T, and until read() whether it ADDS; or FLOAT_OUTPUT. */
    uint32_t kept;
    float scale[MATRICES], bias[MATRICES];

    static constexpr uint32_t FLOAT_OUTPUT = 1 << 16, ADDS = 1 << 17; /* beyond any 16 bits */

    static __device__ __forceinline__ int column()
    {
        return (int)threadIdx.x % TILE;
    }

    static __device__ __forceinline__ int row()
    {
        static_assert(TILE * MIL_THIN_ROWS <= THREADS, "a thread has one output");
        return (int)threadIdx.x / TILE;
    }

    /* The thread's column of the tile is output `out` of a product, if it is `there`.  Needs no mil_wait(). */
    __device__ __forceinline__ void find(const thin_arguments &a, int product, int out, bool there)
    {
        to = NULL;
        if (!there || row() >= a.rows) {
            return;
        }
        const thin_output &o = a.outputs[product];
        const bool as_float = sizeof(T) == 2 && !GATED && o.float_output;
        const int64_t at = row() * (GATED ? a.gated_stride : o.y_stride) + out;
        to = (char *)(GATED ? a.gated : o.y) + at * (as_float ? sizeof(float) : sizeof(T));
        kept = as_float ? FLOAT_OUTPUT : !GATED && o.accumulate ? ADDS : 0;
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            const thin_output &of = a.outputs[product + m];
            scale[m] = SCALED ? of.scale[out] : 1.0f;
            bias[m] = of.bias == NULL ? 0.0f : of.bias[out];
        }
    }

    /* The sum that is added to. */
    __device__ __forceinline__ void read()
    {
        if (to != NULL && kept == ADDS) {
            kept = sizeof(T) == 2 ? *(const uint16_t *)to : *(const uint32_t *)to;
        }
    }

    /* The warps' partial sums of matrix m, in order. */
    __device__ __forceinline__ float add(const float *partial, int pitch, int m) const
    {
        const float *of_mine = partial + column() * pitch + row();
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) {
            sum += of_mine[warp * TILE * pitch];
        }
        return sum * scale[m] + bias[m];
    }

    /* Of a gated pair, the second matrix's partial sums stand behind the first's. */
    __device__ __forceinline__ void write(const thin_arguments &a, const float *partial, int pitch) const
    {
        if (to == NULL) {
            return;
        }
        float sum = add(partial, pitch, 0);
        if constexpr (GATED) { /* of both products as they would have been stored */
            const float gate = mil_float(mil_round<T>(add(partial + WARPS * TILE * pitch, pitch, 1)));
            sum = mil_activate(a.activation, gate) * mil_float(mil_round<T>(sum));
        }
        if (sizeof(T) == 2 && kept == FLOAT_OUTPUT) {
            *(float *)to = sum;
        }
        else {
            *(T *)to = mil_round<T>(mil_float(*(const T *)&kept) + sum);
        }
    }
};

/* The multiplying warps meet. */
static __device__ __forceinline__ void
meet()
{
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

/* The same by thin_stream.cu, where that is possible (*done): x is in place, or the norm is to come first. */
mil_status
mil_thin_stream(mil_context *context, mil_dtype weights, const thin_arguments &a, bool normed, bool gated,
                bool *done);

#endif
