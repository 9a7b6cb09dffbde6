/* A model's whole life in small: made, run with and without states, trained, released; then again with the n-th
 * allocation failing, for every n. Whatever fails must say so, and nothing may be left.
 *
 * The model's values are judged in tests/test_model.py.
 */
#include "harness.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "distill/trainer.h"
#include "small_model.h"

enum { ROWS = 41, MOST_ALLOCATIONS = 2000 };

/* Arenas and arrays of one life; all are given back by life_release. */
typedef struct life {
    mil_arena scratch, host;
    mil_context context;
    small_model small;
    mil_state state, fork, read;
    mil_trainer trainer;
    float *logits;
    char *image;
    bool *trainable;
} life;

/* Memory that is not on trial: it never fails and is not counted. */
static void *
plain(size_t count, size_t size)
{
    void *pointer = calloc(count, size);
    if (pointer == NULL) {
        abort();
    }
    return pointer;
}

static void
life_release(life *l)
{
    mil_trainer_release(&l->trainer);
    mil_state_release(&l->read);
    mil_state_release(&l->fork);
    mil_state_release(&l->state);
    small_model_release(&l->small);
    mil_arena_release(&l->scratch);
    mil_arena_release(&l->host);
    free(l->logits);
    free(l->image);
    free(l->trainable);
    *l = (life){0};
}

/* A prompt, some single tokens, a rollback, a fork, and the state as an image and back. */
static mil_status
use_states(life *l, const int32_t *tokens)
{
    MIL_TRY(mil_state_init(&l->state, &l->small.model, 8));
    MIL_TRY(mil_state_reserve(&l->state, ROWS));
    mil_state *states[] = {&l->state};
    for (int64_t done = 0, count = ROWS - 4; done < ROWS; done += count, count = 1) {
        int64_t offsets[] = {0, count}, last = count - 1;
        MIL_TRY(mil_model_forward(&l->context, &l->small.model,
                                  &(mil_forward){
                                      .tokens = tokens + done,
                                      .sequences = 1,
                                      .offsets = offsets,
                                      .states = states,
                                      .logit_rows = &last,
                                      .logit_count = 1,
                                      .logits = l->logits,
                                  }));
    }
    CHECK(l->state.length == ROWS);
    MIL_TRY(mil_state_rollback(&l->state, 1));
    MIL_TRY(mil_state_copy(&l->fork, &l->state));
    int64_t bytes = mil_state_image_bytes(&l->fork);
    l->image = plain((size_t)bytes, 1);
    MIL_TRY(mil_state_write(&l->fork, l->image));
    MIL_TRY(mil_state_read(&l->read, &l->small.model, l->image, bytes));
    CHECK(l->read.length == ROWS - 1);
    return mil_state_clear(&l->state);
}

/* Two micro-steps and one of the optimizer, the teacher being the model itself. */
static mil_status
train(life *l, const int32_t *tokens)
{
    int64_t offsets[] = {0, 9, ROWS};
    l->trainable = plain((size_t)l->small.model.parameter_count, sizeof(bool));
    memset(l->trainable, 1, (size_t)l->small.model.parameter_count);
    MIL_TRY(mil_trainer_init(&l->trainer, &l->small.model, &l->small.model, l->trainable, true));
    for (int i = 0; i < 2; i++) {
        mil_micro_step step = {
            .tokens = tokens,
            .sequences = 2,
            .offsets = offsets,
            .labels = tokens,
            .kl_weight = 1.0f,
            .ce_weight = 1.0f,
            .temperature = 1.0f,
            .scale = 1.0f / ROWS,
        };
        MIL_TRY(mil_trainer_backward(&l->context, &l->trainer, &step));
        CHECK(step.ce_rows == ROWS);
    }
    l->trainer.teacher = NULL;
    mil_preference pair = {.reference = (double[]){-1, -2}, .beta = 0.5, .label_smoothing = 0.1};
    mil_micro_step prefer = {
        .tokens = tokens,
        .sequences = 2,
        .offsets = offsets,
        .labels = tokens,
        .temperature = 1.0f,
        .scale = 1.0f,
        .preference = &pair,
    };
    MIL_TRY(mil_trainer_backward(&l->context, &l->trainer, &prefer));
    double loss = pair.loss;
    MIL_TRY(mil_evaluate(&l->context, &l->small.model, NULL, &prefer));
    CHECK(loss > 0 && fabs(pair.loss - loss) < 1e-4 * loss &&
          pair.margin == pair.chosen_reward - pair.rejected_reward);
    mil_optimizer_step step = {
        .learning_rate = 1e-3f,
        .beta1 = 0.9f,
        .beta2 = 0.95f,
        .eps = 1e-8f,
        .max_grad_norm = 1.0f,
        .vector_rate = 1.0f,
    };
    return mil_trainer_apply(&l->context, &l->trainer, &step);
}

static mil_status
live(life *l)
{
    int32_t tokens[ROWS];
    for (int i = 0; i < ROWS; i++) {
        tokens[i] = i * 11 % VOCAB;
    }
    *l = (life){0};
    l->context =
        (mil_context){.ops = &mil_cpu_ops, .scratch = &l->scratch, .host = &l->host, .threads = TEST_TEAM};
    l->logits = plain(VOCAB, sizeof *l->logits);
    MIL_TRY(small_model_init(&l->small, 0.0f));
    MIL_TRY(use_states(l, tokens));
    return train(l, tokens);
}

void
test_model_life(void)
{
    life l;
    CHECK_OK(live(&l));
    CHECK(l.scratch.in_use == 0 && l.host.in_use == 0);
    life_release(&l);
    life_release(&l); /* twice is safe */
}

void
test_model_without_memory(void)
{
    life l;
    mil_status status = MIL_ERR_MEMORY;
    int allocations = 0;
    for (; allocations < MOST_ALLOCATIONS && status != MIL_OK; allocations++) {
        mil_memory_fail_after(allocations);
        status = live(&l);
        mil_memory_fail_after(-1);
        check(status == MIL_OK || status == MIL_ERR_MEMORY, mil_message(), __FILE__, __LINE__);
        CHECK(l.scratch.in_use == 0 && l.host.in_use == 0);
        life_release(&l);
        CHECK(mil_memory_blocks() == 0);
    }
    CHECK(status == MIL_OK && allocations > 10);
}

/* An image is hostile until proven otherwise: each byte damaged, each length cut. */
void
test_model_hostile_images(void)
{
    life l;
    CHECK_OK(live(&l));
    int64_t bytes = mil_state_image_bytes(&l.fork);
    char *copy = plain((size_t)bytes, 1);
    for (int64_t i = 0; i < bytes; i += i < 256 ? 1 : 97) {
        for (int flip = 0; flip < 2; flip++) {
            memcpy(copy, l.image, (size_t)bytes);
            copy[i] = (char)(flip == 0 ? copy[i] ^ 0x55 : 0xff);
            mil_state state = {0};
            if (mil_state_read(&state, &l.small.model, copy, bytes) == MIL_OK) {
                CHECK(state.length >= 0 && state.boundary <= state.length && state.length <= state.capacity);
            }
            mil_state_release(&state);
        }
        mil_state cut = {0};
        char *exact = plain((size_t)i + 1, 1); /* its end is the end of its memory, for AddressSanitizer */
        memcpy(exact, l.image, (size_t)i + 1);
        CHECK(i + 1 == bytes || mil_state_read(&cut, &l.small.model, exact, i + 1) == MIL_ERR_FORMAT);
        mil_state_release(&cut);
        free(exact);
    }
    free(copy);
    life_release(&l);
}
