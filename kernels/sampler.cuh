/* What sampling (sampler.cu) and verdicts on drafts (verdict.cu) share: teams of blocks, random numbers,
 * weights, and sums and searches over a row of logits.
 *
 * A team is a cluster of 8 blocks, or one block before sm_90; each block serves a part of the row, each
 * warp a part of that.  All sums of weights are sums of integers: a weight, at most 1, counts 2^44.  That
 * is finer than the rounding of its exponential, and integer sums have the same bits in any order.
 */
#ifndef MIL_KERNELS_SAMPLER_CUH
#define MIL_KERNELS_SAMPLER_CUH

#include "cluster.cuh"

#include <float.h>
#include <limits.h>

#define CLUSTER 8
#define WARPS 16
#define THREADS (WARPS * MIL_WARP)
#define DIGIT 10 /* bits a pass */
#define BINS (1 << DIGIT)
#define LIMB 15 /* bits of a mass that one 32-bit counter takes: 2^17 of them fit */
#define LIMBS 3
#define MOST_VOCAB (1 << 19) /* that many weights of 2^44 fit into 64 bits */
#define ONE 0x1p44f
#define WARP_GROUPS 2 /* groups of tokens a warp whose best scores are kept */
#define MOST_FEW (2 * BINS)

/* Blocks of a cluster read these of each other; each is written once a kernel or, of bins, in turns. */
struct team_part {
    uint64_t best;     /* sampler.cu: rate_token */
    int found;         /* where a search ended, -1: in another block */
    uint64_t total[5]; /* of as many sums */
    int listed;        /* tokens that the block has put on its list of few */
    float group_best[WARPS * WARP_GROUPS];
    union {
        uint64_t bins[2][BINS];
        uint64_t list[MOST_FEW]; /* a key of the score, then the token's complement: larger ones come first */
    };
};

struct sampler_memory {
    team_part part;
    uint64_t warp_sums[WARPS];
    uint64_t scan[WARPS], warp_best[WARPS];
    uint64_t sent, sent_best[CLUSTER]; /* the barrier of what other blocks send, and that */
    uint32_t digit;
    uint64_t above, inside;
    float bound;
    int kept, group_first, group_last, crossing, most; /* of a list of few (sampler.cu) */
    union {
        uint32_t limbs[LIMBS][BINS];
        uint64_t sorted[MOST_FEW];
    };
    alignas(16) float scores[1]; /* this block's part of the row, where it is kept */
};

/* The part of a row that this block serves, and of that this warp's; a multiple of 128 apart. */
struct share {
    int begin, end, warp_begin, warp_end;
};

static __device__ __forceinline__ share
find_share(int vocab, int blocks)
{
    int length = ((vocab + blocks - 1) / blocks + 3) / 4 * 4, rank = blocks == 1 ? 0 : mil_cluster_rank();
    int each = (length + WARPS * 128 - 1) / (WARPS * 128) * 128, warp = threadIdx.x / MIL_WARP;
    share s;
    s.begin = min(rank * length, vocab);
    s.end = min(s.begin + length, vocab);
    s.warp_begin = min(s.begin + warp * each, s.end);
    s.warp_end = min(s.warp_begin + each, s.end);
    return s;
}

template <int BLOCKS>
static __device__ __forceinline__ void
team_sync()
{
    if constexpr (BLOCKS == 1) {
        __syncthreads();
    }
    else {
        mil_cluster_sync();
    }
}

template <int BLOCKS>
static __device__ __forceinline__ const team_part *
part_of(const sampler_memory *memory, int rank)
{
    return BLOCKS == 1 ? &memory->part : mil_cluster_at(&memory->part, rank);
}

/* ---- random numbers and weights ---------------------------------------------------------------------- */

/* Uniform in [0, 1): Philox4x32-10 of key `seed` and counter (position, stream), as mil_uniform. */
static __device__ double
uniform_of(uint64_t seed, uint64_t position, uint32_t stream)
{
    uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = stream, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint32_t next0 = __umulhi(0xCD9E8D57u, c2) ^ c1 ^ k0, next2 = __umulhi(0xD2511F53u, c0) ^ c3 ^ k1;
        c1 = 0xCD9E8D57u * c2;
        c3 = 0xD2511F53u * c0;
        c0 = next0;
        c2 = next2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (double)(((uint64_t)c1 << 32 | c0) >> 11) * 0x1p-53;
}

/* A score as it is compared: zeros alike, and what is not finite (the row is bad then) last. */
static __device__ __forceinline__ float
clean(float x)
{
    return fabsf(x) <= FLT_MAX ? x + 0.0f : -FLT_MAX;
}

/* Scores as integers of the same order, and back. */
static __device__ __forceinline__ uint32_t
key_of(float score)
{
    uint32_t bits = __float_as_uint(score);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ float
score_of(uint32_t key)
{
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

static __device__ __forceinline__ float
weight_of(float score, const mil_filter &f)
{
    return expf((score - f.best_score) * f.inverse);
}

/* The weight that the filters leave to a token. */
static __device__ __forceinline__ float
filtered(float score, int token, const mil_filter &f)
{
    if (score < f.least_score) {
        return 0.0f;
    }
    float weight = weight_of(score, f);
    return weight > f.least_weight || (weight == f.least_weight && token <= f.last) ? weight : 0.0f;
}

/* The likeliest token has weight 1, so min_p is the threshold itself. */
static __device__ __forceinline__ void
cut_min_p(float min_p, mil_filter &f)
{
    if (min_p > f.least_weight) {
        f.least_weight = min_p;
        f.last = INT_MAX;
    }
}

static __device__ __forceinline__ uint64_t
mass_of(float weight)
{
    return __float2ull_rn(weight * ONE);
}

/* The place at quantile `uniform` of a total: the token sought is the first with more than this up to its
 * end. */
static __device__ __forceinline__ uint64_t
quantile(double uniform, uint64_t total)
{
    uint64_t left = (uint64_t)(uniform * (double)total);
    return left < total ? left : total - 1;
}

/* ---- sums and searches over a row -------------------------------------------------------------------- */

static __device__ __forceinline__ uint64_t
warp_sum(uint64_t value)
{
#pragma unroll
    for (int step = MIL_WARP / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(MIL_ALL_LANES, value, step);
    }
    return value;
}

/* Sum of the lanes up to this one. */
static __device__ __forceinline__ uint64_t
warp_scan(uint64_t value)
{
    int lane = threadIdx.x % MIL_WARP;
#pragma unroll
    for (int step = 1; step < MIL_WARP; step *= 2) {
        uint64_t before = __shfl_up_sync(MIL_ALL_LANES, value, step);
        value += lane >= step ? before : 0;
    }
    return value;
}

/* Sums mass(token) over the row: the total, and what lies before this warp's part.  `place` is one of
 * part.total. */
template <int BLOCKS, typename Mass>
static __device__ __forceinline__ uint64_t
measure(sampler_memory *memory, const share &s, int place, uint64_t *before, Mass mass)
{
    int warp = threadIdx.x / MIL_WARP, lane = threadIdx.x % MIL_WARP;
    uint64_t sum = 0;
#pragma unroll 4
    for (int i = s.warp_begin + lane; i < s.warp_end; i += MIL_WARP) {
        sum += mass(i);
    }
    sum = warp_sum(sum);
    __syncthreads(); /* nobody reads the sums of an earlier search */
    if (lane == 0) {
        memory->warp_sums[warp] = sum;
    }
    __syncthreads();
    uint64_t block = 0, total = 0;
    *before = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        *before += i < warp ? memory->warp_sums[i] : 0;
        block += memory->warp_sums[i];
    }
    if (threadIdx.x == 0) {
        memory->part.total[place] = block;
    }
    team_sync<BLOCKS>();
    int rank = BLOCKS == 1 ? 0 : mil_cluster_rank();
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        uint64_t other = part_of<BLOCKS>(memory, i)->total[place];
        *before += i < rank ? other : 0;
        total += other;
    }
    return total;
}

/* After measure: the first token up to whose end there is more than `left`; one thread of the team gets it,
 * others -1. */
template <typename Mass>
static __device__ __forceinline__ int
locate(const sampler_memory *memory, const share &s, uint64_t before, uint64_t left, Mass mass)
{
    int lane = threadIdx.x % MIL_WARP;
    if (left < before || left - before >= memory->warp_sums[threadIdx.x / MIL_WARP]) {
        return -1;
    }
    left -= before;
    for (int first = s.warp_begin; first < s.warp_end; first += 4 * MIL_WARP) {
        uint64_t own[4], sum = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int i = first + lane * 4 + j;
            own[j] = i < s.warp_end ? mass(i) : 0;
            sum += own[j];
        }
        uint64_t scan = warp_scan(sum), all = __shfl_sync(MIL_ALL_LANES, scan, MIL_WARP - 1);
        if (all <= left) {
            left -= all;
            continue;
        }
        if (scan <= left || scan - sum > left) {
            return -1;
        }
        uint64_t up_to = scan - sum;
        int found = -1;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            up_to += own[j];
            found = found < 0 && up_to > left ? first + lane * 4 + j : found;
        }
        return found;
    }
    return -1;
}

/* ---- arguments --------------------------------------------------------------------------------------- */

static inline mil_status
check_vocab(const char *name, int64_t vocab)
{
    if (vocab < 1 || vocab > MOST_VOCAB) {
        return mil_fail(MIL_ERR_UNSUPPORTED, "%s: vocab = %lld; on CUDA it is 1 to %d", name,
                        (long long)vocab, MOST_VOCAB);
    }
    return MIL_OK;
}

#endif
