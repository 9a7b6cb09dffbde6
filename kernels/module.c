/* The extension module mambainllama._cuda: it hands out operator tables, and tells what devices there are.
 *
 * Nothing computes here.  _core takes a table from the capsule that table() returns and uses it as it uses the
 * CPU's; this module is imported when a user first asks for a CUDA device.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "host.h"
#include "table.h"

static PyObject *
raise(void)
{
    PyErr_SetString(PyExc_RuntimeError, mil_message());
    return NULL;
}

static PyObject *
table(PyObject *module, PyObject *args)
{
    (void)module;
    int dtype, device;
    if (!PyArg_ParseTuple(args, "ii:table", &dtype, &device)) {
        return NULL;
    }
    if (dtype < MIL_F32 || dtype > MIL_F16) {
        PyErr_Format(PyExc_ValueError, "table: %d is not a dtype", dtype);
        return NULL;
    }
    const mil_ops *ops;
    if (mil_cuda_table((mil_dtype)dtype, device, &ops) != MIL_OK) {
        return raise();
    }
    return PyCapsule_New((void *)(uintptr_t)ops, MIL_OPS_CAPSULE, NULL);
}

static PyObject *
devices(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    int count;
    if (mil_cuda_device_count(&count) != MIL_OK) {
        return raise();
    }
    PyObject *list = PyList_New(count);
    for (int i = 0; list != NULL && i < count; i++) {
        mil_cuda_device_info info;
        PyObject *entry = NULL;
        if (mil_cuda_describe(i, &info) != MIL_OK) {
            raise();
        }
        else {
            entry =
                Py_BuildValue("{s:s,s:(ii),s:i,s:K,s:K}", "name", info.name, "capability", info.major,
                              info.minor, "multiprocessors", info.multiprocessors, "memory",
                              (unsigned long long)info.memory, "free", (unsigned long long)info.free_memory);
        }
        if (entry == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, entry);
    }
    return list;
}

static PyObject *
memory(PyObject *module, PyObject *args)
{
    (void)module;
    int device;
    if (!PyArg_ParseTuple(args, "i:memory", &device)) {
        return NULL;
    }
    size_t free_bytes, bytes;
    if (mil_cuda_memory(device, &free_bytes, &bytes) != MIL_OK) {
        return raise();
    }
    return Py_BuildValue("KK", (unsigned long long)free_bytes, (unsigned long long)bytes);
}

static PyMethodDef methods[] = {
    {"table", table, METH_VARARGS, "table(dtype, device): a capsule of the operators of one device."},
    {"devices", devices, METH_NOARGS,
     "devices(): name, capability, multiprocessors, memory and free bytes of each."},
    {"memory", memory, METH_VARARGS, "memory(device): its free bytes, and all of its bytes."},
    {NULL, NULL, 0, NULL},
};

static int
module_exec(PyObject *module)
{
    (void)module;
    const mil_host *host = PyCapsule_Import(MIL_HOST_CAPSULE, 0);
    if (host == NULL) {
        return -1;
    }
    if (mil_host_accept(host) == NULL) {
        PyErr_SetString(PyExc_ImportError,
                        "mambainllama._cuda is of another build than mambainllama._core; build both again");
        return -1;
    }
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "mambainllama._cuda",
    .m_doc = "The CUDA operators of mambainllama. Private: use device=\"cuda\".",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__cuda(void)
{
    return PyModuleDef_Init(&definition);
}
