/* Element types, and exact conversions between the 16-bit floats and float32.
 *
 * The 8-bit types are for weights alone: codes that stand for code * scale, with one float32 scale a row
 * (device.h: mil_quantize).  float8 is e4m3 without infinities (sign, 4 bits of exponent, 3 of mantissa).
 *
 * bfloat16 and float16 live in memory as uint16_t bit patterns; nothing computes in them.  Rounding is
 * to nearest even and keeps NaN a NaN, so a value that came from a 16-bit file goes back unchanged.
 */
#ifndef MIL_BASE_DTYPE_H
#define MIL_BASE_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum mil_dtype { MIL_F32 = 0, MIL_BF16 = 1, MIL_F16 = 2, MIL_F8 = 3, MIL_I8 = 4 } mil_dtype;

/* Whether values of this type are codes that need a scale. */
static inline int
mil_dtype_is_scaled(mil_dtype dtype)
{
    return dtype == MIL_F8 || dtype == MIL_I8;
}

static inline size_t
mil_dtype_size(mil_dtype dtype)
{
    return dtype == MIL_F32 ? 4 : mil_dtype_is_scaled(dtype) ? 1 : 2;
}

static inline const char *
mil_dtype_name(mil_dtype dtype)
{
    static const char *const names[] = {"float32", "bfloat16", "float16", "float8", "int8"};
    return names[dtype];
}

static inline float
mil_bits_to_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t
mil_float_to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float
mil_bf16_to_float(uint16_t half)
{
    return mil_bits_to_float((uint32_t)half << 16);
}

/* Selections instead of branches, here and below, so that loops can be vectorised. */
static inline uint16_t
mil_float_to_bf16(float value)
{
    uint32_t bits = mil_float_to_bits(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uint32_t quiet = (bits >> 16) | 0x40u; /* NaN: keep it one after the cut */
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

static inline float
mil_f16_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t magnitude = half & 0x7fffu;
    uint32_t normal = (magnitude << 13) + 0x38000000u;
    uint32_t infinite = (magnitude << 13) | 0x7f800000u;                          /* infinity and NaN */
    uint32_t subnormal = mil_float_to_bits((float)(int32_t)magnitude * 0x1p-24f); /* and zero; exact */
    uint32_t bits = magnitude < 0x0400u ? subnormal : normal;
    bits = magnitude >= 0x7c00u ? infinite : bits;
    return mil_bits_to_float(sign | bits);
}

static inline uint16_t
mil_float_to_f16(float value)
{
    uint32_t bits = mil_float_to_bits(value);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    /* Below 2^-14, subnormal: the addition rounds to nearest even. */
    uint32_t subnormal = mil_float_to_bits(mil_bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half; /* rounds to 65536 or more */
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return (uint16_t)(sign | half);
}

#endif
