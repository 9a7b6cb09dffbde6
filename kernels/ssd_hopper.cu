/* Mamba-2's prompts on Hopper: the chunks of ssd.cu over wgmma.
 *
 * A block has three groups of four warps.  Two hold 64 columns of a head each, as H^T [64, N] in their accumulators: two
 * halves of 128 columns of one head, or two heads of 64 that read the same B and C.  The third prepares what they share,
 * and runs a chunk of 64 tokens ahead of them:
 *
 *   third    x, B, C and decays into shared memory (copies in the background, two or three chunks ahead), and scores
 *            C B^T [64, 64], weighted and rounded
 *   others   h (H^T C^T), H^T = h_last H^T + (to_end x)^T B, and Y^T = D x^T + x^T S^T, products right behind each other,
 *            left operands from registers: H^T as it is, rounded, x^T by ldmatrix.  The scores are needed last.  Y^T goes
 *            out through x's place
 *
 * Where folds alone are asked for, two groups weigh x in its place, and two multiply, H^T = H^T + x^T B.
 * Chunks come last first: the decay to the segment's end is in the weights then, and H^T waits for no factor.
 *
 * What a chunk needs passes from the third group to the others and back by barriers in shared memory, so the two
 * holders are apart from each other: one computes while the other's products run.  A block has a multiprocessor of its own:
 * H^T, Y^T and their operands are 190 registers a thread, of which the third group gives some of its own.
 */

#include "panel_map.cuh"
#include "ssd_chunks.cuh"
#include "wgmma.cuh"

#define HOLDERS 2
#define GROUP_THREADS 128
#define OUTPUT_THREADS ((HOLDERS + 1) * GROUP_THREADS)
#define WEIGHERS 2 /* groups, of chunks in turns, where folds are alone */
#define FOLD_THREADS ((HOLDERS + WEIGHERS) * GROUP_THREADS + MIL_WARP) /* and a warp to copy */
#define PANEL (CHUNK * 64) /* elements of a panel: 64 tokens by 64 columns */
#define SCORES 3           /* chunks whose scores are in shared memory */

/* Registers a thread: a third of 504 each, as the kernel begins and ends, and between. */
#define REGISTERS 168
#define REGISTERS_TO_PREPARE 88
#define REGISTERS_TO_HOLD 208

/* ---- instructions that wgmma.cuh does not have -------------------------------------------------------------------- */

#define STRAIGHT_32(TYPE)                                                              \
    asm volatile(                                                                      \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                   \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" WGMMA_TEXT_32 \
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"                                 \
        : WGMMA_32(c)                                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add)                 \
        : "memory")

/* c [64, CHUNK] (+)= a [64, 16] b [CHUNK, 16]^T, a in registers. */
template <typename T>
static __device__ __forceinline__ void
multiply_straight(float (&c)[CHUNK / 2], const uint32_t (&a)[4], uint64_t b, int add)
{
#if MIL_HAS_WGMMA
    if constexpr (wgmma_is_half<T>) {
        STRAIGHT_32("f16");
    }
    else {
        STRAIGHT_32("bf16");
    }
#else
    (void)c, (void)a, (void)b, (void)add;
#endif
}

#define WGMMA_TURNED(COUNT, N, TYPE, A, B)                                                              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" WGMMA_TEXT_##COUNT \
                 "}, %" A ", %" B ", 1, 1, 1, 1, 1;"                                                    \
                 : WGMMA_##COUNT(c)                                                                     \
                 : "l"(a), "l"(b)                                                                       \
                 : "memory")

/* c [64, N] += a [16, 64]^T b [16, N], both in shared memory. */
template <typename T, int COUNT>
static __device__ __forceinline__ void
multiply_turned(float (&c)[COUNT], uint64_t a, uint64_t b)
{
#if MIL_HAS_WGMMA
    static_assert(COUNT == 32 || COUNT == 64, "64 or 128 columns");
    if constexpr (COUNT == 32 && wgmma_is_half<T>) {
        WGMMA_TURNED(32, "64", "f16", "32", "33");
    }
    else if constexpr (COUNT == 32) {
        WGMMA_TURNED(32, "64", "bf16", "32", "33");
    }
    else if constexpr (wgmma_is_half<T>) {
        WGMMA_TURNED(64, "128", "f16", "64", "65");
    }
    else {
        WGMMA_TURNED(64, "128", "bf16", "64", "65");
    }
#else
    (void)c, (void)a, (void)b;
#endif
}

/* Until at most GROUPS committed groups are under way; their accumulators stay where they are. */
template <int GROUPS>
static __device__ __forceinline__ void
let_run()
{
#if MIL_HAS_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
#endif
}

/* Four 8 x 8 matrices, as accumulators hold them or turned; lane l gives the address of row l % 8 of matrix l / 8. */
template <bool TURNED>
static __device__ __forceinline__ void
store_matrices(uint32_t row, const uint32_t (&from)[4])
{
#if MIL_HAS_WGMMA
    if constexpr (TURNED) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                     "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                     : "memory");
    }
    else {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                     "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                     : "memory");
    }
#else
    (void)row, (void)from;
#endif
}

/* A panel to the array that `map` describes, from (row, column) on, in the background; by one thread. */
[[maybe_unused]] static __device__ __forceinline__ void
give_panel(const CUtensorMap *map, int column, int row, uint32_t from)
{
#if MIL_HAS_WGMMA
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
        "r"(column), "r"(row), "r"(from)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
    (void)map, (void)column, (void)row, (void)from;
#endif
}

/* Until what this thread has given has left shared memory. */
[[maybe_unused]] static __device__ __forceinline__ void
wait_for_given()
{
#if MIL_HAS_WGMMA
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

/* ---- shared memory ------------------------------------------------------------------------------------------------ */

/* Tiles are panels as wgmma reads them. Panel g of x is holder g's. */
template <typename T, int N, bool PAIRS, bool OUTPUT>
struct hopper_memory {
    static constexpr int HEADS = PAIRS ? HOLDERS : 1;
    static constexpr int STAGES = !OUTPUT ? 6 : PAIRS && N == 128 ? 3 : 4; /* chunks */
    alignas(1024) T x[STAGES][HOLDERS][PANEL];
    alignas(1024) T B[STAGES][CHUNK * N];
    alignas(1024) T C[OUTPUT ? STAGES : 1][OUTPUT ? CHUNK * N : 1];
    alignas(1024) T scores[OUTPUT ? SCORES : 1][HEADS][OUTPUT ? PANEL : 1];
    chunk_decays decays[STAGES][HEADS];
    uint64_t full[STAGES], ready[STAGES]; /* inputs are here; and scores */
    uint64_t free[STAGES];                /* the holders are done with both */

    /* Where the n-th chunk is, and the parity of its phases. */
    static __device__ __forceinline__ int stage_of(int n)
    {
        return (unsigned)n % STAGES;
    }

    static __device__ __forceinline__ int parity_of(int n)
    {
        return (unsigned)n / STAGES % 2;
    }
};

/* Descriptions of x, B, C and y of all rows, for copies of a panel. */
struct hopper_maps {
    CUtensorMap x, B, C, y;
};

/* What earlier calls left of the first chunk: its first `before` tokens. */
template <typename T, int UNITS>
static __device__ __forceinline__ void
take_tail(T *tile, const float *tail, int64_t stride, int before)
{
    const int thread = threadIdx.x % GROUP_THREADS;
    for (int row = thread / UNITS; row < before; row += GROUP_THREADS / UNITS) {
        T *to = (T *)((char *)tile + panel_place<CHUNK>(row, thread % UNITS));
        float value[4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            mil_load<4>(tail + row * stride + thread % UNITS * 8 + 4 * half, value);
            mil_store<4>(to + 4 * half, value);
        }
    }
}

/* Zeros for the rows of a tile from `from` on: what lies there is another sequence's, or nobody's. */
template <typename T, int UNITS>
static __device__ __forceinline__ void
clear_rows(T *tile, int from)
{
    const int thread = threadIdx.x % GROUP_THREADS;
    for (int row = from + thread / UNITS; row < CHUNK; row += GROUP_THREADS / UNITS) {
        *(uint4 *)((char *)tile + panel_place<CHUNK>(row, thread % UNITS)) = make_uint4(0, 0, 0, 0);
    }
}

/* The threads of the own group meet. */
[[maybe_unused]] static __device__ __forceinline__ void
meet_group()
{
    barrier_meet(1 + (int)threadIdx.x / GROUP_THREADS, GROUP_THREADS);
}

/* ---- what every group knows of the block ------------------------------------------------------------------------- */

struct hopper_place {
    int slice, segment;
    int head;          /* the block's first */
    int before, count; /* tokens of earlier calls and of this one */
    int folded;        /* of both, to be in the state */
    int first, end;    /* chunks of the segment */
    int64_t row;       /* first of the call */

    /* The n-th chunk to be done. */
    template <bool OUTPUT>
    __device__ __forceinline__ int chunk(int n) const
    {
        return OUTPUT ? first + n : end - 1 - n;
    }
};

/* ---- the third group ----------------------------------------------------------------------------------------------- */

/* Columns of a block's panels in the rows of x, B and C. */
struct hopper_columns {
    int x[HOLDERS], B, C;
};

template <int N, bool PAIRS>
static __device__ __forceinline__ hopper_columns
find_columns(const ssd_arguments &a, const hopper_place &p)
{
    const int of_x = a.heads / a.x_heads, first = p.head / of_x * a.head_dim;
    return {{first + p.slice * (PAIRS ? 64 : 128),
             PAIRS ? (p.head + 1) / of_x * a.head_dim + p.slice * 64 : first + p.slice * 128 + 64},
            p.head / (a.heads / a.B_groups) * N,
            p.head / (a.heads / a.C_groups) * N};
}

/* The n-th chunk of the block, on its way; by one thread. */
template <typename T, int N, bool PAIRS, bool OUTPUT>
static __device__ __forceinline__ void
ask_for_chunk(const chunk_arguments &c, const hopper_maps &maps, const hopper_columns &columns,
              const hopper_place &p, int n, hopper_memory<T, N, PAIRS, OUTPUT> &m)
{
    const int stage = m.stage_of(n), chunk = p.chunk<OUTPUT>(n), row = (int)p.row + chunk * CHUNK - p.before;
    phase_expect(&m.full[stage],
                 (HOLDERS + N / 64 * (OUTPUT ? 2 : 1)) * (int)sizeof m.x[0][0] + (int)sizeof m.decays[0]);
#pragma unroll
    for (int i = 0; i < m.HEADS; i++) {
        copy_bulk(&m.decays[stage][i], find_decays(c, p.head + i, chunk), sizeof(chunk_decays),
                  &m.full[stage]);
    }
#pragma unroll
    for (int i = 0; i < HOLDERS; i++) {
        copy_panel(m.x[stage][i], &maps.x, columns.x[i], row, &m.full[stage]);
    }
#pragma unroll
    for (int i = 0; i < N / 64; i++) {
        copy_panel(m.B[stage] + i * PANEL, &maps.B, columns.B + i * 64, row, &m.full[stage]);
        if constexpr (OUTPUT) {
            copy_panel(m.C[stage] + i * PANEL, &maps.C, columns.C + i * 64, row, &m.full[stage]);
        }
    }
}

/* Waits for the n-th chunk, and completes it by what no copy brings. */
template <typename T, int N, bool PAIRS, bool OUTPUT>
static __device__ __forceinline__ void
complete_chunk(const ssd_arguments &a, const mil_tails &tails, const hopper_columns &columns,
               const hopper_place &p, int n, hopper_memory<T, N, PAIRS, OUTPUT> &m)
{
    constexpr int UNITS = N / 8; /* of a token's B */
    const int stage = m.stage_of(n), chunk = p.chunk<OUTPUT>(n), there = p.before + p.count - chunk * CHUNK;
    phase_wait(&m.full[stage], m.parity_of(n));
    if (chunk > 0 && there >= CHUNK) {
        return;
    }
    if (chunk == 0 && tails.x != NULL) {
#pragma unroll
        for (int i = 0; i < HOLDERS; i++) {
            take_tail<T, 8>(m.x[stage][i], tails.x + columns.x[i], (int64_t)a.x_heads * a.head_dim, p.before);
        }
        take_tail<T, UNITS>(m.B[stage], tails.B + columns.B, (int64_t)a.B_groups * N, p.before);
    }
#pragma unroll
    for (int i = 0; i < HOLDERS; i++) {
        clear_rows<T, 8>(m.x[stage][i], there);
    }
    clear_rows<T, UNITS>(m.B[stage], there);
    wgmma_publish();
    meet_group();
}

/* The n-th chunk, once the holders have left its place; by one thread. */
template <typename T, int N, bool PAIRS, bool OUTPUT>
static __device__ __forceinline__ void
feed_chunk(const chunk_arguments &c, const hopper_maps &maps, const hopper_columns &columns,
           const hopper_place &p, int n, hopper_memory<T, N, PAIRS, OUTPUT> &m)
{
    if (n >= p.end - p.first) {
        return;
    }
    if (n >= m.STAGES) {
        phase_wait(&m.free[m.stage_of(n)], m.parity_of(n - m.STAGES));
    }
    ask_for_chunk(c, maps, columns, p, n, m);
}

/* `work` for the thread's warp of its group, whose number it is told as a constant. */
template <int WARP>
struct warp_number {
    static constexpr int value = WARP;
};

template <typename Work>
static __device__ __forceinline__ void
for_own_warp(Work work)
{
    switch (threadIdx.x % GROUP_THREADS / MIL_WARP) {
        case 0:
            work(warp_number<0>());
            break;
        case 1:
            work(warp_number<1>());
            break;
        case 2:
            work(warp_number<2>());
            break;
        default:
            work(warp_number<3>());
            break;
    }
}

/* What the scores of a thread are multiplied by.  Its warp has the rows of a block of the chunk, of which the thread has two.
 * Left of the block's diagonal tiles a decay is two factors: from the token to the block, and from there. */
struct score_weights {
    float from_block[2];                    /* to each row */
    float to_block[(CHUNK - BLOCK) / 8][2]; /* of two columns a tile, times dt */
    float diagonal[2][2], last_tile[2]; /* of the first diagonal tile; and the lower row's of the second */
};

template <int WARP>
static __device__ __forceinline__ void
weigh_scores(const chunk_decays &decays, score_weights &w)
{
    const int lane = threadIdx.x % MIL_WARP, row = BLOCK * WARP + lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 2 * WARP; j++) {
        const float2 weight = *(const float2 *)(decays.to_block + find_to_block(WARP) + 8 * j + column);
        w.to_block[j][0] = weight.x;
        w.to_block[j][1] = weight.y;
    }
    const float2 top = decays.sum[row], bottom = decays.sum[row + 8];
    w.from_block[0] = decays.from_block[row];
    w.from_block[1] = decays.from_block[row + 8];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const int first = BLOCK * WARP + column + k, second = first + 8;
        w.diagonal[0][k] = decay_between(decays.sum[first], top) * decays.dt[first];
        w.diagonal[1][k] = decay_between(decays.sum[first], bottom) * decays.dt[first];
        w.last_tile[k] = decay_between(decays.sum[second], bottom) * decays.dt[second];
    }
}

/* Weighted and rounded scores of the warp's rows into the tile, up to the diagonal; beyond, the tile is 0. */
template <typename T, int WARP>
static __device__ __forceinline__ void
place_scores(const float (&s)[CHUNK / 2], const score_weights &w, T *tile)
{
    const int lane = threadIdx.x % MIL_WARP;
    /* The lane's row of the four matrices of two tiles. */
    auto row_of = [&](int tile_column) {
        return shared_address(tile) + panel_place<CHUNK>(BLOCK * WARP + lane % 16, tile_column + lane / 16);
    };
#pragma unroll
    for (int j = 0; j < 2 * WARP; j += 2) {
        uint32_t rounded[4];
#pragma unroll
        for (int i = 0; i < 4; i++) { /* top and bottom of a tile, and of the next */
            const int t = j + i / 2, e = 4 * t + i % 2 * 2;
            rounded[i] = pack<T>(w.from_block[i % 2] * w.to_block[t][0] * s[e],
                                 w.from_block[i % 2] * w.to_block[t][1] * s[e + 1]);
        }
        store_matrices<false>(row_of(j), rounded);
    }
    constexpr int E = 8 * WARP; /* its diagonal tiles */
    float value[2][3];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const bool after = lane % 4 * 2 + k > lane / 4; /* the row */
        value[k][0] = after ? 0.0f : w.diagonal[0][k] * s[E + k];
        value[k][1] = w.diagonal[1][k] * s[E + 2 + k];
        value[k][2] = after ? 0.0f : w.last_tile[k] * s[E + 6 + k];
    }
    const uint32_t rounded[4] = {pack<T>(value[0][0], value[1][0]), pack<T>(value[0][1], value[1][1]), 0,
                                 pack<T>(value[0][2], value[1][2])};
    store_matrices<false>(row_of(2 * WARP), rounded);
}

/* s = C B^T of a chunk's tiles, in the background. */
template <typename T, int N>
static __device__ __forceinline__ void
multiply_scores(uint32_t C, uint32_t B, float (&s)[CHUNK / 2])
{
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        const uint32_t at = k / 4 * PANEL * 2 + k % 4 * 32;
        wgmma_shared<T>(s, wgmma_factor(C + at, 16), wgmma_factor(B + at, 16), k > 0);
    }
    wgmma_commit();
}

template <typename T, int N, bool PAIRS>
static __device__ __forceinline__ void
prepare_scores(const chunk_arguments &c, const hopper_maps &maps, const mil_tails &tails,
               const hopper_columns &columns, const hopper_place &p, hopper_memory<T, N, PAIRS, true> &m)
{
    uint4 *scores = (uint4 *)m.scores;
    const bool feeds = threadIdx.x % GROUP_THREADS == 0;
    for (int n = 0; n < m.STAGES && feeds; n++) {
        feed_chunk(c, maps, columns, p, n, m);
    }
    for (int i = threadIdx.x % GROUP_THREADS; i < (int)(sizeof m.scores / sizeof *scores);
         i += GROUP_THREADS) {
        scores[i] = make_uint4(0, 0, 0, 0);
    }
    meet_group();
    float s[CHUNK / 2];
    auto begin = [&](int n) {
        complete_chunk(c.ssd, tails, columns, p, n, m);
        multiply_scores<T, N>(shared_address(m.C[m.stage_of(n)]), shared_address(m.B[m.stage_of(n)]), s);
    };
    begin(0);
#pragma unroll 1
    for (int n = 0; n < p.end - p.first; n++) {
        const int stage = m.stage_of(n);
        const int before = n - SCORES; /* the chunk that had the place of this one's scores */
        score_weights weights;
#pragma unroll
        for (int i = 0; i < m.HEADS; i++) {
            for_own_warp([&](auto warp) { weigh_scores<warp.value>(m.decays[stage][i], weights); });
            if (i == 0) {
                wgmma_wait<0>(s);
                if (before >= 0) {
                    phase_wait(&m.free[m.stage_of(before)], m.parity_of(before));
                }
            }
            for_own_warp(
                [&](auto warp) { place_scores<T, warp.value>(s, weights, m.scores[n % SCORES][i]); });
        }
        /* While the scores are on their way to where they are shown; the last chunk is begun twice, as registers of products
         * must not depend on a condition. */
        begin(min(n + 1, p.end - p.first - 1));
        wgmma_publish();
        phase_arrive(&m.ready[stage]);
        if (feeds && n > 0) {
            feed_chunk(c, maps, columns, p, n - 1 + m.STAGES, m);
        }
        __syncwarp();
    }
    wgmma_wait<0>(s);
}

/* x times `after` to_end, rounded, in its place: all of a chunk is read before any is written, so that it is waited for once. */
template <typename T, int N, bool PAIRS>
static __device__ __forceinline__ void
weigh_chunk(int stage, const float (&after)[HOLDERS], hopper_memory<T, N, PAIRS, false> &m)
{
    constexpr int UNITS = CHUNK * 8 / GROUP_THREADS; /* of a panel */
    const int row = threadIdx.x % GROUP_THREADS / 8, unit = threadIdx.x % 8;
    uint4 units[HOLDERS * UNITS];
    float weight[HOLDERS * UNITS];
    auto unit_of = [&](int i) {
        return (uint4 *)((char *)m.x[stage][i / UNITS] +
                         panel_place<CHUNK>(row + i % UNITS * (GROUP_THREADS / 8), unit));
    };
#pragma unroll
    for (int i = 0; i < HOLDERS * UNITS; i++) {
        units[i] = *unit_of(i);
        weight[i] = after[i / UNITS] *
                    m.decays[stage][PAIRS ? i / UNITS : 0].to_end[row + i % UNITS * (GROUP_THREADS / 8)];
    }
#pragma unroll
    for (int i = 0; i < HOLDERS * UNITS; i++) {
        uint32_t *pairs = (uint32_t *)&units[i];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float2 value = unpack<T>(pairs[k]);
            pairs[k] = pack<T>(weight[i] * value.x, weight[i] * value.y);
        }
        *unit_of(i) = units[i];
    }
}

template <typename T, int N, bool PAIRS>
static __device__ __forceinline__ void
prepare_folds(const chunk_arguments &c, const mil_tails &tails, const hopper_columns &columns,
              const hopper_place &p, hopper_memory<T, N, PAIRS, false> &m)
{
    const int count = p.end - p.first, which = threadIdx.x / GROUP_THREADS - HOLDERS;
    float after[HOLDERS] = {1.0f, 1.0f}; /* decays of the chunks done, by all groups */
    auto pass = [&](int n) {
        phase_wait(&m.full[m.stage_of(n)], m.parity_of(n));
#pragma unroll
        for (int i = 0; i < HOLDERS; i++) {
            after[i] *= m.decays[m.stage_of(n)][PAIRS ? i : 0].last;
        }
    };
    for (int n = 0; n < min(which, count); n++) {
        pass(n);
    }
#pragma unroll 1
    for (int n = which; n < count; n += WEIGHERS) {
        complete_chunk(c.ssd, tails, columns, p, n, m);
        weigh_chunk(m.stage_of(n), after, m);
        for (int next = n; next < min(n + WEIGHERS, count); next++) {
            pass(next); /* before this one is announced: none of them leaves its place before it */
        }
        wgmma_publish();
        phase_arrive(&m.ready[m.stage_of(n)]);
    }
    if (p.slice == 0 && threadIdx.x == HOLDERS * GROUP_THREADS) {
#pragma unroll
        for (int i = 0; i < m.HEADS; i++) {
            c.segment_decays[find_segment(c, p.head + i, p.segment)] = after[i];
        }
    }
}

/* ---- the holders ----------------------------------------------------------------------------------------------------- */

/* x^T of the warp's 16 columns: four left operands of 16 tokens. */
template <typename T>
static __device__ __forceinline__ void
load_x(const T *panel, uint32_t (&x)[4][4])
{
    const int lane = threadIdx.x % MIL_WARP, unit = threadIdx.x % GROUP_THREADS / MIL_WARP * 2 + lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        load_matrices_transposed(
            (const char *)panel + panel_place<CHUNK>(16 * k + lane % 8 + lane / 16 * 8, unit), x[k]);
    }
}

/* (to_end x)^T, rounded. */
template <typename T>
static __device__ __forceinline__ void
weigh_x(const chunk_decays &decays, const uint32_t (&x)[4][4], uint32_t (&weighed)[4][4])
{
#pragma unroll
    for (int i = 0; i < CHUNK / 4; i++) {
        const float2 weight = *(const float2 *)(decays.to_end + i / 2 * 8 + threadIdx.x % 4 * 2);
        const float2 value = unpack<T>(x[i / 4][i % 4]);
        weighed[i / 4][i % 4] = pack<T>(weight.x * value.x, weight.y * value.y);
    }
}

/* Y^T = D x^T. */
template <typename T>
static __device__ __forceinline__ void
begin_output(float D, const uint32_t (&x)[4][4], float (&Y)[CHUNK / 2])
{
#pragma unroll
    for (int i = 0; i < CHUNK / 4; i++) {
        const float2 value = unpack<T>(x[i / 4][i % 4]);
        Y[2 * i] = D * value.x;
        Y[2 * i + 1] = D * value.y;
    }
}

/* Y^T = Y^T + h (H^T C^T), rounded, into the warp's columns of x's panel. */
template <typename T>
static __device__ __forceinline__ void
finish_output(const chunk_decays &decays, const float (&of_H)[CHUNK / 2], const float (&Y)[CHUNK / 2],
              void *panel)
{
    const int lane = threadIdx.x % MIL_WARP, first = threadIdx.x % GROUP_THREADS / MIL_WARP * 2;
    float2 h[CHUNK / 8];
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
        h[j] = *(const float2 *)(decays.from_start + 8 * j + lane % 4 * 2);
    }
    __syncwarp(); /* the warp alone has read these columns of x, and is done with them */
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++) {
        uint32_t rounded[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = 8 * t + 2 * i;
            rounded[i] =
                pack<T>(fmaf(h[at / 4].x, of_H[at], Y[at]), fmaf(h[at / 4].y, of_H[at + 1], Y[at + 1]));
        }
        store_matrices<true>(shared_address(panel) +
                                 panel_place<CHUNK>(16 * t + lane % 8 + lane / 16 * 8, first + lane / 8 % 2),
                             rounded);
    }
}

/* The rows of the warp's columns of a panel that are the call's, 16 bytes at a time. `token`: of the call, the panel's first;
 * `y`: of the call's first row, at the group's first column. */
template <typename T>
static __device__ __forceinline__ void
store_rows(const void *panel, T *y, int64_t stride, int token, int count)
{
    const int lane = threadIdx.x % MIL_WARP, unit = threadIdx.x % GROUP_THREADS / MIL_WARP * 2 + lane % 2;
    __syncwarp();
#pragma unroll 1
    for (int row = lane / 2; row < CHUNK; row += MIL_WARP / 2) {
        if ((unsigned)(token + row) < (unsigned)count) {
            *(uint4 *)(y + (token + row) * stride + unit * 8) =
                *(const uint4 *)((const char *)panel + panel_place<CHUNK>(row, unit));
        }
    }
}

/* Each value of H^T and its place in a state [N, head_dim], from the group's first column on. */
template <int N, typename Move>
static __device__ __forceinline__ void
each_of_H(int head_dim, float (&H)[N / 2], Move move)
{
    const int lane = threadIdx.x % MIL_WARP, row = threadIdx.x % GROUP_THREADS / MIL_WARP * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        move((i / 4 * 8 + lane % 4 * 2 + i % 2) * head_dim + row + i % 4 / 2 * 8, H[i]);
    }
}

/* A holder's head, and its first column there. */
template <bool PAIRS>
static __device__ __forceinline__ int
find_head(const hopper_place &p)
{
    return PAIRS ? p.head + (int)threadIdx.x / GROUP_THREADS : p.head;
}

template <bool PAIRS>
static __device__ __forceinline__ int
find_column(const hopper_place &p)
{
    return PAIRS ? p.slice * 64 : p.slice * 128 + (int)threadIdx.x / GROUP_THREADS * 64;
}

template <typename T, int N, bool PAIRS>
static __device__ __forceinline__ void
hold_outputs(const chunk_arguments &c, const CUtensorMap *y_map, const mil_tails &tails, bool given,
             const hopper_place &p, hopper_memory<T, N, PAIRS, true> &m)
{
    const ssd_arguments &a = c.ssd;
    const int group = threadIdx.x / GROUP_THREADS, thread = threadIdx.x % GROUP_THREADS;
    const int head = find_head<PAIRS>(p), column = find_column<PAIRS>(p);
    const int64_t size = (int64_t)N * a.head_dim;
    float *state = given ? tails.state + head * size + column : NULL;
    const float D = a.D[head];
    float H[N / 2];
    {
        const float *from =
            c.segments == 1 ? state : c.segment_states + find_segment(c, head, p.segment) * size + column;
        each_of_H<N>(a.head_dim, H, [&](int at, float &h) { h = from == NULL ? 0.0f : from[at]; });
    }
#pragma unroll 1
    for (int n = 0; p.first + n < p.end; n++) {
        const int stage = m.stage_of(n), token = (p.first + n) * CHUNK - p.before;
        const bool whole = token >= 0 && token + CHUNK <= p.count; /* all of the chunk is this call's */
        const chunk_decays &decays = m.decays[stage][PAIRS ? group : 0];
        T *x_panel = m.x[stage][group];
        const uint32_t B = shared_address(m.B[stage]), C = shared_address(m.C[stage]),
                       scores = shared_address(m.scores[n % SCORES][PAIRS ? group : 0]);
        float Y[CHUNK / 2], of_H[CHUNK / 2];
        uint32_t left[N / 16][4], x[4][4], weighed[4][4];
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            left[i / 4][i % 4] = pack<T>(H[2 * i], H[2 * i + 1]);
        }
        phase_wait(&m.full[stage], m.parity_of(n));
        const float last = decays.last;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            H[i] *= last;
        }
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < N / 16; k++) {
            multiply_straight<T>(of_H, left[k], wgmma_factor(C + k / 4 * PANEL * 2 + k % 4 * 32, 16), k > 0);
        }
        wgmma_commit();
        if (!whole) {
            phase_wait(&m.ready[stage], m.parity_of(n)); /* what no copy brings */
        }
        load_x(x_panel, x);
        weigh_x<T>(decays, x, weighed);
        wgmma_hold(H);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            wgmma_registers<T>(H, weighed[k], wgmma_factor(B + k * 16 * 128, PANEL * 2));
        }
        wgmma_commit();
        if (thread == 0 && n > 0) { /* its warp's part of the chunk before, which has left by now */
            wait_for_given();
            phase_arrive(&m.free[m.stage_of(n - 1)]);
        }
        begin_output<T>(D, x, Y);
        wgmma_wait<1>(of_H);
        phase_wait(&m.ready[stage], m.parity_of(n));
        wgmma_hold(Y);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            multiply_straight<T>(Y, x[k], wgmma_factor(scores + k * 32, 16), 1);
        }
        wgmma_commit();
        wgmma_wait<0>(Y);
        wgmma_hold(H);
        finish_output<T>(decays, of_H, Y, x_panel);
        if (whole) {
            wgmma_publish();
            meet_group();
            if (thread == 0) {
                give_panel(y_map, head * a.head_dim + column, (int)p.row + token, shared_address(x_panel));
            }
        }
        else {
            store_rows(x_panel, (T *)a.y + p.row * a.y_stride + head * a.head_dim + column, a.y_stride, token,
                       p.count);
        }
        __syncwarp();
        if (thread % MIL_WARP == 0 && thread > 0) {
            phase_arrive(&m.free[stage]);
        }
    }
    if (thread == 0) {
        wait_for_given();
    }
    if (state != NULL && p.folded > p.first * CHUNK && p.folded <= p.end * CHUNK) {
        each_of_H<N>(a.head_dim, H, [&](int at, float &h) { state[at] = h; });
    }
}

/* What the segment adds to a state: while a chunk's products are under way, the next one's are asked for. */
template <typename T, int N, bool PAIRS>
static __device__ __forceinline__ void
hold_folds(const chunk_arguments &c, const hopper_place &p, hopper_memory<T, N, PAIRS, false> &m)
{
    const int group = threadIdx.x / GROUP_THREADS, head = find_head<PAIRS>(p);
    float H[N / 2] = {};
    wgmma_hold(H);
#pragma unroll 1
    for (int n = 0; n < p.end - p.first; n++) {
        const int stage = m.stage_of(n);
        const uint32_t x = shared_address(m.x[stage][group]), B = shared_address(m.B[stage]);
        phase_wait(&m.full[stage], m.parity_of(n));
        phase_wait(&m.ready[stage], m.parity_of(n));
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            multiply_turned<T>(H, wgmma_factor(x + k * 16 * 128, 16),
                               wgmma_factor(B + k * 16 * 128, PANEL * 2));
        }
        wgmma_commit();
        let_run<1>();
        if (n > 0 && threadIdx.x % MIL_WARP == 0) {
            phase_arrive(&m.free[m.stage_of(n - 1)]);
        }
    }
    wgmma_wait<0>(H);
    const int64_t size = (int64_t)N * c.ssd.head_dim;
    float *state = c.segment_states + find_segment(c, head, p.segment) * size + find_column<PAIRS>(p);
    each_of_H<N>(c.ssd.head_dim, H, [&](int at, float &h) { state[at] = h; });
}

/* ---- kernels ------------------------------------------------------------------------------------------------------- */

/* What the block is to do; false if nothing. */
template <typename T, int N, bool PAIRS, bool OUTPUT>
static __device__ __forceinline__ bool
begin_block(const chunk_arguments &c, bool given, hopper_memory<T, N, PAIRS, OUTPUT> &m, mil_span &span,
            hopper_place &p)
{
    if (threadIdx.x < m.STAGES) {
        phase_init(&m.full[threadIdx.x], 1);
        phase_init(&m.ready[threadIdx.x], GROUP_THREADS);
        phase_init(&m.free[threadIdx.x], HOLDERS * GROUP_THREADS / MIL_WARP);
        wgmma_publish();
    }
    mil_wait();
    span = mil_share_span(c.ssd.rows, c.ssd.first + blockIdx.z);
    const int total = span.before + (int)span.count, chunks = (total + CHUNK - 1) / CHUNK;
    p.slice = blockIdx.x % c.ssd.slices;
    p.segment = blockIdx.x / c.ssd.slices;
    p.head = PAIRS ? 2 * blockIdx.y : blockIdx.y;
    p.before = span.before;
    p.count = (int)span.count;
    p.folded = given ? (int)(span.after - span.boundary) : total;
    p.first = p.segment * c.segment_chunks;
    p.end = min(chunks, p.first + c.segment_chunks);
    p.row = span.row;
    return span.count >= c.ssd.least && p.first < chunks &&
           (OUTPUT || p.end < chunks); /* nothing follows the last segment's own state */
}

/* The folds of each segment alone. Grid: (segments, slices of a head), heads or pairs of heads, sequences. */
template <typename T, int N, bool PAIRS>
static __global__ void
__launch_bounds__(FOLD_THREADS, 1) ssd_hopper_folds_kernel(const __grid_constant__ chunk_arguments c,
                                                           const __grid_constant__ mil_states states,
                                                           const __grid_constant__ hopper_maps maps)
{
#if MIL_HAS_WGMMA
    extern __shared__ __align__(1024) char shared[];
    auto &m = *reinterpret_cast<hopper_memory<T, N, PAIRS, false> *>(shared);
    mil_span span;
    hopper_place p;
    if (!begin_block(c, states.given, m, span, p)) {
        return;
    }
    const hopper_columns columns = find_columns<N, PAIRS>(c.ssd, p);
    if (threadIdx.x == FOLD_THREADS - MIL_WARP) {
#pragma unroll 1
        for (int n = 0; n < p.end - p.first; n++) {
            feed_chunk(c, maps, columns, p, n, m);
        }
    }
    else if (threadIdx.x < HOLDERS * GROUP_THREADS) {
        hold_folds(c, p, m);
    }
    else if (threadIdx.x < FOLD_THREADS - MIL_WARP) {
        prepare_folds(c, states.of[blockIdx.z], columns, p, m);
    }
    mil_trigger();
#else
    __trap(); /* the launcher asks for the architecture; setup.py and make build it as sm_90a */
#endif
}

/* Folds and outputs. The same grid. */
template <typename T, int N, bool PAIRS>
static __global__ void
__launch_bounds__(OUTPUT_THREADS, 1)
    ssd_hopper_kernel(const __grid_constant__ chunk_arguments c, const __grid_constant__ mil_states states,
                      const __grid_constant__ hopper_maps maps)
{
#if MIL_HAS_WGMMA
    extern __shared__ __align__(1024) char shared[];
    auto &m = *reinterpret_cast<hopper_memory<T, N, PAIRS, true> *>(shared);
    const ssd_arguments &a = c.ssd;
    const mil_tails &tails = states.of[blockIdx.z];
    mil_span span;
    hopper_place p;
    if (!begin_block(c, states.given, m, span, p)) {
        return;
    }
    if (threadIdx.x >= HOLDERS * GROUP_THREADS) {
        group_give_registers<REGISTERS_TO_PREPARE>();
        prepare_scores(c, maps, tails, find_columns<N, PAIRS>(a, p), p, m);
        group_take_registers<REGISTERS>();
    }
    else {
        group_take_registers<REGISTERS_TO_HOLD>();
        hold_outputs(c, &maps.y, tails, states.given, p, m);
        group_give_registers<REGISTERS>();
    }
    mil_trigger();
    if (states.given && p.segment == 0) {
#pragma unroll 1
        for (int i = 0; i < (PAIRS ? 2 : 1); i++) {
            window_place w = {};
            w.head = p.head + i;
            w.columns = PAIRS ? 64 : 128;
            w.column = p.slice * w.columns;
            w.x_column = (int64_t)(w.head / (a.heads / a.x_heads)) * a.head_dim + w.column;
            w.B_column = (int64_t)(w.head / (a.heads / a.B_groups)) * N;
            move_tails<T>(a, w, span, tails, come_for_tails(a, w, tails, a.slices), a.dt_bias[w.head]);
        }
    }
#else
    __trap(); /* as above */
#endif
}

/* ---- launches ------------------------------------------------------------------------------------------------------- */

template <typename T, int N, bool PAIRS>
static mil_status
launch(mil_context *context, const chunk_arguments *c, const mil_states *states, int64_t sequences,
       bool outputs)
{
    const ssd_arguments &a = c->ssd;
    hopper_maps maps;
    MIL_TRY(mil_map_panels(context, a.x, a.rows_count, (int64_t)a.x_heads * a.head_dim, a.x_stride, CHUNK,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, &maps.x));
    MIL_TRY(mil_map_panels(context, a.B, a.rows_count, (int64_t)a.B_groups * N, a.B_stride, CHUNK,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, &maps.B));
    MIL_TRY(mil_map_panels(context, a.C, a.rows_count, (int64_t)a.C_groups * N, a.C_stride, CHUNK,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, &maps.C));
    MIL_TRY(mil_map_panels(context, a.y, a.rows_count, (int64_t)a.heads * a.head_dim, a.y_stride, CHUNK,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, &maps.y));
    const dim3 grid((unsigned)(c->segments * c->ssd.slices), (unsigned)(c->ssd.heads / (PAIRS ? 2 : 1)),
                    (unsigned)sequences);
    if (!outputs) {
        return mil_launch(context, "ssd", ssd_hopper_folds_kernel<T, N, PAIRS>, grid, dim3(FOLD_THREADS),
                          sizeof(hopper_memory<T, N, PAIRS, false>), *c, *states, maps);
    }
    return mil_launch(context, "ssd", ssd_hopper_kernel<T, N, PAIRS>, grid, dim3(OUTPUT_THREADS),
                      sizeof(hopper_memory<T, N, PAIRS, true>), *c, *states, maps);
}

bool
mil_ssd_hopper_takes(const mil_context *context, const ssd_arguments *a, chunk_blocks *out)
{
    const bool pairs = a->head_dim % 128 != 0, /* of which both must read the same B and C */
        shares = a->heads / a->B_groups % 2 == 0 && a->heads / a->C_groups % 2 == 0;
    if (mil_device_major(context) != 9 || a->head_dim % 64 != 0 ||
        (a->state_dim != 64 && a->state_dim != 128) || (pairs && !shares) || a->rows_count > INT32_MAX / 2 ||
        mil_find_panel_encoder() == NULL) {
        return false;
    }
    *out = {pairs, a->head_dim / (pairs ? 64 : 128), mil_multiprocessors(context)};
    return true;
}

mil_status
mil_ssd_hopper(mil_context *context, const chunk_arguments *c, const mil_states *states, int64_t sequences,
               bool outputs)
{
    const bool pairs = c->ssd.head_dim % 128 != 0, half = context->ops->activation_dtype == MIL_F16;
    typedef mil_status (*launcher)(mil_context *, const chunk_arguments *, const mil_states *, int64_t, bool);
    static const launcher launchers[2][2][2] = {
        {{launch<__nv_bfloat16, 64, false>, launch<__nv_bfloat16, 64, true>},
         {launch<__nv_bfloat16, 128, false>, launch<__nv_bfloat16, 128, true>}},
        {{launch<__half, 64, false>, launch<__half, 64, true>},
         {launch<__half, 128, false>, launch<__half, 128, true>}},
    };
    return launchers[half][c->ssd.state_dim == 128][pairs](context, c, states, sequences, outputs);
}
