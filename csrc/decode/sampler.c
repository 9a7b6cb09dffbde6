/* Filtered distributions and draws (see sampler.h for the formulas and their order).
 *
 * Cost: everything but top-k and top-p is a few passes over the vocabulary, dominated by one expf a
 * token. A full sort of 128 k scores would cost ten times that, so top-k finds its threshold by
 * quickselect, O(vocab), and top-p selects and sorts only the 256 likeliest tokens, then four times as
 * many until they hold enough probability: a peaked distribution, which is the usual one, needs the
 * first step only.
 *
 * Scores are compared as (score descending, token ascending), a total order, so the result
 * does not depend on how the selection happens to move elements about.
 */
#include "decode/sampler.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>

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

static bool
before(mil_candidate a, mil_candidate b)
{
    return a.score > b.score || (a.score == b.score && a.token < b.token);
}

static int
compare(const void *left, const void *right)
{
    mil_candidate a = *(const mil_candidate *)left, b = *(const mil_candidate *)right;
    return before(a, b) ? -1 : before(b, a) ? 1 : 0;
}

static void
swap(mil_candidate *a, mil_candidate *b)
{
    mil_candidate kept = *a;
    *a = *b;
    *b = kept;
}

/* Moves the `keep` first candidates of the order to the front, in no particular order (quickselect; the
 * median of three as pivot keeps sorted input, the common adversary, linear). */
static void
select_first(mil_candidate *candidates, int64_t count, int64_t keep)
{
    int64_t low = 0, high = count - 1;
    while (low < high && keep > low && keep <= high) {
        int64_t middle = low + (high - low) / 2;
        if (before(candidates[middle], candidates[low])) {
            swap(&candidates[middle], &candidates[low]);
        }
        if (before(candidates[high], candidates[low])) {
            swap(&candidates[high], &candidates[low]);
        }
        if (before(candidates[high], candidates[middle])) {
            swap(&candidates[high], &candidates[middle]);
        }
        mil_candidate pivot = candidates[middle];
        int64_t i = low, j = high;
        while (i <= j) {
            while (before(candidates[i], pivot)) {
                i++;
            }
            while (before(pivot, candidates[j])) {
                j--;
            }
            if (i <= j) {
                swap(&candidates[i], &candidates[j]);
                i++;
                j--;
            }
        }
        /* low .. j come before or equal the pivot, i .. high after or equal; between them the pivot. */
        if (keep <= j) {
            high = j;
        }
        else if (keep >= i) {
            low = i;
        }
        else {
            return;
        }
    }
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

static mil_status
check_finite(const float *logits, int64_t vocab)
{
    int bad = 0;
#pragma omp simd reduction(| : bad)
    for (int64_t i = 0; i < vocab; i++) {
        bad |= !(fabsf(logits[i]) <= FLT_MAX);
    }
    if (bad) {
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

/* The first largest score, after the repetition penalty where counts is given. */
static int32_t
find_best(const float *logits, const int32_t *counts, float penalty, int64_t vocab)
{
    if (counts == NULL) {
        float best = logits[0];
#pragma omp simd reduction(max : best)
        for (int64_t i = 0; i < vocab; i++) {
            best = logits[i] > best ? logits[i] : best;
        }
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

/* Of `count` candidates, those that top-k keeps come to the front; returns how many. */
static int64_t
keep_top_k(mil_candidate *candidates, int64_t count, int64_t top_k)
{
    if (top_k == 0 || top_k >= count) {
        return count;
    }
    select_first(candidates, count, top_k);
    float threshold = candidates[0].score;
    for (int64_t i = 1; i < top_k; i++) {
        threshold = candidates[i].score < threshold ? candidates[i].score : threshold;
    }
    int64_t kept = top_k;
    for (int64_t i = top_k; i < count; i++) {
        if (candidates[i].score == threshold) {
            swap(&candidates[kept++], &candidates[i]);
        }
    }
    return kept;
}

/* The same for top-p; `total` is the weight of all candidates. */
static int64_t
keep_top_p(mil_candidate *candidates, int64_t count, const float *weight, double total, float top_p)
{
    if (top_p >= 1.0f) {
        return count;
    }
    double enough = (double)top_p * total;
    for (int64_t looked_at = 256;; looked_at *= 4) {
        int64_t sorted = looked_at < count ? looked_at : count;
        select_first(candidates, count, sorted);
        qsort(candidates, (size_t)sorted, sizeof *candidates, compare);
        double sum = 0.0;
        for (int64_t i = 0; i < sorted; i++) {
            sum += (double)weight[candidates[i].token];
            if (sum >= enough) {
                return i + 1;
            }
        }
        if (sorted == count) {
            return count;
        }
    }
}

/* weight = exp((score - best) * inverse) for what top-k and top-p keep, 0 for the others. */
static void
weigh_likely(const mil_sampling *sampling, int64_t vocab, mil_candidate *scratch, float *weight, float best,
             float inverse)
{
    int64_t kept = keep_top_k(scratch, vocab, sampling->top_k);
    for (int64_t i = 0; i < vocab; i++) {
        weight[i] = 0.0f;
    }
    double total = 0.0;
    for (int64_t i = 0; i < kept; i++) {
        float value = expf((scratch[i].score - best) * inverse);
        weight[scratch[i].token] = value;
        total += (double)value;
    }
    int64_t still = keep_top_p(scratch, kept, weight, total, sampling->top_p);
    for (int64_t i = still; i < kept; i++) {
        weight[scratch[i].token] = 0.0f;
    }
}

mil_status
mil_distribution_fill(const mil_sampling *sampling, const float *logits, const int32_t *counts, int64_t vocab,
                      mil_candidate *scratch, mil_distribution *out)
{
    MIL_TRY(check_finite(logits, vocab));
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
    /* 1 / temperature overflows for temperatures below 1e-38; the cap gives the same one token. */
    float inverse = sampling->temperature > FLT_MIN ? 1.0f / sampling->temperature : FLT_MAX;
    float best = counts ? penalised(logits[out->best], counts[out->best], penalty) : logits[out->best];
    float *weight = out->weight;
    if (sampling->top_k > 0 || sampling->top_p < 1.0f) {
        for (int64_t i = 0; i < vocab; i++) {
            float score = counts ? penalised(logits[i], counts[i], penalty) : logits[i];
            scratch[i] = (mil_candidate){.score = score, .token = (int32_t)i};
        }
        weigh_likely(sampling, vocab, scratch, weight, best, inverse);
    }
    else {
        for (int64_t i = 0; i < vocab; i++) {
            float score = counts ? penalised(logits[i], counts[i], penalty) : logits[i];
            weight[i] = expf((score - best) * inverse);
        }
    }
    double total = 0.0;
    for (int64_t i = 0; i < vocab;
         i++) { /* the likeliest token has weight 1, so min_p is the threshold itself */
        weight[i] = weight[i] < sampling->min_p ? 0.0f : weight[i];
        total += (double)weight[i];
    }
    out->total = total;
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
    for (int64_t i = 0; i < vocab; i++) {
        if (distribution->weight[i] > 0.0f) {
            last = (int32_t)i;
            sum += (double)distribution->weight[i];
            if (sum > left) {
                return last;
            }
        }
    }
    return last; /* uniform * total was rounded up to total */
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

static double
log_sum_exp(const float *logits, int64_t vocab)
{
    float best = logits[find_best(logits, NULL, 1.0f, vocab)];
    double sum = 0.0;
    for (int64_t i = 0; i < vocab; i++) {
        sum += exp((double)logits[i] - (double)best);
    }
    return (double)best + log(sum);
}

double
mil_log_probability(const float *logits, int64_t vocab, int32_t token)
{
    return (double)logits[token] - log_sum_exp(logits, vocab);
}

void
mil_top_log_probabilities(const float *logits, int64_t vocab, int64_t count, int32_t *tokens, float *values)
{
    /* Insertion into a short sorted list: count is at most a few dozen, and few scores get past its end. */
    int64_t held = 0;
    for (int64_t i = 0; i < vocab && count > 0; i++) {
        if (held == count && logits[i] <= values[held - 1]) {
            continue;
        }
        int64_t at = held < count ? held++ : count - 1;
        while (at > 0 && values[at - 1] < logits[i]) {
            values[at] = values[at - 1];
            tokens[at] = tokens[at - 1];
            at--;
        }
        values[at] = logits[i];
        tokens[at] = (int32_t)i;
    }
    double normaliser = log_sum_exp(logits, vocab);
    for (int64_t i = 0; i < held; i++) {
        values[i] = (float)((double)values[i] - normaliser);
    }
}
