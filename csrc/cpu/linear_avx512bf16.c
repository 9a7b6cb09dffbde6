/* bfloat16 products with vdpbf16ps; other dtypes go to the AVX-512 kernels (see linear_tiles.h).
 *
 * One instruction multiplies 32 pairs and adds each two neighbours to one of 16 lanes, so neither weights
 * nor x are widened: x's panel is bfloat16 in plain order, half the bytes, and a step of 32 elements is
 * one load a row. The instruction treats subnormal inputs as zero and rounds sums to nearest even,
 * whatever the mode.
 */
#include "cpu/linear.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define LANES 16
#define PANEL_WIDTH 32
#define PARTS 1
#define TILE_W1 8
#define TILE_W2 8
#define TILE_W3 6
#define TILE_W4 6
#define TILE_W5 5
#define TILE_W6 4
#define ROW_BY_ROW 4
#define THIN_X(dtype) (dtype)
#define WIDE_W 6

typedef __m512 vec;
typedef __m512i pvec;
typedef uint16_t panel_t;

INLINE pvec
load_panel(const panel_t *from)
{
    return _mm512_load_si512(from);
}

INLINE void
store_panel(panel_t *to, pvec values)
{
    _mm512_store_si512(to, values);
}

INLINE pvec
load_weight(mil_dtype dtype, const char *from, int part)
{
    (void)dtype, (void)part; /* bfloat16, one part */
    return _mm512_loadu_si512(from);
}

INLINE vec
multiply_add(vec sums, pvec w, pvec x)
{
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x)); /* see linear_avx2.c */
    return sums;
}

#include "cpu/linear_avx512.h"

#include "cpu/linear_tiles.h"

DEFINE_KERNEL(bf16, MIL_BF16)

const mil_linear_kernel *
mil_linear_avx512bf16(mil_dtype dtype)
{
    return dtype == MIL_BF16 ? &bf16_kernel : NULL;
}

#else

const mil_linear_kernel *
mil_linear_avx512bf16(mil_dtype dtype)
{
    (void)dtype;
    return NULL;
}

#endif
