/* Mamba-1's selective scan: forward and backward.
 *
 * Per channel c and state n, with A = -exp(A_log):
 *
 *   dt_t = clamp(softplus(dt[t] + dt_bias_scale dt_bias))
 *   H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t[n],   y_t = (D x_t + sum_n C_t[n] H_t[n]) silu(z_t)
 *
 * The decay differs in every channel and state, so there is no matrix form: the work is one exponential
 * and three multiplications for each of rows * inner * state_dim elements, and H must stay in the
 * first-level cache.  Tasks are blocks of up to LANES channels that read the same B and C group; a
 * block's H and A lie as [state_dim, LANES], one lane a channel, so the sum over n is a chain in each
 * lane and no sum crosses lanes.  States in memory are [state_dim, inner] for the same reason.  Unused
 * lanes of a short block compute zeros.
 *
 * Bits: H after a token is a function of H before it, whoever runs the step, so prefill, one token at a
 * time and replaying a tail agree bit for bit.  A step starts from `current` if that is the state after
 * `past` tokens (plain decoding), and else replays the tail from `state`, which moves on a window at a
 * time (device.h).
 *
 * Backward recomputes: a first pass keeps H every PIECE rows (1 / PIECE of what storing all states would
 * take), then pieces are taken from the last to the first, each recomputed with all its H and decays
 * kept, and gone through backwards.  With e = grad_y silu(z), and K the gradient of H_t:
 *   K += C_t e_t,  q = K decay_t H_{t-1}
 *   grad_C_t = sum_c e_t H_t,              grad_B_t = sum_c K dt_t x_t
 *   grad_x_t = D e_t + dt_t sum_n K B_t,   grad_dt_t = x_t sum_n K B_t + sum_n A q
 *   grad_A_log += dt_t A q,                K *= decay_t
 *
 * Sums over the channels of a group: within a block in a fixed tree, then blocks in order.  Parameters'
 * gradients: float32 within a piece, float64 over the pieces and sequences in order.
 *
 * Source: Gu & Dao 2023 (arXiv 2312.00752), sections 3.2 and 3.3.2 (recomputation).
 */
#include "cpu/cpu.h"
#include "cpu/tail.h"
#include "cpu/vector.h"

#include <omp.h>

enum { LANES = 16, PIECE = 32, AHEAD = 4, GRAIN = 1 << 14 };

static const float log2_e = 1.442695041f;

/* ---- blocks of channels ------------------------------------------------------------------------------ */

/* Runs of channels that share B and C, cut into blocks of up to LANES. */
typedef struct blocks {
    int64_t run, per_run, count;
} blocks;

typedef struct block {
    int64_t channel, width, state_dim;
    int64_t B_at, C_at;                          /* offsets in rows of B and C */
    int64_t source[LANES];                       /* columns of x */
    bool contiguous;                             /* source[i] = source[0] + i */
    float D[LANES], bias[LANES], dt_min, dt_max; /* bias is scaled */
    float *exponent;                             /* [state_dim, LANES]: A log2(e) */
} block;

static int64_t
greatest_common_divisor(int64_t a, int64_t b)
{
    return b == 0 ? a : greatest_common_divisor(b, a % b);
}

static blocks
cut_blocks(const mil_scan *a)
{
    blocks b = {.run = greatest_common_divisor(a->inner / a->B_groups, a->inner / a->C_groups)};
    b.per_run = (b.run + LANES - 1) / LANES;
    b.count = a->inner / b.run * b.per_run;
    return b;
}

/* exponent[n][i] = -exp(A_log[channel + i][n]) log2(e), kept finite so that 0 * A is 0; 0 in unused lanes. */
MIL_VECTORISE static void
fill_exponent(const mil_scan *a, const block *b)
{
    memset(b->exponent, 0, (size_t)(a->state_dim * LANES) * sizeof(float));
    for (int64_t i = 0; i < b->width; i++) {
        const float *A_log = a->A_log + (b->channel + i) * a->state_dim;
        float *out = b->exponent + i;
#pragma omp simd
        for (int64_t n = 0; n < a->state_dim; n++) {
            float A = mil_expf(A_log[n]);
            out[n * LANES] = -log2_e * mil_select(A > 1e30f, 1e30f, A);
        }
    }
}

static block
get_block(const mil_scan *a, const blocks *cut, int64_t index, float *exponent)
{
    int64_t offset = index % cut->per_run * LANES;
    block b = {
        .channel = index / cut->per_run * cut->run + offset, .state_dim = a->state_dim, .exponent = exponent};
    b.width = cut->run - offset < LANES ? cut->run - offset : LANES;
    b.B_at = b.channel * a->B_groups / a->inner * a->state_dim;
    b.C_at = b.channel * a->C_groups / a->inner * a->state_dim;
    b.dt_min = a->dt_min;
    b.dt_max = a->dt_max;
    b.contiguous = true;
    for (int64_t i = 0; i < b.width; i++) {
        int64_t c = b.channel + i;
        b.source[i] = a->x_repeat > 1
                          ? c / (a->x_repeat_group * a->x_repeat) * a->x_repeat_group + c % a->x_repeat_group
                          : c;
        b.contiguous = b.contiguous && b.source[i] == b.source[0] + i;
        b.D[i] = a->D[c];
        b.bias[i] = a->dt_bias_scale * a->dt_bias[c];
    }
    fill_exponent(a, &b);
    return b;
}

/* Lanes from memory, zeros beyond the block. */
MIL_INLINE void
load_lanes(int64_t width, const float *from, float *lanes)
{
    if (width == LANES) {
        memcpy(lanes, from, LANES * sizeof(float));
    }
    else {
        memset(lanes, 0, LANES * sizeof(float));
        memcpy(lanes, from, (size_t)width * sizeof(float));
    }
}

MIL_INLINE void
store_lanes(int64_t width, const float *lanes, float *to)
{
    if (width == LANES) {
        memcpy(to, lanes, LANES * sizeof(float));
    }
    else {
        memcpy(to, lanes, (size_t)width * sizeof(float));
    }
}

MIL_INLINE void
load_x(const block *b, const float *row, float *lanes)
{
    if (b->contiguous) {
        load_lanes(b->width, row + b->source[0], lanes);
        return;
    }
    memset(lanes, 0, LANES * sizeof(float));
    for (int64_t i = 0; i < b->width; i++) {
        lanes[i] = row[b->source[i]];
    }
}

/* Asks for what row `row` will need. Rows are too far apart for the processor to guess the next one. */
MIL_INLINE void
prefetch_row(const mil_scan *a, const block *b, int64_t row)
{
    if (row < 0 || row >= a->rows.rows) {
        return;
    }
    __builtin_prefetch((const float *)a->x + row * a->x_stride + b->source[0]);
    __builtin_prefetch((const float *)a->dt + row * a->dt_stride + b->channel);
    __builtin_prefetch((const float *)a->B + row * a->B_stride + b->B_at);
    __builtin_prefetch((const float *)a->C + row * a->C_stride + b->C_at);
    if (a->z != NULL) {
        __builtin_prefetch((const float *)a->z + row * a->z_stride + b->channel);
    }
}

/* dt after bias, softplus and clamp. */
MIL_INLINE void
load_dt(const block *b, const float *row, float *lanes)
{
    float raw[LANES];
    load_lanes(b->width, row, raw);
#pragma omp simd
    for (int i = 0; i < LANES; i++) {
        float value = mil_softplusf(raw[i] + b->bias[i]);
        value = mil_select(value < b->dt_min, b->dt_min, value);
        lanes[i] = mil_select(value > b->dt_max, b->dt_max, value);
    }
}

/* One token, the one place where the recurrence is written: H moves on, y += C . H. */
MIL_INLINE void
step(const block *b, const float *dt, const float *x, const float *B, const float *C, float *restrict H,
     float *restrict y)
{
    float input[LANES];
#pragma omp simd
    for (int i = 0; i < LANES; i++) {
        input[i] = dt[i] * x[i];
    }
    for (int64_t n = 0; n < b->state_dim; n++) {
        const float *exponent = b->exponent + n * LANES;
        float *state = H + n * LANES, B_n = B[n], C_n = C[n];
#pragma omp simd
        for (int i = 0; i < LANES; i++) {
            float moved = mil_fma(mil_decayf(dt[i] * exponent[i]), state[i], input[i] * B_n);
            state[i] = moved;
            y[i] = mil_fma(C_n, moved, y[i]);
        }
    }
}

/* ---- forward ----------------------------------------------------------------------------------------- */

/* Rows first .. end of the sequence for one block; dt of tokens from `from` on go to `kept`. */
MIL_VECTORISE static void
run_rows(const mil_scan *a, const block *b, const mil_span *span, int64_t first, int64_t end, float *H,
         float *kept, int64_t from)
{
    for (int64_t i = first; i < end; i++) {
        int64_t row = span->row + i;
        float dt[LANES], x[LANES], y[LANES];
        prefetch_row(a, b, row + AHEAD);
        load_dt(b, (const float *)a->dt + row * a->dt_stride + b->channel, dt);
        load_x(b, (const float *)a->x + row * a->x_stride, x);
#pragma omp simd
        for (int l = 0; l < LANES; l++) {
            y[l] = b->D[l] * x[l];
        }
        step(b, dt, x, (const float *)a->B + row * a->B_stride + b->B_at,
             (const float *)a->C + row * a->C_stride + b->C_at, H, y);
        if (a->z != NULL) {
            float z[LANES];
            load_lanes(b->width, (const float *)a->z + row * a->z_stride + b->channel, z);
#pragma omp simd
            for (int l = 0; l < LANES; l++) {
                y[l] *= mil_siluf(z[l]);
            }
        }
        store_lanes(b->width, y, (float *)a->y + row * a->y_stride + b->channel);
        if (kept != NULL && span->past + i >= from) {
            memcpy(kept + (span->past + i - from) * LANES, dt, sizeof dt);
        }
    }
}

/* Tail tokens from `first` to `end`: H only. */
MIL_VECTORISE static void
replay(const mil_scan *a, const block *b, const mil_span *span, const mil_mixer_state *state, int64_t first,
       int64_t end, float *H)
{
    const int64_t x_width = a->inner / a->x_repeat, B_width = a->B_groups * a->state_dim;
    for (int64_t token = first; token < end; token++) {
        int64_t tail = token - span->boundary;
        const float *B = state->B + tail * B_width + b->B_at;
        float dt[LANES], x[LANES], unused[LANES] = {0};
        load_lanes(b->width, state->dt + tail * a->inner + b->channel, dt);
        load_x(b, state->x + tail * x_width, x);
        step(b, dt, x, B, B, H, unused);
    }
}

static void
load_H(const mil_scan *a, const block *b, const float *state, float *H)
{
    for (int64_t n = 0; n < a->state_dim; n++) {
        load_lanes(b->width, state + n * a->inner + b->channel, H + n * LANES);
    }
}

static void
store_H(const mil_scan *a, const block *b, const float *H, float *state)
{
    for (int64_t n = 0; n < a->state_dim; n++) {
        store_lanes(b->width, H + n * LANES, state + n * a->inner + b->channel);
    }
}

/* Brings H to `past` tokens, and `state` to `after` where the boundary moves over earlier calls' tokens. */
static void
start_from_state(const mil_scan *a, const block *b, const mil_span *span, const mil_mixer_state *state,
                 float *H)
{
    const bool fresh = state->current != NULL && *state->current_tokens == span->past;
    int64_t reached = span->boundary;
    if (fresh && span->after == span->past) { /* the usual way for the boundary to move in plain decoding */
        load_H(a, b, state->current, H);
        store_H(a, b, H, state->state);
        return;
    }
    if (span->boundary < span->after && span->after <= span->past) {
        load_H(a, b, state->state, H);
        replay(a, b, span, state, span->boundary, span->after, H);
        store_H(a, b, H, state->state);
        reached = span->after;
    }
    if (fresh) {
        load_H(a, b, state->current, H);
        return;
    }
    if (reached == span->boundary) {
        load_H(a, b, state->state, H);
    }
    replay(a, b, span, state, reached, span->past, H);
}

static void
forward_with_state(const mil_scan *a, const block *b, const mil_span *span, const mil_mixer_state *state,
                   float *H)
{
    float kept[MIL_TAIL * LANES];
    const int64_t from = span->after > span->past ? span->after : span->past;
    start_from_state(a, b, span, state, H);
    run_rows(a, b, span, 0, from - span->past, H, NULL, 0);
    if (span->after > span->past) {
        store_H(a, b, H, state->state);
    }
    run_rows(a, b, span, from - span->past, span->count, H, kept, from);
    if (state->current != NULL) {
        store_H(a, b, H, state->current);
    }
    mil_tail_move(state->dt, a->inner, 0, b->channel, b->width, span, kept, LANES, from);
}

static void
forward_block(const mil_scan *a, const blocks *cut, int64_t sequence, int64_t index, float *workspace)
{
    const mil_span span = mil_get_span(&a->rows, sequence);
    const block b = get_block(a, cut, index, workspace);
    float *H = workspace + a->state_dim * LANES;
    if (a->states != NULL) {
        forward_with_state(a, &b, &span, &a->states[sequence], H);
        return;
    }
    memset(H, 0, (size_t)(a->state_dim * LANES) * sizeof(float));
    run_rows(a, &b, &span, 0, span.count, H, NULL, 0);
}

static void
move_tails(const mil_scan *a, int64_t sequence)
{
    const mil_span span = mil_get_span(&a->rows, sequence);
    const mil_mixer_state *state = &a->states[sequence];
    int64_t x_width = a->inner / a->x_repeat, B_width = a->B_groups * a->state_dim;
    mil_tail_move(state->x, x_width, 0, 0, x_width, &span, (const float *)a->x + span.row * a->x_stride,
                  a->x_stride, span.past);
    mil_tail_move(state->B, B_width, 0, 0, B_width, &span, (const float *)a->B + span.row * a->B_stride,
                  a->B_stride, span.past);
    if (state->current != NULL) {
        *state->current_tokens = span.past + span.count;
    }
}

static mil_status
check_args(const char *name, const mil_scan *a)
{
    if (a->inner < 1 || a->state_dim < 1) {
        return mil_fail(MIL_ERR_SHAPE, "%s: inner = %lld, state_dim = %lld; expected at least 1", name,
                        (long long)a->inner, (long long)a->state_dim);
    }
    if (a->B_groups < 1 || a->inner % a->B_groups != 0 || a->C_groups < 1 || a->inner % a->C_groups != 0) {
        return mil_fail(MIL_ERR_SHAPE,
                        "%s: inner = %lld is not a multiple of B_groups = %lld and C_groups = %lld", name,
                        (long long)a->inner, (long long)a->B_groups, (long long)a->C_groups);
    }
    if (a->x_repeat < 1 || a->inner % a->x_repeat != 0 ||
        (a->x_repeat > 1 && (a->x_repeat_group < 1 || a->inner / a->x_repeat % a->x_repeat_group != 0))) {
        return mil_fail(MIL_ERR_SHAPE,
                        "%s: inner = %lld is not a multiple of x_repeat = %lld times x_repeat_group = %lld",
                        name, (long long)a->inner, (long long)a->x_repeat, (long long)a->x_repeat_group);
    }
    if (!(a->dt_min <= a->dt_max) || !(a->dt_min >= 0)) {
        return mil_fail(MIL_ERR_VALUE, "%s: dt_min = %g, dt_max = %g; expected 0 <= dt_min <= dt_max", name,
                        a->dt_min, a->dt_max);
    }
    return mil_check_rows(name, &a->rows, a->states != NULL);
}

/* A team costs more than a small call's work, so that does without. `memory` is [threads, workspace]. */
static void
run_forward(const mil_scan *a, int threads, float *memory, int64_t workspace)
{
    const blocks cut = cut_blocks(a);
    const int64_t tasks = a->rows.sequences * cut.count, moving = a->states != NULL ? a->rows.sequences : 0;
    if (threads == 1 || a->rows.rows * a->inner * a->state_dim < GRAIN) {
        for (int64_t task = 0; task < tasks; task++) {
            forward_block(a, &cut, task / cut.count, task % cut.count, memory);
        }
        for (int64_t sequence = 0; sequence < moving; sequence++) {
            move_tails(a, sequence);
        }
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        float *own = memory + omp_get_thread_num() * workspace;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            forward_block(a, &cut, task / cut.count, task % cut.count, own);
        }
#pragma omp for schedule(static)
        for (int64_t sequence = 0; sequence < moving; sequence++) {
            move_tails(a, sequence);
        }
    }
}

mil_status
mil_cpu_scan_forward(mil_context *context, const mil_scan *arguments)
{
    MIL_TRY(check_args("scan_forward", arguments));
    const int64_t workspace = 2 * arguments->state_dim * LANES;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    float *memory;
    MIL_TRY(MIL_PUSH(context->scratch, context->threads * workspace, float, &memory));
    run_forward(arguments, context->threads, memory, workspace);
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------- */

/* One thread's memory, all [.., state_dim, LANES]. */
typedef struct backward_memory {
    float *exponent;
    float *starts;        /* [pieces, ..]: H before each piece */
    float *decay, *after; /* [PIECE, ..]: for each row of a piece the decay that it applies, and H after it */
    float *K;             /* gradient of H */
    float *q;             /* sum of dt q over the rows of a piece */
    double *q_sum;        /* and over all pieces */
} backward_memory;

/* Gradients of a block's other parameters, in the same two steps. */
typedef struct lane_sums {
    float D[LANES], dt[LANES];
    double D_sum[LANES], dt_sum[LANES];
} lane_sums;

/* Where a gradient goes: into the result, or where several blocks or channels add to it into partial
 * rows, to be added up later. */
typedef struct partial_rows {
    float *rows;
    int64_t stride;
    bool shared;
} partial_rows;

typedef struct backward_call {
    const mil_scan_grad *arguments;
    blocks cut;
    partial_rows x;    /* [rows, inner] */
    partial_rows B, C; /* [rows, blocks, state_dim] */
    int64_t pieces;    /* most pieces of a sequence */
} backward_call;

static int64_t
backward_workspace(const mil_scan *a, int64_t pieces)
{
    return (pieces + 2 * PIECE + 5) * a->state_dim * LANES; /* q_sum counts twice */
}

static backward_memory
cut_memory(const mil_scan *a, float *memory)
{
    int64_t size = a->state_dim * LANES;
    backward_memory m = {.q_sum = (double *)memory, .exponent = memory + 2 * size};
    m.K = m.exponent + size;
    m.q = m.K + size;
    m.decay = m.q + size;
    m.after = m.decay + PIECE * size;
    m.starts = m.after + PIECE * size;
    return m;
}

/* A fixed tree. */
MIL_INLINE float
sum_lanes(const float *lanes)
{
    float half[LANES / 2];
#pragma omp simd
    for (int i = 0; i < LANES / 2; i++) {
        half[i] = lanes[i] + lanes[i + LANES / 2];
    }
    return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}

/* H from the first row of a piece to its end. */
MIL_VECTORISE static void
advance_piece(const mil_scan *a, const block *b, int64_t row, int64_t count, const float *from, float *to)
{
    memcpy(to, from, (size_t)(b->state_dim * LANES) * sizeof(float));
    for (int64_t i = row; i < row + count; i++) {
        const float *B = (const float *)a->B + i * a->B_stride + b->B_at;
        float dt[LANES], x[LANES], unused[LANES] = {0};
        prefetch_row(a, b, i + AHEAD);
        load_dt(b, (const float *)a->dt + i * a->dt_stride + b->channel, dt);
        load_x(b, (const float *)a->x + i * a->x_stride, x);
        step(b, dt, x, B, B, to, unused);
    }
}

/* As `step` for each row of a piece, keeping decays and states. */
MIL_VECTORISE static void
keep_piece(const mil_scan *a, const block *b, int64_t row, int64_t count, const float *start,
           const backward_memory *m)
{
    const float *before = start;
    for (int64_t i = 0; i < count; i++) {
        const float *B = (const float *)a->B + (row + i) * a->B_stride + b->B_at;
        float dt[LANES], x[LANES];
        float *decay = m->decay + i * b->state_dim * LANES, *after = m->after + i * b->state_dim * LANES;
        load_dt(b, (const float *)a->dt + (row + i) * a->dt_stride + b->channel, dt);
        load_x(b, (const float *)a->x + (row + i) * a->x_stride, x);
        for (int64_t n = 0; n < b->state_dim; n++) {
            const float *exponent = b->exponent + n * LANES, *from = before + n * LANES;
            float *keep = decay + n * LANES, *to = after + n * LANES, B_n = B[n];
#pragma omp simd
            for (int l = 0; l < LANES; l++) {
                keep[l] = mil_decayf(dt[l] * exponent[l]);
                to[l] = mil_fma(keep[l], from[l], dt[l] * x[l] * B_n);
            }
        }
        before = after;
    }
}

/* The gradient behind the gate, e = grad_y silu(z), and that of z. */
MIL_INLINE void
gate_backward(const mil_scan_grad *g, const block *b, int64_t row, const float *x, const float *H, float *e)
{
    const mil_scan *a = &g->forward;
    const float *C = (const float *)a->C + row * a->C_stride + b->C_at;
    float z[LANES], grad_z[LANES], y[LANES];
    if (a->z == NULL) {
        return;
    }
    load_lanes(b->width, (const float *)a->z + row * a->z_stride + b->channel, z);
#pragma omp simd
    for (int l = 0; l < LANES; l++) {
        y[l] = b->D[l] * x[l];
    }
    for (int64_t n = 0; n < b->state_dim; n++) {
        const float *state = H + n * LANES;
        float C_n = C[n];
#pragma omp simd
        for (int l = 0; l < LANES; l++) {
            y[l] = mil_fma(C_n, state[l], y[l]);
        }
    }
#pragma omp simd
    for (int l = 0; l < LANES; l++) {
        float sigmoid = mil_sigmoidf(z[l]), silu = z[l] * sigmoid;
        grad_z[l] = e[l] * y[l] * (sigmoid + silu * (1.0f - sigmoid));
        e[l] *= silu;
    }
    store_lanes(b->width, grad_z, (float *)g->grad_z + row * g->grad_z_stride + b->channel);
}

/* The recurrence of one row, backwards: K and q of the block, this row's grad_B and grad_C, and for each
 * lane into_B = sum_n K B and into_A = sum_n A q (times log2(e)). */
MIL_INLINE void
step_backward(const block *b, const float *dt, const float *x, const float *e, const float *B, const float *C,
              const float *decay, const float *before, const float *after, const backward_memory *m,
              float *grad_B, float *grad_C, float *into_B, float *into_A)
{
    float input[LANES];
#pragma omp simd
    for (int l = 0; l < LANES; l++) {
        input[l] = dt[l] * x[l];
    }
    for (int64_t n = 0; n < b->state_dim; n++) {
        float B_n = B[n], C_n = C[n], for_B[LANES], for_C[LANES];
        float *K = m->K + n * LANES, *sum = m->q + n * LANES;
        const float *from = before + n * LANES, *to = after + n * LANES;
        const float *kept = decay + n * LANES, *exponent = b->exponent + n * LANES;
#pragma omp simd
        for (int l = 0; l < LANES; l++) {
            float grad = mil_fma(C_n, e[l], K[l]), passed = grad * kept[l], q = passed * from[l];
            for_B[l] = grad * input[l];
            for_C[l] = e[l] * to[l];
            into_B[l] = mil_fma(grad, B_n, into_B[l]);
            into_A[l] = mil_fma(exponent[l], q, into_A[l]);
            sum[l] = mil_fma(dt[l], q, sum[l]);
            K[l] = passed;
        }
        grad_B[n] = sum_lanes(for_B);
        grad_C[n] = sum_lanes(for_C);
    }
}

MIL_VECTORISE static void
backward_row(const backward_call *call, const block *b, int64_t index, int64_t row, const float *decay,
             const float *before, const float *after, const backward_memory *m, lane_sums *sums)
{
    const mil_scan_grad *g = call->arguments;
    const mil_scan *a = &g->forward;
    const float *raw = (const float *)a->dt + row * a->dt_stride + b->channel;
    const float *grad_y = (const float *)g->grad_y + row * g->grad_y_stride + b->channel;
    float dt[LANES], input[LANES], x[LANES], e[LANES], grad_dt[LANES], grad_x[LANES], into_B[LANES] = {0},
                                                                                      into_A[LANES] = {0};
    prefetch_row(a, b, row - AHEAD);
    __builtin_prefetch(grad_y - (row >= AHEAD ? AHEAD * g->grad_y_stride : 0));
    load_dt(b, raw, dt);
    load_lanes(b->width, raw, input);
    load_x(b, (const float *)a->x + row * a->x_stride, x);
    load_lanes(b->width, grad_y, e);
    gate_backward(g, b, row, x, after, e);
    step_backward(b, dt, x, e, (const float *)a->B + row * a->B_stride + b->B_at,
                  (const float *)a->C + row * a->C_stride + b->C_at, decay, before, after, m,
                  call->B.rows + row * call->B.stride + index * b->state_dim,
                  call->C.rows + row * call->C.stride + index * b->state_dim, into_B, into_A);
#pragma omp simd
    for (int l = 0; l < LANES; l++) {
        float biased = input[l] + b->bias[l], value = mil_softplusf(biased);
        float slope = mil_select((value >= b->dt_min) & (value <= b->dt_max), mil_sigmoidf(biased), 0.0f);
        grad_x[l] = mil_fma(dt[l], into_B[l], b->D[l] * e[l]);
        grad_dt[l] = mil_fma(into_A[l], 1.0f / log2_e, x[l] * into_B[l]) * slope;
        sums->D[l] = mil_fma(e[l], x[l], sums->D[l]);
        sums->dt[l] += grad_dt[l];
    }
    store_lanes(b->width, grad_dt, (float *)g->grad_dt + row * g->grad_dt_stride + b->channel);
    store_lanes(b->width, grad_x, call->x.rows + row * call->x.stride + b->channel);
}

static void
close_piece(const block *b, const backward_memory *m, lane_sums *sums)
{
    for (int64_t i = 0; i < b->state_dim * LANES; i++) {
        m->q_sum[i] += (double)m->q[i];
        m->q[i] = 0.0f;
    }
    for (int l = 0; l < LANES; l++) {
        sums->D_sum[l] += (double)sums->D[l];
        sums->dt_sum[l] += (double)sums->dt[l];
        sums->D[l] = sums->dt[l] = 0.0f;
    }
}

static void
backward_sequence(const backward_call *call, const block *b, int64_t index, int64_t sequence,
                  const backward_memory *m, lane_sums *sums)
{
    const mil_scan *a = &call->arguments->forward;
    const mil_span span = mil_get_span(&a->rows, sequence);
    const int64_t size = a->state_dim * LANES, pieces = (span.count + PIECE - 1) / PIECE;
    memset(m->starts, 0, (size_t)size * sizeof(float));
    for (int64_t i = 0; i + 1 < pieces; i++) {
        advance_piece(a, b, span.row + i * PIECE, PIECE, m->starts + i * size, m->starts + (i + 1) * size);
    }
    memset(m->K, 0, (size_t)size * sizeof(float));
    for (int64_t i = pieces - 1; i >= 0; i--) {
        int64_t first = i * PIECE, count = span.count - first < PIECE ? span.count - first : PIECE;
        const float *start = m->starts + i * size;
        keep_piece(a, b, span.row + first, count, start, m);
        for (int64_t t = count - 1; t >= 0; t--) {
            backward_row(call, b, index, span.row + first + t, m->decay + t * size,
                         t > 0 ? m->after + (t - 1) * size : start, m->after + t * size, m, sums);
        }
        close_piece(b, m, sums);
    }
}

static void
add_parameter_gradients(const mil_scan_grad *g, const block *b, const backward_memory *m,
                        const lane_sums *sums)
{
    const int64_t state_dim = b->state_dim;
    for (int64_t i = 0; i < b->width; i++) {
        int64_t c = b->channel + i;
        for (int64_t n = 0; n < state_dim && g->grad_A_log != NULL; n++) {
            double A = (double)b->exponent[n * LANES + i] / (double)log2_e;
            g->grad_A_log[c * state_dim + n] += (float)(A * m->q_sum[n * LANES + i]);
        }
        if (g->grad_dt_bias != NULL) {
            g->grad_dt_bias[c] += (float)((double)g->forward.dt_bias_scale * sums->dt_sum[i]);
        }
        if (g->grad_D != NULL) {
            g->grad_D[c] += (float)sums->D_sum[i];
        }
    }
}

static void
backward_block(const backward_call *call, int64_t index, float *workspace)
{
    const mil_scan *a = &call->arguments->forward;
    const backward_memory m = cut_memory(a, workspace);
    const block b = get_block(a, &call->cut, index, m.exponent);
    lane_sums sums;
    memset(&sums, 0, sizeof sums);
    memset(m.q, 0, (size_t)(a->state_dim * LANES) * sizeof(float));
    memset(m.q_sum, 0, (size_t)(a->state_dim * LANES) * sizeof(double));
    for (int64_t sequence = 0; sequence < a->rows.sequences; sequence++) {
        backward_sequence(call, &b, index, sequence, &m, &sums);
    }
    add_parameter_gradients(call->arguments, &b, &m, &sums);
}

/* One row of grad_B or grad_C from partial rows: the blocks of each group, in order. */
static void
sum_blocks(const mil_scan *a, const blocks *cut, int64_t groups, const float *partial, float *to)
{
    int64_t each = cut->count / groups;
    memset(to, 0, (size_t)(groups * a->state_dim) * sizeof(float));
    for (int64_t block = 0; block < cut->count; block++) {
        float *out = to + block / each * a->state_dim;
        const float *add = partial + block * a->state_dim;
        for (int64_t n = 0; n < a->state_dim; n++) {
            out[n] += add[n];
        }
    }
}

/* One row of grad_x: the repetitions of each input, in order. */
static void
sum_repetitions(const mil_scan *a, const float *partial, float *to)
{
    int64_t group = a->x_repeat_group, run = group * a->x_repeat;
    for (int64_t s = 0; s < a->inner / a->x_repeat; s++) {
        const float *first = partial + s / group * run + s % group;
        float sum = first[0];
        for (int64_t r = 1; r < a->x_repeat; r++) {
            sum += first[r * group];
        }
        to[s] = sum;
    }
}

static void
sum_shared(const backward_call *call, int64_t row)
{
    const mil_scan_grad *g = call->arguments;
    const mil_scan *a = &g->forward;
    if (call->x.shared) {
        sum_repetitions(a, call->x.rows + row * call->x.stride, (float *)g->grad_x + row * g->grad_x_stride);
    }
    if (call->B.shared) {
        sum_blocks(a, &call->cut, a->B_groups, call->B.rows + row * call->B.stride,
                   (float *)g->grad_B + row * g->grad_B_stride);
    }
    if (call->C.shared) {
        sum_blocks(a, &call->cut, a->C_groups, call->C.rows + row * call->C.stride,
                   (float *)g->grad_C + row * g->grad_C_stride);
    }
}

static mil_status
get_partial_rows(mil_context *context, int64_t rows, int64_t width, bool shared, void *result, int64_t stride,
                 partial_rows *out)
{
    *out = (partial_rows){.rows = result, .stride = shared ? width : stride, .shared = shared};
    return shared ? MIL_PUSH(context->scratch, rows * width, float, &out->rows) : MIL_OK;
}

static mil_status
prepare_backward(mil_context *context, const mil_scan_grad *g, backward_call *call, float **memory)
{
    const mil_scan *a = &g->forward;
    const int64_t rows = a->rows.rows;
    *call = (backward_call){.arguments = g, .cut = cut_blocks(a), .pieces = 1};
    for (int64_t i = 0; i < a->rows.sequences; i++) {
        int64_t pieces = (mil_get_span(&a->rows, i).count + PIECE - 1) / PIECE;
        call->pieces = pieces > call->pieces ? pieces : call->pieces;
    }
    const int64_t count = call->cut.count, width = count * a->state_dim;
    MIL_TRY(
        get_partial_rows(context, rows, a->inner, a->x_repeat > 1, g->grad_x, g->grad_x_stride, &call->x));
    MIL_TRY(
        get_partial_rows(context, rows, width, count != a->B_groups, g->grad_B, g->grad_B_stride, &call->B));
    MIL_TRY(
        get_partial_rows(context, rows, width, count != a->C_groups, g->grad_C, g->grad_C_stride, &call->C));
    return MIL_PUSH(context->scratch, context->threads * backward_workspace(a, call->pieces), float, memory);
}

mil_status
mil_cpu_scan_backward(mil_context *context, const mil_scan_grad *arguments)
{
    const mil_scan *a = &arguments->forward;
    MIL_TRY(check_args("scan_backward", a));
    if (a->states != NULL) {
        return mil_fail(MIL_ERR_VALUE, "scan_backward: states are for generation; sequences start here");
    }
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    backward_call call;
    float *memory;
    mil_status status = prepare_backward(context, arguments, &call, &memory);
    if (status != MIL_OK) {
        mil_arena_rewind(context->scratch, mark);
        return status;
    }
    const int64_t workspace = backward_workspace(a, call.pieces);
    const bool parallel = a->rows.rows * a->inner * a->state_dim >= GRAIN;
#pragma omp parallel num_threads(context->threads) if (parallel)
    {
        float *own = memory + omp_get_thread_num() * workspace;
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < call.cut.count; index++) {
            backward_block(&call, index, own);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < a->rows.rows; row++) {
            sum_shared(&call, row);
        }
    }
    mil_arena_rewind(context->scratch, mark);
    return MIL_OK;
}
