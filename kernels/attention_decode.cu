/* Attention of a few rows a sequence upon its cache: decoding (kernels/attention.cu: the operator, and which kernel
 * takes what).
 *
 * It is bound by the reading of the cache.  All query heads of a key head's group and all rows go at once: their
 * scores come from one tensor core product, padded to 16 rows, and every key and value is read once.  A sequence's
 * keys make eight parts:
 *
 *   keys   | tile 0 | tile 1 | ...  | tile 7 | tile 8 | ...     tile t of 64 keys: part t % 8
 *          | warps 0 1 2 3 : 16 keys each, for each 16 query rows
 *
 * Each warp walks its 16 keys of each of a part's tiles, two tiles a step, with a running maximum and sum; the
 * next steps are copied meanwhile.  The results of the four warps are merged as (0 1)(2 3), and those of the
 * parts in their order.  A cluster of eight blocks plays the parts of a key head at once, and each block sends
 * its results to the shared memory of the block that merges that place of them.  Where there are texts enough,
 * one block plays them in turn instead: it copies on while a part ends, so that between the first key and the
 * last memory never waits (H200, 256 texts of 1,024 tokens, 8 key heads of 128: 246 us, with clusters 309).
 *
 * Tiles begin at multiples of 64 keys of the sequence, whatever rows a call brings, and keys that a row may
 * not see take part as exact zeros: so a row's bits depend on its position and the keys only, be it alone,
 * in a verify window, or in a batch.  Nothing but the result goes back to memory, and there is one launch.
 */
#include "attention.cuh"
#include "cluster.cuh"

#include <limits.h>

#define PARTS 8      /* of the keys of one head: as many as the portable most of a cluster's blocks */
#define LANES 4      /* warps that share a tile's keys */
#define LANE_KEYS 16 /* the depth of one product */
#define TILE (LANES * LANE_KEYS)
#define DECODE_BYTES (220 << 10) /* of shared memory: the most that a block may take */

template <int D>
struct tile_pair {
    alignas(128) uint16_t k[2][TILE * D];
    alignas(128) uint16_t v[2][TILE * D];
};

/* The pairs of tiles under way and the results of the lanes of a part, after which a block of a cluster
 * copies no more; 8 columns more for the banks' sake. */
template <int D, int MT, int STEPS, int BLOCKS>
struct decode_tiles {
    union {
        tile_pair<D> step[STEPS];
        float values[LANES][MT * 16][D + 8];
    };
};

/* A block that plays all parts copies on meanwhile. */
template <int D, int MT, int STEPS>
struct decode_tiles<D, MT, STEPS, 1> {
    tile_pair<D> step[STEPS];
    float values[LANES][MT * 16][D + 8];
};

/* Shared memory of a block; D is head_dim rounded up, MT the 16-row tiles of queries, STEPS how many pairs
 * of tiles are under way, BLOCKS how many play the parts. */
template <int D, int MT, int STEPS, int BLOCKS>
struct decode_memory {
    static constexpr int THREADS = LANES * MT * MIL_WARP;
    alignas(128) uint16_t q[MT * 16 * D];
    decode_tiles<D, MT, STEPS, BLOCKS> tiles;
    softmax_row lane_rows[LANES][MT * 16];
    softmax_row rows[PARTS][MT * 16]; /* of every part; where one block plays them all, of all until then */
    /* The values of the parts that the blocks of the cluster send to this one, its share of them: [PARTS,
     * share, 4].  One block: their sums so far, [rows, head_dim]. */
    alignas(16) float inbox[1];
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

/* What a block works on: of a sequence, the slots (query rows times query heads of one key head) first_slot
 * .. first_slot + rows - 1. */
struct decode_place {
    int64_t first_row;                                           /* packed */
    int sequence, past, kv_head, first_slot, slots, rows, quads; /* quads: of a row's values */
};

/* Whether this block has any; after mil_wait_for_states. */
template <int MT>
static __device__ __forceinline__ bool
find_place(const attention_arguments &a, decode_place &p)
{
    p.sequence = blockIdx.z;
    p.first_row = mil_row_of(a.rows, p.sequence);
    int count = (int)(mil_row_of(a.rows, p.sequence + 1) - p.first_row);
    p.past = (int)mil_load_number(a.rows.past + p.sequence);
    p.kv_head = blockIdx.y % a.kv_heads;
    p.first_slot = blockIdx.y / a.kv_heads * MT * 16;
    p.slots = count * a.group;
    p.rows = p.slots - p.first_slot < MT * 16 ? p.slots - p.first_slot : MT * 16;
    p.quads = a.head_dim / 4;
    return count <= a.most && p.rows > 0;
}

/* What one warp works on. */
struct decode_warp {
    int lane, m, thread; /* lane of keys, tile of query rows, thread of the warp */
    int low[2], high[2]; /* keys that its two rows see: low .. high - 1 */
};

static __device__ __forceinline__ void
see_keys(const attention_arguments &a, const decode_place &p, decode_warp &w)
{
#pragma unroll
    for (int row = 0; row < 2; row++) {
        int slot = p.first_slot + w.m * 16 + row * 8 + w.thread / 4;
        if (slot < p.slots) {
            w.high[row] = p.past + slot / a.group + 1;
            w.low[row] = w.high[row] > a.window ? w.high[row] - a.window : 0;
        }
    }
}

/* Queries of the block's rows, times nothing yet: the scale goes to the scores. */
template <typename T, int D, int MT>
static __device__ __forceinline__ void
load_queries(const attention_arguments &a, const decode_place &p, uint32_t q)
{
#pragma unroll
    for (int i = threadIdx.x; i < MT * 16 * (D / 8); i += LANES * MT * MIL_WARP) {
        int row = i / (D / 8), chunk = i % (D / 8), slot = p.first_slot + row;
        bool real = slot < p.slots && chunk * 8 < a.head_dim;
        const T *from = (const T *)a.q;
        if (real) {
            from += (p.first_row + slot / a.group) * a.q_stride +
                    (int64_t)(p.kv_head * a.group + slot % a.group) * a.head_dim + chunk * 8;
        }
        copy_chunk(q + chunk_place<D>(row, chunk), from, real);
    }
}

/* The pairs of tiles that a block walks: tiles t and t + PARTS of which at least one has keys that a row of the
 * block sees, where t / PARTS is even and t % PARTS the part.  One of BLOCKS blocks plays one part or all. */
template <int BLOCKS>
struct pair_walk {
    int end, first, tiles; /* keys and tiles that the rows see: .. end - 1, first .. tiles - 1 */
    int part, tile;

    __device__ __forceinline__ pair_walk(const attention_arguments &a, const decode_place &p)
    {
        int first_end = p.past + p.first_slot / a.group + 1;
        end = p.past + (p.first_slot + p.rows - 1) / a.group + 1;
        first = (first_end > a.window ? first_end - a.window : 0) / TILE;
        tiles = (end + TILE - 1) / TILE;
        enter(BLOCKS > 1 ? mil_cluster_rank() : 0);
    }

    __device__ __forceinline__ void enter(int to)
    {
        part = to;
        tile = first / (2 * PARTS) * 2 * PARTS + part;
        if (tile + PARTS < first) {
            tile += 2 * PARTS;
        }
    }

    /* To the next part, if it is this block's. */
    __device__ __forceinline__ bool next_part()
    {
        if (BLOCKS > 1 || part == PARTS - 1) {
            return false;
        }
        enter(part + 1);
        return true;
    }

    /* To a part that has a pair left; beyond `tiles` where none has. */
    __device__ __forceinline__ void settle()
    {
        while (tile >= tiles && next_part()) {
        }
    }
};

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

/* The pairs of tiles under way: STEPS, in turns. */
template <typename T, int D, int MT, int STEPS, int BLOCKS>
struct pair_ring {
    static constexpr uint32_t TILE_BYTES = TILE * D * 2, PAIR_BYTES = 4 * TILE_BYTES;
    lane_copier<T, D, MT> copier;
    pair_walk<BLOCKS> ahead; /* what is copied next */
    uint32_t steps, step;

    __device__ __forceinline__ pair_ring(const attention_arguments &a, const decode_place &p,
                                         const decode_warp &w, const pair_walk<BLOCKS> &walk, uint32_t memory)
        : copier(find_keys<T>(a, p.sequence, p.kv_head, p.first_row), a.head_dim, w),
          ahead(walk),
          steps(memory),
          step(0)
    {
        ahead.settle();
    }

    /* The pair's keys or values, of those of its tiles that are among low .. high - 1. */
    __device__ __forceinline__ void copy(const T *from, uint32_t to, int low, int high) const
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int tile = ahead.tile + i * PARTS;
            if (tile >= low && tile < high) {
                copier.copy(from, tile * TILE, ahead.end, to + i * TILE_BYTES);
            }
        }
    }

    __device__ __forceinline__ void load(const T *from, uint32_t to, int low = INT_MIN)
    {
        copy(from, to, low, ahead.tiles);
        copies_commit();
    }

    __device__ __forceinline__ void turn()
    {
        ahead.tile += 2 * PARTS;
        ahead.settle();
        step = step + 1 == STEPS ? 0 : step + 1;
    }

    __device__ __forceinline__ uint32_t at() const
    {
        return steps + step * PAIR_BYTES;
    }

    /* The first pairs, as far as their tiles are before `settled`; they stay the next to be copied. */
    __device__ __forceinline__ void begin_settled(int settled) const
    {
        pair_ring first = *this;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            first.copy(copier.k, first.at(), INT_MIN, settled);
            first.copy(copier.v, first.at() + 2 * TILE_BYTES, INT_MIN, settled);
            first.turn();
        }
    }

    /* The rest of them. */
    __device__ __forceinline__ void begin(int settled)
    {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            load(copier.k, at(), settled);
            load(copier.v, at() + 2 * TILE_BYTES, settled);
            turn();
        }
    }
};

/* The scores of 16 rows and the lane's 16 keys of one or both tiles of a pair, which begin at `first` and
 * PARTS * TILE later: their weights, and by the way the rescaling of the sums so far. */
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
            int at = i / 4 * PARTS * TILE + i / 2 % 2 * 8 + i % 2;
            float &score = s[i / 2][row * 2 + i % 2];
            score = at >= low && at < high ? __fmul_rn(score, scale) : -INFINITY;
            maximum = fmaxf(maximum, score);
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(MIL_ALL_LANES, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(MIL_ALL_LANES, maximum, 2));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float &score = s[i / 2][row * 2 + i % 2];
            score = mil_exp2(__fsub_rn(score, maximum));
            sum = __fadd_rn(sum, score);
        }
        factor[row] = mil_exp2(__fsub_rn(state[row].maximum, maximum));
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

/* A lane's result of the real rows among its 16, for merge_lanes. */
template <typename M, int N>
static __device__ __forceinline__ void
keep_lane(M *memory, const decode_warp &w, int rows, softmax_row (&state)[2], const float (&acc)[N][4])
{
#pragma unroll
    for (int row = 0; row < 2; row++) {
        int at = w.m * 16 + row * 8 + w.thread / 4;
        state[row].sum = __fadd_rn(state[row].sum, __shfl_xor_sync(MIL_ALL_LANES, state[row].sum, 1));
        state[row].sum = __fadd_rn(state[row].sum, __shfl_xor_sync(MIL_ALL_LANES, state[row].sum, 2));
        if (at < rows) {
            memory->lane_rows[w.lane][at] = state[row];
#pragma unroll
            for (int i = 0; i < N; i++) {
                *(float2 *)&memory->tiles.values[w.lane][at][i * 8 + w.thread % 4 * 2] =
                    make_float2(acc[i][row * 2], acc[i][row * 2 + 1]);
            }
        }
    }
}

/* The lanes' results of a part as (0 1)(2 3). */
template <typename M>
static __device__ __forceinline__ void
merge_lanes(const M *memory, int row, int column, softmax_row &all, float4 &sum)
{
    softmax_row part[LANES];
    float4 values[LANES];
#pragma unroll
    for (int lane = 0; lane < LANES; lane++) {
        part[lane] = memory->lane_rows[lane][row];
        values[lane] = *(const float4 *)&memory->tiles.values[lane][row][column];
    }
    merge_quads(part[0], values[0], part[1], values[1]);
    merge_quads(part[2], values[2], part[3], values[3]);
    merge_quads(part[0], values[0], part[2], values[2]);
    all = part[0];
    sum = values[0];
}

/* The part of this block of the cluster, sent to the block that merges that place of the rows: quad i of the
 * rows goes to block i / share. */
template <typename M>
static __device__ __forceinline__ void
send_values(M *memory, const decode_place &p, int share)
{
    int rank = mil_cluster_rank();
    for (int i = threadIdx.x; i < p.rows * p.quads; i += M::THREADS) {
        int row = i / p.quads, column = i % p.quads * 4;
        softmax_row all;
        float4 sum;
        merge_lanes(memory, row, column, all, sum);
        ((float4 *)mil_cluster_at(memory, i / share)->inbox)[rank * share + i % share] = sum;
        if (column < PARTS * 4) { /* the first eight threads of a row tell a block each */
            for (int to = column / 4; to < PARTS; to += p.quads) {
                mil_cluster_at(memory, to)->rows[rank][row] = all;
            }
        }
    }
}

/* Four values of a row, divided and rounded. */
template <typename T>
static __device__ __forceinline__ void
write_quad(const attention_arguments &a, const decode_place &p, int i, const softmax_row &all,
           const float4 &sum)
{
    int row = i / p.quads, column = i % p.quads * 4;
    float inverse = __fdiv_rn(1.0f, all.sum);
    float y[4] = {sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse};
    int slot = p.first_slot + row, head = p.kv_head * a.group + slot % a.group;
    int64_t packed = p.first_row + slot / a.group;
    mil_store<4>((T *)a.y + packed * a.y_stride + (int64_t)head * a.head_dim + column, y);
    if (a.log_sum_exp != NULL && column == 0) {
        a.log_sum_exp[packed * a.heads + head] = all.maximum * LN_2 + logf(all.sum);
    }
}

/* The parts' results in order, of this block's share. */
template <typename T, typename M>
static __device__ __forceinline__ void
merge_blocks(const attention_arguments &a, const M *memory, const decode_place &p, int share)
{
    for (int i = threadIdx.x; i < share; i += M::THREADS) {
        int at = mil_cluster_rank() * share + i, row = at / p.quads;
        if (row >= p.rows) {
            return;
        }
        softmax_row all = memory->rows[0][row];
        float4 sum = ((const float4 *)memory->inbox)[i];
#pragma unroll
        for (int part = 1; part < PARTS; part++) {
            merge_quads(all, sum, memory->rows[part][row], ((const float4 *)memory->inbox)[part * share + i]);
        }
        write_quad<T>(a, p, at, all, sum);
    }
}

/* One block for all parts: takes this one to those before. */
template <typename M>
static __device__ __forceinline__ void
fold_part(M *memory, const decode_place &p, int part)
{
    for (int i = threadIdx.x; i < p.rows * p.quads; i += M::THREADS) {
        int row = i / p.quads, column = i % p.quads * 4;
        float4 &kept = ((float4 *)memory->inbox)[i], sum, more;
        softmax_row all, from;
        merge_lanes(memory, row, column, from, more);
        if (part > 0) {
            all = memory->rows[part - 1][row];
            sum = kept;
            merge_quads(all, sum, from, more);
        }
        else {
            all = from;
            sum = more;
        }
        kept = sum;
        if (column == 0) {
            memory->rows[part][row] = all;
        }
    }
}

/* A pair, of which both tiles are there or the first, into the warp's running softmax; the copies of a later one
 * take its place. */
template <typename T, int D, int MT, int STEPS, int BLOCKS>
static __device__ __forceinline__ void
play_pair(const attention_arguments &a, const decode_warp &w, uint32_t q, int first, bool both,
          pair_ring<T, D, MT, STEPS, BLOCKS> &ring, softmax_row (&state)[2], float (&acc)[D / 8][4])
{
    uint32_t k = ring.at(), v = k + 2 * ring.TILE_BYTES, weights[2][4];
    copies_wait<2 * STEPS - 1>();
    lane_sync<MT>(w.lane);
    weigh_keys<T, D>(a, w, q, k, first, both, state, acc, weights);
    lane_sync<MT>(w.lane);
    ring.load(ring.copier.k, k);
    copies_wait<2 * STEPS - 1>();
    lane_sync<MT>(w.lane);
    add_values<T, D>(w, weights[0], v, acc);
    if (both) {
        add_values<T, D>(w, weights[1], v + ring.TILE_BYTES, acc);
    }
    lane_sync<MT>(w.lane);
    ring.load(ring.copier.v, v);
    ring.turn();
}

/* The pairs of a part, of which the last may lack its second tile.  Where one block has a multiprocessor, a loop
 * without branches finds the registers that it needs, and takes a third less time. */
template <typename T, int D, int MT, int STEPS, int BLOCKS>
static __device__ __forceinline__ void
play_part(const attention_arguments &a, const decode_warp &w, uint32_t q, pair_walk<BLOCKS> &walk,
          pair_ring<T, D, MT, STEPS, BLOCKS> &ring, softmax_row (&state)[2], float (&acc)[D / 8][4])
{
    if constexpr (STEPS > 1) {
        for (; walk.tile + PARTS < walk.tiles; walk.tile += 2 * PARTS) {
            play_pair(a, w, q, walk.tile * TILE, true, ring, state, acc);
        }
    }
    for (; walk.tile < walk.tiles; walk.tile += 2 * PARTS) {
        bool both = STEPS == 1 && walk.tile + PARTS < walk.tiles;
        play_pair(a, w, q, walk.tile * TILE, both, ring, state, acc);
    }
}

/* What serves a key head and MT * 16 of its query rows, of a sequence: BLOCKS play the parts. */
template <typename T, int D, int MT, int STEPS, int BLOCKS>
static __device__ __forceinline__ void
decode_head(const attention_arguments &a)
{
    extern __shared__ __align__(128) unsigned char raw[];
    typedef decode_memory<D, MT, STEPS, BLOCKS> memory_type;
    memory_type *memory = reinterpret_cast<memory_type *>(raw);
    /* Where the clusters leave multiprocessors free (several steps under way: decode_width), the product behind fills its
     * ring on those meanwhile: 4,043 us a step of one text become 4,005 (8B on an H200).  So it does where blocks play all
     * parts and end one by one: 6,540 of 32 texts become 6,515.  Other clusters would hold parts of the chip that its blocks
     * share unevenly. */
    if constexpr (STEPS > 1 || BLOCKS == 1) {
        mil_trigger();
    }
    mil_wait_for_states(a.rows);
    decode_place p;
    if (!find_place<MT>(a, p)) {
        mil_wait();
        return; /* with the whole cluster */
    }
    if constexpr (BLOCKS > 1) {
        mil_cluster_arrive();
    }
    decode_warp w = {};
    w.thread = threadIdx.x % MIL_WARP;
    w.lane = threadIdx.x / MIL_WARP % LANES;
    w.m = threadIdx.x / MIL_WARP / LANES;
    pair_walk<BLOCKS> walk(a, p);
    uint32_t q = shared_address(memory->q);
    pair_ring<T, D, MT, STEPS, BLOCKS> ring(a, p, w, walk, shared_address(memory->tiles.step));
    /* Keys and values of earlier passes are on their way while the kernel that adds this one's is still at work. */
    const int settled = a.rows.settled ? p.past / TILE : 0; /* tiles */
    ring.begin_settled(settled);
    mil_wait();
    load_queries<T, D, MT>(a, p, q);
    copies_commit();
    ring.begin(settled);
    see_keys(a, p, w);
    copies_wait<2 * STEPS>();
    __syncthreads();

    do {
        softmax_row state[2] = {{NO_SCORE, 0.0f}, {NO_SCORE, 0.0f}};
        float acc[D / 8][4] = {};
        play_part(a, w, q, walk, ring, state, acc);
        if constexpr (BLOCKS > 1) {
            copies_wait<0>();
            __syncthreads(); /* the results lie where copies did */
        }
        keep_lane(memory, w, p.rows, state, acc);
        __syncthreads();
        if constexpr (BLOCKS == 1) {
            fold_part(memory, p, walk.part);
            __syncthreads();
        }
    } while (walk.next_part());
    if constexpr (BLOCKS > 1) {
        int share = (p.rows * p.quads + PARTS - 1) / PARTS;
        mil_cluster_wait(); /* all blocks have begun: their memory is theirs */
        send_values(memory, p, share);
        mil_cluster_sync();
        merge_blocks<T>(a, memory, p, share);
    }
    else {
        for (int i = threadIdx.x; i < p.rows * p.quads; i += memory_type::THREADS) {
            write_quad<T>(a, p, i, memory->rows[PARTS - 1][i / p.quads], ((const float4 *)memory->inbox)[i]);
        }
    }
}

/* Blocks that a multiprocessor shall hold, which tells the compiler how many registers a thread may have: as many
 * as the 228 KB of Hopper's shared memory suffice for, 1 KB of each being the system's, and no more than leave a
 * thread the registers for its products. */
template <int D, int MT, int STEPS, int BLOCKS>
constexpr int
resident_blocks()
{
    typedef decode_memory<D, MT, STEPS, BLOCKS> memory_type;
    int shared = (228 << 10) / (int)(sizeof(memory_type) + 1024 + 4 * D * sizeof(float)),
        registers = 65536 / (memory_type::THREADS * (D <= 64    ? 96
                                                     : D <= 128 ? 128
                                                                : 255));
    int blocks = shared < registers ? shared : registers;
    return blocks > 1 ? blocks : 1;
}

template <typename T, int D, int MT, int STEPS>
static __global__ void
MIL_CLUSTER(PARTS) __launch_bounds__(LANES * MT * MIL_WARP, resident_blocks<D, MT, STEPS, PARTS>())
    decode_kernel(const __grid_constant__ attention_arguments a)
{
    decode_head<T, D, MT, STEPS, PARTS>(a);
}

template <typename T, int D, int MT>
static __global__ void
__launch_bounds__(LANES * MT * MIL_WARP, resident_blocks<D, MT, 1, 1>())
    decode_many_kernel(const __grid_constant__ attention_arguments a)
{
    decode_head<T, D, MT, 1, 1>(a);
}

template <typename T, int D, int MT, int STEPS, int BLOCKS>
static mil_status
decode_rows(mil_context *context, const attention_arguments *a, int64_t longest)
{
    typedef decode_memory<D, MT, STEPS, BLOCKS> memory_type;
    int64_t slots = longest * a->group, rows = slots < MT * 16 ? slots : MT * 16;
    dim3 grid(BLOCKS, (unsigned)(a->kv_heads * mil_ceil_div(slots, MT * 16)), (unsigned)a->rows.sequences);
    size_t inbox = (size_t)(rows * a->head_dim + 4 * PARTS) * sizeof(float);
    static_assert(sizeof(memory_type) + (MT * 16 * D + 4 * PARTS) * sizeof(float) <= DECODE_BYTES);
    void (*kernel)(attention_arguments);
    if constexpr (BLOCKS > 1) {
        kernel = decode_kernel<T, D, MT, STEPS>;
    }
    else {
        kernel = decode_many_kernel<T, D, MT>;
    }
    return mil_launch(context, "attention (decode)", kernel, grid, dim3(memory_type::THREADS),
                      sizeof(memory_type) + inbox, *a);
}

/* Up to 32 query rows of many texts take a block a key head: no block waits for others, and copies never pause.
 * That pays from one key head for two multiprocessors on, or three for one where rows make two tiles of 16, as
 * a multiprocessor then has one block only.  A text that is far longer than the others would keep its blocks
 * long after theirs; so `texts` counts in lengths of the longest cache.
 *
 * Where clusters are no more blocks than multiprocessors, each takes their whole memory for reading ahead;
 * more than 32 query rows then make two clusters a key head, of which one finds the keys in L2. */
template <typename T, int D>
static mil_status
decode_width(mil_context *context, const attention_arguments *a, int64_t longest, int64_t texts)
{
    int64_t slots = longest * a->group, clusters = (int64_t)a->kv_heads * a->rows.sequences;
    const int multiprocessors = mil_multiprocessors(context);
    bool many = 2 * a->kv_heads * texts >= (slots <= 16 ? 1 : 6) * multiprocessors;
    bool deep = clusters * mil_ceil_div(slots, 32) * PARTS <= multiprocessors;
    if constexpr (D > 128) {
        return slots <= 16 ? decode_rows<T, D, 1, 1, PARTS>(context, a, longest)
                           : decode_rows<T, D, 2, 1, PARTS>(context, a, longest);
    }
    else if (slots <= 16) {
        return many   ? decode_rows<T, D, 1, 1, 1>(context, a, longest)
               : deep ? decode_rows<T, D, 1, 3, PARTS>(context, a, longest)
                      : decode_rows<T, D, 1, 1, PARTS>(context, a, longest);
    }
    else if (slots <= 32 && many) {
        return decode_rows<T, D, 2, 1, 1>(context, a, longest);
    }
    else if (deep) {
        return decode_rows<T, D, 2, 3, PARTS>(context, a, longest);
    }
    else {
        return slots <= 32 ? decode_rows<T, D, 2, 1, PARTS>(context, a, longest)
                           : decode_rows<T, D, 4, 1, PARTS>(context, a, longest);
    }
}

template <typename T>
static mil_status
decode(mil_context *context, const attention_arguments *a, int64_t longest, int64_t texts)
{
    return a->head_dim <= 64    ? decode_width<T, 64>(context, a, longest, texts)
           : a->head_dim <= 128 ? decode_width<T, 128>(context, a, longest, texts)
                                : decode_width<T, 256>(context, a, longest, texts);
}

mil_status
mil_attention_decode(mil_context *context, const attention_arguments *a, int64_t longest, int64_t texts,
                     bool *done)
{
    *done = mil_device_has_clusters(context) && mil_device_has_shared(context, DECODE_BYTES);
    return !*done ? MIL_OK
                  : (context->ops->activation_dtype == MIL_BF16 ? decode<__nv_bfloat16>
                                                                : decode<__half>)(context, a, longest, texts);
}
