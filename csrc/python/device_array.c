/* The type DeviceArray: memory of a CUDA device that we own, for other libraries to take by DLPack.
 *
 * It knows its shape and where it lies, hands itself over without a copy (torch.from_dlpack, jax.dlpack.from_dlpack,
 * cupy.from_dlpack), and copies itself to the host when asked by name.  It computes nothing.  Two kinds: arrays that
 * own their memory, which the last reference frees, and views of a model's parameters, which keep the model.
 *
 * Whoever makes one has waited for what fills it, so taking it needs no order between streams.
 */
#include "python/types.h" /* Python.h comes first */

#include "python/dlpack.h"

typedef struct device_array {
    PyObject_HEAD const mil_ops *ops;
    PyObject *owner; /* strong, or NULL: the memory is ours */
    void *data;
    core_element element;
    int ndim;
    int64_t shape[CORE_MAX_DIMS];
} device_array;

static size_t
item_size(core_element element)
{
    return element == CORE_F32 ? 4 : element == CORE_I8 || element == CORE_U8 ? 1 : 2;
}

static int64_t
size_of(const device_array *self)
{
    int64_t size = 1;
    for (int i = 0; i < self->ndim; i++) {
        size *= self->shape[i];
    }
    return size;
}

static device_array *
make(core_state *state, const mil_ops *ops, int ndim, const int64_t *shape, core_element element)
{
    PyTypeObject *type = state->types[CORE_TYPE_DEVICE_ARRAY];
    device_array *self = (device_array *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->ops = ops;
        self->element = element;
        self->ndim = ndim;
        memcpy(self->shape, shape, (size_t)ndim * sizeof *shape);
    }
    return self;
}

PyObject *
core_device_array_new(core_state *state, const mil_ops *ops, int ndim, const int64_t *shape,
                      core_element element, bool zero)
{
    device_array *self = make(state, ops, ndim, shape, element);
    if (self == NULL) {
        return NULL;
    }
    mil_context context = {.ops = ops};
    size_t bytes = (size_t)size_of(self) * item_size(element);
    mil_status status = ops->alloc(&context, bytes, &self->data);
    if (status == MIL_OK && zero) {
        status = ops->zero(&context, self->data, bytes);
    }
    if (status != MIL_OK) {
        Py_DECREF(self);
        return core_raise(state, status);
    }
    return (PyObject *)self;
}

PyObject *
core_device_array_view(core_state *state, const mil_ops *ops, int ndim, const int64_t *shape,
                       core_element element, void *data, PyObject *owner)
{
    device_array *self = make(state, ops, ndim, shape, element);
    if (self != NULL) {
        self->data = data;
        self->owner = Py_NewRef(owner);
    }
    return (PyObject *)self;
}

static void
dealloc(PyObject *object)
{
    device_array *self = (device_array *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->owner == NULL && self->data != NULL) {
        mil_context context = {.ops = self->ops};
        self->ops->free(&context, self->data);
    }
    Py_XDECREF(self->owner);
    type->tp_free(object);
    Py_DECREF(type);
}

static int
traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((device_array *)object)->owner);
    return 0;
}

/* ---- DLPack ------------------------------------------------------------------------------------------------- */

/* What a consumer holds: the tensor's numbers and a reference to the array. */
typedef struct lent {
    union {
        dl_managed plain;
        dl_managed_versioned versioned;
    } managed;
    PyObject *array;
    int64_t shape[CORE_MAX_DIMS], strides[CORE_MAX_DIMS];
} lent;

static void
give_back(void *manager)
{
    lent *l = manager;
    if (Py_IsInitialized()) { /* a consumer may outlive the interpreter */
        PyGILState_STATE gil = PyGILState_Ensure();
        Py_DECREF(l->array);
        PyGILState_Release(gil);
    }
    mil_free(l);
}

static void
delete_plain(dl_managed *managed)
{
    give_back(managed->manager);
}

static void
delete_versioned(dl_managed_versioned *managed)
{
    give_back(managed->manager);
}

/* A capsule that nobody took gives the array back itself. */
static void
drop_capsule(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        delete_plain(PyCapsule_GetPointer(capsule, "dltensor"));
    }
    else if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        delete_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    }
}

static void
fill_tensor(const device_array *self, lent *l, dl_tensor *tensor)
{
    int64_t step = 1;
    for (int i = self->ndim - 1; i >= 0; i--) {
        l->shape[i] = self->shape[i];
        l->strides[i] = step;
        step *= self->shape[i];
    }
    *tensor = (dl_tensor){.data = self->data, .ndim = self->ndim, .shape = l->shape, .strides = l->strides};
    tensor->device.type = DL_CUDA;
    tensor->device.id = self->ops->device;
    tensor->dtype.code = self->element == CORE_BF16 ? DL_BFLOAT
                         : self->element == CORE_I8 ? DL_INT
                         : self->element == CORE_U8 ? DL_UINT
                                                    : DL_FLOAT;
    tensor->dtype.bits = (uint8_t)(8 * item_size(self->element));
    tensor->dtype.lanes = 1;
}

/* Whether a consumer knows capsules of version 1; -1 with an exception. */
static int
knows_versions(PyObject *max_version)
{
    if (max_version == NULL || max_version == Py_None) {
        return 0;
    }
    PyObject *major = PySequence_GetItem(max_version, 0);
    long value = major != NULL ? PyLong_AsLong(major) : -1;
    Py_XDECREF(major);
    return value == -1 && PyErr_Occurred() ? -1 : value >= 1;
}

static PyObject *
dlpack(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    device_array *self = (device_array *)object;
    PyObject *stream = NULL, *max_version = NULL, *device = NULL, *copy = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|$OOOO:__dlpack__", names, &stream, &max_version,
                                     &device, &copy)) {
        return NULL;
    }
    int type = DL_CUDA, number = self->ops->device;
    if (device != NULL && device != Py_None) {
        if (!PyTuple_Check(device)) {
            PyErr_SetString(PyExc_TypeError, "dl_device must be a tuple (type, number)");
            return NULL;
        }
        if (!PyArg_ParseTuple(device, "ii:dl_device", &type, &number)) {
            return NULL;
        }
    }
    if (type != DL_CUDA || number != self->ops->device || copy == Py_True) {
        PyErr_SetString(PyExc_BufferError, "this array is only lent as it is: no copy, no other device");
        return NULL;
    }
    int versioned = knows_versions(max_version);
    lent *l = versioned < 0 ? NULL : mil_alloc(1, sizeof *l);
    if (l == NULL) {
        return versioned < 0 ? NULL : PyErr_NoMemory();
    }
    *l = (lent){.array = Py_NewRef(object)};
    PyObject *capsule;
    if (versioned) {
        dl_managed_versioned *managed = &l->managed.versioned;
        managed->version.major = 1;
        managed->manager = l;
        managed->deleter = delete_versioned;
        fill_tensor(self, l, &managed->tensor);
        capsule = PyCapsule_New(managed, "dltensor_versioned", drop_capsule);
    }
    else {
        dl_managed *managed = &l->managed.plain;
        managed->manager = l;
        managed->deleter = delete_plain;
        fill_tensor(self, l, &managed->tensor);
        capsule = PyCapsule_New(managed, "dltensor", drop_capsule);
    }
    if (capsule == NULL) {
        Py_DECREF(object);
        mil_free(l);
    }
    return capsule;
}

static PyObject *
dlpack_device(PyObject *object, PyObject *unused)
{
    (void)unused;
    return Py_BuildValue("(ii)", DL_CUDA, ((device_array *)object)->ops->device);
}

/* ---- looking at it ------------------------------------------------------------------------------------------- */

static PyObject *
to_numpy(PyObject *object, PyObject *unused)
{
    (void)unused;
    device_array *self = (device_array *)object;
    npy_intp dims[CORE_MAX_DIMS];
    for (int i = 0; i < self->ndim; i++) {
        dims[i] = (npy_intp)self->shape[i];
    }
    int type = self->element == CORE_F32   ? NPY_FLOAT
               : self->element == CORE_F16 ? NPY_HALF
               : self->element == CORE_I8  ? NPY_INT8
               : self->element == CORE_U8  ? NPY_UINT8
                                           : NPY_UINT16;
    PyObject *array = PyArray_SimpleNew(self->ndim, dims, type);
    if (array == NULL) {
        return NULL;
    }
    void *to = PyArray_DATA((PyArrayObject *)array);
    mil_context context = {.ops = self->ops};
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
        status = self->ops->copy(&context, to, self->data, (size_t)size_of(self) * item_size(self->element));
    Py_END_ALLOW_THREADS
    if (status != MIL_OK) {
        Py_DECREF(array);
        return core_raise(core_state_of(object), status);
    }
    return array;
}

static PyObject *
get_shape(PyObject *object, void *unused)
{
    (void)unused;
    const device_array *self = (device_array *)object;
    PyObject *shape = PyTuple_New(self->ndim);
    for (int i = 0; shape != NULL && i < self->ndim; i++) {
        PyTuple_SET_ITEM(shape, i, PyLong_FromLongLong(self->shape[i]));
    }
    return shape;
}

static PyObject *
get_dtype(PyObject *object, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(core_element_name(((device_array *)object)->element));
}

static PyObject *
get_device(PyObject *object, void *unused)
{
    (void)unused;
    const mil_ops *ops = ((device_array *)object)->ops;
    return PyUnicode_FromFormat("%s:%d", ops->name, ops->device);
}

static PyObject *
get_number(PyObject *object, void *which)
{
    const device_array *self = (device_array *)object;
    int64_t numbers[3] = {self->ndim, size_of(self), size_of(self) * (int64_t)item_size(self->element)};
    return PyLong_FromLongLong(numbers[(intptr_t)which]);
}

static PyObject *
represent(PyObject *object)
{
    PyObject *shape = get_shape(object, NULL), *device = get_device(object, NULL);
    PyObject *text = shape == NULL || device == NULL
                         ? NULL
                         : PyUnicode_FromFormat("<DeviceArray %S %s on %U>", shape,
                                                core_element_name(((device_array *)object)->element), device);
    Py_XDECREF(shape);
    Py_XDECREF(device);
    return text;
}

static PyMethodDef methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))dlpack, METH_VARARGS | METH_KEYWORDS,
     "The array for another library, without a copy."},
    {"__dlpack_device__", dlpack_device, METH_NOARGS, "(2, number of the CUDA device)."},
    {"numpy", to_numpy, METH_NOARGS, "A copy in host memory; bfloat16 as uint16."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"shape", get_shape, NULL, "Extents of the axes.", NULL},
    {"dtype", get_dtype, NULL, "\"float32\", \"bfloat16\", \"float16\"; codes: \"int8\", \"uint8\".", NULL},
    {"device", get_device, NULL, "\"cuda:0\" and so on.", NULL},
    {"ndim", get_number, NULL, "Number of axes.", (void *)0},
    {"size", get_number, NULL, "Number of elements.", (void *)1},
    {"nbytes", get_number, NULL, "Bytes of memory.", (void *)2},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "An array in the memory of a CUDA device, for other libraries to take by DLPack."},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_repr, represent},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "mambainllama._core.DeviceArray",
    .basicsize = sizeof(device_array),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};

/* device_array(table, shape, dtype, zero) */
static PyObject *
new_array(PyObject *module, PyObject *args)
{
    static const core_element elements[] = {CORE_F32, CORE_BF16, CORE_F16};
    core_state *state = core_get_state(module);
    PyObject *capsule, *extents;
    const char *dtype;
    int zero;
    if (!PyArg_ParseTuple(args, "OO!sp:device_array", &capsule, &PyTuple_Type, &extents, &dtype, &zero)) {
        return NULL;
    }
    const mil_ops *ops = core_read_table(state, capsule);
    if (ops == NULL) {
        return NULL;
    }
    int64_t shape[CORE_MAX_DIMS];
    Py_ssize_t ndim = PyTuple_GET_SIZE(extents);
    bool good = ops != &mil_cpu_ops && ndim <= CORE_MAX_DIMS;
    for (Py_ssize_t i = 0; i < ndim && good; i++) {
        shape[i] = (int64_t)PyLong_AsLongLong(PyTuple_GET_ITEM(extents, i));
        good = shape[i] >= 0 && shape[i] < (int64_t)1 << 40;
    }
    for (int i = 0; i < 3 && good && !PyErr_Occurred(); i++) {
        if (strcmp(dtype, core_element_name(elements[i])) == 0) {
            return core_device_array_new(state, ops, (int)ndim, shape, elements[i], zero != 0);
        }
    }
    PyErr_Clear();
    return core_raise_format(state, MIL_ERR_VALUE, "device_array: no array of shape %R and dtype %s there",
                             extents, dtype);
}

static PyMethodDef functions[] = {
    {"device_array", new_array, METH_VARARGS,
     "device_array(table, shape, dtype, zero) -> DeviceArray on the device of an operator table."},
    {NULL, NULL, 0, NULL},
};

int
core_add_device_array_type(PyObject *module, core_state *state)
{
    state->types[CORE_TYPE_DEVICE_ARRAY] = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    if (state->types[CORE_TYPE_DEVICE_ARRAY] == NULL || PyModule_AddFunctions(module, functions) < 0) {
        return -1;
    }
    return PyModule_AddType(module, state->types[CORE_TYPE_DEVICE_ARRAY]);
}
