/* Reads memory as fast as a thread can: several streams a buffer, each asked for ahead, summed and no more.
 *
 * One stream leaves a core waiting at every page, where the hardware's own prefetch starts anew; a product
 * of many weight rows has as many streams. Compiled by memory.py with the system's C compiler.
 */
#include <stddef.h>
#include <stdint.h>

enum { LINE = 64, AHEAD = 1024, MAX_STREAMS = 16 };

typedef uint64_t line __attribute__((vector_size(LINE), may_alias));

/* Sum of the 64-bit numbers in `streams` (1 to 16) equal parts of `bytes` at a multiple of 64, so that nothing
 * is left out by the compiler. */
uint64_t
read_streams(const char *from, size_t bytes, int streams)
{
    const size_t share = bytes / (size_t)streams / LINE * LINE;
    line sums[MAX_STREAMS] = {{0}};
    for (size_t at = 0; at < share; at += LINE) {
        for (int s = 0; s < streams; s++) {
            const char *next = from + (size_t)s * share + at;
            __builtin_prefetch(next + AHEAD);
            sums[s] += *(const line *)next;
        }
    }
    uint64_t total = 0;
    for (int s = 0; s < streams; s++) {
        for (int i = 0; i < LINE / 8; i++) {
            total += sums[s][i];
        }
    }
    return total;
}
