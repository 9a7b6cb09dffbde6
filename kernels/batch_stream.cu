/* A long product of 17 to 64 rows: y [rows, out] (+)= x [rows, in] W^T + bias, every multiprocessor reading an equal share of W.
 *
 * batch_product.cu cuts outputs into tiles of 128 and has two blocks a multiprocessor.  Where W gives few tiles, some
 * multiprocessors have two blocks and others one.  Here the tile is made to fit the device instead:
 *
 *   tile      two multiprocessors (a cluster) have the same outputs, as many as give every pair of them a tile, to a multiple
 *             of 16, and take steps of 64 inputs, or of some times that, in turn.  x is the left factor of the large tensor
 *             core instruction (wgmma), 64 rows, and W the right one, which may have any multiple of 8 columns
 *   block     one a multiprocessor.  Two groups of four warps multiply half of the tile's outputs each; one warp more
 *             copies W and one x
 *   ring      as many steps as shared memory takes, of which only some KB of W are under way at a time: more would queue
 *             in front of what all other multiprocessors ask for.  W does not wait for the kernel before this one, x does
 *   sums      each block owns what one of the groups multiplies: groups send their sums to the owner's shared memory, where
 *             a barrier counts them, and all warps add up both blocks' there and write them
 *
 * Tiles and steps follow from the sizes of W and the device, so a row is the same bits in any company of 17 to 64.  It pays
 * where a multiprocessor has much to read (mil_batch_stream_pays): a short stream is over before its start has paid.
 */
#include "batch_stream.cuh"

#include "batch_tile.cuh"
#include "cluster.cuh"
#include "panel_map.cuh"
#include "wgmma.cuh"

#define RANKS 2                             /* of a cluster */
#define GROUPS 2                            /* of four warps */
#define MULTIPLIERS (GROUPS * 4 * MIL_WARP) /* threads */
#define THREADS (MULTIPLIERS + 2 * MIL_WARP)
#define PANEL 64     /* inputs */
#define TILE_UNIT 16 /* outputs */
#define MOST_OUTPUTS 256
#define STEP_BYTES (16 * 1024)    /* of W, at most, where a panel is not more */
#define RING_BYTES (172 * 1024)   /* at most */
#define SHARED_BYTES (225 * 1024) /* of a block, with what follows the ring */
#define MOST_STAGES 12
#define MOST_AHEAD (96 * 1024)   /* bytes of W under way, at most */
#define LEAST_SHARE (250 * 1024) /* bytes of W that a block reads where this pays */

struct stream_arguments {
    batch_output output;
    int rows, x_rows;  /* x_rows: in memory, of a panel of x */
    int panels;        /* of a step */
    int steps;         /* of both ranks */
    int stages, ahead; /* steps that the ring holds; of which so many are under way */
};

struct stream_maps {
    CUtensorMap x, w;
};

struct stream_barriers {
    uint64_t full_w[MOST_STAGES], full_x[MOST_STAGES], empty[MOST_STAGES], sums;
};

/* Where a warp is in the ring, and the parity of its phase there. */
struct ring_place {
    int stage, parity;

    __device__ __forceinline__ void next(int stages)
    {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/* The ring: of each stage the panels of x, then those of W. */
struct stream_ring {
    unsigned char *memory;
    uint32_t x_panel, w_panel, w_at, stage_bytes;

    __device__ __forceinline__ stream_ring(const stream_arguments &a, int outputs, unsigned char *memory)
        : memory(memory),
          x_panel((uint32_t)a.x_rows * 128),
          w_panel((uint32_t)outputs * 128),
          w_at((uint32_t)a.panels * x_panel),
          stage_bytes(w_at + (uint32_t)a.panels * w_panel)
    {
    }

    __device__ __forceinline__ unsigned char *x(int stage, int panel) const
    {
        return memory + (uint32_t)stage * stage_bytes + (uint32_t)panel * x_panel;
    }

    __device__ __forceinline__ unsigned char *w(int stage, int panel) const
    {
        return memory + (uint32_t)stage * stage_bytes + w_at + (uint32_t)panel * w_panel;
    }
};

static __device__ __forceinline__ int
steps_of(const stream_arguments &a, int rank)
{
    return (a.steps - rank + RANKS - 1) / RANKS;
}

[[maybe_unused]] static __device__ __forceinline__ void
copy_weights(const stream_arguments &a, const stream_ring &ring, const CUtensorMap *map, int first_output,
             stream_barriers &barriers)
{
    const int rank = mil_cluster_rank(), steps = steps_of(a, rank);
    ring_place at = {0, 0}, late = {0, 0};
    for (int i = 0; i < steps; i++) {
        phase_wait(&barriers.empty[at.stage], at.parity ^ 1);
        if (i >= a.ahead) {
            phase_wait(&barriers.full_w[late.stage], late.parity);
            late.next(a.stages);
        }
        phase_expect(&barriers.full_w[at.stage], (uint32_t)a.panels * ring.w_panel);
        for (int p = 0; p < a.panels; p++) {
            copy_panel<true>(ring.w(at.stage, p), map, ((i * RANKS + rank) * a.panels + p) * PANEL,
                             first_output, &barriers.full_w[at.stage]);
        }
        at.next(a.stages);
    }
}

[[maybe_unused]] static __device__ __forceinline__ void
copy_rows(const stream_arguments &a, const stream_ring &ring, const CUtensorMap *map,
          stream_barriers &barriers)
{
    const int rank = mil_cluster_rank(), steps = steps_of(a, rank);
    ring_place at = {0, 0};
    for (int i = 0; i < steps; i++) {
        phase_wait(&barriers.empty[at.stage], at.parity ^ 1);
        phase_expect(&barriers.full_x[at.stage], (uint32_t)a.panels * ring.x_panel);
        for (int p = 0; p < a.panels; p++) {
            copy_panel(ring.x(at.stage, p), map, ((i * RANKS + rank) * a.panels + p) * PANEL, 0,
                       &barriers.full_x[at.stage]);
        }
        at.next(a.stages);
    }
}

/* c [64, N] += x [64, 16] w [N, 16]^T from column FIRST on; N is a multiple of 8, and instructions have powers of two. */
template <typename T, int N, int FIRST = 0>
static __device__ __forceinline__ void
multiply_columns(float (&c)[N / 2], uint64_t x, uint32_t w)
{
    if constexpr (FIRST < N) {
        constexpr int LEFT = N - FIRST, SIZE = LEFT >= 128  ? 128
                                               : LEFT >= 64 ? 64
                                               : LEFT >= 32 ? 32
                                               : LEFT >= 16 ? 16
                                                            : 8;
        wgmma_shared<T>(*(float (*)[SIZE / 2]) & c[FIRST / 2], x, wgmma_factor(w + FIRST * 128, 16), 1);
        multiply_columns<T, N, FIRST + SIZE>(c, x, w);
    }
}

/* Of a rank's sums in shared memory, [RANKS senders][x_rows][pitch]: from row to row other banks. */
static __host__ __device__ constexpr int
sums_pitch(int outputs)
{
    return outputs / RANKS % 16 == 0 ? outputs / RANKS + 8 : outputs / RANKS;
}

template <typename T, int OUTPUTS>
static __device__ __forceinline__ void
multiply(const stream_arguments &a, const stream_ring &ring, stream_barriers &barriers,
         float (&c)[OUTPUTS / GROUPS / 2])
{
    constexpr int COLUMNS = OUTPUTS / GROUPS;
    const int group = (int)threadIdx.x / (4 * MIL_WARP), steps = steps_of(a, mil_cluster_rank());
    ring_place at = {0, 0};
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        phase_wait(&barriers.full_w[at.stage], at.parity);
        phase_wait(&barriers.full_x[at.stage], at.parity);
#pragma unroll 1
        for (int p = 0; p < a.panels; p++) {
            const uint32_t x = (uint32_t)__cvta_generic_to_shared(ring.x(at.stage, p)),
                           w = (uint32_t)__cvta_generic_to_shared(ring.w(at.stage, p)) +
                               group * (COLUMNS * 128);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < PANEL / 16; k++) {
                multiply_columns<T, COLUMNS>(c, wgmma_factor(x + k * 32, 16), w + k * 32);
            }
            wgmma_commit();
            wgmma_wait<0>(c); /* memory is slower */
        }
        if (threadIdx.x % MIL_WARP == 0) {
            phase_arrive(&barriers.empty[at.stage]);
        }
        at.next(a.stages);
    }
}

/* A group's sums to the rank that owns them, whose number is the group's. */
template <int OUTPUTS>
static __device__ __forceinline__ void
send_sums(const stream_arguments &a, const float (&c)[OUTPUTS / GROUPS / 2], float *sums, uint64_t *barrier)
{
    static_assert(GROUPS == RANKS, "a group for each owner");
    constexpr int PITCH = sums_pitch(OUTPUTS);
    const int owner = (int)threadIdx.x / (4 * MIL_WARP), lane = (int)threadIdx.x % MIL_WARP;
    const int row = (int)threadIdx.x / MIL_WARP % 4 * 16 + lane / 4; /* and the eighth one after it */
    const uint32_t to = mil_cluster_place(sums + (mil_cluster_rank() * a.x_rows + row) * PITCH + lane % 4 * 2,
                                          owner),
                   told = mil_cluster_place(barrier, owner);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (row + half * 8 < a.rows) {
#pragma unroll
            for (int i = 0; i < OUTPUTS / GROUPS / 8; i++) {
                mil_cluster_send(to + (half * 8 * PITCH + i * 8) * (int)sizeof(float), c[i * 4 + half * 2],
                                 c[i * 4 + half * 2 + 1], told);
            }
        }
    }
}

/* Four outputs of a row here and there: what a thread writes of those that its rank owns. */
template <typename T, int OUTPUTS>
struct stream_writer {
    static constexpr int OWN = OUTPUTS / RANKS, QUADS = OWN / 4, PITCH = sums_pitch(OUTPUTS);
    const stream_arguments &a;
    const int first; /* output: ranks are neighbours */
    float before[4];

    __device__ __forceinline__ stream_writer(const stream_arguments &a) : a(a), first((int)blockIdx.x * OWN)
    {
        read((int)threadIdx.x);
    }

    __device__ __forceinline__ void read(int at)
    {
        if (a.output.accumulate && at < a.rows * QUADS) {
            read_before<T>(a.output, at / QUADS, first + at % QUADS * 4, before);
        }
    }

    __device__ __forceinline__ void write(const float *sums)
    {
#pragma unroll 1
        for (int at = (int)threadIdx.x; at < a.rows * QUADS; at += MULTIPLIERS) {
            const int row = at / QUADS, column = at % QUADS * 4;
            const float *const from = sums + row * PITCH + column;
            const float4 one = *(const float4 *)from, other = *(const float4 *)(from + a.x_rows * PITCH);
            float sum[4] = {one.x + other.x, one.y + other.y, one.z + other.z, one.w + other.w};
            finish_outputs<T>(a.output, row, first + column, before, sum);
            read(at + MULTIPLIERS);
        }
    }
};

/* Grid: ranks of tiles. */
template <typename T, int OUTPUTS>
static __global__ void
MIL_CLUSTER(RANKS) __launch_bounds__(THREADS, 1)
    stream_kernel(const __grid_constant__ stream_arguments a, const __grid_constant__ stream_maps maps)
{
#if MIL_HAS_WGMMA
    __shared__ stream_barriers barriers;
    extern __shared__ __align__(1024) unsigned char memory[];
    const stream_ring ring(a, OUTPUTS, memory);
    float *const sums = (float *)(memory + (uint32_t)a.stages * ring.stage_bytes);
    const int warp = (int)threadIdx.x / MIL_WARP;
    const bool copies_w = threadIdx.x == MULTIPLIERS, copies_x = threadIdx.x == MULTIPLIERS + MIL_WARP;
    if (copies_w) {
        for (int i = 0; i < a.stages; i++) {
            phase_init(&barriers.full_w[i], 1);
            phase_init(&barriers.full_x[i], 1);
            phase_init(&barriers.empty[i], MULTIPLIERS / MIL_WARP);
        }
        phase_init(&barriers.sums, 1);
        mil_cluster_publish();
        phase_publish();
        phase_expect(&barriers.sums, (uint32_t)(a.rows * OUTPUTS) * sizeof(float));
    }
    __syncwarp();
    if (warp == MULTIPLIERS / MIL_WARP) {
        barrier_announce(1, THREADS);
        mil_cluster_arrive();
        if (copies_w) {
            copy_weights(a, ring, &maps.w, (int)blockIdx.x / RANKS * OUTPUTS, barriers);
        }
        __syncwarp();
        mil_cluster_wait();
        return;
    }
    mil_trigger();
    barrier_meet(1, THREADS); /* the barriers are there */
    if (warp > MULTIPLIERS / MIL_WARP) {
        mil_cluster_arrive();
        mil_wait();
        if (copies_x) {
            copy_rows(a, ring, &maps.x, barriers);
        }
        __syncwarp();
        mil_cluster_wait();
        return;
    }
    mil_cluster_arrive();
    mil_wait();
    stream_writer<T, OUTPUTS> writer(a);
    float c[OUTPUTS / GROUPS / 2] = {};
    multiply<T, OUTPUTS>(a, ring, barriers, c);
    mil_cluster_wait(); /* the neighbour's barriers are there, too */
    send_sums<OUTPUTS>(a, c, sums, &barriers.sums);
    phase_wait(&barriers.sums, 0);
    writer.write(sums);
#else
    (void)a, (void)maps;
#endif
}

/* ---- launches --------------------------------------------------------------------------------------------------- */

/* Outputs of a tile, so that every tile has two multiprocessors; 0 where they are too many. */
static int64_t
tile_outputs(const mil_context *context, int64_t out)
{
    const int multiprocessors = mil_multiprocessors(context);
    if (multiprocessors < RANKS) {
        return 0;
    }
    const int64_t outputs = mil_ceil_div(mil_ceil_div(out, multiprocessors / RANKS), TILE_UNIT) * TILE_UNIT;
    return outputs <= MOST_OUTPUTS ? outputs : 0;
}

bool
mil_batch_stream_pays(const mil_context *context, const mil_linear *product)
{
    return tile_outputs(context, product->out) * (product->in / RANKS) * 2 >= LEAST_SHARE;
}

/* The kernel that has tiles of so many outputs. */
template <typename T, int OUTPUTS = TILE_UNIT>
static mil_status
launch(mil_context *context, const stream_arguments &a, const stream_maps &maps, int outputs,
       int shared_bytes)
{
    if constexpr (OUTPUTS < MOST_OUTPUTS) {
        if (outputs > OUTPUTS) {
            return launch<T, OUTPUTS + TILE_UNIT>(context, a, maps, outputs, shared_bytes);
        }
    }
    auto kernel = stream_kernel<T, OUTPUTS>;
    MIL_CUDA_TRY(mil_prefer_shared((const void *)kernel, context->ops->device));
    const unsigned tiles = (unsigned)mil_ceil_div(a.output.out, OUTPUTS);
    return mil_launch(context, "product", kernel, dim3(tiles * RANKS), dim3(THREADS), (size_t)shared_bytes, a,
                      maps);
}

mil_status
mil_batch_stream(mil_context *context, const mil_linear *product)
{
    const int outputs = (int)tile_outputs(context, product->out), w_panel = outputs * 128;
    stream_arguments a = {};
    a.output = batch_output_of(product, 0);
    a.rows = (int)product->rows;
    a.x_rows = a.rows <= 32 ? 32 : 64;
    a.panels = STEP_BYTES > w_panel ? STEP_BYTES / w_panel : 1;
    a.steps = (int)mil_ceil_div(product->in, PANEL * a.panels);
    const int stage_bytes = a.panels * (a.x_rows * 128 + w_panel);
    const int sums_bytes = RANKS * a.x_rows * sums_pitch(outputs) * (int)sizeof(float);
    const int ring_bytes = RING_BYTES < SHARED_BYTES - sums_bytes ? RING_BYTES : SHARED_BYTES - sums_bytes;
    a.stages = ring_bytes / stage_bytes < MOST_STAGES ? ring_bytes / stage_bytes : MOST_STAGES;
    const int ahead = MOST_AHEAD / (a.panels * w_panel);
    a.ahead = ahead < a.stages ? ahead : a.stages;
    stream_maps maps = {};
    MIL_TRY(mil_map_panels(context, product->x, a.rows, product->in, product->x_stride, a.x_rows,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, &maps.x));
    MIL_TRY(mil_map_panels(context, product->weight, product->out, product->in, product->in, outputs,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, &maps.w));
    auto launch_type = context->ops->activation_dtype == MIL_BF16 ? launch<__nv_bfloat16> : launch<__half>;
    return launch_type(context, a, maps, outputs, a.stages * stage_bytes + sums_bytes);
}
