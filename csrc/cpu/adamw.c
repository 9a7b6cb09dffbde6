/* AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2) in one pass, and the sum of squares for
 * clipping.
 *
 *   g = grad * grad_scale,  m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
 *   master -= lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * master)
 *   weight = round(master)
 *
 * The step is bound by memory: it reads four arrays and writes three or four, 28 to 30 bytes an element,
 * and must not read any of them twice.  Clipping and unscaling therefore enter through grad_scale instead
 * of a pass of their own.  Bias corrections are taken in double: 1 - 0.999^t loses three digits in float32
 * at t = 1.  Elements are independent, so threads cannot change the result.
 *
 * sum_squares adds float64 squares over fixed blocks of BLOCK elements, and then the blocks in order.
 */
#include "cpu/cpu.h"
#include "cpu/vector.h"

#include <math.h>

enum { GRAIN = 32768, BLOCK = 16384, LANES = 8 };

/* What is the same for all elements, worked out once. */
typedef struct step {
    float beta1, beta2, one_minus_beta1, one_minus_beta2;
    float step_size, inverse_root2; /* lr / (1 - b1^t), 1 / sqrt(1 - b2^t) */
    float eps, decay, grad_scale;   /* decay = lr * weight_decay */
} step;

MIL_VECTORISE static void
update(step s, int64_t count, float *restrict master, const float *restrict grad, float *restrict m,
       float *restrict v)
{
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float g = grad[i] * s.grad_scale;
        float first = s.beta1 * m[i] + s.one_minus_beta1 * g;
        float second = s.beta2 * v[i] + s.one_minus_beta2 * g * g;
        m[i] = first;
        v[i] = second;
        float move = s.step_size * first / (sqrtf(second) * s.inverse_root2 + s.eps);
        master[i] -= move + s.decay * master[i];
    }
}

MIL_VECTORISE static void
round_weights(mil_dtype dtype, int64_t count, const float *restrict master, uint16_t *restrict weight)
{
    if (dtype == MIL_BF16) {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            weight[i] = mil_float_to_bf16(master[i]);
        }
    }
    else {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            weight[i] = mil_float_to_f16(master[i]);
        }
    }
}

mil_status
mil_cpu_adamw(mil_context *context, const mil_adamw *arguments)
{
    const mil_adamw a = *arguments;
    if (a.step < 1) {
        return mil_fail(MIL_ERR_VALUE, "adamw: step = %lld; the first is 1", (long long)a.step);
    }
    double correction1 = 1.0 - pow(a.beta1, (double)a.step), correction2 = 1.0 - pow(a.beta2, (double)a.step);
    step s = {
        .beta1 = a.beta1,
        .beta2 = a.beta2,
        .one_minus_beta1 = (float)(1.0 - (double)a.beta1),
        .one_minus_beta2 = (float)(1.0 - (double)a.beta2),
        .step_size = (float)(a.learning_rate / correction1),
        .inverse_root2 = (float)(1.0 / sqrt(correction2)),
        .eps = a.eps,
        .decay = a.learning_rate * a.weight_decay,
        .grad_scale = a.grad_scale,
    };
    int64_t blocks = (a.count + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(context->threads) schedule(static) if (a.count >= GRAIN)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * BLOCK, count = a.count - first < BLOCK ? a.count - first : BLOCK;
        update(s, count, a.master + first, a.grad + first, a.m + first, a.v + first);
        if (a.dtype != MIL_F32) {
            round_weights(a.dtype, count, a.master + first, (uint16_t *)a.weight + first);
        }
    }
    return MIL_OK;
}

MIL_VECTORISE static double
sum_squares_of_block(const float *x, int64_t count)
{
    double lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            double value = x[i + lane];
            lanes[lane] += value * value;
        }
    }
    for (; i < count; i++) {
        lanes[i % LANES] += (double)x[i] * x[i];
    }
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) {
        sum += lanes[lane];
    }
    return sum;
}

mil_status
mil_cpu_sum_squares(mil_context *context, const float *x, int64_t count, double *out)
{
    int64_t blocks = (count + BLOCK - 1) / BLOCK;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    double *partial;
    MIL_TRY(MIL_PUSH(context->scratch, blocks, double, &partial));
#pragma omp parallel for num_threads(context->threads) schedule(static) if (count >= GRAIN)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * BLOCK, size = count - first < BLOCK ? count - first : BLOCK;
        partial[block] = sum_squares_of_block(x + first, size);
    }
    double sum = 0;
    for (int64_t block = 0; block < blocks; block++) {
        sum += partial[block];
    }
    mil_arena_rewind(context->scratch, mark);
    *out = sum;
    return MIL_OK;
}
