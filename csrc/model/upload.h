/* Parameters onto a device that has memory of its own, as they are or in 8 bits. */
#ifndef MIL_MODEL_UPLOAD_H
#define MIL_MODEL_UPLOAD_H

#include "model/model.h"

typedef struct mil_uploader {
    const mil_ops *ops;
    mil_context context; /* open while there is a slice */
    void *slice;         /* on the device: values that are about to become codes */
    int32_t *bad;        /* on the device */
} mil_uploader;

void
mil_uploader_init(mil_uploader *uploader, const mil_ops *ops); /* takes no memory yet */
void
mil_uploader_release(mil_uploader *uploader);

/* Sets p->data, and p->scale where it is of float8 or int8, to memory of the device, from host `values` of type p->given;
 * p->dtype says as what. What was allocated is p's on failure, too. */
mil_status
mil_upload_parameter(mil_uploader *uploader, mil_parameter *p, const void *values) MIL_MUST_CHECK;
/* Gives that memory back. */
void
mil_unload_parameter(const mil_ops *ops, mil_parameter *p);

#endif
