/* Accumulators of 16 floats, as linear_tiles.h asks for them, for linear_avx512.c and linear_avx512bf16.c. */
#ifndef MIL_CPU_LINEAR_AVX512_H
#define MIL_CPU_LINEAR_AVX512_H

INLINE vec
zero(void)
{
    return _mm512_setzero_ps();
}

INLINE vec
load_lanes(const float *from)
{
    return _mm512_load_ps(from);
}

INLINE void
store_lanes(float *to, vec sums)
{
    _mm512_store_ps(to, sums);
}

/* The upper eight lanes added to the lower eight. */
INLINE __m256
fold(const float *lanes)
{
    return _mm256_add_ps(_mm256_load_ps(lanes), _mm256_load_ps(lanes + 8));
}

/* With f_i = l_i + l_(i + 8) each sum is ((f0 + f1) + (f2 + f3)) + ((f4 + f5) + (f6 + f7)). */
INLINE void
reduce(const float *lanes, float *values)
{
    __m256 pairs[4], quads[2];
    for (int i = 0; i < 4; i++) {
        pairs[i] = _mm256_hadd_ps(fold(lanes + 32 * i), fold(lanes + 32 * i + 16));
    }
    quads[0] = _mm256_hadd_ps(pairs[0], pairs[1]);
    quads[1] = _mm256_hadd_ps(pairs[2], pairs[3]);
    __m256 low = _mm256_permute2f128_ps(quads[0], quads[1], 0x20);
    __m256 high = _mm256_permute2f128_ps(quads[0], quads[1], 0x31);
    _mm256_storeu_ps(values, _mm256_add_ps(low, high));
}

#endif
