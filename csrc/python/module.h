/* What the files of csrc/python share: the NumPy API, the module's state, and the pool of scratch arenas.
 *
 * There is no static PyObject: everything the module keeps hangs on core_state, which Python frees with
 * the module.  The one exception is NumPy's table of functions, a static pointer by NumPy's design; for
 * that reason the module declares itself unfit for several interpreters, as NumPy does.
 */
#ifndef MIL_PYTHON_MODULE_H
#define MIL_PYTHON_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL mil_numpy_api
#ifndef MIL_PYTHON_IMPORTS_NUMPY /* module.c alone fills the table */
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "device.h"

#define CORE_STATUS_COUNT 16 /* more than MIL_STATUS_LIST has; module.c checks it */

/* A scratch arena that one running call owns and then gives back, so that calls from several threads never
 * share one and a repeated call finds its memory already there. */
typedef struct core_scratch {
    struct core_scratch *next;
    const mil_ops *ops; /* of this device only */
    mil_allocator allocator;
    void *stream;
    mil_arena arena, host;
} core_scratch;

typedef struct core_state {
    PyObject *error;                     /* mambainllama.Error */
    PyObject *errors[CORE_STATUS_COUNT]; /* by mil_status; [MIL_OK] is NULL */
    PyTypeObject *types[16];             /* heap types of other files, by core_type */
    PyThread_type_lock lock;             /* guards idle */
    core_scratch *idle;
    int threads; /* the team of a call that does not say; set under the GIL */
} core_state;

/* Heap types that other files register; each keeps its place in core_state.types. */
enum core_type {
    CORE_TYPE_MODEL = 0,
    CORE_TYPE_STATE,
    CORE_TYPE_TRAINER,
    CORE_TYPE_GENERATION,
    CORE_TYPE_DEVICE_ARRAY
};

static inline core_state *
core_get_state(PyObject *module)
{
    return (core_state *)PyModule_GetState(module);
}

/* A context with an arena from the pool; never blocks on other calls. Returns MIL_ERR_MEMORY where memory is
 * out. Needs no GIL. */
mil_status
core_context_acquire(core_state *state, const mil_ops *ops, mil_context *context) MIL_MUST_CHECK;

/* Waits for what was queued and gives the arena back, empty. Call it once after every successful acquire. Needs no
 * GIL. */
void
core_context_release(core_state *state, mil_context *context);
/* The same without waiting: whoever takes the arena next works on the same stream, after what is queued there. */
void
core_context_leave(core_state *state, mil_context *context);

/* Each adds its part to the module; 0, or -1 with an exception set. */
int
core_add_errors(PyObject *module, core_state *state);
int
core_add_ops(PyObject *module);
int
core_add_model_types(PyObject *module, core_state *state);
int
core_add_trainer_type(PyObject *module, core_state *state);
int
core_add_generate(PyObject *module);

#endif
