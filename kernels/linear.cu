/* Dense products: y [rows, out] (+)= x [rows, in] W^T + bias.
 *
 * Up to 16 rows the reading of W decides and thin_product.cu does it; up to 64 rows of 16-bit types, on GPUs with
 * wgmma, are batch_product.cu's; other products go to cuBLASLt with float32 accumulation (and true float32 products for
 * float32 weights, never TF32).  cuBLASLt is opened when the first such product comes: neither building nor loading this
 * module needs it, only its header.
 *
 * Row-major y = x W^T is column-major y^T = W x^T: A = W transposed [in, out], B = x^T [in, rows], both with `in`
 * along the columns.  Heuristic choices are remembered by shape, since asking costs more than a small product.
 */
#include "batch_product.cuh"
#include "quantized.cuh"
#include "table.h"
#include "thin_product.cuh"

#include <cublasLt.h>
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>

#define WORKSPACE ((size_t)32 << 20)
#define WORKSPACE_ALIGNMENT 256 /* cuBLASLt refuses less */
#define MOST_PLANS 512
#define MOST_DEVICES 16

/* ---- the library ---------------------------------------------------------------------------------------------- */

#define FOR_EACH_FUNCTION(X)        \
    X(Create)                       \
    X(Matmul)                       \
    X(MatmulAlgoGetHeuristic)       \
    X(MatmulDescCreate)             \
    X(MatmulDescSetAttribute)       \
    X(MatmulDescDestroy)            \
    X(MatrixLayoutCreate)           \
    X(MatrixLayoutDestroy)          \
    X(MatmulPreferenceCreate)       \
    X(MatmulPreferenceSetAttribute) \
    X(MatmulPreferenceDestroy)

static struct {
#define DECLARE(name) decltype(&cublasLt##name) name;
    FOR_EACH_FUNCTION(DECLARE)
#undef DECLARE
    cublasLtHandle_t handles[MOST_DEVICES];
    bool loaded;
} library;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static mil_status
load_library()
{
    if (library.loaded) {
        return MIL_OK;
    }
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};
    void *opened = NULL;
    for (int i = 0; i < 3 && opened == NULL; i++) {
        opened = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    }
    if (opened == NULL) {
        return mil_fail(MIL_ERR_DEVICE,
                        "CUDA: cuBLASLt was not found; install the CUDA toolkit's cuBLAS or "
                        "pip install 'mambainllama[cuda]'");
    }
#define LOOK_UP(name)                                                                            \
    library.name = (decltype(&cublasLt##name))dlsym(opened, "cublasLt" #name);                   \
    if (library.name == NULL) {                                                                  \
        return mil_fail(MIL_ERR_DEVICE,                                                          \
                        "CUDA: this cuBLASLt has no function cublasLt" #name ": it is too old"); \
    }
    FOR_EACH_FUNCTION(LOOK_UP)
#undef LOOK_UP
    library.loaded = true;
    return MIL_OK;
}

static mil_status
blas_status(cublasStatus_t status, const char *what)
{
    return status == CUBLAS_STATUS_SUCCESS
               ? MIL_OK
               : mil_fail(MIL_ERR_DEVICE, "CUDA: cuBLASLt: %s failed with status %d", what, (int)status);
}

#define BLAS_TRY(expression) MIL_TRY(blas_status((expression), #expression))

/* ---- plans ------------------------------------------------------------------------------------------------------ */

typedef struct plan_key {
    int64_t rows, in, out, x_stride, y_stride;
    int device, dtype, accumulate, float_output;
} plan_key;

typedef struct plan {
    plan_key key;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t algorithm;
} plan;

static plan plans[MOST_PLANS];
static int plan_count, next_plan;

static cudaDataType_t
type_of(mil_dtype dtype)
{
    return dtype == MIL_BF16 ? CUDA_R_16BF : dtype == MIL_F16 ? CUDA_R_16F : CUDA_R_32F;
}

static void
release_plan(plan *p)
{
    if (p->product != NULL) {
        library.MatmulDescDestroy(p->product);
    }
    cublasLtMatrixLayout_t layouts[3] = {p->w, p->x, p->y};
    for (int i = 0; i < 3; i++) {
        if (layouts[i] != NULL) {
            library.MatrixLayoutDestroy(layouts[i]);
        }
    }
    memset(p, 0, sizeof *p);
}

static mil_status
choose_algorithm(plan *p, cublasLtHandle_t handle)
{
    cublasLtMatmulPreference_t preference;
    size_t workspace = WORKSPACE;
    BLAS_TRY(library.MatmulPreferenceCreate(&preference));
    library.MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                         sizeof workspace);
    /* What a slice of a wider array guarantees; arenas and parameters give more. */
    bool aligned = p->key.x_stride % 8 == 0 && p->key.y_stride % 8 == 0 && p->key.in % 8 == 0;
    uint32_t alignment = aligned ? 16 : (uint32_t)mil_dtype_size((mil_dtype)p->key.dtype);
    library.MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment,
                                         sizeof alignment);
    library.MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignment,
                                         sizeof alignment);
    library.MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment,
                                         sizeof alignment);
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    cublasStatus_t status = library.MatmulAlgoGetHeuristic(handle, p->product, p->w, p->x, p->y, p->y,
                                                           preference, 1, &result, &found);
    library.MatmulPreferenceDestroy(preference);
    if (status != CUBLAS_STATUS_SUCCESS || found == 0) {
        return mil_fail(
            MIL_ERR_UNSUPPORTED, "CUDA: cuBLASLt has no product of [%lld, %lld] with [%lld, %lld]",
            (long long)p->key.rows, (long long)p->key.in, (long long)p->key.out, (long long)p->key.in);
    }
    p->algorithm = result.algo;
    return MIL_OK;
}

static mil_status
make_plan(plan *p, cublasLtHandle_t handle)
{
    const plan_key *k = &p->key;
    cudaDataType_t type = type_of((mil_dtype)k->dtype), y_type = k->float_output ? CUDA_R_32F : type;
    cublasOperation_t transposed = CUBLAS_OP_T;
    BLAS_TRY(library.MatmulDescCreate(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    BLAS_TRY(library.MatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                            sizeof transposed));
    BLAS_TRY(library.MatrixLayoutCreate(&p->w, type, (uint64_t)k->in, (uint64_t)k->out, k->in));
    BLAS_TRY(library.MatrixLayoutCreate(&p->x, type, (uint64_t)k->in, (uint64_t)k->rows, k->x_stride));
    BLAS_TRY(library.MatrixLayoutCreate(&p->y, y_type, (uint64_t)k->out, (uint64_t)k->rows, k->y_stride));
    return choose_algorithm(p, handle);
}

/* The plan for a key, copied out: a later call may overwrite its place only while nobody holds the lock. */
static mil_status
find_plan(const plan_key *key, cublasLtHandle_t *handle, plan *out)
{
    MIL_TRY(load_library());
    if (library.handles[key->device] == NULL) {
        BLAS_TRY(library.Create(&library.handles[key->device]));
    }
    *handle = library.handles[key->device];
    for (int i = 0; i < plan_count; i++) {
        if (memcmp(&plans[i].key, key, sizeof *key) == 0) {
            *out = plans[i];
            return MIL_OK;
        }
    }
    plan fresh;
    memset(&fresh, 0, sizeof fresh);
    fresh.key = *key;
    mil_status status = make_plan(&fresh, *handle);
    if (status != MIL_OK) {
        release_plan(&fresh);
        return status;
    }
    release_plan(&plans[next_plan]);
    plans[next_plan] = fresh;
    next_plan = (next_plan + 1) % MOST_PLANS;
    plan_count = plan_count < MOST_PLANS ? plan_count + 1 : plan_count;
    *out = fresh;
    return MIL_OK;
}

static mil_status
dense_locked(mil_context *context, const mil_linear *l, void *workspace)
{
    plan_key key;
    memset(&key, 0, sizeof key); /* padding is compared, too */
    key.rows = l->rows;
    key.in = l->in;
    key.out = l->out;
    key.x_stride = l->x_stride;
    key.y_stride = l->y_stride;
    key.device = context->ops->device;
    key.dtype = l->dtype;
    key.accumulate = l->accumulate;
    key.float_output = l->float_output;
    cublasLtHandle_t handle;
    plan p;
    MIL_TRY(find_plan(&key, &handle, &p));
    float alpha = 1.0f, beta = l->accumulate ? 1.0f : 0.0f;
    return blas_status(library.Matmul(handle, p.product, &alpha, l->weight, p.w, l->x, p.x, &beta, l->y, p.y,
                                      l->y, p.y, &p.algorithm, workspace, WORKSPACE, mil_stream(context)),
                       "a product");
}

/* ---- bias ------------------------------------------------------------------------------------------------------- */

template <typename T>
static __global__ void
bias_kernel(int64_t out, const float *bias, T *y, int64_t y_stride)
{
    mil_trigger();
    mil_wait();
    for (int64_t column = threadIdx.x; column < out; column += blockDim.x) {
        T *at = y + blockIdx.x * y_stride + column;
        *at = mil_round<T>(mil_float(*at) + bias[column]);
    }
}

template <typename T>
static mil_status
add_bias(mil_context *context, const mil_linear *l)
{
    dim3 grid((unsigned)l->rows), block(256);
    if (l->float_output) {
        return mil_launch(context, "bias", bias_kernel<float>, grid, block, 0, l->out, l->bias, (float *)l->y,
                          l->y_stride);
    }
    return mil_launch(context, "bias", bias_kernel<T>, grid, block, 0, l->out, l->bias, (T *)l->y,
                      l->y_stride);
}

static mil_status
dense_product(mil_context *context, const mil_linear *l)
{
    if (l->dtype != context->ops->activation_dtype) {
        return mil_fail(MIL_ERR_UNSUPPORTED, "CUDA: a product of %s weights in a %s model",
                        mil_dtype_name(l->dtype), mil_dtype_name(context->ops->activation_dtype));
    }
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    void *memory;
    MIL_TRY(mil_arena_push(context->scratch, WORKSPACE + WORKSPACE_ALIGNMENT, 1, &memory));
    uintptr_t above = (uintptr_t)memory + WORKSPACE_ALIGNMENT - 1;
    void *workspace = (void *)(above - above % WORKSPACE_ALIGNMENT);
    pthread_mutex_lock(&lock);
    mil_status status = dense_locked(context, l, workspace);
    pthread_mutex_unlock(&lock);
    mil_arena_rewind(context->scratch, mark);
    if (status == MIL_OK && l->bias != NULL) {
        status = MIL_FOR_ACT(context, add_bias, context, l);
    }
    return status;
}

static bool
is_thin(const mil_context *context, const mil_linear *products, int64_t count)
{
    bool thin = count <= MIL_THIN_PRODUCTS;
    for (int64_t i = 0; i < count; i++) {
        thin = thin && products[i].dtype == products->dtype && mil_thin_product_fits(context, &products[i]);
    }
    return thin;
}

mil_status
mil_cuda_linear_forward(mil_context *context, const mil_linear *products, int64_t count)
{
    if (is_thin(context, products, count)) {
        return mil_thin_product(context, products, count);
    }
    if (mil_dtype_is_scaled(products->dtype)) {
        return mil_scaled_products(context, products, count);
    }
    if (mil_batch_product_fits(context, products, count)) {
        return mil_batch_product(context, products, count);
    }
    for (int64_t i = 0; i < count; i++) {
        MIL_TRY(dense_product(context, &products[i]));
    }
    return MIL_OK;
}

mil_status
mil_cuda_project(mil_context *context, const mil_norm *norm, const mil_linear *products, int64_t count,
                 const mil_glu *gate, const mil_conv1d *conv)
{
    if (is_thin(context, products, count)) {
        return mil_thin_project(context, norm, products, count, gate, conv);
    }
    MIL_TRY(context->ops->norm_forward(context, norm));
    if (mil_batch_product_fits(context, products, count)) {
        MIL_TRY(mil_batch_gated(context, products, count, gate));
    }
    else {
        MIL_TRY(mil_cuda_linear_forward(context, products, count));
        MIL_TRY(gate == NULL ? MIL_OK : context->ops->glu_forward(context, gate));
    }
    return conv == NULL ? MIL_OK : context->ops->conv1d_forward(context, conv);
}
