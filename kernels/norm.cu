/* RMS norm of groups of columns, plain or gated (device.h: mil_norm).
 *
 *   y = n(x) weight,   n(x silu(z)) weight   or   n(x) weight silu(z),   n(v) = v / sqrt(mean(v^2) + eps)
 *
 * Bytes: x (and z) are read twice, the second time from the first-level cache; y is written once.  Groups up to
 * a thousand columns (heads) take a warp each, wider ones (the residual stream) a block each.  Sums go thread by
 * thread over a fixed stride and then up a fixed tree, so a row's bits depend on nothing but the row.
 */
#include "cuda.cuh"
#include "table.h"

#define WARPS 4 /* groups of a block, where each takes a warp */
#define WIDEST_FOR_WARP 1024

struct norm_arguments {
    int64_t rows, group, groups; /* groups of a row */
    const void *x, *z;
    int64_t x_stride, z_stride;
    bool norm_before_gate, weight_per_group;
    const float *weight;
    float eps;
    void *y;
    int64_t y_stride;
};

/* The gated input of one vector of columns. */
template <typename T, int V>
static __device__ __forceinline__ void
load_input(const norm_arguments &a, const T *x, const T *z, int64_t column, float (&value)[V],
           float (&gate)[V])
{
    mil_load<V>(x + column, value);
    if (z != NULL) {
        mil_load<V>(z + column, gate);
#pragma unroll
        for (int i = 0; i < V; i++) {
            gate[i] = mil_silu(gate[i]);
            value[i] = a.norm_before_gate ? value[i] : value[i] * gate[i];
        }
    }
}

/* One group by `threads` threads, of which this is number `thread`; `sum` adds up over them. */
template <typename T, int V, typename Sum>
static __device__ __forceinline__ void
norm_group(const norm_arguments &a, int64_t row, int64_t group, int thread, int threads, Sum sum)
{
    const T *x = (const T *)a.x + row * a.x_stride + group * a.group;
    const T *z = a.z == NULL ? NULL : (const T *)a.z + row * a.z_stride + group * a.group;
    const float *weight = a.weight == NULL ? NULL : a.weight + (a.weight_per_group ? 0 : group * a.group);
    T *y = (T *)a.y + row * a.y_stride + group * a.group;
    float value[V], gate[V];
    float squares = 0.0f;
    for (int64_t column = (int64_t)thread * V; column < a.group; column += (int64_t)threads * V) {
        load_input<T, V>(a, x, z, column, value, gate);
#pragma unroll
        for (int i = 0; i < V; i++) {
            squares = fmaf(value[i], value[i], squares);
        }
    }
    float scale = 1.0f / sqrtf(sum(squares) / (float)a.group + a.eps);
    for (int64_t column = (int64_t)thread * V; column < a.group; column += (int64_t)threads * V) {
        load_input<T, V>(a, x, z, column, value, gate);
#pragma unroll
        for (int i = 0; i < V; i++) {
            value[i] *= scale;
            value[i] *= weight == NULL ? 1.0f : weight[column + i];
            value[i] *= z != NULL && a.norm_before_gate ? gate[i] : 1.0f;
        }
        mil_store<V>(y + column, value);
    }
}

template <typename T, int V>
static __global__ void
norm_by_block(norm_arguments a)
{
    __shared__ float partial[MIL_WARP];
    mil_trigger();
    mil_wait();
    norm_group<T, V>(a, blockIdx.x / a.groups, blockIdx.x % a.groups, (int)threadIdx.x, (int)blockDim.x,
                     [&](float value) { return mil_block_sum(value, partial); });
}

template <typename T, int V>
static __global__ void
norm_by_warp(norm_arguments a)
{
    int64_t item = (int64_t)blockIdx.x * WARPS + threadIdx.x / MIL_WARP;
    mil_trigger();
    mil_wait();
    if (item < a.rows * a.groups) {
        norm_group<T, V>(a, item / a.groups, item % a.groups, (int)threadIdx.x % MIL_WARP, MIL_WARP,
                         [](float value) { return mil_warp_sum(value); });
    }
}

template <typename T, int V>
static mil_status
launch(mil_context *context, const norm_arguments &a)
{
    int64_t items = a.rows * a.groups;
    if (a.group <= WIDEST_FOR_WARP) {
        return mil_launch(context, "norm", norm_by_warp<T, V>, dim3((unsigned)mil_ceil_div(items, WARPS)),
                          dim3(WARPS * MIL_WARP), 0, a);
    }
    int64_t wanted = mil_ceil_div(a.group, V);
    unsigned threads = wanted >= 1024 ? 1024 : wanted >= 512 ? 512 : 256;
    return mil_launch(context, "norm", norm_by_block<T, V>, dim3((unsigned)items), dim3(threads), 0, a);
}

template <typename T>
static mil_status
norm(mil_context *context, const mil_norm *n)
{
    norm_arguments a = {n->rows,
                        n->group,
                        n->width / n->group,
                        n->x,
                        n->z,
                        n->x_stride,
                        n->z_stride,
                        n->norm_before_gate,
                        n->weight_per_group,
                        n->weight,
                        n->eps,
                        n->y,
                        n->y_stride};
    constexpr int lanes = mil_lanes<T>;
    bool aligned = n->group % lanes == 0 && mil_is_aligned<T>(n->x, n->x_stride) &&
                   mil_is_aligned<T>(n->y, n->y_stride) &&
                   (n->z == NULL || mil_is_aligned<T>(n->z, n->z_stride));
    return aligned ? launch<T, lanes>(context, a) : launch<T, 1>(context, a);
}

mil_status
mil_cuda_norm_forward(mil_context *context, const mil_norm *arguments)
{
    return MIL_FOR_ACT(context, norm, context, arguments);
}
