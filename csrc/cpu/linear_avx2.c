/* Matrix products with AVX2, FMA and F16C: 8 lanes, 16 registers (see linear_tiles.h).
 *
 * With 5 rows a step of 16 bfloat16 weights costs, for two weight rows, 12 loads, 4 shifts and masks and
 * 20 multiply-adds: the latter bind, at 10 cycles for 64 bytes of weights. Tiles have at least 8 chains
 * (4 cycles of latency, 2 multiply-adds a cycle) and leave room for the weights and one vector of x.
 */
#if defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define LANES 8
#define PANEL_WIDTH 8
#define PARTS 2
#define TILE_W1 8
#define TILE_W2 4
#define TILE_W3 3
#define TILE_W4 2
#define TILE_W5 2
#define TILE_W6 2
#define ROW_BY_ROW (GROUP + 1) /* none: arithmetic binds */
#define THIN_X(dtype) EXPANDED
#define WIDE_W 3

#include "cpu/linear.h"

typedef __m256 vec;
typedef __m256 pvec;
typedef float panel_t;

INLINE vec
zero(void)
{
    return _mm256_setzero_ps();
}

INLINE vec
load_lanes(const float *from)
{
    return _mm256_load_ps(from);
}

INLINE void
store_lanes(float *to, vec sums)
{
    _mm256_store_ps(to, sums);
}

INLINE pvec
load_panel(const panel_t *from)
{
    return _mm256_load_ps(from);
}

INLINE void
store_panel(panel_t *to, pvec values)
{
    _mm256_store_ps(to, values);
}

INLINE pvec
load_weight(mil_dtype dtype, const char *from, int part)
{
    if (dtype == MIL_F32) {
        return _mm256_loadu_ps((const float *)(const void *)(from + 32 * part));
    }
    if (dtype == MIL_F16) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(from + 16 * part)));
    }
    __m256i pairs = _mm256_loadu_si256((const __m256i *)(const void *)from);
    __m256i values = part == 0 ? _mm256_slli_epi32(pairs, 16)
                               : _mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u));
    return _mm256_castsi256_ps(values);
}

/* In assembly, because compilers fold the load of x into every multiply-add that uses it, and pick forms
 * that overwrite x and then move sums about: a third of the speed of a tile of 6 rows. */
INLINE vec
multiply_add(vec sums, pvec w, pvec x)
{
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sums) : "x"(w), "x"(x));
    return sums;
}

/* Each sum is ((l0 + l1) + (l2 + l3)) + ((l4 + l5) + (l6 + l7)). */
INLINE void
reduce(const float *lanes, float *values)
{
    __m256 pairs[4], quads[2];
    for (int i = 0; i < 4; i++) {
        pairs[i] = _mm256_hadd_ps(load_lanes(lanes + 16 * i), load_lanes(lanes + 16 * i + 8));
    }
    quads[0] = _mm256_hadd_ps(pairs[0], pairs[1]);
    quads[1] = _mm256_hadd_ps(pairs[2], pairs[3]);
    __m256 low = _mm256_permute2f128_ps(quads[0], quads[1], 0x20);
    __m256 high = _mm256_permute2f128_ps(quads[0], quads[1], 0x31);
    _mm256_storeu_ps(values, _mm256_add_ps(low, high));
}

#include "cpu/linear_tiles.h"

DEFINE_KERNEL(f32, MIL_F32)
DEFINE_KERNEL(bf16, MIL_BF16)
DEFINE_KERNEL(f16, MIL_F16)

const mil_linear_kernel *
mil_linear_avx2(mil_dtype dtype)
{
    return dtype == MIL_F32 ? &f32_kernel : dtype == MIL_BF16 ? &bf16_kernel : &f16_kernel;
}

#else

#include "cpu/linear.h"

const mil_linear_kernel *
mil_linear_avx2(mil_dtype dtype)
{
    (void)dtype;
    return NULL;
}

#endif
