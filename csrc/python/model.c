/* The types Model and State: a model over borrowed arrays, its forward pass, and sequences' states.
 *
 * A Model holds references to the caller's arrays and computes on their memory, so weights that NumPy has
 * mapped from a file are never copied, and training in place is seen by everybody who shares them.
 */
#include "python/types.h"

#include "model/rehearsal.h"
#include "model/upload.h"

/* ---- arguments shared with the other bindings ------------------------------------------------------------ */

core_model *
core_as_model(core_state *core, PyObject *object, const char *what)
{
    if (!PyObject_TypeCheck(object, core->types[CORE_TYPE_MODEL])) {
        core_raise_format(core, MIL_ERR_DTYPE, "%s is a %.80s, not a Model", what, Py_TYPE(object)->tp_name);
        return NULL;
    }
    return (core_model *)object;
}

core_sequence_state *
core_as_state(core_state *core, PyObject *object, const char *what)
{
    if (!PyObject_TypeCheck(object, core->types[CORE_TYPE_STATE])) {
        core_raise_format(core, MIL_ERR_DTYPE, "%s is a %.80s, not a State", what, Py_TYPE(object)->tp_name);
        return NULL;
    }
    return (core_sequence_state *)object;
}

/* A new int64 array of one axis from whatever NumPy reads as integers, or NULL with an exception. An empty list
 * has no integer type of its own and passes. */
static PyObject *
integers(core_state *core, PyObject *object, const char *what)
{
    PyArrayObject *given = (PyArrayObject *)PyArray_FROM_O(object);
    PyObject *array = NULL;
    if (given != NULL && PyArray_NDIM(given) == 1 && (PyArray_ISINTEGER(given) || PyArray_SIZE(given) == 0)) {
        array = PyArray_FROM_OTF((PyObject *)given, NPY_INT64, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
    }
    Py_XDECREF(given);
    if (array == NULL) {
        PyErr_Clear();
        core_raise_format(core, MIL_ERR_DTYPE, "%s must be integers in one axis", what);
    }
    return array;
}

PyObject *
core_tokens(core_state *core, PyObject *object, const char *what)
{
    PyObject *wide = integers(core, object, what);
    if (wide == NULL) {
        return NULL;
    }
    int64_t count = core_length(wide);
    const int64_t *from = core_data(wide);
    PyObject *tokens = core_array_new(1, &count, CORE_I32, false);
    int32_t *to = core_data(tokens);
    for (int64_t i = 0; tokens != NULL && i < count; i++) {
        if (from[i] < INT32_MIN || from[i] > INT32_MAX) {
            core_raise_format(core, MIL_ERR_VALUE, "%s: %lld at position %lld is outside any vocabulary",
                              what, (long long)from[i], (long long)i);
            Py_CLEAR(tokens);
            break;
        }
        to[i] = (int32_t)from[i];
    }
    Py_DECREF(wide);
    return tokens;
}

PyObject *
core_offsets(core_state *core, PyObject *object, int64_t rows)
{
    if (object == NULL || object == Py_None) {
        int64_t two = 2;
        PyObject *one = core_array_new(1, &two, CORE_I64, true);
        if (one != NULL) {
            ((int64_t *)core_data(one))[1] = rows;
        }
        return one;
    }
    PyObject *offsets = integers(core, object, "offsets");
    if (offsets == NULL) {
        return NULL;
    }
    int64_t count = core_length(offsets);
    const int64_t *at = core_data(offsets);
    bool good = count >= 2 && at[0] == 0 && at[count - 1] == rows;
    for (int64_t i = 0; good && i + 1 < count; i++) {
        good = at[i] < at[i + 1];
    }
    if (!good) {
        core_raise_format(core, MIL_ERR_VALUE,
                          "offsets must ascend from 0 to the %lld tokens, one step a sequence, none empty",
                          (long long)rows);
        Py_CLEAR(offsets);
    }
    return offsets;
}

/* ---- operator tables --------------------------------------------------------------------------------------- */

const mil_ops *
core_read_table(core_state *core, PyObject *capsule)
{
    if (capsule == NULL || capsule == Py_None) {
        return &mil_cpu_ops;
    }
    const mil_ops *ops = PyCapsule_GetPointer(capsule, MIL_OPS_CAPSULE);
    if (ops != NULL && (ops->version != MIL_OPS_VERSION || ops->size != sizeof *ops)) {
        core_raise_format(core, MIL_ERR_DEVICE,
                          "the device's operators are of another build than _core; build both again");
        return NULL;
    }
    return ops;
}

/* "cpu", "cuda:0" */
static PyObject *
device_name(const mil_ops *ops)
{
    return ops == &mil_cpu_ops ? PyUnicode_FromString("cpu")
                               : PyUnicode_FromFormat("%s:%d", ops->name, ops->device);
}

PyObject *
core_table_info(const mil_ops *ops)
{
    return Py_BuildValue("{s:N,s:s,s:L}", "device", device_name(ops), "activation",
                         mil_dtype_name(ops->activation_dtype), "prefill_rows", (long long)ops->prefill_rows);
}

/* ---- Model ------------------------------------------------------------------------------------------------ */

/* Parameters on a device are the model's own copies. */
static void
free_device_parameters(mil_model *model)
{
    if (model->ops == NULL || model->ops == &mil_cpu_ops) {
        return;
    }
    for (int64_t i = 0; i < model->parameter_count; i++) {
        mil_unload_parameter(model->ops, &model->parameters[i]);
    }
}

static void
model_dealloc(PyObject *self)
{
    core_model *model = (core_model *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    for (int64_t i = 0; i < model->array_count; i++) {
        core_array_release(&model->arrays[i]);
    }
    mil_free(model->arrays);
    free_device_parameters(&model->model);
    mil_model_release(&model->model);
    Py_XDECREF(model->config);
    Py_XDECREF(model->values);
    type->tp_free(self);
    Py_DECREF(type);
}

static int
model_traverse(PyObject *self, visitproc visit, void *arg)
{
    core_model *model = (core_model *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(model->config);
    Py_VISIT(model->values);
    return 0;
}

/* The element type of a parameter's array: uint16 is bfloat16 where `dtypes` says so. */
static int
parameter_dtype(core_state *core, const core_array *array, const char *name, PyObject *dtypes, mil_dtype *out)
{
    PyObject *word = dtypes == NULL ? NULL : PyDict_GetItemString(dtypes, name);
    const char *text = word != NULL && PyUnicode_Check(word) ? PyUnicode_AsUTF8(word) : NULL;
    bool says_bf16 = text != NULL && strcmp(text, "bfloat16") == 0;
    if (array->element == CORE_F32) {
        *out = MIL_F32;
    }
    else if (array->element == CORE_F16) {
        *out = MIL_F16;
    }
    else if (array->element == CORE_BF16 || (array->element == CORE_U16 && says_bf16)) {
        *out = MIL_BF16;
    }
    else {
        core_raise_format(
            core, MIL_ERR_DTYPE,
            "Model: %s is %s; expected float32, float16, or uint16 that dtypes calls \"bfloat16\"", name,
            array->dtype_name);
        return -1;
    }
    return 0;
}

/* Which 8 bits a parameter is to have on the device, if any: `codes` maps names to "float8" or "int8". */
static int
device_dtype(core_state *core, const mil_parameter *p, PyObject *codes, mil_dtype *out)
{
    PyObject *word = codes == NULL ? NULL : PyDict_GetItemString(codes, p->name);
    *out = p->given;
    if (word == NULL) {
        return 0;
    }
    for (int i = MIL_F8; p->matrix && PyUnicode_Check(word) && i <= MIL_I8; i++) {
        if (PyUnicode_CompareWithASCIIString(word, mil_dtype_name((mil_dtype)i)) == 0) {
            *out = (mil_dtype)i;
            return 0;
        }
    }
    core_raise_format(core, MIL_ERR_DTYPE,
                      "Model: %s cannot become %R; matrices become \"float8\" or \"int8\"", p->name, word);
    return -1;
}

/* Brings a parameter's values into memory of the model's device. */
static int
upload_parameter(core_state *core, mil_uploader *uploader, mil_parameter *p, const void *values)
{
    const mil_ops *ops = uploader->ops;
    if (p->matrix && p->dtype != ops->activation_dtype && !mil_dtype_is_scaled(p->dtype)) {
        core_raise_format(core, MIL_ERR_DTYPE, "Model: %s is %s, but this device table computes in %s",
                          p->name, mil_dtype_name(p->dtype), mil_dtype_name(ops->activation_dtype));
        return -1;
    }
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
        status = mil_upload_parameter(uploader, p, values);
    Py_END_ALLOW_THREADS
    if (status != MIL_OK) {
        core_raise(core, status);
        return -1;
    }
    return 0;
}

static int
bind_parameter(core_state *core, core_model *self, mil_uploader *uploader, mil_parameter *p, PyObject *object,
               PyObject *dtypes, PyObject *codes)
{
    core_array *array = &self->arrays[self->array_count];
    if (core_array_borrow(core, object, "Model", p->name, array) < 0) {
        return -1;
    }
    self->array_count++;
    bool matches = array->ndim == p->dims;
    int64_t stride = 1;
    for (int i = array->ndim - 1; i >= 0 && matches; i--) {
        matches = array->shape[i] == p->shape[i];
        if (matches && array->shape[i] != 1 && array->strides[i] != stride) {
            core_raise_format(core, MIL_ERR_VALUE, "Model: %s is not C-contiguous", p->name);
            return -1;
        }
        stride *= p->shape[i];
    }
    if (!matches) {
        char got[64] = "", expected[64] = "";
        for (int i = 0, at = 0; i < array->ndim && at < 48; i++) {
            at += snprintf(got + at, sizeof got - (size_t)at, i ? ", %lld" : "%lld",
                           (long long)array->shape[i]);
        }
        for (int i = 0, at = 0; i < p->dims && at < 48; i++) {
            at += snprintf(expected + at, sizeof expected - (size_t)at, i ? ", %lld" : "%lld",
                           (long long)p->shape[i]);
        }
        core_raise_format(core, MIL_ERR_SHAPE, "Model: %s has shape (%s); the configuration says (%s)",
                          p->name, got, expected);
        return -1;
    }
    if (parameter_dtype(core, array, p->name, dtypes, &p->given) < 0 ||
        device_dtype(core, p, codes, &p->dtype) < 0) {
        return -1;
    }
    if (self->model.ops == &mil_cpu_ops && p->dtype == p->given) {
        p->data = array->data;
        return 0;
    }
    return upload_parameter(core, uploader, p, array->data);
}

static int
bind_parameters(core_state *core, core_model *self, PyObject *parameters, PyObject *dtypes, PyObject *codes)
{
    mil_uploader uploader;
    self->values = PyDict_New();
    self->arrays = mil_alloc((size_t)self->model.parameter_count, sizeof *self->arrays);
    if (self->values == NULL || self->arrays == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    mil_uploader_init(&uploader, self->model.ops);
    int failed = 0;
    for (int64_t i = 0; i < self->model.parameter_count && !failed; i++) {
        mil_parameter *p = &self->model.parameters[i];
        PyObject *object = PyDict_GetItemString(parameters, p->name);
        if (object != NULL && object != Py_None) {
            failed = PyDict_SetItemString(self->values, p->name, object) < 0 ||
                     bind_parameter(core, self, &uploader, p, object, dtypes, codes) < 0;
        }
    }
    mil_uploader_release(&uploader);
    if (failed) {
        return -1;
    }
    mil_status status = mil_model_bind(&self->model);
    if (status != MIL_OK) {
        core_raise(core, status);
        return -1;
    }
    /* A parameter that no layer asks for is a misunderstanding, not a spare part. */
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(parameters, &position, &key, &value)) {
        if (PyDict_Contains(self->values, key) != 1 && value != Py_None) {
            core_raise_format(core, MIL_ERR_VALUE, "Model: %R is not a parameter of this configuration", key);
            return -1;
        }
    }
    return 0;
}

static PyObject *
model_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"config", "parameters", "dtypes", "table", "codes", NULL};
    core_state *core = PyType_GetModuleState(type);
    PyObject *config, *parameters, *dtypes = NULL, *table = NULL, *codes = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!O!|O!OO!:Model", names, &PyDict_Type, &config,
                                     &PyDict_Type, &parameters, &PyDict_Type, &dtypes, &table, &PyDict_Type,
                                     &codes)) {
        return NULL;
    }
    const mil_ops *ops = core_read_table(core, table);
    if (ops == NULL) {
        return NULL;
    }
    core_model *self = (core_model *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    mil_arena arena = {0};
    mil_model_config parsed;
    int result = core_read_config(core, config, &arena, &parsed);
    if (result == 0) {
        mil_status status = mil_model_init(&self->model, &parsed);
        if (status != MIL_OK) {
            core_raise(core, status);
            result = -1;
        }
    }
    mil_arena_release(&arena);
    if (result == 0) {
        self->config = Py_NewRef(config);
        self->model.ops = ops;
        result = bind_parameters(core, self, parameters, dtypes, codes);
    }
    if (result < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static PyObject *
specs_of(const mil_model *model)
{
    PyObject *list = PyList_New((Py_ssize_t)model->parameter_count);
    for (int64_t i = 0; list != NULL && i < model->parameter_count; i++) {
        const mil_parameter *p = &model->parameters[i];
        PyObject *shape = PyTuple_New(p->dims);
        for (int d = 0; shape != NULL && d < p->dims; d++) {
            PyTuple_SET_ITEM(shape, d, PyLong_FromLongLong(p->shape[d]));
        }
        PyObject *entry = shape == NULL
                              ? NULL
                              : Py_BuildValue("sNOO", p->name, shape, p->matrix ? Py_True : Py_False,
                                              p->required ? Py_True : Py_False);
        if (entry == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, (Py_ssize_t)i, entry);
    }
    return list;
}

static PyObject *
model_parameter_specs(PyObject *type, PyObject *config)
{
    core_state *core = PyType_GetModuleState((PyTypeObject *)type);
    mil_arena arena = {0};
    mil_model_config parsed;
    mil_model model = {0};
    PyObject *specs = NULL;
    if (core_read_config(core, config, &arena, &parsed) == 0) {
        mil_status status = mil_model_init(&model, &parsed);
        specs = status == MIL_OK ? specs_of(&model) : core_raise(core, status);
    }
    mil_model_release(&model);
    mil_arena_release(&arena);
    return specs;
}

/* A dtype's number from its name; -1 with an exception. */
static int
dtype_number(core_state *core, const char *name)
{
    for (int i = MIL_F32; i <= MIL_F16; i++) {
        if (strcmp(name, mil_dtype_name((mil_dtype)i)) == 0) {
            return i;
        }
    }
    core_raise_format(core, MIL_ERR_DTYPE, "footprint: %s is not float32, bfloat16 or float16", name);
    return -1;
}

static PyObject *
model_footprint(PyObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"config", "dtype", "activation", "sequences", "rows", "logits", NULL};
    core_state *core = PyType_GetModuleState((PyTypeObject *)type);
    PyObject *config;
    const char *dtype = "float32", *activation = NULL;
    long long sequences = 1, rows = 1, logits = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!|$szLLL:footprint", names, &PyDict_Type, &config,
                                     &dtype, &activation, &sequences, &rows, &logits)) {
        return NULL;
    }
    int of_matrices = dtype_number(core, dtype);
    int of_rows = activation == NULL ? MIL_F32 : dtype_number(core, activation);
    if (of_matrices < 0 || of_rows < 0) {
        return NULL;
    }
    mil_rehearsal rehearsal = {
        .dtype = (mil_dtype)of_matrices,
        .activation = (mil_dtype)of_rows,
        .keeps_current = activation == NULL, /* only the CPU does */
        .sequences = sequences,
        .rows = rows,
        .logits = logits,
    };
    mil_arena arena = {0};
    mil_model_config parsed;
    mil_footprint found;
    PyObject *result = NULL;
    if (core_read_config(core, config, &arena, &parsed) == 0) {
        mil_status status;
        Py_BEGIN_ALLOW_THREADS
            status = mil_rehearse(&parsed, &rehearsal, &found);
        Py_END_ALLOW_THREADS
        result = status != MIL_OK
                     ? core_raise(core, status)
                     : Py_BuildValue("{s:L,s:L,s:L}", "workspace", (long long)found.workspace, "mixers",
                                     (long long)found.mixer_bytes, "token", (long long)found.token_bytes);
    }
    mil_arena_release(&arena);
    return result;
}

static PyObject *
model_parameters(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyDict_Copy(((core_model *)self)->values);
}

/* The device's own copies, lent: name -> DeviceArray. */
static PyObject *
model_device_parameters(PyObject *self, PyObject *unused)
{
    static const core_element elements[] = {
        [MIL_F32] = CORE_F32, [MIL_BF16] = CORE_BF16, [MIL_F16] = CORE_F16,
        [MIL_F8] = CORE_U8,   [MIL_I8] = CORE_I8,
    };
    (void)unused;
    core_state *core = core_state_of(self);
    const mil_model *model = &((core_model *)self)->model;
    if (model->ops == &mil_cpu_ops) {
        return core_raise_format(core, MIL_ERR_DEVICE,
                                 "device_parameters: this model is on the CPU; parameters() are its arrays");
    }
    PyObject *dict = PyDict_New();
    for (int64_t i = 0; dict != NULL && i < model->parameter_count; i++) {
        const mil_parameter *p = &model->parameters[i];
        if (p->data == NULL) {
            continue;
        }
        PyObject *array =
            core_device_array_view(core, model->ops, p->dims, p->shape, elements[p->dtype], p->data, self);
        if (array == NULL || PyDict_SetItemString(dict, p->name, array) < 0) {
            Py_CLEAR(dict);
        }
        Py_XDECREF(array);
    }
    return dict;
}

static PyObject *
model_dtypes(PyObject *self, PyObject *unused)
{
    (void)unused;
    const mil_model *model = &((core_model *)self)->model;
    PyObject *dict = PyDict_New();
    for (int64_t i = 0; dict != NULL && i < model->parameter_count; i++) {
        const mil_parameter *p = &model->parameters[i];
        PyObject *name = p->data == NULL ? NULL : PyUnicode_FromString(mil_dtype_name(p->given));
        if (p->data != NULL && (name == NULL || PyDict_SetItemString(dict, p->name, name) < 0)) {
            Py_CLEAR(dict);
        }
        Py_XDECREF(name);
    }
    return dict;
}

/* ---- Model.forward ------------------------------------------------------------------------------------------ */

/* What a forward call holds until it ends. */
typedef struct forward_call {
    core_state *core;
    core_model *model;
    mil_forward arguments;
    PyObject *tokens, *offsets, *rows, *logits, *captured; /* strong; captured is a list */
    PyObject *states;                                      /* tuple of State, strong */
    bool marked_busy;
    mil_arena memory;
} forward_call;

static void
release_states(forward_call *call)
{
    for (Py_ssize_t i = 0; call->marked_busy && i < PyTuple_GET_SIZE(call->states); i++) {
        ((core_sequence_state *)PyTuple_GET_ITEM(call->states, i))->busy = false;
    }
    call->marked_busy = false;
}

static void
forward_release(forward_call *call)
{
    release_states(call);
    Py_XDECREF(call->tokens);
    Py_XDECREF(call->offsets);
    Py_XDECREF(call->rows);
    Py_XDECREF(call->logits);
    Py_XDECREF(call->captured);
    Py_XDECREF(call->states);
    mil_arena_release(&call->memory);
}

static int
take_states(forward_call *call, PyObject *object)
{
    if (object == NULL || object == Py_None) {
        return 0;
    }
    int64_t sequences = call->arguments.sequences;
    call->states = PySequence_Tuple(object);
    if (call->states == NULL) {
        return -1;
    }
    if (PyTuple_GET_SIZE(call->states) != sequences) {
        core_raise_format(call->core, MIL_ERR_SHAPE, "forward: %zd states for %lld sequences",
                          PyTuple_GET_SIZE(call->states), (long long)sequences);
        return -1;
    }
    mil_state **states;
    if (MIL_PUSH(&call->memory, sequences, mil_state *, &states) != MIL_OK) {
        core_raise(call->core, MIL_ERR_MEMORY);
        return -1;
    }
    for (int64_t i = 0; i < sequences; i++) {
        core_sequence_state *state =
            core_as_state(call->core, PyTuple_GET_ITEM(call->states, i), "forward: an entry of states");
        if (state == NULL) {
            return -1;
        }
        if (state->busy) {
            core_raise_format(call->core, MIL_ERR_STATE, "forward: state %lld is in use by another call",
                              (long long)i);
            return -1;
        }
        states[i] = &state->state;
    }
    for (int64_t i = 0; i < sequences; i++) {
        ((core_sequence_state *)PyTuple_GET_ITEM(call->states, i))->busy = true;
    }
    call->marked_busy = true;
    call->arguments.states = states;
    return 0;
}

/* `rows`: "all", "last", "none" or indices. */
static int
take_rows(forward_call *call, PyObject *object)
{
    const int64_t *offsets = call->arguments.offsets;
    int64_t sequences = call->arguments.sequences, total = offsets[sequences];
    const char *word = "all";
    if (object != NULL && object != Py_None) {
        word = PyUnicode_Check(object) ? PyUnicode_AsUTF8(object) : NULL;
    }
    bool all = word != NULL && strcmp(word, "all") == 0, last = word != NULL && strcmp(word, "last") == 0;
    bool none = word != NULL && strcmp(word, "none") == 0;
    if (word != NULL && !all && !last && !none) {
        core_raise_format(call->core, MIL_ERR_VALUE,
                          "forward: rows = %R is not \"all\", \"last\", \"none\" or indices", object);
        return -1;
    }
    int64_t count = all ? total : last ? sequences : 0;
    call->rows = word == NULL ? integers(call->core, object, "forward: rows")
                              : core_array_new(1, &count, CORE_I64, false);
    if (call->rows == NULL) {
        return -1;
    }
    int64_t *index = core_data(call->rows);
    call->arguments.logit_count = core_length(call->rows);
    for (int64_t i = 0; i < call->arguments.logit_count; i++) {
        if (word != NULL) {
            index[i] = all ? i : offsets[i + 1] - 1;
        }
        else if (index[i] < 0 || index[i] >= total) {
            core_raise_format(call->core, MIL_ERR_VALUE, "forward: row %lld is not among the %lld tokens",
                              (long long)index[i], (long long)total);
            return -1;
        }
    }
    call->arguments.logit_rows = index;
    int64_t shape[2] = {call->arguments.logit_count, call->model->model.config.vocab};
    call->logits = core_array_new(2, shape, CORE_F32, false);
    call->arguments.logits = core_data(call->logits);
    return call->logits == NULL ? -1 : 0;
}

static int
take_capture(forward_call *call, PyObject *item, mil_capture *out)
{
    static const char *const kinds[] = {"input", "normed", "features", "mixer", "hidden", "final"};
    const char *kind;
    Py_ssize_t layer;
    if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "sn", &kind, &layer)) {
        PyErr_Clear();
        core_raise_format(call->core, MIL_ERR_DTYPE,
                          "forward: an entry of capture is %R; expected (kind, layer)", item);
        return -1;
    }
    const mil_model *model = &call->model->model;
    int found = -1;
    for (int i = 0; i < 6; i++) {
        found = strcmp(kind, kinds[i]) == 0 ? i : found;
    }
    if (found < 0 || layer < 0 || layer >= model->config.layer_count) {
        core_raise_format(call->core, MIL_ERR_VALUE,
                          "forward: cannot capture (\"%s\", %zd); kinds are input, normed, features, mixer, "
                          "hidden, final; the model has %lld layers",
                          kind, layer, (long long)model->config.layer_count);
        return -1;
    }
    const mil_layer_config *c = &model->layers[layer].config;
    int64_t width = model->config.hidden;
    if (found == MIL_CAPTURE_FEATURES) {
        width = c->mixer == MIL_ATTENTION ? c->heads * c->head_dim : c->inner;
    }
    int64_t shape[2] = {core_length(call->tokens), width};
    PyObject *array = core_array_new(2, shape, CORE_F32, false);
    *out = (mil_capture){.kind = (mil_capture_kind)found, .layer = layer, .out = core_data(array)};
    int result = array == NULL ? -1 : PyList_Append(call->captured, array);
    Py_XDECREF(array);
    return result;
}

static int
take_captures(forward_call *call, PyObject *object)
{
    if (object == NULL || object == Py_None) {
        return 0;
    }
    PyObject *items = PySequence_Tuple(object);
    call->captured = PyList_New(0);
    if (items == NULL || call->captured == NULL) {
        Py_XDECREF(items);
        return -1;
    }
    mil_capture *captures;
    int64_t count = PyTuple_GET_SIZE(items);
    int result = 0;
    if (MIL_PUSH(&call->memory, count, mil_capture, &captures) != MIL_OK) {
        core_raise(call->core, MIL_ERR_MEMORY);
        result = -1;
    }
    for (int64_t i = 0; i < count && result == 0; i++) {
        result = take_capture(call, PyTuple_GET_ITEM(items, i), &captures[i]);
    }
    Py_DECREF(items);
    call->arguments.captures = captures;
    call->arguments.capture_count = count;
    return result;
}

static int
run_forward(forward_call *call)
{
    mil_context context;
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
        status = mil_check_tokens(&call->model->model, call->arguments.tokens, call->arguments.sequences,
                                  call->arguments.offsets);
        if (status == MIL_OK) {
            status = core_context_acquire(call->core, call->model->model.ops, &context);
            if (status == MIL_OK) {
                status = mil_model_forward(&context, &call->model->model, &call->arguments);
                core_context_release(call->core, &context);
            }
        }
    Py_END_ALLOW_THREADS
    if (status != MIL_OK) {
        core_raise(call->core, status);
        return -1;
    }
    return 0;
}

static PyObject *
model_forward(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"tokens", "offsets", "states", "rows", "capture", "fast", NULL};
    PyObject *tokens, *offsets = NULL, *states = NULL, *rows = NULL, *capture = NULL, *result = NULL;
    int fast = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|O$OOOp:forward", names, &tokens, &offsets, &states,
                                     &rows, &capture, &fast)) {
        return NULL;
    }
    forward_call call = {.core = core_state_of(self), .model = (core_model *)self};
    call.tokens = core_tokens(call.core, tokens, "forward: tokens");
    call.offsets = call.tokens == NULL ? NULL : core_offsets(call.core, offsets, core_length(call.tokens));
    if (call.offsets != NULL) {
        call.arguments = (mil_forward){
            .tokens = core_data(call.tokens),
            .sequences = core_length(call.offsets) - 1,
            .offsets = core_data(call.offsets),
            .fast = fast != 0,
        };
        if (take_states(&call, states) == 0 && take_rows(&call, rows) == 0 &&
            take_captures(&call, capture) == 0 && run_forward(&call) == 0) {
            result =
                call.captured == NULL ? Py_NewRef(call.logits) : PyTuple_Pack(2, call.logits, call.captured);
        }
    }
    forward_release(&call);
    return result;
}

/* ---- State ------------------------------------------------------------------------------------------------- */

PyObject *
core_wrap_state(core_state *core, core_model *owner, mil_state *state)
{
    PyTypeObject *type = core->types[CORE_TYPE_STATE];
    core_sequence_state *self = (core_sequence_state *)type->tp_alloc(type, 0);
    if (self == NULL) {
        mil_state_release(state);
        return NULL;
    }
    self->owner = (core_model *)Py_NewRef((PyObject *)owner);
    self->state = *state;
    *state = (mil_state){0};
    return (PyObject *)self;
}

static PyObject *
model_state(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"capacity", NULL};
    long long capacity = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|L:state", names, &capacity)) {
        return NULL;
    }
    core_state *core = core_state_of(self);
    mil_state state;
    mil_status status = mil_state_init(&state, &((core_model *)self)->model, capacity);
    return status == MIL_OK ? core_wrap_state(core, (core_model *)self, &state) : core_raise(core, status);
}

static PyObject *
model_state_bytes(PyObject *self, PyObject *length)
{
    int64_t tokens = PyLong_AsLongLong(length);
    if (tokens == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (tokens < 0 || tokens > MIL_MOST_TOKENS) {
        return core_raise_format(core_state_of(self), MIL_ERR_VALUE, "state_bytes: %lld tokens cannot be",
                                 (long long)tokens);
    }
    return PyLong_FromLongLong(mil_state_bytes_at(&((core_model *)self)->model, tokens));
}

static void
state_dealloc(PyObject *self)
{
    core_sequence_state *state = (core_sequence_state *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    mil_state_release(&state->state);
    Py_XDECREF(state->owner);
    type->tp_free(self);
    Py_DECREF(type);
}

static int
state_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((core_sequence_state *)self)->owner);
    return 0;
}

/* The state inside, unless a call is working on it. */
static mil_state *
idle_state(PyObject *self)
{
    core_sequence_state *state = (core_sequence_state *)self;
    if (state->busy) {
        core_raise_format(core_state_of(self), MIL_ERR_STATE, "this state is in use by another call");
        return NULL;
    }
    return &state->state;
}

static PyObject *
state_copy(PyObject *self, PyObject *unused)
{
    (void)unused;
    mil_state *from = idle_state(self), to;
    if (from == NULL) {
        return NULL;
    }
    core_state *core = core_state_of(self);
    mil_status status = mil_state_copy(&to, from);
    return status == MIL_OK ? core_wrap_state(core, ((core_sequence_state *)self)->owner, &to)
                            : core_raise(core, status);
}

static PyObject *
state_rollback(PyObject *self, PyObject *count)
{
    mil_state *state = idle_state(self);
    int64_t tokens = state == NULL ? -1 : PyLong_AsLongLong(count);
    if (state == NULL || (tokens == -1 && PyErr_Occurred())) {
        return NULL;
    }
    mil_status status = mil_state_rollback(state, tokens);
    return status == MIL_OK ? Py_NewRef(Py_None) : core_raise(core_state_of(self), status);
}

static PyObject *
state_clear(PyObject *self, PyObject *unused)
{
    (void)unused;
    mil_state *state = idle_state(self);
    if (state == NULL) {
        return NULL;
    }
    mil_status status = mil_state_clear(state);
    return status == MIL_OK ? Py_NewRef(Py_None) : core_raise(core_state_of(self), status);
}

static PyObject *
state_save(PyObject *self, PyObject *unused)
{
    (void)unused;
    mil_state *state = idle_state(self);
    PyObject *image =
        state == NULL ? NULL : PyBytes_FromStringAndSize(NULL, (Py_ssize_t)mil_state_image_bytes(state));
    if (image != NULL) {
        mil_status status = mil_state_write(state, PyBytes_AS_STRING(image));
        if (status != MIL_OK) {
            Py_DECREF(image);
            return core_raise(core_state_of(self), status);
        }
    }
    return image;
}

/* The object itself, or what it holds as `core`: the package's own models keep a Model there. New reference; NULL
 * with an exception where asking failed. */
static PyObject *
model_behind(core_state *core, PyObject *object)
{
    if (PyObject_TypeCheck(object, core->types[CORE_TYPE_MODEL])) {
        return Py_NewRef(object);
    }
    PyObject *held = PyObject_GetAttrString(object, "core");
    if (held == NULL && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        return Py_NewRef(object);
    }
    return held;
}

static PyObject *
state_restore(PyObject *type, PyObject *args)
{
    core_state *core = PyType_GetModuleState((PyTypeObject *)type);
    PyObject *object;
    Py_buffer image;
    if (!PyArg_ParseTuple(args, "Oy*:restore", &object, &image)) {
        return NULL;
    }
    PyObject *result = NULL;
    PyObject *held = model_behind(core, object);
    core_model *model = held == NULL ? NULL : core_as_model(core, held, "restore: the first argument");
    if (model != NULL) {
        mil_state state;
        mil_status status = mil_state_read(&state, &model->model, image.buf, image.len);
        result = status == MIL_OK ? core_wrap_state(core, model, &state) : core_raise(core, status);
    }
    Py_XDECREF(held);
    PyBuffer_Release(&image);
    return result;
}

static PyObject *
state_get_number(PyObject *self, void *which)
{
    const mil_state *state = &((core_sequence_state *)self)->state;
    int64_t numbers[4] = {state->length, state->boundary, state->capacity, mil_state_bytes(state)};
    return PyLong_FromLongLong(numbers[(intptr_t)which]);
}

static PyObject *
state_get_model(PyObject *self, void *unused)
{
    (void)unused;
    return Py_NewRef((PyObject *)((core_sequence_state *)self)->owner);
}

/* ---- types --------------------------------------------------------------------------------------------------- */

#define KEYWORD_METHOD(function) (PyCFunction)(void (*)(void)) function, METH_VARARGS | METH_KEYWORDS

static PyMethodDef model_methods[] = {
    {"parameter_specs", model_parameter_specs, METH_O | METH_CLASS,
     "parameter_specs(config): list of (name, shape, is_matrix, required) that a configuration asks for."},
    {"footprint", (PyCFunction)(void (*)(void))model_footprint, METH_VARARGS | METH_KEYWORDS | METH_CLASS,
     "footprint(config, *, dtype=\"float32\", activation=None, sequences=1, rows=1, logits=0): bytes of "
     "workspace of such a pass, of a text's mixers, and of one token's keys and values; activation: a "
     "device's, "
     "None: the CPU."},
    {"parameters", model_parameters, METH_NOARGS, "name -> array, as given."},
    {"device_parameters", model_device_parameters, METH_NOARGS,
     "name -> DeviceArray over the memory that a model on a device computes with."},
    {"dtypes", model_dtypes, METH_NOARGS, "name -> \"float32\", \"bfloat16\" or \"float16\"."},
    {"forward", KEYWORD_METHOD(model_forward), "Logits (and captured activations) of packed rows of tokens."},
    {"state", KEYWORD_METHOD(model_state), "state(capacity=0): the empty State of one sequence."},
    {"state_bytes", model_state_bytes, METH_O,
     "Bytes that the state of a sequence of that many tokens needs."},
    {NULL, NULL, 0, NULL},
};

static PyObject *
model_get_config(PyObject *self, void *unused)
{
    (void)unused;
    return Py_NewRef(((core_model *)self)->config);
}

static PyObject *
model_get_table_info(PyObject *self, void *unused)
{
    (void)unused;
    return core_table_info(((core_model *)self)->model.ops);
}

static PyGetSetDef model_properties[] = {
    {"config", model_get_config, NULL, "The configuration dict.", NULL},
    {"table_info", model_get_table_info, NULL, "See _core.table_info.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot model_slots[] = {
    {Py_tp_doc,
     "Model(config, parameters, dtypes={}, table=None): a model over borrowed arrays, or over copies of them "
     "on "
     "the device whose operators `table` holds."},
    {Py_tp_new, model_new},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_traverse, model_traverse},
    {Py_tp_methods, model_methods},
    {Py_tp_getset, model_properties},
    {0, NULL},
};

static PyType_Spec model_spec = {
    .name = "mambainllama._core.Model",
    .basicsize = sizeof(core_model),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = model_slots,
};

static PyMethodDef state_methods[] = {
    {"copy", state_copy, METH_NOARGS, "An independent copy (fork)."},
    {"rollback", state_rollback, METH_O, "rollback(count): take the last tokens back, exactly."},
    {"clear", state_clear, METH_NOARGS, "Back to no tokens."},
    {"save", state_save, METH_NOARGS, "The state as bytes."},
    {"restore", state_restore, METH_VARARGS | METH_CLASS,
     "restore(model, image): a State from save()'s bytes; the model may be what mil.load gave."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef state_properties[] = {
    {"length", state_get_number, NULL, "Tokens seen.", (void *)0},
    {"boundary", state_get_number, NULL, "Tokens folded into the mixers' states.", (void *)1},
    {"capacity", state_get_number, NULL, "Tokens that the KV caches hold.", (void *)2},
    {"nbytes", state_get_number, NULL, "Bytes held.", (void *)3},
    {"model", state_get_model, NULL, "The Model it belongs to.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot state_slots[] = {
    {Py_tp_doc,
     "The state of one sequence: KV caches, convolution windows, SSM states and tails. Made by "
     "Model.state()."},
    {Py_tp_dealloc, state_dealloc},
    {Py_tp_traverse, state_traverse},
    {Py_tp_methods, state_methods},
    {Py_tp_getset, state_properties},
    {0, NULL},
};

static PyType_Spec state_spec = {
    .name = "mambainllama._core.State",
    .basicsize = sizeof(core_sequence_state),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = state_slots,
};

static int
add_type(PyObject *module, core_state *state, enum core_type place, PyType_Spec *spec)
{
    state->types[place] = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return state->types[place] == NULL ? -1 : PyModule_AddType(module, state->types[place]);
}

int
core_add_model_types(PyObject *module, core_state *state)
{
    if (add_type(module, state, CORE_TYPE_MODEL, &model_spec) < 0) {
        return -1;
    }
    return add_type(module, state, CORE_TYPE_STATE, &state_spec);
}
