/* Bursts of speculative rounds without the host, where the device can record work (speculate.c has the rule).
 *
 * One recording holds a whole round of all running texts, K drafts each:
 *
 *   draft model   pass 0, 2 rows a text | draw | pass 1, 1 row | draw | ... K passes, or one search of the text (n-grams)
 *   model         one pass, K + 1 rows a text
 *   verdicts      mil_accept, then mil_settle: texts grow, states go back to what was accepted, the next round is set up
 *
 * and is replayed up to MIL_MOST_REPLAYS times before the host looks.  How many drafts a text offers may differ from round
 * to round (its end is near, no n-gram was found, a token is not of the draft's vocabulary); how many are computed may
 * not, so the others are computed and not judged.
 *
 * States move by numbers alone, which the device keeps:
 *
 *   tokens of the text   0 .................... c - 2 | c - 1 |  draft 1 | draft 2 | .. | draft K
 *   draft model          read before               ^^ pass 0: rows c - 2, c - 1;  then drafts 1 .. K - 1, a pass each
 *   model                read before                  ^ one pass: rows c - 1, drafts 1 .. K
 *
 * The draft model reads the token at c - 2 again in most rounds: after a round whose drafts all stood it has not read the
 * last of them, and a recording's passes have the same rows every time.  Its boundary is held after pass 0 (MIL_HOLD), so
 * a round can always be taken back, windows' ends or not.
 *
 * Tokens, seeds and streams of random numbers are those of rounds with the host.  As with plain bursts, a state that the
 * caller lent must end exactly where its text ends: its rounds begin in one window, so that all can be taken back.
 */
#include "decode/recorder.h"

#include <math.h>

/* The recorder's block: what the device moves on, and what it writes down. Offsets in bytes; K = drafts. */
typedef struct round_layout {
    size_t rounds;       /* int64 [1] */
    size_t position;     /* int64 [K, n] */
    size_t end;          /* int64 [n] */
    size_t rows;         /* int64 [3, n + 1] of the model's pass */
    size_t draft_rows;   /* int64 [K, 3, n + 1] of the draft model's passes */
    size_t tokens;       /* int32 [n, K + 1] that the model reads */
    size_t draft_tokens; /* int32 [n, 2] that the draft model's first pass reads */
    size_t wanted;       /* int32 [n] */
    size_t barred;       /* int32 [n] */
    size_t drafted;      /* int32 [n] */
    size_t failed;       /* int32 [n] */
    size_t history;      /* int32 [MIL_MOST_REPLAYS, n, K + 3] */
    size_t bytes;
} round_layout;

/* A draft state's counters when a burst begins. */
typedef struct counters {
    int64_t length, boundary;
} counters;

struct mil_draft_burst {
    mil_recorder recorder;
    round_layout layout;
    mil_state **states, **draft_states; /* [max_batch] */
    counters *before;                   /* [max_batch] of the draft states */
    mil_sample_options *options; /* [max_batch * (MIL_WINDOW + 1)]: of each text, then of each of its rows */
    int64_t *resident;           /* [max_batch] tokens of each text that the device has, for n-grams */
    int32_t *texts;              /* [n, texts_stride] on the device */
    int64_t texts_stride;
    mil_step step, draft_steps[MIL_WINDOW];
    mil_sample sample, draft_samples[MIL_WINDOW];
    mil_propose propose;
    mil_accept accept;
    mil_settle settle;
};

static round_layout
lay_out(int64_t count, int64_t drafts)
{
    size_t n = (size_t)count, k = (size_t)drafts, numbers = 3 * (n + 1) * sizeof(int64_t);
    round_layout l = {0};
    l.position = l.rounds + sizeof(int64_t);
    l.end = l.position + k * n * sizeof(int64_t);
    l.rows = l.end + n * sizeof(int64_t);
    l.draft_rows = l.rows + numbers;
    l.tokens = l.draft_rows + k * numbers;
    l.draft_tokens = l.tokens + n * (k + 1) * sizeof(int32_t);
    l.wanted = l.draft_tokens + 2 * n * sizeof(int32_t);
    l.barred = l.wanted + n * sizeof(int32_t);
    l.drafted = l.barred + n * sizeof(int32_t);
    l.failed = l.drafted + n * sizeof(int32_t);
    l.history = l.failed + n * sizeof(int32_t);
    l.bytes = l.history + MIL_MOST_REPLAYS * n * (k + 3) * sizeof(int32_t);
    return l;
}

void
mil_draft_burst_delete(mil_draft_burst *burst)
{
    if (burst == NULL) {
        return;
    }
    mil_recorder_release(&burst->recorder);
    mil_free(burst->states);
    mil_free(burst->draft_states);
    mil_free(burst->before);
    mil_free(burst->options);
    mil_free(burst->resident);
    mil_free(burst);
}

static int64_t
smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* ---- how many rounds ---------------------------------------------------------------------------------------- */

/* What the engine and its device must be for rounds without the host. */
static bool
is_possible(const mil_engine *engine)
{
    const mil_engine_options *o = &engine->options;
    const mil_ops *ops = o->model->ops;
    return !engine->cramped && ops->record_begin != NULL && ops->sample != NULL && ops->accept != NULL &&
           ops->settle != NULL &&
           (o->draft_kind == MIL_DRAFT_MODEL || (o->draft_kind == MIL_DRAFT_NGRAM && ops->propose != NULL)) &&
           (o->broken_rule == MIL_RULE_RIGHT || o->broken_rule == MIL_RULE_FORCED) &&
           !mil_rope_changes(&o->model->config.rope) &&
           (o->draft == NULL || !mil_rope_changes(&o->draft->config.rope));
}

/* Whether the draft model has read all tokens but the last two, and can go back to there.  A text that it cannot read takes
 * part with passes that nobody looks at, on a draft state that nobody needs any more. */
static bool
is_ready(const mil_engine *engine, const mil_sequence *sequence)
{
    const mil_state *state = sequence->draft_state;
    const mil_engine_options *o = &engine->options;
    if (o->draft == NULL) {
        return true;
    }
    if (state == NULL || sequence->count < 2) {
        return false;
    }
    if (o->draft->config.vocab < o->model->config.vocab && sequence->request.draft_state != NULL) {
        return false; /* what the caller lent must not read stand-ins of tokens that the draft does not know */
    }
    return sequence->undraftable || (state->length >= sequence->count - 2 &&
                                     (state->mixer_bytes == 0 || state->boundary <= sequence->count - 2));
}

/* Drafts that a round has to compute. */
static int64_t
deepest(const mil_engine *engine)
{
    int64_t depth = 0;
    for (int64_t i = 0; i < engine->running_count; i++) {
        int64_t own = engine->running[i]->depth;
        depth = own > depth ? own : depth;
    }
    return depth;
}

int64_t
mil_draft_burst_rounds(const mil_engine *engine)
{
    if (!is_possible(engine) || engine->running_count == 0) {
        return 0;
    }
    int64_t rounds = MIL_MOST_REPLAYS, longest = 0, wanted = 0, drafts = deepest(engine);
    for (int64_t i = 0; i < engine->running_count; i++) {
        const mil_sequence *sequence = engine->running[i];
        const mil_request *request = &sequence->request;
        if (!mil_burst_takes(sequence) || !is_ready(engine, sequence)) {
            return 0;
        }
        wanted += sequence->wanted;
        int64_t left = request->max_new_tokens - sequence->generation.count;
        longest = left > longest ? left : longest;
        /* The first tokens come a round at a time, so that a reader sees them at once. */
        rounds = smaller(rounds, sequence->generation.count);
        if (request->state != NULL || request->draft_state != NULL) {
            int64_t ahead = MIL_WINDOW - 1 - sequence->state->length % MIL_WINDOW;
            rounds = smaller(rounds, 1 + ahead / (drafts + 1));
        }
    }
    if (wanted == 0) {
        return 0;
    }
    int64_t enough = (int64_t)ceil((double)longest / mil_speculate_tokens(engine, drafts));
    return smaller(rounds, enough > 1 ? enough : 1);
}

/* ---- what is recorded --------------------------------------------------------------------------------------- */

/* The draft model's passes and draws; arrays of the rows' distributions for the verdicts. */
static mil_status
prepare_draft_model(const mil_engine *engine, mil_draft_burst *burst)
{
    mil_recorder *recorder = &burst->recorder;
    int64_t n = recorder->count, drafts = recorder->drafts, width = drafts + 1;
    int64_t vocab = engine->options.draft->config.vocab;
    char *at = recorder->device;
    float *logits;
    int32_t *drawn, *bad;
    mil_filter *filter;
    MIL_TRY(MIL_PUSH(&recorder->kept, n * width * vocab, float, &logits));
    MIL_TRY(MIL_PUSH(&recorder->kept, drafts * n, int32_t, &drawn));
    MIL_TRY(MIL_PUSH(&recorder->kept, drafts * n, int32_t, &bad));
    MIL_TRY(MIL_PUSH(&recorder->kept, n * width, mil_filter, &filter));
    for (int64_t j = 0; j < drafts; j++) {
        burst->draft_steps[j] = (mil_step){
            .sequences = n,
            .count = j == 0 ? 2 : 1,
            .states = burst->draft_states,
            .tokens = j == 0 ? (int32_t *)(at + burst->layout.draft_tokens) : drawn + (j - 1) * n,
            .rows = (int64_t *)(at + burst->layout.draft_rows) + j * 3 * (n + 1),
            .last_only = true,
            .logits = logits + j * vocab,
            .logits_stride = width * vocab,
        };
        burst->draft_samples[j] = (mil_sample){
            .rows = n,
            .vocab = smaller(vocab, engine->options.model->config.vocab),
            .logits = logits + j * vocab,
            .logits_stride = width * vocab,
            .position = (int64_t *)(at + burst->layout.position) + j * n,
            .stream = MIL_SAMPLE_DRAFT,
            .token = drawn + j * n,
            .bad = bad + j * n,
            .filter = filter + j,
            .spread = width,
            .placed = (int32_t *)(at + burst->layout.tokens) + j + 1,
        };
    }
    burst->accept.draft_logits = logits;
    burst->accept.draft_logits_stride = vocab;
    burst->accept.draft_vocab = smaller(vocab, engine->options.model->config.vocab);
    burst->accept.draft_filter = filter;
    burst->settle.draft_bad = bad;
    burst->settle.draft_vocab = vocab;
    burst->settle.draft_rows = (int64_t *)(at + burst->layout.draft_rows);
    burst->settle.draft_tokens = (int32_t *)(at + burst->layout.draft_tokens);
    return MIL_OK;
}

/* The texts, for n-grams, as long as they can become before another recording is made. */
static mil_status
prepare_texts(const mil_engine *engine, mil_draft_burst *burst)
{
    mil_recorder *recorder = &burst->recorder;
    int64_t n = recorder->count, longest = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t capacity = engine->running[i]->state->capacity;
        longest = capacity > longest ? capacity : longest;
        burst->resident[i] = 0;
    }
    burst->texts_stride = longest + MIL_WINDOW + 1;
    MIL_TRY(MIL_PUSH(&recorder->kept, n * burst->texts_stride, int32_t, &burst->texts));
    burst->propose = (mil_propose){
        .sequences = n,
        .drafts = recorder->drafts,
        .texts = burst->texts,
        .texts_stride = burst->texts_stride,
        .count = (int64_t *)(recorder->device + burst->layout.position),
        .longest = MIL_NGRAM_LONGEST,
        .shortest = engine->options.broken_rule == MIL_RULE_FORCED ? 0 : MIL_NGRAM_SHORTEST,
        .tokens = (int32_t *)(recorder->device + burst->layout.tokens),
        .drafted = (int32_t *)(recorder->device + burst->layout.drafted),
    };
    burst->settle.texts = burst->texts;
    burst->settle.texts_stride = burst->texts_stride;
    return MIL_OK;
}

/* The model's pass, and what is made of its logits. */
static mil_status
prepare_verdicts(const mil_engine *engine, mil_draft_burst *burst)
{
    mil_recorder *recorder = &burst->recorder;
    const round_layout *l = &burst->layout;
    int64_t n = recorder->count, drafts = recorder->drafts, rows = n * (drafts + 1);
    int64_t vocab = engine->options.model->config.vocab;
    char *at = recorder->device;
    float *logits;
    int32_t *bad, *accepted, *verdict;
    mil_filter *filter;
    MIL_TRY(MIL_PUSH(&recorder->kept, rows * vocab, float, &logits));
    MIL_TRY(MIL_PUSH(&recorder->kept, rows, int32_t, &bad));
    MIL_TRY(MIL_PUSH(&recorder->kept, n, int32_t, &accepted));
    MIL_TRY(MIL_PUSH(&recorder->kept, rows, int32_t, &verdict));
    MIL_TRY(MIL_PUSH(&recorder->kept, rows, mil_filter, &filter));
    burst->step = (mil_step){
        .sequences = n,
        .count = drafts + 1,
        .states = burst->states,
        .tokens = (int32_t *)(at + l->tokens),
        .rows = (int64_t *)(at + l->rows),
        .logits = logits,
    };
    burst->sample = (mil_sample){
        .rows = rows,
        .vocab = vocab,
        .logits = logits,
        .logits_stride = vocab,
        .stream = MIL_SAMPLE_TARGET,
        .bad = bad,
        .filter = filter,
    };
    burst->accept = (mil_accept){
        .sequences = n,
        .vocab = vocab,
        .offsets = (int64_t *)(at + l->rows),
        .logits = logits,
        .logits_stride = vocab,
        .filter = filter,
        .position = (int64_t *)(at + l->position),
        .drafts = (int32_t *)(at + l->tokens) + 1,
        .drafted = (int32_t *)(at + l->drafted),
        .forced = engine->options.broken_rule == MIL_RULE_FORCED ? engine->options.forced_acceptance : 0.0,
        .accepted = accepted,
        .tokens = verdict,
    };
    burst->settle = (mil_settle){
        .sequences = n,
        .drafts = drafts,
        .accepted = accepted,
        .verdict = verdict,
        .bad = bad,
        .draft_vocab = vocab,
        .wanted = (int32_t *)(at + l->wanted),
        .end = (int64_t *)(at + l->end),
        .barred = (int32_t *)(at + l->barred),
        .drafted = (int32_t *)(at + l->drafted),
        .position = (int64_t *)(at + l->position),
        .rows = (int64_t *)(at + l->rows),
        .tokens = (int32_t *)(at + l->tokens),
        .rounds = (int64_t *)(at + l->rounds),
        .history = (int32_t *)(at + l->history),
        .failed = (int32_t *)(at + l->failed),
    };
    return MIL_OK;
}

static mil_status
prepare(const mil_engine *engine, mil_recorder *recorder)
{
    mil_draft_burst *burst = (mil_draft_burst *)recorder;
    int64_t n = recorder->count, width = recorder->drafts + 1;
    burst->layout = lay_out(n, recorder->drafts);
    MIL_TRY(mil_recorder_take(recorder, burst->layout.bytes));
    for (int64_t i = 0; i < n; i++) {
        const mil_sequence *sequence = engine->running[i];
        mil_sample_options options = mil_device_sampling(&sequence->request.sampling);
        burst->states[i] = sequence->state;
        burst->draft_states[i] = sequence->draft_state;
        burst->options[i] = options;
        for (int64_t j = 0; j < width; j++) {
            burst->options[n + i * width + j] = options;
        }
    }
    MIL_TRY(prepare_verdicts(engine, burst));
    return engine->options.draft != NULL ? prepare_draft_model(engine, burst) : prepare_texts(engine, burst);
}

/* The draft states' counters as pass `pass` of the first round finds them: what is run directly may ask for them. */
static void
set_counters(const mil_engine *engine, mil_draft_burst *burst, int64_t pass)
{
    for (int64_t i = 0; i < burst->recorder.count; i++) {
        mil_state *state = burst->draft_states[i];
        int64_t first = engine->running[i]->count - 2;
        state->length = pass == 0 ? first : first + 1 + pass;
        state->boundary = pass == 0 ? burst->before[i].boundary : mil_boundary_after(first, 1) + MIL_HOLD;
    }
}

static mil_status
run_drafts(const mil_engine *engine, mil_draft_burst *burst, mil_context *context, const void *options)
{
    mil_status status = MIL_OK;
    for (int64_t j = 0; j < burst->recorder.drafts && status == MIL_OK; j++) {
        set_counters(engine, burst, j);
        burst->draft_samples[j].options = options;
        status = mil_model_step(context, engine->options.draft, &burst->draft_steps[j]);
        status = status == MIL_OK ? context->ops->sample(context, &burst->draft_samples[j]) : status;
    }
    for (int64_t i = 0; i < burst->recorder.count; i++) {
        burst->draft_states[i]->length = burst->before[i].length;
        burst->draft_states[i]->boundary = burst->before[i].boundary;
    }
    return status;
}

static mil_status
run_round(const mil_engine *engine, mil_recorder *recorder, mil_context *context)
{
    mil_draft_burst *burst = (mil_draft_burst *)recorder;
    const mil_ops *ops = context->ops;
    int64_t n = recorder->count, all = n * (recorder->drafts + 2);
    const void *uploaded;
    MIL_TRY(ops->upload(context, burst->options, (size_t)all * sizeof *burst->options, &uploaded));
    const mil_sample_options *options = uploaded;
    burst->sample.options = options + n;
    burst->accept.options = options;
    if (engine->options.draft != NULL) {
        MIL_TRY(run_drafts(engine, burst, context, options));
    }
    else {
        MIL_TRY(ops->propose(context, &burst->propose));
    }
    MIL_TRY(mil_model_step(context, engine->options.model, &burst->step));
    MIL_TRY(ops->sample(context, &burst->sample));
    MIL_TRY(ops->accept(context, &burst->accept));
    return ops->settle(context, &burst->settle);
}

/* ---- the block -------------------------------------------------------------------------------------------------- */

/* One text's column of the block. */
static void
fill_text(const mil_sequence *sequence, mil_draft_burst *burst, int64_t i)
{
    mil_recorder *recorder = &burst->recorder;
    const round_layout *l = &burst->layout;
    char *at = recorder->image;
    int64_t n = recorder->count, drafts = recorder->drafts, columns = n + 1, count = sequence->count;
    int64_t *position = (int64_t *)(at + l->position), *rows = (int64_t *)(at + l->rows),
            *end = (int64_t *)(at + l->end);
    const int32_t *text = sequence->generation.tokens;
    rows[i] = i * (drafts + 1);
    rows[columns + i] = sequence->state->length;
    rows[2 * columns + i] = sequence->state->boundary;
    end[i] = sequence->generation.prompt_count + sequence->request.max_new_tokens;
    for (int64_t j = 0; j < drafts; j++) {
        position[j * n + i] = count + j;
    }
    int64_t left = end[i] - count - 1, allowed = smaller(smaller(sequence->depth, drafts), left);
    ((int32_t *)(at + l->wanted))[i] = (int32_t)sequence->depth;
    ((int32_t *)(at + l->drafted))[i] = (int32_t)(allowed > 0 ? allowed : 0);
    ((int32_t *)(at + l->tokens))[i * (drafts + 1)] = text[count - 1];
    if (burst->settle.draft_rows == NULL) {
        return;
    }
    int64_t folded = mil_boundary_after(count - 2, 1), known = burst->settle.draft_vocab - 1;
    burst->before[i] = (counters){sequence->draft_state->length, sequence->draft_state->boundary};
    if (sequence->undraftable) {
        ((int32_t *)(at + l->barred))[i] = 1;
        burst->before[i] = (counters){count - 2, folded};
    }
    for (int64_t j = 0; j < drafts; j++) {
        int64_t *draft_rows = (int64_t *)(at + l->draft_rows) + j * 3 * columns;
        draft_rows[i] = j == 0 ? 2 * i : i;
        draft_rows[columns + i] = j == 0 ? count - 2 : count + j - 1;
        draft_rows[2 * columns + i] = j == 0 ? burst->before[i].boundary : folded + MIL_HOLD;
    }
    ((int32_t *)(at + l->draft_tokens))[2 * i] = (int32_t)smaller(text[count - 2], known);
    ((int32_t *)(at + l->draft_tokens))[2 * i + 1] = (int32_t)smaller(text[count - 1], known);
}

static mil_status
fill_image(const mil_engine *engine, mil_recorder *recorder, mil_context *context)
{
    mil_draft_burst *burst = (mil_draft_burst *)recorder;
    int64_t n = recorder->count, drafts = recorder->drafts;
    for (int64_t i = 0; i < n; i++) {
        const mil_sequence *sequence = engine->running[i];
        fill_text(sequence, burst, i);
        if (burst->settle.texts != NULL && burst->resident[i] != sequence->count) {
            MIL_TRY(context->ops->copy(context, burst->texts + i * burst->texts_stride,
                                       sequence->generation.tokens,
                                       (size_t)sequence->count * sizeof *burst->texts));
            burst->resident[i] = sequence->count;
        }
    }
    ((int64_t *)(recorder->image + burst->layout.rows))[n] = n * (drafts + 1);
    for (int64_t j = 0; j < drafts; j++) {
        int64_t *draft_rows = (int64_t *)(recorder->image + burst->layout.draft_rows) + j * 3 * (n + 1);
        draft_rows[n] = j == 0 ? 2 * n : n;
    }
    return MIL_OK;
}

/* One round of one text. */
static void
read_round(mil_engine *engine, mil_sequence *sequence, const int32_t *history)
{
    int32_t drafted = history[0], stood = history[1], accepted = 0;
    bool rejected = false;
    sequence->generation.stats.rounds++;
    for (int32_t j = 0; j <= stood && sequence->generation.finish == MIL_RUNNING; j++) {
        accepted += j < stood;
        rejected = j == stood && stood < drafted;
        mil_sequence_add(engine, sequence, history[2 + j], NULL);
    }
    mil_speculate_remember(sequence, drafted, accepted, rejected);
}

/* What was accepted enters the texts; the states' counters follow the device's. */
static mil_status
read_back(mil_engine *engine, mil_recorder *recorder, int64_t rounds)
{
    mil_draft_burst *burst = (mil_draft_burst *)recorder;
    const int32_t *history = (const int32_t *)(recorder->image + burst->layout.history);
    const int32_t *failed = (const int32_t *)(recorder->image + burst->layout.failed);
    int64_t n = recorder->count, drafts = recorder->drafts;
    for (int64_t i = 0; i < n; i++) {
        mil_sequence *sequence = engine->running[i];
        mil_state *state = sequence->state, *draft_state = burst->draft_states[i];
        int64_t count = sequence->count;
        if (failed[i] != 0) {
            return mil_sequence_not_finite(sequence);
        }
        for (int64_t round = 0; round < rounds; round++) {
            const int32_t *at = history + (round * n + i) * (drafts + 3);
            state->boundary = mil_boundary_after(count - 1, 1);
            if (draft_state != NULL) {
                draft_state->boundary = mil_boundary_after(count - 2, 1);
                draft_state->length = smaller(count + drafts - 1, count + at[1]);
            }
            count += at[1] + 1;
            state->length = count - 1;
            if (sequence->generation.finish == MIL_RUNNING) {
                read_round(engine, sequence, at);
            }
        }
        burst->resident[i] = count;
    }
    return MIL_OK;
}

/* ---- a burst ---------------------------------------------------------------------------------------------------- */

static const mil_recorded_work rounds_work = {prepare, fill_image, run_round, read_back};

static mil_status
burst_new(const mil_engine *engine, const mil_context *context, mil_draft_burst **out)
{
    size_t most = (size_t)engine->options.max_batch;
    mil_draft_burst *burst = mil_alloc(1, sizeof *burst);
    if (burst == NULL) {
        return mil_fail(MIL_ERR_MEMORY, "generate: out of memory for a burst");
    }
    *burst = (mil_draft_burst){0};
    burst->states = mil_alloc(most, sizeof(mil_state *));
    burst->draft_states = mil_alloc(most, sizeof(mil_state *));
    burst->before = mil_alloc(most, sizeof *burst->before);
    burst->options = mil_alloc(most * (MIL_WINDOW + 1), sizeof *burst->options);
    burst->resident = mil_alloc(most, sizeof *burst->resident);
    bool lacking = burst->states == NULL || burst->draft_states == NULL || burst->before == NULL ||
                   burst->options == NULL || burst->resident == NULL;
    mil_status status =
        lacking ? mil_fail(MIL_ERR_MEMORY, "generate: out of memory for a burst of %zu texts", most)
                : mil_recorder_init(&burst->recorder, engine, context, &rounds_work);
    if (status != MIL_OK) {
        mil_draft_burst_delete(burst);
        return status;
    }
    *out = burst;
    return MIL_OK;
}

mil_status
mil_draft_burst_run(mil_engine *engine, mil_context *context, int64_t rounds, bool *done)
{
    int64_t drafts = deepest(engine);
    *done = false;
    if (engine->draft_burst == NULL) {
        MIL_TRY(burst_new(engine, context, &engine->draft_burst));
    }
    for (int64_t i = 0; i < engine->running_count; i++) {
        mil_sequence *sequence = engine->running[i];
        /* Rows that the last round may read; beyond its end a text gets one token a round. */
        int64_t end = sequence->generation.prompt_count + sequence->request.max_new_tokens;
        int64_t most = smaller(sequence->count + rounds * (drafts + 1), end + rounds + drafts);
        MIL_TRY(mil_sequence_reserve(sequence, rounds * (drafts + 1) + 1));
        MIL_TRY(mil_state_reserve(sequence->state, most));
        if (sequence->draft_state != NULL) {
            MIL_TRY(mil_state_reserve(sequence->draft_state, most));
        }
    }
    mil_recorder *recorder = &engine->draft_burst->recorder;
    mil_status status = mil_recorder_run(recorder, engine, context, drafts, rounds);
    if (status == MIL_ERR_MEMORY && !recorder->prepared) {
        mil_draft_burst_delete(engine->draft_burst);
        engine->draft_burst = NULL;
        engine->cramped = true;
        return MIL_OK;
    }
    *done = true;
    return status;
}
