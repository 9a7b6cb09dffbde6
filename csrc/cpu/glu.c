/* Gated activations of MLPs: y = act(gate) * up, or act(gate) alone; forward and backward.
 *
 *   silu       x s(x),                s(x) = 1 / (1 + exp(-x)),     act' = s + x s (1 - s)
 *   gelu       x F(x),                F the normal distribution,    act' = F + x f,  f its density
 *   gelu_tanh  x (1 + tanh(w)) / 2,   w = sqrt(2 / pi) (x + 0.044715 x^3)
 *   relu       max(x, 0)              relu2  max(x, 0)^2
 *
 * (1 + tanh(w)) / 2 is s(2 w): no difference of nearly equal numbers on the negative side, and s saturates
 * without overflow, since exp = inf gives 0.
 *
 * Backward recomputes the activation from `gate`: one exponential costs less than writing and reading
 * another [rows, width] array.  All operations are elementwise, so neither rows nor threads can
 * change a result.  `value` and `slope` are inlined with a constant activation, so each gets its own
 * vectorised loop.
 */
#include "cpu/cpu.h"
#include "cpu/vector.h"

#include <math.h>

enum { GRAIN = 16384 };

/* F of gelu: for x <= 0 e^(-x^2 / 2) t p(t) with t = 1 / (1 + 0.35 |x|), which keeps its digits far out
 * where 1 + erf has none; p is a polynomial of equal ripples of 3e-8, fitted for |x| < 14, where F leaves
 * the range of floats. */
MIL_INLINE float
normal_distribution(float x)
{
    float t = 1.0f / (1.0f + 0.35f * fabsf(x));
    float p = -0.0291461032f;
    p = mil_fma(p, t, 0.143972546f);
    p = mil_fma(p, t, -0.255716026f);
    p = mil_fma(p, t, 0.159176186f);
    p = mil_fma(p, t, -0.0231112316f);
    p = mil_fma(p, t, 0.105508596f);
    p = mil_fma(p, t, 0.119832717f);
    p = mil_fma(p, t, 0.139861897f);
    p = mil_fma(p, t, 0.139621407f);
    float tail = mil_expf(-0.5f * x * x) * t * p;
    float sign = x > 0.0f ? -1.0f : 1.0f,
          start = x > 0.0f ? 1.0f : 0.0f; /* 1 - tail or tail, without a branch */
    return mil_fma(sign, tail, start);
}

MIL_INLINE float
tanh_gate(float x)
{
    return mil_sigmoidf(2.0f * 0.79788456f * (x + 0.044715f * x * x * x));
}

MIL_INLINE float
value(mil_activation activation, float x)
{
    float positive = x > 0.0f ? x : 0.0f;
    switch (activation) {
        case MIL_SILU:
            return mil_siluf(x);
        case MIL_GELU:
            return x * normal_distribution(x);
        case MIL_GELU_TANH:
            return x * tanh_gate(x);
        case MIL_RELU:
            return positive;
        case MIL_RELU2:
            break;
    }
    return positive * positive;
}

MIL_INLINE float
slope(mil_activation activation, float x)
{
    float gate;
    switch (activation) {
        case MIL_SILU:
            gate = mil_sigmoidf(x);
            return gate + x * gate * (1.0f - gate);
        case MIL_GELU:
            return normal_distribution(x) + x * 0.39894228f * mil_expf(-0.5f * x * x);
        case MIL_GELU_TANH:
            gate = tanh_gate(x);
            return gate + x * gate * (1.0f - gate) * 1.59576912f * (1.0f + 0.134145f * x * x);
        case MIL_RELU:
            return x > 0.0f ? 1.0f : 0.0f;
        case MIL_RELU2:
            break;
    }
    return x > 0.0f ? 2.0f * x : 0.0f;
}

MIL_INLINE void
forward_row(mil_activation activation, int64_t width, const float *gate, const float *up, float *y)
{
    if (up == NULL) {
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            y[i] = value(activation, gate[i]);
        }
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        y[i] = value(activation, gate[i]) * up[i];
    }
}

MIL_INLINE void
backward_row(mil_activation activation, int64_t width, const float *gate, const float *up,
             const float *grad_y, float *grad_gate, float *grad_up)
{
    if (up == NULL) {
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            grad_gate[i] = grad_y[i] * slope(activation, gate[i]);
        }
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        float x = gate[i], grad = grad_y[i];
        grad_gate[i] = grad * up[i] * slope(activation, x);
        grad_up[i] = grad * value(activation, x);
    }
}

MIL_VECTORISE static void
forward_any(mil_activation activation, int64_t width, const float *gate, const float *up, float *y)
{
    switch (activation) {
        case MIL_SILU:
            forward_row(MIL_SILU, width, gate, up, y);
            break;
        case MIL_GELU:
            forward_row(MIL_GELU, width, gate, up, y);
            break;
        case MIL_GELU_TANH:
            forward_row(MIL_GELU_TANH, width, gate, up, y);
            break;
        case MIL_RELU:
            forward_row(MIL_RELU, width, gate, up, y);
            break;
        case MIL_RELU2:
            forward_row(MIL_RELU2, width, gate, up, y);
            break;
    }
}

MIL_VECTORISE static void
backward_any(mil_activation activation, int64_t width, const float *gate, const float *up,
             const float *grad_y, float *grad_gate, float *grad_up)
{
    switch (activation) {
        case MIL_SILU:
            backward_row(MIL_SILU, width, gate, up, grad_y, grad_gate, grad_up);
            break;
        case MIL_GELU:
            backward_row(MIL_GELU, width, gate, up, grad_y, grad_gate, grad_up);
            break;
        case MIL_GELU_TANH:
            backward_row(MIL_GELU_TANH, width, gate, up, grad_y, grad_gate, grad_up);
            break;
        case MIL_RELU:
            backward_row(MIL_RELU, width, gate, up, grad_y, grad_gate, grad_up);
            break;
        case MIL_RELU2:
            backward_row(MIL_RELU2, width, gate, up, grad_y, grad_gate, grad_up);
            break;
    }
}

static mil_status
check_args(const char *name, const mil_glu *a)
{
    if ((unsigned)a->activation > MIL_RELU2) {
        return mil_fail(MIL_ERR_VALUE, "%s: there is no activation %d", name, (int)a->activation);
    }
    return MIL_OK;
}

mil_status
mil_cpu_glu_forward(mil_context *context, const mil_glu *arguments)
{
    const mil_glu a = *arguments;
    MIL_TRY(check_args("glu_forward", &a));
    const float *gate = a.gate, *up = a.up;
#pragma omp parallel for num_threads(context->threads) schedule(static) if (a.rows * a.width >= GRAIN)
    for (int64_t row = 0; row < a.rows; row++) {
        forward_any(a.activation, a.width, gate + row * a.gate_stride,
                    up != NULL ? up + row * a.up_stride : NULL, (float *)a.y + row * a.y_stride);
    }
    return MIL_OK;
}

mil_status
mil_cpu_glu_backward(mil_context *context, const mil_glu_grad *arguments)
{
    const mil_glu_grad a = *arguments;
    const mil_glu f = a.forward;
    MIL_TRY(check_args("glu_backward", &f));
    const float *gate = f.gate, *up = f.up, *grad_y = a.grad_y;
#pragma omp parallel for num_threads(context->threads) schedule(static) if (f.rows * f.width >= GRAIN)
    for (int64_t row = 0; row < f.rows; row++) {
        backward_any(f.activation, f.width, gate + row * f.gate_stride,
                     up != NULL ? up + row * f.up_stride : NULL, grad_y + row * a.grad_y_stride,
                     (float *)a.grad_gate + row * a.grad_gate_stride,
                     up != NULL ? (float *)a.grad_up + row * a.grad_up_stride : NULL);
    }
    return MIL_OK;
}
