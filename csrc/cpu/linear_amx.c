/* bfloat16 products with AMX tiles (Intel SDM volume 1, chapter 18); other dtypes go to the levels below.
 *
 * A tile instruction computes C[16, n] += A[16, 32] B[32, n] with A plain row-major and B in pairs:
 *
 *     A: 16 rows x 64 bytes          B: 16 pairs of k x (n x 2)        C: 16 x n float32
 *     w[c,0] w[c,1] … w[c,31]        x[0,2p] x[0,2p+1] x[1,2p] …       C[c, r] = y[r, c]
 *
 * So weights take the side of A and are loaded from where they lie in the file, 16 rows at a stride, and x,
 * which is small and packed once a call, takes the side of B.  The result comes out transposed.
 *
 * An element of C is the sum over k, 32 at a time in order, whatever n and whatever the other rows hold;
 * a tile that is stored between cuts of k and loaded again is the same. So one row, a verification window
 * and prefill give the same bits. Thin products set the tile's width n to their rows, wide ones to 16.
 *
 * A step of two weight tiles and two x tiles is 4 tile loads for 4 products of 16 cycles. k is cut so
 * that 32 weight rows (32 KiB) stay in L1 while the rows of x stream from L2. Thin products are bound by
 * memory: here the weights ahead are prefetched, since 32 streams are more than hardware follows well.
 */
#include "cpu/linear.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq")))

enum {
    SIDE = 16,                        /* rows of a tile */
    STEP = 32,                        /* elements of k a tile holds */
    COLUMNS = 2 * SIDE,               /* weight rows of a block */
    GROUPS = MIL_LINEAR_CHUNK / SIDE, /* of x rows in a chunk */
    CUT = 16,                         /* steps of k in a cut */
    AHEAD = 8,                        /* steps by which weights are prefetched */
};

/* The tile intrinsics do not tell the compiler which memory they read or write: this keeps stores and
 * loads on their side. */
#define MEMORY_BARRIER() __asm__ volatile("" ::: "memory")

/* Tile registers: 0 … 3 hold C[weight tile][group], 4 and 5 x, 6 and 7 weights. */
typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* The calling thread's working memory. */
typedef struct work {
    float sums[GROUPS][2][SIDE * SIDE]; /* C tiles between cuts, [weight row, x row] */
    uint16_t edge[2][SIDE * STEP];      /* weights that are no whole tile, padded with zeros */
} work;

static int64_t
smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t
step_count(int64_t in)
{
    return (in + STEP - 1) / STEP;
}

/* Rows of x in a tile: all of a thin chunk's, else 16 (padded with zeros in the last group). */
static int64_t
group_width(int64_t rows)
{
    return smaller(rows, SIDE);
}

static int64_t
group_count(int64_t rows)
{
    return (rows + SIDE - 1) / SIDE;
}

static size_t
panel_bytes(int64_t rows, int64_t in)
{
    return (size_t)(group_count(rows) * step_count(in) * STEP * group_width(rows)) * sizeof(uint16_t);
}

/* Group g as [steps, 16 pairs, width, 2]. */
static void
pack(int64_t rows, int64_t g, int64_t in, const float *x, int64_t x_stride, void *panel)
{
    const int64_t width = group_width(rows), steps = step_count(in);
    uint16_t *group = (uint16_t *)panel + g * steps * STEP * width;
    for (int64_t r = 0; r < width; r++) {
        const int64_t row = g * SIDE + r, length = row < rows ? in : 0;
        for (int64_t k = 0; k < steps * STEP; k += 2) {
            const float *from = x + row * x_stride + k;
            uint16_t *to = group + k * width + 2 * r;
            to[0] = k < length ? mil_float_to_bf16(from[0]) : 0;
            to[1] = k + 1 < length ? mil_float_to_bf16(from[1]) : 0;
        }
    }
}

TARGET static void
configure(int64_t width)
{
    tile_config config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.rows[tile] = SIDE;
        config.row_bytes[tile] = (uint16_t)(tile < 6 ? 4 * width : 64);
    }
    const void *from = &config;
    __asm__ volatile("" : "+r"(from) : : "memory"); /* see MEMORY_BARRIER: all of config is read */
    _tile_loadconfig(from);
}

/* Where one weight tile of a step lies: in place if whole, else in a padded copy. */
typedef struct weight_tile {
    const void *from;
    int64_t stride; /* bytes */
} weight_tile;

static weight_tile
find_weights(const mil_linear *product, int64_t column, int64_t end, int64_t step, uint16_t *edge)
{
    const int64_t rows = smaller(end - column, SIDE), length = smaller(product->in - step * STEP, STEP);
    const uint16_t *from = (const uint16_t *)product->weight + column * product->in + step * STEP;
    if (rows == SIDE && length == STEP) {
        return (weight_tile){from, product->in * 2};
    }
    MEMORY_BARRIER(); /* the last tile has been loaded from here */
    memset(edge, 0, SIDE * STEP * sizeof(uint16_t));
    for (int64_t r = 0; r < rows; r++) {
        memcpy(edge + r * STEP, from + r * product->in, (size_t)length * sizeof(uint16_t));
    }
    MEMORY_BARRIER();
    return (weight_tile){edge, STEP * 2};
}

/* A step AHEAD of `step` in the 32 weight rows from `column` on, or in the rows below where these end. */
static void
prefetch_weights(const mil_linear *product, int64_t column, int64_t step, int64_t steps)
{
    const int64_t wraps = step + AHEAD >= steps, target = step + AHEAD - (wraps ? steps : 0);
    const char *from =
        (const char *)product->weight + 2 * ((column + wraps * COLUMNS) * product->in + target * STEP);
    for (int r = 0; r < COLUMNS; r++) {
        __builtin_prefetch(from + 2 * r * product->in);
    }
}

/* Steps [step, end_step) of 32 weight rows with one group of x or, where `pair` is set, with two. */
TARGET static void
multiply_cut(const mil_linear_block *block, int64_t column, int64_t group, bool pair, int64_t step,
             int64_t end_step)
{
    const mil_linear *product = block->product;
    const int64_t width = group_width(block->chunk_rows), steps = step_count(product->in);
    const int64_t end = block->column + block->columns, x_stride = 4 * width;
    const int64_t x_step = STEP * width, x_group = steps * x_step;
    const bool thin = block->chunk_rows <= SIDE;
    work *work = block->scratch;
    float (*sums)[2][SIDE * SIDE] = &work->sums[group];
    const uint16_t *x =
        (const uint16_t *)block->panel + (block->row / SIDE + group) * x_group + step * x_step;

    if (step == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    else {
        _tile_loadd(0, sums[0][0], SIDE * 4);
        _tile_loadd(1, sums[0][1], SIDE * 4);
        if (pair) {
            _tile_loadd(2, sums[1][0], SIDE * 4);
            _tile_loadd(3, sums[1][1], SIDE * 4);
        }
    }
    for (; step < end_step; step++, x += x_step) {
        const weight_tile upper = find_weights(product, column, end, step, work->edge[0]);
        const weight_tile lower = find_weights(product, column + SIDE, end, step, work->edge[1]);
        if (thin) {
            prefetch_weights(product, column, step, steps);
        }
        _tile_loadd(4, x, x_stride);
        _tile_loadd(6, upper.from, upper.stride);
        _tile_loadd(7, lower.from, lower.stride);
        _tile_dpbf16ps(0, 6, 4);
        _tile_dpbf16ps(1, 7, 4);
        if (pair) {
            _tile_loadd(5, x + x_group, x_stride);
            _tile_dpbf16ps(2, 6, 5);
            _tile_dpbf16ps(3, 7, 5);
        }
    }
    _tile_stored(0, sums[0][0], SIDE * 4);
    _tile_stored(1, sums[0][1], SIDE * 4);
    if (pair) {
        _tile_stored(2, sums[1][0], SIDE * 4);
        _tile_stored(3, sums[1][1], SIDE * 4);
    }
    MEMORY_BARRIER();
}

/* Writes y from the finished, transposed tiles. */
static void
finish(const mil_linear_block *block, int64_t column, int64_t columns)
{
    const work *work = block->scratch;
    for (int64_t r = 0; r < block->rows; r++) {
        float values[COLUMNS];
        for (int64_t c = 0; c < columns; c++) {
            values[c] = work->sums[r / SIDE][c / SIDE][c % SIDE * SIDE + r % SIDE];
        }
        mil_linear_store(block->product, block->first_row + block->row + r, column, columns, values);
    }
}

TARGET static void
multiply(const mil_linear_block *block)
{
    const int64_t steps = step_count(block->product->in), groups = group_count(block->rows);
    const int64_t end = block->column + block->columns;
    const int64_t cut = groups == 1 ? steps : CUT;
    configure(group_width(block->chunk_rows));
    for (int64_t column = block->column; column < end; column += COLUMNS) {
        for (int64_t step = 0; step < steps; step += cut) {
            for (int64_t group = 0; group < groups; group += 2) {
                multiply_cut(block, column, group, group + 1 < groups, step, smaller(step + cut, steps));
            }
        }
        finish(block, column, smaller(COLUMNS, end - column));
    }
    _tile_release();
}

const mil_linear_kernel *
mil_linear_amx(mil_dtype dtype)
{
    static const mil_linear_kernel kernel = {
        .panel_bytes = panel_bytes,
        .group_count = group_count,
        .pack = pack,
        .scratch_bytes = sizeof(work),
        .multiply = multiply,
    };
    return dtype == MIL_BF16 ? &kernel : NULL;
}

#else

const mil_linear_kernel *
mil_linear_amx(mil_dtype dtype)
{
    (void)dtype;
    return NULL;
}

#endif
