/* Causal softmax attention over packed sequences with grouped heads and sliding windows
 * (csrc/cpu/attention.c has the formula), and the writing of keys and values into caches.
 *
 * Decoding (at most MIL_WINDOW rows a sequence, keys in caches) is bound by the reading of the cache.  One
 * cluster of blocks serves one key head of one sequence, with all query heads of its group and all rows at
 * once: their scores come from one tensor core product, padded to 16 rows, and every key and value is read
 * once.
 *
 *   keys   | tile 0 | tile 1 | ...  | tile 7 | tile 8 | ...     tile t of 64 keys: block t % 8
 *          | warps 0 1 2 3 : 16 keys each, for each 16 query rows
 *
 * Each warp walks its 16 keys of each of its block's tiles, two tiles a step, with a running maximum and
 * sum; the next steps are copied meanwhile.  The results of the four warps are merged as (0 1)(2 3) and
 * sent to the shared memory of the block that merges that part of them, in the order of the eight blocks.
 * Tiles begin at multiples of 64 keys of the sequence, whatever rows a call brings, and keys that a row may
 * not see take part as exact zeros: so a row's bits depend on its position and the keys only, be it alone,
 * in a verify window, or in a batch.  Nothing but the result goes back to memory, and there is one launch.
 *
 * Prefill is in attention_prefill.cu.  float32 activations, head_dim no multiple of 8, caches of another
 * type than the activations, and GPUs without clusters or with less shared memory than Hopper take the
 * plain kernel below: a block a row and head, in float32 arithmetic, of the same bits for any grouping of
 * rows for the same reason.
 */
#include "attention.cuh"
#include "cluster.cuh"
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

/* ---- decoding ---------------------------------------------------------------------------------------- */

#define CLUSTER 8    /* blocks that share the keys of one head: the portable most */
#define LANES 4      /* warps that share a tile's keys */
#define LANE_KEYS 16 /* the depth of one product */
#define TILE (LANES * LANE_KEYS)
#define DECODE_BYTES (220 << 10) /* of shared memory: the most that a block may take */

/* Shared memory of a block; D is head_dim rounded up, MT the 16-row tiles of queries, STEPS how many pairs
 * of tiles are under way. */
template <int D, int MT, int STEPS>
struct decode_memory {
    alignas(128) uint16_t q[MT * 16 * D];
    union {
        struct {
            alignas(128) uint16_t k[2][TILE * D];
            alignas(128) uint16_t v[2][TILE * D];
        } step[STEPS];
        float values[LANES][MT * 16][D + 8]; /* of the lanes; 8 more for the banks' sake */
    };
    softmax_row lane_rows[LANES][MT * 16];
    /* What the blocks of the cluster send to this one: all their rows, and of the values this block's
     * share. */
    softmax_row rows[CLUSTER][MT * 16];
    alignas(16) float inbox[1]; /* [CLUSTER, share, 4] */
};

/* The warps of one lane, and only they, read the lane's part of a tile. */
template <int MT>
static __device__ __forceinline__ void
lane_sync(int lane)
{
    if constexpr (MT == 1) {
        __syncwarp();
    }
    else {
        asm volatile("bar.sync %0, %1;" ::"r"(lane + 1), "n"(MT * MIL_WARP) : "memory");
    }
}

/* What one warp works on. */
struct decode_warp {
    int lane, m, thread; /* lane of keys, tile of query rows, thread of the warp */
    int low[2], high[2]; /* keys that its two rows see: low .. high - 1 */
};

/* Queries of the block's rows, times nothing yet: the scale goes to the scores. */
template <typename T, int D, int MT>
static __device__ __forceinline__ void
load_queries(const attention_arguments &a, int64_t first_row, int kv_head, int first_slot, int slots,
             uint32_t q)
{
#pragma unroll
    for (int i = threadIdx.x; i < MT * 16 * (D / 8); i += LANES * MT * MIL_WARP) {
        int row = i / (D / 8), chunk = i % (D / 8), slot = first_slot + row;
        bool real = slot < slots && chunk * 8 < a.head_dim;
        const T *from = (const T *)a.q;
        if (real) {
            from += (first_row + slot / a.group) * a.q_stride +
                    (int64_t)(kv_head * a.group + slot % a.group) * a.head_dim + chunk * 8;
        }
        copy_chunk(q + chunk_place<D>(row, chunk), from, real);
    }
}

/* What a thread copies of its lane's part of every tile: one chunk of every STEP-th key. */
template <typename T, int D, int MT>
struct lane_copier {
    static constexpr int STEP = MT * MIL_WARP * 8 / D;
    const T *k, *v; /* position 0, this thread's chunk */
    int64_t stride;
    int key; /* the first one, in the lane's part */
    uint32_t place;
    bool inside;

    __device__ __forceinline__ lane_copier(const key_source<T> &keys, int head_dim, const decode_warp &w)
    {
        int i = w.m * MIL_WARP + w.thread, chunk = i % (D / 8);
        key = i / (D / 8);
        inside = chunk * 8 < head_dim;
        place = chunk_place<D>(w.lane * LANE_KEYS + key, chunk);
        key += w.lane * LANE_KEYS;
        k = keys.k + (inside ? chunk * 8 : 0);
        v = keys.v + (inside ? chunk * 8 : 0);
        stride = keys.stride;
    }

    /* Of the tile of keys first .. into `tile`; zeros from `end` on. STEP keys further on the swizzle is
     * another. */
    __device__ __forceinline__ void copy(const T *from, int first, int end, uint32_t tile) const
    {
        const T *at = from + (int64_t)(first + key) * stride;
        int left = end - first - key;
#pragma unroll
        for (int i = 0; i < LANE_KEYS; i += STEP) {
            bool real = inside && i < left;
            copy_chunk(((tile + place) ^ (uint32_t)((i & 7) << 4)) + i * D * 2, real ? at : from, real);
            at += STEP * stride;
        }
    }
};

/* The scores of 16 rows and the lane's 16 keys of one or both tiles of a pair, which begin at `first` and
 * CLUSTER * TILE later: their weights, and by the way the rescaling of the sums so far. */
template <typename T, int D>
static __device__ __forceinline__ void
weigh_keys(const attention_arguments &a, const decode_warp &w, uint32_t q, uint32_t k, int first, bool both,
           softmax_row (&state)[2], float (&acc)[D / 8][4], uint32_t (&weights)[2][4])
{
    float s[4][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t left[4], right[4];
        load_left<D>(left, q, w.m * 16, i);
        load_right_rows<D>(right, k, w.lane * LANE_KEYS, i);
        mil_multiply_add<T>(s[0], left, right[0], right[1]);
        mil_multiply_add<T>(s[1], left, right[2], right[3]);
        if (both) {
            load_right_rows<D>(right, k, TILE + w.lane * LANE_KEYS, i);
            mil_multiply_add<T>(s[2], left, right[0], right[1]);
            mil_multiply_add<T>(s[3], left, right[2], right[3]);
        }
    }
    float scale = __fmul_rn(a.scale, LOG2_E), factor[2];
    int key = first + w.lane * LANE_KEYS + w.thread % 4 * 2;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float maximum = state[row].maximum, sum = 0.0f;
        int low = w.low[row] - key, high = w.high[row] - key;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int at = i / 4 * CLUSTER * TILE + i / 2 % 2 * 8 + i % 2;
            float &score = s[i / 2][row * 2 + i % 2];
            score = at >= low && at < high ? __fmul_rn(score, scale) : -INFINITY;
            maximum = fmaxf(maximum, score);
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(MIL_ALL_LANES, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(MIL_ALL_LANES, maximum, 2));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &score = s[i / 2][row * 2 + i % 2];
            score = exp2_fast(__fsub_rn(score, maximum));
            sum = __fadd_rn(sum, score);
        }
        factor[row] = exp2_fast(__fsub_rn(state[row].maximum, maximum));
        state[row].sum = __fmaf_rn(state[row].sum, factor[row], sum);
        state[row].maximum = maximum;
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) {
        acc[i / 4][i % 4] = __fmul_rn(acc[i / 4][i % 4], factor[i % 4 / 2]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        weights[i / 4][i % 4] = pack<T>(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
    }
}

/* acc += weights times the lane's values of one tile. */
template <typename T, int D>
static __device__ __forceinline__ void
add_values(const decode_warp &w, const uint32_t (&weights)[4], uint32_t v, float (&acc)[D / 8][4])
{
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t right[4];
        load_right_columns<D>(right, v, w.lane * LANE_KEYS, i);
        mil_multiply_add<T>(acc[2 * i], weights, right[0], right[1]);
        mil_multiply_add<T>(acc[2 * i + 1], weights, right[2], right[3]);
    }
}

static __device__ __forceinline__ void
merge_quads(softmax_row &to, float4 &values, const softmax_row &from, const float4 &more)
{
    float earlier, later;
    merge_rows(to, from, earlier, later);
    values.x = merge_values(values.x, more.x, earlier, later);
    values.y = merge_values(values.y, more.y, earlier, later);
    values.z = merge_values(values.z, more.z, earlier, later);
    values.w = merge_values(values.w, more.w, earlier, later);
}

/* The lanes' results as (0 1)(2 3), sent to the block that merges that place of the rows: quad i of `quads`
 * a row goes to block i / share. */
template <int D, int MT, int STEPS>
static __device__ __forceinline__ void
send_values(decode_memory<D, MT, STEPS> *memory, int rows, int quads, int share)
{
    int rank = mil_cluster_rank();
    for (int i = threadIdx.x; i < rows * quads; i += LANES * MT * MIL_WARP) {
        int row = i / quads, column = i % quads * 4;
        softmax_row part[LANES];
        float4 values[LANES];
#pragma unroll
        for (int lane = 0; lane < LANES; lane++) {
            part[lane] = memory->lane_rows[lane][row];
            values[lane] = *(const float4 *)&memory->values[lane][row][column];
        }
        merge_quads(part[0], values[0], part[1], values[1]);
        merge_quads(part[2], values[2], part[3], values[3]);
        merge_quads(part[0], values[0], part[2], values[2]);
        decode_memory<D, MT, STEPS> *other = mil_cluster_at(memory, i / share);
        ((float4 *)other->inbox)[rank * share + i % share] = values[0];
        if (column < CLUSTER * 4) { /* the first eight threads of a row tell a block each */
            for (int to = column / 4; to < CLUSTER; to += quads) {
                mil_cluster_at(memory, to)->rows[rank][row] = part[0];
            }
        }
    }
}

/* The blocks' results in order, of this block's share, divided and rounded. */
template <typename T, int D, int MT, int STEPS>
static __device__ __forceinline__ void
merge_blocks(const attention_arguments &a, const decode_memory<D, MT, STEPS> *memory, int64_t first_row,
             int kv_head, int first_slot, int rows, int quads, int share)
{
    for (int i = threadIdx.x; i < share; i += LANES * MT * MIL_WARP) {
        int at = mil_cluster_rank() * share + i, row = at / quads, column = at % quads * 4;
        if (row >= rows) {
            return;
        }
        softmax_row all = memory->rows[0][row];
        float4 sum = ((const float4 *)memory->inbox)[i];
#pragma unroll
        for (int block = 1; block < CLUSTER; block++) {
            merge_quads(all, sum, memory->rows[block][row],
                        ((const float4 *)memory->inbox)[block * share + i]);
        }
        float inverse = __fdiv_rn(1.0f, all.sum);
        float y[4] = {sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse};
        int slot = first_slot + row, head = kv_head * a.group + slot % a.group;
        int64_t packed = first_row + slot / a.group;
        mil_store<4>((T *)a.y + packed * a.y_stride + (int64_t)head * a.head_dim + column, y);
        if (a.log_sum_exp != NULL && column == 0) {
            a.log_sum_exp[packed * a.heads + head] = all.maximum * LN_2 + logf(all.sum);
        }
    }
}

/* A cluster a (key head and MT * 16 of its query rows, sequence). */
template <typename T, int D, int MT, int STEPS>
static __global__ void
MIL_CLUSTER(CLUSTER) __launch_bounds__(LANES * MT * MIL_WARP)
    decode_kernel(const __grid_constant__ attention_arguments a)
{
    extern __shared__ __align__(128) unsigned char raw[];
    decode_memory<D, MT, STEPS> *memory = reinterpret_cast<decode_memory<D, MT, STEPS> *>(raw);
    /* No mil_trigger(): blocks of the next kernels would take places unevenly while this one holds a part of
     * the chip. */
    mil_wait();
    int sequence = blockIdx.z, kv_head = blockIdx.y % a.kv_heads,
        first_slot = blockIdx.y / a.kv_heads * MT * 16;
    int64_t first_row = a.rows.offsets[sequence];
    int count = (int)(a.rows.offsets[sequence + 1] - first_row), slots = count * a.group;
    int past = (int)a.rows.past[sequence];
    if (count > a.most || first_slot >= slots) {
        return; /* with the whole cluster */
    }
    mil_cluster_arrive();
    int rows = slots - first_slot < MT * 16 ? slots - first_slot : MT * 16;
    decode_warp w = {};
    w.thread = threadIdx.x % MIL_WARP;
    w.lane = threadIdx.x / MIL_WARP % LANES;
    w.m = threadIdx.x / MIL_WARP / LANES;
    /* The pairs of tiles of any row of this block that are this block's.  Its n-th tile is rank + n *
     * CLUSTER; even n begin a pair. */
    int end = past + (first_slot + rows - 1) / a.group + 1, first_end = past + first_slot / a.group + 1;
    int first_tile = (first_end > a.window ? first_end - a.window : 0) / TILE;
    int tile = first_tile / (2 * CLUSTER) * 2 * CLUSTER + mil_cluster_rank(), tiles = (end + TILE - 1) / TILE;
    if (tile + CLUSTER < first_tile) {
        tile += 2 * CLUSTER;
    }

    lane_copier<T, D, MT> copier(find_keys<T>(a, sequence, kv_head, first_row), a.head_dim, w);
    uint32_t q = shared_address(memory->q), steps = shared_address(memory->step);
    constexpr uint32_t TILE_BYTES = TILE * D * 2, STEP_BYTES = 4 * TILE_BYTES;
    auto load_pair = [&](const T *from, int at, uint32_t to) {
        if (at < tiles) {
            copier.copy(from, at * TILE, end, to);
        }
        if (at + CLUSTER < tiles) {
            copier.copy(from, (at + CLUSTER) * TILE, end, to + TILE_BYTES);
        }
        copies_commit();
    };
    load_queries<T, D, MT>(a, first_row, kv_head, first_slot, slots, q);
    copies_commit();
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        load_pair(copier.k, tile + i * 2 * CLUSTER, steps + i * STEP_BYTES);
        load_pair(copier.v, tile + i * 2 * CLUSTER, steps + i * STEP_BYTES + 2 * TILE_BYTES);
    }
    for (int row = 0; row < 2; row++) {
        int slot = first_slot + w.m * 16 + row * 8 + w.thread / 4;
        if (slot < slots) {
            w.high[row] = past + slot / a.group + 1;
            w.low[row] = w.high[row] > a.window ? w.high[row] - a.window : 0;
        }
    }
    copies_wait<2 * STEPS>();
    __syncthreads();

    softmax_row state[2] = {{NO_SCORE, 0.0f}, {NO_SCORE, 0.0f}};
    float acc[D / 8][4] = {};
    uint32_t step = 0;
    for (; tile < tiles; tile += 2 * CLUSTER) {
        uint32_t k = steps + step * STEP_BYTES, v = k + 2 * TILE_BYTES, weights[2][4];
        bool both = tile + CLUSTER < tiles;
        int next = tile + STEPS * 2 * CLUSTER;
        copies_wait<2 * STEPS - 1>();
        lane_sync<MT>(w.lane);
        weigh_keys<T, D>(a, w, q, k, tile * TILE, both, state, acc, weights);
        lane_sync<MT>(w.lane);
        load_pair(copier.k, next, k);
        copies_wait<2 * STEPS - 1>();
        lane_sync<MT>(w.lane);
        add_values<T, D>(w, weights[0], v, acc);
        if (both) {
            add_values<T, D>(w, weights[1], v + TILE_BYTES, acc);
        }
        lane_sync<MT>(w.lane);
        load_pair(copier.v, next, v);
        step = step + 1 == STEPS ? 0 : step + 1;
    }
    copies_wait<0>();
    __syncthreads();

#pragma unroll
    for (int row = 0; row < 2; row++) {
        int at = w.m * 16 + row * 8 + w.thread / 4;
        state[row].sum = __fadd_rn(state[row].sum, __shfl_xor_sync(MIL_ALL_LANES, state[row].sum, 1));
        state[row].sum = __fadd_rn(state[row].sum, __shfl_xor_sync(MIL_ALL_LANES, state[row].sum, 2));
        if (at < rows) {
            memory->lane_rows[w.lane][at] = state[row];
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                *(float2 *)&memory->values[w.lane][at][i * 8 + w.thread % 4 * 2] =
                    make_float2(acc[i][row * 2], acc[i][row * 2 + 1]);
            }
        }
    }
    __syncthreads();
    int quads = a.head_dim / 4, share = (rows * quads + CLUSTER - 1) / CLUSTER;
    mil_cluster_wait(); /* all blocks have begun: their memory is theirs */
    send_values<D, MT, STEPS>(memory, rows, quads, share);
    mil_cluster_sync();
    merge_blocks<T, D, MT, STEPS>(a, memory, first_row, kv_head, first_slot, rows, quads, share);
}

template <typename T, int D, int MT, int STEPS>
static mil_status
decode_rows(mil_context *context, const attention_arguments *a, int64_t longest)
{
    int64_t slots = longest * a->group, rows = slots < MT * 16 ? slots : MT * 16;
    dim3 grid(CLUSTER, (unsigned)(a->kv_heads * mil_ceil_div(slots, MT * 16)), (unsigned)a->rows.sequences);
    size_t inbox = (size_t)(rows * a->head_dim + 4 * CLUSTER) * sizeof(float);
    static_assert(sizeof(decode_memory<D, MT, STEPS>) + (MT * 16 * D + 4 * CLUSTER) * sizeof(float) <=
                  DECODE_BYTES);
    return mil_launch(context, "attention (decode)", decode_kernel<T, D, MT, STEPS>, grid,
                      dim3(LANES * MT * MIL_WARP), sizeof(decode_memory<D, MT, STEPS>) + inbox, *a);
}

/* Where there are no more blocks than multiprocessors, each takes their whole memory for reading ahead;
 * more than 32 query rows then make two clusters a key head, of which one finds the keys in L2. */
template <typename T, int D>
static mil_status
decode_width(mil_context *context, const attention_arguments *a, int64_t longest)
{
    int64_t slots = longest * a->group, clusters = (int64_t)a->kv_heads * a->rows.sequences;
    int multiprocessors = 0;
    MIL_CUDA_TRY(
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, context->ops->device));
    bool deep = clusters * mil_ceil_div(slots, 32) * CLUSTER <= multiprocessors;
    if constexpr (D > 128) {
        return slots <= 16 ? decode_rows<T, D, 1, 1>(context, a, longest)
                           : decode_rows<T, D, 2, 1>(context, a, longest);
    }
    else if (slots <= 16) {
        return deep ? decode_rows<T, D, 1, 3>(context, a, longest)
                    : decode_rows<T, D, 1, 1>(context, a, longest);
    }
    else if (deep) {
        return decode_rows<T, D, 2, 3>(context, a, longest);
    }
    else {
        return slots <= 32 ? decode_rows<T, D, 2, 1>(context, a, longest)
                           : decode_rows<T, D, 4, 1>(context, a, longest);
    }
}

template <typename T>
static mil_status
decode(mil_context *context, const attention_arguments *a, int64_t longest)
{
    return a->head_dim <= 64    ? decode_width<T, 64>(context, a, longest)
           : a->head_dim <= 128 ? decode_width<T, 128>(context, a, longest)
                                : decode_width<T, 256>(context, a, longest);
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
    int64_t most_few = 0, most_many = 0;
    for (int64_t s = 0; s < given->rows.sequences; s++) {
        int64_t count = given->rows.offsets[s + 1] - given->rows.offsets[s];
        if (count <= MIL_WINDOW) {
            most_few = count > most_few ? count : most_few;
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
        if constexpr (sizeof(T) == 2) {
            if (tensor && a.cached && mil_device_has_clusters(context) &&
                mil_device_has_shared(context, DECODE_BYTES)) {
                MIL_TRY(decode<T>(context, &a, most_few));
                most_few = 0;
            }
        }
        if (most_few > 0) {
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
