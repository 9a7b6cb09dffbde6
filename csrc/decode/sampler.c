/* Filtered distributions and draws (see sampler.h for the formulas and their order).
 *
 * Cost: passes over the vocabulary, one of them with an exponential; all but the draw's last 256 tokens are
 * vectorised.  A full sort of 128 k scores would cost a hundred times as much, so nothing is sorted: top-k
 * finds its threshold with a heap of k scores, which nearly all others fail to enter, and top-p drops what is
 * too unlikely to matter and then narrows the rest by quickselect on probability mass.
 *
 * Candidates are compared as (weight descending, token ascending), a total order, so what is kept does
 * not depend on how the selection happens to move elements about.  Sums run over blocks of 256 weights, a
 * block in 8 lanes: one order on every processor.
 */
#include "decode/sampler.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "cpu/vector.h" /* arithmetic of this host: logits are in its memory, whatever the model's device */

#define BLOCK 256

/* ---- options ---------------------------------------------------------------------------------------- */

mil_status
mil_sampling_check(const mil_sampling *sampling)
{
    if (!(sampling->temperature >= 0.0f && sampling->temperature <= FLT_MAX)) {
        return mil_fail(MIL_ERR_VALUE, "generate: temperature must be a finite number of at least 0, not %g",
                        (double)sampling->temperature);
    }
    if (sampling->top_k < 0) {
        return mil_fail(MIL_ERR_VALUE, "generate: top_k must be at least 0 (0 = off), not %lld",
                        (long long)sampling->top_k);
    }
    if (!(sampling->top_p > 0.0f && sampling->top_p <= 1.0f)) {
        return mil_fail(MIL_ERR_VALUE, "generate: top_p must lie in (0, 1] (1 = off), not %g",
                        (double)sampling->top_p);
    }
    if (!(sampling->min_p >= 0.0f && sampling->min_p <= 1.0f)) {
        return mil_fail(MIL_ERR_VALUE, "generate: min_p must lie in [0, 1] (0 = off), not %g",
                        (double)sampling->min_p);
    }
    if (!(sampling->repetition_penalty > 0.0f && sampling->repetition_penalty <= FLT_MAX)) {
        return mil_fail(MIL_ERR_VALUE,
                        "generate: repetition_penalty must be a positive number (1 = off), not %g",
                        (double)sampling->repetition_penalty);
    }
    return MIL_OK;
}

/* ---- random numbers --------------------------------------------------------------------------------- */

void
mil_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t product0 = (uint64_t)0xD2511F53u * c0;
        uint64_t product1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t next0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
        uint32_t next2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)product1;
        c3 = (uint32_t)product0;
        c0 = next0;
        c2 = next2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

double
mil_uniform(uint64_t seed, uint64_t position, mil_stream stream)
{
    uint32_t counter[4] = {(uint32_t)position, (uint32_t)(position >> 32), (uint32_t)stream, 0};
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t bits[4];
    mil_philox(counter, key, bits);
    uint64_t wide = (uint64_t)bits[1] << 32 | bits[0];
    return (double)(wide >> 11) * 0x1p-53;
}

/* ---- selection -------------------------------------------------------------------------------------- */

/* The k-th largest of `count` values, 1 <= k <= count: the root of a heap of the k largest so far. */
static float
kth_largest(const float *values, int64_t count, int64_t k, mil_candidate *heap)
{
    for (int64_t i = 0; i < count; i++) {
        int64_t at;
        if (i < k) { /* the heap grows: up from its end */
            for (at = i; at > 0 && heap[(at - 1) / 2].score > values[i]; at = (at - 1) / 2) {
                heap[at].score = heap[(at - 1) / 2].score;
            }
        }
        else if (values[i] <= heap[0].score) {
            continue;
        }
        else { /* the root goes: down from there */
            at = 0;
            for (int64_t child = 1; child < k; child = 2 * at + 1) {
                child += child + 1 < k && heap[child + 1].score < heap[child].score;
                if (heap[child].score >= values[i]) {
                    break;
                }
                heap[at].score = heap[child].score;
                at = child;
            }
        }
        heap[at].score = values[i];
    }
    return heap[0].score;
}

static bool
before(mil_candidate a, mil_candidate b)
{
    return a.score > b.score || (a.score == b.score && a.token < b.token);
}

static void
swap(mil_candidate *a, mil_candidate *b)
{
    mil_candidate kept = *a;
    *a = *b;
    *b = kept;
}

/* Hoare's partition of low .. high (included) around the median of three, which keeps sorted input, the
 * common adversary, linear: low .. *left come before or equal the pivot, *right .. high after or equal; what
 * lies between is the pivot.  Both parts are smaller than the whole. */
static void
partition(mil_candidate *c, int64_t low, int64_t high, int64_t *left, int64_t *right)
{
    int64_t middle = low + (high - low) / 2;
    if (before(c[middle], c[low])) {
        swap(&c[middle], &c[low]);
    }
    if (before(c[high], c[low])) {
        swap(&c[high], &c[low]);
    }
    if (before(c[high], c[middle])) {
        swap(&c[high], &c[middle]);
    }
    mil_candidate pivot = c[middle];
    int64_t i = low, j = high;
    while (i <= j) {
        while (before(c[i], pivot)) {
            i++;
        }
        while (before(pivot, c[j])) {
            j--;
        }
        if (i <= j) {
            swap(&c[i++], &c[j--]);
        }
    }
    *left = j;
    *right = i;
}

/* Moves the fewest likeliest candidates that weigh `enough` together to the front; returns how many. */
static int64_t
select_mass(mil_candidate *c, int64_t count, double enough)
{
    int64_t low = 0, high = count; /* before low all are in, from high on all are out */
    while (high - low > 1) {
        int64_t left, right;
        partition(c, low, high - 1, &left, &right);
        double mass = 0.0;
        for (int64_t i = low; i <= left; i++) {
            mass += (double)c[i].score;
        }
        if (mass >= enough) {
            high = left + 1;
            continue;
        }
        for (int64_t i = left + 1; i < right; i++) {
            mass += (double)c[i].score;
            if (mass >= enough) {
                return i + 1;
            }
        }
        enough -= mass;
        low = right;
    }
    return low < count ? low + 1 : count;
}

/* ---- scores ----------------------------------------------------------------------------------------- */

static float
penalised(float score, int32_t count, float penalty)
{
    if (count == 0) {
        return score;
    }
    float changed = score < 0.0f ? score * penalty : score / penalty;
    return fminf(fmaxf(changed, -FLT_MAX), FLT_MAX); /* absurd penalties must not make infinities */
}

/* Whether any is NaN or infinite. */
MIL_VECTORISE static int
any_bad(const float *logits, int64_t vocab)
{
    int bad = 0;
    for (int64_t i = 0; i < vocab; i++) {
        bad |= !(fabsf(logits[i]) <= FLT_MAX);
    }
    return bad;
}

mil_status
mil_logits_check(const float *logits, int64_t vocab)
{
    if (any_bad(logits, vocab)) {
        int64_t at = 0;
        while (fabsf(logits[at]) <= FLT_MAX) {
            at++;
        }
        return mil_fail(
            MIL_ERR_NONFINITE,
            "generate: the logit of token %lld is %g; weights with NaN or infinity, or an overflow of "
            "16-bit weights, cause this",
            (long long)at, (double)logits[at]);
    }
    return MIL_OK;
}

MIL_VECTORISE static float
largest(const float *values, int64_t count)
{
    float best = values[0];
#pragma omp simd reduction(max : best)
    for (int64_t i = 0; i < count; i++) {
        best = values[i] > best ? values[i] : best;
    }
    return best;
}

/* The first largest score, after the repetition penalty where counts is given. */
static int32_t
find_best(const float *logits, const int32_t *counts, float penalty, int64_t vocab)
{
    if (counts == NULL) {
        float best = largest(logits, vocab);
        int32_t at = 0;
        while (logits[at] != best) {
            at++;
        }
        return at;
    }
    int32_t at = 0;
    float best = penalised(logits[0], counts[0], penalty);
    for (int64_t i = 1; i < vocab; i++) {
        float score = penalised(logits[i], counts[i], penalty);
        if (score > best) {
            best = score;
            at = (int32_t)i;
        }
    }
    return at;
}

/* Scores become exp((score - best) * inverse), those below `threshold` 0. */
MIL_VECTORISE static void
weigh(float *scores, int64_t vocab, float best, float inverse, float threshold)
{
    for (int64_t i = 0; i < vocab; i++) {
        float weight = mil_expf((scores[i] - best) * inverse);
        scores[i] = mil_select(scores[i] >= threshold, weight, 0.0f);
    }
}

MIL_VECTORISE static void
drop_below(float *weight, int64_t vocab, float threshold)
{
    for (int64_t i = 0; i < vocab; i++) {
        weight[i] = mil_select(weight[i] >= threshold, weight[i], 0.0f);
    }
}

/* The sum of at most BLOCK weights. */
MIL_VECTORISE static double
block_sum(const float *weight, int64_t count)
{
    double lanes[8] = {0.0};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        for (int lane = 0; lane < 8; lane++) {
            lanes[lane] += (double)weight[i + lane];
        }
    }
    for (; i < count; i++) {
        lanes[0] += (double)weight[i];
    }
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

static int64_t
block_length(int64_t start, int64_t vocab)
{
    return vocab - start < BLOCK ? vocab - start : BLOCK;
}

static double
sum_weights(const float *weight, int64_t vocab)
{
    double total = 0.0;
    for (int64_t start = 0; start < vocab; start += BLOCK) {
        total += block_sum(weight + start, block_length(start, vocab));
    }
    return total;
}

/* Leaves the weights of the smallest likely set with `top_p` of the total; the others become 0. */
static void
keep_top_p(float *weight, int64_t vocab, float top_p, mil_candidate *candidates)
{
    double total = sum_weights(weight, vocab);
    /* All tokens below this together hold less than 1 - top_p, so the rest holds enough without them. */
    float negligible = (float)((1.0 - (double)top_p) * total / (double)vocab * 0.999);
    int64_t count = 0;
    for (int64_t i = 0; i < vocab; i++) {
        if (weight[i] >= negligible && weight[i] > 0.0f) {
            candidates[count++] = (mil_candidate){.score = weight[i], .token = (int32_t)i};
        }
    }
    int64_t kept = select_mass(candidates, count, (double)top_p * total);
    memset(weight, 0, (size_t)vocab * sizeof *weight);
    for (int64_t i = 0; i < kept; i++) {
        weight[candidates[i].token] = candidates[i].score;
    }
}

mil_status
mil_distribution_fill(const mil_sampling *sampling, const float *logits, const int32_t *counts, int64_t vocab,
                      mil_candidate *scratch, mil_distribution *out)
{
    MIL_TRY(mil_logits_check(logits, vocab));
    float penalty = sampling->repetition_penalty;
    if (penalty == 1.0f) {
        counts = NULL;
    }
    out->best = find_best(logits, counts, penalty, vocab);
    out->certain = sampling->temperature == 0.0f;
    out->total = 1.0;
    if (out->certain) {
        return MIL_OK;
    }
    float *weight = out->weight;
    memcpy(weight, logits, (size_t)vocab * sizeof *weight);
    for (int64_t i = 0; i < vocab && counts != NULL; i++) {
        weight[i] = penalised(logits[i], counts[i], penalty);
    }
    /* 1 / temperature overflows for temperatures below 1e-38; the cap gives the same one token. */
    float inverse = sampling->temperature > FLT_MIN ? 1.0f / sampling->temperature : FLT_MAX;
    float threshold = -INFINITY;
    if (sampling->top_k > 0 && sampling->top_k < vocab) {
        threshold = kth_largest(weight, vocab, sampling->top_k, scratch);
    }
    weigh(weight, vocab, weight[out->best], inverse, threshold);
    if (sampling->top_p < 1.0f) {
        keep_top_p(weight, vocab, sampling->top_p, scratch);
    }
    if (sampling->min_p > 0.0f) { /* the likeliest token has weight 1, so min_p is the threshold itself */
        drop_below(weight, vocab, sampling->min_p);
    }
    out->total = sum_weights(weight, vocab);
    return MIL_OK;
}

/* ---- draws ------------------------------------------------------------------------------------------ */

double
mil_distribution_at(const mil_distribution *distribution, int32_t token)
{
    if (distribution->certain) {
        return token == distribution->best ? 1.0 : 0.0;
    }
    return (double)distribution->weight[token] / distribution->total;
}

int32_t
mil_distribution_draw(const mil_distribution *distribution, int64_t vocab, double uniform)
{
    if (distribution->certain) {
        return distribution->best;
    }
    double left = uniform * distribution->total, sum = 0.0;
    int32_t last = distribution->best;
    for (int64_t start = 0; start < vocab; start += BLOCK) {
        const float *weight = distribution->weight + start;
        int64_t count = block_length(start, vocab);
        double more = block_sum(weight, count);
        if (sum + more <= left) {
            sum += more;
            continue;
        }
        for (int64_t i = 0; i < count; i++) {
            if (weight[i] > 0.0f) {
                last = (int32_t)(start + i);
                sum += (double)weight[i];
                if (sum > left) {
                    return last;
                }
            }
        }
        return last; /* lanes and single weights were rounded differently: it is the block's last */
    }
    return last; /* uniform * total was rounded up to total: as good as any, and likely */
}

int32_t
mil_distribution_draw_rest(const mil_distribution *p, const mil_distribution *q, int64_t vocab,
                           double uniform)
{
    if (p->certain) {
        return p->best;
    }
    double total = 0.0;
    for (int64_t i = 0; i < vocab; i++) {
        total += fmax(0.0, mil_distribution_at(p, (int32_t)i) - mil_distribution_at(q, (int32_t)i));
    }
    if (!(total > 0.0)) { /* p and q agree but for rounding: nothing is left, and p is as good */
        return mil_distribution_draw(p, vocab, uniform);
    }
    double left = uniform * total, sum = 0.0;
    int32_t last = p->best;
    for (int64_t i = 0; i < vocab; i++) {
        double rest = mil_distribution_at(p, (int32_t)i) - mil_distribution_at(q, (int32_t)i);
        if (rest > 0.0) {
            last = (int32_t)i;
            sum += rest;
            if (sum > left) {
                return last;
            }
        }
    }
    return last;
}

/* ---- log-probabilities ------------------------------------------------------------------------------ */

/* The sum of exp(logits - best) over at most BLOCK tokens. */
MIL_VECTORISE static double
block_exp_sum(const float *logits, int64_t count, float best)
{
    float weight[BLOCK];
    for (int64_t i = 0; i < count; i++) {
        weight[i] = mil_expf(logits[i] - best);
    }
    return block_sum(weight, count);
}

double
mil_log_sum_exp(const float *logits, int64_t vocab)
{
    float best = largest(logits, vocab);
    double sum = 0.0;
    for (int64_t start = 0; start < vocab; start += BLOCK) {
        sum += block_exp_sum(logits + start, block_length(start, vocab), best);
    }
    return (double)best + log(sum);
}

void
mil_top_log_probabilities(const float *logits, int64_t vocab, double log_sum_exp, int64_t count,
                          int32_t *tokens, double *values)
{
    /* Insertion into a short sorted list: count is at most a few dozen, and few scores get past its end. */
    int64_t held = 0;
    for (int64_t i = 0; i < vocab && count > 0; i++) {
        double value = (double)logits[i] - log_sum_exp;
        if (held == count && value <= values[held - 1]) {
            continue;
        }
        int64_t at = held < count ? held++ : count - 1;
        while (at > 0 && values[at - 1] < value) {
            values[at] = values[at - 1];
            tokens[at] = tokens[at - 1];
            at--;
        }
        values[at] = value;
        tokens[at] = (int32_t)i;
    }
}
