/* The engine: requests, rounds, and the packing of rows (see decode.h for the picture). */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "decode/sequence.h"

#define DEFAULT_BATCH 16
/* Scores of a prompt need a row of logits for each token: chunks are cut so that these stay in 64 MiB. */
#define SCORE_LOGITS ((int64_t)16 << 20)

/* ---- options and requests --------------------------------------------------------------------------- */

mil_status
mil_engine_init(mil_engine *engine, const mil_engine_options *options)
{
    *engine = (mil_engine){.options = *options};
    mil_engine_options *o = &engine->options;
    o->max_batch = o->max_batch == 0 ? DEFAULT_BATCH : o->max_batch;
    o->prefill_rows = o->prefill_rows == 0 ? o->model->ops->prefill_rows : o->prefill_rows;
    if (o->max_batch < 1 || o->max_batch > 1 << 16) {
        return mil_fail(MIL_ERR_VALUE, "generate: max_batch must lie in 1 .. 65536, not %lld",
                        (long long)o->max_batch);
    }
    if (o->prefill_rows < 1 || o->prefill_rows > 1 << 20) {
        return mil_fail(MIL_ERR_VALUE, "generate: prefill_rows must lie in 1 .. 1048576, not %lld",
                        (long long)o->prefill_rows);
    }
    if ((o->draft_kind == MIL_DRAFT_MODEL) != (o->draft != NULL)) {
        return mil_fail(MIL_ERR_VALUE,
                        "generate: a draft model must be given exactly where drafts come from one");
    }
    if (o->draft != NULL && o->draft->ops != o->model->ops) {
        return mil_fail(MIL_ERR_DEVICE,
                        "generate: the draft is on %s, the model on %s; load both on one device",
                        o->draft->ops->name, o->model->ops->name);
    }
    if (o->broken_rule == MIL_RULE_FORCED && !(o->forced_acceptance > 0.0 && o->forced_acceptance <= 1.0)) {
        return mil_fail(MIL_ERR_VALUE, "generate: a forced acceptance must lie in (0, 1], not %g",
                        o->forced_acceptance);
    }
    engine->running = mil_alloc((size_t)o->max_batch, sizeof *engine->running);
    if (engine->running == NULL) {
        return mil_fail(MIL_ERR_MEMORY, "generate: out of memory for a batch of %lld",
                        (long long)o->max_batch);
    }
    mil_speculate_costs(engine);
    return MIL_OK;
}

void
mil_engine_release(mil_engine *engine)
{
    for (int64_t i = 0; i < engine->running_count; i++) {
        mil_sequence_delete(engine->running[i]);
    }
    for (int64_t i = 0; i < engine->waiting_count; i++) {
        mil_sequence_delete(engine->waiting[i]);
    }
    mil_burst_delete(engine->burst);
    mil_draft_burst_delete(engine->draft_burst);
    mil_free(engine->running);
    mil_free(engine->waiting);
    mil_free(engine->pack.tokens);
    mil_free(engine->pack.offsets);
    mil_free(engine->pack.logit_rows);
    mil_free(engine->pack.states);
    mil_free(engine->pack.held);
    mil_free(engine->pack.sequences);
    mil_free(engine->pack.logits);
    mil_free(engine->pack.draw_rows);
    mil_free(engine->pack.draw_positions);
    mil_free(engine->pack.draw_options);
    mil_free(engine->pack.drawn);
    mil_free(engine->pack.bad);
    *engine = (mil_engine){0};
}

static mil_status
check_state(const mil_state *state, const mil_model *model, const mil_request *request, const char *name)
{
    if (state == NULL) {
        return MIL_OK;
    }
    if (state->model != model) {
        return mil_fail(MIL_ERR_STATE,
                        "generate: %s belongs to another model; make it with this model's state()", name);
    }
    MIL_TRY(mil_state_check(state));
    if (state->length > request->prompt_count) {
        return mil_fail(
            MIL_ERR_STATE,
            "generate: %s has read %lld tokens, more than the prompt's %lld; the prompt must begin "
            "with the tokens that the state has read",
            name, (long long)state->length, (long long)request->prompt_count);
    }
    return MIL_OK;
}

static mil_status
check_request(const mil_engine_options *options, const mil_request *request)
{
    if (request->prompt_count < 1) {
        return mil_fail(MIL_ERR_VALUE, "generate: a prompt is empty; give at least one token");
    }
    int64_t offsets[2] = {0, request->prompt_count};
    MIL_TRY(mil_check_tokens(options->model, request->prompt, 1, offsets));
    if (request->max_new_tokens < 0) {
        return mil_fail(MIL_ERR_VALUE, "generate: max_new_tokens must be at least 0, not %lld",
                        (long long)request->max_new_tokens);
    }
    if (request->draft_tokens < 0 || request->draft_tokens >= MIL_WINDOW) {
        return mil_fail(MIL_ERR_VALUE, "generate: draft_tokens must lie in 0 .. %d, not %lld", MIL_WINDOW - 1,
                        (long long)request->draft_tokens);
    }
    if (request->top_logprobs < 0 || request->top_logprobs > options->model->config.vocab) {
        return mil_fail(MIL_ERR_VALUE,
                        "generate: top_logprobs must lie in 0 .. %lld (the vocabulary), not %lld",
                        (long long)options->model->config.vocab, (long long)request->top_logprobs);
    }
    MIL_TRY(mil_sampling_check(&request->sampling));
    MIL_TRY(check_state(request->state, options->model, request, "state"));
    MIL_TRY(check_state(request->origin, options->model, request, "origin"));
    if (request->state != NULL && request->origin != NULL) {
        return mil_fail(MIL_ERR_VALUE, "generate: give a request either a state or an origin, not both");
    }
    if (request->draft_state != NULL && options->draft == NULL) {
        return mil_fail(MIL_ERR_VALUE, "generate: draft_state is given, but there is no draft model");
    }
    return check_state(request->draft_state, options->draft, request, "draft_state");
}

/* Room for `count` elements in an array whose content need not survive. */
static mil_status
room(void **array, int64_t *capacity, int64_t count, size_t size)
{
    if (count <= *capacity) {
        return MIL_OK;
    }
    int64_t wanted = count + count / 2;
    mil_free(*array);
    *capacity = 0;
    *array = mil_alloc((size_t)wanted, size);
    if (*array == NULL) {
        return mil_fail(MIL_ERR_MEMORY, "generate: out of memory for %lld elements of %zu bytes",
                        (long long)wanted, size);
    }
    *capacity = wanted;
    return MIL_OK;
}

mil_status
mil_engine_submit(mil_engine *engine, const mil_request *request)
{
    MIL_TRY(check_request(&engine->options, request));
    if (engine->waiting_count == engine->waiting_capacity) {
        int64_t capacity = 2 * engine->waiting_capacity + 16;
        mil_sequence **larger = mil_alloc((size_t)capacity, sizeof *larger);
        if (larger == NULL) {
            return mil_fail(MIL_ERR_MEMORY, "generate: out of memory for %lld requests", (long long)capacity);
        }
        for (int64_t i = 0; i < engine->waiting_count; i++) {
            larger[i] = engine->waiting[i];
        }
        mil_free(engine->waiting);
        engine->waiting = larger;
        engine->waiting_capacity = capacity;
    }
    MIL_TRY(mil_sequence_new(request, &engine->waiting[engine->waiting_count]));
    engine->waiting_count++;
    return MIL_OK;
}

/* ---- one forward pass ------------------------------------------------------------------------------- */

void
mil_pack_begin(mil_engine *engine)
{
    engine->pack.rows = engine->pack.count = engine->pack.logit_count = engine->pack.draw_count = 0;
}

mil_status
mil_pack_add(mil_engine *engine, mil_sequence *sequence, mil_state *state, int64_t rows, int64_t logit_count,
             bool held)
{
    struct mil_pack *pack = &engine->pack;
    MIL_TRY(mil_state_reserve(state, state->length + rows));
    sequence->past = state->length;
    sequence->rows = rows;
    sequence->first_logit = pack->logit_count;
    sequence->logit_count = logit_count;
    sequence->draw = -1;
    pack->sequences[pack->count] = sequence;
    pack->states[pack->count] = state;
    pack->held[pack->count] = held;
    pack->count++;
    pack->rows += rows;
    pack->logit_count += logit_count;
    return MIL_OK;
}

/* Whether the last of a sequence's rows needs no logits on the host, as the device draws its token. */
static bool
device_draws(const mil_engine *engine, const mil_sequence *sequence)
{
    return engine->options.model->ops->sample != NULL && mil_sequence_draws_alone(sequence) &&
           !sequence->request.prompt_logprobs && sequence->drafted == 0;
}

/* The next `rows` rows of a sequence, and of the last one a token: drawn by the device or from logits. */
static mil_status
add_decoded_rows(mil_engine *engine, mil_sequence *sequence, int64_t rows, int64_t logit_count)
{
    struct mil_pack *pack = &engine->pack;
    bool draws = device_draws(engine, sequence);
    MIL_TRY(mil_pack_add(engine, sequence, sequence->state, rows, draws ? 0 : logit_count, false));
    if (draws) {
        sequence->draw = pack->draw_count;
        pack->draw_options[pack->draw_count] = mil_device_sampling(&sequence->request.sampling);
        pack->draw_positions[pack->draw_count] = sequence->count;
        pack->draw_count++;
    }
    return MIL_OK;
}

/* Lays the packed sequences' rows one after another. */
static void
lay_out_rows(struct mil_pack *pack)
{
    int64_t row = 0, logit = 0;
    for (int64_t i = 0; i < pack->count; i++) {
        const mil_sequence *sequence = pack->sequences[i];
        pack->offsets[i] = row;
        memcpy(pack->tokens + row, sequence->generation.tokens + sequence->past,
               (size_t)sequence->rows * sizeof *pack->tokens);
        row += sequence->rows;
        for (int64_t j = 0; j < sequence->logit_count; j++) {
            pack->logit_rows[logit++] = row - sequence->logit_count + j;
        }
        if (sequence->draw >= 0) {
            pack->draw_rows[sequence->draw] = row - 1;
        }
    }
    pack->offsets[pack->count] = row;
}

mil_status
mil_pack_run(mil_engine *engine, mil_context *context, const mil_model *model)
{
    struct mil_pack *pack = &engine->pack;
    MIL_TRY(room((void **)&pack->tokens, &pack->token_capacity, pack->rows, sizeof *pack->tokens));
    MIL_TRY(
        room((void **)&pack->logit_rows, &pack->row_capacity, pack->logit_count, sizeof *pack->logit_rows));
    MIL_TRY(room((void **)&pack->logits, &pack->logit_capacity, pack->logit_count * model->config.vocab,
                 sizeof *pack->logits));
    lay_out_rows(pack);
    mil_forward forward = {
        .tokens = pack->tokens,
        .sequences = pack->count,
        .offsets = pack->offsets,
        .states = pack->states,
        .held = pack->held,
        .logit_rows = pack->logit_rows,
        .logit_count = pack->logit_count,
        .logits = pack->logit_count > 0 ? pack->logits : NULL,
        .draws = {pack->draw_count, pack->draw_rows, pack->draw_options, pack->draw_positions, pack->drawn,
                  pack->bad},
    };
    return mil_model_forward(context, model, &forward);
}

mil_status
mil_pack_each(mil_engine *engine, mil_context *context, mil_sequence_work work)
{
    struct mil_pack *pack = &engine->pack;
#pragma omp parallel for schedule(dynamic, 1) num_threads(context->threads) if (pack->count > 1)
    for (int64_t i = 0; i < pack->count; i++) {
        mil_sequence *sequence = pack->sequences[i];
        sequence->status = work(engine, sequence);
        if (sequence->status != MIL_OK) { /* the message lives in the worker's own buffer */
            memcpy(sequence->message, mil_message(), sizeof sequence->message);
        }
    }
    for (int64_t i = 0; i < pack->count; i++) {
        if (pack->sequences[i]->status != MIL_OK) {
            return mil_fail(pack->sequences[i]->status, "%s", pack->sequences[i]->message);
        }
    }
    return MIL_OK;
}

/* ---- a round ---------------------------------------------------------------------------------------- */

/* Finished ones leave, waiting ones join. */
static mil_status
change_guard(mil_engine *engine)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < engine->running_count; i++) {
        mil_sequence *sequence = engine->running[i];
        if (sequence->generation.finish == MIL_RUNNING) {
            engine->running[kept++] = sequence;
        }
        else {
            mil_sequence_delete(sequence);
        }
    }
    if (kept < engine->running_count) {
        engine->crowded = false;
    }
    engine->running_count = kept;
    int64_t joined = 0;
    mil_status status = MIL_OK;
    while (!engine->crowded && joined < engine->waiting_count &&
           engine->running_count < engine->options.max_batch) {
        mil_sequence *sequence = engine->waiting[joined];
        sequence->serial = ++engine->joined;
        status = mil_sequence_join(engine, sequence);
        if (status != MIL_OK) {
            mil_sequence_leave(sequence);
            break;
        }
        engine->running[engine->running_count++] = sequence;
        joined++;
    }
    for (int64_t i = joined; i < engine->waiting_count; i++) {
        engine->waiting[i - joined] = engine->waiting[i];
    }
    engine->waiting_count -= joined;
    /* A text that finds no memory beside others waits until one of them has ended. */
    engine->crowded |= status == MIL_ERR_MEMORY && engine->running_count > 0;
    return engine->crowded ? MIL_OK : status;
}

/* Adds the next rows of a prompt; `left`: prompt rows that the round still takes. */
static mil_status
add_prompt_rows(mil_engine *engine, mil_sequence *sequence, int64_t *left)
{
    const mil_request *request = &sequence->request;
    int64_t unread = sequence->count - sequence->state->length;
    int64_t most = *left;
    if (request->prompt_logprobs) {
        int64_t fit = SCORE_LOGITS / engine->options.model->config.vocab;
        fit = fit < MIL_WINDOW ? MIL_WINDOW : fit;
        most = most < fit ? most : fit;
    }
    int64_t rows = unread < most ? unread : most;
    if (mil_rope_changes(&engine->options.model->config.rope)) {
        rows = unread;
    }
    if (rows == 0) {
        return MIL_OK;
    }
    *left -= rows < *left ? rows : *left;
    if (rows == unread && request->max_new_tokens > 0) {
        return add_decoded_rows(engine, sequence, rows, request->prompt_logprobs ? rows : 1);
    }
    return mil_pack_add(engine, sequence, sequence->state, rows, request->prompt_logprobs ? rows : 0, false);
}

static mil_status
pack_round(mil_engine *engine)
{
    int64_t left = engine->options.prefill_rows;
    mil_pack_begin(engine);
    for (int64_t i = 0; i < engine->running_count; i++) {
        mil_sequence *sequence = engine->running[i];
        if (sequence->generation.finish != MIL_RUNNING) {
            continue;
        }
        if (sequence->reading) {
            continue;
        }
        if (sequence->generation.count > 0) {
            int64_t rows = 1 + sequence->drafted;
            MIL_TRY(add_decoded_rows(engine, sequence, rows, rows));
        }
        else {
            MIL_TRY(add_prompt_rows(engine, sequence, &left));
        }
    }
    return MIL_OK;
}

/* Log-probabilities of the prompt's tokens from the rows before them. */
static mil_status
score_prompt(const mil_engine *engine, mil_sequence *sequence, const float *logits)
{
    int64_t vocab = engine->options.model->config.vocab;
    mil_generation *g = &sequence->generation;
    for (int64_t row = 0; row < sequence->rows; row++) {
        int64_t next = sequence->past + row + 1;
        if (next >= g->prompt_count) {
            break;
        }
        const float *at = logits + row * vocab;
        MIL_TRY(mil_logits_check(at, vocab));
        double log_sum_exp = mil_log_sum_exp(at, vocab);
        g->prompt_logprobs[next] = (double)at[g->tokens[next]] - log_sum_exp;
        if (g->top > 0) {
            mil_top_log_probabilities(at, vocab, log_sum_exp, g->top, g->prompt_top_tokens + next * g->top,
                                      g->prompt_top_logprobs + next * g->top);
        }
    }
    return MIL_OK;
}

/* The token that the device drew for a sequence. */
static mil_status
settle_draw(const mil_engine *engine, mil_sequence *sequence)
{
    if (engine->pack.bad[sequence->draw] != 0) {
        return mil_sequence_not_finite(sequence);
    }
    mil_sequence_add(engine, sequence, engine->pack.drawn[sequence->draw], NULL);
    if (sequence->wanted > 0) { /* and there were no drafts */
        mil_speculate_remember(sequence, 0, 0, false);
    }
    return MIL_OK;
}

/* Reads what the round gave one sequence; runs beside the others. */
static mil_status
settle(const mil_engine *engine, mil_sequence *sequence)
{
    int64_t vocab = engine->options.model->config.vocab;
    const float *logits = engine->pack.logits + sequence->first_logit * vocab;
    bool decoding = sequence->generation.count > 0;
    sequence->generation.stats.rounds += decoding;
    if (sequence->draw >= 0) {
        return settle_draw(engine, sequence);
    }
    if (decoding) {
        return mil_speculate_settle(engine, sequence, logits);
    }
    if (sequence->request.prompt_logprobs) {
        MIL_TRY(score_prompt(engine, sequence, logits));
    }
    if (sequence->past + sequence->rows < sequence->count || sequence->request.max_new_tokens == 0) {
        return MIL_OK;
    }
    return mil_speculate_settle(engine, sequence, logits + (sequence->logit_count - 1) * vocab);
}

/* A text that has ended leaves its own states where they are: nobody reads them again. */
static mil_status
take_back(const mil_sequence *sequence, mil_state *state, int64_t length)
{
    bool own = state == &sequence->own_state || state == &sequence->own_draft_state;
    if (state == NULL || state->length <= length || (own && sequence->generation.finish != MIL_RUNNING)) {
        return MIL_OK;
    }
    return mil_state_rollback(state, state->length - length);
}

/* Rejected drafts leave the states; a finished text gets its times. */
static mil_status
close_round(mil_sequence *sequence)
{
    mil_generation *g = &sequence->generation;
    bool only_read = sequence->request.max_new_tokens == 0;
    if (only_read && g->finish == MIL_RUNNING && sequence->state->length >= sequence->count) {
        g->finish = MIL_FINISH_LENGTH;
        sequence->first_token_at = omp_get_wtime();
    }
    if (g->count > 0) {
        /* The last token is one that the model has not read, unless a stop token came after it. */
        int64_t read = g->finish == MIL_FINISH_STOP ? sequence->count : sequence->count - 1;
        MIL_TRY(take_back(sequence, sequence->state, read));
        MIL_TRY(take_back(sequence, sequence->draft_state, read));
    }
    if (g->finish != MIL_RUNNING) {
        double now = omp_get_wtime();
        double first = sequence->first_token_at > 0.0 ? sequence->first_token_at : now;
        g->stats.new_tokens = g->count;
        g->stats.prefill_seconds = sequence->joined_at > 0.0 ? first - sequence->joined_at : 0.0;
        g->stats.decode_seconds = now - first;
    }
    return MIL_OK;
}

/* Room for the tokens of this round, and where speculation stands. */
static mil_status
plan_round(mil_engine *engine)
{
    for (int64_t i = 0; i < engine->running_count; i++) {
        mil_sequence *sequence = engine->running[i];
        sequence->fresh = 0;
        sequence->drafted = 0;
        sequence->wanted = sequence->reading ? sequence->wanted : 0;
        if (sequence->generation.finish != MIL_RUNNING) {
            continue;
        }
        MIL_TRY(mil_sequence_reserve(sequence, MIL_WINDOW + 1));
    }
    mil_speculate_plan(engine);
    return MIL_OK;
}

/* Drafts, one forward pass of all rows, and verdicts. */
static mil_status
run_round(mil_engine *engine, mil_context *context)
{
    MIL_TRY(mil_speculate_draft(engine, context));
    MIL_TRY(pack_round(engine));
    if (engine->pack.count > 0) {
        MIL_TRY(mil_pack_run(engine, context, engine->options.model));
        MIL_TRY(mil_pack_each(engine, context, settle));
    }
    return MIL_OK;
}

mil_status
mil_engine_round(mil_engine *engine, mil_context *context)
{
    MIL_TRY(change_guard(engine));
    struct mil_pack *pack = &engine->pack;
    if (pack->sequences == NULL) {
        size_t most = (size_t)engine->options.max_batch;
        pack->sequences = mil_alloc(most, sizeof *pack->sequences);
        pack->states = mil_alloc(most, sizeof *pack->states);
        pack->held = mil_alloc(most, sizeof *pack->held);
        pack->offsets = mil_alloc(most + 1, sizeof *pack->offsets);
        pack->draw_rows = mil_alloc(most, sizeof *pack->draw_rows);
        pack->draw_positions = mil_alloc(most, sizeof *pack->draw_positions);
        pack->draw_options = mil_alloc(most, sizeof *pack->draw_options);
        pack->drawn = mil_alloc(most, sizeof *pack->drawn);
        pack->bad = mil_alloc(most, sizeof *pack->bad);
        if (pack->sequences == NULL || pack->states == NULL || pack->held == NULL || pack->offsets == NULL ||
            pack->draw_rows == NULL || pack->draw_positions == NULL || pack->draw_options == NULL ||
            pack->drawn == NULL || pack->bad == NULL) {
            return mil_fail(MIL_ERR_MEMORY, "generate: out of memory for a batch of %zu", most);
        }
    }
    MIL_TRY(plan_round(engine));
    int64_t steps = mil_burst_steps(engine), rounds = mil_draft_burst_rounds(engine);
    bool done = false;
    if (steps > 0) {
        MIL_TRY(mil_burst_run(engine, context, steps));
        done = true;
    }
    else if (rounds > 0) {
        MIL_TRY(mil_draft_burst_run(engine, context, rounds, &done));
    }
    if (!done) {
        MIL_TRY(run_round(engine, context));
    }
    for (int64_t i = 0; i < engine->running_count; i++) {
        MIL_TRY(close_round(engine->running[i]));
    }
    return MIL_OK;
}

/* ---- between rounds --------------------------------------------------------------------------------- */

int64_t
mil_engine_pending(const mil_engine *engine)
{
    int64_t pending = engine->waiting_count;
    for (int64_t i = 0; i < engine->running_count; i++) {
        pending += engine->running[i]->generation.finish == MIL_RUNNING;
    }
    return pending;
}

const mil_generation *
mil_engine_look(const mil_engine *engine, int64_t index, int64_t *fresh)
{
    *fresh = engine->running[index]->fresh;
    return &engine->running[index]->generation;
}

mil_status
mil_engine_cut(mil_engine *engine, int64_t index, int64_t keep, mil_finish finish)
{
    mil_sequence *sequence = engine->running[index];
    mil_generation *g = &sequence->generation;
    int64_t dropped = sequence->fresh - (keep < 0 ? 0 : keep > sequence->fresh ? sequence->fresh : keep);
    g->count -= dropped;
    sequence->count -= dropped;
    sequence->fresh -= dropped;
    g->finish = finish;
    /* Each dropped token was in the last pass or came from it, so the pass can give it back. */
    MIL_TRY(take_back(sequence, sequence->state, sequence->count));
    MIL_TRY(take_back(sequence, sequence->draft_state, sequence->count));
    return close_round(sequence);
}

mil_generation
mil_engine_take(mil_engine *engine, int64_t index)
{
    mil_generation taken = engine->running[index]->generation;
    engine->running[index]->generation = (mil_generation){.tag = taken.tag, .finish = taken.finish};
    return taken;
}
