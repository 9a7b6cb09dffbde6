/* The operator tables of CUDA devices: one for each activation type and device.
 *
 * Members that are missing (NULL) are the backward operators, losses and optimizers: training runs on the CPU.
 */
#include "cuda.cuh"
#include "table.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_DEVICES 16

static mil_ops tables[MOST_DEVICES][3];

static mil_ops
table_of(mil_dtype activation_dtype, int device)
{
    mil_ops ops = {};
    ops.version = MIL_OPS_VERSION;
    ops.size = sizeof(mil_ops);
    ops.name = "cuda";
    ops.activation_dtype = activation_dtype;
    ops.device = device;
    ops.prefill_rows = 8192; /* products of fewer rows than some thousands leave tensor cores idle */
    ops.open = mil_cuda_open;
    ops.finish = mil_cuda_finish;
    ops.close = mil_cuda_close;
    ops.order = mil_cuda_order;
    ops.alloc = mil_cuda_alloc;
    ops.free = mil_cuda_free;
    ops.copy = mil_cuda_copy;
    ops.zero = mil_cuda_zero;
    ops.upload = mil_cuda_upload;
    ops.linear_forward = mil_cuda_linear_forward;
    ops.norm_forward = mil_cuda_norm_forward;
    ops.rope_table = mil_cuda_rope_table;
    ops.rope = mil_cuda_rope;
    ops.attention_forward = mil_cuda_attention_forward;
    ops.kv_append = mil_cuda_kv_append;
    ops.conv1d_forward = mil_cuda_conv1d_forward;
    ops.scan_forward = mil_cuda_scan_forward;
    ops.ssd_forward = mil_cuda_ssd_forward;
    ops.glu_forward = mil_cuda_glu_forward;
    ops.embedding_forward = mil_cuda_embedding_forward;
    ops.add = mil_cuda_add;
    ops.gather_rows = mil_cuda_gather_rows;
    ops.widen = mil_cuda_widen;
    const char *fuse =
        getenv("MAMBAINLLAMA_CUDA_FUSE"); /* 0: one kernel an operator, to compare and to profile */
    if (fuse == NULL || strcmp(fuse, "0") != 0) {
        ops.project = mil_cuda_project;
        ops.rope_append = mil_cuda_rope_append;
        ops.scan_mixer = mil_cuda_scan_mixer;
    }
    ops.quantize = mil_cuda_quantize;
    ops.sample = mil_cuda_sample;
    ops.accept = mil_cuda_accept;
    ops.advance = mil_cuda_advance;
    ops.propose = mil_cuda_propose;
    ops.settle = mil_cuda_settle;
    ops.record_begin = mil_cuda_record_begin;
    ops.record_end = mil_cuda_record_end;
    ops.replay = mil_cuda_replay;
    ops.record_free = mil_cuda_record_free;
    return ops;
}

mil_status
mil_cuda_device_count(int *count)
{
    *count = 0;
    if (cudaGetDeviceCount(count) != cudaSuccess) {
        (void)cudaGetLastError();
        *count = 0;
    }
    return MIL_OK;
}

mil_status
mil_cuda_describe(int device, mil_cuda_device_info *out)
{
    cudaDeviceProp properties;
    MIL_CUDA_TRY(cudaSetDevice(device));
    MIL_CUDA_TRY(cudaGetDeviceProperties(&properties, device));
    snprintf(out->name, sizeof out->name, "%.*s", (int)sizeof out->name - 1, properties.name);
    out->major = properties.major;
    out->minor = properties.minor;
    out->multiprocessors = properties.multiProcessorCount;
    MIL_CUDA_TRY(cudaMemGetInfo(&out->free_memory, &out->memory));
    return MIL_OK;
}

mil_status
mil_cuda_memory(int device, size_t *free_bytes, size_t *bytes)
{
    MIL_CUDA_TRY(cudaSetDevice(device));
    return mil_cuda_status(cudaMemGetInfo(free_bytes, bytes), "asking for free memory");
}

/* Does nothing: whether there is machine code of it for a device says whether there is of all. */
static __global__ void
probe_kernel()
{
}

/* Fails in one line where this build has no machine code for a device. */
static mil_status
check_architecture(int device)
{
    int major = 0, minor = 0;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaSetDevice(device);
    error = error == cudaSuccess ? cudaFuncGetAttributes(&attributes, probe_kernel) : error;
    if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction) {
        (void)cudaGetLastError(); /* what else is wrong the first call says */
        return MIL_OK;
    }
    (void)cudaGetLastError();
    (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    (void)cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return mil_fail(
        MIL_ERR_DEVICE,
        "device \"cuda:%d\": this build has no kernels for GPUs of compute capability %d.%d; install "
        "mambainllama again with MAMBAINLLAMA_CUDA_ARCHS=%d%d (80 and newer), or use device=\"cpu\"",
        device, major, minor, major, minor);
}

mil_status
mil_cuda_table(mil_dtype activation_dtype, int device, const mil_ops **out)
{
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    *out = NULL;
    if (error != cudaSuccess || count == 0) {
        (void)cudaGetLastError();
        return mil_fail(MIL_ERR_DEVICE, "device \"cuda\": no usable GPU here (%s); use device=\"cpu\"",
                        error == cudaSuccess ? "none found" : cudaGetErrorString(error));
    }
    if (device < 0 || device >= count || device >= MOST_DEVICES) {
        return mil_fail(MIL_ERR_DEVICE, "device \"cuda:%d\": this machine has cuda:0 to cuda:%d", device,
                        count - 1);
    }
    mil_ops *table = &tables[device][activation_dtype];
    if (table->version == 0) { /* not yet handed out */
        MIL_TRY(check_architecture(device));
    }
    *table = table_of(activation_dtype, device); /* the same bytes whoever writes them */
    *out = table;
    return MIL_OK;
}
