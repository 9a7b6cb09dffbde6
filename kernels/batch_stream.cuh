/* Long products of some tens of rows (see batch_stream.cu), as batch_product.cu calls them. */
#ifndef MIL_KERNELS_BATCH_STREAM_CUH
#define MIL_KERNELS_BATCH_STREAM_CUH

#include "cuda.cuh"

/* Whether a multiprocessor has enough to read of this product's weights for one block's stream to pay: by their sizes alone. */
bool
mil_batch_stream_pays(const mil_context *context, const mil_linear *product);
mil_status
mil_batch_stream(mil_context *context, const mil_linear *product);

#endif
