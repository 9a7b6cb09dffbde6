/* Weights of 8 bits: making the codes, and making values of them again for products of many rows.
 *
 * A row has one scale, so a product needs no more than one multiplication an output, whatever the order of its
 * sum.  Groups of 128 inputs would lower int8's error on Gaussian rows of 4,096 from 0.8 to 0.65 % (float8's is
 * 2.6 % with any scale) for 3 % more bytes and a rescaling of sums within the loop: not worth either.  float8's
 * scale is a power of two, which costs a floating-point code nothing and keeps every value exact in 16 bits, so
 * that prompts and decoding see the same weights.
 */
#include "quantized.cuh"

#include <cuda_fp8.h>

#include "table.h"
#include "thin_product.cuh"

#define THREADS 256
#define FLOAT8_MOST 448.0f
#define INT8_MOST 127.0f
#define LEAST_SCALE 0x1p-126f
#define MOST_PASSES \
    4 /* of 16 rows; values of 16 bits, written and read, cost as much as reading codes five times */
#define SLICE_BYTES ((int64_t)32 << 20)

/* ---- to codes --------------------------------------------------------------------------------------------------- */

/* The least power of two that times 448 reaches `largest`: 448 = 1.75 * 2^8. */
static __device__ __forceinline__ float
float8_scale(float largest)
{
    int exponent;
    float fraction = frexpf(largest, &exponent); /* [0.5, 1) */
    return fmaxf(ldexpf(1.0f, exponent - (fraction <= 0.875f ? 9 : 8)), LEAST_SCALE);
}

static __device__ __forceinline__ mil_f8
encode(float value, float scale, mil_f8)
{
    return {(uint8_t)__nv_cvt_float_to_fp8(value / scale, __NV_SATFINITE, __NV_E4M3)};
}

static __device__ __forceinline__ mil_i8
encode(float value, float scale, mil_i8)
{
    return {(int8_t)fminf(fmaxf(rintf(value / scale), -INT8_MOST), INT8_MOST)};
}

static __device__ __forceinline__ float
scale_of(float largest, mil_f8)
{
    return float8_scale(largest);
}

static __device__ __forceinline__ float
scale_of(float largest, mil_i8)
{
    return fmaxf(largest / INT8_MOST, LEAST_SCALE);
}

/* The largest magnitude of a row, infinite where it has a NaN, the same in every thread. */
template <typename From>
static __device__ __forceinline__ float
largest_of(const From *row, int64_t columns)
{
    __shared__ float partial[THREADS / MIL_WARP];
    float largest = 0.0f;
    for (int64_t i = threadIdx.x; i < columns; i += THREADS) {
        float magnitude = fabsf(mil_float(row[i]));
        largest = fmaxf(largest, isnan(magnitude) ? INFINITY : magnitude);
    }
    largest = mil_warp_max(largest);
    if (threadIdx.x % MIL_WARP == 0) {
        partial[threadIdx.x / MIL_WARP] = largest;
    }
    __syncthreads();
    for (int i = 0; i < THREADS / MIL_WARP; i++) {
        largest = fmaxf(largest, partial[i]);
    }
    return largest;
}

/* A block a row, which it reads twice, the second time from cache. */
template <typename From, typename Code>
static __global__ void
__launch_bounds__(THREADS) quantize_kernel(mil_quantize a)
{
    mil_wait();
    const From *row = (const From *)a.values + blockIdx.x * a.columns;
    float largest = largest_of(row, a.columns);
    bool finite = largest < INFINITY;
    float scale = largest > 0.0f && finite ? scale_of(largest, Code()) : 1.0f;
    Code *codes = (Code *)a.codes + blockIdx.x * a.columns;
    for (int64_t i = threadIdx.x; i < a.columns; i += THREADS) {
        codes[i] = encode(mil_float(row[i]), scale, Code());
    }
    if (threadIdx.x == 0) {
        a.scale[blockIdx.x] = scale;
        if (!finite) {
            *a.bad = 1;
        }
    }
}

template <typename Code>
static mil_status
quantize(mil_context *context, const mil_quantize *a)
{
    auto kernel = a->from == MIL_BF16  ? quantize_kernel<__nv_bfloat16, Code>
                  : a->from == MIL_F16 ? quantize_kernel<__half, Code>
                                       : quantize_kernel<float, Code>;
    return mil_launch(context, "quantize", kernel, dim3((unsigned)a->rows), dim3(THREADS), 0, *a);
}

mil_status
mil_cuda_quantize(mil_context *context, const mil_quantize *arguments)
{
    return arguments->dtype == MIL_F8 ? quantize<mil_f8>(context, arguments)
                                      : quantize<mil_i8>(context, arguments);
}

/* ---- to values -------------------------------------------------------------------------------------------------- */

template <typename T, typename Code>
static __global__ void
__launch_bounds__(THREADS)
    dequantize_kernel(int64_t columns, const Code *codes, const float *scale, T *values)
{
    mil_trigger();
    mil_wait();
    codes += blockIdx.x * columns;
    values += blockIdx.x * columns;
    float row_scale = scale[blockIdx.x];
    if (columns % 8 == 0) {
        for (int64_t i = (int64_t)threadIdx.x * 8; i < columns; i += THREADS * 8) {
            float value[8];
            mil_load<8>(codes + i, value);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                value[j] *= row_scale;
            }
            if constexpr (sizeof(T) == 2) {
                mil_store<8>(values + i, value);
            }
            else {
                mil_store<4>(values + i, *reinterpret_cast<float (*)[4]>(&value[0]));
                mil_store<4>(values + i + 4, *reinterpret_cast<float (*)[4]>(&value[4]));
            }
        }
    }
    else {
        for (int64_t i = threadIdx.x; i < columns; i += THREADS) {
            values[i] = mil_round<T>(mil_float(codes[i]) * row_scale);
        }
    }
}

template <typename T>
static mil_status
dequantize(mil_context *context, const mil_linear *p, void *values)
{
    dim3 grid((unsigned)p->out), block(THREADS);
    return p->dtype == MIL_F8 ? mil_launch(context, "dequantize", dequantize_kernel<T, mil_f8>, grid, block,
                                           0, p->in, (const mil_f8 *)p->weight, p->scale, (T *)values)
                              : mil_launch(context, "dequantize", dequantize_kernel<T, mil_i8>, grid, block,
                                           0, p->in, (const mil_i8 *)p->weight, p->scale, (T *)values);
}

/* Ends when everything before it has, and is seen: what comes next may read what is being written before it waits. */
static __global__ void
settle_kernel()
{
    mil_wait();
}

/* In passes of few rows, each of which reads the codes once. */
static mil_status
product_by_rows(mil_context *context, const mil_linear *product)
{
    int64_t x_row = product->x_stride * (int64_t)mil_dtype_size(context->ops->activation_dtype);
    int64_t y_row = product->y_stride *
                    (int64_t)mil_dtype_size(product->float_output ? MIL_F32 : context->ops->activation_dtype);
    for (int64_t row = 0; row < product->rows; row += MIL_THIN_ROWS) {
        mil_linear part = *product;
        part.rows = product->rows - row < MIL_THIN_ROWS ? product->rows - row : MIL_THIN_ROWS;
        part.x = (const char *)product->x + row * x_row;
        part.y = (char *)product->y + row * y_row;
        MIL_TRY(mil_thin_product(context, &part, 1));
    }
    return MIL_OK;
}

/* By slices of outputs whose values, written and read again at once, stay in the second-level cache.  Our kernels for
 * products fetch weights before they wait, since nobody writes weights; these have only just been written. */
static mil_status
product_by_values(mil_context *context, const mil_linear *product)
{
    mil_dtype act = context->ops->activation_dtype;
    int64_t y_size = (int64_t)mil_dtype_size(product->float_output ? MIL_F32 : act);
    int64_t slice = SLICE_BYTES / (product->in * (int64_t)mil_dtype_size(act)) / 128 * 128;
    slice = slice < 128 ? 128 : slice > product->out ? product->out : slice;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    void *values;
    MIL_TRY(mil_arena_push(context->scratch, (size_t)(slice * product->in), mil_dtype_size(act), &values));
    for (int64_t first = 0; first < product->out; first += slice) {
        mil_linear part = *product;
        part.out = product->out - first < slice ? product->out - first : slice;
        part.weight = (const char *)product->weight + first * product->in;
        part.scale = product->scale + first;
        MIL_TRY(MIL_FOR_ACT(context, dequantize, context, &part, values));
        MIL_TRY(mil_launch(context, "settle", settle_kernel, dim3(1), dim3(MIL_WARP), 0));
        part.weight = values;
        part.dtype = act;
        part.scale = NULL;
        part.bias = product->bias == NULL ? NULL : product->bias + first;
        part.y = (char *)product->y + first * y_size;
        MIL_TRY(mil_cuda_linear_forward(context, &part, 1));
    }
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}

mil_status
mil_scaled_products(mil_context *context, const mil_linear *products, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        mil_linear few = products[i];
        few.rows = few.rows < MIL_THIN_ROWS ? few.rows : MIL_THIN_ROWS;
        bool by_rows =
            products[i].rows <= MOST_PASSES * MIL_THIN_ROWS && mil_thin_product_fits(context, &few);
        MIL_TRY(by_rows ? product_by_rows(context, &products[i]) : product_by_values(context, &products[i]));
    }
    return MIL_OK;
}
