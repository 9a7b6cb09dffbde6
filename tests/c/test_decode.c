/* The engine in C, where sanitizers see everything: plain and speculative generation agree, and with the n-th
 * allocation failing, for every n, a failure says so and leaves nothing.
 *
 * The model has an attention and a Mamba-2 layer. What it generates is judged in tests/test_generate.py.
 */
#include "harness.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "decode/decode.h"
#include "small_model.h"

enum { PROMPTS = 3, NEW_TOKENS = 24, MOST_ALLOCATIONS = 2000 };

static const int32_t prompts[PROMPTS][24] = {
    {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4},
    {7},
    {1, 2, 3, 1, 2, 3, 1, 2, 3},
};
static const int64_t prompt_counts[PROMPTS] = {24, 1, 9};

/* Runs the prompts to their ends and hands their results to `out` [PROMPTS], which the caller releases. */
static mil_status
generate_all(const mil_engine_options *options, const mil_sampling *sampling, mil_generation *out)
{
    mil_arena scratch = {0}, host = {0};
    mil_context context = {.ops = &mil_cpu_ops, .scratch = &scratch, .host = &host, .threads = 1};
    mil_engine engine = {0};
    mil_status status = mil_engine_init(&engine, options);
    for (int64_t i = 0; i < PROMPTS && status == MIL_OK; i++) {
        mil_request request = {
            .prompt = prompts[i],
            .prompt_count = prompt_counts[i],
            .max_new_tokens = NEW_TOKENS,
            .sampling = *sampling,
            .draft_tokens = 3 + i,
            .fixed_draft = true,
            .logprobs = true,
            .prompt_logprobs = true,
            .top_logprobs = 2,
            .tag = i,
        };
        status = mil_engine_submit(&engine, &request);
    }
    while (status == MIL_OK && mil_engine_pending(&engine) > 0) {
        status = mil_engine_round(&engine, &context);
        for (int64_t i = 0; i < engine.running_count && status == MIL_OK; i++) {
            int64_t fresh;
            const mil_generation *g = mil_engine_look(&engine, i, &fresh);
            if (g->finish != MIL_RUNNING) {
                int64_t tag = g->tag;
                out[tag] = mil_engine_take(&engine, i);
            }
        }
    }
    mil_engine_release(&engine);
    mil_arena_release(&scratch);
    mil_arena_release(&host);
    return status;
}

static void
release_all(mil_generation *results)
{
    for (int64_t i = 0; i < PROMPTS; i++) {
        mil_generation_release(&results[i]);
    }
}

void
test_decode_speculation(void)
{
    small_model target, draft;
    CHECK_OK(small_model_init(&target, 0.0f));
    CHECK_OK(small_model_init(&draft, 0.05f));
    mil_sampling greedy = MIL_SAMPLING_DEFAULT;
    greedy.repetition_penalty = 1.2f; /* keeps a small model from one word for ever */
    mil_generation plain[PROMPTS] = {0};
    CHECK_OK(generate_all(&(mil_engine_options){.model = &target.model}, &greedy, plain));
    int64_t drafted = 0, accepted = 0;
    for (int kind = 0; kind < 4; kind++) {
        mil_engine_options options = {
            .model = &target.model,
            .draft_kind = kind % 2 ? MIL_DRAFT_NGRAM : MIL_DRAFT_MODEL,
            .draft = kind % 2 ? NULL : &draft.model,
            .max_batch = kind < 2 ? 1 : PROMPTS,
            .prefill_rows = 10,
        };
        mil_generation found[PROMPTS] = {0};
        CHECK_OK(generate_all(&options, &greedy, found));
        for (int64_t i = 0; i < PROMPTS; i++) {
            CHECK(found[i].count == NEW_TOKENS && found[i].finish == MIL_FINISH_LENGTH);
            CHECK(memcmp(found[i].tokens, plain[i].tokens, (size_t)(prompt_counts[i] + NEW_TOKENS) * 4) == 0);
            CHECK(memcmp(found[i].logprobs, plain[i].logprobs, NEW_TOKENS * sizeof(double)) == 0);
            drafted += found[i].stats.drafted;
            accepted += found[i].stats.accepted;
        }
        release_all(found);
    }
    CHECK(accepted > 0 && accepted < drafted);
    release_all(plain);
    small_model_release(&target);
    small_model_release(&draft);
}

void
test_decode_without_memory(void)
{
    small_model target, draft;
    CHECK_OK(small_model_init(&target, 0.0f));
    CHECK_OK(small_model_init(&draft, 0.3f));
    mil_sampling sampling = {
        .temperature = 1.0f, .top_k = 9, .top_p = 0.9f, .repetition_penalty = 1.1f, .seed = 5};
    mil_engine_options options = {
        .model = &target.model,
        .draft_kind = MIL_DRAFT_MODEL,
        .draft = &draft.model,
        .max_batch = 2,
    };
    int64_t before = mil_memory_blocks(), allowed = 0;
    mil_status status = MIL_ERR_MEMORY;
    for (; allowed < MOST_ALLOCATIONS && status != MIL_OK; allowed++) {
        mil_generation found[PROMPTS] = {0};
        mil_memory_fail_after(allowed);
        status = generate_all(&options, &sampling, found);
        mil_memory_fail_after(-1);
        release_all(found);
        CHECK(status == MIL_OK || status == MIL_ERR_MEMORY);
        CHECK(mil_memory_blocks() == before);
    }
    CHECK(status == MIL_OK && allowed > 30);
    small_model_release(&target);
    small_model_release(&draft);
}

void
test_decode_draws(void)
{
    float logits[VOCAB], weight[VOCAB];
    mil_candidate scratch[VOCAB];
    for (int i = 0; i < VOCAB; i++) {
        logits[i] = 2.0f * sinf((float)i);
    }
    mil_sampling sampling = {.temperature = 0.8f, .top_p = 0.9f, .repetition_penalty = 1.0f};
    mil_distribution p = {.weight = weight};
    CHECK_OK(mil_distribution_fill(&sampling, logits, NULL, VOCAB, scratch, &p));
    int64_t counts[VOCAB] = {0}, draws = 20000;
    for (int64_t i = 0; i < draws; i++) {
        counts[mil_distribution_draw(&p, VOCAB, mil_uniform(1, (uint64_t)i, MIL_STREAM_TARGET))]++;
    }
    for (int32_t i = 0; i < VOCAB; i++) { /* within five standard deviations */
        double expected = (double)draws * mil_distribution_at(&p, i);
        CHECK(fabs((double)counts[i] - expected) <= 5.0 * sqrt(expected));
    }
    CHECK(mil_distribution_draw(&p, VOCAB, 0.0) >= 0);
    CHECK(weight[mil_distribution_draw(&p, VOCAB, 1.0 - 0x1p-53)] > 0.0f);
    logits[7] = NAN;
    CHECK_STATUS(mil_distribution_fill(&sampling, logits, NULL, VOCAB, scratch, &p), MIL_ERR_NONFINITE);
    CHECK_MESSAGE("token 7");
}
