/* Products with 1 to 16 rows on Hopper: every multiprocessor streams its share of the weights through shared memory.
 *
 * thin_product.cu tells how tensor cores take rows of W for a few rows of x.  This is the same arithmetic, chunk for chunk and
 * hence bit for bit; what differs is who computes what, and how weights come:
 *
 *   share     a multiprocessor has one block, and each block the same number of outputs to within one: 2,560 outputs are 19 or
 *             20 for each of 132, where tiles of 16 would give some two tiles and most one.  They are taken in tiles of at
 *             most 16
 *   a warp    copies a tile's rows, some KB of each at a time, into a ring by bulk copies, as far ahead as the ring is
 *             long, past the ends of tiles.  Such copies take nothing of the multiprocessor's load units, so that what has
 *             come while x was not there yet is multiplied several times as fast as memory could bring it.  It asks for
 *             some 64 KB at a time, which is enough for memory's full rate: with all of the ring under way, 20 MB on
 *             all multiprocessors that any other access may have to wait behind, a step takes 2 to 6 % longer.  It sets
 *             the ring up itself and begins before the others have met: from the last byte of one launch to the first
 *             request of the next, memory has nothing to do
 *   8 warps   share a row's inputs by chunks of 64 bytes: chunk 8 j + w is warp w's
 *
 *   stage     row 0: | segment of the row | 64 bytes free, so that rows do not share banks |
 *             row 1: ...
 *
 * Rows of x that are few or short lie in shared memory.  Others are read from the second-level cache, a segment ahead, for
 * several tiles at once: 16 rows are as many bytes as a tile of W, and every multiprocessor reads all of them, so that once a
 * tile they would take longer than W takes from memory.
 *
 * The ring takes most of the shared memory on purpose: a second block on the same multiprocessor would be one of the next
 * kernel on some and none on others, and the shares uneven.  What has been copied leaves the second-level cache first: no token
 * reads it twice, and activations stay.  Weights of 8 bits become pairs of values in registers, on the way to the tensor cores.
 * Small matrices and short rows are faster in blocks that come and go (thin_product.cu), and so are more than 8 rows with
 * weights of 8 bits.  Figures: docs/performance-log.md.
 */
#include "phase.cuh"
#include "thin_conv.cuh"
#include "thin_norm.cuh"

#include <limits.h>

#define BLOCK (THREADS + MIL_WARP)
#define UNIT (WARPS * 64) /* bytes of a row in a chunk of every warp */
#define FEWEST_UNITS 3    /* of a segment: shorter copies are slower */
#define MOST_UNITS 5      /* of a segment */
#define RING_BYTES (172 << 10)
#define UNDER_WAY_BYTES (64 << 10) /* of the ring */
#define FEWEST_BYTES (6 << 20)     /* of the weights of a launch */
#define SHORTEST_ROW 1536          /* bytes */
#define MOST_STAGES 8
#define FEWEST_STAGES 2 /* what very many channels' taps and tails leave may be less */
#define ROWS_OF_GROUP 8 /* of x, which the tensor cores' instruction takes at a time */
#define ROW_GAP 64      /* bytes between rows of a stage */

enum x_source { X_IN_PLACE, X_COPIED, X_NORMED };

/* What leaves a product: its outputs, the gated activation of two, or some outputs convolved. */
enum way_out { AS_IT_COMES, GATED_PAIR, CONVOLVED };

/* Elements between rows of x in shared memory, so that what goes with a load of W of each row does not share banks. */
template <typename W>
constexpr int X_PAD = sizeof(W) == 1 ? 8 : 32;

/* Tiles that are multiplied with the same loads of x, as many as registers are there for. */
template <x_source X, way_out OUT, int GROUPS>
constexpr int
tiles_together()
{
    if (X != X_IN_PLACE) {
        return 1;
    }
    return OUT == GATED_PAIR || (OUT == CONVOLVED && GROUPS > 1) ? 2 : 3;
}

/* How a share is cut into tiles: how many, and how many outputs each of them has but the last one. */
struct share_cut {
    int tiles, size;
};

/* A matrix, and the first output that is its own when those of all products stand one behind another. */
struct stream_matrix {
    const void *weight;
    int first;
};

/* What the copying warp needs stands first and is ready for use: a kernel's constants come line by line, and memory waits. */
struct stream_arguments {
    int each, more;    /* outputs (or pairs of up and gate) of a block; blocks that have one more */
    share_cut cuts[2]; /* of blocks that have one more, and of the others */
    int units, stages; /* of a segment; of the ring */
    int under_way;     /* stages on their way from memory, at most */
    int row_bytes;     /* of the weights */
    stream_matrix matrices[MIL_THIN_PRODUCTS]; /* beyond the last one: with a first output that nobody has */
    thin_arguments thin; /* first_tile: the first output of a product, when all stand one behind another */
};

/* ---- rows of x ------------------------------------------------------------------------------------------------------ */

/* Rows `first` to at most `first` + ROWS - 1. */
template <typename T, int PAD, int ROWS, int STEPS>
static __device__ __forceinline__ void
copy_some(const thin_arguments &a, int first, T *rows)
{
    constexpr int STEP = THREADS * 8;
    T *const to = rows + first * (a.in + PAD);
    for (int column = (int)threadIdx.x * 8; column < a.in; column += STEPS * STEP) {
        uint4 values[ROWS][STEPS];
        load_rows((const T *)a.x + first * a.x_stride, a.x_stride, a.rows - first, column, STEP, a.in,
                  values);
#pragma unroll
        for (int i = 0; i < ROWS * STEPS; i++) {
            const int row = i / STEPS, at = column + i % STEPS * STEP;
            if (first + row < a.rows && at < a.in) {
                *(uint4 *)(to + row * (a.in + PAD) + at) = values[row][i % STEPS];
            }
        }
    }
}

/* One row, of which the thread has `left` columns from its first one on. */
template <typename T, int STEPS>
static __device__ __forceinline__ void
copy_one(const T *from, int left, T *to)
{
    constexpr int STEP = THREADS * 8;
    for (int first = 0; first < left; first += STEPS * STEP) {
        uint4 values[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (first + i * STEP < left) {
                values[i] = *(const uint4 *)(from + first + i * STEP);
            }
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (first + i * STEP < left) {
                *(uint4 *)(to + first + i * STEP) = values[i];
            }
        }
    }
}

template <typename T, int PAD>
static __device__ __forceinline__ void
copy_rows(const thin_arguments &a, T *rows)
{
    const int column = (int)threadIdx.x * 8, left = a.in - column;
    const T *const from = (const T *)a.x + column;
    mil_wait_knowing(mil_known(from) ^ left);
    if (a.rows == 1) {
        copy_one<T, 8>(from, left, rows + column);
    }
    else {
        for (int first = 0; first < a.rows; first += ROWS_AT_ONCE) {
            copy_some<T, PAD, ROWS_AT_ONCE, 3>(a, first, rows);
        }
    }
    meet();
}

/* ---- the stream ------------------------------------------------------------------------------------------------------- */

/* A block's outputs (or pairs of up and gate), cut into tiles of `size`. */
struct share {
    int first, count, tiles, size;

    explicit __device__ __forceinline__ share(const stream_arguments &s)
    {
        const int block = (int)blockIdx.x, more = block < s.more ? 1 : 0;
        const share_cut cut = s.cuts[1 - more];
        first = block * s.each + min(block, s.more);
        count = s.each + more;
        tiles = cut.tiles;
        size = cut.size;
    }

    /* Of a tile beyond the last one, at most 0. */
    __device__ __forceinline__ int in_tile(int tile) const
    {
        return min(size, count - tile * size);
    }
};

struct ring {
    uint64_t *full, *empty; /* [stages] */
    uint8_t *memory;        /* [stages][TILE][row_bytes] */
    int stages, row_bytes, stage, parity;

    __device__ __forceinline__ uint8_t *row(int i) const
    {
        return memory + (stage * TILE + i) * row_bytes;
    }

    __device__ __forceinline__ void next()
    {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/* The copying warp has set the ring's barriers up: it goes on, the other warps wait for that. */
static __device__ __forceinline__ void
announce_ring()
{
    asm volatile("bar.arrive 2, %0;" ::"n"(BLOCK) : "memory");
}

static __device__ __forceinline__ void
await_ring()
{
    asm volatile("bar.sync 2, %0;" ::"n"(BLOCK) : "memory");
}

/* The matrix that has an output: none of the comparisons waits for another one's constants. */
static __device__ __forceinline__ stream_matrix
matrix_of(const stream_arguments &s, int output)
{
    int i = 0;
#pragma unroll
    for (int j = 1; j < MIL_THIN_PRODUCTS; j++) {
        i += output >= s.matrices[j].first ? 1 : 0;
    }
    return s.matrices[i];
}

/* Passes over the segments in which SETS tiles and matrices go through the ring: together, where they share a load of x; where x
 * costs nothing to load again one after the other, so that what is under way is of one matrix. */
template <x_source X, int SETS>
constexpr int PASSES = X == X_IN_PLACE ? 1 : SETS;

/* Warp 8: lane l copies row l of each tile's segments, of TILES tiles together, and never asks for more than `under_way`
 * stages that have not come. */
template <typename W, x_source X, int TILES, int MATRICES>
static __device__ __forceinline__ void
produce(const stream_arguments &s, const share &mine, ring r, int lane)
{
    constexpr int SETS = TILES * MATRICES;
    const int row_bytes = s.row_bytes, segment = s.units * UNIT;
    ring late = r; /* the oldest stage under way */
    int under_way = 0;
    auto copy = [&](const char *from, int at, int rows) {
        const uint32_t bytes = (uint32_t)min(segment, row_bytes - at);
        phase_wait(&r.empty[r.stage], r.parity ^ 1);
        if (under_way >= s.under_way) {
            phase_wait(&late.full[late.stage], late.parity);
            late.next();
        }
        else {
            under_way++;
        }
        if (lane == 0) {
            phase_expect(&r.full[r.stage], bytes * (uint32_t)rows);
        }
        __syncwarp();
        if (lane < rows) {
            copy_bulk<true>(r.row(lane), from + at, bytes, &r.full[r.stage]);
        }
        r.next();
    };
    for (int first = 0; first < mine.tiles; first += TILES) {
        const char *from[SETS] = {};
#pragma unroll
        for (int i = 0; i < SETS; i++) {
            const int tile = first + i / MATRICES, output = mine.first + tile * mine.size + lane;
            if (lane < mine.in_tile(tile)) {
                const stream_matrix m = MATRICES == 2 ? s.matrices[i % MATRICES] : matrix_of(s, output);
                from[i] = (const char *)m.weight + (int64_t)(output - m.first) * row_bytes;
            }
        }
#pragma unroll
        for (int pass = 0; pass < PASSES<X, SETS>; pass++) {
#pragma unroll 1
            for (int at = 0; at < row_bytes; at += segment) {
#pragma unroll
                for (int i = pass; i < SETS && first + i / MATRICES < mine.tiles; i += PASSES<X, SETS>) {
                    copy(from[i], at, mine.in_tile(first + i / MATRICES));
                }
            }
        }
    }
}

/* Floats between outputs among partial sums; odd, for the banks' sake. */
static __host__ __device__ inline int
sums_pitch(int rows)
{
    return rows | 1;
}

/* This warp's sums of a tile to where the others' are; partial: [WARPS][TILE][pitch]. */
template <typename W, int GROUPS>
static __device__ __forceinline__ void
put_sums(const float (&c)[CHAINS<W>][GROUPS][4], int rows, float *partial)
{
    const int warp = (int)threadIdx.x / MIL_WARP, lane = (int)threadIdx.x % MIL_WARP, g = lane / 4,
              t = lane % 4;
#pragma unroll
    for (int i = 0; i < GROUPS * 4; i++) {
        const int group = i / 4, j = i % 4, row = group * 8 + 2 * t + j % 2;
        if (row < rows) {
            partial[(warp * TILE + g + j / 2 * 8) * sums_pitch(rows) + row] =
                add_chains<W, GROUPS>(c, group, j);
        }
    }
}

/* A lane's part of a segment of GROUPS * 8 rows of x, from its first row on; zeros beyond `rows` and beyond `units` chunks. */
template <typename T, typename W, int GROUPS>
struct x_segment {
    uint4 at[MOST_UNITS][GROUPS][X_LOADS<T, W>];

    __device__ __forceinline__ void load(const T *x, int64_t stride, int rows, int units)
    {
#pragma unroll
        for (int i = 0; i < MOST_UNITS * GROUPS * X_LOADS<T, W>; i++) {
            const int part = i % X_LOADS<T, W>, group = i / X_LOADS<T, W> % GROUPS,
                      u = i / X_LOADS<T, W> / GROUPS;
            const T *from = x + group * 8 * stride + u * (UNIT / (int)sizeof(W)) + 8 * part;
            at[u][group][part] =
                u < units && group * 8 < rows ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
        }
    }
};

/* The same chunks of a stage. */
struct w_segment {
    uint4 low[MOST_UNITS], high[MOST_UNITS]; /* of rows g and g + 8 */

    /* What the stage has beyond the row's end is not read. */
    __device__ __forceinline__ void load(const uint8_t *weights, int row_bytes, int units)
    {
        const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int u = 0; u < MOST_UNITS; u++) {
            low[u] = u < units ? *(const uint4 *)(weights + u * UNIT) : zero;
            high[u] = u < units ? *(const uint4 *)(weights + 8 * row_bytes + u * UNIT) : zero;
        }
    }
};

/* `most`: units that a segment may have. */
template <typename T, typename W, int GROUPS>
static __device__ __forceinline__ void
multiply_segment(const w_segment &w, int most, const x_segment<T, W, GROUPS> &x,
                 float (&c)[CHAINS<W>][GROUPS][4])
{
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) {
        if (u < most) {
            multiply_load<T, W, GROUPS>(c, w.low[u], w.high[u], x.at[u]);
        }
    }
}

/* The other warps: TILES tiles at a time, of one matrix or of both of a gated pair. */
template <typename T, typename W, x_source X, way_out OUT, int GROUPS>
struct multiplier {
    static constexpr bool GATED = OUT == GATED_PAIR;
    static constexpr int MATRICES = GATED ? 2 : 1, TILES = tiles_together<X, OUT, GROUPS>();
    static constexpr int SETS = TILES * MATRICES;
    static constexpr int INPUTS = UNIT / (int)sizeof(W);            /* of a unit */
    static constexpr bool AHEAD = X == X_IN_PLACE && sizeof(W) > 1; /* codes leave no registers for that */

    const stream_arguments &s;
    const share &mine;
    ring r;
    const T *x; /* of the lane's first row and unit; its rows are 8 apart */
    int64_t stride;
    int lane_input, lane_rows; /* rows from its first one on */
    x_segment<T, W, GROUPS> next;

    __device__ __forceinline__ multiplier(const stream_arguments &s, const share &mine, const ring &r,
                                          const T *rows, int64_t stride)
        : s(s), mine(mine), r(r), stride(stride)
    {
        const int warp = (int)threadIdx.x / MIL_WARP, g = lane() / 4, t = lane() % 4;
        lane_input = warp * CHUNK<W> + t * PER_LOAD<W>;
        lane_rows = s.thin.rows - g;
        x = rows + g * stride + lane_input;
        if constexpr (AHEAD) {
            load(next, 0);
        }
    }

    static __device__ __forceinline__ int lane()
    {
        return (int)threadIdx.x % MIL_WARP;
    }

    /* Whether there is such a tile.  One tile at a time is not asked for: weights' addresses are then known before the wait
     * for them. */
    __device__ __forceinline__ bool has(int tile) const
    {
        return TILES == 1 || tile < mine.tiles;
    }

    /* The lane's units of a segment. */
    __device__ __forceinline__ int units_of(int segment) const
    {
        return min(s.units, (s.thin.in - segment - lane_input + INPUTS - 1) / INPUTS);
    }

    __device__ __forceinline__ void load(x_segment<T, W, GROUPS> &to, int segment) const
    {
        to.load(x + segment, stride, lane_rows, units_of(segment));
    }

    /* Tile `first` and those that go with it; c: [tile][matrix]. */
    __device__ __forceinline__ void multiply(int first, float (&c)[SETS][CHAINS<W>][GROUPS][4])
    {
        const int step = s.units * INPUTS, weight = (int)threadIdx.x / MIL_WARP * 64 + lane() % 4 * 16;
#pragma unroll
        for (int pass = 0; pass < PASSES<X, SETS> && has(first + pass / MATRICES); pass++) {
#pragma unroll 1
            for (int segment = 0; segment < s.thin.in; segment += step) {
                x_segment<T, W, GROUPS> inputs;
                if constexpr (AHEAD) {
                    inputs = next;
                    const int after = segment + step < s.thin.in ? segment + step : 0;
                    if (after > 0 || first + TILES < mine.tiles) {
                        load(next, after);
                    }
                }
                else {
                    load(inputs, segment);
                }
                const int units = units_of(segment);
#pragma unroll
                for (int i = pass; i < SETS && has(first + i / MATRICES); i += PASSES<X, SETS>) {
                    phase_wait(&r.full[r.stage], r.parity);
                    w_segment weights;
                    weights.load(r.row(lane() / 4) + weight, r.row_bytes, units);
                    __syncwarp();
                    if (lane() == 0) {
                        phase_arrive(&r.empty[r.stage]);
                    }
                    r.next();
                    multiply_segment<T, W, GROUPS>(weights, s.units, inputs, c[i]);
                }
            }
        }
    }

    /* All tiles, and out with them.  partials: of a tile's matrices, twice. */
    __device__ __forceinline__ void run(float *partials, const conv_share &conv)
    {
        const thin_arguments &a = s.thin;
        const int matrix = WARPS * TILE * sums_pitch(a.rows);
        for (int first = 0; first < mine.tiles; first += TILES) {
            place<T, W, GATED> places[TILES];
#pragma unroll
            for (int i = 0; i < TILES && has(first + i); i++) {
                const int column = places[i].column(), output = mine.first + (first + i) * mine.size + column;
                const int product = GATED ? 0 : product_of(a, output);
                places[i].find(a, product, output - a.outputs[product].first_tile,
                               column < mine.in_tile(first + i));
                places[i].read();
            }
            float c[SETS][CHAINS<W>][GROUPS][4] = {};
            multiply(first, c);
#pragma unroll
            for (int i = 0; i < TILES && has(first + i); i++) {
                float *const partial = partials + (first + i) % 2 * MATRICES * matrix;
                conv_output<T> convolved;
                if constexpr (OUT == CONVOLVED) {
                    conv.find(a, mine.first + (first + i) * mine.size, mine.size, places[i].to != NULL,
                              &convolved);
                }
#pragma unroll
                for (int m = 0; m < MATRICES; m++) {
                    put_sums<W, GROUPS>(c[i * MATRICES + m], a.rows, partial + m * matrix);
                }
                meet(); /* once a tile: who still reads a buffer has not come to the next meeting */
                if constexpr (OUT == CONVOLVED) {
                    convolved.template write<W>(a, places[i], partial, sums_pitch(a.rows));
                }
                else {
                    places[i].write(a, partial, sums_pitch(a.rows));
                }
            }
        }
    }
};

/* W: of the weights, T or 8 bits.  GATED_PAIR: outputs[0] is up, outputs[1] the gate, and only their gated activation is
 * written.  GROUPS of 8 rows. */
template <typename T, typename W, x_source X, way_out OUT, int GROUPS>
static __global__ void
__launch_bounds__(BLOCK, 1) stream_kernel(const __grid_constant__ stream_arguments s)
{
    using multiplier_type = multiplier<T, W, X, OUT, GROUPS>;
    constexpr int MATRICES = multiplier_type::MATRICES;
    __shared__ uint64_t full[MOST_STAGES], empty[MOST_STAGES];
    __shared__ conv_number numbers[OUT == CONVOLVED ? MIL_THIN_ROWS : 1];
    extern __shared__ __align__(128)
        uint8_t memory[]; /* the ring, partial sums, rows of x, inputs and taps */
    const thin_arguments &a = s.thin;
    const ring r = {full, empty, memory, s.stages, s.units * UNIT + ROW_GAP, 0, 0};
    if (threadIdx.x >= THREADS) { /* weights need not wait: nobody writes them */
        const int lane = (int)threadIdx.x % MIL_WARP;
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < MOST_STAGES; i++) {
                phase_init(&full[i], 1);
                phase_init(&empty[i], WARPS);
            }
            phase_publish(); /* copies see the barriers */
        }
        __syncwarp();
        announce_ring();
        produce<W, X, multiplier_type::TILES, MATRICES>(s, share(s), r, lane);
        return;
    }
    const share mine(s);
    mil_trigger();
    await_ring();
    float *const partials = (float *)(memory + s.stages * TILE * r.row_bytes);
    T *const rows = (T *)(partials + 2 * MATRICES * WARPS * TILE * sums_pitch(a.rows));
    conv_share conv;
    if (OUT == CONVOLVED && conv.find(a, mine.first, mine.count)) {
        conv.numbers = numbers;
        conv.table = (float *)(rows + (X == X_IN_PLACE ? 0 : a.rows * (a.in + X_PAD<W>)));
        conv.fetch(a);
        mil_await_copies(); /* before all meet again, */
        if constexpr (X == X_IN_PLACE) {
            meet(); /* which they do once more anyway where x comes into shared memory */
        }
    }
    if constexpr (X == X_NORMED) {
        if (is_narrow(a)) {
            const narrow_columns<T> columns(a);
            mil_wait_knowing(columns.known());
            norm_narrow<T, X_PAD<W>>(a, columns, rows, partials);
        }
        else {
            const norm_columns columns(a);
            const weights_at_hand weights(a, columns);
            mil_wait();
            norm_wide<T, X_PAD<W>, ROWS_AT_ONCE>(a, columns, weights, rows, partials);
        }
    }
    else if constexpr (X == X_COPIED) {
        copy_rows<T, X_PAD<W>>(a, rows);
    }
    else {
        mil_wait();
    }
    const bool in_place = X == X_IN_PLACE;
    multiplier_type multiplies(s, mine, r, in_place ? (const T *)a.x : rows,
                               in_place ? a.x_stride : a.in + X_PAD<W>);
    multiplies.run(partials, conv);
}

/* ---- launches ------------------------------------------------------------------------------------------------------------ */

/* Of a row's units, as many as divide it best: a short segment at its end leaves most of a stage unused. */
static int
units_of_segment(int64_t units)
{
    int best = MOST_UNITS;
    for (int n = MOST_UNITS - 1; n >= FEWEST_UNITS; n--) {
        if (mil_ceil_div(units, n) * n < mil_ceil_div(units, best) * best) {
            best = n;
        }
    }
    return best;
}

static share_cut
cut_into_tiles(int count)
{
    const int tiles = (int)mil_ceil_div(count, TILE);
    return {tiles, (int)mil_ceil_div(count, tiles)};
}

static size_t
stage_bytes(const stream_arguments &s)
{
    return (size_t)TILE * (size_t)(s.units * UNIT + ROW_GAP);
}

/* Stages of a ring that leaves so many bytes of shared memory to others. */
static int
stages_beside(const stream_arguments &s, size_t others, size_t shared)
{
    const size_t room = others < shared ? shared - others : 0;
    const size_t stages = (room < RING_BYTES ? room : RING_BYTES) / stage_bytes(s);
    return (int)(stages < MOST_STAGES ? stages : MOST_STAGES);
}

/* Where rows of x are to be, and the ring beside them; shared memory in all.  They go there where the ring does not lose a
 * stage by it, and leave more than 8 where they are: little of the next kernel would fit beside so many. */
static size_t
plan_memory(stream_arguments *s, bool gated, bool normed, size_t most, x_source *x)
{
    const thin_arguments &a = s->thin;
    const size_t rows = sizeof(uint16_t) * (size_t)a.rows * (size_t)(a.in + X_PAD<uint16_t>);
    const int sums = 2 * (gated ? 2 : 1) * WARPS * TILE * sums_pitch(a.rows);
    const int conv = a.conv.channels > 0 ? conv_floats(s->each + 1, a.conv.rows.sequences) : 0;
    const size_t always = (size_t)(sums + conv) * sizeof(float);
    s->stages = stages_beside(*s, always, most);
    const int enough = (int)mil_ceil_div(UNDER_WAY_BYTES, (int64_t)stage_bytes(*s));
    s->under_way = enough < s->stages ? enough : s->stages;
    const bool room = a.rows <= ROWS_OF_GROUP && stages_beside(*s, always + rows, most) == s->stages;
    *x = !room ? X_IN_PLACE : normed ? X_NORMED : X_COPIED;
    return (size_t)s->stages * stage_bytes(*s) + always + (room ? rows : 0);
}

/* Whether rows of x can be normed on the way, if there is room for them. */
static bool
norm_fits(const thin_arguments &a)
{
    return (a.rows <= ROWS_AT_ONCE || is_narrow(a)) && norm_is_short(a);
}

template <typename T, typename W, way_out OUT>
static mil_status
launch_rows(mil_context *context, const stream_arguments &s, x_source x, dim3 grid, size_t shared)
{
    auto kernel = x == X_NORMED   ? stream_kernel<T, W, X_NORMED, OUT, 1>
                  : x == X_COPIED ? stream_kernel<T, W, X_COPIED, OUT, 1>
                                  : stream_kernel<T, W, X_IN_PLACE, OUT, 1>;
    /* What comes between two streams has room beside the ring, then: 1 % of Mamba 2.8B's step.  With more rows, which are read
     * through the first-level cache, it does not pay. */
    MIL_CUDA_TRY(mil_prefer_shared((const void *)kernel, context->ops->device));
    return mil_launch(context, "thin product", kernel, grid, dim3(BLOCK), shared, s);
}

template <typename T, way_out OUT>
static mil_status
launch(mil_context *context, mil_dtype weights, const stream_arguments &s, x_source x, dim3 grid,
       size_t shared)
{
    if (s.thin.rows > ROWS_OF_GROUP) {
        return mil_launch(context, "thin product", stream_kernel<T, T, X_IN_PLACE, OUT, 2>, grid, dim3(BLOCK),
                          shared, s);
    }
    if constexpr (OUT != CONVOLVED) {
        if (weights == MIL_F8 || weights == MIL_I8) {
            return (weights == MIL_F8 ? launch_rows<T, mil_f8, OUT>
                                      : launch_rows<T, mil_i8, OUT>)(context, s, x, grid, shared);
        }
    }
    return launch_rows<T, T, OUT>(context, s, x, grid, shared);
}

template <typename T>
static mil_status
launch_out(mil_context *context, mil_dtype weights, const stream_arguments &s, bool gated, x_source x,
           dim3 grid, size_t shared)
{
    auto function = gated                      ? launch<T, GATED_PAIR>
                    : s.thin.conv.channels > 0 ? launch<T, CONVOLVED>
                                               : launch<T, AS_IT_COMES>;
    return function(context, weights, s, x, grid, shared);
}

mil_status
mil_thin_stream(mil_context *context, mil_dtype weights, const thin_arguments &thin, bool normed, bool gated,
                bool *done)
{
    stream_arguments s = {};
    s.thin = thin;
    int total = 0;
    for (int i = 0; i < thin.count; i++) {
        s.thin.outputs[i].first_tile = total;
        total += thin.outputs[i].out;
    }
    const int64_t row_bytes = thin.in * (int64_t)mil_dtype_size(weights);
    const int most_rows = mil_dtype_is_scaled(weights) ? ROWS_OF_GROUP : MIL_THIN_ROWS;
    *done = false;
    if (thin.rows > most_rows || row_bytes < SHORTEST_ROW ||
        total * row_bytes * (gated ? 2 : 1) < FEWEST_BYTES || (normed && !norm_fits(thin))) {
        return MIL_OK;
    }
    const int multiprocessors = mil_multiprocessors(context),
              most_shared = mil_device_number(context, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (mil_device_major(context) < 9 || most_shared < (int)RING_BYTES || total < multiprocessors) {
        return MIL_OK;
    }
    s.units = units_of_segment(mil_ceil_div(row_bytes, UNIT));
    s.row_bytes = (int)row_bytes;
    for (int i = 0; i < MIL_THIN_PRODUCTS; i++) {
        const bool there = i < (gated ? 2 : thin.count);
        s.matrices[i].weight = there ? thin.outputs[i].weight : NULL;
        s.matrices[i].first = !there ? INT_MAX : gated ? 0 : s.thin.outputs[i].first_tile;
    }
    s.each = total / multiprocessors;
    s.more = total % multiprocessors;
    s.cuts[0] = cut_into_tiles(s.each + 1);
    s.cuts[1] = cut_into_tiles(s.each);
    x_source x;
    const size_t shared = plan_memory(&s, gated, normed, (size_t)most_shared - 1024, &x);
    if ((normed && x != X_NORMED) || s.stages < FEWEST_STAGES) {
        return MIL_OK;
    }
    *done = true;
    auto function =
        context->ops->activation_dtype == MIL_BF16 ? launch_out<__nv_bfloat16> : launch_out<__half>;
    return function(context, weights, s, gated, x, dim3((unsigned)multiprocessors), shared);
}
