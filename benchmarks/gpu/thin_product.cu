/* Products with few rows, in the shapes of a decoding step: bytes of weights a second against a copy.
 *
 * A graph holds, for each layer, its products one after another as a step has them, on weights of its own, so nothing
 * is read twice and the gaps between kernels count; norms before and gates after products belong to them, unless
 * "plain" asks for products alone.  The limit is a device-to-device copy in the same run, counting bytes
 * read and written.  Prints one line a model, type of weights and number of rows; medians of several replays.
 *
 *   thin_product [model [type [most_rows [plain]]]]     model: 8b 3b 1b mamba-2.8b; type: bfloat16 float8 int8; or all
 */
#include "timing.h"

enum { MOST_PRODUCTS = 5, MOST_ROWS = 16, WIDEST = 14336 };

/* One launch's products: `count` of the same size; two are up and gate. */
typedef struct launch_sizes {
    int64_t in, out;
    int count;
    bool normed;
} launch_sizes;

typedef struct layer_sizes {
    const char *name;
    int layers, launches;
    launch_sizes launch[MOST_PRODUCTS];
} layer_sizes;

static const layer_sizes models[] = {
    {"8b",
     32,
     4,
     {{4096, 6144, 1, true}, {4096, 4096, 1, false}, {4096, 14336, 2, true}, {14336, 4096, 1, false}}},
    {"3b",
     28,
     4,
     {{3072, 5120, 1, true}, {3072, 3072, 1, false}, {3072, 8192, 2, true}, {8192, 3072, 1, false}}},
    {"1b",
     16,
     4,
     {{2048, 3072, 1, true}, {2048, 2048, 1, false}, {2048, 8192, 2, true}, {8192, 2048, 1, false}}},
    {"mamba-2.8b",
     64,
     4,
     {{2560, 10240, 1, true}, {5120, 192, 1, false}, {160, 5120, 1, false}, {5120, 2560, 1, false}}},
};

static int64_t
layer_elements(const layer_sizes *n)
{
    int64_t elements = 0;
    for (int i = 0; i < n->launches; i++) {
        elements += n->launch[i].in * n->launch[i].out * n->launch[i].count;
    }
    return elements;
}

/* What all products of a run share. */
typedef struct operands {
    mil_dtype dtype;
    bool plain;
    int64_t rows;
    void *x, *u; /* before and after a norm */
    const float *norm;
    const float *scale;
    char *y;
} operands;

static mil_status
run_launch(harness *h, const launch_sizes *s, const operands *o, const char *weights)
{
    mil_linear l[2] = {};
    bool normed = s->normed && !o->plain;
    for (int j = 0; j < s->count; j++) {
        l[j].rows = o->rows;
        l[j].in = l[j].x_stride = s->in;
        l[j].out = l[j].y_stride = s->out;
        l[j].x = normed ? o->u : o->x;
        l[j].y = o->y + j * MOST_ROWS * s->out * 2;
        l[j].weight = weights + j * s->in * s->out * (int64_t)mil_dtype_size(o->dtype);
        l[j].dtype = o->dtype;
        l[j].scale = mil_dtype_is_scaled(o->dtype) ? o->scale : NULL;
    }
    if (!normed) {
        return h->gpu.ops->linear_forward(&h->gpu, l, s->count);
    }
    mil_norm n = {};
    n.rows = o->rows;
    n.width = n.group = n.x_stride = n.y_stride = s->in;
    n.x = o->x;
    n.y = o->u;
    n.weight = o->norm;
    n.eps = 1e-5f;
    mil_glu g = {};
    g.rows = o->rows;
    g.width = g.gate_stride = g.up_stride = g.y_stride = s->out;
    g.up = l[0].y;
    g.gate = l[1].y;
    g.y = l[0].y;
    return h->gpu.ops->project(&h->gpu, &n, l, s->count, s->count == 2 ? &g : NULL, NULL);
}

static mil_status
run_layer(harness *h, const layer_sizes *n, const operands *o, const char *weights)
{
    for (int i = 0; i < n->launches; i++) {
        const launch_sizes *s = &n->launch[i];
        MIL_TRY(run_launch(h, s, o, weights));
        weights += s->in * s->out * s->count * (int64_t)mil_dtype_size(o->dtype);
    }
    return MIL_OK;
}

/* Bytes without the codes of NaN. */
static __global__ void
fill_codes(uint32_t *codes, int64_t words)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < words;
         i += (int64_t)gridDim.x * blockDim.x) {
        uint32_t v = (uint32_t)i * 2654435761u;
        v ^= v >> 15;
        codes[i] = (v * 2246822519u) & 0xbfbfbfbfu;
    }
}

static void
run_model(harness *h, const layer_sizes *n, mil_dtype dtype, int64_t most_rows, bool plain, double copy)
{
    int64_t elements = layer_elements(n) * n->layers;
    double bytes = (double)mil_dtype_size(dtype) * (double)elements;
    char *weights;
    if (mil_dtype_is_scaled(dtype)) {
        weights = (char *)timing_array(h, elements / 4, MIL_F32, 1.0f);
        fill_codes<<<1024, 256, 0, mil_stream(&h->gpu)>>>((uint32_t *)weights, elements / 4);
    }
    else {
        weights = (char *)timing_array(h, elements, dtype, 0.02f);
    }
    operands o = {};
    o.dtype = dtype;
    o.plain = plain;
    o.x = timing_array(h, MOST_ROWS * WIDEST, MIL_BF16, 1.0f);
    o.u = timing_array(h, MOST_ROWS * WIDEST, MIL_BF16, 1.0f);
    o.norm = (const float *)timing_array(h, WIDEST, MIL_F32, 1.0f);
    o.scale = (const float *)timing_array(h, WIDEST, MIL_F32, 0.02f);
    o.y = (char *)timing_array(h, 2 * MOST_ROWS * WIDEST, MIL_BF16, 1.0f);
    static const int64_t counts[] = {1, 5, 9, 16};
    double one = 0;
    for (int64_t rows : counts) {
        if (rows > most_rows) {
            continue;
        }
        o.rows = rows;
        double seconds = n->layers * timing_of(h, n->layers, [&](int layer) {
                             return run_layer(h, n, &o, weights + layer * (int64_t)(bytes / n->layers));
                         });
        one = rows == 1 ? seconds : one;
        printf("%-10s %-8s rows %2lld: %8.1f us, %.2f TB/s = %5.1f %% of the copy, %.3f of one row\n",
               n->name, mil_dtype_name(dtype), (long long)rows, seconds * 1e6, bytes / seconds * 1e-12,
               100.0 * bytes / seconds / copy, seconds / one);
    }
    void *arrays[] = {weights, o.x, o.u, (void *)o.norm, (void *)o.scale, o.y};
    for (void *array : arrays) {
        h->gpu.ops->free(&h->gpu, array);
    }
}

int
main(int argc, char **argv)
{
    static harness h;
    harness_begin(&h, MIL_BF16);
    double copy = timing_copy_rate(&h);
    cudaDeviceProp device;
    timing_need(cudaGetDeviceProperties(&device, 0));
    printf("%s; copy %.2f TB/s\n", device.name, copy * 1e-12);
    static const mil_dtype dtypes[] = {MIL_BF16, MIL_F8, MIL_I8};
    for (const layer_sizes &n : models) {
        for (mil_dtype dtype : dtypes) {
            const char *words[2] = {n.name, mil_dtype_name(dtype)};
            bool wanted = true;
            for (int i = 1; i < argc && i <= 2; i++) {
                wanted = wanted && (strcmp(argv[i], "all") == 0 || strcmp(argv[i], words[i - 1]) == 0);
            }
            if (wanted) {
                run_model(&h, &n, dtype, argc > 3 ? atoi(argv[3]) : MOST_ROWS,
                          argc > 4 && strcmp(argv[4], "plain") == 0, copy);
            }
        }
    }
    return 0;
}
