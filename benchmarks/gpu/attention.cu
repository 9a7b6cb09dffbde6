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

static void
bench_decode(harness *h, double copy, int64_t batch, int64_t context, int64_t count, int64_t heads,
             int64_t kv_heads, int64_t head_dim)
{
    enum { MOST = 256 };
    static mil_kv_cache caches[MOST];
    static int64_t offsets[MOST + 1], past[MOST], boundary[MOST];
    size_t cache = (size_t)((context + 16) * kv_heads * head_dim) * 2, one = 2 * (size_t)batch * cache;
    int64_t layers = (int64_t)(((size_t)1 << 30) / one);
    layers = layers < 2 ? 2 : layers > 64 ? 64 : layers;
    char *memory = (char *)random_halves(h, (int64_t)one * layers / 2);
    for (int64_t s = 0; s <= batch; s++) {
        offsets[s] = s * count;
        past[s < batch ? s : 0] = context - count;
    }
    mil_attention a = {};
    a.rows = harness_rows(h, batch, offsets, past, boundary);
    a.heads = heads;
    a.kv_heads = kv_heads;
    a.head_dim = head_dim;
    a.scale = 1.0f / sqrtf((float)head_dim);
    a.q = random_halves(h, batch * count * heads * head_dim);
    a.q_stride = a.y_stride = heads * head_dim;
    a.y = random_halves(h, batch * count * heads * head_dim);
    a.caches = caches;
    double seconds = timing_of(h, (int)layers, [&](int layer) {
        for (int64_t s = 0; s < batch; s++) {
            caches[s].k = memory + (size_t)layer * one + 2 * (size_t)s * cache;
            caches[s].v = (char *)caches[s].k + cache;
            caches[s].dtype = MIL_BF16;
            caches[s].capacity = context + 16;
        }
        return h->gpu.ops->attention_forward(&h->gpu, &a);
    });
    double rate = (double)(batch * context * kv_heads * head_dim) * 4.0 / seconds;
    printf(
        "decode   batch %3lld  context %6lld  rows %2lld  heads %2lld/%-2lld  head_dim %3lld   %8.2f us  "
        "%7.1f GB/s  %5.1f %% of a copy\n",
        (long long)batch, (long long)context, (long long)count, (long long)heads, (long long)kv_heads,
        (long long)head_dim, seconds * 1e6, rate * 1e-9, 100.0 * rate / copy);
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
    int64_t contexts[] = {16, 512, 1024, 4096, 16384, 65536};
    for (int64_t context : contexts) {
        bench_decode(&h, copy, 1, context, 1, 32, 8, 128);
    }
    int64_t counts[] = {2, 5, 9, 16};
    for (int64_t count : counts) {
        bench_decode(&h, copy, 1, 4096, count, 32, 8, 128);
    }
    bench_decode(&h, copy, 1, 4096, 1, 32, 8, 64);
    bench_decode(&h, copy, 1, 4096, 1, 16, 2, 256);
    bench_decode(&h, copy, 8, 4096, 1, 32, 8, 128);
    bench_decode(&h, copy, 32, 4096, 1, 32, 8, 128);
    bench_decode(&h, copy, 32, 4096, 5, 32, 8, 128);
    bench_decode(&h, copy, 256, 1024, 1, 32, 8, 128);
    int64_t lengths[] = {2048, 8192, 16384};
    for (int64_t length : lengths) {
        bench_prefill(&h, 16384 / length, length, 32, 8, 128);
        bench_prefill(&h, 16384 / length, length, 32, 8, 64);
    }
    bench_prefill(&h, 1, 8192, 16, 4, 256);
    harness_close(&h);
    return 0;
}
