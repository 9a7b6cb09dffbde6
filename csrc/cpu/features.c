/* Processor detection by cpuid and xgetbv (Intel SDM volume 1, chapters 13 to 15 and 18).
 *
 * An instruction set counts only where the operating system also saves its registers, which XCR0 tells.
 * Linux hands out AMX's 8 KiB of tile registers on request, once a process, for all of its threads.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* syscall */
#endif

#include "cpu/features.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static const char *const names[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};
enum { LEVELS = sizeof names / sizeof names[0] };
static const char *const orders[] = {"side-by-side", "in-order"};
enum { ORDERS = sizeof orders / sizeof orders[0] };

#if defined(__x86_64__)

static bool
bit(uint32_t word, int index)
{
    return (word >> index & 1u) != 0;
}

/* XCR0: which register files the operating system saves. */
static uint32_t
saved_registers(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static bool
tiles_permitted(void)
{
#if defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* arch_prctl(ARCH_REQ_XCOMP_PERM) */
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

/* Tiles are asked for only where `wanted` allows them. */
static mil_cpu_level
detect(mil_cpu_level wanted)
{
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) {
        return MIL_CPU_PORTABLE;
    }
    bool os_saves = bit(c, 27), fma = bit(c, 12), avx = bit(c, 28), f16c = bit(c, 29);
    if (!os_saves || !avx || !fma || !f16c || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        return MIL_CPU_PORTABLE;
    }
    uint32_t leaves = a, saved = saved_registers();
    bool avx2 = bit(b, 5);
    bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31); /* F, DQ, BW, VL */
    bool amx = bit(d, 24) && bit(d, 22); /* tiles, and their bfloat16 product */
    if (!avx2 || (saved & 0x06u) != 0x06u) {
        return MIL_CPU_PORTABLE;
    }
    if (!avx512 || (saved & 0xe6u) != 0xe6u) {
        return MIL_CPU_AVX2;
    }
    if (leaves < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !bit(a, 5)) {
        return MIL_CPU_AVX512;
    }
    if (!amx || (saved & 0x60000u) != 0x60000u || wanted < MIL_CPU_AMX || !tiles_permitted()) {
        return MIL_CPU_AVX512BF16;
    }
    return MIL_CPU_AMX;
}

#else

static mil_cpu_level
detect(mil_cpu_level wanted)
{
    (void)wanted;
    return MIL_CPU_PORTABLE;
}

#endif

/* Which of `count` words an environment variable holds, or `count` where it is unset or senseless. */
static int
find_setting(const char *variable, const char *const *words, int count)
{
    const char *text = getenv(variable);
    int found = 0;
    while (text != NULL && found < count && strcmp(text, words[found]) != 0) {
        found++;
    }
    return text == NULL ? count : found;
}

mil_cpu_level
mil_cpu_get_level(void)
{
    static atomic_int known = -1; /* two threads that race here find the same */
    int level = atomic_load_explicit(&known, memory_order_relaxed);
    if (level < 0) {
        int cap = find_setting("MAMBAINLLAMA_CPU", names, LEVELS);
        mil_cpu_level wanted = cap < LEVELS ? (mil_cpu_level)cap : MIL_CPU_AMX;
        mil_cpu_level best = detect(wanted);
        level = (int)(best < wanted ? best : wanted);
        atomic_store_explicit(&known, level, memory_order_relaxed);
    }
    return (mil_cpu_level)level;
}

const char *
mil_cpu_level_name(mil_cpu_level level)
{
    return names[level];
}

/* Whether cpuid names AMD. */
static bool
made_by_amd(void)
{
#if defined(__x86_64__)
    uint32_t a = 0, b = 0, c = 0, d = 0; /* gcc cannot see that they are set */
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx && c == signature_AMD_ecx &&
           d == signature_AMD_edx;
#else
    return false;
#endif
}

bool
mil_cpu_reads_in_order(void)
{
    static atomic_int known = -1;
    int order = atomic_load_explicit(&known, memory_order_relaxed);
    if (order < 0) {
        order = find_setting("MAMBAINLLAMA_CPU_READS", orders, ORDERS);
        order = order < ORDERS ? order : made_by_amd();
        atomic_store_explicit(&known, order, memory_order_relaxed);
    }
    return order != 0;
}

static mil_status
check_setting(const char *variable, const char *const *words, int count, const char *list)
{
    const char *text = getenv(variable);
    if (text != NULL && *text != '\0' && find_setting(variable, words, count) == count) {
        return mil_fail(MIL_ERR_VALUE, "%s: \"%.40s\" is not one of %s", variable, text, list);
    }
    return MIL_OK;
}

mil_status
mil_cpu_check_settings(void)
{
    MIL_TRY(check_setting("MAMBAINLLAMA_CPU", names, LEVELS, "portable, avx2, avx512, avx512bf16, amx"));
    return check_setting("MAMBAINLLAMA_CPU_READS", orders, ORDERS, "side-by-side, in-order");
}
