/* What this processor can do, found once at run time.
 *
 * Levels are ordered: each includes those before it.  MAMBAINLLAMA_CPU=portable|avx2|avx512|avx512bf16|amx
 * caps the level; a level that the processor lacks falls to the best one that it has.
 * MAMBAINLLAMA_CPU_READS=in-order|side-by-side says how weights are read, which is the processor's to choose otherwise.
 */
#ifndef MIL_CPU_FEATURES_H
#define MIL_CPU_FEATURES_H

#include <stdbool.h>

#include "base/status.h"

typedef enum mil_cpu_level {
    MIL_CPU_PORTABLE = 0,   /* plain C; SSE2 or NEON by the compiler's own doing */
    MIL_CPU_AVX2 = 1,       /* with FMA and F16C */
    MIL_CPU_AVX512 = 2,     /* F, BW, VL, DQ */
    MIL_CPU_AVX512BF16 = 3, /* vdpbf16ps */
    MIL_CPU_AMX = 4,        /* tiles of bfloat16, with the kernel's permission */
} mil_cpu_level;

/* The level in use: the processor's, capped by MAMBAINLLAMA_CPU as it was at the first call. */
mil_cpu_level
mil_cpu_get_level(void);

/* "portable", "avx2", … as in MAMBAINLLAMA_CPU. */
const char *
mil_cpu_level_name(mil_cpu_level level);

/* Whether a thread reads memory fastest in one stream of ascending addresses, as on AMD's processors, rather than in
 * several side by side (docs/performance-log.md). */
bool
mil_cpu_reads_in_order(void);

/* Fails where MAMBAINLLAMA_CPU or MAMBAINLLAMA_CPU_READS holds nothing that is known; it is ignored otherwise. */
mil_status
mil_cpu_check_settings(void) MIL_MUST_CHECK;

#endif
