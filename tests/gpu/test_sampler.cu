/* Sampling and verdicts on CUDA against csrc/decode/sampler.c and the rule of csrc/decode/speculate.c.
 *
 * Exponentials of the two differ in their last bit, so a token may be another where the random number lies
 * within 1e-6 of the border of two tokens; everything else must be equal.
 */
#include "harness.h"

#define mil_stream mil_random_stream /* cuda.cuh has a function of that name */
extern "C" {
#include "decode/sampler.h"
}
#undef mil_stream

#define MOST_ROWS 64
#define CLOSE 1e-6

static int
different_tokens(const mil_distribution *d, int64_t vocab, double uniform, int32_t token)
{
    if (mil_distribution_draw(d, vocab, uniform) == token) {
        return 0;
    }
    if (d->certain || token < 0 || token >= vocab || !(d->weight[token] > 0.0f)) {
        return 1;
    }
    double before = 0.0, at = uniform * d->total;
    for (int32_t i = 0; i < token; i++) {
        before += (double)d->weight[i];
    }
    double slack = CLOSE * d->total;
    return at < before - slack || at > before + (double)d->weight[token] + slack;
}

static void
expect(harness *h, bool right, const char *what, int64_t row, const char *which, double got, double expected)
{
    h->checks++;
    if (!right) {
        h->failures++;
        printf("FAILED: %s, row %lld: %s is %.17g, expected %.17g\n", what, (long long)row, which, got,
               expected);
    }
}

/* How scores are made: not closer than their exponentials can tell, unless equal. */
typedef enum shape { PEAKED, FLAT, TIED, EQUAL, ASCENDING } shape;

static void
fill_scores(harness *h, harness_array *a, shape kind)
{
    for (int64_t i = 0; i < a->count; i++) {
        float u = harness_uniform(h), v = harness_uniform(h);
        a->cpu[i] = kind == PEAKED      ? 12.0f * u * v * v
                    : kind == FLAT      ? floorf(100.0f * u) * 1e-4f
                    : kind == TIED      ? floorf(20.0f * u * v) * 0.5f
                    : kind == ASCENDING ? (float)i * 1e-3f
                                        : 1.25f;
    }
    harness_upload(h, a);
}

static mil_sampling
sampling_of(const mil_sample_options *o)
{
    mil_sampling s = {};
    s.repetition_penalty = 1.0f;
    s.temperature = o->temperature;
    s.top_p = o->top_p;
    s.min_p = o->min_p;
    s.top_k = o->top_k;
    s.seed = o->seed;
    return s;
}

/* What the device gave for rows of logits. */
struct sampled {
    harness_array logits;
    int32_t token[MOST_ROWS], bad[MOST_ROWS];
    mil_filter filter[MOST_ROWS];
    void *device_filter;
};

static void
sample_on_device(harness *h, sampled *s, int64_t rows, int64_t vocab, int64_t stride,
                 const mil_sample_options *options, const int64_t *position, mil_sample_stream stream)
{
    harness_array token = harness_zeros(h, rows), bad = harness_zeros(h, rows);
    harness_array filter = harness_zeros(h, rows * (int64_t)sizeof(mil_filter) / 4);
    mil_sample a = {};
    a.rows = rows;
    a.vocab = vocab;
    a.logits = (const float *)s->logits.gpu;
    a.logits_stride = stride;
    a.options = (const mil_sample_options *)harness_bytes(h, options, (size_t)rows * sizeof *options);
    a.position = (const int64_t *)harness_bytes(h, position, (size_t)rows * sizeof *position);
    a.stream = stream;
    a.token = (int32_t *)token.gpu;
    a.bad = (int32_t *)bad.gpu;
    a.filter = (mil_filter *)filter.gpu;
    harness_check(h, h->gpu.ops->sample(&h->gpu, &a));
    harness_need(h->gpu.ops->copy(&h->gpu, s->token, token.gpu, (size_t)rows * 4));
    harness_need(h->gpu.ops->copy(&h->gpu, s->bad, bad.gpu, (size_t)rows * 4));
    harness_need(h->gpu.ops->copy(&h->gpu, s->filter, filter.gpu, (size_t)rows * sizeof(mil_filter)));
    s->device_filter = filter.gpu;
}

static void
test_sample(harness *h, const char *name, shape kind, int64_t rows, int64_t vocab, int64_t padding,
            mil_sample_options options)
{
    if (!harness_turn(h)) {
        return;
    }
    static sampled s;
    char what[160];
    int64_t stride = vocab + padding, position[MOST_ROWS];
    mil_sample_options all[MOST_ROWS];
    s.logits = harness_empty_of(h, rows * stride, MIL_F32);
    fill_scores(h, &s.logits, kind);
    for (int64_t r = 0; r < rows; r++) {
        all[r] = options;
        all[r].seed = options.seed + (uint64_t)r;
        position[r] = 1000003 * r;
    }
    sample_on_device(h, &s, rows, vocab, stride, all, position, MIL_SAMPLE_TARGET);
    snprintf(what, sizeof what, "sample %s, %lld tokens", name, (long long)vocab);
    mil_distribution d = {};
    d.weight = (float *)malloc((size_t)vocab * sizeof(float));
    mil_candidate *scratch = (mil_candidate *)malloc((size_t)vocab * sizeof *scratch);
    for (int64_t r = 0; r < rows; r++) {
        mil_sampling sampling = sampling_of(&all[r]);
        harness_need(mil_distribution_fill(&sampling, s.logits.cpu + r * stride, NULL, vocab, scratch, &d));
        double uniform = mil_uniform(all[r].seed, (uint64_t)position[r], MIL_STREAM_TARGET);
        expect(h, s.bad[r] == 0, what, r, "bad", s.bad[r], 0);
        expect(h, s.filter[r].best == d.best, what, r, "best", s.filter[r].best, d.best);
        expect(h, fabs(s.filter[r].total - d.total) <= 2e-6 * d.total, what, r, "total", s.filter[r].total,
               d.total);
        expect(h, !different_tokens(&d, vocab, uniform, s.token[r]), what, r, "token", s.token[r],
               mil_distribution_draw(&d, vocab, uniform));
    }
    free(d.weight);
    free(scratch);
    harness_reset(h);
}

static void
test_options(harness *h, const char *name, shape kind, int64_t vocab, int64_t padding)
{
    mil_sample_options greedy = {0.0f, 1.0f, 0.0f, 0, 7};
    mil_sample_options options = {0.8f, 1.0f, 0.0f, 0, 11};
    char what[100];
    struct {
        const char *name;
        float temperature, top_p, min_p;
        int64_t top_k;
    } list[] = {
        {"plain", 1.0f, 1.0f, 0.0f, 0},       {"cold", 0.05f, 1.0f, 0.0f, 0},
        {"hot", 3.0f, 1.0f, 0.0f, 0},         {"freezing", 1e-40f, 1.0f, 0.0f, 0},
        {"top-k 1", 0.8f, 1.0f, 0.0f, 1},     {"top-k 40", 0.8f, 1.0f, 0.0f, 40},
        {"top-p 0.9", 0.8f, 0.9f, 0.0f, 0},   {"top-p 0.999", 1.0f, 0.999f, 0.0f, 0},
        {"top-p tiny", 1.0f, 1e-6f, 0.0f, 0}, {"min-p 0.1", 1.0f, 1.0f, 0.1f, 0},
        {"min-p 1", 1.0f, 1.0f, 1.0f, 0},     {"all", 0.7f, 0.95f, 0.02f, 50},
        {"k and p", 1.3f, 0.5f, 0.0f, 200},
    };
    snprintf(what, sizeof what, "%s greedy", name);
    test_sample(h, what, kind, 3, vocab, padding, greedy);
    for (const auto &one : list) {
        options.temperature = one.temperature;
        options.top_p = one.top_p;
        options.min_p = one.min_p;
        options.top_k = one.top_k < vocab ? one.top_k : 0;
        snprintf(what, sizeof what, "%s %s", name, one.name);
        test_sample(h, what, kind, 5, vocab, padding, options);
    }
}

static void
test_bad(harness *h)
{
    static sampled s;
    float values[] = {NAN, INFINITY, -INFINITY};
    mil_sample_options options[4];
    int64_t position[4] = {1, 2, 3, 4}, vocab = 5000;
    s.logits = harness_random_of(h, 4 * vocab, 3.0f, MIL_F32);
    for (int r = 0; r < 3; r++) {
        s.logits.cpu[(r + 1) * vocab - 1 - r] = values[r];
    }
    for (int r = 0; r < 4; r++) {
        options[r] = {1.0f, 1.0f, 0.0f, 0, 1};
    }
    harness_upload(h, &s.logits);
    sample_on_device(h, &s, 4, vocab, vocab, options, position, MIL_SAMPLE_TARGET);
    for (int r = 0; r < 4; r++) {
        expect(h, s.bad[r] == (r < 3), "sample of bad logits", r, "bad", s.bad[r], r < 3);
        expect(h, s.token[r] >= 0 && s.token[r] < vocab, "sample of bad logits", r, "token", s.token[r], 0);
    }
    harness_reset(h);
}

/* `drafts` drafts for each of `sequences` texts, from a draft model that is `noise` away from the target. */
static void
test_accept(harness *h, const char *name, int64_t sequences, int64_t drafts, int64_t vocab,
            int64_t draft_vocab, float noise, mil_sample_options options, bool certain)
{
    if (!harness_turn(h)) {
        return;
    }
    static sampled p, q;
    int64_t rows = sequences * (drafts + 1), position[MOST_ROWS], first_position[MOST_ROWS],
            offsets[MOST_ROWS];
    mil_sample_options all[MOST_ROWS], firsts[MOST_ROWS];
    p.logits = harness_empty_of(h, rows * vocab, MIL_F32);
    q.logits = harness_empty_of(h, rows * draft_vocab, MIL_F32);
    fill_scores(h, &p.logits, PEAKED);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < draft_vocab; i++) {
            q.logits.cpu[r * draft_vocab + i] =
                (i < vocab ? p.logits.cpu[r * vocab + i] : 0.0f) + noise * harness_uniform(h);
        }
        all[r] = options;
        all[r].seed = options.seed + (uint64_t)(r / (drafts + 1));
        position[r] = 100 * (r / (drafts + 1)) + r % (drafts + 1);
    }
    harness_upload(h, &q.logits);
    int64_t shared = vocab < draft_vocab ? vocab : draft_vocab;
    sample_on_device(h, &p, rows, vocab, vocab, all, position, MIL_SAMPLE_TARGET);
    sample_on_device(h, &q, rows, shared, draft_vocab, all, position, MIL_SAMPLE_DRAFT);
    for (int64_t s = 0; s <= sequences; s++) {
        offsets[s] = s * (drafts + 1);
        if (s < sequences) {
            firsts[s] = all[offsets[s]];
            first_position[s] = position[offsets[s]];
        }
    }
    harness_array accepted = harness_zeros(h, sequences), tokens = harness_zeros(h, rows);
    mil_accept a = {};
    a.sequences = sequences;
    a.vocab = vocab;
    a.offsets = (const int64_t *)harness_bytes(h, offsets, (size_t)(sequences + 1) * sizeof *offsets);
    a.logits = (const float *)p.logits.gpu;
    a.logits_stride = vocab;
    a.filter = (const mil_filter *)p.device_filter;
    a.options = (const mil_sample_options *)harness_bytes(h, firsts, (size_t)sequences * sizeof *firsts);
    a.position =
        (const int64_t *)harness_bytes(h, first_position, (size_t)sequences * sizeof *first_position);
    a.drafts = (const int32_t *)harness_bytes(h, q.token, (size_t)rows * 4);
    if (!certain) {
        a.draft_logits = (const float *)q.logits.gpu;
        a.draft_logits_stride = draft_vocab;
        a.draft_vocab = shared;
        a.draft_filter = (const mil_filter *)q.device_filter;
    }
    a.accepted = (int32_t *)accepted.gpu;
    a.tokens = (int32_t *)tokens.gpu;
    harness_check(h, h->gpu.ops->accept(&h->gpu, &a));
    int32_t got_accepted[MOST_ROWS], got_tokens[MOST_ROWS];
    harness_need(h->gpu.ops->copy(&h->gpu, got_accepted, accepted.gpu, (size_t)sequences * 4));
    harness_need(h->gpu.ops->copy(&h->gpu, got_tokens, tokens.gpu, (size_t)rows * 4));

    mil_distribution dp = {}, dq = {};
    dp.weight = (float *)calloc((size_t)vocab, sizeof(float));
    dq.weight = (float *)calloc((size_t)(vocab > draft_vocab ? vocab : draft_vocab), sizeof(float));
    mil_candidate *scratch = (mil_candidate *)malloc((size_t)(vocab + draft_vocab) * sizeof *scratch);
    int64_t total = 0;
    for (int64_t s = 0; s < sequences; s++) {
        mil_sampling sampling = sampling_of(&firsts[s]);
        int64_t stands = 0;
        for (bool rejected = false; !rejected && stands <= drafts;) {
            int64_t row = offsets[s] + stands;
            uint64_t at = (uint64_t)position[row];
            harness_need(
                mil_distribution_fill(&sampling, p.logits.cpu + row * vocab, NULL, vocab, scratch, &dp));
            double own = mil_uniform(sampling.seed, at, MIL_STREAM_TARGET);
            if (stands == drafts) {
                expect(h, !different_tokens(&dp, vocab, own, got_tokens[row]), name, row, "last token",
                       got_tokens[row], mil_distribution_draw(&dp, vocab, own));
                break;
            }
            harness_need(mil_distribution_fill(&sampling, q.logits.cpu + row * draft_vocab, NULL, shared,
                                               scratch, &dq));
            for (int64_t i = shared; i < vocab; i++) {
                dq.weight[i] = 0.0f;
            }
            if (certain) {
                dq.certain = true;
                dq.best = q.token[row];
            }
            double target = mil_distribution_at(&dp, q.token[row]);
            double uniform = mil_uniform(sampling.seed, at, MIL_STREAM_ACCEPT);
            rejected = !(uniform * mil_distribution_at(&dq, q.token[row]) < target);
            int32_t token = rejected ? mil_distribution_draw_rest(&dp, &dq, vocab, own) : q.token[row];
            expect(h, got_tokens[row] == token, name, row, rejected ? "replaced token" : "accepted token",
                   got_tokens[row], token);
            stands += !rejected;
        }
        total += stands;
        expect(h, got_accepted[s] == stands, name, s, "accepted", got_accepted[s], (double)stands);
    }
    printf("%s: %lld of %lld drafts stand\n", name, (long long)total, (long long)(sequences * drafts));
    free(dp.weight);
    free(dq.weight);
    free(scratch);
    harness_reset(h);
}

int
main(void)
{
    static harness h;
    harness_begin(&h, MIL_BF16);
    int64_t sizes[] = {1, 7, 100, 1000, 32003, 128256, 262144};
    for (int64_t vocab : sizes) {
        test_options(&h, "peaked", PEAKED, vocab, 0);
        test_options(&h, "tied", TIED, vocab, vocab % 2);
    }
    test_options(&h, "flat", FLAT, 50000, 3);
    test_options(&h, "equal", EQUAL, 50257, 1);
    test_options(&h, "ascending", ASCENDING, 9001, 0);
    test_bad(&h);
    mil_sample_options greedy = {0.0f, 1.0f, 0.0f, 0, 3}, plain = {1.0f, 1.0f, 0.0f, 0, 5};
    mil_sample_options filtered = {0.8f, 0.95f, 0.01f, 100, 9}, cold = {0.1f, 0.95f, 0.01f, 100, 9};
    test_accept(&h, "accept, greedy", 7, 4, 32000, 32000, 0.3f, greedy, false);
    test_accept(&h, "accept, plain", 10, 5, 32000, 32000, 1.0f, plain, false);
    test_accept(&h, "accept, filtered", 10, 5, 128256, 128256, 1.0f, filtered, false);
    test_accept(&h, "accept, smaller draft vocabulary", 4, 15, 5003, 4990, 0.5f, plain, false);
    test_accept(&h, "accept, larger draft vocabulary", 4, 3, 5000, 5024, 0.5f, filtered, false);
    test_accept(&h, "accept, same distribution", 4, 8, 5000, 5000, 0.0f, plain, false);
    test_accept(&h, "accept, certain drafts", 12, 4, 32000, 32000, 0.0f, cold, true);
    test_accept(&h, "accept, certain drafts, greedy", 12, 4, 32000, 32000, 0.2f, greedy, true);
    harness_close(&h);
    return harness_end(&h, "sampler");
}
