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
 *   THIN_X(dtype)                 how x is kept for thin products: dtype, as the weights are stored, or EXPANDED
 *   zero(), load_lanes(p), store_lanes(p, v), load_panel(p), store_panel(p, v), multiply_add(sum, w, x)
 *   load_weight(dtype, p, part)   expands part of the step of stored weights at p
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
    LANES_BYTES = MIL_LINEAR_CHUNK * WIDE_COLUMNS * LANES * sizeof(float), /* more than THIN_ROWS * COLUMNS */
    /* A cut of k: of 512 KiB of L2 a thin product's rows of x take 160, of 32 KiB of L1 a wide block's weights
     * 18. */
    THIN_PANEL = 163840,               /* bytes */
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
    int64_t ahead;             /* bytes from there to the rows that come next */
    const char *panel;         /* x's cut: [steps, x rows, STEP] */
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

INLINE void
tile(int dtype, int x_dtype, int w_count, int x_count, const tile_work *work)
{
    const int64_t size = element_size(dtype), x_size = element_size(x_dtype);
    const char *panel = work->panel;
    float *lanes = work->lanes;
    vec sums[GROUP][MAX_W];
    const char *weight[MAX_W];
    UNROLL
    for (int j = 0; j < w_count; j++) {
        weight[j] = work->weight[j];
        UNROLL
        for (int i = 0; i < x_count; i++) {
            sums[i][j] = work->resume ? load_lanes(lanes + (i * w_count + j) * LANES) : zero();
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
        if (x_dtype != EXPANDED) {
            UNROLL
            for (int64_t b = 0; b < x_count * STEP * x_size; b += 64) {
                __builtin_prefetch(panel + X_NEAR * x_count * STEP * x_size + b);
            }
        }
        tile_step(dtype, x_dtype, w_count, x_count, weight, offset, panel, sums);
        offset += STEP * size;
        panel += x_count * STEP * x_size;
    }
    UNROLL
    for (int i = 0; i < x_count; i++) {
        UNROLL
        for (int j = 0; j < w_count; j++) {
            store_lanes(lanes + (i * w_count + j) * LANES, sums[i][j]);
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

/* How a thin product of so many rows is divided. */
typedef struct thin_plan {
    int64_t groups;
    int64_t first_row[THIN_ROWS / GROUP + 2]; /* of each group, and the end of the last */
    /* Weight rows of which the groups take turns while they are in the caches: whole tiles of each. */
    int64_t strip;
    int64_t cut; /* elements of k */
} thin_plan;

static thin_plan
plan_thin(int64_t rows, int64_t in, int64_t x_size)
{
    thin_plan plan = {.groups = group_count(rows), .cut = cut_length(in, THIN_PANEL / (rows * x_size))};
    plan.strip = plan.groups == 1 ? 1 : STRIP;
    for (int64_t g = 1; g <= plan.groups; g++) {
        plan.first_row[g] = group_start(rows, g);
    }
    /* Groups have one size or two, the last the larger. */
    const int64_t first = tile_weights[plan.first_row[1]];
    const int64_t last = tile_weights[rows - plan.first_row[plan.groups - 1]];
    while (plan.strip % first != 0 || plan.strip % last != 0) {
        plan.strip++;
    }
    return plan;
}

/* A block of at most COLUMNS columns, whole strips but for the product's end, and a thin chunk's rows, weights
 * read in place; tiles[x] serves x rows. */
static void
thin_block(const mil_linear_block *block, const thin_plan *plan, int64_t size, int64_t x_size,
           const tile_function *tiles, int64_t column, int64_t columns)
{
    const mil_linear *product = block->product;
    const int64_t in = product->in, end = column + columns, padded = padded_length(in), row_bytes = in * size;
    float *lanes = block->scratch;

    for (int64_t k = 0; k < in; k += plan->cut) {
        const int64_t length = smaller(plan->cut, in - k), next_k = k + plan->cut < in ? k + plan->cut : 0;
        const int64_t tail = length % STEP; /* the end of a row that is no whole step */
        tile_work work = {.steps = length / STEP, .resume = k != 0};
        for (int64_t first = column; first < end; first += plan->strip) {
            const int64_t strip_end = smaller(first + plan->strip, end);
            for (int64_t g = 0; g < plan->groups; g++) {
                const int64_t row = plan->first_row[g], x_count = plan->first_row[g + 1] - row;
                const int64_t weights = tile_weights[x_count];
                work.panel = (const char *)block->panel + (row * padded + k * x_count) * x_size;
                for (int64_t c = first; c < strip_end; c += weights) {
                    /* Next come the strip's next rows, all of it for the next group, the next strip, the next cut,
                     * or the next block. */
                    const bool within = c + weights < strip_end, again = !within && g + 1 < plan->groups;
                    const bool cut_ends = !within && !again && strip_end == end;
                    const int64_t next = within                    ? c + weights
                                         : again                   ? first
                                         : cut_ends && next_k != 0 ? column
                                                                   : strip_end;
                    work.ahead = (next - c) * row_bytes + (cut_ends ? next_k - k : 0) * size;
                    point_at_weights(product, size, c, end, (int)weights, k, work.weight);
                    work.lanes = lanes + (row * COLUMNS + (c - column) * x_count) * LANES;
                    tiles[x_count](&work);
                    if (tail != 0) {
                        finish_tile(tiles[x_count], &work, x_count, tail * size, STEP * size, STEP * x_size);
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
         const tile_function *thin_tiles, const tile_function *wide_tiles)
{
    const int64_t end = block->column + block->columns;
    if (block->chunk_rows <= THIN_ROWS) {
        const thin_plan plan = plan_thin(block->rows, block->product->in, x_size);
        const int64_t most = COLUMNS / plan.strip * plan.strip;
        for (int64_t column = block->column; column < end; column += most) {
            thin_block(block, &plan, size, x_size, thin_tiles, column, smaller(most, end - column));
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

#define DEFINE_TILE(name, dtype, x_dtype, w_count, x_count) \
    TARGET static void name(const tile_work *work)          \
    {                                                       \
        tile(dtype, x_dtype, w_count, x_count, work);       \
    }

DEFINE_TILE(wide_tile_1, EXPANDED, EXPANDED, WIDE_W, 1)
DEFINE_TILE(wide_tile_2, EXPANDED, EXPANDED, WIDE_W, 2)
DEFINE_TILE(wide_tile_3, EXPANDED, EXPANDED, WIDE_W, 3)
DEFINE_TILE(wide_tile_4, EXPANDED, EXPANDED, WIDE_W, 4)
static const tile_function wide_tiles[WIDE_GROUP + 1] = {NULL, wide_tile_1, wide_tile_2, wide_tile_3,
                                                         wide_tile_4};

#define DEFINE_KERNEL(name, dtype)                                                                          \
    DEFINE_TILE(name##_tile_1, dtype, THIN_X(dtype), TILE_W1, 1)                                            \
    DEFINE_TILE(name##_tile_2, dtype, THIN_X(dtype), TILE_W2, 2)                                            \
    DEFINE_TILE(name##_tile_3, dtype, THIN_X(dtype), TILE_W3, 3)                                            \
    DEFINE_TILE(name##_tile_4, dtype, THIN_X(dtype), TILE_W4, 4)                                            \
    DEFINE_TILE(name##_tile_5, dtype, THIN_X(dtype), TILE_W5, 5)                                            \
    DEFINE_TILE(name##_tile_6, dtype, THIN_X(dtype), TILE_W6, 6)                                            \
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
        multiply(block, element_size(dtype), element_size(THIN_X(dtype)), name##_expand, name##_tiles,      \
                 wide_tiles);                                                                               \
    }                                                                                                       \
    static const mil_linear_kernel name##_kernel = {                                                        \
        .panel_bytes = panel_bytes,                                                                         \
        .group_count = group_count,                                                                         \
        .pack = name##_pack,                                                                                \
        .scratch_bytes = LANES_BYTES + WIDE_COLUMNS * WIDE_CUT * sizeof(panel_t),                           \
        .multiply = name##_multiply,                                                                        \
    };
