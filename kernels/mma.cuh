/* The tensor cores' instruction for 16-bit operands, as every kernel but those over wgmma uses it. */
#ifndef MIL_KERNELS_MMA_CUH
#define MIL_KERNELS_MMA_CUH

#include "cuda.cuh"

/* c += a b, 16 x 16 by 16 x 8: lane (g, t) = (lane / 4, lane % 4) holds c[g][2t .. 2t + 1] and c[g + 8][..], of `a` in
 * pairs a[g][2t ..], a[g + 8][2t ..], a[g][2t + 8 ..], a[g + 8][2t + 8 ..], of b b[2t ..][g] and b[2t + 8 ..][g]. */
template <typename T>
static __device__ __forceinline__ void
mil_multiply_add(float *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void
mil_multiply_add<__nv_bfloat16>(float *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void
mil_multiply_add<__half>(float *c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                         uint32_t b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* The same with `a` as an array. */
template <typename T>
static __device__ __forceinline__ void
mil_multiply_add(float *c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    mil_multiply_add<T>(c, a[0], a[1], a[2], a[3], b0, b1);
}

#endif
