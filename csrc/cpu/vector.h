/* float32 functions for vectorised loops, and the macro that compiles them for several processors.
 *
 *   mil_expf      e^x           0 below 2^-126 (no subnormal results), inf above the largest float, NaN stays
 *   mil_decayf    2^x, x <= 0   the decays of state-space models; 0 from 2^-127 down
 *   mil_sigmoidf  1 / (1 + e^-x)
 *   mil_siluf     x / (1 + e^-x)
 *   mil_softplusf max(x, 0) + log(1 + e^-|x|), with all its digits where it is tiny
 *
 * Why our own: a call of libm in a loop keeps the compiler from vectorising it, and vector libraries
 * round differently from one instruction set to the next.  Everything here is straight-line: selections
 * instead of branches, integer arithmetic on the exponent instead of ldexp.  Errors (tests/c): below 1
 * unit in the last place (ulp) for mil_expf and mil_decayf, 2.5 for the others.
 *
 * Bits: the build uses -ffp-contract=off (part of -std=c11), so a product and a sum are fused exactly
 * where mil_fma says so.  An elementwise loop therefore gives the same bits in its vector body, in its
 * scalar remainder and on every instruction set with a fused multiply-add.  Sums over a vector's lanes
 * have no such promise; the kernels that need it keep lanes apart (one lane an output element) or in
 * arrays of fixed size.
 */
#ifndef MIL_CPU_VECTOR_H
#define MIL_CPU_VECTOR_H

#include <math.h>
#include <stdint.h>

#include "base/dtype.h"

/* MIL_VECTORISE before a function compiles it for each level of x86-64 and picks one when the library is
 * loaded; what it calls must be inlined into it to profit.  Other processors have one level.  Sanitizers
 * instrument the picking, which runs before they do: they get one version. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#if __GNUC__ >= 12
#define MIL_VECTORISE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
#ifdef MIL_VECTORISE
#define MIL_HAS_FMA 1 /* processors older than 2013 call libm for it: right, but slow */
#else
#define MIL_VECTORISE
#if defined(__FMA__) || defined(__aarch64__)
#define MIL_HAS_FMA 1
#else
#define MIL_HAS_FMA 0
#endif
#endif

#define MIL_INLINE static inline __attribute__((always_inline))

/* a * b + c, rounded once wherever the processor can. */
MIL_INLINE float
mil_fma(float a, float b, float c)
{
#if MIL_HAS_FMA
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

/* condition ? a : b, both computed. Written with ?: the compiler would move the work for `a` behind a
 * branch, and a loop with a branch around what may raise floating-point flags is not vectorised. */
MIL_INLINE float
mil_select(int condition, float a, float b)
{
    uint32_t mask = -(uint32_t)condition;
    return mil_bits_to_float((mil_float_to_bits(a) & mask) | (mil_float_to_bits(b) & ~mask));
}

/* 1.5 * 2^23: adding it rounds |x| < 2^22 to an integer, which is then the low bits of the sum. */
#define MIL_ROUNDER 12582912.0f
#define MIL_ROUNDER_BITS 0x4b400000

/* value * 2^n for a result in the normal range, where `rounded` is n + MIL_ROUNDER. */
MIL_INLINE float
mil_scale_by_power(float value, float rounded)
{
    uint32_t power = (mil_float_to_bits(rounded) - MIL_ROUNDER_BITS) << 23;
    return mil_bits_to_float(mil_float_to_bits(value) + power);
}

/* x = n log(2) + r with |r| <= log(2) / 2 (log(2) in two parts, so r is exact to the last bit), then
 * e^r = 1 + r + r^2 q(r), q of degree 4 with equal ripples of 3e-9. */
MIL_INLINE float
mil_expf(float x)
{
    float rounded = mil_fma(x, 1.442695041f, MIL_ROUNDER);
    float n = rounded - MIL_ROUNDER;
    float r = mil_fma(n, -0.693145752f, x);
    r = mil_fma(n, -1.42860677e-6f, r);
    float q = 0.00138131448f;
    q = mil_fma(q, r, 0.00836941879f);
    q = mil_fma(q, r, 0.041668456f);
    q = mil_fma(q, r, 0.166665152f);
    q = mil_fma(q, r, 0.49999994f);
    float power = mil_scale_by_power(1.0f + mil_fma(r * r, q, r), rounded);
    power = mil_select(x <= 88.72283f, power, x * INFINITY); /* NaN takes the second way and stays NaN */
    return mil_select(x < -87.33654f, 0.0f, power);
}

/* x = n + r with |r| <= 1/2 exactly, 2^r = 1 + r q(r), q of degree 5 with equal ripples of 2e-9.
 * At x = -127 that is a 1 whose exponent bits are taken away, which is 0; between -127 and -126 it is
 * something as small.  x > 0 is not for this function; a decay is 2^(dt A log2(e)), A < 0. */
MIL_INLINE float
mil_decayf(float x)
{
    float bounded = mil_select(x < -127.0f, -127.0f, x);
    float rounded = bounded + MIL_ROUNDER;
    float r = bounded - (rounded - MIL_ROUNDER);
    float q = 0.000153523171f;
    q = mil_fma(q, r, 0.00134001707f);
    q = mil_fma(q, r, 0.00961844996f);
    q = mil_fma(q, r, 0.0555032939f);
    q = mil_fma(q, r, 0.240226477f);
    q = mil_fma(q, r, 0.693147182f);
    return mil_scale_by_power(mil_fma(r, q, 1.0f), rounded);
}

MIL_INLINE float
mil_sigmoidf(float x)
{
    return 1.0f / (1.0f + mil_expf(-x)); /* e^-x = inf gives 0 */
}

MIL_INLINE float
mil_siluf(float x)
{
    return x / (1.0f + mil_expf(-x));
}

/* With u = e^-|x| in [0, 1] and s = u / (2 + u): log(1 + u) = 2 atanh(s) = u - s (u - s^2 P(s^2)), which
 * has no cancellation for small u. */
MIL_INLINE float
mil_softplusf(float x)
{
    float u = mil_expf(-fabsf(x));
    float s = u / (2.0f + u), square = s * s;
    float p = 0.242971539f;
    p = mil_fma(p, square, 0.214288875f);
    p = mil_fma(p, square, 0.286167502f);
    p = mil_fma(p, square, 0.39998883f);
    p = mil_fma(p, square, 0.666666746f);
    float log1p = mil_fma(-s, u - square * p, u);
    return mil_select(x > 0.0f, x, 0.0f) + log1p;
}

#endif
