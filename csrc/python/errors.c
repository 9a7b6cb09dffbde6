/* From mil_status to Python exceptions.
 *
 * Every code of MIL_STATUS_LIST becomes one class that is a mambainllama.Error and also the built-in
 * exception that the list names, so both `except mil.Error` and `except ValueError` do what they say:
 *
 *   Error(Exception)
 *     ArgumentError(Error, ValueError)   ShapeError(Error, ValueError)   DtypeError(Error, TypeError) ...
 *
 * This is the only file that makes an exception out of a status.
 */
#include "python/errors.h"

#include <stdarg.h>

/* The public name of each code's class. */
static const char *const class_names[] = {
    [MIL_ERR_VALUE] = "mambainllama.ArgumentError",
    [MIL_ERR_SHAPE] = "mambainllama.ShapeError",
    [MIL_ERR_DTYPE] = "mambainllama.DtypeError",
    [MIL_ERR_FORMAT] = "mambainllama.FormatError",
    [MIL_ERR_MEMORY] = "mambainllama.OutOfMemoryError",
    [MIL_ERR_IO] = "mambainllama.FileError",
    [MIL_ERR_DEVICE] = "mambainllama.DeviceError",
    [MIL_ERR_UNSUPPORTED] = "mambainllama.UnsupportedError",
    [MIL_ERR_STATE] = "mambainllama.StateError",
    [MIL_ERR_NONFINITE] = "mambainllama.NonFiniteError",
    [MIL_ERR_STOPPED] = "mambainllama.StoppedError",
};

/* Makes one class under Error and `base` and adds it to the module under its short name. */
static int
add_error(PyObject *module, core_state *state, mil_status code, const char *words, PyObject *base)
{
    const char *name = class_names[code];
    PyObject *bases = PyTuple_Pack(2, state->error, base);
    if (bases == NULL) {
        return -1;
    }
    state->errors[code] = PyErr_NewExceptionWithDoc(name, words, bases, NULL);
    Py_DECREF(bases);
    if (state->errors[code] == NULL) {
        return -1;
    }
    return PyModule_AddObjectRef(module, strchr(name, '.') + 1, state->errors[code]);
}

int
core_add_errors(PyObject *module, core_state *state)
{
    state->error = PyErr_NewExceptionWithDoc(
        "mambainllama.Error", "Base of every error that mambainllama raises on purpose.", NULL, NULL);
    if (state->error == NULL || PyModule_AddObjectRef(module, "Error", state->error) < 0) {
        return -1;
    }
#define ADD_ERROR(code, words, base)                                              \
    _Static_assert((code) < CORE_STATUS_COUNT, "core_state.errors is too small"); \
    if (add_error(module, state, (code), words, PyExc_##base) < 0) {              \
        return -1;                                                                \
    }
    MIL_STATUS_LIST(ADD_ERROR)
#undef ADD_ERROR
    return 0;
}

static PyObject *
class_of(core_state *state, mil_status status)
{
    bool known = status > MIL_OK && (int)status < CORE_STATUS_COUNT && state->errors[status] != NULL;
    return known ? state->errors[status] : state->error;
}

PyObject *
core_raise(core_state *state, mil_status status)
{
    if (!PyErr_Occurred()) {
        const char *message = mil_message();
        PyErr_SetString(class_of(state, status), message[0] != '\0' ? message : mil_status_words(status));
    }
    return NULL;
}

/* The text with every run of white space as one blank, cut where a quoted value is too long to read.  Takes
 * over the reference; NULL with an exception set. */
static PyObject *
one_line(PyObject *text)
{
    PyObject *words = text != NULL ? PyUnicode_Split(text, NULL, -1) : NULL;
    Py_XDECREF(text);
    PyObject *blank = words != NULL ? PyUnicode_FromString(" ") : NULL;
    PyObject *line = blank != NULL ? PyUnicode_Join(blank, words) : NULL;
    Py_XDECREF(blank);
    Py_XDECREF(words);
    if (line != NULL && PyUnicode_GET_LENGTH(line) > MIL_MESSAGE_SIZE) {
        PyObject *cut = PyUnicode_Substring(line, 0, MIL_MESSAGE_SIZE - 3);
        Py_SETREF(line, cut != NULL ? PyUnicode_FromFormat("%U...", cut) : NULL);
        Py_XDECREF(cut);
    }
    return line;
}

PyObject *
core_raise_format(core_state *state, mil_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    PyObject *line = one_line(PyUnicode_FromFormatV(format, arguments)); /* %R may run over several lines */
    va_end(arguments);
    if (line != NULL) {
        PyErr_SetObject(class_of(state, status), line);
        Py_DECREF(line);
    }
    return NULL;
}
