/* Recorded work of the engine: something that is run directly a few times, then recorded and replayed, with all numbers that
 * move in one block of device memory (burst.c records steps, draft_burst.c speculative rounds). */
#ifndef MIL_DECODE_RECORDER_H
#define MIL_DECODE_RECORDER_H

#include "decode/sequence.h"

#define MIL_MOST_REPLAYS MIL_WINDOW /* of one burst */

typedef struct mil_recorder mil_recorder;

/* What is recorded.  Each gets the recorder, which is the first member of the caller's struct. */
typedef struct mil_recorded_work {
    /* The block's size, and everything else for `count` texts, from `kept`. */
    mil_status (*prepare)(const mil_engine *engine, mil_recorder *recorder);
    /* The block's content before a burst, into `image`. */
    mil_status (*fill)(const mil_engine *engine, mil_recorder *recorder, mil_context *context);
    /* Once: what is run directly and what is recorded. */
    mil_status (*run)(const mil_engine *engine, mil_recorder *recorder, mil_context *context);
    /* The block has come back to `image` after `times` runs. */
    mil_status (*read)(mil_engine *engine, mil_recorder *recorder, int64_t times);
} mil_recorded_work;

/* What a recording depends on, for each text. */
typedef struct mil_record_key {
    int64_t serial, capacity, draft_capacity;
} mil_record_key;

struct mil_recorder {
    const mil_ops *ops;
    const mil_recorded_work *work;
    mil_allocator allocator;
    mil_arena scratch, kept, host;           /* of the recorded work */
    void *recording;                         /* of other texts until `recorded`, and then made over */
    int64_t recorded_count, recorded_drafts; /* its texts, and drafts a round */
    mil_record_key *key;                     /* [max_batch] */
    int64_t count;                           /* texts of the key */
    int64_t drafts;                          /* drafts a round, likewise of the key */
    int64_t repeats;
    bool prepared, recorded; /* for the texts of the key */
    size_t bytes, room;      /* of the block, and of what the image has memory for */
    char *device;            /* [bytes] the block */
    char *image;             /* [bytes] the same in host memory */
};

/* On failure nothing is held. */
mil_status
mil_recorder_init(mil_recorder *recorder, const mil_engine *engine, const mil_context *context,
                  const mil_recorded_work *work) MIL_MUST_CHECK;
void
mil_recorder_release(mil_recorder *recorder); /* twice is safe */
/* Takes the block, of `bytes`; for `prepare`. */
mil_status
mil_recorder_take(mil_recorder *recorder, size_t bytes) MIL_MUST_CHECK;
/* Runs the work `times` for all running texts, whose states have room for it. */
mil_status
mil_recorder_run(mil_recorder *recorder, mil_engine *engine, mil_context *context, int64_t drafts,
                 int64_t times) MIL_MUST_CHECK;

#endif
