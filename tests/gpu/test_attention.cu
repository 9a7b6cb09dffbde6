/* Attention and kv_append on CUDA against the CPU's: decoding, verify windows, batches, prompts in chunks,
 * windows, and bits.
 *
 * Keys beyond what a row may see are NaN on the device, so that a kernel that reads one is found out.
 */
#include "harness.h"

#define MOST 300

struct attention_case {
    const char *name;
    int64_t heads, kv_heads, head_dim, window;
    int64_t sequences, count[MOST], past[MOST];
    bool cached;
    mil_dtype cache_dtype; /* MIL_F32: that of the activations */
};

struct attention_inputs {
    harness_array q, k, v, y, log_sum_exp, cache_k[MOST], cache_v[MOST];
    int64_t offsets[MOST + 1], capacity[MOST];
    mil_dtype cache_dtype;
};

static attention_inputs inputs;

static double
tolerance_of(const harness *h)
{
    return h->act == MIL_F32 ? 1e-5 : h->act == MIL_F16 ? 1.5e-3 : 1e-2;
}

static mil_attention
arguments_of(const attention_case *c, bool gpu, const mil_rows *rows, const mil_kv_cache *caches)
{
    mil_attention a = {};
    a.rows = *rows;
    a.heads = c->heads;
    a.kv_heads = c->kv_heads;
    a.head_dim = c->head_dim;
    a.window = c->window;
    a.scale = 1.0f / sqrtf((float)c->head_dim);
    a.q = gpu ? inputs.q.gpu : inputs.q.cpu;
    a.q_stride = c->heads * c->head_dim + 16;
    a.k = gpu ? inputs.k.gpu : inputs.k.cpu;
    a.v = gpu ? inputs.v.gpu : inputs.v.cpu;
    a.kv_stride = c->kv_heads * c->head_dim + 8;
    a.caches = c->cached ? caches : NULL;
    a.y = gpu ? inputs.y.gpu : inputs.y.cpu;
    a.y_stride = c->heads * c->head_dim;
    a.log_sum_exp = (float *)(gpu ? inputs.log_sum_exp.gpu : inputs.log_sum_exp.cpu);
    return a;
}

static void
fill_caches(harness *h, const attention_case *c, int64_t s)
{
    int64_t width = c->kv_heads * c->head_dim, filled = c->past[s] * width;
    inputs.capacity[s] = c->past[s] + c->count[s] + 5;
    harness_array *both[2] = {&inputs.cache_k[s], &inputs.cache_v[s]};
    for (int i = 0; i < 2; i++) {
        harness_array a = harness_random_of(h, inputs.capacity[s] * width, 1.0f, inputs.cache_dtype);
        for (int64_t j = filled; j < a.count; j++) {
            a.cpu[j] = NAN;
        }
        harness_upload(h, &a);
        *both[i] = a;
    }
}

/* One row at a time, each with what comes after it in the cache, must give the bits of all at once. */
static void
check_bits(harness *h, const attention_case *c, const mil_kv_cache *caches)
{
    char what[128];
    int64_t width = c->heads * c->head_dim, row = 0;
    for (int64_t s = 0; s < c->sequences; s++) {
        for (int64_t j = 0; j < c->count[s]; j++, row++) {
            if (c->sequences > 8 && row % 7 != 0) {
                continue;
            }
            int64_t offsets[2] = {0, 1}, past = c->past[s] + j, boundary = 0;
            mil_rows rows = harness_rows(h, 1, offsets, &past, &boundary);
            harness_array alone = harness_empty(h, width);
            mil_attention a = arguments_of(c, true, &rows, caches + s);
            a.q = (const char *)a.q + row * a.q_stride * (int64_t)mil_dtype_size(h->act);
            a.y = alone.gpu;
            a.log_sum_exp = NULL;
            harness_check(h, h->gpu.ops->attention_forward(&h->gpu, &a));
            snprintf(what, sizeof what, "attention %s: sequence %lld, row %lld alone", c->name, (long long)s,
                     (long long)j);
            harness_same_bits(h, what, inputs.y, row * width, alone, 0, width);
        }
    }
}

static void
test_case(harness *h, const attention_case *c)
{
    if (!harness_turn(h)) {
        return;
    }
    char what[128];
    int64_t rows_count = 0, none[MOST] = {0};
    bool few = c->cached;
    inputs.cache_dtype = c->cache_dtype == MIL_F32 ? h->act : c->cache_dtype;
    for (int64_t s = 0; s < c->sequences; s++) {
        inputs.offsets[s] = rows_count;
        rows_count += c->count[s];
        few &= c->count[s] <= MIL_WINDOW;
    }
    inputs.offsets[c->sequences] = rows_count;
    mil_rows rows = harness_rows(h, c->sequences, inputs.offsets, c->past, none);
    rows.settled = h->cases % 3 != 0; /* what the caches hold on entry is there */
    int64_t kv_width = c->kv_heads * c->head_dim;
    inputs.q = harness_random(h, rows_count * (c->heads * c->head_dim + 16), 2.0f);
    inputs.k = harness_random(h, rows_count * (kv_width + 8), 2.0f);
    inputs.v = harness_random(h, rows_count * (kv_width + 8), 1.0f);
    inputs.y = harness_empty(h, rows_count * c->heads * c->head_dim);
    inputs.log_sum_exp = harness_empty_of(h, rows_count * c->heads, MIL_F32);
    mil_kv_cache cpu_caches[MOST], gpu_caches[MOST];
    for (int64_t s = 0; c->cached && s < c->sequences; s++) {
        fill_caches(h, c, s);
        cpu_caches[s] = {inputs.cache_k[s].cpu, inputs.cache_v[s].cpu, MIL_F32, inputs.capacity[s]};
        gpu_caches[s] = {inputs.cache_k[s].gpu, inputs.cache_v[s].gpu, inputs.cache_dtype,
                         inputs.capacity[s]};
    }
    if (c->cached) {
        mil_kv_append append = {rows,         c->kv_heads,  c->head_dim, inputs.k.cpu,
                                inputs.v.cpu, kv_width + 8, cpu_caches};
        harness_check(h, mil_cpu_ops.kv_append(&h->cpu, &append));
        append.k = inputs.k.gpu;
        append.v = inputs.v.gpu;
        append.caches = gpu_caches;
        harness_check(h, h->gpu.ops->kv_append(&h->gpu, &append));
        for (int64_t s = 0; s < c->sequences; s++) {
            for (int64_t i = 0; i < inputs.cache_k[s].count; i++) {
                inputs.cache_k[s].cpu[i] = harness_rounded(inputs.cache_dtype, inputs.cache_k[s].cpu[i]);
                inputs.cache_v[s].cpu[i] = harness_rounded(inputs.cache_dtype, inputs.cache_v[s].cpu[i]);
            }
            if (s < 4) {
                snprintf(what, sizeof what, "kv_append %s, sequence %lld", c->name, (long long)s);
                harness_compare(h, what, inputs.cache_k[s], 0.0);
                harness_compare(h, what, inputs.cache_v[s], 0.0);
            }
        }
    }
    mil_attention a = arguments_of(c, false, &rows, cpu_caches);
    harness_check(h, mil_cpu_ops.attention_forward(&h->cpu, &a));
    a = arguments_of(c, true, &rows, gpu_caches);
    harness_check(h, h->gpu.ops->attention_forward(&h->gpu, &a));
    snprintf(what, sizeof what, "attention %s", c->name);
    double error = harness_compare(h, what, inputs.y, tolerance_of(h));
    snprintf(what, sizeof what, "attention %s: log_sum_exp", c->name);
    double lse_error = harness_compare(h, what, inputs.log_sum_exp, 1e-5);
    printf("%-8s %-44s y %.2g, log_sum_exp %.2g\n", harness_act_name(h), c->name, error, lse_error);
    if (few) {
        check_bits(h, c, gpu_caches);
    }
    harness_reset(h);
}

static attention_case
make_case(const char *name, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t window, bool cached)
{
    attention_case c = {};
    c.name = name;
    c.heads = heads;
    c.kv_heads = kv_heads;
    c.head_dim = head_dim;
    c.window = window;
    c.cached = cached;
    return c;
}

static void
add(attention_case *c, int64_t count, int64_t past)
{
    c->count[c->sequences] = count;
    c->past[c->sequences++] = past;
}

/* So many texts that a block serves a whole key head; check_bits has clusters do them again. */
static void
test_many(harness *h)
{
    static const struct {
        const char *name;
        int64_t heads, kv_heads, head_dim, window, count, longest;
    } cases[] = {
        {"140 texts of up to 1200 tokens", 16, 8, 64, 0, 1, 1200},
        {"140 texts of up to 300 tokens", 32, 8, 128, 0, 1, 300},
        {"140 texts of up to 60 tokens", 8, 8, 128, 0, 1, 60},
        {"140 texts, 4 rows", 32, 8, 128, 0, 4, 300},
        {"140 texts, 5 rows", 32, 8, 128, 0, 5, 300},
        {"140 texts, 4 rows, group 8", 64, 8, 64, 0, 4, 300},
        {"140 texts, 2 rows, group 8", 64, 8, 64, 0, 2, 300},
        {"140 texts, window of 100", 16, 8, 64, 100, 1, 500},
        {"140 texts, 5 rows, window of 50", 32, 8, 64, 50, 5, 300},
        {"140 texts, 3 rows, window of 400", 32, 8, 64, 400, 3, 1200},
        {"140 texts, head_dim 80", 16, 8, 80, 0, 1, 300},
    };
    for (const auto &of : cases) {
        attention_case c = make_case(of.name, of.heads, of.kv_heads, of.head_dim, of.window, true);
        for (int i = 0; i < 140; i++) {
            add(&c, i % 5 == 4 ? 1 : of.count, (i * 101 + 100) % 140 * of.longest / 140);
        }
        test_case(h, &c);
    }
}

static void
test_decoding(harness *h)
{
    attention_case c = make_case("first token", 8, 2, 64, 0, true);
    add(&c, 1, 0);
    test_case(h, &c);
    int64_t pasts[] = {1, 15, 62, 63, 64, 65, 127, 500, 511, 512, 1000, 4097};
    for (int64_t past : pasts) {
        char name[64];
        snprintf(name, sizeof name, "one row after %lld", (long long)past);
        c = make_case(name, 8, 2, 128, 0, true);
        add(&c, 1, past);
        test_case(h, &c);
    }
    int64_t counts[] = {2, 4, 5, 9, 16};
    for (int64_t count : counts) {
        char name[64];
        snprintf(name, sizeof name, "%lld rows after 1019, group 4", (long long)count);
        c = make_case(name, 8, 2, 128, 0, true);
        add(&c, count, 1019);
        test_case(h, &c);
    }
    c = make_case("16 rows, group 8", 16, 2, 64, 0, true);
    add(&c, 16, 250);
    test_case(h, &c);
    c = make_case("5 rows, group 1", 4, 4, 96, 0, true);
    add(&c, 5, 333);
    test_case(h, &c);
    c = make_case("window of 100", 8, 2, 128, 100, true);
    add(&c, 3, 1000);
    add(&c, 16, 90);
    add(&c, 1, 64);
    test_case(h, &c);
    c = make_case("window of 1", 4, 2, 64, 1, true);
    add(&c, 4, 70);
    test_case(h, &c);
    c = make_case("batch of mixed rows", 8, 2, 128, 0, true);
    add(&c, 1, 0);
    add(&c, 7, 129);
    add(&c, 16, 1);
    add(&c, 1, 2000);
    add(&c, 4, 63);
    test_case(h, &c);
    int64_t widths[] = {32, 40, 72, 80, 112, 136, 192, 256};
    for (int64_t width : widths) {
        char name[64];
        snprintf(name, sizeof name, "head_dim %lld", (long long)width);
        c = make_case(name, 6, 2, width, 0, true);
        add(&c, 1, 300);
        add(&c, 11, 77);
        test_case(h, &c);
    }
    c = make_case("70 sequences", 4, 2, 64, 0, true);
    for (int i = 0; i < 70; i++) {
        add(&c, 1 + i % 3, i * 13 % 400);
    }
    test_case(h, &c);
    c = make_case("70 sequences, one far longer", 4, 2, 64, 0, true);
    for (int i = 0; i < 70; i++) {
        add(&c, 1 + i % 3, i == 40 ? 2500 : i * 13 % 400);
    }
    test_case(h, &c);
    c = make_case("256 sequences", 4, 1, 32, 0, true);
    for (int i = 0; i < 256; i++) {
        add(&c, 1, i * 7 % 200);
    }
    test_case(h, &c);
    if (h->act != MIL_F32) { /* whose kernel knows no difference */
        test_many(h);
    }
    c = make_case("odd head_dim", 4, 2, 33, 0, true);
    add(&c, 3, 200);
    test_case(h, &c);
    for (int dtype = MIL_BF16; dtype <= MIL_F16; dtype++) {
        c = make_case(dtype == MIL_BF16 ? "cache of bfloat16" : "cache of float16", 8, 2, 64, 0, true);
        c.cache_dtype = (mil_dtype)dtype;
        add(&c, 2, 300);
        add(&c, 40, 10);
        test_case(h, &c);
    }
}

static void
test_prefill(harness *h)
{
    int64_t widths[] = {32, 64, 80, 128, 160, 256};
    for (int64_t width : widths) {
        char name[64];
        snprintf(name, sizeof name, "prompts, head_dim %lld", (long long)width);
        attention_case c = make_case(name, 6, 2, width, 0, false);
        int64_t counts[] = {1, 17, 63, 64, 65, 128, 129, 300, 2};
        for (int64_t count : counts) {
            add(&c, count, 0);
        }
        test_case(h, &c);
    }
    attention_case c = make_case("prompts, window of 100", 4, 2, 128, 100, false);
    add(&c, 700, 0);
    add(&c, 50, 0);
    test_case(h, &c);
    c = make_case("prompts, window of 7", 4, 2, 64, 7, false);
    add(&c, 400, 0);
    test_case(h, &c);
    c = make_case("chunks upon caches", 8, 2, 128, 0, true);
    add(&c, 100, 77);
    add(&c, 17, 1000);
    add(&c, 129, 0);
    test_case(h, &c);
    c = make_case("chunks upon caches, window of 64", 8, 2, 64, 64, true);
    add(&c, 100, 77);
    add(&c, 200, 500);
    test_case(h, &c);
    c = make_case("chunks and single rows in one call", 8, 2, 64, 0, true);
    add(&c, 1, 77);
    add(&c, 200, 130);
    add(&c, 3, 900);
    test_case(h, &c);
    c = make_case("2000 rows", 4, 1, 128, 0, false);
    add(&c, 2000, 0);
    test_case(h, &c);
    c = make_case("70 prompts and 70 single rows", 4, 2, 64, 0, true);
    for (int i = 0; i < 140; i++) {
        add(&c, i % 2 == 0 ? 1 : 17 + i % 5, i * 3);
    }
    test_case(h, &c);
    c = make_case("odd head_dim, prompt", 4, 2, 35, 0, false);
    add(&c, 150, 0);
    test_case(h, &c);
}

int
main(void)
{
    static harness h;
    for (int act = MIL_F32; act <= MIL_F16; act++) {
        harness_begin(&h, (mil_dtype)act);
        test_decoding(&h);
        test_prefill(&h);
        harness_close(&h);
    }
    return harness_end(&h, "attention");
}
