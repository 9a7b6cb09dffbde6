/* What every kernel file shares: element types, vector access, reductions, and launches.
 *
 * Activations are of one type a table: float (to compare with the CPU), __nv_bfloat16 or __half.  Kernels are
 * templates over it; all arithmetic is float32.  A launch goes through mil_launch, which marks it as a
 * programmatic dependent of the kernel before it on the stream: its blocks may start while that one drains.
 * Therefore EVERY kernel calls mil_wait() in every block before it touches memory that another kernel writes or
 * reads (weights, which nobody writes, may be fetched before), and may call mil_trigger() once its own share of
 * the chip is no longer needed by others.  Before sm_90 both are nothing and launches are ordinary ones.
 *
 * Kernels depend on no host value that changes from token to token (numbers of past tokens, boundaries): they
 * read those from rows.device, and grids are sized from what is constant, so that a decoding step can be
 * captured in a CUDA graph and replayed.
 */
#ifndef MIL_KERNELS_CUDA_CUH
#define MIL_KERNELS_CUDA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

extern "C" {
#include "device.h"
}

#define MIL_WARP 32
#define MIL_ALL_LANES 0xffffffffu

/* ---- errors and launches ------------------------------------------------------------------------------- */

/* A CUDA failure as a status, in one line. */
static inline mil_status
mil_cuda_status(cudaError_t error, const char *what)
{
    if (error == cudaSuccess) {
        return MIL_OK;
    }
    (void)cudaGetLastError(); /* what is not sticky must not be found by the next call */
    return mil_fail(error == cudaErrorMemoryAllocation ? MIL_ERR_MEMORY : MIL_ERR_DEVICE, "CUDA: %s: %s",
                    what, cudaGetErrorString(error));
}

#define MIL_CUDA_TRY(expression) MIL_TRY(mil_cuda_status((expression), #expression))

static inline cudaStream_t
mil_stream(const mil_context *context)
{
    return (cudaStream_t)context->stream;
}

static inline int64_t
mil_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* Dynamic shared memory that any kernel here gets without asking: 48 KB are for static memory and it together. */
#define MIL_SHARED_UNASKED ((size_t)24 << 10)

/* Lets a kernel have so much of it on a device, if it may not yet; what it may have is never lowered (limits.cu). */
cudaError_t
mil_allow_shared(const void *kernel, int device, size_t bytes);

/* Leaves first-level cache to a kernel only where shared memory is not: blocks of other kernels find room beside its own. */
cudaError_t
mil_prefer_shared(const void *kernel, int device);

/* A number of the context's device, 0 where it cannot be had. */
static inline int
mil_device_number(const mil_context *context, cudaDeviceAttr which)
{
    int number = 0;
    return cudaDeviceGetAttribute(&number, which, context->ops->device) == cudaSuccess ? number : 0;
}

static inline int
mil_multiprocessors(const mil_context *context)
{
    return mil_device_number(context, cudaDevAttrMultiProcessorCount);
}

/* Of the compute capability. */
static inline int
mil_device_major(const mil_context *context)
{
    return mil_device_number(context, cudaDevAttrComputeCapabilityMajor);
}

/* Whether a block of this device can have so much shared memory, and a little that is static. */
static inline bool
mil_device_has_shared(const mil_context *context, size_t bytes)
{
    return bytes + 64 <= (size_t)mil_device_number(context, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

/* Launches `kernel<<<grid, block, shared>>>(arguments...)` on the context's stream, as a programmatic dependent of
 * the kernel before. */
template <typename... Parameters, typename... Arguments>
static inline mil_status
mil_launch(mil_context *context, const char *name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
           size_t shared, Arguments... arguments)
{
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
        return MIL_OK;
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = mil_stream(context);
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaError_t error = cudaSuccess;
    if (shared > MIL_SHARED_UNASKED) {
        error = mil_allow_shared((const void *)kernel, context->ops->device, shared);
    }
    if (error == cudaSuccess) {
        error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    }
    return mil_cuda_status(error, name);
}

/* ---- within a kernel --------------------------------------------------------------------------------------- */

/* Everything that kernels before this one on the stream wrote is visible from here on. */
static __device__ __forceinline__ void
mil_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* mil_wait() once `known` is: the assembler else puts arithmetic that could be done before behind the wait, where everybody
 * waits for it. */
static __device__ __forceinline__ void
mil_wait_knowing(int known)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred even;\n"
        "setp.eq.s32 even, %0, 0;\n"
        "@even griddepcontrol.wait;\n"
        "@!even griddepcontrol.wait;\n"
        "}" ::"r"(known)
        : "memory");
#endif
}

/* Of an address, for it. */
static __device__ __forceinline__ int
mil_known(const void *address)
{
    const int64_t bits = (int64_t)address;
    return (int)(bits ^ bits >> 32);
}

/* Lets the next kernel's blocks start where there is room. They still wait for this grid to end. */
static __device__ __forceinline__ void
mil_trigger()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Sum over a warp's lanes, the same bits in every lane; a fixed tree. */
static __device__ __forceinline__ float
mil_warp_sum(float value)
{
#pragma unroll
    for (int step = MIL_WARP / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(MIL_ALL_LANES, value, step);
    }
    return value;
}

static __device__ __forceinline__ float
mil_warp_max(float value)
{
#pragma unroll
    for (int step = MIL_WARP / 2; step > 0; step /= 2) {
        value = fmaxf(value, __shfl_xor_sync(MIL_ALL_LANES, value, step));
    }
    return value;
}

/* Sum over a block of a multiple of 32 threads, the same bits in every thread; `partial` has 32 floats of shared
 * memory, free for use again after the call. */
static __device__ __forceinline__ float
mil_block_sum(float value, float *partial)
{
    int lane = threadIdx.x % MIL_WARP, warp = threadIdx.x / MIL_WARP, warps = blockDim.x / MIL_WARP;
    value = mil_warp_sum(value);
    if (lane == 0) {
        partial[warp] = value;
    }
    __syncthreads();
    value = mil_warp_sum(lane < warps ? partial[lane] : 0.0f);
    __syncthreads();
    return value;
}

/* 2^x by one instruction; below 2^-126 it is 0. */
static __device__ __forceinline__ float
mil_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float
mil_sigmoid(float x)
{
    return 1.0f / (1.0f + __expf(-x));
}

static __device__ __forceinline__ float
mil_silu(float x)
{
    return x / (1.0f + __expf(-x));
}

/* log(1 + e^x), without a branch and without overflow: max(x, 0) + log(1 + e), e = e^-|x|, of which the second is
 * 2 atanh(e / (2 + e)), an odd function whose argument is at most a third (polynomial within 4e-9 of it). */
static __device__ __forceinline__ float
mil_softplus(float x)
{
    const float e = mil_exp2(-1.44269504f * fabsf(x)), a = __fdividef(e, 2.0f + e), square = a * a;
    float series = fmaf(square, 0.28174657f, 0.27961415f);
    series = fmaf(square, series, 0.40024853f);
    series = fmaf(square, series, 0.66666317f);
    series = fmaf(square, series, 2.0f);
    return fmaf(a, series, fmaxf(x, 0.0f));
}

/* ---- element types ------------------------------------------------------------------------------------------ */

static __device__ __forceinline__ float
mil_float(float x)
{
    return x;
}

static __device__ __forceinline__ float
mil_float(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}

static __device__ __forceinline__ float
mil_float(__half x)
{
    return __half2float(x);
}

template <typename T>
static __device__ __forceinline__ T
mil_round(float x);

template <>
__device__ __forceinline__ float
mil_round<float>(float x)
{
    return x;
}

template <>
__device__ __forceinline__ __nv_bfloat16
mil_round<__nv_bfloat16>(float x)
{
    return __float2bfloat16_rn(x);
}

template <>
__device__ __forceinline__ __half
mil_round<__half>(float x)
{
    return __float2half_rn(x);
}

/* `N` elements that move as one access of N * sizeof(T) bytes; N is a power of two, at most 16 bytes. */
template <typename T, int N>
struct alignas(N * sizeof(T)) mil_vector {
    T at[N];
};

/* Elements in 16 bytes. */
template <typename T>
constexpr int mil_lanes = 16 / (int)sizeof(T);

/* N elements from `from` as float32. */
template <int N, typename T>
static __device__ __forceinline__ void
mil_load(const T *from, float (&out)[N])
{
    mil_vector<T, N> v = *reinterpret_cast<const mil_vector<T, N> *>(from);
#pragma unroll
    for (int i = 0; i < N; i++) {
        out[i] = mil_float(v.at[i]);
    }
}

/* The same past the first-level cache, and where it stands in the code. */
template <int N>
static __device__ __forceinline__ void
mil_load_settled(const float *from, float (&out)[N])
{
    static_assert(N == 1 || N == 2 || N == 4, "one access");
    if constexpr (N == 4) {
        asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])
                     : "l"(from)
                     : "memory");
    }
    else if constexpr (N == 2) {
        asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];"
                     : "=f"(out[0]), "=f"(out[1])
                     : "l"(from)
                     : "memory");
    }
    else {
        asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(out[0]) : "l"(from) : "memory");
    }
}

template <int N, typename T>
static __device__ __forceinline__ void
mil_store(T *to, const float (&in)[N])
{
    mil_vector<T, N> v;
#pragma unroll
    for (int i = 0; i < N; i++) {
        v.at[i] = mil_round<T>(in[i]);
    }
    *reinterpret_cast<mil_vector<T, N> *>(to) = v;
}

/* Whether rows at `pointer`, `stride` elements apart, can be read in steps of 16 bytes. */
template <typename T>
static inline bool
mil_is_aligned(const void *pointer, int64_t stride)
{
    return (uintptr_t)pointer % 16 == 0 && stride % mil_lanes<T> == 0;
}

/* ---- copies into shared memory ------------------------------------------------------------------------------- */

/* 16 bytes on their way, past the first-level cache. */
static __device__ __forceinline__ void
mil_copy_16(void *to, const void *from)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
                 "l"(from)
                 : "memory");
}

/* Until this thread's copies have arrived. */
static __device__ __forceinline__ void
mil_await_copies()
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* ---- packed rows (mil_rows.device) ---------------------------------------------------------------------------- */

struct mil_device_rows {
    int sequences;
    int each; /* rows of every sequence, as decoding has them; 0 where they bring different numbers */
    bool settled;
    const int64_t *offsets, *past, *boundary; /* [sequences + 1], the last two with one entry too many */
};

static inline mil_device_rows
mil_rows_of(const mil_rows &rows)
{
    int64_t columns = rows.sequences + 1, each = rows.rows / rows.sequences;
    for (int64_t i = 1; i <= rows.sequences; i++) {
        each = rows.offsets[i] == i * each ? each : 0;
    }
    return {(int)rows.sequences,      (int)each, rows.settled, rows.device, rows.device + columns,
            rows.device + 2 * columns};
}

/* Until the rows' numbers, states and caches may be read, as they are on entry: at once where they are settled, as the
 * kernel that embeds the tokens waits before it lets any other start.  What kernels of this pass write still needs
 * mil_wait().  To be read past the first-level cache (mil_load_settled, __ldcg, cp.async.cg). */
static __device__ __forceinline__ void
mil_wait_for_states(const mil_device_rows &rows)
{
    if (!rows.settled) {
        mil_wait();
    }
}

/* One of the numbers of mil_rows, past the first-level cache, and where it stands in the code. */
static __device__ __forceinline__ int64_t
mil_load_number(const int64_t *from)
{
    long long value;
    asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
    return value;
}

/* First row of a sequence, or of the one after it. Whoever asks for a line of memory waits for all that asked before, 0.4 ns
 * each over the whole device: nobody asks for what the launch knows. */
static __device__ __forceinline__ int64_t
mil_row_of(const mil_device_rows &rows, int64_t sequence)
{
    return rows.each > 0 ? sequence * rows.each : mil_load_number(rows.offsets + sequence);
}

/* The sequence that holds a row; found by halving, after mil_wait(), where rows.each is 0. */
static __device__ __forceinline__ int
mil_sequence_of(const mil_device_rows &rows, int64_t row)
{
    if (rows.each > 0) {
        return (int)row / rows.each;
    }
    int low = 0, high = rows.sequences;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (rows.offsets[middle] <= row) {
            low = middle;
        }
        else {
            high = middle;
        }
    }
    return low;
}

/* ---- one instance a type ---------------------------------------------------------------------------------------- */

/* Calls `function<T>(arguments...)` for the table's activation type. */
#define MIL_FOR_ACT(context, function, ...)                                               \
    ((context)->ops->activation_dtype == MIL_BF16  ? function<__nv_bfloat16>(__VA_ARGS__) \
     : (context)->ops->activation_dtype == MIL_F16 ? function<__half>(__VA_ARGS__)        \
                                                   : function<float>(__VA_ARGS__))

#endif
