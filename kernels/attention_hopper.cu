/* Attention of many rows a sequence on Hopper: flash attention over wgmma (Shah et al. 2024, without their copy engine).
 *
 * A block of two groups of four warps owns 128 query positions of one head, 64 a group, and walks the tiles of keys:
 *
 *   shared     Q [128, D] once; K and V [N, D] twice each
 *   a group    S = Q K^T [64, N] from shared memory into registers, softmax there, rounded into P,
 *              O += P V with P from registers
 *   overlap    S of tile j and O of tile j - 1 are started together; while the second runs, the softmax of the first is
 *              computed.  Tile j + 1 of K and tile j of V are copied in the meantime
 *
 * mma.sync, which attention_prefill.cu uses, reaches about 0.6 of these tensor cores' rate and needs its factors in
 * registers.  Copies are cp.async and no tensor maps: keys lie in as many caches as there are sequences, and
 * rows begin anywhere.
 */
#include "attention.cuh"
#include "table.h"
#include "wgmma.cuh"

#define GROUPS 2
#define THREADS (GROUPS * 128)
#define ROWS (GROUPS * 64)

/* D: head_dim rounded up, in panels of 64; N: keys a tile. */
template <int D, int N>
struct hopper_memory {
    alignas(1024) uint16_t q[ROWS * D];
    alignas(1024) uint16_t k[2][N * D];
    alignas(1024) uint16_t v[2][N * D];
};

/* What a thread copies of each tile: always the same chunk, of every (8 * THREADS / D)-th row. */
template <typename T, int D>
struct copier {
    static constexpr int STEP = THREADS * 8 / D;
    const T *from; /* row 0, this thread's chunk */
    int64_t stride;
    int row; /* the first row */
    bool inside;

    __device__ __forceinline__ copier(const T *rows, int64_t row_stride, int head_dim)
    {
        int chunk = threadIdx.x % (D / 8);
        row = threadIdx.x / (D / 8);
        stride = row_stride;
        inside = chunk * 8 < head_dim;
        from = rows + (inside ? chunk * 8 : 0);
    }

    /* Rows first .. first + COUNT into a tile, those from `end` on as zeros. */
    template <int COUNT>
    __device__ __forceinline__ void copy(int first, int end, uint32_t tile) const
    {
        uint32_t to = tile + panel_place<COUNT>(row, threadIdx.x % (D / 8));
        const T *at = from + (int64_t)(first + row) * stride;
        int left = end - first - row;
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP) {
            bool real = inside && i < left;
            copy_chunk(to + i * 128, real ? at : from, real);
            at += STEP * stride;
        }
    }
};

/* S = Q K^T of a group's rows. */
template <typename T, int D, int N>
static __device__ __forceinline__ void
start_scores(float (&s)[N / 2], uint32_t q, uint32_t k)
{
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t panel = i / 4, inside = i % 4 * 32;
        wgmma_shared<T>(s, wgmma_factor(q + panel * ROWS * 128 + inside, 16),
                        wgmma_factor(k + panel * N * 128 + inside, 16), i > 0);
    }
    wgmma_commit();
}

/* O += P V. */
template <typename T, int D, int N>
static __device__ __forceinline__ void
start_values(float (&o)[D / 2], const uint32_t (&p)[N / 16][4], uint32_t v)
{
#pragma unroll
    for (int i = 0; i < N / 16; i++) {
        wgmma_registers<T>(o, p[i], wgmma_factor(v + i * 16 * 128, N * 128));
    }
    wgmma_commit();
}

/* -inf where a row may not see a key; `position` is that of the thread's first row, the other is 8 later. */
template <int N>
static __device__ __forceinline__ void
mask_scores(float (&s)[N / 2], int first_key, int position, int window)
{
    int key = first_key + (int)threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        int at = key + i / 4 * 8 + i % 2, row = position + i % 4 / 2 * 8;
        s[i] = at > row || at <= row - window ? -INFINITY : s[i];
    }
}

template <typename T, int N>
static __device__ __forceinline__ void
round_weights(const float (&s)[N / 2], uint32_t (&p)[N / 16][4])
{
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        p[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
    }
}

template <typename T, int D, int N>
static __global__ void
__launch_bounds__(THREADS, 1) hopper_kernel(const __grid_constant__ attention_arguments a)
{
#if MIL_HAS_WGMMA
    extern __shared__ __align__(1024) unsigned char raw[];
    hopper_memory<D, N> *memory = reinterpret_cast<hopper_memory<D, N> *>(raw);
    mil_wait();
    int head = blockIdx.x, sequence = blockIdx.y, first = (int)(gridDim.z - 1 - blockIdx.z) * ROWS;
    int64_t first_row = a.rows.offsets[sequence];
    int count = (int)(a.rows.offsets[sequence + 1] - first_row);
    if (count < a.least || first >= count) {
        return;
    }
    int past = a.cached ? (int)a.rows.past[sequence] : 0, last = first + ROWS < count ? first + ROWS : count;
    int end = past + last, window = a.window; /* keys of this block: .. end - 1 */
    int tile = (past + first + 1 > window ? past + first + 1 - window : 0) / N, tiles = (end + N - 1) / N;
    int group = threadIdx.x / 128, thread = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
    int own = past + first + warp * 16; /* position of the warp's first row */

    key_source<T> keys = find_keys<T>(a, sequence, head / a.group, first_row);
    const T *queries = (const T *)a.q + first_row * a.q_stride + (int64_t)head * a.head_dim;
    copier<T, D> k_copier(keys.k, keys.stride, a.head_dim), v_copier(keys.v, keys.stride, a.head_dim);
    copier<T, D> q_copier(queries, a.q_stride, a.head_dim);
    uint32_t q = shared_address(memory->q), k = shared_address(memory->k), v = shared_address(memory->v);
    constexpr uint32_t BYTES = N * D * 2; /* of a tile */
    uint32_t own_q = q + group * 64 * 128;
    q_copier.template copy<ROWS>(first, count, q);
    k_copier.template copy<N>(tile * N, end, k);
    copies_commit();
    copies_wait<0>();
    wgmma_publish();
    __syncthreads();

    softmax_pair rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float o[D / 2] = {}, s[N / 2], factor[2], scale = a.scale * LOG2_E;
    uint32_t p[N / 16][4];
    v_copier.template copy<N>(tile * N, end, v);
    if (tile + 1 < tiles) {
        k_copier.template copy<N>((tile + 1) * N, end, k + BYTES);
    }
    copies_commit();
    wgmma_begin();
    start_scores<T, D, N>(s, own_q, k);
    wgmma_wait<0>(s);
    mask_scores<N>(s, tile * N, own + thread / 4, window);
    soften<N>(s, scale, rows, factor);
    round_weights<T, N>(s, p);

    uint32_t stage = 0; /* of V; K is one ahead */
    for (tile++; tile < tiles; tile++, stage ^= 1) {
        copies_wait<0>();
        wgmma_publish();
        __syncthreads();
        v_copier.template copy<N>(tile * N, end, v + (stage ^ 1) * BYTES);
        if (tile + 1 < tiles) {
            k_copier.template copy<N>((tile + 1) * N, end, k + stage * BYTES);
        }
        copies_commit();
        wgmma_hold(o);
        wgmma_begin();
        start_scores<T, D, N>(s, own_q, k + (stage ^ 1) * BYTES);
        start_values<T, D, N>(o, p, v + stage * BYTES);
        wgmma_wait<1>(s);
        if (tile * N + N - 1 > own || tile * N <= own + 15 - window) {
            mask_scores<N>(s, tile * N, own + thread / 4, window);
        }
        soften<N>(s, scale, rows, factor);
        wgmma_wait<0>(o);
#pragma unroll
        for (int i = 0; i < D / 2; i++) {
            o[i] *= factor[i % 4 / 2];
        }
        round_weights<T, N>(s, p);
    }
    copies_wait<0>();
    wgmma_publish();
    __syncthreads();
    wgmma_hold(o);
    wgmma_begin();
    start_values<T, D, N>(o, p, v + stage * BYTES);
    wgmma_wait<0>(o);
    mil_trigger();

    /* The result goes through the group's rows of Q, to be written in steps of 16 bytes. */
    wgmma_group_sync(group);
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float sum = softmax_finish(rows.sum[row]), inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        int place = warp * 16 + row * 8 + thread / 4;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            *(uint32_t *)((char *)memory->q + panel_place<ROWS>(place, i) + (uint32_t)thread % 4 * 4) =
                pack<T>(o[i * 4 + row * 2] * inverse, o[i * 4 + row * 2 + 1] * inverse);
        }
        if (a.log_sum_exp != NULL && thread % 4 == 0 && first + place < count) {
            a.log_sum_exp[(first_row + first + place) * a.heads + head] =
                rows.maximum[row] * a.scale + logf(sum);
        }
    }
    __syncwarp();
    T *y = (T *)a.y + (first_row + first) * a.y_stride + (int64_t)head * a.head_dim;
    for (int i = thread; i < 16 * (D / 8); i += MIL_WARP) {
        int place = warp * 16 + i / (D / 8), chunk = i % (D / 8);
        if (first + place < count && chunk * 8 < a.head_dim) {
            *(uint4 *)(y + place * a.y_stride + chunk * 8) =
                *(const uint4 *)((const char *)memory->q + panel_place<ROWS>(place, chunk));
        }
    }
#else
    __trap(); /* the launcher asks for the architecture; setup.py and make build it as sm_90a */
#endif
}

template <typename T, int D, int N>
static mil_status
prefill_tiles(mil_context *context, const attention_arguments *a, int64_t longest)
{
    dim3 grid((unsigned)a->heads, (unsigned)a->rows.sequences, (unsigned)mil_ceil_div(longest, ROWS));
    return mil_launch(context, "attention (prefill)", hopper_kernel<T, D, N>, grid, dim3(THREADS),
                      sizeof(hopper_memory<D, N>), *a);
}

template <typename T>
static mil_status
prefill(mil_context *context, const attention_arguments *a, int64_t longest)
{
    return a->head_dim <= 64    ? prefill_tiles<T, 64, 128>(context, a, longest)
           : a->head_dim <= 128 ? prefill_tiles<T, 128, 128>(context, a, longest)
                                : prefill_tiles<T, 256, 64>(context, a, longest);
}

mil_status
mil_attention_prefill_hopper(mil_context *context, const attention_arguments *a, int64_t longest, bool *done)
{
    int major = 0;
    MIL_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, context->ops->device));
    *done = major == 9;
    if (!*done) {
        return MIL_OK;
    }
    return context->ops->activation_dtype == MIL_F16 ? prefill<__half>(context, a, longest)
                                                     : prefill<__nv_bfloat16>(context, a, longest);
}
