/* Attention of many rows a sequence on Hopper: flash attention over wgmma (Shah et al. 2024, without their
 * copy engine).
 *
 * A block owns 64 query positions of one head for each of two or three groups of four warps, and walks the
 * tiles of keys; one more group does nothing but copy:
 *
 *   shared     Q [64 * groups, D] once; K and V [N, D] twice each, filled and emptied in turns
 *   a group    S = Q K^T [64, N] from shared memory into registers, softmax there, rounded into P,
 *              O += P V with P from registers
 *   overlap    S of tile j and O of tile j - 1 are started together; while the second runs, the softmax
 *              of the first is computed.  The groups start theirs in turns, so that one's softmax runs
 *              beside another's products
 *
 * mma.sync, which attention_prefill.cu uses, reaches about 0.6 of these tensor cores' rate and needs its
 * factors in registers.  Copies are cp.async and no tensor maps: keys lie in as many caches as there are
 * sequences, and rows begin anywhere.
 */
#include "attention.cuh"
#include "table.h"
#include "wgmma.cuh"

#define COPIERS 128 /* threads of the copying group */

/* D: head_dim rounded up, in panels of 64; N: keys a tile; GROUPS: of 64 rows. */
template <int D, int N, int GROUPS>
struct hopper_memory {
    alignas(1024) uint16_t q[GROUPS * 64 * D];
    alignas(1024) uint16_t k[2][N * D];
    alignas(1024) uint16_t v[2][N * D];
    uint64_t k_full[2], k_empty[2], v_full[2], v_empty[2];
};

/* What a thread copies of each tile: always the same chunk, of every STEP-th row. */
template <typename T, int D>
struct copier {
    static constexpr int STEP = COPIERS * 8 / D;
    const T *from; /* row 0, this thread's chunk */
    int64_t stride;
    bool inside;

    __device__ __forceinline__ copier(const T *rows, int64_t row_stride, int head_dim)
    {
        int chunk = threadIdx.x % (D / 8);
        stride = row_stride;
        inside = chunk * 8 < head_dim;
        from = rows + (inside ? chunk * 8 : 0);
    }

    /* Rows first .. first + COUNT into a tile, those from `end` on as zeros. */
    template <int COUNT>
    __device__ __forceinline__ void copy(int first, int end, uint32_t tile) const
    {
        int row = threadIdx.x % COPIERS / (D / 8), left = end - first - row;
        uint32_t to = tile + panel_place<COUNT>(row, threadIdx.x % (D / 8));
        const T *at = from + (int64_t)(first + row) * stride;
#pragma unroll 8
        for (int i = 0; i < COUNT; i += STEP) {
            bool real = inside && i < left;
            copy_chunk((to ^ (uint32_t)((i & 7) << 4)) + i * 128, real ? at : from, real);
            at += STEP * stride;
        }
    }
};

/* Lets the consumers know of copies once they are there: those of one tile when the next one's are under
 * way. */
struct publisher {
    uint64_t *pending;

    __device__ __forceinline__ void flush()
    {
        if (pending != NULL) {
            copies_wait<0>();
            wgmma_publish();
            phase_arrive(pending);
            pending = NULL;
        }
    }

    __device__ __forceinline__ void wait_empty(uint64_t *empty, int parity)
    {
        if (!phase_done(empty, parity)) {
            flush();
            phase_wait(empty, parity);
        }
    }

    __device__ __forceinline__ void add(uint64_t *full)
    {
        copies_commit();
        if (pending != NULL) {
            copies_wait<1>();
            wgmma_publish();
            phase_arrive(pending);
        }
        pending = full;
    }
};

/* S = Q K^T of a group's rows. */
template <typename T, int D, int N, int ROWS>
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

/* What a block works on. */
struct block_work {
    int head, sequence, first, count; /* rows first .. of the sequence's count */
    int64_t first_row;
    int past, end, tile, tiles; /* keys .. end - 1, in tiles tile .. tiles - 1 */
};

/* The copying group: tiles in the order in which they are needed, K one ahead of V. */
template <typename T, int D, int N, int GROUPS>
static __device__ __forceinline__ void
copy_tiles(const attention_arguments &a, hopper_memory<D, N, GROUPS> *memory, const block_work &b)
{
    key_source<T> keys = find_keys<T>(a, b.sequence, b.head / a.group, b.first_row);
    copier<T, D> k(keys.k, keys.stride, a.head_dim), v(keys.v, keys.stride, a.head_dim);
    publisher done = {NULL};
    {
        const T *queries = (const T *)a.q + b.first_row * a.q_stride + (int64_t)b.head * a.head_dim;
        copier<T, D> q(queries, a.q_stride, a.head_dim);
        q.template copy<GROUPS * 64>(b.first, b.count, shared_address(memory->q));
    }
    for (int n = 0; n <= b.tiles - b.tile; n++) {
        int first = (b.tile + n) * N;
        if (b.tile + n < b.tiles) {
            if (n >= 2) {
                done.wait_empty(&memory->k_empty[n % 2], (n / 2 - 1) % 2);
            }
            k.template copy<N>(first, b.end, shared_address(memory->k[n % 2]));
            done.add(&memory->k_full[n % 2]);
        }
        if (n >= 1) {
            int m = n - 1;
            if (m >= 2) {
                done.wait_empty(&memory->v_empty[m % 2], (m / 2 - 1) % 2);
            }
            v.template copy<N>(first - N, b.end, shared_address(memory->v[m % 2]));
            done.add(&memory->v_full[m % 2]);
        }
    }
    done.flush();
}

/* A group's 64 rows. */
template <typename T, int D, int N, int GROUPS>
static __device__ __forceinline__ void
attend(const attention_arguments &a, hopper_memory<D, N, GROUPS> *memory, const block_work &b)
{
    constexpr int ROWS = GROUPS * 64;
    int group = threadIdx.x / 128, thread = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP;
    int own = b.past + b.first + warp * 16, window = a.window; /* position of the warp's first row */
    uint32_t q = shared_address(memory->q) + group * 64 * 128;
    softmax_pair rows = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float o[D / 2] = {}, s[N / 2], factor[2], scale = a.scale * LOG2_E;
    uint32_t p[N / 16][4];
    bool last_group = group == GROUPS - 1;
    if (last_group && b.tile + 1 < b.tiles) {
        barrier_announce(1, 256); /* the first group begins */
    }
    phase_wait(&memory->k_full[0], 0);
    wgmma_begin();
    start_scores<T, D, N, ROWS>(s, q, shared_address(memory->k[0]));
    wgmma_wait<0>(s);
    if (thread == 0) {
        phase_arrive(&memory->k_empty[0]);
    }
    mask_scores<N>(s, b.tile * N, own + thread / 4, window);
    soften<N>(s, scale, rows, factor);
    round_weights<T, N>(s, p);

    int n = 1; /* tiles whose scores are known */
    for (; b.tile + n < b.tiles; n++) {
        int k_stage = n % 2, v_stage = (n - 1) % 2, first_key = (b.tile + n) * N;
        phase_wait(&memory->k_full[k_stage], n / 2 % 2);
        phase_wait(&memory->v_full[v_stage], (n - 1) / 2 % 2);
        barrier_meet(1 + group, 256);
        wgmma_hold(o);
        wgmma_begin();
        start_scores<T, D, N, ROWS>(s, q, shared_address(memory->k[k_stage]));
        start_values<T, D, N>(o, p, shared_address(memory->v[v_stage]));
        if (!last_group || b.tile + n + 1 < b.tiles) {
            barrier_announce(last_group ? 1 : 2 + group, 256);
        }
        wgmma_wait<1>(s);
        if (thread == 0) {
            phase_arrive(&memory->k_empty[k_stage]);
        }
        if (first_key + N - 1 > own || first_key <= own + 15 - window) {
            mask_scores<N>(s, first_key, own + thread / 4, window);
        }
        soften<N>(s, scale, rows, factor);
        wgmma_wait<0>(o);
        if (thread == 0) {
            phase_arrive(&memory->v_empty[v_stage]);
        }
#pragma unroll
        for (int i = 0; i < D / 2; i++) {
            o[i] *= factor[i % 4 / 2];
        }
        round_weights<T, N>(s, p);
    }
    phase_wait(&memory->v_full[(n - 1) % 2], (n - 1) / 2 % 2);
    wgmma_hold(o);
    wgmma_begin();
    start_values<T, D, N>(o, p, shared_address(memory->v[(n - 1) % 2]));
    wgmma_wait<0>(o);
    mil_trigger();

    /* The result goes through the group's rows of Q, to be written in steps of 16 bytes. */
    barrier_meet(8 + group, 128);
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float sum = softmax_finish(rows.sum[row]), inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        int place = warp * 16 + row * 8 + thread / 4;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            *(uint32_t *)((char *)memory->q + panel_place<ROWS>(place, i) + (uint32_t)thread % 4 * 4) =
                pack<T>(o[i * 4 + row * 2] * inverse, o[i * 4 + row * 2 + 1] * inverse);
        }
        if (a.log_sum_exp != NULL && thread % 4 == 0 && b.first + place < b.count) {
            a.log_sum_exp[(b.first_row + b.first + place) * a.heads + b.head] =
                rows.maximum[row] * a.scale + logf(sum);
        }
    }
    __syncwarp();
    T *y = (T *)a.y + (b.first_row + b.first) * a.y_stride + (int64_t)b.head * a.head_dim;
    for (int i = thread; i < 16 * (D / 8); i += MIL_WARP) {
        int place = warp * 16 + i / (D / 8), chunk = i % (D / 8);
        if (b.first + place < b.count && chunk * 8 < a.head_dim) {
            *(uint4 *)(y + place * a.y_stride + chunk * 8) =
                *(const uint4 *)((const char *)memory->q + panel_place<ROWS>(place, chunk));
        }
    }
}

template <typename T, int D, int N, int GROUPS>
static __global__ void
__launch_bounds__(GROUPS * 128 + COPIERS, 1) hopper_kernel(const __grid_constant__ attention_arguments a)
{
#if MIL_HAS_WGMMA
    extern __shared__ __align__(1024) unsigned char raw[];
    hopper_memory<D, N, GROUPS> *memory = reinterpret_cast<hopper_memory<D, N, GROUPS> *>(raw);
    constexpr int ROWS = GROUPS * 64;
    if (threadIdx.x < 2) {
        phase_init(&memory->k_full[threadIdx.x], COPIERS);
        phase_init(&memory->v_full[threadIdx.x], COPIERS);
        phase_init(&memory->k_empty[threadIdx.x], GROUPS * 4);
        phase_init(&memory->v_empty[threadIdx.x], GROUPS * 4);
    }
    __syncthreads();
    mil_wait();
    block_work b;
    b.head = blockIdx.x;
    b.sequence = find_prompt(a, blockIdx.y);
    b.first = (int)(gridDim.z - 1 - blockIdx.z) * ROWS;
    b.first_row = a.rows.offsets[b.sequence];
    b.count = (int)(a.rows.offsets[b.sequence + 1] - b.first_row);
    if (b.count < a.least || b.first >= b.count) {
        return;
    }
    b.past = a.cached ? (int)a.rows.past[b.sequence] : 0;
    b.end = b.past + (b.first + ROWS < b.count ? b.first + ROWS : b.count);
    b.tile = (b.past + b.first + 1 > a.window ? b.past + b.first + 1 - a.window : 0) / N;
    b.tiles = (b.end + N - 1) / N;
    /* 512 registers a thread of four groups, or 504 of three. */
    if (threadIdx.x >= GROUPS * 128) {
        group_give_registers<GROUPS == 2 ? 24 : 32>();
        copy_tiles<T, D, N, GROUPS>(a, memory, b);
    }
    else {
        group_take_registers<GROUPS == 2 ? 240 : 160>();
        attend<T, D, N, GROUPS>(a, memory, b);
    }
#else
    __trap(); /* the launcher asks for the architecture; setup.py and make build it as sm_90a */
#endif
}

template <typename T, int D, int N, int GROUPS>
static mil_status
prefill_tiles(mil_context *context, const attention_arguments *a, int64_t longest)
{
    dim3 grid((unsigned)a->heads, prompt_count(a), (unsigned)mil_ceil_div(longest, GROUPS * 64));
    return mil_launch(context, "attention (prefill)", hopper_kernel<T, D, N, GROUPS>, grid,
                      dim3(GROUPS * 128 + COPIERS), sizeof(hopper_memory<D, N, GROUPS>), *a);
}

template <typename T>
static mil_status
prefill(mil_context *context, const attention_arguments *a, int64_t longest)
{
    return a->head_dim <= 64    ? prefill_tiles<T, 64, 128, 3>(context, a, longest)
           : a->head_dim <= 128 ? prefill_tiles<T, 128, 128, 2>(context, a, longest)
                                : prefill_tiles<T, 256, 64, 2>(context, a, longest);
}

mil_status
mil_attention_prefill_hopper(mil_context *context, const attention_arguments *a, int64_t longest, bool *done)
{
    *done = mil_device_major(context) == 9;
    if (!*done) {
        return MIL_OK;
    }
    return context->ops->activation_dtype == MIL_F16 ? prefill<__half>(context, a, longest)
                                                     : prefill<__nv_bfloat16>(context, a, longest);
}
