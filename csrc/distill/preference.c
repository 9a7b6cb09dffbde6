/* The loss of preference pairs (Rafailov et al. 2023, "Direct preference optimization", equation 7).
 *
 * With p = log-probability of an answer under the model (the sum over its tokens; the mean where
 * length_normalized) and q = the same under the reference model, for each pair of a chosen and a rejected answer
 *
 *   margin = beta ((p_chosen - q_chosen) - (p_rejected - q_rejected))
 *   loss   = -(1 - e) log sigmoid(margin) - e log sigmoid(-margin),     e = label_smoothing
 *   d loss / d margin = e sigmoid(margin) - (1 - e) sigmoid(-margin)
 *
 * The gradient by the weights is that of the answers' cross-entropy with one factor an answer: so the model runs
 * once, its log-probabilities decide the factors, and the fused loss runs a second time with the factors as
 * weights of its rows, negative ones for rejected answers.  What that costs is one more output product; no
 * [rows, vocab] array is ever kept, and no second forward pass is made.
 *
 * log sigmoid is taken as -softplus, so margins of any size give finite losses and factors.
 */
#include "distill/trainer.h"

#include <math.h>

static double
softplus(double x)
{
    return (x > 0 ? x : 0) + log1p(exp(-fabs(x)));
}

static double
sigmoid(double x)
{
    return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x));
}

/* Log-probability of sequence s by its rows' cross-entropy, and how many rows it counts over. */
static double
answer_logprob(const mil_micro_step *step, const double *row_ce, int64_t s, int64_t *tokens)
{
    double sum = 0;
    *tokens = 0;
    for (int64_t row = step->offsets[s]; row < step->offsets[s + 1]; row++) {
        if (step->labels[row] >= 0 && (step->row_weight == NULL || step->row_weight[row] != 0)) {
            sum -= row_ce[row];
            ++*tokens;
        }
    }
    return step->preference->length_normalized && *tokens > 0 ? sum / (double)*tokens : sum;
}

/* row_factor of one answer: d loss / d (cross-entropy) = -slope, shared among its tokens where normalized. */
static void
fill_factors(const mil_micro_step *step, int64_t s, double slope, int64_t tokens, float *row_factor)
{
    double factor = step->preference->length_normalized && tokens > 0 ? -slope / (double)tokens : -slope;
    for (int64_t row = step->offsets[s]; row < step->offsets[s + 1]; row++) {
        bool counts = step->labels[row] >= 0 && (step->row_weight == NULL || step->row_weight[row] != 0);
        row_factor[row] = counts ? (float)factor : 0;
    }
}

void
mil_preference_loss(mil_micro_step *step, const double *row_ce, float *row_factor)
{
    mil_preference *p = step->preference;
    for (int64_t pair = 0; pair < step->sequences / 2; pair++) {
        int64_t chosen = 2 * pair, rejected = chosen + 1, chosen_tokens, rejected_tokens;
        double chosen_logprob = answer_logprob(step, row_ce, chosen, &chosen_tokens);
        double rejected_logprob = answer_logprob(step, row_ce, rejected, &rejected_tokens);
        double chosen_reward = p->beta * (chosen_logprob - p->reference[chosen]);
        double rejected_reward = p->beta * (rejected_logprob - p->reference[rejected]);
        double margin = chosen_reward - rejected_reward, e = p->label_smoothing;
        double slope = p->beta * (e * sigmoid(margin) - (1 - e) * sigmoid(-margin));
        fill_factors(step, chosen, slope, chosen_tokens, row_factor);
        fill_factors(step, rejected, -slope, rejected_tokens, row_factor);
        p->loss += (1 - e) * softplus(-margin) + (e > 0 ? e * softplus(margin) : 0);
        p->margin += margin;
        p->chosen_reward += chosen_reward;
        p->rejected_reward += rejected_reward;
        p->chosen_logprob += chosen_logprob;
        p->rejected_logprob += rejected_logprob;
        p->correct += margin > 0 ? 1 : 0;
    }
}
