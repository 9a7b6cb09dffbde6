/* Prompt lookup: drafts without a draft model (Saxena 2023, "Prompt lookup decoding").
 *
 * Answers quote: code that is edited, documents that are summarised, JSON keys, names.  Where the text's
 * last n tokens have occurred before, what followed then is proposed now.  Longer suffixes are surer, so
 * the longest match wins, and of equally long ones the latest.  One backward scan of the text finds it; at
 * 100 k tokens that is less than a thousandth of one pass of a model worth speculating for.
 */
#include "decode/decode.h"

/* Tokens before `end` that agree with those before `count`, at most `longest`. */
static int64_t
common_suffix(const int32_t *tokens, int64_t end, int64_t count, int64_t longest)
{
    int64_t length = 0;
    while (length < longest && length < end && tokens[end - 1 - length] == tokens[count - 1 - length]) {
        length++;
    }
    return length;
}

int64_t
mil_ngram_propose(const int32_t *tokens, int64_t count, int64_t longest, int64_t shortest, int64_t wanted,
                  int32_t *out)
{
    int64_t best = 0, best_end = 0;
    for (int64_t end = count - 1; end >= shortest && best < longest; end--) {
        int64_t length = common_suffix(tokens, end, count, longest);
        if (length > best) {
            best = length;
            best_end = end;
        }
    }
    if (best < shortest) {
        return 0;
    }
    for (int64_t i = 0; i < wanted; i++) {
        /* A match that runs into the end of the text goes on with the proposals themselves: a loop. */
        int64_t at = best_end + i;
        out[i] = at < count ? tokens[at] : out[at - count];
    }
    return wanted;
}
