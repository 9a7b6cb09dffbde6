/* Products with few rows (see thin_product.cu), as linear.cu calls them. */
#ifndef MIL_KERNELS_THIN_PRODUCT_CUH
#define MIL_KERNELS_THIN_PRODUCT_CUH

#include "cuda.cuh"

#define MIL_THIN_ROWS 16    /* most rows; a row's bits do not depend on how many there are */
#define MIL_THIN_PRODUCTS 6 /* most products of one launch */

/* Whether these products are the gate's, so that only their gated activation need be written. */
static inline bool
mil_gate_fits(const mil_linear *products, int64_t count, const mil_glu *gate)
{
    return count == 2 && products[0].out == products[1].out && gate->up == products[0].y &&
           gate->gate == products[1].y && !products[0].accumulate && !products[1].accumulate;
}

/* Whether the kernels can read these operands: types agree, rows start at multiples of 16 bytes. */
bool
mil_thin_product_fits(const mil_context *context, const mil_linear *product);
mil_status
mil_thin_product(mil_context *context, const mil_linear *products, int64_t count);
/* The same after a norm and before a gate (device.h: project); gate may be NULL. */
mil_status
mil_thin_project(mil_context *context, const mil_norm *norm, const mil_linear *products, int64_t count,
                 const mil_glu *gate);

#endif
