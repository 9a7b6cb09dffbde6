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
#include "decode/recorder.h"

/* Numbers that the device reads and moves on: the recorder's block. */
typedef struct burst_layout {
    size_t steps, position, rows, tokens, failed, history, bytes; /* offsets in bytes */
} burst_layout;

struct mil_burst {
    mil_recorder recorder;
    burst_layout layout;
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
    l.bytes = l.history + MIL_MOST_REPLAYS * n * sizeof(int32_t);
    return l;
}

void
mil_burst_delete(mil_burst *burst)
{
    if (burst == NULL) {
        return;
    }
    mil_recorder_release(&burst->recorder);
    mil_free(burst->states);
    mil_free(burst->options);
    mil_free(burst);
}

/* ---- how many steps --------------------------------------------------------------------------------------- */

bool
mil_burst_takes(const mil_sequence *sequence)
{
    return sequence->generation.finish == MIL_RUNNING && sequence->generation.count > 0 &&
           mil_sequence_draws_alone(sequence) && sequence->count - sequence->state->length == 1;
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
    int64_t steps = mil_speculate_quiet_steps(engine), longest = 0;
    for (int64_t i = 0; i < engine->running_count; i++) {
        const mil_sequence *sequence = engine->running[i];
        if (!mil_burst_takes(sequence) || sequence->wanted > 0) {
            return 0;
        }
        int64_t left = sequence->request.max_new_tokens - sequence->generation.count;
        longest = left > longest ? left : longest;
        /* The first tokens come one by one, so that a reader sees them at once. */
        steps = smaller(steps, sequence->generation.count);
        if (sequence->request.state != NULL) {
            steps = smaller(steps, smaller(left, MIL_WINDOW - sequence->state->length % MIL_WINDOW));
        }
    }
    return smaller(steps, longest);
}

/* ---- what is recorded --------------------------------------------------------------------------------------- */

static mil_status
prepare(const mil_engine *engine, mil_recorder *recorder)
{
    mil_burst *burst = (mil_burst *)recorder;
    int64_t n = recorder->count, vocab = engine->options.model->config.vocab;
    int32_t *drawn, *bad;
    float *logits;
    burst->layout = lay_out(n);
    MIL_TRY(mil_recorder_take(recorder, burst->layout.bytes));
    MIL_TRY(MIL_PUSH(&recorder->kept, n, int32_t, &drawn));
    MIL_TRY(MIL_PUSH(&recorder->kept, n, int32_t, &bad));
    MIL_TRY(MIL_PUSH(&recorder->kept, n * vocab, float, &logits));
    for (int64_t i = 0; i < n; i++) {
        burst->states[i] = engine->running[i]->state;
        burst->options[i] = mil_device_sampling(&engine->running[i]->request.sampling);
    }
    char *at = recorder->device;
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

static mil_status
run_step(const mil_engine *engine, mil_recorder *recorder, mil_context *context)
{
    mil_burst *burst = (mil_burst *)recorder;
    const mil_ops *ops = context->ops;
    const void *options;
    MIL_TRY(ops->upload(context, burst->options, (size_t)recorder->count * sizeof *burst->options, &options));
    burst->sample.options = options;
    MIL_TRY(mil_model_step(context, engine->options.model, &burst->step));
    MIL_TRY(ops->sample(context, &burst->sample));
    return ops->advance(context, &burst->advance);
}

static mil_status
fill_image(const mil_engine *engine, mil_recorder *recorder, mil_context *context)
{
    (void)context;
    const mil_burst *burst = (mil_burst *)recorder;
    char *at = recorder->image;
    int64_t count = recorder->count, columns = count + 1;
    int64_t *position = (int64_t *)(at + burst->layout.position),
            *rows = (int64_t *)(at + burst->layout.rows);
    int32_t *tokens = (int32_t *)(at + burst->layout.tokens);
    for (int64_t i = 0; i < count; i++) {
        const mil_sequence *sequence = engine->running[i];
        position[i] = sequence->count;
        rows[i] = i;
        rows[columns + i] = sequence->state->length;
        rows[2 * columns + i] = sequence->state->boundary;
        tokens[i] = sequence->generation.tokens[sequence->count - 1];
    }
    rows[count] = count;
    return MIL_OK;
}

/* The drawn tokens enter the texts; the states' counters follow the device's. */
static mil_status
read_back(mil_engine *engine, mil_recorder *recorder, int64_t steps)
{
    const mil_burst *burst = (mil_burst *)recorder;
    const int32_t *history = (const int32_t *)(recorder->image + burst->layout.history);
    const int32_t *failed = (const int32_t *)(recorder->image + burst->layout.failed);
    for (int64_t i = 0; i < recorder->count; i++) {
        mil_sequence *sequence = engine->running[i];
        mil_state *state = sequence->state;
        if (failed[i] != 0) {
            return mil_sequence_not_finite(sequence);
        }
        for (int64_t step = 0; step < steps; step++) {
            state->boundary = mil_boundary_after(state->length, 1);
            state->length++;
            if (sequence->generation.finish == MIL_RUNNING) {
                sequence->generation.stats.rounds++;
                mil_sequence_add(engine, sequence, history[step * recorder->count + i], NULL);
            }
        }
    }
    return MIL_OK;
}

/* ---- a burst ------------------------------------------------------------------------------------------------- */

static const mil_recorded_work steps_work = {prepare, fill_image, run_step, read_back};

static mil_status
burst_new(const mil_engine *engine, const mil_context *context, mil_burst **out)
{
    size_t most = (size_t)engine->options.max_batch;
    mil_burst *burst = mil_alloc(1, sizeof *burst);
    if (burst == NULL) {
        return mil_fail(MIL_ERR_MEMORY, "generate: out of memory for a burst");
    }
    *burst = (mil_burst){0};
    burst->states = mil_alloc(most, sizeof(mil_state *));
    burst->options = mil_alloc(most, sizeof *burst->options);
    mil_status status =
        burst->states == NULL || burst->options == NULL
            ? mil_fail(MIL_ERR_MEMORY, "generate: out of memory for a burst of %zu texts", most)
            : mil_recorder_init(&burst->recorder, engine, context, &steps_work);
    if (status != MIL_OK) {
        mil_burst_delete(burst);
        return status;
    }
    *out = burst;
    return MIL_OK;
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
    engine->quiet += steps;
    return mil_recorder_run(&engine->burst->recorder, engine, context, 0, steps);
}
