/* mamba-ssm's selective scan, callable by pointers.
 *
 * The kernel is the package's own (selective_scan_fwd_kernel.cuh of its source archive), launched as its launcher does
 * for lengths above 1024: 128 threads of 16 tokens, one channel a block.  Only this instance is compiled, for bfloat16
 * activations, whole pieces of 2048 tokens and one group of B and C: seconds instead of the package's many minutes.
 * Arrays are [batch, channels, length], B and C [batch, 1, state, length], as the package wants them.
 */
#include "selective_scan_fwd_kernel.cuh"

template <bool Z>
static int
launch(SSMParamsBase &params, cudaStream_t stream)
{
    using traits = Selective_Scan_fwd_kernel_traits<128, 16, 1, true, true, true, Z, at::BFloat16, float>;
    constexpr int shared = traits::kSmemSize + MAX_DSTATE * sizeof(typename traits::scan_t);
    auto kernel = &selective_scan_fwd_kernel<traits>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    kernel<<<dim3(params.batch, params.dim), traits::kNThreads, shared, stream>>>(params);
    return (int)cudaGetLastError();
}
extern "C" int
scan_forward(int batch, int dim, int length, int state, void *u, void *delta, void *A, void *B, void *C,
             void *D, void *bias, void *z, void *x, void *out, void *out_z, void *stream)
{
    SSMParamsBase p = {};
    p.batch = batch, p.dim = dim, p.seqlen = length, p.dstate = state;
    p.n_groups = 1, p.n_chunks = (length + 2047) / 2048, p.dim_ngroups_ratio = dim;
    p.is_variable_B = p.is_variable_C = p.delta_softplus = true;
    p.A_d_stride = state, p.A_dstate_stride = 1;
    p.B_batch_stride = p.C_batch_stride = p.B_group_stride = p.C_group_stride = (size_t)state * length;
    p.B_dstate_stride = p.C_dstate_stride = length;
    p.u_batch_stride = p.delta_batch_stride = p.z_batch_stride = (size_t)dim * length;
    p.out_batch_stride = p.out_z_batch_stride = (size_t)dim * length;
    p.u_d_stride = p.delta_d_stride = p.z_d_stride = p.out_d_stride = p.out_z_d_stride = length;
    p.A_ptr = A, p.B_ptr = B, p.C_ptr = C, p.D_ptr = D, p.u_ptr = u, p.delta_ptr = delta;
    p.delta_bias_ptr = bias, p.out_ptr = out, p.x_ptr = x, p.z_ptr = z, p.out_z_ptr = out_z;
    return z != nullptr ? launch<true>(p, (cudaStream_t)stream) : launch<false>(p, (cudaStream_t)stream);
}
