/* Float32 matrix products of a BLAS library that is found at run time.
 *
 * There is no link-time dependency: Python knows where the scipy-openblas64 wheel lies and gives the path.
 * The library runs on one thread; linear.c divides a product over the context's team itself, so that a
 * result repeats for the same shapes and threads, and no second thread pool competes with OpenMP's.
 */
#ifndef MIL_CPU_BLAS_H
#define MIL_CPU_BLAS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

/* Loads the shared library at `path`, which must offer CBLAS under plain, 64-bit or scipy-openblas names.
 * May be called once more with another library; not while products run. */
mil_status
mil_blas_load(const char *path) MIL_MUST_CHECK;

bool
mil_blas_loaded(void);

/* What is loaded, for `info` and reports: "none", or the library's own description. Never NULL. */
const char *
mil_blas_description(void);

/* c = alpha op(a) op(b) + beta c on the calling thread, row-major as in mil_cpu_gemm; only where loaded. */
void
mil_blas_sgemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
               const float *a, int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

#endif
