/* One row each of many sequences (see ssd_batch.cu), as ssd.cu calls it. */
#ifndef MIL_KERNELS_SSD_BATCH_CUH
#define MIL_KERNELS_SSD_BATCH_CUH

#include "ssd.cuh"

/* The rows of all sequences, each of which brings one, where *done is set. */
mil_status
mil_ssd_batch(mil_context *context, const ssd_arguments *arguments, const mil_mixer_state *states,
              int64_t sequences, bool *done);

#endif
