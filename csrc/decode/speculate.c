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
 * rows can always be taken back.  The draft model reads one token a pass; its boundary is held where such a
 * pass would fold tokens that the verdict may take back, so all of a round's passes can go as well.
 *
 * How many drafts: with acceptance a (of this text so far, older rounds fading), K drafts give
 * 1 + a + .. + a^K tokens for 1 + K (verify_cost + draft_cost) passes; K maximises the ratio, and
 * is 0 where drafting does not pay, with a short trial every now and then.  The costs are numbers from the
 * models' sizes, not measured times, so that a text does not depend on the machine's mood.
 *
 * On a device that runs whole rounds by itself (draft_burst.c) all texts draft equally many tokens, because
 * what a round costs depends on the batch: K follows all texts' acceptance, and moves only for a clear gain,
 * since a new K means a new recording.
 */
#include <math.h>

#include "decode/sequence.h"

#define PRIOR_TRIED 2.0 /* weight and value of the acceptance assumed at the start */
#define PRIOR_ACCEPTED 1.4
#define FADING 0.97      /* of old drafts, a draft */
#define OFFER_FADING 0.1 /* weight of the last round in the share of rounds with drafts */
#define TRIAL_ROUNDS 32  /* rounds between trials where drafting does not pay */
#define TRIAL_DRAFTS 2
#define VERIFY_COST 0.12 /* of a pass, each row beyond the first: 0.05 to 0.2 on CPUs, by dtype and mixer */

/* Of devices, fitted to an H200 (docs/performance-log.md); only ratios matter. */
#define DEVICE_RATE 3.5e12      /* bytes a second */
#define DEVICE_ROW 0.005        /* more of a product's time with each row, of all texts */
#define DEVICE_LAYER 6e-6       /* seconds of a layer's launches and small operators */
#define DEVICE_LAYER_ROW 1.0e-6 /* more with each row of a text */
#define DEVICE_TOKEN 10e-6      /* seconds of sampling one token */
#define DEVICE_TRIAL 128        /* plain steps until the first trial; twice as many after each */
#define DEVICE_TRIAL_MOST 2048
#define CLEAR_GAIN 1.05 /* over no drafts, or another number of them: models of costs are not exact */

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
mil_speculate_costs(mil_engine *engine)
{
    mil_engine_options *options = &engine->options;
    const mil_ops *ops = options->model->ops;
    engine->together = ops->settle != NULL && ops->record_begin != NULL && options->verify_cost <= 0.0 &&
                       options->draft_cost <= 0.0;
    engine->trial_after = DEVICE_TRIAL;
    engine->weight_bytes = bytes_read(options->model);
    engine->draft_weight_bytes = options->draft != NULL ? bytes_read(options->draft) : 0.0;
    if (options->verify_cost <= 0.0) {
        options->verify_cost = VERIFY_COST;
    }
    if (options->draft_cost <= 0.0 && options->draft_kind == MIL_DRAFT_MODEL) {
        options->draft_cost = engine->draft_weight_bytes / engine->weight_bytes;
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

/* By a text's own acceptance. */
static void
plan_alone(const mil_engine *engine, mil_sequence *sequence, int64_t limit)
{
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

/* ---- all texts together ------------------------------------------------------------------------------- */

static bool
is_decoding(const mil_sequence *sequence)
{
    return sequence->generation.finish == MIL_RUNNING && sequence->generation.count > 0;
}

/* Seconds of one pass of `rows` rows for each of `texts` texts, whose states have so many bytes. */
static double
pass_seconds(const mil_model *model, double weight_bytes, double texts, double rows, double state_bytes)
{
    double seconds = weight_bytes / DEVICE_RATE * (1.0 + (texts * rows - 1.0) * DEVICE_ROW);
    return seconds + state_bytes / DEVICE_RATE + DEVICE_TOKEN +
           (double)model->config.layer_count * (DEVICE_LAYER + DEVICE_LAYER_ROW * (rows - 1.0));
}

double
mil_speculate_tokens(const mil_engine *engine, int64_t drafts)
{
    double tried = PRIOR_TRIED, accepted = PRIOR_ACCEPTED, offered = 0.0, texts = 0.0;
    for (int64_t i = 0; i < engine->running_count; i++) {
        const mil_sequence *sequence = engine->running[i];
        if (is_decoding(sequence)) {
            tried += sequence->tried;
            accepted += sequence->accepted;
            offered += sequence->offered;
            texts += 1.0;
        }
    }
    double power = texts > 0.0 ? offered / texts : 1.0, tokens = 1.0;
    for (int64_t i = 0; i < drafts; i++) {
        power *= accepted / tried;
        tokens += power;
    }
    return tokens;
}

/* What passes of all decoding texts have to do with. */
typedef struct batch_load {
    double texts, state_bytes, draft_state_bytes;
} batch_load;

static batch_load
load_of(const mil_engine *engine)
{
    const mil_model *model = engine->options.model, *draft = engine->options.draft;
    batch_load load = {0};
    for (int64_t i = 0; i < engine->running_count; i++) {
        const mil_sequence *sequence = engine->running[i];
        if (is_decoding(sequence)) {
            load.texts += 1.0;
            load.state_bytes += (double)mil_state_bytes_at(model, sequence->count);
            load.draft_state_bytes +=
                draft != NULL ? (double)mil_state_bytes_at(draft, sequence->count) : 0.0;
        }
    }
    return load;
}

/* Tokens in the time of a plain step, from rounds of so many drafts for all texts. */
static double
rate_of(const mil_engine *engine, const batch_load *load, int64_t drafts)
{
    if (drafts == 0) {
        return 1.0;
    }
    const mil_model *model = engine->options.model, *draft = engine->options.draft;
    double bytes = engine->weight_bytes, rows = (double)drafts + 1.0;
    double plain = pass_seconds(model, bytes, load->texts, 1.0, load->state_bytes);
    double seconds = pass_seconds(model, bytes, load->texts, rows, load->state_bytes) + DEVICE_TOKEN;
    if (draft != NULL) {
        seconds += (double)drafts *
                   pass_seconds(draft, engine->draft_weight_bytes, load->texts, 1.0, load->draft_state_bytes);
    }
    return mil_speculate_tokens(engine, drafts) * plain / seconds;
}

/* Sets engine->depth; `most`: the most that any text may draft. */
static void
plan_depth(mil_engine *engine, int64_t most)
{
    batch_load load = load_of(engine);
    int64_t best = 0;
    double best_rate = 1.0;
    for (int64_t drafts = 1; drafts <= most; drafts++) {
        double rate = rate_of(engine, &load, drafts);
        if (rate > best_rate) {
            best = drafts;
            best_rate = rate;
        }
    }
    best = best_rate < CLEAR_GAIN ? 0 : best;
    bool stays = best > 0 && engine->depth > 0 && engine->depth <= most &&
                 best_rate < CLEAR_GAIN * rate_of(engine, &load, engine->depth);
    engine->depth = stays ? engine->depth : best;
    if (engine->depth > 0) {
        engine->quiet = 0;
        engine->trial_after = DEVICE_TRIAL;
    }
}

/* While n-grams are not used, whether there are any is asked from time to time: it costs next to nothing. */
static void
watch_text(mil_sequence *sequence)
{
    int32_t token;
    bool found = mil_ngram_propose(sequence->generation.tokens, sequence->count, MIL_NGRAM_LONGEST,
                                   MIL_NGRAM_SHORTEST, 1, &token) > 0;
    sequence->offered += OFFER_FADING * ((found ? 1.0 : 0.0) - sequence->offered);
}

/* Drafts of those texts that leave their number open. */
static int64_t
depth_together(mil_engine *engine)
{
    int64_t most = 0;
    for (int64_t i = 0; i < engine->running_count; i++) {
        mil_sequence *sequence = engine->running[i];
        if (is_decoding(sequence)) {
            if (sequence->request.draft_tokens == 0) {
                return 0; /* rounds without the host are for all texts or none */
            }
            int64_t own = smaller(sequence->request.draft_tokens, MIL_WINDOW - 1);
            most = own > most ? own : most;
            if (engine->options.draft_kind == MIL_DRAFT_NGRAM && engine->depth == 0) {
                watch_text(sequence);
            }
        }
    }
    plan_depth(engine, most);
    if (engine->depth == 0 && engine->quiet >= engine->trial_after) {
        engine->quiet = 0;
        engine->trial_after = smaller(2 * engine->trial_after, DEVICE_TRIAL_MOST);
        return smaller(TRIAL_DRAFTS, most);
    }
    return engine->depth;
}

int64_t
mil_speculate_quiet_steps(const mil_engine *engine)
{
    int64_t left = MIL_WINDOW;
    if (engine->options.draft_kind != MIL_DRAFT_NONE) {
        left = engine->together ? smaller(left, engine->trial_after - engine->quiet) : 1;
    }
    return left > 1 ? left : 1;
}

/* A round that reads a prompt goes by way of the host, where logits of all texts' drafts would come, too. */
static bool
reads_prompt(const mil_engine *engine)
{
    for (int64_t i = 0; i < engine->running_count; i++) {
        const mil_sequence *sequence = engine->running[i];
        if (sequence->generation.finish == MIL_RUNNING && sequence->generation.count == 0) {
            return true;
        }
    }
    return false;
}

void
mil_speculate_plan(mil_engine *engine)
{
    if (engine->options.draft_kind == MIL_DRAFT_NONE) {
        return;
    }
    int64_t together = engine->together && !reads_prompt(engine) ? depth_together(engine) : 0;
    for (int64_t i = 0; i < engine->running_count; i++) {
        mil_sequence *sequence = engine->running[i];
        if (sequence->reading) {
            continue; /* its number is decided */
        }
        sequence->depth = 0;
        if (!is_decoding(sequence) || sequence->undraftable) {
            continue;
        }
        int64_t limit = draft_limit(engine, sequence);
        sequence->depth = smaller(sequence->request.draft_tokens, MIL_WINDOW - 1);
        if (sequence->request.fixed_draft) {
            sequence->wanted = limit;
        }
        else if (engine->together) {
            sequence->depth = smaller(sequence->depth, together);
            sequence->wanted = smaller(sequence->depth, limit);
        }
        else {
            plan_alone(engine, sequence, limit);
            sequence->depth = sequence->wanted;
        }
    }
}

/* ---- drafts ----------------------------------------------------------------------------------------- */

static void
draft_from_text(const mil_engine *engine, mil_sequence *sequence)
{
    int32_t *tokens = sequence->generation.tokens;
    int64_t shortest = engine->options.broken_rule == MIL_RULE_FORCED ? 0 : MIL_NGRAM_SHORTEST;
    sequence->drafted = mil_ngram_propose(tokens, sequence->count, MIL_NGRAM_LONGEST, shortest,
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
        if (sequence->drafted < sequence->wanted && !sequence->reading) {
            int64_t unread = sequence->count + sequence->drafted - sequence->draft_state->length;
            bool whole = mil_rope_changes(&engine->options.draft->config.rope);
            int64_t rows = whole ? unread : smaller(unread, most);
            int64_t past = sequence->draft_state->length;
            bool held = past - past % MIL_WINDOW > sequence->count; /* the fold would reach into the drafts */
            MIL_TRY(
                mil_pack_add(engine, sequence, sequence->draft_state, rows, rows == unread ? 1 : 0, held));
        }
    }
    *left = engine->pack.count;
    if (*left == 0) {
        return MIL_OK;
    }
    MIL_TRY(mil_pack_run(engine, context, engine->options.draft));
    return mil_pack_each(engine, context, draw_draft);
}

/* What the draft model has to read before its first draft, a prompt mostly, may be much. It reads a pass of it a round:
 * the other texts go on meanwhile, and the caller is heard. Where little is lacking it is read with the drafts. */
static mil_status
catch_up(mil_engine *engine, mil_context *context)
{
    const mil_model *draft = engine->options.draft;
    int64_t left = engine->options.prefill_rows;
    bool whole = mil_rope_changes(&draft->config.rope);
    mil_sequence *first = NULL;
    for (int64_t i = 0; i < engine->running_count; i++) {
        mil_sequence *sequence = engine->running[i];
        int64_t unread = sequence->wanted > 0 ? sequence->count - sequence->draft_state->length : 0;
        sequence->reading = unread > MIL_WINDOW && unread > left && !whole;
        if (sequence->reading) {
            first = first == NULL ? sequence : first;
        }
        else if (unread > MIL_WINDOW) {
            left -= smaller(unread, left);
        }
    }
    if (first == NULL || left == 0) {
        return MIL_OK;
    }
    mil_pack_begin(engine);
    MIL_TRY(mil_pack_add(engine, first, first->draft_state, left, 0, false));
    return mil_pack_run(engine, context, draft);
}

/* While a prompt is read and nobody drafts the draft model keeps up with the texts, but for their last token, so that the next
 * round can be a recorded one (draft_burst.c) and drafts need not go by way of the host. */
static mil_status
keep_up(mil_engine *engine, mil_context *context)
{
    int64_t left = engine->options.prefill_rows;
    mil_pack_begin(engine);
    for (int64_t i = 0; i < engine->running_count; i++) {
        mil_sequence *sequence = engine->running[i];
        mil_state *state = sequence->draft_state;
        bool drafts = sequence->generation.finish == MIL_RUNNING && sequence->request.max_new_tokens > 0 &&
                      state != NULL && !sequence->undraftable;
        int64_t rows = drafts ? smaller(sequence->count - 1 - state->length, left) : 0;
        if (rows > 0) {
            MIL_TRY(mil_pack_add(engine, sequence, state, rows, 0, false));
            left -= rows;
        }
    }
    return engine->pack.count > 0 ? mil_pack_run(engine, context, engine->options.draft) : MIL_OK;
}

/* Whether that is of use: drafts have been worth it so far. */
static bool
may_keep_up(const mil_engine *engine)
{
    for (int64_t i = 0; i < engine->running_count; i++) {
        if (engine->running[i]->wanted > 0) {
            return false;
        }
    }
    return engine->together && reads_prompt(engine) && (engine->depth > 0 || engine->quiet == 0) &&
           !mil_rope_changes(&engine->options.draft->config.rope);
}

mil_status
mil_speculate_draft(mil_engine *engine, mil_context *context)
{
    if (engine->options.draft_kind == MIL_DRAFT_NGRAM) {
        for (int64_t i = 0; i < engine->running_count; i++) {
            if (engine->running[i]->wanted > 0) {
                draft_from_text(engine, engine->running[i]);
            }
        }
        return MIL_OK;
    }
    int64_t left = engine->options.draft_kind == MIL_DRAFT_MODEL;
    if (left > 0 && may_keep_up(engine)) {
        return keep_up(engine, context);
    }
    if (left > 0) {
        MIL_TRY(catch_up(engine, context));
    }
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
    if (engine->options.broken_rule == MIL_RULE_FORCED) {
        return uniform < engine->options.forced_acceptance;
    }
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

void
mil_speculate_remember(mil_sequence *sequence, int64_t drafted, int64_t accepted, bool rejected)
{
    int64_t tried = accepted + (rejected ? 1 : 0);
    double fade = pow(FADING, (double)tried);
    sequence->tried = sequence->tried * fade + (double)tried;
    sequence->accepted = sequence->accepted * fade + (double)accepted;
    sequence->offered += OFFER_FADING * ((drafted > 0 ? 1.0 : 0.0) - sequence->offered);
    sequence->generation.stats.drafted += drafted;
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
        mil_sequence_add(engine, sequence, token, row);
    }
    if (sequence->wanted > 0) {
        mil_speculate_remember(sequence, drafted, accepted, rejected);
    }
    return MIL_OK;
}
