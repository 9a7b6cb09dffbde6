/* Products with some tens of rows, as batches of texts bring them: y [rows, out] (+)= x [rows, in] W^T + bias.
 *
 * The reading of W still decides (a multiprocessor multiplies a tile of it with 64 rows in a third of the time in which memory
 * brings the next one), but W must now pass through the large tensor core instruction (wgmma), which takes it
 * as the left factor: 64 outputs times 32, 64 or 128 rows of x.
 *
 *   block     128 outputs (two groups of four warps, 64 each; of a gated pair one group has up and one gate), all
 *             rows, a part of the inputs
 *   ring      64 inputs a step: 16 KB of W and 4 to 16 KB of x, copied (cp.async) STAGES - 1 steps ahead; two blocks share
 *             a multiprocessor, so that one multiplies while the other meets
 *   cluster   where outputs make too few blocks for the chip, up to four blocks share the inputs of a tile, and add their sums
 *             through each other's shared memory, in the order of the inputs
 *
 * Several products of one x go in one launch, and the first steps' weights are under way before the kernel before this one has
 * ended, which a library's kernels do not do.  How inputs are cut depends on the sizes of the weights only, so a
 * row is the same bits in any company of 17 to 128 rows.  Bytes: W once, and x once a tile of outputs from the
 * second-level cache, a quarter (32 rows) of W's or all of it (128), which is where this ends being the way.
 */
#include "batch_product.cuh"

#include "activate.cuh"
#include "attention.cuh"
#include "cluster.cuh"
#include "wgmma.cuh"

#include <cuda.h>

#define GROUPS 2 /* of four warps */
#define THREADS (GROUPS * 4 * MIL_WARP)
#define GROUP_OUTPUTS 64
#define TILE_OUTPUTS (GROUPS * GROUP_OUTPUTS)
#define STEP 64                  /* inputs */
#define PITCH (TILE_OUTPUTS + 4) /* of a row of sums: another 4 for the banks' sake */
#define LEAST_STEPS 4            /* of a block */
#define MOST_OUTPUTS (65535 / MIL_BATCH_PRODUCTS * GROUP_OUTPUTS) /* of a product: tiles are a grid's y */

struct batch_output {
    const void *weight;
    const float *bias;
    void *y;
    int64_t y_stride;
    int out, first_tile;
    bool accumulate, float_output, wide; /* wide: y takes four outputs at once */
};

struct batch_arguments {
    int rows, in, count, tiles;
    const void *x;
    int64_t x_stride;
    void *gated; /* where the two outputs are a gate's */
    int64_t gated_stride;
    mil_activation activation;
    bool gated_wide;
    int ahead; /* steps beyond the ring that the second-level cache is asked for */
    int mixed, burst;
    batch_output outputs[MIL_BATCH_PRODUCTS];
};

/* A step's factors: W [TILE_OUTPUTS, STEP] and x [COLUMNS, STEP], panels as wgmma.cuh has them. */
template <int COLUMNS>
struct batch_ring {
    static constexpr int W_BYTES = TILE_OUTPUTS * 128, X_BYTES = COLUMNS * 128;
    static constexpr int STAGE = W_BYTES + X_BYTES;
    static constexpr int STAGES = COLUMNS == 32 ? 5 : COLUMNS == 64 ? 4 : 3;
    static constexpr int BYTES = STAGES * STAGE;
    static_assert(COLUMNS * PITCH * 4 <= BYTES, "the sums take the ring's place");
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

/* What a thread copies of every step: one chunk of 16 bytes of every 32nd row of W, and of x. */
template <typename T, int COLUMNS, bool GATED>
struct batch_copier {
    using ring = batch_ring<COLUMNS>;
    static constexpr int APART = THREADS / 8, W_ROWS = TILE_OUTPUTS / APART, X_ROWS = COLUMNS / APART;
    const T *w[W_ROWS], *x[X_ROWS];
    uint32_t real_w, real_x; /* a bit a row */
    int w_at, x_at, end;     /* the chunk's first input in the next step; all inputs end there */
    uint32_t place;

    __device__ __forceinline__ batch_copier(const batch_arguments &a, const batch_output &o, int tile,
                                            int begin, int past)
    {
        const int chunk = threadIdx.x % 8, row = threadIdx.x / 8;
        place = panel_place<TILE_OUTPUTS>(row, chunk); /* APART rows on, the swizzle is the same */
        w_at = x_at = begin + chunk * 8;
        end = past;
        real_w = real_x = 0;
#pragma unroll
        for (int k = 0; k < W_ROWS; k++) {
            int at = row + k * APART, second = GATED ? at / GROUP_OUTPUTS : 0;
            int out = GATED ? tile * GROUP_OUTPUTS + at % GROUP_OUTPUTS : tile * TILE_OUTPUTS + at;
            bool real = out < o.out;
            real_w |= (uint32_t)real << k;
            w[k] = (const T *)(second ? a.outputs[1].weight : o.weight) +
                   (real ? (int64_t)out * a.in + w_at : 0);
        }
#pragma unroll
        for (int k = 0; k < X_ROWS; k++) {
            int at = row + k * APART;
            bool real = at < a.rows;
            real_x |= (uint32_t)real << k;
            x[k] = (const T *)a.x + (real ? at * a.x_stride + x_at : 0);
        }
    }

    __device__ __forceinline__ void copy_w(uint32_t stage)
    {
        bool inside = w_at < end;
#pragma unroll
        for (int k = 0; k < W_ROWS; k++) {
            bool real = inside && (real_w >> k & 1);
            asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(stage + place +
                                                                                        k * APART * 128),
                         "l"(w[k]), "r"(real ? 16 : 0)
                         : "memory");
            w[k] += real ? STEP : 0;
        }
        w_at += STEP;
    }

    __device__ __forceinline__ void copy_x(uint32_t stage)
    {
        bool inside = x_at < end;
#pragma unroll
        for (int k = 0; k < X_ROWS; k++) {
            bool real = inside && (real_x >> k & 1);
            copy_chunk(stage + ring::W_BYTES + place + k * APART * 128, x[k], real);
            x[k] += real ? STEP : 0;
        }
        x_at += STEP;
    }
};

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

template <typename T>
static __device__ __forceinline__ void
add_bias(const batch_output &o, int out, float (&sum)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum[i] += o.bias != NULL && out + i < o.out ? o.bias[out + i] : 0.0f;
    }
}

/* Up to four neighbouring outputs of a row. */
template <typename T>
static __device__ __forceinline__ void
write_outputs(T *y, bool wide, int count, const float (&value)[4])
{
    if (wide) {
        mil_store<4>(y, value);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (i < count) {
            y[i] = mil_round<T>(value[i]);
        }
    }
}

template <typename T>
static __device__ __forceinline__ void
finish_outputs(const batch_output &o, int row, int out, float (&sum)[4])
{
    int count = o.out - out;
    if (count <= 0) {
        return;
    }
    add_bias<T>(o, out, sum);
    int64_t at = row * o.y_stride + out;
    if (o.float_output) {
        write_outputs((float *)o.y + at, o.wide, count, sum);
        return;
    }
    T *y = (T *)o.y + at;
    if (o.accumulate) {
        float before[4] = {};
        if (o.wide) {
            mil_load<4>(y, before);
        }
        else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                before[i] = i < count ? mil_float(y[i]) : 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum[i] += before[i];
        }
    }
    write_outputs(y, o.wide, count, sum);
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
    add_bias<T>(a.outputs[0], out, up);
    add_bias<T>(a.outputs[1], out, gate);
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

/* The tile's sums, of all ranks, to where they belong; `sums` is free memory. */
template <typename T, int COLUMNS, int RANKS, bool GATED>
static __device__ __forceinline__ void
finish_tile(const batch_arguments &a, const batch_output &o, int tile, const float (&c)[COLUMNS / 2],
            float *sums)
{
    const int rank = blockIdx.x;
    if (threadIdx.x < THREADS) {
        put_sums<COLUMNS>(c, a.rows, sums);
    }
    if constexpr (RANKS > 1) {
        mil_cluster_sync();
    }
    else {
        __syncthreads();
    }
    constexpr int QUADS = (GATED ? GROUP_OUTPUTS : TILE_OUTPUTS) / 4; /* of a row */
    const int share = (a.rows * QUADS + RANKS - 1) / RANKS, end = min(a.rows * QUADS, (rank + 1) * share);
    for (int i = threadIdx.x < THREADS ? rank * share + (int)threadIdx.x : end; i < end; i += THREADS) {
        const int row = i / QUADS, column = i % QUADS * 4;
        float sum[4];
        add_ranks<RANKS>(sums, row, column, sum);
        if constexpr (GATED) {
            float gate[4];
            add_ranks<RANKS>(sums, row, column + GROUP_OUTPUTS, gate);
            finish_gated<T>(a, row, tile * GROUP_OUTPUTS + column, sum, gate);
        }
        else {
            finish_outputs<T>(o, row, tile * TILE_OUTPUTS + column, sum);
        }
    }
    if constexpr (RANKS > 1) {
        mil_cluster_sync(); /* nobody leaves while its sums are read */
    }
}

/* Grid: ranks of a tile, tiles. */
template <typename T, int COLUMNS, int RANKS, bool GATED>
static __global__ void
MIL_CLUSTER(RANKS) __launch_bounds__(THREADS, 2) batch_kernel(const __grid_constant__ batch_arguments a)
{
#if MIL_HAS_WGMMA
    using ring = batch_ring<COLUMNS>;
    extern __shared__ __align__(1024) unsigned char memory[];
    const uint32_t stages = shared_address(memory);
    const int rank = blockIdx.x, group = threadIdx.x / (4 * MIL_WARP);
    const batch_output &o = output_of(a, (int)blockIdx.y);
    const int tile = (int)blockIdx.y - o.first_tile;
    const int all = (a.in + STEP - 1) / STEP, begin = all * rank / RANKS,
              steps = all * (rank + 1) / RANKS - begin;
    batch_copier<T, COLUMNS, GATED> copier(a, o, tile, begin * STEP, min(a.in, (begin + steps) * STEP));
    for (int i = 0; i < ring::STAGES - 1; i++) { /* weights, which nobody writes */
        copier.copy_w(stages + i * ring::STAGE);
        copies_commit();
    }
    mil_trigger();
    mil_wait();
    for (int i = 0; i < ring::STAGES - 1; i++) {
        copier.copy_x(stages + i * ring::STAGE);
        copies_commit();
    }
    float c[COLUMNS / 2] = {};
    int place = 0,
        free = ring::STAGES - 1; /* the stage of this step; the one that the step before has read */
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        copies_wait<ring::STAGES - 2>();
        wgmma_publish();
        wgmma_wait<0>(c);
        __syncthreads();
        copier.copy_w(stages + free * ring::STAGE);
        copier.copy_x(stages + free * ring::STAGE);
        copies_commit();
        const uint32_t w = stages + place * ring::STAGE + group * (GROUP_OUTPUTS * 128),
                       x = stages + place * ring::STAGE + ring::W_BYTES;
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < STEP / 16; k++) {
            wgmma_shared<T>(c, wgmma_factor(w + k * 32, 16), wgmma_factor(x + k * 32, 16), 1);
        }
        wgmma_commit();
        free = place;
        place = place + 1 == ring::STAGES ? 0 : place + 1;
    }
    copies_wait<0>();
    wgmma_wait<0>(c);
    __syncthreads();
    finish_tile<T, COLUMNS, RANKS, GATED>(a, o, tile, c, (float *)memory);
#else
    (void)a;
#endif
}

/* ---- by the copy engine ------------------------------------------------------------------------------------------------- */

/* The same tiles, copied by one thread of a warp of their own: the engine knows the arrays (`maps`), fills what lies beyond them
 * with zeros, and lays panels out as wgmma.cuh has them. */
struct batch_maps {
    CUtensorMap x, w[MIL_BATCH_PRODUCTS]; /* boxes of STEP inputs by all rows, and by GROUP_OUTPUTS outputs */
};

template <int COLUMNS, int STAGES>
struct engine_ring {
    static constexpr int W_BYTES = TILE_OUTPUTS * 128, STAGE = W_BYTES + COLUMNS * 128;
    static constexpr int BYTES = STAGES * STAGE > COLUMNS * PITCH * 4 ? STAGES * STAGE : COLUMNS * PITCH * 4;
    static constexpr int ALL = BYTES + 2 * STAGES * (int)sizeof(uint64_t);
    static_assert(BYTES % 1024 == 0 || STAGES * STAGE < COLUMNS * PITCH * 4, "barriers come after it");
};

/* A box whose corner is at (input, row) of the array into shared memory. */
[[maybe_unused]] static __device__ __forceinline__ void
copy_box(uint32_t to, const CUtensorMap *map, int input, int row, uint64_t *barrier)
{
#if MIL_HAS_WGMMA
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(input), "r"(row), "r"(shared_address(barrier))
        : "memory");
#else
    (void)to, (void)map, (void)input, (void)row, (void)barrier;
#endif
}

/* The same into the second-level cache alone. */
[[maybe_unused]] static __device__ __forceinline__ void
prefetch_box(const CUtensorMap *map, int input, int row)
{
#if MIL_HAS_WGMMA
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(input),
                 "r"(row)
                 : "memory");
#else
    (void)map, (void)input, (void)row;
#endif
}

[[maybe_unused]] static __device__ __forceinline__ void
expect_bytes(uint64_t *barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

template <typename T, int COLUMNS, int RANKS, bool GATED, int STAGES>
static __global__ void
MIL_CLUSTER(RANKS) __launch_bounds__(THREADS + MIL_WARP, STAGES >= 6 ? 1 : 2)
    engine_kernel(const __grid_constant__ batch_arguments a, const __grid_constant__ batch_maps maps)
{
#if MIL_HAS_WGMMA
    using ring = engine_ring<COLUMNS, STAGES>;
    extern __shared__ __align__(1024) unsigned char memory[];
    uint64_t *const full = (uint64_t *)(memory + ring::BYTES), *const empty = full + STAGES;
    const uint32_t stages = shared_address(memory);
    const int warp = threadIdx.x / MIL_WARP, group = warp / 4;
    const batch_output &o = output_of(a, (int)blockIdx.y);
    const int tile = (int)blockIdx.y - o.first_tile, product = GATED ? 0 : (int)(&o - a.outputs);
    const int all = (a.in + STEP - 1) / STEP, rank = blockIdx.x, begin = a.mixed ? rank : all * rank / RANKS,
              apart = a.mixed ? RANKS : 1,
              steps = a.mixed ? (all - rank + RANKS - 1) / RANKS : all * (rank + 1) / RANKS - begin;
    const bool copies = threadIdx.x == THREADS;
    auto copy_w = [&](int i) {
        const int at = i % STAGES;
        expect_bytes(&full[at], ring::STAGE);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            copy_box(stages + at * ring::STAGE + g * GROUP_OUTPUTS * 128, &maps.w[GATED ? g : product],
                     (begin + i * apart) * STEP,
                     GATED ? tile * GROUP_OUTPUTS : (tile * GROUPS + g) * GROUP_OUTPUTS, &full[at]);
        }
    };
    auto copy_x = [&](int i) {
        const int at = i % STAGES;
        copy_box(stages + at * ring::STAGE + ring::W_BYTES, &maps.x, (begin + i * apart) * STEP, 0,
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
        for (int i = STAGES; i < min(STAGES + a.ahead, steps); i++) {
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                prefetch_box(&maps.w[GATED ? g : product], (begin + i * apart) * STEP,
                             GATED ? tile * GROUP_OUTPUTS : (tile * GROUPS + g) * GROUP_OUTPUTS);
            }
        }
    }
    __syncwarp();
    mil_trigger();
    mil_wait();
    __syncthreads(); /* the barriers are there */
    float c[COLUMNS / 2] = {};
    if (copies) {
        for (int first = 0; first < steps; first += a.burst) {
            const int end = min(first + a.burst, steps);
            for (int i = first; i < end; i++) {
                if (i >= STAGES) {
                    phase_wait(&empty[i % STAGES], (i / STAGES + 1) % 2);
                }
            }
            for (int i = first; i < end; i++) {
                if (i >= STAGES) {
                    copy_w(i);
                }
                copy_x(i);
            }
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
            wgmma_wait<1>(c);
            if (i > 0 && threadIdx.x % MIL_WARP == 0) {
                phase_arrive(&empty[(i - 1) % STAGES]);
            }
        }
        wgmma_wait<0>(c);
    }
    __syncthreads();
    finish_tile<T, COLUMNS, RANKS, GATED>(a, o, tile, c, (float *)memory);
#else
    (void)a, (void)maps;
#endif
}

/* ---- launches --------------------------------------------------------------------------------------------------------- */

/* How the copy engine finds a row-major array [rows, columns] of 16-bit elements. */
static mil_status
map_array(mil_context *context, CUtensorMap *map, const void *array, int64_t rows, int64_t columns,
          int64_t stride, int box)
{
    static decltype(&cuTensorMapEncodeTiled) encode;
    if (encode == NULL) {
        void *found = NULL;
        cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
        MIL_CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                      cudaEnableDefault, &result));
#else
        MIL_CUDA_TRY(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
        if (found == NULL) {
            return mil_fail(MIL_ERR_DEVICE, "CUDA: this driver has no cuTensorMapEncodeTiled: it is too old");
        }
        encode = (decltype(&cuTensorMapEncodeTiled))found;
    }
    const bool brain = context->ops->activation_dtype == MIL_BF16;
    const cuuint64_t size[2] = {(cuuint64_t)columns, (cuuint64_t)rows}, apart[1] = {(cuuint64_t)stride * 2};
    const cuuint32_t boxes[2] = {STEP, (cuuint32_t)box}, steps[2] = {1, 1};
    CUresult result = encode(map, brain ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                             2, (void *)array, size, apart, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS
               ? MIL_OK
               : mil_fail(MIL_ERR_DEVICE, "CUDA: cuTensorMapEncodeTiled failed with status %d", (int)result);
}

static mil_status
map_arrays(mil_context *context, const batch_arguments &a, bool gated, int columns, batch_maps *maps)
{
    MIL_TRY(map_array(context, &maps->x, a.x, a.rows, a.in, a.x_stride, columns));
    for (int i = 0; i < (gated ? 2 : a.count); i++) {
        MIL_TRY(map_array(context, &maps->w[i], a.outputs[i].weight, a.outputs[i].out, a.in, a.in,
                          GROUP_OUTPUTS));
    }
    return MIL_OK;
}

static int
setting(const char *name, int otherwise)
{
    const char *value = getenv(name);
    return value == NULL ? otherwise : atoi(value);
}

template <typename T, int COLUMNS, int RANKS, bool GATED, int STAGES>
static mil_status
launch_engine(mil_context *context, const batch_arguments &a)
{
    static const int ahead = setting("MIL_AHEAD", 0);
    batch_maps maps = {};
    batch_arguments b = a;
    b.ahead = ahead;
    static const int mixed = setting("MIL_MIXED", 0), burst = setting("MIL_BURST", 1);
    b.mixed = mixed;
    b.burst = burst;
    MIL_TRY(map_arrays(context, a, GATED, COLUMNS, &maps));
    return mil_launch(context, "product", engine_kernel<T, COLUMNS, RANKS, GATED, STAGES>,
                      dim3(RANKS, (unsigned)a.tiles), dim3(THREADS + MIL_WARP),
                      engine_ring<COLUMNS, STAGES>::ALL, b, maps);
}

template <typename T, int COLUMNS, int RANKS, bool GATED>
static mil_status
launch(mil_context *context, const batch_arguments &a)
{
    static const int stages = setting("MIL_ENGINE", 5);
    if (stages == 10) {
        return launch_engine<T, COLUMNS, RANKS, GATED,
                             COLUMNS == 32   ? 10
                             : COLUMNS == 64 ? 9
                                             : 6>(context, a);
    }
    if (stages == 5) {
        return launch_engine<T, COLUMNS, RANKS, GATED, COLUMNS == 32 ? 5 : COLUMNS == 64 ? 4 : 3>(context, a);
    }
    return mil_launch(context, "product", batch_kernel<T, COLUMNS, RANKS, GATED>,
                      dim3(RANKS, (unsigned)a.tiles), dim3(THREADS), batch_ring<COLUMNS>::BYTES, a);
}

/* Into how many parts the inputs are cut: by the sizes of the weights alone. */
template <typename T, int COLUMNS, bool GATED>
static mil_status
choose_ranks(mil_context *context, const batch_arguments &a)
{
    static const int most_ranks = setting("MIL_RANKS", 4), enough = setting("MIL_ENOUGH", 512);
    int ranks = most_ranks;
    while (ranks > 1 && (a.tiles * ranks > enough || a.in < ranks * LEAST_STEPS * STEP)) {
        ranks /= 2;
    }
    return ranks == 8   ? launch<T, COLUMNS, 8, GATED>(context, a)
           : ranks == 4 ? launch<T, COLUMNS, 4, GATED>(context, a)
           : ranks == 2 ? launch<T, COLUMNS, 2, GATED>(context, a)
                        : launch<T, COLUMNS, 1, GATED>(context, a);
}

template <typename T, bool GATED>
static mil_status
choose_columns(mil_context *context, const batch_arguments &a)
{
    return a.rows <= 32   ? choose_ranks<T, 32, GATED>(context, a)
           : a.rows <= 64 ? choose_ranks<T, 64, GATED>(context, a)
                          : choose_ranks<T, 128, GATED>(context, a);
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
    int major = 0;
    if (count > MIL_BATCH_PRODUCTS || context->ops->activation_dtype == MIL_F32 ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, context->ops->device) !=
            cudaSuccess ||
        major != 9) {
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

/* Whether four outputs of `size` bytes can be written at once. */
static bool
is_wide(const void *y, int64_t stride, int64_t out, size_t size)
{
    return (uintptr_t)y % (4 * size) == 0 && stride % 4 == 0 && out % 4 == 0;
}

static batch_output
output_of(const mil_linear *p, int first_tile)
{
    return {p->weight,     p->bias,         p->y,
            p->y_stride,   (int)p->out,     first_tile,
            p->accumulate, p->float_output, is_wide(p->y, p->y_stride, p->out, p->float_output ? 4 : 2)};
}

static batch_arguments
arguments_of(const mil_linear *products, int64_t count, int tile_outputs)
{
    batch_arguments a = {};
    a.rows = (int)products->rows;
    a.in = (int)products->in;
    a.count = (int)count;
    a.x = products->x;
    a.x_stride = products->x_stride;
    for (int64_t i = 0; i < count; i++) {
        a.outputs[i] = output_of(&products[i], a.tiles);
        a.tiles += (int)mil_ceil_div(products[i].out, tile_outputs);
    }
    return a;
}

mil_status
mil_batch_product(mil_context *context, const mil_linear *products, int64_t count)
{
    return choose_type<false>(context, arguments_of(products, count, TILE_OUTPUTS));
}

mil_status
mil_batch_gated(mil_context *context, const mil_linear *products, int64_t count, const mil_glu *gate)
{
    bool gated = gate != NULL && count == 2 && products[0].out == products[1].out &&
                 gate->up == products[0].y && gate->gate == products[1].y && !products[0].accumulate &&
                 !products[1].accumulate;
    if (!gated) {
        MIL_TRY(mil_batch_product(context, products, count));
        return gate == NULL ? MIL_OK : context->ops->glu_forward(context, gate);
    }
    batch_arguments a = arguments_of(products, 1, GROUP_OUTPUTS);
    a.outputs[1] = output_of(&products[1], 0);
    a.gated = gate->y;
    a.gated_stride = gate->y_stride;
    a.activation = gate->activation;
    a.gated_wide = is_wide(gate->y, gate->y_stride, products[0].out, 2);
    return choose_type<true>(context, a);
}
