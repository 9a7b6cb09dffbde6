/* Small dense products on arrays that fit the caches: c (+)= a b, for attention's tiles.
 *
 *   c [m, n] with c_stride, a(i, l) = a[i * a_row + l * a_step], b [k, n] with b_stride; n a multiple of 16
 *
 * A BLAS call costs more than a tile of attention, and promises nothing about the order in which it adds.
 * Here every element of c is a chain of k fused multiply-adds in the order of l, starting from 0 or from c:
 * it is the same bits in any tile, with any m.  (A processor without them multiplies and adds; the order is
 * the same.)
 *
 * The kernel keeps ROWS x 16 elements of c in registers and goes down k once: 6 x 2 vectors of 8, two of b
 * and one of a fill the 16 registers of AVX2.  a is read one element at a time, so its transpose is as
 * fast.
 *
 * This file is included once for each instruction set, which defines
 *   TILE_NAME(name)  the name with the set's suffix      TILE_TARGET  function attribute
 *   LANES, VECTOR    width and type of a vector          ROWS         rows of c in registers
 *   LOAD(p), STORE(p, v), FILL(x), MULTIPLY_ADD(a, b, c)
 */
#define VECTORS (16 / LANES)

/* One strip of c: `rows` (a constant after inlining) by 16 columns. */
TILE_TARGET static inline __attribute__((always_inline)) void
TILE_NAME(strip)(const int rows, int64_t k, const float *a, int64_t a_row, int64_t a_step, const float *b,
                 int64_t b_stride, float *c, int64_t c_stride, bool accumulate)
{
    VECTOR sums[ROWS][VECTORS];
    for (int i = 0; i < rows; i++) {
        for (int v = 0; v < VECTORS; v++) {
            sums[i][v] = accumulate ? LOAD(c + i * c_stride + v * LANES) : FILL(0.0f);
        }
    }
    for (int64_t l = 0; l < k; l++) {
        VECTOR columns[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            columns[v] = LOAD(b + l * b_stride + v * LANES);
        }
        for (int i = 0; i < rows; i++) {
            VECTOR factor = FILL(a[i * a_row + l * a_step]);
            for (int v = 0; v < VECTORS; v++) {
                sums[i][v] = MULTIPLY_ADD(factor, columns[v], sums[i][v]);
            }
        }
    }
    for (int i = 0; i < rows; i++) {
        for (int v = 0; v < VECTORS; v++) {
            STORE(c + i * c_stride + v * LANES, sums[i][v]);
        }
    }
}

TILE_TARGET static void
TILE_NAME(tile_product)(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_step,
                        const float *b, int64_t b_stride, float *c, int64_t c_stride, bool accumulate)
{
    for (int64_t column = 0; column < n; column += 16) {
        const float *b_strip = b + column;
        float *c_strip = c + column;
        int64_t i = 0;
        for (; i + ROWS <= m; i += ROWS) {
            TILE_NAME(strip)(ROWS, k, a + i * a_row, a_row, a_step, b_strip, b_stride, c_strip + i * c_stride,
                             c_stride, accumulate);
        }
        for (; ROWS > 4 && i + 4 <= m; i += 4) {
            TILE_NAME(strip)(4, k, a + i * a_row, a_row, a_step, b_strip, b_stride, c_strip + i * c_stride,
                             c_stride, accumulate);
        }
        for (; ROWS > 2 && i + 2 <= m; i += 2) {
            TILE_NAME(strip)(2, k, a + i * a_row, a_row, a_step, b_strip, b_stride, c_strip + i * c_stride,
                             c_stride, accumulate);
        }
        for (; i < m; i++) {
            TILE_NAME(strip)(1, k, a + i * a_row, a_row, a_step, b_strip, b_stride, c_strip + i * c_stride,
                             c_stride, accumulate);
        }
    }
}

#undef VECTORS
#undef TILE_NAME
#undef TILE_TARGET
#undef LANES
#undef VECTOR
#undef ROWS
#undef LOAD
#undef STORE
#undef FILL
#undef MULTIPLY_ADD
