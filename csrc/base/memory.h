/* Memory: one allocator, and arenas for everything a step needs.
 *
 * The allocator gives 64-byte aligned blocks, checks products for overflow and counts what is alive, so
 * tests can assert that nothing is left; mil_memory_fail_after makes the n-th allocation fail, so tests
 * can walk every failing path.
 *
 * An arena hands out memory by moving a pointer and takes it all back at once (mark, rewind).  It grows
 * by whole blocks; rewinding to empty merges them into one, so from the second step of a shape
 * onwards nothing is allocated.  Within a first step, what one operator gives back serves the next one that asks for as
 * much: a device's allocator waits for the device.  Arenas belong to one context and are not shared between threads.
 */
#ifndef MIL_BASE_MEMORY_H
#define MIL_BASE_MEMORY_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

#define MIL_ALIGNMENT 64

/* NULL where memory is out or count * size overflows. Not cleared. */
void *
mil_alloc(size_t count, size_t size);
void
mil_free(void *pointer); /* NULL is fine */

int64_t
mil_memory_bytes(void); /* alive now, of all threads */
int64_t
mil_memory_blocks(void);
void
mil_memory_fail_after(int64_t allocations); /* -1: never (default). For tests. */

/* Where an arena's memory comes from: a device's allocator. NULL in an arena means host memory. */
typedef struct mil_allocator {
    void *(*alloc)(void *owner, size_t bytes); /* MIL_ALIGNMENT aligned at least; NULL: out of memory */
    void (*free)(void *owner, void *memory);
    void *owner;
} mil_allocator;

typedef struct mil_arena_block {
    struct mil_arena_block *previous;
    char *memory; /* of the allocator; this struct itself is host memory */
    size_t size, used;
} mil_arena_block;

/* Zero-initialised is a valid empty arena in host memory. */
typedef struct mil_arena {
    mil_arena_block *last;
    mil_arena_block *spare; /* the largest that a rewind has left over, or NULL */
    size_t total;           /* bytes in all blocks but the spare */
    size_t peak;            /* most bytes ever in use */
    size_t in_use;
    const mil_allocator *allocator; /* borrowed */
} mil_arena;

typedef struct mil_arena_mark {
    mil_arena_block *block;
    size_t used, in_use;
} mil_arena_mark;

/* count * size bytes, 64-byte aligned, not cleared, valid until the arena is rewound past it. */
mil_status
mil_arena_push(mil_arena *arena, size_t count, size_t size, void **out) MIL_MUST_CHECK;
mil_arena_mark
mil_arena_get_mark(const mil_arena *arena);
void
mil_arena_rewind(mil_arena *arena, mil_arena_mark mark);
void
mil_arena_release(mil_arena *arena); /* frees all; twice is safe */

#define MIL_PUSH(arena, count, type, out) \
    mil_arena_push((arena), (size_t)(count), sizeof(type), (void **)(out))

#endif
