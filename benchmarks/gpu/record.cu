/* What a change of the batch costs the host: a decoding step of an 8B hybrid is run, recorded, and recorded anew for other
 * texts, by the same calls as csrc/decode/recorder.c makes.  Microseconds: whole times are medians of several turns, their parts of the
 * last one.
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

/* What is done without a recording, and what makes one. */
static void
time_making(mil_context *context, const mil_model *model, const mil_step *steps)
{
    double host = 0, taken;
    double whole = median(context, [&](int i) {
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
    printf("run directly %.0f, of which the host %.0f; captured %.0f\n", whole, host, captured);
}

/* An executable graph made, made over for other texts, and deleted; the replay after each, and one more. */
static void
time_graphs(mil_context *context, const mil_model *model, const mil_step *steps)
{
    double made = 0, over = 0, deleted = 0, first = 0, again = 0, taken;
    size_t nodes;
    cudaGraph_t graphs[2];
    for (int i = 0; i < 2; i++) {
        graphs[i] = capture(context, model, &steps[i], &taken);
    }
    timing_need(cudaGraphGetNodes(graphs[0], NULL, &nodes));
    double after_update = median(context, [&](int) {
        cudaGraphExec_t exec;
        cudaGraphExecUpdateResultInfo result;
        double begin = now();
        timing_need(cudaGraphInstantiate(&exec, graphs[0], 0));
        made = now() - begin;
        first = replay(context, exec, 1);
        again = replay(context, exec, 1);
        begin = now();
        timing_need(cudaGraphExecUpdate(exec, graphs[1], &result));
        over = now() - begin;
        double last = replay(context, exec, 1);
        begin = now();
        timing_need(cudaGraphExecDestroy(exec));
        deleted = now() - begin;
        return last;
    });
    printf("%zu kernels: a graph made %.0f, made over %.0f, deleted %.0f; ", nodes, made, over, deleted);
    printf("replayed first %.0f, again %.0f, made over %.0f\n", first, again, after_update);
    timing_need(cudaGraphDestroy(graphs[0]));
    timing_need(cudaGraphDestroy(graphs[1]));
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

/* Steps of a text less: by a recording of the texts before made over once and once more, and by one made anew. */
static void
time_fewer(mil_context *context, const mil_model *model, const mil_step *step, void *recording)
{
    cudaGraphExecUpdateResultInfo result;
    cudaGraphExec_t fresh;
    double over[2], taken;
    run_step(context, model, step);
    cudaGraph_t graph = capture(context, model, step, &taken);
    for (int i = 0; i < 2; i++) {
        timing_need(cudaGraphExecUpdate((cudaGraphExec_t)recording, graph, &result));
        over[i] = median(context, [&](int) { return replay(context, recording, BURST); });
    }
    timing_need(cudaGraphInstantiate(&fresh, graph, 0));
    double anew = median(context, [&](int) { return replay(context, fresh, BURST); });
    double again = median(context, [&](int) { return replay(context, recording, BURST); });
    printf("a step of one text less: made over %.1f, once more %.1f, anew %.1f, made over %.1f\n",
           over[0] / BURST, over[1] / BURST, anew / BURST, again / BURST);
    timing_need(cudaGraphExecDestroy(fresh));
    timing_need(cudaGraphDestroy(graph));
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
    mil_step steps[2];
    for (int i = 0; i < 2; i++) {
        steps[i] = model_step_of(&h, model, sequences, past);
    }
    double begin = now();
    run_step(&context, model, &steps[0]);
    harness_need(ops.finish(&context));
    printf("%lld sequences: the first step of the process %.0f\n", (long long)sequences, now() - begin);
    time_making(&context, model, steps);
    time_graphs(&context, model, steps);
    void *recording = NULL;
    time_changes(&context, model, steps, &recording);
    time_states(&context, model);
    if (sequences > 1) {
        const mil_step fewer = model_step_of(&h, model, sequences - 1, past);
        time_fewer(&context, model, &fewer, recording);
    }
    ops.record_free(&context, recording);
    time_calls(&context);
    return 0;
}
