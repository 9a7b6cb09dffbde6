/* Causal softmax attention over packed sequences, with grouped heads and sliding windows; forward and
 * backward.
 *
 *   y[p, h] = sum_j P[j] v[j, g],   P[j] = exp(scale q[p, h] k[j, g] - L),   L = log sum_j exp(scale q k[j])
 *   over keys max(0, p - window + 1) <= j <= p of the same sequence; g = h * kv_heads / heads
 *
 * Never more than a tile of scores exists (FlashAttention, Dao et al. 2022).  A work item is a tile of query
 * positions, with all query heads of one key head, so that a block of keys and values is read, widened
 * from 16 bits, and transposed once for the whole group:
 *
 *              64 keys        64 keys        64 keys
 *            +--------------+--------------+--------------+
 *   rows of  |   K^T block  |              |              |   S = Q K^T  ->  P  ->  acc = acc * rescale + P V
 *   a tile   |   V block    |              |      diagonal|   with a running maximum and sum a row
 *            +--------------+--------------+--------------+
 *   split:   |<------- SPLIT keys: own maximum, sum, acc ------->|  merged in order
 *
 * Order.  Blocks begin at multiples of BLOCK keys and splits at multiples of SPLIT keys of the sequence,
 * wherever the query rows begin.  Within a block the order is that of tile_product.h for S and P V, and
 * LANES_OF_SUM lanes for the sum of P.  Keys that a row may not see take part as exact zeros.  So a row's
 * bits depend on its position and the keys only: prefill, decoding one token, verifying a window and any
 * batch agree, and a long context can be split between threads when there are fewer tiles than threads
 * (flash decoding).
 *
 * Bytes: each key and value is read once for all heads of its group.  Prefill multiplies ROWS_A_TILE rows
 * by a block whose transposition is amortised over them.  Decoding and verification are bound by memory:
 * there a tile takes several key heads, block by block, because their rows are neighbours in the cache.
 *
 * Backward recomputes P from the saved L = log_sum_exp (5 products instead of a [length, length] array):
 *   D = rowsum(grad_y y),  dP = grad_y V^T,  dS = P (dP - D)
 *   grad_q = scale dS K,   grad_k = dS^T (scale q),   grad_v = P^T grad_y
 * One thread owns one (sequence, key head) and walks its heads, query tiles and key blocks in that order, so
 * sums have one order and no gradient is shared.  Where there are fewer of those than threads, the
 * query tiles and then the key blocks are shared out instead, in two passes that add in the same
 * order at 7 products: the same bits again.
 */
#include "cpu/cpu.h"

#include <float.h>
#include <math.h>
#include <omp.h>
#include <string.h>

#include "cpu/tile.h"
#include "cpu/vector.h"

enum {
    BLOCK = MIL_TILE_KEYS,
    SPLIT = 512,             /* keys a split, a multiple of BLOCK */
    ROWS_A_TILE = 96,        /* most query rows (positions x heads of a group) a forward tile, roughly */
    POSITIONS = 48,          /* most query positions of a tile: more waste scores beyond the diagonal */
    ROWS_OF_ALL_HEADS = 256, /* most query rows of a tile that takes several key heads */
    LANES_OF_SUM = 16,
    GRAIN = 1 << 17, /* multiplications that are worth waking the team for */
};

/* A maximum before any key; finite, so that exp(maximum - maximum) is 1 and not NaN. */
#define NO_SCORE (-FLT_MAX)

/* ---- one softmax row ---------------------------------------------------------------------------------- */

/* Running softmax of one query row. */
typedef struct softmax_row {
    float maximum, sum;
} softmax_row;

MIL_INLINE void
fill_unseen(float *row, int first, int last, float value)
{
    for (int j = 0; j < first; j++) {
        row[j] = value;
    }
    for (int j = last; j < BLOCK; j++) {
        row[j] = value;
    }
}

/* Turns the scores [BLOCK] of which only first .. last may be seen into exp(score - maximum), zeros
 * elsewhere, takes them into `state` and returns the factor by which earlier sums shrink. */
MIL_VECTORISE static float
softmax_block(float *scores, int first, int last, softmax_row *state)
{
    float maximum = state->maximum, lanes[LANES_OF_SUM] = {0};
    fill_unseen(scores, first, last, -INFINITY);
#pragma omp simd reduction(max : maximum)
    for (int j = 0; j < BLOCK; j++) {
        maximum = scores[j] > maximum ? scores[j] : maximum;
    }
#pragma omp simd
    for (int j = 0; j < BLOCK; j++) {
        scores[j] = mil_expf(scores[j] - maximum);
    }
    for (int j = 0; j < BLOCK; j += LANES_OF_SUM) {
        for (int lane = 0; lane < LANES_OF_SUM; lane++) {
            lanes[lane] += scores[j + lane];
        }
    }
    float sum = 0, rescale = mil_expf(state->maximum - maximum);
    for (int lane = 0; lane < LANES_OF_SUM; lane++) {
        sum += lanes[lane];
    }
    state->sum = state->sum * rescale + sum;
    state->maximum = maximum;
    return rescale;
}

/* Adds the softmax of later keys to that of earlier ones. Either may be empty: its factor is 0. */
MIL_VECTORISE static void
merge_rows(int64_t width, softmax_row *to, float *to_sums, const softmax_row *from, const float *from_sums)
{
    float maximum = to->maximum > from->maximum ? to->maximum : from->maximum;
    float earlier = mil_expf(to->maximum - maximum), later = mil_expf(from->maximum - maximum);
    to->sum = to->sum * earlier + from->sum * later;
    to->maximum = maximum;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        to_sums[i] = to_sums[i] * earlier + from_sums[i] * later;
    }
}

MIL_VECTORISE static void
scale_row(int64_t width, float *row, float factor)
{
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        row[i] *= factor;
    }
}

/* ---- forward ------------------------------------------------------------------------------------------ */

/* A tile of query positions of one sequence with the heads of one key head, and the splits to walk. */
typedef struct tile {
    int64_t sequence, kv_head, kv_heads;
    int64_t first_row, positions;    /* rows of the packed arrays */
    int64_t first_position;          /* position of first_row in its sequence */
    int64_t first_split, last_split; /* one past */
    int64_t partial;                 /* which partial result it writes; -1: the result itself */
} tile;

/* A thread's arrays, or the partial results of one tile and split. */
typedef struct sums {
    softmax_row *state; /* [rows] */
    float *acc;         /* [rows, mil_tile_stride(head_dim)] */
} sums;

typedef struct workspace {
    float *q;      /* [rows, mil_tile_stride(head_dim)] queries times scale */
    float *scores; /* [rows, BLOCK] */
    float *k, *v;  /* [head_dim, mil_tile_stride(BLOCK)], [BLOCK, mil_tile_stride(head_dim)] */
    sums own, next;
} workspace;

typedef struct forward_pass {
    const mil_attention *a;
    int64_t group;                     /* query heads a key head */
    int64_t positions, kv_heads, rows; /* of a full tile */
    int64_t acc_stride;
    mil_tile_kernels kernels;
} forward_pass;

static int64_t
first_key(int64_t window, int64_t position)
{
    return window > 0 && position + 1 > window ? position + 1 - window : 0;
}

/* A key's place in the block that begins at `block_first`, 0 to BLOCK: 32 bits for the vectorised masks. */
static int
place_in_block(int64_t key, int64_t block_first)
{
    int64_t place = key - block_first;
    return place < 0 ? 0 : place > BLOCK ? BLOCK : (int)place;
}

static mil_status
push_sums(mil_arena *arena, const forward_pass *f, int64_t rows, sums *out)
{
    MIL_TRY(MIL_PUSH(arena, rows, softmax_row, &out->state));
    return MIL_PUSH(arena, rows * f->acc_stride, float, &out->acc);
}

static mil_status
push_workspace(mil_arena *arena, const forward_pass *f, workspace *out)
{
    int64_t head_dim = f->a->head_dim;
    MIL_TRY(MIL_PUSH(arena, f->rows * f->acc_stride, float, &out->q));
    MIL_TRY(MIL_PUSH(arena, f->rows * BLOCK, float, &out->scores));
    MIL_TRY(MIL_PUSH(arena, head_dim * mil_tile_stride(BLOCK), float, &out->k));
    MIL_TRY(MIL_PUSH(arena, BLOCK * f->acc_stride, float, &out->v));
    MIL_TRY(push_sums(arena, f, f->rows, &out->own));
    return push_sums(arena, f, f->rows, &out->next);
}

/* Keys (or values) of one key head, indexed by position. */
static mil_tile_source
get_source(const mil_attention *a, int64_t sequence, int64_t kv_head, bool values)
{
    if (a->caches != NULL) {
        const mil_kv_cache *cache = &a->caches[sequence];
        const char *data = values ? cache->v : cache->k;
        return (mil_tile_source){data + kv_head * a->head_dim * (int64_t)mil_dtype_size(cache->dtype),
                                 cache->dtype, a->kv_heads * a->head_dim};
    }
    const float *rows = (const float *)(values ? a->v : a->k) + a->rows.offsets[sequence] * a->kv_stride;
    return (mil_tile_source){(const char *)(rows + kv_head * a->head_dim), MIL_F32, a->kv_stride};
}

static int64_t
rows_of(const forward_pass *f, const tile *t)
{
    return t->kv_heads * t->positions * f->group;
}

/* One block of keys of one key head, for its rows of the tile: those from first_row on. */
static void
forward_block(const forward_pass *f, const tile *t, int64_t kv_head, int64_t block, workspace *w, sums *to)
{
    const mil_attention *a = f->a;
    int64_t first = block * BLOCK, rows = t->positions * f->group, first_row = (kv_head - t->kv_head) * rows;
    int64_t keys = t->first_position + t->positions - first;
    keys = keys < BLOCK ? keys : BLOCK;
    const float *q = w->q + first_row * f->acc_stride;
    float *acc = to->acc + first_row * f->acc_stride;

    f->kernels.pack_transposed(get_source(a, t->sequence, kv_head, false), first, keys, a->head_dim, w->k);
    f->kernels.pack_rows(get_source(a, t->sequence, kv_head, true), first, keys, a->head_dim, 1.0f, w->v);
    f->kernels.product(rows, mil_round_up(keys, MIL_TILE_STRIP), a->head_dim, q, f->acc_stride, 1, w->k,
                       mil_tile_stride(BLOCK), w->scores, BLOCK, false);
    for (int64_t row = 0; row < rows; row++) {
        int64_t position = t->first_position + row / f->group;
        int low = place_in_block(first_key(a->window, position), first),
            high = place_in_block(position + 1, first);
        float rescale = softmax_block(w->scores + row * BLOCK, low, high, &to->state[first_row + row]);
        if (rescale != 1.0f) {
            scale_row(f->acc_stride - MIL_TILE_STRIP, acc + row * f->acc_stride, rescale);
        }
    }
    f->kernels.product(rows, f->acc_stride - MIL_TILE_STRIP, keys, w->scores, BLOCK, 1, w->v, f->acc_stride,
                       acc, f->acc_stride, true);
}

static void
forward_split(const forward_pass *f, const tile *t, int64_t split, workspace *w, sums *to)
{
    int64_t rows = rows_of(f, t);
    for (int64_t row = 0; row < rows; row++) {
        to->state[row] = (softmax_row){NO_SCORE, 0};
    }
    memset(to->acc, 0, (size_t)(rows * f->acc_stride) * sizeof(float));
    int64_t per_split = SPLIT / BLOCK;
    int64_t first = first_key(f->a->window, t->first_position) / BLOCK;
    int64_t last = (t->first_position + t->positions - 1) / BLOCK + 1;
    first = first > split * per_split ? first : split * per_split;
    last = last < (split + 1) * per_split ? last : (split + 1) * per_split;
    for (int64_t block = first; block < last; block++) {
        for (int64_t kv_head = t->kv_head; kv_head < t->kv_head + t->kv_heads; kv_head++) {
            forward_block(f, t, kv_head, block, w, to);
        }
    }
}

static void
merge(const forward_pass *f, const tile *t, sums *to, const sums *from)
{
    int64_t stride = f->acc_stride;
    for (int64_t row = 0; row < rows_of(f, t); row++) {
        merge_rows(stride - MIL_TILE_STRIP, &to->state[row], to->acc + row * stride, &from->state[row],
                   from->acc + row * stride);
    }
}

/* y = acc / sum, log_sum_exp = maximum + log(sum). */
static void
write_result(const forward_pass *f, const tile *t, const sums *from)
{
    const mil_attention *a = f->a;
    for (int64_t row = 0; row < rows_of(f, t); row++) {
        int64_t packed = t->first_row + row / f->group % t->positions;
        int64_t head = (t->kv_head + row / (f->group * t->positions)) * f->group + row % f->group;
        const float *acc = from->acc + row * f->acc_stride;
        float *y = (float *)a->y + packed * a->y_stride + head * a->head_dim;
        float inverse = 1.0f / from->state[row].sum;
        for (int64_t i = 0; i < a->head_dim; i++) {
            y[i] = acc[i] * inverse;
        }
        if (a->log_sum_exp != NULL) {
            a->log_sum_exp[packed * a->heads + head] = from->state[row].maximum + logf(from->state[row].sum);
        }
    }
}

static void
forward_tile(const forward_pass *f, const tile *t, workspace *w, sums *partials)
{
    const mil_attention *a = f->a;
    for (int64_t i = 0; i < t->kv_heads * t->positions; i++) {
        const float *q = (const float *)a->q + (t->first_row + i % t->positions) * a->q_stride;
        mil_tile_source heads = {(const char *)q, MIL_F32, a->head_dim};
        f->kernels.pack_rows(heads, (t->kv_head + i / t->positions) * f->group, f->group, a->head_dim,
                             a->scale, w->q + i * f->group * f->acc_stride);
    }
    if (t->partial >= 0) {
        forward_split(f, t, t->first_split, w, &partials[t->partial]);
        return;
    }
    forward_split(f, t, t->first_split, w, &w->own);
    for (int64_t split = t->first_split + 1; split < t->last_split; split++) {
        forward_split(f, t, split, w, &w->next);
        merge(f, t, &w->own, &w->next);
    }
    write_result(f, t, &w->own);
}

static int64_t
count_tiles(const forward_pass *f)
{
    const mil_rows *rows = &f->a->rows;
    int64_t count = 0;
    for (int64_t s = 0; s < rows->sequences; s++) {
        count += (rows->offsets[s + 1] - rows->offsets[s] + f->positions - 1) / f->positions;
    }
    return count * (f->a->kv_heads / f->kv_heads);
}

/* Longest first within a sequence, so that threads that take tiles as they come end together. */
static void
list_tiles(const forward_pass *f, tile *tiles)
{
    const mil_attention *a = f->a;
    for (int64_t s = 0; s < a->rows.sequences; s++) {
        int64_t begin = a->rows.offsets[s], count = a->rows.offsets[s + 1] - begin;
        int64_t past = a->rows.past != NULL ? a->rows.past[s] : 0;
        for (int64_t first = (count - 1) / f->positions * f->positions; count > 0 && first >= 0;
             first -= f->positions) {
            for (int64_t kv_head = 0; kv_head < a->kv_heads; kv_head += f->kv_heads) {
                int64_t positions = count - first < f->positions ? count - first : f->positions;
                int64_t last_key = past + first + positions - 1;
                *tiles++ = (tile){s,
                                  kv_head,
                                  f->kv_heads,
                                  begin + first,
                                  positions,
                                  past + first,
                                  first_key(a->window, past + first) / SPLIT,
                                  last_key / SPLIT + 1,
                                  -1};
            }
        }
    }
}

static mil_status
check_args(const char *name, const mil_attention *a)
{
    if (a->kv_heads < 1 || a->heads % a->kv_heads != 0) {
        return mil_fail(MIL_ERR_SHAPE, "%s: heads = %lld is not a multiple of kv_heads = %lld", name,
                        (long long)a->heads, (long long)a->kv_heads);
    }
    for (int64_t s = 0; a->caches == NULL && a->rows.past != NULL && s < a->rows.sequences; s++) {
        if (a->rows.past[s] != 0) {
            return mil_fail(MIL_ERR_VALUE, "%s: past[%lld] = %lld without caches to hold it", name,
                            (long long)s, (long long)a->rows.past[s]);
        }
    }
    return MIL_OK;
}

static int64_t
count_splits(const tile *tiles, int64_t count)
{
    int64_t splits = 0;
    for (int64_t i = 0; i < count; i++) {
        splits += tiles[i].last_split - tiles[i].first_split;
    }
    return splits;
}

/* Multiplications of all tiles, the copies of a block counted as two rows' worth. */
static int64_t
count_work(const forward_pass *f, const tile *tiles, int64_t count)
{
    int64_t work = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t end = tiles[i].first_position + tiles[i].positions;
        int64_t keys = end - first_key(f->a->window, tiles[i].first_position);
        work += 2 * keys * tiles[i].kv_heads * (tiles[i].positions * f->group + 2) * f->a->head_dim;
    }
    return work;
}

/* Fewer tiles than threads: all splits of all tiles at once, then the merging, tile by tile. */
static mil_status
forward_by_splits(mil_context *context, const forward_pass *f, const tile *tiles, int64_t count,
                  workspace *workspaces)
{
    int64_t splits = count_splits(tiles, count), next = 0;
    tile *items;
    sums *partials;
    MIL_TRY(MIL_PUSH(context->scratch, splits, tile, &items));
    MIL_TRY(MIL_PUSH(context->scratch, splits, sums, &partials));
    for (int64_t i = 0; i < count; i++) {
        for (int64_t split = tiles[i].first_split; split < tiles[i].last_split; split++, next++) {
            items[next] = tiles[i];
            items[next].first_split = split;
            items[next].partial = next;
            MIL_TRY(push_sums(context->scratch, f, rows_of(f, &tiles[i]), &partials[next]));
        }
    }
#pragma omp parallel num_threads(context->threads)
    {
        workspace *own = &workspaces[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < splits; i++) {
            forward_tile(f, &items[i], own, partials);
        }
    }
    for (int64_t i = 0; i < splits; i++) {
        const tile *t = &items[i];
        int64_t begin = i;
        while (i + 1 < splits && items[i + 1].first_row == t->first_row &&
               items[i + 1].kv_head == t->kv_head) {
            merge(f, t, &partials[begin], &partials[++i]);
        }
        write_result(f, t, &partials[begin]);
    }
    return MIL_OK;
}

static mil_status
run_forward(mil_context *context, const forward_pass *f)
{
    int64_t count = count_tiles(f);
    tile *tiles;
    workspace *workspaces;
    MIL_TRY(MIL_PUSH(context->scratch, count, tile, &tiles));
    MIL_TRY(MIL_PUSH(context->scratch, context->threads, workspace, &workspaces));
    for (int thread = 0; thread < context->threads; thread++) {
        MIL_TRY(push_workspace(context->scratch, f, &workspaces[thread]));
    }
    list_tiles(f, tiles);
    bool shared = context->threads > 1 && count_work(f, tiles, count) >= GRAIN;
    if (shared && count < 2 * context->threads && count_splits(tiles, count) > count) {
        return forward_by_splits(context, f, tiles, count, workspaces);
    }
#pragma omp parallel num_threads(context->threads) if (shared && count > 1)
    {
        workspace *own = &workspaces[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            forward_tile(f, &tiles[i], own, NULL);
        }
    }
    return MIL_OK;
}

/* Key heads a tile. With few query rows (decoding, verification) memory is what costs, and rows of all key
 * heads lie together: then a tile takes as many heads as leave two items a thread. */
static int64_t
share_heads(const mil_context *context, const mil_attention *a, int64_t *positions)
{
    int64_t longest = 0, items = 0;
    for (int64_t s = 0; s < a->rows.sequences; s++) {
        int64_t count = a->rows.offsets[s + 1] - a->rows.offsets[s];
        int64_t end = count + (a->rows.past != NULL ? a->rows.past[s] : 0);
        longest = count > longest ? count : longest;
        items += (end - first_key(a->window, end) + SPLIT - 1) / SPLIT;
    }
    if (longest > *positions || longest * a->heads > ROWS_OF_ALL_HEADS) {
        return 1;
    }
    *positions = longest > 0 ? longest : 1;
    int64_t kv_heads = a->kv_heads;
    while (a->kv_heads % kv_heads != 0 ||
           (kv_heads > 1 && items * (a->kv_heads / kv_heads) < 2 * context->threads)) {
        kv_heads--;
    }
    return kv_heads;
}

mil_status
mil_cpu_attention_forward(mil_context *context, const mil_attention *arguments)
{
    MIL_TRY(check_args("attention_forward", arguments));
    int64_t group = arguments->heads / arguments->kv_heads;
    int64_t positions = group < ROWS_A_TILE ? ROWS_A_TILE / group : 1;
    positions = positions < POSITIONS ? positions : POSITIONS;
    int64_t kv_heads = share_heads(context, arguments, &positions);
    forward_pass f = {
        .a = arguments,
        .group = group,
        .positions = positions,
        .kv_heads = kv_heads,
        .rows = positions * group * kv_heads,
        .acc_stride = mil_tile_stride(arguments->head_dim),
        .kernels = mil_tile_get_kernels(),
    };
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_status status = run_forward(context, &f);
    mil_arena_rewind(context->scratch, mark);
    return status;
}

/* ---- backward ----------------------------------------------------------------------------------------- */

/* One query head's tile of positions: what does not change from key block to key block. */
typedef struct query_tile {
    int64_t sequence, head;
    int64_t first_row, first_position, positions;
} query_tile;

typedef struct backward_workspace {
    float *q;           /* [POSITIONS, stride] queries times scale */
    float *grad_y;      /* [POSITIONS, stride] */
    float *D;           /* [POSITIONS] */
    float *grad_q;      /* [POSITIONS, stride] */
    float *p, *ds;      /* [POSITIONS, mil_tile_stride(BLOCK)] */
    float *k, *kt, *vt; /* [BLOCK, stride], twice [head_dim, mil_tile_stride(BLOCK)] */
    float *grad_kv;     /* [BLOCK, stride] of one tile, where head_dim is not whole strips */
} backward_workspace;

typedef struct backward_pass {
    const mil_attention_grad *a;
    int64_t group, stride; /* stride = mil_tile_stride(head_dim) */
    mil_tile_kernels kernels;
} backward_pass;

static mil_status
push_backward_workspace(mil_arena *arena, const backward_pass *b, backward_workspace *w)
{
    int64_t head_dim = b->a->forward.head_dim, block_stride = mil_tile_stride(BLOCK);
    MIL_TRY(MIL_PUSH(arena, POSITIONS * b->stride, float, &w->q));
    MIL_TRY(MIL_PUSH(arena, POSITIONS * b->stride, float, &w->grad_y));
    MIL_TRY(MIL_PUSH(arena, POSITIONS, float, &w->D));
    MIL_TRY(MIL_PUSH(arena, POSITIONS * b->stride, float, &w->grad_q));
    MIL_TRY(MIL_PUSH(arena, POSITIONS * block_stride, float, &w->p));
    MIL_TRY(MIL_PUSH(arena, POSITIONS * block_stride, float, &w->ds));
    MIL_TRY(MIL_PUSH(arena, BLOCK * b->stride, float, &w->k));
    MIL_TRY(MIL_PUSH(arena, head_dim * block_stride, float, &w->kt));
    MIL_TRY(MIL_PUSH(arena, head_dim * block_stride, float, &w->vt));
    return MIL_PUSH(arena, BLOCK * b->stride, float, &w->grad_kv);
}

static query_tile
get_query_tile(const mil_attention *a, int64_t sequence, int64_t head, int64_t index)
{
    int64_t begin = a->rows.offsets[sequence], count = a->rows.offsets[sequence + 1] - begin;
    int64_t first = index * POSITIONS, left = count - first;
    return (query_tile){sequence, head, begin + first, first, left < POSITIONS ? left : POSITIONS};
}

static int64_t
count_units(const mil_attention *a, int64_t sequence, int64_t unit)
{
    return (a->rows.offsets[sequence + 1] - a->rows.offsets[sequence] + unit - 1) / unit;
}

/* Packs queries and grad_y of a tile, D = rowsum(grad_y y), and clears grad_q. */
MIL_VECTORISE static void
load_queries(const backward_pass *b, const query_tile *t, backward_workspace *w)
{
    const mil_attention_grad *g = b->a;
    const mil_attention *a = &g->forward;
    int64_t column = t->head * a->head_dim;
    mil_tile_source q = {(const char *)((const float *)a->q + column), MIL_F32, a->q_stride};
    const float *y = (const float *)a->y + t->first_row * a->y_stride + column;
    const float *grad_y = (const float *)g->grad_y + t->first_row * g->grad_y_stride + column;
    mil_tile_source grad_rows = {(const char *)grad_y, MIL_F32, g->grad_y_stride};
    b->kernels.pack_rows(q, t->first_row, t->positions, a->head_dim, a->scale, w->q);
    b->kernels.pack_rows(grad_rows, 0, t->positions, a->head_dim, 1.0f, w->grad_y);
    for (int64_t row = 0; row < t->positions; row++) {
        float sum = 0;
        for (int64_t i = 0; i < a->head_dim; i++) {
            sum += grad_y[row * g->grad_y_stride + i] * y[row * a->y_stride + i];
        }
        w->D[row] = sum;
    }
    memset(w->grad_q, 0, (size_t)(t->positions * b->stride) * sizeof(float));
}

/* Blocks of keys that some row of the tile sees: *first to *last, one past. */
static void
get_block_range(const mil_attention *a, const query_tile *t, int64_t *first, int64_t *last)
{
    *first = first_key(a->window, t->first_position) / BLOCK;
    *last = (t->first_position + t->positions - 1) / BLOCK + 1;
}

/* scores -> P, dP -> dS, for one row of BLOCK keys of which first .. last are seen. */
MIL_VECTORISE static void
backward_softmax(float *p, float *ds, int first, int last, float log_sum_exp, float D)
{
#pragma omp simd
    for (int j = 0; j < BLOCK; j++) {
        float probability = mil_expf(p[j] - log_sum_exp);
        p[j] = probability;
        ds[j] = probability * (ds[j] - D);
    }
    fill_unseen(p, first, last, 0);
    fill_unseen(ds, first, last, 0);
}

MIL_VECTORISE static void
add_rows(int64_t count, int64_t width, const float *from, int64_t from_stride, float *to, int64_t to_stride)
{
    for (int64_t row = 0; row < count; row++) {
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            to[row * to_stride + i] += from[row * from_stride + i];
        }
    }
}

/* to [keys, head_dim] += p^T x, with p [positions, BLOCK] and x [positions, head_dim] packed. */
static void
add_product(const backward_pass *b, int64_t keys, int64_t positions, const float *p, const float *x,
            float *to, float *buffer)
{
    int64_t head_dim = b->a->forward.head_dim, to_stride = b->a->grad_kv_stride;
    if (head_dim % MIL_TILE_STRIP == 0) {
        b->kernels.product(keys, head_dim, positions, p, 1, mil_tile_stride(BLOCK), x, b->stride, to,
                           to_stride, true);
        return;
    }
    b->kernels.product(keys, b->stride - MIL_TILE_STRIP, positions, p, 1, mil_tile_stride(BLOCK), x,
                       b->stride, buffer, b->stride, false);
    add_rows(keys, head_dim, buffer, b->stride, to, to_stride);
}

/* One tile of queries against one block of keys; adds to w->grad_q where want_q, to grad_k and grad_v where
 * want_kv. */
static void
backward_unit(const backward_pass *b, const query_tile *t, int64_t block, bool want_q, bool want_kv,
              backward_workspace *w)
{
    const mil_attention_grad *g = b->a;
    const mil_attention *a = &g->forward;
    int64_t stride = b->stride, width = stride - MIL_TILE_STRIP, block_stride = mil_tile_stride(BLOCK),
            first = block * BLOCK;
    int64_t begin = a->rows.offsets[t->sequence], keys = a->rows.offsets[t->sequence + 1] - begin - first;
    keys = keys < BLOCK ? keys : BLOCK;
    int64_t kv_head = t->head / b->group, columns = mil_round_up(keys, MIL_TILE_STRIP);
    mil_tile_source k = get_source(a, t->sequence, kv_head, false),
                    v = get_source(a, t->sequence, kv_head, true);

    /* 1  P and dS. */
    b->kernels.pack_transposed(k, first, keys, a->head_dim, w->kt);
    b->kernels.pack_transposed(v, first, keys, a->head_dim, w->vt);
    b->kernels.product(t->positions, columns, a->head_dim, w->q, stride, 1, w->kt, block_stride, w->p,
                       block_stride, false);
    b->kernels.product(t->positions, columns, a->head_dim, w->grad_y, stride, 1, w->vt, block_stride, w->ds,
                       block_stride, false);
    for (int64_t row = 0; row < t->positions; row++) {
        int64_t position = t->first_position + row;
        float log_sum_exp = a->log_sum_exp[(t->first_row + row) * a->heads + t->head];
        backward_softmax(w->p + row * block_stride, w->ds + row * block_stride,
                         place_in_block(first_key(a->window, position), first),
                         place_in_block(position + 1, first), log_sum_exp, w->D[row]);
    }

    /* 2  grad_q += dS K, with `scale` left to the end. */
    if (want_q) {
        b->kernels.pack_rows(k, first, keys, a->head_dim, 1.0f, w->k);
        b->kernels.product(t->positions, width, keys, w->ds, block_stride, 1, w->k, stride, w->grad_q, stride,
                           true);
    }

    /* 3  grad_k += dS^T q, grad_v += P^T grad_y. */
    if (want_kv) {
        int64_t offset = (begin + first) * g->grad_kv_stride + kv_head * a->head_dim;
        add_product(b, keys, t->positions, w->ds, w->q, (float *)g->grad_k + offset, w->grad_kv);
        add_product(b, keys, t->positions, w->p, w->grad_y, (float *)g->grad_v + offset, w->grad_kv);
    }
}

static void
write_grad_q(const backward_pass *b, const query_tile *t, const backward_workspace *w)
{
    const mil_attention *a = &b->a->forward;
    float *grad_q = (float *)b->a->grad_q + t->first_row * b->a->grad_q_stride + t->head * a->head_dim;
    for (int64_t row = 0; row < t->positions; row++) {
        for (int64_t i = 0; i < a->head_dim; i++) {
            grad_q[row * b->a->grad_q_stride + i] = w->grad_q[row * b->stride + i] * a->scale;
        }
    }
}

/* Rows first .. first + count of grad_k and grad_v for one key head. */
static void
clear_grad_kv(const backward_pass *b, int64_t kv_head, int64_t first, int64_t count)
{
    const mil_attention_grad *g = b->a;
    size_t bytes = (size_t)g->forward.head_dim * sizeof(float);
    for (int64_t row = first; row < first + count; row++) {
        memset((float *)g->grad_k + row * g->grad_kv_stride + kv_head * g->forward.head_dim, 0, bytes);
        memset((float *)g->grad_v + row * g->grad_kv_stride + kv_head * g->forward.head_dim, 0, bytes);
    }
}

/* All gradients of one key head of one sequence. */
static void
backward_head(const backward_pass *b, int64_t sequence, int64_t kv_head, backward_workspace *w)
{
    const mil_attention *a = &b->a->forward;
    int64_t begin = a->rows.offsets[sequence], first, last;
    clear_grad_kv(b, kv_head, begin, a->rows.offsets[sequence + 1] - begin);
    for (int64_t head = kv_head * b->group; head < (kv_head + 1) * b->group; head++) {
        for (int64_t index = 0; index < count_units(a, sequence, POSITIONS); index++) {
            query_tile t = get_query_tile(a, sequence, head, index);
            load_queries(b, &t, w);
            get_block_range(a, &t, &first, &last);
            for (int64_t block = first; block < last; block++) {
                backward_unit(b, &t, block, true, true, w);
            }
            write_grad_q(b, &t, w);
        }
    }
}

/* grad_q of one tile: the first of the two passes. */
static void
backward_queries(const backward_pass *b, int64_t sequence, int64_t head, int64_t index, backward_workspace *w)
{
    const mil_attention *a = &b->a->forward;
    query_tile t = get_query_tile(a, sequence, head, index);
    int64_t first, last;
    load_queries(b, &t, w);
    get_block_range(a, &t, &first, &last);
    for (int64_t block = first; block < last; block++) {
        backward_unit(b, &t, block, true, false, w);
    }
    write_grad_q(b, &t, w);
}

/* grad_k and grad_v of one block: the second pass. Heads and tiles come in the order of backward_head. */
static void
backward_keys(const backward_pass *b, int64_t sequence, int64_t kv_head, int64_t block, backward_workspace *w)
{
    const mil_attention *a = &b->a->forward;
    int64_t begin = a->rows.offsets[sequence] + block * BLOCK, left = a->rows.offsets[sequence + 1] - begin;
    clear_grad_kv(b, kv_head, begin, left < BLOCK ? left : BLOCK);
    for (int64_t head = kv_head * b->group; head < (kv_head + 1) * b->group; head++) {
        for (int64_t index = block * BLOCK / POSITIONS; index < count_units(a, sequence, POSITIONS);
             index++) {
            query_tile t = get_query_tile(a, sequence, head, index);
            int64_t first, last;
            get_block_range(a, &t, &first, &last);
            if (block >= last) {
                continue; /* the tile ends before this block */
            }
            if (block < first) {
                break; /* the window has left this block behind */
            }
            load_queries(b, &t, w);
            backward_unit(b, &t, block, false, true, w);
        }
    }
}

/* Work of one shared loop: what `index` means depends on the pass. */
typedef struct unit {
    int64_t sequence, head, index;
} unit;

static int64_t
list_units(const mil_attention *a, int64_t heads, int64_t size, unit *units)
{
    int64_t count = 0;
    for (int64_t s = 0; s < a->rows.sequences; s++) {
        for (int64_t index = count_units(a, s, size) - 1; index >= 0; index--) {
            for (int64_t head = 0; head < heads; head++) {
                units[count++] = (unit){s, head, index};
            }
        }
    }
    return count;
}

static mil_status
run_backward(mil_context *context, const backward_pass *b)
{
    const mil_attention *a = &b->a->forward;
    backward_workspace *workspaces;
    MIL_TRY(MIL_PUSH(context->scratch, context->threads, backward_workspace, &workspaces));
    for (int thread = 0; thread < context->threads; thread++) {
        MIL_TRY(push_backward_workspace(context->scratch, b, &workspaces[thread]));
    }
    int64_t tiles = 0, blocks = 0, whole = a->rows.sequences * a->kv_heads;
    for (int64_t s = 0; s < a->rows.sequences; s++) {
        tiles += count_units(a, s, POSITIONS);
        blocks += count_units(a, s, BLOCK);
    }
    int64_t work = tiles * a->heads * POSITIONS * BLOCK * a->head_dim;
    if (whole >= context->threads || work < GRAIN) {
#pragma omp parallel num_threads(context->threads) if (whole > 1 && work >= GRAIN)
        {
            backward_workspace *own = &workspaces[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < whole; i++) {
                backward_head(b, i / a->kv_heads, i % a->kv_heads, own);
            }
        }
        return MIL_OK;
    }
    unit *query_units, *key_units;
    MIL_TRY(MIL_PUSH(context->scratch, tiles * a->heads, unit, &query_units));
    MIL_TRY(MIL_PUSH(context->scratch, blocks * a->kv_heads, unit, &key_units));
    int64_t queries = list_units(a, a->heads, POSITIONS, query_units);
    int64_t keys = list_units(a, a->kv_heads, BLOCK, key_units);
#pragma omp parallel num_threads(context->threads)
    {
        backward_workspace *own = &workspaces[omp_get_thread_num()];
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < queries; i++) {
            backward_queries(b, query_units[i].sequence, query_units[i].head, query_units[i].index, own);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = keys - 1; i >= 0; i--) {
            backward_keys(b, key_units[i].sequence, key_units[i].head, key_units[i].index, own);
        }
    }
    return MIL_OK;
}

mil_status
mil_cpu_attention_backward(mil_context *context, const mil_attention_grad *arguments)
{
    const mil_attention *a = &arguments->forward;
    MIL_TRY(check_args("attention_backward", a));
    if (a->caches != NULL || a->log_sum_exp == NULL) {
        return mil_fail(MIL_ERR_VALUE,
                        "attention_backward: needs log_sum_exp of a forward pass without caches");
    }
    backward_pass b = {
        .a = arguments,
        .group = a->heads / a->kv_heads,
        .stride = mil_tile_stride(a->head_dim),
        .kernels = mil_tile_get_kernels(),
    };
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_status status = run_backward(context, &b);
    mil_arena_rewind(context->scratch, mark);
    return status;
}

/* ---- cache -------------------------------------------------------------------------------------------- */

MIL_VECTORISE static void
round_row(mil_dtype dtype, int64_t count, const float *from, void *to)
{
    uint16_t *half = to;
    if (dtype == MIL_F32) {
        memcpy(to, from, (size_t)count * sizeof(float));
    }
    else if (dtype == MIL_BF16) {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            half[i] = mil_float_to_bf16(from[i]);
        }
    }
    else {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            half[i] = mil_float_to_f16(from[i]);
        }
    }
}

mil_status
mil_cpu_kv_append(mil_context *context, const mil_kv_append *arguments)
{
    const mil_kv_append a = *arguments;
    int64_t width = a.kv_heads * a.head_dim;
#pragma omp parallel num_threads(context->threads) if (a.rows.rows * width >= GRAIN / 4)
    for (int64_t s = 0; s < a.rows.sequences; s++) {
        int64_t begin = a.rows.offsets[s], past = a.rows.past != NULL ? a.rows.past[s] : 0;
        const mil_kv_cache *cache = &a.caches[s];
        int64_t row_bytes = width * (int64_t)mil_dtype_size(cache->dtype);
#pragma omp for schedule(static) nowait
        for (int64_t row = begin; row < a.rows.offsets[s + 1]; row++) {
            int64_t offset = (past + row - begin) * row_bytes;
            round_row(cache->dtype, width, (const float *)a.k + row * a.kv_stride, (char *)cache->k + offset);
            round_row(cache->dtype, width, (const float *)a.v + row * a.kv_stride, (char *)cache->v + offset);
        }
    }
    return MIL_OK;
}
