/* Products of one x, as several tests set them up. */
#ifndef MIL_TESTS_GPU_PRODUCTS_H
#define MIL_TESTS_GPU_PRODUCTS_H

#include "harness.h"

static inline mil_linear
products_linear(int64_t rows, int64_t in, int64_t out, mil_dtype dtype)
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

/* The norm of x, two products of it and, where `gated`, act(second) * first: by project, and one after another, with the
 * same bits.  `products` are whole but for x and y. */
static inline void
products_test_project(harness *h, const char *name, const harness_array *x, const harness_array *norm_weight,
                      const mil_linear (&products)[2], bool gated)
{
    const int64_t rows = products[0].rows, in = products[0].in, out = products[0].out;
    const mil_ops *ops = h->gpu.ops;
    harness_array results[2][3]; /* of both products, and gated */
    for (int fused = 0; fused < 2; fused++) {
        harness_array normed = harness_empty(h, rows * in), *y = results[fused];
        mil_norm n = {};
        n.rows = rows;
        n.width = n.group = n.x_stride = n.y_stride = in;
        n.x = x->gpu;
        n.weight = (const float *)norm_weight->gpu;
        n.eps = 1e-5f;
        n.y = normed.gpu;
        mil_linear pair[2] = {products[0], products[1]};
        for (int i = 0; i < 3; i++) {
            y[i] = harness_empty(h, rows * out);
        }
        for (int i = 0; i < 2; i++) {
            pair[i].x = normed.gpu;
            pair[i].y = y[i].gpu;
        }
        mil_glu g = {};
        g.rows = rows;
        g.width = g.gate_stride = g.up_stride = g.y_stride = out;
        g.up = y[0].gpu;
        g.gate = y[1].gpu;
        g.y = y[2].gpu;
        if (fused) {
            harness_check(h, ops->project(&h->gpu, &n, pair, 2, gated ? &g : NULL, NULL));
            continue;
        }
        harness_check(h, ops->norm_forward(&h->gpu, &n));
        harness_check(h, ops->linear_forward(&h->gpu, pair, 2));
        harness_check(h, gated ? ops->glu_forward(&h->gpu, &g) : MIL_OK);
    }
    for (int i = gated ? 2 : 0; i < (gated ? 3 : 2); i++) {
        harness_same_bits(h, name, results[0][i], 0, results[1][i], 0, rows * out);
    }
}

/* The same with random weights of the activation type. */
static inline void
products_test_random_project(harness *h, const char *name, int64_t rows, int64_t in, int64_t out, bool bias,
                             bool gated)
{
    harness_array x = harness_random(h, rows * in, 2.0f), w = harness_random(h, 2 * out * in, 0.3f);
    harness_array norm_weight = harness_random_of(h, in, 1.0f, MIL_F32),
                  b = harness_random_of(h, out, 1.0f, MIL_F32);
    const mil_linear l = products_linear(rows, in, out, h->act);
    mil_linear pair[2] = {l, l};
    for (int i = 0; i < 2; i++) {
        pair[i].weight = (char *)w.gpu + i * out * in * (int64_t)mil_dtype_size(h->act);
        pair[i].bias = bias ? (const float *)b.gpu : NULL;
    }
    products_test_project(h, name, &x, &norm_weight, pair, gated);
    harness_reset(h);
}

#endif
