/* The canonical configuration, from a Python dict to the structs of model.h.
 *
 * mambainllama/families.py has turned a checkpoint's words into this dict; its keys are the structs' field
 * names.  An unknown key is refused, so that a misspelt switch cannot silently do nothing.
 */
#include "python/types.h"

#include <math.h>

typedef struct reader {
    core_state *core;
    PyObject *dict;   /* own copy: what stands for a number may run Python, which may change the caller's */
    const char *what; /* "config", "config['layers'][3]" in messages */
    Py_ssize_t found;
    bool failed;
} reader;

static PyObject *
get(reader *r, const char *key)
{
    if (r->failed) {
        return NULL;
    }
    PyObject *value = PyDict_GetItemString(r->dict, key);
    if (value == NULL) {
        return NULL;
    }
    r->found++;
    return value == Py_None ? NULL : value;
}

static void
fail_type(reader *r, const char *key, const char *expected)
{
    PyErr_Clear();
    core_raise_format(r->core, MIL_ERR_DTYPE, "%s: %s is not %s", r->what, key, expected);
    r->failed = true;
}

static int64_t
get_int(reader *r, const char *key, int64_t otherwise)
{
    PyObject *value = get(r, key);
    if (value == NULL) {
        return otherwise;
    }
    int64_t number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred()) {
        fail_type(r, key, "an integer");
    }
    return number;
}

static float
get_float(reader *r, const char *key, double otherwise)
{
    PyObject *value = get(r, key);
    if (value == NULL) {
        return (float)otherwise;
    }
    double number = PyFloat_AsDouble(value);
    if (number == -1 && PyErr_Occurred()) {
        fail_type(r, key, "a number");
    }
    return (float)number;
}

static bool
get_bool(reader *r, const char *key, bool otherwise)
{
    PyObject *value = get(r, key);
    int truth = value == NULL ? otherwise : PyObject_IsTrue(value);
    if (truth < 0) {
        fail_type(r, key, "a truth value");
    }
    return truth > 0;
}

static int
get_choice(reader *r, const char *key, const char *const *choices)
{
    PyObject *value = get(r, key);
    if (value == NULL) {
        return 0;
    }
    const char *text = PyUnicode_Check(value) ? PyUnicode_AsUTF8(value) : NULL;
    for (int i = 0; text != NULL && choices[i] != NULL; i++) {
        if (strcmp(text, choices[i]) == 0) {
            return i;
        }
    }
    fail_type(r, key, "one of the known words");
    return 0;
}

/* A list of `count` floats in the arena. */
static const float *
get_floats(reader *r, const char *key, int64_t count, mil_arena *arena)
{
    PyObject *value = get(r, key);
    if (value == NULL) {
        return NULL;
    }
    PyObject *array = PyArray_FROM_OTF(value, NPY_FLOAT32, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
    float *floats = NULL;
    if (array == NULL || PyArray_NDIM((PyArrayObject *)array) != 1 || core_length(array) != count) {
        Py_XDECREF(array);
        fail_type(r, key, "a list of one number for each rotated pair");
        return NULL;
    }
    if (MIL_PUSH(arena, count, float, &floats) != MIL_OK) {
        core_raise(r->core, MIL_ERR_MEMORY);
        r->failed = true;
    }
    else {
        memcpy(floats, core_data(array), (size_t)count * sizeof(float));
    }
    Py_DECREF(array);
    return floats;
}

/* Refuses keys that nobody asked for. */
static int
check_known(reader *r)
{
    Py_ssize_t unknown = PyDict_GET_SIZE(r->dict) - r->found;
    if (!r->failed && unknown > 0) {
        core_raise_format(r->core, MIL_ERR_VALUE,
                          "%s has %zd keys that are not known; the known ones are the fields in model.h",
                          r->what, unknown);
        r->failed = true;
    }
    return r->failed ? -1 : 0;
}

static int
finish(reader *r)
{
    int failed = check_known(r);
    Py_CLEAR(r->dict);
    return failed;
}

static int
begin(core_state *core, PyObject *object, const char *what, reader *r)
{
    *r = (reader){.core = core, .what = what};
    if (!PyDict_Check(object)) {
        core_raise_format(core, MIL_ERR_DTYPE, "%s is a %.80s, not a dict", what, Py_TYPE(object)->tp_name);
        return -1;
    }
    r->dict = PyDict_Copy(object);
    return r->dict == NULL ? -1 : 0;
}

static int
read_layer(core_state *core, PyObject *dict, const char *what, mil_layer_config *c)
{
    static const char *const mixers[] = {"attention", "mamba1", "mamba2", NULL};
    static const char *const activations[] = {"silu", "gelu", "gelu_tanh", "relu", "relu2", NULL};
    reader r;
    if (begin(core, dict, what, &r) < 0) {
        return -1;
    }
    c->mixer = (mil_mixer_kind)get_choice(&r, "mixer", mixers);
    c->heads = get_int(&r, "heads", 0);
    c->kv_heads = get_int(&r, "kv_heads", c->heads);
    c->head_dim = get_int(&r, "head_dim", 0);
    c->window = get_int(&r, "window", 0);
    c->rotary = get_int(&r, "rotary", 0);
    c->attention_scale =
        get_float(&r, "attention_scale", c->head_dim > 0 ? 1 / sqrt((double)c->head_dim) : 1);
    c->inner = get_int(&r, "inner", 0);
    c->state_dim = get_int(&r, "state_dim", 0);
    c->conv_width = get_int(&r, "conv_width", 4);
    c->dt_rank = get_int(&r, "dt_rank", 0);
    c->x_width = get_int(&r, "x_width", c->inner);
    c->B_groups = get_int(&r, "B_groups", 1);
    c->C_groups = get_int(&r, "C_groups", 1);
    c->repeat_before_conv = get_bool(&r, "repeat_before_conv", true);
    c->x_proj = get_bool(&r, "x_proj", false);
    c->bcdt_norm = get_bool(&r, "bcdt_norm", false);
    c->bcdt_eps = get_float(&r, "bcdt_eps", 1e-6);
    c->norm_group = get_int(&r, "norm_group", 0);
    c->norm_before_gate = get_bool(&r, "norm_before_gate", false);
    c->mixer_norm_eps = get_float(&r, "mixer_norm_eps", 1e-5);
    c->dt_bias_scale = get_float(&r, "dt_bias_scale", 1);
    c->dt_min = get_float(&r, "dt_min", 0);
    c->dt_max = get_float(&r, "dt_max", INFINITY);
    c->intermediate = get_int(&r, "intermediate", 0);
    c->gated = get_bool(&r, "gated", true);
    c->activation = (mil_activation)get_choice(&r, "activation", activations);
    return finish(&r);
}

static int
read_layers(core_state *core, PyObject *list, mil_arena *arena, mil_model_config *config)
{
    if (list == NULL || !PyList_Check(list) || PyList_GET_SIZE(list) == 0) {
        core_raise_format(core, MIL_ERR_DTYPE, "config: layers is not a list with an entry for each layer");
        return -1;
    }
    mil_layer_config *layers;
    config->layer_count = PyList_GET_SIZE(list);
    if (MIL_PUSH(arena, config->layer_count, mil_layer_config, &layers) != MIL_OK) {
        core_raise(core, MIL_ERR_MEMORY);
        return -1;
    }
    config->layers = layers;
    PyObject *own = PyList_AsTuple(list);
    int failed = own == NULL ? -1 : 0;
    for (int64_t i = 0; i < config->layer_count && !failed; i++) {
        char what[48];
        snprintf(what, sizeof what, "config: layers[%lld]", (long long)i);
        layers[i] = (mil_layer_config){0};
        failed = read_layer(core, PyTuple_GET_ITEM(own, i), what, &layers[i]);
    }
    Py_XDECREF(own);
    return failed;
}

static int
read_rope(core_state *core, PyObject *dict, mil_arena *arena, mil_rope_config *rope)
{
    *rope = (mil_rope_config){.scale = 1};
    reader r;
    if (dict == NULL) {
        return 0;
    }
    if (begin(core, dict, "config: rope", &r) < 0) {
        return -1;
    }
    rope->rotary = get_int(&r, "rotary", 0);
    if (!r.failed && (rope->rotary < 0 || rope->rotary % 2 != 0)) {
        core_raise_format(core, MIL_ERR_VALUE, "config: rope: rotary = %lld is not an even size",
                          (long long)rope->rotary);
        r.failed = true;
    }
    rope->inv_freq = get_floats(&r, "inv_freq", rope->rotary / 2, arena);
    rope->long_inv_freq = get_floats(&r, "long_inv_freq", rope->rotary / 2, arena);
    rope->long_after = get_int(&r, "long_after", 0);
    rope->scale = get_float(&r, "scale", 1);
    rope->theta = get_float(&r, "theta", 10000);
    rope->dynamic_factor = get_float(&r, "dynamic_factor", 0);
    return finish(&r);
}

int
core_read_config(core_state *core, PyObject *dict, mil_arena *arena, mil_model_config *config)
{
    reader r;
    if (begin(core, dict, "config", &r) < 0) {
        return -1;
    }
    *config = (mil_model_config){
        .vocab = get_int(&r, "vocab", 0),
        .hidden = get_int(&r, "hidden", 0),
        .tied = get_bool(&r, "tied", false),
        .norm_eps = get_float(&r, "norm_eps", 1e-6),
        .embedding_scale = get_float(&r, "embedding_scale", 1),
        .logit_scale = get_float(&r, "logit_scale", 1),
    };
    PyObject *rope = get(&r, "rope"), *layers = get(&r, "layers");
    if (check_known(&r) < 0 || read_rope(core, rope, arena, &config->rope) < 0 ||
        read_layers(core, layers, arena, config) < 0) {
        r.failed = true;
    }
    return finish(&r);
}
