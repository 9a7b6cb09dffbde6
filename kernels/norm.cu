/* RMS norm of groups of columns, plain or gated (device.h: mil_norm).
 *
 *   y = n(x) weight,   n(x silu(z)) weight   or   n(x) weight silu(z),   n(v) = v / sqrt(mean(v^2) + eps)
 *
 * Bytes: x (and z) are read once where a thread's columns fit its registers, else a second time from the first-level
 * cache; y is written once.  Groups up to a thousand columns (heads) take a warp or a part of one each, wider ones (the
 * residual stream) a block each.  Of many such rows a block does several, with the weights in registers: 4 bytes a column
 * from the second-level cache would be as much as the rows themselves.  Sums go thread by thread over a fixed stride and
 * then up a fixed tree, so a row's bits depend on nothing but the row.
 */
#include "norm.cuh"
#include "table.h"

#define WARPS 4 /* of a block that does several groups */

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

/* Rows of one group each, STEPS vectors a thread, with the weights there before the rows are. FEW: a row is one trip to
 * memory; else other blocks have work while it is under way, and fewer registers are better.  GATED: z is given; its code is twice as
 * long as all the rest. */
template <typename T, int V, int STEPS, bool FEW, bool GATED>
static __global__ void
__launch_bounds__(MIL_NORM_THREADS) norm_rows(norm_arguments a)
{
    __shared__ float partial[MIL_WARP];
    float weight[STEPS][V], value[STEPS][V], gate[V];
    mil_trigger();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        int64_t column = ((int64_t)s * MIL_NORM_THREADS + threadIdx.x) * V;
#pragma unroll
        for (int i = 0; i < V; i++) {
            weight[s][i] = a.weight != NULL && column < a.group ? a.weight[column + i] : 1.0f;
        }
    }
    mil_wait();
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        const T *x = (const T *)a.x + row * a.x_stride;
        const T *z = GATED ? (const T *)a.z + row * a.z_stride : NULL;
        T *y = group_output<T>(a, row, 0);
        mil_vector<T, V> inputs[STEPS], gates[STEPS];
#pragma unroll
        for (int s = 0; FEW && s < STEPS; s++) {
            int64_t column = ((int64_t)s * MIL_NORM_THREADS + threadIdx.x) * V;
            if (column < a.group) {
                inputs[s] = *(const mil_vector<T, V> *)(x + column);
            }
            if (GATED && column < a.group) {
                gates[s] = *(const mil_vector<T, V> *)(z + column);
            }
        }
        float squares = 0.0f;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            int64_t column = ((int64_t)s * MIL_NORM_THREADS + threadIdx.x) * V;
            if (column < a.group) {
                if constexpr (!FEW) {
                    load_input<T, V>(a, x, z, column, value[s], gate);
                }
#pragma unroll
                for (int i = 0; i < V; i++) {
                    if constexpr (FEW) {
                        value[s][i] = mil_float(inputs[s].at[i]);
                        value[s][i] *= GATED ? mil_silu(mil_float(gates[s].at[i])) : 1.0f;
                    }
                    squares = fmaf(value[s][i], value[s][i], squares);
                }
            }
        }
        float scale = mil_norm_factor(a, mil_block_sum(squares, partial));
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            int64_t column = ((int64_t)s * MIL_NORM_THREADS + threadIdx.x) * V;
            if (column < a.group) {
#pragma unroll
                for (int i = 0; i < V; i++) {
                    value[s][i] *= scale;
                    value[s][i] *= weight[s][i];
                }
                mil_store<V>(y + column, value[s]);
            }
        }
    }
}

/* LANES lanes a group, a vector of it each: one trip to memory, with the weights there before.  The sum is that of a whole
 * warp, the rest of which would add zeros. */
template <typename T, int V, int LANES>
static __global__ void
norm_by_lanes(norm_arguments a)
{
    const int lane = threadIdx.x % LANES, column = lane * V;
    const unsigned own = (LANES == 32 ? ~0u : (1u << LANES % 32) - 1)
                         << threadIdx.x % MIL_WARP / LANES * LANES;
    const int64_t item = ((int64_t)blockIdx.x * WARPS * MIL_WARP + threadIdx.x) / LANES;
    const int64_t row = item / a.groups, group = item % a.groups;
    const bool real = row < a.rows, there = real && column < a.group;
    const float *weights = norm_weight(a, group);
    float weight[V], value[V] = {}, gate[V], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < V; i++) {
        weight[i] = there && weights != NULL ? weights[column + i] : 1.0f;
    }
    const T *x = (const T *)a.x + row * a.x_stride + group * a.group;
    const T *z = a.z == NULL ? NULL : (const T *)a.z + row * a.z_stride + group * a.group;
    mil_trigger();
    mil_wait();
    if (!real) {
        return;
    }
    if (there) {
        load_input<T, V>(a, x, z, column, value, gate);
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
        squares = fmaf(value[i], value[i], squares);
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        squares += __shfl_xor_sync(own, squares, step);
    }
    const float scale = mil_norm_factor(a, squares);
#pragma unroll
    for (int i = 0; i < V; i++) {
        value[i] *= scale;
        value[i] *= weight[i];
        value[i] *= z != NULL && a.norm_before_gate ? gate[i] : 1.0f;
    }
    if (there) {
        mil_store<V>(group_output<T>(a, row, group) + column, value);
    }
}

/* A group of more vectors than a warp has lanes. */
template <typename T, int V>
static __global__ void
norm_by_warp(norm_arguments a)
{
    const int64_t item = (int64_t)blockIdx.x * WARPS + threadIdx.x / MIL_WARP;
    mil_trigger();
    mil_wait();
    if (item < a.rows * a.groups) {
        const int64_t row = item / a.groups, group = item % a.groups;
        norm_group<T, V>(a, row, group, norm_weight(a, group), group_output<T>(a, row, group),
                         (int)threadIdx.x % MIL_WARP, MIL_WARP,
                         [](float value) { return mil_warp_sum(value); });
    }
}

/* The kernel for rows of so many vectors a thread. */
template <typename T, int V, bool GATED>
static auto
choose_rows(int64_t steps, bool few)
{
    return few          ? steps == 1   ? norm_rows<T, V, 1, true, GATED>
                          : steps == 2 ? norm_rows<T, V, 2, true, GATED>
                                       : norm_rows<T, V, 4, true, GATED>
           : steps == 1 ? norm_rows<T, V, 1, false, GATED>
           : steps == 2 ? norm_rows<T, V, 2, false, GATED>
                        : norm_rows<T, V, 4, false, GATED>;
}

template <typename T, int V>
static mil_status
launch(mil_context *context, const norm_arguments &a)
{
    const int64_t items = a.rows * a.groups, most = 1024; /* blocks, of which each keeps its weights */
    const int64_t steps = mil_ceil_div(a.group, (int64_t)MIL_NORM_THREADS * V);
    if (a.group <= MIL_NORM_WIDEST_FOR_WARP) {
        const int lanes = a.group <= 8 * V ? 8 : a.group <= 16 * V ? 16 : 32;
        return mil_launch(context, "norm",
                          lanes == 8                ? norm_by_lanes<T, V, 8>
                          : lanes == 16             ? norm_by_lanes<T, V, 16>
                          : a.group <= MIL_WARP * V ? norm_by_lanes<T, V, 32>
                                                    : norm_by_warp<T, V>,
                          dim3((unsigned)mil_ceil_div(items * lanes, WARPS * MIL_WARP)),
                          dim3(WARPS * MIL_WARP), 0, a);
    }
    if (a.groups == 1 && steps <= 4 && (a.z == NULL || !a.norm_before_gate)) {
        const bool few = a.rows < most;
        return mil_launch(
            context, "norm",
            a.z != NULL ? choose_rows<T, V, true>(steps, few) : choose_rows<T, V, false>(steps, few),
            dim3((unsigned)(few ? a.rows : most)), dim3(MIL_NORM_THREADS), 0, a);
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
