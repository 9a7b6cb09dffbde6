/* Operators that move their bytes once and compute next to nothing: gated activations, embedding rows, residual
 * addition, row gathering, conversion to float32.
 *
 * Each is one template over (row, vector of columns): a thread owns 16 bytes of one row where all arrays allow
 * it, one element otherwise.
 */
#include "activate.cuh"
#include "quantized.cuh"
#include "table.h"

#define THREADS 256

/* The columns of this thread, or -1; blocks are laid out [rows, slices of THREADS * V columns]. */
template <int V>
static __device__ __forceinline__ int64_t
my_column(int64_t width)
{
    int64_t column = ((int64_t)blockIdx.y * THREADS + threadIdx.x) * V;
    return column < width ? column : -1;
}

static inline dim3
grid_of(int64_t rows, int64_t width, int lanes)
{
    return dim3((unsigned)rows, (unsigned)mil_ceil_div(width, (int64_t)THREADS * lanes));
}

/* ---- gated activations -------------------------------------------------------------------------------------- */

struct glu_arguments {
    int64_t width;
    mil_activation activation;
    const void *gate, *up;
    int64_t gate_stride, up_stride;
    void *y;
    int64_t y_stride;
};

template <typename T, int V>
static __global__ void
glu_kernel(glu_arguments a)
{
    mil_trigger();
    mil_wait();
    int64_t row = blockIdx.x, column = my_column<V>(a.width);
    if (column < 0) {
        return;
    }
    float gate[V], up[V];
    mil_load<V>((const T *)a.gate + row * a.gate_stride + column, gate);
    if (a.up != NULL) {
        mil_load<V>((const T *)a.up + row * a.up_stride + column, up);
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
        gate[i] = mil_activate(a.activation, gate[i]) * (a.up == NULL ? 1.0f : up[i]);
    }
    mil_store<V>((T *)a.y + row * a.y_stride + column, gate);
}

template <typename T>
static mil_status
glu(mil_context *context, const mil_glu *g)
{
    glu_arguments a = {g->width,       g->activation, g->gate, g->up,
                       g->gate_stride, g->up_stride,  g->y,    g->y_stride};
    constexpr int lanes = mil_lanes<T>;
    bool aligned = g->width % lanes == 0 && mil_is_aligned<T>(g->gate, g->gate_stride) &&
                   mil_is_aligned<T>(g->y, g->y_stride) &&
                   (g->up == NULL || mil_is_aligned<T>(g->up, g->up_stride));
    return aligned ? mil_launch(context, "glu", glu_kernel<T, lanes>, grid_of(g->rows, g->width, lanes),
                                dim3(THREADS), 0, a)
                   : mil_launch(context, "glu", glu_kernel<T, 1>, grid_of(g->rows, g->width, 1),
                                dim3(THREADS), 0, a);
}

mil_status
mil_cuda_glu_forward(mil_context *context, const mil_glu *arguments)
{
    return MIL_FOR_ACT(context, glu, context, arguments);
}

/* ---- embedding ---------------------------------------------------------------------------------------------- */

struct embedding_arguments {
    int64_t hidden;
    const int32_t *tokens;
    const void *table;
    const float *row_scale;
    float scale;
    void *y;
    int64_t y_stride;
};

template <typename T, typename W>
static __global__ void
embedding_kernel(embedding_arguments a)
{
    mil_wait(); /* first, so that what was written before this pass is settled for all kernels to come (mil_rows) */
    mil_trigger();
    int64_t row = blockIdx.x, column = my_column<1>(a.hidden);
    if (column >= 0) {
        int64_t token = a.tokens[row];
        float value = mil_float(((const W *)a.table)[token * a.hidden + column]);
        value *= a.row_scale == NULL ? 1.0f : a.row_scale[token];
        ((T *)a.y)[row * a.y_stride + column] = mil_round<T>(value * a.scale);
    }
}

template <typename T>
static mil_status
embedding(mil_context *context, const mil_embedding *e)
{
    embedding_arguments a = {e->hidden, e->tokens, e->table, e->row_scale, e->scale, e->y, e->y_stride};
    auto kernel = e->dtype == MIL_BF16  ? embedding_kernel<T, __nv_bfloat16>
                  : e->dtype == MIL_F16 ? embedding_kernel<T, __half>
                  : e->dtype == MIL_F8  ? embedding_kernel<T, mil_f8>
                  : e->dtype == MIL_I8  ? embedding_kernel<T, mil_i8>
                                        : embedding_kernel<T, float>;
    return mil_launch(context, "embedding", kernel, grid_of(e->rows, e->hidden, 1), dim3(THREADS), 0, a);
}

mil_status
mil_cuda_embedding_forward(mil_context *context, const mil_embedding *arguments)
{
    return MIL_FOR_ACT(context, embedding, context, arguments);
}

/* ---- rows ----------------------------------------------------------------------------------------------------- */

template <typename T>
static __global__ void
add_kernel(int64_t width, const T *x, int64_t x_stride, T *y, int64_t y_stride)
{
    mil_trigger();
    mil_wait();
    int64_t row = blockIdx.x, column = my_column<1>(width);
    if (column >= 0) {
        T *to = y + row * y_stride + column;
        *to = mil_round<T>(mil_float(*to) + mil_float(x[row * x_stride + column]));
    }
}

template <typename T>
static mil_status
add(mil_context *context, int64_t rows, int64_t width, const void *x, int64_t x_stride, void *y,
    int64_t y_stride)
{
    return mil_launch(context, "add", add_kernel<T>, grid_of(rows, width, 1), dim3(THREADS), 0, width,
                      (const T *)x, x_stride, (T *)y, y_stride);
}

mil_status
mil_cuda_add(mil_context *context, int64_t rows, int64_t width, const void *x, int64_t x_stride, void *y,
             int64_t y_stride)
{
    return MIL_FOR_ACT(context, add, context, rows, width, x, x_stride, y, y_stride);
}

template <typename T>
static __global__ void
gather_kernel(int64_t width, const int64_t *index, const T *x, int64_t x_stride, T *y, int64_t y_stride)
{
    mil_trigger();
    mil_wait();
    int64_t row = blockIdx.x, column = my_column<1>(width);
    if (column >= 0) {
        y[row * y_stride + column] = x[index[row] * x_stride + column];
    }
}

template <typename T>
static mil_status
gather(mil_context *context, int64_t count, int64_t width, const int64_t *index, const void *x,
       int64_t x_stride, void *y, int64_t y_stride)
{
    return mil_launch(context, "gather_rows", gather_kernel<T>, grid_of(count, width, 1), dim3(THREADS), 0,
                      width, index, (const T *)x, x_stride, (T *)y, y_stride);
}

mil_status
mil_cuda_gather_rows(mil_context *context, int64_t count, int64_t width, const int64_t *index, const void *x,
                     int64_t x_stride, void *y, int64_t y_stride)
{
    return MIL_FOR_ACT(context, gather, context, count, width, index, x, x_stride, y, y_stride);
}

template <typename T>
static __global__ void
widen_kernel(int64_t width, const T *x, int64_t x_stride, float scale, float *y)
{
    mil_trigger();
    mil_wait();
    int64_t row = blockIdx.x, column = my_column<1>(width);
    if (column >= 0) {
        y[row * width + column] = scale * mil_float(x[row * x_stride + column]);
    }
}

mil_status
mil_cuda_widen(mil_context *context, int64_t rows, int64_t width, mil_dtype dtype, const void *x,
               int64_t x_stride, float scale, float *y)
{
    dim3 grid = grid_of(rows, width, 1), block(THREADS);
    if (dtype == MIL_BF16) {
        return mil_launch(context, "widen", widen_kernel<__nv_bfloat16>, grid, block, 0, width,
                          (const __nv_bfloat16 *)x, x_stride, scale, y);
    }
    if (dtype == MIL_F16) {
        return mil_launch(context, "widen", widen_kernel<__half>, grid, block, 0, width, (const __half *)x,
                          x_stride, scale, y);
    }
    return mil_launch(context, "widen", widen_kernel<float>, grid, block, 0, width, (const float *)x,
                      x_stride, scale, y);
}
