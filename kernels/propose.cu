/* Prompt lookup on the device (csrc/decode/ngram.c has the rule): a block a text looks at all earlier places at once.
 *
 * The longest match wins, and of equally long ones the latest: the largest (length, place) as one integer.  A text of
 * 8,192 tokens takes a thread 16 places of mostly one comparison each.
 */
#include "cuda.cuh"
#include "table.h"

#define THREADS 512

/* Tokens before `end` that agree with those before `count`, at most `longest`. */
static __device__ __forceinline__ int
common_suffix(const int32_t *text, int64_t end, int64_t count, int64_t longest)
{
    int length = 0;
    while (length < longest && length < end && text[end - 1 - length] == text[count - 1 - length]) {
        length++;
    }
    return length;
}

/* The largest of a block's values, in every thread. */
static __device__ __forceinline__ int64_t
block_max(int64_t value, int64_t *partial)
{
#pragma unroll
    for (int step = MIL_WARP / 2; step > 0; step /= 2) {
        value = max(value, __shfl_xor_sync(MIL_ALL_LANES, value, step));
    }
    if (threadIdx.x % MIL_WARP == 0) {
        partial[threadIdx.x / MIL_WARP] = value;
    }
    __syncthreads();
    for (int i = 0; i < THREADS / MIL_WARP; i++) {
        value = max(value, partial[i]);
    }
    return value;
}

static __global__ void
__launch_bounds__(THREADS) propose_kernel(const mil_propose p)
{
    __shared__ int64_t partial[THREADS / MIL_WARP];
    constexpr int PLACE_BITS = 48;
    mil_trigger();
    mil_wait();
    const int64_t sequence = blockIdx.x, count = p.count[sequence];
    const int32_t *text = p.texts + sequence * p.texts_stride;
    int32_t *tokens = p.tokens + sequence * (p.drafts + 1);
    int64_t best = 0; /* nothing found: a match of no tokens, before the first */
    for (int64_t end = p.shortest + threadIdx.x; end < count; end += THREADS) {
        const int length = common_suffix(text, end, count, p.longest);
        if (length > 0) {
            best = max(best, (int64_t)length << PLACE_BITS | end);
        }
    }
    best = block_max(best, partial);
    const int64_t from = best & (((int64_t)1 << PLACE_BITS) - 1), period = count - from;
    const bool found = best >> PLACE_BITS >= p.shortest;
    if (threadIdx.x == 0) {
        tokens[0] = text[count - 1];
        p.drafted[sequence] = found ? p.drafted[sequence] : 0;
    }
    /* A match that runs into the end of the text goes on with the proposals themselves: a loop. */
    for (int64_t i = threadIdx.x; i < p.drafts; i += THREADS) {
        tokens[1 + i] = text[from + i % period];
    }
}

mil_status
mil_cuda_propose(mil_context *context, const mil_propose *arguments)
{
    return mil_launch(context, "propose", propose_kernel, dim3((unsigned)arguments->sequences), dim3(THREADS),
                      0, *arguments);
}
