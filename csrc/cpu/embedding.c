/* Token embedding: y[r] = table[tokens[r]] * scale, and its gradient.
 *
 * Forward reads one row of the table a token, in the table's own type, and widens it on the way.
 *
 * Backward adds rows of grad_y into rows of grad_table.  Tokens repeat, so two threads may not own two rows
 * of grad_y; each owns a slice of columns instead and walks all tokens in order.  Every element of
 * grad_table is thus a sum in row order, whatever the number of threads, without atomics and without a
 * sorted copy of the tokens.  Slices are whole cache lines.
 */
#include "cpu/cpu.h"
#include "cpu/vector.h"

enum { GRAIN = 32768, SLICE = 16 };

/* A call of mil_cpu_expand for each row would cost more than the row. */
MIL_VECTORISE static void
widen_row(mil_dtype dtype, int64_t hidden, float scale, const void *row, float *y)
{
    const float *single = row;
    const uint16_t *half = row;
    if (dtype == MIL_F32) {
#pragma omp simd
        for (int64_t column = 0; column < hidden; column++) {
            y[column] = single[column] * scale;
        }
    }
    else if (dtype == MIL_BF16) {
#pragma omp simd
        for (int64_t column = 0; column < hidden; column++) {
            y[column] = mil_bf16_to_float(half[column]) * scale;
        }
    }
    else {
#pragma omp simd
        for (int64_t column = 0; column < hidden; column++) {
            y[column] = mil_f16_to_float(half[column]) * scale;
        }
    }
}

mil_status
mil_cpu_embedding_forward(mil_context *context, const mil_embedding *arguments)
{
    const mil_embedding a = *arguments;
    const char *table = a.table;
    int64_t row_bytes = a.hidden * (int64_t)mil_dtype_size(a.dtype);
#pragma omp parallel for num_threads(context->threads) schedule(static) if (a.rows * a.hidden >= GRAIN)
    for (int64_t row = 0; row < a.rows; row++) {
        float *y = (float *)a.y + row * a.y_stride;
        widen_row(a.dtype, a.hidden, a.scale, table + a.tokens[row] * row_bytes, y);
    }
    return MIL_OK;
}

mil_status
mil_cpu_embedding_backward(mil_context *context, const mil_embedding_grad *arguments)
{
    const mil_embedding_grad a = *arguments;
    const float *grad_y = a.grad_y;
    int64_t slices = (a.hidden + SLICE - 1) / SLICE;
    int64_t per_thread = (slices + context->threads - 1) / context->threads * SLICE;
#pragma omp parallel for num_threads(context->threads) schedule(static) if (a.rows * a.hidden >= GRAIN)
    for (int64_t first = 0; first < a.hidden; first += per_thread) {
        int64_t last = first + per_thread < a.hidden ? first + per_thread : a.hidden;
        for (int64_t row = 0; row < a.rows; row++) {
            const float *from = grad_y + row * a.grad_y_stride;
            float *to = a.grad_table + a.tokens[row] * a.hidden;
#pragma omp simd
            for (int64_t column = first; column < last; column++) {
                to[column] += from[column] * a.scale;
            }
        }
    }
    return MIL_OK;
}
