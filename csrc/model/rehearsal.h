/* What a pass over a model will need of a device's memory, before anything is computed (see rehearsal.c). */
#ifndef MIL_MODEL_REHEARSAL_H
#define MIL_MODEL_REHEARSAL_H

#include "model/model.h"

/* The pass to foresee. */
typedef struct mil_rehearsal {
    mil_dtype dtype;      /* of the matrices */
    mil_dtype activation; /* of the device's table */
    bool keeps_current;   /* likewise */
    int64_t sequences;    /* at least 1 */
    int64_t rows;         /* of all sequences, at least one each */
    int64_t logits;       /* rows whose logits are wanted, at most `rows` */
} mil_rehearsal;

typedef struct mil_footprint {
    int64_t workspace;   /* most bytes of activations at a time; operators' own workspace not among them */
    int64_t mixer_bytes; /* of one text, however long: SSM states, convolution windows, tails */
    int64_t token_bytes; /* of one token of one text: keys and values */
} mil_footprint;

/* Needs no parameters and touches no device. */
mil_status
mil_rehearse(const mil_model_config *config, const mil_rehearsal *rehearsal,
             mil_footprint *out) MIL_MUST_CHECK;

#endif
