/* The CUDA operators, as kernels/table.cu puts them into the table (see csrc/device.h for what each does). */
#ifndef MIL_KERNELS_TABLE_H
#define MIL_KERNELS_TABLE_H

#ifdef __cplusplus
extern "C" {
#endif

#include "device.h"

/* table.cu: the table of one device for one activation type; fails in one line where there is no such device. */
mil_status
mil_cuda_table(mil_dtype activation_dtype, int device, const mil_ops **out);

typedef struct mil_cuda_device_info {
    char name[128];
    int major, minor; /* compute capability */
    int multiprocessors;
    size_t memory, free_memory; /* bytes */
} mil_cuda_device_info;

mil_status
mil_cuda_device_count(int *count); /* 0 without a driver, too: then the message of mil_cuda_table says why */
mil_status
mil_cuda_describe(int device, mil_cuda_device_info *out);
mil_status
mil_cuda_memory(int device, size_t *free_bytes, size_t *bytes); /* quicker than describing all */

/* memory.cu */
mil_status
mil_cuda_alloc(mil_context *context, size_t bytes, void **out);
void
mil_cuda_free(mil_context *context, void *pointer);
mil_status
mil_cuda_copy(mil_context *context, void *to, const void *from, size_t bytes);
mil_status
mil_cuda_zero(mil_context *context, void *pointer, size_t bytes);
mil_status
mil_cuda_upload(mil_context *context, const void *from, size_t bytes, const void **out);
mil_status
mil_cuda_open(mil_context *context);
void
mil_cuda_close(mil_context *context);
mil_status
mil_cuda_finish(mil_context *context);

/* order.cu */
mil_status
mil_cuda_order(mil_context *context, void *before, void *after);

/* linear.cu, thin_product.cu */
mil_status
mil_cuda_linear_forward(mil_context *context, const mil_linear *products, int64_t count);

mil_status
mil_cuda_project(mil_context *context, const mil_norm *norm, const mil_linear *products, int64_t count,
                 const mil_glu *gate, const mil_conv1d *conv);

/* quantized.cu */
mil_status
mil_cuda_quantize(mil_context *context, const mil_quantize *arguments);

/* norm.cu */
mil_status
mil_cuda_norm_forward(mil_context *context, const mil_norm *arguments);

/* rope.cu */
mil_status
mil_cuda_rope_table(mil_context *context, const mil_rope_table *arguments);
mil_status
mil_cuda_rope(mil_context *context, const mil_rope *arguments);
mil_status
mil_cuda_rope_append(mil_context *context, const mil_rope *q, const mil_rope *k, const mil_kv_append *append);

/* attention.cu */
mil_status
mil_cuda_attention_forward(mil_context *context, const mil_attention *arguments);
mil_status
mil_cuda_kv_append(mil_context *context, const mil_kv_append *arguments);

/* sampler.cu, verdict.cu */
mil_status
mil_cuda_sample(mil_context *context, const mil_sample *arguments);
mil_status
mil_cuda_accept(mil_context *context, const mil_accept *arguments);

/* propose.cu */
mil_status
mil_cuda_propose(mil_context *context, const mil_propose *arguments);

/* record.cu */
mil_status
mil_cuda_advance(mil_context *context, const mil_advance *arguments);
mil_status
mil_cuda_settle(mil_context *context, const mil_settle *arguments);
mil_status
mil_cuda_record_begin(mil_context *context);
mil_status
mil_cuda_record_end(mil_context *context, void **recording);
mil_status
mil_cuda_replay(mil_context *context, void *recording);
void
mil_cuda_record_free(mil_context *context, void *recording);

/* conv1d.cu, selective_scan.cu, ssd.cu */
mil_status
mil_cuda_conv1d_forward(mil_context *context, const mil_conv1d *arguments);
mil_status
mil_cuda_scan_forward(mil_context *context, const mil_scan *arguments);
mil_status
mil_cuda_ssd_forward(mil_context *context, const mil_ssd *arguments);

/* scan_mixer.cu */
mil_status
mil_cuda_scan_mixer(mil_context *context, const mil_scan_mixer *arguments);

/* elementwise.cu */
mil_status
mil_cuda_glu_forward(mil_context *context, const mil_glu *arguments);
mil_status
mil_cuda_embedding_forward(mil_context *context, const mil_embedding *arguments);
mil_status
mil_cuda_add(mil_context *context, int64_t rows, int64_t width, const void *x, int64_t x_stride, void *y,
             int64_t y_stride);
mil_status
mil_cuda_gather_rows(mil_context *context, int64_t count, int64_t width, const int64_t *index, const void *x,
                     int64_t x_stride, void *y, int64_t y_stride);
mil_status
mil_cuda_widen(mil_context *context, int64_t rows, int64_t width, mil_dtype dtype, const void *x,
               int64_t x_stride, float scale, float *y);

#ifdef __cplusplus
}
#endif

#endif
