/* RMS norm of groups of columns, plain or gated (device.h: mil_norm).
 *
 *   y = n(x) weight,   n(x silu(z)) weight   or   n(x) weight silu(z),   n(v) = v / sqrt(mean(v^2) + eps)
 *
 * Bytes: x (and z) are read twice, the second time from the first-level cache; y is written once.  Groups up to
 * a thousand columns (heads) take a warp each, wider ones (the residual stream) a block each.  Sums go thread by
 * thread over a fixed stride and then up a fixed tree, so a row's bits depend on nothing but the row.
 */
#include "norm.cuh"
#include "table.h"

#define WARPS 4 /* groups of a block, where each takes a warp */

template <typename T>
static __device__ __forceinline__ T *
group_output(const norm_arguments &a, int64_t row, int64_t group)
{
    return (T *)a.y + row * a.y_stride + group * a.group;
}

template <typename T, int V>
static __global__ void
norm_by_block(norm_arguments a)
{
    __shared__ float partial[MIL_WARP];
    mil_trigger();
    mil_wait();
    int64_t row = blockIdx.x / a.groups, group = blockIdx.x % a.groups;
    norm_group<T, V>(a, row, group, norm_weight(a, group), group_output<T>(a, row, group), (int)threadIdx.x,
                     MIL_NORM_THREADS, [&](float value) { return mil_block_sum(value, partial); });
}

template <typename T, int V>
static __global__ void
norm_by_warp(norm_arguments a)
{
    int64_t item = (int64_t)blockIdx.x * WARPS + threadIdx.x / MIL_WARP;
    mil_trigger();
    mil_wait();
    if (item < a.rows * a.groups) {
        int64_t row = item / a.groups, group = item % a.groups;
        norm_group<T, V>(a, row, group, norm_weight(a, group), group_output<T>(a, row, group),
                         (int)threadIdx.x % MIL_WARP, MIL_WARP,
                         [](float value) { return mil_warp_sum(value); });
    }
}

template <typename T, int V>
static mil_status
launch(mil_context *context, const norm_arguments &a)
{
    int64_t items = a.rows * a.groups;
    if (a.group <= MIL_NORM_WIDEST_FOR_WARP) {
        return mil_launch(context, "norm", norm_by_warp<T, V>, dim3((unsigned)mil_ceil_div(items, WARPS)),
                          dim3(WARPS * MIL_WARP), 0, a);
    }
    return mil_launch(context, "norm", norm_by_block<T, V>, dim3((unsigned)items), dim3(MIL_NORM_THREADS), 0,
                      a);
}

template <typename T>
static mil_status
norm(mil_context *context, const mil_norm *n)
{
    norm_arguments a = norm_arguments_of(n);
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
