/* Attention on CUDA: decoding in bytes of the cache a second against a copy, prefill in flops a second.
 *
 * Decoding: a graph holds one call for each of many layers, with caches of their own so that none is found
 * in L2, and so the gaps between kernels count.  Bytes are those of the keys and values, once; the limit is
 * a device-to-device copy in the same run, counting bytes read and written.  Prefill: causal, 4 * head_dim
 * flops for each pair of a query and a key that it sees.  Medians of several replays.
 */
#include "timing.h"

static void *
random_halves(harness *h, int64_t count)
{
    return timing_array(h, count, MIL_BF16, 1.0f);
}

/* What one call decodes: texts of `shortest` to `context` tokens, spread evenly and mixed, the longest last; with
 * `outlier` all but that one are of the shortest length. */
struct decode_shape {
    int64_t batch, context, shortest, count, heads, kv_heads, head_dim;
    bool outlier;
};

static int64_t
length_of(const decode_shape *s, int64_t text)
{
    int64_t place = (text + 1) * 101 % s->batch; /* from the longest on */
    return s->outlier && place > 0 ? s->shortest : s->context - (s->context - s->shortest) * place / s->batch;
}

static void
bench_decode(harness *h, double copy, const decode_shape *s)
{
    enum { MOST = 256 };
    static mil_kv_cache caches[MOST];
    static int64_t offsets[MOST + 1], past[MOST], boundary[MOST];
    int64_t width = s->kv_heads * s->head_dim, tokens = 0;
    for (int64_t i = 0; i < s->batch; i++) {
        offsets[i + 1] = (i + 1) * s->count;
        past[i] = length_of(s, i) - s->count;
        tokens += length_of(s, i);
    }
    int64_t one = 2 * (tokens + 16 * s->batch) * width; /* a layer's keys and values */
    int64_t layers = ((int64_t)1 << 29) / one;
    layers = layers < 2 ? 2 : layers > 64 ? 64 : layers;
    __nv_bfloat16 *memory = (__nv_bfloat16 *)random_halves(h, one * layers);
    mil_attention a = {};
    a.rows = harness_rows(h, s->batch, offsets, past, boundary);
    a.heads = s->heads;
    a.kv_heads = s->kv_heads;
    a.head_dim = s->head_dim;
    a.scale = 1.0f / sqrtf((float)s->head_dim);
    a.q = random_halves(h, s->batch * s->count * s->heads * s->head_dim);
    a.q_stride = a.y_stride = s->heads * s->head_dim;
    a.y = random_halves(h, s->batch * s->count * s->heads * s->head_dim);
    a.caches = caches;
    double seconds = timing_of(h, (int)layers, [&](int layer) {
        __nv_bfloat16 *next = memory + layer * one;
        for (int64_t i = 0; i < s->batch; i++) {
            int64_t capacity = past[i] + s->count + 16;
            caches[i] = {next, next + capacity * width, MIL_BF16, capacity};
            next += 2 * capacity * width;
        }
        return h->gpu.ops->attention_forward(&h->gpu, &a);
    });
    double rate = (double)(tokens * width) * 4.0 / seconds;
    printf(
        "decode   batch %3lld  context %5lld ..%6lld  rows %2lld  heads %2lld/%-2lld  head_dim %3lld"
        "   %8.2f us  %7.1f GB/s  %5.1f %% of a copy%s\n",
        (long long)s->batch, (long long)s->shortest, (long long)s->context, (long long)s->count,
        (long long)s->heads, (long long)s->kv_heads, (long long)s->head_dim, seconds * 1e6, rate * 1e-9,
        100.0 * rate / copy, s->outlier ? ", one text of the longest" : "");
    fflush(stdout);
    h->gpu.ops->free(&h->gpu, memory);
    h->gpu.ops->free(&h->gpu, (void *)a.q);
    h->gpu.ops->free(&h->gpu, a.y);
    harness_reset(h);
}

static void
bench_prefill(harness *h, int64_t batch, int64_t length, int64_t heads, int64_t kv_heads, int64_t head_dim)
{
    enum { CALLS = 4 };
    static int64_t offsets[65];
    for (int64_t s = 0; s <= batch; s++) {
        offsets[s] = s * length;
    }
    int64_t rows = batch * length;
    mil_attention a = {};
    a.rows = harness_rows(h, batch, offsets, NULL, NULL);
    a.heads = heads;
    a.kv_heads = kv_heads;
    a.head_dim = head_dim;
    a.scale = 1.0f / sqrtf((float)head_dim);
    a.q_stride = a.y_stride = heads * head_dim;
    a.kv_stride = kv_heads * head_dim;
    a.q = random_halves(h, rows * heads * head_dim);
    a.y = random_halves(h, rows * heads * head_dim);
    a.k = random_halves(h, rows * kv_heads * head_dim);
    a.v = random_halves(h, rows * kv_heads * head_dim);
    double seconds = timing_of(h, CALLS, [&](int) { return h->gpu.ops->attention_forward(&h->gpu, &a); });
    double flops = 4.0 * (double)(batch * heads * head_dim) * 0.5 * (double)length * (double)(length + 1);
    printf(
        "prefill  batch %3lld  length  %6lld  heads %2lld/%-2lld  head_dim %3lld   %9.1f us  %6.1f Tflop/s\n",
        (long long)batch, (long long)length, (long long)heads, (long long)kv_heads, (long long)head_dim,
        seconds * 1e6, flops / seconds * 1e-12);
    fflush(stdout);
    void *all[] = {(void *)a.q, a.y, (void *)a.k, (void *)a.v};
    for (void *memory : all) {
        h->gpu.ops->free(&h->gpu, memory);
    }
    harness_reset(h);
}

int
main(void)
{
    static harness h;
    harness_begin(&h, MIL_BF16);
    double copy = timing_copy_rate(&h);
    printf("copy: %.1f GB/s (read and written)\n", copy * 1e-9);
    static const decode_shape shapes[] = {
        {1, 16, 16, 1, 32, 8, 128, false},       {1, 512, 512, 1, 32, 8, 128, false},
        {1, 1024, 1024, 1, 32, 8, 128, false},   {1, 4096, 4096, 1, 32, 8, 128, false},
        {1, 16384, 16384, 1, 32, 8, 128, false}, {1, 65536, 65536, 1, 32, 8, 128, false},
        {1, 4096, 4096, 2, 32, 8, 128, false},   {1, 4096, 4096, 5, 32, 8, 128, false},
        {1, 4096, 4096, 9, 32, 8, 128, false},   {1, 4096, 4096, 16, 32, 8, 128, false},
        {1, 4096, 4096, 1, 32, 8, 64, false},    {1, 4096, 4096, 1, 16, 2, 256, false},
        {8, 4096, 4096, 1, 32, 8, 128, false},   {32, 4096, 4096, 1, 32, 8, 128, false},
        {32, 4096, 4096, 5, 32, 8, 128, false},  {16, 1024, 1024, 1, 32, 8, 128, false},
        {64, 1024, 1024, 1, 32, 8, 128, false},  {128, 1024, 1024, 1, 32, 8, 128, false},
        {256, 1024, 1024, 1, 32, 8, 128, false}, {256, 1024, 1024, 1, 32, 8, 64, false},
        {256, 1024, 1024, 1, 64, 8, 128, false}, {256, 1024, 1024, 5, 32, 8, 128, false},
        {256, 2048, 64, 1, 32, 8, 128, false},   {256, 16384, 512, 1, 32, 8, 128, true},
    };
    for (const decode_shape &shape : shapes) {
        bench_decode(&h, copy, &shape);
    }
    int64_t lengths[] = {2048, 8192, 16384};
    for (int64_t length : lengths) {
        bench_prefill(&h, 16384 / length, length, 32, 8, 128);
        bench_prefill(&h, 16384 / length, length, 32, 8, 64);
    }
    bench_prefill(&h, 1, 8192, 16, 4, 256);
    harness_close(&h);
    return 0;
}
