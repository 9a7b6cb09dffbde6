/* Device time of operators: a graph of calls, replayed, so that launches from the host do not count.
 *
 * The calls of one graph go round several sets of arrays, as the layers of a model do, so that what they read comes
 * from memory and not from the second-level cache.  Times are medians over replays, and the copy rate is measured in
 * the same process.
 */
#ifndef MIL_BENCHMARKS_GPU_TIMING_H
#define MIL_BENCHMARKS_GPU_TIMING_H

#include "harness.h"

#define TIMING_REPLAYS 21

static inline void
timing_need(cudaError_t error)
{
    if (error != cudaSuccess) {
        printf("FAILED: %s\n", cudaGetErrorString(error));
        exit(1);
    }
}

static inline int
timing_order(const void *a, const void *b)
{
    double difference = *(const double *)a - *(const double *)b;
    return difference < 0 ? -1 : difference > 0;
}

/* Seconds a call: `calls` calls of `call` (number, owner) in a graph. */
template <typename Call>
static inline double
timing_of(harness *h, int calls, Call call)
{
    cudaStream_t stream = mil_stream(&h->gpu);
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    cudaEvent_t begin, end;
    double seconds[TIMING_REPLAYS];
    for (int i = 0; i < calls; i++) {
        harness_need(call(i)); /* grows the arenas, loads the kernels */
    }
    harness_need(h->gpu.ops->finish(&h->gpu));
    timing_need(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; i++) {
        harness_need(call(i));
    }
    timing_need(cudaStreamEndCapture(stream, &graph));
    timing_need(cudaGraphInstantiate(&ready, graph, 0));
    timing_need(cudaEventCreate(&begin));
    timing_need(cudaEventCreate(&end));
    for (int i = 0; i < TIMING_REPLAYS + 3; i++) {
        float milliseconds;
        timing_need(cudaEventRecord(begin, stream));
        timing_need(cudaGraphLaunch(ready, stream));
        timing_need(cudaEventRecord(end, stream));
        timing_need(cudaEventSynchronize(end));
        timing_need(cudaEventElapsedTime(&milliseconds, begin, end));
        if (i >= 3) {
            seconds[i - 3] = milliseconds * 1e-3 / calls;
        }
    }
    timing_need(cudaEventDestroy(begin));
    timing_need(cudaEventDestroy(end));
    timing_need(cudaGraphExecDestroy(ready));
    timing_need(cudaGraphDestroy(graph));
    qsort(seconds, TIMING_REPLAYS, sizeof *seconds, timing_order);
    return seconds[TIMING_REPLAYS / 2];
}

/* Bytes a second of a copy within the device, read plus written.  Not a power of two: buffers of 2^30 bytes, which lie that far
 * apart, were copied at 2.4 TB/s where 1.95e9 bytes went at 3.0 (H100). */
static inline double
timing_copy_rate(harness *h)
{
    const size_t bytes = (size_t)1500000 * 1024;
    void *from, *to;
    harness_need(h->gpu.ops->alloc(&h->gpu, bytes, &from));
    harness_need(h->gpu.ops->alloc(&h->gpu, bytes, &to));
    double seconds = timing_of(h, 2, [&](int) { return h->gpu.ops->copy(&h->gpu, to, from, bytes); });
    h->gpu.ops->free(&h->gpu, from);
    h->gpu.ops->free(&h->gpu, to);
    return 2.0 * (double)bytes / seconds;
}

/* Random activations made on the device: host arrays of this size would take long to make. */
static __global__ void
timing_fill(void *array, int64_t count, mil_dtype dtype, float scale, unsigned seed)
{
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x) {
        uint64_t bits = ((uint64_t)i + 1) * 0x9e3779b97f4a7c15u + seed * 0xbf58476d1ce4e5b9u;
        bits = (bits ^ (bits >> 30)) * 0x94d049bb133111ebu;
        float value = scale * ((float)(bits >> 40) * 0x1p-23f - 1.0f);
        if (dtype == MIL_F32) {
            ((float *)array)[i] = value;
        }
        else if (dtype == MIL_BF16) {
            ((__nv_bfloat16 *)array)[i] = __float2bfloat16_rn(value);
        }
        else {
            ((__half *)array)[i] = __float2half_rn(value);
        }
    }
}

static inline void *
timing_array(harness *h, int64_t count, mil_dtype dtype, float scale)
{
    static unsigned seed;
    void *array;
    harness_need(h->gpu.ops->alloc(&h->gpu, (size_t)count * mil_dtype_size(dtype), &array));
    timing_fill<<<1024, 256, 0, mil_stream(&h->gpu)>>>(array, count, dtype, scale, ++seed);
    timing_need(cudaGetLastError());
    return array;
}

/* Rows of `sequences` sequences of `count` rows, `past` tokens after the beginning and `tail` after the boundary. */
static inline mil_rows
timing_rows(harness *h, int64_t sequences, int64_t count, int64_t past, int64_t tail)
{
    int64_t *numbers = (int64_t *)malloc((size_t)(3 * (sequences + 1)) * sizeof *numbers);
    for (int64_t i = 0; i <= sequences; i++) {
        numbers[i] = i * count;
        numbers[sequences + 1 + i] = past;
        numbers[2 * (sequences + 1) + i] = past - tail;
    }
    return harness_rows(h, sequences, numbers, numbers + sequences + 1, numbers + 2 * (sequences + 1));
}

/* States on the device, tails included. */
static inline mil_mixer_state *
timing_states(harness *h, int64_t sequences, int64_t state, int64_t conv, int64_t x, int64_t B, int64_t dt)
{
    mil_mixer_state *states = (mil_mixer_state *)calloc((size_t)sequences, sizeof *states);
    for (int64_t i = 0; i < sequences; i++) {
        states[i].state = (float *)timing_array(h, state, MIL_F32, 1);
        states[i].conv = (float *)timing_array(h, conv * (MIL_TAIL + 8), MIL_F32, 1);
        states[i].x = (float *)timing_array(h, x * MIL_TAIL, MIL_F32, 1);
        states[i].B = (float *)timing_array(h, B * MIL_TAIL, MIL_F32, 1);
        states[i].dt = (float *)timing_array(h, dt * MIL_TAIL, MIL_F32, 0.05f);
        if (x + B + dt > 0) { /* where blocks count themselves */
            timing_need(cudaMemset(states[i].x + x * (MIL_TAIL - 1), 0, (size_t)x * sizeof(float)));
            timing_need(cudaMemset(states[i].B + B * (MIL_TAIL - 1), 0, (size_t)B * sizeof(float)));
            timing_need(cudaMemset(states[i].dt + dt * (MIL_TAIL - 1), 0, (size_t)dt * sizeof(float)));
        }
    }
    timing_need(cudaDeviceSynchronize());
    return states;
}

#endif
