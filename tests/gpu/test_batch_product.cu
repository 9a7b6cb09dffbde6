/* Products of some tens of rows: CUDA against the CPU, a row's bits in any company, and gates that go along. */
#include "products.h"

static double
tolerance_of(const harness *h)
{
    return h->act == MIL_F16 ? 2e-3 : 1.6e-2; /* two roundings of the output */
}

/* Of float32 sums of so many products, in whatever order. */
static double
sum_tolerance(int64_t in)
{
    return fmax(1e-5, 2e-9 * (double)in);
}

enum { PRODUCTS = 3 };

/* `count` products of one x in one call, of different widths, rows of x and y further apart than they are long. */
static void
test_products(harness *h, int count, int64_t rows, int64_t in, int64_t out, bool bias, bool accumulate,
              bool float_output)
{
    const int64_t widths[PRODUCTS] = {out, out / 2 + 1, 32}, x_stride = in + 16;
    harness_array x = harness_random(h, rows * x_stride, 1.0f), y[PRODUCTS], w[PRODUCTS], b[PRODUCTS];
    mil_linear l[PRODUCTS];
    mil_dtype y_dtype = float_output ? MIL_F32 : h->act;
    for (int i = 0; i < count; i++) {
        w[i] = harness_random(h, widths[i] * in, 1.0f);
        b[i] = harness_random_of(h, widths[i], 1.0f, MIL_F32);
        l[i] = products_linear(rows, in, widths[i], MIL_F32);
        l[i].x_stride = x_stride;
        l[i].y_stride = widths[i] + i;
        /* No NaN of an empty array between the rows: nobody writes there. */
        y[i] = harness_random_of(h, rows * l[i].y_stride, 1.0f, y_dtype);
        l[i].accumulate = accumulate;
        l[i].float_output = float_output;
        l[i].x = x.cpu;
        l[i].weight = w[i].cpu;
        l[i].bias = bias ? b[i].cpu : NULL;
        l[i].y = y[i].cpu;
    }
    harness_check(h, mil_cpu_ops.linear_forward(&h->cpu, l, count));
    for (int i = 0; i < count; i++) {
        l[i].dtype = h->act;
        l[i].x = x.gpu;
        l[i].weight = w[i].gpu;
        l[i].bias = bias ? (const float *)b[i].gpu : NULL;
        l[i].y = y[i].gpu;
    }
    harness_check(h, h->gpu.ops->linear_forward(&h->gpu, l, count));
    for (int i = 0; i < count; i++) {
        char name[96];
        snprintf(name, sizeof name, "product %lld x %lld -> %lld%s%s%s", (long long)rows, (long long)in,
                 (long long)widths[i], bias ? " bias" : "", accumulate ? " accumulate" : "",
                 float_output ? " float" : "");
        harness_compare(h, name, y[i], float_output ? sum_tolerance(in) : tolerance_of(h));
    }
    harness_reset(h);
}

/* The first rows among 17 to 64. */
static void
test_bits(harness *h, int64_t in, int64_t out)
{
    static const int64_t counts[] = {18, 24, 32, 33, 40, 57, 64};
    harness_array x = harness_random(h, 64 * in, 1.0f), w = harness_random(h, out * in, 1.0f);
    harness_array few = harness_empty(h, 17 * out);
    mil_linear l = products_linear(17, in, out, h->act);
    l.x = x.gpu;
    l.weight = w.gpu;
    l.y = few.gpu;
    harness_check(h, h->gpu.ops->linear_forward(&h->gpu, &l, 1));
    for (int64_t rows : counts) {
        harness_array y = harness_empty(h, rows * out);
        l.rows = rows;
        l.y = y.gpu;
        harness_check(h, h->gpu.ops->linear_forward(&h->gpu, &l, 1));
        harness_same_bits(h, "a row's bits among others", few, 0, y, 0, 17 * out);
    }
    harness_reset(h);
}

static void
test_gate(harness *h, int64_t rows, int64_t in, int64_t out, bool bias)
{
    products_test_random_project(h, "project of many rows", rows, in, out, bias, true);
}

static void
test_kinds(harness *h, int count, const int64_t (&size)[3])
{
    for (int flags = 0; flags < 4; flags++) {
        test_products(h, count, size[0], size[1], size[2], flags & 1, (flags & 2) != 0, false);
    }
    test_products(h, count, size[0], size[1], size[2], true, false, true);
}

/* One product with much to read for each multiprocessor: every width of tile on devices of 132, rows that end within a panel, a
 * step or a tile. */
static void
test_long(harness *h)
{
    static const int64_t sizes[][3] = {
        {17, 20488, 1},    {33, 10248, 130},  {64, 14336, 4096}, {64, 10272, 2049}, {31, 5128, 4100},
        {20, 4112, 6002},  {48, 5128, 8190},  {32, 4096, 10272}, {57, 3080, 12601}, {18, 4104, 14700},
        {63, 3000, 16896}, {40, 5000, 16897}, {17, 7048, 3001},  {50, 4104, 5100},  {33, 3000, 7130},
        {23, 2312, 9401},  {64, 2000, 11501}, {29, 1608, 13601}, {61, 1376, 15702}};
    for (const auto &size : sizes) {
        if (harness_turn(h)) {
            test_kinds(h, 1, size);
        }
    }
    test_bits(h, 14344, 4000);
    test_bits(h, 4096, 10274);
}

static void
test_all(harness *h)
{
    static const int64_t sizes[][3] = {{17, 8, 1},     {17, 64, 16},   {20, 72, 130},   {31, 200, 33},
                                       {32, 1024, 40}, {33, 1032, 7},  {40, 4096, 300}, {64, 264, 128},
                                       {65, 512, 129}, {100, 256, 48}, {127, 2048, 65}, {128, 136, 1030},
                                       {32, 14336, 20}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        if (!harness_turn(h)) {
            continue;
        }
        test_kinds(h, PRODUCTS, sizes[i]);
        test_gate(h, sizes[i][0], sizes[i][1], sizes[i][2], i % 2 == 0);
    }
    /* Tiles of fewer outputs, where they make more blocks: 112, 96 and 80; of gated pairs 56, 48 and 40. */
    static const int64_t fewer[][3] = {{32, 1024, 16300}, {17, 520, 19200}, {64, 1032, 4400},
                                       {48, 1024, 14336}, {33, 264, 11008}, {20, 512, 10001}};
    for (const auto &size : fewer) {
        if (harness_turn(h)) {
            test_kinds(h, PRODUCTS, size);
            test_gate(h, size[0], size[1], size[2], true);
        }
    }
    test_bits(h, 4096, 40); /* four blocks a tile */
    test_bits(h, 520, 9000);
    test_bits(h, 1024, 40000); /* one block a tile */
    test_gate(h, 24, 1024, 17000, true);
    test_long(h);
}

int
main(void)
{
    static harness h;
    static const mil_dtype acts[] = {MIL_BF16, MIL_F16};
    for (mil_dtype act : acts) {
        harness_begin(&h, act);
        test_all(&h);
        harness_close(&h);
    }
    return harness_end(&h, "batch product");
}
