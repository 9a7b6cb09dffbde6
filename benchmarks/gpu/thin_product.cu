/* Products with few rows, in the shapes of a decoding step: bytes of weights a second against a copy.
 *
 * A graph holds `layers` times the four products of a Llama layer, each on weights of its own, so nothing is read twice
 * and the gaps between kernels count as they do in a real step.  The limit is a device-to-device copy in the same
 * run, counting bytes read and written.  Prints one line a shape and number of rows; medians of several replays.
 *
 *   thin_product [hidden kv_width intermediate layers]
 */
#include "timing.h"

/* What the products of one layer read: hidden, kv width and intermediate. */
typedef struct sizes {
    int64_t hidden, kv, intermediate;
} sizes;

static int64_t
layer_elements(const sizes *n)
{
    return n->hidden * (n->hidden + 2 * n->kv) + n->hidden * n->hidden + 3 * n->hidden * n->intermediate;
}

/* The products of one layer: q, k and v in one, o, up and gate, down. */
static mil_status
run_layer(harness *h, const sizes *n, int64_t rows, const void *weights, const void *x, void *y)
{
    int64_t shapes[5][2] = {{n->hidden, n->hidden + 2 * n->kv},
                            {n->hidden, n->hidden},
                            {n->hidden, n->intermediate},
                            {n->hidden, n->intermediate},
                            {n->intermediate, n->hidden}};
    mil_linear l[5] = {};
    const char *at = (const char *)weights;
    for (int i = 0; i < 5; i++) {
        l[i].rows = rows;
        l[i].in = l[i].x_stride = shapes[i][0];
        l[i].out = l[i].y_stride = shapes[i][1];
        l[i].x = x;
        l[i].y = (char *)y + (i == 3 ? 16 * n->intermediate * 2 : 0);
        l[i].weight = at;
        l[i].dtype = MIL_BF16;
        at += shapes[i][0] * shapes[i][1] * 2;
    }
    const mil_ops *ops = h->gpu.ops;
    MIL_TRY(ops->linear_forward(&h->gpu, &l[0], 1));
    MIL_TRY(ops->linear_forward(&h->gpu, &l[1], 1));
    MIL_TRY(ops->linear_forward(&h->gpu, &l[2], 2));
    return ops->linear_forward(&h->gpu, &l[4], 1);
}

int
main(int argc, char **argv)
{
    sizes n = {argc > 1 ? atoll(argv[1]) : 4096, argc > 2 ? atoll(argv[2]) : 1024,
               argc > 3 ? atoll(argv[3]) : 14336};
    int layers = argc > 4 ? atoi(argv[4]) : 32;
    static harness h;
    harness_begin(&h, MIL_BF16);
    double copy = timing_copy_rate(&h), bytes = 2.0 * (double)(layer_elements(&n) * layers);
    char *weights = (char *)timing_array(&h, layer_elements(&n) * layers, MIL_BF16, 0.02f);
    void *x = timing_array(&h, 16 * n.intermediate, MIL_BF16, 1.0f);
    void *y = timing_array(&h, 16 * 2 * n.intermediate, MIL_BF16, 1.0f);
    cudaDeviceProp device;
    timing_need(cudaGetDeviceProperties(&device, 0));
    printf("%s; copy %.2f TB/s; %d layers of hidden %lld, kv %lld, intermediate %lld: %.2f GB\n", device.name,
           copy * 1e-12, layers, (long long)n.hidden, (long long)n.kv, (long long)n.intermediate,
           bytes * 1e-9);
    static const int64_t counts[] = {1, 2, 5, 8, 9, 16};
    double one = 0;
    for (int64_t rows : counts) {
        double seconds = layers * timing_of(&h, layers, [&](int layer) {
                             return run_layer(&h, &n, rows, weights + 2 * layer * layer_elements(&n), x, y);
                         });
        one = rows == 1 ? seconds : one;
        printf("rows %2lld: %8.1f us, %.2f TB/s = %.1f %% of the copy, %.3f of one row\n", (long long)rows,
               seconds * 1e6, bytes / seconds * 1e-12, 100.0 * bytes / seconds / copy, seconds / one);
    }
    return 0;
}
