/* Bursts of recorded steps, on a table that plays a device with recordings: the tokens, the ends and the states are those of
 * single rounds.
 *
 * The played device computes with the CPU's operators.  While recording its operators do nothing; a replay runs the step
 * with the numbers that "the device" holds, which are the block that burst.c uploaded and mil_advance moves on.
 */
#include "harness.h"

#include <string.h>

#include "decode/sequence.h"
#include "small_model.h"

enum { TEXTS = 4, NEW_TOKENS = 45 };

/* ---- the played device ---------------------------------------------------------------------------------------- */

static struct {
    bool recording;
    mil_engine *engine;
    mil_sample sample;
    mil_advance advance;
    int64_t recordings, replays, freed;
    int64_t bad_after; /* replays until a logit is said not to be finite; -1: never */
} played;

#define UNLESS_RECORDING(name, type)                                             \
    static mil_status played_##name(mil_context *context, const type *arguments) \
    {                                                                            \
        return played.recording ? MIL_OK : mil_cpu_ops.name(context, arguments); \
    }

UNLESS_RECORDING(norm_forward, mil_norm)
UNLESS_RECORDING(rope_table, mil_rope_table)
UNLESS_RECORDING(rope, mil_rope)
UNLESS_RECORDING(attention_forward, mil_attention)
UNLESS_RECORDING(kv_append, mil_kv_append)
UNLESS_RECORDING(conv1d_forward, mil_conv1d)
UNLESS_RECORDING(ssd_forward, mil_ssd)
UNLESS_RECORDING(glu_forward, mil_glu)
UNLESS_RECORDING(embedding_forward, mil_embedding)

static mil_status
played_linear(mil_context *context, const mil_linear *products, int64_t count)
{
    return played.recording ? MIL_OK : mil_cpu_ops.linear_forward(context, products, count);
}

static mil_status
played_sample(mil_context *context, const mil_sample *arguments)
{
    (void)context;
    played.sample = *arguments;
    for (int64_t i = 0; i < arguments->rows && !played.recording; i++) {
        const float *logits = arguments->logits + i * arguments->logits_stride;
        int32_t best = 0;
        for (int32_t token = 1; token < arguments->vocab; token++) {
            best = logits[token] > logits[best] ? token : best;
        }
        arguments->token[i] = best;
        arguments->bad[i] = played.bad_after == 0;
    }
    return MIL_OK;
}

static mil_status
played_advance(mil_context *context, const mil_advance *a)
{
    (void)context;
    played.advance = *a;
    for (int64_t i = 0; i < a->sequences && !played.recording; i++) {
        int64_t *past = a->rows + a->sequences + 1 + i, *boundary = past + a->sequences + 1;
        a->tokens[i] = a->drawn[i];
        a->history[*a->steps * a->sequences + i] = a->drawn[i];
        a->failed[i] |= a->bad[i];
        *boundary = mil_boundary_after(*past, 1);
        *past += 1;
        a->position[i] += 1;
    }
    *a->steps += played.recording ? 0 : 1;
    return MIL_OK;
}

static mil_status
played_finish(mil_context *context)
{
    (void)context;
    return MIL_OK;
}

static mil_status
played_record_begin(mil_context *context)
{
    (void)context;
    played.recording = true;
    return MIL_OK;
}

static mil_status
played_record_end(mil_context *context, void **out)
{
    (void)context;
    played.recording = false;
    played.recordings++;
    *out = &played;
    return MIL_OK;
}

static void
played_record_free(mil_context *context, void *recording)
{
    (void)context;
    played.freed += recording != NULL;
}

static mil_status
played_replay(mil_context *context, void *recording)
{
    (void)recording;
    const mil_advance *a = &played.advance;
    mil_state *states[TEXTS];
    int64_t lengths[TEXTS], boundaries[TEXTS];
    for (int64_t i = 0; i < a->sequences; i++) {
        states[i] = played.engine->running[i]->state;
        lengths[i] = states[i]->length;
        boundaries[i] = states[i]->boundary;
        states[i]->length = a->rows[a->sequences + 1 + i];
        states[i]->boundary = a->rows[2 * (a->sequences + 1) + i];
    }
    mil_step step = {
        .sequences = a->sequences,
        .states = states,
        .tokens = a->tokens,
        .rows = a->rows,
        .logits = (float *)(uintptr_t)played.sample.logits,
    };
    played.replays++;
    played.bad_after -= played.bad_after > 0;
    mil_context plain = *context;
    plain.kept = NULL;
    mil_status status = mil_model_step(&plain, played.engine->options.model, &step);
    for (int64_t i = 0; i < a->sequences; i++) {
        states[i]->length = lengths[i];
        states[i]->boundary = boundaries[i];
    }
    MIL_TRY(status);
    MIL_TRY(played_sample(context, &played.sample));
    return played_advance(context, &played.advance);
}

static mil_ops
played_table(void)
{
    mil_ops ops = mil_cpu_ops;
    ops.norm_forward = played_norm_forward;
    ops.rope_table = played_rope_table;
    ops.rope = played_rope;
    ops.attention_forward = played_attention_forward;
    ops.kv_append = played_kv_append;
    ops.conv1d_forward = played_conv1d_forward;
    ops.ssd_forward = played_ssd_forward;
    ops.glu_forward = played_glu_forward;
    ops.embedding_forward = played_embedding_forward;
    ops.linear_forward = played_linear;
    ops.sample = played_sample;
    ops.advance = played_advance;
    ops.finish = played_finish;
    ops.record_begin = played_record_begin;
    ops.record_end = played_record_end;
    ops.record_free = played_record_free;
    ops.replay = played_replay;
    return ops;
}

/* ---- texts ------------------------------------------------------------------------------------------------------ */

static const int32_t prompts[TEXTS][18] = {
    {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3}, {7}, {1, 2, 3}, {20, 21, 22, 23, 24}};
static const int64_t prompt_counts[TEXTS] = {18, 1, 3, 5};

/* What a run left: texts, and how far the lent states have read. */
typedef struct outcome {
    mil_generation texts[TEXTS];
    int64_t lengths[TEXTS];
} outcome;

/* Runs all texts; those with a bit set in `lent` on a state of the caller's, which must end where its text ends and go on. */
static mil_status
run_all(const mil_model *model, int64_t max_batch, int32_t stop, unsigned lent, outcome *out)
{
    mil_arena scratch = {0}, host = {0};
    mil_context context = {.ops = model->ops, .scratch = &scratch, .host = &host, .threads = 1};
    mil_engine engine = {0};
    mil_state states[TEXTS] = {0};
    mil_engine_options options = {.model = model, .max_batch = max_batch};
    mil_status status = mil_engine_init(&engine, &options);
    played.engine = &engine;
    for (int64_t i = 0; i < TEXTS && status == MIL_OK; i++) {
        mil_request request = {
            .prompt = prompts[i],
            .prompt_count = prompt_counts[i],
            .max_new_tokens = NEW_TOKENS - 9 * i,
            .sampling = MIL_SAMPLING_DEFAULT,
            .stop_tokens = &stop,
            .stop_count = stop < 0 ? 0 : 1,
            .tag = i,
        };
        if (lent >> i & 1) {
            status = mil_state_init(&states[i], model, 0);
            request.state = &states[i];
        }
        status = status == MIL_OK ? mil_engine_submit(&engine, &request) : status;
    }
    while (status == MIL_OK && mil_engine_pending(&engine) > 0) {
        status = mil_engine_round(&engine, &context);
        for (int64_t i = 0; i < engine.running_count && status == MIL_OK; i++) {
            int64_t fresh;
            const mil_generation *g = mil_engine_look(&engine, i, &fresh);
            if (g->finish != MIL_RUNNING) {
                int64_t tag = g->tag;
                out->texts[tag] = mil_engine_take(&engine, i);
            }
        }
    }
    for (int64_t i = 0; i < TEXTS; i++) {
        out->lengths[i] = states[i].length;
        mil_state_release(&states[i]);
    }
    mil_engine_release(&engine);
    mil_arena_release(&scratch);
    mil_arena_release(&host);
    return status;
}

static void
release(outcome *o)
{
    for (int64_t i = 0; i < TEXTS; i++) {
        mil_generation_release(&o->texts[i]);
    }
}

static void
compare(const outcome *a, const outcome *b)
{
    for (int64_t i = 0; i < TEXTS; i++) {
        const mil_generation *x = &a->texts[i], *y = &b->texts[i];
        CHECK(x->finish == y->finish && x->count == y->count);
        CHECK(x->count == y->count &&
              memcmp(x->tokens, y->tokens, (size_t)(prompt_counts[i] + x->count) * sizeof *x->tokens) == 0);
        CHECK(x->stats.rounds == y->stats.rounds);
        CHECK(a->lengths[i] == b->lengths[i]);
    }
}

void
test_burst_is_rounds(void)
{
    small_model m;
    CHECK_OK(small_model_init(&m, 0.0f));
    mil_ops ops = played_table();
    for (int32_t stop = -1; stop < VOCAB; stop += 3) {
        for (int64_t batch = 1; batch <= TEXTS; batch += 3) {
            for (unsigned lent = 0; lent < 16; lent += 5) {
                outcome plain = {0}, bursts = {0};
                m.model.ops = &mil_cpu_ops;
                CHECK_OK(run_all(&m.model, batch, stop, lent, &plain));
                played.recordings = played.replays = played.freed = 0;
                played.bad_after = -1;
                m.model.ops = &ops;
                CHECK_OK(run_all(&m.model, batch, stop, lent, &bursts));
                compare(&plain, &bursts);
                CHECK(played.recordings == played.freed);
                CHECK(stop >= 0 || played.replays > played.recordings);
                release(&plain);
                release(&bursts);
            }
        }
    }
    small_model_release(&m);
}

void
test_burst_failures(void)
{
    small_model m;
    CHECK_OK(small_model_init(&m, 0.0f));
    mil_ops ops = played_table();
    m.model.ops = &ops;
    outcome found = {0};
    played.bad_after = 5;
    CHECK_STATUS(run_all(&m.model, TEXTS, -1, 0, &found), MIL_ERR_NONFINITE);
    CHECK_MESSAGE("not finite");
    release(&found);
    played.bad_after = -1;
    int64_t before = mil_memory_blocks(), allowed = 0;
    mil_status status = MIL_ERR_MEMORY;
    for (; allowed < 2000 && status != MIL_OK; allowed++) {
        outcome o = {0};
        mil_memory_fail_after(allowed);
        status = run_all(&m.model, 2, -1, 1, &o);
        mil_memory_fail_after(-1);
        release(&o);
        CHECK(status == MIL_OK || status == MIL_ERR_MEMORY);
        CHECK(mil_memory_blocks() == before);
    }
    CHECK(status == MIL_OK && allowed > 30);
    small_model_release(&m);
}
