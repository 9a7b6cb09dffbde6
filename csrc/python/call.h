/* One call of an operator from Python: keyword arguments in, checked pointers out, results back.
 *
 * A binding reads like the operator's struct in device.h:
 *
 *     core_call call;
 *     mil_glu a = {0};
 *     int64_t rows = 0;
 *     call_begin(&call, module, "glu_forward", args, count, names);
 *     a.gate = call_input(&call, "gate", &a.gate_stride, "rows width", &rows, &a.width);
 *     ...
 *     if (call_ready(&call)) {
 *         CALL_RUN(&call, mil_cpu_ops.glu_forward(&call.context, &a));
 *     }
 *     return call_end(&call);
 *
 * The first failure sticks: every later step does nothing and gives NULL or 0, so one check is enough and
 * one exit cleans up.  Sizes are named in a short list; a size that is still 0 is taken from the array,
 * another one must agree.  All sizes are at least 1.
 *
 * Devices: a binding that calls call_on_devices takes CUDA arrays as well, all of one device, and then runs
 * call.context.ops instead of mil_cpu_ops.  Activations (call_input, call_output) are float32, bfloat16 or float16
 * there, all alike; call_floats is float32 everywhere; integers stay in host memory.  The operator runs on a stream of
 * its own, after what the caller has queued on his, and his goes on after it (see finish in call.c).
 *
 * Rows: a `stride` pointer allows an array whose rows are farther apart than they are wide (a slice of a
 * projection's output); the axes after the first must always lie densely.  Without it the array is C-contiguous.
 */
#ifndef MIL_PYTHON_CALL_H
#define MIL_PYTHON_CALL_H

#include "python/arrays.h"
#include "python/errors.h"

#define CALL_MAX_RESULTS 16
#define CALL_NOWHERE (-2)

typedef struct core_call {
    core_state *core;
    const char *operator;
    PyObject *const *values; /* of the keywords, borrowed from the caller */
    PyObject *names;         /* tuple, or NULL: no keywords */
    uint64_t used;           /* bit i: keyword i was asked for */
    bool failed;             /* an exception is set */
    bool devices;            /* CUDA arrays are taken */
    bool stream_known;       /* `stream` is the caller's */
    int64_t stream;          /* by DLPack's numbers */
    int place;               /* where the arrays lie: CORE_HOST, a device's number, or CALL_NOWHERE yet */
    core_element act;        /* of activations on a device; CORE_OTHER: not known yet */
    PyObject *like;          /* strong: the first array on a device; or NULL */
    PyObject *table;         /* strong: capsule of `ops`; or NULL */
    const mil_ops *ops;      /* of the device; NULL: not asked for yet */
    mil_rows *rows;          /* of the operator's arguments, or NULL */
    bool leased;             /* context holds a scratch arena */
    bool begun;              /* work may be queued on the context's stream */
    mil_context context;
    mil_status status;
    core_array *arrays; /* everything borrowed */
    int64_t array_count, array_capacity;
    mil_arena memory; /* lists that only this call needs: offsets, states, caches */
    struct {
        const char *key;
        PyObject *value; /* strong */
    } results[CALL_MAX_RESULTS];
    int result_count;
} core_call;

void
call_begin(core_call *call, PyObject *module, const char *operator, PyObject * const * args, Py_ssize_t count,
           PyObject *names);

/* Takes arrays of CUDA devices, too, and the keyword "stream". */
void
call_on_devices(core_call *call);

/* Raises unless a keyword is unknown or something failed before; then takes a context. */
bool
call_ready(core_call *call);

/* Runs one expression of type mil_status without the GIL, unless something has failed. */
#define CALL_RUN(call, expression)                                \
    do {                                                          \
        if ((call)->status == MIL_OK) {                           \
            PyThreadState *call_run_thread = PyEval_SaveThread(); \
            (call)->status = (expression);                        \
            PyEval_RestoreThread(call_run_thread);                \
        }                                                         \
    } while (0)

/* Gives everything back; returns the only result, or a dict of several, or None, or NULL with an exception. */
PyObject *
call_end(core_call *call);
/* The same for operators that return a dict whatever the number of results. */
PyObject *
call_end_dict(core_call *call);

/* Sets the exception, once. */
void
call_fail(core_call *call, mil_status status, const char *format, ...);

/* A keyword's value, borrowed; NULL where it is missing or None. */
PyObject *
call_object(core_call *call, const char *name);
bool
call_has(core_call *call, const char *name);
int64_t
call_int(core_call *call, const char *name, int64_t otherwise);
double
call_float(core_call *call, const char *name, double otherwise);
bool
call_bool(core_call *call, const char *name, bool otherwise);
/* The position of a keyword's text in `choices` (ends with NULL). */
int
call_choice(core_call *call, const char *name, int otherwise, const char *const *choices);

/* Inputs. `sizes` is a list of names, one an axis; an int64_t * follows for each. */
const float *
call_input(core_call *call, const char *name, int64_t *stride, const char *sizes, ...);
const float *
call_optional(core_call *call, const char *name, int64_t *stride, const char *sizes, ...);
/* Float32 on any device, C-contiguous; float32 in host memory. */
const float *
call_floats(core_call *call, const char *name, bool required, const char *sizes, ...);
const float *
call_host_floats(core_call *call, const char *name, int64_t *stride, const char *sizes, ...);
/* Of float32, bfloat16 or float16, C-contiguous; `dtype_name` is the keyword that says what uint16 means. */
const void *
call_weight(core_call *call, const char *name, const char *dtype_name, mil_dtype *dtype, const char *sizes,
            ...);
const int32_t *
call_int32(core_call *call, const char *name, bool required, const char *sizes, ...);
const int64_t *
call_int64(core_call *call, const char *name, bool required, const char *sizes, ...);

/* Number of axes of a keyword's array, before it is borrowed; 0 where it has no `ndim`. */
int
call_array_dims(core_call *call, const char *name);
/* A keyword that is a list of weights: its length (0 where it is none), and one entry. */
int64_t
call_list_size(core_call *call, const char *name);
const void *
call_list_weight(core_call *call, const char *name, int64_t index, const char *dtype_name, mil_dtype *dtype,
                 const char *sizes, ...);

/* C-contiguous arrays of any shape, seen as *count elements (0: any number, then told). */
const float *
call_flat(core_call *call, const char *name, int64_t *count);
float *
call_flat_inout(core_call *call, const char *name, int64_t *count);
void *
call_flat_weight(core_call *call, const char *name, const char *dtype_name, mil_dtype *dtype, int64_t *count);

/* The result `key`: the array in keyword "out" (itself, or its entry `key` where it is a dict) or a new one.
 * Where the dict's entry is None the result is not wanted and the pointer NULL, if `optional`.
 * `zero`: a new array starts at zero (parameter gradients are added to). All sizes are known by now. */
float *
call_output(core_call *call, const char *key, int64_t *stride, const char *sizes, ...);
float *
call_gradient(core_call *call, const char *key, bool optional, bool zero, int64_t *stride, const char *sizes,
              ...);
/* The same for results that are float32 on any device. */
float *
call_float_output(core_call *call, const char *key, const char *sizes, ...);
/* A result that is always a new array; float32 on any device. */
float *
call_fresh(core_call *call, const char *key, const char *sizes, ...);
/* Fails where an array of a device begins at no multiple of 16 bytes: its kernels, or its libraries, read so many at once. */
void
call_check_begin(core_call *call, const void *data, const char *name);
/* Rows of activations from one array into another, unless they are the same; after call_ready. */
void
call_copy_rows(core_call *call, int64_t rows, int64_t width, const void *from, int64_t from_stride, void *to,
               int64_t to_stride);
/* Integers in host memory as the operator reads them; after call_ready. */
const void *
call_upload(core_call *call, const void *integers, size_t bytes);
/* A plain number as a result. */
void
call_number(core_call *call, const char *key, double value);

/* offsets, past and boundary; `count` is the number of rows. */
void
call_rows(core_call *call, mil_rows *rows, int64_t count);

/* Sizes of the arrays in a mixer state; 0: the operator does not use that array. */
typedef struct call_state_sizes {
    int64_t state, conv_rows, conv, x, B, dt; /* elements; conv, x, B, dt a row */
    bool current;                             /* current and current_tokens may be there */
} call_state_sizes;

/* Keyword "states": a list of one dict a sequence, or None (NULL). */
const mil_mixer_state *
call_states(core_call *call, int64_t sequences, const call_state_sizes *sizes);

/* Keyword "caches": a list of one (k, v) a sequence, or None (NULL).  Checks that past + count rows fit. */
const mil_kv_cache *
call_caches(core_call *call, const mil_rows *rows, int64_t *kv_heads, int64_t *head_dim, bool writeable,
            bool required);

#endif
