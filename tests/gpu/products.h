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

/* A weight matrix in 8 bits on the device, its codes' values in float32 on the host. */
typedef struct scaled_weights {
    float *values; /* [out, in], the harness's */
    void *codes;
    float *scale;
} scaled_weights;

/* What device.h says of mil_quantize, in float64. */
static inline double
products_quantized(double value, double largest, mil_dtype dtype, float *scale)
{
    if (dtype == MIL_I8) {
        *scale = largest > 0 ? (float)largest / 127.0f : 1.0f;
        return fmin(fmax(rint((double)((float)value / *scale)), -127), 127);
    }
    *scale = 1.0f;
    if (largest > 0) {
        *scale = exp2f(-100);
        while (448.0 * *scale < largest) {
            *scale *= 2;
        }
    }
    double magnitude = fabs(value) / *scale;
    double step = magnitude < 0x1p-6 ? 0x1p-9 : exp2(floor(log2(magnitude)) - 3);
    return copysign(fmin(rint(magnitude / step) * step, 448), value);
}

static inline double
products_decoded(uint8_t code, mil_dtype dtype)
{
    if (dtype == MIL_I8) {
        return (int8_t)code;
    }
    int exponent = code >> 3 & 15, mantissa = code & 7;
    double magnitude = exponent == 0 ? mantissa * 0x1p-9 : (8 + mantissa) * exp2(exponent - 10);
    return code & 0x80 ? -magnitude : magnitude;
}

/* Random rows of very different sizes, quantised on the device and checked against the rule. */
static inline scaled_weights
products_random_scaled(harness *h, int64_t out, int64_t in, mil_dtype dtype)
{
    harness_array w = harness_random(h, out * in, 1.0f);
    for (int64_t i = 0; i < out * in; i++) {
        w.cpu[i] *= i / in % 5 == 3 ? 0.0f : exp2f((float)(i / in % 7) - 6.0f) * (i % 11 == 0 ? 1.0f : 0.05f);
    }
    harness_upload(h, &w);
    harness_array codes = harness_random_of(h, (out * in + 3) / 4, 1.0f, MIL_F32);
    harness_array scale = harness_empty_of(h, out, MIL_F32), bad = harness_zeros(h, 1);
    mil_quantize q = {};
    q.rows = out;
    q.columns = in;
    q.values = w.gpu;
    q.from = h->act;
    q.dtype = dtype;
    q.codes = codes.gpu;
    q.scale = (float *)scale.gpu;
    q.bad = (int32_t *)bad.gpu;
    harness_check(h, h->gpu.ops->quantize(&h->gpu, &q));
    uint8_t *got = (uint8_t *)malloc((size_t)(out * in));
    harness_need(h->gpu.ops->copy(&h->gpu, got, codes.gpu, (size_t)(out * in)));
    int64_t wrong = 0;
    for (int64_t j = 0; j < out; j++) {
        double largest = 0;
        for (int64_t k = 0; k < in; k++) {
            largest = fmax(largest, fabs((double)w.cpu[j * in + k]));
        }
        for (int64_t k = j * in; k < (j + 1) * in; k++) {
            double expected = products_quantized((double)w.cpu[k], largest, dtype, &scale.cpu[j]);
            wrong += products_decoded(got[k], dtype) != expected;
            w.cpu[k] = (float)expected * scale.cpu[j];
        }
    }
    h->checks++;
    if (wrong > 0) {
        h->failures++;
        printf("FAILED: %s to %s: %lld of %lld codes are wrong\n", harness_act_name(h), mil_dtype_name(dtype),
               (long long)wrong, (long long)(out * in));
    }
    harness_compare(h, "scales", scale, 0);
    harness_compare(h, "nothing bad", bad, 0);
    free(got);
    return {w.cpu, codes.gpu, (float *)scale.gpu};
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
