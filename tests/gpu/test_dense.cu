/* Products, norms, rotations and elementwise operators: CUDA against the CPU, and a row's bits in any company. */
#include "harness.h"

static double
tolerance_of(const harness *h)
{
    return h->act == MIL_F32 ? 1e-5 : h->act == MIL_F16 ? 2e-3 : 1.6e-2; /* two roundings of the output */
}

/* ---- products --------------------------------------------------------------------------------------------------- */

static mil_linear
linear_of(int64_t rows, int64_t in, int64_t out, mil_dtype dtype)
{
    mil_linear l = {};
    l.rows = rows;
    l.in = in;
    l.out = out;
    l.x_stride = in;
    l.y_stride = out;
    l.dtype = dtype;
    return l;
}

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
    mil_linear l = linear_of(rows, in, out, MIL_F32);
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
    mil_linear l = linear_of(1, in, out, h->act);
    l.x = x.gpu;
    l.weight = w.gpu;
    l.y = alone.gpu;
    harness_check(h, h->gpu.ops->linear_forward(&h->gpu, &l, 1));
    for (int64_t rows = 2; rows <= 16; rows++) {
        harness_array y = harness_empty(h, rows * out), z = harness_empty(h, rows * out);
        mil_linear pair[2] = {linear_of(rows, in, out, h->act), linear_of(rows, in, out, h->act)};
        pair[0].x = pair[1].x = x.gpu;
        pair[0].weight = w.gpu;
        pair[1].weight = (char *)w.gpu + out * in * (int64_t)mil_dtype_size(h->act);
        pair[0].y = y.gpu;
        pair[1].y = z.gpu;
        harness_check(h, h->gpu.ops->linear_forward(&h->gpu, pair, 2));
        harness_same_bits(h, "a row's bits among others", alone, 0, y, 0, out);
        harness_array again = harness_empty(h, rows * out);
        pair[1].y = again.gpu;
        harness_check(h, h->gpu.ops->linear_forward(&h->gpu, &pair[1], 1));
        harness_same_bits(h, "a product's bits among others", z, 0, again, 0, rows * out);
    }
    harness_reset(h);
}

static void
test_products(harness *h)
{
    static const int64_t sizes[][3] = {{1, 8, 1},    {1, 32, 16},    {3, 40, 17},    {5, 64, 100},
                                       {8, 160, 33}, {9, 4096, 31},  {16, 264, 50},  {17, 128, 64},
                                       {33, 72, 24}, {100, 256, 48}, {1, 4096, 512}, {2, 7, 5},
                                       {20, 9, 7},   {300, 512, 96}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        for (int flags = 0; flags < 4; flags++) {
            test_product(h, sizes[i][0], sizes[i][1], sizes[i][2], flags & 1, (flags & 2) != 0, false);
        }
        test_product(h, sizes[i][0], sizes[i][1], sizes[i][2], true, false, true);
    }
    test_product_bits(h, 4096, 40);
    test_product_bits(h, 96, 33);
}

/* norm, products and gate in one launch, and one after another: the same bits. */
static void
test_project(harness *h, int64_t rows, int64_t in, int64_t out, bool gated)
{
    harness_array x = harness_random(h, rows * in, 2.0f), w = harness_random(h, 2 * out * in, 0.3f);
    harness_array scale = harness_random_of(h, in, 1.0f, MIL_F32),
                  bias = harness_random_of(h, out, 1.0f, MIL_F32);
    harness_array results[2], seconds[2];
    for (int fused = 0; fused < 2; fused++) {
        harness_array u = harness_empty(h, rows * in), gate_out = harness_empty(h, rows * out);
        results[fused] = harness_empty(h, rows * out);
        seconds[fused] = harness_empty(h, rows * out);
        mil_norm n = {};
        n.rows = rows;
        n.width = n.group = n.x_stride = n.y_stride = in;
        n.x = x.gpu;
        n.weight = (const float *)scale.gpu;
        n.eps = 1e-5f;
        n.y = u.gpu;
        mil_linear pair[2] = {linear_of(rows, in, out, h->act), linear_of(rows, in, out, h->act)};
        for (int i = 0; i < 2; i++) {
            pair[i].x = u.gpu;
            pair[i].weight = (char *)w.gpu + i * out * in * (int64_t)mil_dtype_size(h->act);
            pair[i].bias = (const float *)bias.gpu;
        }
        pair[0].y = gated ? gate_out.gpu : results[fused].gpu;
        pair[1].y = seconds[fused].gpu;
        mil_glu g = {};
        g.rows = rows;
        g.width = g.gate_stride = g.up_stride = g.y_stride = out;
        g.up = pair[0].y;
        g.gate = pair[1].y;
        g.y = results[fused].gpu;
        const mil_ops *ops = h->gpu.ops;
        if (fused) {
            harness_check(h, ops->project(&h->gpu, &n, pair, 2, gated ? &g : NULL));
            continue;
        }
        harness_check(h, ops->norm_forward(&h->gpu, &n));
        harness_check(h, ops->linear_forward(&h->gpu, pair, 2));
        harness_check(h, gated ? ops->glu_forward(&h->gpu, &g) : MIL_OK);
    }
    harness_same_bits(h, "project", results[0], 0, results[1], 0, rows * out);
    if (!gated) {
        harness_same_bits(h, "project, second product", seconds[0], 0, seconds[1], 0, rows * out);
    }
    harness_reset(h);
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
    e.y_stride = WIDTH;
    e.tokens = tokens;
    e.table = table.cpu;
    e.dtype = MIL_F32;
    e.y = x.cpu;
    harness_check(h, mil_cpu_ops.embedding_forward(&h->cpu, &e));
    e.tokens = (const int32_t *)harness_bytes(h, tokens, sizeof tokens);
    e.table = table.gpu;
    e.dtype = h->act;
    e.y = x.gpu;
    harness_check(h, h->gpu.ops->embedding_forward(&h->gpu, &e));
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
        }
        if (harness_turn(&h)) {
            test_norms(&h);
        }
        if (harness_turn(&h)) {
            test_rope(&h);
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
