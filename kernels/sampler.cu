/* From logits to tokens without the host: greedy and filtered sampling.
 *
 * The meaning is that of csrc/decode/sampler.c: weights exp((s - max) / temperature), 0 where top-k, top-p
 * or min-p leave a token out; the token at quantile u of them in index order; u from Philox by (seed,
 * position, stream).
 *
 * A cluster of 8 blocks serves a row: each keeps an eighth of it in shared memory, so that logits are read
 * once, and results meet in each other's shared memory.  Before sm_90, and for rows too long to keep, a
 * block or eight read the row again in each pass.
 *
 * Sums of weights are sums of integers (sampler.cuh): so histograms may be filled by atomics, and a row's
 * token depends on neither the number of rows nor the shape of the grid.
 *
 * top-k and top-p ask for the largest key (score, or weight) such that tokens from it on up count enough (1
 * each, or their weight).  Of tokens at that very weight top-p keeps the first ones only.  Two ways lead
 * there:
 *
 *   few        the largest scores of 256 groups of tokens are at hand from the search for the best one;
 *              at least k tokens are not below the k-th of those, and seldom many more (top-p alone tries
 *              with about 900).  One block sorts these few and finishes the row
 *   many       where that may be too many, or too few for top-p, the key is found ten bits at a time by
 *              histograms
 */
#include "phase.cuh"
#include "sampler.cuh"
#include "table.h"

/* ---- many candidates: by histograms ------------------------------------------------------------------ */

template <int BLOCKS>
static __device__ __forceinline__ void
add_mass(sampler_memory *memory, int turn, uint32_t bin, uint64_t mass)
{
    if constexpr (BLOCKS == 1) { /* a block that sees a whole row could overflow a limb */
        atomicAdd((unsigned long long *)&memory->part.bins[turn][bin], (unsigned long long)mass);
    }
    else {
#pragma unroll
        for (int i = 0; i < LIMBS; i++) {
            uint32_t limb = (uint32_t)(mass >> (i * LIMB)) & ((1u << LIMB) - 1);
            if (limb != 0) {
                atomicAdd(&memory->limbs[i][bin], limb);
            }
        }
    }
}

/* What select_key found: the key, the mass of larger ones, and its own. */
struct selection {
    uint32_t key;
    uint64_t above, inside;
};

/* The largest key such that the tokens from it on up have a mass of at least `enough`, which is at least 1
 * and at most that of all.  item(token, &key, &mass); keys have `bits` bits. */
template <int BLOCKS, typename Item>
static __device__ selection
select_key(sampler_memory *memory, const share &s, int bits, uint64_t enough, Item item)
{
    static_assert(BINS == 2 * THREADS, "a thread has two bins");
    int warp = threadIdx.x / MIL_WARP, lane = threadIdx.x % MIL_WARP;
    selection found = {0, 0, 0};
    for (int turn = 0; bits > 0; turn ^= 1) {
        int digit = bits < DIGIT ? bits : DIGIT, shift = bits - digit;
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
            memory->limbs[0][bin] = memory->limbs[1][bin] = memory->limbs[2][bin] = 0;
            memory->part.bins[turn][bin] = 0;
        }
        __syncthreads();
        for (int i = s.warp_begin + lane; i < s.warp_end; i += MIL_WARP) {
            uint32_t key;
            uint64_t mass;
            item(i, key, mass);
            if (mass > 0 && (uint64_t)key >> bits == found.key) {
                add_mass<BLOCKS>(memory, turn, key >> shift & ((1u << digit) - 1), mass);
            }
        }
        __syncthreads();
        if (BLOCKS > 1) {
            for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
                memory->part.bins[turn][bin] = (uint64_t)memory->limbs[0][bin] +
                                               ((uint64_t)memory->limbs[1][bin] << LIMB) +
                                               ((uint64_t)memory->limbs[2][bin] << 2 * LIMB);
            }
        }
        team_sync<BLOCKS>();
        /* From the largest bin down; a thread has two neighbours. */
        int high = BINS - 1 - 2 * (int)threadIdx.x, low = high - 1;
        uint64_t in_high = 0, in_low = 0;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            in_high += part_of<BLOCKS>(memory, i)->bins[turn][high];
            in_low += part_of<BLOCKS>(memory, i)->bins[turn][low];
        }
        uint64_t scan = warp_scan(in_high + in_low), above = found.above + scan - in_high - in_low;
        if (lane == MIL_WARP - 1) {
            memory->scan[warp] = scan;
        }
        __syncthreads();
        for (int i = 0; i < warp; i++) {
            above += memory->scan[i];
        }
        bool is_high = above < enough && above + in_high >= enough;
        bool is_low = above + in_high < enough && above + in_high + in_low >= enough;
        if (is_high || is_low) {
            memory->digit = (uint32_t)(is_high ? high : low);
            memory->above = is_high ? above : above + in_high;
            memory->inside = is_high ? in_high : in_low;
        }
        __syncthreads();
        found.key = found.key << digit | memory->digit;
        found.above = memory->above;
        found.inside = memory->inside;
        bits = shift;
    }
    return found;
}

/* ---- one row ----------------------------------------------------------------------------------------- */

struct best_of {
    float score;
    int token, bad;
};

#define QUADS 4 /* of a lane's tokens that are under way at once */

/* A token as one integer, of which larger ones are better: a key of its score, then the lower token; and in the last bit, which
 * decides nothing, whether any score so far is bad. */
static __device__ __forceinline__ uint64_t
rate_token(uint32_t key, int token, bool bad)
{
    return (uint64_t)key << 32 | ~(uint32_t)token << 1 | (bad ? 1u : 0u);
}

/* The best of what the lanes have. */
static __device__ __forceinline__ uint64_t
warp_best(uint32_t key, int token, bool bad)
{
    const uint32_t most = __reduce_max_sync(MIL_ALL_LANES, key);
    token = (int)__reduce_min_sync(MIL_ALL_LANES, key == most ? (uint32_t)token : (uint32_t)INT_MAX);
    return rate_token(most, token, __any_sync(MIL_ALL_LANES, bad));
}

/* The same of ratings; one of none is 0. */
static __device__ __forceinline__ uint64_t
warp_best(uint64_t rating)
{
    return warp_best((uint32_t)(rating >> 32), (int)(~(uint32_t)rating >> 1), rating & 1);
}

static __device__ __forceinline__ best_of
best_in(uint64_t rating)
{
    return {score_of((uint32_t)(rating >> 32)), (int)(~(uint32_t)rating >> 1), (int)(rating & 1)};
}

/* A lane's quadruples of tokens, from `first` on; what is beyond the end is anything. */
static __device__ __forceinline__ void
load_quads(const float *row, int first, int end, bool wide, float (&x)[QUADS][4])
{
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int at = first + i * 4 * MIL_WARP;
        if (wide && at + 4 <= end) {
            mil_load<4>(row + at, x[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int at = first + i * 4 * MIL_WARP;
        if (!(wide && at + 4 <= end) && at < end) {
            for (int j = 0; j < 4; j++) {
                x[i][j] = row[min(at + j, end - 1)];
            }
        }
    }
}

/* The first largest score of the block's part of the row, in its first warp; on the way the part goes to shared memory where
 * KEEP.  DRAWS: its groups' best scores are wanted too. */
template <bool KEEP, bool DRAWS>
static __device__ __forceinline__ uint64_t
find_best(sampler_memory *memory, const share &s, const float *row)
{
    const int warp = threadIdx.x / MIL_WARP, lane = threadIdx.x % MIL_WARP;
    const bool wide = (uintptr_t)(row + s.begin) % 16 == 0;
    float best = -INFINITY;
    int token = INT_MAX;
    bool bad = false;
#pragma unroll 1
    for (int first = s.warp_begin + lane * 4; first < s.warp_end; first += QUADS * 4 * MIL_WARP) {
        float x[QUADS][4];
        load_quads(row, first, s.warp_end, wide, x);
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int at = first + i * 4 * MIL_WARP;
            if (at < s.warp_end) {
#pragma unroll
                for (int j = 0; j < 4; j++) { /* repeats of the row's last token are not better */
                    bad |= !(fabsf(x[i][j]) <= FLT_MAX);
                    x[i][j] = clean(x[i][j]);
                    token = x[i][j] > best ? at + j : token;
                    best = fmaxf(best, x[i][j]);
                }
                if (KEEP && DRAWS) { /* the part is rounded up to whole quadruples */
                    mil_store<4>(memory->scores + (at - s.begin), x[i]);
                }
            }
        }
    }
    const uint32_t key = key_of(best);
    if (DRAWS) {
        const uint32_t group = lane < MIL_WARP / WARP_GROUPS ? __reduce_max_sync(0x0000ffffu, key)
                                                             : __reduce_max_sync(0xffff0000u, key);
        if (lane % (MIL_WARP / WARP_GROUPS) == 0) {
            memory->part.group_best[warp * WARP_GROUPS + lane / (MIL_WARP / WARP_GROUPS)] = score_of(group);
        }
    }
    const uint64_t rating = warp_best(key, token, bad);
    if (lane == 0) {
        memory->warp_best[warp] = rating;
    }
    __syncthreads();
    return warp == 0 ? warp_best(lane < WARPS ? memory->warp_best[lane] : 0) : 0;
}

/* The row's best, of what find_best has for each block, in all threads of the team. */
template <int BLOCKS>
static __device__ __forceinline__ best_of
share_best(sampler_memory *memory, uint64_t rating)
{
    if (threadIdx.x == 0) {
        memory->part.best = rating;
        memory->part.listed = 0;
    }
    team_sync<BLOCKS>();
    uint64_t best = 0, bad = 0;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        const uint64_t other = part_of<BLOCKS>(memory, i)->best;
        best = max(best, other);
        bad |= other & 1;
    }
    return best_in(best | bad);
}

/* The same, in the first warp of the first block alone: others have only to send what they found. */
template <int BLOCKS>
static __device__ __forceinline__ best_of
send_best(sampler_memory *memory, uint64_t rating)
{
    const int lane = threadIdx.x % MIL_WARP;
    if (BLOCKS > 1) {
        const int rank = mil_cluster_rank();
        if (lane == 0) {
            mil_cluster_send(mil_cluster_place(&memory->sent_best[rank], 0), rating,
                             mil_cluster_place(&memory->sent, 0));
        }
        if (rank == 0) {
            phase_wait(&memory->sent, 0);
            rating = warp_best(lane < BLOCKS ? memory->sent_best[lane] : 0);
        }
    }
    return best_in(rating);
}

/* ---- few candidates ---------------------------------------------------------------------------------- */

/* Sum of the threads before this one; *total of all. */
static __device__ uint64_t
block_scan(sampler_memory *memory, uint64_t value, uint64_t *total)
{
    int warp = threadIdx.x / MIL_WARP, lane = threadIdx.x % MIL_WARP;
    uint64_t scan = warp_scan(value), before = scan - value;
    __syncthreads();
    if (lane == MIL_WARP - 1) {
        memory->scan[warp] = scan;
    }
    __syncthreads();
    *total = 0;
    for (int i = 0; i < WARPS; i++) {
        before += i < warp ? memory->scan[i] : 0;
        *total += memory->scan[i];
    }
    return before;
}

static __device__ int
power_of_two(int count)
{
    return count <= 1 ? 1 : 1 << (32 - __clz(count - 1));
}

/* Largest first (bitonic); size is a power of two.  Steps of up to 32 keep the pairs of a warp among its
 * own 64 keys. */
static __device__ void
sort_keys(uint64_t *keys, int size)
{
    __syncthreads();
    for (int run = 2; run <= size; run *= 2) {
        for (int step = run / 2; step > 0; step /= 2) {
            for (int i = threadIdx.x; i < size / 2; i += THREADS) {
                int low = 2 * i - (i & (step - 1)), high = low + step;
                uint64_t a = keys[low], b = keys[high];
                if ((a < b) == ((low & run) == 0)) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
            bool next_is_wide = step == 1 ? run > MIL_WARP : step > 2 * MIL_WARP;
            if (step > MIL_WARP || next_is_wide) {
                __syncthreads();
            }
            else {
                __syncwarp();
            }
        }
    }
    __syncthreads();
}

/* The k-th largest of the groups' best scores. */
template <int BLOCKS>
static __device__ float
find_bound(sampler_memory *memory, int k)
{
    constexpr int GROUPS = BLOCKS * WARPS * WARP_GROUPS;
    static_assert(GROUPS <= THREADS, "a thread a group");
    float *all = (float *)memory->sorted, own = -INFINITY;
    if (threadIdx.x < GROUPS) {
        own = part_of<BLOCKS>(memory, threadIdx.x / (WARPS * WARP_GROUPS))
                  ->group_best[threadIdx.x % (WARPS * WARP_GROUPS)];
        all[threadIdx.x] = own;
    }
    __syncthreads();
    int larger = 0;
#pragma unroll 16
    for (int i = 0; i < GROUPS; i++) {
        larger += all[i] > own || (all[i] == own && i < (int)threadIdx.x);
    }
    if (threadIdx.x < GROUPS && larger == k - 1) {
        memory->bound = own;
    }
    __syncthreads();
    return memory->bound;
}

/* Puts the block's tokens from `bound` on up on its list, as far as there is room. */
template <typename Score>
static __device__ void
list_candidates(sampler_memory *memory, const share &s, float bound, Score score)
{
    for (int i = s.warp_begin + (int)threadIdx.x % MIL_WARP; i < s.warp_end; i += MIL_WARP) {
        float x = score(i);
        if (x >= bound) {
            int at = atomicAdd(&memory->part.listed, 1);
            if (at < MOST_FEW) {
                memory->part.list[at] = (uint64_t)key_of(x) << 32 | ~(uint32_t)i;
            }
        }
    }
}

static __device__ __forceinline__ float
score_in(uint64_t key)
{
    return score_of((uint32_t)(key >> 32));
}

static __device__ __forceinline__ int
token_in(uint64_t key)
{
    return (int)~(uint32_t)key;
}

/* top-k on the sorted candidates: how many stay. */
static __device__ int
cut_top_k(sampler_memory *memory, int count, int k, mil_filter &f)
{
    f.least_score = score_in(memory->sorted[k - 1]);
    for (int i = threadIdx.x; i < count; i += THREADS) {
        if (score_in(memory->sorted[i]) >= f.least_score &&
            (i + 1 == count || score_in(memory->sorted[i + 1]) < f.least_score)) {
            memory->kept = i + 1;
        }
    }
    __syncthreads();
    return memory->kept;
}

/* top-p on the first `kept` sorted candidates: where they have `enough`.  There is a run of equal weights
 * around that place, of which the lowest tokens stay; it need not be in the order of tokens, because
 * different scores can have one weight. */
static __device__ void
cut_top_p(sampler_memory *memory, int kept, uint64_t before, const uint64_t (&mass)[4], uint64_t enough,
          mil_filter &f)
{
    if (threadIdx.x == 0) {
        memory->crossing = kept - 1;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (before < enough && before + mass[j] >= enough) {
            memory->crossing = threadIdx.x * 4 + j;
        }
        before += mass[j];
    }
    __syncthreads();
    int crossing = memory->crossing;
    float weight = f.least_weight = weight_of(score_in(memory->sorted[crossing]), f);
    auto is_equal = [&](int i) {
        return i >= 0 && i < kept && weight_of(score_in(memory->sorted[i]), f) == weight;
    };
    for (int i = threadIdx.x; i < kept; i += THREADS) {
        if (is_equal(i) && !is_equal(i - 1)) {
            memory->group_first = i;
        }
        if (is_equal(i) && !is_equal(i + 1)) {
            memory->group_last = i;
        }
    }
    __syncthreads();
    int first = memory->group_first, last = memory->group_last, wanted = crossing - first + 1;
    if (last == crossing) {
        return; /* all of that weight stay */
    }
    for (int i = first + (int)threadIdx.x; i <= last; i += THREADS) {
        int lower = 0, token = token_in(memory->sorted[i]);
        for (int other = first; other <= last; other++) {
            lower += token_in(memory->sorted[other]) < token;
        }
        if (lower == wanted - 1) {
            memory->kept = token;
        }
    }
    __syncthreads();
    f.last = memory->kept;
}

/* Finishes a row whose `count` candidates hold all that the filters can leave; the first block of the team
 * alone.  `total` is the weight of all tokens, where top-k does not say otherwise.  Returns the token at
 * quantile `uniform`, in every thread. */
template <int BLOCKS>
static __device__ int
finish_few(sampler_memory *memory, const int (&listed)[BLOCKS], int count, uint64_t total,
           const mil_sample_options &options, double uniform, mil_filter &f)
{
    static_assert(MOST_FEW == 4 * THREADS, "a thread has four candidates");
    int size = power_of_two(count), kept = count;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        int block = 0, at = i;
#pragma unroll
        for (int other = 0; other < BLOCKS - 1; other++) {
            bool beyond = block == other && at >= listed[other];
            at -= beyond ? listed[other] : 0;
            block += beyond;
        }
        memory->sorted[i] = part_of<BLOCKS>(memory, block)->list[at];
    }
    for (int i = count + (int)threadIdx.x; i < size; i += THREADS) {
        memory->sorted[i] = 0;
    }
    sort_keys(memory->sorted, size);
    if (options.top_k > 0) {
        kept = cut_top_k(memory, count, (int)options.top_k, f);
    }
    if (options.top_p < 1.0f) {
        uint64_t mass[4], sum = 0, all;
        for (int j = 0; j < 4; j++) {
            int i = threadIdx.x * 4 + j;
            mass[j] = i < kept ? mass_of(weight_of(score_in(memory->sorted[i]), f)) : 0;
            sum += mass[j];
        }
        uint64_t before = block_scan(memory, sum, &all), of = options.top_k > 0 ? all : total;
        uint64_t enough = (uint64_t)ceil((double)options.top_p * (double)of);
        cut_top_p(memory, kept, before, mass, enough > 0 ? enough : 1, f);
    }
    cut_min_p(options.min_p, f);
    /* What is left, in the order of tokens: a key of the token, then its weight. */
    uint64_t key[4];
    int most = 0;
    for (int j = 0; j < 4; j++) {
        int i = threadIdx.x * 4 + j;
        float score = i < kept ? score_in(memory->sorted[i]) : 0.0f;
        int token = i < kept ? token_in(memory->sorted[i]) : 0;
        float weight = i < kept ? filtered(score, token, f) : 0.0f;
        key[j] = weight > 0.0f ? ~((uint64_t)token << 32 | __float_as_uint(weight)) : 0;
        most = weight > 0.0f ? i + 1 : most;
    }
    if (threadIdx.x == 0) { /* not `kept`, which other warps may not have read yet */
        memory->most = 1;
    }
    __syncthreads();
    if (most > 0) {
        atomicMax(&memory->most, most);
    }
    for (int j = 0; j < 4; j++) {
        memory->sorted[threadIdx.x * 4 + j] = key[j];
    }
    __syncthreads();
    sort_keys(memory->sorted, power_of_two(memory->most));
    uint64_t mass[4], sum = 0, all;
    for (int j = 0; j < 4; j++) {
        key[j] = memory->sorted[threadIdx.x * 4 + j];
        mass[j] = key[j] != 0 ? mass_of(__uint_as_float((uint32_t)~key[j])) : 0;
        sum += mass[j];
    }
    uint64_t before = block_scan(memory, sum, &all), left = quantile(uniform, all);
    f.total = (double)all / ONE;
    for (int j = 0; j < 4; j++) {
        if (before <= left && before + mass[j] > left) {
            memory->crossing = (int)(~key[j] >> 32);
        }
        before += mass[j];
    }
    __syncthreads();
    return memory->crossing;
}

/* Whether the candidates suffice, the same in all blocks; then they are listed.  *count of them and the
 * *total weight of all. */
template <int BLOCKS, typename Score>
static __device__ bool
gather_few(sampler_memory *memory, const share &s, const mil_sample_options &options, const mil_filter &f,
           Score score, int (&listed)[BLOCKS], int *count, uint64_t *total)
{
    constexpr int GROUPS = BLOCKS * WARPS * WARP_GROUPS;
    uint64_t before, enough = 0;
    *total = 0;
    if (options.top_k > GROUPS) {
        return false;
    }
    if (options.top_k == 0) {
        *total =
            measure<BLOCKS>(memory, s, 0, &before, [&](int i) { return mass_of(weight_of(score(i), f)); });
        enough = (uint64_t)ceil((double)options.top_p * (double)*total);
    }
    float bound = find_bound<BLOCKS>(memory, options.top_k > 0 ? (int)options.top_k : GROUPS - GROUPS / 32);
    list_candidates(memory, s, bound, score);
    uint64_t mass = measure<BLOCKS>(memory, s, 1, &before, [&](int i) {
        float x = score(i);
        return x >= bound ? mass_of(weight_of(x, f)) : 0;
    });
    *count = 0;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        listed[i] = part_of<BLOCKS>(memory, i)->listed;
        *count += listed[i];
    }
    return *count <= MOST_FEW && mass >= enough;
}

/* ---- one row, whole ---------------------------------------------------------------------------------- */

/* Leaves the smallest set of likely tokens with `top_p` of the weight. */
template <int BLOCKS, typename Score>
static __device__ void
keep_top_p(sampler_memory *memory, const share &s, int vocab, float top_p, mil_filter &f, Score score)
{
    uint64_t before, total = measure<BLOCKS>(memory, s, 0, &before, [&](int i) {
                         float x = score(i);
                         return x >= f.least_score ? mass_of(weight_of(x, f)) : 0;
                     });
    /* All tokens below this together have less than 1 - top_p, so the rest has enough without them. */
    float negligible = (float)((1.0 - (double)top_p) * ((double)total / ONE) / (double)vocab * 0.999);
    uint64_t enough = (uint64_t)ceil((double)top_p * (double)total);
    selection at =
        select_key<BLOCKS>(memory, s, 30, enough > 0 ? enough : 1, [&](int i, uint32_t &key, uint64_t &mass) {
            float x = score(i), weight = weight_of(x, f);
            key = __float_as_uint(weight);
            mass = x >= f.least_score && weight >= negligible ? mass_of(weight) : 0;
        });
    f.least_weight = __uint_as_float(at.key);
    uint64_t each = mass_of(f.least_weight), wanted = (enough - at.above + each - 1) / each;
    if (wanted * each >= at.inside) {
        return; /* all of that weight stay */
    }
    auto equal = [&](int i) {
        float x = score(i);
        return (uint64_t)(x >= f.least_score && weight_of(x, f) == f.least_weight);
    };
    measure<BLOCKS>(memory, s, 3, &before, equal);
    int last = locate(memory, s, before, wanted - 1, equal);
    if (threadIdx.x == 0) {
        memory->part.found = -1;
    }
    __syncthreads();
    if (last >= 0) {
        memory->part.found = last;
    }
    team_sync<BLOCKS>();
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        int found = part_of<BLOCKS>(memory, i)->found;
        f.last = found >= 0 ? found : f.last;
    }
}

/* Finishes a row whatever is left of it; one thread of the team gets the token at quantile `uniform`, the
 * others -1. */
template <int BLOCKS, typename Score>
static __device__ int
finish_many(sampler_memory *memory, const share &s, int vocab, const mil_sample_options &options,
            double uniform, mil_filter &f, Score score)
{
    if (options.top_k > 0) {
        selection at = select_key<BLOCKS>(memory, s, 32, (uint64_t)options.top_k,
                                          [&](int i, uint32_t &key, uint64_t &mass) {
                                              key = key_of(score(i));
                                              mass = 1;
                                          });
        f.least_score = score_of(at.key);
    }
    if (options.top_p < 1.0f) {
        keep_top_p<BLOCKS>(memory, s, vocab, options.top_p, f, score);
    }
    cut_min_p(options.min_p, f);
    auto mass = [&](int i) { return mass_of(filtered(score(i), i, f)); };
    uint64_t before, total = measure<BLOCKS>(memory, s, 4, &before, mass);
    f.total = (double)total / ONE;
    return locate(memory, s, before, quantile(uniform, total), mass);
}

/* What a row has come to: `token` in the one thread that has it, else -1; all else by the one that `writes`. */
static __device__ __forceinline__ void
write_row(const mil_sample &a, int64_t row, int token, bool writes, int bad, const mil_filter &f)
{
    const int64_t spread = a.spread > 0 ? row * a.spread : row;
    if (token >= 0 && a.token != NULL) {
        a.token[row] = token;
        if (a.placed != NULL) {
            a.placed[spread] = token;
        }
    }
    if (writes) {
        a.bad[row] = bad;
        if (a.filter != NULL) {
            a.filter[spread] = f;
        }
    }
}

/* A team a row. */
template <int BLOCKS, bool KEEP>
static __global__ void
MIL_CLUSTER(BLOCKS) __launch_bounds__(THREADS, 2) sample_kernel(const mil_sample a)
{
    extern __shared__ __align__(16) unsigned char raw[];
    sampler_memory *memory = reinterpret_cast<sampler_memory *>(raw);
    if (BLOCKS > 1) {
        if (threadIdx.x == 0) {
            phase_init(&memory->sent, 1);
            mil_cluster_publish();
        }
        mil_cluster_arrive();
        mil_cluster_wait();     /* all have begun */
        if (threadIdx.x == 0) { /* sends that come before are counted as well */
            phase_expect(&memory->sent, BLOCKS * (uint32_t)sizeof(uint64_t));
        }
    }
    mil_trigger();
    const int64_t row = blockIdx.x / BLOCKS;
    const int vocab = (int)a.vocab;
    const float *logits = a.logits + row * a.logits_stride;
    const share s = find_share(vocab, BLOCKS);
    const bool first = blockIdx.x % BLOCKS == 0, writes = first && threadIdx.x == 0;
    mil_wait();
    mil_sample_options options = a.options[row];
    mil_filter f = {};
    f.total = 1.0;
    f.certain = options.temperature == 0.0f;
    f.last = INT_MAX;
    f.least_score = -INFINITY;
    /* 1 / temperature overflows for temperatures below 1e-38; the cap gives the same one token. */
    f.inverse = options.temperature > FLT_MIN ? 1.0f / options.temperature : FLT_MAX;
    if (f.certain) {
        const uint64_t rating = find_best<KEEP, false>(memory, s, logits);
        if (threadIdx.x < MIL_WARP) {
            const best_of best = send_best<BLOCKS>(memory, rating);
            f.best_score = best.score;
            f.best = best.token;
            write_row(a, row, writes ? best.token : -1, writes, best.bad, f);
        }
        return; /* nobody sends to other blocks than the first, which has waited */
    }
    const best_of best = share_best<BLOCKS>(memory, find_best<KEEP, true>(memory, s, logits));
    auto score = [&](int i) { return KEEP ? memory->scores[i - s.begin] : clean(logits[i]); };
    f.best_score = best.score;
    f.best = best.token;
    if (options.top_k >= vocab) {
        options.top_k = 0;
    }
    const bool filters = options.top_k > 0 || options.top_p < 1.0f;
    const double uniform =
        a.token != NULL ? uniform_of(options.seed, (uint64_t)a.position[row], a.stream) : 0.0;
    int listed[BLOCKS], count, token = -1;
    uint64_t total;
    if (filters && gather_few<BLOCKS>(memory, s, options, f, score, listed, &count, &total)) {
        if (first) {
            token = finish_few<BLOCKS>(memory, listed, count, total, options, uniform, f);
            token = threadIdx.x == 0 ? token : -1;
        }
    }
    else {
        token = finish_many<BLOCKS>(memory, s, vocab, options, uniform, f, score);
    }
    write_row(a, row, token, writes, best.bad, f);
    team_sync<BLOCKS>(); /* the others may still be reading this block's memory */
}

/* ---- entry point ------------------------------------------------------------------------------------- */

mil_status
mil_cuda_sample(mil_context *context, const mil_sample *arguments)
{
    const mil_sample *a = arguments;
    MIL_TRY(check_vocab("sample", a->vocab));
    size_t kept = sizeof(sampler_memory) + (size_t)(mil_ceil_div(a->vocab, CLUSTER) + 4) * sizeof(float);
    if (!mil_device_has_clusters(context)) {
        return mil_launch(context, "sample", sample_kernel<1, false>, dim3((unsigned)a->rows), dim3(THREADS),
                          sizeof(sampler_memory), *a);
    }
    bool keep = mil_device_has_shared(context, kept);
    return mil_launch(context, "sample", keep ? sample_kernel<CLUSTER, true> : sample_kernel<CLUSTER, false>,
                      dim3((unsigned)(a->rows * CLUSTER)), dim3(THREADS),
                      keep ? kept : sizeof(sampler_memory), *a);
}
