/* Recordings: CUDA graphs of a decoding step or a speculative round, and the small kernels that carry one into the next.
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

/* The arguments of `graph` into a recording of the same kernels in the same order, as the steps of other texts are. */
static bool
make_over(cudaGraphExec_t recording, cudaGraph_t graph)
{
    cudaGraphExecUpdateResultInfo result;
    bool done = recording != NULL && cudaGraphExecUpdate(recording, graph, &result) == cudaSuccess;
    if (!done) {
        (void)cudaGetLastError();
    }
    return done;
}

mil_status
mil_cuda_record_end(mil_context *context, void **recording)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = (cudaGraphExec_t)*recording;
    cudaError_t error = cudaStreamEndCapture(mil_stream(context), &graph);
    if (error != cudaSuccess || !make_over(exec, graph)) {
        mil_cuda_record_free(context, exec);
        exec = NULL;
        error = error == cudaSuccess ? cudaGraphInstantiate(&exec, graph, 0) : error;
    }
    if (graph != NULL) {
        (void)cudaGraphDestroy(graph);
    }
    *recording = error == cudaSuccess ? exec : NULL;
    return mil_cuda_status(error, "ending a recording");
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

/* What the texts' next round may offer, after `count` tokens. */
static __device__ __forceinline__ int
allowed_drafts(const mil_settle &s, int64_t i, int64_t count)
{
    int64_t left = s.end[i] - count - 1, most = s.barred[i] ? 0 : min((int64_t)s.wanted[i], s.drafts);
    return (int)max((int64_t)0, min(most, left));
}

/* Numbers of the draft model's passes for a text of `count` tokens. */
static __device__ __forceinline__ void
set_draft_rows(const mil_settle &s, int64_t i, int64_t count)
{
    int64_t columns = s.sequences + 1, first = count - 2, boundary = first - first % MIL_WINDOW;
    for (int64_t j = 0; j < s.drafts; j++) {
        int64_t *past = s.draft_rows + (3 * j + 1) * columns + i;
        *past = j == 0 ? first : first + 1 + j;
        /* Pass 0 finds the boundary that the round before has left, the others what pass 0 leaves. */
        past[columns] = j == 0 ? past[columns] : boundary + MIL_HOLD;
    }
}

/* A thread a text; one block, so that all have read *rounds before it moves. */
static __global__ void
settle_kernel(const __grid_constant__ mil_settle s)
{
    mil_trigger();
    mil_wait();
    const int64_t round = *s.rounds, columns = s.sequences + 1;
    const int width = (int)s.drafts + 1;
    __syncthreads();
    if (threadIdx.x == 0) {
        *s.rounds = round + 1;
    }
    for (int64_t i = threadIdx.x; i < s.sequences; i += blockDim.x) {
        const int accepted = s.accepted[i], drafted = s.drafted[i];
        const int32_t *verdict = s.verdict + i * width;
        int32_t *history = s.history + (round * s.sequences + i) * (width + 2);
        const int64_t count = s.position[i], next = count + accepted + 1;
        history[0] = drafted;
        history[1] = accepted;
        int bad = 0;
        for (int j = 0; j <= accepted; j++) {
            const int token = verdict[j];
            history[2 + j] = token;
            bad |= s.bad[i * width + j];
            bad |= s.draft_bad != NULL && j < drafted ? s.draft_bad[j * s.sequences + i] : 0;
            s.barred[i] |= token >= s.draft_vocab;
            if (s.texts != NULL) {
                s.texts[i * s.texts_stride + count + j] = token;
            }
        }
        s.failed[i] |= bad;
        const int last = verdict[accepted],
                  before = accepted > 0 ? verdict[accepted - 1] : s.tokens[i * width];
        s.tokens[i * width] = last;
        s.drafted[i] = allowed_drafts(s, i, next);
        for (int64_t j = 0; j < s.drafts; j++) {
            s.position[j * s.sequences + i] = next + j;
        }
        int64_t *past = s.rows + columns + i;
        past[columns] = *past - *past % MIL_WINDOW; /* mil_boundary_after(*past, width) */
        *past = next - 1;
        if (s.draft_rows != NULL) {
            int64_t first = count - 2, *boundary = s.draft_rows + 2 * columns + i;
            *boundary = first - first % MIL_WINDOW;
            set_draft_rows(s, i, next);
            const int most =
                (int)s.draft_vocab - 1; /* a token that the draft does not know: any will do, it is barred */
            s.draft_tokens[2 * i] = min(before, most);
            s.draft_tokens[2 * i + 1] = min(last, most);
        }
    }
}

mil_status
mil_cuda_settle(mil_context *context, const mil_settle *arguments)
{
    return mil_launch(context, "settle", settle_kernel, dim3(1), dim3(128), 0, *arguments);
}
