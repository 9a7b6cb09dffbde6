/* Recordings: CUDA graphs of a decoding step, and the small kernel that carries one step into the next.
 *
 * A step of a one-row batch is some hundred kernels of a few microseconds each.  Launched one by one they would
 * cost the host more than they cost the GPU; replayed as a graph, with the next token, positions and window
 * boundaries kept on the device, many steps run without the host at all.
 */
#include "cuda.cuh"
#include "table.h"

mil_status
mil_cuda_record_begin(mil_context *context)
{
    return mil_cuda_status(cudaStreamBeginCapture(mil_stream(context), cudaStreamCaptureModeRelaxed),
                           "beginning a recording");
}

mil_status
mil_cuda_record_end(mil_context *context, void **out)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    *out = NULL;
    MIL_TRY(mil_cuda_status(cudaStreamEndCapture(mil_stream(context), &graph), "ending a recording"));
    cudaError_t error = cudaGraphInstantiate(&exec, graph, 0);
    (void)cudaGraphDestroy(graph);
    MIL_TRY(mil_cuda_status(error, "preparing a recording"));
    *out = exec;
    return MIL_OK;
}

mil_status
mil_cuda_replay(mil_context *context, void *recording)
{
    return mil_cuda_status(cudaGraphLaunch((cudaGraphExec_t)recording, mil_stream(context)), "a replay");
}

void
mil_cuda_record_free(mil_context *context, void *recording)
{
    if (recording != NULL) {
        (void)cudaSetDevice(context->ops->device);
        (void)cudaGraphExecDestroy((cudaGraphExec_t)recording);
    }
}

/* One block: `steps` is read by all before one thread moves it on. */
static __global__ void
advance_kernel(mil_advance a)
{
    mil_trigger();
    mil_wait();
    int64_t step = *a.steps, columns = a.sequences + 1;
    __syncthreads();
    if (threadIdx.x == 0) {
        *a.steps = step + 1;
    }
    for (int64_t i = threadIdx.x; i < a.sequences; i += blockDim.x) {
        int64_t *past = a.rows + columns + i, *boundary = a.rows + 2 * columns + i;
        a.tokens[i] = a.drawn[i];
        a.history[step * a.sequences + i] = a.drawn[i];
        a.failed[i] |= a.bad[i];
        *boundary = *past - *past % MIL_WINDOW; /* mil_boundary_after(*past, 1) */
        *past += 1;
        a.position[i] += 1;
    }
}

mil_status
mil_cuda_advance(mil_context *context, const mil_advance *arguments)
{
    return mil_launch(context, "advance", advance_kernel, dim3(1), dim3(256), 0, *arguments);
}
