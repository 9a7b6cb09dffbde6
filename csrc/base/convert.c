/* See convert.h. Bytes decide: a thread reads and writes some 5 GB/s, so all of the team take parts of a large array. */
#include "base/convert.h"

#define BLOCK ((int64_t)1 << 16) /* elements a turn; fewer than two blocks are not worth a team */

#define CONVERT(from_type, to_type, value) \
    do {                                   \
        const from_type *x = from;         \
        to_type *y = to;                   \
        for (int64_t i = 0; i < n; i++) {  \
            y[i] = (value);                \
        }                                  \
    } while (0)

static void
convert_block(const void *restrict from, mil_dtype from_dtype, void *restrict to, mil_dtype to_dtype,
              int64_t n)
{
    if (from_dtype == to_dtype) {
        memcpy(to, from, (size_t)n * mil_dtype_size(to_dtype));
    }
    else if (from_dtype == MIL_F32 && to_dtype == MIL_BF16) {
        CONVERT(float, uint16_t, mil_float_to_bf16(x[i]));
    }
    else if (from_dtype == MIL_F32) {
        CONVERT(float, uint16_t, mil_float_to_f16(x[i]));
    }
    else if (from_dtype == MIL_BF16 && to_dtype == MIL_F32) {
        CONVERT(uint16_t, float, mil_bf16_to_float(x[i]));
    }
    else if (from_dtype == MIL_BF16) {
        CONVERT(uint16_t, uint16_t, mil_float_to_f16(mil_bf16_to_float(x[i])));
    }
    else if (to_dtype == MIL_F32) {
        CONVERT(uint16_t, float, mil_f16_to_float(x[i]));
    }
    else {
        CONVERT(uint16_t, uint16_t, mil_float_to_bf16(mil_f16_to_float(x[i])));
    }
}

void
mil_convert(const void *from, mil_dtype from_dtype, void *to, mil_dtype to_dtype, int64_t count, int threads)
{
    int64_t from_size = (int64_t)mil_dtype_size(from_dtype), to_size = (int64_t)mil_dtype_size(to_dtype);
#pragma omp parallel for schedule(static) num_threads(threads) if (count > BLOCK)
    for (int64_t first = 0; first < count; first += BLOCK) {
        int64_t n = count - first < BLOCK ? count - first : BLOCK;
        convert_block((const char *)from + first * from_size, from_dtype, (char *)to + first * to_size,
                      to_dtype, n);
    }
}
