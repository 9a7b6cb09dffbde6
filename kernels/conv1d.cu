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
 * The thread that has a column's first chunk is the only one that reads and moves the column's tail: no other thread is
 * in its way.  So it takes what earlier calls left, and moves it on after a fold, before the kernel before has ended
 * (mil_rows.settled); this call's rows are added when it has computed.
 *
 * Where every sequence brings one row, a kernel without loops over rows does it.  Of many sequences a thread takes two
 * (TOGETHER), all of whose rows are on their way at once, and reads the taps for them once.
 */
#include "conv1d.cuh"

#include "table.h"
#include "tail.cuh"

#define THREADS 128
#define CHUNK 64
#define MOST_TAPS 8
#define SEQUENCES 256   /* of one launch, whose tails travel as kernel parameters */
#define MANY_BLOCKS 264 /* two for each of 132 multiprocessors */

struct conv_arguments {
    mil_device_rows rows;
    int64_t first; /* sequence of blockIdx.z = 0 */
    int count;     /* of sequences of this launch */
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

/* The inputs before a chunk of rows, the newest last: of this call, or of earlier ones, or none. */
template <typename T, int V, int TAPS>
static __device__ __forceinline__ void
load_lead(const conv_arguments &a, const mil_span &span, const float *tail, int64_t input, int64_t row,
          float (&lead)[TAPS - 1][V])
{
    const int missing = missing_taps<TAPS>(a);
#pragma unroll
    for (int j = 0; j < TAPS - 1; j++) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            lead[j][v] = 0.0f;
        }
        if (j < missing) {
            continue;
        }
        if (row > 0) { /* a whole chunk */
            mil_load<V>((const T *)a.x + (span.row + row - (TAPS - 1) + j) * a.x_stride + input, lead[j]);
        }
        else if (tail != NULL) {
            mil_load_settled<V>(tail + (span.before + j - missing) * a.inputs + input, lead[j]);
        }
    }
}

/* Rows `row` .. `end` of the channels that read the inputs, in the repetition whose taps are given. */
template <typename T, int V, int TAPS>
static __device__ __forceinline__ void
convolve(const conv_arguments &a, const mil_span &span, const float (&lead)[TAPS - 1][V], int64_t input,
         int64_t channel, int64_t row, int64_t end, const float (&weight)[TAPS][V], const float (&bias)[V])
{
    constexpr int AHEAD = 8; /* rows asked for before the first of them is needed */
    const int missing = missing_taps<TAPS>(a);
    float x[TAPS - 1 + AHEAD][V];
#pragma unroll
    for (int j = 0; j < TAPS - 1; j++) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            x[j][v] = lead[j][v];
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
            if (row + i < end) {
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

/* Where V columns of the tail fold, by `shift` rows: the `kept` rows of earlier calls that stay, to the beginning. */
template <int V, int GROUP>
static __device__ __forceinline__ void
keep_rows(const conv_arguments &a, int64_t shift, int64_t kept, float *tail, int64_t input)
{
    float x[GROUP][V]; /* rows on their way at once; a fold moves rows by 16 or more */
    for (int64_t i = 0; shift > 0 && i < kept; i += GROUP) {
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            if (i + k < kept) {
                mil_load_settled<V>(tail + (shift + i + k) * a.inputs + input, x[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < GROUP; k++) {
            if (i + k < kept) {
                mil_store<V>(tail + (i + k) * a.inputs + input, x[k]);
            }
        }
    }
}

/* The rows of this call that stay. */
template <typename T, int V>
static __device__ __forceinline__ void
append_rows(const conv_arguments &a, const mil_span &span, float *tail, int64_t input)
{
    constexpr int GROUP = 8;
    const int64_t first = span.after - (a.width - 1), end = span.past + span.count;
    float x[V];
#pragma unroll GROUP
    for (int64_t token = first > span.past ? first : span.past; token < end; token++) {
        mil_load<V>((const T *)a.x + (span.row + token - span.past) * a.x_stride + input, x);
        mil_store<V>(tail + (token - first) * a.inputs + input, x);
    }
}

template <typename T, int V, int TAPS>
static __global__ void
__launch_bounds__(THREADS, TAPS > 4 ? 3 : 4)
    conv1d_forward_kernel(const __grid_constant__ conv_arguments a, const __grid_constant__ conv_tails tails)
{
    mil_trigger();
    const int64_t input = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    const int64_t run = a.repeat > 1 ? a.repeat_group : a.inputs;
    int64_t channel = input / run * run * a.repeat + input % run;
    float weight[TAPS][V], bias[V], lead[TAPS - 1][V];
    if (input < a.inputs) {
        load_taps<V, TAPS>(a, channel, weight, bias);
    }
    mil_wait_for_states(a.rows);
    const mil_span span = mil_share_span(a.rows, a.first + blockIdx.z);
    if (input >= a.inputs) {
        mil_wait();
        return;
    }
    const int64_t row = (int64_t)blockIdx.y * CHUNK,
                  end = row + CHUNK < span.count ? row + CHUNK : span.count;
    float *tail = tails.given ? tails.of[blockIdx.z] : NULL;
    if (row == 0) {
        load_lead<T, V, TAPS>(a, span, tail, input, row, lead);
        if (tail != NULL) {
            keep_rows<V, 8>(a, span.after - span.boundary, span.past - span.after + a.width - 1, tail, input);
        }
    }
    mil_wait();
    if (row > 0 && row < end) {
        load_lead<T, V, TAPS>(a, span, tail, input, row, lead);
    }
    convolve<T, V, TAPS>(a, span, lead, input, channel, row, end, weight, bias);
    for (int64_t repetition = 1; repetition < a.repeat; repetition++) {
        channel += run;
        load_taps<V, TAPS>(a, channel, weight, bias);
        convolve<T, V, TAPS>(a, span, lead, input, channel, row, end, weight, bias);
    }
    if (tail != NULL && row == 0) {
        append_rows<T, V>(a, span, tail, input);
    }
}

/* One row's outputs of V channels. */
template <typename T, int V, int TAPS>
static __device__ __forceinline__ void
convolve_row(const conv_arguments &a, const float (&lead)[TAPS - 1][V], const float (&x)[V],
             const float (&weight)[TAPS][V], const float (&bias)[V], T *to)
{
    float y[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
        float taps[TAPS], inputs[TAPS];
#pragma unroll
        for (int j = 0; j < TAPS; j++) {
            taps[j] = weight[j][v];
            inputs[j] = j < TAPS - 1 ? lead[j][v] : x[v];
        }
        y[v] = mil_convolve<T, TAPS>(taps, inputs, bias[v], 0, a.silu);
    }
    mil_store<V>(to, y);
}

/* Grid: inputs, sequences by TOGETHER; each brings one row, and there are TAPS taps. */
template <typename T, int V, int TAPS, int TOGETHER>
static __global__ void
__launch_bounds__(THREADS, TOGETHER == 1 ? 8 : 5)
    conv1d_rows_kernel(const __grid_constant__ conv_arguments a, const __grid_constant__ conv_tails tails)
{
    mil_trigger();
    const int64_t input = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
    const int first = (int)blockIdx.y * TOGETHER, count = min(TOGETHER, a.count - first);
    mil_span span[TOGETHER];
    mil_wait_for_states(a.rows);
    mil_share_spans(a.rows, a.first + first, a.first + first + count - 1, span);
    if (input >= a.inputs) {
        mil_wait();
        return;
    }
    const int64_t run = a.repeat > 1 ? a.repeat_group : a.inputs;
    int64_t channel = input / run * run * a.repeat + input % run;
    float weight[TAPS][V], bias[V], lead[TOGETHER][TAPS - 1][V], x[TOGETHER][V];
    int row[TOGETHER], shift[TOGETHER], kept[TOGETHER];
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) {
        row[k] = (int)span[k].row;
        shift[k] = (int)(span[k].after - span[k].boundary);
        kept[k] = (int)(span[k].past - span[k].after) + TAPS - 1;
        load_lead<T, V, TAPS>(a, span[k], tails.of[first + min(k, count - 1)], input, 0, lead[k]);
    }
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) {
        if (k < count) {
            keep_rows<V, 4>(a, shift[k], kept[k], tails.of[first + k],
                            input); /* 3, if each call brings a row */
        }
    }
    load_taps<V, TAPS>(a, channel, weight, bias);
    mil_wait();
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) {
        mil_load<V>((const T *)a.x + row[k] * a.x_stride + input, x[k]);
    }
#pragma unroll 1
    for (int repetition = 0; repetition < a.repeat; repetition++, channel += run) {
        if (repetition > 0) {
            load_taps<V, TAPS>(a, channel, weight, bias);
        }
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            if (k < count) {
                convolve_row<T, V, TAPS>(a, lead[k], x[k], weight, bias,
                                         (T *)a.y + row[k] * a.y_stride + channel);
            }
        }
    }
#pragma unroll
    for (int k = 0; k < TOGETHER; k++) {
        if (k < count) {
            mil_store<V>(tails.of[first + k] + (int64_t)kept[k] * a.inputs + input, x[k]);
        }
    }
}

template <typename T, int V, int TOGETHER>
static mil_status
launch_rows(mil_context *context, const conv_arguments &a, const conv_tails &tails)
{
    const dim3 grid((unsigned)mil_ceil_div(a.inputs, THREADS * V), (unsigned)mil_ceil_div(a.count, TOGETHER));
    return mil_launch(context, "conv1d", conv1d_rows_kernel<T, V, 4, TOGETHER>, grid, dim3(THREADS), 0, a,
                      tails);
}

/* One row of each sequence, `vector` inputs a thread. */
template <typename T>
static mil_status
choose_rows(mil_context *context, const conv_arguments &a, const conv_tails &tails, int vector)
{
    const bool many = mil_ceil_div(a.inputs, THREADS * 4) * mil_ceil_div(a.count, 2) >= MANY_BLOCKS;
    return (vector == 4 && many ? launch_rows<T, 4, 2>
            : vector == 4       ? launch_rows<T, 4, 1>
            : vector == 2       ? launch_rows<T, 2, 1>
                                : launch_rows<T, 1, 1>)(context, a, tails);
}

/* Whether there are the four taps that most models have, to be read at once. */
static bool
takes_four(const conv_arguments &a)
{
    return a.width == 4 && mil_is_aligned<float>(a.weight, 0);
}

template <typename T, int V>
static mil_status
launch(mil_context *context, const conv_arguments &a, const conv_tails &tails, dim3 grid)
{
    return takes_four(a) ? mil_launch(context, "conv1d", conv1d_forward_kernel<T, V, 4>, grid, dim3(THREADS),
                                      0, a, tails)
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
    conv_arguments k = {mil_rows_of(a->rows), 0,    0,           a->channels, inputs,  a->width, a->repeat,
                        a->repeat_group,      a->x, a->x_stride, a->weight,   a->bias, a->silu,  a->y,
                        a->y_stride};
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
        k.count = (int)count;
        if (longest == 1 && mil_shortest(a->rows, k.first, count) == 1 && tails.given && takes_four(k)) {
            MIL_TRY(choose_rows<T>(context, k, tails, vector));
            continue;
        }
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
