/* The type Trainer, and evaluate(): micro-steps and optimizer steps of csrc/distill from Python.
 *
 * Gradients, moments and masters are memory of the trainer; Python sees them as NumPy views that keep the
 * trainer alive, which is how checkpoints are written and read without copies in between.
 */
#include "python/types.h"

#include "distill/trainer.h"

typedef struct core_trainer {
    PyObject_HEAD core_model *student, *teacher; /* strong; teacher may be NULL */
    mil_trainer trainer;
    bool busy; /* while a call works on it without the GIL */
} core_trainer;

/* ---- life ------------------------------------------------------------------------------------------------- */

static void
trainer_dealloc(PyObject *self)
{
    core_trainer *trainer = (core_trainer *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    mil_trainer_release(&trainer->trainer);
    Py_XDECREF(trainer->student);
    Py_XDECREF(trainer->teacher);
    type->tp_free(self);
    Py_DECREF(type);
}

static int
trainer_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((core_trainer *)self)->student);
    Py_VISIT(((core_trainer *)self)->teacher);
    return 0;
}

/* Marks the parameters to train: all, or those named. Their arrays must be writeable. */
static int
choose_trainable(core_state *core, const core_model *student, PyObject *names, bool *trainable)
{
    const mil_model *model = &student->model;
    PyObject *set = names == NULL || names == Py_None ? NULL : PySet_New(names);
    if (set == NULL && PyErr_Occurred()) {
        return -1;
    }
    int result = 0;
    Py_ssize_t found = 0;
    int64_t bound = 0; /* arrays were borrowed in the order of the parameters that have data */
    for (int64_t i = 0; i < model->parameter_count && result == 0; i++) {
        const mil_parameter *p = &model->parameters[i];
        trainable[i] = false;
        if (p->data == NULL) {
            continue;
        }
        const core_array *array = &student->arrays[bound++];
        PyObject *name = PyUnicode_FromString(p->name);
        int chosen = name == NULL ? -1 : set == NULL ? 1 : PySet_Contains(set, name);
        Py_XDECREF(name);
        result = chosen < 0 ? -1 : 0;
        trainable[i] = chosen == 1;
        found += trainable[i];
        if (trainable[i] && !array->writeable) {
            core_raise_format(core, MIL_ERR_VALUE,
                              "Trainer: %s is read-only; load the student with writeable parameters",
                              p->name);
            result = -1;
        }
    }
    if (result == 0 && set != NULL && found != PySet_GET_SIZE(set)) {
        core_raise_format(core, MIL_ERR_VALUE,
                          "Trainer: %zd of the %zd trainable names are not parameters of the student",
                          PySet_GET_SIZE(set) - found, PySet_GET_SIZE(set));
        result = -1;
    }
    if (result == 0 && found == 0) {
        core_raise_format(core, MIL_ERR_VALUE, "Trainer: nothing is trainable");
        result = -1;
    }
    Py_XDECREF(set);
    return result;
}

static int
init_trainer(core_state *core, core_trainer *self, PyObject *names, bool checkpointing)
{
    mil_model *student = &self->student->model;
    bool *trainable = mil_alloc((size_t)student->parameter_count, sizeof *trainable);
    if (trainable == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    int result = choose_trainable(core, self->student, names, trainable);
    if (result == 0) {
        const mil_model *teacher = self->teacher == NULL ? NULL : &self->teacher->model;
        mil_status status = mil_trainer_init(&self->trainer, student, teacher, trainable, checkpointing);
        if (status != MIL_OK) {
            core_raise(core, status);
            result = -1;
        }
    }
    mil_free(trainable);
    return result;
}

static PyObject *
trainer_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"student", "teacher", "trainable", "checkpointing", NULL};
    core_state *core = PyType_GetModuleState(type);
    PyObject *student, *teacher = Py_None, *trainable = NULL;
    int checkpointing = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|O$Op:Trainer", names, &student, &teacher, &trainable,
                                     &checkpointing)) {
        return NULL;
    }
    if (core_as_model(core, student, "Trainer: student") == NULL ||
        (teacher != Py_None && core_as_model(core, teacher, "Trainer: teacher") == NULL)) {
        return NULL;
    }
    core_trainer *self = (core_trainer *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->student = (core_model *)Py_NewRef(student);
    self->teacher = teacher == Py_None ? NULL : (core_model *)Py_NewRef(teacher);
    if (init_trainer(core, self, trainable, checkpointing != 0) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

/* ---- micro-steps -------------------------------------------------------------------------------------------- */

/* Python's arguments of one micro-step, and the arrays that back them. */
typedef struct step_call {
    mil_micro_step step;
    mil_preference preference;
    PyObject *tokens, *offsets, *labels, *row_weight;         /* strong */
    PyObject *top_tokens, *top_logprobs, *reference, *row_ce; /* strong */
} step_call;

static void
step_release(step_call *call)
{
    Py_XDECREF(call->tokens);
    Py_XDECREF(call->offsets);
    Py_XDECREF(call->labels);
    Py_XDECREF(call->row_weight);
    Py_XDECREF(call->top_tokens);
    Py_XDECREF(call->top_logprobs);
    Py_XDECREF(call->reference);
    Py_XDECREF(call->row_ce);
}

/* Reads (tokens, offsets=None, *, labels, row_weight, ...) behind `format`'s positional objects. */
static int
step_arrays(core_state *core, step_call *call, PyObject *tokens, PyObject *offsets, PyObject *labels,
            PyObject *row_weight)
{
    call->tokens = core_tokens(core, tokens, "tokens");
    if (call->tokens == NULL) {
        return -1;
    }
    int64_t rows = core_length(call->tokens);
    call->offsets = core_offsets(core, offsets, rows);
    if (call->offsets == NULL) {
        return -1;
    }
    if (labels != NULL && labels != Py_None) {
        call->labels = core_tokens(core, labels, "labels");
        if (call->labels == NULL) {
            return -1;
        }
    }
    if (row_weight != NULL && row_weight != Py_None) {
        call->row_weight =
            PyArray_FROM_OTF(row_weight, NPY_FLOAT32, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
        if (call->row_weight == NULL) {
            return -1;
        }
    }
    if ((call->labels != NULL && core_length(call->labels) != rows) ||
        (call->row_weight != NULL &&
         (PyArray_NDIM((PyArrayObject *)call->row_weight) != 1 || core_length(call->row_weight) != rows))) {
        core_raise_format(core, MIL_ERR_SHAPE,
                          "labels and row_weight need one entry for each of the %lld tokens",
                          (long long)rows);
        return -1;
    }
    call->step.tokens = core_data(call->tokens);
    call->step.offsets = core_data(call->offsets);
    call->step.sequences = core_length(call->offsets) - 1;
    call->step.labels = core_data(call->labels);
    call->step.row_weight = core_data(call->row_weight);
    return 0;
}

static bool
is_given(PyObject *object)
{
    return object != NULL && object != Py_None;
}

/* An array of `type` in C order and of `dims` axes, or NULL with an exception. */
static PyArrayObject *
take_array(core_state *core, PyObject *object, int type, int dims, const char *name)
{
    PyObject *array = PyArray_FROM_OTF(object, type, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
    if (array != NULL && PyArray_NDIM((PyArrayObject *)array) != dims) {
        core_raise_format(core, MIL_ERR_SHAPE, "%s needs %d axes, it has %d", name, dims,
                          PyArray_NDIM((PyArrayObject *)array));
        Py_CLEAR(array);
    }
    return (PyArrayObject *)array;
}

/* Stored likeliest tokens, if any: [rows, top] and [rows, top + 1]. */
static int
step_top(core_state *core, step_call *call, PyObject *tokens, PyObject *logprobs)
{
    if (is_given(tokens) != is_given(logprobs)) {
        core_raise_format(core, MIL_ERR_VALUE, "top_tokens and top_logprobs belong together: give both");
        return -1;
    }
    if (!is_given(tokens)) {
        return 0;
    }
    PyArrayObject *ids = take_array(core, tokens, NPY_INT32, 2, "top_tokens");
    call->top_tokens = (PyObject *)ids;
    PyArrayObject *values = ids == NULL ? NULL : take_array(core, logprobs, NPY_FLOAT32, 2, "top_logprobs");
    call->top_logprobs = (PyObject *)values;
    if (values == NULL) {
        return -1;
    }
    int64_t rows = core_length(call->tokens), top = PyArray_DIM(ids, 1);
    if (PyArray_DIM(ids, 0) != rows || PyArray_DIM(values, 0) != rows || PyArray_DIM(values, 1) != top + 1) {
        core_raise_format(core, MIL_ERR_SHAPE,
                          "top_tokens and top_logprobs must be [%lld, top] and [%lld, top + 1]",
                          (long long)rows, (long long)rows);
        return -1;
    }
    call->step.top = top;
    call->step.top_tokens = PyArray_DATA(ids);
    call->step.top_logprobs = PyArray_DATA(values);
    return 0;
}

/* Preference pairs, where the reference model's log-probabilities are given. */
static int
step_preference(core_state *core, step_call *call, PyObject *reference, int length_normalized)
{
    if (!is_given(reference)) {
        return 0;
    }
    PyArrayObject *array = take_array(core, reference, NPY_FLOAT64, 1, "reference");
    call->reference = (PyObject *)array;
    if (array == NULL) {
        return -1;
    }
    if (PyArray_DIM(array, 0) != call->step.sequences) {
        core_raise_format(core, MIL_ERR_SHAPE, "reference needs one entry for each of the %lld sequences",
                          (long long)call->step.sequences);
        return -1;
    }
    call->preference.reference = PyArray_DATA(array);
    call->preference.length_normalized = length_normalized != 0;
    call->step.preference = &call->preference;
    call->step.kl_weight = 0;
    return 0;
}

static int
read_direction(core_state *core, const char *word, mil_kl_direction *out)
{
    static const char *const words[] = {"forward", "reverse", "jsd"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(word, words[i]) == 0) {
            *out = (mil_kl_direction)i;
            return 0;
        }
    }
    core_raise_format(core, MIL_ERR_VALUE, "direction = \"%.40s\" is not \"forward\", \"reverse\" or \"jsd\"",
                      word);
    return -1;
}

static PyObject *
pair_results(const mil_preference *p, const mil_micro_step *step)
{
    return Py_BuildValue("{sdsdsdsdsdsdsdsdsdsd}", "loss", p->loss, "margin", p->margin, "chosen_reward",
                         p->chosen_reward, "rejected_reward", p->rejected_reward, "chosen_logprob",
                         p->chosen_logprob, "rejected_logprob", p->rejected_logprob, "pairs_correct",
                         p->correct, "pairs", (double)(step->sequences / 2), "ce", step->ce, "ce_rows",
                         step->ce_rows);
}

static PyObject *
step_results(const mil_micro_step *step)
{
    if (step->preference != NULL) {
        return pair_results(step->preference, step);
    }
    return Py_BuildValue("{sdsdsdsdsdsdsdsdsd}", "kl", step->kl, "ce", step->ce, "teacher_ce",
                         step->teacher_ce, "kl_rows", step->kl_rows, "ce_rows", step->ce_rows, "agree",
                         step->agree, "correct", step->correct, "hidden", step->hidden, "align", step->align);
}

/* Runs `student` against `teacher` through the trainer, or without one (evaluation). */
static PyObject *
run_step(core_state *core, mil_trainer *trainer, const mil_model *student, const mil_model *teacher,
         mil_micro_step *step)
{
    mil_context context;
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
        status = core_context_acquire(core, &mil_cpu_ops, &context);
        if (status == MIL_OK) {
            status = trainer != NULL ? mil_trainer_backward(&context, trainer, step)
                                     : mil_evaluate(&context, student, teacher, step);
            core_context_release(core, &context);
        }
    Py_END_ALLOW_THREADS
    return status == MIL_OK ? step_results(step) : core_raise(core, status);
}

/* Sets the busy flag, or raises where another thread has it. */
static int
enter(core_state *core, core_trainer *self)
{
    if (self->busy) {
        core_raise_format(core, MIL_ERR_STATE, "this Trainer is in use by another thread");
        return -1;
    }
    self->busy = true;
    return 0;
}

static PyObject *
trainer_backward(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"tokens",
                            "offsets",
                            "labels",
                            "row_weight",
                            "kl_weight",
                            "ce_weight",
                            "temperature",
                            "direction",
                            "scale",
                            "hidden_weight",
                            "align_weight",
                            "evaluate",
                            "mix",
                            "top_tokens",
                            "top_logprobs",
                            "reference",
                            "beta",
                            "label_smoothing",
                            "length_normalized",
                            NULL};
    core_trainer *self = (core_trainer *)object;
    core_state *core = core_state_of(object);
    step_call call = {.step = {.kl_weight = 1, .temperature = 1, .scale = 1, .mix = 0.5f},
                      .preference = {.beta = 0.1}};
    PyObject *tokens, *offsets = NULL, *labels = NULL, *row_weight = NULL, *top_tokens = NULL,
                      *top_logprobs = NULL, *reference = NULL, *result = NULL;
    const char *direction = "forward";
    int evaluate = 0, length_normalized = 0;
    mil_preference *pairs = &call.preference;
    mil_micro_step *step = &call.step;
    step->kl_weight = self->teacher == NULL ? 0 : 1;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|O$OOfffsfffpfOOOddp:backward", names, &tokens,
                                     &offsets, &labels, &row_weight, &step->kl_weight, &step->ce_weight,
                                     &step->temperature, &direction, &step->scale, &step->hidden_weight,
                                     &step->align_weight, &evaluate, &step->mix, &top_tokens, &top_logprobs,
                                     &reference, &pairs->beta, &pairs->label_smoothing, &length_normalized)) {
        return NULL;
    }
    step->evaluate = evaluate != 0;
    if (read_direction(core, direction, &step->direction) == 0 &&
        step_arrays(core, &call, tokens, offsets, labels, row_weight) == 0 &&
        step_top(core, &call, top_tokens, top_logprobs) == 0 &&
        step_preference(core, &call, reference, length_normalized) == 0 && enter(core, self) == 0) {
        result = run_step(core, &self->trainer, NULL, NULL, step);
        self->busy = false;
    }
    step_release(&call);
    return result;
}

/* An array for each row's cross-entropy, where it is wanted. */
static int
step_rows(step_call *call, bool wanted)
{
    npy_intp rows = (npy_intp)core_length(call->tokens);
    call->row_ce = wanted ? PyArray_ZEROS(1, &rows, NPY_FLOAT64, 0) : NULL;
    call->step.row_ce = core_data(call->row_ce);
    return wanted && call->row_ce == NULL ? -1 : 0;
}

static PyObject *
core_evaluate(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"student",    "teacher",     "tokens",    "offsets", "labels",
                            "row_weight", "temperature", "direction", "rows",    NULL};
    core_state *core = core_get_state(module);
    step_call call = {.step = {.kl_weight = 1, .ce_weight = 1, .temperature = 1, .scale = 1, .mix = 0.5f}};
    int rows = 0;
    PyObject *student, *teacher, *tokens, *offsets = NULL, *labels = NULL, *row_weight = NULL, *result = NULL;
    const char *direction = "forward";
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO|O$OOfsp:evaluate", names, &student, &teacher,
                                     &tokens, &offsets, &labels, &row_weight, &call.step.temperature,
                                     &direction, &rows)) {
        return NULL;
    }
    core_model *s = core_as_model(core, student, "evaluate: student");
    core_model *t =
        teacher == Py_None || s == NULL ? NULL : core_as_model(core, teacher, "evaluate: teacher");
    if (s == NULL || (t == NULL && teacher != Py_None)) {
        return NULL;
    }
    if (read_direction(core, direction, &call.step.direction) == 0 &&
        step_arrays(core, &call, tokens, offsets, labels, row_weight) == 0 &&
        step_rows(&call, rows != 0) == 0) {
        result = run_step(core, NULL, &s->model, t == NULL ? NULL : &t->model, &call.step);
    }
    if (result != NULL && rows != 0 && PyDict_SetItemString(result, "row_ce", call.row_ce) < 0) {
        Py_CLEAR(result);
    }
    step_release(&call);
    return result;
}

/* ---- optimizer ---------------------------------------------------------------------------------------------- */

static PyObject *
trainer_apply(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"learning_rate", "betas",         "eps",
                            "weight_decay",  "max_grad_norm", "vector_rate",
                            "muon_rate",     "muon_momentum", NULL};
    core_trainer *self = (core_trainer *)object;
    core_state *core = core_state_of(object);
    mil_optimizer_step step = {.beta1 = 0.9f,
                               .beta2 = 0.95f,
                               .eps = 1e-8f,
                               .max_grad_norm = 1,
                               .vector_rate = 1,
                               .muon_momentum = 0.95f};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "f|$(ff)ffffff:apply", names, &step.learning_rate,
                                     &step.beta1, &step.beta2, &step.eps, &step.weight_decay,
                                     &step.max_grad_norm, &step.vector_rate, &step.muon_rate,
                                     &step.muon_momentum)) {
        return NULL;
    }
    if (enter(core, self) < 0) {
        return NULL;
    }
    mil_context context;
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
        status = core_context_acquire(core, &mil_cpu_ops, &context);
        if (status == MIL_OK) {
            status = mil_trainer_apply(&context, &self->trainer, &step);
            core_context_release(core, &context);
        }
    Py_END_ALLOW_THREADS
    self->busy = false;
    return status == MIL_OK ? PyFloat_FromDouble(step.grad_norm) : core_raise(core, status);
}

/* ---- views ---------------------------------------------------------------------------------------------------- */

/* Adds prefix + name -> a view of `data` in the parameter's shape to dict. */
static int
add_view(PyObject *self, PyObject *dict, const char *prefix, const mil_parameter *p, float *data)
{
    if (data == NULL) {
        return 0;
    }
    npy_intp shape[3] = {(npy_intp)p->shape[0], (npy_intp)p->shape[1], (npy_intp)p->shape[2]};
    PyObject *key = PyUnicode_FromFormat("%s%s", prefix, p->name);
    PyObject *view = PyArray_SimpleNewFromData(p->dims, shape, NPY_FLOAT32, data);
    int result = -1;
    if (key != NULL && view != NULL && PyArray_SetBaseObject((PyArrayObject *)view, Py_NewRef(self)) == 0) {
        result = PyDict_SetItem(dict, key, view);
    }
    Py_XDECREF(key);
    Py_XDECREF(view);
    return result;
}

static PyObject *
trainer_gradients(PyObject *object, PyObject *unused)
{
    (void)unused;
    const mil_trainer *trainer = &((core_trainer *)object)->trainer;
    PyObject *dict = PyDict_New();
    for (int64_t i = 0; dict != NULL && i < trainer->student->parameter_count; i++) {
        if (add_view(object, dict, "", &trainer->student->parameters[i], trainer->gradients.of[i]) < 0) {
            Py_CLEAR(dict);
        }
    }
    return dict;
}

static PyObject *
trainer_state(PyObject *object, PyObject *unused)
{
    (void)unused;
    const mil_trainer *trainer = &((core_trainer *)object)->trainer;
    PyObject *dict = PyDict_New();
    for (int64_t i = 0; dict != NULL && i < trainer->student->parameter_count; i++) {
        const mil_parameter *p = &trainer->student->parameters[i];
        float *master = p->dtype == MIL_F32 ? NULL : trainer->master[i]; /* else it is the parameter itself */
        if (add_view(object, dict, "m.", p, trainer->m[i]) < 0 ||
            add_view(object, dict, "v.", p, trainer->v[i]) < 0 ||
            add_view(object, dict, "master.", p, master) < 0) {
            Py_CLEAR(dict);
        }
    }
    return dict;
}

static PyObject *
trainer_get_step(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(((core_trainer *)object)->trainer.step);
}

static int
trainer_set_step(PyObject *object, PyObject *value, void *unused)
{
    (void)unused;
    int64_t step = value == NULL ? -1 : PyLong_AsLongLong(value);
    if (step < 0) {
        if (!PyErr_Occurred()) {
            core_raise_format(core_state_of(object), MIL_ERR_VALUE,
                              "Trainer: step is a number of optimizer steps, from 0");
        }
        return -1;
    }
    ((core_trainer *)object)->trainer.step = step;
    return 0;
}

/* ---- type ------------------------------------------------------------------------------------------------------ */

#define KEYWORD_METHOD(function) (PyCFunction)(void (*)(void)) function, METH_VARARGS | METH_KEYWORDS

static PyMethodDef trainer_methods[] = {
    {"backward", KEYWORD_METHOD(trainer_backward),
     "One micro-step: losses, and gradients added. Returns sums."},
    {"apply", KEYWORD_METHOD(trainer_apply),
     "Clip, AdamW, clear. Returns the gradient's norm before clipping."},
    {"gradients", trainer_gradients, METH_NOARGS, "name -> view of the gradient."},
    {"state", trainer_state, METH_NOARGS,
     "\"m.name\", \"v.name\", \"master.name\" -> views, for checkpoints."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef trainer_properties[] = {
    {"step", trainer_get_step, trainer_set_step, "Optimizer steps taken.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot trainer_slots[] = {
    {Py_tp_doc,
     "Trainer(student, teacher=None, *, trainable=None, checkpointing=False): gradients and AdamW of a "
     "student."},
    {Py_tp_new, trainer_new},
    {Py_tp_dealloc, trainer_dealloc},
    {Py_tp_traverse, trainer_traverse},
    {Py_tp_methods, trainer_methods},
    {Py_tp_getset, trainer_properties},
    {0, NULL},
};

static PyType_Spec trainer_spec = {
    .name = "mambainllama._core.Trainer",
    .basicsize = sizeof(core_trainer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = trainer_slots,
};

static PyMethodDef functions[] = {
    {"evaluate", KEYWORD_METHOD(core_evaluate),
     "Losses of a student, with or without a teacher, on packed rows. Returns sums."},
    {NULL, NULL, 0, NULL},
};

int
core_add_trainer_type(PyObject *module, core_state *state)
{
    state->types[CORE_TYPE_TRAINER] = (PyTypeObject *)PyType_FromModuleAndSpec(module, &trainer_spec, NULL);
    if (state->types[CORE_TYPE_TRAINER] == NULL ||
        PyModule_AddType(module, state->types[CORE_TYPE_TRAINER]) < 0) {
        return -1;
    }
    return PyModule_AddFunctions(module, functions);
}
