/* What the attention kernels share: their arguments, where keys lie, and the tensor cores' 16-bit products.
 *
 * Tiles of 16-bit elements lie in shared memory as rows of D elements, in chunks of 8 (16 bytes).  Chunk c
 * of row r is kept at place c ^ (r % 8) of its row, so that the eight rows of one matrix that ldmatrix
 * reads, which have the same c, fall into different banks.
 */
#ifndef MIL_KERNELS_ATTENTION_CUH
#define MIL_KERNELS_ATTENTION_CUH

#include "mma.cuh"

#include <float.h>

/* A maximum before any key; finite, so that exp(maximum - maximum) is 1 and not NaN. */
#define NO_SCORE (-FLT_MAX)
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

/* ---- arguments --------------------------------------------------------------------------------------- */

/* Caches of up to this many sequences travel as kernel arguments, which saves an upload a layer. */
#define CACHES_INLINE 64

struct cache_list {
    const mil_kv_cache *list; /* [sequences] on the device, or NULL: see k and v */
    void *k[CACHES_INLINE], *v[CACHES_INLINE];
};

/* With up to this many prompts in a call, sequences with few rows get no blocks of the prompts' kernels. */
#define MANY_INLINE 64

struct attention_arguments {
    mil_device_rows rows;
    int heads, kv_heads, group, head_dim;
    int window; /* INT_MAX: none */
    float scale;
    const void *q;
    int64_t q_stride;
    const void *k, *v; /* without caches */
    int64_t kv_stride;
    bool cached;
    cache_list caches;
    void *y;
    int64_t y_stride;
    float *log_sum_exp; /* [rows, heads] or NULL */
    int least, most;    /* a launch serves the sequences that bring so many rows */
    int listed;         /* > 0: the sequences of more than MIL_WINDOW rows are these, else any may be one */
    int many[MANY_INLINE];
};

/* Keys (or values) of one key head, indexed by position in the sequence. */
template <typename C>
struct key_source {
    const C *k, *v;
    int64_t stride;
};

template <typename C>
static __device__ __forceinline__ key_source<C>
find_keys(const attention_arguments &a, int sequence, int kv_head, int64_t first_row)
{
    int64_t head = (int64_t)kv_head * a.head_dim;
    if (!a.cached) {
        int64_t from = first_row * a.kv_stride + head;
        return {(const C *)a.k + from, (const C *)a.v + from, a.kv_stride};
    }
    const void *k = a.caches.k[sequence % CACHES_INLINE], *v = a.caches.v[sequence % CACHES_INLINE];
    if (a.caches.list != NULL) {
        k = a.caches.list[sequence].k;
        v = a.caches.list[sequence].v;
    }
    return {(const C *)k + head, (const C *)v + head, (int64_t)a.kv_heads * a.head_dim};
}

/* A prompts' kernel has blocks for this many sequences, and its i-th is: */
static inline unsigned
prompt_count(const attention_arguments *a)
{
    return (unsigned)(a->listed > 0 ? a->listed : a->rows.sequences);
}

static __device__ __forceinline__ int
find_prompt(const attention_arguments &a, int i)
{
    return a.listed > 0 ? a.many[i] : i;
}

/* Fills `out` for the caches of a call. */
mil_status
mil_attention_list_caches(mil_context *context, const mil_kv_cache *caches, int64_t sequences,
                          cache_list *out);

/* attention_decode.cu: the sequences of at most MIL_WINDOW rows, `longest` the most of one, with caches, where
 * types and places are as below and the GPU has clusters (*done).  `texts`: how many of the longest cache they
 * would be. */
mil_status
mil_attention_decode(mil_context *context, const attention_arguments *a, int64_t longest, int64_t texts,
                     bool *done);

/* attention_prefill.cu: the sequences of more than MIL_WINDOW rows, `longest` the most of one, where 16-bit
 * keys and queries are of the activation type, lie at multiples of 16 bytes, and head_dim is a multiple of
 * 8. */
mil_status
mil_attention_prefill(mil_context *context, const attention_arguments *a, int64_t longest);

/* attention_hopper.cu: the same where *done is set, on GPUs that have wgmma. */
mil_status
mil_attention_prefill_hopper(mil_context *context, const attention_arguments *a, int64_t longest, bool *done);

/* ---- softmax ----------------------------------------------------------------------------------------- */

/* A row's softmax over some keys; the sum of its values is kept apart. */
struct softmax_row {
    float maximum, sum;
};

/* Adds the softmax of later keys to that of earlier ones and tells by which factors their values count.
 * Either may be empty: its factor is 0, or 1 where both are. */
static __device__ __forceinline__ void
merge_rows(softmax_row &to, const softmax_row &from, float &earlier, float &later)
{
    float maximum = fmaxf(to.maximum, from.maximum);
    earlier = mil_exp2(__fsub_rn(to.maximum, maximum));
    later = mil_exp2(__fsub_rn(from.maximum, maximum));
    to.sum = __fmaf_rn(from.sum, later, __fmul_rn(to.sum, earlier));
    to.maximum = maximum;
}

static __device__ __forceinline__ float
merge_values(float to, float from, float earlier, float later)
{
    return __fmaf_rn(from, later, __fmul_rn(to, earlier));
}

/* A thread's running softmax of two rows whose scores it shares with the three other threads of its quad. */
struct softmax_pair {
    float maximum[2], sum[2]; /* sum: of the thread's own scores until softmax_finish */
};

/* Scores s [N / 2] of N keys, as tensor cores leave them (i % 4 / 2 is the row), to weights; takes them
 * into the running rows and gives the factors by which earlier values shrink.  The maximum is of unscaled
 * scores: scaling and subtraction are one instruction. */
template <int N>
static __device__ __forceinline__ void
soften(float (&s)[N / 2], float scale, softmax_pair &rows, float (&factor)[2])
{
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float maximum = rows.maximum[row];
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            maximum = fmaxf(maximum, fmaxf(s[i * 4 + row * 2], s[i * 4 + row * 2 + 1]));
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(MIL_ALL_LANES, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(MIL_ALL_LANES, maximum, 2));
        /* A row that has seen nothing yet: exp2(-inf - 0) and not exp2(-inf + inf). */
        float shift = maximum == -INFINITY ? 0.0f : maximum * scale, sum = 0.0f;
        factor[row] = mil_exp2(rows.maximum[row] * scale - shift);
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            float &even = s[i * 4 + row * 2], &odd = s[i * 4 + row * 2 + 1];
            even = mil_exp2(fmaf(even, scale, -shift));
            odd = mil_exp2(fmaf(odd, scale, -shift));
            sum += even + odd;
        }
        rows.sum[row] = rows.sum[row] * factor[row] + sum;
        rows.maximum[row] = maximum;
    }
}

/* The sum of a whole row, in all threads of its quad. */
static __device__ __forceinline__ float
softmax_finish(float sum)
{
    sum += __shfl_xor_sync(MIL_ALL_LANES, sum, 1);
    return sum + __shfl_xor_sync(MIL_ALL_LANES, sum, 2);
}

/* ---- shared memory ----------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t
shared_address(const void *pointer)
{
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

/* 16 bytes from global to shared memory, in the background; zeros where not `real`. */
static __device__ __forceinline__ void
copy_chunk(uint32_t to, const void *from, bool real)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0));
}

static __device__ __forceinline__ void
copies_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most N of this thread's groups are under way. */
template <int N>
static __device__ __forceinline__ void
copies_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* The byte place of chunk `chunk` of row `row` in a tile of rows of D elements. */
template <int D>
static __device__ __forceinline__ uint32_t
chunk_place(int row, int chunk)
{
    return (uint32_t)(row * D * 2 + ((chunk ^ (row & 7)) << 4));
}

/* ---- 16-bit products --------------------------------------------------------------------------------- */

template <typename T>
constexpr bool is_half = false;
template <>
constexpr bool is_half<__half> = true;

static __device__ __forceinline__ void
load_matrices(uint32_t (&to)[4], uint32_t from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

static __device__ __forceinline__ void
load_matrices_transposed(uint32_t (&to)[4], uint32_t from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

/* Two values rounded into one register, the first in the low half. */
template <typename T>
static __device__ __forceinline__ uint32_t
pack(float low, float high)
{
    uint32_t bits;
    if constexpr (is_half<T>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    }
    else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    }
    return bits;
}

/* The right factors of two products: rows first .. first + 16 of a tile [*, D], transposed, in columns k *
 * 16 ..; b[0] and b[1] for the first 8 rows, b[2] and b[3] for the others. */
template <int D>
static __device__ __forceinline__ void
load_right_rows(uint32_t (&b)[4], uint32_t tile, int first, int k)
{
    int lane = threadIdx.x % MIL_WARP;
    load_matrices(b, tile + chunk_place<D>(first + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
}

/* The same of rows first .. first + 16 as they are, in columns n * 16 ..: b[0] and b[1] for the first 8
 * columns. */
template <int D>
static __device__ __forceinline__ void
load_right_columns(uint32_t (&b)[4], uint32_t tile, int first, int n)
{
    int lane = threadIdx.x % MIL_WARP;
    load_matrices_transposed(b, tile + chunk_place<D>(first + (lane & 15), 2 * n + (lane >> 4)));
}

/* The 16 x 16 part of rows first .. of a tile [*, D] in columns k * 16 .., as the left factor. */
template <int D>
static __device__ __forceinline__ void
load_left(uint32_t (&a)[4], uint32_t tile, int first, int k)
{
    int lane = threadIdx.x % MIL_WARP;
    load_matrices(a, tile + chunk_place<D>(first + (lane & 15), 2 * k + (lane >> 4)));
}

#endif
