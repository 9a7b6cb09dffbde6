/* Rotary position embedding, in the Hugging Face order (device.h: mil_rope_table, mil_rope; csrc/cpu/rope.c says
 * why the angle is rounded to float32 before its cosine).
 *
 * One table serves all attention layers of a pass.  Each thread rotates pairs (i, i + rotary / 2) of one head; with the append,
 * as many as 16 bytes hold.
 */
#include "attention.cuh"
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

/* Entries i and i + half of a head turned by (cosine, sine): which product is rounded is said here and not left to the
 * compiler, so that all kernels give the same bits. */
static __device__ __forceinline__ float2
turn_pair(float first, float second, float2 turn)
{
    return make_float2(fmaf(first, turn.x, -__fmul_rn(second, turn.y)),
                       fmaf(second, turn.x, __fmul_rn(first, turn.y)));
}

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
        turn.y *= a.direction;
        const float2 turned = turn_pair(mil_float(*low), mil_float(*high), turn);
        *low = mil_round<T>(turned.x);
        *high = mil_round<T>(turned.y);
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

/* ---- rotation and append in one ------------------------------------------------------------------------------ */

struct rope_append_arguments {
    mil_device_rows rows;
    int heads, kv_heads, head_dim, half;
    const float *table;
    void *q;
    int64_t q_stride;
    const void *k, *v;
    int64_t k_stride, v_stride;
    cache_list caches;
};

/* V pairs of one head from pair i on: rotated, rounded to the activation type as rope leaves them. */
template <typename T, int V>
static __device__ __forceinline__ void
rotate_pairs(const rope_append_arguments &a, int64_t row, const T *from, int i, T *low, T *high)
{
    float first[V], second[V];
    mil_load<V>(from + i, first);
    mil_load<V>(from + i + a.half, second);
    const float2 *turns = (const float2 *)a.table + row * a.half + i;
    float turned_low[V], turned_high[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
        const float2 turned = turn_pair(first[j], second[j], turns[j]);
        turned_low[j] = turned.x;
        turned_high[j] = turned.y;
    }
    mil_store<V>(low, turned_low);
    mil_store<V>(high, turned_high);
}

template <typename T, int V>
static __device__ __forceinline__ void
copy_entries(const T *from, T *to)
{
    *reinterpret_cast<mil_vector<T, V> *>(to) = *reinterpret_cast<const mil_vector<T, V> *>(from);
}

/* Items of a row, V entries each: pairs of q, pairs of k, entries of k that are not rotated, entries of v. */
template <typename T, int V>
static __global__ void
rope_append_kernel(const __grid_constant__ rope_append_arguments a)
{
    mil_trigger();
    if (a.rows.each > 0) {
        mil_wait_for_states(a.rows);
    }
    else {
        mil_wait();
    }
    int64_t row = blockIdx.x;
    int sequence = mil_sequence_of(a.rows, row);
    int64_t position = mil_load_number(a.rows.past + sequence) + row - mil_row_of(a.rows, sequence);
    int width = a.kv_heads * a.head_dim, half = a.half / V, rest = a.head_dim / V - 2 * half;
    T *k_cache = (T *)a.caches.k[sequence % CACHES_INLINE],
      *v_cache = (T *)a.caches.v[sequence % CACHES_INLINE];
    if (a.caches.list != NULL) {
        k_cache = (T *)a.caches.list[sequence].k;
        v_cache = (T *)a.caches.list[sequence].v;
    }
    k_cache += position * width;
    v_cache += position * width;
    mil_wait();
    const T *k = (const T *)a.k + row * a.k_stride, *v = (const T *)a.v + row * a.v_stride;
    int item = (int)blockIdx.y * THREADS + (int)threadIdx.x;
    if (item < a.heads * half) {
        int i = item % half * V;
        T *head = (T *)a.q + row * a.q_stride + item / half * a.head_dim;
        rotate_pairs<T, V>(a, row, (const T *)head, i, head + i, head + i + a.half);
        return;
    }
    item -= a.heads * half;
    if (item < a.kv_heads * half) {
        int i = item % half * V, at = item / half * a.head_dim;
        rotate_pairs<T, V>(a, row, k + at, i, k_cache + at + i, k_cache + at + i + a.half);
        return;
    }
    item -= a.kv_heads * half;
    if (item < a.kv_heads * rest) {
        int at = item / rest * a.head_dim + 2 * a.half + item % rest * V;
        copy_entries<T, V>(k + at, k_cache + at);
        return;
    }
    item -= a.kv_heads * rest;
    if (item < width / V) {
        copy_entries<T, V>(v + item * V, v_cache + item * V);
    }
}

template <typename T>
static mil_status
rope_append(mil_context *context, const mil_rope *q, const mil_rope *k, const mil_kv_append *append)
{
    rope_append_arguments a = {mil_rows_of(append->rows),
                               (int)q->heads,
                               (int)k->heads,
                               (int)q->head_dim,
                               (int)(q->rotary / 2),
                               q->table,
                               q->x,
                               q->x_stride,
                               k->x,
                               append->v,
                               k->x_stride,
                               append->kv_stride,
                               {}};
    MIL_TRY(mil_attention_list_caches(context, append->caches, append->rows.sequences, &a.caches));
    int64_t width = k->heads * k->head_dim, pairs = (q->heads + k->heads) * a.half;
    int64_t items = pairs + k->heads * (k->head_dim - q->rotary) + width;
    constexpr int V = mil_lanes<T>;
    const bool vectors = a.half % V == 0 && k->head_dim % V == 0 && mil_is_aligned<T>(q->x, q->x_stride) &&
                         mil_is_aligned<T>(k->x, k->x_stride) &&
                         mil_is_aligned<T>(append->v, append->kv_stride);
    const int64_t threads = items / (vectors ? V : 1);
    return mil_launch(context, "rope_append", vectors ? rope_append_kernel<T, V> : rope_append_kernel<T, 1>,
                      dim3((unsigned)q->rows, (unsigned)mil_ceil_div(threads, THREADS)), dim3(THREADS), 0, a);
}

/* Whether the caches are of the activation type, and the two rotations alike. */
static bool
is_uniform(const mil_context *context, const mil_rope *q, const mil_rope *k, const mil_kv_append *append)
{
    bool uniform = q->rotary == k->rotary && q->head_dim == k->head_dim && !q->inverse && !k->inverse;
    for (int64_t i = 0; i < append->rows.sequences; i++) {
        uniform = uniform && append->caches[i].dtype == context->ops->activation_dtype;
    }
    return uniform;
}

mil_status
mil_cuda_rope_append(mil_context *context, const mil_rope *q, const mil_rope *k, const mil_kv_append *append)
{
    if (!is_uniform(context, q, k, append)) {
        MIL_TRY(mil_cuda_rope(context, q));
        MIL_TRY(mil_cuda_rope(context, k));
        return mil_cuda_kv_append(context, append);
    }
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_status status = MIL_FOR_ACT(context, rope_append, context, q, k, append);
    mil_arena_rewind(context->scratch, mark);
    return status;
}
