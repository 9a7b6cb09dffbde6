/* Matrix products in plain C: 4 lanes in the compilers' own vector type, which is SSE2 on x86-64 and NEON
 * on aarch64 (see linear_tiles.h).
 *
 * Where the processor is known to have fused multiply-adds (aarch64) they are used; elsewhere a product is
 * rounded before it is added, since fmaf without hardware is a slow function.
 */
#include <stdint.h>
#include <string.h>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/linear.h"

#define TARGET
#define INLINE static inline __attribute__((always_inline))
#define LANES 4
#define PANEL_WIDTH 4
#define PARTS 2
#define TILE_W1 8
#define TILE_W2 4
#define TILE_W3 3
#define TILE_W4 2
#define TILE_W5 2
#define TILE_W6 2
#define ROW_BY_ROW (GROUP + 1) /* none: arithmetic binds */
#define THIN_X(dtype) EXPANDED
#define WIDE_W 2

typedef float vec __attribute__((vector_size(16)));
typedef vec pvec;
typedef float panel_t;
typedef uint32_t bits __attribute__((vector_size(16)));
typedef int32_t mask __attribute__((vector_size(16)));

INLINE vec
zero(void)
{
    return (vec){0};
}

INLINE vec
load_lanes(const float *from)
{
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void
store_lanes(float *to, vec sums)
{
    memcpy(to, &sums, sizeof sums);
}

INLINE pvec
load_panel(const panel_t *from)
{
    return load_lanes(from);
}

INLINE void
store_panel(panel_t *to, pvec values)
{
    store_lanes(to, values);
}

/* Four float16 in the low halves, exactly as mil_f16_to_float: with the exponent in place the bits are
 * the value times 2^-112, subnormal or not; infinities and NaN get the full exponent. */
INLINE vec
f16_to_float(bits half)
{
    bits shifted = (half & 0x7fffu) << 13;
    vec magnitude = (vec)shifted * 0x1p112f;
    bits special = (bits)((mask)shifted >= 0x0f800000) & 0x7f800000u;
    return (vec)((bits)magnitude | special | (half & 0x8000u) << 16);
}

INLINE pvec
load_weight(mil_dtype dtype, const char *from, int part)
{
    if (dtype == MIL_F32) {
        return load_lanes((const float *)(const void *)(from + 16 * part));
    }
    bits pairs;
    memcpy(&pairs, from, sizeof pairs);
    if (dtype == MIL_F16) {
        return f16_to_float(part == 0 ? pairs & 0xffffu : pairs >> 16);
    }
    return (vec)(part == 0 ? pairs << 16 : pairs & 0xffff0000u);
}

INLINE vec
multiply_add(vec sums, pvec w, pvec x)
{
#if defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)sums, (float32x4_t)w, (float32x4_t)x);
#else
    return sums + w * x;
#endif
}

/* Each sum is (l0 + l1) + (l2 + l3). */
INLINE void
reduce(const float *lanes, float *values)
{
    for (int i = 0; i < 8; i++) {
        const float *l = lanes + 4 * i;
        values[i] = (l[0] + l[1]) + (l[2] + l[3]);
    }
}

#include "cpu/linear_tiles.h"

DEFINE_KERNEL(f32, MIL_F32)
DEFINE_KERNEL(bf16, MIL_BF16)
DEFINE_KERNEL(f16, MIL_F16)

const mil_linear_kernel *
mil_linear_portable(mil_dtype dtype)
{
    return dtype == MIL_F32 ? &f32_kernel : dtype == MIL_BF16 ? &bf16_kernel : &f16_kernel;
}
