/* Products, norms, rotations and elementwise operators: CUDA against the CPU, and a row's bits in any company. */
#include "products.h"

static double
tolerance_of(const harness *h)
{
    return h->act == MIL_F32 ? 1e-5 : h->act == MIL_F16 ? 2e-3 : 1.6e-2; /* two roundings of the output */
}

/* ---- products --------------------------------------------------------------------------------------------------- */

static void
test_product(harness *h, int64_t rows, int64_t in, int64_t out, bool bias, bool accumulate, bool float_output)
{
    char name[96];
    snprintf(name, sizeof name, "product %lld x %lld -> %lld%s%s%s", (long long)rows, (long long)in,
             (long long)out, bias ? " bias" : "", accumulate ? " accumulate" : "",
             float_output ? " float" : "");
    harness_array x = harness_random(h, rows * in, 1.0f), w = harness_random(h, out * in, 1.0f);
    harness_array b = harness_random_of(h, out, 1.0f, MIL_F32);
    mil_dtype y_dtype = float_output ? MIL_F32 : h->act;
    harness_array y = accumulate ? harness_random_of(h, rows * out, 1.0f, y_dtype)
                                 : harness_empty_of(h, rows * out, y_dtype);
    mil_linear l = products_linear(rows, in, out, MIL_F32);
    l.accumulate = accumulate;
    l.float_output = float_output;
    l.x = x.cpu;
    l.weight = w.cpu;
    l.bias = bias ? b.cpu : NULL;
    l.y = y.cpu;
    harness_check(h, mil_cpu_ops.linear_forward(&h->cpu, &l, 1));
    l.dtype = h->act;
    l.x = x.gpu;
    l.weight = w.gpu;
    l.bias = bias ? (const float *)b.gpu : NULL;
    l.y = y.gpu;
    harness_check(h, h->gpu.ops->linear_forward(&h->gpu, &l, 1));
    harness_compare(h, name, y, float_output ? 1e-5 : tolerance_of(h));
    harness_reset(h);
}

/* Row 0 alone and among 1 to 16 rows; several products in one launch and one by one. */
static void
test_product_bits(harness *h, int64_t in, int64_t out)
{
    harness_array x = harness_random(h, 16 * in, 1.0f), w = harness_random(h, 2 * out * in, 1.0f);
    harness_array alone = harness_empty(h, out);
    mil_linear l = products_linear(1, in, out, h->act);
    l.x = x.gpu;
    l.weight = w.gpu;
    l.y = alone.gpu;
    harness_check(h, h->gpu.ops->linear_forward(&h->gpu, &l, 1));
    for (int64_t rows = 2; rows <= 16; rows++) {
        harness_array y = harness_empty(h, rows * out), z = harness_empty(h, rows * out);
        mil_linear pair[2] = {products_linear(rows, in, out, h->act), products_linear(rows, in, out, h->act)};
        pair[0].x = pair[1].x = x.gpu;
        pair[0].weight = w.gpu;
        pair[1].weight = (char *)w.gpu + out * in * (int64_t)mil_dtype_size(h->act);
        pair[0].y = y.gpu;
        pair[1].y = z.gpu;
        harness_check(h, h->gpu.ops->linear_forward(&h->gpu, pair, 2));
        harness_same_bits(h, "a row's bits among others", alone, 0, y, 0, out);
        harness_array again = harness_empty(h, rows * out);
        mil_linear swapped[2] = {pair[1], pair[0]};
        swapped[0].y = again.gpu;
        harness_check(h, h->gpu.ops->linear_forward(&h->gpu, swapped, 2));
        harness_same_bits(h, "a product's bits in another place", z, 0, again, 0, rows * out);
    }
    harness_reset(h);
}

/* Two products of one x that the library takes in one call, with their arrays in all orders in memory. */
static void
test_pair(harness *h, int64_t rows, int64_t in, int64_t out, bool bias)
{
    harness_array x = harness_random(h, rows * in, 1.0f), w = harness_random(h, 2 * out * in, 1.0f),
                  b = harness_random_of(h, out, 1.0f, MIL_F32), results[4];
    for (int way = 0; way < 4; way++) {
        results[way] = harness_empty(h, 2 * rows * out);
        for (int gpu = 0; gpu < 2; gpu++) {
            const mil_dtype dtype = gpu ? h->act : MIL_F32;
            mil_linear pair[2];
            for (int i = 0; i < 2;
                 i++) { /* the first or the second half of the weights, and of the results */
                const int from = i ^ (way & 1), to = i ^ (way & 1) ^ (way >> 1);
                pair[i] = products_linear(rows, in, out, dtype);
                pair[i].x = gpu ? x.gpu : x.cpu;
                pair[i].weight =
                    (char *)(gpu ? w.gpu : w.cpu) + from * out * in * (int64_t)mil_dtype_size(dtype);
                pair[i].bias = !bias ? NULL : (const float *)(gpu ? b.gpu : b.cpu);
                pair[i].y = (char *)(gpu ? results[way].gpu : results[way].cpu) +
                            to * rows * out * (int64_t)mil_dtype_size(dtype);
            }
            harness_check(h, gpu ? h->gpu.ops->linear_forward(&h->gpu, pair, 2)
                                 : mil_cpu_ops.linear_forward(&h->cpu, pair, 2));
        }
        char name[64];
        snprintf(name, sizeof name, "two products %lld x %lld -> %lld", (long long)rows, (long long)in,
                 (long long)out);
        harness_compare(h, name, results[way], tolerance_of(h));
    }
    harness_same_bits(h, "both turned", results[0], 0, results[1], 0, 2 * rows * out);
    for (int half = 0; half < 2; half++) {
        for (int way = 2; way < 4; way++) {
            harness_same_bits(h, "only y turned", results[0], half * rows * out, results[way],
                              (1 - half) * rows * out, rows * out);
        }
    }
    harness_reset(h);
}

static void
test_products(harness *h)
{
    static const int64_t sizes[][3] = {{1, 8, 1},
                                       {1, 32, 16},
                                       {3, 40, 17},
                                       {5, 64, 100},
                                       {8, 160, 33},
                                       {9, 4096, 31},
                                       {16, 264, 50},
                                       {17, 128, 64},
                                       {33, 72, 24},
                                       {100, 256, 48},
                                       {1, 4096, 512},
                                       {2, 7, 5},
                                       {20, 9, 7},
                                       {300, 512, 96},
                                       /* enough weights for thin_stream.cu: x copied, and read in place */
                                       {1, 4096, 1100},
                                       {5, 2056, 1700},
                                       {8, 6152, 700},
                                       {9, 2056, 1700},
                                       {13, 2056, 4500},
                                       {16, 6152, 700},
                                       /* small matrices, all of whose weights are on their way before x */
                                       {1, 1536, 768},
                                       {5, 1288, 100},
                                       {16, 1032, 70},
                                       {9, 2048, 50}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        for (int flags = 0; flags < 4; flags++) {
            test_product(h, sizes[i][0], sizes[i][1], sizes[i][2], flags & 1, (flags & 2) != 0, false);
        }
        test_product(h, sizes[i][0], sizes[i][1], sizes[i][2], true, false, true);
    }
    static const int64_t pairs[][3] = {{65, 4096, 1024},   {100, 256, 48}, {128, 3072, 1024},
                                       {256, 4096, 1024},  {300, 512, 96}, {256, 2048, 512},
                                       {1000, 4096, 1024}, {70, 40, 17}};
    for (size_t i = 0; i < 2 * sizeof pairs / sizeof pairs[0]; i++) {
        test_pair(h, pairs[i / 2][0], pairs[i / 2][1], pairs[i / 2][2], i % 2 != 0);
    }
    test_product_bits(h, 4096, 40);
    test_product_bits(h, 96, 33);
    test_product_bits(h, 1536, 80);
    test_product_bits(h, 2040, 40);
    /* Products that stream through shared memory, by one tile a block and by several. */
    test_product(h, 1, 2048, 2300, true, false, false);
    test_product(h, 2, 1032, 4300, false, true, false);
    test_product(h, 1, 1536, 9000, true, false, true);
    test_product_bits(h, 2048, 4300);
}

static void
test_project(harness *h, int64_t rows, int64_t in, int64_t out, bool gated)
{
    products_test_random_project(h, "project", rows, in, out, true, gated);
}

static void
test_projects(harness *h)
{
    static const int64_t sizes[][3] = {{1, 4096, 50},  {5, 4096, 33}, {16, 768, 40}, {2, 64, 16},
                                       {16, 4096, 24}, {3, 24, 7},    {20, 64, 32}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        test_project(h, sizes[i][0], sizes[i][1], sizes[i][2], false);
        test_project(h, sizes[i][0], sizes[i][1], sizes[i][2], true);
    }
    static const int64_t counts[] = {1, 2, 5, 6, 8, 9, 10, 11, 16};
    for (int64_t rows : counts) {
        test_project(h, rows, 2048, 4300, false);
        test_project(h, rows, 768, 4300, false);
        test_project(h, rows, 768, 200, false);
        test_project(h, rows, 1024, 130, true);
        test_project(h, rows, 1000, 33, false);
        test_project(h, rows, 1040, 4300, true);
        test_project(h, rows, 4096, 1100, true);
    }
    /* A normed row and sums that take 48 KB of shared memory together, but not each. */
    test_project(h, 1, 8192, 24, false);
    test_project(h, 2, 6144, 24, false);
    test_project(h, 2, 5632, 24, true);
    test_project(h, 8, 4096, 1000, true); /* too wide to be normed on the way, and not */
    test_project(h, 5, 4096, 1000, true);
}

/* ---- weights of 8 bits -------------------------------------------------------------------------------------------- */

static void
test_scaled_product(harness *h, int64_t rows, int64_t in, int64_t out, mil_dtype dtype, bool accumulate,
                    bool float_output)
{
    char name[96];
    snprintf(name, sizeof name, "%s product %lld x %lld -> %lld%s%s", mil_dtype_name(dtype), (long long)rows,
             (long long)in, (long long)out, accumulate ? " accumulate" : "", float_output ? " float" : "");
    scaled_weights w = products_random_scaled(h, out, in, dtype);
    harness_array x = harness_random(h, rows * in, 1.0f), b = harness_random_of(h, out, 1.0f, MIL_F32);
    mil_dtype y_dtype = float_output ? MIL_F32 : h->act;
    harness_array y = accumulate ? harness_random_of(h, rows * out, 1.0f, y_dtype)
                                 : harness_empty_of(h, rows * out, y_dtype);
    mil_linear l = products_linear(rows, in, out, MIL_F32);
    l.accumulate = accumulate;
    l.float_output = float_output;
    l.x = x.cpu;
    l.weight = w.values;
    l.bias = b.cpu;
    l.y = y.cpu;
    harness_check(h, mil_cpu_ops.linear_forward(&h->cpu, &l, 1));
    l.dtype = dtype;
    l.x = x.gpu;
    l.weight = w.codes;
    l.scale = w.scale;
    l.bias = (const float *)b.gpu;
    l.y = y.gpu;
    harness_check(h, h->gpu.ops->linear_forward(&h->gpu, &l, 1));
    /* Many rows meet int8 weights rounded to the activation type. */
    bool rounded = dtype == MIL_I8 && h->act != MIL_F32 && (rows > 64 || in % 16 != 0);
    harness_compare(h, name, y, float_output && !rounded ? 1e-5 : tolerance_of(h));
    harness_reset(h);
}

/* Row 0 alone, among 2 to 64 rows (16 where rows of codes are no multiples of 16), and by project with a norm and a
 * gate. */
static void
test_scaled_bits(harness *h, int64_t in, int64_t out, mil_dtype dtype)
{
    scaled_weights w[2] = {products_random_scaled(h, out, in, dtype),
                           products_random_scaled(h, out, in, dtype)};
    harness_array x = harness_random(h, 64 * in, 1.0f), alone = harness_empty(h, out);
    mil_linear l = products_linear(1, in, out, dtype);
    l.x = x.gpu;
    l.weight = w[0].codes;
    l.scale = w[0].scale;
    l.y = alone.gpu;
    harness_check(h, h->gpu.ops->linear_forward(&h->gpu, &l, 1));
    static const int64_t counts[] = {2, 5, 8, 9, 16, 17, 40, 64};
    for (int64_t rows : counts) {
        if (rows > 16 && in % 16 != 0) {
            break; /* codes that the kernels for few rows cannot read: cuBLASLt's order */
        }
        harness_array y = harness_empty(h, rows * out), z = harness_empty(h, rows * out);
        mil_linear pair[2] = {l, l};
        pair[0].rows = pair[1].rows = rows;
        pair[0].y = y.gpu;
        pair[1].y = z.gpu;
        pair[1].weight = w[1].codes;
        pair[1].scale = w[1].scale;
        harness_check(h, h->gpu.ops->linear_forward(&h->gpu, pair, 2));
        harness_same_bits(h, "a row's bits among others, 8-bit weights", alone, 0, y, 0, out);
    }
    harness_array norm_weight = harness_random_of(h, in, 1.0f, MIL_F32);
    static const int64_t projected[] = {1, 5, 16, 20};
    for (int64_t rows : projected) {
        mil_linear pair[2] = {l, l};
        pair[0].rows = pair[1].rows = rows;
        pair[1].weight = w[1].codes;
        pair[1].scale = w[1].scale;
        products_test_project(h, "project, 8-bit weights", &x, &norm_weight, pair, true);
    }
    harness_reset(h);
}

/* Looks `tokens` up in a float32 table on the CPU and in the device's `table`; x: both results. */
static void
embed_on_both(harness *h, const mil_embedding *given, const int32_t *tokens, const float *values,
              const void *table, mil_dtype dtype, const harness_array *x)
{
    mil_embedding e = *given;
    e.y_stride = e.hidden;
    e.tokens = (const int32_t *)harness_bytes(h, tokens, (size_t)e.rows * sizeof *tokens);
    e.table = table;
    e.dtype = dtype;
    e.y = x->gpu;
    harness_check(h, h->gpu.ops->embedding_forward(&h->gpu, &e));
    e.tokens = tokens;
    e.table = values;
    e.dtype = MIL_F32;
    e.row_scale = NULL;
    e.y = x->cpu;
    harness_check(h, mil_cpu_ops.embedding_forward(&h->cpu, &e));
}

/* An embedding table in 8 bits, and weights that are not finite. */
static void
test_scaled_table(harness *h, mil_dtype dtype)
{
    enum { VOCAB = 9, WIDTH = 40, ROWS = 4 };
    static const int32_t tokens[ROWS] = {8, 0, 3, 4};
    scaled_weights w = products_random_scaled(h, VOCAB, WIDTH, dtype);
    harness_array x = harness_empty(h, ROWS * WIDTH);
    mil_embedding e = {};
    e.rows = ROWS;
    e.hidden = WIDTH;
    e.vocab = VOCAB;
    e.scale = 1.0f;
    e.row_scale = w.scale;
    embed_on_both(h, &e, tokens, w.values, w.codes, dtype, &x);
    harness_compare(h, "embedding of 8 bits", x, dtype == MIL_F8 ? 0 : tolerance_of(h));
    static const float strange[] = {NAN, INFINITY, -INFINITY};
    for (float value : strange) {
        harness_array row = harness_random(h, 300, 1.0f), codes = harness_zeros(h, 75),
                      bad = harness_zeros(h, 1);
        harness_array scale = harness_zeros(h, 1);
        row.cpu[257] = value;
        harness_upload(h, &row);
        mil_quantize q = {1, 300, row.gpu, h->act, dtype, codes.gpu, (float *)scale.gpu, (int32_t *)bad.gpu};
        harness_check(h, h->gpu.ops->quantize(&h->gpu, &q));
        bad.cpu[0] = mil_bits_to_float(1);
        harness_compare(h, "not finite", bad, 0);
    }
    harness_reset(h);
}

static void
test_scaled(harness *h)
{
    static const int64_t sizes[][3] = {{1, 16, 1},      {1, 64, 16},     {3, 80, 17},    {5, 160, 100},
                                       {8, 336, 33},    {9, 4096, 31},   {16, 528, 50},  {17, 128, 9},
                                       {64, 272, 20},   {100, 256, 48},  {70, 4096, 40}, {2, 7, 5},
                                       {20, 40, 7},     {1, 24, 32},     {5, 24, 700},   {16, 1000, 3000},
                                       {5, 6160, 1100}, {8, 4096, 1700}, {1, 2064, 3100}};
    for (int dtype = MIL_F8; dtype <= MIL_I8; dtype++) {
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            const int64_t *n = sizes[i];
            test_scaled_product(h, n[0], n[1], n[2], (mil_dtype)dtype, false, false);
            test_scaled_product(h, n[0], n[1], n[2], (mil_dtype)dtype, true, false);
            test_scaled_product(h, n[0], n[1], n[2], (mil_dtype)dtype, false, true);
        }
        if (h->act != MIL_F32) {
            test_scaled_bits(h, 4096, 40, (mil_dtype)dtype);
            test_scaled_bits(h, 96, 33, (mil_dtype)dtype);
            test_scaled_bits(h, 1000, 300, (mil_dtype)dtype);
            test_scaled_bits(h, 2064, 4300, (mil_dtype)dtype);
            test_scaled_product(h, 1, 4096, 2300, (mil_dtype)dtype, false, true);
        }
        test_scaled_table(h, (mil_dtype)dtype);
    }
}

/* ---- norms -------------------------------------------------------------------------------------------------------- */

static void
test_norm(harness *h, int64_t rows, int64_t width, int64_t group, bool gate, bool before, bool per_group)
{
    char name[96];
    snprintf(name, sizeof name, "norm %lld x %lld by %lld", (long long)rows, (long long)width,
             (long long)group);
    int64_t stride = width + 8;
    harness_array x = harness_random(h, rows * stride, 3.0f), z = harness_random(h, rows * stride, 3.0f);
    harness_array w = harness_random_of(h, per_group ? group : width, 1.0f, MIL_F32);
    harness_array y = harness_empty(h, rows * width);
    mil_norm n = {};
    n.rows = rows;
    n.width = width;
    n.group = group;
    n.x_stride = n.z_stride = stride;
    n.norm_before_gate = before;
    n.weight_per_group = per_group;
    n.eps = 1e-5f;
    n.y_stride = width;
    n.x = x.cpu;
    n.z = gate ? z.cpu : NULL;
    n.weight = w.cpu;
    n.y = y.cpu;
    harness_check(h, mil_cpu_ops.norm_forward(&h->cpu, &n));
    n.x = x.gpu;
    n.z = gate ? z.gpu : NULL;
    n.weight = (const float *)w.gpu;
    n.y = y.gpu;
    harness_check(h, h->gpu.ops->norm_forward(&h->gpu, &n));
    harness_compare(h, name, y, tolerance_of(h));
    harness_reset(h);
}

static void
test_norms(harness *h)
{
    test_norm(h, 1, 4096, 4096, false, false, false);
    test_norm(h, 7, 33, 33, false, false, false);
    test_norm(h, 3, 96, 32, false, false, true);
    test_norm(h, 2, 256, 128, true, false, false);
    test_norm(h, 2, 3072, 3072, true, false, false);
    test_norm(h, 5, 512, 64, true, true, false);
    test_norm(h, 2, 14, 7, true, true, true);
    test_norm(h, 1100, 4096, 4096, false, false, false);
    test_norm(h, 1030, 1032, 1032, true, false, false);
    test_norm(h, 1025, 5003, 5003, false, false, false);
}

/* ---- rotations ------------------------------------------------------------------------------------------------------ */

static void
test_rope(harness *h)
{
    enum { HEADS = 3, HEAD_DIM = 24, ROTARY = 16, ROWS = 9 };
    int64_t offsets[4] = {0, 1, 6, 9}, past[3] = {0, 1000, 131000}, boundary[3] = {0, 992, 130992};
    float inv_freq[ROTARY / 2];
    for (int i = 0; i < ROTARY / 2; i++) {
        inv_freq[i] = powf(10000.0f, -2.0f * (float)i / ROTARY);
    }
    harness_array table = harness_empty_of(h, ROWS * ROTARY, MIL_F32),
                  x = harness_random(h, ROWS * HEADS * HEAD_DIM, 1);
    mil_rope_table t = {};
    t.rows = harness_rows(h, 3, offsets, past, boundary);
    t.rotary = ROTARY;
    t.inv_freq = inv_freq;
    t.scale = 1.25f;
    t.table = table.cpu;
    harness_check(h, mil_cpu_ops.rope_table(&h->cpu, &t));
    t.table = (float *)table.gpu;
    harness_check(h, h->gpu.ops->rope_table(&h->gpu, &t));
    harness_compare(h, "rope_table", table, 1e-6);
    for (int inverse = 0; inverse < 2; inverse++) {
        mil_rope r = {};
        r.rows = ROWS;
        r.heads = HEADS;
        r.head_dim = HEAD_DIM;
        r.rotary = ROTARY;
        r.inverse = inverse != 0;
        r.x_stride = HEADS * HEAD_DIM;
        r.table = table.cpu;
        r.x = x.cpu;
        harness_check(h, mil_cpu_ops.rope(&h->cpu, &r));
        r.table = (const float *)table.gpu;
        r.x = x.gpu;
        harness_check(h, h->gpu.ops->rope(&h->gpu, &r));
        harness_compare(h, "rope", x, tolerance_of(h));
    }
    harness_reset(h);
}

/* Rotations and append in one launch, and one after another: the same bits.  `alike`: sequences of as many rows each. */
static void
test_rope_append(harness *h, int64_t head_dim, int64_t rotary, bool alike)
{
    enum { HEADS = 4, KV_HEADS = 2, ROWS = 9, CAPACITY = 24 };
    static const int64_t different[4] = {0, 1, 6, 9}, same[4] = {0, 3, 6, 9}, past[3] = {0, 11, 20},
                         boundary[3] = {0, 0, 16};
    const int64_t width = KV_HEADS * head_dim;
    mil_rows rows = harness_rows(h, 3, alike ? same : different, past, boundary);
    rows.settled = alike;
    harness_array table = harness_random_of(h, ROWS * rotary, 1, MIL_F32),
                  v = harness_random(h, ROWS * width, 1), caches[2][6], q[2], k[2];
    uint64_t random = h->random;
    for (int fused = 0; fused < 2; fused++) {
        mil_kv_cache list[3];
        h->random = random;
        q[fused] = harness_random(h, ROWS * HEADS * head_dim, 1);
        k[fused] = harness_random(h, ROWS * width, 1);
        for (int i = 0; i < 3; i++) {
            caches[fused][2 * i] = harness_random(h, CAPACITY * width, 1);
            caches[fused][2 * i + 1] = harness_random(h, CAPACITY * width, 1);
            list[i] = {caches[fused][2 * i].gpu, caches[fused][2 * i + 1].gpu, h->act, CAPACITY};
        }
        mil_rope turns[2] = {};
        for (int i = 0; i < 2; i++) {
            turns[i].rows = ROWS;
            turns[i].heads = i == 0 ? HEADS : KV_HEADS;
            turns[i].head_dim = head_dim;
            turns[i].rotary = rotary;
            turns[i].table = (const float *)table.gpu;
            turns[i].x = i == 0 ? q[fused].gpu : k[fused].gpu;
            turns[i].x_stride = turns[i].heads * head_dim;
        }
        mil_kv_append append = {rows, KV_HEADS, head_dim, k[fused].gpu, v.gpu, width, list};
        if (fused) {
            harness_check(h, mil_cuda_rope_append(&h->gpu, &turns[0], &turns[1], &append));
        }
        else {
            harness_check(h, h->gpu.ops->rope(&h->gpu, &turns[0]));
            harness_check(h, h->gpu.ops->rope(&h->gpu, &turns[1]));
            harness_check(h, h->gpu.ops->kv_append(&h->gpu, &append));
        }
    }
    harness_same_bits(h, "rope_append: q", q[1], 0, q[0], 0, q[0].count);
    for (int i = 0; i < 6; i++) {
        harness_same_bits(h, "rope_append: cache", caches[1][i], 0, caches[0][i], 0, CAPACITY * width);
    }
    harness_reset(h);
}

/* ---- elementwise ------------------------------------------------------------------------------------------------------ */

static void
test_glu(harness *h, int64_t rows, int64_t width, bool gated)
{
    static const mil_activation all[] = {MIL_SILU, MIL_GELU, MIL_GELU_TANH, MIL_RELU, MIL_RELU2};
    for (int i = 0; i < 5; i++) {
        harness_array gate = harness_random(h, rows * width, 8.0f),
                      up = harness_random(h, rows * width, 1.0f);
        harness_array y = harness_empty(h, rows * width);
        mil_glu g = {};
        g.rows = rows;
        g.width = width;
        g.activation = all[i];
        g.gate_stride = g.up_stride = g.y_stride = width;
        g.gate = gate.cpu;
        g.up = gated ? up.cpu : NULL;
        g.y = y.cpu;
        harness_check(h, mil_cpu_ops.glu_forward(&h->cpu, &g));
        g.gate = gate.gpu;
        g.up = gated ? up.gpu : NULL;
        g.y = y.gpu;
        harness_check(h, h->gpu.ops->glu_forward(&h->gpu, &g));
        harness_compare(h, "glu", y, tolerance_of(h));
    }
    harness_reset(h);
}

static void
test_rows(harness *h)
{
    enum { VOCAB = 11, WIDTH = 37, ROWS = 5 };
    int32_t tokens[ROWS] = {10, 0, 3, 3, 7};
    int64_t index[ROWS] = {4, 4, 0, 2, 1};
    harness_array table = harness_random(h, VOCAB * WIDTH, 1.0f), x = harness_empty(h, ROWS * WIDTH);
    mil_embedding e = {};
    e.rows = ROWS;
    e.hidden = WIDTH;
    e.vocab = VOCAB;
    e.scale = 2.0f;
    embed_on_both(h, &e, tokens, table.cpu, table.gpu, h->act, &x);
    harness_compare(h, "embedding", x, 0);

    harness_array y = harness_random(h, ROWS * WIDTH, 1.0f), picked = harness_empty(h, ROWS * WIDTH);
    harness_check(h, mil_cpu_ops.add(&h->cpu, ROWS, WIDTH, x.cpu, WIDTH, y.cpu, WIDTH));
    harness_check(h, h->gpu.ops->add(&h->gpu, ROWS, WIDTH, x.gpu, WIDTH, y.gpu, WIDTH));
    harness_compare(h, "add", y, tolerance_of(h));
    const int64_t *on_device = (const int64_t *)harness_bytes(h, index, sizeof index);
    harness_check(h, mil_cpu_ops.gather_rows(&h->cpu, ROWS, WIDTH, index, x.cpu, WIDTH, picked.cpu, WIDTH));
    harness_check(h,
                  h->gpu.ops->gather_rows(&h->gpu, ROWS, WIDTH, on_device, x.gpu, WIDTH, picked.gpu, WIDTH));
    harness_compare(h, "gather_rows", picked, 0);
    harness_array wide = harness_empty_of(h, ROWS * WIDTH, MIL_F32);
    harness_check(h, mil_cpu_ops.widen(&h->cpu, ROWS, WIDTH, MIL_F32, x.cpu, WIDTH, 0.5f, wide.cpu));
    harness_check(h, h->gpu.ops->widen(&h->gpu, ROWS, WIDTH, h->act, x.gpu, WIDTH, 0.5f, (float *)wide.gpu));
    harness_compare(h, "widen", wide, 0);
    harness_reset(h);
}

int
main(void)
{
    static harness h;
    static const mil_dtype types[] = {MIL_F32, MIL_BF16, MIL_F16};
    for (int i = 0; i < 3; i++) {
        harness_begin(&h, types[i]);
        if (harness_turn(&h)) {
            test_products(&h);
        }
        if (harness_turn(&h)) {
            test_projects(&h);
            test_scaled(&h);
        }
        if (harness_turn(&h)) {
            test_norms(&h);
        }
        if (harness_turn(&h)) {
            test_rope(&h);
            for (int alike = 0; alike < 2; alike++) {
                test_rope_append(&h, 128, 128, alike != 0);
                test_rope_append(&h, 64, 32, alike != 0);
                test_rope_append(&h, 20, 12, alike != 0);
            }
        }
        if (harness_turn(&h)) {
            test_glu(&h, 3, 64, true);
        }
        if (harness_turn(&h)) {
            test_glu(&h, 2, 13, false);
        }
        if (harness_turn(&h)) {
            test_rows(&h);
        }
        harness_close(&h);
    }
    return harness_end(&h, "dense");
}
