/* The distillation loss, fused with the output product; and the relative error of hidden states.
 *
 * linear_loss computes logits z = logit_scale x W^T of student and teacher, and with
 * ls = log softmax(z_student / T), lt = log softmax(z_teacher / T) over the vocabulary, for each row
 *   forward  kl = sum exp(lt) (lt - ls)     d kl / d z = (exp(ls) - exp(lt)) / T
 *   reverse  kl = sum exp(ls) (ls - lt)     d kl / d z = exp(ls) (ls - lt - kl) / T
 *   jsd      with a = mix, lm = log(a exp(lt) + (1 - a) exp(ls)), g = (1 - a) (ls - lm), G = sum exp(ls) g
 *            kl = a sum exp(lt) (lt - lm) + G      d kl / d z = exp(ls) (g - G) / T
 *            (Agarwal et al. 2024, "On-policy distillation", equation 1; a -> 0 and 1 turn to the two above,
 *            divided by a and 1 - a)
 *   ce = -log softmax(z_student)[label]     d ce / d z = softmax(z_student) - 1[label]
 *
 * With stored likeliest tokens (top > 0) the vocabulary is cut into buckets: each of the `top` tokens alone,
 * and R, all others together, s_R = sum over R of s.  The same three divergences are taken between s and t
 * over the buckets.  None of them can tell tokens of R apart, so their gradients keep the student's own
 * shares s_j / s_R there: with d_b the derivative by a bucket's logit as above, d kl / d z_j = d_R s_j / s_R.
 * Both are lower bounds of the divergence over the whole vocabulary (data processing), tight as t_R -> 0.
 * log s_R is the log-sum-exp over R itself: 1 - sum of the rest would have no digits where s_R is small.
 *
 * Why in blocks: logits of 8 sequences of 2048 tokens over 128,256 tokens are 8.4 GB for each of student,
 * teacher and gradient, far more than the model's activations.  A block of rows needs two arrays of
 * [block rows, vocab]; the gradient is written over the student's logits, and is used up by two products
 * (grad_x and grad_weight) before the next block overwrites it.  Rows of weight zero (padding, prompts)
 * never enter a block: blocks are filled with the rows that count.
 *
 * A 16-bit W is widened once a call where the float32 copy is small enough, otherwise panel by panel of
 * PANEL_BYTES for every block: a panel stays in the caches between its widening and its product, so what
 * this costs is a fraction of the product, and memory does not grow with the model.
 *
 * Numbers: maxima are subtracted before every exponential, sums over the vocabulary are taken in LANES
 * float32 lanes within CHUNK columns and in float64 beyond, so logits of any size give finite results.
 * Sums over rows are float64 in row order.
 */
#include "cpu/cpu.h"
#include "cpu/vector.h"

#include <math.h>
#include <string.h>

enum {
    GRAIN = 16384, /* exponentials */
    LANES = 16,
    CHUNK = 256,            /* columns, a multiple of LANES */
    BLOCK_BYTES = 32 << 20, /* logits of a block, unless that leaves fewer rows than */
    LEAST_ROWS = 128,       /* which a product needs to be worth its weight's way through memory */
    MOST_ROWS = 2048,
    WHOLE_BYTES = 512 << 20, /* a float32 copy of a weight up to this size is made once a call */
    PANEL_BYTES = 4 << 20,
};

/* ---- one row over the vocabulary ---------------------------------------------------------------------- */

/* Logits of one row and what their softmax at 1 / inverse_t needs: log p[i] = (z[i] - maximum) * inverse_t
 * - log_sum. */
typedef struct distribution {
    const float *z;
    float maximum, inverse_t, log_sum;
} distribution;

MIL_INLINE float
log_probability(const distribution *d, int64_t i)
{
    return (d->z[i] - d->maximum) * d->inverse_t - d->log_sum;
}

/* Adds EXPRESSION, a float in terms of i, over i < count to `sum` in the order that the file's head tells. */
#define SUM_IN_ORDER(count, EXPRESSION, sum)                                 \
    do {                                                                     \
        for (int64_t start = 0; start < (count); start += CHUNK) {           \
            int64_t end = start + CHUNK < (count) ? start + CHUNK : (count); \
            float lanes[LANES] = {0};                                        \
            int64_t column = start;                                          \
            for (; column + LANES <= end; column += LANES) {                 \
                _Pragma("omp simd") for (int lane = 0; lane < LANES; lane++) \
                {                                                            \
                    int64_t i = column + lane;                               \
                    lanes[lane] += EXPRESSION;                               \
                }                                                            \
            }                                                                \
            for (int64_t i = column; i < end; i++) {                         \
                lanes[i - column] += EXPRESSION;                             \
            }                                                                \
            for (int lane = 0; lane < LANES; lane++) {                       \
                (sum) += (double)lanes[lane];                                \
            }                                                                \
        }                                                                    \
    } while (0)

MIL_VECTORISE static float
find_maximum(int64_t count, const float *z)
{
    float maximum = z[0];
#pragma omp simd reduction(max : maximum)
    for (int64_t i = 0; i < count; i++) {
        maximum = z[i] > maximum ? z[i] : maximum;
    }
    return maximum;
}

/* The first column that holds `value`; 0 where none does, which only NaN brings about. */
MIL_VECTORISE static int64_t
find_first(int64_t count, const float *z, float value)
{
    for (int64_t start = 0; start < count; start += CHUNK) {
        int64_t end = start + CHUNK < count ? start + CHUNK : count;
        int found = 0;
#pragma omp simd reduction(| : found)
        for (int64_t i = start; i < end; i++) {
            found |= z[i] == value;
        }
        for (int64_t i = start; found != 0 && i < end; i++) {
            if (z[i] == value) {
                return i;
            }
        }
    }
    return 0;
}

MIL_VECTORISE static double
sum_exponentials(int64_t count, const float *z, float maximum, float inverse_t)
{
    double sum = 0;
    SUM_IN_ORDER(count, mil_expf((z[i] - maximum) * inverse_t), sum);
    return sum;
}

static distribution
get_distribution(int64_t count, const float *z, float maximum, float inverse_t)
{
    double sum = sum_exponentials(count, z, maximum, inverse_t);
    return (distribution){z, maximum, inverse_t, (float)log(sum)};
}

/* sum p (log p - log q) */
MIL_VECTORISE static double
divergence(int64_t count, distribution p, distribution q)
{
    double sum = 0;
    SUM_IN_ORDER(count, mil_expf(log_probability(&p, i)) * (log_probability(&p, i) - log_probability(&q, i)),
                 sum);
    return sum;
}

/* log m - ls and log m - lt of the mixture m = mix t + (1 - mix) s, without leaving logs: with d = lt - ls it is
 * log(1 - mix) + log(1 + mix / (1 - mix) e^d). */
typedef struct mixture {
    float mix, log_rest, log_odds; /* log(1 - mix), log(mix / (1 - mix)) */
} mixture;

static mixture
get_mixture(float mix)
{
    double rest = 1.0 - (double)mix;
    return (mixture){mix, (float)log(rest), (float)log((double)mix / rest)};
}

/* log m - ls */
MIL_INLINE float
mixture_above(mixture m, float difference)
{
    return m.log_rest + mil_softplusf(difference + m.log_odds);
}

/* sum t (lt - lm) */
MIL_VECTORISE static double
divergence_of_teacher(int64_t count, distribution student, distribution teacher, mixture m)
{
    double sum = 0;
    SUM_IN_ORDER(count,
                 mil_expf(log_probability(&teacher, i)) *
                     (log_probability(&teacher, i) - log_probability(&student, i) -
                      mixture_above(m, log_probability(&teacher, i) - log_probability(&student, i))),
                 sum);
    return sum;
}

/* sum s (ls - lm) */
MIL_VECTORISE static double
divergence_of_student(int64_t count, distribution student, distribution teacher, mixture m)
{
    double sum = 0;
    SUM_IN_ORDER(count,
                 mil_expf(log_probability(&student, i)) *
                     -mixture_above(m, log_probability(&teacher, i) - log_probability(&student, i)),
                 sum);
    return sum;
}

/* What a row's gradient is made of. `centre` is what exp(ls) must not gain or lose in sum: the kl in the
 * reverse direction, G for jsd; ce_factor is for rows with a label. */
typedef struct row_gradient {
    distribution student, teacher; /* at the temperature */
    distribution plain;            /* student at temperature 1 */
    mixture m;
    float centre, kl_factor, ce_factor;
} row_gradient;

/* grad may be the student's logits. The flags are constants after inlining. */
MIL_INLINE void
write_gradient(bool with_kl, mil_kl_direction direction, bool with_ce, int64_t count, row_gradient g,
               float *grad)
{
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float sum = 0;
        if (with_kl) {
            float ls = log_probability(&g.student, i), lt = log_probability(&g.teacher, i), s = mil_expf(ls);
            float slope = direction == MIL_KL_FORWARD ? s - mil_expf(lt)
                          : direction == MIL_KL_REVERSE
                              ? s * (ls - lt - g.centre)
                              : s * (-(1 - g.m.mix) * mixture_above(g.m, lt - ls) - g.centre);
            sum = g.kl_factor * slope;
        }
        if (with_ce) {
            sum += g.ce_factor * mil_expf(log_probability(&g.plain, i));
        }
        grad[i] = sum;
    }
}

MIL_INLINE void
gradient_in_direction(mil_kl_direction direction, bool with_ce, int64_t count, row_gradient g, float *grad)
{
    if (with_ce) {
        write_gradient(true, direction, true, count, g, grad);
    }
    else {
        write_gradient(true, direction, false, count, g, grad);
    }
}

MIL_VECTORISE static void
gradient_of_row(mil_kl_direction direction, int64_t count, row_gradient g, float *grad)
{
    bool with_kl = g.kl_factor != 0, with_ce = g.ce_factor != 0;
    if (with_kl && direction == MIL_KL_FORWARD) {
        gradient_in_direction(MIL_KL_FORWARD, with_ce, count, g, grad);
    }
    else if (with_kl && direction == MIL_KL_REVERSE) {
        gradient_in_direction(MIL_KL_REVERSE, with_ce, count, g, grad);
    }
    else if (with_kl) {
        gradient_in_direction(MIL_KL_JSD, with_ce, count, g, grad);
    }
    else if (with_ce) {
        write_gradient(false, MIL_KL_FORWARD, true, count, g, grad);
    }
    else {
        /* a row without label where only labels count */
        write_gradient(false, MIL_KL_FORWARD, false, count, g, grad);
    }
}

/* ---- one row of the loss ------------------------------------------------------------------------------ */

typedef struct row_sums {
    double kl, ce, teacher_ce, weight;
    bool has_label, agree, correct;
} row_sums;

static double
cross_entropy(const distribution *d, int32_t label)
{
    return (double)d->log_sum - ((double)d->z[label] - d->maximum) * d->inverse_t;
}

/* The distribution at temperature 1 beside the one at `inverse_t`: the same where that is 1. */
static distribution
get_plain(int64_t count, const distribution *d)
{
    return d->inverse_t == 1.0f ? *d : get_distribution(count, d->z, d->maximum, 1.0f);
}

/* The divergence of g->student and g->teacher; fills in what its gradient needs. */
static double
divergence_of_row(const mil_linear_loss *a, row_gradient *g)
{
    int64_t vocab = a->vocab;
    if (a->direction == MIL_KL_FORWARD) {
        return divergence(vocab, g->teacher, g->student);
    }
    if (a->direction == MIL_KL_REVERSE) {
        double kl = divergence(vocab, g->student, g->teacher);
        g->centre = (float)kl;
        return kl;
    }
    g->m = get_mixture(a->mix);
    double centre = (1.0 - a->mix) * divergence_of_student(vocab, g->student, g->teacher, g->m);
    g->centre = (float)centre;
    return a->mix * divergence_of_teacher(vocab, g->student, g->teacher, g->m) + centre;
}

/* Sums of one row; its gradient over `z` where want_gradient. teacher_z is NULL without a teacher. */
static row_sums
loss_of_row(const mil_linear_loss *a, int64_t row, float *z, const float *teacher_z, bool want_gradient)
{
    int64_t vocab = a->vocab;
    int32_t label = a->labels != NULL ? a->labels[row] : -1;
    float weight = a->row_weight != NULL ? a->row_weight[row] : 1.0f;
    float inverse_t = teacher_z != NULL ? 1.0f / a->temperature : 1.0f;
    row_sums sums = {.weight = weight, .has_label = label >= 0};
    row_gradient g = {0};

    float maximum = find_maximum(vocab, z);
    int64_t best = find_first(vocab, z, maximum);
    g.student = get_distribution(vocab, z, maximum, inverse_t);
    if (teacher_z != NULL) {
        float teacher_maximum = find_maximum(vocab, teacher_z);
        sums.agree = best == find_first(vocab, teacher_z, teacher_maximum);
        g.teacher = get_distribution(vocab, teacher_z, teacher_maximum, inverse_t);
        sums.kl = divergence_of_row(a, &g);
        g.kl_factor = a->scale * weight * a->kl_weight * a->temperature; /* T^2 / T */
    }
    if (label >= 0) {
        g.plain = get_plain(vocab, &g.student);
        sums.ce = cross_entropy(&g.plain, label);
        sums.correct = best == label;
        g.ce_factor = a->scale * weight * a->ce_weight;
    }
    if (label >= 0 && teacher_z != NULL) {
        distribution teacher = get_plain(vocab, &g.teacher);
        sums.teacher_ce = cross_entropy(&teacher, label);
    }
    if (want_gradient) {
        gradient_of_row(a->direction, vocab, g, z);
        if (label >= 0) {
            z[label] -= g.ce_factor;
        }
    }
    return sums;
}

/* ---- one row against stored likeliest tokens ------------------------------------------------------------- */

enum {
    MOST_TOP = 1024
}; /* stored tokens a row: what lies beyond is next to nothing, and this fits a stack */

/* Smaller stored log-probabilities count as this: infinitely unlikely would be infinitely wrong. */
#define LEAST_LOG (-100.0)

/* Buckets 0 to top - 1 are the row's stored tokens, bucket `top` is R, if any token is left for it. */
typedef struct buckets {
    int64_t count;                /* top, + 1 with R */
    const int32_t *tokens;        /* [top] */
    double student[MOST_TOP + 1]; /* log s */
    double teacher[MOST_TOP + 1]; /* log t, sums to 1 */
    double slope[MOST_TOP + 1];   /* d kl / d logit of the bucket */
} buckets;

static double
log_sum(int64_t count, const double *logs)
{
    double maximum = -INFINITY, sum = 0;
    for (int64_t i = 0; i < count; i++) {
        maximum = logs[i] > maximum ? logs[i] : maximum;
    }
    for (int64_t i = 0; i < count; i++) {
        sum += exp(logs[i] - maximum);
    }
    return maximum + log(sum);
}

/* log-sum-exp of the logits outside the stored tokens, whose own are taken out for the while; -inf: none left. */
static double
log_sum_of_rest(int64_t vocab, float *z, int64_t top, const int32_t *tokens)
{
    float kept[MOST_TOP];
    for (int64_t k = 0; k < top; k++) {
        kept[k] = z[tokens[k]];
        z[tokens[k]] = -INFINITY;
    }
    double sum = -INFINITY;
    if (top < vocab) {
        float maximum = find_maximum(vocab, z);
        sum = maximum + log(sum_exponentials(vocab, z, maximum, 1.0f));
    }
    for (int64_t k = 0; k < top; k++) {
        z[tokens[k]] = kept[k];
    }
    return sum;
}

/* Fills both distributions; returns the log-sum-exp of all the student's logits. */
static double
fill_buckets(const mil_linear_loss *a, int64_t row, float *z, buckets *b)
{
    int64_t top = a->top;
    const float *stored = a->top_logprobs + row * (top + 1);
    b->tokens = a->top_tokens + row * top;
    b->count = top < a->vocab ? top + 1 : top;
    b->student[top] = log_sum_of_rest(a->vocab, z, top, b->tokens);
    for (int64_t k = 0; k < top; k++) {
        b->student[k] = z[b->tokens[k]];
    }
    for (int64_t k = 0; k < b->count; k++) {
        /* NaN stays NaN: a damaged label must not pass for an unlikely token. */
        b->teacher[k] = stored[k] < LEAST_LOG ? LEAST_LOG : stored[k];
    }
    double all = log_sum(b->count, b->student), teacher_all = log_sum(b->count, b->teacher);
    for (int64_t k = 0; k < b->count; k++) {
        b->student[k] -= all;
        b->teacher[k] -= teacher_all;
    }
    return all;
}

/* The divergence over the buckets, and its slopes. */
static double
divergence_of_buckets(const mil_linear_loss *a, buckets *b)
{
    double kl = 0, centre = 0;
    for (int64_t k = 0; k < b->count; k++) {
        double ls = b->student[k], lt = b->teacher[k], s = exp(ls), t = exp(lt);
        if (a->direction == MIL_KL_FORWARD) {
            kl += t * (lt - ls);
            b->slope[k] = s - t;
            continue;
        }
        double lm = a->direction == MIL_KL_REVERSE
                        ? lt
                        : log_sum(2, (double[2]){log(a->mix) + lt, log1p(-a->mix) + ls});
        double share = a->direction == MIL_KL_REVERSE ? 1.0 : 1.0 - a->mix;
        kl += share * s * (ls - lm) + (1.0 - share) * t * (lt - lm);
        centre += share * s * (ls - lm);
        b->slope[k] = share * (ls - lm);
    }
    for (int64_t k = 0; k < b->count && a->direction != MIL_KL_FORWARD; k++) {
        b->slope[k] = exp(b->student[k]) * (b->slope[k] - centre);
    }
    return kl;
}

/* z = kl_factor * its share in R + ce_factor * softmax(z); `all` and `rest` are log-sum-exps above `maximum`. */
MIL_VECTORISE static void
gradient_of_rest(int64_t count, float *z, float maximum, float all, float rest, float kl_factor,
                 float ce_factor)
{
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float above = z[i] - maximum;
        z[i] = kl_factor * mil_expf(above - rest) + ce_factor * mil_expf(above - all);
    }
}

/* As loss_of_row, with buckets in the teacher's place. */
static row_sums
loss_of_labelled_row(const mil_linear_loss *a, int64_t row, float *z, bool want_gradient)
{
    int64_t vocab = a->vocab, top = a->top;
    int32_t label = a->labels != NULL ? a->labels[row] : -1;
    float weight = a->row_weight != NULL ? a->row_weight[row] : 1.0f;
    row_sums sums = {.weight = weight, .has_label = label >= 0};
    buckets b;
    float maximum = find_maximum(vocab, z);
    int64_t best = find_first(vocab, z, maximum), likeliest = 0;
    double all = fill_buckets(a, row, z, &b);
    sums.kl = divergence_of_buckets(a, &b);
    for (int64_t k = 1; k < top; k++) {
        likeliest = b.teacher[k] > b.teacher[likeliest] ? k : likeliest;
    }
    sums.agree = best == b.tokens[likeliest];
    float kl_factor = a->scale * weight * a->kl_weight, ce_factor = 0;
    if (label >= 0) {
        sums.ce = all - (double)z[label];
        sums.correct = best == label;
        ce_factor = a->scale * weight * a->ce_weight;
    }
    if (!want_gradient) {
        return sums;
    }
    float rest = 0, rest_factor = 0;
    if (b.count > top) {
        rest = (float)(b.student[top] + all - maximum);
        rest_factor = kl_factor * (float)b.slope[top];
    }
    /* Stored tokens are not of R, where their exponentials may overflow: they are written after, from here. */
    double shares[MOST_TOP];
    for (int64_t k = 0; k < top; k++) {
        shares[k] = kl_factor * b.slope[k] + ce_factor * exp(b.student[k]);
    }
    gradient_of_rest(vocab, z, maximum, (float)(all - maximum), rest, rest_factor, ce_factor);
    for (int64_t k = 0; k < top; k++) {
        z[b.tokens[k]] = (float)shares[k];
    }
    if (label >= 0) {
        z[label] -= ce_factor;
    }
    return sums;
}

/* ---- products with a weight that may need widening ---------------------------------------------------- */

/* W [vocab, hidden] as float32: all of it, or one panel of rows at a time. */
typedef struct wide_weight {
    const void *weight;
    mil_dtype dtype;
    int64_t vocab, hidden;
    const float *whole; /* NULL: panels */
    float *panel;       /* [panel_rows, hidden] */
    int64_t panel_rows;
} wide_weight;

static mil_status
push_wide_weight(mil_context *context, const void *weight, mil_dtype dtype, int64_t vocab, int64_t hidden,
                 wide_weight *out)
{
    *out = (wide_weight){
        .weight = weight, .dtype = dtype, .vocab = vocab, .hidden = hidden, .panel_rows = vocab};
    if (dtype == MIL_F32) {
        out->whole = weight;
        return MIL_OK;
    }
    if (vocab * hidden <= WHOLE_BYTES / (int64_t)sizeof(float)) {
        float *whole;
        MIL_TRY(MIL_PUSH(context->scratch, vocab * hidden, float, &whole));
        mil_cpu_expand(context->threads, dtype, vocab, hidden, weight, hidden, whole, hidden);
        out->whole = whole;
        return MIL_OK;
    }
    int64_t rows = PANEL_BYTES / ((int64_t)sizeof(float) * hidden);
    out->panel_rows = rows < LANES ? LANES : rows;
    return MIL_PUSH(context->scratch, out->panel_rows * hidden, float, &out->panel);
}

/* Rows first .. first + count of the weight. */
static const float *
get_panel(mil_context *context, const wide_weight *w, int64_t first, int64_t count)
{
    if (w->whole != NULL) {
        return w->whole + first * w->hidden;
    }
    const char *rows = (const char *)w->weight + first * w->hidden * (int64_t)mil_dtype_size(w->dtype);
    mil_cpu_expand(context->threads, w->dtype, count, w->hidden, rows, w->hidden, w->panel, w->hidden);
    return w->panel;
}

/* logits [rows, vocab] = factor x W^T */
static mil_status
multiply_logits(mil_context *context, const wide_weight *w, int64_t rows, float factor, const float *x,
                float *logits)
{
    for (int64_t first = 0; first < w->vocab; first += w->panel_rows) {
        int64_t count = w->vocab - first < w->panel_rows ? w->vocab - first : w->panel_rows;
        const float *panel = get_panel(context, w, first, count);
        MIL_TRY(mil_cpu_gemm(context, false, true, rows, count, w->hidden, factor, x, w->hidden, panel,
                             w->hidden, 0.0f, logits + first, w->vocab));
    }
    return MIL_OK;
}

/* grad_x [rows, hidden] = factor grad_logits W */
static mil_status
multiply_grad_x(mil_context *context, const wide_weight *w, int64_t rows, float factor,
                const float *grad_logits, float *grad_x)
{
    for (int64_t first = 0; first < w->vocab; first += w->panel_rows) {
        int64_t count = w->vocab - first < w->panel_rows ? w->vocab - first : w->panel_rows;
        const float *panel = get_panel(context, w, first, count);
        MIL_TRY(mil_cpu_gemm(context, false, false, rows, w->hidden, count, factor, grad_logits + first,
                             w->vocab, panel, w->hidden, first == 0 ? 0.0f : 1.0f, grad_x, w->hidden));
    }
    return MIL_OK;
}

/* ---- the fused loss ----------------------------------------------------------------------------------- */

typedef struct loss_pass {
    mil_linear_loss *a;
    wide_weight student, teacher;
    int64_t active, block_rows;
    int64_t *index;       /* [active] rows that count */
    float *x;             /* [block_rows, hidden or teacher_hidden] */
    float *z, *teacher_z; /* [block_rows, vocab] */
    float *grad_x;        /* [block_rows, hidden] */
    row_sums *sums;       /* [block_rows] */
    bool want_gradient;
} loss_pass;

static bool
row_counts(const mil_linear_loss *a, int64_t row)
{
    bool weighted = a->row_weight == NULL || a->row_weight[row] != 0.0f;
    return weighted && (a->teacher_hidden > 0 || a->top > 0 || (a->labels != NULL && a->labels[row] >= 0));
}

/* Stored tokens of the rows that count: in the vocabulary, each only once (two would be taken out twice). */
static mil_status
check_top_tokens(mil_context *context, const mil_linear_loss *a)
{
    int64_t *seen; /* [vocab] the last row that held a token, + 1 */
    MIL_TRY(MIL_PUSH(context->scratch, a->vocab, int64_t, &seen));
    memset(seen, 0, (size_t)a->vocab * sizeof *seen);
    for (int64_t row = 0; row < a->rows; row++) {
        for (int64_t k = 0; row_counts(a, row) && k < a->top; k++) {
            int32_t token = a->top_tokens[row * a->top + k];
            bool outside = token < 0 || token >= a->vocab;
            if (outside || seen[token] == row + 1) {
                return mil_fail(MIL_ERR_VALUE, "linear_loss: top_tokens[%lld, %lld] = %d; %s", (long long)row,
                                (long long)k, (int)token,
                                outside ? "it is outside the vocabulary" : "it stands there twice");
            }
            seen[token] = row + 1;
        }
    }
    return MIL_OK;
}

static mil_status
check_top(const mil_linear_loss *a)
{
    if (a->top == 0) {
        return MIL_OK;
    }
    int64_t most = a->vocab < MOST_TOP ? a->vocab : MOST_TOP;
    if (a->top < 0 || a->top > most || a->teacher_hidden > 0) {
        return mil_fail(MIL_ERR_VALUE,
                        "linear_loss: top = %lld; expected 1 to %lld, and no teacher beside it",
                        (long long)a->top, (long long)most);
    }
    if (a->temperature != 1.0f) {
        return mil_fail(MIL_ERR_VALUE,
                        "linear_loss: temperature = %g; stored likeliest tokens were taken at temperature 1",
                        (double)a->temperature);
    }
    return MIL_OK;
}

static mil_status
check_args(const mil_linear_loss *a)
{
    if (a->vocab < 1 || a->hidden < 1) {
        return mil_fail(MIL_ERR_SHAPE, "linear_loss: weight is [%lld, %lld]; expected at least [1, 1]",
                        (long long)a->vocab, (long long)a->hidden);
    }
    if (a->teacher_hidden > 0 && !(a->temperature > 0.0f)) {
        return mil_fail(MIL_ERR_VALUE, "linear_loss: temperature = %g; expected a positive number",
                        (double)a->temperature);
    }
    if (a->direction == MIL_KL_JSD && !(a->mix > 0.0f && a->mix < 1.0f)) {
        return mil_fail(MIL_ERR_VALUE, "linear_loss: mix = %g; expected a number between 0 and 1",
                        (double)a->mix);
    }
    MIL_TRY(check_top(a));
    for (int64_t row = 0; a->labels != NULL && row < a->rows; row++) {
        if (a->labels[row] >= a->vocab) {
            return mil_fail(MIL_ERR_VALUE, "linear_loss: labels[%lld] = %d; vocab is %lld", (long long)row,
                            (int)a->labels[row], (long long)a->vocab);
        }
    }
    return MIL_OK;
}

static mil_status
push_arrays(mil_context *context, loss_pass *p)
{
    const mil_linear_loss *a = p->a;
    bool teacher = a->teacher_hidden > 0;
    int64_t bytes_a_row = a->vocab * (int64_t)sizeof(float) * (teacher ? 2 : 1);
    int64_t rows = BLOCK_BYTES / bytes_a_row,
            widest = a->hidden > a->teacher_hidden ? a->hidden : a->teacher_hidden;
    rows = rows < LEAST_ROWS ? LEAST_ROWS : rows > MOST_ROWS ? MOST_ROWS : rows;
    p->block_rows = rows < a->rows ? rows : a->rows;
    MIL_TRY(MIL_PUSH(context->scratch, a->rows, int64_t, &p->index));
    MIL_TRY(MIL_PUSH(context->scratch, p->block_rows * widest, float, &p->x));
    MIL_TRY(MIL_PUSH(context->scratch, p->block_rows * a->vocab, float, &p->z));
    MIL_TRY(MIL_PUSH(context->scratch, p->block_rows, row_sums, &p->sums));
    if (a->grad_x != NULL) {
        MIL_TRY(MIL_PUSH(context->scratch, p->block_rows * a->hidden, float, &p->grad_x));
    }
    if (teacher) {
        MIL_TRY(MIL_PUSH(context->scratch, p->block_rows * a->vocab, float, &p->teacher_z));
        MIL_TRY(push_wide_weight(context, a->teacher_weight, a->teacher_dtype, a->vocab, a->teacher_hidden,
                                 &p->teacher));
    }
    return push_wide_weight(context, a->weight, a->dtype, a->vocab, a->hidden, &p->student);
}

static void
find_active_rows(loss_pass *p)
{
    mil_linear_loss *a = p->a;
    for (int64_t row = 0; row < a->rows; row++) {
        if (a->row_ce != NULL) {
            a->row_ce[row] = 0;
        }
        if (row_counts(a, row)) {
            p->index[p->active++] = row;
        }
        else if (a->grad_x != NULL) {
            memset((float *)a->grad_x + row * a->grad_x_stride, 0, (size_t)a->hidden * sizeof(float));
        }
    }
}

static void
add_sums(mil_linear_loss *a, const row_sums *s)
{
    a->sums.kl += s->weight * s->kl;
    a->sums.ce += s->weight * s->ce;
    a->sums.teacher_ce += s->weight * s->teacher_ce;
    a->sums.kl_rows += a->teacher_hidden > 0 || a->top > 0 ? s->weight : 0;
    a->sums.ce_rows += s->has_label ? s->weight : 0;
    a->sums.agree += s->agree ? s->weight : 0;
    a->sums.correct += s->correct ? s->weight : 0;
}

/* The `count` active rows from `first` on. */
static mil_status
run_block(mil_context *context, loss_pass *p, int64_t first, int64_t count)
{
    mil_linear_loss *a = p->a;
    const int64_t *index = p->index + first;

    /* 1  Logits. The student's rows come last: its products need p->x again. */
    if (a->teacher_hidden > 0) {
        MIL_TRY(mil_cpu_gather_rows(context, count, a->teacher_hidden, index, a->teacher_x,
                                    a->teacher_x_stride, p->x, a->teacher_hidden));
        MIL_TRY(multiply_logits(context, &p->teacher, count, a->teacher_logit_scale, p->x, p->teacher_z));
    }
    MIL_TRY(mil_cpu_gather_rows(context, count, a->hidden, index, a->x, a->x_stride, p->x, a->hidden));
    MIL_TRY(multiply_logits(context, &p->student, count, a->logit_scale, p->x, p->z));

    /* 2  Losses, and the gradient of the logits in their place. */
#pragma omp parallel for num_threads(context->threads) schedule(dynamic) if (count * a->vocab >= GRAIN)
    for (int64_t i = 0; i < count; i++) {
        const float *teacher_z = a->teacher_hidden > 0 ? p->teacher_z + i * a->vocab : NULL;
        float *z = p->z + i * a->vocab;
        p->sums[i] = a->top > 0 ? loss_of_labelled_row(a, index[i], z, p->want_gradient)
                                : loss_of_row(a, index[i], z, teacher_z, p->want_gradient);
    }
    for (int64_t i = 0; i < count; i++) {
        add_sums(a, &p->sums[i]);
        if (a->row_ce != NULL) {
            a->row_ce[index[i]] = p->sums[i].ce;
        }
    }

    /* 3  Gradients of x and of the weight. */
    if (a->grad_weight != NULL) {
        MIL_TRY(mil_cpu_gemm(context, true, false, a->vocab, a->hidden, count, a->logit_scale, p->z, a->vocab,
                             p->x, a->hidden, 1.0f, a->grad_weight, a->hidden));
    }
    if (a->grad_x != NULL) {
        MIL_TRY(multiply_grad_x(context, &p->student, count, a->logit_scale, p->z, p->grad_x));
        for (int64_t i = 0; i < count; i++) {
            memcpy((float *)a->grad_x + index[i] * a->grad_x_stride, p->grad_x + i * a->hidden,
                   (size_t)a->hidden * sizeof(float));
        }
    }
    return MIL_OK;
}

static mil_status
run_loss(mil_context *context, loss_pass *p)
{
    if (p->a->top > 0) {
        MIL_TRY(check_top_tokens(context, p->a));
    }
    MIL_TRY(push_arrays(context, p));
    find_active_rows(p);
    for (int64_t first = 0; first < p->active; first += p->block_rows) {
        int64_t left = p->active - first;
        MIL_TRY(run_block(context, p, first, left < p->block_rows ? left : p->block_rows));
    }
    return MIL_OK;
}

mil_status
mil_cpu_linear_loss(mil_context *context, mil_linear_loss *arguments)
{
    MIL_TRY(check_args(arguments));
    memset(&arguments->sums, 0, sizeof arguments->sums);
    loss_pass p = {.a = arguments,
                   .want_gradient = arguments->grad_x != NULL || arguments->grad_weight != NULL};
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_status status = run_loss(context, &p);
    mil_arena_rewind(context->scratch, mark);
    return status;
}

/* ---- relative error of hidden states ------------------------------------------------------------------ */

typedef struct square_sums {
    double error, target;
} square_sums;

MIL_VECTORISE static square_sums
squares_of_row(int64_t width, const float *x, const float *target)
{
    square_sums sums = {0, 0};
    SUM_IN_ORDER(width, (x[i] - target[i]) * (x[i] - target[i]), sums.error);
    SUM_IN_ORDER(width, target[i] * target[i], sums.target);
    return sums;
}

MIL_VECTORISE static void
add_difference(int64_t width, float factor, const float *x, const float *target, float *grad)
{
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        grad[i] += factor * (x[i] - target[i]);
    }
}

/* A target of zeros has no relative error; its sum of squares then counts as 1. */
mil_status
mil_cpu_relative_mse(mil_context *context, mil_relative_mse *arguments)
{
    const mil_relative_mse a = *arguments;
    const float *x = a.x, *target = a.target;
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    square_sums *rows, sums = {0, 0};
    MIL_TRY(MIL_PUSH(context->scratch, a.rows, square_sums, &rows));
#pragma omp parallel for num_threads(context->threads) schedule(static) if (a.rows * a.width >= 2 * GRAIN)
    for (int64_t row = 0; row < a.rows; row++) {
        rows[row] = squares_of_row(a.width, x + row * a.x_stride, target + row * a.target_stride);
    }
    for (int64_t row = 0; row < a.rows; row++) {
        sums.error += rows[row].error;
        sums.target += rows[row].target;
    }
    mil_arena_rewind(context->scratch, mark);
    double scale = sums.target > 0 ? sums.target : 1;
    arguments->value = sums.error / scale;
    if (a.grad_x != NULL) {
        float factor = (float)(2.0 * a.weight / scale);
#pragma omp parallel for num_threads(context->threads) schedule(static) if (a.rows * a.width >= 2 * GRAIN)
        for (int64_t row = 0; row < a.rows; row++) {
            add_difference(a.width, factor, x + row * a.x_stride, target + row * a.target_stride,
                           (float *)a.grad_x + row * a.grad_x_stride);
        }
    }
    return MIL_OK;
}
