/* One group of an RMS norm, as norm.cu and the products that begin with a norm compute it: the same bits. */
#ifndef MIL_KERNELS_NORM_CUH
#define MIL_KERNELS_NORM_CUH

#include "cuda.cuh"

/* Groups up to this many columns take a warp each, wider ones a block of MIL_NORM_THREADS. */
#define MIL_NORM_WIDEST_FOR_WARP 1024
#define MIL_NORM_THREADS 256

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

/* The weights of a group, or NULL. */
static __device__ __forceinline__ const float *
norm_weight(const norm_arguments &a, int64_t group)
{
    return a.weight == NULL ? NULL : a.weight + (a.weight_per_group ? 0 : group * a.group);
}

/* What a group is multiplied by, from the sum of its squares: to some units in float32's last place, by instructions instead of
 * subroutines, as all of a kernel waits for it. */
static __device__ __forceinline__ float
mil_norm_factor(const norm_arguments &a, float squares)
{
    return rsqrtf(__fdividef(squares, (float)a.group) + a.eps);
}

/* One group into y by `threads` threads, of which this is number `thread`; `sum` adds up over them. */
template <typename T, int V, typename Sum>
static __device__ __forceinline__ void
norm_group(const norm_arguments &a, int64_t row, int64_t group, const float *weight, T *y, int thread,
           int threads, Sum sum)
{
    const T *x = (const T *)a.x + row * a.x_stride + group * a.group;
    const T *z = a.z == NULL ? NULL : (const T *)a.z + row * a.z_stride + group * a.group;
    float value[V], gate[V];
    float squares = 0.0f;
    for (int64_t column = (int64_t)thread * V; column < a.group; column += (int64_t)threads * V) {
        load_input<T, V>(a, x, z, column, value, gate);
#pragma unroll
        for (int i = 0; i < V; i++) {
            squares = fmaf(value[i], value[i], squares);
        }
    }
    float scale = mil_norm_factor(a, sum(squares));
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

static inline norm_arguments
norm_arguments_of(const mil_norm *n)
{
    return {n->rows,
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
}

#endif
