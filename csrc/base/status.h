/* Status codes and the message of the last failure.
 *
 * Every function that can fail returns a mil_status and, when it fails, has written one line into a
 * thread-local buffer of fixed size: failing needs no memory and no Python.  Only csrc/python/errors.c
 * turns a status into an exception.  The list below is the one place that names codes, their words
 * and the Python exception each becomes (besides mil.Error, which they all are).
 */
#ifndef MIL_BASE_STATUS_H
#define MIL_BASE_STATUS_H

/* X(code, words, Python base class beside mil.Error) */
#define MIL_STATUS_LIST(X)                                       \
    X(MIL_ERR_VALUE, "bad value", ValueError)                    \
    X(MIL_ERR_SHAPE, "bad shape", ValueError)                    \
    X(MIL_ERR_DTYPE, "bad dtype", TypeError)                     \
    X(MIL_ERR_FORMAT, "bad file format", ValueError)             \
    X(MIL_ERR_MEMORY, "out of memory", MemoryError)              \
    X(MIL_ERR_IO, "input or output failed", OSError)             \
    X(MIL_ERR_DEVICE, "device failed", RuntimeError)             \
    X(MIL_ERR_UNSUPPORTED, "not supported", NotImplementedError) \
    X(MIL_ERR_STATE, "wrong state", RuntimeError)                \
    X(MIL_ERR_NONFINITE, "not finite", ArithmeticError)          \
    X(MIL_ERR_STOPPED, "stopped by the caller", RuntimeError)

typedef enum mil_status {
    MIL_OK = 0,
#define MIL_STATUS_ENUM(code, words, base) code,
    MIL_STATUS_LIST(MIL_STATUS_ENUM)
#undef MIL_STATUS_ENUM
} mil_status;

#define MIL_MESSAGE_SIZE 512

#if defined(__GNUC__)
#define MIL_PRINTF(format_index, first) __attribute__((format(printf, format_index, first)))
#define MIL_MUST_CHECK __attribute__((warn_unused_result))
#else
#define MIL_PRINTF(format_index, first)
#define MIL_MUST_CHECK
#endif

/* Records the message (printf style, cut at MIL_MESSAGE_SIZE) and returns `code`. */
mil_status
mil_fail(mil_status code, const char *format, ...) MIL_PRINTF(2, 3) MIL_MUST_CHECK;

/* The message of this thread's last failure; valid until its next one. Never NULL. */
const char *
mil_message(void);

/* The general words of a code, as in MIL_STATUS_LIST. */
const char *
mil_status_words(mil_status code);

/* Passes a failure up. */
#define MIL_TRY(expression)                        \
    do {                                           \
        mil_status mil_try_status_ = (expression); \
        if (mil_try_status_ != MIL_OK) {           \
            return mil_try_status_;                \
        }                                          \
    } while (0)

/* Passes a failure to the function's one cleanup label; the function has `mil_status status`. */
#define MIL_GOTO(label, expression) \
    do {                            \
        status = (expression);      \
        if (status != MIL_OK) {     \
            goto label;             \
        }                           \
    } while (0)

/* Our own mistakes only; what a caller can cause is a status. Gone from release builds. */
#ifdef MIL_DEBUG
#include <stdio.h>
#include <stdlib.h>
#define MIL_ASSERT(condition)                                                                 \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            fprintf(stderr, "%s:%d: assertion failed: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                          \
        }                                                                                     \
    } while (0)
#else
#define MIL_ASSERT(condition) ((void)0)
#endif

#endif
