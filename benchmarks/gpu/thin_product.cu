/* Products with few rows, in the shapes of a decoding step: bytes of weights a second against a copy.
 *
 * A graph holds `layers` times the four products of a Llama layer, each on weights of its own, so nothing is read twice
 * and the gaps between kernels count as they do in a real step.  The limit is a device-to-device copy in the same
 * run, counting bytes read and written.  Prints one line a shape and number of rows; medians of several replays.
 *
 *   thin_product [hidden kv_width intermediate layers]
 */
#include "harness.h"

static int
compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median seconds of a graph's replay. */
static double
time_graph(cudaGraphExec_t graph, cudaStream_t stream)
{
    enum { REPEATS = 201 };
    double seconds[REPEATS];
    cudaEvent_t start, end;
    cudaEventCreate(&start);
    cudaEventCreate(&end);
    for (int i = -3; i < REPEATS; i++) {
        float ms;
        cudaEventRecord(start, stream);
        cudaGraphLaunch(graph, stream);
        cudaEventRecord(end, stream);
        cudaEventSynchronize(end);
        cudaEventElapsedTime(&ms, start, end);
        if (i >= 0) {
            seconds[i] = ms * 1e-3;
        }
    }
    qsort(seconds, REPEATS, sizeof *seconds, compare_doubles);
    return seconds[REPEATS / 2];
}

static cudaGraphExec_t
end_capture(cudaStream_t stream)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    if (cudaStreamEndCapture(stream, &graph) != cudaSuccess ||
        cudaGraphInstantiate(&exec, graph, 0) != cudaSuccess) {
        printf("capture failed: %s\n", cudaGetErrorString(cudaGetLastError()));
        exit(1);
    }
    return exec;
}

static __global__ void
fill(uint32_t *to, size_t count, uint32_t seed)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
         i += (size_t)gridDim.x * blockDim.x) {
        uint32_t v = (uint32_t)i * 2654435761u + seed;
        v ^= v >> 15;
        v *= 2246822519u;
        v ^= v >> 13;
        /* two bfloat16 of magnitude 2^-7 .. 2^-6, random signs and mantissas */
        to[i] = (v & 0x807f807fu) | 0x3c003c00u;
    }
}

int
main(int argc, char **argv)
{
    int64_t hidden = argc > 1 ? atoll(argv[1]) : 4096, kv = argc > 2 ? atoll(argv[2]) : 1024;
    int64_t intermediate = argc > 3 ? atoll(argv[3]) : 14336, layers = argc > 4 ? atoll(argv[4]) : 32;
    static harness h;
    harness_begin(&h, MIL_BF16);
    cudaStream_t stream = mil_stream(&h.gpu);
    int64_t per_layer = hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * intermediate;
    size_t bytes = (size_t)(per_layer * layers) * 2;
    void *weights, *x, *y, *copy;
    harness_need(h.gpu.ops->alloc(&h.gpu, bytes, &weights));
    harness_need(h.gpu.ops->alloc(&h.gpu, (size_t)(16 * intermediate) * 2, &x));
    harness_need(h.gpu.ops->alloc(&h.gpu, (size_t)(16 * 2 * intermediate) * 2, &y));
    fill<<<4096, 256, 0, stream>>>((uint32_t *)weights, bytes / 4, 1);
    fill<<<64, 256, 0, stream>>>((uint32_t *)x, (size_t)(16 * intermediate) / 2, 2);

    size_t half = (size_t)1 << 31;
    harness_need(h.gpu.ops->alloc(&h.gpu, half, &copy));
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    cudaMemcpyAsync(copy, weights, half < bytes ? half : bytes, cudaMemcpyDeviceToDevice, stream);
    double copy_rate = 2.0 * (double)(half < bytes ? half : bytes) / time_graph(end_capture(stream), stream);
    cudaDeviceProp device;
    cudaGetDeviceProperties(&device, 0);
    printf("%s; copy %.2f TB/s; %lld layers of hidden %lld, kv %lld, intermediate %lld: %.2f GB\n",
           device.name, copy_rate * 1e-12, (long long)layers, (long long)hidden, (long long)kv,
           (long long)intermediate, (double)bytes * 1e-9);

    static const int64_t counts[] = {1, 2, 5, 8, 9, 16};
    double one = 0;
    for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
        cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
        char *at = (char *)weights;
        for (int64_t layer = 0; layer < layers; layer++) {
            int64_t shapes[5][2] = {{hidden, hidden + 2 * kv},
                                    {hidden, hidden},
                                    {hidden, intermediate},
                                    {hidden, intermediate},
                                    {intermediate, hidden}};
            mil_linear l[5] = {};
            for (int i = 0; i < 5; i++) {
                l[i].rows = counts[c];
                l[i].in = l[i].x_stride = shapes[i][0];
                l[i].out = l[i].y_stride = shapes[i][1];
                l[i].x = x;
                l[i].y = (char *)y + (i == 3 ? 16 * intermediate * 2 : 0);
                l[i].weight = at;
                l[i].dtype = MIL_BF16;
                at += shapes[i][0] * shapes[i][1] * 2;
            }
            harness_need(h.gpu.ops->linear_forward(&h.gpu, &l[0], 1));
            harness_need(h.gpu.ops->linear_forward(&h.gpu, &l[1], 1));
            harness_need(h.gpu.ops->linear_forward(&h.gpu, &l[2], 2));
            harness_need(h.gpu.ops->linear_forward(&h.gpu, &l[4], 1));
        }
        double seconds = time_graph(end_capture(stream), stream);
        one = counts[c] == 1 ? seconds : one;
        printf("rows %2lld: %8.1f us, %.2f TB/s = %.1f %% of the copy, %.3f of one row\n",
               (long long)counts[c], seconds * 1e6, (double)bytes / seconds * 1e-12,
               100.0 * (double)bytes / seconds / copy_rate, seconds / one);
    }
    harness_need(mil_cuda_status(cudaGetLastError(), "benchmark"));
    return 0;
}
