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

/* The arguments of one launch for products of one x, in tiles of so many outputs; output_of(product, first tile) is what
 * they hold of each. */
template <typename Arguments, typename Output>
static inline Arguments
mil_product_arguments(const mil_linear *products, int64_t count, int tile_outputs, Output output_of)
{
    Arguments a = {};
    a.rows = (int)products->rows;
    a.in = (int)products->in;
    a.count = (int)count;
    a.x = products->x;
    a.x_stride = products->x_stride;
    for (int64_t i = 0; i < count; i++) {
        a.outputs[i] = output_of(&products[i], a.tiles);
        a.tiles += (int)mil_ceil_div(products[i].out, tile_outputs);
    }
    return a;
}

/* Whether the kernels can read these operands: types agree, rows start at multiples of 16 bytes. */
bool
mil_thin_product_fits(const mil_context *context, const mil_linear *product);
mil_status
mil_thin_product(mil_context *context, const mil_linear *products, int64_t count);
/* The same after a norm and before a gate or a convolution, which may be NULL (device.h: project). */
mil_status
mil_thin_project(mil_context *context, const mil_norm *norm, const mil_linear *products, int64_t count,
                 const mil_glu *gate, const mil_conv1d *conv);

#endif
