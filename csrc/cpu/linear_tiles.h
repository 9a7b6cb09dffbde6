/* The vector kernels of matrix products, written once and included by linear_<level>.c for each processor
 * level.
 *
 * Computed: y[r, c] = sum_k x[r, k] w[c, k]. Both rows are contiguous along k, so vectors run along k: an
 * output owns one accumulator of LANES partial sums. Lane l adds the products at panel positions l,
 * l + LANES, l + 2 LANES, … in that order by fused multiply-adds, and `reduce` adds the lanes in one fixed
 * tree at the end. That is the order for one row and for a thousand, hence the same bits. Weights stay in
 * the plain [out, in] layout of the file: nothing is repacked at load, a mapped file is used as it is.
 *
 * Panel.  x is rounded to the weights' dtype.  A vector of 16-bit weights holds pairs; a shift and a mask
 * turn it into its even and its odd elements as float32, and x is expanded likewise, once a call:
 *
 *     memory  w0 w1 w2 w3 w4 w5 w6 w7 …    expanded  w0 w2 w4 w6 … | w1 w3 w5 w7 …      (one step)
 *
 * The rows that share a tile (a group) stand side by side, [steps, rows of the group, STEP], so that a
 * tile walks through x with one pointer and no two rows compete for the same set of the cache.
 *
 * Where instructions do not bind (AVX-512), x of thin products stays as the weights are stored and is widened
 * as they are wherever it is read: it comes out of L2 while weights come out of memory, and every line of
 * either holds one of the few buffers for lines on their way to L1. With half as many lines, asked for X_NEAR
 * steps ahead, five rows are 8 to 14 % faster.
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
 * Some processors read one stream of ascending addresses a thread far faster than several (features.h: AMD's). There
 * a tile asks for the next tile's rows, one after another, into L2: every line where one row of x leaves nearly all
 * time to reading, every second one where more rows multiply meanwhile, since they drop what is asked for faster than
 * memory gives it. ROW_BY_ROW and more rows of x in one group, as many as multiply fast enough to be waited for, meet
 * one weight row after another, read from memory in that very order, while a shorter cut of them rests in L1.
 *
 * Wide products are bound by multiply-adds: WIDE_COLUMNS weight rows of a k cut are expanded once into a
 * panel of their own (L1) and meet all rows of the chunk, which stream through from L2 in tiles of
 * WIDE_GROUP rows.
 *
 * The includer defines, before inclusion:
 *   TARGET, INLINE                attribute of functions with vector code, or nothing; same, always inlined
 *   vec, LANES                    accumulator
 *   panel_t, pvec, PANEL_WIDTH    expanded element, vector of them, elements a vector
 *   PARTS                         such vectors a step; STEP = PARTS * PANEL_WIDTH elements of k
 *   TILE_W1 … TILE_W6, WIDE_W     weight rows of a tile with 1 … 6 rows of x, and of wide tiles (divisor of
 *                                 WIDE_COLUMNS)
 *   ROW_BY_ROW                    fewest rows of x that take weight rows one by one where memory is read in order
 *   THIN_X(dtype)                 how x is kept for thin products: dtype, as the weights are stored, or EXPANDED
 *   zero(), load_lanes(p), store_lanes(p, v), load_panel(p), store_panel(p, v), multiply_add(sum, w, x)
 *   load_weight(dtype, p, part)   expands part of the step of stored weights at p
 *   reduce(lanes, values)         sums of 8 accumulators
 */
#include <string.h>

#include "cpu/features.h"
#include "cpu/linear.h"

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

enum {
    STEP = PARTS * PANEL_WIDTH,
    COLUMNS = 40,      /* most columns of a thin block */
    THIN_ROWS = 16,    /* most rows of a thin product */
    GROUP = 6,         /* most rows of a tile */
    WIDE_GROUP = 4,    /* rows of a wide tile */
    STRIP = 12,        /* fewest weight rows that several groups share */
    MAX_W = 8,         /* most weight rows of a tile */
    MAX_SUMS = 32,     /* most sums of a tile, a multiple of 8 */
    WIDE_COLUMNS = 12, /* of a wide block; a multiple of WIDE_W */
    NEAR = 384,        /* bytes by which weights are prefetched, whole steps */
    X_NEAR = 3,        /* steps by which x is, where it is stored as weights are */
    FAR = 16384,       /* bytes by which weights are, at least, row by row */
    LINE = 64,         /* bytes that are fetched at once */
    LANES_BYTES = MIL_LINEAR_CHUNK * WIDE_COLUMNS * LANES * sizeof(float), /* more than THIN_ROWS * COLUMNS */
    /* A cut of k: of 512 KiB of L2 a thin product's rows of x take 160, of 32 KiB of L1 a wide block's weights
     * 18. */
    THIN_PANEL = 163840,               /* bytes */
    ROW_PANEL = 26624,                 /* bytes: row by row, of 32 KiB of L1 */
    WIDE_CUT = 1536 / sizeof(panel_t), /* elements */
};

/* Weights and x as the tiles read them: as stored, or expanded, which the fourth value stands for. */
enum { EXPANDED = 3 };

INLINE pvec
load_any(int dtype, const char *from, int part)
{
    return dtype == EXPANDED ? load_panel((const panel_t *)(const void *)from + part * PANEL_WIDTH)
                             : load_weight((mil_dtype)dtype, from, part);
}

static inline int64_t
element_size(int dtype)
{
    return (int64_t)(dtype == EXPANDED ? sizeof(panel_t) : mil_dtype_size((mil_dtype)dtype));
}

/* ---- tiles ------------------------------------------------------------------------------------------- */

/* What a tile works on: whole steps of one cut of k. */
typedef struct tile_work {
    const char *weight[MAX_W]; /* start of each weight row's cut; may repeat a row at the edge */
    int64_t row_bytes;         /* of a whole weight row */
    int64_t ahead;     /* bytes from there to the rows that are fetched meanwhile, those that come next */
    const char *panel; /* x's cut: [steps, x rows, STEP] */
    int64_t steps;
    float *lanes; /* [x rows, weight rows, LANES]: accumulators */
    bool resume;  /* go on from `lanes`; else from zero */
} tile_work;

typedef void (*tile_function)(const tile_work *work);

/* One step of k for w_count weight rows and x_count rows; the counts are constants after inlining. The
 * side with fewer rows is held in registers, the other passes by. */
INLINE void
tile_step(int dtype, int x_dtype, int w_count, int x_count, const char *const *weight, int64_t offset,
          const char *panel, vec sums[GROUP][MAX_W])
{
    const int64_t x_bytes = STEP * element_size(x_dtype);
    UNROLL
    for (int part = 0; part < PARTS; part++) {
        pvec held[MAX_W];
        if (w_count <= x_count) {
            UNROLL
            for (int j = 0; j < w_count; j++) {
                held[j] = load_any(dtype, weight[j] + offset, part);
            }
            UNROLL
            for (int i = 0; i < x_count; i++) {
                pvec x = load_any(x_dtype, panel + i * x_bytes, part);
                UNROLL
                for (int j = 0; j < w_count; j++) {
                    sums[i][j] = multiply_add(sums[i][j], held[j], x);
                }
            }
        }
        else {
            UNROLL
            for (int i = 0; i < x_count; i++) {
                held[i] = load_any(x_dtype, panel + i * x_bytes, part);
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

/* The accumulators of `count` weight rows from `first` on, of a tile of w_count. */
INLINE void
load_sums(const tile_work *work, int w_count, int first, int count, int x_count, vec sums[GROUP][MAX_W])
{
    UNROLL
    for (int j = 0; j < count; j++) {
        UNROLL
        for (int i = 0; i < x_count; i++) {
            sums[i][j] = work->resume ? load_lanes(work->lanes + (i * w_count + first + j) * LANES) : zero();
        }
    }
}

INLINE void
store_sums(const tile_work *work, int w_count, int first, int count, int x_count, vec sums[GROUP][MAX_W])
{
    UNROLL
    for (int i = 0; i < x_count; i++) {
        UNROLL
        for (int j = 0; j < count; j++) {
            store_lanes(work->lanes + (i * w_count + first + j) * LANES, sums[i][j]);
        }
    }
}

/* Weight rows side by side. What is fetched meanwhile lies NEAR bytes ahead in all of them, where the next rows'
 * beginnings follow these rows' ends; or, in order, it is the next rows one after another. */
INLINE void
tile(int dtype, int x_dtype, int w_count, int x_count, bool in_order, const tile_work *work)
{
    const int64_t size = element_size(dtype), x_step = x_count * STEP * element_size(x_dtype);
    const int64_t wrapped = work->ahead + NEAR - work->steps * STEP * size;
    const int64_t turn = work->steps - NEAR / (STEP * size);
    /* In order: of the next rows, what a step fetches, and the steps that fetch one of them. */
    const int64_t bytes = w_count * STEP * size, apart = x_count == 1 ? LINE : 2 * LINE;
    const int64_t share = in_order ? (work->steps + w_count - 1) / w_count : work->steps;
    const char *panel = work->panel, *next_row = work->weight[0] + work->ahead;
    const char *weight[MAX_W]; /* in registers */
    vec sums[GROUP][MAX_W];
    UNROLL
    for (int j = 0; j < w_count; j++) {
        weight[j] = work->weight[j];
    }
    load_sums(work, w_count, 0, w_count, x_count, sums);
    int64_t offset = 0;
    for (int64_t s = 0; s < work->steps; next_row += work->row_bytes) {
        const char *next = next_row;
        for (const int64_t end = s + share < work->steps ? s + share : work->steps; s < end; s++) {
            if (in_order) {
                UNROLL
                for (int64_t b = 0; b < bytes; b += apart) {
                    __builtin_prefetch(next + b, 0, 2); /* into L2 */
                }
                next += bytes;
            }
            if (!in_order && dtype != EXPANDED) {
                const int64_t fetched = offset + (s < turn ? NEAR : wrapped);
                UNROLL
                for (int j = 0; j < w_count; j++) {
                    __builtin_prefetch(weight[j] + fetched);
                }
            }
            if (!in_order && x_dtype != EXPANDED) {
                UNROLL
                for (int64_t b = 0; b < x_step; b += LINE) {
                    __builtin_prefetch(panel + X_NEAR * x_step + b);
                }
            }
            tile_step(dtype, x_dtype, w_count, x_count, weight, offset, panel, sums);
            offset += STEP * size;
            panel += x_step;
        }
    }
    store_sums(work, w_count, 0, w_count, x_count, sums);
}

INLINE void
tile_beside(int dtype, int x_dtype, int w_count, int x_count, const tile_work *work)
{
    tile(dtype, x_dtype, w_count, x_count, false, work);
}

INLINE void
tile_in_order(int dtype, int x_dtype, int w_count, int x_count, const tile_work *work)
{
    tile(dtype, x_dtype, w_count, x_count, true, work);
}

/* One weight row after another, a line of it a step or less; lines far ahead in memory's order are fetched meanwhile. */
INLINE void
tile_by_rows(int dtype, int x_dtype, int w_count, int x_count, const tile_work *work)
{
    const int64_t step = STEP * element_size(dtype), x_step = x_count * STEP * element_size(x_dtype);
    for (int j = 0; j < w_count; j++) {
        const char *weight = work->weight[j], *panel = work->panel;
        vec sums[GROUP][MAX_W];
        load_sums(work, w_count, j, 1, x_count, sums);
        for (int64_t s = 0; s < work->steps; s++) {
            __builtin_prefetch(weight + work->ahead, 0, 2); /* into L2 */
            tile_step(dtype, x_dtype, 1, x_count, &weight, 0, panel, sums);
            weight += step;
            panel += x_step;
        }
        store_sums(work, w_count, j, 1, x_count, sums);
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

/* Adds up the lanes of a tile of `weights` weight rows and writes y, at rows of the block and at columns before
 * `end`. At once, so that the weights of the next tile, which have been asked for, arrive meanwhile. */
TARGET static void
finish(const mil_linear_block *block, int64_t row, int64_t x_count, int64_t column, int64_t weights,
       int64_t end, const float *lanes)
{
    float values[MAX_SUMS];
    for (int64_t i = 0; i < x_count * weights; i += 8) {
        reduce(lanes + i * LANES, values + i);
    }
    for (int64_t i = 0; i < x_count; i++) {
        mil_linear_store(block->product, block->first_row + block->row + row + i, column,
                         smaller(weights, end - column), values + i * weights);
    }
}

/* Points at weight rows column, column + 1, … before `end` from element k on, and then at the last one again. */
static void
point_at_weights(const mil_linear *product, int64_t size, int64_t column, int64_t end, int count, int64_t k,
                 const char **rows)
{
    for (int j = 0; j < count; j++) {
        int64_t c = smaller(column + j, end - 1);
        rows[j] = (const char *)product->weight + (c * product->in + k) * size;
    }
}

/* The last elements of weight rows, `tail` bytes that are no whole step, through a copy padded with zeros. */
static void
finish_tile(tile_function tile, const tile_work *work, int64_t x_count, int64_t tail, int64_t step_bytes,
            int64_t x_step_bytes)
{
    char padded[MAX_W][STEP * sizeof(float)];
    tile_work last = *work;
    for (int j = 0; j < tile_weights[x_count]; j++) {
        memset(padded[j], 0, sizeof padded[j]);
        memcpy(padded[j], work->weight[j] + work->steps * step_bytes, (size_t)tail);
        last.weight[j] = padded[j];
    }
    last.panel += work->steps * x_count * x_step_bytes;
    last.steps = 1;
    last.resume = true;
    tile(&last);
}

/* Tiles of 1 … GROUP rows of x by the order in which they read weights. */
typedef struct thin_tiles {
    const tile_function *beside, *in_order, *by_rows;
} thin_tiles;

/* How a thin product of so many rows is divided. */
typedef struct thin_plan {
    const tile_function *tiles; /* tiles[x] serves x rows */
    int64_t groups;
    int64_t first_row[THIN_ROWS / GROUP + 2]; /* of each group, and the end of the last */
    /* Weight rows of which the groups take turns while they are in the caches: whole tiles of each. */
    int64_t strip;
    int64_t cut;   /* elements of k */
    int64_t ahead; /* tiles between the one that is multiplied and the one that is fetched */
} thin_plan;

static thin_plan
plan_thin(int64_t rows, int64_t in, int64_t size, int64_t x_size, const thin_tiles *tiles)
{
    const bool in_order = mil_cpu_reads_in_order(), one = group_count(rows) == 1;
    const bool by_rows = in_order && one && rows >= ROW_BY_ROW;
    thin_plan plan = {
        .tiles = by_rows    ? tiles->by_rows
                 : in_order ? tiles->in_order
                            : tiles->beside,
        .groups = group_count(rows),
        .strip = one ? 1 : STRIP,
        .cut = cut_length(in, (by_rows ? ROW_PANEL : THIN_PANEL) / (rows * x_size)),
        .ahead = 1,
    };
    for (int64_t g = 1; g <= plan.groups; g++) {
        plan.first_row[g] = group_start(rows, g);
    }
    /* Groups have one size or two, the last the larger. */
    const int64_t first = tile_weights[plan.first_row[1]];
    const int64_t last = tile_weights[rows - plan.first_row[plan.groups - 1]];
    while (plan.strip % first != 0 || plan.strip % last != 0) {
        plan.strip++;
    }
    if (by_rows) {
        const int64_t tile_bytes = first * smaller(plan.cut, in) * size;
        plan.ahead = (FAR + tile_bytes - 1) / tile_bytes;
    }
    return plan;
}

/* A block of at most COLUMNS columns, whole strips but for the product's end, and a thin chunk's rows, weights
 * read in place. */
static void
thin_block(const mil_linear_block *block, const thin_plan *plan, int64_t size, int64_t x_size, int64_t column,
           int64_t columns)
{
    const mil_linear *product = block->product;
    const int64_t in = product->in, end = column + columns, padded = padded_length(in), row_bytes = in * size;
    float *lanes = block->scratch;

    for (int64_t k = 0; k < in; k += plan->cut) {
        const int64_t length = smaller(plan->cut, in - k), next_k = k + plan->cut < in ? k + plan->cut : 0;
        const int64_t tail = length % STEP; /* the end of a row that is no whole step */
        tile_work work = {.row_bytes = row_bytes, .steps = length / STEP, .resume = k != 0};
        for (int64_t first = column; first < end; first += plan->strip) {
            const int64_t strip_end = smaller(first + plan->strip, end);
            for (int64_t g = 0; g < plan->groups; g++) {
                const int64_t row = plan->first_row[g], x_count = plan->first_row[g + 1] - row;
                const int64_t weights = tile_weights[x_count];
                work.panel = (const char *)block->panel + (row * padded + k * x_count) * x_size;
                for (int64_t c = first; c < strip_end; c += weights) {
                    /* Next come the strip's next rows, all of it for the next group, the next strip, the next cut,
                     * or the next block. */
                    int64_t next = c + plan->ahead * weights, fetched_k = k;
                    if (next >= strip_end && g + 1 < plan->groups) {
                        next = first;
                    }
                    else if (next >= end && next_k != 0) {
                        next += column - end;
                        fetched_k = next_k;
                    }
                    work.ahead = (next - c) * row_bytes + (fetched_k - k) * size;
                    point_at_weights(product, size, c, end, (int)weights, k, work.weight);
                    work.lanes = lanes + (row * COLUMNS + (c - column) * x_count) * LANES;
                    plan->tiles[x_count](&work);
                    if (tail != 0) {
                        finish_tile(plan->tiles[x_count], &work, x_count, tail * size, STEP * size,
                                    STEP * x_size);
                    }
                    if (next_k == 0) {
                        finish(block, row, x_count, c, weights, end, work.lanes);
                    }
                }
            }
        }
    }
}

/* One step of one stored row, expanded. */
INLINE void
expand_step(int dtype, const char *from, panel_t *to)
{
    UNROLL
    for (int part = 0; part < PARTS; part++) {
        store_panel(to + part * PANEL_WIDTH, load_any(dtype, from, part));
    }
}

/* Copies `columns` weight rows' cut into a panel, as x's is laid out; rows past the last are left alone. */
INLINE void
expand(int dtype, const mil_linear *product, int64_t column, int64_t columns, int64_t k, int64_t length,
       panel_t *to)
{
    const int64_t size = element_size(dtype);
    for (int64_t c = 0; c < columns; c++) {
        const char *from = (const char *)product->weight + ((column + c) * product->in + k) * size;
        panel_t *row = to + c * WIDE_CUT;
        for (int64_t s = 0; s < length / STEP; s++, from += STEP * size, row += STEP) {
            expand_step(dtype, from, row);
        }
        if (length % STEP != 0) {
            char padded[STEP * sizeof(float)] = {0};
            memcpy(padded, from, (size_t)(length % STEP * size));
            expand_step(dtype, padded, row);
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
    panel_t *weights = (panel_t *)((char *)block->scratch + LANES_BYTES); /* [WIDE_COLUMNS, WIDE_CUT] */

    for (int64_t k = 0; k < in; k += cut) {
        const int64_t length = smaller(cut, in - k);
        expand_cut(product, column, columns, k, length, weights);
        tile_work work = {.steps = (length + STEP - 1) / STEP, .resume = k != 0};
        for (int64_t row = 0; row < rows; row += WIDE_GROUP) {
            const int64_t x_count = smaller(WIDE_GROUP, rows - row);
            work.panel =
                (const char *)((const panel_t *)block->panel + (block->row + row) * padded + k * x_count);
            for (int64_t c = 0; c < columns; c += WIDE_W) {
                for (int64_t j = 0; j < WIDE_W; j++) {
                    work.weight[j] = (const char *)(weights + smaller(c + j, columns - 1) * WIDE_CUT);
                }
                work.lanes = lanes + (row * WIDE_COLUMNS + c * x_count) * LANES;
                tiles[x_count](&work);
                if (k + cut >= in) {
                    finish(block, row, x_count, column + c, WIDE_W, column + columns, work.lanes);
                }
            }
        }
    }
}

static void
multiply(const mil_linear_block *block, int64_t size, int64_t x_size, expand_function expand_cut,
         const thin_tiles *thin_tiles, const tile_function *wide_tiles)
{
    const int64_t end = block->column + block->columns;
    if (block->chunk_rows <= THIN_ROWS) {
        const thin_plan plan = plan_thin(block->rows, block->product->in, size, x_size, thin_tiles);
        const int64_t most = COLUMNS / plan.strip * plan.strip;
        for (int64_t column = block->column; column < end; column += most) {
            thin_block(block, &plan, size, x_size, column, smaller(most, end - column));
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

/* Rounds STEP values to dtype. */
INLINE void
round_step(int dtype, const float *values, void *to)
{
    if (dtype == MIL_F32) {
        memcpy(to, values, STEP * sizeof(float));
        return;
    }
    uint16_t *halves = to;
    for (int i = 0; i < STEP; i++) {
        halves[i] = dtype == MIL_BF16 ? mil_float_to_bf16(values[i]) : mil_float_to_f16(values[i]);
    }
}

/* Packs group g of a chunk of `rows` rows, as the weights are stored or expanded. */
INLINE void
pack(int dtype, int64_t rows, int64_t g, int64_t in, const float *x, int64_t x_stride, void *panel)
{
    const bool expanded = rows > THIN_ROWS || THIN_X(dtype) == EXPANDED;
    const int64_t size = element_size(expanded ? EXPANDED : dtype);
    const int64_t row = group_start(rows, g), x_count = group_start(rows, g + 1) - row;
    char *group = (char *)panel + row * padded_length(in) * size;
    for (int64_t i = 0; i < x_count; i++) {
        const float *from = x + (row + i) * x_stride;
        for (int64_t k = 0; k < in; k += STEP) {
            char *to = group + (k * x_count + i * STEP) * size;
            const float *step = from + k;
            float padded[STEP];
            uint16_t rounded[2 * STEP]; /* STEP of any dtype */
            if (k + STEP > in) {
                memset(padded, 0, sizeof padded);
                memcpy(padded, step, (size_t)(in - k) * sizeof(float));
                step = padded;
            }
            round_step(dtype, step, expanded ? (void *)rounded : to);
            if (expanded) {
                expand_step(dtype, (const char *)rounded, (panel_t *)(void *)to);
            }
        }
    }
}

/* ---- one kernel a dtype ------------------------------------------------------------------------------ */

#define DEFINE_TILE(name, body, dtype, x_dtype, w_count, x_count) \
    TARGET static void name(const tile_work *work)                \
    {                                                             \
        body(dtype, x_dtype, w_count, x_count, work);             \
    }

DEFINE_TILE(wide_tile_1, tile_beside, EXPANDED, EXPANDED, WIDE_W, 1)
DEFINE_TILE(wide_tile_2, tile_beside, EXPANDED, EXPANDED, WIDE_W, 2)
DEFINE_TILE(wide_tile_3, tile_beside, EXPANDED, EXPANDED, WIDE_W, 3)
DEFINE_TILE(wide_tile_4, tile_beside, EXPANDED, EXPANDED, WIDE_W, 4)
static const tile_function wide_tiles[WIDE_GROUP + 1] = {NULL, wide_tile_1, wide_tile_2, wide_tile_3,
                                                         wide_tile_4};

#define DEFINE_THIN_TILES(name, body, dtype)                                              \
    DEFINE_TILE(name##_1, body, dtype, THIN_X(dtype), TILE_W1, 1)                         \
    DEFINE_TILE(name##_2, body, dtype, THIN_X(dtype), TILE_W2, 2)                         \
    DEFINE_TILE(name##_3, body, dtype, THIN_X(dtype), TILE_W3, 3)                         \
    DEFINE_TILE(name##_4, body, dtype, THIN_X(dtype), TILE_W4, 4)                         \
    DEFINE_TILE(name##_5, body, dtype, THIN_X(dtype), TILE_W5, 5)                         \
    DEFINE_TILE(name##_6, body, dtype, THIN_X(dtype), TILE_W6, 6)                         \
    static const tile_function name[GROUP + 1] = {NULL,     name##_1, name##_2, name##_3, \
                                                  name##_4, name##_5, name##_6};

#define DEFINE_KERNEL(name, dtype)                                                                          \
    DEFINE_THIN_TILES(name##_beside, tile_beside, dtype)                                                    \
    DEFINE_THIN_TILES(name##_in_order, tile_in_order, dtype)                                                \
    DEFINE_THIN_TILES(name##_by_rows, tile_by_rows, dtype)                                                  \
    static const thin_tiles name##_tiles = {name##_beside, name##_in_order, name##_by_rows};                \
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
        multiply(block, element_size(dtype), element_size(THIN_X(dtype)), name##_expand, &name##_tiles,     \
                 wide_tiles);                                                                               \
    }                                                                                                       \
    static const mil_linear_kernel name##_kernel = {                                                        \
        .panel_bytes = panel_bytes,                                                                         \
        .group_count = group_count,                                                                         \
        .pack = name##_pack,                                                                                \
        .scratch_bytes = LANES_BYTES + WIDE_COLUMNS * WIDE_CUT * sizeof(panel_t),                           \
        .multiply = name##_multiply,                                                                        \
    };
