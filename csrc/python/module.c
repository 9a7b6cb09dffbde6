/* The extension module mambainllama._core: initialisation, settings and the pool of scratch arenas.
 *
 * Multi-phase initialisation with everything in core_state.  The module needs the GIL's protection for
 * core_state.threads and says nothing to a free-threaded Python, which then switches its GIL on.
 */
#define MIL_PYTHON_IMPORTS_NUMPY
#include "python/module.h"

#if defined(__linux__)
#include <sched.h>
#endif
#include <pthread.h>
#include <unistd.h>

#include "base/convert.h"
#include "base/host.h"
#include "cpu/blas.h"
#include "cpu/features.h"
#include "python/errors.h"
#include "python/ops.h"
#include "python/types.h"

/* ---- teams --------------------------------------------------------------------------------------------- */

/* OpenMP keeps workers for each thread that has had a team. After fork() the one thread that is left would wait for ever
 * for those that it had, so it computes alone; threads that the child starts find workers of their own. */
static _Thread_local bool had_team, lost_team;

/* Runs in the child, in the thread that forked. */
static void
lose_team(void)
{
    lost_team |= had_team;
}

/* The threads of a call of this thread. */
static int
team_size(const core_state *state)
{
    if (lost_team) {
        return 1;
    }
    had_team |= state->threads > 1;
    return state->threads;
}

/* ---- contexts ------------------------------------------------------------------------------------------ */

/* A device's memory for an arena (memory.h: mil_allocator); the owner is the device's table. */
static void *
allocate_on_device(void *owner, size_t bytes)
{
    mil_context context = {.ops = owner};
    void *memory;
    return context.ops->alloc(&context, bytes, &memory) == MIL_OK ? memory : NULL;
}

static void
free_on_device(void *owner, void *memory)
{
    mil_context context = {.ops = owner};
    context.ops->free(&context, memory);
}

mil_status
core_context_acquire(core_state *state, const mil_ops *ops, mil_context *context)
{
    PyThread_acquire_lock(state->lock, WAIT_LOCK);
    core_scratch **place = &state->idle;
    while (*place != NULL && (*place)->ops != ops) {
        place = &(*place)->next;
    }
    core_scratch *scratch = *place;
    if (scratch != NULL) {
        *place = scratch->next;
    }
    PyThread_release_lock(state->lock);
    if (scratch == NULL) {
        scratch = mil_alloc(1, sizeof *scratch);
        if (scratch == NULL) {
            return mil_fail(MIL_ERR_MEMORY, "out of memory: %zu bytes for a call", sizeof *scratch);
        }
        *scratch = (core_scratch){
            .ops = ops,
            .allocator = {.alloc = allocate_on_device,
                          .free = free_on_device,
                          .owner = (void *)(uintptr_t)ops},
        };
        scratch->arena.allocator = ops == &mil_cpu_ops ? NULL : &scratch->allocator;
    }
    *context = (mil_context){.ops = ops,
                             .scratch = &scratch->arena,
                             .host = &scratch->host,
                             .threads = team_size(state),
                             .stream = scratch->stream};
    mil_status status = ops->open == NULL ? MIL_OK : ops->open(context);
    scratch->stream = context->stream;
    if (status != MIL_OK) {
        core_context_release(state, context);
    }
    return status;
}

void
core_context_release(core_state *state, mil_context *context)
{
    if (context->ops->finish != NULL && context->stream != NULL) {
        mil_status unfinished = context->ops->finish(context); /* a device that failed says so again */
        (void)unfinished;
    }
    core_context_leave(state, context);
}

void
core_context_leave(core_state *state, mil_context *context)
{
    core_scratch *scratch = (core_scratch *)((char *)context->scratch - offsetof(core_scratch, arena));
    mil_arena_rewind(&scratch->arena, (mil_arena_mark){0});
    mil_arena_rewind(&scratch->host, (mil_arena_mark){0});
    PyThread_acquire_lock(state->lock, WAIT_LOCK);
    scratch->next = state->idle;
    state->idle = scratch;
    PyThread_release_lock(state->lock);
    *context = (mil_context){0};
}

/* Frees the arenas that no call uses. */
static void
trim_pool(core_state *state)
{
    PyThread_acquire_lock(state->lock, WAIT_LOCK);
    core_scratch *scratch = state->idle;
    state->idle = NULL;
    PyThread_release_lock(state->lock);
    while (scratch != NULL) {
        core_scratch *next = scratch->next;
        mil_arena_release(&scratch->arena);
        mil_arena_release(&scratch->host);
        if (scratch->ops->close != NULL) {
            mil_context context = {.ops = scratch->ops, .stream = scratch->stream};
            scratch->ops->close(&context);
        }
        mil_free(scratch);
        scratch = next;
    }
}

/* ---- threads ------------------------------------------------------------------------------------------- */

enum { MOST_THREADS = 1024 };

/* CPUs that a container's quota leaves, or `most`.  A team larger than the quota is stopped again and again in
 * the middle of its parallel regions, so asking for all cores of the host is slow there. */
static int
cores_of_quota(int most)
{
    long long quota = -1, period = 0;
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "r");
    if (file != NULL) {
        if (fscanf(file, "%lld %lld", &quota, &period) != 2) { /* "max 100000": no quota */
            quota = -1;
        }
        fclose(file);
    }
    else if ((file = fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) != NULL) {
        if (fscanf(file, "%lld", &quota) != 1) {
            quota = -1;
        }
        fclose(file);
        file = fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r");
        if (file != NULL) {
            if (fscanf(file, "%lld", &period) != 1) {
                period = 0;
            }
            fclose(file);
        }
    }
    if (quota <= 0 || period <= 0) {
        return most;
    }
    long long cores = (quota + period - 1) / period;
    return cores < most ? (int)cores : most;
}

/* OMP_NUM_THREADS where it is a number, else the cores that this process may use. */
static int
default_threads(void)
{
    const char *wanted = getenv("OMP_NUM_THREADS");
    if (wanted != NULL) {
        char *end;
        long value = strtol(wanted, &end, 10);
        if (end != wanted && value >= 1) {
            return value < MOST_THREADS ? (int)value : MOST_THREADS;
        }
    }
    int cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        cores = CPU_COUNT(&set);
    }
#endif
    cores = cores_of_quota(cores);
    return cores < 1 ? 1 : cores < MOST_THREADS ? cores : MOST_THREADS;
}

/* ---- functions ----------------------------------------------------------------------------------------- */

static PyObject *
set_threads(PyObject *module, PyObject *argument)
{
    core_state *state = core_get_state(module);
    if (argument == Py_None) {
        state->threads = default_threads();
        Py_RETURN_NONE;
    }
    long threads = PyLong_Check(argument) ? PyLong_AsLong(argument) : 0;
    if (threads < 1 || threads > MOST_THREADS) {
        PyErr_Clear();
        return core_raise_format(state, MIL_ERR_VALUE,
                                 "set_threads: threads = %R; expected an integer from 1 to %d", argument,
                                 MOST_THREADS);
    }
    state->threads = (int)threads;
    Py_RETURN_NONE;
}

static PyObject *
get_threads(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromLong(core_get_state(module)->threads);
}

/* -1 with an exception where no such float type is known. */
static int
float_dtype(core_state *state, const char *name)
{
    for (int i = MIL_F32; i <= MIL_F16; i++) {
        if (strcmp(name, mil_dtype_name((mil_dtype)i)) == 0) {
            return i;
        }
    }
    core_raise_format(state, MIL_ERR_DTYPE, "convert: \"%s\" is not float32, bfloat16 or float16", name);
    return -1;
}

static PyObject *
convert(PyObject *module, PyObject *args)
{
    core_state *state = core_get_state(module);
    Py_buffer from, to;
    const char *from_name, *to_name;
    if (!PyArg_ParseTuple(args, "y*sw*s:convert", &from, &from_name, &to, &to_name)) {
        return NULL;
    }
    int from_dtype = float_dtype(state, from_name);
    int to_dtype = from_dtype < 0 ? -1 : float_dtype(state, to_name);
    if (to_dtype >= 0) {
        size_t from_size = mil_dtype_size((mil_dtype)from_dtype), count = (size_t)from.len / from_size;
        if ((size_t)from.len % from_size == 0 &&
            (size_t)to.len == count * mil_dtype_size((mil_dtype)to_dtype)) {
            Py_BEGIN_ALLOW_THREADS
                mil_convert(from.buf, (mil_dtype)from_dtype, to.buf, (mil_dtype)to_dtype, (int64_t)count,
                            team_size(state));
            Py_END_ALLOW_THREADS
        }
        else {
            core_raise_format(state, MIL_ERR_SHAPE, "convert: %zd bytes of %s do not become %zd bytes of %s",
                              from.len, from_name, to.len, to_name);
        }
    }
    PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *
load_blas(PyObject *module, PyObject *argument)
{
    PyObject *path = NULL;
    if (!PyUnicode_FSConverter(argument, &path)) {
        return NULL;
    }
    mil_status status = mil_blas_load(PyBytes_AS_STRING(path));
    Py_DECREF(path);
    if (status != MIL_OK) {
        return core_raise(core_get_state(module), status);
    }
    Py_RETURN_NONE;
}

static PyObject *
memory(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return Py_BuildValue("{s:L,s:L}", "bytes", (long long)mil_memory_bytes(), "blocks",
                         (long long)mil_memory_blocks());
}

static PyObject *
trim_memory(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    trim_pool(core_get_state(module));
    Py_RETURN_NONE;
}

static PyObject *
fail_after(PyObject *module, PyObject *argument)
{
    long long allocations = PyLong_AsLongLong(argument);
    if (allocations == -1 && PyErr_Occurred()) {
        return core_raise_format(core_get_state(module), MIL_ERR_VALUE, "fail_after: expected an integer");
    }
    mil_memory_fail_after((int64_t)allocations);
    Py_RETURN_NONE;
}

static PyObject *
cpu_info(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    return Py_BuildValue("{s:s,s:s,s:s,s:O,s:i}", "level", mil_cpu_level_name(mil_cpu_get_level()), "reads",
                         mil_cpu_reads_in_order() ? "in-order" : "side-by-side", "blas",
                         mil_blas_description(), "blas_loaded", mil_blas_loaded() ? Py_True : Py_False,
                         "threads", core_get_state(module)->threads);
}

static PyObject *
table_info(PyObject *module, PyObject *capsule)
{
    const mil_ops *ops = core_read_table(core_get_state(module), capsule);
    return ops == NULL ? NULL : core_table_info(ops);
}

static PyMethodDef methods[] = {
    {"table_info", table_info, METH_O,
     "table_info(table) -> {'device', 'activation', 'prefill_rows'} of an operator table; None: the CPU's."},
    {"cpu_info", cpu_info, METH_NOARGS, "cpu_info() -> dict: kernels in use, BLAS, threads."},
    {"set_threads", set_threads, METH_O, "set_threads(n): the team of every later call; None = the default."},
    {"get_threads", get_threads, METH_NOARGS, "get_threads() -> int."},
    {"convert", convert, METH_VARARGS,
     "convert(source, dtype, target, to): a contiguous array's values into another, rounded to nearest."},
    {"load_blas", load_blas, METH_O, "load_blas(path): float32 products of this CBLAS library from now on."},
    {"memory", memory, METH_NOARGS, "memory() -> {'bytes', 'blocks'}: what the C core holds now."},
    {"trim_memory", trim_memory, METH_NOARGS, "trim_memory(): free the scratch memory that no call uses."},
    {"fail_after", fail_after, METH_O,
     "fail_after(n): the n-th allocation from now fails; -1 = never. For tests."},
    {NULL, NULL, 0, NULL},
};

/* ---- for other extension modules -------------------------------------------------------------------- */

static const mil_host host = {
    .version = MIL_HOST_VERSION,
    .size = sizeof(mil_host),
    .fail = mil_fail,
    .message = mil_message,
    .arena_push = mil_arena_push,
    .arena_get_mark = mil_arena_get_mark,
    .arena_rewind = mil_arena_rewind,
};

static int
add_host(PyObject *module)
{
    PyObject *capsule = PyCapsule_New((void *)(uintptr_t)&host, MIL_HOST_CAPSULE, NULL);
    int result = capsule == NULL ? -1 : PyModule_AddObjectRef(module, "_host", capsule);
    Py_XDECREF(capsule);
    return result;
}

/* The CPU's table, for tests that dress it up as another device's. */
static int
add_cpu_table(PyObject *module)
{
    PyObject *capsule = PyCapsule_New((void *)(uintptr_t)&mil_cpu_ops, MIL_OPS_CAPSULE, NULL);
    int result = capsule == NULL ? -1 : PyModule_AddObjectRef(module, "_cpu_table", capsule);
    Py_XDECREF(capsule);
    return result;
}

/* ---- initialisation ------------------------------------------------------------------------------------ */

int
core_add_ops(PyObject *module)
{
    if (PyModule_AddFunctions(module, core_dense_methods) < 0 ||
        PyModule_AddFunctions(module, core_attention_methods) < 0 ||
        PyModule_AddFunctions(module, core_mixer_methods) < 0) {
        return -1;
    }
    return PyModule_AddIntConstant(module, "WINDOW", MIL_WINDOW) < 0 ||
                   PyModule_AddIntConstant(module, "TAIL", MIL_TAIL) < 0
               ? -1
               : 0;
}

static int
module_exec(PyObject *module)
{
    core_state *state = core_get_state(module);
    if (PyArray_ImportNumPyAPI() < 0) {
        return -1;
    }
    state->lock = PyThread_allocate_lock();
    if (state->lock == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    state->threads = default_threads();
    if (pthread_atfork(NULL, NULL, lose_team) != 0) {
        PyErr_NoMemory();
        return -1;
    }
    if (core_add_errors(module, state) < 0 || core_add_ops(module) < 0 ||
        core_add_model_types(module, state) < 0 || core_add_trainer_type(module, state) < 0 ||
        core_add_device_array_type(module, state) < 0 || core_add_generate(module) < 0 ||
        add_host(module) < 0 || add_cpu_table(module) < 0) {
        return -1;
    }
    mil_status status = mil_cpu_check_settings(); /* environment variables misspelt: say so at once */
    if (status != MIL_OK) {
        core_raise(state, status);
        return -1;
    }
    return 0;
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    core_state *state = core_get_state(module);
    Py_VISIT(state->error);
    for (int i = 0; i < CORE_STATUS_COUNT; i++) {
        Py_VISIT(state->errors[i]);
    }
    for (size_t i = 0; i < sizeof state->types / sizeof state->types[0]; i++) {
        Py_VISIT(state->types[i]);
    }
    return 0;
}

static int
module_clear(PyObject *module)
{
    core_state *state = core_get_state(module);
    Py_CLEAR(state->error);
    for (int i = 0; i < CORE_STATUS_COUNT; i++) {
        Py_CLEAR(state->errors[i]);
    }
    for (size_t i = 0; i < sizeof state->types / sizeof state->types[0]; i++) {
        Py_CLEAR(state->types[i]);
    }
    return 0;
}

static void
module_free(void *module)
{
    core_state *state = core_get_state(module);
    module_clear(module);
    if (state->lock != NULL) {
        trim_pool(state);
        PyThread_free_lock(state->lock);
        state->lock = NULL;
    }
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
    .m_name = "mambainllama._core",
    .m_doc = "The C core of mambainllama. Private: use mambainllama and mambainllama.ops.",
    .m_size = sizeof(core_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC
PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
