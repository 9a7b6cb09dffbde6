/* One training step of a student: losses against a teacher and against labels, backward through every
 * layer, and the optimizer.
 *
 * A trainer holds what training adds to a model: gradients, AdamW moments, and float32 masters of 16-bit
 * weights.  A micro-step (mil_trainer_backward) adds to the gradients; mil_trainer_apply clips, steps and
 * clears them.  Python decides rates, scales and data; it never sees a layer.
 */
#ifndef MIL_DISTILL_TRAINER_H
#define MIL_DISTILL_TRAINER_H

#include "model/block.h"

typedef struct mil_trainer {
    mil_model *student;
    const mil_model *teacher; /* NULL: labels only */
    bool checkpointing;       /* keep only each layer's input; run its forward again in backward */
    mil_gradients gradients;
    float **m, **v, **master; /* [parameter_count]; NULL where frozen; master = data where float32 */
    int64_t step;             /* optimizer steps taken */
} mil_trainer;

/* trainable[i]: whether parameter i is trained; the others are frozen. */
mil_status
mil_trainer_init(mil_trainer *trainer, mil_model *student, const mil_model *teacher, const bool *trainable,
                 bool checkpointing) MIL_MUST_CHECK;
void
mil_trainer_release(mil_trainer *trainer);

/* Pairs of answers in place of the other losses: sequence 2 i is the chosen one of pair i, 2 i + 1 the rejected one.
 * labels and row_weight (zero or not) tell which rows belong to the answers. Gradients are those of scale * loss. */
typedef struct mil_preference {
    const double *reference; /* [sequences] log-probabilities of the answers under the reference model */
    double beta, label_smoothing;
    bool length_normalized; /* log-probabilities are means over tokens, the reference's too */
    /* out: sums over pairs */
    double loss, margin, chosen_reward, rejected_reward, chosen_logprob, rejected_logprob, correct;
} mil_preference;

typedef struct mil_micro_step {
    const int32_t *tokens; /* [rows] */
    int64_t sequences;
    const int64_t *offsets;
    const int32_t *labels;   /* [rows] next tokens, negative = none; NULL = none */
    const float *row_weight; /* [rows] or NULL = all 1 */
    float kl_weight, ce_weight, temperature;
    mil_kl_direction direction;
    float mix;   /* of MIL_KL_JSD */
    float scale; /* of the loss, see mil_linear_loss */
    /* stored likeliest tokens in a teacher's place, see mil_linear_loss */
    int64_t top;
    const int32_t *top_tokens;  /* [rows, top] */
    const float *top_logprobs;  /* [rows, top + 1] */
    mil_preference *preference; /* or NULL */
    double *row_ce;             /* [rows] or NULL: cross-entropy of each row that counts, 0 elsewhere */
    /* hidden_weight * mean over layers of the relative squared error of hidden states after each layer */
    float hidden_weight;
    /* > 0: instead of all the above, align_weight * mean over converted layers of the relative squared
     * error of mixer(x) against the teacher's mixer(x) on the teacher's own hidden states x */
    float align_weight;
    bool evaluate; /* losses only, no gradients */
    /* out */
    double kl, ce, teacher_ce, kl_rows, ce_rows, agree, correct; /* as mil_linear_loss.sums */
    double hidden, align;                                        /* unweighted means */
} mil_micro_step;

/* Fills the sums of step->preference, and row_factor [rows]: what weight each row's cross-entropy has in the
 * gradient (csrc/distill/preference.c). row_ce is [rows]. */
void
mil_preference_loss(mil_micro_step *step, const double *row_ce, float *row_factor);

mil_status
mil_trainer_backward(mil_context *context, mil_trainer *trainer, mil_micro_step *step) MIL_MUST_CHECK;

typedef struct mil_optimizer_step {
    float learning_rate, beta1, beta2, eps;
    float weight_decay;  /* of matrices; vectors (norms, biases, A_log, D, conv) are never decayed */
    float max_grad_norm; /* 0 = no clipping */
    float vector_rate;   /* factor on learning_rate for vectors; 1 by custom */
    float muon_rate;     /* > 0: Muon with this learning rate on the layers' matrices, AdamW elsewhere */
    float muon_momentum;
    double grad_norm; /* out, before clipping */
} mil_optimizer_step;

/* A gradient that is not finite is a MIL_ERR_NONFINITE and changes nothing but clears the gradients. */
mil_status
mil_trainer_apply(mil_context *context, mil_trainer *trainer, mil_optimizer_step *step) MIL_MUST_CHECK;

/* Losses without a trainer: student against teacher (may be NULL) on given rows. */
mil_status
mil_evaluate(mil_context *context, const mil_model *student, const mil_model *teacher,
             mil_micro_step *step) MIL_MUST_CHECK;

#endif
