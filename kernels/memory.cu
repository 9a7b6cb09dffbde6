/* Device memory, copies, and the streams of running calls.
 *
 * Every running call owns a stream of its own (non-blocking, so that calls of several threads overlap).  Work
 * without a stream (states are made and copied outside of calls) goes to the default stream and is waited for.
 * While a stream is being captured into a graph nothing may be copied from host memory by a node, because the
 * memory would be read again at every replay: uploads then take place at once, on a stream beside it, into
 * memory that is kept as long as the recording.
 */
#include "cuda.cuh"
#include "table.h"

#include <string.h>

mil_status
mil_cuda_alloc(mil_context *context, size_t bytes, void **out)
{
    *out = NULL;
    MIL_CUDA_TRY(cudaSetDevice(context->ops->device));
    cudaError_t error = cudaMalloc(out, bytes == 0 ? 1 : bytes);
    if (error == cudaErrorMemoryAllocation) {
        size_t free_bytes = 0, total = 0;
        (void)cudaGetLastError();
        (void)cudaMemGetInfo(&free_bytes, &total);
        return mil_fail(
            MIL_ERR_MEMORY,
            "CUDA: out of memory: %.2f GiB wanted, %.2f of %.2f GiB free on cuda:%d; use a shorter "
            "context, a smaller batch, or dtype=\"bfloat16\"",
            (double)bytes / 0x1p30, (double)free_bytes / 0x1p30, (double)total / 0x1p30,
            context->ops->device);
    }
    return mil_cuda_status(error, "allocation");
}

void
mil_cuda_free(mil_context *context, void *pointer)
{
    if (pointer != NULL) {
        (void)cudaSetDevice(context->ops->device);
        (void)cudaFree(pointer);
    }
}

static bool
is_host(const void *pointer)
{
    cudaPointerAttributes attributes;
    if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess) {
        (void)cudaGetLastError();
        return true;
    }
    return attributes.type == cudaMemoryTypeUnregistered || attributes.type == cudaMemoryTypeHost;
}

mil_status
mil_cuda_copy(mil_context *context, void *to, const void *from, size_t bytes)
{
    if (bytes == 0) {
        return MIL_OK;
    }
    MIL_CUDA_TRY(cudaSetDevice(context->ops->device));
    MIL_CUDA_TRY(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, mil_stream(context)));
    if (context->stream == NULL || is_host(to)) {
        MIL_CUDA_TRY(cudaStreamSynchronize(mil_stream(context)));
    }
    return MIL_OK;
}

mil_status
mil_cuda_zero(mil_context *context, void *pointer, size_t bytes)
{
    if (bytes == 0) {
        return MIL_OK;
    }
    MIL_CUDA_TRY(cudaSetDevice(context->ops->device));
    MIL_CUDA_TRY(cudaMemsetAsync(pointer, 0, bytes, mil_stream(context)));
    if (context->stream == NULL) {
        MIL_CUDA_TRY(cudaStreamSynchronize(mil_stream(context)));
    }
    return MIL_OK;
}

/* Copies now, although this thread's stream is being captured: on another one, which the capture does not see. */
static mil_status
upload_beside(void *to, const void *from, size_t bytes)
{
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaStream_t beside;
    MIL_CUDA_TRY(cudaThreadExchangeStreamCaptureMode(&mode));
    cudaError_t error = cudaStreamCreateWithFlags(&beside, cudaStreamNonBlocking);
    if (error == cudaSuccess) {
        error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, beside);
        error = error == cudaSuccess ? cudaStreamSynchronize(beside) : error;
        (void)cudaStreamDestroy(beside);
    }
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
    return mil_cuda_status(error, "upload into a recording's memory");
}

mil_status
mil_cuda_upload(mil_context *context, const void *from, size_t bytes, const void **out)
{
    void *copy;
    MIL_TRY(mil_arena_push(context->kept != NULL ? context->kept : context->scratch, bytes, 1, &copy));
    *out = copy;
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    MIL_CUDA_TRY(cudaStreamIsCapturing(mil_stream(context), &capture));
    if (capture == cudaStreamCaptureStatusNone) {
        return mil_cuda_status(
            cudaMemcpyAsync(copy, from, bytes, cudaMemcpyHostToDevice, mil_stream(context)), "upload");
    }
    return upload_beside(copy, from, bytes);
}

mil_status
mil_cuda_open(mil_context *context)
{
    MIL_CUDA_TRY(cudaSetDevice(context->ops->device));
    if (context->stream == NULL) {
        cudaStream_t stream;
        MIL_CUDA_TRY(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        context->stream = stream;
    }
    return MIL_OK;
}

mil_status
mil_cuda_finish(mil_context *context)
{
    return mil_cuda_status(cudaStreamSynchronize(mil_stream(context)), "waiting for the device");
}

void
mil_cuda_close(mil_context *context)
{
    if (context->stream != NULL) {
        (void)cudaStreamDestroy(mil_stream(context));
        context->stream = NULL;
    }
}
