/* Dense products: y [rows, out] (+)= x [rows, in] W^T + bias.
 *
 * Up to 16 rows the reading of W decides and thin_product.cu does it; up to 64 rows of 16-bit types, on GPUs with
 * wgmma, are batch_product.cu's; other products go to cuBLASLt with float32 accumulation (and true float32 products for
 * float32 weights, never TF32).  cuBLASLt is opened when the first such product comes: neither building nor loading this
 * module needs it, only its header.
 *
 * Row-major y = x W^T is column-major y^T = W x^T: A = W transposed [in, out], B = x^T [in, rows], both with `in`
 * along the columns.  Heuristic choices are remembered by shape, since asking costs more than a small product.  Two products
 * of one x and one shape that would each leave multiprocessors idle, such as those of keys and values, are one call.
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
#define WORKSPACE_ALIGNMENT 256                /* cuBLASLt refuses less */
#define ALIGNMENT 16                           /* bytes from array to array of a call */
#define MOST_OF_PAIR ((int64_t)128 * 128 * 64) /* outputs of a product that is called with another one */
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
    X(MatrixLayoutSetAttribute)     \
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
    int count; /* of products in one call */
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

/* Elements from the weights of one product of a call to those of the next, and from y to y; x is the same. */
static mil_status
set_steps(const plan *p, int64_t w, int64_t y)
{
    BLAS_TRY(
        library.MatrixLayoutSetAttribute(p->w, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &w, sizeof w));
    return blas_status(
        library.MatrixLayoutSetAttribute(p->y, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &y, sizeof y),
        "a layout");
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
    if (k->count > 1) {
        const cublasLtMatrixLayout_t layouts[3] = {p->w, p->x, p->y};
        for (int i = 0; i < 3; i++) {
            const int32_t count = k->count;
            BLAS_TRY(library.MatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                                      sizeof count));
        }
        MIL_TRY(set_steps(p, k->in * k->out, k->rows * k->y_stride));
    }
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

static int64_t
bytes_between(const void *from, const void *to)
{
    return (int64_t)((intptr_t)to - (intptr_t)from);
}

static int64_t
y_size(const mil_linear *l)
{
    return (int64_t)mil_dtype_size(l->float_output ? MIL_F32 : l->dtype);
}

/* Whether two products can be one call and are better so.  The order of their arrays in memory does not matter. */
static bool
is_pair(const mil_linear *l)
{
    return l[0].x == l[1].x && l[0].rows == l[1].rows && l[0].in == l[1].in && l[0].out == l[1].out &&
           l[0].x_stride == l[1].x_stride && l[0].y_stride == l[1].y_stride && l[0].dtype == l[1].dtype &&
           l[0].float_output == l[1].float_output && !l[0].accumulate && !l[1].accumulate &&
           l[0].weight != l[1].weight && bytes_between(l[0].weight, l[1].weight) % ALIGNMENT == 0 &&
           bytes_between(l[0].y, l[1].y) % ALIGNMENT == 0 && l[0].rows * l[0].out <= MOST_OF_PAIR;
}

static mil_status
dense_locked(mil_context *context, const mil_linear *l, int count, void *workspace)
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
    key.count = count;
    cublasLtHandle_t handle;
    plan p;
    MIL_TRY(find_plan(&key, &handle, &p));
    if (count > 1) {
        MIL_TRY(set_steps(&p, bytes_between(l[0].weight, l[1].weight) / (int64_t)mil_dtype_size(l->dtype),
                          bytes_between(l[0].y, l[1].y) / y_size(l)));
    }
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
dense_unlocked(mil_context *context, const mil_linear *l, int count)
{
    void *memory;
    MIL_TRY(mil_arena_push(context->scratch, WORKSPACE + WORKSPACE_ALIGNMENT, 1, &memory));
    uintptr_t above = (uintptr_t)memory + WORKSPACE_ALIGNMENT - 1;
    void *workspace = (void *)(above - above % WORKSPACE_ALIGNMENT);
    pthread_mutex_lock(&lock);
    mil_status status = dense_locked(context, l, count, workspace);
    pthread_mutex_unlock(&lock);
    return status;
}

/* A call goes forward through memory, from weights to weights and from y to y.  Where that is not the order of the arrays
 * y, they are written beside them and copied: a row's bits must not depend on where an allocator has put what. */
static mil_status
dense_pair(mil_context *context, const mil_linear *l)
{
    const bool turned = bytes_between(l[0].weight, l[1].weight) < 0;
    mil_linear pair[2] = {l[turned], l[!turned]};
    if (bytes_between(pair[0].y, pair[1].y) > 0) {
        return dense_unlocked(context, pair, 2);
    }
    const size_t bytes = (size_t)(l->rows * l->y_stride * y_size(l)),
                 aligned = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    void *beside;
    MIL_TRY(mil_arena_push(context->scratch, 2 * aligned, 1, &beside));
    for (int i = 0; i < 2; i++) {
        pair[i].y = (char *)beside + i * (int64_t)aligned;
    }
    MIL_TRY(dense_unlocked(context, pair, 2));
    for (int i = 0; i < 2; i++) {
        const size_t pitch = (size_t)(l->y_stride * y_size(l)), width = (size_t)(l->out * y_size(l));
        MIL_CUDA_TRY(cudaMemcpy2DAsync(l[turned ? !i : i].y, pitch, pair[i].y, pitch, width, (size_t)l->rows,
                                       cudaMemcpyDeviceToDevice, mil_stream(context)));
    }
    return MIL_OK;
}

/* One product, or a pair. */
static mil_status
dense_product(mil_context *context, const mil_linear *l, int count)
{
    if (l->dtype != context->ops->activation_dtype) {
        return mil_fail(MIL_ERR_UNSUPPORTED, "CUDA: a product of %s weights in a %s model",
                        mil_dtype_name(l->dtype), mil_dtype_name(context->ops->activation_dtype));
    }
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_status status = count > 1 ? dense_pair(context, l) : dense_unlocked(context, l, 1);
    mil_arena_rewind(context->scratch, mark);
    for (int i = 0; i < count && status == MIL_OK; i++) {
        if (l[i].bias != NULL) {
            status = MIL_FOR_ACT(context, add_bias, context, &l[i]);
        }
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
    for (int64_t i = 0; i < count;) {
        const int together = i + 1 < count && is_pair(&products[i]) ? 2 : 1;
        MIL_TRY(dense_product(context, &products[i], together));
        i += together;
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
