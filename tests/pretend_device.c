/* A device for tests where there is none: the CPU's operators behind another name, with streams that are only counted.
 *
 * Compiled and imported by test_device_arrays.py; it runs everything that csrc/python does for arrays of a device.
 * Codes of weights alone are as late as a device may be: they are made when somebody waits for their stream, of what
 * the values' memory holds by then.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/host.h"
#include "device.h"

static const mil_host *host;
static mil_ops table;
static int orders, waits;
static size_t room = SIZE_MAX, taken, most; /* bytes: all that there are, and those in use */

enum { MOST_PARTS = 256 };
static mil_quantize parts[MOST_PARTS]; /* all since the table was made */
static int part_count, parts_done;

/* device.h's int8 codes of float32 values. */
static void
make_codes(const mil_quantize *a)
{
    for (int64_t row = 0; row < a->rows; row++) {
        const float *values = (const float *)a->values + row * a->columns;
        int8_t *codes = (int8_t *)a->codes + row * a->columns;
        float largest = 0.0f;
        for (int64_t i = 0; i < a->columns; i++) {
            largest = fmaxf(largest, isfinite(values[i]) ? fabsf(values[i]) : INFINITY);
        }
        *a->bad |= !isfinite(largest);
        a->scale[row] = largest > 0.0f && isfinite(largest) ? fmaxf(largest / 127.0f, 0x1p-126f) : 1.0f;
        for (int64_t i = 0; i < a->columns; i++) {
            codes[i] = isfinite(values[i]) ? (int8_t)rintf(values[i] / a->scale[row]) : 0;
        }
    }
}

static mil_status
quantize(mil_context *context, const mil_quantize *arguments)
{
    if (context->stream == NULL || arguments->from != MIL_F32 || arguments->dtype != MIL_I8 ||
        part_count == MOST_PARTS) {
        return host->fail(MIL_ERR_UNSUPPORTED, "quantize: not of this device");
    }
    parts[part_count++] = *arguments;
    return MIL_OK;
}

static mil_status
open_stream(mil_context *context)
{
    context->stream = (void *)77;
    return MIL_OK;
}

static mil_status
finish(mil_context *context)
{
    (void)context;
    waits++;
    while (parts_done < part_count) {
        make_codes(&parts[parts_done++]);
    }
    return MIL_OK;
}

static void
close_stream(mil_context *context)
{
    context->stream = NULL;
}

static mil_status
order(mil_context *context, void *before, void *after)
{
    (void)context;
    orders++;
    return before != after ? MIL_OK : host->fail(MIL_ERR_DEVICE, "a stream cannot wait for itself");
}

/* Each block is preceded by its size, in one alignment unit. */
static mil_status
take(mil_context *context, size_t bytes, void **out)
{
    (void)context;
    *out = NULL;
    bytes = (bytes / MIL_ALIGNMENT + 2) * MIL_ALIGNMENT;
    char *block = bytes <= room - taken ? aligned_alloc(MIL_ALIGNMENT, bytes) : NULL;
    if (block == NULL) {
        return host->fail(MIL_ERR_MEMORY, "out of memory: %zu bytes beside %zu", bytes, taken);
    }
    memcpy(block, &bytes, sizeof bytes);
    taken += bytes;
    most = taken > most ? taken : most;
    *out = block + MIL_ALIGNMENT;
    return MIL_OK;
}

static void
give(mil_context *context, void *pointer)
{
    (void)context;
    if (pointer != NULL) {
        char *block = (char *)pointer - MIL_ALIGNMENT;
        taken -= *(size_t *)block;
        free(block);
    }
}

static mil_status
copy(mil_context *context, void *to, const void *from, size_t bytes)
{
    (void)context;
    memmove(to, from, bytes);
    return MIL_OK;
}

static mil_status
zero(mil_context *context, void *pointer, size_t bytes)
{
    (void)context;
    memset(pointer, 0, bytes);
    return MIL_OK;
}

static mil_status
upload(mil_context *context, const void *from, size_t bytes, const void **out)
{
    void *memory;
    MIL_TRY(host->arena_push(context->scratch, bytes, 1, &memory));
    memcpy(memory, from, bytes);
    *out = memory;
    return MIL_OK;
}

/* table(cpu) -> capsule */
static PyObject *
make_table(PyObject *module, PyObject *cpu)
{
    (void)module;
    const mil_ops *from = PyCapsule_GetPointer(cpu, MIL_OPS_CAPSULE);
    host = PyCapsule_Import(MIL_HOST_CAPSULE, 0);
    if (from == NULL || host == NULL) {
        return NULL;
    }
    table = *from;
    table.name = "cuda";
    table.keeps_current = false;
    table.open = open_stream;
    table.finish = finish;
    table.close = close_stream;
    table.order = order;
    table.alloc = take;
    table.free = give;
    table.copy = copy;
    table.zero = zero;
    table.upload = upload;
    table.quantize = quantize;
    part_count = parts_done = 0;
    return PyCapsule_New(&table, MIL_OPS_CAPSULE, NULL);
}

/* counts() -> (orders of streams, times the host waited) */
static PyObject *
counts(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return Py_BuildValue("ii", orders, waits);
}

/* scales() -> [(rows, float32 bytes)] of each part of a matrix that has become codes; for a model that is alive */
static PyObject *
scales(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyObject *list = PyList_New(parts_done);
    for (int i = 0; list != NULL && i < parts_done; i++) {
        const mil_quantize *a = &parts[i];
        PyObject *pair = Py_BuildValue("Ly#", (long long)a->rows, (const char *)a->scale,
                                       (Py_ssize_t)(a->rows * (int64_t)sizeof *a->scale));
        if (pair == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, pair);
    }
    return list;
}

/* memory(room) -> bytes in use, and the most since the last call; from now on there is room for so many in all, or
 * for any number where it is negative. */
static PyObject *
memory(PyObject *module, PyObject *bytes)
{
    (void)module;
    long long wanted = PyLong_AsLongLong(bytes);
    PyObject *result = Py_BuildValue("nn", (Py_ssize_t)taken, (Py_ssize_t)most);
    room = wanted < 0 ? SIZE_MAX : (size_t)wanted;
    most = taken;
    return result;
}

static PyMethodDef methods[] = {
    {"memory", memory, METH_O, ""},
    {"scales", scales, METH_NOARGS, ""},
    {"table", make_table, METH_O, ""},
    {"counts", counts, METH_NOARGS, ""},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "pretend_device",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC
PyInit_pretend_device(void)
{
    return PyModule_Create(&definition);
}
