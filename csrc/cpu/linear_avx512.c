/* Matrix products with AVX-512 F, BW, VL, DQ: 16 lanes, 32 registers (see linear_tiles.h).
 *
 * Twice the lanes of AVX2, and room for 25 accumulators beside five vectors of x and one of weights.
 */
#include "cpu/linear.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define LANES 16
#define PANEL_WIDTH 16
#define PARTS 2
#define TILE_W1 8
#define TILE_W2 8
#define TILE_W3 6
#define TILE_W4 4
#define TILE_W5 5
#define TILE_W6 4
#define ROW_BY_ROW (GROUP + 1) /* none: arithmetic binds */
#define THIN_X(dtype) (dtype)
#define WIDE_W 6

typedef __m512 vec;
typedef __m512 pvec;
typedef float panel_t;

INLINE pvec
load_panel(const panel_t *from)
{
    return _mm512_load_ps(from);
}

INLINE void
store_panel(panel_t *to, pvec values)
{
    _mm512_store_ps(to, values);
}

INLINE pvec
load_weight(mil_dtype dtype, const char *from, int part)
{
    if (dtype == MIL_F32) {
        return _mm512_loadu_ps(from + 64 * part);
    }
    if (dtype == MIL_F16) {
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(from + 32 * part)));
    }
    __m512i pairs = _mm512_loadu_si512(from);
    __m512i values = part == 0 ? _mm512_slli_epi32(pairs, 16)
                               : _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u));
    return _mm512_castsi512_ps(values);
}

INLINE vec
multiply_add(vec sums, pvec w, pvec x)
{
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x)); /* see linear_avx2.c */
    return sums;
}

#include "cpu/linear_avx512.h"

#include "cpu/linear_tiles.h"

DEFINE_KERNEL(f32, MIL_F32)
DEFINE_KERNEL(bf16, MIL_BF16)
DEFINE_KERNEL(f16, MIL_F16)

const mil_linear_kernel *
mil_linear_avx512(mil_dtype dtype)
{
    return dtype == MIL_F32 ? &f32_kernel : dtype == MIL_BF16 ? &bf16_kernel : &f16_kernel;
}

#else

const mil_linear_kernel *
mil_linear_avx512(mil_dtype dtype)
{
    (void)dtype;
    return NULL;
}

#endif
