/* Parameters onto a device, as they are or in 8 bits.
 *
 * A matrix that becomes codes goes over slice by slice: a slice of its rows is copied into one buffer on the device,
 * which makes the codes from there.  So the host holds nothing but the (mapped) values, and the device never
 * more than a slice of them beside the codes.
 */
#include "model/upload.h"

#define SLICE_BYTES ((int64_t)64 << 20)

void
mil_uploader_init(mil_uploader *uploader, const mil_ops *ops)
{
    *uploader = (mil_uploader){.ops = ops};
}

void
mil_uploader_release(mil_uploader *uploader)
{
    if (uploader->slice != NULL) {
        uploader->ops->free(&uploader->context, uploader->slice);
        uploader->ops->close(&uploader->context);
    }
    if (uploader->bad != NULL) {
        uploader->ops->free(&uploader->context, uploader->bad);
    }
    *uploader = (mil_uploader){0};
}

static mil_status
prepare_slices(mil_uploader *uploader, const mil_parameter *p)
{
    mil_context context = {.ops = uploader->ops};
    if (uploader->ops->quantize == NULL) {
        return mil_fail(MIL_ERR_UNSUPPORTED,
                        "Model: %s weights need a CUDA device; on \"%s\" leave weights as they are",
                        mil_dtype_name(p->dtype), uploader->ops->name);
    }
    if (p->shape[1] * (int64_t)mil_dtype_size(p->given) > SLICE_BYTES) {
        return mil_fail(MIL_ERR_UNSUPPORTED, "Model: rows of %lld values (%s) are too wide to become %s",
                        (long long)p->shape[1], p->name, mil_dtype_name(p->dtype));
    }
    if (uploader->slice == NULL) {
        uploader->context = context;
        MIL_TRY(uploader->ops->open(&uploader->context));
        mil_status status = uploader->ops->alloc(&context, SLICE_BYTES, &uploader->slice);
        if (status != MIL_OK) {
            uploader->ops->close(&uploader->context);
            return status;
        }
    }
    if (uploader->bad == NULL) {
        void *bad;
        MIL_TRY(uploader->ops->alloc(&context, sizeof *uploader->bad, &bad));
        uploader->bad = bad;
    }
    return uploader->ops->zero(&context, uploader->bad, sizeof *uploader->bad);
}

static mil_status
upload_codes(mil_uploader *uploader, mil_parameter *p, const char *values)
{
    const mil_ops *ops = uploader->ops;
    mil_context context = {.ops = ops};
    int64_t rows = p->shape[0], columns = p->shape[1],
            row_bytes = columns * (int64_t)mil_dtype_size(p->given);
    int64_t slice = SLICE_BYTES / row_bytes;
    for (int64_t first = 0; first < rows; first += slice) {
        mil_quantize part = {
            .rows = rows - first < slice ? rows - first : slice,
            .columns = columns,
            .values = uploader->slice,
            .from = p->given,
            .dtype = p->dtype,
            .codes = (char *)p->data + first * columns,
            .scale = p->scale + first,
            .bad = uploader->bad,
        };
        MIL_TRY(ops->copy(&context, uploader->slice, values + first * row_bytes,
                          (size_t)(part.rows * row_bytes)));
        MIL_TRY(ops->quantize(&uploader->context, &part));
        MIL_TRY(ops->finish(&uploader->context)); /* the next slice comes into the same place */
    }
    int32_t bad;
    MIL_TRY(ops->copy(&context, &bad, uploader->bad, sizeof bad));
    return bad == 0
               ? MIL_OK
               : mil_fail(
                     MIL_ERR_VALUE,
                     "Model: %s has NaN or infinite values and cannot become %s; leave weights as they are",
                     p->name, mil_dtype_name(p->dtype));
}

mil_status
mil_upload_parameter(mil_uploader *uploader, mil_parameter *p, const void *values)
{
    const mil_ops *ops = uploader->ops;
    mil_context context = {.ops = ops};
    size_t bytes = (size_t)p->count * mil_dtype_size(p->dtype);
    if (!mil_dtype_is_scaled(p->dtype)) {
        MIL_TRY(ops->alloc(&context, bytes, &p->data));
        return ops->copy(&context, p->data, values, bytes);
    }
    void *scale;
    MIL_TRY(prepare_slices(uploader, p));
    MIL_TRY(ops->alloc(&context, bytes, &p->data));
    MIL_TRY(ops->alloc(&context, (size_t)p->shape[0] * sizeof *p->scale, &scale));
    p->scale = scale;
    return upload_codes(uploader, p, values);
}

void
mil_unload_parameter(const mil_ops *ops, mil_parameter *p)
{
    mil_context context = {.ops = ops};
    ops->free(&context, p->data);
    ops->free(&context, p->scale);
    p->data = NULL;
    p->scale = NULL;
}
