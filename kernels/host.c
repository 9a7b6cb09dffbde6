/* The functions of csrc/base that the kernels call, forwarded to _core's. */
#include "host.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

static const mil_host *lent;

const mil_host *
mil_host_accept(const mil_host *host)
{
    bool fits = host->version == MIL_HOST_VERSION && host->size == sizeof *host;
    lent = fits ? host : NULL;
    return lent;
}

mil_status
mil_fail(mil_status code, const char *format, ...)
{
    char text[MIL_MESSAGE_SIZE];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return lent->fail(code, "%s", text);
}

const char *
mil_message(void)
{
    return lent->message();
}

mil_status
mil_arena_push(mil_arena *arena, size_t count, size_t size, void **out)
{
    return lent->arena_push(arena, count, size, out);
}

mil_arena_mark
mil_arena_get_mark(const mil_arena *arena)
{
    return lent->arena_get_mark(arena);
}

void
mil_arena_rewind(mil_arena *arena, mil_arena_mark mark)
{
    lent->arena_rewind(arena, mark);
}
