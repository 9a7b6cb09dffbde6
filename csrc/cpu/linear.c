/* Matrix products on CPUs: y = x W^T + bias, its gradients, and float32 products for other operators. */
#include "cpu/cpu.h"

#include <string.h>
#include <time.h>

#include "cpu/blas.h"

static float
weight_at(mil_dtype dtype, const void *weight, int64_t index)
{
    if (dtype == MIL_F32) {
        float value;
        memcpy(&value, (const char *)weight + 4 * index, 4);
        return value;
    }
    uint16_t half;
    memcpy(&half, (const char *)weight + 2 * index, 2);
    return dtype == MIL_BF16 ? mil_bf16_to_float(half) : mil_f16_to_float(half);
}

static float
round_to(mil_dtype dtype, float value)
{
    return dtype == MIL_F32    ? value
           : dtype == MIL_BF16 ? mil_bf16_to_float(mil_float_to_bf16(value))
                               : mil_f16_to_float(mil_float_to_f16(value));
}

void
mil_cpu_expand(int threads, mil_dtype dtype, int64_t rows, int64_t columns, const void *from, int64_t from_stride,
               float *to, int64_t to_stride)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < columns; c++) {
            to[r * to_stride + c] = weight_at(dtype, from, r * from_stride + c);
        }
    }
}

mil_status
mil_cpu_gemm(mil_context *context, bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
             const float *a, int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc)
{
#pragma omp parallel for num_threads(context->threads) schedule(static)
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            float sum = 0;
            for (int64_t l = 0; l < k; l++) {
                sum += (transpose_a ? a[l * lda + i] : a[i * lda + l]) * (transpose_b ? b[j * ldb + l] : b[l * ldb + j]);
            }
            c[i * ldc + j] = alpha * sum + (beta == 0 ? 0 : beta * c[i * ldc + j]);
        }
    }
    return MIL_OK;
}

mil_status
mil_cpu_linear_forward(mil_context *context, const mil_linear *products, int64_t count)
{
    for (int64_t p = 0; p < count; p++) {
        const mil_linear *l = &products[p];
        const float *x = l->x;
        float *y = l->y;
#pragma omp parallel for num_threads(context->threads) schedule(static)
        for (int64_t j = 0; j < l->out; j++) {
            for (int64_t r = 0; r < l->rows; r++) {
                float sum = 0;
                for (int64_t i = 0; i < l->in; i++) {
                    sum += round_to(l->fast ? MIL_F32 : l->dtype, x[r * l->x_stride + i]) *
                           weight_at(l->dtype, l->weight, j * l->in + i);
                }
                sum += l->bias ? l->bias[j] : 0;
                y[r * l->y_stride + j] = sum + (l->accumulate ? y[r * l->y_stride + j] : 0);
            }
        }
    }
    return MIL_OK;
}

mil_status
mil_cpu_linear_backward(mil_context *context, const mil_linear_grad *arguments)
{
    const mil_linear_grad *l = arguments;
    const float *x = l->x, *grad_y = l->grad_y;
    float *grad_x = l->grad_x;
    (void)context;
    for (int64_t r = 0; r < l->rows && grad_x != NULL; r++) {
        for (int64_t i = 0; i < l->in; i++) {
            float sum = l->accumulate ? grad_x[r * l->grad_x_stride + i] : 0;
            for (int64_t j = 0; j < l->out; j++) {
                sum += grad_y[r * l->grad_y_stride + j] * weight_at(l->dtype, l->weight, j * l->in + i);
            }
            grad_x[r * l->grad_x_stride + i] = sum;
        }
    }
    for (int64_t j = 0; j < l->out; j++) {
        for (int64_t r = 0; r < l->rows; r++) {
            float g = grad_y[r * l->grad_y_stride + j];
            for (int64_t i = 0; i < l->in && l->grad_weight != NULL; i++) {
                l->grad_weight[j * l->in + i] += g * x[r * l->x_stride + i];
            }
            if (l->grad_bias != NULL) {
                l->grad_bias[j] += g;
            }
        }
    }
    return MIL_OK;
}

mil_status
mil_cpu_read_bandwidth(mil_context *context, const void *buffer, size_t bytes, int64_t repeats,
                       double *bytes_per_second)
{
    (void)context, (void)buffer, (void)bytes, (void)repeats;
    *bytes_per_second = 0;
    return MIL_OK;
}
