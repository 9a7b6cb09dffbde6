/* Device memory, copies, and the streams of running calls.
 *
 * Every running call owns a stream of its own (non-blocking, so that calls of several threads overlap).  Work
 * without a stream (states are made and copied outside of calls) goes to the default stream and is waited for.
 * While a stream is being captured into a graph nothing may be copied from host memory by a node, because the
 * memory would be read again at every replay: uploads then take place at once, on a stream beside it, into
 * memory that is kept as long as the recording.
 *
 * Weights come from a mapped file.  A plain copy of pageable memory goes through the driver's own small buffer, by
 * one thread that also takes the page faults: 3 to 8 GB/s where the bus carries 50.  So large uploads are cut into
 * pieces, and several threads ("lanes") bring them into pinned buffers, two of each lane, of which one is sent
 * while the other is filled:
 *
 *     lane 0   read piece 0 | read piece 2   | read piece 5 ...
 *                           | send 0         | send 2
 *     lane 1   read piece 1    | read piece 3 | read piece 4 ...
 *                              | send 1       | send 3
 */
#include "cuda.cuh"
#include "table.h"

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LANES = 8, PIECE = 2 << 20, LARGE = 4 * PIECE };

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

/* One large upload: what the lanes share. */
typedef struct upload {
    int device;
    char *to;
    const char *from;
    size_t bytes;
    size_t next; /* first byte that no lane has taken yet */
} upload;

typedef struct lane {
    upload *work;
    char *buffers; /* [2, PIECE], pinned */
    cudaStream_t stream;
    cudaEvent_t sent[2]; /* of each buffer */
    cudaError_t error;
    pthread_t thread;
    bool started;
} lane;

/* Asks the system to read the pages of [from, from + bytes) of a mapped file in one go, not as they are touched. */
static void
expect_reading(const char *from, size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), before = (size_t)from % page;
    (void)madvise((void *)(from - before), bytes + before, MADV_WILLNEED);
}

static cudaError_t
send_pieces(lane *self)
{
    upload *work = self->work;
    cudaError_t error = cudaSetDevice(work->device);
    for (int turn = 0; error == cudaSuccess; turn = 1 - turn) {
        size_t begin = __atomic_fetch_add(&work->next, PIECE, __ATOMIC_RELAXED);
        if (begin >= work->bytes) {
            break;
        }
        char *buffer = self->buffers + (size_t)turn * PIECE;
        size_t bytes = work->bytes - begin;
        bytes = bytes < PIECE ? bytes : (size_t)PIECE;
        expect_reading(work->from + begin, bytes);
        error = cudaEventSynchronize(self->sent[turn]);
        if (error == cudaSuccess) {
            memcpy(buffer, work->from + begin, bytes);
            error = cudaMemcpyAsync(work->to + begin, buffer, bytes, cudaMemcpyHostToDevice, self->stream);
        }
        if (error == cudaSuccess) {
            error = cudaEventRecord(self->sent[turn], self->stream);
        }
    }
    cudaError_t waited = cudaStreamSynchronize(self->stream);
    return error == cudaSuccess ? waited : error;
}

static void *
run_lane(void *argument)
{
    lane *self = (lane *)argument;
    self->error = send_pieces(self);
    return NULL;
}

static void
close_lane(lane *self)
{
    for (int i = 0; i < 2 && self->sent[i] != NULL; i++) {
        (void)cudaEventDestroy(self->sent[i]);
    }
    if (self->stream != NULL) {
        (void)cudaStreamDestroy(self->stream);
    }
    *self = (lane){};
}

static cudaError_t
open_lane(lane *self, char *buffers)
{
    self->buffers = buffers;
    cudaError_t error = cudaStreamCreateWithFlags(&self->stream, cudaStreamNonBlocking);
    for (int i = 0; i < 2 && error == cudaSuccess; i++) {
        error = cudaEventCreateWithFlags(&self->sent[i], cudaEventDisableTiming);
    }
    return error;
}

/* Pinned memory and streams cost milliseconds to get, a model has hundreds of weights: they are made once and stay
 * (32 MiB), the streams until another device's turn.  Call it under the lock of whoever uses the lanes; false where
 * there are none, and copies take the plain way. */
static bool
open_lanes(lane *lanes, int device)
{
    static char *memory;
    static int device_of_lanes = -1;
    cudaError_t error = cudaSuccess;
    if (device_of_lanes == device) {
        return true;
    }
    if (memory == NULL) {
        error = cudaHostAlloc((void **)&memory, (size_t)LANES * 2 * PIECE, cudaHostAllocPortable);
        memory = error == cudaSuccess ? memory : NULL;
    }
    for (int i = 0; i < LANES; i++) {
        close_lane(&lanes[i]);
        if (error == cudaSuccess) {
            error = open_lane(&lanes[i], memory + (size_t)i * 2 * PIECE);
        }
    }
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
    }
    device_of_lanes = error == cudaSuccess ? device : -1;
    return error == cudaSuccess;
}

/* Uploads by lanes, the caller's thread being the first; *done says whether that was possible. */
static mil_status
upload_by_lanes(mil_context *context, void *to, const void *from, size_t bytes, bool *done)
{
    static pthread_mutex_t lanes_in_use = PTHREAD_MUTEX_INITIALIZER;
    static lane lanes[LANES];
    upload work = {context->ops->device, (char *)to, (const char *)from, bytes, 0};
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&lanes_in_use);
    *done = open_lanes(lanes, work.device);
    if (*done) {
        for (int i = 0; i < LANES; i++) {
            lanes[i].work = &work;
            lanes[i].started =
                i > 0 && i < cores && pthread_create(&lanes[i].thread, NULL, run_lane, &lanes[i]) == 0;
        }
        error = send_pieces(&lanes[0]);
        for (int i = 1; i < LANES; i++) {
            if (lanes[i].started) {
                (void)pthread_join(lanes[i].thread, NULL);
                error = error == cudaSuccess ? lanes[i].error : error;
            }
        }
    }
    pthread_mutex_unlock(&lanes_in_use);
    return mil_cuda_status(error, "upload");
}

static bool
is_pageable(const void *pointer)
{
    cudaPointerAttributes attributes;
    if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess) {
        (void)cudaGetLastError();
        return true;
    }
    return attributes.type == cudaMemoryTypeUnregistered;
}

mil_status
mil_cuda_copy(mil_context *context, void *to, const void *from, size_t bytes)
{
    if (bytes == 0) {
        return MIL_OK;
    }
    MIL_CUDA_TRY(cudaSetDevice(context->ops->device));
    if (context->stream == NULL && bytes >= LARGE && is_pageable(from) && !is_host(to)) {
        bool done;
        MIL_TRY(upload_by_lanes(context, to, from, bytes, &done));
        if (done) {
            return MIL_OK;
        }
    }
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
