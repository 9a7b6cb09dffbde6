/* Where one sequence's tokens are in a mixer call, and how its tails move on afterwards.
 *
 * A tail array holds rows of tokens; token t is row t - boundary + lead, where lead is conv_width - 1 for
 * the convolution's inputs, else 0.  A call starts with `boundary` and leaves `after` (mil_boundary_after):
 *
 *   before   | lead | boundary .......... past |            rows of this call: past .. past + count
 *   after                     | lead | after ............ past + count |
 *
 * Operators read the old tail and these rows while they compute, and move the tail at the end.
 */
#ifndef MIL_CPU_TAIL_H
#define MIL_CPU_TAIL_H

#include <string.h>

#include "device.h"

typedef struct mil_span {
    int64_t row, count; /* first row and number of rows of this call */
    int64_t past, boundary,
        after; /* tokens before the rows; in the states on entry; in the states on return */
} mil_span;

static inline mil_span
mil_get_span(const mil_rows *rows, int64_t sequence)
{
    mil_span span = {.row = rows->offsets[sequence]};
    span.count = rows->offsets[sequence + 1] - span.row;
    span.past = rows->past != NULL ? rows->past[sequence] : 0;
    int64_t boundary = rows->boundary != NULL ? rows->boundary[sequence] : 0;
    bool held = boundary % MIL_WINDOW == MIL_HOLD;
    span.boundary = held ? boundary - MIL_HOLD : boundary;
    span.after = held ? span.boundary : mil_boundary_after(span.past, span.count);
    return span;
}

/* Moves columns [column, column + columns) of a tail of `width` columns from span->boundary to span->after.
 * New rows come from `source`, whose row 0 is token `source_token`, and begin at its column 0. */
static inline void
mil_tail_move(float *tail, int64_t width, int64_t lead, int64_t column, int64_t columns, const mil_span *span,
              const float *source, int64_t source_stride, int64_t source_token)
{
    int64_t first = span->after - lead, shift = span->after - span->boundary;
    size_t bytes = (size_t)columns * sizeof(float);
    for (int64_t token = first; shift > 0 && token < span->past; token++) {
        float *to = tail + (token - first) * width + column;
        memcpy(to, to + shift * width, bytes); /* rows downwards, so none is overwritten before it moved */
    }
    for (int64_t token = first > span->past ? first : span->past; token < span->past + span->count; token++) {
        memcpy(tail + (token - first) * width + column, source + (token - source_token) * source_stride,
               bytes);
    }
}

/* The part of mil_rows that every mixer checks. */
static inline mil_status
mil_check_rows(const char *name, const mil_rows *rows, bool has_states)
{
    if (rows->sequences < 1 || rows->offsets == NULL || rows->offsets[0] != 0 ||
        rows->offsets[rows->sequences] != rows->rows) {
        return mil_fail(MIL_ERR_SHAPE, "%s: offsets do not lead from 0 to rows = %lld in %lld sequences",
                        name, (long long)rows->rows, (long long)rows->sequences);
    }
    for (int64_t i = 0; i < rows->sequences; i++) {
        mil_span span = mil_get_span(rows, i);
        if (span.count < 0) {
            return mil_fail(MIL_ERR_SHAPE, "%s: offsets[%lld] is greater than the next", name, (long long)i);
        }
        if (!has_states && (span.past != 0 || span.boundary != 0)) {
            return mil_fail(MIL_ERR_VALUE, "%s: past[%lld] = %lld, but no states are given", name,
                            (long long)i, (long long)span.past);
        }
        if (span.boundary % MIL_WINDOW != 0 || span.boundary > span.past ||
            span.past - span.boundary >= MIL_TAIL ||
            (span.after == span.boundary && span.past + span.count - span.boundary >= MIL_TAIL)) {
            return mil_fail(
                MIL_ERR_VALUE,
                "%s: boundary[%lld] = %lld; expected a multiple of %d, at most past = %lld and less "
                "than %d behind it",
                name, (long long)i, (long long)span.boundary, MIL_WINDOW, (long long)span.past, MIL_TAIL);
        }
    }
    return MIL_OK;
}

#endif
