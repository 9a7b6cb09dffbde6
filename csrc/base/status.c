/* The message of the last failure, one buffer a thread (see status.h). */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[MIL_MESSAGE_SIZE];

mil_status
mil_fail(mil_status code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return code;
}

const char *
mil_message(void)
{
    return message;
}

const char *
mil_status_words(mil_status code)
{
    switch (code) {
        case MIL_OK:
            return "ok";
#define MIL_STATUS_CASE(name, words, base) \
    case name:                             \
        return words;
            MIL_STATUS_LIST(MIL_STATUS_CASE)
#undef MIL_STATUS_CASE
    }
    return "unknown status";
}
