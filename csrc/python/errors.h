/* From mil_status to Python exceptions (see errors.c). */
#ifndef MIL_PYTHON_ERRORS_H
#define MIL_PYTHON_ERRORS_H

#include "python/module.h"

/* Sets the exception of `status` with this thread's mil_message() and returns NULL.  An exception that is
 * already set stays: a callback's own failure, KeyboardInterrupt included, says more than "stopped". */
PyObject *
core_raise(core_state *state, mil_status status);

/* The same with a message of its own, printf style as PyErr_Format; always one line. */
PyObject *
core_raise_format(core_state *state, mil_status status, const char *format, ...);

#endif
