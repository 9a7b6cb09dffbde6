/* Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the Hugging Face order.
 *
 * The table holds, for each row at position p and each i < rotary / 2, the pair
 *   cos(p * inv_freq[i]) * scale, sin(p * inv_freq[i]) * scale        table [rows, rotary / 2, 2]
 * with the product rounded to float32 before cos and sin: that is what transformers computes, and a product
 * in double would drift from every published checkpoint at long positions.  One table serves all attention
 * layers of a call, so that the slow functions run rows * rotary / 2 times and not once a layer and head.
 *
 * The rotation turns entry i together with entry i + rotary / 2 of each head:
 *   y[i]              = x[i] cos - x[i + rotary / 2] sin
 *   y[i + rotary / 2] = x[i + rotary / 2] cos + x[i] sin
 * and leaves entries from `rotary` on alone.  It is orthogonal up to `scale`, so backward is the same
 * rotation by the opposite angle.
 */
#include "cpu/cpu.h"

#include <math.h>

/* A table entry costs about as much as GRAIN / TABLE_GRAIN rotated ones. */
enum { GRAIN = 32768, TABLE_GRAIN = 1024 };

static void
fill_row(float *table, const float *inv_freq, int64_t half, float position, float scale)
{
    for (int64_t i = 0; i < half; i++) {
        float angle = position * inv_freq[i];
        table[2 * i] = cosf(angle) * scale;
        table[2 * i + 1] = sinf(angle) * scale;
    }
}

mil_status
mil_cpu_rope_table(mil_context *context, const mil_rope_table *arguments)
{
    const mil_rope_table a = *arguments;
    int64_t half = a.rotary / 2;
    if (a.rotary % 2 != 0) {
        return mil_fail(MIL_ERR_SHAPE, "rope_table: rotary = %lld is not even", (long long)a.rotary);
    }
#pragma omp parallel num_threads(context->threads) if (a.rows.rows * half >= TABLE_GRAIN)
    for (int64_t sequence = 0; sequence < a.rows.sequences; sequence++) {
        int64_t first = a.rows.offsets[sequence], last = a.rows.offsets[sequence + 1];
        int64_t past = a.rows.past != NULL ? a.rows.past[sequence] : 0;
        const float *inv_freq = a.inv_freq + sequence * a.inv_freq_stride;
#pragma omp for schedule(static) nowait
        for (int64_t row = first; row < last; row++) {
            fill_row(a.table + row * a.rotary, inv_freq, half, (float)(past + row - first), a.scale);
        }
    }
    return MIL_OK;
}

static void
rotate_head(float *x, const float *table, int64_t half, float direction)
{
    float *low = x, *high = x + half;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float cosine = table[2 * i], sine = direction * table[2 * i + 1];
        float first = low[i], second = high[i];
        low[i] = first * cosine - second * sine;
        high[i] = second * cosine + first * sine;
    }
}

mil_status
mil_cpu_rope(mil_context *context, const mil_rope *arguments)
{
    const mil_rope a = *arguments;
    if (a.rotary % 2 != 0 || a.rotary > a.head_dim) {
        return mil_fail(MIL_ERR_SHAPE, "rope: rotary = %lld is not an even number up to head_dim = %lld",
                        (long long)a.rotary, (long long)a.head_dim);
    }
    float direction = a.inverse ? -1.0f : 1.0f;
#pragma omp parallel for num_threads(context->threads) \
    schedule(static) if (a.rows * a.heads * a.rotary >= GRAIN)
    for (int64_t row = 0; row < a.rows; row++) {
        const float *table = a.table + row * a.rotary;
        float *x = (float *)a.x + row * a.x_stride;
        for (int64_t head = 0; head < a.heads; head++) {
            rotate_head(x + head * a.head_dim, table, a.rotary / 2, direction);
        }
    }
    return MIL_OK;
}
