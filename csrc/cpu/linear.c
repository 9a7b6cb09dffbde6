/* Matrix products on CPUs: y = x W^T + bias, its gradients, and float32 products for other operators.
 *
 * Two machines share the work, because two different limits bind.
 *
 * Plain products (decoding, verification, prefill) use our own kernels (linear_tiles.h, linear_amx.c): no
 * library multiplies bfloat16 weights where they lie at the speed of memory, and none promises that a
 * row's bits do not depend on the rows beside it. One parallel region serves all products of a call.
 * Threads take pieces of the columns, weighed by the bytes of their weights, long ones first; where columns
 * are few and rows many, rows are divided too. None of that touches the order in which an output is reduced.
 *
 * Products with `fast` set and all gradients (training: many rows, bound by multiply-adds) use a BLAS
 * where one is loaded (blas.h), each thread on its own rectangle of the result. 16-bit weights are
 * expanded to float32 a few megabytes at a time, as many as caches hold: expanding costs 6 bytes of
 * traffic a weight against 2 * rows flops. Without a BLAS our float32 kernel takes over, behind
 * transposed copies.
 */
#include "cpu/linear.h"

#include <omp.h>
#include <stdatomic.h>
#include <string.h>

#include "cpu/blas.h"
#include "cpu/features.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    /* Below this many multiply-adds waking the team costs more than it saves. */
    TINY = 65536,
    /* Weights of a block that is expanded or transposed at a time: 8 MiB as float32. */
    BLOCK_WEIGHTS = 1 << 21,
    /* Rectangles a thread should get at least, so that uneven ones even out. */
    SHARES = 3,
    /* Elements of the weights that a thread takes at a time, at least. */
    PIECE = 65536,
};

static int64_t
smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t
larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int64_t
ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* ---- arguments --------------------------------------------------------------------------------------- */

static mil_status
check_sizes(const char *operator, int64_t rows, int64_t in, int64_t out, mil_dtype dtype)
{
    if (rows < 0 || in < 1 || out < 1) {
        return mil_fail(
            MIL_ERR_SHAPE,
            "%s: rows = %lld, in = %lld, out = %lld; rows must be >= 0, in and out >= 1", operator,(long long)
                                                                                              rows,
            (long long)in, (long long)out);
    }
    if (dtype != MIL_F32 && dtype != MIL_BF16 && dtype != MIL_F16) {
        return mil_fail(
            MIL_ERR_DTYPE,
            "%s: weight has dtype number %d; expected float32, bfloat16 or float16", operator,(int) dtype);
    }
    return MIL_OK;
}

static mil_status
check_rows(const char *operator, const char * argument, const void *pointer, int64_t rows, int64_t stride,
           int64_t width)
{
    if (pointer == NULL) {
        return mil_fail(MIL_ERR_VALUE, "%s: %s is missing", operator, argument);
    }
    if (rows > 1 && stride < width) {
        return mil_fail(MIL_ERR_SHAPE, "%s: %s_stride = %lld is less than the row's %lld elements", operator,
                        argument, (long long)stride, (long long)width);
    }
    return MIL_OK;
}

static mil_status
check_forward(const mil_linear *products, int64_t count)
{
    const char *operator= "linear_forward";
    for (int64_t p = 0; p < count; p++) {
        const mil_linear *product = &products[p], *first = &products[0];
        MIL_TRY(check_sizes(operator, product->rows, product->in, product->out, product->dtype));
        if (product->rows != first->rows || product->in != first->in || product->x != first->x ||
            product->x_stride != first->x_stride || product->fast != first->fast) {
            return mil_fail(MIL_ERR_VALUE,
                            "%s: product %lld differs from product 0 in x, rows, in or fast; products of a "
                            "call share them",
                            operator,(long long) p);
        }
        if (product->rows > 0) {
            MIL_TRY(check_rows(operator, "x", product->x, product->rows, product->x_stride, product->in));
            MIL_TRY(check_rows(operator, "y", product->y, product->rows, product->y_stride, product->out));
            MIL_TRY(check_rows(operator, "weight", product->weight, 1, 0, 0));
        }
    }
    return MIL_OK;
}

/* ---- expanding weights ------------------------------------------------------------------------------- */

#if defined(__x86_64__)
__attribute__((target("avx2,fma,f16c"))) static int64_t
expand_f16_avx2(int64_t count, const uint16_t *from, float *to)
{
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(from + i))));
    }
    return i;
}
#endif

static void
expand_row(mil_dtype dtype, int64_t count, const void *from, float *to)
{
    if (dtype == MIL_F32) {
        memcpy(to, from, (size_t)count * sizeof(float));
        return;
    }
    const uint16_t *half = from;
    int64_t i = 0;
    if (dtype == MIL_BF16) {
        for (; i < count; i++) {
            to[i] = mil_bf16_to_float(half[i]);
        }
        return;
    }
#if defined(__x86_64__)
    if (mil_cpu_get_level() >= MIL_CPU_AVX2) {
        i = expand_f16_avx2(count, half, to);
    }
#endif
    for (; i < count; i++) {
        to[i] = mil_f16_to_float(half[i]);
    }
}

void
mil_cpu_expand(int threads, mil_dtype dtype, int64_t rows, int64_t columns, const void *from,
               int64_t from_stride, float *to, int64_t to_stride)
{
    const size_t size = mil_dtype_size(dtype);
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns > TINY)
    for (int64_t r = 0; r < rows; r++) {
        expand_row(dtype, columns, (const char *)from + (size_t)(r * from_stride) * size, to + r * to_stride);
    }
}

/* to [columns, rows] = scale * from [rows, columns], in squares that keep both sides' lines in L1. */
static void
transpose(int threads, int64_t rows, int64_t columns, const float *from, int64_t from_stride, float scale,
          float *to, int64_t to_stride)
{
    enum { SQUARE = 16 };
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns > TINY)
    for (int64_t c0 = 0; c0 < columns; c0 += SQUARE) {
        for (int64_t r0 = 0; r0 < rows; r0 += SQUARE) {
            for (int64_t c = c0; c < smaller(c0 + SQUARE, columns); c++) {
                for (int64_t r = r0; r < smaller(r0 + SQUARE, rows); r++) {
                    to[c * to_stride + r] = scale * from[r * from_stride + c];
                }
            }
        }
    }
}

/* ---- our kernels ------------------------------------------------------------------------------------- */

static const mil_linear_kernel *
get_kernel(mil_dtype dtype)
{
    const mil_linear_kernel *(*const levels[])(mil_dtype) = {
        mil_linear_portable, mil_linear_avx2, mil_linear_avx512, mil_linear_avx512bf16, mil_linear_amx};
    const mil_linear_kernel *kernel = NULL;
    for (int level = (int)mil_cpu_get_level(); kernel == NULL; level--) {
        kernel = levels[level](dtype);
    }
    return kernel;
}

/* How a call is divided: rectangles of one block of columns and one part of the rows. */
typedef struct plan {
    const mil_linear *products;
    int64_t count;
    int threads;
    int64_t chunk;         /* rows packed at a time */
    int64_t row_parts;     /* of a chunk */
    int64_t weight;        /* of all rectangles */
    int64_t least;         /* of what a thread takes at a time */
    void *panels[3];       /* packed x by dtype; NULL where no product needs it */
    size_t thread_scratch; /* bytes */
    char *scratch;         /* [threads, thread_scratch] */
} plan;

static int64_t
column_blocks(const mil_linear *product)
{
    return ceil_div(product->out, MIL_LINEAR_COLUMNS);
}

static mil_status
make_plan(mil_context *context, const mil_linear *products, int64_t count, plan *out)
{
    /* Chunks of nearly equal size: a last one of a few rows would read all weights for almost nothing. */
    const int64_t rows = products->rows, chunks = ceil_div(rows, MIL_LINEAR_CHUNK);
    const int64_t chunk = smaller(rows, ceil_div(ceil_div(rows, chunks), MIL_LINEAR_ROWS) * MIL_LINEAR_ROWS);
    int64_t blocks = 0, outputs = 0;
    *out = (plan){.products = products, .count = count, .chunk = chunk};
    for (int64_t p = 0; p < count; p++) {
        const mil_linear_kernel *kernel = get_kernel(products[p].dtype);
        void **panel = &out->panels[products[p].dtype];
        if (*panel == NULL) {
            MIL_TRY(MIL_PUSH(context->scratch, kernel->panel_bytes(chunk, products->in), char, panel));
        }
        if (kernel->scratch_bytes > out->thread_scratch) {
            out->thread_scratch = kernel->scratch_bytes;
        }
        blocks += column_blocks(&products[p]);
        outputs += products[p].out;
    }
    bool tiny = (double)products->rows * (double)products->in * (double)outputs < TINY;
    out->threads = tiny || context->threads < 1 ? 1 : context->threads;
    /* Thin chunks are never divided by rows, which would read weights twice. */
    int64_t parts = chunk <= MIL_LINEAR_ROWS ? 1 : ceil_div((int64_t)out->threads * SHARES, blocks);
    out->row_parts = out->threads == 1 ? 1 : larger(1, smaller(parts, chunk / (2 * MIL_LINEAR_ROWS)));
    for (int64_t p = 0; p < count; p++) {
        out->weight +=
            column_blocks(&products[p]) * out->row_parts * (int64_t)mil_dtype_size(products[p].dtype);
    }
    out->least = larger(1, PIECE / (MIL_LINEAR_COLUMNS * products->in));
    MIL_TRY(MIL_PUSH(context->scratch, out->thread_scratch * (size_t)out->threads, char, &out->scratch));
    return MIL_OK;
}

/* The next piece of the weight of a chunk, three quarters of an even share of what is left: threads stay together
 * at the end though one of them is slowed down (by other work, or by its core's other thread), and still follow
 * long stretches of weights. False when nothing is left. */
static bool
take_piece(const plan *plan, _Atomic int64_t *taken, int64_t *begin, int64_t *end)
{
    *begin = atomic_load(taken);
    do {
        if (*begin >= plan->weight) {
            return false;
        }
        const int64_t left = plan->weight - *begin;
        const int64_t share = plan->threads == 1 ? left : 3 * left / (4 * plan->threads);
        *end = *begin + smaller(left, larger(plan->least, share));
    } while (!atomic_compare_exchange_weak(taken, begin, *end));
    return true;
}

/* The rectangles of one chunk whose first byte falls into a piece of the weight; neighbouring columns are computed
 * in one stretch. */
static void
multiply_piece(const plan *plan, int64_t begin, int64_t end, int64_t first_row, int64_t chunk_rows,
               void *scratch)
{
    int64_t base = 0;
    for (int64_t p = 0; p < plan->count; p++) {
        const mil_linear *product = &plan->products[p];
        const mil_linear_kernel *kernel = get_kernel(product->dtype);
        const int64_t size = (int64_t)mil_dtype_size(product->dtype), blocks = column_blocks(product);
        for (int64_t part = 0; part < plan->row_parts; part++, base += blocks * size) {
            const int64_t first = smaller(blocks, larger(0, ceil_div(begin - base, size)));
            const int64_t last = smaller(blocks, larger(0, ceil_div(end - base, size)));
            const int64_t units = ceil_div(chunk_rows, MIL_LINEAR_ROWS);
            const int64_t row = units * part / plan->row_parts * MIL_LINEAR_ROWS;
            const int64_t row_end =
                smaller(chunk_rows, units * (part + 1) / plan->row_parts * MIL_LINEAR_ROWS);
            if (begin - base >= blocks * size || first >= last || row >= row_end) {
                continue;
            }
            kernel->multiply(&(mil_linear_block){
                .product = product,
                .panel = plan->panels[product->dtype],
                .first_row = first_row,
                .chunk_rows = chunk_rows,
                .row = row,
                .rows = row_end - row,
                .column = first * MIL_LINEAR_COLUMNS,
                .columns = smaller(product->out, last * MIL_LINEAR_COLUMNS) - first * MIL_LINEAR_COLUMNS,
                .scratch = scratch,
            });
        }
    }
}

static void
run_plan(const plan *plan)
{
    const mil_linear *product = plan->products; /* any: x, rows and in are shared */
    const float *x = product->x;
    _Atomic int64_t taken = 0;
#pragma omp parallel num_threads(plan->threads) if (plan -> threads > 1)
    {
        void *scratch = plan->scratch + (size_t)omp_get_thread_num() * plan->thread_scratch;
        for (int64_t row = 0; row < product->rows; row += plan->chunk) {
            const int64_t rows = smaller(plan->chunk, product->rows - row);
            for (int dtype = 0; dtype < 3; dtype++) {
                if (plan->panels[dtype] == NULL) {
                    continue;
                }
                const mil_linear_kernel *kernel = get_kernel((mil_dtype)dtype);
                const int64_t groups = kernel->group_count(rows);
#pragma omp for schedule(static) nowait
                for (int64_t g = 0; g < groups; g++) {
                    kernel->pack(rows, g, product->in, x + row * product->x_stride, product->x_stride,
                                 plan->panels[dtype]);
                }
            }
#pragma omp barrier
            for (int64_t begin, end; take_piece(plan, &taken, &begin, &end);) {
                multiply_piece(plan, begin, end, row, rows, scratch);
            }
#pragma omp barrier
#pragma omp single nowait
            atomic_store(&taken, 0); /* the next pieces are taken behind a barrier */
        }
    }
}

static mil_status
multiply(mil_context *context, const mil_linear *products, int64_t count)
{
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    plan plan;
    mil_status status = make_plan(context, products, count, &plan);
    if (status == MIL_OK) {
        run_plan(&plan);
    }
    mil_arena_rewind(context->scratch, mark);
    return status;
}

/* ---- float32 products -------------------------------------------------------------------------------- */

typedef struct gemm {
    bool transpose_a, transpose_b;
    int64_t m, n, k;
    float alpha;
    const float *a;
    int64_t lda;
    const float *b;
    int64_t ldb;
    float beta;
    float *c;
    int64_t ldc;
} gemm;

/* The team as a grid over c: the one whose rectangles have the least edges, since edges are what is read. */
static void
choose_grid(int threads, int64_t m, int64_t n, int *grid_m, int *grid_n)
{
    double best = -1;
    for (int i = 1; i <= threads; i++) {
        if (threads % i != 0) {
            continue;
        }
        double edges = (double)m / i + (double)n / (threads / i);
        if (best < 0 || edges < best) {
            best = edges;
            *grid_m = i;
            *grid_n = threads / i;
        }
    }
}

/* Each thread of the team multiplies one rectangle of c, cut at multiples of 16. */
static void
gemm_blas(int threads, const gemm *g)
{
    int grid_m = 1, grid_n = 1;
    choose_grid(threads, g->m, g->n, &grid_m, &grid_n);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        const int64_t units_m = ceil_div(g->m, 16), units_n = ceil_div(g->n, 16);
        const int64_t i = units_m * (t / grid_n) / grid_m * 16, j = units_n * (t % grid_n) / grid_n * 16;
        const int64_t i_end = smaller(g->m, units_m * (t / grid_n + 1) / grid_m * 16);
        const int64_t j_end = smaller(g->n, units_n * (t % grid_n + 1) / grid_n * 16);
        if (i < i_end && j < j_end) {
            mil_blas_sgemm(g->transpose_a, g->transpose_b, i_end - i, j_end - j, g->k, g->alpha,
                           g->a + (g->transpose_a ? i : i * g->lda), g->lda,
                           g->b + (g->transpose_b ? j * g->ldb : j), g->ldb, g->beta, g->c + i * g->ldc + j,
                           g->ldc);
        }
    }
}

/* Without a BLAS: our kernels want both operands contiguous along k, so what lies otherwise is copied. */
static mil_status
gemm_own(mil_context *context, const gemm *g)
{
    const int64_t block = larger(MIL_LINEAR_COLUMNS, smaller(g->n, BLOCK_WEIGHTS / larger(g->k, 1)));
    float *a_copy = NULL, *b_copy = NULL;
    if (g->transpose_a) {
        MIL_TRY(MIL_PUSH(context->scratch, smaller(g->m, MIL_LINEAR_CHUNK) * g->k, float, &a_copy));
    }
    MIL_TRY(MIL_PUSH(context->scratch, block * g->k, float, &b_copy));
    for (int64_t j = 0; j < g->n; j += block) {
        const int64_t columns = smaller(block, g->n - j);
        if (g->transpose_b) {
            for (int64_t c = 0; c < columns; c++) {
                for (int64_t l = 0; l < g->k; l++) {
                    b_copy[c * g->k + l] = g->alpha * g->b[(j + c) * g->ldb + l];
                }
            }
        }
        else {
            transpose(context->threads, g->k, columns, g->b + j, g->ldb, g->alpha, b_copy, g->k);
        }
        for (int64_t i = 0; i < g->m; i += MIL_LINEAR_CHUNK) {
            const int64_t rows = smaller(MIL_LINEAR_CHUNK, g->m - i);
            const float *a = g->a + i * g->lda;
            if (g->transpose_a) {
                transpose(context->threads, g->k, rows, g->a + i, g->lda, 1.0f, a_copy, g->k);
                a = a_copy;
            }
            const mil_linear product = {
                .rows = rows,
                .in = g->k,
                .out = columns,
                .x = a,
                .x_stride = g->transpose_a ? g->k : g->lda,
                .weight = b_copy,
                .dtype = MIL_F32,
                .y = g->c + i * g->ldc + j,
                .y_stride = g->ldc,
                .accumulate = g->beta != 0.0f,
            };
            MIL_TRY(multiply(context, &product, 1));
        }
    }
    return MIL_OK;
}

static void
scale_rows(int threads, int64_t rows, int64_t columns, float scale, float *c, int64_t ldc)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns > TINY)
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < columns; j++) {
            c[i * ldc + j] = scale == 0.0f ? 0.0f : scale * c[i * ldc + j];
        }
    }
}

mil_status
mil_cpu_gemm(mil_context *context, bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k,
             float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta, float *c,
             int64_t ldc)
{
    /* A single stored row has no distance to a next one, and callers may give any; a BLAS insists on the
     * width at least. */
    lda = larger(lda, transpose_a ? m : k);
    ldb = larger(ldb, transpose_b ? k : n);
    ldc = larger(ldc, n);
    gemm g = {transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc};
    if (m <= 0 || n <= 0) {
        return MIL_OK;
    }
    if (mil_blas_loaded()) {
        gemm_blas((double)m * (double)n * (double)k < TINY ? 1 : context->threads, &g);
        return MIL_OK;
    }
    if (beta != 1.0f && (beta != 0.0f || k <= 0)) {
        scale_rows(context->threads, m, n, beta, c, ldc);
    }
    if (k <= 0) {
        return MIL_OK;
    }
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_status status = gemm_own(context, &g);
    mil_arena_rewind(context->scratch, mark);
    return status;
}

/* ---- forward ----------------------------------------------------------------------------------------- */

/* Rows of a weight that are expanded at a time. */
static int64_t
block_rows(int64_t out, int64_t in)
{
    return smaller(out, larger(64, BLOCK_WEIGHTS / in));
}

static void
add_bias(int threads, const mil_linear *product)
{
    float *y = product->y;
#pragma omp parallel for schedule(static) num_threads(threads) if (product->rows * product->out > TINY)
    for (int64_t r = 0; r < product->rows; r++) {
        for (int64_t c = 0; c < product->out; c++) {
            y[r * product->y_stride + c] += product->bias[c];
        }
    }
}

static mil_status
multiply_fast(mil_context *context, const mil_linear *product)
{
    const int64_t block = block_rows(product->out, product->in);
    float *expanded = NULL, *y = product->y;
    if (product->dtype != MIL_F32) {
        MIL_TRY(MIL_PUSH(context->scratch, block * product->in, float, &expanded));
    }
    for (int64_t c = 0; c < product->out; c += block) {
        const int64_t columns = smaller(block, product->out - c);
        const float *weight = (const float *)product->weight + c * product->in;
        if (product->dtype != MIL_F32) {
            const uint16_t *half = (const uint16_t *)product->weight + c * product->in;
            mil_cpu_expand(context->threads, product->dtype, columns, product->in, half, product->in,
                           expanded, product->in);
            weight = expanded;
        }
        MIL_TRY(mil_cpu_gemm(context, false, true, product->rows, columns, product->in, 1.0f, product->x,
                             product->x_stride, weight, product->in, product->accumulate ? 1.0f : 0.0f, y + c,
                             product->y_stride));
    }
    if (product->bias != NULL) {
        add_bias(context->threads, product);
    }
    return MIL_OK;
}

mil_status
mil_cpu_linear_forward(mil_context *context, const mil_linear *products, int64_t count)
{
    if (count <= 0) {
        return MIL_OK;
    }
    MIL_TRY(check_forward(products, count));
    if (products->rows == 0) {
        return MIL_OK;
    }
    if (!products->fast) {
        return multiply(context, products, count);
    }
    for (int64_t p = 0; p < count; p++) {
        mil_arena_mark mark = mil_arena_get_mark(context->scratch);
        mil_status status = multiply_fast(context, &products[p]);
        mil_arena_rewind(context->scratch, mark);
        MIL_TRY(status);
    }
    return MIL_OK;
}

/* ---- backward ---------------------------------------------------------------------------------------- */

/* grad_bias += column sums, in row order and float64; a thread owns whole columns. */
static void
sum_columns(int threads, const mil_linear_grad *grad)
{
    enum { STRIP = 64 };
    const float *grad_y = grad->grad_y;
#pragma omp parallel for schedule(static) num_threads(threads) if (grad->rows * grad->out > TINY)
    for (int64_t c0 = 0; c0 < grad->out; c0 += STRIP) {
        const int64_t columns = smaller(STRIP, grad->out - c0);
        double sums[STRIP] = {0};
        for (int64_t r = 0; r < grad->rows; r++) {
            for (int64_t c = 0; c < columns; c++) {
                sums[c] += (double)grad_y[r * grad->grad_y_stride + c0 + c];
            }
        }
        for (int64_t c = 0; c < columns; c++) {
            grad->grad_bias[c0 + c] += (float)sums[c];
        }
    }
}

/* grad_x = grad_y W, block after block of W's rows. */
static mil_status
backward_x(mil_context *context, const mil_linear_grad *grad)
{
    const int64_t block = grad->dtype == MIL_F32 ? grad->out : block_rows(grad->out, grad->in);
    const float *grad_y = grad->grad_y;
    float *expanded = NULL;
    if (grad->dtype != MIL_F32) {
        MIL_TRY(MIL_PUSH(context->scratch, block * grad->in, float, &expanded));
    }
    for (int64_t c = 0; c < grad->out; c += block) {
        const int64_t columns = smaller(block, grad->out - c);
        const float *weight = grad->weight;
        if (grad->dtype != MIL_F32) {
            const uint16_t *half = (const uint16_t *)grad->weight + c * grad->in;
            mil_cpu_expand(context->threads, grad->dtype, columns, grad->in, half, grad->in, expanded,
                           grad->in);
            weight = expanded;
        }
        const float beta = c > 0 || grad->accumulate ? 1.0f : 0.0f;
        MIL_TRY(mil_cpu_gemm(context, false, false, grad->rows, grad->in, columns, 1.0f, grad_y + c,
                             grad->grad_y_stride, weight, grad->in, beta, grad->grad_x, grad->grad_x_stride));
    }
    return MIL_OK;
}

static mil_status
check_backward(const mil_linear_grad *grad)
{
    const char *operator= "linear_backward";
    MIL_TRY(check_sizes(operator, grad->rows, grad->in, grad->out, grad->dtype));
    if (grad->rows == 0) {
        return MIL_OK;
    }
    MIL_TRY(check_rows(operator, "grad_y", grad->grad_y, grad->rows, grad->grad_y_stride, grad->out));
    if (grad->grad_x != NULL) {
        MIL_TRY(check_rows(operator, "grad_x", grad->grad_x, grad->rows, grad->grad_x_stride, grad->in));
        MIL_TRY(check_rows(operator, "weight", grad->weight, 1, 0, 0));
    }
    if (grad->grad_weight != NULL) {
        MIL_TRY(check_rows(operator, "x", grad->x, grad->rows, grad->x_stride, grad->in));
    }
    return MIL_OK;
}

mil_status
mil_cpu_linear_backward(mil_context *context, const mil_linear_grad *arguments)
{
    MIL_TRY(check_backward(arguments));
    if (arguments->rows == 0) {
        return MIL_OK;
    }
    if (arguments->grad_bias != NULL) {
        sum_columns(context->threads, arguments);
    }
    if (arguments->grad_weight != NULL) {
        MIL_TRY(mil_cpu_gemm(context, true, false, arguments->out, arguments->in, arguments->rows, 1.0f,
                             arguments->grad_y, arguments->grad_y_stride, arguments->x, arguments->x_stride,
                             1.0f, arguments->grad_weight, arguments->in));
    }
    if (arguments->grad_x == NULL) {
        return MIL_OK;
    }
    mil_arena_mark mark = mil_arena_get_mark(context->scratch);
    mil_status status = backward_x(context, arguments);
    mil_arena_rewind(context->scratch, mark);
    return status;
}
