/* The float32 functions of cpu/vector.h against long double, and vector body against scalar remainder. */
#include "cpu/vector.h"
#include "harness.h"

#include <math.h>
#include <stdlib.h>

enum { COUNT = 100000 };

#define MAP(function)                                                                 \
    MIL_VECTORISE static void map_##function(int64_t count, const float *x, float *y) \
    {                                                                                 \
        _Pragma("omp simd") for (int64_t i = 0; i < count; i++)                       \
        {                                                                             \
            y[i] = function(x[i]);                                                    \
        }                                                                             \
    }
MAP(mil_expf)
MAP(mil_decayf)
MAP(mil_sigmoidf)
MAP(mil_siluf)
MAP(mil_softplusf)

static long double
exact_sigmoid(long double x)
{
    return 1.0L / (1.0L + expl(-x));
}

static long double
exact_silu(long double x)
{
    return x / (1.0L + expl(-x));
}

static long double
exact_softplus(long double x)
{
    return (x > 0 ? x : 0) + log1pl(expl(-fabsl(x)));
}

typedef struct function {
    const char *name;
    void (*map)(int64_t count, const float *x, float *y);
    long double (*exact)(long double x);
    float low, high;
    double limit; /* units in the last place; one more is left to processors that cannot fuse */
} function;

static const function functions[] = {
    {"mil_expf", map_mil_expf, expl, -87.3f, 88.7f, 1.0},
    {"mil_decayf", map_mil_decayf, exp2l, -125.9f, 0.0f, 1.0},
    {"mil_sigmoidf", map_mil_sigmoidf, exact_sigmoid, -87.0f, 87.0f, 2.5},
    {"mil_siluf", map_mil_siluf, exact_silu, -87.0f, 87.0f, 2.5},
    {"mil_softplusf", map_mil_softplusf, exact_softplus, -87.0f, 87.0f, 2.5},
};

/* Half of the points spread over the range, half near zero, where most of a model's values are. */
static void
fill_points(const function *f, float *x)
{
    float *random = random_floats(COUNT, 7);
    for (int64_t i = 0; i < COUNT; i++) {
        float reach = i % 2 == 0 ? 1.0f : 0.02f, value = random[i] * reach;
        x[i] = value > 0 ? value * f->high : -value * f->low;
    }
    mil_free(random);
}

void
test_vector_errors(void)
{
    float *x = mil_alloc(COUNT, sizeof *x), *y = mil_alloc(COUNT, sizeof *y);
    for (size_t k = 0; k < sizeof functions / sizeof functions[0]; k++) {
        const function *f = &functions[k];
        double worst = 0;
        fill_points(f, x);
        f->map(COUNT, x, y);
        for (int64_t i = 0; i < COUNT; i++) {
            long double exact = f->exact((long double)x[i]);
            float near = fabsf((float)exact), ulp = nextafterf(near, INFINITY) - near;
            double error = (double)(fabsl((long double)y[i] - exact) / (long double)ulp);
            worst = error > worst && near >= 0x1p-125f ? error : worst;
        }
        CHECK(worst < f->limit + (MIL_HAS_FMA ? 0.0 : 1.0));
    }
    mil_free(x);
    mil_free(y);
}

void
test_vector_bits(void)
{
    float *x = mil_alloc(COUNT, sizeof *x), *y = mil_alloc(COUNT, sizeof *y);
    for (size_t k = 0; k < sizeof functions / sizeof functions[0]; k++) {
        int64_t different = 0;
        fill_points(&functions[k], x);
        functions[k].map(COUNT, x, y);
        for (int64_t i = 0; i < 1000; i++) {
            float alone;
            functions[k].map(1, x + i, &alone);
            different += mil_float_to_bits(alone) != mil_float_to_bits(y[i]);
        }
        CHECK(different == 0);
    }
    mil_free(x);
    mil_free(y);
}

void
test_vector_extremes(void)
{
    const float x[] = {INFINITY, -INFINITY, NAN, 0.0f, 1e38f, -1e38f, 88.73f, -87.34f};
    float y[8];
    map_mil_expf(8, x, y);
    CHECK(isinf(y[0]) && y[1] == 0.0f && isnan(y[2]) && y[3] == 1.0f);
    CHECK(isinf(y[4]) && y[5] == 0.0f && isinf(y[6]) && y[7] == 0.0f);
    map_mil_sigmoidf(8, x, y);
    CHECK(y[0] == 1.0f && y[1] == 0.0f && isnan(y[2]) && y[3] == 0.5f && y[4] == 1.0f && y[5] == 0.0f);
    map_mil_siluf(8, x, y);
    CHECK(isnan(y[2]) && y[3] == 0.0f && y[4] == 1e38f && y[5] == 0.0f);
    map_mil_softplusf(8, x, y);
    CHECK(isinf(y[0]) && y[1] == 0.0f && isnan(y[2]) && y[4] == 1e38f && y[5] == 0.0f);
    const float decays[] = {-INFINITY, -127.0f, 0.0f, -1.0f, -1e38f, -126.0f, -10.0f, -126.5f};
    map_mil_decayf(8, decays, y);
    CHECK(y[0] == 0.0f && y[1] == 0.0f && y[2] == 1.0f && y[3] == 0.5f && y[4] == 0.0f && y[5] == 0x1p-126f);
    CHECK(y[6] == 0x1p-10f && y[7] >= 0.0f && y[7] < 0x1p-126f);
}
