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
 *   y_i = D x_i + sum_{s <= i} W[i, s] dt_s (C_i . B_s) x_s + sum_n h_i C_i[n] H[n]                 (rows)
 *   H'  = h_last H + sum_s B_s (outer) W[last, s] dt_s x_s                                          (fold)
 *
 * Why windows: one token costs one reading of H, and writes nothing; H is read and written once a window
 * instead of once a token, and what happens inside a window is matrix products with about state_dim + MIL_WINDOW
 * multiplications an output.  Longer windows need more for the scores and make a step read a longer tail.
 * Why W is multiplied up, not exp of a difference of sums: a large dt makes the sum large and the
 * difference lose its digits; products of numbers in [0, 1] keep theirs and cannot overflow.
 *
 * Bits: a row is computed from its window's first state and the window's tokens up to itself, by one function,
 * in the order written above.  So it is the same whether it comes alone, in a window, in prefill or in a batch, and
 * after any rollback.  States and tails: device.h.  All sums run over rows of vectors along head_dim (or state_dim
 * in backward), one lane an output; only scores are sums across lanes, always eight.
 *
 * Backward keeps nothing from forward: it recomputes the state before each window (a window's inputs are an order smaller
 * than the states) and goes through the windows from the last to the first, G being the gradient of the state after
 * the window, P[i, s] = grad_y_i . x_s dt_s and S[i, s] = C_i . B_s:
 *
 *   grad_C_i = sum_{s <= i} W[i, s] P[i, s] B_s + h_i t_i,                t_i = H grad_y_i
 *   grad_B_s = sum_{i >= s} W[i, s] P[i, s] C_i + W[last, s] dt_s g_s,    g_s = G x_s
 *   grad_u_s = sum_{i >= s} W[i, s] S[i, s] grad_y_i + W[last, s] G^T B_s,  u_s = dt_s x_s
 *   G'       = h_last G + sum_i h_i C_i (outer) grad_y_i
 *   grad of log decay_k = sum of all terms above that contain decay_k:
 *              sum_{s < k <= i} W S P[i, s] + sum_{i >= k} h_i C_i . t_i + sum_{s < k} W[last, s] dt_s B_s . g_s + h_last <H, G>
 *
 * x, B and C may be shared by several heads: their gradients are then written a head and added up in the order of heads.
 *
 * Source: Dao & Gu 2024 (arXiv 2405.21060), section 6; the tail is the project's own (docs).
 */
#include "cpu/cpu.h"
#include "cpu/tail.h"
#include "cpu/vector.h"

#include <omp.h>

enum { WINDOW = MIL_WINDOW, GRAIN = 1 << 16, HEADS_A_TASK = 8 };

static const float log2_e = 1.442695041f;

/* ---- small products, in fixed order ------------------------------------------------------------------ */

/* out = scale * in + sum_k c[k] v[k], k = 0 .. 7 in order, over rows of `width`; out may be in. */
MIL_INLINE void
combine(int64_t width, float *out, float scale, const float *in, const float *c, const float *const *v)
{
    const float *v0 = v[0], *v1 = v[1], *v2 = v[2], *v3 = v[3], *v4 = v[4], *v5 = v[5], *v6 = v[6], *v7 = v[7];
    float c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3], c4 = c[4], c5 = c[5], c6 = c[6], c7 = c[7];
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        float sum = mil_fma(c0, v0[j], scale * in[j]);
        sum = mil_fma(c1, v1[j], sum);
        sum = mil_fma(c2, v2[j], sum);
        sum = mil_fma(c3, v3[j], sum);
        sum = mil_fma(c4, v4[j], sum);
        sum = mil_fma(c5, v5[j], sum);
        sum = mil_fma(c6, v6[j], sum);
        out[j] = mil_fma(c7, v7[j], sum);
    }
}

/* out = scale * in + sum_k c[k] v[k], k < count in order.  Places up to the next multiple of 8 get
 * coefficient 0 and the row `in`: whatever v holds beyond `count` must not be touched, it may not be finite. */
MIL_INLINE void
combine_rows(int64_t width, float *out, float scale, const float *in, int64_t count, const float *c,
             const float *const *v)
{
    for (int64_t k = 0; k < count; k += 8) {
        float some[8];
        const float *rows[8];
        for (int64_t i = 0; i < 8; i++) {
            bool there = k + i < count;
            some[i] = there ? c[k + i] : 0.0f;
            rows[i] = there ? v[k + i] : v[count - 1];
        }
        combine(width, out, k == 0 ? scale : 1.0f, k == 0 ? in : out, some, rows);
    }
}

/* out += sum_k c[k] matrix[k], matrix [count, width] without gaps. */
MIL_INLINE void
add_matrix_rows(int64_t width, float *out, int64_t count, const float *c, const float *matrix)
{
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) {
        const float *rows[8];
        for (int64_t i = 0; i < 8; i++) {
            rows[i] = matrix + (k + i) * width;
        }
        combine(width, out, 1.0f, out, c + k, rows);
    }
    for (; k < count; k++) {
        const float *row = matrix + k * width;
        float scale = c[k];
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            out[j] = mil_fma(scale, row[j], out[j]);
        }
    }
}

/* a . b: lane l takes elements l, l + 8, ..; then halves are added. */
MIL_INLINE float
dot(int64_t width, const float *a, const float *b)
{
    float lanes[8] = {0};
    int64_t j = 0;
    for (; j + 8 <= width; j += 8) {
        for (int l = 0; l < 8; l++) {
            lanes[l] += a[j + l] * b[j + l];
        }
    }
    for (int l = 0; j + l < width; l++) {
        lanes[l] += a[j + l] * b[j + l];
    }
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

/* ---- one window of one head -------------------------------------------------------------------------- */

/* The tokens of a window as one head sees them. */
typedef struct window {
    int64_t head_dim, state_dim;
    int64_t length;         /* tokens, at most WINDOW */
    float A, D;             /* A < 0 */
    float dt[WINDOW];       /* after bias, softplus and clamp; 0 beyond length */
    const float *x[WINDOW]; /* [head_dim] each */
    const float *B[WINDOW]; /* [state_dim] each */
    const float *C[WINDOW]; /* [state_dim] each; set from the first row to be computed */
} window;

/* W and h of the file's head. W is 0 above the diagonal; tokens beyond the window's length have dt = 0, decay 1. */
typedef struct decays {
    float within[WINDOW][WINDOW], from_start[WINDOW];
} decays;

MIL_INLINE void
fill_decays(const window *w, decays *d)
{
    float decay[WINDOW], running[WINDOW] = {0}, from_start = 1.0f, exponent = w->A * log2_e;
#pragma omp simd
    for (int s = 0; s < WINDOW; s++) {
        decay[s] = mil_decayf(w->dt[s] * exponent);
    }
    for (int i = 0; i < WINDOW; i++) {
        float factor = decay[i];
#pragma omp simd
        for (int s = 0; s < WINDOW; s++) {
            running[s] *= factor;
        }
        running[i] = 1.0f;
        from_start *= factor;
        memcpy(d->within[i], running, sizeof running);
        d->from_start[i] = from_start;
    }
}

/* S[i, s] = C_i . B_s for s <= i, first <= i < length; zeros above the diagonal. */
MIL_VECTORISE static void
fill_scores(const window *w, int64_t first, float (*scores)[WINDOW])
{
    for (int64_t i = first; i < w->length; i++) {
        for (int64_t s = 0; s <= i; s++) {
            scores[i][s] = dot(w->state_dim, w->C[i], w->B[s]);
        }
        for (int64_t s = i + 1; s < WINDOW; s++) {
            scores[i][s] = 0.0f;
        }
    }
}

/* to[u] = last * from[u] + sum_s weight[s] a_s[u] b_s, over u < rows: the outer products of a whole window.
 * `scaled` is workspace [WINDOW, width]; to may be from. */
MIL_INLINE void
fold(int64_t rows, int64_t width, int64_t length, float last, const float *weight, const float *const *a,
     const float *const *b, float *scaled, const float *from, float *to)
{
    const float *v[WINDOW];
    for (int64_t s = 0; s < length; s++) {
        float *row = scaled + s * width;
        const float *source = b[s];
        float scale = weight[s];
#pragma omp simd
        for (int64_t j = 0; j < width; j++) {
            row[j] = scale * source[j];
        }
        v[s] = row;
    }
    for (int64_t u = 0; u < rows; u++) {
        float c[WINDOW];
        for (int64_t s = 0; s < length; s++) {
            c[s] = a[s][u];
        }
        combine_rows(width, to + u * width, last, from + u * width, length, c, v);
    }
}

/* Rows first .. length - 1 of the window into y[i], and where `to` is given the state after the window. */
MIL_VECTORISE static void
run_window(const window *w, int64_t first, const float (*scores)[WINDOW], const float *state, float *const *y,
           float *scaled, float *to)
{
    decays d;
    fill_decays(w, &d);
    for (int64_t i = first; i < w->length; i++) {
        float c[WINDOW];
        for (int s = 0; s < WINDOW; s++) {
            c[s] = d.within[i][s] * w->dt[s] * scores[i][s];
        }
        combine_rows(w->head_dim, y[i], w->D, w->x[i], i + 1, c, w->x);
    }
    /* A piece of the state serves all rows while it is in the first-level cache. */
    for (int64_t n = 0; n < w->state_dim; n += 8) {
        int64_t count = w->state_dim - n < 8 ? w->state_dim - n : 8;
        for (int64_t i = first; i < w->length; i++) {
            float c[8];
            for (int64_t k = 0; k < count; k++) {
                c[k] = d.from_start[i] * w->C[i][n + k];
            }
            add_matrix_rows(w->head_dim, y[i], count, c, state + n * w->head_dim);
        }
    }
    if (to != NULL) {
        float weight[WINDOW];
        for (int s = 0; s < WINDOW; s++) {
            weight[s] = d.within[w->length - 1][s] * w->dt[s];
        }
        fold(w->state_dim, w->head_dim, w->length, d.from_start[w->length - 1], weight, w->B, w->x, scaled, state, to);
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
        return mil_fail(MIL_ERR_SHAPE, "%s: heads = %lld, head_dim = %lld, state_dim = %lld; expected at least 1", name,
                        (long long)a->heads, (long long)a->head_dim, (long long)a->state_dim);
    }
    for (int i = 0; i < 3; i++) {
        if (shared[i].count < 1 || a->heads % shared[i].count != 0) {
            return mil_fail(MIL_ERR_SHAPE, "%s: heads = %lld is not a multiple of %s = %lld", name, (long long)a->heads,
                            shared[i].name, (long long)shared[i].count);
        }
    }
    if (!(a->dt_min <= a->dt_max) || !(a->dt_min >= 0)) {
        return mil_fail(MIL_ERR_VALUE, "%s: dt_min = %g, dt_max = %g; expected 0 <= dt_min <= dt_max", name, a->dt_min,
                        a->dt_max);
    }
    return mil_check_rows(name, &a->rows, a->states != NULL);
}

static int64_t
greatest_common_divisor(int64_t a, int64_t b)
{
    return b == 0 ? a : greatest_common_divisor(b, a % b);
}

/* -exp(A_log), kept finite so that 0 * A is 0. */
static float
get_A(const mil_ssd *a, int64_t head)
{
    float A = mil_expf(a->A_log[head]);
    return A > 1e30f ? -1e30f : -A;
}

/* dt after bias, softplus and clamp for one row; `free` (may be NULL) is its derivative by dt, 0 where clamped. */
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

/* Fills all of a window but C for one head: `length` tokens from `start` on; dt is [rows, heads] of this call. */
static void
get_window(const mil_ssd *a, const mil_span *span, const mil_mixer_state *state, const float *dt, int64_t head,
           int64_t start, int64_t length, window *w)
{
    int64_t x_at = head * a->x_heads / a->heads * a->head_dim, B_at = head * a->B_groups / a->heads * a->state_dim;
    *w = (window){.head_dim = a->head_dim, .state_dim = a->state_dim, .length = length};
    w->A = get_A(a, head);
    w->D = a->D[head];
    for (int64_t s = 0; s < length; s++) {
        int64_t token = start + s, row = span->row + token - span->past, tail = token - span->boundary;
        if (token < span->past) {
            w->x[s] = state->x + tail * a->x_heads * a->head_dim + x_at;
            w->B[s] = state->B + tail * a->B_groups * a->state_dim + B_at;
            w->dt[s] = state->dt[tail * a->heads + head];
        }
        else {
            w->x[s] = (const float *)a->x + row * a->x_stride + x_at;
            w->B[s] = (const float *)a->B + row * a->B_stride + B_at;
            w->C[s] = (const float *)a->C + row * a->C_stride + head * a->C_groups / a->heads * a->state_dim;
            w->dt[s] = dt[row * a->heads + head];
        }
    }
}

/* ---- forward ----------------------------------------------------------------------------------------- */

/* How (sequence, head) pairs are cut into tasks: up to `size` heads that share B and C, so also the scores. */
typedef struct head_tasks {
    int64_t run, size, per_run, per_sequence;
} head_tasks;

static head_tasks
cut_heads(const mil_ssd *a, int threads)
{
    head_tasks t = {.run = greatest_common_divisor(a->heads / a->B_groups, a->heads / a->C_groups)};
    int64_t fair = a->heads * a->rows.sequences / (2 * threads);
    t.size = t.run < HEADS_A_TASK ? t.run : HEADS_A_TASK;
    t.size = t.size < fair ? t.size : fair;
    t.size = t.size > 1 ? t.size : 1;
    t.per_run = (t.run + t.size - 1) / t.size;
    t.per_sequence = a->heads / t.run * t.per_run;
    return t;
}

/* Bytes are floats: states beyond the boundary (or all of them, without `states`), then `scaled`. */
static int64_t
forward_workspace(const mil_ssd *a, const head_tasks *t)
{
    return t->size * a->state_dim * a->head_dim + WINDOW * a->head_dim;
}

/* One task: heads `head` .. `head + heads` of one sequence, all its windows. */
static void
forward_heads(const mil_ssd *a, const float *dt, int64_t sequence, int64_t head, int64_t heads, float *workspace)
{
    const mil_span span = mil_get_span(&a->rows, sequence);
    const mil_mixer_state *state = a->states != NULL ? &a->states[sequence] : NULL;
    const int64_t size = a->state_dim * a->head_dim, end = span.past + span.count;
    float *own = workspace, *scaled = workspace + heads * size, scores[WINDOW][WINDOW];
    const float *current = state != NULL ? state->state + head * size : own;
    if (state == NULL) {
        memset(own, 0, (size_t)(heads * size) * sizeof(float));
    }
    for (int64_t start = span.boundary; start < end; start += WINDOW) {
        int64_t length = end - start < WINDOW ? end - start : WINDOW;
        int64_t first = span.past > start ? span.past - start : 0;
        first = first < length ? first : length;
        /* The state after the window: kept, needed by later rows, or not wanted. */
        bool kept = state != NULL && start + WINDOW <= span.after;
        float *to = kept ? state->state + head * size : start + WINDOW < end ? own : NULL;
        for (int64_t h = 0; h < heads; h++) {
            window w;
            float *y[WINDOW];
            get_window(a, &span, state, dt, head + h, start, length, &w);
            if (h == 0) {
                fill_scores(&w, first, scores);
            }
            for (int64_t i = first; i < length; i++) {
                y[i] = (float *)a->y + (span.row + start + i - span.past) * a->y_stride + (head + h) * a->head_dim;
            }
            run_window(&w, first, (const float(*)[WINDOW])scores, current + h * size, y, scaled,
                       to == NULL ? NULL : to + h * size);
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
    mil_tail_move(state->x, x_width, 0, 0, x_width, &span, (const float *)a->x + span.row * a->x_stride, a->x_stride,
                  span.past);
    mil_tail_move(state->B, B_width, 0, 0, B_width, &span, (const float *)a->B + span.row * a->B_stride, a->B_stride,
                  span.past);
    mil_tail_move(state->dt, a->heads, 0, 0, a->heads, &span, dt + span.row * a->heads, a->heads, span.past);
}

mil_status
mil_cpu_ssd_forward(mil_context *context, const mil_ssd *arguments)
{
    const mil_ssd *a = arguments;
    MIL_TRY(check_args("ssd_forward", a));
    const head_tasks t = cut_heads(a, context->threads);
    const int64_t tasks = t.per_sequence * a->rows.sequences, workspace = forward_workspace(a, &t);
    const bool parallel = a->rows.rows * a->heads * a->head_dim * a->state_dim >= GRAIN;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    float *dt, *memory;
    MIL_TRY(MIL_PUSH(context->scratch, a->rows.rows * a->heads, float, &dt));
    mil_status status = MIL_PUSH(context->scratch, context->threads * workspace, float, &memory);
    if (status != MIL_OK) {
        mil_arena_rewind(context->scratch, mark);
        return status;
    }
#pragma omp parallel num_threads(context->threads) if (parallel)
    {
        float *own = memory + omp_get_thread_num() * workspace;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a->rows.rows; row++) {
            fill_dt(a, (const float *)a->dt + row * a->dt_stride, dt + row * a->heads, NULL);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t index = task % t.per_sequence, offset = index % t.per_run * t.size;
            int64_t heads = t.run - offset < t.size ? t.run - offset : t.size;
            forward_heads(a, dt, task / t.per_sequence, index / t.per_run * t.run + offset, heads, own);
        }
        if (a->states != NULL) {
#pragma omp for schedule(static)
            for (int64_t sequence = 0; sequence < a->rows.sequences; sequence++) {
                move_tails(a, dt, sequence);
            }
        }
    }
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------- */

/* Where the gradients of one window of one head go; rows are the window's tokens. */
typedef struct window_grad {
    const float *y[WINDOW];                      /* [head_dim]: gradient of the output, read */
    float *x[WINDOW];                            /* [head_dim] */
    float *B[WINDOW], *C[WINDOW];                /* [state_dim] */
    float dt[WINDOW];                            /* of dt after softplus and clamp */
    double A, D;                                 /* added to */
} window_grad;

/* One thread's memory. Transposed copies let every product run along rows. */
typedef struct backward_memory {
    float *before;  /* [windows, head_dim, state_dim]: H^T before each window */
    float *G, *G_T; /* [state_dim, head_dim], [head_dim, state_dim]: gradient of the state after the window */
    float *scaled;  /* [WINDOW, max(head_dim, state_dim)] */
    float *row;     /* [max(head_dim, state_dim)] */
} backward_memory;

static int64_t
larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int64_t
backward_workspace(const mil_ssd *a, int64_t windows)
{
    return (windows + 2) * a->state_dim * a->head_dim + (WINDOW + 1) * larger(a->state_dim, a->head_dim);
}

static backward_memory
cut_memory(const mil_ssd *a, int64_t windows, float *memory)
{
    int64_t size = a->state_dim * a->head_dim;
    backward_memory m = {.before = memory, .G = memory + windows * size};
    m.G_T = m.G + size;
    m.scaled = m.G_T + size;
    m.row = m.scaled + WINDOW * larger(a->state_dim, a->head_dim);
    return m;
}

/* The state before the next window, transposed. */
MIL_VECTORISE static void
advance_transposed(const window *w, float *scaled, const float *from, float *to)
{
    decays d;
    float weight[WINDOW];
    fill_decays(w, &d);
    for (int s = 0; s < WINDOW; s++) {
        weight[s] = d.within[w->length - 1][s] * w->dt[s];
    }
    fold(w->head_dim, w->state_dim, w->length, d.from_start[w->length - 1], weight, w->x, w->B, scaled, from, to);
}

/* sum_k c[k] matrix[k] from nothing; zeros where there is no matrix. */
MIL_INLINE void
multiply_matrix(int64_t width, float *out, int64_t count, const float *c, const float *matrix)
{
    memset(out, 0, (size_t)width * sizeof(float));
    if (matrix != NULL) {
        add_matrix_rows(width, out, count, c, matrix);
    }
}

/* Gradients of the logs of decays from the terms that contain them; see the file's head. */
MIL_INLINE void
add_decay_gradients(const window *w, float (*terms)[WINDOW], const float *start_terms, const float *end_terms,
                    float through, window_grad *g)
{
    float from_rows[WINDOW] = {0}; /* [k]: sum over i >= k, s < k of terms[i][s] */
    for (int64_t i = 0; i < w->length; i++) {
        float before = 0.0f;
        for (int64_t k = 1; k <= i; k++) {
            before += terms[i][k - 1];
            from_rows[k] += before;
        }
    }
    float after = 0.0f, ends[WINDOW + 1] = {0};
    for (int64_t s = 0; s < w->length; s++) {
        ends[s + 1] = ends[s] + end_terms[s];
    }
    for (int64_t k = w->length - 1; k >= 0; k--) {
        after += start_terms[k];
        float sum = from_rows[k] + after + ends[k] + through;
        g->dt[k] += w->A * sum;
        g->A += (double)(w->dt[k] * sum);
    }
}

/* All gradients of a window. `before` is H^T, NULL for zeros; G and G_T are NULL after the last window. */
MIL_VECTORISE static void
window_backward(const window *w, const float *before, const float *G, const float *G_T, float *row, window_grad *g)
{
    const int64_t length = w->length, last = length - 1;
    decays d;
    float scores[WINDOW][WINDOW], terms[WINDOW][WINDOW], start_terms[WINDOW], end_terms[WINDOW];
    float by_row[WINDOW][WINDOW];                             /* [i][s] W P */
    float B_weights[WINDOW][WINDOW], x_weights[WINDOW][WINDOW]; /* [s][i] W P and W S */
    fill_decays(w, &d);

    /* 1  scores and their gradients. */
    for (int64_t i = 0; i < length; i++) {
        for (int64_t s = 0; s <= i; s++) {
            float within = d.within[i][s], P = w->dt[s] * dot(w->head_dim, g->y[i], w->x[s]);
            scores[i][s] = dot(w->state_dim, w->C[i], w->B[s]);
            by_row[i][s] = B_weights[s][i] = within * P;
            x_weights[s][i] = within * scores[i][s];
            terms[i][s] = x_weights[s][i] * P;
        }
    }
    /* 2  C: through the scores, and through the state before the window. */
    for (int64_t i = 0; i < length; i++) {
        multiply_matrix(w->state_dim, row, w->head_dim, g->y[i], before);
        start_terms[i] = d.from_start[i] * dot(w->state_dim, w->C[i], row);
        combine_rows(w->state_dim, g->C[i], d.from_start[i], row, i + 1, by_row[i], w->B);
    }
    /* 3  B: through the scores, and through the state after the window. */
    for (int64_t s = 0; s < length; s++) {
        float weight = d.within[last][s] * w->dt[s];
        multiply_matrix(w->state_dim, row, w->head_dim, w->x[s], G_T);
        end_terms[s] = weight * dot(w->state_dim, w->B[s], row);
        combine_rows(w->state_dim, g->B[s], weight, row, length - s, B_weights[s] + s, w->C + s);
    }
    /* 4  x and dt through u = dt x; D. */
    for (int64_t s = 0; s < length; s++) {
        multiply_matrix(w->head_dim, row, w->state_dim, w->B[s], G);
        combine_rows(w->head_dim, row, d.within[last][s], row, length - s, x_weights[s] + s, g->y + s);
        g->dt[s] = dot(w->head_dim, row, w->x[s]);
        g->D += (double)dot(w->head_dim, g->y[s], w->x[s]);
        const float *grad_y = g->y[s];
        float *grad_x = g->x[s], dt = w->dt[s], D = w->D;
#pragma omp simd
        for (int64_t j = 0; j < w->head_dim; j++) {
            grad_x[j] = mil_fma(dt, row[j], D * grad_y[j]);
        }
    }
    /* 5  decays. */
    float through = 0.0f;
    if (before != NULL && G_T != NULL) {
        through = d.from_start[last] * dot(w->head_dim * w->state_dim, before, G_T);
    }
    add_decay_gradients(w, terms, start_terms, end_terms, through, g);
}

/* 6  G of the window before this one, both ways round. */
MIL_VECTORISE static void
step_back(const window *w, const window_grad *g, float *scaled, float *G, float *G_T)
{
    decays d;
    fill_decays(w, &d);
    float last = d.from_start[w->length - 1];
    fold(w->state_dim, w->head_dim, w->length, last, d.from_start, w->C, g->y, scaled, G, G);
    fold(w->head_dim, w->state_dim, w->length, last, d.from_start, g->y, w->C, scaled, G_T, G_T);
}

/* Where a head's gradient of a tensor goes: the result itself, or where heads share it, a row of its own to be summed. */
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

static void
get_window_grad(const backward_call *call, int64_t head, int64_t row, int64_t length, window_grad *g)
{
    const mil_ssd_grad *a = call->arguments;
    const head_rows *x = &call->x, *B = &call->B, *C = &call->C;
    for (int64_t s = 0; s < length; s++) {
        g->y[s] = (const float *)a->grad_y + (row + s) * a->grad_y_stride + head * a->forward.head_dim;
        g->x[s] = x->rows + (row + s) * x->stride + head * x->width;
        g->B[s] = B->rows + (row + s) * B->stride + head * B->width;
        g->C[s] = C->rows + (row + s) * C->stride + head * C->width;
    }
}

static void
backward_head(const backward_call *call, int64_t sequence, int64_t head, float *workspace)
{
    const mil_ssd_grad *a = call->arguments;
    const mil_ssd *f = &a->forward;
    const mil_span span = mil_get_span(&f->rows, sequence);
    const int64_t size = f->state_dim * f->head_dim, windows = (span.count + WINDOW - 1) / WINDOW;
    const backward_memory m = cut_memory(f, call->windows, workspace);
    window w;
    window_grad g = {.A = 0.0, .D = 0.0};
    double dt_bias = 0.0;
    memset(m.before, 0, (size_t)size * sizeof(float));
    for (int64_t i = 0; i + 1 < windows; i++) {
        get_window(f, &span, NULL, call->dt, head, i * WINDOW, WINDOW, &w);
        advance_transposed(&w, m.scaled, m.before + i * size, m.before + (i + 1) * size);
    }
    memset(m.G, 0, (size_t)(2 * size) * sizeof(float));
    for (int64_t i = windows - 1; i >= 0; i--) {
        bool final = i == windows - 1;
        int64_t start = i * WINDOW, length = final ? span.count - start : WINDOW;
        get_window(f, &span, NULL, call->dt, head, start, length, &w);
        get_window_grad(call, head, span.row + start, length, &g);
        window_backward(&w, i > 0 ? m.before + i * size : NULL, final ? NULL : m.G, final ? NULL : m.G_T, m.row, &g);
        for (int64_t s = 0; s < length; s++) {
            int64_t row = span.row + start + s;
            float grad = g.dt[s] * call->slope[row * f->heads + head];
            ((float *)a->grad_dt)[row * a->grad_dt_stride + head] = grad;
            dt_bias += (double)grad;
        }
        if (i > 0) {
            step_back(&w, &g, m.scaled, m.G, m.G_T);
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
get_head_rows(mil_context *context, const mil_ssd *a, int64_t groups, int64_t width, void *result, int64_t stride,
              head_rows *out)
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
        sum_heads(x, f->heads, f->x_heads, x->rows + row * x->stride, (float *)a->grad_x + row * a->grad_x_stride);
    }
    if (B->shared) {
        sum_heads(B, f->heads, f->B_groups, B->rows + row * B->stride, (float *)a->grad_B + row * a->grad_B_stride);
    }
    if (C->shared) {
        sum_heads(C, f->heads, f->C_groups, C->rows + row * C->stride, (float *)a->grad_C + row * a->grad_C_stride);
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
            fill_dt(f, (const float *)f->dt + row * f->dt_stride, dt + row * f->heads, slope + row * f->heads);
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
