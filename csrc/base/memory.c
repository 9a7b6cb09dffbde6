/* Allocator and arenas (see memory.h). */
#include "base/memory.h"

#include <stdatomic.h>
#include <stdlib.h>

/* Each block is preceded by its size, in one alignment unit, so that freeing can count it back. */
static _Atomic int64_t bytes_alive, blocks_alive, fail_after = -1;

void *
mil_alloc(size_t count, size_t size)
{
    if (size != 0 && count > (SIZE_MAX / 2 - 2 * MIL_ALIGNMENT) / size) {
        return NULL;
    }
    int64_t left = atomic_load(&fail_after);
    if (left >= 0) {
        if (left == 0) {
            return NULL;
        }
        atomic_store(&fail_after, left - 1);
    }
    size_t bytes = (count * size + MIL_ALIGNMENT - 1) / MIL_ALIGNMENT * MIL_ALIGNMENT;
    char *base = aligned_alloc(MIL_ALIGNMENT, bytes + MIL_ALIGNMENT);
    if (base == NULL) {
        return NULL;
    }
    *(size_t *)base = bytes;
    atomic_fetch_add(&bytes_alive, (int64_t)bytes);
    atomic_fetch_add(&blocks_alive, 1);
    return base + MIL_ALIGNMENT;
}

void
mil_free(void *pointer)
{
    if (pointer == NULL) {
        return;
    }
    char *base = (char *)pointer - MIL_ALIGNMENT;
    atomic_fetch_sub(&bytes_alive, (int64_t)*(size_t *)base);
    atomic_fetch_sub(&blocks_alive, 1);
    free(base);
}

int64_t
mil_memory_bytes(void)
{
    return atomic_load(&bytes_alive);
}

int64_t
mil_memory_blocks(void)
{
    return atomic_load(&blocks_alive);
}

void
mil_memory_fail_after(int64_t allocations)
{
    atomic_store(&fail_after, allocations);
}

static void *
take_memory(const mil_arena *arena, size_t bytes)
{
    const mil_allocator *from = arena->allocator;
    return from == NULL ? mil_alloc(1, bytes) : from->alloc(from->owner, bytes);
}

static void
block_free(const mil_arena *arena, mil_arena_block *block)
{
    const mil_allocator *to = arena->allocator;
    if (block == NULL) {
        return;
    }
    if (to == NULL) {
        mil_free(block->memory);
    }
    else {
        to->free(to->owner, block->memory);
    }
    mil_free(block);
}

static mil_arena_block *
block_new(const mil_arena *arena, size_t size, mil_arena_block *previous)
{
    mil_arena_block *block = mil_alloc(1, sizeof *block);
    if (block == NULL) {
        return NULL;
    }
    *block = (mil_arena_block){.previous = previous, .size = size, .memory = take_memory(arena, size)};
    if (block->memory == NULL) {
        mil_free(block);
        return NULL;
    }
    return block;
}

/* A block of at least `bytes` behind the others, as large as all of them where it can be had. */
static mil_arena_block *
grow(mil_arena *arena, size_t bytes)
{
    mil_arena_block *block = arena->spare;
    arena->spare = NULL;
    if (block != NULL && block->size >= bytes) {
        block->previous = arena->last;
        block->used = 0;
        return block;
    }
    block_free(arena, block);
    size_t wanted = bytes > arena->total ? bytes : arena->total; /* at least double */
    wanted = wanted < (size_t)1 << 16 ? (size_t)1 << 16 : wanted;
    block = block_new(arena, wanted, arena->last);
    return block != NULL || wanted == bytes ? block : block_new(arena, bytes, arena->last);
}

mil_status
mil_arena_push(mil_arena *arena, size_t count, size_t size, void **out)
{
    *out = NULL;
    if (size != 0 && count > (SIZE_MAX / 4) / size) {
        return mil_fail(MIL_ERR_MEMORY, "arena: %zu elements of %zu bytes overflow", count, size);
    }
    size_t bytes = (count * size + MIL_ALIGNMENT - 1) / MIL_ALIGNMENT * MIL_ALIGNMENT;
    mil_arena_block *block = arena->last;
    if (block == NULL || block->size - block->used < bytes) {
        block = grow(arena, bytes);
        if (block == NULL) {
            return mil_fail(MIL_ERR_MEMORY, "out of memory: %zu more bytes of workspace beside %zu", bytes,
                            arena->total);
        }
        arena->last = block;
        arena->total += block->size;
    }
    *out = block->memory + block->used;
    block->used += bytes;
    arena->in_use += bytes;
    if (arena->in_use > arena->peak) {
        arena->peak = arena->in_use;
    }
    return MIL_OK;
}

mil_arena_mark
mil_arena_get_mark(const mil_arena *arena)
{
    return (mil_arena_mark){
        .block = arena->last,
        .used = arena->last ? arena->last->used : 0,
        .in_use = arena->in_use,
    };
}

void
mil_arena_rewind(mil_arena *arena, mil_arena_mark mark)
{
    /* Back to empty: one block as large as the most that was ever in use serves every later step. */
    if (mark.in_use == 0) {
        if (arena->last != NULL &&
            (arena->last->previous != NULL || arena->spare != NULL || arena->last->size < arena->peak)) {
            size_t peak = arena->peak;
            mil_arena_release(arena);
            arena->peak = peak;
            arena->last = block_new(arena, peak, NULL); /* where this fails, the next push tries again */
            arena->total = arena->last ? peak : 0;
        }
        else if (arena->last != NULL) {
            arena->last->used = 0;
        }
        arena->in_use = 0;
        return;
    }
    while (arena->last != mark.block) {
        mil_arena_block *block = arena->last;
        arena->last = block->previous;
        arena->total -= block->size;
        if (arena->spare == NULL || arena->spare->size < block->size) {
            mil_arena_block *smaller = arena->spare;
            arena->spare = block;
            block = smaller;
        }
        block_free(arena, block);
    }
    arena->last->used = mark.used;
    arena->in_use = mark.in_use;
}

void
mil_arena_release(mil_arena *arena)
{
    while (arena->last != NULL) {
        mil_arena_block *previous = arena->last->previous;
        block_free(arena, arena->last);
        arena->last = previous;
    }
    block_free(arena, arena->spare);
    *arena = (mil_arena){.allocator = arena->allocator};
}
