/* Finds a CBLAS in a shared library (see blas.h).
 *
 * Three families of names exist: OpenBLAS as SciPy's wheels build it (scipy_cblas_sgemm64_, 64-bit
 * integers), OpenBLAS and others built with 64-bit integers and the suffix (cblas_sgemm64_), and the plain
 * interface (cblas_sgemm).  The plain name says nothing about its integers: OpenBLAS tells through
 * openblas_get_config ("USE64BITINT"); every other library is taken for 32-bit, the CBLAS standard.
 */
#include "cpu/blas.h"

#include <dlfcn.h>
#include <string.h>

enum { ROW_MAJOR = 101, NO_TRANSPOSE = 111, TRANSPOSE = 112 }; /* CBLAS constants */

typedef void (*sgemm64_function)(int order, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k,
                                 float alpha, const float *a, int64_t lda, const float *b, int64_t ldb,
                                 float beta, float *c, int64_t ldc);
typedef void (*sgemm32_function)(int order, int transpose_a, int transpose_b, int32_t m, int32_t n, int32_t k,
                                 float alpha, const float *a, int32_t lda, const float *b, int32_t ldb,
                                 float beta, float *c, int32_t ldc);
typedef void (*set_threads_function)(int threads);
typedef const char *(*config_function)(void);

static struct {
    void *library;
    sgemm64_function sgemm64; /* one of the two is set where loaded */
    sgemm32_function sgemm32;
    char description[160];
} blas = {.description = "none"};

/* ISO C has no cast from an object pointer to a function pointer; POSIX guarantees this copy. */
static bool
find(void *library, const char *name, void *function)
{
    void *symbol = dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol != NULL;
}

static void
describe(const char *text)
{
    size_t length = strlen(text);
    while (length > 0 && text[length - 1] == ' ') {
        length--;
    }
    if (length >= sizeof blas.description) {
        length = sizeof blas.description - 1;
    }
    memcpy(blas.description, text, length);
    blas.description[length] = '\0';
}

mil_status
mil_blas_load(const char *path)
{
    static const struct {
        const char *sgemm, *set_threads, *config;
        bool suffixed; /* the name itself says 64-bit integers */
    } families[] = {
        {"scipy_cblas_sgemm64_", "scipy_openblas_set_num_threads64_", "scipy_openblas_get_config64_", true},
        {"cblas_sgemm64_", "openblas_set_num_threads64_", "openblas_get_config64_", true},
        {"scipy_cblas_sgemm", "scipy_openblas_set_num_threads", "scipy_openblas_get_config", false},
        {"cblas_sgemm", "openblas_set_num_threads", "openblas_get_config", false},
    };
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        const char *reason = dlerror();
        return mil_fail(MIL_ERR_IO, "BLAS: cannot load %s: %s", path, reason ? reason : "unknown reason");
    }
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) {
        sgemm64_function sgemm64;
        sgemm32_function sgemm32;
        set_threads_function set_threads;
        config_function config;
        if (!find(library, families[i].sgemm, &sgemm64)) {
            continue;
        }
        (void)find(library, families[i].sgemm, &sgemm32);
        if (find(library, families[i].set_threads, &set_threads)) {
            set_threads(1);
        }
        const char *text = find(library, families[i].config, &config) ? config() : "CBLAS";
        bool wide = families[i].suffixed || strstr(text, "USE64BITINT") != NULL;
        describe(text);
        blas.sgemm64 = wide ? sgemm64 : NULL;
        blas.sgemm32 = wide ? NULL : sgemm32;
        blas.library = library; /* never closed: its threads and our pointers may outlive any owner */
        return MIL_OK;
    }
    dlclose(library);
    return mil_fail(MIL_ERR_UNSUPPORTED, "BLAS: %s offers no cblas_sgemm under any known name", path);
}

bool
mil_blas_loaded(void)
{
    return blas.library != NULL;
}

const char *
mil_blas_description(void)
{
    return blas.description;
}

void
mil_blas_sgemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
               const float *a, int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc)
{
    int op_a = transpose_a ? TRANSPOSE : NO_TRANSPOSE;
    int op_b = transpose_b ? TRANSPOSE : NO_TRANSPOSE;
    if (blas.sgemm64 != NULL) {
        blas.sgemm64(ROW_MAJOR, op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    blas.sgemm32(ROW_MAJOR, op_a, op_b, (int32_t)m, (int32_t)n, (int32_t)k, alpha, a, (int32_t)lda, b,
                 (int32_t)ldb, beta, c, (int32_t)ldc);
}
