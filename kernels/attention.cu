/* Causal softmax attention over packed sequences with grouped heads and sliding windows
 * (csrc/cpu/attention.c has the formula), and the writing of keys and values into caches.
 *
 * Decoding (at most MIL_WINDOW rows a sequence, keys in caches) is in attention_decode.cu, prefill in
 * attention_prefill.cu.  float32 activations, head_dim no multiple of 8, caches of another type than the
 * activations, and GPUs without clusters or with less shared memory than Hopper take the plain kernel below: a
 * block a row and head, in float32 arithmetic, of the same bits for any grouping of rows.
 */
#include "attention.cuh"
#include "table.h"

#include <limits.h>

/* ---- appending to caches ----------------------------------------------------------------------------- */

struct append_arguments {
    mil_device_rows rows;
    int width; /* kv_heads * head_dim */
    const void *k, *v;
    int64_t kv_stride;
    cache_list caches;
};

#define APPEND_THREADS 128

/* One row's k (blockIdx.y = 0) or v, N elements a thread. */
template <typename T, typename C, int N>
static __global__ void
append_kernel(const __grid_constant__ append_arguments a)
{
    mil_trigger();
    mil_wait();
    int64_t row = blockIdx.x;
    int sequence = mil_sequence_of(a.rows, row);
    bool values = blockIdx.y == 1;
    void *cache = values ? a.caches.v[sequence % CACHES_INLINE] : a.caches.k[sequence % CACHES_INLINE];
    if (a.caches.list != NULL) {
        cache = values ? a.caches.list[sequence].v : a.caches.list[sequence].k;
    }
    int64_t position = a.rows.past[sequence] + row - a.rows.offsets[sequence];
    const T *from = (const T *)(values ? a.v : a.k) + row * a.kv_stride;
    C *to = (C *)cache + position * a.width;
    for (int i = threadIdx.x * N; i < a.width; i += APPEND_THREADS * N) {
        float x[N];
        mil_load<N>(from + i, x);
        mil_store<N>(to + i, x);
    }
}

mil_status
mil_attention_list_caches(mil_context *context, const mil_kv_cache *caches, int64_t sequences,
                          cache_list *out)
{
    out->list = NULL;
    if (sequences > CACHES_INLINE) {
        const void *list;
        MIL_TRY(context->ops->upload(context, caches, (size_t)sequences * sizeof *caches, &list));
        out->list = (const mil_kv_cache *)list;
        return MIL_OK;
    }
    for (int64_t s = 0; s < sequences; s++) {
        out->k[s] = caches[s].k;
        out->v[s] = caches[s].v;
    }
    return MIL_OK;
}

/* All caches of a call are of one type, and whether each begins at a multiple of 16 bytes. */
static mil_status
check_caches(const char *name, const mil_kv_cache *caches, int64_t sequences, bool *aligned)
{
    *aligned = true;
    for (int64_t s = 0; s < sequences; s++) {
        if (caches[s].dtype != caches[0].dtype) {
            return mil_fail(MIL_ERR_DTYPE, "%s: caches[%lld] is %s and caches[0] %s; one call takes one type",
                            name, (long long)s, mil_dtype_name(caches[s].dtype),
                            mil_dtype_name(caches[0].dtype));
        }
        *aligned &= ((uintptr_t)caches[s].k | (uintptr_t)caches[s].v) % 16 == 0;
    }
    return MIL_OK;
}

template <typename T, typename C>
static mil_status
append_of(mil_context *context, const append_arguments &a, int64_t rows, bool aligned)
{
    constexpr int N = 16 / (int)(sizeof(T) > sizeof(C) ? sizeof(T) : sizeof(C));
    bool wide = aligned && a.width % 8 == 0 && mil_is_aligned<T>(a.k, a.kv_stride) &&
                mil_is_aligned<T>(a.v, a.kv_stride);
    return mil_launch(context, "kv_append", wide ? append_kernel<T, C, N> : append_kernel<T, C, 1>,
                      dim3((unsigned)rows, 2), dim3(APPEND_THREADS), 0, a);
}

template <typename T>
static mil_status
append(mil_context *context, const mil_kv_append *given)
{
    append_arguments a = {mil_rows_of(given->rows),
                          (int)(given->kv_heads * given->head_dim),
                          given->k,
                          given->v,
                          given->kv_stride,
                          {}};
    bool aligned;
    MIL_TRY(check_caches("kv_append", given->caches, given->rows.sequences, &aligned));
    MIL_TRY(mil_attention_list_caches(context, given->caches, given->rows.sequences, &a.caches));
    mil_dtype dtype = given->caches[0].dtype;
    return dtype == MIL_BF16  ? append_of<T, __nv_bfloat16>(context, a, given->rows.rows, aligned)
           : dtype == MIL_F16 ? append_of<T, __half>(context, a, given->rows.rows, aligned)
                              : append_of<T, float>(context, a, given->rows.rows, aligned);
}

mil_status
mil_cuda_kv_append(mil_context *context, const mil_kv_append *arguments)
{
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_status status = MIL_FOR_ACT(context, append, context, arguments);
    mil_arena_rewind(context->scratch, mark);
    return status;
}

/* ---- the plain kernel -------------------------------------------------------------------------------- */

#define PLAIN_WARPS 4
#define PLAIN_MOST 256 /* head_dim */
#define PLAIN_COLUMNS (PLAIN_MOST / MIL_WARP)

template <typename T>
static __device__ __forceinline__ float
exp_for(float x)
{
    return sizeof(T) == 4 ? expf(x) : __expf(x);
}

/* q k for one key, N elements a step, in the order of the elements. */
template <typename C, int N>
static __device__ __forceinline__ float
dot(const float *q, const C *k, int head_dim)
{
    float sum = 0.0f;
    for (int i = 0; i < head_dim; i += N) {
        float x[N];
        mil_load<N>(k + i, x);
#pragma unroll
        for (int j = 0; j < N; j++) {
            sum = __fmaf_rn(q[i + j], x[j], sum);
        }
    }
    return sum;
}

/* A block a (row, query head).  Warp w takes the runs of 32 keys w, w + 4, ... of the sequence, a key a
 * thread for the scores, a column a thread for the values. */
template <typename T, typename C, int N>
static __global__ void
__launch_bounds__(PLAIN_WARPS *MIL_WARP) plain_kernel(const __grid_constant__ attention_arguments a)
{
    __shared__ alignas(16) float q[PLAIN_MOST];
    __shared__ float values[PLAIN_WARPS][PLAIN_MOST];
    __shared__ softmax_row rows[PLAIN_WARPS];
    mil_trigger();
    mil_wait();
    int64_t row = blockIdx.x;
    int sequence = mil_sequence_of(a.rows, row), head = blockIdx.y;
    int64_t first_row = a.rows.offsets[sequence];
    int count = (int)(a.rows.offsets[sequence + 1] - first_row);
    if (count < a.least || count > a.most) {
        return;
    }
    int warp = threadIdx.x / MIL_WARP, lane = threadIdx.x % MIL_WARP;
    for (int i = threadIdx.x; i < a.head_dim; i += blockDim.x) {
        q[i] = mil_float(((const T *)a.q)[row * a.q_stride + (int64_t)head * a.head_dim + i]) * a.scale;
    }
    __syncthreads();
    int past = a.cached ? (int)a.rows.past[sequence] : 0, high = past + (int)(row - first_row) + 1;
    int low = high > a.window ? high - a.window : 0, first_run = low / MIL_WARP;
    key_source<C> keys = find_keys<C>(a, sequence, head / a.group, first_row);
    softmax_row state = {NO_SCORE, 0.0f};
    float acc[PLAIN_COLUMNS] = {};
    int run = first_run + (warp - first_run % PLAIN_WARPS + PLAIN_WARPS) % PLAIN_WARPS;
    for (; run * MIL_WARP < high; run += PLAIN_WARPS) {
        int key = run * MIL_WARP + lane;
        bool seen = key >= low && key < high;
        float score = seen ? dot<C, N>(q, keys.k + key * keys.stride, a.head_dim) : -INFINITY;
        float maximum = fmaxf(state.maximum, mil_warp_max(score));
        float weight = seen ? exp_for<T>(score - maximum) : 0.0f,
              factor = exp_for<T>(state.maximum - maximum);
        state.sum = __fmaf_rn(state.sum, factor, mil_warp_sum(weight));
        state.maximum = maximum;
#pragma unroll
        for (int i = 0; i < PLAIN_COLUMNS; i++) {
            acc[i] *= factor;
        }
        int from = low - run * MIL_WARP > 0 ? low - run * MIL_WARP : 0, to = high - run * MIL_WARP;
        for (int j = from; j < (to < MIL_WARP ? to : MIL_WARP); j++) {
            const C *v = keys.v + (int64_t)(run * MIL_WARP + j) * keys.stride;
            float share = __shfl_sync(MIL_ALL_LANES, weight, j);
#pragma unroll
            for (int i = 0; i < PLAIN_COLUMNS; i++) {
                int column = i * MIL_WARP + lane;
                if (column < a.head_dim) {
                    acc[i] = __fmaf_rn(share, mil_float(v[column]), acc[i]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < PLAIN_COLUMNS; i++) {
        values[warp][i * MIL_WARP + lane] = acc[i];
    }
    if (lane == 0) {
        rows[warp] = state;
    }
    __syncthreads();
    float maximum = NO_SCORE, sum = 0.0f, factor[PLAIN_WARPS];
    for (int i = 0; i < PLAIN_WARPS; i++) {
        maximum = fmaxf(maximum, rows[i].maximum);
    }
#pragma unroll
    for (int i = 0; i < PLAIN_WARPS; i++) {
        factor[i] = exp_for<T>(rows[i].maximum - maximum);
        sum = __fmaf_rn(rows[i].sum, factor[i], sum);
    }
    for (int i = threadIdx.x; i < a.head_dim; i += blockDim.x) {
        float y = 0.0f;
#pragma unroll
        for (int j = 0; j < PLAIN_WARPS; j++) {
            y = __fmaf_rn(values[j][i], factor[j], y);
        }
        ((T *)a.y)[row * a.y_stride + (int64_t)head * a.head_dim + i] = mil_round<T>(y / sum);
    }
    if (a.log_sum_exp != NULL && threadIdx.x == 0) {
        a.log_sum_exp[row * a.heads + head] = maximum + logf(sum);
    }
}

template <typename T, typename C>
static mil_status
plain_of(mil_context *context, const attention_arguments *a, int64_t rows, bool aligned)
{
    constexpr int N = mil_lanes<C>;
    bool wide = aligned && a->head_dim % N == 0;
    return mil_launch(context, "attention (plain)", wide ? plain_kernel<T, C, N> : plain_kernel<T, C, 1>,
                      dim3((unsigned)rows, (unsigned)a->heads), dim3(PLAIN_WARPS * MIL_WARP), 0, *a);
}

template <typename T>
static mil_status
plain(mil_context *context, const attention_arguments *a, int64_t rows, mil_dtype keys, bool aligned)
{
    return keys == MIL_BF16  ? plain_of<T, __nv_bfloat16>(context, a, rows, aligned)
           : keys == MIL_F16 ? plain_of<T, __half>(context, a, rows, aligned)
                             : plain_of<T, float>(context, a, rows, aligned);
}

/* ---- choosing ---------------------------------------------------------------------------------------- */

static mil_status
check_args(const mil_attention *a)
{
    if (a->kv_heads < 1 || a->heads % a->kv_heads != 0) {
        return mil_fail(MIL_ERR_SHAPE, "attention_forward: heads = %lld is not a multiple of kv_heads = %lld",
                        (long long)a->heads, (long long)a->kv_heads);
    }
    if (a->head_dim < 1 || a->head_dim > PLAIN_MOST) {
        return mil_fail(MIL_ERR_UNSUPPORTED, "attention_forward: head_dim = %lld; on CUDA it is at most %d",
                        (long long)a->head_dim, PLAIN_MOST);
    }
    if (a->rows.sequences > 65535) {
        return mil_fail(MIL_ERR_UNSUPPORTED, "attention_forward: %lld sequences; on CUDA at most 65535",
                        (long long)a->rows.sequences);
    }
    return MIL_OK;
}

/* Sequences with few rows and sequences with many go to different kernels, so that a token's bits are the
 * same whoever else is in the call. */
template <typename T>
static mil_status
forward(mil_context *context, const mil_attention *given)
{
    MIL_TRY(check_args(given));
    attention_arguments a = {};
    a.rows = mil_rows_of(given->rows);
    a.heads = (int)given->heads;
    a.kv_heads = (int)given->kv_heads;
    a.group = a.heads / a.kv_heads;
    a.head_dim = (int)given->head_dim;
    a.window = given->window > 0 && given->window < INT_MAX ? (int)given->window : INT_MAX;
    a.scale = given->scale;
    a.q = given->q;
    a.q_stride = given->q_stride;
    a.k = given->k;
    a.v = given->v;
    a.kv_stride = given->kv_stride;
    a.y = given->y;
    a.y_stride = given->y_stride;
    a.log_sum_exp = given->log_sum_exp;
    a.cached = given->caches != NULL;
    mil_dtype keys = context->ops->activation_dtype;
    bool aligned =
        mil_is_aligned<T>(given->k, given->kv_stride) && mil_is_aligned<T>(given->v, given->kv_stride);
    if (a.cached) {
        MIL_TRY(check_caches("attention_forward", given->caches, given->rows.sequences, &aligned));
        MIL_TRY(mil_attention_list_caches(context, given->caches, given->rows.sequences, &a.caches));
        keys = given->caches[0].dtype;
    }
    int64_t most_few = 0, most_many = 0, longest = 1, all = 0; /* longest, all: tokens of caches */
    for (int64_t s = 0; s < given->rows.sequences; s++) {
        int64_t count = given->rows.offsets[s + 1] - given->rows.offsets[s];
        if (count <= MIL_WINDOW) {
            most_few = count > most_few ? count : most_few;
            if (a.cached) {
                int64_t capacity = given->caches[s].capacity;
                longest = capacity > longest ? capacity : longest;
                all += capacity;
            }
            continue;
        }
        most_many = count > most_many ? count : most_many;
        if (a.listed >= 0) {
            a.many[a.listed % MANY_INLINE] = (int)s;
            a.listed = a.listed < MANY_INLINE ? a.listed + 1 : -1;
        }
    }
    bool tensor = keys == context->ops->activation_dtype && sizeof(T) == 2 && aligned &&
                  a.head_dim % 8 == 0 && a.scale > 0.0f && mil_is_aligned<T>(a.q, a.q_stride) &&
                  mil_is_aligned<T>(a.y, a.y_stride);
    if (most_few > 0) {
        a.least = 0;
        a.most = MIL_WINDOW;
        bool done = false;
        if (tensor && a.cached) {
            MIL_TRY(mil_attention_decode(context, &a, most_few, all / longest, &done));
        }
        if (!done) {
            MIL_TRY(plain<T>(context, &a, given->rows.rows, keys, aligned));
        }
    }
    if (most_many > 0) {
        a.least = MIL_WINDOW + 1;
        a.most = INT_MAX;
        if (tensor) { /* its maximum is taken before the scale, which must not turn it round */
            return mil_attention_prefill(context, &a, most_many);
        }
        return plain<T>(context, &a, given->rows.rows, keys, aligned);
    }
    return MIL_OK;
}

mil_status
mil_cuda_attention_forward(mil_context *context, const mil_attention *arguments)
{
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_status status = MIL_FOR_ACT(context, forward, context, arguments);
    mil_arena_rewind(context->scratch, mark);
    return status;
}
