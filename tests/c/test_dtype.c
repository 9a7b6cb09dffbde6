/* 16-bit floats: every pattern survives a round trip, and rounding is to nearest even. */
#include "harness.h"

#include <math.h>

#include "base/dtype.h"

/* Of two neighbouring patterns, the one that `value` rounds to: the nearer, or the even one at half way. */
static void
check_between(float low, float high, uint16_t low_bits, uint16_t (*round_to)(float))
{
    double middle = ((double)low + high) / 2;
    float below = nextafterf((float)middle, low), above = nextafterf((float)middle, high);
    uint16_t even = low_bits % 2 == 0 ? low_bits : (uint16_t)(low_bits + 1);
    if ((double)(float)middle == middle) {
        CHECK(round_to((float)middle) == even);
    }
    CHECK(round_to(below) == low_bits);
    CHECK(round_to(above) == (uint16_t)(low_bits + 1));
}

static void
check_all(float (*expand)(uint16_t), uint16_t (*round_to)(float), uint32_t infinity)
{
    uint32_t wrong = 0;
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        float value = expand((uint16_t)bits);
        bool nan = (bits & 0x7fff) > infinity;
        wrong += nan ? !isnan(value) || !isnan(expand(round_to(value))) : round_to(value) != bits;
    }
    CHECK(wrong == 0);
    for (uint32_t bits = 1; bits + 1 < infinity; bits += 37) {
        check_between(expand((uint16_t)bits), expand((uint16_t)(bits + 1)), (uint16_t)bits, round_to);
    }
    CHECK(round_to(INFINITY) == infinity && round_to(-INFINITY) == (infinity | 0x8000));
    CHECK(round_to(3.4e38f) == infinity); /* beyond the largest */
    CHECK(isnan(expand(round_to(NAN))));
}

void
test_dtype_bfloat16(void)
{
    check_all(mil_bf16_to_float, mil_float_to_bf16, 0x7f80);
}

void
test_dtype_float16(void)
{
    check_all(mil_f16_to_float, mil_float_to_f16, 0x7c00);
    CHECK(mil_float_to_f16(65519.0f) == 0x7bff && mil_float_to_f16(65520.0f) == 0x7c00);
    CHECK(mil_float_to_f16(0x1p-25f) == 0 && mil_float_to_f16(0x1.1p-25f) == 1);
}
