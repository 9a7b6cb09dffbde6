/* The vector kernels of matrix products, written once and included by linear_<level>.c for each processor
 * level.
 *
 * Computed: y[r, c] = sum_k x[r, k] w[c, k]. Both rows are contiguous along k, so vectors run along k: an
 * output owns one accumulator of LANES partial sums. Lane l adds the products at panel positions l,
 * l + LANES, l + 2 LANES, … in that order by fused multiply-adds, and `reduce` adds the lanes in one fixed
 * tree at the end. That is the order for one row and for a thousand, hence the same bits. Weights stay in
 * the plain [out, in] layout of the file: nothing is repacked at load, a mapped file is used as it is.
 *
 * Panel.  x is stored in the order in which vectors of weights come out of memory.  A vector of 16-bit
 * weights holds pairs; a shift and a mask turn it into its even and its odd elements as float32, so a
 * step of the panel holds the even elements first, then the odd ones:
 *
 *     memory  w0 w1 w2 w3 w4 w5 w6 w7 …      panel  x0 x2 x4 x6 … | x1 x3 x5 x7 …      (one step)
 *
 * The rows that share a tile (a group) stand side by side, [steps, rows of the group, STEP], so that a
 * tile walks through x with one pointer and no two rows compete for the same set of the cache.
 *
 * Thin products (up to THIN_ROWS rows) are bound by memory: each weight is read once, from where it lies,
 * and meets all rows while in registers or L1. A tile is W weight rows by X rows of x, so that W * X
 * chains hide the latency of a multiply-add, and a step costs W + X loads for W * X multiply-adds. Weight
 * rows are followed as far as the rows of x have room in L2, mostly to their ends, and prefetched NEAR bytes
 * ahead, past their ends in the rows that come next; where k is cut the accumulators rest in `lanes`. (Cuts
 * that keep x in L1 break weights into pieces of 1 to 4 KB, each of which the hardware's own prefetch must
 * find anew: 7 to 10 % slower. Further ahead crowds L1, where rows that lie a power of two apart share a few
 * sets; the whole next strip into L2 is slower as well.)
 *
 * Wide products are bound by multiply-adds: WIDE_COLUMNS weight rows of a k cut are expanded once into a
 * panel of their own (L1) and meet all rows of the chunk, which stream through from L2 in tiles of
 * WIDE_GROUP rows.
 *
 * The includer defines, before inclusion:
 *   TARGET, INLINE                attribute of functions with vector code, or nothing; same, always inlined
 *   vec, LANES                    accumulator
 *   panel_t, pvec, PANEL_WIDTH    element and vector of the panel, elements a vector
 *   PARTS                         panel vectors a step; STEP = PARTS * PANEL_WIDTH elements of k
 *   TILE_W1 … TILE_W6, WIDE_W     weight rows of a tile with 1 … 6 rows of x (divisors of COLUMNS), and of
 *                                 wide tiles (divisor of WIDE_COLUMNS)
 *   zero(), load_lanes(p), store_lanes(p, v), load_panel(p), store_panel(p, v),
 *   load_weight(dtype, p, part), multiply_add(sum, w, x)
 *   round_step(dtype, values)     rounds STEP floats to dtype, in place
 *   panel_source(dtype, i)        which element of a step stands at position i of the panel's step
 *   to_panel(value)               a rounded float as panel_t
 *   reduce(lanes, values)         sums of 8 accumulators
 */
#include <string.h>

#include "cpu/linear.h"

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

enum {
    STEP = PARTS * PANEL_WIDTH,
    COLUMNS = 24,   /* of a thin block; a multiple of 8 and of every tile's weight rows */
    THIN_ROWS = 16, /* most rows of a thin product */
    GROUP = 6,      /* most rows of a tile */
    WIDE_GROUP = 4, /* rows of a wide tile */
    STRIP = 12,     /* weight rows that several groups share; a multiple of TILE_W3 … TILE_W6 */
    MAX_W = 8,      /* most weight rows of a tile */
    LANES_BYTES = MIL_LINEAR_CHUNK * COLUMNS * LANES * sizeof(float),
    WIDE_COLUMNS = 12, /* of a wide block; a multiple of WIDE_W */
    NEAR = 384,        /* bytes by which weights are prefetched, whole steps */
    /* Elements of a cut of k: of 512 KiB of L2 a thin product's rows of x take 160, of 32 KiB of L1 a wide block's
     * weights 18. */
    THIN_PANEL = 163840 / sizeof(panel_t),
    WIDE_CUT = 1536 / sizeof(panel_t),
};

/* Weights as the tiles read them: as stored, or expanded by `expand`, which the fourth value stands for. */
enum { EXPANDED = 3 };

INLINE pvec
load_any(int dtype, const char *weight, int part)
{
    return dtype == EXPANDED ? load_panel((const panel_t *)weight + part * PANEL_WIDTH)
                             : load_weight((mil_dtype)dtype, weight, part);
}

static inline size_t
element_size(int dtype)
{
    return dtype == EXPANDED ? sizeof(panel_t) : mil_dtype_size((mil_dtype)dtype);
}

/* ---- tiles ------------------------------------------------------------------------------------------- */

/* What a tile works on: whole steps of one cut of k. */
typedef struct tile_work {
    const char *weight[MAX_W]; /* start of each weight row's cut; may repeat a row at the edge */
    int64_t ahead;             /* bytes from there to the rows that come next */
    const panel_t *panel;      /* x's cut: [steps, x rows, STEP] */
    int64_t steps;
    float *lanes; /* [x rows][COLUMNS][LANES]: accumulators, at this tile's first column */
    bool resume;  /* go on from `lanes`; else from zero */
} tile_work;

typedef void (*tile_function)(const tile_work *work);

/* One step of k for w_count weight rows and x_count rows; the counts are constants after inlining. The
 * side with fewer rows is held in registers, the other passes by. */
INLINE void
tile_step(int dtype, int w_count, int x_count, const char *const *weight, int64_t offset,
          const panel_t *panel, vec sums[GROUP][MAX_W])
{
    UNROLL
    for (int part = 0; part < PARTS; part++) {
        const panel_t *x_part = panel + part * PANEL_WIDTH;
        pvec held[MAX_W];
        if (w_count <= x_count) {
            UNROLL
            for (int j = 0; j < w_count; j++) {
                held[j] = load_any(dtype, weight[j] + offset, part);
            }
            UNROLL
            for (int i = 0; i < x_count; i++) {
                pvec x = load_panel(x_part + i * STEP);
                UNROLL
                for (int j = 0; j < w_count; j++) {
                    sums[i][j] = multiply_add(sums[i][j], held[j], x);
                }
            }
        }
        else {
            UNROLL
            for (int i = 0; i < x_count; i++) {
                held[i] = load_panel(x_part + i * STEP);
            }
            UNROLL
            for (int j = 0; j < w_count; j++) {
                pvec w = load_any(dtype, weight[j] + offset, part);
                UNROLL
                for (int i = 0; i < x_count; i++) {
                    sums[i][j] = multiply_add(sums[i][j], w, held[i]);
                }
            }
        }
    }
}

INLINE void
tile(int dtype, int w_count, int x_count, const tile_work *work)
{
    const int64_t size = (int64_t)element_size(dtype);
    const panel_t *panel = work->panel;
    float *lanes = work->lanes;
    vec sums[GROUP][MAX_W];
    const char *weight[MAX_W];
    UNROLL
    for (int j = 0; j < w_count; j++) {
        weight[j] = work->weight[j];
        UNROLL
        for (int i = 0; i < x_count; i++) {
            sums[i][j] = work->resume ? load_lanes(lanes + (i * COLUMNS + j) * LANES) : zero();
        }
    }
    /* What is fetched meanwhile: NEAR bytes ahead in the weight rows, whose ends the next ones' beginnings follow. */
    const int64_t wrapped = work->ahead + NEAR - work->steps * STEP * size;
    const int64_t turn = work->steps - NEAR / (STEP * size);
    int64_t offset = 0;
    for (int64_t s = 0; s < work->steps; s++) {
        if (dtype != EXPANDED) {
            const int64_t fetched = offset + (s < turn ? NEAR : wrapped);
            UNROLL
            for (int j = 0; j < w_count; j++) {
                __builtin_prefetch(weight[j] + fetched);
            }
        }
        tile_step(dtype, w_count, x_count, weight, offset, panel, sums);
        offset += STEP * size;
        panel += x_count * STEP;
    }
    UNROLL
    for (int i = 0; i < x_count; i++) {
        UNROLL
        for (int j = 0; j < w_count; j++) {
            store_lanes(lanes + (i * COLUMNS + j) * LANES, sums[i][j]);
        }
    }
}

/* ---- blocks ------------------------------------------------------------------------------------------ */

static const int tile_weights[GROUP + 1] = {0, TILE_W1, TILE_W2, TILE_W3, TILE_W4, TILE_W5, TILE_W6};

static int64_t
padded_length(int64_t in)
{
    return (in + STEP - 1) / STEP * STEP;
}

static int64_t
smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Rows of a chunk form groups: few rows up to GROUP each and nearly equal, many rows WIDE_GROUP each. */
static int64_t
group_count(int64_t rows)
{
    int64_t most = rows <= THIN_ROWS ? GROUP : WIDE_GROUP;
    return (rows + most - 1) / most;
}

/* First row of group g; the end of the last one for g = group_count. */
static int64_t
group_start(int64_t rows, int64_t g)
{
    return rows <= THIN_ROWS ? rows * g / group_count(rows) : smaller(g * WIDE_GROUP, rows);
}

/* Cuts of equal length, whole steps, at most `limit` elements each. */
static int64_t
cut_length(int64_t in, int64_t limit)
{
    int64_t steps = padded_length(in) / STEP, limit_steps = limit / STEP > 0 ? limit / STEP : 1;
    int64_t cuts = (steps + limit_steps - 1) / limit_steps;
    return cuts == 0 ? STEP : (steps + cuts - 1) / cuts * STEP;
}

/* Adds up the lanes of the block's rows and writes y. */
TARGET static void
finish(const mil_linear_block *block, int64_t column, int64_t columns, const float *lanes)
{
    for (int64_t i = 0; i < block->rows; i++) {
        float values[COLUMNS];
        for (int64_t c = 0; c < columns; c += 8) {
            reduce(lanes + (i * COLUMNS + c) * LANES, values + c);
        }
        mil_linear_store(block->product, block->first_row + block->row + i, column, columns, values);
    }
}

/* Points at weight rows column, column + 1, … from element k on; beyond the last row, at the last one. */
static void
point_at_weights(const mil_linear *product, int64_t size, int64_t column, int count, int64_t k,
                 const char **rows)
{
    for (int j = 0; j < count; j++) {
        int64_t c = smaller(column + j, product->out - 1);
        rows[j] = (const char *)product->weight + (c * product->in + k) * size;
    }
}

/* The last elements of weight rows, `tail` bytes that are no whole step, through a copy padded with zeros. */
static void
finish_tile(tile_function tile, const tile_work *work, int64_t x_count, int64_t tail, int64_t step_bytes)
{
    char padded[MAX_W][STEP * sizeof(float)];
    tile_work last = *work;
    for (int j = 0; j < tile_weights[x_count]; j++) {
        memset(padded[j], 0, sizeof padded[j]);
        memcpy(padded[j], work->weight[j] + work->steps * step_bytes, (size_t)tail);
        last.weight[j] = padded[j];
    }
    last.panel += work->steps * x_count * STEP;
    last.steps = 1;
    last.resume = true;
    tile(&last);
}

/* A block of at most COLUMNS columns and a thin chunk's rows, weights read in place; tiles[x] serves x
 * rows. Several groups take turns on a strip of weights in the caches. */
static void
thin_block(const mil_linear_block *block, int64_t size, const tile_function *tiles, int64_t column,
           int64_t columns)
{
    const mil_linear *product = block->product;
    const int64_t in = product->in, rows = block->rows, end = column + columns, padded = padded_length(in);
    const int64_t groups = group_count(rows), row_bytes = in * size;
    const int64_t strip = groups == 1 ? tile_weights[rows] : STRIP;
    const int64_t cut = cut_length(in, THIN_PANEL / rows);
    float *lanes = block->scratch;

    for (int64_t k = 0; k < in; k += cut) {
        const int64_t length = smaller(cut, in - k), next_k = k + cut < in ? k + cut : 0;
        const int64_t tail = length % STEP; /* the end of a row that is no whole step */
        tile_work work = {.steps = length / STEP, .resume = k != 0};
        for (int64_t first = column; first < end; first += strip) {
            const int64_t strip_end = smaller(first + strip, end);
            for (int64_t g = 0; g < groups; g++) {
                const int64_t row = group_start(rows, g), x_count = group_start(rows, g + 1) - row;
                const int64_t weights = tile_weights[x_count];
                work.panel = (const panel_t *)block->panel + row * padded + k * x_count;
                for (int64_t c = first; c < strip_end; c += weights) {
                    /* Next come the strip's next rows, all of it for the next group, the next strip, the next cut,
                     * or the next block. */
                    const bool within = c + weights < strip_end, again = !within && g + 1 < groups;
                    const bool cut_ends = !within && !again && strip_end == end;
                    const int64_t next = within                    ? c + weights
                                         : again                   ? first
                                         : cut_ends && next_k != 0 ? column
                                                                   : strip_end;
                    work.ahead = (next - c) * row_bytes + (cut_ends ? next_k - k : 0) * size;
                    point_at_weights(product, size, c, (int)weights, k, work.weight);
                    work.lanes = lanes + (row * COLUMNS + c - column) * LANES;
                    tiles[x_count](&work);
                    if (tail != 0) {
                        finish_tile(tiles[x_count], &work, x_count, tail * size, STEP * size);
                    }
                }
            }
        }
    }
    finish(block, column, columns, lanes);
}

/* Copies `columns` weight rows' cut into a panel, as x's is laid out; rows past the last are left alone. */
INLINE void
expand(int dtype, const mil_linear *product, int64_t column, int64_t columns, int64_t k, int64_t length,
       panel_t *to)
{
    const size_t size = element_size(dtype);
    for (int64_t c = 0; c < columns; c++) {
        const char *from = (const char *)product->weight + ((column + c) * product->in + k) * (int64_t)size;
        panel_t *row = to + c * WIDE_CUT;
        for (int64_t s = 0; s < length / STEP; s++, from += STEP * size, row += STEP) {
            UNROLL
            for (int part = 0; part < PARTS; part++) {
                store_panel(row + part * PANEL_WIDTH, load_any(dtype, from, part));
            }
        }
        if (length % STEP != 0) {
            char padded[STEP * sizeof(float)] = {0};
            memcpy(padded, from, (size_t)(length % STEP) * size);
            UNROLL
            for (int part = 0; part < PARTS; part++) {
                store_panel(row + part * PANEL_WIDTH, load_any(dtype, padded, part));
            }
        }
    }
}

typedef void (*expand_function)(const mil_linear *product, int64_t column, int64_t columns, int64_t k,
                                int64_t length, panel_t *to);

/* A block of at most WIDE_COLUMNS columns and any rows of the chunk. */
static void
wide_block(const mil_linear_block *block, expand_function expand_cut, const tile_function *tiles,
           int64_t column, int64_t columns)
{
    const mil_linear *product = block->product;
    const int64_t in = product->in, rows = block->rows, padded = padded_length(in);
    const int64_t cut = cut_length(in, WIDE_CUT);
    float *lanes = block->scratch;
    panel_t *weights = (panel_t *)((char *)block->scratch + LANES_BYTES); /* [COLUMNS, WIDE_CUT] */

    for (int64_t k = 0; k < in; k += cut) {
        const int64_t length = smaller(cut, in - k);
        expand_cut(product, column, columns, k, length, weights);
        tile_work work = {.steps = (length + STEP - 1) / STEP, .resume = k != 0};
        for (int64_t row = 0; row < rows; row += WIDE_GROUP) {
            const int64_t x_count = smaller(WIDE_GROUP, rows - row);
            work.panel = (const panel_t *)block->panel + (block->row + row) * padded + k * x_count;
            for (int64_t c = 0; c < columns; c += WIDE_W) {
                for (int64_t j = 0; j < WIDE_W; j++) {
                    work.weight[j] = (const char *)(weights + smaller(c + j, columns - 1) * WIDE_CUT);
                }
                work.lanes = lanes + (row * COLUMNS + c) * LANES;
                tiles[x_count](&work);
            }
        }
    }
    finish(block, column, columns, lanes);
}

static void
multiply(const mil_linear_block *block, int64_t size, expand_function expand_cut,
         const tile_function *thin_tiles, const tile_function *wide_tiles)
{
    const int64_t end = block->column + block->columns;
    if (block->chunk_rows <= THIN_ROWS) {
        for (int64_t column = block->column; column < end; column += COLUMNS) {
            thin_block(block, size, thin_tiles, column, smaller(COLUMNS, end - column));
        }
        return;
    }
    for (int64_t column = block->column; column < end; column += WIDE_COLUMNS) {
        wide_block(block, expand_cut, wide_tiles, column, smaller(WIDE_COLUMNS, end - column));
    }
}

/* ---- packing ----------------------------------------------------------------------------------------- */

static size_t
panel_bytes(int64_t rows, int64_t in)
{
    return (size_t)rows * (size_t)padded_length(in) * sizeof(panel_t);
}

INLINE void
pack_step(int dtype, const float *x, panel_t *to)
{
    float values[STEP];
    memcpy(values, x, sizeof values);
    round_step((mil_dtype)dtype, values);
    for (int i = 0; i < STEP; i++) {
        to[i] = to_panel(values[panel_source((mil_dtype)dtype, i)]);
    }
}

/* Packs group g of a chunk of `rows` rows. */
INLINE void
pack(int dtype, int64_t rows, int64_t g, int64_t in, const float *x, int64_t x_stride, void *panel)
{
    const int64_t row = group_start(rows, g), x_count = group_start(rows, g + 1) - row;
    panel_t *group = (panel_t *)panel + row * padded_length(in);
    for (int64_t i = 0; i < x_count; i++) {
        const float *from = x + (row + i) * x_stride;
        panel_t *to = group + i * STEP;
        int64_t k = 0;
        for (; k + STEP <= in; k += STEP) {
            pack_step(dtype, from + k, to + k * x_count);
        }
        if (k < in) {
            float padded[STEP] = {0};
            memcpy(padded, from + k, (size_t)(in - k) * sizeof(float));
            pack_step(dtype, padded, to + k * x_count);
        }
    }
}

/* ---- one kernel a dtype ------------------------------------------------------------------------------ */

#define DEFINE_TILE(name, dtype, w_count, x_count) \
    TARGET static void name(const tile_work *work) \
    {                                              \
        tile(dtype, w_count, x_count, work);       \
    }

DEFINE_TILE(wide_tile_1, EXPANDED, WIDE_W, 1)
DEFINE_TILE(wide_tile_2, EXPANDED, WIDE_W, 2)
DEFINE_TILE(wide_tile_3, EXPANDED, WIDE_W, 3)
DEFINE_TILE(wide_tile_4, EXPANDED, WIDE_W, 4)
static const tile_function wide_tiles[WIDE_GROUP + 1] = {NULL, wide_tile_1, wide_tile_2, wide_tile_3,
                                                         wide_tile_4};

#define DEFINE_KERNEL(name, dtype)                                                                          \
    DEFINE_TILE(name##_tile_1, dtype, TILE_W1, 1)                                                           \
    DEFINE_TILE(name##_tile_2, dtype, TILE_W2, 2)                                                           \
    DEFINE_TILE(name##_tile_3, dtype, TILE_W3, 3)                                                           \
    DEFINE_TILE(name##_tile_4, dtype, TILE_W4, 4)                                                           \
    DEFINE_TILE(name##_tile_5, dtype, TILE_W5, 5)                                                           \
    DEFINE_TILE(name##_tile_6, dtype, TILE_W6, 6)                                                           \
    static const tile_function name##_tiles[GROUP + 1] = {                                                  \
        NULL, name##_tile_1, name##_tile_2, name##_tile_3, name##_tile_4, name##_tile_5, name##_tile_6};    \
    TARGET static void name##_expand(const mil_linear *product, int64_t column, int64_t columns, int64_t k, \
                                     int64_t length, panel_t *to)                                           \
    {                                                                                                       \
        expand(dtype, product, column, columns, k, length, to);                                             \
    }                                                                                                       \
    TARGET static void name##_pack(int64_t rows, int64_t g, int64_t in, const float *x, int64_t x_stride,   \
                                   void *panel)                                                             \
    {                                                                                                       \
        pack(dtype, rows, g, in, x, x_stride, panel);                                                       \
    }                                                                                                       \
    static void name##_multiply(const mil_linear_block *block)                                              \
    {                                                                                                       \
        multiply(block, (int64_t)element_size(dtype), name##_expand, name##_tiles, wide_tiles);             \
    }                                                                                                       \
    static const mil_linear_kernel name##_kernel = {                                                        \
        .panel_bytes = panel_bytes,                                                                         \
        .group_count = group_count,                                                                         \
        .pack = name##_pack,                                                                                \
        .scratch_bytes = LANES_BYTES + WIDE_COLUMNS * WIDE_CUT * sizeof(panel_t),                           \
        .multiply = name##_multiply,                                                                        \
    };
