/* Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers"): the momentum of a matrix, made orthogonal.
 *
 *   m = momentum m + g,  u = g + momentum m                (Nesterov)
 *   X = u / |u|_F, five times:  A = X X^T,  X = a X + (b A + c A A) X
 *   master -= learning_rate * (0.2 sqrt(max(rows, columns)) X + weight_decay * master)
 *
 * The quintic with (a, b, c) = (3.4445, -4.7750, 2.0315) drives every singular value towards 1 (0.7 to 1.2
 * suffices), so a step moves all directions of the matrix alike, also those in which gradients are small.  The factor
 * 0.2 sqrt(max) gives the update the root mean square that AdamW's has (Liu et al. 2025, arXiv 2502.16982),
 * so that learning rates carry over.
 *
 * A matrix that stacks unlike projections (z, x, B, C and dt of one in_proj) is orthogonalised part by part.  The Gram
 * matrix is taken on the shorter side: 5 (2 s^2 l + s^3) multiply-adds for sides s <= l, about 15 s for each
 * element, which is small beside the 6 tokens multiply-adds of its gradient in any batch of more than s tokens.
 */
#include "cpu/cpu.h"

#include <math.h>
#include <string.h>

enum { ITERATIONS = 5 };
static const float QUINTIC_A = 3.4445f, QUINTIC_B = -4.7750f, QUINTIC_C = 2.0315f;

/* The part's momentum and its Nesterov update u, divided by the Frobenius norm; false where u is zero. */
static bool
nesterov(const mil_muon *a, int64_t first, int64_t count, float *u)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
        float g = a->grad[first + i] * a->grad_scale;
        a->m[first + i] = a->momentum * a->m[first + i] + g;
        u[i] = g + a->momentum * a->m[first + i];
        sum += (double)u[i] * u[i];
    }
    if (!(sum > 0)) {
        return false;
    }
    float inverse = (float)(1 / sqrt(sum));
    for (int64_t i = 0; i < count; i++) {
        u[i] *= inverse;
    }
    return true;
}

/* One step of the quintic: next = a X + P X (or X P), P = b A + c A A, A the Gram matrix of the shorter side. */
static mil_status
iterate(mil_context *context, int64_t rows, int64_t columns, const float *x, float *gram, float *polynomial,
        float *next)
{
    bool wide = rows <= columns;
    int64_t side = wide ? rows : columns, other = wide ? columns : rows;
    MIL_TRY(mil_cpu_gemm(context, !wide, wide, side, side, other, 1, x, columns, x, columns, 0, gram, side));
    memcpy(polynomial, gram, (size_t)(side * side) * sizeof(float));
    MIL_TRY(mil_cpu_gemm(context, false, false, side, side, side, QUINTIC_C, gram, side, gram, side,
                         QUINTIC_B, polynomial, side));
    memcpy(next, x, (size_t)(rows * columns) * sizeof(float));
    if (wide) {
        return mil_cpu_gemm(context, false, false, rows, columns, rows, 1, polynomial, side, x, columns,
                            QUINTIC_A, next, columns);
    }
    return mil_cpu_gemm(context, false, false, rows, columns, columns, 1, x, columns, polynomial, side,
                        QUINTIC_A, next, columns);
}

static void
apply(const mil_muon *a, int64_t first, int64_t count, float scale, const float *x)
{
    float keep = 1 - a->learning_rate * a->weight_decay;
    for (int64_t i = 0; i < count; i++) {
        float value = keep * a->master[first + i] - scale * x[i];
        a->master[first + i] = value;
        if (a->dtype != MIL_F32) {
            ((uint16_t *)a->weight)[first + i] =
                a->dtype == MIL_BF16 ? mil_float_to_bf16(value) : mil_float_to_f16(value);
        }
    }
}

static mil_status
update_part(mil_context *context, const mil_muon *a, int64_t first_row, int64_t rows)
{
    int64_t columns = a->columns, first = first_row * columns, count = rows * columns;
    int64_t side = rows < columns ? rows : columns;
    float *x, *next, *gram, *polynomial;
    MIL_TRY(MIL_PUSH(context->scratch, count, float, &x));
    MIL_TRY(MIL_PUSH(context->scratch, count, float, &next));
    MIL_TRY(MIL_PUSH(context->scratch, side * side, float, &gram));
    MIL_TRY(MIL_PUSH(context->scratch, side * side, float, &polynomial));
    if (!nesterov(a, first, count, x)) {
        memset(x, 0, (size_t)count * sizeof(float)); /* nothing to follow: decay alone */
    }
    else {
        for (int i = 0; i < ITERATIONS; i++) {
            MIL_TRY(iterate(context, rows, columns, x, gram, polynomial, next));
            float *swap = x;
            x = next;
            next = swap;
        }
    }
    float scale = a->learning_rate * 0.2f * sqrtf((float)(rows > columns ? rows : columns));
    apply(a, first, count, scale, x);
    return MIL_OK;
}

mil_status
mil_cpu_muon(mil_context *context, const mil_muon *arguments)
{
    int64_t sum = 0;
    for (int64_t i = 0; i < arguments->part_count; i++) {
        if (arguments->parts[i] < 1) {
            return mil_fail(MIL_ERR_SHAPE, "muon: parts[%lld] = %lld rows; expected at least 1", (long long)i,
                            (long long)arguments->parts[i]);
        }
        sum += arguments->parts[i];
    }
    if (arguments->part_count > 0 && sum != arguments->rows) {
        return mil_fail(MIL_ERR_SHAPE, "muon: the parts have %lld rows together; the matrix has %lld",
                        (long long)sum, (long long)arguments->rows);
    }
    int64_t whole = arguments->rows, count = arguments->part_count > 0 ? arguments->part_count : 1;
    const int64_t *parts = arguments->part_count > 0 ? arguments->parts : &whole;
    for (int64_t i = 0, row = 0; i < count; row += parts[i], i++) {
        mil_arena_mark mark = mil_arena_get_mark(context->scratch);
        mil_status status = update_part(context, arguments, row, parts[i]);
        mil_arena_rewind(context->scratch, mark);
        MIL_TRY(status);
    }
    return MIL_OK;
}
