/* Allocator and arenas: alignment, counting, overflow, rewinding, and every failing allocation. */
#include "harness.h"

#include <pthread.h>
#include <string.h>

static bool
aligned(const void *pointer)
{
    return pointer != NULL && (uintptr_t)pointer % MIL_ALIGNMENT == 0;
}

void
test_memory_allocator(void)
{
    void *a = mil_alloc(3, 5), *empty = mil_alloc(0, 8);
    CHECK(aligned(a));
    CHECK(aligned(empty));
    CHECK(mil_memory_blocks() == 2);
    memset(a, 1, 15);
    mil_free(a);
    mil_free(empty);
    mil_free(NULL);
    CHECK(mil_memory_blocks() == 0);

    /* Products that overflow, and sums with the header that would. */
    CHECK(mil_alloc(SIZE_MAX, 2) == NULL);
    CHECK(mil_alloc(SIZE_MAX / 2, 4) == NULL);
    CHECK(mil_alloc(1, SIZE_MAX) == NULL);
    CHECK(mil_alloc(SIZE_MAX / 8, 8) == NULL);

    mil_memory_fail_after(1);
    void *first = mil_alloc(1, 1);
    CHECK(first != NULL);
    CHECK(mil_alloc(1, 1) == NULL);
    CHECK(mil_alloc(1, 1) == NULL);
    mil_memory_fail_after(-1);
    mil_free(first);
}

void
test_memory_arena(void)
{
    mil_arena arena = {0};
    char *a, *b, *c;
    CHECK_OK(mil_arena_push(&arena, 10, 1, (void **)&a));
    mil_arena_mark mark = mil_arena_get_mark(&arena);
    CHECK_OK(mil_arena_push(&arena, 100, 8, (void **)&b));
    CHECK(aligned(a) && aligned(b));
    memset(b, 2, 800);

    /* Rewinding to a mark gives the same memory again, also from a later block. */
    mil_arena_rewind(&arena, mark);
    CHECK_OK(mil_arena_push(&arena, 100, 8, (void **)&c));
    CHECK(c == b);
    mil_arena_rewind(&arena, mark);
    CHECK_OK(mil_arena_push(&arena, 1, (size_t)1 << 20, (void **)&c)); /* a block of its own */
    memset(c, 3, (size_t)1 << 20);
    mil_arena_rewind(&arena, mark);
    CHECK(mil_memory_blocks() == 4); /* two blocks, each with a header: the second serves the next push */
    CHECK_OK(mil_arena_push(&arena, 1, (size_t)1 << 19, (void **)&b));
    CHECK(b == c && mil_memory_blocks() == 4);
    mil_arena_rewind(&arena, mark);
    CHECK_OK(mil_arena_push(&arena, 1, (size_t)1 << 21, (void **)&b)); /* too large for it: it makes room */
    CHECK(mil_memory_blocks() == 4);
    mil_arena_rewind(&arena, mark);

    /* Back to empty, the arena is one block as large as the most that was in use: the same step again allocates
     * nothing. */
    mil_arena_rewind(&arena, (mil_arena_mark){0});
    int64_t blocks = mil_memory_blocks(), bytes = mil_memory_bytes();
    for (int step = 0; step < 3; step++) {
        CHECK_OK(mil_arena_push(&arena, 10, 1, (void **)&a));
        CHECK_OK(mil_arena_push(&arena, 1, (size_t)1 << 20, (void **)&c));
        CHECK(mil_memory_blocks() == blocks && mil_memory_bytes() == bytes);
        mil_arena_rewind(&arena, (mil_arena_mark){0});
    }
    mil_arena_release(&arena);
    mil_arena_release(&arena); /* twice is safe */
}

void
test_memory_arena_failures(void)
{
    mil_arena arena = {0};
    void *out = &arena;
    CHECK_STATUS(mil_arena_push(&arena, SIZE_MAX, 8, &out), MIL_ERR_MEMORY);
    CHECK(out == NULL);
    CHECK_MESSAGE("overflow");

    CHECK_OK(mil_arena_push(&arena, 1, 100, &out));
    mil_memory_fail_after(0);
    CHECK_STATUS(mil_arena_push(&arena, 1, (size_t)1 << 20, &out), MIL_ERR_MEMORY);
    CHECK_MESSAGE("out of memory");
    mil_arena_rewind(&arena, (mil_arena_mark){0}); /* keeps the block that it has, or none */
    mil_memory_fail_after(-1);
    CHECK_OK(mil_arena_push(&arena, 1, (size_t)1 << 20, &out)); /* usable after a failure */
    mil_arena_release(&arena);
}

static void *
allocate_often(void *argument)
{
    (void)argument;
    for (int i = 0; i < 2000; i++) {
        void *a = mil_alloc(1, (size_t)(i % 100)), *b = mil_alloc(2, 64);
        mil_free(a);
        mil_free(b);
    }
    return NULL;
}

void
test_memory_threads(void)
{
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        CHECK(pthread_create(&threads[i], NULL, allocate_often, NULL) == 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
    }
}
