/* One text in the making: its memory, and what happens when a token is added (see sequence.h). */
#include "decode/sequence.h"

#include <math.h>
#include <omp.h>
#include <string.h>

/* Replaces *array by one of `count` elements that begins with the `used` of the old. */
static mil_status
grow(void **array, int64_t used, int64_t count, size_t size)
{
    void *larger = mil_alloc((size_t)count, size);
    if (larger == NULL) {
        return mil_fail(MIL_ERR_MEMORY, "generate: out of memory for %lld elements of a text",
                        (long long)count);
    }
    if (used > 0) {
        memcpy(larger, *array, (size_t)used * size);
    }
    mil_free(*array);
    *array = larger;
    return MIL_OK;
}

static mil_status
take(void **array, int64_t count, size_t size)
{
    return grow(array, 0, count, size);
}

mil_status
mil_sequence_reserve(mil_sequence *sequence, int64_t more)
{
    if (sequence->count + more <= sequence->token_capacity) {
        return MIL_OK;
    }
    mil_generation *g = &sequence->generation;
    int64_t capacity = sequence->count + more + sequence->count / 2;
    int64_t used = g->count, room = capacity - g->prompt_count;
    MIL_TRY(grow((void **)&g->tokens, sequence->count, capacity, sizeof *g->tokens));
    if (sequence->request.logprobs) {
        MIL_TRY(grow((void **)&g->logprobs, used, room, sizeof *g->logprobs));
        if (g->top > 0) {
            MIL_TRY(grow((void **)&g->top_tokens, used * g->top, room * g->top, sizeof *g->top_tokens));
            MIL_TRY(grow((void **)&g->top_logprobs, used * g->top, room * g->top, sizeof *g->top_logprobs));
        }
    }
    sequence->token_capacity = capacity;
    return MIL_OK;
}

/* The prompt's scores, unknown until its rows are read. */
static mil_status
take_prompt_scores(mil_generation *g)
{
    MIL_TRY(take((void **)&g->prompt_logprobs, g->prompt_count, sizeof *g->prompt_logprobs));
    for (int64_t i = 0; i < g->prompt_count; i++) {
        g->prompt_logprobs[i] = (double)NAN;
    }
    if (g->top > 0) {
        MIL_TRY(take((void **)&g->prompt_top_tokens, g->prompt_count * g->top, sizeof *g->prompt_top_tokens));
        MIL_TRY(
            take((void **)&g->prompt_top_logprobs, g->prompt_count * g->top, sizeof *g->prompt_top_logprobs));
        for (int64_t i = 0; i < g->prompt_count * g->top; i++) {
            g->prompt_top_tokens[i] = -1;
            g->prompt_top_logprobs[i] = (double)NAN;
        }
    }
    return MIL_OK;
}

/* Memory that the sampler needs, by what the request asks for. */
static mil_status
take_sampling_memory(mil_sequence *sequence, const mil_engine_options *options)
{
    const mil_request *request = &sequence->request;
    const mil_sampling *sampling = &request->sampling;
    int64_t vocab = options->model->config.vocab;
    if (sampling->repetition_penalty != 1.0f) {
        MIL_TRY(take((void **)&sequence->occurrences, vocab, sizeof *sequence->occurrences));
        memset(sequence->occurrences, 0, (size_t)vocab * sizeof *sequence->occurrences);
        for (int64_t i = 0; i < request->prompt_count; i++) {
            mil_sequence_mark(sequence, sequence->generation.tokens[i], 1);
        }
    }
    if (sampling->temperature == 0.0f) {
        return MIL_OK;
    }
    MIL_TRY(take((void **)&sequence->weight, vocab, sizeof *sequence->weight));
    if (sampling->top_k > 0 || sampling->top_p < 1.0f) {
        MIL_TRY(take((void **)&sequence->scratch, vocab, sizeof *sequence->scratch));
    }
    if (options->draft_kind == MIL_DRAFT_MODEL && request->draft_tokens > 0) {
        MIL_TRY(take((void **)&sequence->draft_weight, vocab * request->draft_tokens,
                     sizeof *sequence->draft_weight));
        for (int64_t i = 0; i < request->draft_tokens; i++) {
            sequence->drafts[i].weight = sequence->draft_weight + i * vocab;
        }
    }
    return MIL_OK;
}

/* Most new tokens that a state has room for from the start; what is longer grows. */
#define ROOM_AT_ONCE 4096

/* The states: those of the request, or fresh ones.  They take the memory of the whole text now, so that it is lacking
 * before the text begins, if at all, and not in its middle. */
static mil_status
take_states(mil_sequence *sequence, const mil_engine_options *options)
{
    const mil_request *request = &sequence->request;
    int64_t most = request->max_new_tokens, at_once = most < ROOM_AT_ONCE ? most : ROOM_AT_ONCE;
    /* A round's drafts, and what a burst draws after the end, are read before they are known to be in vain. */
    int64_t capacity = request->prompt_count + at_once + request->draft_tokens + MIL_WINDOW;
    int64_t expected = most > MIL_MOST_TOKENS ? 0 : capacity - at_once + most;
    sequence->state = request->state;
    if (sequence->state == NULL) {
        MIL_TRY(request->origin != NULL ? mil_state_copy(&sequence->own_state, request->origin)
                                        : mil_state_init(&sequence->own_state, options->model, capacity));
        sequence->state = &sequence->own_state;
    }
    sequence->state->expected = expected;
    MIL_TRY(mil_state_reserve(sequence->state, capacity));
    if (options->draft_kind == MIL_DRAFT_MODEL && request->draft_tokens > 0) {
        sequence->draft_state = request->draft_state;
        if (sequence->draft_state == NULL) {
            MIL_TRY(mil_state_init(&sequence->own_draft_state, options->draft, capacity));
            sequence->draft_state = &sequence->own_draft_state;
        }
        sequence->draft_state->expected = expected;
        MIL_TRY(mil_state_reserve(sequence->draft_state, capacity));
    }
    return MIL_OK;
}

/* A prompt that the state has read to its end leaves no row to predict from: its last token is taken back. */
static mil_status
leave_one_row(mil_sequence *sequence)
{
    if (sequence->state->length < sequence->count || sequence->request.max_new_tokens == 0) {
        return MIL_OK;
    }
    if (mil_state_rollback(sequence->state, 1) != MIL_OK) {
        return mil_fail(
            MIL_ERR_STATE,
            "generate: the state has read all %lld tokens of the prompt and cannot take the last one "
            "back; make it from a prompt that is at least one token shorter",
            (long long)sequence->count);
    }
    return MIL_OK;
}

/* What submitting needs: the text and the stop list. The large arrays wait until the sequence joins. */
static mil_status
copy_request(mil_sequence *sequence)
{
    mil_request *request = &sequence->request;
    mil_generation *g = &sequence->generation;
    const int32_t *prompt = request->prompt, *stop_tokens = request->stop_tokens;
    request->prompt = NULL;
    request->stop_tokens = NULL;
    g->tag = request->tag;
    g->prompt_count = request->prompt_count;
    g->top = request->top_logprobs;
    g->stats.prompt_tokens = request->prompt_count;
    int64_t first = request->max_new_tokens < 64 ? request->max_new_tokens : 64;
    MIL_TRY(mil_sequence_reserve(sequence, request->prompt_count + first + MIL_WINDOW));
    memcpy(g->tokens, prompt, (size_t)request->prompt_count * sizeof *prompt);
    sequence->count = request->prompt_count;
    if (request->stop_count > 0) {
        MIL_TRY(take((void **)&request->stop_tokens, request->stop_count, sizeof *stop_tokens));
        memcpy((void *)request->stop_tokens, stop_tokens, (size_t)request->stop_count * sizeof *stop_tokens);
    }
    return MIL_OK;
}

mil_status
mil_sequence_join(const mil_engine *engine, mil_sequence *sequence)
{
    const mil_engine_options *options = &engine->options;
    sequence->joined_at = omp_get_wtime();
    if (sequence->request.prompt_logprobs) {
        MIL_TRY(take_prompt_scores(&sequence->generation));
    }
    MIL_TRY(take_sampling_memory(sequence, options));
    MIL_TRY(take_states(sequence, options));
    MIL_TRY(leave_one_row(sequence));
    if (sequence->draft_state != NULL) {
        for (int64_t i = 0; i < sequence->count; i++) {
            sequence->undraftable |= sequence->generation.tokens[i] >= options->draft->config.vocab;
        }
    }
    sequence->offered = 1.0;
    sequence->generation.stats.cached_tokens = sequence->state->length;
    return MIL_OK;
}

mil_status
mil_sequence_new(const mil_request *request, mil_sequence **out)
{
    *out = NULL;
    mil_sequence *sequence = mil_alloc(1, sizeof *sequence);
    if (sequence == NULL) {
        return mil_fail(MIL_ERR_MEMORY, "generate: out of memory for a request");
    }
    memset(sequence, 0, sizeof *sequence);
    sequence->request = *request;
    mil_status status = copy_request(sequence);
    if (status != MIL_OK) {
        mil_sequence_delete(sequence);
        return status;
    }
    *out = sequence;
    return MIL_OK;
}

static void
drop(void **array)
{
    mil_free(*array);
    *array = NULL;
}

void
mil_sequence_leave(mil_sequence *sequence)
{
    mil_generation *g = &sequence->generation;
    mil_state_release(&sequence->own_state);
    mil_state_release(&sequence->own_draft_state);
    sequence->state = sequence->draft_state = NULL;
    drop((void **)&g->prompt_logprobs);
    drop((void **)&g->prompt_top_tokens);
    drop((void **)&g->prompt_top_logprobs);
    drop((void **)&sequence->occurrences);
    drop((void **)&sequence->weight);
    drop((void **)&sequence->scratch);
    drop((void **)&sequence->draft_weight);
}

void
mil_sequence_delete(mil_sequence *sequence)
{
    if (sequence == NULL) {
        return;
    }
    mil_sequence_leave(sequence);
    mil_generation_release(&sequence->generation);
    mil_free((void *)sequence->request.stop_tokens);
    mil_free(sequence);
}

void
mil_generation_release(mil_generation *generation)
{
    mil_free(generation->tokens);
    mil_free(generation->logprobs);
    mil_free(generation->top_tokens);
    mil_free(generation->top_logprobs);
    mil_free(generation->prompt_logprobs);
    mil_free(generation->prompt_top_tokens);
    mil_free(generation->prompt_top_logprobs);
    *generation = (mil_generation){0};
}

mil_status
mil_sequence_not_finite(const mil_sequence *sequence)
{
    return mil_fail(MIL_ERR_NONFINITE, "generate: the model's logits are not finite after %lld tokens",
                    (long long)sequence->count);
}

void
mil_sequence_add(const mil_engine *engine, mil_sequence *sequence, int32_t token, const float *logits)
{
    mil_generation *g = &sequence->generation;
    const mil_engine_options *options = &engine->options;
    int64_t vocab = options->model->config.vocab;
    sequence->undraftable |= options->draft != NULL && token >= options->draft->config.vocab;
    if (g->count == 0) {
        sequence->first_token_at = omp_get_wtime();
    }
    if (mil_sequence_stops(sequence, token)) {
        g->finish = MIL_FINISH_STOP;
        return;
    }
    g->tokens[sequence->count++] = token;
    mil_sequence_mark(sequence, token, 1);
    if (g->logprobs != NULL) {
        double log_sum_exp = mil_log_sum_exp(logits, vocab);
        g->logprobs[g->count] = (double)logits[token] - log_sum_exp;
        if (g->top > 0) {
            mil_top_log_probabilities(logits, vocab, log_sum_exp, g->top, g->top_tokens + g->count * g->top,
                                      g->top_logprobs + g->count * g->top);
        }
    }
    g->count++;
    sequence->fresh++;
    if (g->count >= sequence->request.max_new_tokens) {
        g->finish = MIL_FINISH_LENGTH;
    }
}
