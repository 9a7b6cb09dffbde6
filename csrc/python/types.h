/* The objects Model and State of _core, as the other bindings see them (see model.c). */
#ifndef MIL_PYTHON_TYPES_H
#define MIL_PYTHON_TYPES_H

#include "python/arrays.h" /* Python.h comes first */
#include "python/errors.h"

#include "model/model.h"

/* A model over borrowed parameters. Immutable after its making, but for the parameters' values. */
typedef struct core_model {
    PyObject_HEAD mil_model model;
    PyObject *config;   /* the dict it was made from */
    PyObject *values;   /* dict: name -> the caller's array object */
    core_array *arrays; /* [array_count] borrowed */
    int64_t array_count;
} core_model;

/* One sequence's state. `busy` while a call without the GIL works on it. */
typedef struct core_sequence_state {
    PyObject_HEAD core_model *owner; /* strong: the state reads its model's configuration */
    mil_state state;
    bool busy;
} core_sequence_state;

/* The module's state, from an object of one of its types. */
static inline core_state *
core_state_of(PyObject *self)
{
    return PyType_GetModuleState(Py_TYPE(self));
}

/* NULL with DtypeError unless `object` is a Model (a State). Borrowed. `what` names it in messages. */
core_model *
core_as_model(core_state *core, PyObject *object, const char *what);
core_sequence_state *
core_as_state(core_state *core, PyObject *object, const char *what);

/* A State that owns `state` (moved), of the same model. */
PyObject *
core_wrap_state(core_state *core, core_model *owner, mil_state *state);

/* The table in another module's capsule, the CPU's for None or NULL; or NULL with an exception. */
const mil_ops *
core_read_table(core_state *core, PyObject *capsule);
/* {"device", "activation", "prefill_rows"} of a table. */
PyObject *
core_table_info(const mil_ops *ops);

/* Tokens from anything NumPy reads as integers: a new int32 array of one axis. Checked to fit int32 only. */
PyObject *
core_tokens(core_state *core, PyObject *object, const char *what);
/* Ascending offsets of sequences over `rows` rows (NULL or None: one sequence): a new int64 array. */
PyObject *
core_offsets(core_state *core, PyObject *object, int64_t rows);
/* An array's data; NULL for NULL. */
static inline void *
core_data(PyObject *array)
{
    return array == NULL ? NULL : PyArray_DATA((PyArrayObject *)array);
}
static inline int64_t
core_length(PyObject *array)
{
    return (int64_t)PyArray_DIM((PyArrayObject *)array, 0);
}

/* A configuration from its dict (see config.c); inv_freq and layers stay in `arena`. 0, or -1 with an exception. */
int
core_read_config(core_state *core, PyObject *dict, mil_arena *arena, mil_model_config *config);

#endif
