/* What carries speculative rounds on the device: n-gram drafts against csrc/decode/ngram.c, mil_settle against plain C, draws
 * that are put into later rows, and recordings that are made over. Everything is integers and must be equal. */
#include "harness.h"

#include "../c/settle.h" /* after device.h, which harness.h includes as C */

#define mil_stream mil_random_stream /* cuda.cuh has a function of that name */
extern "C" {
#include "decode/decode.h"
}
#undef mil_stream

static void
expect_equal(harness *h, const char *what, const void *got, const void *expected, size_t bytes)
{
    h->checks++;
    if (memcmp(got, expected, bytes) != 0) {
        h->failures++;
        printf("FAILED: %s differs\n", what);
    }
}

static int64_t
below(harness *h, int64_t bound)
{
    int64_t value = (int64_t)((double)bound * 0.5 * (1.0 + (double)harness_uniform(h)));
    return value < 0 ? 0 : value < bound ? value : bound - 1;
}

/* ---- drafts from the text ------------------------------------------------------------------------------------------ */

static void
test_propose(harness *h, int64_t sequences, int64_t length, int64_t words, int64_t drafts, int64_t shortest)
{
    if (!harness_turn(h)) {
        return;
    }
    int64_t stride = length + 3, width = drafts + 1, *count = (int64_t *)malloc((size_t)sequences * 8);
    int32_t *texts = (int32_t *)malloc((size_t)(sequences * stride) * 4);
    int32_t *drafted = (int32_t *)malloc((size_t)sequences * 4);
    int32_t *tokens = (int32_t *)malloc((size_t)(sequences * width) * 4);
    for (int64_t i = 0; i < sequences; i++) {
        count[i] = 1 + below(h, length);
        drafted[i] = (int32_t)below(h, drafts + 1);
        for (int64_t t = 0; t < stride; t++) {
            texts[i * stride + t] = (int32_t)below(h, words);
        }
    }
    harness_array out = harness_zeros(h, sequences * width);
    mil_propose p = {};
    p.sequences = sequences;
    p.drafts = drafts;
    p.texts = (const int32_t *)harness_bytes(h, texts, (size_t)(sequences * stride) * 4);
    p.texts_stride = stride;
    p.count = (const int64_t *)harness_bytes(h, count, (size_t)sequences * 8);
    p.longest = 4;
    p.shortest = shortest;
    p.tokens = (int32_t *)out.gpu;
    p.drafted = (int32_t *)harness_bytes(h, drafted, (size_t)sequences * 4);
    harness_check(h, h->gpu.ops->propose(&h->gpu, &p));
    harness_need(h->gpu.ops->copy(&h->gpu, tokens, out.gpu, (size_t)(sequences * width) * 4));
    int32_t *allowed = (int32_t *)malloc((size_t)sequences * 4);
    memcpy(allowed, drafted, (size_t)sequences * 4);
    harness_need(h->gpu.ops->copy(&h->gpu, drafted, p.drafted, (size_t)sequences * 4));
    for (int64_t i = 0; i < sequences; i++) {
        int32_t found[64];
        int64_t proposed = mil_ngram_propose(texts + i * stride, count[i], 4, shortest, drafts, found);
        int32_t offered = proposed > 0 ? allowed[i] : 0;
        expect_equal(h, "propose: number of drafts", &drafted[i], &offered, 4);
        expect_equal(h, "propose: last token", &tokens[i * width], &texts[i * stride + count[i] - 1], 4);
        expect_equal(h, "propose: drafts", &tokens[i * width + 1], found, (size_t)proposed * 4);
        for (int64_t j = 0; j < width; j++) {
            bool valid = tokens[i * width + j] >= 0 && tokens[i * width + j] < words;
            expect_equal(h, "propose: a token that is none", &valid, "\1", 1);
        }
    }
    free(count);
    free(texts);
    free(drafted);
    free(allowed);
    free(tokens);
    harness_reset(h);
}

/* ---- the end of a round ---------------------------------------------------------------------------------------------- */

/* An array on both sides. */
struct both {
    void *host, *device;
    size_t bytes;
};

static both
make(harness *h, void *host, size_t bytes)
{
    return {host, (void *)(uintptr_t)harness_bytes(h, host, bytes), bytes};
}

static void
test_settle(harness *h, int64_t n, int64_t drafts, bool model_drafts)
{
    if (!harness_turn(h)) {
        return;
    }
    enum { ROUNDS = 3, VOCAB = 50 };
    int64_t width = drafts + 1, columns = n + 1, stride = 400;
    auto numbers = [&](int64_t count) { return (int64_t *)calloc((size_t)count, 8); };
    auto words = [&](int64_t count) { return (int32_t *)calloc((size_t)count, 4); };
    int64_t *position = numbers(drafts * n), *rows = numbers(3 * columns),
            *draft_rows = numbers(drafts * 3 * columns), *end = numbers(n), *rounds = numbers(1);
    int32_t *accepted = words(n), *verdict = words(n * width), *bad = words(n * width),
            *draft_bad = words(drafts * n), *wanted = words(n), *barred = words(n), *drafted = words(n),
            *tokens = words(n * width), *draft_tokens = words(2 * n), *texts = words(n * stride),
            *history = words(ROUNDS * n * (width + 2)), *failed = words(n);
    for (int64_t i = 0; i < n; i++) {
        int64_t count = 2 + below(h, 100);
        for (int64_t j = 0; j < drafts; j++) {
            position[j * n + i] = count + j;
        }
        rows[columns + i] = count - 1;
        draft_rows[columns + i] = count - 2;
        end[i] = count + 1 + below(h, 20);
        wanted[i] = drafted[i] = (int32_t)below(h, drafts + 1);
    }
    both arrays[] = {
        make(h, position, (size_t)(drafts * n) * 8),
        make(h, rows, (size_t)(3 * columns) * 8),
        make(h, draft_rows, (size_t)(drafts * 3 * columns) * 8),
        make(h, end, (size_t)n * 8),
        make(h, rounds, 8),
        make(h, wanted, (size_t)n * 4),
        make(h, barred, (size_t)n * 4),
        make(h, drafted, (size_t)n * 4),
        make(h, tokens, (size_t)(n * width) * 4),
        make(h, draft_tokens, (size_t)(2 * n) * 4),
        make(h, texts, (size_t)(n * stride) * 4),
        make(h, history, (size_t)(ROUNDS * n * (width + 2)) * 4),
        make(h, failed, (size_t)n * 4),
    };
    static const char *const names[] = {"position", "rows",    "draft rows", "end",    "rounds",
                                        "wanted",   "barred",  "drafted",    "tokens", "draft tokens",
                                        "texts",    "history", "failed"};
    for (int round = 0; round < ROUNDS; round++) {
        for (int64_t i = 0; i < n; i++) {
            accepted[i] = (int32_t)below(h, drafted[i] + 1);
            for (int64_t j = 0; j < width; j++) {
                verdict[i * width + j] = (int32_t)below(h, VOCAB + 1);
            }
        }
        mil_settle s = {};
        s.sequences = n;
        s.drafts = drafts;
        s.draft_vocab = model_drafts ? VOCAB : VOCAB + 1;
        s.accepted = accepted;
        s.verdict = verdict;
        s.bad = bad;
        s.draft_bad = model_drafts ? draft_bad : NULL;
        s.wanted = wanted;
        s.end = end;
        s.barred = barred;
        s.drafted = drafted;
        s.position = position;
        s.rows = rows;
        s.draft_rows = model_drafts ? draft_rows : NULL;
        s.tokens = tokens;
        s.draft_tokens = model_drafts ? draft_tokens : NULL;
        s.texts = model_drafts ? NULL : texts;
        s.texts_stride = stride;
        s.rounds = rounds;
        s.history = history;
        s.failed = failed;
        mil_settle d = s;
        d.accepted = (const int32_t *)harness_bytes(h, accepted, (size_t)n * 4);
        d.verdict = (const int32_t *)harness_bytes(h, verdict, (size_t)(n * width) * 4);
        d.bad = (const int32_t *)harness_bytes(h, bad, (size_t)(n * width) * 4);
        d.draft_bad =
            model_drafts ? (const int32_t *)harness_bytes(h, draft_bad, (size_t)(drafts * n) * 4) : NULL;
        d.position = (int64_t *)arrays[0].device;
        d.rows = (int64_t *)arrays[1].device;
        d.draft_rows = model_drafts ? (int64_t *)arrays[2].device : NULL;
        d.end = (const int64_t *)arrays[3].device;
        d.rounds = (int64_t *)arrays[4].device;
        d.wanted = (const int32_t *)arrays[5].device;
        d.barred = (int32_t *)arrays[6].device;
        d.drafted = (int32_t *)arrays[7].device;
        d.tokens = (int32_t *)arrays[8].device;
        d.draft_tokens = model_drafts ? (int32_t *)arrays[9].device : NULL;
        d.texts = model_drafts ? NULL : (int32_t *)arrays[10].device;
        d.history = (int32_t *)arrays[11].device;
        d.failed = (int32_t *)arrays[12].device;
        settle(&s);
        harness_check(h, h->gpu.ops->settle(&h->gpu, &d));
        for (int a = 0; a < 13; a++) {
            char *got = (char *)malloc(arrays[a].bytes), what[64];
            harness_need(h->gpu.ops->copy(&h->gpu, got, arrays[a].device, arrays[a].bytes));
            snprintf(what, sizeof what, "settle, %lld texts, %lld drafts: %s", (long long)n,
                     (long long)drafts, names[a]);
            expect_equal(h, what, got, arrays[a].host, arrays[a].bytes);
            free(got);
        }
        bad[below(h, n * width)] = 1; /* of a row that counts, or not */
    }
    for (const both &a : arrays) {
        free(a.host);
    }
    free(accepted);
    free(verdict);
    free(bad);
    free(draft_bad);
    harness_reset(h);
}

/* ---- draws into later rows ---------------------------------------------------------------------------------------------- */

static void
test_spread(harness *h, float temperature)
{
    enum { ROWS = 5, SPREAD = 3, WORDS = 700 };
    harness_array logits = harness_random_of(h, ROWS * WORDS, 3.0f, MIL_F32);
    mil_sample_options options[ROWS];
    int64_t position[ROWS];
    for (int r = 0; r < ROWS; r++) {
        options[r] = {temperature, 1.0f, 0.0f, 0, (uint64_t)r};
        position[r] = r;
    }
    harness_array token = harness_zeros(h, ROWS), bad = harness_zeros(h, ROWS),
                  placed = harness_zeros(h, ROWS * SPREAD);
    harness_array dense = harness_zeros(h, ROWS * (int64_t)sizeof(mil_filter) / 4);
    harness_array filter = harness_zeros(h, ROWS * SPREAD * (int64_t)sizeof(mil_filter) / 4);
    mil_sample a = {};
    a.rows = ROWS;
    a.vocab = a.logits_stride = WORDS;
    a.logits = (const float *)logits.gpu;
    a.options = (const mil_sample_options *)harness_bytes(h, options, sizeof options);
    a.position = (const int64_t *)harness_bytes(h, position, sizeof position);
    a.token = (int32_t *)token.gpu;
    a.bad = (int32_t *)bad.gpu;
    a.filter = (mil_filter *)dense.gpu;
    harness_check(h, h->gpu.ops->sample(&h->gpu, &a));
    int32_t tokens[ROWS], again[ROWS], spread[ROWS * SPREAD];
    mil_filter filters[ROWS], far[ROWS * SPREAD];
    harness_need(h->gpu.ops->copy(&h->gpu, tokens, token.gpu, sizeof tokens));
    harness_need(h->gpu.ops->copy(&h->gpu, filters, dense.gpu, sizeof filters));
    a.filter = (mil_filter *)filter.gpu;
    a.spread = SPREAD;
    a.placed = (int32_t *)placed.gpu;
    harness_check(h, h->gpu.ops->sample(&h->gpu, &a));
    harness_need(h->gpu.ops->copy(&h->gpu, again, token.gpu, sizeof again));
    harness_need(h->gpu.ops->copy(&h->gpu, spread, placed.gpu, sizeof spread));
    harness_need(h->gpu.ops->copy(&h->gpu, far, filter.gpu, sizeof far));
    expect_equal(h, "spread draws: tokens", again, tokens, sizeof tokens);
    for (int r = 0; r < ROWS; r++) {
        expect_equal(h, "spread draws: placed", &spread[r * SPREAD], &tokens[r], 4);
        expect_equal(h, "spread draws: total", &far[r * SPREAD].total, &filters[r].total, sizeof(double));
        expect_equal(h, "spread draws: best", &far[r * SPREAD].best, &filters[r].best, 4);
    }
    harness_reset(h);
}

/* ---- recordings ------------------------------------------------------------------------------------------------------ */

/* One recording of another work after another: `kernels` scalings of x each, by factors and into arrays of their own.  The
 * replay of the one before is still queued when the next is made of it. */
static void
test_recordings(harness *h)
{
    if (!harness_turn(h)) {
        return;
    }
    enum { WORKS = 5, MOST = 3, ROWS = 3, WIDTH = 70, COUNT = ROWS * WIDTH };
    static const int kernels[WORKS] = {2, 2, 3, 1, 1};
    mil_context *gpu = &h->gpu;
    const mil_ops *ops = gpu->ops;
    harness_array x = harness_random_of(h, COUNT, 1.0f, MIL_F32), y[WORKS][MOST];
    void *recording = NULL;
    for (int i = 0; i < WORKS; i++) {
        for (int j = 0; j < kernels[i]; j++) {
            y[i][j] = harness_empty_of(h, COUNT, MIL_F32);
        }
        const int64_t rows = i % 2 == 0 ? ROWS : 1; /* another grid, too */
        harness_need(ops->record_begin(gpu));
        for (int j = 0; j < kernels[i]; j++) {
            harness_check(h, ops->widen(gpu, rows, COUNT / rows, MIL_F32, x.gpu, COUNT / rows,
                                        (float)(10 * i + j), (float *)y[i][j].gpu));
        }
        harness_check(h, ops->record_end(gpu, &recording));
        harness_check(h, ops->replay(gpu, recording));
    }
    for (int i = 0; i < WORKS; i++) {
        for (int j = 0; j < kernels[i]; j++) {
            float expected[COUNT], got[COUNT];
            for (int e = 0; e < COUNT; e++) {
                expected[e] = (float)(10 * i + j) * x.cpu[e];
            }
            harness_need(ops->copy(gpu, got, y[i][j].gpu, sizeof got));
            expect_equal(h, "a replay's array", got, expected, sizeof got);
        }
    }
    ops->record_free(gpu, recording);
    harness_reset(h);
}

int
main(void)
{
    static harness h;
    harness_begin(&h, MIL_BF16);
    test_recordings(&h);
    int64_t lengths[] = {1, 2, 5, 40, 600, 5000};
    for (int64_t length : lengths) {
        for (int64_t words = 2; words <= 200; words *= 10) {
            for (int64_t drafts = 1; drafts <= 15; drafts += 7) {
                test_propose(&h, 7, length, words, drafts, 2);
                test_propose(&h, 3, length, words, drafts, 0);
            }
        }
    }
    int64_t batches[] = {1, 3, 64, 300};
    for (int64_t n : batches) {
        for (int64_t drafts = 1; drafts <= 15; drafts += 7) {
            test_settle(&h, n, drafts, true);
            test_settle(&h, n, drafts, false);
        }
    }
    test_spread(&h, 0.0f);
    test_spread(&h, 0.9f);
    harness_close(&h);
    return harness_end(&h, "rounds");
}
