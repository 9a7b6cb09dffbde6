/* Borrowed arrays: NumPy arrays, buffers and DLPack tensors, of the host or of a CUDA device, used in place (see
 * arrays.c). */
#ifndef MIL_PYTHON_ARRAYS_H
#define MIL_PYTHON_ARRAYS_H

#include "python/module.h"

#define CORE_MAX_DIMS 4

/* Element types that cross the boundary. A bfloat16 array without a type of its own comes as uint16. */
typedef enum core_element {
    CORE_F32 = 0,
    CORE_BF16,
    CORE_F16,
    CORE_U16,
    CORE_I32,
    CORE_I64,
    CORE_I8, /* these two only leave: codes of 8-bit weights */
    CORE_U8,
    CORE_OTHER,
} core_element;

#define CORE_HOST (-1) /* core_array.device of host memory */

/* One borrowed array. Holds a strong reference (or a DLPack tensor) until released, so `data` stays valid
 * while the GIL is released, whatever other threads do with their names for it. */
typedef struct core_array {
    PyObject *owner; /* NumPy array, or NULL */
    void *dlpack;    /* tensor to hand back to its producer, or NULL */
    bool versioned;  /* which of DLPack's two structs that is */
    void *data;
    int device; /* CORE_HOST, or the number of a CUDA device */
    core_element element;
    int ndim;
    int64_t shape[CORE_MAX_DIMS];
    int64_t strides[CORE_MAX_DIMS]; /* in elements */
    bool writeable;
    char dtype_name[24]; /* for messages */
} core_array;

/* Borrows `object`. Names `operator` and `argument` in what it raises. 0, or -1 with an exception set and
 * nothing held. Copies nothing; checks that elements are aligned and strides are whole elements. */
int
core_array_borrow(core_state *state, PyObject *object, const char *operator, const char * argument,
                  core_array *out);

/* The same for arrays of CUDA devices as well.  The producer is told that they will be used on `stream` (DLPack's
 * numbers: 1 is CUDA's default stream) and makes it wait for what it has queued elsewhere. */
int
core_array_borrow_on(core_state *state, PyObject *object, const char *operator, const char * argument,
                     int64_t stream, core_array *out);

/* Whether it lies in a CUDA device's own memory; -1 with an exception. */
int
core_is_on_device(PyObject *object);

/* Gives the array back. Needs the GIL; twice is safe. */
void
core_array_release(core_array *array);

/* A new C-contiguous array, not cleared unless `zero`; NULL with an exception set. */
PyObject *
core_array_new(int ndim, const int64_t *shape, core_element element, bool zero);

const char *
core_element_name(core_element element);

/* ---- arrays of a device that we own (device_array.c) ------------------------------------------------------- */

/* A new C-contiguous array on the device of `ops`. NULL with an exception set. */
PyObject *
core_device_array_new(core_state *state, const mil_ops *ops, int ndim, const int64_t *shape,
                      core_element element, bool zero);
/* One over memory of that device that `owner` keeps. */
PyObject *
core_device_array_view(core_state *state, const mil_ops *ops, int ndim, const int64_t *shape,
                       core_element element, void *data, PyObject *owner);
int
core_add_device_array_type(PyObject *module, core_state *state);

#endif
