/* One row each of many sequences: the bits of a sequence alone, in outputs, states and tails, wherever in its window it is. */
#include "ssd_sizes.h"

enum { SEQUENCES = 272, STEPS = 3 };

/* States and tails of all sequences, one array each. */
typedef struct all_states {
    harness_array state, x, B, dt;
    mil_mixer_state of[SEQUENCES];
} all_states;

/* `floats` for each sequence; the last row of a tail (`tail` floats) is zeros, as between calls. */
static harness_array
random_states(harness *h, int64_t floats, int64_t tail, float least, float scale, uint64_t seed)
{
    h->random = seed;
    harness_array a = harness_random_of(h, SEQUENCES * floats, scale, MIL_F32);
    for (int64_t i = 0; i < a.count; i++) {
        a.cpu[i] = i % floats >= floats - tail ? 0.0f : fmaxf(a.cpu[i], least);
    }
    harness_upload(h, &a);
    return a;
}

static void
make_states(harness *h, const ssd_sizes *s, all_states *all)
{
    const int64_t state = s->heads * s->head_dim * s->state_dim, x = s->x_heads * s->head_dim,
                  B = s->B_groups * s->state_dim;
    all->state = random_states(h, state, 0, -1, 1.0f, 11);
    all->x = random_states(h, x * MIL_TAIL, x, -1, 1.0f, 12);
    all->B = random_states(h, B * MIL_TAIL, B, -1, 1.0f, 13);
    all->dt = random_states(h, s->heads * MIL_TAIL, s->heads, 0, 0.2f, 14);
    for (int64_t i = 0; i < SEQUENCES; i++) {
        all->of[i] = {};
        all->of[i].state = (float *)all->state.gpu + i * state;
        all->of[i].x = (float *)all->x.gpu + i * x * MIL_TAIL;
        all->of[i].B = (float *)all->B.gpu + i * B * MIL_TAIL;
        all->of[i].dt = (float *)all->dt.gpu + i * s->heads * MIL_TAIL;
    }
}

static void
compare(harness *h, const char *name, const all_states *a, const all_states *b)
{
    char what[128];
    const harness_array *left[] = {&a->state, &a->x, &a->B, &a->dt},
                        *right[] = {&b->state, &b->x, &b->B, &b->dt};
    static const char *const names[] = {"state", "x", "B", "dt"};
    for (int i = 0; i < 4; i++) {
        snprintf(what, sizeof what, "%s: %s", name, names[i]);
        harness_same_bits(h, what, *left[i], 0, *right[i], 0, left[i]->count);
    }
}

static void
test_batch(harness *h, const ssd_sizes *s)
{
    char name[96];
    snprintf(name, sizeof name, "ssd batch %lld x %lld x %lld, x %lld, B %lld", (long long)s->heads,
             (long long)s->head_dim, (long long)s->state_dim, (long long)s->x_heads, (long long)s->B_groups);
    const int64_t width = (ssd_width(s) + s->heads + 7) / 8 * 8, y_width = s->heads * s->head_dim,
                  size = (int64_t)mil_dtype_size(h->act);
    all_states together, alone;
    make_states(h, s, &together);
    make_states(h, s, &alone);
    harness_array dt_bias = harness_random_of(h, s->heads, 2.0f, MIL_F32),
                  A_log = harness_random_of(h, s->heads, 2.0f, MIL_F32),
                  D = harness_random_of(h, s->heads, 1.0f, MIL_F32);
    int64_t offsets[SEQUENCES + 1], past[SEQUENCES], boundary[SEQUENCES], one[2] = {0, 1};
    for (int64_t i = 0; i < SEQUENCES; i++) {
        const bool held = i % 5 == 4 && i % 32 < 28;
        boundary[i] = i % 7 * MIL_WINDOW;
        past[i] = boundary[i] + i % MIL_TAIL;
        boundary[i] += held ? MIL_HOLD : 0;
        offsets[i] = i;
    }
    offsets[SEQUENCES] = SEQUENCES;
    for (int step = 0; step < STEPS; step++) {
        harness_array in = harness_random(h, SEQUENCES * width, 1.0f),
                      y = harness_empty(h, SEQUENCES * y_width), z = harness_empty(h, SEQUENCES * y_width);
        for (int64_t i = -1; i < SEQUENCES; i++) { /* -1: all */
            const bool all = i < 0;
            const char *row = (const char *)in.gpu + (all ? 0 : i * width * size);
            mil_ssd a = ssd_of(s, row, width, size);
            a.rows = all ? harness_rows(h, SEQUENCES, offsets, past, boundary)
                         : harness_rows(h, 1, one, past + i, boundary + i);
            a.dt_bias = (const float *)dt_bias.gpu;
            a.A_log = (const float *)A_log.gpu;
            a.D = (const float *)D.gpu;
            a.y = all ? y.gpu : (char *)z.gpu + i * y_width * size;
            a.states = all ? together.of : alone.of + i;
            harness_check(h, h->gpu.ops->ssd_forward(&h->gpu, &a));
        }
        harness_same_bits(h, name, y, 0, z, 0, y.count);
        compare(h, name, &together, &alone);
        for (int64_t i = 0; i < SEQUENCES; i++) {
            const bool held = boundary[i] % MIL_WINDOW == MIL_HOLD;
            boundary[i] = held ? boundary[i] : past[i] - past[i] % MIL_WINDOW;
            past[i]++;
        }
    }
    harness_reset(h);
}

int
main(void)
{
    static const ssd_sizes sizes[] = {{8, 128, 128, 2, 2, 8}, {16, 64, 128, 16, 1, 1}, {4, 128, 64, 4, 2, 4},
                                      {8, 64, 64, 2, 4, 1},   {2, 128, 128, 1, 2, 1},  {6, 64, 128, 2, 2, 3}};
    static const mil_dtype types[] = {MIL_F32, MIL_BF16, MIL_F16};
    static harness h;
    for (mil_dtype type : types) {
        harness_begin(&h, type);
        for (const ssd_sizes &s : sizes) {
            if (harness_turn(&h)) {
                test_batch(&h, &s);
            }
        }
        harness_close(&h);
    }
    return harness_end(&h, "ssd batch");
}
