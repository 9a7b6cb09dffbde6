/* The verdicts of speculative decoding, without the host (csrc/decode/speculate.c has the rule and why it
 * is exact).
 *
 * The distributions of the model's rows, and those that drafts were drawn from, come as logits and filters
 * (mil_filter), so the probability of one token costs one exponential: the verdicts on all drafts of a
 * sequence are taken at once, a lane each. Only the one token that follows the accepted drafts takes a pass
 * over a row, from p, or from max(0, p - q) where a draft fell. Random numbers are those of the host:
 * (seed, position, stream).
 */
#include "sampler.cuh"
#include "table.h"

static __device__ __forceinline__ double
probability(const mil_filter &f, const float *logits, int token)
{
    if (f.certain) {
        return token == f.best ? 1.0 : 0.0;
    }
    return (double)filtered(clean(logits[token]), token, f) / f.total;
}

/* What the draft of a row was drawn from: all on itself where there are no logits; tokens beyond
 * draft_vocab had none. */
static __device__ __forceinline__ double
draft_probability(const mil_accept &a, int64_t row, int token)
{
    if (a.draft_logits == NULL) {
        return token == a.drafts[row] ? 1.0 : 0.0;
    }
    if (token >= a.draft_vocab) {
        return 0.0;
    }
    return probability(a.draft_filter[row], a.draft_logits + row * a.draft_logits_stride, token);
}

/* How many drafts of a sequence stand: a lane a verdict. */
static __device__ int
count_accepted(const mil_accept &a, int64_t first_row, int drafted, uint64_t seed, int64_t position)
{
    int lane = threadIdx.x % MIL_WARP;
    for (int first = 0; first < drafted; first += MIL_WARP) {
        bool stands = false;
        if (first + lane < drafted) {
            int64_t row = first_row + first + lane;
            int token = a.drafts[row];
            double p = probability(a.filter[row], a.logits + row * a.logits_stride, token);
            double uniform = uniform_of(seed, (uint64_t)(position + first + lane), MIL_SAMPLE_ACCEPT);
            stands = a.forced > 0.0 ? uniform < a.forced : uniform * draft_probability(a, row, token) < p;
        }
        uint32_t rejected = __ballot_sync(MIL_ALL_LANES, !stands);
        if (rejected != 0) {
            int at = first + __ffs((int)rejected) - 1;
            return at < drafted ? at : drafted;
        }
    }
    return drafted;
}

/* A team a sequence. */
template <int BLOCKS>
static __global__ void
MIL_CLUSTER(BLOCKS) __launch_bounds__(THREADS, 1) accept_kernel(const mil_accept a)
{
    __shared__ sampler_memory memory;
    mil_trigger();
    mil_wait();
    int64_t sequence = blockIdx.x / BLOCKS, first_row = a.offsets[sequence];
    int drafted = (int)(a.offsets[sequence + 1] - first_row) - 1;
    if (a.drafted != NULL) {
        drafted = min(drafted, a.drafted[sequence]);
    }
    uint64_t seed = a.options[sequence].seed;
    int64_t position = a.position[sequence];
    int accepted = count_accepted(a, first_row, drafted, seed, position);
    int64_t row = first_row + accepted;
    const float *logits = a.logits + row * a.logits_stride;
    mil_filter f = a.filter[row];
    share s = find_share((int)a.vocab, BLOCKS);
    bool writes = blockIdx.x % BLOCKS == 0;
    if (writes) {
        for (int j = threadIdx.x; j < accepted; j += THREADS) {
            a.tokens[first_row + j] = a.drafts[first_row + j];
        }
        if (threadIdx.x == 0) {
            a.accepted[sequence] = accepted;
        }
    }
    if (f.certain) {
        if (writes && threadIdx.x == 0) {
            a.tokens[row] = f.best;
        }
        return; /* with the whole team */
    }
    double uniform = uniform_of(seed, (uint64_t)(position + accepted), MIL_SAMPLE_TARGET);
    auto own = [&](int i) { return mass_of(filtered(clean(logits[i]), i, f)); };
    auto rest = [&](int i) {
        double more = (double)filtered(clean(logits[i]), i, f) / f.total - draft_probability(a, row, i);
        return more > 0.0 ? __double2ull_rn(more * 0x1p60) : 0;
    };
    uint64_t before, total = accepted < drafted ? measure<BLOCKS>(&memory, s, 0, &before, rest) : 0;
    int token;
    if (total > 0) {
        token = locate(&memory, s, before, quantile(uniform, total), rest);
    }
    else { /* no draft fell, or p and q agree but for rounding */
        total = measure<BLOCKS>(&memory, s, 1, &before, own);
        token = locate(&memory, s, before, quantile(uniform, total), own);
    }
    if (token >= 0) {
        a.tokens[row] = token;
    }
    team_sync<BLOCKS>();
}

mil_status
mil_cuda_accept(mil_context *context, const mil_accept *arguments)
{
    const mil_accept *a = arguments;
    MIL_TRY(check_vocab("accept", a->vocab));
    if (!mil_device_has_clusters(context)) {
        return mil_launch(context, "accept", accept_kernel<1>, dim3((unsigned)a->sequences), dim3(THREADS), 0,
                          *a);
    }
    return mil_launch(context, "accept", accept_kernel<CLUSTER>, dim3((unsigned)(a->sequences * CLUSTER)),
                      dim3(THREADS), 0, *a);
}
