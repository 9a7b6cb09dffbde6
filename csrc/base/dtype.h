/* Element types, and exact conversions between the 16-bit floats and float32.
 *
 * bfloat16 and float16 live in memory as uint16_t bit patterns; nothing computes in them.  Rounding is
 * to nearest even and keeps NaN a NaN, so a value that came from a 16-bit file goes back unchanged.
 */
#ifndef MIL_BASE_DTYPE_H
#define MIL_BASE_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum mil_dtype { MIL_F32 = 0, MIL_BF16 = 1, MIL_F16 = 2 } mil_dtype;

static inline size_t
mil_dtype_size(mil_dtype dtype)
{
    return dtype == MIL_F32 ? 4 : 2;
}

static inline const char *
mil_dtype_name(mil_dtype dtype)
{
    return dtype == MIL_F32 ? "float32" : dtype == MIL_BF16 ? "bfloat16" : "float16";
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

static inline uint16_t
mil_float_to_bf16(float value)
{
    uint32_t bits = mil_float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)((bits >> 16) | 0x40u); /* NaN: keep it one after the cut */
    }
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float
mil_f16_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = (half >> 10) & 0x1fu;
    uint32_t mantissa = half & 0x3ffu;
    if (exponent == 0x1fu) {
        return mil_bits_to_float(sign | 0x7f800000u | (mantissa << 13));
    }
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24 is exact in float32 */
        float magnitude = (float)mantissa * 0x1p-24f;
        return mil_bits_to_float(sign | mil_float_to_bits(magnitude));
    }
    return mil_bits_to_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

static inline uint16_t
mil_float_to_f16(float value)
{
    uint32_t bits = mil_float_to_bits(value);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u);
    }
    if (magnitude >= 0x477ff000u) { /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (magnitude < 0x38800000u) { /* below 2^-14: subnormal; the addition rounds to nearest even */
        float shifted = mil_bits_to_float(magnitude) + 0.5f;
        return (uint16_t)(sign | (mil_float_to_bits(shifted) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

#endif
