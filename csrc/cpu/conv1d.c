/* Depthwise causal convolution over time, with an optional SiLU: forward and backward.
 *
 *   pre[t, c] = bias[c] + sum_j weight[c, j] x[t - width + 1 + j, source(c)],     y = pre or silu(pre)
 *
 * x [rows, inputs], y [rows, channels], channels = inputs * repeat.  With grouped heads (repeat > 1)
 * each run of repeat_group inputs is read `repeat` times, so the repeated inputs never exist in memory:
 *
 *   inputs      | run 0 | run 1 |                    repeat = 2
 *   channels    | run 0 | run 0 | run 1 | run 1 |
 *
 * A few multiplications a value make this a matter of memory: each input is read from memory once, by
 * the task that owns its block of up to BLOCK neighbouring inputs.  A block never crosses a run, so
 * inputs and outputs of a block are contiguous for each repetition and loops run over channels, one lane
 * an output.  Weights of a block are transposed first ([width, BLOCK]).
 *
 * Every output is bias + taps in the order j = 0 .. width - 1, wherever its inputs come from: rows of
 * this call, the tail of earlier ones, or zeros before the first token.  So a token's bits do not depend
 * on how tokens arrive.
 *
 * Backward recomputes pre instead of keeping it.  With g = grad_y silu'(pre):
 *   grad_x[u, s] = sum over repetitions c of s, then t = u .. u + width - 1:  weight[c, j] g[t, c]
 *   grad_weight[c, j] += sum_t g[t, c] x[t - width + 1 + j, s],   grad_bias[c] += sum_t g[t, c]
 * The sums over t run in float32 within pieces of PIECE rows of a sequence, and in float64 over the
 * pieces in order.
 */
#include "cpu/cpu.h"
#include "cpu/tail.h"
#include "cpu/vector.h"

enum { BLOCK = 64, PIECE = 256, MAX_WIDTH = 8, GRAIN = 1 << 15 };

/* How channels are cut into blocks: `blocks_per_run` blocks of up to `size` inputs in each run. */
typedef struct blocks {
    int64_t run, size, per_run, count;
} blocks;

/* One block of inputs, and one repetition of it. */
typedef struct block {
    int64_t input, channel, size; /* first input, first channel, inputs */
} block;

static int64_t
inputs_of(const mil_conv1d *a)
{
    return a->channels / a->repeat;
}

/* Blocks shrink where there would be fewer than two a thread; no result depends on their size. */
static blocks
cut_blocks(const mil_conv1d *a, int threads)
{
    blocks b = {.run = a->repeat > 1 ? a->repeat_group : inputs_of(a)};
    for (b.size = BLOCK;; b.size /= 2) {
        b.per_run = (b.run + b.size - 1) / b.size;
        b.count = inputs_of(a) / b.run * b.per_run;
        if (b.size <= 16 || b.count >= 2 * (int64_t)threads) {
            return b;
        }
    }
}

static block
get_block(const mil_conv1d *a, const blocks *b, int64_t index, int64_t repetition)
{
    int64_t run = index / b->per_run, offset = index % b->per_run * b->size;
    return (block){
        .input = run * b->run + offset,
        .channel = (run * a->repeat + repetition) * b->run + offset,
        .size = b->run - offset < b->size ? b->run - offset : b->size,
    };
}

/* weight and bias of a block, one row of channels a tap. */
typedef struct taps {
    float weight[MAX_WIDTH][BLOCK], bias[BLOCK];
} taps;

static void
load_taps(const mil_conv1d *a, const block *b, taps *taps)
{
    for (int64_t i = 0; i < b->size; i++) {
        const float *weight = a->weight + (b->channel + i) * a->width;
        for (int64_t j = 0; j < a->width; j++) {
            taps->weight[j][i] = weight[j];
        }
        taps->bias[i] = a->bias != NULL ? a->bias[b->channel + i] : 0.0f;
    }
}

/* The inputs that one block of the row of `token` reads, oldest first; `zeros` for those before the first. */
static void
find_inputs(const mil_conv1d *a, const mil_span *span, const mil_mixer_state *state, const block *b,
            int64_t token, const float *zeros, const float **inputs)
{
    for (int64_t j = 0; j < a->width; j++) {
        int64_t source = token - a->width + 1 + j;
        if (source >= span->past) {
            inputs[j] = (const float *)a->x + (span->row + source - span->past) * a->x_stride + b->input;
        }
        else if (state != NULL) {
            inputs[j] = state->conv + (source - span->boundary + a->width - 1) * inputs_of(a) + b->input;
        }
        else {
            inputs[j] = zeros;
        }
    }
}

/* pre of one row and block: the one place where the sum over taps is written. */
MIL_INLINE void
convolve(int64_t width, int64_t size, const taps *taps, const float *const *inputs, float *restrict pre)
{
    const float *x0 = inputs[0], *x1 = inputs[1];
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        pre[i] = mil_fma(taps->weight[1][i], x1[i], mil_fma(taps->weight[0][i], x0[i], taps->bias[i]));
    }
    for (int64_t j = 2; j < width; j++) {
        const float *x = inputs[j];
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            pre[i] = mil_fma(taps->weight[j][i], x[i], pre[i]);
        }
    }
}

MIL_VECTORISE static void
forward_row(int64_t width, int64_t size, const taps *taps, const float *const *inputs, bool silu, float *y)
{
    float pre[BLOCK];
    convolve(width, size, taps, inputs, pre);
    if (silu) {
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            y[i] = mil_siluf(pre[i]);
        }
    }
    else {
        memcpy(y, pre, (size_t)size * sizeof(float));
    }
}

static void
forward_block(const mil_conv1d *a, const blocks *cut, int64_t sequence, int64_t index)
{
    static const float zeros[BLOCK];
    const mil_span span = mil_get_span(&a->rows, sequence);
    const mil_mixer_state *state = a->states != NULL ? &a->states[sequence] : NULL;
    block b;
    for (int64_t repetition = 0; repetition < a->repeat; repetition++) {
        taps taps;
        b = get_block(a, cut, index, repetition);
        load_taps(a, &b, &taps);
        for (int64_t i = 0; i < span.count; i++) {
            const float *inputs[MAX_WIDTH];
            find_inputs(a, &span, state, &b, span.past + i, zeros, inputs);
            forward_row(a->width, b.size, &taps, inputs, a->silu,
                        (float *)a->y + (span.row + i) * a->y_stride + b.channel);
        }
    }
    if (state != NULL) { /* the block's columns of the tail are nobody else's */
        mil_tail_move(state->conv, inputs_of(a), a->width - 1, b.input, b.size, &span,
                      (const float *)a->x + span.row * a->x_stride + b.input, a->x_stride, span.past);
    }
}

static mil_status
check_args(const char *name, const mil_conv1d *a)
{
    if (a->width < 2 || a->width > MAX_WIDTH) {
        return mil_fail(MIL_ERR_SHAPE, "%s: width = %lld taps; expected 2 to %d", name, (long long)a->width,
                        MAX_WIDTH);
    }
    if (a->repeat < 1 || a->channels < 1 || a->channels % a->repeat != 0) {
        return mil_fail(MIL_ERR_SHAPE, "%s: channels = %lld is not a multiple of repeat = %lld", name,
                        (long long)a->channels, (long long)a->repeat);
    }
    if (a->repeat > 1 && (a->repeat_group < 1 || inputs_of(a) % a->repeat_group != 0)) {
        return mil_fail(MIL_ERR_SHAPE,
                        "%s: channels / repeat = %lld is not a multiple of repeat_group = %lld", name,
                        (long long)inputs_of(a), (long long)a->repeat_group);
    }
    return mil_check_rows(name, &a->rows, a->states != NULL);
}

mil_status
mil_cpu_conv1d_forward(mil_context *context, const mil_conv1d *arguments)
{
    const mil_conv1d *a = arguments;
    MIL_TRY(check_args("conv1d_forward", a));
    const blocks cut = cut_blocks(a, context->threads);
    int64_t tasks = a->rows.sequences * cut.count;
#pragma omp parallel for num_threads(context->threads) \
    schedule(static) if (a->rows.rows * a->channels >= GRAIN)
    for (int64_t task = 0; task < tasks; task++) {
        forward_block(a, &cut, task / cut.count, task % cut.count);
    }
    return MIL_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------- */

/* Gradients of a block's taps: float32 within a piece, float64 over pieces. */
typedef struct taps_grad {
    float weight[MAX_WIDTH][BLOCK], bias[BLOCK];
    double weight_sum[MAX_WIDTH][BLOCK], bias_sum[BLOCK];
} taps_grad;

/* One row: g, then what it adds to the gradients of the taps and of the inputs that it read. */
MIL_VECTORISE static void
backward_row(int64_t width, int64_t size, const taps *taps, const float *const *inputs, bool silu,
             const float *grad_y, float *const *grad_inputs, taps_grad *grad)
{
    float g[BLOCK];
    if (silu) {
        convolve(width, size, taps, inputs, g);
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float sigmoid = mil_sigmoidf(g[i]);
            g[i] = grad_y[i] * (sigmoid + g[i] * sigmoid * (1.0f - sigmoid));
        }
    }
    else {
        memcpy(g, grad_y, (size_t)size * sizeof(float));
    }
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
        grad->bias[i] += g[i];
    }
    for (int64_t j = 0; j < width; j++) {
        const float *x = inputs[j], *weight = taps->weight[j];
        float *grad_weight = grad->weight[j], *grad_x = grad_inputs[j];
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            grad_weight[i] = mil_fma(g[i], x[i], grad_weight[i]);
            grad_x[i] = mil_fma(g[i], weight[i], grad_x[i]);
        }
    }
}

MIL_VECTORISE static void
close_piece(int64_t width, int64_t size, taps_grad *grad)
{
    for (int64_t j = 0; j < width; j++) {
        for (int64_t i = 0; i < size; i++) {
            grad->weight_sum[j][i] += grad->weight[j][i];
            grad->weight[j][i] = 0.0f;
        }
    }
    for (int64_t i = 0; i < size; i++) {
        grad->bias_sum[i] += grad->bias[i];
        grad->bias[i] = 0.0f;
    }
}

static void
backward_sequence(const mil_conv1d_grad *g, const mil_span *span, const block *b, const taps *taps,
                  taps_grad *grad)
{
    static const float zeros[BLOCK];
    const mil_conv1d *a = &g->forward;
    float nowhere[BLOCK]; /* takes what would go to tokens before the first */
    memset(nowhere, 0, sizeof nowhere);
    for (int64_t t = 0; t < span->count; t++) {
        const float *inputs[MAX_WIDTH];
        float *grad_inputs[MAX_WIDTH];
        find_inputs(a, span, NULL, b, t, zeros, inputs);
        for (int64_t j = 0; j < a->width; j++) {
            int64_t source = t - a->width + 1 + j;
            grad_inputs[j] = source < 0
                                 ? nowhere
                                 : (float *)g->grad_x + (span->row + source) * g->grad_x_stride + b->input;
        }
        backward_row(a->width, b->size, taps, inputs, a->silu,
                     (const float *)g->grad_y + (span->row + t) * g->grad_y_stride + b->channel, grad_inputs,
                     grad);
        if ((t + 1) % PIECE == 0 || t + 1 == span->count) {
            close_piece(a->width, b->size, grad);
        }
    }
}

static void
backward_block(const mil_conv1d_grad *g, const blocks *cut, int64_t index)
{
    const mil_conv1d *a = &g->forward;
    block b = get_block(a, cut, index, 0);
    for (int64_t row = 0; row < a->rows.rows; row++) {
        memset((float *)g->grad_x + row * g->grad_x_stride + b.input, 0, (size_t)b.size * sizeof(float));
    }
    for (int64_t repetition = 0; repetition < a->repeat; repetition++) {
        taps taps;
        taps_grad grad;
        memset(&grad, 0, sizeof grad);
        b = get_block(a, cut, index, repetition);
        load_taps(a, &b, &taps);
        for (int64_t sequence = 0; sequence < a->rows.sequences; sequence++) {
            mil_span span = mil_get_span(&a->rows, sequence);
            backward_sequence(g, &span, &b, &taps, &grad);
        }
        for (int64_t i = 0; i < b.size; i++) {
            for (int64_t j = 0; j < a->width && g->grad_weight != NULL; j++) {
                g->grad_weight[(b.channel + i) * a->width + j] += (float)grad.weight_sum[j][i];
            }
            if (g->grad_bias != NULL) {
                g->grad_bias[b.channel + i] += (float)grad.bias_sum[i];
            }
        }
    }
}

mil_status
mil_cpu_conv1d_backward(mil_context *context, const mil_conv1d_grad *arguments)
{
    const mil_conv1d *a = &arguments->forward;
    MIL_TRY(check_args("conv1d_backward", a));
    if (a->states != NULL) {
        return mil_fail(MIL_ERR_VALUE, "conv1d_backward: states are for generation; sequences start here");
    }
    const blocks cut = cut_blocks(a, context->threads);
#pragma omp parallel for num_threads(context->threads) \
    schedule(static) if (a->rows.rows * a->channels >= GRAIN)
    for (int64_t index = 0; index < cut.count; index++) {
        backward_block(arguments, &cut, index);
    }
    return MIL_OK;
}
