/* Small dense arrays for attention's tiles: widened copies of rows, and products of what fits the caches.
 *
 * A packed array is float32 with rows of mil_tile_stride(width) numbers: the width in whole strips, zeros
 * where it ends inside one, and one strip that is never touched, so that a column does not fall into few
 * cache sets.  Kernels therefore have no tails along a row.
 */
#ifndef MIL_CPU_TILE_H
#define MIL_CPU_TILE_H

#include "base/dtype.h"

#include <stdbool.h>
#include <stdint.h>

enum {
    MIL_TILE_STRIP = 16, /* widths of products are multiples of this */
    MIL_TILE_KEYS = 64,  /* most rows that are transposed at once */
};

/* Rows of float32 or 16-bit numbers: row j at data + j * stride elements. */
typedef struct mil_tile_source {
    const char *data;
    mil_dtype dtype;
    int64_t stride;
} mil_tile_source;

/* What is written for each instruction set; `count` rows of `width` numbers are read from `first` on. */
typedef struct mil_tile_kernels {
    /* c (+)= a b, see tile_product.h: c [m, n], b [k, n], n whole strips, a(i, l) = a[i * a_row + l *
     * a_step] */
    void (*product)(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_step,
                    const float *b, int64_t b_stride, float *c, int64_t c_stride, bool accumulate);
    /* to [count, mil_tile_stride(width)] = rows * factor */
    void (*pack_rows)(mil_tile_source from, int64_t first, int64_t count, int64_t width, float factor,
                      float *to);
    /* to [width, mil_tile_stride(MIL_TILE_KEYS)] = rows transposed; count at most MIL_TILE_KEYS */
    void (*pack_transposed)(mil_tile_source from, int64_t first, int64_t count, int64_t width, float *to);
} mil_tile_kernels;

/* Those for the level of this processor (features.h). */
mil_tile_kernels
mil_tile_get_kernels(void);

static inline int64_t
mil_round_up(int64_t value, int64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

static inline int64_t
mil_tile_stride(int64_t width)
{
    return mil_round_up(width, MIL_TILE_STRIP) + MIL_TILE_STRIP;
}

#endif
