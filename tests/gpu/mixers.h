/* Sessions of the operators that keep states: calls of one or more rows, some of them taken back, through the CPU's
 * table and CUDA's on the same inputs.
 *
 * A row's inputs are a function of its stream and token, so that the same tokens can come one at a time, in windows,
 * or in a batch; one packed row of inputs holds all that an operator reads, side by side, as a projection gives it.
 */
#ifndef MIL_TESTS_GPU_MIXERS_H
#define MIL_TESTS_GPU_MIXERS_H

#include "harness.h"

#define MIXER_SEQUENCES 8

typedef struct mixer_call {
    int64_t count[MIXER_SEQUENCES]; /* rows of each sequence */
    int64_t drop[MIXER_SEQUENCES];  /* of them taken back afterwards */
} mixer_call;

typedef struct mixer_case {
    char name[128];
    int64_t width, y_width;                   /* of a row of inputs, of outputs */
    int64_t state, conv_rows, conv, x, B, dt; /* floats of the state; widths of the tails */
    double tolerance;                         /* of y, relative to the largest */
    double tail_tolerance;                    /* of the tails; 0: they hold what was given */
    bool makes_inputs;                        /* of the convolution: its tail does not hold what was given */
    const void *arguments;                    /* the operator's, without rows, inputs and outputs */
    void (*run)(harness *h, const struct mixer_case *c, bool gpu, const mil_rows *rows, const void *inputs,
                void *y, const mil_mixer_state *states);
} mixer_case;

/* An array where an operator of that device finds it. */
static inline const void *
mixer_side(const harness_array *a, bool gpu)
{
    return gpu ? a->gpu : a->cpu;
}

/* In [-1, 1). */
static inline float
mixer_value(int64_t stream, int64_t token, int64_t column)
{
    uint64_t bits = (uint64_t)stream * 0x9e3779b97f4a7c15u + (uint64_t)token * 0xbf58476d1ce4e5b9u +
                    (uint64_t)column * 0x94d049bb133111ebu + 1;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    bits ^= bits >> 31;
    return (float)((double)(bits >> 11) * 0x1p-52 - 1.0);
}

typedef struct mixer_states {
    harness_array state, conv, x, B, dt;
} mixer_states;

static inline mixer_states
mixer_new_states(harness *h, const mixer_case *c)
{
    mixer_states s;
    s.state = harness_zeros(h, c->state);
    s.conv = harness_zeros(h, c->conv_rows * c->conv);
    s.x = harness_zeros(h, MIL_TAIL * c->x);
    s.B = harness_zeros(h, MIL_TAIL * c->B);
    s.dt = harness_zeros(h, MIL_TAIL * c->dt);
    return s;
}

static inline mil_mixer_state
mixer_state_of(const mixer_states *s, bool gpu)
{
    mil_mixer_state state = {};
    state.state = (float *)mixer_side(&s->state, gpu);
    state.conv = (float *)mixer_side(&s->conv, gpu);
    state.x = (float *)mixer_side(&s->x, gpu);
    state.B = (float *)mixer_side(&s->B, gpu);
    state.dt = (float *)mixer_side(&s->dt, gpu);
    return state;
}

/* The tails' and state's error after a call. */
static inline void
mixer_compare_states(harness *h, const mixer_case *c, const mixer_states *s, int64_t call)
{
    char what[256];
    const harness_array *arrays[] = {&s->state, &s->conv, &s->x, &s->B, &s->dt};
    static const char *const names[] = {"state", "conv", "x", "B", "dt"};
    for (int i = 0; i < 5; i++) {
        snprintf(what, sizeof what, "%s: %s after call %lld", c->name, names[i], (long long)call);
        double tolerance = i == 0 && h->act != MIL_F32                            ? c->tolerance
                           : (i != 1 || c->makes_inputs) && c->tail_tolerance > 0 ? c->tail_tolerance
                                                                                  : 2e-5;
        if (arrays[i]->count > 0) {
            harness_compare(h, what, *arrays[i], tolerance);
        }
    }
}

/* Runs the calls; sequence i reads stream streams[i]. Where `stateless`, sequences begin with the only call and
 * leave nothing. What CUDA gives for sequence i's token t goes to y[i] + t * y_width, where y is given. */
static inline void
mixer_session(harness *h, const mixer_case *c, int64_t sequences, const int64_t *streams,
              const mixer_call *calls, int64_t call_count, bool stateless, bool compare, float **y)
{
    mixer_states states[MIXER_SEQUENCES];
    mil_mixer_state cpu[MIXER_SEQUENCES], gpu[MIXER_SEQUENCES];
    int64_t past[MIXER_SEQUENCES] = {}, boundary[MIXER_SEQUENCES] = {}, offsets[MIXER_SEQUENCES + 1] = {};
    char what[256];
    for (int64_t i = 0; i < sequences && !stateless; i++) {
        states[i] = mixer_new_states(h, c);
        cpu[i] = mixer_state_of(&states[i], false);
        gpu[i] = mixer_state_of(&states[i], true);
    }
    for (int64_t n = 0; n < call_count; n++) {
        const mixer_call *call = &calls[n];
        for (int64_t i = 0; i < sequences; i++) {
            offsets[i + 1] = offsets[i] + call->count[i];
        }
        harness_array *inputs = harness_new(h, offsets[sequences] * c->width, h->act);
        for (int64_t i = 0; i < sequences; i++) {
            for (int64_t j = 0; j < call->count[i] * c->width; j++) {
                inputs->cpu[offsets[i] * c->width + j] =
                    mixer_value(streams[i], past[i] + j / c->width, j % c->width);
            }
        }
        harness_upload(h, inputs);
        harness_array out = harness_empty(h, offsets[sequences] * c->y_width);
        mil_rows rows = harness_rows(h, sequences, offsets, past, boundary);
        rows.settled = n % 3 != 0; /* the uploads have waited for all that is before them */
        c->run(h, c, true, &rows, inputs->gpu, out.gpu, stateless ? NULL : gpu);
        if (compare) {
            c->run(h, c, false, &rows, inputs->cpu, out.cpu, stateless ? NULL : cpu);
            snprintf(what, sizeof what, "%s: call %lld", c->name, (long long)n);
            harness_compare(h, what, out, c->tolerance);
            for (int64_t i = 0; i < sequences && !stateless; i++) {
                mixer_compare_states(h, c, &states[i], n);
            }
        }
        if (y != NULL) {
            float *values = harness_download(h, &out);
            for (int64_t i = 0; i < sequences; i++) {
                memcpy(y[i] + past[i] * c->y_width, values + offsets[i] * c->y_width,
                       (size_t)(call->count[i] * c->y_width) * sizeof(float));
            }
            free(values);
        }
        for (int64_t i = 0; i < sequences; i++) {
            boundary[i] = mil_boundary_after(past[i], call->count[i]);
            past[i] += call->count[i] - call->drop[i];
        }
    }
}

/* Against the CPU: single tokens, windows with and without tokens taken back, prompts of several lengths, in a batch,
 * and without states. */
static inline void
mixer_test_parity(harness *h, const mixer_case *c)
{
    if (!harness_turn(h)) {
        return;
    }
    static const int64_t streams[] = {1, 2, 3};
    static const mixer_call calls[] = {
        {{1, 5, 16}, {0, 2, 0}},   {{1, 16, 3}, {0, 0, 3}},  {{20, 12, 16}, {0, 5, 15}},
        {{9, 16, 1}, {4, 16, 0}},  {{16, 1, 40}, {0, 0, 0}}, {{1, 16, 16}, {0, 0, 1}},
        {{130, 16, 1}, {0, 0, 0}}, {{3, 16, 0}, {1, 9, 0}},  {{16, 16, 16}, {}},
        {{16, 16, 16}, {}},        {{1, 1, 1}, {}},          {{1, 64, 97}, {}},
        {{2, 3, 4}, {}},           {{0, 1, 17}, {}},         {{5, 5, 5}, {0, 1, 2}},
    };
    mixer_session(h, c, 3, streams, calls, sizeof calls / sizeof *calls, false, true, NULL);
    static const mixer_call alone[] = {{{1}, {}},  {{17}, {}},  {{64}, {}},
                                       {{65}, {}}, {{200}, {}}, {{333}, {}}};
    for (size_t i = 0; i < sizeof alone / sizeof *alone; i++) {
        mixer_session(h, c, 1, streams, &alone[i], 1, true, true, NULL);
    }
    static const mixer_call batch[] = {{{70, 1, 129}, {}}};
    mixer_session(h, c, 3, streams, batch, 1, true, true, NULL);
    harness_reset(h);
}

static inline void
mixer_same_rows(harness *h, const mixer_case *c, const char *how, const float *y, const float *expected,
                int64_t tokens)
{
    h->checks++;
    if (memcmp(y, expected, (size_t)(tokens * c->y_width) * sizeof(float)) != 0) {
        int64_t i = 0;
        while (memcmp(&y[i], &expected[i], sizeof(float)) == 0) {
            i++;
        }
        h->failures++;
        printf("FAILED: %s %s: %s: token %lld, column %lld: %.9g, alone %.9g\n", harness_act_name(h), c->name,
               how, (long long)(i / c->y_width), (long long)(i % c->y_width), (double)y[i],
               (double)expected[i]);
    }
}

/* The same bits one token at a time, in windows of which some rows are taken back, and in a batch. */
static inline void
mixer_test_bits(harness *h, const mixer_case *c)
{
    if (!harness_turn(h)) {
        return;
    }
    enum { TOKENS = 75 };
    static const int64_t first[] = {7}, batch[] = {4, 7, 5, 6, 7};
    static const mixer_call one = {{1}, {}};
    mixer_call single[TOKENS];
    for (int i = 0; i < TOKENS; i++) {
        single[i] = one;
    }
    static const mixer_call windows[] = {
        {{5}, {3}},  {{16}, {0}}, {{4}, {0}},  {{16}, {14}}, {{16}, {6}},
        {{16}, {0}}, {{2}, {0}},  {{16}, {0}}, {{15}, {}},
    }; /* keeps 2, 18, 22, 24, 34, 50, 52, 68, 83 tokens */
    static const mixer_call batched[] = {
        {{1, 4, 16, 2, 1}, {}},  {{3, 4, 16, 2, 12}, {}}, {{16, 4, 16, 2, 12}, {0, 0, 16}},
        {{1, 4, 16, 2, 12}, {}}, {{1, 4, 16, 2, 12}, {}}, {{1, 4, 16, 2, 12}, {}},
        {{1, 4, 1, 2, 12}, {}},  {{1, 16, 1, 2, 12}, {}}, {{1, 16, 1, 2, 12}, {}},
        {{1, 16, 1, 2, 12}, {}},
    }; /* the second: 28 + 48 tokens; the last: 1 + 108 */
    float *alone = (float *)malloc(TOKENS * (size_t)c->y_width * sizeof(float));
    float *other[5];
    for (int i = 0; i < 5; i++) {
        other[i] = (float *)malloc(4 * TOKENS * (size_t)c->y_width * sizeof(float));
    }
    mixer_session(h, c, 1, first, single, TOKENS, false, false, &alone);
    mixer_session(h, c, 1, first, windows, sizeof windows / sizeof *windows, false, false, other);
    mixer_same_rows(h, c, "in windows", other[0], alone, TOKENS);
    mixer_session(h, c, 5, batch, batched, sizeof batched / sizeof *batched, false, false, other);
    mixer_same_rows(h, c, "second of a batch", other[1], alone, TOKENS);
    mixer_same_rows(h, c, "last of a batch", other[4], alone, TOKENS);
    free(alone);
    for (int i = 0; i < 5; i++) {
        free(other[i]);
    }
    harness_reset(h);
}

/* Against the CPU: calls of mostly 16 rows in all at most, some with rows taken back, and prompts in between. */
static inline void
mixer_test_thin_parity(harness *h, const mixer_case *c)
{
    static const int64_t streams[] = {1, 2, 3};
    static const mixer_call calls[] = {
        {{1, 5, 10}, {0, 2, 0}}, {{4, 8, 3}, {0, 0, 3}}, {{20, 12, 16}, {0, 5, 15}},
        {{9, 6, 1}, {4, 6, 0}},  {{16, 0, 0}, {}},       {{0, 16, 0}, {}},
        {{0, 0, 16}, {0, 0, 1}}, {{5, 5, 5}, {0, 1, 2}}, {{1, 1, 1}, {}},
        {{130, 16, 1}, {}},      {{3, 9, 0}, {1, 9, 0}}, {{2, 3, 11}, {}},
        {{8, 7, 1}, {}},         {{1, 1, 14}, {}},       {{12, 2, 2}, {}},
        {{1, 1, 1}, {}},         {{9, 3, 4}, {}},        {{1, 1, 1}, {}},
        {{5, 5, 5}, {}},         {{1, 15, 0}, {}},
    };
    if (harness_turn(h)) {
        mixer_session(h, c, 3, streams, calls, sizeof calls / sizeof *calls, false, true, NULL);
        harness_reset(h);
    }
}

/* The same bits one token at a time, in windows of which some rows are taken back, in a batch of 16 rows at most, and, where
 * `apart` is given, which makes it so, operator by operator. */
static inline void
mixer_test_thin_bits(harness *h, const mixer_case *c, bool *apart)
{
    enum { TOKENS = 75 };
    if (!harness_turn(h)) {
        return;
    }
    static const int64_t first[] = {7}, batch[] = {4, 7, 5};
    static const mixer_call one = {{1}, {}};
    static const mixer_call windows[] = {
        {{5}, {3}},  {{16}, {0}}, {{4}, {0}},  {{16}, {14}}, {{16}, {6}},
        {{16}, {0}}, {{2}, {0}},  {{16}, {0}}, {{15}, {}},
    }; /* keeps 2, 18, 22, 24, 34, 50, 52, 68, 83 tokens */
    static const mixer_call batched[] = {
        {{1, 4, 8}, {}}, {{3, 12, 1}, {}}, {{2, 9, 5}, {0, 0, 5}}, {{1, 14, 1}, {}}, {{1, 4, 1}, {}},
        {{6, 9, 1}, {}}, {{3, 3, 3}, {}},  {{1, 9, 1}, {}},        {{2, 13, 1}, {}},
    }; /* the second: 77 tokens */
    mixer_call single[TOKENS];
    for (int i = 0; i < TOKENS; i++) {
        single[i] = one;
    }
    float *y[4];
    for (int i = 0; i < 4; i++) {
        y[i] = (float *)malloc(4 * TOKENS * (size_t)c->y_width * sizeof(float));
    }
    mixer_session(h, c, 1, first, single, TOKENS, false, false, y);
    mixer_session(h, c, 1, first, windows, sizeof windows / sizeof *windows, false, false, y + 1);
    mixer_same_rows(h, c, "in windows", y[1], y[0], TOKENS);
    mixer_session(h, c, 3, batch, batched, sizeof batched / sizeof *batched, false, false, y + 1);
    mixer_same_rows(h, c, "second of a batch", y[2], y[0], TOKENS);
    if (apart != NULL) {
        *apart = true;
        mixer_session(h, c, 1, first, single, TOKENS, false, false, y + 1);
        mixer_same_rows(h, c, "operator by operator", y[1], y[0], TOKENS);
        mixer_session(h, c, 1, first, windows, sizeof windows / sizeof *windows, false, false, y + 1);
        mixer_same_rows(h, c, "operator by operator, in windows", y[1], y[0], TOKENS);
    }
    for (int i = 0; i < 4; i++) {
        free(y[i]);
    }
    harness_reset(h);
}

static inline double
mixer_tolerance(const harness *h)
{
    return h->act == MIL_F32 ? 1e-5 : h->act == MIL_F16 ? 1e-3 : 8e-3;
}

/* float32 parameters on both sides, uniform in [from, to). */
static inline harness_array
mixer_parameters(harness *h, int64_t count, float from, float to)
{
    harness_array *a = harness_new(h, count, MIL_F32);
    for (int64_t i = 0; i < count; i++) {
        a->cpu[i] = from + (to - from) * (0.5f + 0.5f * harness_uniform(h));
    }
    harness_upload(h, a);
    return *a;
}

/* Element `offset` of an array of activations. */
static inline const void *
mixer_at(const harness *h, bool gpu, const void *array, int64_t offset)
{
    return (const char *)array + offset * (gpu ? (int64_t)mil_dtype_size(h->act) : 4);
}

#endif
