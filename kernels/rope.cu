/* Rotary position embedding, in the Hugging Face order (device.h: mil_rope_table, mil_rope; csrc/cpu/rope.c says
 * why the angle is rounded to float32 before its cosine).
 *
 * One table serves all attention layers of a pass.  Each thread rotates pairs (i, i + rotary / 2) of one head.
 */
#include "cuda.cuh"
#include "table.h"

#define THREADS 128

struct table_arguments {
    mil_device_rows rows;
    int64_t half;
    const float *inv_freq;
    int64_t inv_freq_stride;
    float scale;
    float *table;
};

static __global__ void
fill_table(table_arguments a)
{
    mil_trigger();
    mil_wait();
    int64_t row = blockIdx.x;
    int sequence = mil_sequence_of(a.rows, row);
    float position = (float)(a.rows.past[sequence] + row - a.rows.offsets[sequence]);
    for (int64_t i = threadIdx.x; i < a.half; i += blockDim.x) {
        float angle = position * a.inv_freq[sequence * a.inv_freq_stride + i];
        float2 *to = (float2 *)a.table + row * a.half + i;
        *to = make_float2(cosf(angle) * a.scale, sinf(angle) * a.scale);
    }
}

mil_status
mil_cuda_rope_table(mil_context *context, const mil_rope_table *arguments)
{
    const mil_rope_table *t = arguments;
    if (t->rotary % 2 != 0) {
        return mil_fail(MIL_ERR_SHAPE, "rope_table: rotary = %lld is not even", (long long)t->rotary);
    }
    int64_t half = t->rotary / 2, frequencies = t->inv_freq_stride == 0 ? half : half * t->rows.sequences;
    const void *inv_freq;
    MIL_TRY(context->ops->upload(context, t->inv_freq, (size_t)frequencies * sizeof(float), &inv_freq));
    table_arguments a = {mil_rows_of(t->rows), half,     (const float *)inv_freq,
                         t->inv_freq_stride,   t->scale, t->table};
    return mil_launch(context, "rope_table", fill_table, dim3((unsigned)t->rows.rows), dim3(THREADS), 0, a);
}

struct rope_arguments {
    int64_t heads, head_dim, half;
    const float *table;
    float direction;
    void *x;
    int64_t x_stride;
};

template <typename T>
static __global__ void
rotate(rope_arguments a)
{
    mil_trigger();
    mil_wait();
    int64_t row = blockIdx.x;
    T *x = (T *)a.x + row * a.x_stride;
    const float2 *table = (const float2 *)a.table + row * a.half;
    int64_t pair = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    if (pair < a.heads * a.half) {
        int64_t i = pair % a.half;
        T *low = x + pair / a.half * a.head_dim + i, *high = low + a.half;
        float2 turn = table[i];
        float first = mil_float(*low), second = mil_float(*high), sine = a.direction * turn.y;
        *low = mil_round<T>(first * turn.x - second * sine);
        *high = mil_round<T>(second * turn.x + first * sine);
    }
}

template <typename T>
static mil_status
rope(mil_context *context, const mil_rope *r)
{
    rope_arguments a = {r->heads, r->head_dim, r->rotary / 2, r->table, r->inverse ? -1.0f : 1.0f,
                        r->x,     r->x_stride};
    dim3 grid((unsigned)r->rows, (unsigned)mil_ceil_div(r->heads * (r->rotary / 2), THREADS));
    return mil_launch(context, "rope", rotate<T>, grid, dim3(THREADS), 0, a);
}

mil_status
mil_cuda_rope(mil_context *context, const mil_rope *arguments)
{
    const mil_rope *r = arguments;
    if (r->rotary % 2 != 0 || r->rotary > r->head_dim) {
        return mil_fail(MIL_ERR_SHAPE, "rope: rotary = %lld is not an even number up to head_dim = %lld",
                        (long long)r->rotary, (long long)r->head_dim);
    }
    return MIL_FOR_ACT(context, rope, context, r);
}
