/* Packing and products of tiles, for each level of processor (tile.h).
 *
 * Attention reads a block of keys twice over: once to transpose it, so that scores of 16 keys fill a strip,
 * and once more (values) as it lies.  Both copies widen 16-bit numbers on the way, so the cache is read in
 * its own type and nothing is converted twice.
 */
#include "cpu/tile.h"

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/features.h"
#include "cpu/vector.h"

enum { AHEAD = 32 }; /* rows between the one that is read and the one that is prefetched */

MIL_INLINE const char *
row_of(mil_tile_source from, int64_t row, int64_t column)
{
    return from.data + (row * from.stride + column) * (int64_t)mil_dtype_size(from.dtype);
}

MIL_INLINE float
load_one(mil_dtype dtype, const char *from)
{
    if (dtype == MIL_F32) {
        float single;
        memcpy(&single, from, sizeof single);
        return single;
    }
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return dtype == MIL_BF16 ? mil_bf16_to_float(half) : mil_f16_to_float(half);
}

/* Columns begin .. of one packed row: numbers up to `width`, zeros up to the last strip. */
MIL_INLINE void
finish_row(mil_tile_source from, int64_t row, int64_t begin, int64_t width, float factor, float *to)
{
    for (int64_t i = begin; i < width; i++) {
        to[i] = load_one(from.dtype, row_of(from, row, i)) * factor;
    }
    for (int64_t i = width; i < mil_round_up(width, MIL_TILE_STRIP); i++) {
        to[i] = 0;
    }
}

/* Keys begin .. of one column: numbers up to `count`, zeros up to the last strip. */
MIL_INLINE void
finish_column(mil_tile_source from, int64_t first, int64_t begin, int64_t count, int64_t column, float *to)
{
    for (int64_t key = begin; key < count; key++) {
        to[key] = load_one(from.dtype, row_of(from, first + key, column));
    }
    for (int64_t key = count; key < mil_round_up(count, MIL_TILE_STRIP); key++) {
        to[key] = 0;
    }
}

static void
pack_rows_portable(mil_tile_source from, int64_t first, int64_t count, int64_t width, float factor, float *to)
{
    for (int64_t row = 0; row < count; row++) {
        finish_row(from, first + row, 0, width, factor, to + row * mil_tile_stride(width));
    }
}

static void
pack_transposed_portable(mil_tile_source from, int64_t first, int64_t count, int64_t width, float *to)
{
    for (int64_t column = 0; column < width; column++) {
        finish_column(from, first, 0, count, column, to + column * mil_tile_stride(MIL_TILE_KEYS));
    }
}

#if defined(__x86_64__)
#define TILE_NAME(name) name##_avx512
#define TILE_TARGET __attribute__((target("avx512f")))
#define LANES 16
#define VECTOR __m512
#define ROWS 12
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps((p), (v))
#define FILL(x) _mm512_set1_ps(x)
#define MULTIPLY_ADD(a, b, c) _mm512_fmadd_ps((a), (b), (c))
#include "cpu/tile_product.h"

#define TILE_NAME(name) name##_avx2
#define TILE_TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define VECTOR __m256
#define ROWS 6
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps((p), (v))
#define FILL(x) _mm256_set1_ps(x)
#define MULTIPLY_ADD(a, b, c) _mm256_fmadd_ps((a), (b), (c))
#include "cpu/tile_product.h"

#define TILE_NAME(name) name##_portable
#define TILE_TARGET
#define LANES 4
#define VECTOR __m128
#define ROWS 2
#define LOAD(p) _mm_loadu_ps(p)
#define STORE(p, v) _mm_storeu_ps((p), (v))
#define FILL(x) _mm_set1_ps(x)
#define MULTIPLY_ADD(a, b, c) _mm_add_ps(_mm_mul_ps((a), (b)), (c))
#include "cpu/tile_product.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))

AVX2 MIL_INLINE __m256
load_eight(mil_dtype dtype, const char *from)
{
    if (dtype == MIL_F32) {
        return _mm256_loadu_ps((const float *)from);
    }
    __m128i halves = _mm_loadu_si128((const __m128i *)from);
    return dtype == MIL_F16 ? _mm256_cvtph_ps(halves)
                            : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* A key head's rows lie kv_heads * head_dim numbers apart, often a page, which the processor's own
 * prefetching does not follow: asks for the row AHEAD of this one, which may well be the next block's. */
MIL_INLINE void
prefetch(mil_tile_source from, int64_t row, int64_t column)
{
    uintptr_t ahead = (uintptr_t)from.data + (uintptr_t)(((row + AHEAD) * from.stride + column) *
                                                         (int64_t)mil_dtype_size(from.dtype));
    _mm_prefetch((const char *)ahead, _MM_HINT_T0);
}

AVX2 MIL_INLINE void
pack_rows_of(mil_tile_source from, int64_t first, int64_t count, int64_t width, float factor, float *to)
{
    int64_t stride = mil_tile_stride(width), whole = width - width % 8;
    for (int64_t row = 0; row < count; row++, to += stride) {
        for (int64_t i = 0; i < whole; i += 8) {
            prefetch(from, first + row, i);
            __m256 eight = load_eight(from.dtype, row_of(from, first + row, i));
            _mm256_storeu_ps(to + i, _mm256_mul_ps(eight, _mm256_set1_ps(factor)));
        }
        finish_row(from, first + row, whole, width, factor, to);
    }
}

/* Eight keys by eight columns: pairs of rows are interleaved by ones, twos and halves. */
AVX2 MIL_INLINE void
transpose_eight(mil_tile_source from, int64_t key, int64_t column, float *to, int64_t to_stride)
{
    __m256 row[8], pair[8], four[8];
    for (int i = 0; i < 8; i++) {
        prefetch(from, key + i, column);
        row[i] = load_eight(from.dtype, row_of(from, key + i, column));
    }
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
    }
}

AVX2 MIL_INLINE void
pack_transposed_of(mil_tile_source from, int64_t first, int64_t count, int64_t width, float *to)
{
    int64_t stride = mil_tile_stride(MIL_TILE_KEYS), keys = count - count % 8, columns = width - width % 8;
    for (int64_t key = 0; key < keys; key += 8) {
        for (int64_t column = 0; column < columns; column += 8) {
            transpose_eight(from, first + key, column, to + column * stride + key, stride);
        }
    }
    for (int64_t column = 0; column < width; column++) {
        finish_column(from, first, column < columns ? keys : 0, count, column, to + column * stride);
    }
}

/* The type is a constant in each branch, so no loop asks for it. */
AVX2 static void
pack_rows_avx2(mil_tile_source from, int64_t first, int64_t count, int64_t width, float factor, float *to)
{
    switch (from.dtype) {
        case MIL_F32:
            pack_rows_of((mil_tile_source){from.data, MIL_F32, from.stride}, first, count, width, factor, to);
            break;
        case MIL_BF16:
            pack_rows_of((mil_tile_source){from.data, MIL_BF16, from.stride}, first, count, width, factor,
                         to);
            break;
        case MIL_F16:
            pack_rows_of((mil_tile_source){from.data, MIL_F16, from.stride}, first, count, width, factor, to);
            break;
        default: /* 8 bits are for weights */
            break;
    }
}

AVX2 static void
pack_transposed_avx2(mil_tile_source from, int64_t first, int64_t count, int64_t width, float *to)
{
    switch (from.dtype) {
        case MIL_F32:
            pack_transposed_of((mil_tile_source){from.data, MIL_F32, from.stride}, first, count, width, to);
            break;
        case MIL_BF16:
            pack_transposed_of((mil_tile_source){from.data, MIL_BF16, from.stride}, first, count, width, to);
            break;
        case MIL_F16:
            pack_transposed_of((mil_tile_source){from.data, MIL_F16, from.stride}, first, count, width, to);
            break;
        default:
            break;
    }
}

mil_tile_kernels
mil_tile_get_kernels(void)
{
    mil_cpu_level level = mil_cpu_get_level();
    if (level >= MIL_CPU_AVX2) {
        return (mil_tile_kernels){level >= MIL_CPU_AVX512 ? tile_product_avx512 : tile_product_avx2,
                                  pack_rows_avx2, pack_transposed_avx2};
    }
    return (mil_tile_kernels){tile_product_portable, pack_rows_portable, pack_transposed_portable};
}

#else

#define TILE_NAME(name) name##_portable
#define TILE_TARGET
#define LANES 1
#define VECTOR float
#define ROWS 4
#define LOAD(p) (*(p))
#define STORE(p, v) (*(p) = (v))
#define FILL(x) (x)
#define MULTIPLY_ADD(a, b, c) mil_fma((a), (b), (c))
#include "cpu/tile_product.h"

mil_tile_kernels
mil_tile_get_kernels(void)
{
    return (mil_tile_kernels){tile_product_portable, pack_rows_portable, pack_transposed_portable};
}

#endif
