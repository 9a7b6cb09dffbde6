/* Sampling on CUDA: microseconds a call in a graph of many, by rows and filters, at the vocabulary of Llama
 * 3.
 *
 * Rows of logits rotate through more memory than L2 holds; in a decoding step they would be found there.
 */
#include "timing.h"

enum { CALLS = 32, VOCAB = 128256 };

static double
bench(harness *h, const float *logits, int64_t row_count, mil_sample a)
{
    return timing_of(h, CALLS, [&](int i) {
        a.logits = logits + (i * a.rows) % (row_count - a.rows + 1) * VOCAB;
        return h->gpu.ops->sample(&h->gpu, &a);
    });
}

int
main(void)
{
    static harness h;
    harness_begin(&h, MIL_BF16);
    enum { ROWS = 512 };
    harness_array logits = harness_empty_of(&h, (int64_t)ROWS * VOCAB, MIL_F32);
    for (int64_t i = 0; i < logits.count; i++) { /* a few likely tokens, as in text */
        float u = harness_uniform(&h), v = harness_uniform(&h);
        logits.cpu[i] = 20.0f * u * v * v;
    }
    harness_upload(&h, &logits);
    harness_array token = harness_zeros(&h, ROWS), bad = harness_zeros(&h, ROWS);
    static int64_t position[ROWS];
    static mil_sample_options options[ROWS];
    mil_sample_options list[] = {
        {0.0f, 1.0f, 0.0f, 0, 1},  {0.8f, 1.0f, 0.0f, 0, 1},  {0.8f, 1.0f, 0.05f, 0, 1},
        {0.8f, 1.0f, 0.0f, 40, 1}, {0.8f, 0.95f, 0.0f, 0, 1}, {0.8f, 0.95f, 0.05f, 40, 1},
    };
    const char *names[] = {"greedy", "temperature", "min-p", "top-k", "top-p", "all filters"};
    for (int i = 0; i < 6; i++) {
        for (int64_t rows = 1; rows <= 256; rows *= rows == 1 ? 8 : 32) {
            for (int64_t r = 0; r < ROWS; r++) {
                options[r] = list[i];
                position[r] = r;
            }
            mil_sample a = {};
            a.rows = rows;
            a.vocab = VOCAB;
            a.logits_stride = VOCAB;
            a.options = (const mil_sample_options *)harness_bytes(&h, options, sizeof options);
            a.position = (const int64_t *)harness_bytes(&h, position, sizeof position);
            a.token = (int32_t *)token.gpu;
            a.bad = (int32_t *)bad.gpu;
            printf("sample  rows %3lld  %-12s %8.2f us\n", (long long)rows, names[i],
                   bench(&h, (const float *)logits.gpu, ROWS, a) * 1e6);
        }
    }
    harness_close(&h);
    return 0;
}
