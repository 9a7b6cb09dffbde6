/* One call of an operator from Python (see call.h).
 *
 * Everything is checked here, with the GIL held, before an operator sees a pointer: an operator trusts its
 * struct, so nothing that Python code can pass may reach it unchecked (index ranges included).
 */
#include "python/call.h"

#include <math.h>
#include <stdarg.h>

#include "python/types.h"

#define CALL_MAX_KEYWORDS 64
/* Beside the element types: what activations are, which on a device the first of them says. */
#define ACTIVATION ((core_element)(CORE_OTHER + 1))
#define DEFAULT_STREAM 1 /* CUDA's, by DLPack's numbers */

/* ---- begin, fail, end ---------------------------------------------------------------------------------- */

void
call_begin(core_call *call, PyObject *module, const char *operator, PyObject * const * args, Py_ssize_t count,
           PyObject *names)
{
    *call = (core_call){
        .core = core_get_state(module),
        .operator= operator,
        .values = args + count,
        .names = names,
        .stream = DEFAULT_STREAM,
        .place = CALL_NOWHERE,
        .act = CORE_OTHER,
    };
    if (count != 0) {
        call_fail(call, MIL_ERR_VALUE, "%s: takes keyword arguments only; got %zd positional", operator,
                  count);
    }
    if (names != NULL && PyTuple_GET_SIZE(names) > CALL_MAX_KEYWORDS) {
        call_fail(call, MIL_ERR_VALUE, "%s: too many keyword arguments", operator);
    }
}

void
call_fail(core_call *call, mil_status status, const char *format, ...)
{
    if (call->failed) {
        return;
    }
    call->failed = true;
    va_list arguments;
    va_start(arguments, format);
    PyObject *text = PyUnicode_FromFormatV(format, arguments);
    va_end(arguments);
    if (text != NULL) {
        core_raise_format(call->core, status, "%U", text);
        Py_DECREF(text);
    }
}

/* ---- devices -------------------------------------------------------------------------------------------- */

void
call_on_devices(core_call *call)
{
    call->devices = true;
    int64_t stream = call_int(call, "stream", 0);
    if (call_has(call, "stream") && !call->failed) {
        if (stream < 1) {
            call_fail(call, MIL_ERR_VALUE,
                      "%s: stream = %lld; expected the number of a CUDA stream (1: the default stream)",
                      call->operator,(long long) stream);
        }
        call->stream = stream;
        call->stream_known = true;
    }
}

static void *
caller_stream(const core_call *call)
{
    return (void *)(intptr_t)call->stream;
}

/* A function of mambainllama.interop, called; NULL with an exception and the call failed. */
static PyObject *
ask_interop(core_call *call, const char *function, const char *format, ...)
{
    PyObject *module = PyImport_ImportModule("mambainllama.interop"), *result = NULL;
    PyObject *callable = module != NULL ? PyObject_GetAttrString(module, function) : NULL;
    if (callable != NULL) {
        va_list arguments;
        va_start(arguments, format);
        PyObject *tuple = Py_VaBuildValue(format, arguments);
        va_end(arguments);
        result = tuple != NULL ? PyObject_Call(callable, tuple, NULL) : NULL;
        Py_XDECREF(tuple);
    }
    Py_XDECREF(callable);
    Py_XDECREF(module);
    call->failed = call->failed || result == NULL;
    return result;
}

/* Before the first array of a device is taken: on which stream does its caller work? */
static void
meet_device(core_call *call, PyObject *object, const char *name)
{
    int on_device = call->like == NULL && !call->failed ? core_is_on_device(object) : 0;
    if (on_device <= 0) {
        PyErr_Clear(); /* borrowing says what is wrong with it */
        return;
    }
    call->like = Py_NewRef(object);
    PyObject *what = PyUnicode_FromFormat("%s: %s", call->operator, name);
    PyObject *stream = what == NULL ? NULL : ask_interop(call, "meet", "(ON)", object, what);
    if (stream == NULL) {
        call->failed = true;
    }
    else if (!call->stream_known && stream != Py_None) {
        call->stream = (int64_t)PyLong_AsLongLong(stream);
        call->stream_known = true;
        call->failed = call->failed || PyErr_Occurred();
    }
    Py_XDECREF(stream);
}

static void
place_words(int place, char *text, size_t size)
{
    if (place < 0) {
        snprintf(text, size, "the CPU");
    }
    else {
        snprintf(text, size, "cuda:%d", place);
    }
}

/* All arrays lie where the first one does. */
static bool
same_place(core_call *call, const core_array *array, const char *name)
{
    if (call->place == CALL_NOWHERE) {
        call->place = array->device;
    }
    if (call->devices && call->place != array->device) {
        char here[24], there[24];
        place_words(array->device, here, sizeof here);
        place_words(call->place, there, sizeof there);
        call_fail(call, MIL_ERR_DEVICE,
                  "%s: %s lies on %s and the arguments before it on %s; move it there first", call->operator,
                  name, here, there);
    }
    return !call->failed;
}

/* The operators for these arrays; NULL with an exception and the call failed. */
static const mil_ops *
ops_of(core_call *call)
{
    if (call->failed) {
        return NULL;
    }
    if (call->place < 0) {
        return &mil_cpu_ops;
    }
    if (call->ops == NULL) {
        core_element act = call->act == CORE_OTHER ? CORE_F32 : call->act;
        call->table = ask_interop(call, "table", "(is)", call->place, core_element_name(act));
        call->ops = call->table != NULL ? core_read_table(call->core, call->table) : NULL;
        call->failed = call->failed || call->ops == NULL;
    }
    return call->ops;
}

/* After what the caller has queued; and the rows' numbers where kernels read them. */
static mil_status
begin_on_device(core_call *call)
{
    mil_context *context = &call->context;
    MIL_TRY(context->ops->order(context, caller_stream(call), context->stream));
    call->begun = true;
    if (call->rows == NULL) {
        return MIL_OK;
    }
    mil_rows *rows = call->rows;
    int64_t *numbers, columns = rows->sequences + 1;
    size_t bytes = (size_t)(3 * columns) * sizeof *numbers;
    MIL_TRY(MIL_PUSH(context->host, 3 * columns, int64_t, &numbers));
    memset(numbers, 0, bytes);
    memcpy(numbers, rows->offsets, (size_t)columns * sizeof *numbers);
    for (int64_t i = 0; i < rows->sequences; i++) {
        numbers[columns + i] = rows->past != NULL ? rows->past[i] : 0;
        numbers[2 * columns + i] = rows->boundary != NULL ? rows->boundary[i] : 0;
    }
    const void *uploaded;
    MIL_TRY(context->ops->upload(context, numbers, bytes, &uploaded));
    rows->device = uploaded;
    return MIL_OK;
}

const void *
call_upload(core_call *call, const void *integers, size_t bytes)
{
    const void *uploaded = NULL;
    if (call->status == MIL_OK) {
        call->status = call->context.ops->upload(&call->context, integers, bytes, &uploaded);
    }
    return uploaded;
}

/* Device memory has no copy of strided rows: gathering all of them in order is one. */
static mil_status
gather_all(core_call *call, int64_t rows, int64_t width, const void *from, int64_t from_stride, void *to,
           int64_t to_stride)
{
    mil_context *context = &call->context;
    int64_t *index;
    const void *uploaded;
    MIL_TRY(MIL_PUSH(context->host, rows, int64_t, &index));
    for (int64_t r = 0; r < rows; r++) {
        index[r] = r;
    }
    MIL_TRY(context->ops->upload(context, index, (size_t)rows * sizeof *index, &uploaded));
    return context->ops->gather_rows(context, rows, width, uploaded, from, from_stride, to, to_stride);
}

void
call_copy_rows(core_call *call, int64_t rows, int64_t width, const void *from, int64_t from_stride, void *to,
               int64_t to_stride)
{
    const mil_ops *ops = call->context.ops;
    size_t item = mil_dtype_size(ops->activation_dtype), row = (size_t)width * item;
    if (from == to || call->status != MIL_OK) {
        return;
    }
    if (call->place < 0) {
        for (int64_t r = 0; r < rows; r++) {
            memmove((char *)to + (size_t)(r * to_stride) * item,
                    (const char *)from + (size_t)(r * from_stride) * item, row);
        }
    }
    else if (from_stride == width && to_stride == width) {
        call->status = ops->copy(&call->context, to, from, (size_t)rows * row);
    }
    else {
        call->status = gather_all(call, rows, width, from, from_stride, to, to_stride);
    }
}

/* ---- ready, end ---------------------------------------------------------------------------------------- */

bool
call_ready(core_call *call)
{
    Py_ssize_t count = call->names != NULL ? PyTuple_GET_SIZE(call->names) : 0;
    for (Py_ssize_t i = 0; i < count && !call->failed; i++) {
        if ((call->used >> i & 1) == 0) {
            call_fail(call, MIL_ERR_VALUE, "%s: unknown argument %U", call->operator,
                      PyTuple_GET_ITEM(call->names, i));
        }
    }
    if (call->failed) {
        return false;
    }
    const mil_ops *ops = ops_of(call);
    if (ops == NULL) {
        return false;
    }
    call->status = core_context_acquire(call->core, ops, &call->context);
    call->leased = call->status == MIL_OK;
    if (call->leased && call->place >= 0) {
        call->status = begin_on_device(call);
    }
    return call->status == MIL_OK;
}

/* Whether all results are arrays of a library that knows streams. */
static bool
results_wait(const core_call *call)
{
    bool wait = call->stream_known;
    for (int i = 0; i < call->result_count; i++) {
        wait = wait && Py_TYPE(call->results[i].value) != call->core->types[CORE_TYPE_DEVICE_ARRAY];
    }
    return wait;
}

/* On a device the caller's stream goes on after the operator.  Where we do not know it, or the call failed, or a result
 * is an array of ours, the host waits instead. */
static void
leave_context(core_call *call)
{
    if (call->place < 0) {
        core_context_release(call->core, &call->context);
        return;
    }
    const mil_ops *ops = call->context.ops;
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
        status = !call->begun ? MIL_OK
                 : call->status == MIL_OK && results_wait(call)
                     ? ops->order(&call->context, call->context.stream, caller_stream(call))
                     : ops->finish(&call->context);
        core_context_leave(call->core, &call->context);
    Py_END_ALLOW_THREADS
    call->status = call->status != MIL_OK ? call->status : status;
}

/* Releases all but the results; false where the call failed. */
static bool
finish(core_call *call)
{
    if (call->leased) {
        leave_context(call);
    }
    if (!call->failed && call->status != MIL_OK) {
        core_raise(call->core, call->status);
        call->failed = true;
    }
    for (int64_t i = 0; i < call->array_count; i++) {
        core_array_release(&call->arrays[i]);
    }
    PyMem_Free(call->arrays);
    mil_arena_release(&call->memory);
    Py_XDECREF(call->like);
    Py_XDECREF(call->table);
    return !call->failed;
}

static PyObject *
results_as_dict(core_call *call)
{
    PyObject *dict = PyDict_New();
    for (int i = 0; i < call->result_count && dict != NULL; i++) {
        if (PyDict_SetItemString(dict, call->results[i].key, call->results[i].value) < 0) {
            Py_CLEAR(dict);
        }
    }
    return dict;
}

static void
drop_results(core_call *call)
{
    for (int i = 0; i < call->result_count; i++) {
        Py_CLEAR(call->results[i].value);
    }
}

PyObject *
call_end_dict(core_call *call)
{
    PyObject *result = finish(call) ? results_as_dict(call) : NULL;
    drop_results(call);
    return result;
}

PyObject *
call_end(core_call *call)
{
    if (call->result_count > 1) {
        return call_end_dict(call);
    }
    PyObject *result = NULL;
    if (finish(call)) {
        result = Py_NewRef(call->result_count == 1 ? call->results[0].value : Py_None);
    }
    drop_results(call);
    return result;
}

/* Takes over the reference; NULL marks a Python failure. */
static void
add_result(core_call *call, const char *key, PyObject *value)
{
    if (value == NULL || call->result_count == CALL_MAX_RESULTS) {
        Py_XDECREF(value);
        call->failed = true;
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_SystemError, "too many results");
        }
        return;
    }
    call->results[call->result_count].key = key;
    call->results[call->result_count].value = value;
    call->result_count++;
}

void
call_number(core_call *call, const char *key, double value)
{
    if (!call->failed && call->status == MIL_OK) {
        add_result(call, key, PyFloat_FromDouble(value));
    }
}

/* ---- plain values -------------------------------------------------------------------------------------- */

PyObject *
call_object(core_call *call, const char *name)
{
    Py_ssize_t count = call->names != NULL ? PyTuple_GET_SIZE(call->names) : 0;
    for (Py_ssize_t i = 0; i < count && i < CALL_MAX_KEYWORDS; i++) {
        if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(call->names, i), name) == 0) {
            call->used |= (uint64_t)1 << i;
            return call->values[i] == Py_None ? NULL : call->values[i];
        }
    }
    return NULL;
}

bool
call_has(core_call *call, const char *name)
{
    return call_object(call, name) != NULL;
}

/* Turns a conversion's own exception into ours, which names the argument. */
static void
fail_value(core_call *call, const char *name, PyObject *value, const char *expected)
{
    PyErr_Clear();
    call_fail(call, MIL_ERR_VALUE, "%s: %s is %R; expected %s", call->operator, name, value, expected);
}

int64_t
call_int(core_call *call, const char *name, int64_t otherwise)
{
    PyObject *object = call_object(call, name);
    if (object == NULL || call->failed) {
        return otherwise;
    }
    PyObject *number = PyNumber_Index(object);
    int64_t value = number != NULL ? (int64_t)PyLong_AsLongLong(number) : -1;
    Py_XDECREF(number);
    if (PyErr_Occurred()) {
        fail_value(call, name, object, "an integer");
    }
    return value;
}

double
call_float(core_call *call, const char *name, double otherwise)
{
    PyObject *object = call_object(call, name);
    if (object == NULL || call->failed) {
        return otherwise;
    }
    double value = PyFloat_AsDouble(object);
    if (PyErr_Occurred() || isnan(value)) {
        fail_value(call, name, object, "a number");
    }
    return value;
}

bool
call_bool(core_call *call, const char *name, bool otherwise)
{
    PyObject *object = call_object(call, name);
    if (object == NULL || call->failed) {
        return otherwise;
    }
    int value = PyObject_IsTrue(object);
    if (value < 0) {
        fail_value(call, name, object, "True or False");
    }
    return value > 0;
}

int
call_choice(core_call *call, const char *name, int otherwise, const char *const *choices)
{
    PyObject *object = call_object(call, name);
    if (object == NULL || call->failed) {
        return otherwise;
    }
    char list[128] = "";
    for (int i = 0; choices[i] != NULL; i++) {
        if (PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, choices[i]) == 0) {
            return i;
        }
        size_t length = strlen(list);
        snprintf(list + length, sizeof list - length, "%s\"%s\"", i > 0 ? ", " : "one of ", choices[i]);
    }
    fail_value(call, name, object, list);
    return otherwise;
}

/* ---- arrays -------------------------------------------------------------------------------------------- */

/* "(5, 2, 16)" */
static void
format_shape(const core_array *array, char *text, size_t size)
{
    size_t used = (size_t)snprintf(text, size, "(");
    for (int i = 0; i < array->ndim; i++) {
        used += (size_t)snprintf(text + used, size - used, "%s%lld", i > 0 ? ", " : "",
                                 (long long)array->shape[i]);
    }
    snprintf(text + used, size - used, array->ndim == 1 ? ",)" : ")");
}

/* Names of the axes and where their sizes are kept, from the tail of a variadic call. */
typedef struct size_list {
    int count;
    char names[CORE_MAX_DIMS][24];
    int64_t *values[CORE_MAX_DIMS];
} size_list;

static size_list
read_sizes(const char *sizes, va_list arguments)
{
    size_list list = {0};
    while (*sizes != '\0' && list.count < CORE_MAX_DIMS) {
        size_t length = strcspn(sizes, " ");
        snprintf(list.names[list.count], sizeof list.names[0], "%.*s", (int)length, sizes);
        list.values[list.count++] = va_arg(arguments, int64_t *);
        sizes += length + (sizes[length] == ' ');
    }
    return list;
}

/* "(rows = 6, B_groups, state_dim = 16)": what is known is given with its number. */
static void
format_sizes(const size_list *list, char *text, size_t size)
{
    size_t used = (size_t)snprintf(text, size, "(");
    for (int i = 0; i < list->count; i++) {
        used += (size_t)snprintf(text + used, size - used, "%s%s", i > 0 ? ", " : "", list->names[i]);
        if (*list->values[i] > 0) {
            used += (size_t)snprintf(text + used, size - used, " = %lld", (long long)*list->values[i]);
        }
    }
    snprintf(text + used, size - used, ")");
}

/* Room for one more borrowed array; NULL with the failure recorded. */
static core_array *
new_array(core_call *call)
{
    if (call->array_count == call->array_capacity) {
        int64_t capacity = call->array_capacity > 0 ? 2 * call->array_capacity : 32;
        core_array *larger = PyMem_Realloc(call->arrays, (size_t)capacity * sizeof(core_array));
        if (larger == NULL) {
            PyErr_NoMemory();
            call->failed = true;
            return NULL;
        }
        call->arrays = larger;
        call->array_capacity = capacity;
    }
    return &call->arrays[call->array_count];
}

/* Shape and layout of one array against the sizes; unknown sizes are taken from it. */
static void
check_layout(core_call *call, const core_array *array, const char *name, int64_t *stride,
             const size_list *list)
{
    bool fits = array->ndim == list->count;
    for (int i = 0; i < list->count && fits; i++) {
        fits = array->shape[i] > 0 && (*list->values[i] <= 0 || *list->values[i] == array->shape[i]);
    }
    if (!fits) {
        char got[128], expected[256];
        format_shape(array, got, sizeof got);
        format_sizes(list, expected, sizeof expected);
        call_fail(call, MIL_ERR_SHAPE, "%s: %s has shape %s; expected %s", call->operator, name, got,
                  expected);
        return;
    }
    int64_t width = 1;
    for (int i = array->ndim - 1; i >= 0; i--) {
        /* The step along an axis of one entry means nothing. */
        bool rows_axis = i == 0 && stride != NULL && array->ndim > 1;
        bool dense = array->shape[i] == 1 || array->strides[i] == width;
        if (!dense && !(rows_axis && array->strides[i] > width)) {
            call_fail(call, MIL_ERR_VALUE,
                      "%s: %s steps by %lld elements along axis %d; expected %s%lld: pass %s%s%s",
                      call->operator, name, (long long)array->strides[i], i, rows_axis ? "at least " : "",
                      (long long)width, array->device < 0 ? "numpy.ascontiguousarray(" : "", name,
                      array->device < 0 ? ")" : ".contiguous()");
            return;
        }
        if (rows_axis) {
            *stride = array->shape[0] > 1 ? array->strides[0] : width;
        }
        else {
            width *= array->shape[i];
        }
        *list->values[i] = array->shape[i];
    }
    if (stride != NULL && array->ndim <= 1) {
        *stride = 1;
    }
}

/* Borrows `object`, or gives NULL with the call failed. `host`: it must lie there whatever the others do. */
static core_array *
borrow(core_call *call, PyObject *object, const char *name, bool host)
{
    if (object == NULL || call->failed) {
        return NULL;
    }
    bool devices = call->devices && !host;
    if (devices) {
        meet_device(call, object, name);
    }
    core_array *array = call->failed ? NULL : new_array(call);
    if (array == NULL) {
        return NULL;
    }
    int failed = devices ? core_array_borrow_on(call->core, object, call->operator, name, call->stream, array)
                         : core_array_borrow(call->core, object, call->operator, name, array);
    if (failed < 0) {
        call->failed = true;
        return NULL;
    }
    call->array_count++;
    return host || same_place(call, array, name) ? array : NULL;
}

/* What activations are: float32, or on a device what the first of them is. */
static core_element
activation_of(core_call *call, const core_array *array)
{
    if (array->device < 0) {
        return CORE_F32;
    }
    if (call->act == CORE_OTHER && array->element <= CORE_F16) {
        call->act = array->element;
    }
    return call->act == CORE_OTHER ? CORE_F32 : call->act;
}

/* Borrows `object` with the given elements. */
static void *
bind_object(core_call *call, PyObject *object, const char *name, core_element element, bool write,
            int64_t *stride, const size_list *list)
{
    core_array *array = borrow(call, object, name, element == CORE_I32 || element == CORE_I64);
    if (array == NULL) {
        return NULL;
    }
    bool any = element == ACTIVATION && array->device >= 0 && call->act == CORE_OTHER;
    element = element == ACTIVATION ? activation_of(call, array) : element;
    if (array->element != element) {
        call_fail(call, MIL_ERR_DTYPE, "%s: %s has dtype %s; expected %s", call->operator, name,
                  array->dtype_name, any ? "float32, bfloat16 or float16" : core_element_name(element));
        return NULL;
    }
    if (write && !array->writeable) {
        call_fail(call, MIL_ERR_VALUE, "%s: %s is read-only and would be written: pass %s.copy()",
                  call->operator, name, name);
        return NULL;
    }
    check_layout(call, array, name, stride, list);
    return call->failed ? NULL : array->data;
}

/* The object of a required keyword. */
static PyObject *
require(core_call *call, const char *name)
{
    PyObject *object = call_object(call, name);
    if (object == NULL && !call->failed) {
        call_fail(call, MIL_ERR_VALUE, "%s: argument %s is missing", call->operator, name);
    }
    return object;
}

/* The variadic functions below differ in three switches only. */
#define BIND(object, element, write)                                                 \
    do {                                                                             \
        PyObject *bind_object_ = (object);                                           \
        if (bind_object_ == NULL || call->failed) {                                  \
            return NULL;                                                             \
        }                                                                            \
        va_list arguments;                                                           \
        va_start(arguments, sizes);                                                  \
        size_list list = read_sizes(sizes, arguments);                               \
        va_end(arguments);                                                           \
        return bind_object(call, bind_object_, name, element, write, stride, &list); \
    } while (0)

const float *
call_input(core_call *call, const char *name, int64_t *stride, const char *sizes, ...)
{
    BIND(require(call, name), ACTIVATION, false);
}

const float *
call_optional(core_call *call, const char *name, int64_t *stride, const char *sizes, ...)
{
    BIND(call_object(call, name), ACTIVATION, false);
}

const float *
call_floats(core_call *call, const char *name, bool required, const char *sizes, ...)
{
    int64_t *stride = NULL;
    BIND(required ? require(call, name) : call_object(call, name), CORE_F32, false);
}

const float *
call_host_floats(core_call *call, const char *name, int64_t *stride, const char *sizes, ...)
{
    bool devices = call->devices;
    va_list arguments;
    va_start(arguments, sizes);
    size_list list = read_sizes(sizes, arguments);
    va_end(arguments);
    PyObject *object = require(call, name);
    int place = call->place;
    call->devices = false; /* as for operators that compute on the CPU only */
    float *data = object == NULL ? NULL : bind_object(call, object, name, CORE_F32, false, stride, &list);
    call->devices = devices;
    call->place = place;
    return data;
}

const int32_t *
call_int32(core_call *call, const char *name, bool required, const char *sizes, ...)
{
    int64_t *stride = NULL;
    BIND(required ? require(call, name) : call_object(call, name), CORE_I32, false);
}

const int64_t *
call_int64(core_call *call, const char *name, bool required, const char *sizes, ...)
{
    int64_t *stride = NULL;
    BIND(required ? require(call, name) : call_object(call, name), CORE_I64, false);
}

/* What the elements of a weight mean: its own type, or for uint16 the keyword's word. */
static bool
weight_dtype(core_call *call, const core_array *array, const char *name, const char *dtype_name,
             mil_dtype *dtype)
{
    static const char *const choices[] = {"float32", "bfloat16", "float16", NULL};
    bool said = call_has(call, dtype_name);
    mil_dtype word = (mil_dtype)call_choice(call, dtype_name, MIL_F32, choices);
    if (call->failed) {
        return false;
    }
    switch (array->element) {
        case CORE_F32:
            *dtype = MIL_F32;
            break;
        case CORE_BF16:
            *dtype = MIL_BF16;
            break;
        case CORE_F16:
            *dtype = MIL_F16;
            break;
        case CORE_U16:
            if (said && word != MIL_F32) {
                *dtype = word;
                return true;
            }
            call_fail(call, MIL_ERR_DTYPE,
                      "%s: %s has dtype uint16: say what its bits are with %s=\"bfloat16\"", call->operator,
                      name, dtype_name);
            return false;
        default:
            call_fail(call, MIL_ERR_DTYPE, "%s: %s has dtype %s; expected float32, bfloat16 or float16",
                      call->operator, name, array->dtype_name);
            return false;
    }
    if (said && word != *dtype) {
        call_fail(call, MIL_ERR_DTYPE, "%s: %s has dtype %s, but %s says %s", call->operator, name,
                  array->dtype_name, dtype_name, choices[word]);
        return false;
    }
    return true;
}

static void *
bind_weight(core_call *call, PyObject *object, const char *name, const char *dtype_name, mil_dtype *dtype,
            bool write, const size_list *list)
{
    core_array *array = borrow(call, object, name, false);
    if (array == NULL) {
        return NULL;
    }
    if (!weight_dtype(call, array, name, dtype_name, dtype)) {
        return NULL;
    }
    if (write && !array->writeable) {
        call_fail(call, MIL_ERR_VALUE, "%s: %s is read-only and would be written: pass %s.copy()",
                  call->operator, name, name);
        return NULL;
    }
    check_layout(call, array, name, NULL, list);
    return call->failed ? NULL : array->data;
}

const void *
call_weight(core_call *call, const char *name, const char *dtype_name, mil_dtype *dtype, const char *sizes,
            ...)
{
    va_list arguments;
    va_start(arguments, sizes);
    size_list list = read_sizes(sizes, arguments);
    va_end(arguments);
    return bind_weight(call, require(call, name), name, dtype_name, dtype, false, &list);
}

int
call_array_dims(core_call *call, const char *name)
{
    PyObject *object = call_object(call, name);
    if (call->failed) {
        return 0; /* the exception that is set must stay */
    }
    PyObject *ndim = object != NULL ? PyObject_GetAttrString(object, "ndim") : NULL;
    long value = ndim != NULL && PyLong_Check(ndim) ? PyLong_AsLong(ndim) : 0;
    Py_XDECREF(ndim);
    PyErr_Clear();
    return (int)value;
}

int64_t
call_list_size(core_call *call, const char *name)
{
    PyObject *object = require(call, name);
    return object != NULL && PyTuple_Check(object) ? PyTuple_GET_SIZE(object) : 0;
}

const void *
call_list_weight(core_call *call, const char *name, int64_t index, const char *dtype_name, mil_dtype *dtype,
                 const char *sizes, ...)
{
    va_list arguments;
    va_start(arguments, sizes);
    size_list list = read_sizes(sizes, arguments);
    va_end(arguments);
    char entry[48];
    snprintf(entry, sizeof entry, "%s[%lld]", name, (long long)index);
    return bind_weight(call, PyTuple_GET_ITEM(call_object(call, name), index), entry, dtype_name, dtype,
                       false, &list);
}

void
call_check_begin(core_call *call, const void *data, const char *name)
{
    if (call->place >= 0 && (uintptr_t)data % 16 != 0) {
        call_fail(call, MIL_ERR_VALUE,
                  "%s: %s begins at an address that is no multiple of 16 bytes: pass a contiguous copy",
                  call->operator, name);
    }
}

/* A C-contiguous array of *count elements (0: any number, then told) in any shape.  Float32, or with
 * `dtype` any weight type. */
static void *
bind_flat(core_call *call, PyObject *object, const char *name, const char *dtype_name, mil_dtype *dtype,
          bool write, int64_t *count)
{
    core_array *array = borrow(call, object, name, false);
    if (array == NULL) {
        return NULL;
    }
    if (dtype != NULL) {
        if (!weight_dtype(call, array, name, dtype_name, dtype)) {
            return NULL;
        }
    }
    else if (array->element != CORE_F32) {
        call_fail(call, MIL_ERR_DTYPE, "%s: %s has dtype %s; expected float32", call->operator, name,
                  array->dtype_name);
        return NULL;
    }
    int64_t size = 1;
    bool dense = true;
    for (int i = array->ndim - 1; i >= 0; i--) {
        dense = dense && (array->shape[i] == 1 || array->strides[i] == size);
        size *= array->shape[i];
    }
    bool fits = size > 0 && (*count <= 0 || size == *count);
    if (!fits || !dense || (write && !array->writeable)) {
        char shape[128], expected[48] = "at least one element";
        format_shape(array, shape, sizeof shape);
        if (*count > 0) {
            snprintf(expected, sizeof expected, "%lld elements", (long long)*count);
        }
        call_fail(call, fits ? MIL_ERR_VALUE : MIL_ERR_SHAPE,
                  "%s: %s has shape %s%s; expected %s, C-contiguous%s", call->operator, name, shape,
                  !fits    ? ""
                  : !dense ? ", not contiguous"
                           : ", read-only",
                  expected, write ? " and writeable" : "");
        return NULL;
    }
    *count = size;
    return array->data;
}

const float *
call_flat(core_call *call, const char *name, int64_t *count)
{
    return bind_flat(call, require(call, name), name, NULL, NULL, false, count);
}

float *
call_flat_inout(core_call *call, const char *name, int64_t *count)
{
    return bind_flat(call, require(call, name), name, NULL, NULL, true, count);
}

void *
call_flat_weight(core_call *call, const char *name, const char *dtype_name, mil_dtype *dtype, int64_t *count)
{
    return bind_flat(call, require(call, name), name, dtype_name, dtype, true, count);
}

/* ---- results ------------------------------------------------------------------------------------------- */

/* A new array on the device of the others, of the same library where we know it. */
static void *
new_on_device(core_call *call, const char *key, core_element element, bool zero, int64_t *stride,
              const size_list *list)
{
    PyObject *shape = PyTuple_New(list->count);
    for (int i = 0; shape != NULL && i < list->count; i++) {
        PyTuple_SET_ITEM(shape, i, PyLong_FromLongLong(*list->values[i]));
    }
    if (shape == NULL || ops_of(call) == NULL) {
        Py_XDECREF(shape);
        call->failed = true;
        return NULL;
    }
    PyObject *array = ask_interop(call, "empty", "(OONsO)", call->like, call->table, shape,
                                  core_element_name(element), zero ? Py_True : Py_False);
    void *data = array == NULL ? NULL : bind_object(call, array, key, element, true, stride, list);
    if (array != NULL) {
        add_result(call, key, array);
    }
    return call->failed ? NULL : data;
}

/* The array to write `key` into: given, or new. */
static float *
bind_result(core_call *call, PyObject *given, const char *key, core_element element, bool zero,
            int64_t *stride, const size_list *list)
{
    if (call->failed) {
        return NULL;
    }
    if (given == NULL && call->place >= 0) {
        element = element == CORE_F32 ? CORE_F32 : call->act == CORE_OTHER ? CORE_F32 : call->act;
        return new_on_device(call, key, element, zero, stride, list);
    }
    if (given != NULL) {
        float *data = bind_object(call, given, key, element, true, stride, list);
        if (data != NULL) {
            add_result(call, key, Py_NewRef(given));
        }
        return data;
    }
    int64_t shape[CORE_MAX_DIMS], width = 1;
    for (int i = list->count - 1; i >= 0; i--) {
        shape[i] = *list->values[i];
        width *= i > 0 ? shape[i] : 1;
    }
    PyObject *array = core_array_new(list->count, shape, CORE_F32, zero);
    add_result(call, key, array);
    if (stride != NULL) {
        *stride = width;
    }
    return call->failed ? NULL : (float *)PyArray_DATA((PyArrayObject *)array);
}

float *
call_output(core_call *call, const char *key, int64_t *stride, const char *sizes, ...)
{
    va_list arguments;
    va_start(arguments, sizes);
    size_list list = read_sizes(sizes, arguments);
    va_end(arguments);
    PyObject *given = call_object(call, "out");
    if (given != NULL && PyDict_Check(given)) {
        given = PyDict_GetItemString(given, key);
        given = given == Py_None ? NULL : given;
    }
    return bind_result(call, given, key, ACTIVATION, false, stride, &list);
}

float *
call_float_output(core_call *call, const char *key, const char *sizes, ...)
{
    va_list arguments;
    va_start(arguments, sizes);
    size_list list = read_sizes(sizes, arguments);
    va_end(arguments);
    return bind_result(call, call_object(call, "out"), key, CORE_F32, false, NULL, &list);
}

float *
call_gradient(core_call *call, const char *key, bool optional, bool zero, int64_t *stride, const char *sizes,
              ...)
{
    va_list arguments;
    va_start(arguments, sizes);
    size_list list = read_sizes(sizes, arguments);
    va_end(arguments);
    PyObject *out = call_object(call, "out"), *given = NULL;
    if (out != NULL && !call->failed) {
        if (!PyDict_Check(out)) {
            call_fail(call, MIL_ERR_DTYPE, "%s: out is a %.80s; expected a dict of gradients", call->operator,
                      Py_TYPE(out)->tp_name);
            return NULL;
        }
        given = PyDict_GetItemString(out, key);
    }
    if (given == Py_None) {
        if (!optional) {
            call_fail(call, MIL_ERR_VALUE, "%s: out[\"%s\"] is None, but this gradient cannot be left out",
                      call->operator, key);
        }
        return NULL;
    }
    return bind_result(call, given, key, ACTIVATION, zero, stride, &list);
}

float *
call_fresh(core_call *call, const char *key, const char *sizes, ...)
{
    va_list arguments;
    va_start(arguments, sizes);
    size_list list = read_sizes(sizes, arguments);
    va_end(arguments);
    return bind_result(call, NULL, key, CORE_F32, false, NULL, &list);
}

/* ---- rows, states, caches -------------------------------------------------------------------------------- */

static void
check_offsets(core_call *call, const mil_rows *rows)
{
    for (int64_t i = 0; i < rows->sequences && !call->failed; i++) {
        if (rows->offsets[i] > rows->offsets[i + 1]) {
            call_fail(call, MIL_ERR_VALUE, "%s: offsets[%lld] = %lld is more than offsets[%lld] = %lld",
                      call->operator,(long long) i, (long long)rows->offsets[i], (long long)i + 1,
                      (long long)rows->offsets[i + 1]);
        }
    }
    if (!call->failed && (rows->offsets[0] != 0 || rows->offsets[rows->sequences] != rows->rows)) {
        call_fail(call, MIL_ERR_VALUE, "%s: offsets run from %lld to %lld; expected 0 to rows = %lld",
                  call->operator,(long long) rows->offsets[0], (long long)rows->offsets[rows->sequences],
                  (long long)rows->rows);
    }
}

/* The tail reaches from the boundary to past and has room for one window more. */
static void
check_past(core_call *call, const mil_rows *rows)
{
    for (int64_t i = 0; i < rows->sequences && !call->failed; i++) {
        int64_t past = rows->past != NULL ? rows->past[i] : 0;
        int64_t boundary = rows->boundary != NULL ? rows->boundary[i] : past - past % MIL_WINDOW;
        if (past < 0 || past > INT64_MAX / 4) {
            call_fail(call, MIL_ERR_VALUE, "%s: past[%lld] = %lld is no number of tokens",
                      call->operator,(long long) i, (long long)past);
        }
        else if (boundary < 0 || boundary > past || past - boundary >= MIL_TAIL ||
                 boundary % MIL_WINDOW != 0) {
            call_fail(call, MIL_ERR_VALUE,
                      "%s: boundary[%lld] = %lld; expected a multiple of %d at most %d below past = %lld",
                      call->operator,(long long) i, (long long)boundary, MIL_WINDOW, MIL_TAIL - 1,
                      (long long)past);
        }
    }
}

void
call_rows(core_call *call, mil_rows *rows, int64_t count)
{
    *rows = (mil_rows){.rows = count, .sequences = 1};
    call->rows = rows;
    int64_t length = 0;
    rows->offsets = call_int64(call, "offsets", false, "sequences+1", &length);
    if (call->failed) {
        return;
    }
    if (rows->offsets == NULL) { /* one sequence */
        int64_t *offsets = NULL;
        if (mil_arena_push(&call->memory, 2, sizeof(int64_t), (void **)&offsets) != MIL_OK) {
            PyErr_NoMemory();
            call->failed = true;
            return;
        }
        offsets[0] = 0;
        offsets[1] = count;
        rows->offsets = offsets;
        length = 2;
    }
    if (length < 2) {
        call_fail(call, MIL_ERR_SHAPE, "%s: offsets has one entry; expected sequences + 1", call->operator);
        return;
    }
    rows->sequences = length - 1;
    check_offsets(call, rows);
    rows->past = call_int64(call, "past", false, "sequences", &rows->sequences);
    rows->boundary = call_int64(call, "boundary", false, "sequences", &rows->sequences);
    check_past(call, rows);
}

/* One entry of a state's dict; NULL where `count` is 0 (not used), or where it is absent and may be. */
static float *
state_entry(core_call *call, PyObject *dict, int64_t sequence, const char *key, int64_t count, bool optional)
{
    if (call->failed || count == 0) {
        return NULL;
    }
    PyObject *object = PyDict_GetItemString(dict, key);
    if (object == NULL || object == Py_None) {
        if (!optional) {
            call_fail(call, MIL_ERR_VALUE, "%s: states[%lld] has no entry \"%s\"",
                      call->operator,(long long) sequence, key);
        }
        return NULL;
    }
    char name[64];
    snprintf(name, sizeof name, "states[%lld][\"%s\"]", (long long)sequence, key);
    float *data = bind_flat(call, object, name, NULL, NULL, true, &count);
    call_check_begin(call, data, name);
    return data;
}

static void
bind_state(core_call *call, PyObject *dict, int64_t sequence, const call_state_sizes *sizes,
           mil_mixer_state *state)
{
    if (!PyDict_Check(dict)) {
        call_fail(call, MIL_ERR_DTYPE, "%s: states[%lld] is a %.80s; expected a dict",
                  call->operator,(long long) sequence, Py_TYPE(dict)->tp_name);
        return;
    }
    *state = (mil_mixer_state){
        .state = state_entry(call, dict, sequence, "state", sizes->state, false),
        .conv = state_entry(call, dict, sequence, "conv", sizes->conv * sizes->conv_rows, false),
        .x = state_entry(call, dict, sequence, "x", sizes->x * MIL_TAIL, false),
        .B = state_entry(call, dict, sequence, "B", sizes->B * MIL_TAIL, false),
        .dt = state_entry(call, dict, sequence, "dt", sizes->dt * MIL_TAIL, false),
        .current = state_entry(call, dict, sequence, "current", sizes->current ? sizes->state : 0, true),
    };
    if (state->current == NULL || call->failed) {
        return;
    }
    if (call->place >= 0) {
        call_fail(call, MIL_ERR_VALUE,
                  "%s: states[%lld] has \"current\", which only the CPU keeps: leave it out",
                  call->operator,(long long) sequence);
        return;
    }
    PyObject *tokens = PyDict_GetItemString(dict, "current_tokens");
    if (tokens == NULL) {
        call_fail(call, MIL_ERR_VALUE, "%s: states[%lld] has \"current\" but no \"current_tokens\"",
                  call->operator,(long long) sequence);
        return;
    }
    int64_t one = 1;
    size_list list = {.count = 1, .names = {"one"}, .values = {&one}};
    state->current_tokens =
        bind_object(call, tokens, "states[...][\"current_tokens\"]", CORE_I64, true, NULL, &list);
}

/* A tuple with one entry a sequence, so that nothing can change its length; a new reference. */
static PyObject *
tuple_of_sequences(core_call *call, const char *name, int64_t sequences)
{
    PyObject *object = call_object(call, name);
    if (object == NULL || call->failed) {
        return NULL;
    }
    PyObject *list = PySequence_Tuple(object);
    if (list == NULL) {
        PyErr_Clear();
        call_fail(call, MIL_ERR_DTYPE, "%s: %s is a %.80s; expected a list, one entry a sequence",
                  call->operator, name, Py_TYPE(object)->tp_name);
        return NULL;
    }
    if (PyTuple_GET_SIZE(list) != sequences) {
        call_fail(call, MIL_ERR_SHAPE, "%s: %s has %zd entries; sequences = %lld", call->operator, name,
                  PyTuple_GET_SIZE(list), (long long)sequences);
        Py_CLEAR(list);
    }
    return list;
}

const mil_mixer_state *
call_states(core_call *call, int64_t sequences, const call_state_sizes *sizes)
{
    PyObject *list = tuple_of_sequences(call, "states", sequences);
    if (list == NULL) {
        return NULL;
    }
    mil_mixer_state *states = NULL;
    if (mil_arena_push(&call->memory, (size_t)sequences, sizeof *states, (void **)&states) != MIL_OK) {
        PyErr_NoMemory();
        call->failed = true;
    }
    for (int64_t i = 0; i < sequences && !call->failed; i++) {
        bind_state(call, PyTuple_GET_ITEM(list, i), i, sizes, &states[i]);
    }
    Py_DECREF(list);
    return call->failed ? NULL : states;
}

static void
bind_cache(core_call *call, PyObject *pair, int64_t sequence, int64_t *kv_heads, int64_t *head_dim,
           bool writeable, mil_kv_cache *cache)
{
    char name[64];
    snprintf(name, sizeof name, "caches[%lld]", (long long)sequence);
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) {
        call_fail(call, MIL_ERR_DTYPE, "%s: %s is a %.80s; expected a pair (k, v)", call->operator, name,
                  Py_TYPE(pair)->tp_name);
        return;
    }
    *cache = (mil_kv_cache){0};
    mil_dtype v_dtype = MIL_F32;
    size_list list = {
        .count = 3,
        .names = {"capacity", "kv_heads", "head_dim"},
        .values = {&cache->capacity, kv_heads, head_dim},
    };
    cache->k =
        bind_weight(call, PyTuple_GET_ITEM(pair, 0), name, "cache_dtype", &cache->dtype, writeable, &list);
    cache->v = bind_weight(call, PyTuple_GET_ITEM(pair, 1), name, "cache_dtype", &v_dtype, writeable, &list);
    if (!call->failed && v_dtype != cache->dtype) {
        call_fail(call, MIL_ERR_DTYPE, "%s: %s: k is %s and v is %s", call->operator, name,
                  mil_dtype_name(cache->dtype), mil_dtype_name(v_dtype));
    }
}

const mil_kv_cache *
call_caches(core_call *call, const mil_rows *rows, int64_t *kv_heads, int64_t *head_dim, bool writeable,
            bool required)
{
    if (required) {
        require(call, "caches");
    }
    call_object(call, "cache_dtype"); /* known, even where no cache asks for it */
    PyObject *list = tuple_of_sequences(call, "caches", rows->sequences);
    if (list == NULL) {
        return NULL;
    }
    mil_kv_cache *caches = NULL;
    if (mil_arena_push(&call->memory, (size_t)rows->sequences, sizeof *caches, (void **)&caches) != MIL_OK) {
        PyErr_NoMemory();
        call->failed = true;
    }
    for (int64_t i = 0; i < rows->sequences && !call->failed; i++) {
        bind_cache(call, PyTuple_GET_ITEM(list, i), i, kv_heads, head_dim, writeable, &caches[i]);
        int64_t past = rows->past != NULL ? rows->past[i] : 0;
        int64_t end = past + rows->offsets[i + 1] - rows->offsets[i];
        if (!call->failed && end > caches[i].capacity) {
            call_fail(call, MIL_ERR_VALUE, "%s: caches[%lld] holds %lld tokens; past + rows = %lld",
                      call->operator,(long long) i, (long long)caches[i].capacity, (long long)end);
        }
    }
    Py_DECREF(list);
    return call->failed ? NULL : caches;
}
