/* What linear.c and the kernels of each processor level (linear_<level>.c) agree on.
 *
 * A kernel multiplies packed rows of x with rows of a weight read in place.  `pack` writes x once a call in
 * the order and type in which the kernel reads it (rounded to the weight's dtype, padded with zeros to
 * whole vector steps), so all products of a call share the work.  `multiply` then computes any rectangle
 * of y.  Every output is reduced along `in` in one order that is the kernel's own: neither the
 * rectangle, nor the number of rows, nor anything else about the call changes it.
 */
#ifndef MIL_CPU_LINEAR_H
#define MIL_CPU_LINEAR_H

#include "cpu/cpu.h"

/* Rows packed at a time; larger calls go through in chunks, which bounds the memory of packed x. */
#define MIL_LINEAR_CHUNK 256
/* Rectangles begin at multiples of these. */
#define MIL_LINEAR_ROWS 16
#define MIL_LINEAR_COLUMNS 16

/* y[first_row + row .. + rows, column .. + columns] of one product; chunks of up to MIL_LINEAR_ROWS rows
 * are not divided. */
typedef struct mil_linear_block {
    const mil_linear *product;
    const void *panel; /* packed x of the chunk's rows */
    int64_t first_row, chunk_rows;
    int64_t row, rows; /* within the chunk */
    int64_t column, columns;
    void *scratch; /* the calling thread's own, scratch_bytes, 64-byte aligned */
} mil_linear_block;

typedef struct mil_linear_kernel {
    /* Of a panel of `rows` rows. */
    size_t (*panel_bytes)(int64_t rows, int64_t in);
    /* Rows are packed in groups, each by itself so that threads can share them; x is the whole chunk's. */
    int64_t (*group_count)(int64_t rows);
    void (*pack)(int64_t rows, int64_t group, int64_t in, const float *x, int64_t x_stride, void *panel);
    size_t scratch_bytes;
    void (*multiply)(const mil_linear_block *block);
} mil_linear_kernel;

/* The kernel of one level for a dtype, or NULL: then the level below serves. portable serves all. */
const mil_linear_kernel *
mil_linear_portable(mil_dtype dtype);
const mil_linear_kernel *
mil_linear_avx2(mil_dtype dtype);
const mil_linear_kernel *
mil_linear_avx512(mil_dtype dtype);
const mil_linear_kernel *
mil_linear_avx512bf16(mil_dtype dtype);
const mil_linear_kernel *
mil_linear_amx(mil_dtype dtype);

/* y = value + bias, or y += that: the one place where `values` [columns] become outputs of row `row`. */
static inline void
mil_linear_store(const mil_linear *product, int64_t row, int64_t column, int64_t columns, const float *values)
{
    float *y = (float *)product->y + row * product->y_stride + column;
    const float *bias = product->bias ? product->bias + column : NULL;
    for (int64_t c = 0; c < columns; c++) {
        float value = bias ? values[c] + bias[c] : values[c];
        y[c] = product->accumulate ? y[c] + value : value;
    }
}

#endif
