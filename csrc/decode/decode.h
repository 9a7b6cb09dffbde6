/* Generation: many texts at once, with continuous batching and exact speculative decoding.
 *
 * An engine holds requests.  mil_engine_round advances every running one: waiting prompts by a chunk of
 * rows, the others by one token, or by several where a draft proposed them.  All rows of a round, whatever
 * they are for, go through the model in one forward pass of packed rows.  Requests of any length join
 * when a place is free and leave when they are finished; no padding exists.
 *
 *   round n    | prompt A, 512 rows        | B 1 + 4 drafts | C 1 row |        one forward pass
 *   round n+1  | prompt A, 37 rows | B 1 + 4 drafts | D's prompt, 12 rows |    C has finished, D has joined
 *
 * What a request yields depends on the request alone: the model's rows do not depend on their
 * neighbours (device.h), random numbers on (seed, position), and the number of drafts on the request's own
 * acceptance so far, never on a clock.  Greedy tokens are the same with and without a draft; sampled tokens
 * are distributed exactly as without (see speculate.c).
 *
 * The caller loops: submit, then while (mil_engine_round(...) leaves something running) look at the
 * sequences' fresh tokens, cut those that it wants to end, take the finished ones.
 */
#ifndef MIL_DECODE_DECODE_H
#define MIL_DECODE_DECODE_H

#include "decode/sampler.h"
#include "model/model.h"

typedef enum mil_finish {
    MIL_RUNNING = 0,
    MIL_FINISH_STOP,     /* a stop token came, or the caller's hook found a stop string */
    MIL_FINISH_LENGTH,   /* max_new_tokens are there */
    MIL_FINISH_CANCELLED /* the caller's wish */
} mil_finish;

typedef struct mil_request {
    const int32_t *prompt;  /* [prompt_count], copied by mil_engine_submit */
    int64_t prompt_count;   /* at least 1 */
    int64_t max_new_tokens; /* 0: only read the prompt (scores, prompt caches) */
    mil_sampling sampling;
    const int32_t *stop_tokens; /* [stop_count], copied */
    int64_t stop_count;
    int64_t draft_tokens; /* most drafts a round, at most MIL_WINDOW - 1; 0: never speculate */
    bool fixed_draft;     /* always that many, instead of what the acceptance so far suggests */
    bool logprobs;        /* log-probability of each new token under the model's own logits */
    bool prompt_logprobs; /* the same for the prompt's tokens */
    int64_t top_logprobs; /* and of so many likeliest tokens at each of those places */
    /* The state to start from, or NULL for an empty one.  It has read the first `length` tokens of the prompt
     * (the caller's promise), which are not computed again.  Borrowed; when the request has finished it
     * has read prompt and new tokens up to its then `length`.  draft_state: the same for the draft model. */
    mil_state *state, *draft_state;
    /* Or a state that several requests begin with: copied when the request joins, never changed. */
    const mil_state *origin;
    int64_t tag; /* the caller's */
} mil_request;

typedef struct mil_generation_stats {
    int64_t prompt_tokens, cached_tokens, new_tokens;
    int64_t rounds;            /* forward passes after the prompt */
    int64_t drafted, accepted; /* tokens */
    double prefill_seconds;    /* from joining to the first token */
    double decode_seconds;     /* from there to the end; other requests' share included */
} mil_generation_stats;

typedef struct mil_generation {
    int64_t tag;
    mil_finish finish;
    int64_t prompt_count, count, top;
    int32_t *tokens;      /* [prompt_count + count]: prompt, then the new ones, the stop token not included */
    double *logprobs;     /* [count] or NULL */
    int32_t *top_tokens;  /* [count, top] or NULL */
    double *top_logprobs; /* [count, top] */
    double *prompt_logprobs;     /* [prompt_count] or NULL; NaN for the first token and for cached ones */
    int32_t *prompt_top_tokens;  /* [prompt_count, top]; -1 there */
    double *prompt_top_logprobs; /* [prompt_count, top] */
    mil_generation_stats stats;
} mil_generation;

void
mil_generation_release(mil_generation *generation); /* twice is safe */

typedef enum mil_draft_kind { MIL_DRAFT_NONE = 0, MIL_DRAFT_MODEL, MIL_DRAFT_NGRAM } mil_draft_kind;

/* Deliberate errors in the accept rule: tests prove with them that the statistics would notice. */
typedef enum mil_broken_rule {
    MIL_RULE_RIGHT = 0,
    MIL_RULE_ACCEPT_ALL,    /* every draft that the target could have drawn */
    MIL_RULE_REDRAW_FROM_P, /* a rejected draft is replaced from p instead of max(0, p - q) */
    MIL_RULE_FORCED /* each draft with probability forced_acceptance, and n-gram drafts are always found: for timing
                     * models of random weights as if their drafts were good */
} mil_broken_rule;

typedef struct mil_engine_options {
    const mil_model *model;
    mil_draft_kind draft_kind;
    const mil_model *draft; /* where MIL_DRAFT_MODEL */
    int64_t max_batch;      /* requests that run at once; 0: 16 */
    int64_t prefill_rows;   /* prompt rows of one round, of all requests; 0: as the device has it */
    /* Cost of one more verified row, and of one drafted token, in one-row passes of the model.
     * 0: estimated from the parameters' bytes (speculate.c). */
    double verify_cost, draft_cost;
    mil_broken_rule broken_rule;
    double forced_acceptance; /* of MIL_RULE_FORCED, in (0, 1] */
} mil_engine_options;

typedef struct mil_sequence mil_sequence;
typedef struct mil_burst mil_burst;
typedef struct mil_draft_burst mil_draft_burst;

/* Zero-initialised is not valid; see mil_engine_init. */
typedef struct mil_engine {
    mil_engine_options options;
    mil_sequence **waiting; /* [waiting_count] in order of submission */
    mil_sequence **running; /* [running_count], likewise */
    int64_t waiting_count, waiting_capacity, running_count;
    int64_t joined;               /* requests that ever ran */
    bool crowded;                 /* there was no memory for one more; until one leaves */
    mil_burst *burst;             /* burst.c; NULL until the first */
    mil_draft_burst *draft_burst; /* draft_burst.c, likewise */
    bool cramped; /* there was no memory for the logits of such a round: the host takes part */
    /* speculate.c, where all texts of a round draft equally many tokens */
    bool together;
    int64_t depth; /* drafts of a round */
    int64_t quiet; /* plain steps since drafts were last worth it, or tried */
    int64_t trial_after;
    double weight_bytes, draft_weight_bytes;
    struct mil_pack { /* one forward pass in the making */
        int32_t *tokens;
        int64_t *offsets, *logit_rows;
        mil_state **states;
        bool *held;
        mil_sequence **sequences;
        float *logits;
        int64_t token_capacity, sequence_capacity, row_capacity, logit_capacity;
        int64_t rows, count, logit_count;
        /* rows that the device draws from, one of a sequence at most */
        int64_t draw_count, *draw_rows, *draw_positions;
        mil_sample_options *draw_options;
        int32_t *drawn, *bad;
    } pack;
} mil_engine;

/* Checks the options and the pair of models. On failure nothing is held. */
mil_status
mil_engine_init(mil_engine *engine, const mil_engine_options *options) MIL_MUST_CHECK;
void
mil_engine_release(mil_engine *engine); /* with whatever still runs; twice is safe */

/* Checks and copies a request; it joins in a later round. */
mil_status
mil_engine_submit(mil_engine *engine, const mil_request *request) MIL_MUST_CHECK;

/* Drops what has finished, lets waiting requests join, and advances all. After a failure the engine can only
 * be released. */
mil_status
mil_engine_round(mil_engine *engine, mil_context *context) MIL_MUST_CHECK;

/* Requests that a next round would advance. */
int64_t
mil_engine_pending(const mil_engine *engine);

/* After a round: running sequence `index` and how many of its last tokens are new since the round before. */
const mil_generation *
mil_engine_look(const mil_engine *engine, int64_t index, int64_t *fresh);
/* Ends it with only `keep` of its fresh tokens; its state then has read no token beyond those. */
mil_status
mil_engine_cut(mil_engine *engine, int64_t index, int64_t keep, mil_finish finish) MIL_MUST_CHECK;
/* Moves a finished sequence's result out; the next round drops the rest. */
mil_generation
mil_engine_take(mil_engine *engine, int64_t index);
/* Prompt lookup (speculate.c): the tokens that followed the latest earlier occurrence of the longest suffix
 * of `longest` to `shortest` tokens; returns how many of `wanted` were proposed. */
int64_t
mil_ngram_propose(const int32_t *tokens, int64_t count, int64_t longest, int64_t shortest, int64_t wanted,
                  int32_t *out);

#endif
