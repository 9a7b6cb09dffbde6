/* mil_settle as device.h describes it, in plain C: what a played device does, and what CUDA's is compared with. */
#ifndef MIL_TEST_SETTLE_H
#define MIL_TEST_SETTLE_H

#include "device.h"

/* One text. */
static inline void
settle_text(const mil_settle *s, int64_t i)
{
    int64_t width = s->drafts + 1, columns = s->sequences + 1, count = s->position[i];
    int64_t accepted = s->accepted[i], next = count + accepted + 1, left = s->end[i] - next - 1;
    const int32_t *verdict = s->verdict + i * width;
    int32_t *history = s->history + (*s->rounds * s->sequences + i) * (width + 2),
            last = s->tokens[i * width];
    history[0] = s->drafted[i];
    history[1] = (int32_t)accepted;
    for (int64_t j = 0; j <= accepted; j++) {
        history[2 + j] = verdict[j];
        s->failed[i] |= s->bad[i * width + j];
        s->barred[i] |= verdict[j] >= s->draft_vocab;
        if (s->texts != NULL) {
            s->texts[i * s->texts_stride + count + j] = verdict[j];
        }
    }
    int64_t most = s->barred[i] ? 0 : s->wanted[i] < s->drafts ? s->wanted[i] : s->drafts;
    s->drafted[i] = (int32_t)(left < 0 ? 0 : left < most ? left : most);
    for (int64_t j = 0; j < s->drafts; j++) {
        s->position[j * s->sequences + i] = next + j;
    }
    s->tokens[i * width] = verdict[accepted];
    s->rows[2 * columns + i] = mil_boundary_after(s->rows[columns + i], width);
    s->rows[columns + i] = next - 1;
    for (int64_t j = 0; j < s->drafts && s->draft_rows != NULL; j++) {
        int64_t *rows = s->draft_rows + j * 3 * columns;
        rows[columns + i] = j == 0 ? next - 2 : next + j - 1;
        rows[2 * columns + i] =
            j == 0 ? mil_boundary_after(count - 2, 1) : mil_boundary_after(next - 2, 1) + MIL_HOLD;
    }
    if (s->draft_tokens != NULL) {
        int32_t before = accepted > 0 ? verdict[accepted - 1] : last,
                most_known = (int32_t)s->draft_vocab - 1;
        s->draft_tokens[2 * i] = before < most_known ? before : most_known;
        s->draft_tokens[2 * i + 1] = verdict[accepted] < most_known ? verdict[accepted] : most_known;
    }
}

static inline void
settle(const mil_settle *s)
{
    for (int64_t i = 0; i < s->sequences; i++) {
        settle_text(s, i);
    }
    *s->rounds += 1;
}

#endif
