/* Bursts of recorded steps and of speculative rounds, on a table that plays a device with recordings: the tokens, the ends
 * and the states are those of single rounds.
 *
 * The played device computes with the CPU's operators.  While recording its operators do nothing but leave their arguments;
 * a replay runs the step, or the round, with the numbers that "the device" holds, which are the block that was uploaded and
 * that mil_advance or mil_settle moves on.
 */
#include "harness.h"

#include <string.h>

#include "decode/sequence.h"
#include "settle.h"
#include "small_model.h"

enum { TEXTS = 4, MANY_TEXTS = 40, NEW_TOKENS = 45 };

/* ---- the played device ---------------------------------------------------------------------------------------- */

/* What a recording replays. */
typedef struct recorded {
    mil_sample samples[MIL_WINDOW + 1]; /* of drafts, if any, and of the model's rows */
    int64_t sample_count;
    mil_advance advance;
    mil_propose propose;
    mil_accept accept;
    mil_settle settle; /* sequences = 0: a plain step */
} recorded;

static struct {
    bool recording;
    mil_engine *engine;
    recorded now;                                            /* in the making */
    int64_t recordings, made, replays, round_replays, freed; /* made: those not made over */
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
UNLESS_RECORDING(scan_forward, mil_scan)
UNLESS_RECORDING(ssd_forward, mil_ssd)
UNLESS_RECORDING(glu_forward, mil_glu)
UNLESS_RECORDING(embedding_forward, mil_embedding)

static mil_status
played_linear(mil_context *context, const mil_linear *products, int64_t count)
{
    return played.recording ? MIL_OK : mil_cpu_ops.linear_forward(context, products, count);
}

static mil_sampling
sampling_of(const mil_sample_options *o)
{
    return (mil_sampling){.temperature = o->temperature,
                          .top_p = o->top_p,
                          .min_p = o->min_p,
                          .top_k = o->top_k,
                          .repetition_penalty = 1.0f,
                          .seed = o->seed};
}

/* The distribution of a row over the first `vocab` tokens, 0 beyond. */
static mil_status
fill(mil_distribution *out, float *weight, const float *logits, const mil_sample_options *options,
     int64_t vocab)
{
    mil_candidate scratch[VOCAB];
    mil_sampling sampling = sampling_of(options);
    memset(weight, 0, VOCAB * sizeof *weight);
    *out = (mil_distribution){.weight = weight};
    return mil_distribution_fill(&sampling, logits, NULL, vocab, scratch, out);
}

static mil_status
played_sample(mil_context *context, const mil_sample *a)
{
    (void)context;
    if (played.recording) {
        played.now.samples[played.now.sample_count++] = *a;
        return MIL_OK;
    }
    for (int64_t i = 0; i < a->rows; i++) {
        mil_distribution p;
        float weight[VOCAB];
        const mil_status status =
            fill(&p, weight, a->logits + i * a->logits_stride, &a->options[i], a->vocab);
        /* Drafts of a text that the draft model cannot read come of a cache that nobody wrote. */
        a->bad[i] = played.bad_after == 0 || status != MIL_OK;
        if (a->token != NULL) {
            double uniform = mil_uniform(a->options[i].seed, (uint64_t)a->position[i], (mil_stream)a->stream);
            a->token[i] = status == MIL_OK ? mil_distribution_draw(&p, a->vocab, uniform) : 0;
            if (a->placed != NULL) {
                a->placed[i * a->spread] = a->token[i];
            }
        }
    }
    return MIL_OK;
}

static mil_status
played_propose(mil_context *context, const mil_propose *a)
{
    (void)context;
    played.now.propose = *a;
    for (int64_t i = 0; i < a->sequences && !played.recording; i++) {
        const int32_t *text = a->texts + i * a->texts_stride;
        int32_t *tokens = a->tokens + i * (a->drafts + 1);
        for (int64_t j = 0; j <= a->drafts; j++) {
            tokens[j] = text[a->count[i] - 1];
        }
        if (mil_ngram_propose(text, a->count[i], a->longest, a->shortest, a->drafts, tokens + 1) == 0) {
            a->drafted[i] = 0;
        }
    }
    return MIL_OK;
}

/* How many drafts of one sequence stand, and the token after them: speculate.c's rule. */
static mil_status
judge(const mil_accept *a, int64_t sequence)
{
    int64_t row = a->offsets[sequence], drafted = a->drafted[sequence], position = a->position[sequence];
    const mil_sample_options *options = &a->options[sequence];
    a->accepted[sequence] = 0;
    for (int64_t j = 0; j <= drafted; j++, row++, position++) {
        mil_distribution p, q = {.certain = true, .best = a->drafts[row]};
        float weight[VOCAB], draft_weight[VOCAB];
        MIL_TRY(fill(&p, weight, a->logits + row * a->logits_stride, options, a->vocab));
        double own = mil_uniform(options->seed, (uint64_t)position, MIL_STREAM_TARGET);
        if (j == drafted) {
            a->tokens[row] = mil_distribution_draw(&p, a->vocab, own);
            break;
        }
        if (a->draft_logits != NULL) {
            MIL_TRY(fill(&q, draft_weight, a->draft_logits + row * a->draft_logits_stride, options,
                         a->draft_vocab));
        }
        int32_t token = a->drafts[row];
        double uniform = mil_uniform(options->seed, (uint64_t)position, MIL_STREAM_ACCEPT);
        bool stands = uniform * mil_distribution_at(&q, token) < mil_distribution_at(&p, token);
        a->tokens[row] = stands ? token : mil_distribution_draw_rest(&p, &q, a->vocab, own);
        if (!stands) {
            break;
        }
        a->accepted[sequence]++;
    }
    return MIL_OK;
}

static mil_status
played_accept(mil_context *context, const mil_accept *a)
{
    (void)context;
    played.now.accept = *a;
    for (int64_t i = 0; i < a->sequences && !played.recording; i++) {
        MIL_TRY(judge(a, i));
    }
    return MIL_OK;
}

static mil_status
played_settle(mil_context *context, const mil_settle *s)
{
    (void)context;
    played.now.settle = *s;
    if (!played.recording) {
        settle(s);
    }
    return MIL_OK;
}

static mil_status
played_advance(mil_context *context, const mil_advance *a)
{
    (void)context;
    played.now.advance = *a;
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
    played.now = (recorded){0};
    return MIL_OK;
}

static mil_status
played_record_end(mil_context *context, void **recording)
{
    (void)context;
    played.recording = false;
    played.recordings++;
    if (*recording == NULL) {
        played.made++;
        *recording = malloc(sizeof played.now);
    }
    if (*recording == NULL) {
        abort();
    }
    *(recorded *)*recording = played.now;
    return MIL_OK;
}

static void
played_record_free(mil_context *context, void *recording)
{
    (void)context;
    played.freed += recording != NULL;
    free(recording);
}

/* Runs a step with the device's numbers in the states, which then have their own again. */
static mil_status
run_step(mil_context *context, const mil_model *model, mil_step *step, bool drafts)
{
    mil_context plain = *context;
    plain.kept = NULL;
    mil_state *states[MANY_TEXTS];
    int64_t lengths[MANY_TEXTS], boundaries[MANY_TEXTS], n = step->sequences;
    for (int64_t i = 0; i < n; i++) {
        const mil_sequence *sequence = played.engine->running[i];
        states[i] = drafts ? sequence->draft_state : sequence->state;
        lengths[i] = states[i]->length;
        boundaries[i] = states[i]->boundary;
        states[i]->length = step->rows[n + 1 + i];
        states[i]->boundary = step->rows[2 * (n + 1) + i];
    }
    step->states = states;
    mil_status status = mil_model_step(&plain, model, step);
    for (int64_t i = 0; i < n; i++) {
        states[i]->length = lengths[i];
        states[i]->boundary = boundaries[i];
    }
    return status;
}

static mil_status
replay_round(mil_context *context, const recorded *r)
{
    const mil_settle *s = &r->settle;
    int64_t drafts = s->draft_rows != NULL ? s->drafts : 0, n = s->sequences;
    for (int64_t j = 0; j < drafts; j++) {
        const mil_sample *sample = &r->samples[j];
        mil_step step = {
            .sequences = n,
            .count = j == 0 ? 2 : 1,
            .tokens = j == 0 ? s->draft_tokens : r->samples[j - 1].token,
            .rows = s->draft_rows + j * 3 * (n + 1),
            .last_only = true,
            .logits = (float *)(uintptr_t)sample->logits,
            .logits_stride = sample->logits_stride,
        };
        MIL_TRY(run_step(context, played.engine->options.draft, &step, true));
        MIL_TRY(played_sample(context, sample));
    }
    if (drafts == 0) {
        MIL_TRY(played_propose(context, &r->propose));
    }
    mil_step step = {
        .sequences = n,
        .count = s->drafts + 1,
        .tokens = s->tokens,
        .rows = s->rows,
        .logits = (float *)(uintptr_t)r->accept.logits,
    };
    played.round_replays++;
    MIL_TRY(run_step(context, played.engine->options.model, &step, false));
    MIL_TRY(played_sample(context, &r->samples[drafts]));
    MIL_TRY(played_accept(context, &r->accept));
    return played_settle(context, s);
}

static mil_status
played_replay(mil_context *context, void *recording)
{
    const recorded *r = recording;
    played.replays++;
    played.bad_after -= played.bad_after > 0;
    if (r->settle.sequences > 0) {
        return replay_round(context, r);
    }
    mil_step step = {
        .sequences = r->advance.sequences,
        .tokens = r->advance.tokens,
        .rows = r->advance.rows,
        .logits = (float *)(uintptr_t)r->samples[0].logits,
    };
    MIL_TRY(run_step(context, played.engine->options.model, &step, false));
    MIL_TRY(played_sample(context, &r->samples[0]));
    return played_advance(context, &r->advance);
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
    ops.scan_forward = played_scan_forward;
    ops.ssd_forward = played_ssd_forward;
    ops.glu_forward = played_glu_forward;
    ops.embedding_forward = played_embedding_forward;
    ops.linear_forward = played_linear;
    ops.sample = played_sample;
    ops.advance = played_advance;
    ops.propose = played_propose;
    ops.accept = played_accept;
    ops.settle = played_settle;
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
    int64_t count;
    mil_generation texts[MANY_TEXTS];
    int64_t lengths[MANY_TEXTS];
} outcome;

typedef struct setting {
    int64_t texts; /* 0: TEXTS; beyond those, the same prompts with other seeds */
    int64_t max_batch;
    int32_t stop;
    unsigned lent; /* bits: texts on a state of the caller's, which must end where its text ends and go on */
    mil_draft_kind draft_kind;
    const mil_model *draft;
    int64_t drafts;
    bool adapts;
    float temperature;
} setting;

/* Runs all texts. */
static mil_status
run_texts(const mil_model *model, const setting *with, outcome *out)
{
    int32_t stop = with->stop;
    unsigned lent = with->lent;
    mil_arena scratch = {0}, host = {0};
    mil_context context = {.ops = model->ops, .scratch = &scratch, .host = &host, .threads = 1};
    mil_engine engine = {0};
    mil_state states[MANY_TEXTS] = {0};
    mil_engine_options options = {
        .model = model, .max_batch = with->max_batch, .draft_kind = with->draft_kind, .draft = with->draft};
    mil_status status = mil_engine_init(&engine, &options);
    out->count = with->texts > 0 ? with->texts : TEXTS;
    played.engine = &engine;
    for (int64_t i = 0; i < out->count && status == MIL_OK; i++) {
        mil_request request = {
            .prompt = prompts[i % TEXTS],
            .prompt_count = prompt_counts[i % TEXTS],
            .max_new_tokens = NEW_TOKENS - 9 * (i % TEXTS),
            .sampling = MIL_SAMPLING_DEFAULT,
            .stop_tokens = &stop,
            .stop_count = stop < 0 ? 0 : 1,
            .draft_tokens = with->drafts,
            .fixed_draft = !with->adapts,
            .tag = i,
        };
        request.sampling.temperature = with->temperature;
        request.sampling.top_k = with->temperature > 1.0f ? 7 : 0;
        request.sampling.seed = (uint64_t)(40 + i);
        if (lent >> i % TEXTS & 1) {
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
    for (int64_t i = 0; i < out->count; i++) {
        out->lengths[i] = states[i].length;
        mil_state_release(&states[i]);
    }
    mil_engine_release(&engine);
    mil_arena_release(&scratch);
    mil_arena_release(&host);
    return status;
}

static mil_status
run_all(const mil_model *model, int64_t max_batch, int32_t stop, unsigned lent, outcome *out)
{
    setting with = {.max_batch = max_batch, .stop = stop, .lent = lent};
    return run_texts(model, &with, out);
}

static void
release(outcome *o)
{
    for (int64_t i = 0; i < o->count; i++) {
        mil_generation_release(&o->texts[i]);
    }
}

static void
compare(const outcome *a, const outcome *b)
{
    for (int64_t i = 0; i < a->count; i++) {
        const mil_generation *x = &a->texts[i], *y = &b->texts[i];
        CHECK(x->finish == y->finish && x->count == y->count);
        CHECK(x->count == y->count &&
              memcmp(x->tokens, y->tokens,
                     (size_t)(prompt_counts[i % TEXTS] + x->count) * sizeof *x->tokens) == 0);
        CHECK(x->stats.rounds == y->stats.rounds);
        CHECK(x->stats.accepted == y->stats.accepted);
        CHECK(a->lengths[i] == b->lengths[i]);
    }
}

/* The same texts, whatever the rounds. */
static void
compare_texts(const outcome *a, const outcome *b)
{
    for (int64_t i = 0; i < a->count; i++) {
        const mil_generation *x = &a->texts[i], *y = &b->texts[i];
        CHECK(x->finish == y->finish && x->count == y->count &&
              memcmp(x->tokens, y->tokens,
                     (size_t)(prompt_counts[i % TEXTS] + x->count) * sizeof *x->tokens) == 0);
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
                played.recordings = played.made = played.replays = played.freed = 0;
                played.bad_after = -1;
                m.model.ops = &ops;
                CHECK_OK(run_all(&m.model, batch, stop, lent, &bursts));
                compare(&plain, &bursts);
                CHECK(played.made == played.freed);
                CHECK(batch > 1 || played.made <= 1); /* one text after another: made over */
                CHECK(stop >= 0 || played.replays > played.recordings);
                release(&plain);
                release(&bursts);
            }
        }
    }
    small_model_release(&m);
}

/* More texts than any kernel takes rows at its best: all of them in one recording, whoever has ended in between. */
void
test_bursts_of_many(void)
{
    small_model m;
    CHECK_OK(small_model_init(&m, 0.0f));
    mil_ops ops = played_table();
    for (int64_t batch = MANY_TEXTS / 2; batch <= MANY_TEXTS; batch += MANY_TEXTS / 2) {
        for (unsigned lent = 0; lent < 16; lent += 15) {
            setting with = {.texts = MANY_TEXTS,
                            .max_batch = batch,
                            .stop = -1,
                            .lent = lent,
                            .temperature = lent > 0 ? 0.7f : 0.0f};
            outcome plain = {0}, bursts = {0};
            m.model.ops = &mil_cpu_ops;
            CHECK_OK(run_texts(&m.model, &with, &plain));
            played.recordings = played.made = played.replays = played.freed = 0;
            played.bad_after = -1;
            m.model.ops = &ops;
            CHECK_OK(run_texts(&m.model, &with, &bursts));
            compare(&plain, &bursts);
            CHECK(played.made == played.freed);
            CHECK(played.replays > NEW_TOKENS / 2 * (MANY_TEXTS / batch));
            release(&plain);
            release(&bursts);
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

/* With a draft model or n-grams: rounds on the device against rounds with the host, and against no drafts where greedy. */
void
test_draft_burst_is_rounds(void)
{
    small_model m, d, less; /* a draft, and one that lacks some of the words */
    CHECK_OK(small_model_init(&m, 0.0f));
    CHECK_OK(small_model_init(&d, 0.05f));
    CHECK_OK(small_model_init_of(&less, 0.0f, VOCAB - 3));
    mil_ops ops = played_table();
    int64_t replays = 0, accepted = 0, drafted = 0;
    for (int run = 0; run < 120; run++) {
        setting with = {
            .max_batch = run % 3 == 0 ? 1 : TEXTS,
            .stop = run % 4 == 0 ? -1 : (run * 7) % VOCAB,
            .lent = run % 5 < 3 ? 0 : 5u << run % 2,
            .draft_kind = run % 2 == 0 ? MIL_DRAFT_MODEL : MIL_DRAFT_NGRAM,
            .draft = run % 2 == 1   ? NULL
                     : run % 7 == 0 ? &less.model
                                    : &d.model,
            .drafts = (int64_t[]){1, 2, 3, 4, 7, 15}[run / 2 % 6],
            .temperature = (float[]){0.0f, 0.7f, 1.3f}[run / 12 % 3],
        };
        outcome plain = {0}, rounds = {0}, bursts = {0};
        setting without = with;
        without.draft_kind = MIL_DRAFT_NONE;
        without.draft = NULL;
        m.model.ops = d.model.ops = less.model.ops = &mil_cpu_ops;
        CHECK_OK(run_texts(&m.model, &without, &plain));
        CHECK_OK(run_texts(&m.model, &with, &rounds));
        played.made = played.round_replays = played.freed = 0;
        played.bad_after = -1;
        m.model.ops = d.model.ops = less.model.ops = &ops;
        CHECK_OK(run_texts(&m.model, &with, &bursts));
        compare(&rounds, &bursts);
        if (with.temperature == 0.0f) {
            compare_texts(&plain, &bursts);
        }
        with.adapts = true;
        release(&bursts);
        bursts = (outcome){0};
        CHECK_OK(run_texts(&m.model, &with, &bursts));
        if (with.temperature == 0.0f) {
            compare_texts(&plain, &bursts);
        }
        CHECK(played.made == played.freed);
        replays += played.round_replays;
        for (int64_t i = 0; i < TEXTS; i++) {
            accepted += bursts.texts[i].stats.accepted;
            drafted += bursts.texts[i].stats.drafted;
        }
        release(&plain);
        release(&rounds);
        release(&bursts);
    }
    CHECK(replays > 500);
    CHECK(drafted / 10 < accepted && accepted < drafted);
    small_model_release(&less);
    small_model_release(&d);
    small_model_release(&m);
}

void
test_draft_burst_failures(void)
{
    small_model m, d;
    CHECK_OK(small_model_init(&m, 0.0f));
    CHECK_OK(small_model_init(&d, 0.05f));
    mil_ops ops = played_table();
    m.model.ops = d.model.ops = &ops;
    setting with = {.max_batch = TEXTS,
                    .stop = -1,
                    .lent = 1,
                    .draft_kind = MIL_DRAFT_MODEL,
                    .draft = &d.model,
                    .drafts = 3};
    outcome found = {0};
    played.bad_after = 5;
    CHECK_STATUS(run_texts(&m.model, &with, &found), MIL_ERR_NONFINITE);
    CHECK_MESSAGE("not finite");
    release(&found);
    played.bad_after = -1;
    int64_t before = mil_memory_blocks(), allowed = 0;
    mil_status status = MIL_ERR_MEMORY;
    for (; allowed < 3000 && status != MIL_OK; allowed++) {
        outcome o = {0};
        mil_memory_fail_after(allowed);
        status = run_texts(&m.model, &with, &o);
        mil_memory_fail_after(-1);
        release(&o);
        CHECK(status == MIL_OK || status == MIL_ERR_MEMORY);
        CHECK(mil_memory_blocks() == before);
    }
    CHECK(status == MIL_OK && allowed > 30);
    small_model_release(&d);
    small_model_release(&m);
}

/* One text on a lent state, ended by the caller once it has `most` tokens (or at its own end). */
static mil_status
run_until(const mil_model *model, const setting *with, const int32_t *prompt, int64_t prompt_count,
          int64_t max_new_tokens, int64_t most, mil_state *state, mil_generation *out)
{
    mil_arena scratch = {0}, host = {0};
    mil_context context = {.ops = model->ops, .scratch = &scratch, .host = &host, .threads = 1};
    mil_engine engine = {0};
    mil_engine_options options = {
        .model = model, .max_batch = 1, .draft_kind = with->draft_kind, .draft = with->draft};
    mil_request request = {
        .prompt = prompt,
        .prompt_count = prompt_count,
        .max_new_tokens = max_new_tokens,
        .sampling = MIL_SAMPLING_DEFAULT,
        .draft_tokens = with->drafts,
        .fixed_draft = true,
        .state = state,
    };
    mil_status status = mil_engine_init(&engine, &options);
    played.engine = &engine;
    status = status == MIL_OK ? mil_engine_submit(&engine, &request) : status;
    while (status == MIL_OK && mil_engine_pending(&engine) > 0) {
        int64_t fresh;
        status = mil_engine_round(&engine, &context);
        const mil_generation *g = engine.running_count > 0 ? mil_engine_look(&engine, 0, &fresh) : NULL;
        if (status == MIL_OK && g != NULL && fresh > 0 && g->count >= most) { /* its own end or not */
            status = mil_engine_cut(&engine, 0, fresh - (g->count - most), MIL_FINISH_CANCELLED);
        }
    }
    *out = status == MIL_OK ? mil_engine_take(&engine, 0) : (mil_generation){0};
    mil_engine_release(&engine);
    mil_arena_release(&scratch);
    mil_arena_release(&host);
    return status;
}

/* Texts that the caller ends in the middle of a burst: their states go on from there. */
void
test_bursts_are_cut(void)
{
    enum { FREE = 60, MORE = 12 };
    small_model m, d;
    CHECK_OK(small_model_init(&m, 0.0f));
    CHECK_OK(small_model_init(&d, 0.05f));
    mil_ops ops = played_table();
    m.model.ops = d.model.ops = &ops;
    played.bad_after = -1;
    mil_generation whole;
    setting none = {0};
    CHECK_OK(run_until(&m.model, &none, prompts[0], prompt_counts[0], FREE, FREE, NULL, &whole));
    for (int64_t most = 1; most + MORE <= FREE; most++) {
        setting with = {
            .draft_kind = (mil_draft_kind)(most % 3),
            .draft = most % 3 == MIL_DRAFT_MODEL ? &d.model : NULL,
            .drafts = 1 + most % 5,
        };
        mil_state state;
        mil_generation cut, rest;
        CHECK_OK(mil_state_init(&state, &m.model, 0));
        CHECK_OK(run_until(&m.model, &with, prompts[0], prompt_counts[0], FREE, most, &state, &cut));
        int64_t length = prompt_counts[0] + most;
        CHECK(cut.finish == MIL_FINISH_CANCELLED && cut.count == most && state.length <= length);
        CHECK(memcmp(cut.tokens, whole.tokens, (size_t)length * sizeof *cut.tokens) == 0);
        CHECK_OK(run_until(&m.model, &none, cut.tokens, length, MORE, MORE, &state, &rest));
        CHECK(rest.stats.cached_tokens >= length - 1 &&
              memcmp(rest.tokens, whole.tokens, (size_t)(length + MORE) * sizeof *rest.tokens) == 0);
        mil_generation_release(&cut);
        mil_generation_release(&rest);
        mil_state_release(&state);
    }
    mil_generation_release(&whole);
    small_model_release(&d);
    small_model_release(&m);
}
