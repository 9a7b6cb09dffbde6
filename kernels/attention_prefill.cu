/* Attention of many rows a sequence: prompts, in one piece or in chunks upon a cache (attention_decode.cu:
 * decoding; attention_hopper.cu: the same on Hopper's tensor cores, in other units).
 *
 * Flash attention (Dao 2023): a block owns 64 or 128 query positions of one head and walks the tiles of
 * keys that they see with a running maximum and sum a row, so that scores never leave registers.
 *
 *   shared     Q [128, D] once; K, V [64, D] twice: a tile is copied while the one before it is used
 *   a warp     32 query rows: each K or V fragment read from shared memory serves two products, else its
 *              128 bytes a clock would be the limit and not the tensor cores
 *   work       4 head_dim flops a (query, key); bytes are far from a limit from 128 rows on
 *
 * Tiles that every row of a warp sees whole skip the masking.  Blocks with the longest rows start first;
 * the heads of a group run side by side and find their keys in L2.
 */
#include "attention.cuh"
#include "table.h"

#define WARPS 4

/* D: head_dim rounded up; M: 16-row tiles of queries a warp; N: keys a tile. */
template <int D, int M, int N>
struct prefill_memory {
    alignas(128) uint16_t q[WARPS * M * 16 * D];
    struct {
        alignas(128) uint16_t k[N * D];
        alignas(128) uint16_t v[N * D];
    } stage[2];
};

/* Rows first .. first + ROWS of a strided array, those from `end` on as zeros, by the whole block. */
template <typename T, int D, int ROWS>
static __device__ __forceinline__ void
load_rows(const T *from, int64_t stride, int head_dim, int first, int end, uint32_t tile)
{
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += WARPS * MIL_WARP) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        bool real = first + row < end && chunk * 8 < head_dim;
        copy_chunk(tile + chunk_place<D>(row, chunk), real ? from + (first + row) * stride + chunk * 8 : from,
                   real);
    }
}

/* s = q k^T: the warp's M tiles of 16 queries, from row `own` on, by the N keys of a tile. */
template <typename T, int D, int M, int N>
static __device__ __forceinline__ void
score(uint32_t q, int own, uint32_t k, float (&s)[M][N / 2])
{
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            load_left<D>(left[m], q, own + m * 16, i);
        }
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32_t right[4];
            load_right_rows<D>(right, k, n * 16, i);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mil_multiply_add<T>(s[m] + 8 * n, left[m], right[0], right[1]);
                mil_multiply_add<T>(s[m] + 8 * n + 4, left[m], right[2], right[3]);
            }
        }
    }
}

/* Scores of keys that a query does not see: later ones, and those before its window. */
template <int M, int N>
static __device__ __forceinline__ void
mask(int first_key, int first_position, int window, float (&s)[M][N / 2])
{
    const int thread = threadIdx.x % MIL_WARP;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            int key = first_key + i / 4 * 8 + thread % 4 * 2 + i % 2;
            int position = first_position + m * 16 + i % 4 / 2 * 8 + thread / 4;
            if (key > position || key <= position - window) {
                s[m][i] = -INFINITY;
            }
        }
    }
}

/* acc += s v, s being probabilities by now. */
template <typename T, int D, int M, int N>
static __device__ __forceinline__ void
add_values(const float (&s)[M][N / 2], uint32_t v, float (&acc)[M][D / 2])
{
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
        uint32_t left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                left[m][i] = pack<T>(s[m][8 * n + 2 * i], s[m][8 * n + 2 * i + 1]);
            }
        }
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            uint32_t right[4];
            load_right_columns<D>(right, v, n * 16, i);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mil_multiply_add<T>(acc[m] + 8 * i, left[m], right[0], right[1]);
                mil_multiply_add<T>(acc[m] + 8 * i + 4, left[m], right[2], right[3]);
            }
        }
    }
}

/* Where a block's rows are. */
struct prefill_place {
    int64_t first_row;      /* of the sequence */
    int head, first, count; /* first query of the block; of the sequence's rows */
};

/* acc over the sums to y, through the warp's own rows of Q in shared memory, for steps of 16 bytes. */
template <typename T, int D, int M>
static __device__ __forceinline__ void
write_rows(const attention_arguments &a, const prefill_place &p, int own, uint16_t *q,
           const softmax_pair (&rows)[M], const float (&acc)[M][D / 2])
{
    const int thread = threadIdx.x % MIL_WARP;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float sum = softmax_finish(rows[m].sum[row]), inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
            int place = own + m * 16 + row * 8 + thread / 4;
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                uint32_t at = chunk_place<D>(place, i) + (uint32_t)thread % 4 * 4;
                *(uint32_t *)((char *)q + at) =
                    pack<T>(acc[m][i * 4 + row * 2] * inverse, acc[m][i * 4 + row * 2 + 1] * inverse);
            }
            if (a.log_sum_exp != NULL && thread % 4 == 0 && p.first + place < p.count) {
                a.log_sum_exp[(p.first_row + p.first + place) * a.heads + p.head] =
                    rows[m].maximum[row] * a.scale + logf(sum);
            }
        }
    }
    __syncwarp();
    T *y = (T *)a.y + (p.first_row + p.first) * a.y_stride + (int64_t)p.head * a.head_dim;
    for (int i = thread; i < M * 16 * (D / 8); i += MIL_WARP) {
        int place = own + i / (D / 8), chunk = i % (D / 8);
        if (p.first + place < p.count && chunk * 8 < a.head_dim) {
            *(uint4 *)(y + place * a.y_stride + chunk * 8) =
                *(const uint4 *)((const char *)q + chunk_place<D>(place, chunk));
        }
    }
}

/* Tiles of K and V from key `first` on into a stage. */
template <typename T, int D, int N, typename Stage>
static __device__ __forceinline__ void
load_keys(const key_source<T> &keys, int head_dim, int first, int end, Stage &stage)
{
    load_rows<T, D, N>(keys.k, keys.stride, head_dim, first, end, shared_address(stage.k));
    load_rows<T, D, N>(keys.v, keys.stride, head_dim, first, end, shared_address(stage.v));
}

template <typename T, int D, int M, int N>
static __global__ void
__launch_bounds__(WARPS *MIL_WARP) prefill_kernel(const __grid_constant__ attention_arguments a)
{
    extern __shared__ __align__(128) unsigned char raw[];
    prefill_memory<D, M, N> *memory = reinterpret_cast<prefill_memory<D, M, N> *>(raw);
    constexpr int ROWS = WARPS * M * 16;
    mil_wait();
    int head = blockIdx.x, sequence = find_prompt(a, blockIdx.y),
        first = (int)(gridDim.z - 1 - blockIdx.z) * ROWS;
    int64_t first_row = a.rows.offsets[sequence];
    int count = (int)(a.rows.offsets[sequence + 1] - first_row);
    if (count < a.least || first >= count) {
        return;
    }
    int past = a.cached ? (int)a.rows.past[sequence] : 0, last = first + ROWS < count ? first + ROWS : count;
    int end = past + last, window = a.window; /* keys of this block: .. end - 1 */
    int tile = (past + first + 1 > window ? past + first + 1 - window : 0) / N;

    key_source<T> keys = find_keys<T>(a, sequence, head / a.group, first_row);
    const T *queries = (const T *)a.q + first_row * a.q_stride + (int64_t)head * a.head_dim;
    uint32_t q = shared_address(memory->q);
    load_rows<T, D, ROWS>(queries, a.q_stride, a.head_dim, first, count, q);
    load_keys<T, D, N>(keys, a.head_dim, tile * N, end, memory->stage[0]);
    copies_commit();

    int own = threadIdx.x / MIL_WARP * M * 16; /* the warp's first row */
    softmax_pair rows[M];
    float acc[M][D / 2] = {};
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        rows[i / 2].maximum[i % 2] = -INFINITY;
        rows[i / 2].sum[i % 2] = 0.0f;
    }
    float scale = a.scale * LOG2_E;
    int own_first = past + first + own, own_last = own_first + M * 16 - 1; /* positions of its rows */
    for (int stage = 0; tile * N < end; tile++, stage ^= 1) {
        copies_wait<0>();
        __syncthreads();
        if ((tile + 1) * N < end) {
            load_keys<T, D, N>(keys, a.head_dim, (tile + 1) * N, end, memory->stage[stage ^ 1]);
        }
        copies_commit();
        int first_key = tile * N;
        if (first_key > own_last || first_key + N <= own_first + 1 - window) {
            continue; /* nothing that this warp's rows may see */
        }
        float s[M][N / 2] = {};
        score<T, D, M, N>(q, own, shared_address(memory->stage[stage].k), s);
        if (first_key + N - 1 > own_first || first_key <= own_last - window) {
            mask<M, N>(first_key, own_first, window, s);
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
            float factor[2];
            soften<N>(s[m], scale, rows[m], factor);
#pragma unroll
            for (int i = 0; i < D / 2; i++) {
                acc[m][i] *= factor[i % 4 / 2];
            }
        }
        add_values<T, D, M, N>(s, shared_address(memory->stage[stage].v), acc);
    }
    mil_trigger();
    copies_wait<0>();
    __syncwarp();
    write_rows<T, D, M>(a, {first_row, head, first, count}, own, memory->q, rows, acc);
}

template <typename T, int D, int M, int N>
static mil_status
prefill_tiles(mil_context *context, const attention_arguments *a, int64_t longest)
{
    dim3 grid((unsigned)a->heads, prompt_count(a), (unsigned)mil_ceil_div(longest, WARPS * M * 16));
    return mil_launch(context, "attention (prefill)", prefill_kernel<T, D, M, N>, grid,
                      dim3(WARPS * MIL_WARP), sizeof(prefill_memory<D, M, N>), *a);
}

template <typename T>
static mil_status
prefill(mil_context *context, const attention_arguments *a, int64_t longest)
{
    return a->head_dim <= 64    ? prefill_tiles<T, 64, 2, 64>(context, a, longest)
           : a->head_dim <= 128 ? prefill_tiles<T, 128, 2, 64>(context, a, longest)
                                : prefill_tiles<T, 256, 1, 32>(context, a, longest);
}

mil_status
mil_attention_prefill(mil_context *context, const attention_arguments *a, int64_t longest)
{
    bool done;
    MIL_TRY(mil_attention_prefill_hopper(context, a, longest, &done));
    if (done) {
        return MIL_OK;
    }
    return context->ops->activation_dtype == MIL_F16 ? prefill<__half>(context, a, longest)
                                                     : prefill<__nv_bfloat16>(context, a, longest);
}
