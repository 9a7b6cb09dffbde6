/* Borrowed arrays: NumPy arrays, buffers and DLPack tensors read in place.
 *
 * Three ways in, none of which copies:
 *   1. a NumPy array (or subclass), as it is;
 *   2. an object with __dlpack__ (torch, JAX, CuPy, TensorFlow ...): its tensor is taken over and handed
 *      back through its deleter when the call is done;
 *   3. an object with the buffer protocol (memoryview, array.array, mmap): NumPy wraps it.
 * Anything else, a list for instance, is refused with the words that convert it.
 *
 * bfloat16.  NumPy has no bfloat16 of its own, so the bits cross in one of three shapes that mean the same:
 * a DLPack tensor of type bfloat16, an array of ml_dtypes.bfloat16, or a NumPy uint16 array beside the
 * argument dtype="bfloat16".  A bare uint16 array is never guessed to be one.
 *
 * Where.  core_array_borrow takes memory of the host; core_array_borrow_on arrays of CUDA devices, too, which come by
 * the second way only and are never looked into here.
 */
#include "python/arrays.h"

#include "python/dlpack.h"
#include "python/errors.h"

/* ---- DLPack ------------------------------------------------------------------------------------------ */

/* Asks for a capsule: with a version and copy=False where the producer knows them, plainly else. `stream` is named for
 * arrays of a device. */
static PyObject *
dlpack_capsule(PyObject *object, bool on_device, int64_t stream)
{
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    if (method == NULL) {
        return NULL;
    }
    PyObject *capsule = NULL, *empty = PyTuple_New(0);
    PyObject *plain = on_device ? Py_BuildValue("{s:L}", "stream", (long long)stream) : PyDict_New();
    PyObject *options = plain != NULL ? PyDict_Copy(plain) : NULL;
    PyObject *version = Py_BuildValue("(ii)", 1, 0);
    if (empty != NULL && options != NULL && version != NULL &&
        PyDict_SetItemString(options, "max_version", version) == 0 &&
        PyDict_SetItemString(options, "copy", Py_False) == 0) {
        capsule = PyObject_Call(method, empty, options);
        if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear(); /* an older producer: its __dlpack__ takes no such arguments */
            capsule = PyObject_Call(method, empty, plain);
        }
    }
    Py_XDECREF(version);
    Py_XDECREF(plain);
    Py_XDECREF(options);
    Py_XDECREF(empty);
    Py_DECREF(method);
    return capsule;
}

/* The device's type from __dlpack_device__; -1 with an exception set. */
static long
dlpack_device(PyObject *object)
{
    PyObject *pair = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (pair == NULL) {
        return -1;
    }
    PyObject *first = PySequence_GetItem(pair, 0);
    Py_DECREF(pair);
    PyObject *number = first != NULL ? PyNumber_Index(first) : NULL; /* torch gives an enum */
    Py_XDECREF(first);
    long type = number != NULL ? PyLong_AsLong(number) : -1;
    Py_XDECREF(number);
    return type;
}

int
core_is_on_device(PyObject *object)
{
    if (PyArray_Check(object) || !PyObject_HasAttrString(object, "__dlpack_device__")) {
        return 0;
    }
    long type = dlpack_device(object);
    return type == -1 && PyErr_Occurred() ? -1 : type == DL_CUDA;
}

static core_element
dlpack_element(const dl_tensor *tensor, char *name, size_t size)
{
    static const char *const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    unsigned code = tensor->dtype.code, bits = tensor->dtype.bits;
    snprintf(name, size, "%s%u", code < sizeof kinds / sizeof kinds[0] ? kinds[code] : "type", bits);
    if (tensor->dtype.lanes != 1) {
        return CORE_OTHER;
    }
    switch (code << 8 | bits) {
        case DL_FLOAT << 8 | 32:
            return CORE_F32;
        case DL_FLOAT << 8 | 16:
            return CORE_F16;
        case DL_BFLOAT << 8 | 16:
            return CORE_BF16;
        case DL_UINT << 8 | 16:
            return CORE_U16;
        case DL_INT << 8 | 32:
            return CORE_I32;
        case DL_INT << 8 | 64:
            return CORE_I64;
        default:
            return CORE_OTHER;
    }
}

/* Replaces a producer's exception by ours that names the argument and keeps the producer's words. */
static int
raise_from_producer(core_state *state, const char *operator, const char * argument)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (type != NULL && !PyErr_GivenExceptionMatches(type, PyExc_Exception)) {
        PyErr_Restore(type, value, traceback); /* KeyboardInterrupt and the like */
        return -1;
    }
    PyErr_NormalizeException(&type, &value, &traceback);
    core_raise_format(state, MIL_ERR_VALUE, "%s: %s cannot be read through DLPack: %S", operator, argument,
                      value != NULL ? value : Py_None);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return -1;
}

static int
borrow_dlpack(core_state *state, PyObject *object, const char *operator, const char * argument, bool devices,
              int64_t stream, core_array *out)
{
    long device = dlpack_device(object);
    if (device == -1 && PyErr_Occurred()) {
        return raise_from_producer(state, operator, argument);
    }
    bool on_device = device == DL_CUDA && devices;
    if (device != DL_CPU && device != DL_CUDA_HOST && device != DL_ROCM_HOST && device != DL_CUDA_MANAGED &&
        !on_device) {
        core_raise_format(state, MIL_ERR_DEVICE,
                          "%s: %s lies on a device of DLPack type %ld; this operator computes on the CPU: "
                          "move it there first (torch: .cpu())",
                          operator, argument, device);
        return -1;
    }
    PyObject *capsule = dlpack_capsule(object, on_device, stream);
    if (capsule == NULL) {
        return raise_from_producer(state, operator, argument);
    }
    /* A consumed capsule is renamed: its own destructor then leaves the tensor to us. */
    const dl_tensor *tensor = NULL;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        dl_managed_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (managed->version.major == 1 && PyCapsule_SetName(capsule, "used_dltensor_versioned") == 0) {
            out->dlpack = managed;
            out->versioned = true;
            out->writeable = (managed->flags & DL_FLAG_READ_ONLY) == 0;
            tensor = &managed->tensor;
        }
    }
    else if (PyCapsule_IsValid(capsule, "dltensor")) {
        dl_managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") == 0) {
            out->dlpack = managed;
            out->writeable = true;
            tensor = &managed->tensor;
        }
    }
    Py_DECREF(capsule);
    if (tensor == NULL) {
        PyErr_Clear();
        core_raise_format(state, MIL_ERR_VALUE,
                          "%s: %s gave a DLPack capsule of an unknown version", operator, argument);
        return -1;
    }
    if (tensor->ndim < 0 || tensor->ndim > CORE_MAX_DIMS) {
        core_raise_format(state, MIL_ERR_SHAPE, "%s: %s has %d dimensions; at most %d are possible", operator,
                          argument, (int)tensor->ndim, CORE_MAX_DIMS);
        core_array_release(out);
        return -1;
    }
    out->device = on_device ? tensor->device.id : CORE_HOST;
    out->element = dlpack_element(tensor, out->dtype_name, sizeof out->dtype_name);
    out->ndim = tensor->ndim;
    out->data = (char *)tensor->data + tensor->byte_offset;
    int64_t step = 1;
    for (int i = out->ndim - 1; i >= 0; i--) {
        out->shape[i] = tensor->shape[i];
        out->strides[i] = tensor->strides != NULL ? tensor->strides[i] : step;
        step *= tensor->shape[i];
    }
    return 0;
}

/* ---- NumPy ------------------------------------------------------------------------------------------- */

static core_element
numpy_element(PyArray_Descr *descr, char *name, size_t size)
{
    const char *type_name = strrchr(descr->typeobj->tp_name, '.');
    type_name = type_name != NULL ? type_name + 1 : descr->typeobj->tp_name;
    snprintf(name, size, "%s%s", PyDataType_ISBYTESWAPPED(descr) ? "byte-swapped " : "", type_name);
    if (PyDataType_ISBYTESWAPPED(descr)) {
        return CORE_OTHER;
    }
    switch (descr->type_num) {
        case NPY_FLOAT:
            return CORE_F32;
        case NPY_HALF:
            return CORE_F16;
        case NPY_USHORT:
            return CORE_U16;
        default:
            break;
    }
    if (PyTypeNum_ISSIGNED(descr->type_num)) { /* int, long and long long differ between platforms */
        return PyDataType_ELSIZE(descr) == 8   ? CORE_I64
               : PyDataType_ELSIZE(descr) == 4 ? CORE_I32
                                               : CORE_OTHER;
    }
    if (PyDataType_ELSIZE(descr) == 2 && strcmp(type_name, "bfloat16") == 0) {
        return CORE_BF16; /* ml_dtypes */
    }
    return CORE_OTHER;
}

/* Takes over the reference to `array`. */
static int
borrow_numpy(core_state *state, PyArrayObject *array, const char *operator, const char * argument,
             core_array *out)
{
    out->owner = (PyObject *)array;
    out->ndim = PyArray_NDIM(array);
    if (out->ndim > CORE_MAX_DIMS) {
        core_raise_format(state, MIL_ERR_SHAPE, "%s: %s has %d dimensions; at most %d are possible", operator,
                          argument, out->ndim, CORE_MAX_DIMS);
        core_array_release(out);
        return -1;
    }
    out->element = numpy_element(PyArray_DESCR(array), out->dtype_name, sizeof out->dtype_name);
    out->data = PyArray_DATA(array);
    out->writeable = PyArray_ISWRITEABLE(array);
    int64_t size = PyArray_ITEMSIZE(array);
    for (int i = 0; i < out->ndim; i++) {
        out->shape[i] = PyArray_DIM(array, i);
        int64_t bytes = PyArray_STRIDE(array, i);
        if (size == 0 || bytes % size != 0) {
            core_raise_format(state, MIL_ERR_VALUE,
                              "%s: %s steps by %lld bytes along axis %d, no whole number of elements: "
                              "pass numpy.ascontiguousarray(%s)",
                              operator, argument, (long long)bytes, i, argument);
            core_array_release(out);
            return -1;
        }
        out->strides[i] = bytes / size;
    }
    return 0;
}

/* ---- both -------------------------------------------------------------------------------------------- */

static int64_t
element_size(core_element element)
{
    switch (element) {
        case CORE_I64:
            return 8;
        case CORE_F32:
        case CORE_I32:
            return 4;
        case CORE_I8:
        case CORE_U8:
        case CORE_OTHER:
            return 1;
        default:
            return 2;
    }
}

static int
borrow_any(core_state *state, PyObject *object, const char *operator, const char * argument, bool devices,
           int64_t stream, core_array *out)
{
    if (PyArray_Check(object)) {
        return borrow_numpy(state, (PyArrayObject *)Py_NewRef(object), operator, argument, out);
    }
    if (PyObject_HasAttrString(object, "__dlpack__")) {
        return borrow_dlpack(state, object, operator, argument, devices, stream, out);
    }
    if (PyObject_CheckBuffer(object) && !PyBytes_Check(object) && !PyByteArray_Check(object)) {
        PyObject *array = PyArray_FromAny(object, NULL, 0, 0, 0, NULL);
        return array == NULL ? raise_from_producer(state, operator, argument)
                             : borrow_numpy(state, (PyArrayObject *)array, operator, argument, out);
    }
    core_raise_format(state, MIL_ERR_DTYPE,
                      "%s: %s is a %.80s; expected a NumPy array, a buffer or a DLPack tensor: pass "
                      "numpy.asarray(%s, dtype=...)",
                      operator, argument, Py_TYPE(object)->tp_name, argument);
    return -1;
}

static int
borrow(core_state *state, PyObject *object, const char *operator, const char * argument, bool devices,
       int64_t stream, core_array *out)
{
    *out = (core_array){.device = CORE_HOST};
    Py_INCREF(object); /* what __dlpack__ runs may drop the caller's last reference */
    int failed = borrow_any(state, object, operator, argument, devices, stream, out);
    Py_DECREF(object);
    if (failed) {
        return -1;
    }
    if ((uintptr_t)out->data % (uintptr_t)element_size(out->element) != 0) {
        core_raise_format(state, MIL_ERR_VALUE,
                          "%s: %s is not aligned to its elements: pass %s.copy()", operator, argument,
                          argument);
        core_array_release(out);
        return -1;
    }
    return 0;
}

int
core_array_borrow(core_state *state, PyObject *object, const char *operator, const char * argument,
                  core_array *out)
{
    return borrow(state, object, operator, argument, false, 0, out);
}

int
core_array_borrow_on(core_state *state, PyObject *object, const char *operator, const char * argument,
                     int64_t stream, core_array *out)
{
    return borrow(state, object, operator, argument, true, stream, out);
}

void
core_array_release(core_array *array)
{
    Py_CLEAR(array->owner);
    if (array->dlpack != NULL && array->versioned) {
        dl_managed_versioned *managed = array->dlpack;
        if (managed->deleter != NULL) {
            managed->deleter(managed);
        }
    }
    else if (array->dlpack != NULL) {
        dl_managed *managed = array->dlpack;
        if (managed->deleter != NULL) {
            managed->deleter(managed);
        }
    }
    array->dlpack = NULL;
    array->data = NULL;
}

PyObject *
core_array_new(int ndim, const int64_t *shape, core_element element, bool zero)
{
    npy_intp dims[CORE_MAX_DIMS];
    for (int i = 0; i < ndim; i++) {
        dims[i] = (npy_intp)shape[i];
    }
    int type = element == CORE_I64   ? NPY_INT64
               : element == CORE_I32 ? NPY_INT32
               : element == CORE_F16 ? NPY_HALF
               : element == CORE_F32 ? NPY_FLOAT
                                     : NPY_UINT16;
    return zero ? PyArray_ZEROS(ndim, dims, type, 0) : PyArray_SimpleNew(ndim, dims, type);
}

const char *
core_element_name(core_element element)
{
    switch (element) {
        case CORE_F32:
            return "float32";
        case CORE_BF16:
            return "bfloat16";
        case CORE_F16:
            return "float16";
        case CORE_U16:
            return "uint16";
        case CORE_I32:
            return "int32";
        case CORE_I64:
            return "int64";
        case CORE_I8:
            return "int8";
        case CORE_U8:
            return "uint8";
        case CORE_OTHER:
            break;
    }
    return "another dtype";
}
