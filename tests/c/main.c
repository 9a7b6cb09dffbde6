/* The C test binary: runs every test, and after each one asserts that no memory is left. */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TESTS(X)                     \
    X(test_status_messages)          \
    X(test_status_threads)           \
    X(test_memory_allocator)         \
    X(test_memory_arena)             \
    X(test_memory_arena_failures)    \
    X(test_memory_threads)           \
    X(test_dtype_bfloat16)           \
    X(test_dtype_float16)            \
    X(test_vector_errors)            \
    X(test_vector_bits)              \
    X(test_vector_extremes)          \
    X(test_operators_repeat)         \
    X(test_operators_threads)        \
    X(test_operators_without_memory) \
    X(test_operators_concurrently)   \
    X(test_model_life)               \
    X(test_model_without_memory)     \
    X(test_model_hostile_images)     \
    X(test_burst_failures)           \
    X(test_burst_is_rounds)          \
    X(test_bursts_of_many)           \
    X(test_bursts_are_cut)           \
    X(test_draft_burst_failures)     \
    X(test_draft_burst_is_rounds)    \
    X(test_decode_draws)             \
    X(test_decode_speculation)       \
    X(test_decode_without_memory)

#define DECLARE(name) void name(void);
TESTS(DECLARE)
#undef DECLARE

static _Atomic int checks, failures;

void
check(bool passed, const char *what, const char *file, int line)
{
    checks++;
    if (!passed) {
        failures++;
        fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
    }
}

void
check_status(mil_status got, mil_status expected, const char *what, const char *file, int line)
{
    check(got == expected, what, file, line);
    if (got != expected) {
        fprintf(stderr, "    got \"%s\", expected \"%s\"; message: %s\n", mil_status_words(got),
                mil_status_words(expected), mil_message());
    }
}

float *
random_floats(int64_t count, unsigned seed)
{
    float *values = mil_alloc((size_t)count, sizeof *values);
    if (values == NULL) {
        abort();
    }
    uint64_t word = seed * 2654435761u + 1;
    for (int64_t i = 0; i < count; i++) {
        word = word * 6364136223846793005u + 1442695040888963407u;
        values[i] = (float)(word >> 40) * 0x1p-23f - 1.0f;
    }
    return values;
}

int
main(int count, char **arguments)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
#define ENTRY(name) {#name, name},
        TESTS(ENTRY)
#undef ENTRY
    };
    int run = 0;
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
        if (count > 1 && strstr(tests[i].name, arguments[1]) == NULL) {
            continue;
        }
        int before = failures;
        tests[i].run();
        CHECK(mil_memory_blocks() == 0);
        CHECK(mil_memory_bytes() == 0);
        printf("%-32s %s\n", tests[i].name, failures == before ? "ok" : "FAILED");
        fflush(stdout);
        run++;
    }
    printf("%d C tests, %d checks, %d failed\n", run, checks, failures);
    return failures != 0 || run == 0;
}
