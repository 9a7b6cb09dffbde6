/* Mamba-2's selective scan in its dual, attention-like form, window by window: forward and backward.
 *
 * Per head, with A = -exp(A_log), dt_t = clamp(softplus(dt + dt_bias)) and decay_t = exp(dt_t A):
 *
 *   H_t = decay_t H_{t-1} + dt_t B_t (outer) x_t       [state_dim, head_dim]
 *   y_t = H_t^T C_t + D x_t                            [head_dim]
 *
 * Tokens are cut into windows of MIL_WINDOW at multiples of MIL_WINDOW.  With H the state before a window,
 * W[i, s] = decay_{s+1} .. decay_i and h_i = decay_0 .. decay_i (products within the window):
 *
 *   y_i = h_i H^T C_i + sum_{s <= i} W[i, s] dt_s (C_i . B_s) x_s + D x_i          (mix)
 *   H'  = h_last H + sum_s W[last, s] dt_s B_s (outer) x_s                         (fold)
 *
 * Why windows: one token costs one reading of H, and writes nothing; H is read and written once a window
 * instead of once a token, and what happens inside a window is matrix products with about state_dim +
 * MIL_WINDOW multiplications an output.  Longer windows need more for the scores and make a step read a
 * longer tail.  Why W is multiplied up, not exp of a difference of sums: a large dt makes the sum large
 * and the difference lose its digits; products of numbers in [0, 1] keep theirs and cannot overflow.
 *
 * Bits: an output element is one chain of fused multiply-adds in the order written above (state_dim, then
 * s = 0 .. i, then D), in its own vector lane, whatever tile it is computed in.  It depends on the state
 * at its window's start and on the window's tokens up to itself.  So it is the same alone, in a verify
 * window, in prefill or in a batch, and after any rollback.  States and tails: device.h.
 *
 * Backward keeps nothing from forward: it recomputes the state before each window and goes through the
 * windows from the last to the first, G being the gradient of the state after the window,
 * P[i, s] = dt_s grad_y_i . x_s and S[i, s] = C_i . B_s:
 *
 *   grad_C_i = h_i t_i + sum_{s <= i} W[i, s] P[i, s] B_s,                  t_i = H grad_y_i
 *   grad_B_s = W[last, s] dt_s g_s + sum_{i >= s} W[i, s] P[i, s] C_i,      g_s = G x_s
 *   grad_u_s = W[last, s] G^T B_s + sum_{i >= s} W[i, s] S[i, s] grad_y_i,  u_s = dt_s x_s
 *   G'       = h_last G + sum_i h_i C_i (outer) grad_y_i
 *   grad of log decay_k = sum of all terms above that contain decay_k: sum_{s < k <= i} W S P[i, s]
 *       + sum_{i >= k} h_i C_i . t_i + sum_{s < k} W[last, s] dt_s B_s . g_s + h_last <H, G>
 *
 * Each of the first three is a product with a matrix, a scale a row, and a triangle: the same `mix` as
 * forward.  H and G are kept in both orientations, so that every product runs along rows.  x, B and C may
 * be shared by several heads: their gradients are written a head and added up in the order of heads.
 *
 * Workspace of backward: a state a window for each thread, which is state_dim * head_dim / MIL_WINDOW
 * floats a token of the longest sequence, and heads * width floats a row for each shared x, B or C.
 *
 * Source: Dao & Gu 2024 (arXiv 2405.21060), section 6; the tail is the project's own (docs).
 */
#include "cpu/cpu.h"
#include "cpu/tail.h"
#include "cpu/vector.h"

#include <omp.h>

enum {
    WINDOW = MIL_WINDOW,
    LANES = 16,       /* outputs side by side: two vectors of AVX2, one of AVX-512 */
    TILE = 4,         /* rows of LANES outputs in registers at a time */
    HEADS_A_TASK = 8, /* so that their states stay in the second-level cache */
    GRAIN = 1 << 16,
};

static const float log2_e = 1.442695041f;

/* ---- tiles of outputs -------------------------------------------------------------------------------- */

/* acc[r][j] += sum_k c[r, k] v[k][j] for k = 0 .. count - 1 in order; c[r, k] is at r * c_row + k * c_step
 * of c, row k of v at k * v_step.  With `rows` = TILE and `width` = LANES known, the compiler keeps acc in
 * registers: six loads for eight multiplications of AVX2 vectors.  `wide` is for a single row of
 * rows * LANES outputs: then acc[r] is its r-th part. */
MIL_INLINE void
accumulate(int rows, bool wide, int64_t width, float (*acc)[LANES], int64_t count, const float *c,
           int64_t c_row, int64_t c_step, const float *v, int64_t v_step)
{
    for (int64_t k = 0; k < count; k++) {
        const float *row = v + k * v_step, *coefficients = c + k * c_step;
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            float coefficient = coefficients[wide ? 0 : r * c_row];
            const float *part = row + (wide ? r * LANES : 0);
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                acc[r][j] = mil_fma(coefficient, part[j], acc[r][j]);
            }
        }
    }
}

/* As accumulate from zeros, for count of at least 1.  The first term is written apart because the
 * compiler would make a slow string instruction of clearing acc; fused with zero it has the bits of a sum
 * that began there. */
MIL_INLINE void
multiply(int rows, bool wide, int64_t width, float (*acc)[LANES], int64_t count, const float *c,
         int64_t c_row, int64_t c_step, const float *v, int64_t v_step)
{
    for (int r = 0; r < rows; r++) {
        float coefficient = c[wide ? 0 : r * c_row];
        const float *part = v + (wide ? r * LANES : 0);
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            acc[r][j] = mil_fma(coefficient, part[j], 0.0f);
        }
    }
    accumulate(rows, wide, width, acc, count - 1, c + c_step, c_row, c_step, v + v_step, v_step);
}

/* Rows first .. length - 1 of an output that mixes a matrix and a triangle of weights:
 *
 *   m_i   = sum_k a_i[k] matrix[k]
 *   u_i   = scale[i] m_i + sum_k weights[i][k] b_k, k <= i;  `upper`: weights[k][i], i <= k < length
 *   out_i = u_i, then factor[i] u_i where `factor` is given, then + D extra_i where `extra` is given
 *   matrix_dots[i] += m_i . matrix_dot_i,  dots[i] += u_i . dot_i, where these are given
 *
 * Arrays have no gaps between rows; only the output may. */
typedef struct mix {
    int64_t width, first, length;
    int64_t depth;
    const float *a;                 /* [length, depth] */
    const float *matrix;            /* [depth, width]; NULL: zeros */
    const float *scale;             /* [WINDOW] */
    const float (*weights)[WINDOW]; /* [WINDOW, WINDOW] */
    bool upper;
    const float *b;      /* [length, width] */
    const float *factor; /* [WINDOW] */
    float D;
    const float *extra;            /* [length, width] */
    const float *matrix_dot, *dot; /* [length, width] */
    float *matrix_dots, *dots;     /* [WINDOW] */
    float *out;                    /* [length - first, width] */
    int64_t out_stride;
} mix;

/* Lanes are added by halves. */
MIL_INLINE float
add_lanes(const float *lanes)
{
    float half[LANES / 2];
#pragma omp simd
    for (int j = 0; j < LANES / 2; j++) {
        half[j] = lanes[j] + lanes[j + LANES / 2];
    }
    return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}

/* The dot product of `width` columns, added to *sum. */
MIL_INLINE void
add_dot(int64_t width, const float *a, const float *b, float *sum)
{
    float lanes[LANES] = {0};
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        lanes[j] = a[j] * b[j];
    }
    *sum += add_lanes(lanes);
}

/* The triangle: what all rows of the tile share, and the tile's own corner. */
MIL_INLINE void
add_triangle(const mix *m, int rows, bool wide, int64_t width, int64_t i, int64_t column, float (*acc)[LANES])
{
    const float *b = m->b + column, *weights = &m->weights[0][0];
    const int tall = wide ? 1 : rows;
    if (!m->upper) {
        accumulate(rows, wide, width, acc, i, weights + i * WINDOW, WINDOW, 1, b, m->width);
    }
    for (int r = 0; r < tall; r++) {
        int64_t first = m->upper ? i + r : i, count = m->upper ? tall - r : r + 1;
        const float *c = m->upper ? weights + first * WINDOW + i + r : weights + (i + r) * WINDOW + first;
        accumulate(wide ? rows : 1, wide, width, acc + r, count, c, 0, m->upper ? WINDOW : 1,
                   b + first * m->width, m->width);
    }
    if (m->upper) {
        int64_t first = i + tall;
        accumulate(rows, wide, width, acc, m->length - first, weights + first * WINDOW + i, 1, WINDOW,
                   b + first * m->width, m->width);
    }
}

/* One tile: `width` columns from `column` on of `rows` rows from i on, or if wide rows * LANES of row i. */
MIL_INLINE void
mix_tile(const mix *m, int rows, bool wide, int64_t width, int64_t i, int64_t column)
{
    float acc[TILE][LANES];
    if (m->matrix != NULL) {
        multiply(rows, wide, width, acc, m->depth, m->a + i * m->depth, m->depth, 1, m->matrix + column,
                 m->width);
        for (int r = 0; r < rows; r++) {
            int64_t row = wide ? i : i + r, at = column + (wide ? r * LANES : 0);
            float scale = m->scale[row];
            if (m->matrix_dot != NULL) {
                add_dot(width, acc[r], m->matrix_dot + row * m->width + at, &m->matrix_dots[row]);
            }
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                acc[r][j] *= scale;
            }
        }
    }
    else {
        memset(acc, 0, sizeof acc);
    }
    add_triangle(m, rows, wide, width, i, column, acc);
    for (int r = 0; r < rows; r++) {
        int64_t row = wide ? i : i + r, at = column + (wide ? r * LANES : 0);
        float *out = m->out + (row - m->first) * m->out_stride + at;
        if (m->dot != NULL) {
            add_dot(width, acc[r], m->dot + row * m->width + at, &m->dots[row]);
        }
        float factor = m->factor != NULL ? m->factor[row] : 1.0f, D = m->D;
        if (m->extra != NULL) {
            const float *extra = m->extra + row * m->width + at;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                out[j] = mil_fma(D, extra[j], factor * acc[r][j]);
            }
        }
        else {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                out[j] = factor * acc[r][j];
            }
        }
    }
}

MIL_INLINE void
mix_rows(const mix *m)
{
    int64_t i = m->first;
    for (; i + TILE <= m->length; i += TILE) {
        int64_t column = 0;
        for (; column + LANES <= m->width; column += LANES) {
            mix_tile(m, TILE, false, LANES, i, column);
        }
        if (column < m->width) {
            mix_tile(m, TILE, false, m->width - column, i, column);
        }
    }
    for (; i < m->length; i++) {
        int64_t column = 0;
        for (; column + TILE * LANES <= m->width; column += TILE * LANES) {
            mix_tile(m, TILE, true, LANES, i, column);
        }
        for (; column < m->width; column += LANES) {
            mix_tile(m, 1, false, m->width - column < LANES ? m->width - column : LANES, i, column);
        }
    }
}

/* to = last * from + sum_s a_s (outer) b_s over [rows, width]; no gaps between rows. */
typedef struct fold {
    int64_t rows, width, length;
    float last;
    const float *a, *b; /* [length, rows], [length, width] */
    const float *from;  /* NULL: zeros */
    float *to;          /* may be from */
} fold;

MIL_INLINE void
fold_tile(const fold *f, int rows, int64_t width, int64_t u, int64_t column)
{
    float acc[TILE][LANES];
    for (int r = 0; r < rows; r++) {
        if (f->from == NULL) {
            memset(acc[r], 0, sizeof acc[r]);
            continue;
        }
        const float *from = f->from + (u + r) * f->width + column;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            acc[r][j] = f->last * from[j];
        }
    }
    accumulate(rows, false, width, acc, f->length, f->a + u, 1, f->rows, f->b + column, f->width);
    for (int r = 0; r < rows; r++) {
        memcpy(f->to + (u + r) * f->width + column, acc[r], (size_t)width * sizeof(float));
    }
}

MIL_INLINE void
fold_rows(const fold *f)
{
    int64_t u = 0;
    for (; u + TILE <= f->rows; u += TILE) {
        int64_t column = 0;
        for (; column + LANES <= f->width; column += LANES) {
            fold_tile(f, TILE, LANES, u, column);
        }
        if (column < f->width) {
            fold_tile(f, TILE, f->width - column, u, column);
        }
    }
    for (; u < f->rows; u++) {
        for (int64_t column = 0; column < f->width; column += LANES) {
            fold_tile(f, 1, f->width - column < LANES ? f->width - column : LANES, u, column);
        }
    }
}

/* ---- one window of one head -------------------------------------------------------------------------- */

/* The tokens of a window as one head sees them. */
typedef struct window {
    int64_t head_dim, state_dim;
    int64_t length;     /* tokens, at most WINDOW */
    float A, D;         /* A < 0 */
    float dt[WINDOW];   /* after bias, softplus and clamp; 0 beyond length */
    const float *x;     /* [length, head_dim] */
    const float *B, *C; /* [length, state_dim]; C from the first row to be computed on */
} window;

/* W and h of the file's head. W is 0 above the diagonal; tokens beyond the window's length have decay 1. */
typedef struct decays {
    float within[WINDOW][WINDOW], from_start[WINDOW];
    float to_end[WINDOW]; /* W[last, s] dt_s */
} decays;

MIL_INLINE void
fill_decays(const window *w, decays *d)
{
    static const float unit[2 * WINDOW] = {[WINDOW] = 1.0f}; /* from WINDOW - i on: row i of the identity */
    float decay[WINDOW], running[WINDOW] = {0}, from_start = 1.0f, exponent = w->A * log2_e;
#pragma omp simd
    for (int s = 0; s < WINDOW; s++) {
        decay[s] = mil_decayf(w->dt[s] * exponent);
    }
    for (int i = 0; i < WINDOW; i++) {
        const float factor = decay[i], *diagonal = unit + WINDOW - i;
#pragma omp simd
        for (int s = 0; s < WINDOW; s++) {
            running[s] = mil_fma(running[s], factor, diagonal[s]);
        }
        memcpy(d->within[i], running, sizeof running);
        from_start *= factor;
        d->from_start[i] = from_start;
    }
#pragma omp simd
    for (int s = 0; s < WINDOW; s++) {
        d->to_end[s] = running[s] * w->dt[s];
    }
}

/* to[k][s] = rows[s][k], zeros for s >= length: [width, WINDOW]. */
MIL_VECTORISE static void
transpose(int64_t length, int64_t width, const float *rows, float *to)
{
    memset(to, 0, (size_t)(width * WINDOW) * sizeof(float));
    for (int64_t s = 0; s < length; s++) {
        for (int64_t k = 0; k < width; k++) {
            to[k * WINDOW + s] = rows[s * width + k];
        }
    }
}

/* products[i][s] = a_i . b_s for first <= i < length and all s, from b transposed; a chain in each lane. */
MIL_INLINE void
multiply_transposed(int64_t first, int64_t length, int64_t depth, const float *a, const float *b_transposed,
                    float (*products)[WINDOW])
{
    int64_t i = first;
    for (; i + TILE <= length; i += TILE) {
        multiply(TILE, false, WINDOW, products + i, depth, a + i * depth, depth, 1, b_transposed, WINDOW);
    }
    for (; i < length; i++) {
        multiply(1, false, WINDOW, products + i, depth, a + i * depth, 0, 1, b_transposed, WINDOW);
    }
}

MIL_VECTORISE static void
fill_scores(const window *w, int64_t first, const float *B_transposed, float (*scores)[WINDOW])
{
    multiply_transposed(first, w->length, w->state_dim, w->C, B_transposed, scores);
}

/* scaled[s] = weight[s] rows[s], [length, width] without gaps. */
MIL_INLINE void
scale_rows(int64_t length, int64_t width, const float *weight, const float *rows, float *scaled)
{
    for (int64_t s = 0; s < length; s++) {
        const float *from = rows + s * width;
        float *to = scaled + s * width, factor = weight[s];
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            to[j] = factor * from[j];
        }
    }
}

/* Rows first .. length - 1 of the window into y, and where `to` is given the state after the window.
 * `scaled` is workspace [WINDOW, state_dim]. */
MIL_VECTORISE static void
run_window(const window *w, int64_t first, const float (*scores)[WINDOW], const float *state, float *y,
           int64_t y_stride, float *scaled, float *to)
{
    decays d;
    float weights[WINDOW][WINDOW];
    fill_decays(w, &d);
    for (int64_t i = first; i < w->length; i++) {
#pragma omp simd
        for (int s = 0; s < WINDOW; s++) {
            weights[i][s] = d.within[i][s] * w->dt[s] * scores[i][s];
        }
    }
    mix_rows(&(mix){
        .width = w->head_dim,
        .first = first,
        .length = w->length,
        .depth = w->state_dim,
        .a = w->C,
        .matrix = state,
        .scale = d.from_start,
        .weights = (const float (*)[WINDOW])weights,
        .b = w->x,
        .D = w->D,
        .extra = w->x,
        .out = y,
        .out_stride = y_stride,
    });
    if (to != NULL) {
        scale_rows(w->length, w->state_dim, d.to_end, w->B, scaled);
        fold_rows(&(fold){
            .rows = w->state_dim,
            .width = w->head_dim,
            .length = w->length,
            .last = d.from_start[WINDOW - 1],
            .a = scaled,
            .b = w->x,
            .from = state,
            .to = to,
        });
    }
}

/* ---- arguments --------------------------------------------------------------------------------------- */

static mil_status
check_args(const char *name, const mil_ssd *a)
{
    const struct {
        const char *name;
        int64_t count;
    } shared[] = {{"x_heads", a->x_heads}, {"B_groups", a->B_groups}, {"C_groups", a->C_groups}};
    if (a->heads < 1 || a->head_dim < 1 || a->state_dim < 1) {
        return mil_fail(MIL_ERR_SHAPE,
                        "%s: heads = %lld, head_dim = %lld, state_dim = %lld; expected at least 1", name,
                        (long long)a->heads, (long long)a->head_dim, (long long)a->state_dim);
    }
    for (int i = 0; i < 3; i++) {
        if (shared[i].count < 1 || a->heads % shared[i].count != 0) {
            return mil_fail(MIL_ERR_SHAPE, "%s: heads = %lld is not a multiple of %s = %lld", name,
                            (long long)a->heads, shared[i].name, (long long)shared[i].count);
        }
    }
    if (!(a->dt_min <= a->dt_max) || !(a->dt_min >= 0)) {
        return mil_fail(MIL_ERR_VALUE, "%s: dt_min = %g, dt_max = %g; expected 0 <= dt_min <= dt_max", name,
                        a->dt_min, a->dt_max);
    }
    return mil_check_rows(name, &a->rows, a->states != NULL);
}

/* -exp(A_log), kept finite so that 0 * A is 0. */
static float
get_A(const mil_ssd *a, int64_t head)
{
    float A = mil_expf(a->A_log[head]);
    return A > 1e30f ? -1e30f : -A;
}

/* dt after bias, softplus and clamp for one row; `slope` (may be NULL): its derivative, 0 where clamped. */
MIL_VECTORISE static void
fill_dt(const mil_ssd *a, const float *raw, float *dt, float *slope)
{
#pragma omp simd
    for (int64_t h = 0; h < a->heads; h++) {
        float value = mil_softplusf(raw[h] + a->dt_bias[h]);
        value = mil_select(value < a->dt_min, a->dt_min, value);
        dt[h] = mil_select(value > a->dt_max, a->dt_max, value);
    }
    if (slope != NULL) {
#pragma omp simd
        for (int64_t h = 0; h < a->heads; h++) {
            float input = raw[h] + a->dt_bias[h], value = mil_softplusf(input);
            slope[h] = mil_select((value >= a->dt_min) & (value <= a->dt_max), mil_sigmoidf(input), 0.0f);
        }
    }
}

/* copy[s] = `width` floats at `column` of token start + s, from the tail or this call's rows, for
 * first <= s < length.  Rows of a projection often lie a power of two apart, where sixteen of them push
 * each other out of the first-level cache; copies without gaps do not. */
static void
copy_rows(const mil_span *span, const float *tail, int64_t tail_stride, const void *rows, int64_t row_stride,
          int64_t column, int64_t width, int64_t start, int64_t first, int64_t length, float *copy)
{
    for (int64_t s = first; s < length; s++) {
        int64_t token = start + s;
        const float *from = token < span->past
                                ? tail + (token - span->boundary) * tail_stride
                                : (const float *)rows + (span->row + token - span->past) * row_stride;
        memcpy(copy + s * width, from + column, (size_t)width * sizeof(float));
    }
}

/* Memory of one forward task. */
typedef struct forward_memory {
    float *states;       /* [heads of a task, state_dim, head_dim] */
    float *x, *B, *C;    /* [WINDOW, head_dim], [WINDOW, state_dim] */
    float *scaled;       /* [WINDOW, state_dim] */
    float *B_transposed; /* [state_dim, WINDOW] */
} forward_memory;

static int64_t
forward_workspace(const mil_ssd *a, int64_t heads)
{
    return heads * a->state_dim * a->head_dim + WINDOW * (a->head_dim + 4 * a->state_dim);
}

static forward_memory
cut_forward_memory(const mil_ssd *a, int64_t heads, float *memory)
{
    forward_memory m = {.states = memory, .x = memory + heads * a->state_dim * a->head_dim};
    m.B = m.x + WINDOW * a->head_dim;
    m.C = m.B + WINDOW * a->state_dim;
    m.scaled = m.C + WINDOW * a->state_dim;
    m.B_transposed = m.scaled + WINDOW * a->state_dim;
    return m;
}

static int64_t
x_column(const mil_ssd *a, int64_t head)
{
    return head * a->x_heads / a->heads * a->head_dim;
}

static int64_t
B_column(const mil_ssd *a, int64_t head)
{
    return head * a->B_groups / a->heads * a->state_dim;
}

static int64_t
C_column(const mil_ssd *a, int64_t head)
{
    return head * a->C_groups / a->heads * a->state_dim;
}

/* dt of a window for one head, zeros beyond its length; dt is [rows, heads] of this call. */
static void
get_dt(const mil_ssd *a, const mil_span *span, const mil_mixer_state *state, const float *dt, int64_t head,
       int64_t start, int64_t length, float *out)
{
    for (int64_t s = 0; s < WINDOW; s++) {
        int64_t token = start + s;
        out[s] = s >= length          ? 0.0f
                 : token < span->past ? state->dt[(token - span->boundary) * a->heads + head]
                                      : dt[(span->row + token - span->past) * a->heads + head];
    }
}

/* ---- forward ----------------------------------------------------------------------------------------- */

/* How (sequence, head) pairs are cut into tasks: up to `size` heads that share B. */
typedef struct head_tasks {
    int64_t run, size, per_run, per_sequence;
} head_tasks;

static int64_t
smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t
larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static head_tasks
cut_heads(const mil_ssd *a, int threads)
{
    head_tasks t = {.run = a->heads / a->B_groups};
    int64_t fair = a->heads * a->rows.sequences / (2 * threads);
    t.size = larger(1, smaller(smaller(t.run, HEADS_A_TASK), fair));
    t.per_run = (t.run + t.size - 1) / t.size;
    t.per_sequence = a->B_groups * t.per_run;
    return t;
}

/* Brings into m what head `head` + h reads of the window at `start`, unless the head before it did. */
static void
load_window(const mil_ssd *a, const mil_span *span, const mil_mixer_state *state, int64_t head, int64_t h,
            int64_t start, int64_t first, int64_t length, const forward_memory *m)
{
    const float *tail_x = state != NULL ? state->x : NULL, *tail_B = state != NULL ? state->B : NULL;
    const int64_t previous = head + h - 1, N = a->state_dim, P = a->head_dim;
    if (h == 0) { /* all heads of a task share B */
        copy_rows(span, tail_B, a->B_groups * N, a->B, a->B_stride, B_column(a, head), N, start, 0, length,
                  m->B);
    }
    if (h == 0 || x_column(a, head + h) != x_column(a, previous)) {
        copy_rows(span, tail_x, a->x_heads * P, a->x, a->x_stride, x_column(a, head + h), P, start, 0, length,
                  m->x);
    }
    if (h == 0 || C_column(a, head + h) != C_column(a, previous)) {
        copy_rows(span, NULL, 0, a->C, a->C_stride, C_column(a, head + h), N, start, first, length, m->C);
    }
}

/* One task: heads `head` .. `head + heads` of one sequence, all its windows. */
static void
forward_heads(const mil_ssd *a, const float *dt, int64_t sequence, int64_t head, int64_t heads,
              float *workspace)
{
    const mil_span span = mil_get_span(&a->rows, sequence);
    const mil_mixer_state *state = a->states != NULL ? &a->states[sequence] : NULL;
    const forward_memory m = cut_forward_memory(a, heads, workspace);
    const int64_t size = a->state_dim * a->head_dim, end = span.past + span.count;
    const float *current = state != NULL ? state->state + head * size : NULL; /* NULL: zeros */
    for (int64_t start = span.boundary; start < end; start += WINDOW) {
        int64_t length = smaller(WINDOW, end - start), first = smaller(length, larger(0, span.past - start));
        float *y = (float *)a->y + (span.row + start + first - span.past) * a->y_stride + head * a->head_dim;
        float scores[WINDOW][WINDOW];
        /* The state after the window: kept, needed by later rows, or not wanted. */
        bool kept = state != NULL && start + WINDOW <= span.after;
        float *to = kept ? state->state + head * size : start + WINDOW < end ? m.states : NULL;
        for (int64_t h = 0; h < heads; h++) {
            window w = {
                .head_dim = a->head_dim,
                .state_dim = a->state_dim,
                .length = length,
                .A = get_A(a, head + h),
                .D = a->D[head + h],
                .x = m.x,
                .B = m.B,
                .C = m.C,
            };
            load_window(a, &span, state, head, h, start, first, length, &m);
            get_dt(a, &span, state, dt, head + h, start, length, w.dt);
            if (h == 0 && first < length) {
                transpose(length, a->state_dim, w.B, m.B_transposed);
            }
            if (h == 0 || C_column(a, head + h) != C_column(a, head + h - 1)) {
                fill_scores(&w, first, m.B_transposed, scores);
            }
            run_window(&w, first, (const float (*)[WINDOW])scores,
                       current == NULL ? NULL : current + h * size, y + h * a->head_dim, a->y_stride,
                       m.scaled, to == NULL ? NULL : to + h * size);
        }
        current = to;
    }
}

static void
move_tails(const mil_ssd *a, const float *dt, int64_t sequence)
{
    const mil_span span = mil_get_span(&a->rows, sequence);
    const mil_mixer_state *state = &a->states[sequence];
    int64_t x_width = a->x_heads * a->head_dim, B_width = a->B_groups * a->state_dim;
    mil_tail_move(state->x, x_width, 0, 0, x_width, &span, (const float *)a->x + span.row * a->x_stride,
                  a->x_stride, span.past);
    mil_tail_move(state->B, B_width, 0, 0, B_width, &span, (const float *)a->B + span.row * a->B_stride,
                  a->B_stride, span.past);
    mil_tail_move(state->dt, a->heads, 0, 0, a->heads, &span, dt + span.row * a->heads, a->heads, span.past);
}

/* A forward call with all memory taken. */
typedef struct forward_call {
    const mil_ssd *arguments;
    head_tasks cut;
    int64_t tasks, workspace;
    float *dt;     /* [rows, heads] */
    float *memory; /* [threads, workspace] */
} forward_call;

static void
fill_dt_row(const forward_call *call, int64_t row)
{
    const mil_ssd *a = call->arguments;
    fill_dt(a, (const float *)a->dt + row * a->dt_stride, call->dt + row * a->heads, NULL);
}

static void
run_task(const forward_call *call, int64_t task, int thread)
{
    const head_tasks *t = &call->cut;
    int64_t index = task % t->per_sequence, offset = index % t->per_run * t->size;
    forward_heads(call->arguments, call->dt, task / t->per_sequence, index / t->per_run * t->run + offset,
                  smaller(t->run - offset, t->size), call->memory + thread * call->workspace);
}

/* A team costs more than a small call's work, so that does without. */
static void
run_forward(const forward_call *call, int threads)
{
    const mil_ssd *a = call->arguments;
    const int64_t moving = a->states != NULL ? a->rows.sequences : 0;
    if (threads == 1 || a->rows.rows * a->heads * a->head_dim * a->state_dim < GRAIN) {
        for (int64_t row = 0; row < a->rows.rows; row++) {
            fill_dt_row(call, row);
        }
        for (int64_t task = 0; task < call->tasks; task++) {
            run_task(call, task, 0);
        }
        for (int64_t sequence = 0; sequence < moving; sequence++) {
            move_tails(a, call->dt, sequence);
        }
        return;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a->rows.rows; row++) {
            fill_dt_row(call, row);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < call->tasks; task++) {
            run_task(call, task, omp_get_thread_num());
        }
#pragma omp for schedule(static)
        for (int64_t sequence = 0; sequence < moving; sequence++) {
            move_tails(a, call->dt, sequence);
        }
    }
}

mil_status
mil_cpu_ssd_forward(mil_context *context, const mil_ssd *arguments)
{
    const mil_ssd *a = arguments;
    MIL_TRY(check_args("ssd_forward", a));
    forward_call call = {.arguments = a, .cut = cut_heads(a, context->threads)};
    call.tasks = call.cut.per_sequence * a->rows.sequences;
    call.workspace = forward_workspace(a, call.cut.size);
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_status status = MIL_PUSH(context->scratch, a->rows.rows * a->heads, float, &call.dt);
    if (status == MIL_OK) {
        status = MIL_PUSH(context->scratch, context->threads * call.workspace, float, &call.memory);
    }
    if (status == MIL_OK) {
        run_forward(&call, context->threads);
    }
    mil_arena_rewind(context->scratch, mark);
    return status;
}

/* ---- backward ---------------------------------------------------------------------------------------- */

/* One thread's memory. Both orientations of states and gradients let every product run along rows. */
typedef struct backward_memory {
    float *before;  /* [windows, head_dim, state_dim]: H^T before each window; the first is zero and unused */
    float *G, *G_T; /* [state_dim, head_dim], [head_dim, state_dim]: gradient of the state after the window */
    float *x, *grad_y; /* [WINDOW, head_dim] */
    float *B, *C;      /* [WINDOW, state_dim] */
    float *scaled;     /* [WINDOW, max(head_dim, state_dim)] */
    float *transposed; /* [max(head_dim, state_dim), WINDOW] */
} backward_memory;

static int64_t
backward_workspace(const mil_ssd *a, int64_t windows)
{
    int64_t wider = larger(a->state_dim, a->head_dim);
    return (windows + 2) * a->state_dim * a->head_dim + 2 * WINDOW * (a->state_dim + a->head_dim + wider);
}

static backward_memory
cut_backward_memory(const mil_ssd *a, int64_t windows, float *memory)
{
    int64_t size = a->state_dim * a->head_dim;
    backward_memory m = {.before = memory, .G = memory + windows * size};
    m.G_T = m.G + size;
    m.x = m.G_T + size;
    m.grad_y = m.x + WINDOW * a->head_dim;
    m.B = m.grad_y + WINDOW * a->head_dim;
    m.C = m.B + WINDOW * a->state_dim;
    m.scaled = m.C + WINDOW * a->state_dim;
    m.transposed = m.scaled + WINDOW * larger(a->state_dim, a->head_dim);
    return m;
}

/* Where the gradients of one window of one head go. */
typedef struct window_grad {
    const float *y;   /* [length, head_dim] without gaps: gradient of the output, read */
    float *x, *B, *C; /* [length, head_dim], [length, state_dim] */
    int64_t x_stride, B_stride, C_stride;
    float dt[WINDOW]; /* of dt after softplus and clamp */
    double A, D;      /* added to */
} window_grad;

/* H^T before the next window; from = NULL: zeros. */
MIL_VECTORISE static void
advance_transposed(const window *w, float *scaled, const float *from, float *to)
{
    decays d;
    fill_decays(w, &d);
    scale_rows(w->length, w->head_dim, d.to_end, w->x, scaled);
    fold_rows(&(fold){
        .rows = w->head_dim,
        .width = w->state_dim,
        .length = w->length,
        .last = d.from_start[WINDOW - 1],
        .a = scaled,
        .b = w->B,
        .from = from,
        .to = to,
    });
}

/* G' of the file's head in both orientations; final: there is no G yet. */
MIL_VECTORISE static void
step_back(const window *w, const window_grad *g, bool final, const backward_memory *m)
{
    decays d;
    fill_decays(w, &d);
    fold f = {
        .rows = w->state_dim,
        .width = w->head_dim,
        .length = w->length,
        .last = d.from_start[WINDOW - 1],
        .a = m->scaled,
        .b = g->y,
        .from = final ? NULL : m->G,
        .to = m->G,
    };
    scale_rows(w->length, w->state_dim, d.from_start, w->C, m->scaled);
    fold_rows(&f);
    f.rows = w->head_dim;
    f.width = w->state_dim;
    f.b = w->C;
    f.from = final ? NULL : m->G_T;
    f.to = m->G_T;
    scale_rows(w->length, w->head_dim, d.from_start, g->y, m->scaled);
    fold_rows(&f);
}

/* <a, b> of [rows, width] without gaps. */
MIL_INLINE float
inner_product(int64_t count, const float *a, const float *b)
{
    float lanes[LANES] = {0}, rest = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
#pragma omp simd
        for (int j = 0; j < LANES; j++) {
            lanes[j] = mil_fma(a[i + j], b[i + j], lanes[j]);
        }
    }
    for (; i < count; i++) {
        rest = mil_fma(a[i], b[i], rest);
    }
    return add_lanes(lanes) + rest;
}

/* Gradients of the logs of decays from the terms that contain them; see the file's head. */
MIL_INLINE void
add_decay_gradients(const window *w, const float (*terms)[WINDOW], const float *start_terms,
                    const float *end_terms, float through, window_grad *g)
{
    float from_rows[WINDOW] = {0}; /* [k]: sum over i >= k, s < k of terms[i][s] */
    for (int64_t i = 0; i < w->length; i++) {
        float before = 0.0f;
        for (int64_t k = 1; k <= i; k++) {
            before += terms[i][k - 1];
            from_rows[k] += before;
        }
    }
    float ends[WINDOW] = {0}; /* [k]: sum over s < k */
    for (int64_t k = 1; k < w->length; k++) {
        ends[k] = ends[k - 1] + end_terms[k - 1];
    }
    float starts = 0.0f;
    for (int64_t k = w->length - 1; k >= 0; k--) {
        starts += start_terms[k];
        float sum = from_rows[k] + starts + ends[k] + through;
        g->dt[k] += w->A * sum;
        g->A += (double)(w->dt[k] * sum);
    }
}

/* All gradients of a window. `before` is H^T, NULL for zeros; G and G_T are NULL after the last window.
 * `transposed` is workspace. */
MIL_VECTORISE static void
window_backward(const window *w, const float *before, const float *G, const float *G_T, float *transposed,
                window_grad *g)
{
    const int64_t length = w->length;
    decays d;
    float scores[WINDOW][WINDOW], products[WINDOW][WINDOW]; /* C_i . B_s, and grad_y_i . x_s, later W P */
    float start_dots[WINDOW] = {0}, end_dots[WINDOW] = {0};
    fill_decays(w, &d);

    /* 1  The window's scores and their gradients; scores become W S, products W P. */
    transpose(length, w->state_dim, w->B, transposed);
    multiply_transposed(0, length, w->state_dim, w->C, transposed, scores);
    transpose(length, w->head_dim, w->x, transposed);
    multiply_transposed(0, length, w->head_dim, g->y, transposed, products);
    float terms[WINDOW][WINDOW];
    for (int64_t i = 0; i < length; i++) {
        g->D += (double)products[i][i];
        g->dt[i] = 0.0f;
#pragma omp simd
        for (int s = 0; s < WINDOW; s++) {
            float P = products[i][s] * w->dt[s], kept = d.within[i][s] * scores[i][s];
            terms[i][s] = kept * P;
            scores[i][s] = kept;
            products[i][s] = d.within[i][s] * P;
        }
    }
    /* 2  C: through the scores, and through the state before the window. */
    mix m = {
        .width = w->state_dim,
        .length = length,
        .depth = w->head_dim,
        .a = g->y,
        .matrix = before,
        .scale = d.from_start,
        .weights = (const float (*)[WINDOW])products,
        .b = w->B,
        .out = g->C,
        .out_stride = g->C_stride,
        .matrix_dot = w->C,
        .matrix_dots = start_dots,
    };
    mix_rows(&m);
    /* 3  B: through the scores, and through the state after the window. */
    m.a = w->x;
    m.matrix = G_T;
    m.scale = d.to_end;
    m.upper = true;
    m.b = w->C;
    m.out = g->B;
    m.out_stride = g->B_stride;
    m.matrix_dot = w->B;
    m.matrix_dots = end_dots;
    mix_rows(&m);
    /* 4  x and dt through u = dt x, and x through D x. */
    m = (mix){
        .width = w->head_dim,
        .length = length,
        .depth = w->state_dim,
        .a = w->B,
        .matrix = G,
        .scale = d.within[WINDOW - 1],
        .weights = (const float (*)[WINDOW])scores,
        .upper = true,
        .b = g->y,
        .factor = w->dt,
        .D = w->D,
        .extra = g->y,
        .out = g->x,
        .out_stride = g->x_stride,
        .dot = w->x,
        .dots = g->dt,
    };
    mix_rows(&m);
    /* 5  Decays. */
    for (int64_t s = 0; s < length; s++) {
        start_dots[s] *= d.from_start[s];
        end_dots[s] *= d.to_end[s];
    }
    float through = 0.0f;
    if (before != NULL && G_T != NULL) {
        through = d.from_start[WINDOW - 1] * inner_product(w->head_dim * w->state_dim, before, G_T);
    }
    add_decay_gradients(w, (const float (*)[WINDOW])terms, start_dots, end_dots, through, g);
}

/* Where a head's gradient of a tensor goes: into the result, or where heads share it into rows of its own,
 * to be added up later. */
typedef struct head_rows {
    float *rows; /* [rows, heads, width] or the result */
    int64_t stride, width;
    bool shared;
} head_rows;

/* What one (sequence, head) adds to the parameters' gradients. */
typedef struct parameter_sums {
    double dt_bias, A, D;
} parameter_sums;

typedef struct backward_call {
    const mil_ssd_grad *arguments;
    const float *dt, *slope; /* [rows, heads] */
    head_rows x, B, C;
    int64_t windows;      /* most windows of a sequence */
    parameter_sums *sums; /* [sequences, heads] */
} backward_call;

/* The window at `start` for one head, its rows copied to m. */
static window
load_for_backward(const backward_call *call, const mil_span *span, int64_t head, int64_t start,
                  const backward_memory *m)
{
    const mil_ssd *f = &call->arguments->forward;
    const int64_t length = smaller(WINDOW, span->count - start), N = f->state_dim, P = f->head_dim;
    window w = {
        .head_dim = P,
        .state_dim = N,
        .length = length,
        .A = get_A(f, head),
        .D = f->D[head],
        .x = m->x,
        .B = m->B,
        .C = m->C,
    };
    get_dt(f, span, NULL, call->dt, head, start, length, w.dt);
    copy_rows(span, NULL, 0, f->x, f->x_stride, x_column(f, head), P, start, 0, length, m->x);
    copy_rows(span, NULL, 0, f->B, f->B_stride, B_column(f, head), N, start, 0, length, m->B);
    return w;
}

static void
backward_head(const backward_call *call, int64_t sequence, int64_t head, float *workspace)
{
    const mil_ssd_grad *a = call->arguments;
    const mil_ssd *f = &a->forward;
    const mil_span span = mil_get_span(&f->rows, sequence);
    const int64_t size = f->state_dim * f->head_dim, windows = (span.count + WINDOW - 1) / WINDOW;
    const backward_memory m = cut_backward_memory(f, call->windows, workspace);
    window_grad g = {.y = m.grad_y};
    double dt_bias = 0.0;
    g.x_stride = call->x.stride;
    g.B_stride = call->B.stride;
    g.C_stride = call->C.stride;
    for (int64_t i = 0; i + 1 < windows; i++) {
        window w = load_for_backward(call, &span, head, i * WINDOW, &m);
        advance_transposed(&w, m.scaled, i > 0 ? m.before + i * size : NULL, m.before + (i + 1) * size);
    }
    for (int64_t i = windows - 1; i >= 0; i--) {
        const bool final = i == windows - 1;
        const int64_t start = i * WINDOW, row = span.row + start;
        const window w = load_for_backward(call, &span, head, start, &m);
        copy_rows(&span, NULL, 0, f->C, f->C_stride, C_column(f, head), f->state_dim, start, 0, w.length,
                  m.C);
        copy_rows(&span, NULL, 0, a->grad_y, a->grad_y_stride, head * f->head_dim, f->head_dim, start, 0,
                  w.length, m.grad_y);
        g.x = call->x.rows + row * call->x.stride + head * f->head_dim;
        g.B = call->B.rows + row * call->B.stride + head * f->state_dim;
        g.C = call->C.rows + row * call->C.stride + head * f->state_dim;
        window_backward(&w, i > 0 ? m.before + i * size : NULL, final ? NULL : m.G, final ? NULL : m.G_T,
                        m.transposed, &g);
        for (int64_t s = 0; s < w.length; s++) {
            float grad = g.dt[s] * call->slope[(row + s) * f->heads + head];
            ((float *)a->grad_dt)[(row + s) * a->grad_dt_stride + head] = grad;
            dt_bias += (double)grad;
        }
        if (i > 0) {
            step_back(&w, &g, final, &m);
        }
    }
    call->sums[sequence * f->heads + head] =
        (parameter_sums){.dt_bias = dt_bias, .A = g.A * (double)get_A(f, head), .D = g.D};
}

/* Gradients of one row of a shared tensor: the heads of each group, in order. */
MIL_VECTORISE static void
sum_heads(const head_rows *from, int64_t heads, int64_t groups, const float *partial, float *to)
{
    int64_t width = from->width, each = heads / groups;
    for (int64_t group = 0; group < groups; group++) {
        float *out = to + group * width;
        memcpy(out, partial + group * each * width, (size_t)width * sizeof(float));
        for (int64_t h = 1; h < each; h++) {
            const float *add = partial + (group * each + h) * width;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                out[j] += add[j];
            }
        }
    }
}

static mil_status
get_head_rows(mil_context *context, const mil_ssd *a, int64_t groups, int64_t width, void *result,
              int64_t stride, head_rows *out)
{
    *out = (head_rows){.rows = result, .stride = stride, .width = width, .shared = groups != a->heads};
    if (out->shared) {
        out->stride = a->heads * width;
        return MIL_PUSH(context->scratch, a->rows.rows * out->stride, float, &out->rows);
    }
    return MIL_OK;
}

static void
sum_shared(const backward_call *call, int64_t row)
{
    const mil_ssd_grad *a = call->arguments;
    const mil_ssd *f = &a->forward;
    const head_rows *x = &call->x, *B = &call->B, *C = &call->C;
    if (x->shared) {
        sum_heads(x, f->heads, f->x_heads, x->rows + row * x->stride,
                  (float *)a->grad_x + row * a->grad_x_stride);
    }
    if (B->shared) {
        sum_heads(B, f->heads, f->B_groups, B->rows + row * B->stride,
                  (float *)a->grad_B + row * a->grad_B_stride);
    }
    if (C->shared) {
        sum_heads(C, f->heads, f->C_groups, C->rows + row * C->stride,
                  (float *)a->grad_C + row * a->grad_C_stride);
    }
}

static void
add_parameter_sums(const backward_call *call)
{
    const mil_ssd_grad *a = call->arguments;
    for (int64_t head = 0; head < a->forward.heads; head++) {
        parameter_sums total = {0};
        for (int64_t sequence = 0; sequence < a->forward.rows.sequences; sequence++) {
            const parameter_sums *one = &call->sums[sequence * a->forward.heads + head];
            total.dt_bias += one->dt_bias;
            total.A += one->A;
            total.D += one->D;
        }
        if (a->grad_dt_bias != NULL) {
            a->grad_dt_bias[head] += (float)total.dt_bias;
        }
        if (a->grad_A_log != NULL) {
            a->grad_A_log[head] += (float)total.A;
        }
        if (a->grad_D != NULL) {
            a->grad_D[head] += (float)total.D;
        }
    }
}

/* Takes all memory of a backward pass; `memory` is [threads, backward_workspace]. */
static mil_status
prepare_backward(mil_context *context, const mil_ssd_grad *a, backward_call *call, float **dt, float **slope,
                 float **memory)
{
    const mil_ssd *f = &a->forward;
    int64_t count = f->rows.rows * f->heads, windows = 1;
    for (int64_t i = 0; i < f->rows.sequences; i++) {
        windows = larger(windows, (mil_get_span(&f->rows, i).count + WINDOW - 1) / WINDOW);
    }
    *call = (backward_call){.arguments = a, .windows = windows};
    MIL_TRY(MIL_PUSH(context->scratch, count, float, dt));
    MIL_TRY(MIL_PUSH(context->scratch, count, float, slope));
    MIL_TRY(get_head_rows(context, f, f->x_heads, f->head_dim, a->grad_x, a->grad_x_stride, &call->x));
    MIL_TRY(get_head_rows(context, f, f->B_groups, f->state_dim, a->grad_B, a->grad_B_stride, &call->B));
    MIL_TRY(get_head_rows(context, f, f->C_groups, f->state_dim, a->grad_C, a->grad_C_stride, &call->C));
    MIL_TRY(MIL_PUSH(context->scratch, f->rows.sequences * f->heads, parameter_sums, &call->sums));
    MIL_TRY(MIL_PUSH(context->scratch, context->threads * backward_workspace(f, windows), float, memory));
    call->dt = *dt;
    call->slope = *slope;
    return MIL_OK;
}

mil_status
mil_cpu_ssd_backward(mil_context *context, const mil_ssd_grad *arguments)
{
    const mil_ssd *f = &arguments->forward;
    MIL_TRY(check_args("ssd_backward", f));
    if (f->states != NULL) {
        return mil_fail(MIL_ERR_VALUE, "ssd_backward: states are for generation; sequences start here");
    }
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    backward_call call;
    float *dt, *slope, *memory;
    mil_status status = prepare_backward(context, arguments, &call, &dt, &slope, &memory);
    if (status != MIL_OK) {
        mil_arena_rewind(context->scratch, mark);
        return status;
    }
    const int64_t tasks = f->rows.sequences * f->heads, workspace = backward_workspace(f, call.windows);
    const bool parallel = f->rows.rows * f->heads * f->head_dim * f->state_dim >= GRAIN;
#pragma omp parallel num_threads(context->threads) if (parallel)
    {
        float *own = memory + omp_get_thread_num() * workspace;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < f->rows.rows; row++) {
            fill_dt(f, (const float *)f->dt + row * f->dt_stride, dt + row * f->heads,
                    slope + row * f->heads);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            backward_head(&call, task / f->heads, task % f->heads, own);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < f->rows.rows; row++) {
            sum_shared(&call, row);
        }
    }
    add_parameter_sums(&call);
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}
