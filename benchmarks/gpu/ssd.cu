/* Mamba-2 on the device: the convolution and the SSD, decoding and prompts, against the bytes that they must move.
 *
 * Shapes of an 8B hybrid (32 heads of 128, state 128, x and B of 8 heads, C of 32), of a Mamba-2 2.7B (80 heads of
 * 64), and the issue's prompt shape (every head its own x, B, C in one group).
 *
 *   ssd [prompts of this shape alone]
 */
#include "ssd_sizes.h"
#include "timing.h"

typedef struct ssd_shape {
    const char *name;
    ssd_sizes sizes;
} ssd_shape;

static double copy_rate;

static void
report(const ssd_shape *s, const char *op, int64_t sequences, int64_t count, int64_t tail, double seconds,
       double bytes)
{
    printf("%-8s %-5s b %-4lld rows %-6lld tail %-3lld %9.2f us %8.1f GB/s %5.1f %% of a copy\n", s->name, op,
           (long long)sequences, (long long)count, (long long)tail, seconds * 1e6, bytes / seconds * 1e-9,
           100 * bytes / seconds / copy_rate);
}

/* `layers` sets of arrays, so that all of them together are well above the second-level cache. */
static void
time_shape(harness *h, const ssd_shape *shape, int64_t sequences, int64_t count, int64_t tail, bool stateful)
{
    enum { MOST = 48 };
    const ssd_sizes *s = &shape->sizes;
    const int64_t rows_count = sequences * count, x = s->x_heads * s->head_dim,
                  B = s->B_groups * s->state_dim;
    const int64_t conv = ssd_width(s), y = s->heads * s->head_dim;
    const int64_t state = y * s->state_dim;
    double set =
        (double)rows_count * (double)(2 * conv + y) * 2 + (stateful ? (double)(sequences * state) * 4 : 0);
    int layers = set * MOST < 400e6 ? MOST : set > 200e6 ? 2 : (int)(400e6 / set) + 1;
    mil_dtype act = h->act;
    mil_conv1d convs[MOST];
    mil_ssd ssds[MOST];
    mil_rows rows = timing_rows(h, sequences, count, stateful ? 160 + tail : 0, stateful ? tail : 0);
    for (int i = 0; i < layers; i++) {
        mil_mixer_state *states = stateful ? timing_states(h, sequences, state, conv, x, B, s->heads) : NULL;
        mil_conv1d c = {};
        c.rows = rows;
        c.channels = conv;
        c.width = 4;
        c.repeat = c.repeat_group = 1;
        c.x = timing_array(h, rows_count * conv, act, 1);
        c.x_stride = c.y_stride = conv;
        c.weight = (const float *)timing_array(h, conv * 4, MIL_F32, 0.5f);
        c.bias = (const float *)timing_array(h, conv, MIL_F32, 0.5f);
        c.silu = true;
        c.y = timing_array(h, rows_count * conv, act, 1);
        c.states = states;
        mil_ssd a = ssd_of(s, c.x, conv, 2);
        a.rows = rows;
        a.dt = timing_array(h, rows_count * s->heads, act, 1);
        a.dt_stride = s->heads;
        a.dt_bias = (const float *)timing_array(h, s->heads, MIL_F32, 1);
        a.A_log = (const float *)timing_array(h, s->heads, MIL_F32, 1);
        a.D = (const float *)timing_array(h, s->heads, MIL_F32, 1);
        a.y = timing_array(h, rows_count * y, act, 1);
        a.states = states;
        convs[i] = c;
        ssds[i] = a;
    }
    double seconds =
        timing_of(h, layers, [&](int i) { return h->gpu.ops->conv1d_forward(&h->gpu, &convs[i]); });
    report(shape, "conv", sequences, count, tail, seconds,
           (double)rows_count * (double)conv * 4 +
               (stateful ? (double)(sequences * conv) * (3 + (double)count) * 4 : 0));
    seconds = timing_of(h, layers, [&](int i) { return h->gpu.ops->ssd_forward(&h->gpu, &ssds[i]); });
    report(shape, "ssd", sequences, count, tail, seconds,
           (double)rows_count * (double)(conv + y + s->heads) * 2 +
               (stateful ? (double)(sequences * state) * 4 : 0));
    for (int i = 0; i < layers; i++) {
        void *arrays[] = {
            (void *)convs[i].x, (void *)convs[i].weight, (void *)convs[i].bias, convs[i].y,
            (void *)ssds[i].dt, (void *)ssds[i].dt_bias, (void *)ssds[i].A_log, (void *)ssds[i].D,
            ssds[i].y};
        for (size_t j = 0; j < sizeof arrays / sizeof *arrays; j++) {
            timing_need(cudaFree(arrays[j]));
        }
        for (int64_t j = 0; stateful && j < sequences; j++) {
            const mil_mixer_state *m = &convs[i].states[j];
            timing_need(cudaFree(m->state));
            timing_need(cudaFree(m->conv));
            timing_need(cudaFree(m->x));
            timing_need(cudaFree(m->B));
            timing_need(cudaFree(m->dt));
        }
    }
    harness_reset(h);
}

int
main(int argc, char **argv)
{
    static const ssd_shape shapes[] = {{"8B", {32, 128, 128, 8, 8, 32}},
                                       {"2.7B", {80, 64, 128, 80, 1, 1}},
                                       {"issue", {32, 128, 128, 32, 1, 1}}};
    static harness h;
    harness_begin(&h, MIL_BF16);
    copy_rate = timing_copy_rate(&h);
    printf("copy: %.0f GB/s\n", copy_rate * 1e-9);
    for (size_t i = 0; argc < 2 && i < 2; i++) {
        time_shape(&h, &shapes[i], 1, 1, 8, true);
        time_shape(&h, &shapes[i], 1, 5, 8, true);
        time_shape(&h, &shapes[i], 1, 9, 8, true);
        time_shape(&h, &shapes[i], 1, 1, 16, true); /* folds */
        time_shape(&h, &shapes[i], 32, 1, 8, true);
        time_shape(&h, &shapes[i], 256, 1, 8, true);
        time_shape(&h, &shapes[i], 256, 1, 16, true);
        time_shape(&h, &shapes[i], 1, 512, 0, true);
    }
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        if (argc < 2 || strcmp(argv[1], shapes[i].name) == 0) {
            time_shape(&h, &shapes[i], 8, 2048, 0, false);
            time_shape(&h, &shapes[i], 1, 16384, 0, false);
        }
    }
    harness_close(&h);
    return 0;
}
