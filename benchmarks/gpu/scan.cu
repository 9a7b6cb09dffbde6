/* Mamba-1's scan on the device: decoding and prompts, against the bytes that it must move.
 *
 * Shapes of a Mamba 2.8B (inner 5120), of an 8B hybrid (4096, B of 64 groups and C of 256, as MambaInLlama has it),
 * and the issue's prompt shape.
 *
 *   scan [prompts of this shape alone]
 */
#include "timing.h"

typedef struct scan_shape {
    const char *name;
    int64_t inner, state_dim, B_groups, C_groups;
} scan_shape;

static double copy_rate;

static void
time_shape(harness *h, const scan_shape *s, int64_t sequences, int64_t count, int64_t tail, bool stateful)
{
    enum { MOST = 48 };
    const int64_t rows_count = sequences * count, B = s->B_groups * s->state_dim,
                  C = s->C_groups * s->state_dim;
    const int64_t state = s->inner * s->state_dim;
    double set = (double)rows_count * (double)(4 * s->inner + B + C) * 2 +
                 (stateful ? (double)(sequences * state) * 4 : 0);
    int layers = set * MOST < 400e6 ? MOST : set > 200e6 ? 2 : (int)(400e6 / set) + 1;
    mil_dtype act = h->act;
    mil_scan scans[MOST];
    mil_rows rows = timing_rows(h, sequences, count, stateful ? 160 + tail : 0, stateful ? tail : 0);
    for (int i = 0; i < layers; i++) {
        mil_scan a = {};
        a.rows = rows;
        a.inner = s->inner;
        a.state_dim = s->state_dim;
        a.B_groups = s->B_groups;
        a.C_groups = s->C_groups;
        a.x_repeat = a.x_repeat_group = 1;
        a.x = timing_array(h, rows_count * s->inner, act, 1);
        a.dt = timing_array(h, rows_count * s->inner, act, 1);
        a.z = timing_array(h, rows_count * s->inner, act, 1);
        a.B = timing_array(h, rows_count * B, act, 1);
        a.C = timing_array(h, rows_count * C, act, 1);
        a.x_stride = a.dt_stride = a.z_stride = a.y_stride = s->inner;
        a.B_stride = B;
        a.C_stride = C;
        a.dt_bias = (const float *)timing_array(h, s->inner, MIL_F32, 1);
        a.A_log = (const float *)timing_array(h, state, MIL_F32, 1);
        a.D = (const float *)timing_array(h, s->inner, MIL_F32, 1);
        a.dt_bias_scale = 1;
        a.dt_max = INFINITY;
        a.y = timing_array(h, rows_count * s->inner, act, 1);
        a.states = stateful ? timing_states(h, sequences, state, 0, s->inner, B, s->inner) : NULL;
        scans[i] = a;
    }
    double seconds =
        timing_of(h, layers, [&](int i) { return h->gpu.ops->scan_forward(&h->gpu, &scans[i]); });
    double bytes = (double)rows_count * (double)(4 * s->inner + B + C) * 2 +
                   (stateful ? (double)(sequences * state) * 4 : 0);
    printf("%-6s b %-4lld rows %-6lld tail %-3lld %9.2f us %8.1f GB/s %5.1f %% of a copy\n", s->name,
           (long long)sequences, (long long)count, (long long)tail, seconds * 1e6, bytes / seconds * 1e-9,
           100 * bytes / seconds / copy_rate);
    for (int i = 0; i < layers; i++) {
        void *arrays[] = {(void *)scans[i].x,     (void *)scans[i].dt, (void *)scans[i].z,
                          (void *)scans[i].B,     (void *)scans[i].C,  (void *)scans[i].dt_bias,
                          (void *)scans[i].A_log, (void *)scans[i].D,  scans[i].y};
        for (size_t j = 0; j < sizeof arrays / sizeof *arrays; j++) {
            timing_need(cudaFree(arrays[j]));
        }
        for (int64_t j = 0; stateful && j < sequences; j++) {
            const mil_mixer_state *m = &scans[i].states[j];
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
    static const scan_shape shapes[] = {
        {"2.8B", 5120, 16, 1, 1}, {"8B", 4096, 16, 64, 256}, {"issue", 4096, 16, 1, 1}};
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
