/* Hopper's tensor core instruction (PTX wgmma): four warps multiply 64 rows by tiles in shared memory, in
 * the background.
 *
 * Tiles lie as panels of 64 columns: rows of 128 bytes, whose chunk c of 16 bytes is at place c ^ (row %
 * 8), panels one after another, each at a multiple of 1024 bytes.  A left factor lies with its depth along
 * the rows of the panel, a right factor [N, depth] likewise, and a right factor [depth, N] as it is
 * (`transposed`).
 *
 * The accumulators of an instruction under way must not be touched before wgmma_wait, nor its factors'
 * memory; the registers of a left factor neither.  Memory written by ordinary stores or cp.async is shown
 * to the unit by wgmma_publish in the writing threads before a barrier.
 */
#ifndef MIL_KERNELS_WGMMA_CUH
#define MIL_KERNELS_WGMMA_CUH

#include "phase.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MIL_HAS_WGMMA 1
#else
#define MIL_HAS_WGMMA 0
#endif

/* The byte place of chunk `chunk` of row `row` in a tile of ROWS rows. */
template <int ROWS>
static __device__ __forceinline__ uint32_t
panel_place(int row, int chunk)
{
    return (uint32_t)(chunk / 8 * ROWS * 128 + row * 128 + (((chunk ^ row) & 7) << 4));
}

/* What an instruction is told of a factor at `address`: 128-byte swizzle, 1024 bytes from eight rows to the
 * next eight, and from a panel to the next (used by transposed factors only) `panel` bytes. */
static __device__ __forceinline__ uint64_t
wgmma_factor(uint32_t address, uint32_t panel)
{
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(panel >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}

static __device__ __forceinline__ void
wgmma_publish()
{
    phase_publish();
}

/* Before instructions whose registers (accumulators, left factors) other code has written. */
static __device__ __forceinline__ void
wgmma_begin()
{
#if MIL_HAS_WGMMA
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

static __device__ __forceinline__ void
wgmma_commit()
{
#if MIL_HAS_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/* Keeps the compiler from using or moving accumulators across this place. */
template <int N>
static __device__ __forceinline__ void
wgmma_hold(float (&c)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+f"(c[i])::"memory");
    }
}

/* Waits until at most GROUPS committed groups are under way; c are accumulators that are complete then. */
template <int GROUPS, int N>
static __device__ __forceinline__ void
wgmma_wait(float (&c)[N])
{
#if MIL_HAS_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
#endif
    wgmma_hold(c);
}

/* ---- registers and barriers of groups of four warps -------------------------------------------------- */

/* A group's share of the registers grows or shrinks to COUNT a thread; all of its warps say so. */
template <int COUNT>
static __device__ __forceinline__ void
group_take_registers()
{
#if MIL_HAS_WGMMA
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

template <int COUNT>
static __device__ __forceinline__ void
group_give_registers()
{
#if MIL_HAS_WGMMA
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

/* Named barriers 1 to 15: `threads` meet, those that only announce themselves go on. */
static __device__ __forceinline__ void
barrier_meet(int barrier, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

static __device__ __forceinline__ void
barrier_announce(int barrier, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/* A panel of the array that `map` (a CUtensorMap) describes, from (row, column) on, in the background; zeros where there is
 * nothing. The barrier counts its bytes, which need no publishing. ONCE: nothing reads them again soon, so they leave the
 * second-level cache first. */
template <bool ONCE = false>
static __device__ __forceinline__ void
copy_panel(void *to, const void *map, int column, int row, uint64_t *barrier)
{
#if MIL_HAS_WGMMA
    uint32_t at = (uint32_t)__cvta_generic_to_shared(to), meet = (uint32_t)__cvta_generic_to_shared(barrier);
    if constexpr (ONCE) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(at),
            "l"(map), "r"(column), "r"(row), "r"(meet), "l"(FORGET_FIRST)
            : "memory");
    }
    else {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%2, %3}], [%4];" ::"r"(at),
            "l"(map), "r"(column), "r"(row), "r"(meet)
            : "memory");
    }
#else
    (void)to, (void)map, (void)column, (void)row, (void)barrier;
#endif
}

/* ---- instructions ------------------------------------------------------------------------------------ */

/* Register lists of 4, 8, 16, 32, 64 and 128 accumulators, for text and for operands. */
#define WGMMA_TEXT_4 "%0, %1, %2, %3"
#define WGMMA_TEXT_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_TEXT_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_TEXT_32 \
    WGMMA_TEXT_16     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_TEXT_64                                                                                        \
    WGMMA_TEXT_32                                                                                            \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, "                                                                                                  \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_TEXT_128                                                                                       \
    WGMMA_TEXT_64                                                                                            \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
    "%84, "                                                                                                  \
    "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, "    \
    "%104, "                                                                                                 \
    "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, " \
    "%122, "                                                                                                 \
    "%123, %124, %125, %126, %127"
#define WGMMA_4_FROM(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define WGMMA_4(c) WGMMA_4_FROM(c, 0)
#define WGMMA_8(c) WGMMA_4_FROM(c, 0), WGMMA_4_FROM(c, 4)
#define WGMMA_16_FROM(c, i) \
    WGMMA_4_FROM(c, i), WGMMA_4_FROM(c, i + 4), WGMMA_4_FROM(c, i + 8), WGMMA_4_FROM(c, i + 12)
#define WGMMA_16(c) WGMMA_16_FROM(c, 0)
#define WGMMA_32(c) WGMMA_16(c), WGMMA_16_FROM(c, 16)
#define WGMMA_64(c) WGMMA_32(c), WGMMA_16_FROM(c, 32), WGMMA_16_FROM(c, 48)
#define WGMMA_128(c) \
    WGMMA_64(c), WGMMA_16_FROM(c, 64), WGMMA_16_FROM(c, 80), WGMMA_16_FROM(c, 96), WGMMA_16_FROM(c, 112)

/* COUNT accumulators are N = 2 * COUNT columns; A0 .. are the numbers of the operands after them. */
#define WGMMA_SHARED_OF(TYPE, COUNT, N, A, B, P)                                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P                                                 \
                 ", 0;\n"                                                                               \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" WGMMA_TEXT_##COUNT \
                 "}, %" A ", %" B ", p, 1, 1, 0, 0;\n}"                                                 \
                 : WGMMA_##COUNT(c)                                                                     \
                 : "l"(a), "l"(b), "r"(add)                                                             \
                 : "memory")
#define WGMMA_REGISTERS_OF(TYPE, COUNT, N, A0, A1, A2, A3, B)                                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" WGMMA_TEXT_##COUNT \
                 "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B ", 1, 1, 1, 1;"                         \
                 : WGMMA_##COUNT(c)                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                   \
                 : "memory")

template <typename T>
constexpr bool wgmma_is_half = false;
template <>
constexpr bool wgmma_is_half<__half> = true;

/* Of type T. */
#define WGMMA_OF(FORM, ...)                         \
    do {                                            \
        if constexpr (wgmma_is_half<T>) {           \
            WGMMA_##FORM##_OF("f16", __VA_ARGS__);  \
        }                                           \
        else {                                      \
            WGMMA_##FORM##_OF("bf16", __VA_ARGS__); \
        }                                           \
    } while (0)

/* c [64, N] (+)= a [64, 16] b [N, 16]^T, both in shared memory; c has N / 2 values a thread, added to where
 * `add`. */
template <typename T, int COUNT>
static __device__ __forceinline__ void
wgmma_shared(float (&c)[COUNT], uint64_t a, uint64_t b, int add)
{
#if MIL_HAS_WGMMA
    static_assert(COUNT == 4 || COUNT == 8 || COUNT == 16 || COUNT == 32 || COUNT == 64,
                  "8, 16, 32, 64 or 128 columns");
    if constexpr (COUNT == 4) {
        WGMMA_OF(SHARED, 4, "8", "4", "5", "6");
    }
    else if constexpr (COUNT == 8) {
        WGMMA_OF(SHARED, 8, "16", "8", "9", "10");
    }
    else if constexpr (COUNT == 16) {
        WGMMA_OF(SHARED, 16, "32", "16", "17", "18");
    }
    else if constexpr (COUNT == 32) {
        WGMMA_OF(SHARED, 32, "64", "32", "33", "34");
    }
    else {
        WGMMA_OF(SHARED, 64, "128", "64", "65", "66");
    }
#else
    (void)c, (void)a, (void)b, (void)add;
#endif
}

/* c [64, N] += a [64, 16] b [16, N], a in registers (as mma.sync's m16k16 in each warp), b transposed in
 * shared memory. */
template <typename T, int COUNT>
static __device__ __forceinline__ void
wgmma_registers(float (&c)[COUNT], const uint32_t (&a)[4], uint64_t b)
{
#if MIL_HAS_WGMMA
    static_assert(COUNT == 32 || COUNT == 64 || COUNT == 128, "64, 128 or 256 columns");
    if constexpr (COUNT == 32) {
        WGMMA_OF(REGISTERS, 32, "64", "32", "33", "34", "35", "36");
    }
    else if constexpr (COUNT == 64) {
        WGMMA_OF(REGISTERS, 64, "128", "64", "65", "66", "67", "68");
    }
    else {
        WGMMA_OF(REGISTERS, 128, "256", "128", "129", "130", "131", "132");
    }
#else
    (void)c, (void)a, (void)b;
#endif
}

#endif
