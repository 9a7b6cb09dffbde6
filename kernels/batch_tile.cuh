/* Outputs of the kernels for 17 to 64 rows (batch_product.cu, batch_stream.cu), and how sums become them. */
#ifndef MIL_KERNELS_BATCH_TILE_CUH
#define MIL_KERNELS_BATCH_TILE_CUH

#include "cuda.cuh"

struct batch_output {
    const void *weight;
    const float *bias;
    void *y;
    int64_t y_stride;
    int out, first_tile;
    bool accumulate, float_output, wide; /* wide: y takes four outputs at once */
};

/* Whether four outputs of `size` bytes can be written at once. */
static inline bool
batch_is_wide(const void *y, int64_t stride, int64_t out, size_t size)
{
    return (uintptr_t)y % (4 * size) == 0 && stride % 4 == 0 && out % 4 == 0;
}

static inline batch_output
batch_output_of(const mil_linear *p, int first_tile)
{
    return {
        p->weight,     p->bias,         p->y,
        p->y_stride,   (int)p->out,     first_tile,
        p->accumulate, p->float_output, batch_is_wide(p->y, p->y_stride, p->out, p->float_output ? 4 : 2)};
}

static __device__ __forceinline__ void
add_bias(const batch_output &o, int out, float (&sum)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum[i] += o.bias != NULL && out + i < o.out ? o.bias[out + i] : 0.0f;
    }
}

/* Up to four neighbouring outputs of a row. */
template <typename T>
static __device__ __forceinline__ void
write_outputs(T *y, bool wide, int count, const float (&value)[4])
{
    if (wide) {
        if (count > 0) {
            mil_store<4>(y, value);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (i < count) {
            y[i] = mil_round<T>(value[i]);
        }
    }
}

/* What four outputs are added to. */
template <typename T>
static __device__ __forceinline__ void
read_before(const batch_output &o, int row, int out, float (&before)[4])
{
    const T *y = (const T *)o.y + row * o.y_stride + out;
    if (o.wide && out < o.out) {
        mil_load<4>(y, before);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        before[i] = out + i < o.out ? mil_float(y[i]) : 0.0f;
    }
}

template <typename T>
static __device__ __forceinline__ void
finish_outputs(const batch_output &o, int row, int out, const float (&before)[4], float (&sum)[4])
{
    const int count = o.out - out;
    add_bias(o, out, sum);
    int64_t at = row * o.y_stride + out;
    if (o.float_output) {
        write_outputs((float *)o.y + at, o.wide, count, sum);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum[i] = o.accumulate ? sum[i] + before[i] : sum[i];
    }
    write_outputs((T *)o.y + at, o.wide, count, sum);
}

#endif
