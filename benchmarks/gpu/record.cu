/* What a change of the batch costs the host: a decoding step of an 8B hybrid is run, recorded, and recorded anew for other
 * texts, by the same calls as csrc/decode/recorder.c makes.  Microseconds, medians of several turns.
 *
 *   record [sequences [tokens before [layers]]]
 */
#include "random_model.h"

#include <time.h>

enum { TURNS = 9, CALLS = 200, BURST = 16 };

static double
now()
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

/* Calls `work` TURNS times, with the device at rest before each. */
template <typename Work>
static double
median(mil_context *context, Work work)
{
    double times[TURNS];
    for (int i = 0; i < TURNS; i++) {
        harness_need(context->ops->finish(context));
        times[i] = work(i);
    }
    qsort(times, TURNS, sizeof *times, timing_order);
    return times[TURNS / 2];
}

/* What is uploaded for a recording takes the place of what was for the one before, as there. */
static void
run_step(mil_context *context, const mil_model *model, const mil_step *step)
{
    const mil_arena_mark mark = mil_arena_get_mark(context->kept);
    harness_need(mil_model_step(context, model, step));
    mil_arena_rewind(context->kept, mark);
}

/* A graph of the step; *taken: the host's time. */
static cudaGraph_t
capture(mil_context *context, const mil_model *model, const mil_step *step, double *taken)
{
    cudaGraph_t graph;
    double begin = now();
    harness_need(context->ops->record_begin(context));
    run_step(context, model, step);
    timing_need(cudaStreamEndCapture(mil_stream(context), &graph));
    *taken = now() - begin;
    return graph;
}

/* From the first call to the end of `count` replays. */
static double
replay(mil_context *context, void *recording, int count)
{
    double begin = now();
    for (int i = 0; i < count; i++) {
        harness_need(context->ops->replay(context, recording));
    }
    harness_need(context->ops->finish(context));
    return now() - begin;
}

/* The parts of a recording, one after another. */
static void
time_parts(mil_context *context, const mil_model *model, const mil_step *steps)
{
    double taken, host = 0, whole = 0, instantiated = 0, first = 0, steady = 0, updated = 0, again = 0,
                  destroyed = 0;
    whole = median(context, [&](int i) {
        double begin = now();
        run_step(context, model, &steps[i % 2]);
        host = now() - begin;
        harness_need(context->ops->finish(context));
        return now() - begin;
    });
    double captured = median(context, [&](int i) {
        timing_need(cudaGraphDestroy(capture(context, model, &steps[i % 2], &taken)));
        return taken;
    });
    cudaGraph_t graphs[2];
    for (int i = 0; i < 2; i++) {
        graphs[i] = capture(context, model, &steps[i], &taken);
    }
    size_t nodes;
    timing_need(cudaGraphGetNodes(graphs[0], NULL, &nodes));
    first = median(context, [&](int i) {
        cudaGraphExec_t exec;
        double begin = now();
        timing_need(cudaGraphInstantiate(&exec, graphs[i % 2], 0));
        instantiated = now() - begin;
        double one = replay(context, exec, 1);
        steady = replay(context, exec, 1);
        begin = now();
        timing_need(cudaGraphExecDestroy(exec));
        destroyed = now() - begin;
        return one;
    });
    cudaGraphExec_t exec;
    timing_need(cudaGraphInstantiate(&exec, graphs[0], 0));
    again = median(context, [&](int i) {
        cudaGraphExecUpdateResultInfo result;
        double begin = now();
        timing_need(cudaGraphExecUpdate(exec, graphs[1 - i % 2], &result));
        updated = now() - begin;
        return replay(context, exec, 1);
    });
    timing_need(cudaGraphExecDestroy(exec));
    timing_need(cudaGraphDestroy(graphs[0]));
    timing_need(cudaGraphDestroy(graphs[1]));
    printf(
        "%zu kernels: run directly %.0f (host %.0f), captured %.0f, instantiated %.0f, updated %.0f, "
        "destroyed %.0f; replayed first %.0f, after an update %.0f, again %.0f\n",
        nodes, whole, host, captured, instantiated, updated, destroyed, first, again, steady);
}

/* How a change of texts is taken. */
typedef struct change_way {
    const char *name;
    bool waits, anew;
} change_way;

/* A burst of other texts than before, one step run directly and the others replayed, beyond a burst of the same texts. */
static void
time_changes(mil_context *context, const mil_model *model, const mil_step *steps, void **recording)
{
    static const change_way ways[] = {
        {"in turn and anew", true, true},
        {"in turn and made over", true, false},
        {"meanwhile and anew", false, true},
        {"meanwhile and made over", false, false},
    };
    printf("a change of texts, beyond the %d steps of a burst", BURST);
    for (const change_way &way : ways) {
        double same = 0, changed = median(context, [&](int i) {
                             double begin = now();
                             if (way.anew) {
                                 context->ops->record_free(context, *recording);
                                 *recording = NULL;
                             }
                             run_step(context, model, &steps[i % 2]);
                             if (way.waits) {
                                 harness_need(context->ops->finish(context));
                             }
                             harness_need(context->ops->record_begin(context));
                             run_step(context, model, &steps[i % 2]);
                             harness_need(context->ops->record_end(context, recording));
                             (void)replay(context, *recording, BURST - 1);
                             double all = now() - begin;
                             same = replay(context, *recording, BURST);
                             return all;
                         });
        printf("%s %.0f %s (a step %.0f)", &way == ways ? ":" : ",", changed - same, way.name, same / BURST);
    }
    printf("\n");
}

/* The memory of a text that ends and of one that joins. */
static void
time_states(mil_context *context, const mil_model *model)
{
    for (int64_t tokens = 512; tokens <= 8192; tokens *= 4) {
        double made = 0, freed = median(context, [&](int) {
                             mil_state state;
                             double begin = now();
                             harness_need(mil_state_init(&state, model, tokens));
                             made = now() - begin;
                             begin = now();
                             mil_state_release(&state);
                             return now() - begin;
                         });
        printf("a state of %lld tokens: made in %.0f, freed in %.0f\n", (long long)tokens, made, freed);
    }
}

/* Calls of the runtime that launches make, or made. */
static void
time_calls(mil_context *context)
{
    static const char *const names[] = {"an attribute of the device", "a kernel's shared memory",
                                        "the same, remembered", "a stream made and destroyed",
                                        "an upload while recording"};
    double taken[5];
    for (int kind = 0; kind < 5; kind++) {
        cudaGraph_t graph;
        int value;
        cudaStream_t stream;
        const void *copy;
        if (kind == 4) {
            harness_need(context->ops->record_begin(context));
        }
        double begin = now();
        for (int i = 0; i < CALLS; i++) {
            switch (kind) {
                case 0:
                    timing_need(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0));
                    break;
                case 1:
                    timing_need(cudaFuncSetAttribute(model_fill_codes,
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, 65536));
                    break;
                case 2:
                    timing_need(mil_allow_shared((const void *)model_fill_codes, 0, 65536));
                    break;
                case 3:
                    timing_need(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
                    timing_need(cudaStreamDestroy(stream));
                    break;
                default:
                    harness_need(context->ops->upload(context, names, sizeof names, &copy));
            }
        }
        taken[kind] = (now() - begin) / CALLS;
        if (kind == 4) {
            timing_need(cudaStreamEndCapture(mil_stream(context), &graph));
            timing_need(cudaGraphDestroy(graph));
        }
        printf("%s%s %.2f", kind > 0 ? ", " : "", names[kind], taken[kind]);
    }
    printf("\n");
}

int
main(int argc, char **argv)
{
    const int64_t sequences = argc > 1 ? atoll(argv[1]) : 1, past = argc > 2 ? atoll(argv[2]) : 512,
                  layers = argc > 3 ? atoll(argv[3]) : 32;
    static harness h;
    harness_begin(&h, MIL_BF16);
    const model_shape shape = {4096, layers, 32, 8, 14336, 128256, 2};
    mil_ops ops = *h.gpu.ops;
    mil_model *model = model_random(&h, &shape, MIL_BF16, &ops);
    mil_arena kept = {};
    kept.allocator = &h.allocator;
    mil_context context = h.gpu;
    context.ops = &ops;
    context.kept = &kept;
    mil_step steps[2], fewer;
    for (int i = 0; i < 2; i++) {
        steps[i] = model_step_of(&h, model, sequences, past);
    }
    double begin = now();
    run_step(&context, model, &steps[0]);
    harness_need(ops.finish(&context));
    printf("%lld sequences: the first step of the process %.0f\n", (long long)sequences, now() - begin);
    time_parts(&context, model, steps);
    void *recording = NULL;
    time_changes(&context, model, steps, &recording);
    time_states(&context, model);
    if (sequences > 1) {
        cudaGraphExecUpdateResultInfo result;
        double taken;
        fewer = model_step_of(&h, model, sequences - 1, past);
        run_step(&context, model, &fewer);
        cudaGraph_t graph = capture(&context, model, &fewer, &taken);
        cudaError_t error = cudaGraphExecUpdate((cudaGraphExec_t)recording, graph, &result);
        printf("made over for one sequence less: %s (%d)\n", cudaGetErrorString(error), result.result);
        timing_need(cudaGraphDestroy(graph));
        (void)cudaGetLastError();
    }
    ops.record_free(&context, recording);
    time_calls(&context);
    return 0;
}
