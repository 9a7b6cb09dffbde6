/* Speculative decoding, exact (Leviathan, Kalman, Matias 2023; Chen et al. 2023).
 *
 * A draft proposes x_1 .. x_K, drawn from q_1 .. q_K; the model reads the last token and the drafts in one
 * pass of K + 1 rows, which gives p_1 .. p_{K+1}, each after the same filters as in plain sampling.  Then
 *
 *   for j = 1 .. K:   with probability min(1, p_j(x_j) / q_j(x_j)) x_j is the next token,
 *                     else a draw from max(0, p_j - q_j), normalised, is, and the round ends
 *   after K:          a draw from p_{K+1} is one more token
 *
 * and every token is distributed as p: what min(p, q) lacks, the second draw adds.  Greedy sampling is
 * the same rule with p on one token.  An n-gram draft has q on one token.  Random numbers come from one
 * stream each for drafts, verdicts and the model's own draws; a draft that is thrown away leaves its
 * stream's later numbers unseen by any kept token, so using them again at the same position is sound.
 *
 * The state goes back to the last accepted token exactly (device.h: the tail).  A pass of K + 1 <= 16
 * rows can always be taken back.  The draft model, though, reads one token a pass, and once such a pass
 * begins a new window the old one is folded: so a draft with mixers never drafts across a window's end
 * (draft_limit), which shortens a few rounds in sixteen and needs no copies of states.
 *
 * How many drafts: with acceptance a (of this text so far, older rounds fading), K drafts give
 * 1 + a + .. + a^K tokens for 1 + K (verify_cost + draft_cost) passes; K maximises the ratio, and
 * is 0 where drafting does not pay, with a short trial every now and then.  The costs are numbers from the
 * models' sizes, not measured times, so that a text does not depend on the machine's mood.
 */
#include <math.h>

#include "decode/sequence.h"

#define PRIOR_TRIED 2.0 /* weight and value of the acceptance assumed at the start */
#define PRIOR_ACCEPTED 1.4
#define FADING 0.97     /* of old drafts, a draft */
#define TRIAL_ROUNDS 32 /* rounds between trials where drafting does not pay */
#define TRIAL_DRAFTS 2
#define VERIFY_COST 0.12 /* of a pass, each row beyond the first: 0.05 to 0.2 on CPUs, by dtype and mixer */
#define NGRAM_LONGEST 4
#define NGRAM_SHORTEST 2

/* ---- how many --------------------------------------------------------------------------------------- */

/* Bytes of the weights that one token reads. */
static double
bytes_read(const mil_model *model)
{
    double bytes = 0.0;
    for (int64_t i = 0; i < model->parameter_count; i++) {
        const mil_parameter *p = &model->parameters[i];
        if (p->data != NULL && (p != model->embedding || p == model->output)) {
            bytes += (double)p->count * (double)mil_dtype_size(p->dtype);
        }
    }
    return bytes;
}

void
mil_speculate_costs(mil_engine_options *options)
{
    if (options->verify_cost <= 0.0) {
        options->verify_cost = VERIFY_COST;
    }
    if (options->draft_cost <= 0.0 && options->draft_kind == MIL_DRAFT_MODEL) {
        options->draft_cost = bytes_read(options->draft) / bytes_read(options->model);
    }
}

static int64_t
smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* The same limited by positions: where frequencies change at a length (LongRoPE), one pass must not lie on
 * both sides of it; where they change with every token (dynamic NTK), each token needs a pass of its own. */
static int64_t
position_limit(const mil_model *model, int64_t count, int64_t limit)
{
    const mil_rope_config *rope = &model->config.rope;
    if (!mil_rope_changes(rope)) {
        return limit;
    }
    if (count > rope->long_after) {
        return rope->dynamic_factor > 0.0f ? 0 : limit;
    }
    return smaller(limit, rope->long_after - count);
}

/* The most drafts that this round allows. */
static int64_t
draft_limit(const mil_engine *engine, const mil_sequence *sequence)
{
    /* One token comes from the model itself, so the last of the request needs no draft. */
    int64_t left = sequence->request.max_new_tokens - sequence->generation.count - 1;
    int64_t limit = smaller(smaller(sequence->request.draft_tokens, left), MIL_WINDOW - 1);
    if (sequence->draft_state != NULL && sequence->draft_state->mixer_bytes > 0) {
        /* Passes of one row at count .. count + K - 2 must not begin a window that ends after `count`. */
        limit = smaller(limit, MIL_WINDOW + 1 - sequence->count % MIL_WINDOW);
    }
    limit = position_limit(engine->options.model, sequence->count, limit);
    return limit > 0 ? limit : 0;
}

static int64_t
best_number(double acceptance, double cost, int64_t limit)
{
    int64_t best = 0;
    double best_rate = 1.0, tokens = 1.0, power = 1.0;
    for (int64_t drafts = 1; drafts <= limit; drafts++) {
        power *= acceptance;
        tokens += power;
        double rate = tokens / (1.0 + (double)drafts * cost);
        if (rate > best_rate) {
            best_rate = rate;
            best = drafts;
        }
    }
    return best;
}

void
mil_speculate_plan(const mil_engine *engine, mil_sequence *sequence)
{
    sequence->wanted = 0;
    sequence->drafted = 0;
    if (engine->options.draft_kind == MIL_DRAFT_NONE || sequence->undraftable) {
        return;
    }
    int64_t limit = draft_limit(engine, sequence);
    if (sequence->request.fixed_draft) {
        sequence->wanted = limit;
        return;
    }
    double acceptance = (sequence->accepted + PRIOR_ACCEPTED) / (sequence->tried + PRIOR_TRIED);
    double cost = engine->options.verify_cost + engine->options.draft_cost;
    sequence->wanted = best_number(acceptance, cost, limit);
    if (sequence->wanted == 0 && ++sequence->quiet >= TRIAL_ROUNDS) {
        sequence->wanted = smaller(TRIAL_DRAFTS, limit);
    }
    if (sequence->wanted > 0) {
        sequence->quiet = 0;
    }
}

/* ---- drafts ----------------------------------------------------------------------------------------- */

static void
draft_from_text(mil_sequence *sequence)
{
    int32_t *tokens = sequence->generation.tokens;
    sequence->drafted = mil_ngram_propose(tokens, sequence->count, NGRAM_LONGEST, NGRAM_SHORTEST,
                                          sequence->wanted, tokens + sequence->count);
    for (int64_t i = 0; i < sequence->drafted; i++) {
        int32_t token = tokens[sequence->count + i];
        sequence->drafts[i].certain = true;
        sequence->drafts[i].best = token;
        mil_sequence_mark(sequence, token, 1);
    }
}

/* Draws the next draft from the draft model's logits. The two vocabularies may differ by padding at their
 * ends; tokens that one of them lacks are never drafted. */
static mil_status
draw_draft(const mil_engine *engine, mil_sequence *sequence)
{
    if (sequence->logit_count == 0) { /* a chunk of a text that the draft model has still to read */
        return MIL_OK;
    }
    int64_t vocab = engine->options.model->config.vocab;
    int64_t shared = smaller(vocab, engine->options.draft->config.vocab);
    const float *logits = engine->pack.logits + sequence->first_logit * engine->options.draft->config.vocab;
    mil_distribution *q = &sequence->drafts[sequence->drafted];
    const mil_sampling *sampling = &sequence->request.sampling;
    MIL_TRY(mil_distribution_fill(sampling, logits, sequence->occurrences, shared, sequence->scratch, q));
    if (!q->certain) {
        for (int64_t i = shared; i < vocab; i++) {
            q->weight[i] = 0.0f;
        }
    }
    int64_t position = sequence->count + sequence->drafted;
    double uniform = mil_uniform(sampling->seed, (uint64_t)position, MIL_STREAM_DRAFT);
    int32_t token = mil_distribution_draw(q, shared, uniform);
    sequence->generation.tokens[position] = token;
    mil_sequence_mark(sequence, token, 1);
    sequence->drafted++;
    if (mil_sequence_stops(sequence, token)) {
        sequence->wanted = sequence->drafted; /* nothing comes after an end */
    }
    return MIL_OK;
}

/* One pass of the draft model over at most `most` rows a sequence; those that reach the end of their text get
 * a draft. *left: sequences that took part, none once all have what they want. */
static mil_status
draft_pass(mil_engine *engine, mil_context *context, int64_t most, int64_t *left)
{
    mil_pack_begin(engine);
    for (int64_t i = 0; i < engine->running_count; i++) {
        mil_sequence *sequence = engine->running[i];
        if (sequence->drafted < sequence->wanted) {
            int64_t unread = sequence->count + sequence->drafted - sequence->draft_state->length;
            bool whole = mil_rope_changes(&engine->options.draft->config.rope);
            int64_t rows = whole ? unread : smaller(unread, most);
            MIL_TRY(mil_pack_add(engine, sequence, sequence->draft_state, rows, rows == unread ? 1 : 0));
        }
    }
    *left = engine->pack.count;
    if (*left == 0) {
        return MIL_OK;
    }
    MIL_TRY(mil_pack_run(engine, context, engine->options.draft));
    return mil_pack_each(engine, context, draw_draft);
}

mil_status
mil_speculate_draft(mil_engine *engine, mil_context *context)
{
    if (engine->options.draft_kind == MIL_DRAFT_NGRAM) {
        for (int64_t i = 0; i < engine->running_count; i++) {
            if (engine->running[i]->wanted > 0) {
                draft_from_text(engine->running[i]);
            }
        }
        return MIL_OK;
    }
    int64_t left = engine->options.draft_kind == MIL_DRAFT_MODEL;
    while (left > 0) {
        MIL_TRY(draft_pass(engine, context, engine->options.prefill_rows, &left));
    }
    return MIL_OK;
}

/* ---- verdicts --------------------------------------------------------------------------------------- */

/* Whether the draft token at `position` stands. */
static bool
accepts(const mil_engine *engine, const mil_sequence *sequence, const mil_distribution *p,
        const mil_distribution *q, int32_t token, int64_t position)
{
    double target = mil_distribution_at(p, token);
    if (engine->options.broken_rule == MIL_RULE_ACCEPT_ALL) {
        return target > 0.0;
    }
    double uniform = mil_uniform(sequence->request.sampling.seed, (uint64_t)position, MIL_STREAM_ACCEPT);
    return uniform * mil_distribution_at(q, token) < target;
}

/* What the text goes on with once `p` alone decides; q: the rejected draft's distribution, or NULL. */
static int32_t
draw_own(const mil_engine *engine, const mil_sequence *sequence, const mil_distribution *p,
         const mil_distribution *q, int64_t position)
{
    int64_t vocab = engine->options.model->config.vocab;
    double uniform = mil_uniform(sequence->request.sampling.seed, (uint64_t)position, MIL_STREAM_TARGET);
    if (q == NULL || engine->options.broken_rule == MIL_RULE_REDRAW_FROM_P) {
        return mil_distribution_draw(p, vocab, uniform);
    }
    return mil_distribution_draw_rest(p, q, vocab, uniform);
}

/* The last verdicts enter the running acceptance. */
static void
remember(mil_sequence *sequence, int64_t accepted, bool rejected)
{
    int64_t tried = accepted + (rejected ? 1 : 0);
    double fade = pow(FADING, (double)tried);
    sequence->tried = sequence->tried * fade + (double)tried;
    sequence->accepted = sequence->accepted * fade + (double)accepted;
    sequence->generation.stats.drafted += sequence->drafted;
    sequence->generation.stats.accepted += accepted;
}

mil_status
mil_speculate_settle(const mil_engine *engine, mil_sequence *sequence, const float *logits)
{
    int64_t vocab = engine->options.model->config.vocab, drafted = sequence->drafted, accepted = 0;
    const int32_t *draft = sequence->generation.tokens + sequence->count;
    int32_t own_copy[MIL_WINDOW]; /* adding a token writes where the drafts lie */
    for (int64_t j = 0; j < drafted; j++) {
        own_copy[j] = draft[j];
        mil_sequence_mark(sequence, draft[j], -1); /* each row sees only the tokens before it */
    }
    mil_distribution p = {.weight = sequence->weight};
    bool rejected = false;
    for (int64_t j = 0; j <= drafted && !rejected && sequence->generation.finish == MIL_RUNNING; j++) {
        const float *row = logits + j * vocab;
        MIL_TRY(mil_distribution_fill(&sequence->request.sampling, row, sequence->occurrences, vocab,
                                      sequence->scratch, &p));
        int64_t position = sequence->count;
        const mil_distribution *q = j < drafted ? &sequence->drafts[j] : NULL;
        int32_t token;
        if (q != NULL && accepts(engine, sequence, &p, q, own_copy[j], position)) {
            token = own_copy[j];
            accepted++;
        }
        else {
            token = draw_own(engine, sequence, &p, q, position);
            rejected = q != NULL;
        }
        mil_sequence_add(sequence, vocab, token, row);
        sequence->undraftable |=
            engine->options.draft != NULL && token >= engine->options.draft->config.vocab;
    }
    if (drafted > 0) {
        remember(sequence, accepted, rejected);
    }
    return MIL_OK;
}
