/* _core.generate: the engine of csrc/decode driven from one Python call, and the sampler for tests.
 *
 * The loop runs without the GIL.  It takes the GIL after a round only where Python has something to
 * hear: fresh tokens if there is an on_tokens, a finished request, a poll for new requests, or, every
 * 50 ms, signals, so that Ctrl-C works.  Whatever ends the call (an exception in a callback,
 * KeyboardInterrupt, a failing forward pass) takes the one exit that releases the engine and marks the
 * states idle again.
 */
#include "python/types.h"

#include <omp.h>
#include <string.h>

#include "decode/decode.h"

#define SIGNAL_SECONDS 0.05

/* ---- reading a request ------------------------------------------------------------------------------ */

/* A dict that is read key by key; the first failure sticks. */
typedef struct reader {
    core_state *core;
    PyObject *dict;
    Py_ssize_t known; /* keys of the dict that were asked for */
    bool failed;
} reader;

/* Borrowed; NULL where missing or None. */
static PyObject *
read_key(reader *r, const char *key)
{
    PyObject *value = r->failed ? NULL : PyDict_GetItemString(r->dict, key);
    if (value != NULL) {
        r->known++;
    }
    return value == Py_None ? NULL : value;
}

static int64_t
read_int(reader *r, const char *key, int64_t otherwise)
{
    PyObject *value = read_key(r, key);
    if (value == NULL) {
        return otherwise;
    }
    PyObject *index = PyBool_Check(value) ? NULL : PyNumber_Index(value);
    long long number = index == NULL ? 0 : PyLong_AsLongLong(index);
    Py_XDECREF(index);
    if (index == NULL || PyErr_Occurred()) {
        PyErr_Clear();
        core_raise_format(r->core, MIL_ERR_DTYPE, "generate: %s must be an integer of 64 bits, not %R", key,
                          value);
        r->failed = true;
    }
    return (int64_t)number;
}

static double
read_float(reader *r, const char *key, double otherwise)
{
    PyObject *value = read_key(r, key);
    if (value == NULL) {
        return otherwise;
    }
    double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        core_raise_format(r->core, MIL_ERR_DTYPE, "generate: %s must be a number, not %R", key, value);
        r->failed = true;
    }
    return number;
}

static bool
read_bool(reader *r, const char *key)
{
    PyObject *value = read_key(r, key);
    int truth = value == NULL ? 0 : PyObject_IsTrue(value);
    if (truth < 0) {
        PyErr_Clear();
        core_raise_format(r->core, MIL_ERR_DTYPE, "generate: %s must be true or false, not %R", key, value);
        r->failed = true;
    }
    return truth > 0;
}

/* Seeds are the integers of 64 bits, signed or not. */
static uint64_t
read_seed(reader *r)
{
    PyObject *value = read_key(r, "seed");
    if (value == NULL) {
        return 0;
    }
    PyObject *index = PyNumber_Index(value);
    unsigned long long seed = index == NULL ? 0 : PyLong_AsUnsignedLongLongMask(index);
    Py_XDECREF(index);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        core_raise_format(r->core, MIL_ERR_DTYPE, "generate: seed must be an integer, not %R", value);
        r->failed = true;
    }
    return (uint64_t)seed;
}

static void
read_sampling(reader *r, mil_sampling *sampling)
{
    sampling->temperature = (float)read_float(r, "temperature", 0.0);
    sampling->top_k = read_int(r, "top_k", 0);
    sampling->top_p = (float)read_float(r, "top_p", 1.0);
    sampling->min_p = (float)read_float(r, "min_p", 0.0);
    sampling->repetition_penalty = (float)read_float(r, "repetition_penalty", 1.0);
    sampling->seed = read_seed(r);
}

/* The state in `value`, busy from now on, or NULL where it is none or in use; *found borrows `value` then. */
static mil_state *
claim_state(reader *r, PyObject *value, const char *key, PyObject **found)
{
    core_sequence_state *state = core_as_state(r->core, value, key);
    if (state == NULL) {
        r->failed = true;
        return NULL;
    }
    if (state->busy) {
        core_raise_format(r->core, MIL_ERR_STATE,
                          "generate: a %s is in use by another request or call; fork it with copy()", key);
        r->failed = true;
        return NULL;
    }
    state->busy = true; /* at once, so that the same state in two requests is found out */
    *found = value;
    return &state->state;
}

static mil_state *
read_state(reader *r, const char *key, PyObject **found)
{
    PyObject *value = read_key(r, key);
    return value == NULL ? NULL : claim_state(r, value, key, found);
}

/* ---- the call --------------------------------------------------------------------------------------- */

typedef struct generate_call {
    core_state *core;
    mil_engine engine;
    PyObject *results; /* list, one dict a request; NULL where on_finish takes them */
    PyObject *states;  /* dict: tag -> tuple of the States that the request keeps busy */
    PyObject *origins; /* list of the States that requests copy: busy until the call ends */
    PyObject *on_tokens, *on_finish, *more; /* borrowed, NULL where not wanted */
    int64_t next_tag;
    bool closed; /* `more` has no more */
} generate_call;

static void
set_idle(PyObject *state)
{
    if (state != NULL && state != Py_None) {
        ((core_sequence_state *)state)->busy = false;
    }
}

/* The states of a finished request are its owner's again. */
static int
release_states(generate_call *call, int64_t tag)
{
    PyObject *key = PyLong_FromLongLong(tag);
    PyObject *pair = key == NULL ? NULL : PyDict_GetItem(call->states, key);
    if (pair != NULL) {
        set_idle(PyTuple_GET_ITEM(pair, 0));
        set_idle(PyTuple_GET_ITEM(pair, 1));
        if (PyDict_DelItem(call->states, key) < 0) {
            Py_DECREF(key);
            return -1;
        }
    }
    Py_XDECREF(key);
    return key == NULL ? -1 : 0;
}

static int
keep_states(generate_call *call, int64_t tag, PyObject *state, PyObject *draft_state)
{
    if (state == NULL && draft_state == NULL) {
        return 0;
    }
    PyObject *key = PyLong_FromLongLong(tag);
    PyObject *pair = PyTuple_Pack(2, state ? state : Py_None, draft_state ? draft_state : Py_None);
    int failed = key == NULL || pair == NULL ? -1 : PyDict_SetItem(call->states, key, pair);
    Py_XDECREF(key);
    Py_XDECREF(pair);
    return failed;
}

/* A State that requests of this call copy when they join; nobody may change it meanwhile. */
static const mil_state *
read_origin(generate_call *call, reader *r)
{
    PyObject *value = read_key(r, "origin");
    for (Py_ssize_t i = 0; value != NULL && i < PyList_GET_SIZE(call->origins); i++) {
        if (PyList_GET_ITEM(call->origins, i) == value) {
            return &((core_sequence_state *)value)->state;
        }
    }
    PyObject *found = NULL;
    const mil_state *origin = value == NULL ? NULL : claim_state(r, value, "origin", &found);
    if (found != NULL && PyList_Append(call->origins, found) < 0) {
        set_idle(found);
        r->failed = true;
        return NULL;
    }
    return origin;
}

/* Reads a request's dict, which nobody else holds, and hands it to the engine. */
static int
submit_own(generate_call *call, PyObject *dict)
{
    reader r = {.core = call->core, .dict = dict};
    mil_request request = {.tag = call->next_tag, .sampling = MIL_SAMPLING_DEFAULT};
    PyObject *prompt = NULL, *stop = NULL, *state = NULL, *draft_state = NULL;
    PyObject *prompt_object = read_key(&r, "prompt"), *stop_object = read_key(&r, "stop");
    int failed = -1;
    if (prompt_object == NULL) {
        core_raise_format(call->core, MIL_ERR_VALUE, "generate: a request has no prompt");
        goto done;
    }
    prompt = core_tokens(call->core, prompt_object, "generate: a prompt");
    stop =
        prompt == NULL || stop_object == NULL ? NULL : core_tokens(call->core, stop_object, "generate: stop");
    if (prompt == NULL || (stop_object != NULL && stop == NULL)) {
        goto done;
    }
    request.prompt = core_data(prompt);
    request.prompt_count = core_length(prompt);
    request.stop_tokens = core_data(stop);
    request.stop_count = stop == NULL ? 0 : core_length(stop);
    request.max_new_tokens = read_int(&r, "max_new_tokens", 128);
    request.draft_tokens = read_int(&r, "draft_tokens", 4);
    request.fixed_draft = read_bool(&r, "fixed_draft");
    request.logprobs = read_bool(&r, "logprobs");
    request.prompt_logprobs = read_bool(&r, "prompt_logprobs");
    request.top_logprobs = read_int(&r, "top_logprobs", 0);
    read_sampling(&r, &request.sampling);
    request.state = read_state(&r, "state", &state);
    request.draft_state = read_state(&r, "draft_state", &draft_state);
    request.origin = read_origin(call, &r);
    if (!r.failed && r.known != PyDict_GET_SIZE(dict)) {
        core_raise_format(call->core, MIL_ERR_VALUE, "generate: a request has an unknown key among %R", dict);
        r.failed = true;
    }
    if (r.failed) {
        goto done;
    }
    mil_status status = mil_engine_submit(&call->engine, &request);
    if (status != MIL_OK) {
        core_raise(call->core, status);
        goto done;
    }
    failed = keep_states(call, request.tag, state, draft_state);
    call->next_tag++;
done:
    if (failed) {
        set_idle(state);
        set_idle(draft_state);
    }
    Py_XDECREF(prompt);
    Py_XDECREF(stop);
    return failed;
}

/* The same for a dict of the caller's: what stands for a number may run Python, which may change the dict. */
static int
submit(generate_call *call, PyObject *dict)
{
    if (!PyDict_Check(dict)) {
        core_raise_format(call->core, MIL_ERR_DTYPE, "generate: a request is a dict, not %.80s",
                          Py_TYPE(dict)->tp_name);
        return -1;
    }
    PyObject *own = PyDict_Copy(dict);
    int failed = own == NULL ? -1 : submit_own(call, own);
    Py_XDECREF(own);
    return failed;
}

/* A request that came by `more` and makes no sense is its sender's affair: on_finish gets the exception, and
 * the others go on. Anything but an exception of ours ends the call. */
static int
report_refusal(generate_call *call)
{
    if (!PyErr_ExceptionMatches(call->core->error)) {
        return -1;
    }
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    PyObject *ignored = PyObject_CallFunction(call->on_finish, "LO", (long long)call->next_tag++, value);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    Py_XDECREF(ignored);
    return ignored == NULL ? -1 : 0;
}

static int
submit_all(generate_call *call, PyObject *requests)
{
    PyObject *list = PySequence_Tuple(requests);
    if (list == NULL) {
        return -1;
    }
    int failed = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(list) && !failed; i++) {
        failed = submit(call, PyTuple_GET_ITEM(list, i));
        if (failed && call->more != NULL) {
            failed = report_refusal(call);
        }
        if (!failed && call->results != NULL) {
            failed = PyList_Append(call->results, Py_None);
        }
    }
    Py_DECREF(list);
    return failed;
}

/* Asks for more requests; waits for them where there is nothing else to do. */
static int
poll_more(generate_call *call)
{
    if (call->more == NULL || call->closed) {
        return 0;
    }
    PyObject *wait = mil_engine_pending(&call->engine) == 0 ? Py_True : Py_False;
    PyObject *requests = PyObject_CallOneArg(call->more, wait);
    if (requests == NULL) {
        return -1;
    }
    call->closed = requests == Py_None;
    int failed = call->closed ? 0 : submit_all(call, requests);
    Py_DECREF(requests);
    return failed;
}

/* ---- results ---------------------------------------------------------------------------------------- */

/* A new array [count] or [count, width] with a copy of `from`; None where `from` is NULL. */
static PyObject *
copied(const void *from, int typenum, int64_t count, int64_t width)
{
    if (from == NULL) {
        Py_RETURN_NONE;
    }
    npy_intp shape[2] = {(npy_intp)count, (npy_intp)width};
    PyObject *array = PyArray_SimpleNew(width > 0 ? 2 : 1, shape, typenum);
    if (array != NULL) {
        memcpy(PyArray_DATA((PyArrayObject *)array), from, (size_t)PyArray_NBYTES((PyArrayObject *)array));
    }
    return array;
}

static PyObject *
stats_of(const mil_generation_stats *s)
{
    return Py_BuildValue("{s:L,s:L,s:L,s:L,s:L,s:L,s:d,s:d}", "prompt_tokens", (long long)s->prompt_tokens,
                         "cached_tokens", (long long)s->cached_tokens, "new_tokens", (long long)s->new_tokens,
                         "rounds", (long long)s->rounds, "drafted", (long long)s->drafted, "accepted",
                         (long long)s->accepted, "prefill_seconds", s->prefill_seconds, "decode_seconds",
                         s->decode_seconds);
}

static PyObject *
result_of(const mil_generation *g)
{
    static const char *const reasons[] = {"running", "stop", "length", "cancelled"};
    /* "N" hands the new references over, and fails cleanly where one of them is NULL. */
    return Py_BuildValue(
        "{s:N,s:s,s:N,s:N,s:N,s:N,s:N,s:N,s:N}", "tokens",
        copied(g->tokens + g->prompt_count, NPY_INT32, g->count, 0), "finish_reason", reasons[g->finish],
        "logprobs", copied(g->logprobs, NPY_FLOAT64, g->count, 0), "top_tokens",
        copied(g->top_tokens, NPY_INT32, g->count, g->top), "top_logprobs",
        copied(g->top_logprobs, NPY_FLOAT64, g->count, g->top), "prompt_logprobs",
        copied(g->prompt_logprobs, NPY_FLOAT64, g->prompt_count, 0), "prompt_top_tokens",
        copied(g->prompt_top_tokens, NPY_INT32, g->prompt_count, g->top), "prompt_top_logprobs",
        copied(g->prompt_top_logprobs, NPY_FLOAT64, g->prompt_count, g->top), "stats", stats_of(&g->stats));
}

/* on_tokens(tag, tokens) -> None: go on; n >= 0: end after n of these tokens; n < 0: cancel. */
static int
tell_tokens(generate_call *call, int64_t index, const mil_generation *g, int64_t fresh)
{
    PyObject *tokens = PyList_New((Py_ssize_t)fresh);
    for (int64_t i = 0; tokens != NULL && i < fresh; i++) {
        PyObject *token = PyLong_FromLong(g->tokens[g->prompt_count + g->count - fresh + i]);
        if (token == NULL) {
            Py_CLEAR(tokens);
            break;
        }
        PyList_SET_ITEM(tokens, (Py_ssize_t)i, token);
    }
    if (tokens == NULL) {
        return -1;
    }
    PyObject *answer = PyObject_CallFunction(call->on_tokens, "LN", (long long)g->tag, tokens);
    if (answer == NULL || answer == Py_None) {
        Py_XDECREF(answer);
        return answer == NULL ? -1 : 0;
    }
    long long keep = PyLong_AsLongLong(answer);
    Py_DECREF(answer);
    if (keep == -1 && PyErr_Occurred()) {
        return -1;
    }
    mil_status status = mil_engine_cut(&call->engine, index, keep < 0 ? fresh : keep,
                                       keep < 0 ? MIL_FINISH_CANCELLED : MIL_FINISH_STOP);
    if (status != MIL_OK) {
        core_raise(call->core, status);
        return -1;
    }
    return 0;
}

/* Takes a finished request's result out of the engine and to Python. */
static int
hand_over(generate_call *call, int64_t index)
{
    mil_generation g = mil_engine_take(&call->engine, index);
    PyObject *result = result_of(&g);
    int64_t tag = g.tag;
    mil_generation_release(&g);
    if (result == NULL || release_states(call, tag) < 0) {
        Py_XDECREF(result);
        return -1;
    }
    if (call->results != NULL) {
        return PyList_SetItem(call->results, (Py_ssize_t)tag, result);
    }
    PyObject *ignored = PyObject_CallFunction(call->on_finish, "LN", (long long)tag, result);
    Py_XDECREF(ignored);
    return ignored == NULL ? -1 : 0;
}

/* After a round, with the GIL. */
static int
deliver(generate_call *call)
{
    if (PyErr_CheckSignals() < 0) {
        return -1;
    }
    for (int64_t i = 0; i < call->engine.running_count; i++) {
        int64_t fresh;
        const mil_generation *g = mil_engine_look(&call->engine, i, &fresh);
        if (fresh > 0 && call->on_tokens != NULL && tell_tokens(call, i, g, fresh) < 0) {
            return -1;
        }
        if (g->finish != MIL_RUNNING && hand_over(call, i) < 0) {
            return -1;
        }
    }
    return 0;
}

/* Whether Python has to hear about the round just done. */
static bool
is_news(const generate_call *call, double last_heard)
{
    if (call->on_tokens != NULL || call->more != NULL || omp_get_wtime() - last_heard > SIGNAL_SECONDS) {
        return true;
    }
    for (int64_t i = 0; i < call->engine.running_count; i++) {
        int64_t fresh;
        if (mil_engine_look(&call->engine, i, &fresh)->finish != MIL_RUNNING) {
            return true;
        }
    }
    return false;
}

static int
run(generate_call *call)
{
    for (;;) {
        if (poll_more(call) < 0) {
            return -1;
        }
        if (mil_engine_pending(&call->engine) == 0) {
            if (call->more == NULL || call->closed) {
                return 0;
            }
            continue;
        }
        mil_context context;
        mil_status status;
        Py_BEGIN_ALLOW_THREADS
            status = core_context_acquire(call->core, call->engine.options.model->ops, &context);
            if (status == MIL_OK) {
                double last_heard = omp_get_wtime();
                do {
                    status = mil_engine_round(&call->engine, &context);
                } while (status == MIL_OK && !is_news(call, last_heard));
                core_context_release(call->core, &context);
            }
        Py_END_ALLOW_THREADS
        if (status != MIL_OK) {
            core_raise(call->core, status);
            return -1;
        }
        if (deliver(call) < 0) {
            return -1;
        }
    }
}

/* ---- _core.generate --------------------------------------------------------------------------------- */

static int
read_draft(core_state *core, PyObject *draft, mil_engine_options *options)
{
    if (draft == NULL || draft == Py_None) {
        return 0;
    }
    if (PyUnicode_Check(draft)) {
        if (PyUnicode_CompareWithASCIIString(draft, "ngram") != 0) {
            core_raise_format(core, MIL_ERR_VALUE, "generate: draft is a Model or \"ngram\", not %R", draft);
            return -1;
        }
        options->draft_kind = MIL_DRAFT_NGRAM;
        return 0;
    }
    core_model *model = core_as_model(core, draft, "generate: draft");
    if (model == NULL) {
        return -1;
    }
    options->draft_kind = MIL_DRAFT_MODEL;
    options->draft = &model->model;
    return 0;
}

/* Takes the workspace of the largest round in one block now: taken bit by bit it would need more, and what is lacking
 * would be noticed late. */
static mil_status
reserve(core_state *core, const mil_ops *ops, size_t bytes)
{
    mil_context context;
    mil_status status;
    Py_BEGIN_ALLOW_THREADS
        status = core_context_acquire(core, ops, &context);
        if (status == MIL_OK) {
            void *memory;
            status = mil_arena_push(context.scratch, bytes, 1, &memory);
            core_context_release(core, &context);
        }
    Py_END_ALLOW_THREADS
    return status;
}

static PyObject *
wanted(PyObject *callback)
{
    return callback == Py_None ? NULL : callback;
}

static PyObject *
generate(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"model",
                            "requests",
                            "draft",
                            "max_batch",
                            "prefill_rows",
                            "on_tokens",
                            "on_finish",
                            "more",
                            "verify_cost",
                            "draft_cost",
                            "_break_accept",
                            "workspace",
                            "_force_acceptance",
                            NULL};
    PyObject *model_object, *requests, *draft = NULL, *on_tokens = NULL, *on_finish = NULL, *more = NULL;
    Py_ssize_t max_batch = 0, prefill_rows = 0, workspace = 0;
    double verify_cost = 0.0, draft_cost = 0.0, forced = 0.0;
    int broken = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO|$OnnOOOddind:generate", names, &model_object,
                                     &requests, &draft, &max_batch, &prefill_rows, &on_tokens, &on_finish,
                                     &more, &verify_cost, &draft_cost, &broken, &workspace, &forced)) {
        return NULL;
    }
    generate_call call = {
        .core = core_get_state(module),
        .on_tokens = wanted(on_tokens),
        .on_finish = wanted(on_finish),
        .more = wanted(more),
    };
    core_model *model = core_as_model(call.core, model_object, "generate: model");
    if (model == NULL) {
        return NULL;
    }
    mil_engine_options options = {
        .model = &model->model,
        .max_batch = (int64_t)max_batch,
        .prefill_rows = (int64_t)prefill_rows,
        .verify_cost = verify_cost,
        .draft_cost = draft_cost,
        .broken_rule = forced > 0.0 ? MIL_RULE_FORCED : (mil_broken_rule)broken,
        .forced_acceptance = forced,
    };
    if (read_draft(call.core, draft, &options) < 0) {
        return NULL;
    }
    if (call.more != NULL && call.on_finish == NULL) {
        return core_raise_format(call.core, MIL_ERR_VALUE,
                                 "generate: with more, on_finish must take the results");
    }
    mil_status status = workspace > 0 ? reserve(call.core, model->model.ops, (size_t)workspace) : MIL_OK;
    if (status == MIL_OK) {
        status = mil_engine_init(&call.engine, &options);
    }
    if (status != MIL_OK) {
        return core_raise(call.core, status);
    }
    int failed = -1;
    call.states = PyDict_New();
    call.origins = PyList_New(0);
    call.results = call.on_finish == NULL ? PyList_New(0) : NULL;
    if (call.states != NULL && call.origins != NULL && (call.results != NULL || call.on_finish != NULL)) {
        failed = submit_all(&call, requests) < 0 || run(&call) < 0 ? -1 : 0;
    }
    mil_engine_release(&call.engine);
    if (call.states != NULL) {
        PyObject *key, *pair;
        for (Py_ssize_t at = 0; PyDict_Next(call.states, &at, &key, &pair);) {
            set_idle(PyTuple_GET_ITEM(pair, 0));
            set_idle(PyTuple_GET_ITEM(pair, 1));
        }
    }
    for (Py_ssize_t i = 0; call.origins != NULL && i < PyList_GET_SIZE(call.origins); i++) {
        set_idle(PyList_GET_ITEM(call.origins, i));
    }
    Py_XDECREF(call.states);
    Py_XDECREF(call.origins);
    if (failed) {
        Py_XDECREF(call.results);
        return NULL;
    }
    if (call.results == NULL) {
        Py_RETURN_NONE;
    }
    return call.results;
}

/* ---- the sampler by itself -------------------------------------------------------------------------- */

static PyObject *
sample(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"logits", "options", "history", "position", NULL};
    core_state *core = core_get_state(module);
    PyObject *logits_object, *options, *history_object = NULL, *history = NULL, *weights = NULL,
                                       *result = NULL;
    unsigned long long position = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO!|$OK:sample", names, &logits_object, &PyDict_Type,
                                     &options, &history_object, &position)) {
        return NULL;
    }
    reader r = {.core = core, .dict = options};
    mil_sampling sampling;
    read_sampling(&r, &sampling);
    if (r.failed) {
        return NULL;
    }
    PyObject *logits = PyArray_FROM_OTF(logits_object, NPY_FLOAT32, NPY_ARRAY_IN_ARRAY);
    if (logits == NULL || PyArray_NDIM((PyArrayObject *)logits) != 1 || core_length(logits) < 1) {
        Py_XDECREF(logits);
        return core_raise_format(core, MIL_ERR_SHAPE, "sample: logits must be float32 [vocab]");
    }
    int64_t vocab = core_length(logits);
    int32_t *counts = mil_alloc((size_t)vocab, sizeof *counts);
    mil_candidate *scratch = mil_alloc((size_t)vocab, sizeof *scratch);
    weights = core_array_new(1, &vocab, CORE_F32, true);
    if (counts == NULL || scratch == NULL || weights == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    memset(counts, 0, (size_t)vocab * sizeof *counts);
    if (history_object != NULL && history_object != Py_None) {
        history = core_tokens(core, history_object, "sample: history");
        if (history == NULL) {
            goto done;
        }
        for (int64_t i = 0; i < core_length(history); i++) {
            int32_t token = ((const int32_t *)core_data(history))[i];
            if (token < 0 || token >= vocab) {
                core_raise_format(core, MIL_ERR_VALUE, "sample: history holds %d, outside the vocabulary",
                                  token);
                goto done;
            }
            counts[token]++;
        }
    }
    mil_distribution p = {.weight = core_data(weights)};
    mil_status status = mil_sampling_check(&sampling);
    if (status == MIL_OK) {
        status = mil_distribution_fill(&sampling, core_data(logits), counts, vocab, scratch, &p);
    }
    if (status != MIL_OK) {
        core_raise(core, status);
        goto done;
    }
    if (p.certain) {
        p.weight[p.best] = 1.0f;
    }
    double uniform = mil_uniform(sampling.seed, (uint64_t)position, MIL_STREAM_TARGET);
    int32_t token = mil_distribution_draw(&p, vocab, uniform);
    result = Py_BuildValue("iOd", (int)token, weights, p.total);
done:
    mil_free(counts);
    mil_free(scratch);
    Py_DECREF(logits);
    Py_XDECREF(weights);
    Py_XDECREF(history);
    return result;
}

static PyObject *
philox(PyObject *module, PyObject *args)
{
    (void)module;
    unsigned int c[4], k[2];
    if (!PyArg_ParseTuple(args, "(IIII)(II):philox", &c[0], &c[1], &c[2], &c[3], &k[0], &k[1])) {
        return NULL;
    }
    uint32_t out[4];
    mil_philox((uint32_t[4]){c[0], c[1], c[2], c[3]}, (uint32_t[2]){k[0], k[1]}, out);
    return Py_BuildValue("(IIII)", (unsigned)out[0], (unsigned)out[1], (unsigned)out[2], (unsigned)out[3]);
}

static PyObject *
uniform(PyObject *module, PyObject *args)
{
    (void)module;
    unsigned long long seed, position;
    int stream;
    if (!PyArg_ParseTuple(args, "KKi:uniform", &seed, &position, &stream)) {
        return NULL;
    }
    return PyFloat_FromDouble(mil_uniform((uint64_t)seed, (uint64_t)position, (mil_stream)stream));
}

static PyObject *
ngram_propose(PyObject *module, PyObject *args)
{
    PyObject *object;
    Py_ssize_t longest, shortest, most;
    if (!PyArg_ParseTuple(args, "Onnn:ngram_propose", &object, &longest, &shortest, &most)) {
        return NULL;
    }
    core_state *core = core_get_state(module);
    if (shortest < 1 || longest < shortest || most < 0 || most > 1 << 20) {
        return core_raise_format(core, MIL_ERR_VALUE, "ngram_propose: 1 <= shortest <= longest is needed");
    }
    PyObject *tokens = core_tokens(core, object, "ngram_propose: tokens");
    int64_t room = (int64_t)most;
    PyObject *out = tokens == NULL ? NULL : core_array_new(1, &room, CORE_I32, true);
    PyObject *result = NULL;
    if (out != NULL) {
        int64_t found = mil_ngram_propose(core_data(tokens), core_length(tokens), (int64_t)longest,
                                          (int64_t)shortest, room, core_data(out));
        result = PySequence_GetSlice(out, 0, (Py_ssize_t)found);
    }
    Py_XDECREF(tokens);
    Py_XDECREF(out);
    return result;
}

static PyMethodDef methods[] = {
    {"generate", (PyCFunction)(void (*)(void))generate, METH_VARARGS | METH_KEYWORDS,
     "generate(model, requests, *, draft=None, max_batch=16, prefill_rows=0, on_tokens=None, "
     "on_finish=None, more=None,\n"
     "         verify_cost=0, draft_cost=0, _break_accept=0, workspace=0, _force_acceptance=0) -> list of "
     "dicts. See "
     "mambainllama/generate.py."},
    {"sample", (PyCFunction)(void (*)(void))sample, METH_VARARGS | METH_KEYWORDS,
     "sample(logits, options, *, history=None, position=0) -> (token, weights, sum of weights)."},
    {"philox", philox, METH_VARARGS, "philox(counter, key) -> four words of Philox4x32-10. For tests."},
    {"uniform", uniform, METH_VARARGS,
     "uniform(seed, position, stream) -> the number in [0, 1) that a draw uses."},
    {"ngram_propose", ngram_propose, METH_VARARGS,
     "ngram_propose(tokens, longest, shortest, most) -> drafts."},
    {NULL, NULL, 0, NULL},
};

int
core_add_generate(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
