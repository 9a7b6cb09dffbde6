/* Weights of 8 bits on the device: codes to activation values, and the calls of quantized.cu.
 *
 * Codes lie as they do in any file: e4m3 bytes and two's complement int8, row-major.  Every code is an exact
 * bfloat16 and an exact float16, so the tensor cores see the weights as they are and the activations keep all their
 * bits; a row's scale multiplies the finished sum.  Four codes become two registers of pairs, of codes 0 and 2 and of 1 and
 * 3 (the sum over inputs does not mind; x is paired likewise), which takes 1.25 instructions a code of the units for bits
 * and 1 of those for numbers.  An H100 can issue 4.5 of either while memory brings a byte for each lane, so reading still
 * decides.
 */
#ifndef MIL_KERNELS_QUANTIZED_CUH
#define MIL_KERNELS_QUANTIZED_CUH

#include "cuda.cuh"

struct mil_f8 {
    uint8_t bits;
};

struct mil_i8 {
    int8_t value;
};

template <typename Pair>
static __device__ __forceinline__ Pair
mil_pair_of(uint32_t bits)
{
    return *reinterpret_cast<Pair *>(&bits);
}

template <typename Pair>
static __device__ __forceinline__ uint32_t
mil_bits_of(Pair pair)
{
    return *reinterpret_cast<uint32_t *>(&pair);
}

/* Codes `half` and `half` + 2 of a word of four, as a pair of activations.
 *
 * e4m3: a code keeps its sign as the uppermost of 16 bits, and its seven other bits move to where the lower four bits of that
 * float's exponent and the top three of its mantissa are.  That is the value times 2^(7 - bias), subnormals included, and
 * one exact product mends it.  Products stand for shifts to the left: other units do them. */
static __device__ __forceinline__ uint32_t
mil_expand(uint32_t word, int half, mil_f8, __nv_bfloat16)
{
    uint32_t small = half == 0 ? ((word * 16) & 0x07f007f0u) | ((word * 256) & 0x80008000u)
                               : ((word >> 4) & 0x07f007f0u) | (word & 0x80008000u);
    return mil_bits_of(__hmul2(mil_pair_of<__nv_bfloat162>(small), mil_pair_of<__nv_bfloat162>(0x7b807b80u)));
}

static __device__ __forceinline__ uint32_t
mil_expand(uint32_t word, int half, mil_f8, __half)
{
    uint32_t small = half == 0 ? ((word * 128) & 0x3f803f80u) | ((word * 256) & 0x80008000u)
                               : ((word >> 1) & 0x3f803f80u) | (word & 0x80008000u);
    return mil_bits_of(__hmul2(mil_pair_of<__half2>(small), mil_pair_of<__half2>(0x5c005c00u)));
}

/* int8 as bfloat16, whose mantissa holds seven bits: 128 + the lower seven, minus 128 or, where the code is
 * negative, 256. */
static __device__ __forceinline__ uint32_t
mil_expand(uint32_t word, int half, mil_i8, __nv_bfloat16)
{
    uint32_t byte = __byte_perm(word, 0x43434343u, half == 0 ? 0x4240 : 0x4341);
    return mil_bits_of(__hsub2(mil_pair_of<__nv_bfloat162>(byte & 0xff7fff7fu),
                               mil_pair_of<__nv_bfloat162>(byte & 0xff80ff80u)));
}

/* As float16, whose mantissa holds all: 1024 + (code + 128), minus 1152. */
static __device__ __forceinline__ uint32_t
mil_expand(uint32_t word, int half, mil_i8, __half)
{
    uint32_t byte = __byte_perm(word ^ 0x80808080u, 0x64646464u, half == 0 ? 0x4240 : 0x4341);
    return mil_bits_of(__hsub2(mil_pair_of<__half2>(byte), mil_pair_of<__half2>(0x64806480u)));
}

/* One code as float32. */
static __device__ __forceinline__ float
mil_float(mil_f8 code)
{
    uint32_t expanded = mil_expand(code.bits, 0, code, __half());
    return __low2float(mil_pair_of<__half2>(expanded));
}

static __device__ __forceinline__ float
mil_float(mil_i8 code)
{
    return (float)code.value;
}

/* Products of weights of 8 bits that thin_product.cu does not take as they are, whatever their shape. */
mil_status
mil_scaled_products(mil_context *context, const mil_linear *products, int64_t count);

#endif
