/* Products of some tens of rows (see batch_product.cu), as linear.cu calls them. */
#ifndef MIL_KERNELS_BATCH_PRODUCT_CUH
#define MIL_KERNELS_BATCH_PRODUCT_CUH

#include "cuda.cuh"

#define MIL_BATCH_ROWS 64    /* most rows; a row's bits do not depend on how many there are */
#define MIL_BATCH_PRODUCTS 6 /* most products of one launch */

/* Whether the kernel can do these: a GPU with wgmma, 16-bit weights of the activation type, aligned rows. */
bool
mil_batch_product_fits(const mil_context *context, const mil_linear *products, int64_t count);
mil_status
mil_batch_product(mil_context *context, const mil_linear *products, int64_t count);
/* The same before a gate, which may be NULL. */
mil_status
mil_batch_gated(mil_context *context, const mil_linear *products, int64_t count, const mil_glu *gate);

#endif
