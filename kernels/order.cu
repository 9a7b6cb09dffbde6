/* Order between a caller's stream and ours, for operators on arrays of other libraries (csrc/python/call.c).
 *
 * An operator runs on a stream of its own, whose scratch memory nobody else uses; two events put it between what the
 * caller queued before and after the call.  So nobody waits on the host, and the caller's stream may be any.
 */
#include "cuda.cuh"
#include "table.h"

mil_status
mil_cuda_order(mil_context *context, void *before, void *after)
{
    if (before == after) {
        return MIL_OK;
    }
    MIL_CUDA_TRY(cudaSetDevice(context->ops->device));
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    MIL_CUDA_TRY(cudaStreamIsCapturing((cudaStream_t)before, &capture));
    if (capture != cudaStreamCaptureStatusNone) {
        return mil_fail(
            MIL_ERR_UNSUPPORTED,
            "the caller's CUDA stream is being captured into a graph; operators cannot be part of "
            "one, since their workspace is used again: call them outside of the capture");
    }
    cudaEvent_t event;
    MIL_CUDA_TRY(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    cudaError_t error = cudaEventRecord(event, (cudaStream_t)before);
    if (error == cudaSuccess) {
        error = cudaStreamWaitEvent((cudaStream_t)after, event, 0);
    }
    (void)cudaEventDestroy(event); /* what waits for it still does */
    return mil_cuda_status(error, "ordering two streams");
}
