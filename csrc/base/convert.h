/* Arrays of one float type as arrays of another: to nearest, ties to even; NaN stays NaN. */
#ifndef MIL_BASE_CONVERT_H
#define MIL_BASE_CONVERT_H

#include "base/dtype.h"

/* `from` and `to`: count elements each, apart; float32, bfloat16 or float16. */
void
mil_convert(const void *from, mil_dtype from_dtype, void *to, mil_dtype to_dtype, int64_t count, int threads);

#endif
