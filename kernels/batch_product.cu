/* Products with some tens of rows, as batches of texts bring them: y [rows, out] (+)= x [rows, in] W^T + bias.
 *
 * The reading of W still decides (a multiprocessor multiplies a tile of it with 64 rows in a third of the time in which memory
 * brings the next one), but W must now pass through the large tensor core instruction (wgmma), which takes it
 * as the left factor: 64 outputs times 32 or 64 rows of x.
 *
 *   block     up to 128 outputs (two groups of four warps, up to 64 each; of a gated pair one group has up and one gate), all
 *             rows, a part of the inputs
 *   ring      64 inputs a step: 16 KB of W and 4 or 8 KB of x, copied by the engine that knows the arrays (tensor maps) into
 *             panels as wgmma.cuh has them.  A warp of its own tells it what to copy, as far ahead as places are free; the
 *             second-level cache forgets W first.  Two blocks share a multiprocessor: one multiplies or ends while the other
 *             reads
 *   cluster   where outputs make too few blocks for that, up to four blocks share the inputs of a tile, taking steps in turn, and
 *             add their sums through each other's shared memory, in the order of the blocks
 *   cut       as many blocks as there are places for, as far as fewer outputs a block bring them there: a multiprocessor takes in
 *             some 40 GB/s at most, so that one with two blocks is what all wait for, where others have one
 *
 * Several products of one x go in one launch, and the first steps' weights are under way before the kernel before this one has
 * ended, which a library's kernels do not do.  How inputs are cut depends on the weights of the launch only, so a
 * row is the same bits in any company of 17 to 64 rows.  Bytes: W once, and x once a tile of outputs from the
 * second-level cache, a quarter (32 rows) of W's or a half (64); beyond, that is what would decide, and cuBLASLt is better.
 * A long product that is alone in its launch is batch_stream.cu's.
 */
#include "batch_product.cuh"

#include "activate.cuh"
#include "attention.cuh"
#include "batch_stream.cuh"
#include "batch_tile.cuh"
#include "cluster.cuh"
#include "panel_map.cuh"
#include "thin_product.cuh"
#include "wgmma.cuh"

#define GROUPS 2 /* of four warps */
#define THREADS (GROUPS * 4 * MIL_WARP)
#define GROUP_OUTPUTS 64 /* at most */
#define FEWEST_GROUP_OUTPUTS 40
#define TILE_OUTPUTS (GROUPS * GROUP_OUTPUTS)
#define STEP 64                  /* inputs */
#define PITCH (TILE_OUTPUTS + 4) /* of a row of sums: another 4 for the banks' sake */
#define MOST_RANKS 4
#define MOST_BLOCKS 264 /* to which cutting the inputs may lead: two for each of 132 multiprocessors */
#define LEAST_STEPS 4   /* of a block */
#define MOST_OUTPUTS (65535 / MIL_BATCH_PRODUCTS * GROUP_OUTPUTS) /* of a product: tiles are a grid's y */

struct batch_arguments {
    int rows, in, count, tiles;
    int group, ranks; /* outputs of a group, a multiple of 8; blocks that share the inputs of a tile */
    const void *x;
    int64_t x_stride;
    void *gated; /* where the two outputs are a gate's */
    int64_t gated_stride;
    mil_activation activation;
    bool gated_wide;
    batch_output outputs[MIL_BATCH_PRODUCTS];
};

/* A step's factors: W [TILE_OUTPUTS, STEP] and x [COLUMNS, STEP]; then barriers: what has arrived, and what has been read.  Of fewer
 * outputs the rest of a group's rows is anything; its sums are nobody's. */
template <int COLUMNS>
struct batch_ring {
    static constexpr int W_BYTES = TILE_OUTPUTS * 128, STAGE = W_BYTES + COLUMNS * 128;
    static constexpr int STAGES = COLUMNS == 32 ? 5 : 4;
    static constexpr int BARRIERS = STAGES * STAGE, BYTES = BARRIERS + 2 * STAGES * (int)sizeof(uint64_t);
    static_assert(COLUMNS * PITCH * 4 <= BARRIERS, "the sums take the ring's place");
};

[[maybe_unused]] static __device__ __forceinline__ const batch_output &
output_of(const batch_arguments &a, int tile)
{
    int i = 0;
    while (i + 1 < a.count && tile >= a.outputs[i + 1].first_tile) {
        i++;
    }
    return a.outputs[i];
}

/* Four sums of one row from the ranks' shared memory, in the ranks' order. */
template <int RANKS>
static __device__ __forceinline__ void
add_ranks(float *sums, int row, int column, float (&total)[4])
{
#pragma unroll
    for (int rank = 0; rank < RANKS; rank++) {
        const float *from = RANKS == 1 ? sums : mil_cluster_at(sums, rank);
        float4 part = *(const float4 *)(from + row * PITCH + column);
        total[0] = rank == 0 ? part.x : total[0] + part.x;
        total[1] = rank == 0 ? part.y : total[1] + part.y;
        total[2] = rank == 0 ? part.z : total[2] + part.z;
        total[3] = rank == 0 ? part.w : total[3] + part.w;
    }
}

/* act(gate) * up of both products as they would have been stored. */
template <typename T>
static __device__ __forceinline__ void
finish_gated(const batch_arguments &a, int row, int out, float (&up)[4], float (&gate)[4])
{
    int count = a.outputs[0].out - out;
    if (count <= 0) {
        return;
    }
    add_bias(a.outputs[0], out, up);
    add_bias(a.outputs[1], out, gate);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        up[i] = mil_activate(a.activation, mil_float(mil_round<T>(gate[i]))) * mil_float(mil_round<T>(up[i]));
    }
    write_outputs((T *)a.gated + row * a.gated_stride + out, a.gated_wide, count, up);
}

/* The block's sums into shared memory, [COLUMNS][PITCH]: rows of x by outputs of the tile. */
template <int COLUMNS>
static __device__ __forceinline__ void
put_sums(const float (&c)[COLUMNS / 2], int rows, float *sums)
{
    const int lane = threadIdx.x % MIL_WARP, first = threadIdx.x / MIL_WARP * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) {
        int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row < rows) {
            sums[row * PITCH + first + i / 2 % 2 * 8] = c[i];
        }
    }
}

/* What a thread writes of the tile: four outputs of a row here and there, and what they are added to. */
template <typename T, int RANKS, bool GATED>
struct batch_writer {
    static constexpr int COLUMNS = GATED ? GROUP_OUTPUTS : TILE_OUTPUTS, QUADS = COLUMNS / 4; /* of sums */
    int at, end;
    float before[4];

    __device__ __forceinline__ int row() const
    {
        return at / QUADS;
    }

    __device__ __forceinline__ int column() const
    {
        return at % QUADS * 4;
    }

    /* Columns beyond a group's outputs are nobody's. */
    __device__ __forceinline__ bool is_output(const batch_arguments &a) const
    {
        return column() % GROUP_OUTPUTS < a.group;
    }

    __device__ __forceinline__ int output(const batch_arguments &a, int tile) const
    {
        return (tile * (COLUMNS / GROUP_OUTPUTS) + column() / GROUP_OUTPUTS) * a.group +
               column() % GROUP_OUTPUTS;
    }

    __device__ __forceinline__ batch_writer(const batch_arguments &a, const batch_output &o, int tile)
    {
        const int share = (a.rows * QUADS + RANKS - 1) / RANKS;
        end = min(a.rows * QUADS, ((int)blockIdx.x + 1) * share);
        at = (int)threadIdx.x < THREADS ? (int)blockIdx.x * share + (int)threadIdx.x : end;
        read(a, o, tile);
    }

    __device__ __forceinline__ void read(const batch_arguments &a, const batch_output &o, int tile)
    {
        if (!GATED && o.accumulate && at < end && is_output(a)) {
            read_before<T>(o, row(), output(a, tile), before);
        }
    }

    /* Sums of all ranks to where they belong. */
    __device__ __forceinline__ void
    write(const batch_arguments &a, const batch_output &o, int tile, float *sums)
    {
        for (; at < end; at += THREADS, read(a, o, tile)) {
            if (!is_output(a)) {
                continue;
            }
            float sum[4];
            add_ranks<RANKS>(sums, row(), column(), sum);
            if constexpr (GATED) {
                float gate[4];
                add_ranks<RANKS>(sums, row(), column() + GROUP_OUTPUTS, gate);
                finish_gated<T>(a, row(), output(a, tile), sum, gate);
            }
            else {
                finish_outputs<T>(o, row(), output(a, tile), before, sum);
            }
        }
    }
};

/* ---- the kernel --------------------------------------------------------------------------------------------------- */

/* How the copy engine finds x and the weights: what lies beyond an array it fills with zeros. */
struct batch_maps {
    CUtensorMap x, w[MIL_BATCH_PRODUCTS]; /* boxes of STEP inputs by all rows, and by a group's outputs */
};

/* Grid: ranks of a tile, tiles. */
template <typename T, int COLUMNS, int RANKS, bool GATED>
static __global__ void
MIL_CLUSTER(RANKS) __launch_bounds__(THREADS + MIL_WARP, 2)
    batch_kernel(const __grid_constant__ batch_arguments a, const __grid_constant__ batch_maps maps)
{
#if MIL_HAS_WGMMA
    using ring = batch_ring<COLUMNS>;
    constexpr int STAGES = ring::STAGES;
    constexpr int SHARERS = GATED ? GROUPS / 2 : GROUPS; /* groups of one product */
    extern __shared__ __align__(1024) unsigned char memory[];
    uint64_t *const full = (uint64_t *)(memory + ring::BARRIERS), *const empty = full + STAGES;
    const uint32_t stages = shared_address(memory);
    const int warp = threadIdx.x / MIL_WARP, group = warp / 4, rank = blockIdx.x;
    const batch_output &o = output_of(a, (int)blockIdx.y);
    const int tile = (int)blockIdx.y - o.first_tile, product = GATED ? 0 : (int)(&o - a.outputs);
    const int steps = ((a.in + STEP - 1) / STEP - rank + RANKS - 1) / RANKS; /* rank, rank + RANKS, .. */
    const bool copies = threadIdx.x == THREADS;
    const uint32_t step_bytes = (uint32_t)(GROUPS * a.group + COLUMNS) * 128;
    auto copy_w = [&](int i) {
        const int at = i % STAGES;
        phase_expect(&full[at], step_bytes);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            copy_panel<true>(memory + at * ring::STAGE + g * GROUP_OUTPUTS * 128,
                             &maps.w[GATED ? g / SHARERS : product], (rank + i * RANKS) * STEP,
                             (tile * SHARERS + g % SHARERS) * a.group, &full[at]);
        }
    };
    auto copy_x = [&](int i) {
        const int at = i % STAGES;
        copy_panel(memory + at * ring::STAGE + ring::W_BYTES, &maps.x, (rank + i * RANKS) * STEP, 0,
                   &full[at]);
    };
    if (copies) {
        for (int i = 0; i < STAGES; i++) {
            phase_init(&full[i], 1);
            phase_init(&empty[i], GROUPS * 4);
        }
        wgmma_publish();
        for (int i = 0; i < min(STAGES, steps); i++) { /* weights, which nobody writes */
            copy_w(i);
        }
    }
    __syncwarp();
    mil_trigger();
    mil_wait();
    __syncthreads(); /* the barriers are there */
    float c[COLUMNS / 2] = {};
    batch_writer<T, RANKS, GATED> writer(a, o, tile);
    if (copies) {
        for (int i = 0; i < steps; i++) {
            if (i >= STAGES) {
                phase_wait(&empty[i % STAGES], (i / STAGES + 1) % 2);
                copy_w(i);
            }
            copy_x(i);
        }
    }
    __syncwarp();
    if (warp < GROUPS * 4) {
#pragma unroll 1
        for (int i = 0; i < steps; i++) {
            const uint32_t w = stages + i % STAGES * ring::STAGE + group * (GROUP_OUTPUTS * 128),
                           x = stages + i % STAGES * ring::STAGE + ring::W_BYTES;
            phase_wait(&full[i % STAGES], i / STAGES % 2);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < STEP / 16; k++) {
                wgmma_shared<T>(c, wgmma_factor(w + k * 32, 16), wgmma_factor(x + k * 32, 16), 1);
            }
            wgmma_commit();
            wgmma_wait<0>(c); /* memory is slower: there is time to give the place back first */
            if (threadIdx.x % MIL_WARP == 0) {
                phase_arrive(&empty[i % STAGES]);
            }
        }
    }
    __syncthreads();
    float *const sums = (float *)memory;
    if (warp < GROUPS * 4) {
        put_sums<COLUMNS>(c, a.rows, sums);
    }
    if constexpr (RANKS > 1) {
        mil_cluster_sync();
        writer.write(a, o, tile, sums);
        mil_cluster_arrive(); /* nobody leaves while its sums are read */
        mil_cluster_wait();
    }
    else {
        __syncthreads();
        writer.write(a, o, tile, sums);
    }
#else
    (void)a, (void)maps;
#endif
}

/* ---- launches --------------------------------------------------------------------------------------------------------- */

static mil_status
map_arrays(mil_context *context, const batch_arguments &a, bool gated, int columns, batch_maps *maps)
{
    MIL_TRY(mil_map_panels(context, a.x, a.rows, a.in, a.x_stride, columns,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, &maps->x));
    for (int i = 0; i < (gated ? 2 : a.count); i++) {
        MIL_TRY(mil_map_panels(context, a.outputs[i].weight, a.outputs[i].out, a.in, a.in, a.group,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, &maps->w[i]));
    }
    return MIL_OK;
}

template <typename T, int COLUMNS, int RANKS, bool GATED>
static mil_status
launch(mil_context *context, const batch_arguments &a)
{
    batch_maps maps = {};
    MIL_TRY(map_arrays(context, a, GATED, COLUMNS, &maps));
    return mil_launch(context, "product", batch_kernel<T, COLUMNS, RANKS, GATED>,
                      dim3(RANKS, (unsigned)a.tiles), dim3(THREADS + MIL_WARP), batch_ring<COLUMNS>::BYTES, a,
                      maps);
}

template <typename T, int COLUMNS, bool GATED>
static mil_status
choose_ranks(mil_context *context, const batch_arguments &a)
{
    return a.ranks == 4   ? launch<T, COLUMNS, 4, GATED>(context, a)
           : a.ranks == 2 ? launch<T, COLUMNS, 2, GATED>(context, a)
                          : launch<T, COLUMNS, 1, GATED>(context, a);
}

template <typename T, bool GATED>
static mil_status
choose_columns(mil_context *context, const batch_arguments &a)
{
    return a.rows <= 32 ? choose_ranks<T, 32, GATED>(context, a) : choose_ranks<T, 64, GATED>(context, a);
}

template <bool GATED>
static mil_status
choose_type(mil_context *context, const batch_arguments &a)
{
    return context->ops->activation_dtype == MIL_BF16 ? choose_columns<__nv_bfloat16, GATED>(context, a)
                                                      : choose_columns<__half, GATED>(context, a);
}

bool
mil_batch_product_fits(const mil_context *context, const mil_linear *products, int64_t count)
{
    if (count > MIL_BATCH_PRODUCTS || context->ops->activation_dtype == MIL_F32 ||
        mil_device_major(context) != 9 || mil_find_panel_encoder() == NULL) {
        return false;
    }
    bool fits = true;
    for (int64_t i = 0; i < count; i++) {
        const mil_linear *p = &products[i];
        fits = fits && p->rows <= MIL_BATCH_ROWS && p->dtype == context->ops->activation_dtype &&
               p->in % 8 == 0 && p->in < 1 << 30 && p->out <= MOST_OUTPUTS &&
               (uintptr_t)p->weight % 16 == 0 && (uintptr_t)p->x % 16 == 0 && p->x_stride % 8 == 0;
    }
    return fits;
}

/* Chooses group and ranks, by the sizes of the weights alone, so that of the blocks that have a place each there are most. A group has
 * fewer outputs only for a sixteenth more blocks, and where no clusters are needed: 65 of four blocks for 66 places are not always all
 * there at once.  sharers: groups of one product in a tile. */
static void
choose_cut(const mil_linear *products, int64_t count, int sharers, int *best_group, int *best_ranks)
{
    int64_t most = 0;
    *best_group = GROUP_OUTPUTS;
    *best_ranks = 1;
    for (int group = GROUP_OUTPUTS; group >= FEWEST_GROUP_OUTPUTS; group -= 8) {
        int64_t tiles = 0;
        for (int64_t i = 0; i < count; i++) {
            tiles += mil_ceil_div(products[i].out, sharers * group);
        }
        for (int ranks = group == GROUP_OUTPUTS ? MOST_RANKS : 1; ranks > 0; ranks /= 2) {
            const int64_t blocks = tiles * ranks;
            if (blocks <= MOST_BLOCKS && (ranks == 1 || products->in >= ranks * LEAST_STEPS * STEP) &&
                blocks > most + most / 16) {
                *best_group = group;
                *best_ranks = ranks;
                most = blocks;
            }
        }
    }
}

static batch_arguments
arguments_of(const mil_linear *products, int64_t count, int sharers)
{
    int group, ranks;
    choose_cut(products, count, sharers, &group, &ranks);
    batch_arguments a = mil_product_arguments<batch_arguments>(
        products, count, sharers * group,
        [](const mil_linear *p, int first_tile) { return batch_output_of(p, first_tile); });
    a.group = group;
    a.ranks = ranks;
    return a;
}

mil_status
mil_batch_product(mil_context *context, const mil_linear *products, int64_t count)
{
    if (count == 1 && mil_batch_stream_pays(context, products)) {
        return mil_batch_stream(context, products);
    }
    return choose_type<false>(context, arguments_of(products, count, GROUPS));
}

mil_status
mil_batch_gated(mil_context *context, const mil_linear *products, int64_t count, const mil_glu *gate)
{
    bool gated = gate != NULL && mil_gate_fits(products, count, gate);
    if (!gated) {
        MIL_TRY(mil_batch_product(context, products, count));
        return gate == NULL ? MIL_OK : context->ops->glu_forward(context, gate);
    }
    batch_arguments a = arguments_of(products, 1, GROUPS / 2);
    a.outputs[1] = batch_output_of(&products[1], 0);
    a.gated = gate->y;
    a.gated_stride = gate->y_stride;
    a.activation = gate->activation;
    a.gated_wide = batch_is_wide(gate->y, gate->y_stride, products[0].out, 2);
    return choose_type<true>(context, a);
}
