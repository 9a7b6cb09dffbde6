/* The CPU's operators, and what its operator families share with one another.
 *
 * Every member of mil_cpu_ops is a function mil_cpu_<member>; shapes, ownership and aliasing are told in
 * device.h, algorithms in the file of each family.  The table itself is in table.c.
 */
#ifndef MIL_CPU_H
#define MIL_CPU_H

#include "device.h"

/* ---- members of the table ---------------------------------------------------------------------------- */

/* table.c */
mil_status
mil_cpu_alloc(mil_context *context, size_t bytes, void **out);
void
mil_cpu_free(mil_context *context, void *pointer);
mil_status
mil_cpu_copy(mil_context *context, void *to, const void *from, size_t bytes);
mil_status
mil_cpu_zero(mil_context *context, void *pointer, size_t bytes);
mil_status
mil_cpu_upload(mil_context *context, const void *from, size_t bytes, const void **out);

/* linear.c */
mil_status
mil_cpu_linear_forward(mil_context *context, const mil_linear *products, int64_t count);
mil_status
mil_cpu_linear_backward(mil_context *context, const mil_linear_grad *arguments);

/* norms, attention, mixers, elementwise: one file a family */
mil_status
mil_cpu_norm_forward(mil_context *context, const mil_norm *arguments);
mil_status
mil_cpu_norm_backward(mil_context *context, const mil_norm_grad *arguments);
mil_status
mil_cpu_rope_table(mil_context *context, const mil_rope_table *arguments);
mil_status
mil_cpu_rope(mil_context *context, const mil_rope *arguments);
mil_status
mil_cpu_attention_forward(mil_context *context, const mil_attention *arguments);
mil_status
mil_cpu_attention_backward(mil_context *context, const mil_attention_grad *arguments);
mil_status
mil_cpu_kv_append(mil_context *context, const mil_kv_append *arguments);
mil_status
mil_cpu_conv1d_forward(mil_context *context, const mil_conv1d *arguments);
mil_status
mil_cpu_conv1d_backward(mil_context *context, const mil_conv1d_grad *arguments);
mil_status
mil_cpu_scan_forward(mil_context *context, const mil_scan *arguments);
mil_status
mil_cpu_scan_backward(mil_context *context, const mil_scan_grad *arguments);
mil_status
mil_cpu_ssd_forward(mil_context *context, const mil_ssd *arguments);
mil_status
mil_cpu_ssd_backward(mil_context *context, const mil_ssd_grad *arguments);
mil_status
mil_cpu_glu_forward(mil_context *context, const mil_glu *arguments);
mil_status
mil_cpu_glu_backward(mil_context *context, const mil_glu_grad *arguments);
mil_status
mil_cpu_embedding_forward(mil_context *context, const mil_embedding *arguments);
mil_status
mil_cpu_embedding_backward(mil_context *context, const mil_embedding_grad *arguments);
mil_status
mil_cpu_linear_loss(mil_context *context, mil_linear_loss *arguments);
mil_status
mil_cpu_relative_mse(mil_context *context, mil_relative_mse *arguments);
mil_status
mil_cpu_adamw(mil_context *context, const mil_adamw *arguments);
mil_status
mil_cpu_muon(mil_context *context, const mil_muon *arguments);
mil_status
mil_cpu_sum_squares(mil_context *context, const float *x, int64_t count, double *out);
mil_status
mil_cpu_add(mil_context *context, int64_t rows, int64_t width, const void *x, int64_t x_stride, void *y,
            int64_t y_stride);
mil_status
mil_cpu_gather_rows(mil_context *context, int64_t count, int64_t width, const int64_t *index, const void *x,
                    int64_t x_stride, void *y, int64_t y_stride);
mil_status
mil_cpu_widen(mil_context *context, int64_t rows, int64_t width, mil_dtype dtype, const void *x,
              int64_t x_stride, float scale, float *y);

/* ---- shared between families (linear.c) -------------------------------------------------------------- */

/* c = alpha op(a) op(b) + beta c in float32, all row-major: op(a) is [m, k], op(b) is [k, n], c is [m, n].
 * With transpose_a the array a is [k, m], with transpose_b the array b is [n, k]; lda, ldb, ldc are the
 * distances between stored rows.  beta = 0 overwrites c whatever it held.  Runs on the context's team in
 * an order that is fixed for a shape and a thread count; called inside a parallel region it would run on
 * the calling thread alone, but scratch belongs to one caller, so do not. */
mil_status
mil_cpu_gemm(mil_context *context, bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k,
             float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta, float *c,
             int64_t ldc) MIL_MUST_CHECK;

/* to = from as float32, exactly; from is [rows, columns] of `dtype`, from_stride elements between rows.
 * Runs on a team of `threads` (1 inside a parallel region). */
void
mil_cpu_expand(int threads, mil_dtype dtype, int64_t rows, int64_t columns, const void *from,
               int64_t from_stride, float *to, int64_t to_stride);

#endif
