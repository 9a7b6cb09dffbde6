/* Small operators over rows: residual addition, row gathering, float32 copies.
 *
 *   add           y[r, c] += x[r, c]
 *   gather_rows   y[i, c] = x[index[i], c]
 *   widen         y[r, c] = scale * x[r, c]
 *
 * Each moves its bytes once and computes next to nothing, so the only decisions are to split rows between
 * threads when there is enough to move, and to stay in the calling thread when there is not: waking a team
 * costs some microseconds, which is what a copy of a hundred kilobytes costs.
 */
#include "cpu/cpu.h"

#include <string.h>

/* Fewer elements than this are handled by the calling thread alone. */
enum { GRAIN = 32768 };

mil_status
mil_cpu_add(mil_context *context, int64_t rows, int64_t width, const void *x, int64_t x_stride, void *y,
            int64_t y_stride)
{
    const float *from = x;
    float *to = y;
#pragma omp parallel for num_threads(context->threads) schedule(static) if (rows * width >= GRAIN)
    for (int64_t row = 0; row < rows; row++) {
        const float *x_row = from + row * x_stride;
        float *y_row = to + row * y_stride;
#pragma omp simd
        for (int64_t column = 0; column < width; column++) {
            y_row[column] += x_row[column];
        }
    }
    return MIL_OK;
}

mil_status
mil_cpu_gather_rows(mil_context *context, int64_t count, int64_t width, const int64_t *index, const void *x,
                    int64_t x_stride, void *y, int64_t y_stride)
{
    const float *from = x;
    float *to = y;
#pragma omp parallel for num_threads(context->threads) schedule(static) if (count * width >= GRAIN)
    for (int64_t i = 0; i < count; i++) {
        memcpy(to + i * y_stride, from + index[i] * x_stride, (size_t)width * sizeof(float));
    }
    return MIL_OK;
}

mil_status
mil_cpu_widen(mil_context *context, int64_t rows, int64_t width, mil_dtype dtype, const void *x,
              int64_t x_stride, float scale, float *y)
{
    (void)dtype; /* float32: there is no other activation type here */
    const float *from = x;
#pragma omp parallel for num_threads(context->threads) schedule(static) if (rows * width >= GRAIN)
    for (int64_t row = 0; row < rows; row++) {
        const float *x_row = from + row * x_stride;
        float *y_row = y + row * width;
#pragma omp simd
        for (int64_t column = 0; column < width; column++) {
            y_row[column] = scale * x_row[column];
        }
    }
    return MIL_OK;
}
