/* What another extension module (_cuda) uses of this one's base: the message of the last failure and arenas.
 *
 * Both live in _core, where thread-local messages and memory accounting are kept once; a second copy would
 * set messages that nobody reads.  _core offers this table in a PyCapsule, and kernels/host.c forwards to it.
 */
#ifndef MIL_BASE_HOST_H
#define MIL_BASE_HOST_H

#include "base/memory.h"

#define MIL_HOST_CAPSULE "mambainllama._core._host"
#define MIL_HOST_VERSION 1

typedef struct mil_host {
    uint32_t version, size; /* MIL_HOST_VERSION, sizeof(mil_host) */
    mil_status (*fail)(mil_status code, const char *format, ...);
    const char *(*message)(void);
    mil_status (*arena_push)(mil_arena *arena, size_t count, size_t size, void **out);
    mil_arena_mark (*arena_get_mark)(const mil_arena *arena);
    void (*arena_rewind)(mil_arena *arena, mil_arena_mark mark);
} mil_host;

#endif
