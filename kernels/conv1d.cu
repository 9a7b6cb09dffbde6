/* Depthwise causal convolution with an optional SiLU (device.h: mil_conv1d, csrc/cpu/conv1d.c).
 *
 *   y[t, c] = act(bias[c] + sum_j weight[c, j] x[t - width + 1 + j, source(c)])
 *
 * A few multiplications a value: a matter of bytes, or, in decoding, of one trip to memory.  A thread takes V
 * neighbouring inputs and CHUNK rows of one sequence, with the last width - 1 inputs in registers, so an input is
 * read once (and width - 1 rows more a chunk).  V is 4 where there is enough to do (with AHEAD rows on their way, that
 * fills the memory system at fewer registers than 8 would take), else 2 or 1, so that one row of a small model still
 * spreads over the chip.  Taps are added in the order j = 0 .. width - 1 whoever computes a row, so its bits are
 * always the same.
 *
 * The thread that has a column's first chunk is the only one that reads the column's tail, and moves it on when it
 * has computed: no other thread is in its way.
 */
#include "conv1d.cuh"

#include "table.h"
#include "tail.cuh"

#define THREADS 128
#define CHUNK 64
#define MOST_TAPS 8
#define SEQUENCES 256 /* of one launch, whose tails travel as kernel parameters */

struct conv_arguments {
    mil_device_rows rows;
    int64_t first; /* sequence of blockIdx.z = 0 */
    int64_t channels, inputs, width, repeat, repeat_group;
    const void *x;
    int64_t x_stride;
    const float *weight, *bias;
    bool silu;
    void *y;
    int64_t y_stride;
};

struct conv_tails {
    float *of[SEQUENCES];
    bool given; /* else every sequence begins here and leaves nothing */
};

/* How many of TAPS taps, the oldest, do not exist. */
template <int TAPS>
static __device__ __forceinline__ int
missing_taps(const conv_arguments &a)
{
    return TAPS == 4 ? 0 : TAPS - (int)a.width; /* the kernel for 4 is only for 4 */
}

template <int V, int TAPS>
static __device__ __forceinline__ void
load_taps(const conv_arguments &a, int64_t channel, float (&weight)[TAPS][V], float (&bias)[V])
{
    const int missing = missing_taps<TAPS>(a);
#pragma unroll
    for (int v = 0; v < V; v++) {
        if constexpr (TAPS == 4) {
            float taps[4];
            mil_load<4>(a.weight + (channel + v) * 4, taps);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                weight[j][v] = taps[j];
            }
        }
        else {
#pragma unroll
            for (int j = 0; j < TAPS; j++) {
                weight[j][v] = j < missing ? 0.0f : a.weight[(channel + v) * a.width + j - missing];
            }
        }
        bias[v] = a.bias == NULL ? 0.0f : a.bias[channel + v];
    }
}

/* The inputs of the row `row` of this call, which may lie before its first. */
template <typename T, int V>
static __device__ __forceinline__ void
load_input(const conv_arguments &a, const mil_span &span, const float *tail, int64_t input, int64_t row,
           float (&x)[V])
{
    if (row >= 0) {
        mil_load<V>((const T *)a.x + (span.row + row) * a.x_stride + input, x);
        return;
    }
    if (tail != NULL) {
        mil_load<V>(tail + (span.before + row + a.width - 1) * a.inputs + input, x);
        return;
    }
#pragma unroll
    for (int v = 0; v < V; v++) {
        x[v] = 0.0f;
    }
}

/* Rows `row` .. `end` of the channels that read the inputs, in the repetition whose taps are given. */
template <typename T, int V, int TAPS>
static __device__ __forceinline__ void
convolve(const conv_arguments &a, const mil_span &span, const float *tail, int64_t input, int64_t channel,
         int64_t row, int64_t end, const float (&weight)[TAPS][V], const float (&bias)[V])
{
    constexpr int AHEAD = 8; /* rows asked for before the first of them is needed */
    const int missing = missing_taps<TAPS>(a);
    float x[TAPS - 1 + AHEAD][V];
#pragma unroll
    for (int j = 0; j < TAPS - 1; j++) {
        if (j >= missing) {
            load_input<T, V>(a, span, tail, input, row - (TAPS - 1) + j, x[j]);
        }
    }
    for (; row < end; row += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (row + i < end) {
                mil_load<V>((const T *)a.x + (span.row + row + i) * a.x_stride + input, x[TAPS - 1 + i]);
            }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            float y[V];
#pragma unroll
            for (int v = 0; v < V; v++) {
                y[v] = bias[v];
#pragma unroll
                for (int j = 0; j < TAPS; j++) {
                    y[v] = j < missing ? y[v] : fmaf(weight[j][v], x[i + j][v], y[v]);
                }
                y[v] = mil_conv_activate<T>(y[v], a.silu);
            }
            if (row + i < end) {
                mil_store<V>((T *)a.y + (span.row + row + i) * a.y_stride + channel, y);
            }
        }
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                x[j][v] = x[j + AHEAD][v];
            }
        }
    }
}

/* Brings V columns of the tail from `boundary` to `after`. */
template <typename T, int V>
static __device__ __forceinline__ void
move_columns(const conv_arguments &a, const mil_span &span, float *tail, int64_t input)
{
    constexpr int GROUP = 8; /* rows on their way at once; a fold moves rows by 16 or more */
    int64_t lead = a.width - 1, first = span.after - lead, shift = span.after - span.boundary;
    float x[GROUP][V];
    int64_t token = shift > 0 ? first : span.past, end = span.past + span.count;
    for (; token < end; token += GROUP) {
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            if (token + i < end) {
                load_input<T, V>(a, span, tail, input, token + i - span.past, x[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            if (token + i < end) {
                mil_store<V>(tail + (token + i - first) * a.inputs + input, x[i]);
            }
        }
    }
}

template <typename T, int V, int TAPS>
static __global__ void
__launch_bounds__(THREADS, 4)
    conv1d_forward_kernel(const __grid_constant__ conv_arguments a, const __grid_constant__ conv_tails tails)
{
    int64_t input = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    bool mine = input < a.inputs;
    int64_t run = a.repeat > 1 ? a.repeat_group : a.inputs;
    int64_t channel = input / run * run * a.repeat + input % run;
    float weight[TAPS][V], bias[V];
    mil_trigger();
    if (mine) {
        load_taps<V, TAPS>(a, channel, weight, bias);
    }
    mil_wait();
    mil_span span = mil_span_of(a.rows, a.first + blockIdx.z);
    int64_t row = (int64_t)blockIdx.y * CHUNK;
    if (!mine || (row > 0 && row >= span.count)) {
        return;
    }
    int64_t end = row + CHUNK < span.count ? row + CHUNK : span.count;
    float *tail = tails.given ? tails.of[blockIdx.z] : NULL;
    convolve<T, V, TAPS>(a, span, tail, input, channel, row, end, weight, bias);
    for (int64_t repetition = 1; repetition < a.repeat; repetition++) {
        channel += run;
        load_taps<V, TAPS>(a, channel, weight, bias);
        convolve<T, V, TAPS>(a, span, tail, input, channel, row, end, weight, bias);
    }
    if (tail != NULL && row == 0) {
        move_columns<T, V>(a, span, tail, input);
    }
}

template <typename T, int V>
static mil_status
launch(mil_context *context, const conv_arguments &a, const conv_tails &tails, dim3 grid)
{
    const bool four = a.width == 4 && mil_is_aligned<float>(a.weight, 0);
    return four ? mil_launch(context, "conv1d", conv1d_forward_kernel<T, V, 4>, grid, dim3(THREADS), 0, a,
                             tails)
           : a.width < 4 ? mil_launch(context, "conv1d", conv1d_forward_kernel<T, V, 3>, grid, dim3(THREADS),
                                      0, a, tails)
                         : mil_launch(context, "conv1d", conv1d_forward_kernel<T, V, MOST_TAPS>, grid,
                                      dim3(THREADS), 0, a, tails);
}

/* How many inputs a thread takes: 4 or 2 where alignment and runs allow, but not so many that the chip idles. */
template <typename T>
static int
inputs_a_thread(const mil_conv1d *a, int64_t chunks)
{
    const int64_t enough = 1 << 15, inputs = a->channels / a->repeat;
    int64_t run = a->repeat > 1 ? a->repeat_group : inputs;
    int most = mil_is_aligned<T>(a->x, a->x_stride) && mil_is_aligned<T>(a->y, a->y_stride) ? 4 : 1;
    while (most > 1 && (run % most != 0 || inputs / most * chunks < enough)) {
        most /= 2;
    }
    return most;
}

template <typename T>
static mil_status
conv1d(mil_context *context, const mil_conv1d *a)
{
    const int64_t inputs = a->channels / a->repeat;
    conv_arguments k = {
        mil_rows_of(a->rows), 0,         a->channels, inputs,  a->width, a->repeat,  a->repeat_group, a->x,
        a->x_stride,          a->weight, a->bias,     a->silu, a->y,     a->y_stride};
    for (; k.first < a->rows.sequences; k.first += SEQUENCES) {
        int64_t count = a->rows.sequences - k.first;
        count = count < SEQUENCES ? count : SEQUENCES;
        int64_t longest = mil_longest(a->rows, k.first, count);
        conv_tails tails = {};
        tails.given = a->states != NULL;
        for (int64_t i = 0; tails.given && i < count; i++) {
            tails.of[i] = a->states[k.first + i].conv;
        }
        int vector = inputs_a_thread<T>(a, mil_ceil_div(longest, CHUNK) * count);
        dim3 grid((unsigned)mil_ceil_div(inputs, THREADS * vector),
                  (unsigned)mil_ceil_div(longest > 0 ? longest : 1, CHUNK), (unsigned)count);
        MIL_TRY((vector == 4   ? launch<T, 4>
                 : vector == 2 ? launch<T, 2>
                               : launch<T, 1>)(context, k, tails, grid));
    }
    return MIL_OK;
}

mil_status
mil_cuda_conv1d_forward(mil_context *context, const mil_conv1d *arguments)
{
    const mil_conv1d *a = arguments;
    if (a->width < 2 || a->width > MOST_TAPS) {
        return mil_fail(MIL_ERR_SHAPE, "conv1d_forward: width = %lld taps; expected 2 to %d",
                        (long long)a->width, MOST_TAPS);
    }
    if (a->repeat < 1 || a->channels < 1 || a->channels % a->repeat != 0 ||
        (a->repeat > 1 && (a->repeat_group < 1 || a->channels / a->repeat % a->repeat_group != 0))) {
        return mil_fail(MIL_ERR_SHAPE,
                        "conv1d_forward: channels = %lld is not a multiple of repeat = %lld in runs of %lld",
                        (long long)a->channels, (long long)a->repeat, (long long)a->repeat_group);
    }
    return MIL_FOR_ACT(context, conv1d, context, a);
}
