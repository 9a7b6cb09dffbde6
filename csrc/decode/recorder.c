/* Recorded work (see recorder.h): memory, when to record, and the way of the block to the device and back. */
#include "decode/recorder.h"

#include <string.h>

#define RECORD_AFTER 2 /* bursts of one run with the same texts before it is worth recording */

static void
forget(mil_recorder *recorder)
{
    mil_context context = {.ops = recorder->ops};
    recorder->ops->record_free(&context, recorder->recording);
    recorder->recording = NULL;
}

/* For other texts; memory stays, and the recording is kept to be made over. */
static void
begin_anew(mil_recorder *recorder)
{
    mil_arena_rewind(&recorder->kept, (mil_arena_mark){0});
    recorder->prepared = recorder->recorded = false;
    recorder->repeats = 0;
}

void
mil_recorder_release(mil_recorder *recorder)
{
    if (recorder->ops == NULL) {
        return;
    }
    forget(recorder);
    mil_arena_release(&recorder->scratch);
    mil_arena_release(&recorder->kept);
    mil_arena_release(&recorder->host);
    mil_free(recorder->key);
    mil_free(recorder->image);
    *recorder = (mil_recorder){0};
}

mil_status
mil_recorder_init(mil_recorder *recorder, const mil_engine *engine, const mil_context *context,
                  const mil_recorded_work *work)
{
    *recorder = (mil_recorder){.ops = context->ops, .work = work};
    if (context->scratch->allocator != NULL) {
        recorder->allocator = *context->scratch->allocator;
        recorder->scratch.allocator = recorder->kept.allocator = &recorder->allocator;
    }
    recorder->key = mil_alloc((size_t)engine->options.max_batch, sizeof *recorder->key);
    if (recorder->key == NULL) {
        mil_recorder_release(recorder);
        return mil_fail(MIL_ERR_MEMORY, "generate: out of memory for a burst of %lld texts",
                        (long long)engine->options.max_batch);
    }
    return MIL_OK;
}

mil_status
mil_recorder_take(mil_recorder *recorder, size_t bytes)
{
    MIL_TRY(MIL_PUSH(&recorder->kept, bytes, char, &recorder->device));
    recorder->bytes = bytes;
    if (bytes > recorder->room) {
        mil_free(recorder->image);
        recorder->room = 0;
        recorder->image = mil_alloc(bytes, 1);
        if (recorder->image == NULL) {
            return mil_fail(MIL_ERR_MEMORY, "generate: out of memory for a burst of %zu bytes", bytes);
        }
        recorder->room = bytes;
    }
    return MIL_OK;
}

/* Whether the key is that of the running texts; makes it so. */
static bool
matches(const mil_engine *engine, mil_recorder *recorder, int64_t drafts)
{
    bool same = recorder->count == engine->running_count && recorder->drafts == drafts;
    for (int64_t i = 0; i < engine->running_count; i++) {
        const mil_sequence *sequence = engine->running[i];
        mil_record_key key = {
            .serial = sequence->serial,
            .capacity = sequence->state->capacity,
            .draft_capacity = sequence->draft_state != NULL ? sequence->draft_state->capacity : 0,
        };
        const mil_record_key *old = &recorder->key[i];
        same = same && old->serial == key.serial && old->capacity == key.capacity &&
               old->draft_capacity == key.draft_capacity;
        recorder->key[i] = key;
    }
    recorder->count = engine->running_count;
    recorder->drafts = drafts;
    return same;
}

/* Records the work, whose memory a direct run has made. The device is still busy with that run, and with a large model for
 * longer than this takes.  Only a recording of as many texts is made over: steps of one made over for a text less took
 * 1.4 % longer than those of one made anew (8B on an H200; why is not known). */
static mil_status
record(const mil_engine *engine, mil_recorder *recorder, mil_context *context)
{
    if (recorder->recorded_count != recorder->count || recorder->recorded_drafts != recorder->drafts) {
        forget(recorder);
    }
    recorder->recorded_count = recorder->count;
    recorder->recorded_drafts = recorder->drafts;
    MIL_TRY(context->ops->record_begin(context));
    mil_status status = recorder->work->run(engine, recorder, context);
    mil_status ended = context->ops->record_end(context, &recorder->recording);
    recorder->recorded = status == MIL_OK && ended == MIL_OK;
    return status != MIL_OK ? status : ended;
}

static mil_status
run_times(mil_recorder *recorder, mil_engine *engine, mil_context *context, int64_t times)
{
    if (!recorder->prepared) {
        MIL_TRY(recorder->work->prepare(engine, recorder));
        recorder->prepared = true;
    }
    memset(recorder->image, 0, recorder->bytes);
    MIL_TRY(recorder->work->fill(engine, recorder, context));
    MIL_TRY(context->ops->copy(context, recorder->device, recorder->image, recorder->bytes));
    int64_t done = 0;
    if (!recorder->recorded) {
        mil_arena_mark kept = mil_arena_get_mark(&recorder->kept);
        MIL_TRY(recorder->work->run(engine, recorder, context));
        mil_arena_rewind(&recorder->kept, kept); /* a recording uploads the same bytes there again */
        done = 1;
        if (times > 1 || ++recorder->repeats > RECORD_AFTER) {
            MIL_TRY(record(engine, recorder, context));
        }
    }
    for (; done < times; done++) {
        MIL_TRY(context->ops->replay(context, recorder->recording));
    }
    MIL_TRY(context->ops->copy(context, recorder->image, recorder->device, recorder->bytes));
    return recorder->work->read(engine, recorder, times);
}

mil_status
mil_recorder_run(mil_recorder *recorder, mil_engine *engine, mil_context *context, int64_t drafts,
                 int64_t times)
{
    if (!matches(engine, recorder, drafts)) {
        begin_anew(recorder);
    }
    mil_context inner = {
        .ops = context->ops,
        .scratch = &recorder->scratch,
        .host = &recorder->host,
        .kept = &recorder->kept,
        .threads = context->threads,
        .stream = context->stream,
    };
    return run_times(recorder, engine, &inner, times);
}
