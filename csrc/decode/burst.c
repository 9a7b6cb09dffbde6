/* Bursts: several plain decoding steps of all running texts without the host, where the device can record work.
 *
 * A step (one row a text, sampling included) is recorded once for a given set of texts and replayed: the token that
 * was drawn, positions and window boundaries stay on the device.  After a burst the host reads the drawn tokens, ends
 * the texts whose stop token came, and forgets what was drawn after it.
 *
 *   device   step | step | step | step |            one recording, replayed
 *   host                                 read 4 tokens a text, stop tokens, callbacks
 *
 * The logits and draws of a text are those of single rounds, so a burst changes times and nothing else.  A state
 * that the caller lent must end exactly where its text ends; its bursts stop at the end of a window, up to where
 * everything can be taken back (device.h: the tail).  Other states are thrown away with their text.
 */
#include <string.h>

#include "decode/sequence.h"

#define MOST_STEPS MIL_WINDOW
#define RECORD_AFTER 2 /* bursts of one step with the same texts before it is worth recording */

/* What a recording depends on, for each text. */
typedef struct burst_key {
    int64_t serial, capacity;
} burst_key;

/* Numbers that the device reads and moves on, in one block so that one copy sets them all. */
typedef struct burst_layout {
    size_t steps, position, rows, tokens, failed, history, bytes; /* offsets in bytes */
} burst_layout;

struct mil_burst {
    const mil_ops *ops;
    mil_allocator allocator;
    mil_arena scratch, kept, host; /* of the recorded step */
    void *recording;
    burst_key *key; /* [max_batch] */
    int64_t count;  /* texts of the key */
    int64_t repeats;
    burst_layout layout;
    char *device; /* [layout.bytes] */
    char *image;  /* the same in host memory */
    mil_step step;
    mil_state **states;          /* [max_batch] */
    mil_sample_options *options; /* [max_batch] */
    mil_sample sample;
    mil_advance advance;
};

static burst_layout
lay_out(int64_t count)
{
    size_t n = (size_t)count;
    burst_layout l = {0};
    l.steps = 0;
    l.position = l.steps + sizeof(int64_t);
    l.rows = l.position + n * sizeof(int64_t);
    l.tokens = l.rows + 3 * (n + 1) * sizeof(int64_t);
    l.failed = l.tokens + n * sizeof(int32_t);
    l.history = l.failed + n * sizeof(int32_t);
    l.bytes = l.history + MOST_STEPS * n * sizeof(int32_t);
    return l;
}

/* Forgets the recording; memory stays. */
static void
forget(mil_burst *burst)
{
    mil_context context = {.ops = burst->ops};
    if (burst->recording != NULL) {
        burst->ops->record_free(&context, burst->recording);
        burst->recording = NULL;
    }
    mil_arena_rewind(&burst->kept, (mil_arena_mark){0});
    burst->device = NULL;
}

void
mil_burst_delete(mil_burst *burst)
{
    if (burst == NULL) {
        return;
    }
    forget(burst);
    mil_arena_release(&burst->scratch);
    mil_arena_release(&burst->kept);
    mil_arena_release(&burst->host);
    mil_free(burst->key);
    mil_free(burst->states);
    mil_free(burst->options);
    mil_free(burst->image);
    mil_free(burst);
}

static mil_status
burst_new(const mil_engine *engine, const mil_context *context, mil_burst **out)
{
    size_t most = (size_t)engine->options.max_batch;
    mil_burst *burst = mil_alloc(1, sizeof *burst);
    if (burst == NULL) {
        return mil_fail(MIL_ERR_MEMORY, "generate: out of memory for a burst");
    }
    *burst = (mil_burst){.ops = context->ops};
    if (context->scratch->allocator != NULL) {
        burst->allocator = *context->scratch->allocator;
        burst->scratch.allocator = burst->kept.allocator = &burst->allocator;
    }
    burst->key = mil_alloc(most, sizeof *burst->key);
    burst->states = mil_alloc(most, sizeof(mil_state *));
    burst->options = mil_alloc(most, sizeof *burst->options);
    burst->image = mil_alloc(1, lay_out(engine->options.max_batch).bytes);
    if (burst->key == NULL || burst->states == NULL || burst->options == NULL || burst->image == NULL) {
        mil_burst_delete(burst);
        return mil_fail(MIL_ERR_MEMORY, "generate: out of memory for a burst of %zu texts", most);
    }
    *out = burst;
    return MIL_OK;
}

/* ---- how many steps --------------------------------------------------------------------------------------- */

static bool
is_plain(const mil_sequence *sequence)
{
    const mil_request *request = &sequence->request;
    return sequence->generation.finish == MIL_RUNNING && sequence->generation.count > 0 &&
           sequence->wanted == 0 && !request->logprobs && request->sampling.repetition_penalty == 1.0f &&
           sequence->count - sequence->state->length == 1;
}

static int64_t
smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

int64_t
mil_burst_steps(const mil_engine *engine)
{
    const mil_model *model = engine->options.model;
    if (model->ops->record_begin == NULL || model->ops->sample == NULL || engine->running_count == 0 ||
        mil_rope_changes(&model->config.rope)) {
        return 0;
    }
    int64_t steps = MOST_STEPS, longest = 0;
    for (int64_t i = 0; i < engine->running_count; i++) {
        const mil_sequence *sequence = engine->running[i];
        if (!is_plain(sequence)) {
            return 0;
        }
        int64_t left = sequence->request.max_new_tokens - sequence->generation.count;
        longest = left > longest ? left : longest;
        /* The first tokens come one by one, so that a reader sees them at once. */
        steps = smaller(steps, sequence->generation.count);
        if (sequence->request.state != NULL) {
            steps = smaller(steps, smaller(left, MIL_WINDOW - sequence->state->length % MIL_WINDOW));
        }
        if (engine->options.draft_kind != MIL_DRAFT_NONE) {
            steps = 1; /* the next round may be worth a draft */
        }
    }
    return smaller(steps, longest);
}

/* ---- the recording ------------------------------------------------------------------------------------------ */

/* Whether the key is that of the running texts; makes it so. */
static bool
matches(const mil_engine *engine, mil_burst *burst)
{
    bool same = burst->count == engine->running_count;
    for (int64_t i = 0; i < engine->running_count; i++) {
        const mil_sequence *sequence = engine->running[i];
        burst_key key = {.serial = sequence->serial, .capacity = sequence->state->capacity};
        same = same && burst->key[i].serial == key.serial && burst->key[i].capacity == key.capacity;
        burst->key[i] = key;
    }
    burst->count = engine->running_count;
    return same;
}

static mil_status
take_memory(const mil_engine *engine, mil_burst *burst)
{
    int64_t n = burst->count, vocab = engine->options.model->config.vocab;
    int32_t *drawn, *bad;
    float *logits;
    burst->layout = lay_out(n);
    MIL_TRY(MIL_PUSH(&burst->kept, burst->layout.bytes, char, &burst->device));
    MIL_TRY(MIL_PUSH(&burst->kept, n, int32_t, &drawn));
    MIL_TRY(MIL_PUSH(&burst->kept, n, int32_t, &bad));
    MIL_TRY(MIL_PUSH(&burst->kept, n * vocab, float, &logits));
    for (int64_t i = 0; i < n; i++) {
        const mil_sampling *sampling = &engine->running[i]->request.sampling;
        burst->states[i] = engine->running[i]->state;
        burst->options[i] = (mil_sample_options){
            .temperature = sampling->temperature,
            .top_p = sampling->top_p,
            .min_p = sampling->min_p,
            .top_k = sampling->top_k,
            .seed = sampling->seed,
        };
    }
    char *at = burst->device;
    burst->step = (mil_step){
        .sequences = n,
        .states = burst->states,
        .tokens = (int32_t *)(at + burst->layout.tokens),
        .rows = (int64_t *)(at + burst->layout.rows),
        .logits = logits,
    };
    burst->sample = (mil_sample){
        .rows = n,
        .vocab = vocab,
        .logits = logits,
        .logits_stride = vocab,
        .position = (int64_t *)(at + burst->layout.position),
        .stream = MIL_SAMPLE_TARGET,
        .token = drawn,
        .bad = bad,
    };
    burst->advance = (mil_advance){
        .sequences = n,
        .drawn = drawn,
        .bad = bad,
        .tokens = (int32_t *)(at + burst->layout.tokens),
        .rows = (int64_t *)(at + burst->layout.rows),
        .position = (int64_t *)(at + burst->layout.position),
        .steps = (int64_t *)(at + burst->layout.steps),
        .history = (int32_t *)(at + burst->layout.history),
        .failed = (int32_t *)(at + burst->layout.failed),
    };
    return MIL_OK;
}

/* One step: what is run directly and what is recorded. */
static mil_status
run_step(const mil_engine *engine, mil_burst *burst, mil_context *context)
{
    const mil_ops *ops = context->ops;
    const void *options;
    MIL_TRY(ops->upload(context, burst->options, (size_t)burst->count * sizeof *burst->options, &options));
    burst->sample.options = options;
    MIL_TRY(mil_model_step(context, engine->options.model, &burst->step));
    MIL_TRY(ops->sample(context, &burst->sample));
    return ops->advance(context, &burst->advance);
}

/* Records the step, whose memory the direct runs before have made. */
static mil_status
record(const mil_engine *engine, mil_burst *burst, mil_context *context)
{
    void *recording = NULL;
    MIL_TRY(context->ops->finish(context));
    MIL_TRY(context->ops->record_begin(context));
    mil_status status = run_step(engine, burst, context);
    mil_status ended = context->ops->record_end(context, &recording);
    if (status != MIL_OK || ended != MIL_OK) {
        context->ops->record_free(context, recording);
        return status != MIL_OK ? status : ended;
    }
    burst->recording = recording;
    return MIL_OK;
}

/* ---- a burst ------------------------------------------------------------------------------------------------- */

static void
fill_image(const mil_engine *engine, mil_burst *burst)
{
    char *at = burst->image;
    int64_t columns = burst->count + 1;
    memset(at, 0, burst->layout.bytes);
    int64_t *position = (int64_t *)(at + burst->layout.position),
            *rows = (int64_t *)(at + burst->layout.rows);
    int32_t *tokens = (int32_t *)(at + burst->layout.tokens);
    for (int64_t i = 0; i < burst->count; i++) {
        const mil_sequence *sequence = engine->running[i];
        position[i] = sequence->count;
        rows[i] = i;
        rows[columns + i] = sequence->state->length;
        rows[2 * columns + i] = sequence->state->boundary;
        tokens[i] = sequence->generation.tokens[sequence->count - 1];
    }
    rows[burst->count] = burst->count;
}

/* The drawn tokens enter the texts; the states' counters follow the device's. */
static mil_status
read_back(const mil_engine *engine, mil_burst *burst, int64_t steps)
{
    const int32_t *history = (const int32_t *)(burst->image + burst->layout.history);
    const int32_t *failed = (const int32_t *)(burst->image + burst->layout.failed);
    int64_t vocab = engine->options.model->config.vocab;
    for (int64_t i = 0; i < burst->count; i++) {
        mil_sequence *sequence = engine->running[i];
        mil_state *state = sequence->state;
        if (failed[i] != 0) {
            return mil_fail(MIL_ERR_NONFINITE,
                            "generate: the model's logits are not finite after %lld tokens",
                            (long long)sequence->count);
        }
        for (int64_t step = 0; step < steps; step++) {
            state->boundary = mil_boundary_after(state->length, 1);
            state->length++;
            if (sequence->generation.finish == MIL_RUNNING) {
                sequence->generation.stats.rounds++;
                mil_sequence_add(sequence, vocab, history[step * burst->count + i], NULL);
            }
        }
    }
    return MIL_OK;
}

static mil_status
run_steps(mil_engine *engine, mil_burst *burst, mil_context *context, int64_t steps)
{
    bool same = matches(engine, burst);
    if (!same) {
        forget(burst);
        burst->repeats = 0;
    }
    if (burst->device == NULL) {
        MIL_TRY(take_memory(engine, burst));
    }
    fill_image(engine, burst);
    MIL_TRY(context->ops->copy(context, burst->device, burst->image, burst->layout.bytes));
    int64_t done = 0;
    if (burst->recording == NULL) {
        mil_arena_mark kept = mil_arena_get_mark(&burst->kept);
        MIL_TRY(run_step(engine, burst, context));
        MIL_TRY(context->ops->finish(context));
        mil_arena_rewind(&burst->kept, kept);
        done = 1;
        if (steps > 1 || ++burst->repeats > RECORD_AFTER) {
            MIL_TRY(record(engine, burst, context));
        }
    }
    for (; done < steps; done++) {
        MIL_TRY(context->ops->replay(context, burst->recording));
    }
    MIL_TRY(context->ops->copy(context, burst->image, burst->device, burst->layout.bytes));
    return read_back(engine, burst, steps);
}

mil_status
mil_burst_run(mil_engine *engine, mil_context *context, int64_t steps)
{
    if (engine->burst == NULL) {
        MIL_TRY(burst_new(engine, context, &engine->burst));
    }
    for (int64_t i = 0; i < engine->running_count; i++) {
        mil_state *state = engine->running[i]->state;
        MIL_TRY(mil_state_reserve(state, state->length + steps));
    }
    mil_burst *burst = engine->burst;
    mil_context inner = {
        .ops = context->ops,
        .scratch = &burst->scratch,
        .host = &burst->host,
        .kept = &burst->kept,
        .threads = context->threads,
        .stream = context->stream,
    };
    return run_steps(engine, burst, &inner, steps);
}
