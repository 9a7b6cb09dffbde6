/* Mamba-2's prompts chunk by chunk: what ssd.cu (mma.sync) and ssd_hopper.cu (wgmma) share. */
#ifndef MIL_KERNELS_SSD_CHUNKS_CUH
#define MIL_KERNELS_SSD_CHUNKS_CUH

#include "ssd.cuh"

#define CHUNK 64

/* What a chunk's dt give. */
struct alignas(16) chunk_decays {
    float2 sum[CHUNK]; /* of dt A log2(e) up to a token, as two floats */
    float dt[CHUNK];
    float from_start[CHUNK]; /* h_i */
    float to_end[CHUNK];     /* W[last, s] dt_s; 0 after the last token to be folded */
    float last;              /* h_last */
};

struct chunk_arguments {
    ssd_arguments ssd;
    int segments, segment_chunks;
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

static __device__ __forceinline__ unsigned
shared_address(const void *pointer)
{
    return (unsigned)__cvta_generic_to_shared(pointer);
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

static __device__ __forceinline__ float
fast_power(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* dt of two tokens a lane, done from the tail or raw from the activations, as they lie in memory: whoever widened them here
 * would wait for them here. */
template <typename T>
struct chunk_times {
    float old[2];
    T fresh[2];
};

template <typename T>
static __device__ __forceinline__ void
ask_for_dt(const ssd_arguments &a, const mil_span &span, const float *tail, int head, int64_t start,
           int64_t total, chunk_times<T> &dt)
{
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int64_t token = start + 2 * (threadIdx.x % MIL_WARP) + k;
        if (token < span.before) {
            dt.old[k] = tail[token * a.heads + head];
        }
        if (token >= span.before && token < total) {
            dt.fresh[k] = ((const T *)a.dt)[(span.row + token - span.before) * a.dt_stride + head];
        }
    }
}

/* Sums, decays and weights of a chunk from its dt, by one warp. `folded`: tokens of the chunk that a fold takes. */
template <typename T>
static __device__ __forceinline__ void
fill_decays(const ssd_arguments &a, const mil_span &span, int64_t start, int64_t total, int folded,
            float exponent, float bias, const chunk_times<T> &raw, chunk_decays &out)
{
    const int lane = threadIdx.x % MIL_WARP;
    const double least = -1e4; /* 2^least is 0, and sums of it are far from overflow */
    float dt[2];
    double sum[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int64_t token = start + 2 * lane + k;
        dt[k] = token < span.before ? raw.old[k]
                : token < total     ? mil_time_step(mil_float(raw.fresh[k]) + bias, a.dt_min, a.dt_max)
                                    : 0.0f;
        sum[k] = fmax((double)(dt[k] * exponent), least);
    }
    sum[1] += sum[0];
    double running = sum[1];
#pragma unroll
    for (int step = 1; step < MIL_WARP; step *= 2) {
        double below = __shfl_up_sync(MIL_ALL_LANES, running, step);
        running += lane >= step ? below : 0.0;
    }
    double before = running - sum[1];
    sum[0] += before;
    sum[1] += before;
    double end = __shfl_sync(MIL_ALL_LANES, folded % 2 == 0 ? sum[1] : sum[0], max(0, (folded - 1) / 2));
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int s = 2 * lane + k;
        float high = (float)sum[k];
        out.sum[s] = make_float2(high, (float)(sum[k] - (double)high));
        out.dt[s] = dt[k];
        out.from_start[s] = fast_power(high);
        out.to_end[s] = s < folded ? fast_power((float)(end - sum[k])) * dt[k] : 0.0f;
    }
    if (lane == 0) {
        out.last = fast_power((float)end);
    }
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
