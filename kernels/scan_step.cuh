/* The selective scan token by token, as a thread does its part: V channels side by side, every sixteenth state.
 *
 * Used by the scan alone (selective_scan_step.cu) and by the whole mixer (scan_mixer.cu), which give the same bits.
 */
#ifndef MIL_KERNELS_SCAN_STEP_CUH
#define MIL_KERNELS_SCAN_STEP_CUH

#include "selective_scan.cuh"

#define QUADS 8    /* threads side by side */
#define LANES_N 16 /* threads that share a channel */
#define THREADS (QUADS * LANES_N)
#define WARPS (THREADS / MIL_WARP)

/* One token: H moves on. */
template <int V, int J>
static __device__ __forceinline__ void
step(const float (&dt)[V], const float (&input)[V], const float (&exponent)[J][V], const float (&B)[J],
     float (&H)[J][V])
{
#pragma unroll
    for (int j = 0; j < J; j++) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            H[j][v] = fmaf(fast_power(dt[v] * exponent[j][v]), H[j][v], input[v] * B[j]);
        }
    }
}

/* Sums over the lanes of a warp that have the same channels. */
template <int V>
static __device__ __forceinline__ void
add_lanes(float (&sum)[V])
{
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int lanes = QUADS; lanes < MIL_WARP; lanes *= 2) {
            sum[v] += __shfl_xor_sync(MIL_ALL_LANES, sum[v], lanes);
        }
    }
}

/* The thread's part of sum_n C H, summed over the lanes of its warp, into partial [WARPS, COLUMNS]. */
template <int V, int J>
static __device__ __forceinline__ void
store_partial(const float (&C)[J], const float (&H)[J][V], float *partial)
{
    float sum[V] = {};
#pragma unroll
    for (int j = 0; j < J; j++) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            sum[v] = fmaf(C[j], H[j][v], sum[v]);
        }
    }
    add_lanes<V>(sum);
    if (threadIdx.x % MIL_WARP < QUADS) {
        mil_store<V>(partial + threadIdx.x / MIL_WARP * QUADS * V + threadIdx.x % QUADS * V, sum);
    }
}

/* Moves H between registers and `state` [state_dim, inner], or NULL; c: the thread's first channel. */
template <int V, int J>
static __device__ __forceinline__ void
load_H(const scan_arguments &a, const float *state, int c, int lane_n, float (&H)[J][V])
{
    mil_load_state<LANES_N>(state, c, a.state_dim, a.inner, c < a.inner, lane_n, H);
}

template <int V, int J>
static __device__ __forceinline__ void
store_H(const scan_arguments &a, const float (&H)[J][V], int c, int lane_n, float *state)
{
    mil_store_state<LANES_N>(H, state, c, a.state_dim, a.inner, c < a.inner, lane_n);
}

/* A log2(e), finite so that 0 * A is 0; 0 where there is no state. */
template <int V, int J>
static __device__ __forceinline__ void
load_exponent(const scan_arguments &a, int c, int lane_n, float (&exponent)[J][V])
{
#pragma unroll
    for (int j = 0; j < J; j++) {
        int n = lane_n + j * LANES_N;
#pragma unroll
        for (int v = 0; v < V; v++) {
            exponent[j][v] = n < a.state_dim && c < a.inner
                                 ? -log2_e * fminf(expf(a.A_log[(int64_t)(c + v) * a.state_dim + n]), 1e30f)
                                 : 0.0f;
        }
    }
}

#endif
