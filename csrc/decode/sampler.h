/* From logits to a token: the filtered distribution, draws from it, and log-probabilities.
 *
 * Filters and their order are those of Hugging Face's generate(), so that settings found in a
 * generation_config mean the same here:
 *
 *   repetition penalty    s < 0 ? s * penalty : s / penalty, for tokens already in the text (prompt included)
 *   temperature           s / temperature; 0 means greedy: the first largest score, and the filters below
 *                         cannot change it
 *   top-k                 scores below the k-th largest go; ties with it stay
 *   top-p                 the smallest set of most likely tokens with probability >= top_p stays; of equal
 *                         ones the lower index comes first
 *   min-p                 tokens less likely than min_p times the likeliest go
 *
 * Speculative decoding needs the distribution itself and not only a draw, so that is what is built:
 * unnormalised float32 weights exp((s - max) / temperature), 0 where filtered, and their float64 sum. A
 * draw uses exactly these weights; normalising would only add rounding.
 *
 * Random numbers are a function of (seed, position in the text, stream) and of nothing else
 * (mil_uniform), so a text comes out the same alone, in a batch, or after a restart.
 */
#ifndef MIL_DECODE_SAMPLER_H
#define MIL_DECODE_SAMPLER_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

typedef struct mil_sampling {
    float temperature;        /* 0 = greedy */
    float top_p;              /* in (0, 1], 1 = off */
    float min_p;              /* in [0, 1], 0 = off */
    float repetition_penalty; /* > 0, 1 = off */
    int64_t top_k;            /* 0 = off */
    uint64_t seed;
} mil_sampling;

/* Greedy, every filter off. */
#define MIL_SAMPLING_DEFAULT ((mil_sampling){.top_p = 1.0f, .repetition_penalty = 1.0f})

/* The message names the first option that makes no sense. */
mil_status
mil_sampling_check(const mil_sampling *sampling) MIL_MUST_CHECK;

/* What a random number is for; one stream never repeats another's numbers. */
typedef enum mil_stream { MIL_STREAM_TARGET = 0, MIL_STREAM_DRAFT = 1, MIL_STREAM_ACCEPT = 2 } mil_stream;

/* Uniform in [0, 1) with 53 random bits: Philox4x32-10 (Salmon et al. 2011) of key `seed` and counter
 * (position, stream). */
double
mil_uniform(uint64_t seed, uint64_t position, mil_stream stream);
/* The generator itself, for its published test vectors. */
void
mil_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* A distribution over [0, vocab). Where `certain`, all of it is on `best` and weight is not read. */
typedef struct mil_distribution {
    bool certain;
    int32_t best;  /* most likely token, the lowest of equals */
    float *weight; /* [vocab], caller's memory */
    double total;  /* sum of weight */
} mil_distribution;

typedef struct mil_candidate {
    float score;
    int32_t token;
} mil_candidate;

/* Fills *out, whose weight array the caller has set (it may be NULL for greedy sampling).
 *   logits      [vocab], not changed
 *   counts      [vocab] occurrences in the text so far; may be NULL where repetition_penalty is 1
 *   scratch     [vocab], may be NULL where neither top_k nor top_p is on
 * A logit that is NaN or infinite is a MIL_ERR_NONFINITE. */
mil_status
mil_distribution_fill(const mil_sampling *sampling, const float *logits, const int32_t *counts, int64_t vocab,
                      mil_candidate *scratch, mil_distribution *out) MIL_MUST_CHECK;

/* Normalised probability of one token. */
double
mil_distribution_at(const mil_distribution *distribution, int32_t token);
/* The token at quantile `uniform` in [0, 1), in index order. */
int32_t
mil_distribution_draw(const mil_distribution *distribution, int64_t vocab, double uniform);
/* The same from the normalised max(0, p - q): what is left of p once q was accepted where it could be. */
int32_t
mil_distribution_draw_rest(const mil_distribution *p, const mil_distribution *q, int64_t vocab,
                           double uniform);

/* Fails (MIL_ERR_NONFINITE) where one is NaN or infinite; the message names the first. */
mil_status
mil_logits_check(const float *logits, int64_t vocab) MIL_MUST_CHECK;

/* log sum exp(logits): a token's log-probability under the model itself, before any filter, is its logit
 * minus this.  Of float32 exponentials, so right to about 1e-7. */
double
mil_log_sum_exp(const float *logits, int64_t vocab);
/* The `count` likeliest tokens, most likely first, ties in index order, and their logits minus log_sum_exp;
 * count <= vocab. */
void
mil_top_log_probabilities(const float *logits, int64_t vocab, double log_sum_exp, int64_t count,
                          int32_t *tokens, double *values);

#endif
