/* The base that _core lends to this module (see csrc/base/host.h). */
#ifndef MIL_KERNELS_HOST_H
#define MIL_KERNELS_HOST_H

#include "base/host.h"

/* NULL where `host` is of another build. Call it once, before anything else of the kernels. */
const mil_host *
mil_host_accept(const mil_host *host);

#endif
