/* One text in the making: the inside of an engine, shared by generate.c and speculate.c. */
#ifndef MIL_DECODE_SEQUENCE_H
#define MIL_DECODE_SEQUENCE_H

#include "decode/decode.h"

/* tokens   0 ...... prompt_count ...... count ...... count + drafted
 *          | prompt | new tokens        | drafts of this round, not yet believed
 *                            | state->length: read by the model; the one token beyond it, at count - 1, is
 *                              the first row of the next pass
 */
struct mil_sequence {
    mil_request request; /* stop_tokens: own copy; prompt: not kept, see tokens */
    mil_generation generation;
    int64_t serial; /* no other sequence of the engine has or had it */
    int64_t count, token_capacity;
    int64_t fresh;
    int32_t *occurrences; /* [vocab] of tokens in the text and its drafts, or NULL: no repetition penalty */
    mil_state own_state, own_draft_state;
    mil_state *state, *draft_state; /* the request's or the own ones; draft_state NULL: no draft model */

    /* sampling */
    float *weight;          /* [vocab] of the distribution in hand; NULL where greedy */
    mil_candidate *scratch; /* [vocab] or NULL */

    /* speculation */
    int64_t wanted, drafted;             /* this round */
    mil_distribution drafts[MIL_WINDOW]; /* that each was drawn from; weights in draft_weight */
    float *draft_weight;                 /* [draft_tokens, vocab] or NULL */
    double tried, accepted;              /* recent drafts, older ones fading */
    double offered;                      /* share of recent rounds that had any, likewise */
    int64_t depth;                       /* drafts a round wherever the text's end allows them */
    int64_t quiet;                       /* rounds since the last speculation */
    bool reading;                        /* it waits for the draft model, which still reads the text */
    bool undraftable;                    /* the text holds a token that the draft model does not know */

    /* this round's rows */
    int64_t rows, first_logit, logit_count;
    int64_t draw; /* its number among the pass's draws; -1: none */
    int64_t past; /* tokens read before them */

    double joined_at, first_token_at;
    mil_status status; /* of the parallel part, with its message */
    char message[MIL_MESSAGE_SIZE];
};

/* A sequence that waits: it holds its text only. */
mil_status
mil_sequence_new(const mil_request *request, mil_sequence **out) MIL_MUST_CHECK;
/* States and sampling memory, when its turn has come. */
mil_status
mil_sequence_join(const mil_engine *engine, mil_sequence *sequence) MIL_MUST_CHECK;
/* Gives them back: the sequence waits again. Also after joining half way. */
void
mil_sequence_leave(mil_sequence *sequence);
void
mil_sequence_delete(mil_sequence *sequence);

/* Room for `more` tokens beyond count, in the arrays that grow with the text. */
mil_status
mil_sequence_reserve(mil_sequence *sequence, int64_t more) MIL_MUST_CHECK;

/* The failure of a text whose logits a device found not to be finite. */
mil_status
mil_sequence_not_finite(const mil_sequence *sequence) MIL_MUST_CHECK;

/* Counts a token for the repetition penalty, or takes it back. */
static inline void
mil_sequence_mark(mil_sequence *sequence, int32_t token, int32_t change)
{
    if (sequence->occurrences != NULL) {
        sequence->occurrences[token] += change;
    }
}

/* Whether frequencies depend on a text's length (model.h). The prompt is then read in one pass, so that all
 * of it has the frequencies of its whole length, as in transformers. */
static inline bool
mil_rope_changes(const mil_rope_config *rope)
{
    return rope->rotary > 0 && (rope->long_inv_freq != NULL || rope->dynamic_factor > 0.0f);
}

static inline bool
mil_sequence_stops(const mil_sequence *sequence, int32_t token)
{
    for (int64_t i = 0; i < sequence->request.stop_count; i++) {
        if (sequence->request.stop_tokens[i] == token) {
            return true;
        }
    }
    return false;
}

/* Adds one token to the text, with its log-probabilities from `logits`; ends the sequence at a stop token or
 * at its length. */
void
mil_sequence_add(const mil_engine *engine, mil_sequence *sequence, int32_t token, const float *logits);

/* Whether its tokens can be drawn without their logits on the host. */
static inline bool
mil_sequence_draws_alone(const mil_sequence *sequence)
{
    return !sequence->request.logprobs && sequence->request.sampling.repetition_penalty == 1.0f;
}

/* A request's settings as operators take them. */
static inline mil_sample_options
mil_device_sampling(const mil_sampling *sampling)
{
    return (mil_sample_options){
        .temperature = sampling->temperature,
        .top_p = sampling->top_p,
        .min_p = sampling->min_p,
        .top_k = sampling->top_k,
        .seed = sampling->seed,
    };
}

/* ---- speculate.c ------------------------------------------------------------------------------------ */

/* Longest and shortest ends of a text that are looked for in it (ngram.c). */
#define MIL_NGRAM_LONGEST 4
#define MIL_NGRAM_SHORTEST 2

/* Sets the costs that the options leave open. */
void
mil_speculate_costs(mil_engine *engine);
/* Sets `wanted` of all running sequences: the number of drafts that this round is worth. */
void
mil_speculate_plan(mil_engine *engine);
/* Plain steps in a row before drafts have to be thought of again, at least 1. */
int64_t
mil_speculate_quiet_steps(const mil_engine *engine);
/* Tokens that a round of so many drafts is expected to give a text, going by all texts' drafts so far. */
double
mil_speculate_tokens(const mil_engine *engine, int64_t drafts);
/* A round of `drafted` drafts, of which so many stood until the text's end or the first rejected one. */
void
mil_speculate_remember(mil_sequence *sequence, int64_t drafted, int64_t accepted, bool rejected);
/* Fills tokens[count ..] with drafts for all running sequences that want some. */
mil_status
mil_speculate_draft(mil_engine *engine, mil_context *context) MIL_MUST_CHECK;
/* The target's verdict on one sequence: logits [drafted + 1, vocab] of the last token and the drafts. Adds
 * the accepted drafts and one token more. Touches this sequence only. */
mil_status
mil_speculate_settle(const mil_engine *engine, mil_sequence *sequence, const float *logits) MIL_MUST_CHECK;

/* ---- burst.c ---------------------------------------------------------------------------------------- */

/* Whether a sequence's next token can come without the host, as far as its request is concerned. */
bool
mil_burst_takes(const mil_sequence *sequence);
/* Plain steps of all running sequences that may now be taken without the host in between; 0: a round is needed. */
int64_t
mil_burst_steps(const mil_engine *engine);
/* Takes so many of them. */
mil_status
mil_burst_run(mil_engine *engine, mil_context *context, int64_t steps) MIL_MUST_CHECK;
void
mil_burst_delete(mil_burst *burst);

/* ---- draft_burst.c ---------------------------------------------------------------------------------- */

/* The same for speculative rounds; *done is false, and nothing has changed, where there is no memory for them. */
int64_t
mil_draft_burst_rounds(const mil_engine *engine);
mil_status
mil_draft_burst_run(mil_engine *engine, mil_context *context, int64_t rounds, bool *done) MIL_MUST_CHECK;
void
mil_draft_burst_delete(mil_draft_burst *burst);

/* ---- generate.c ------------------------------------------------------------------------------------- */

/* Starts a pass; adds the next `rows` tokens of a sequence that `state` has not read, the last `logit_count`
 * of them with logits, `held`: without moving its boundary; runs it: a sequence's logits start at row first_logit of
 * engine->pack.logits. */
void
mil_pack_begin(mil_engine *engine);
mil_status
mil_pack_add(mil_engine *engine, mil_sequence *sequence, mil_state *state, int64_t rows, int64_t logit_count,
             bool held) MIL_MUST_CHECK;
mil_status
mil_pack_run(mil_engine *engine, mil_context *context, const mil_model *model) MIL_MUST_CHECK;

/* Runs `work` for each packed sequence on the context's team; the first failure, in order, is returned. */
typedef mil_status (*mil_sequence_work)(const mil_engine *engine, mil_sequence *sequence);
mil_status
mil_pack_each(mil_engine *engine, mil_context *context, mil_sequence_work work) MIL_MUST_CHECK;

#endif
