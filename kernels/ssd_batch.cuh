/* One row each of many sequences (see ssd_batch.cu), as ssd.cu calls it. */
#ifndef MIL_KERNELS_SSD_BATCH_CUH
#define MIL_KERNELS_SSD_BATCH_CUH

#include "ssd.cuh"

/* The same as mil_ssd_windows for sequences that bring one row each, where *done is set. */
mil_status
mil_ssd_batch(mil_context *context, const ssd_arguments *a, const mil_states *states, int64_t sequences,
              bool *done);

#endif
