/* Mamba-2's prompts chunk by chunk: what ssd.cu (mma.sync) and ssd_hopper.cu (wgmma) share. */
#ifndef MIL_KERNELS_SSD_CHUNKS_CUH
#define MIL_KERNELS_SSD_CHUNKS_CUH

#include "ssd.cuh"

#define CHUNK 64
#define BLOCK 16 /* tokens of it whose decays to each other are exponents of their own, in scores */

/* What a chunk's dt give. */
struct alignas(16) chunk_decays {
    float2 sum[CHUNK]; /* of dt A log2(e) up to a token, as two floats */
    float dt[CHUNK];
    float from_start[CHUNK]; /* h_i */
    float to_end[CHUNK];     /* W[last, s] dt_s; 0 after the last token to be folded */
    float from_block[CHUNK]; /* W[i, b - 1] with b the first token of i's block */
    float to_block[3 * BLOCK * (CHUNK / BLOCK) /
                   2]; /* W[b - 1, s] dt_s of s < b, for each block but the first */
    float last;        /* h_last of the tokens to be folded; 1 where there are none */
};

/* Where the weights to the block of `number` begin in to_block. */
static __host__ __device__ constexpr int
find_to_block(int number)
{
    return BLOCK * number * (number - 1) / 2;
}

struct chunk_arguments {
    ssd_arguments ssd;
    int segments, segment_chunks;
    chunk_decays *decays; /* [sequences, heads, segments * segment_chunks] */
    float *
        segment_states; /* [sequences, heads, segments, N, P]: what each adds from 0; then what each starts from */
    float *segment_decays; /* [sequences, heads, segments] */
};

/* Where the states of segment `segment` of a head are among all of them. */
static __device__ __forceinline__ int64_t
find_segment(const chunk_arguments &c, int head, int segment)
{
    return ((int64_t)blockIdx.z * c.ssd.heads + head) * c.segments + segment;
}

/* What a chunk's dt give a head, as ssd_decays_kernel left it. */
static __device__ __forceinline__ chunk_decays *
find_decays(const chunk_arguments &c, int head, int64_t chunk)
{
    return c.decays + find_segment(c, head, 0) * c.segment_chunks + chunk;
}

static __device__ __forceinline__ unsigned
shared_address(const void *pointer)
{
    return (unsigned)__cvta_generic_to_shared(pointer);
}

/* Decay after a token of sum `from` up to one of sum `to`. */
static __device__ __forceinline__ float
decay_between(float2 from, float2 to)
{
    return mil_exp2((to.x - from.x) + (to.y - from.y));
}

/* 16 bytes on their way from memory, or zeros. */
static __device__ __forceinline__ void
copy_unit(void *to, const void *from, bool there)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 16 : 0));
}

static __device__ __forceinline__ void
load_matrices_transposed(const void *row, uint32_t (&to)[4])
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}

static __device__ __forceinline__ uint32_t
pack(float low, float high, __nv_bfloat16)
{
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

static __device__ __forceinline__ uint32_t
pack(float low, float high, __half)
{
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

/* Two values rounded, the first in the low half. */
template <typename T>
static __device__ __forceinline__ uint32_t
pack(float low, float high)
{
    return pack(low, high, T());
}

template <typename T>
static __device__ __forceinline__ float2
unpack(uint32_t bits)
{
    mil_vector<T, 2> v = *reinterpret_cast<mil_vector<T, 2> *>(&bits);
    return make_float2(mil_float(v.at[0]), mil_float(v.at[1]));
}

/* ssd_hopper.cu: heads of 64 by twos, or 128 columns of a head, a block. */
struct chunk_blocks {
    bool pairs;
    int slices; /* of a head */
    int enough; /* blocks that fill the chip */
};

/* Whether this device and shape are for it. */
bool
mil_ssd_hopper_takes(const mil_context *context, const ssd_arguments *arguments, chunk_blocks *out);

/* One launch over all segments: the folds alone, or the outputs as well. */
mil_status
mil_ssd_hopper(mil_context *context, const chunk_arguments *arguments, const mil_states *states,
               int64_t sequences, bool outputs);

#endif
