/* For tests of CUDA operators: the same inputs through the CPU's table and through CUDA's, and a comparison.
 *
 * A test program is one file with a main() that calls CHECK-ing functions for each activation type:
 *
 *     static void test_glu(harness *h, ...)
 *     {
 *         harness_array gate = harness_random(h, rows * width, 1.0f);     // rounded to the activation type
 *         harness_array y = harness_empty(h, rows * width);               // poisoned with NaN on the device
 *         mil_glu a = {...};
 *         a.gate = gate.cpu; ...  harness_check(h, mil_cpu_ops.glu_forward(&h->cpu, &a));
 *         a.gate = gate.gpu; ...  harness_check(h, h->gpu.ops->glu_forward(&h->gpu, &a));
 *         harness_compare(h, "glu 7 x 33", y, tolerance);
 *     }
 *
 * Arrays live until harness_reset.  A failure prints one line and counts; harness_end returns the exit status.
 * MIL_GPU_PART=2/4 in the environment runs every fourth case, from the second on: under compute-sanitizer a
 * whole program would take too long in one process.
 */
#ifndef MIL_TESTS_GPU_HARNESS_H
#define MIL_TESTS_GPU_HARNESS_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.cuh"
#include "table.h"

#define HARNESS_MOST 4096

typedef struct harness_array {
    float *cpu; /* [count] float32 */
    void *gpu;  /* [count] of `dtype` */
    mil_dtype dtype;
    int64_t count;
} harness_array;

typedef struct harness {
    mil_dtype act;
    mil_context cpu, gpu;
    mil_arena cpu_scratch, cpu_host, gpu_scratch, gpu_host;
    mil_allocator allocator;
    harness_array arrays[HARNESS_MOST];
    int array_count;
    uint64_t random;
    int checks, failures, cases;
} harness;

static void *
harness_gpu_alloc(void *owner, size_t bytes)
{
    mil_context context = {};
    void *memory;
    context.ops = (const mil_ops *)owner;
    return context.ops->alloc(&context, bytes, &memory) == MIL_OK ? memory : NULL;
}

static void
harness_gpu_free(void *owner, void *memory)
{
    mil_context context = {};
    context.ops = (const mil_ops *)owner;
    context.ops->free(&context, memory);
}

/* Stops the program where the device itself does not work. */
static void
harness_need(mil_status status)
{
    if (status != MIL_OK) {
        printf("FAILED: %s\n", mil_message());
        exit(1);
    }
}

static inline void
harness_begin(harness *h, mil_dtype act)
{
    int checks = h->checks, failures = h->failures, cases = h->cases;
    setvbuf(stdout, NULL, _IOLBF, 0); /* a program that is stopped has told what it found */
    memset(h, 0, sizeof *h);
    h->checks = checks;
    h->failures = failures;
    h->cases = cases;
    h->act = act;
    h->random = 88172645463325252u;
    const mil_ops *ops;
    harness_need(mil_cuda_table(act, 0, &ops));
    h->allocator.alloc = harness_gpu_alloc;
    h->allocator.free = harness_gpu_free;
    h->allocator.owner = (void *)ops;
    h->gpu_scratch.allocator = &h->allocator;
    h->cpu.ops = &mil_cpu_ops;
    h->cpu.scratch = &h->cpu_scratch;
    h->cpu.host = &h->cpu_host;
    const char *threads = getenv("OMP_NUM_THREADS");
    h->cpu.threads = threads != NULL && atoi(threads) > 0 ? atoi(threads) : 8;
    h->gpu.ops = ops;
    h->gpu.scratch = &h->gpu_scratch;
    h->gpu.host = &h->gpu_host;
    h->gpu.threads = 1;
    harness_need(ops->open(&h->gpu));
}

/* Whether the next case belongs to this process's part. */
static inline bool
harness_turn(harness *h)
{
    const char *part = getenv("MIL_GPU_PART");
    int mine = 1, parts = 1, at = h->cases++;
    if (part != NULL && (sscanf(part, "%d/%d", &mine, &parts) != 2 || parts < 1 || mine < 1)) {
        printf("MIL_GPU_PART=%s: give it as part/parts, such as 2/4\n", part);
        exit(1);
    }
    return at % parts == mine - 1;
}

/* Uniform in [-1, 1), with the low bits of float32 in use. */
static inline float
harness_uniform(harness *h)
{
    h->random ^= h->random << 13;
    h->random ^= h->random >> 7;
    h->random ^= h->random << 17;
    return (float)((double)(h->random >> 11) * 0x1p-52 - 1.0);
}

static inline float
harness_rounded(mil_dtype dtype, float x)
{
    return dtype == MIL_BF16  ? mil_bf16_to_float(mil_float_to_bf16(x))
           : dtype == MIL_F16 ? mil_f16_to_float(mil_float_to_f16(x))
                              : x;
}

static inline harness_array *
harness_new(harness *h, int64_t count, mil_dtype dtype)
{
    if (h->array_count == HARNESS_MOST) {
        printf("FAILED: more than %d arrays\n", HARNESS_MOST);
        exit(1);
    }
    harness_array *a = &h->arrays[h->array_count++];
    a->count = count;
    a->dtype = dtype;
    a->cpu = (float *)calloc((size_t)count + 1, sizeof(float));
    harness_need(h->gpu.ops->alloc(&h->gpu, (size_t)(count + 1) * mil_dtype_size(dtype), &a->gpu));
    return a;
}

/* The CPU's values, rounded to the array's type in place, onto the device. */
static inline void
harness_upload(harness *h, harness_array *a)
{
    size_t size = mil_dtype_size(a->dtype);
    void *packed = malloc((size_t)a->count * size + 1);
    for (int64_t i = 0; i < a->count; i++) {
        if (a->dtype == MIL_F32) {
            ((float *)packed)[i] = a->cpu[i];
        }
        else {
            uint16_t bits = a->dtype == MIL_BF16 ? mil_float_to_bf16(a->cpu[i]) : mil_float_to_f16(a->cpu[i]);
            ((uint16_t *)packed)[i] = bits;
            a->cpu[i] = harness_rounded(a->dtype, a->cpu[i]);
        }
    }
    harness_need(h->gpu.ops->copy(&h->gpu, a->gpu, packed, (size_t)a->count * size));
    harness_need(h->gpu.ops->finish(&h->gpu));
    free(packed);
}

/* The device's values as float32, malloc'ed. */
static inline float *
harness_download(harness *h, const harness_array *a)
{
    size_t size = mil_dtype_size(a->dtype);
    char *packed = (char *)malloc((size_t)a->count * size + 1);
    float *values = (float *)malloc((size_t)a->count * sizeof(float) + 1);
    harness_need(h->gpu.ops->copy(&h->gpu, packed, a->gpu, (size_t)a->count * size));
    for (int64_t i = 0; i < a->count; i++) {
        if (a->dtype == MIL_F32) {
            memcpy(&values[i], packed + i * 4, 4);
        }
        else {
            uint16_t bits;
            memcpy(&bits, packed + i * 2, 2);
            values[i] = a->dtype == MIL_BF16 ? mil_bf16_to_float(bits) : mil_f16_to_float(bits);
        }
    }
    free(packed);
    return values;
}

/* Uniform in [-scale, scale), of any element type. */
static inline harness_array
harness_random_of(harness *h, int64_t count, float scale, mil_dtype dtype)
{
    harness_array *a = harness_new(h, count, dtype);
    for (int64_t i = 0; i < count; i++) {
        a->cpu[i] = scale * harness_uniform(h);
    }
    harness_upload(h, a);
    return *a;
}

/* Of the activation type. */
static inline harness_array
harness_random(harness *h, int64_t count, float scale)
{
    return harness_random_of(h, count, scale, h->act);
}

/* An output of the activation type: zeros on the CPU, NaN on the device. */
static inline harness_array
harness_empty_of(harness *h, int64_t count, mil_dtype dtype)
{
    harness_array *a = harness_new(h, count, dtype);
    for (int64_t i = 0; i < count; i++) {
        a->cpu[i] = NAN;
    }
    harness_upload(h, a);
    memset(a->cpu, 0, (size_t)count * sizeof(float));
    return *a;
}

static inline harness_array
harness_empty(harness *h, int64_t count)
{
    return harness_empty_of(h, count, h->act);
}

/* float32 zeros on both: states. */
static inline harness_array
harness_zeros(harness *h, int64_t count)
{
    harness_array *a = harness_new(h, count, MIL_F32);
    harness_upload(h, a);
    return *a;
}

/* Raw bytes on the device (tokens, offsets); lives until harness_reset. */
static inline const void *
harness_bytes(harness *h, const void *from, size_t bytes)
{
    harness_array *a = harness_new(h, (int64_t)(bytes + 3) / 4, MIL_F32);
    harness_need(h->gpu.ops->copy(&h->gpu, a->gpu, from, bytes));
    harness_need(h->gpu.ops->finish(&h->gpu));
    return a->gpu;
}

/* Rows of sequences with the device's copy; past and boundary may be NULL. The arrays are the caller's. */
static inline mil_rows
harness_rows(harness *h, int64_t sequences, const int64_t *offsets, const int64_t *past,
             const int64_t *boundary)
{
    int64_t columns = sequences + 1;
    int64_t *numbers = (int64_t *)calloc((size_t)(3 * columns), sizeof *numbers);
    memcpy(numbers, offsets, (size_t)columns * sizeof *numbers);
    if (past != NULL) {
        memcpy(numbers + columns, past, (size_t)sequences * sizeof *numbers);
        memcpy(numbers + 2 * columns, boundary, (size_t)sequences * sizeof *numbers);
    }
    mil_rows rows = {};
    rows.rows = offsets[sequences];
    rows.sequences = sequences;
    rows.offsets = offsets;
    rows.past = past;
    rows.boundary = boundary;
    rows.device = (const int64_t *)harness_bytes(h, numbers, (size_t)(3 * columns) * sizeof *numbers);
    free(numbers);
    return rows;
}

static inline void
harness_check(harness *h, mil_status status)
{
    h->checks++;
    if (status != MIL_OK) {
        h->failures++;
        printf("FAILED: %s\n", mil_message());
    }
}

static inline const char *
harness_act_name(const harness *h)
{
    return mil_dtype_name(h->act);
}

/* The device's array against the CPU's: largest difference relative to the largest value. */
static inline double
harness_compare(harness *h, const char *what, harness_array a, double tolerance)
{
    float *values = harness_download(h, &a);
    double largest = 0, worst = 0;
    int64_t at = 0, wrong = 0;
    for (int64_t i = 0; i < a.count; i++) {
        double difference = fabs((double)values[i] - (double)a.cpu[i]);
        bool same_nan = isnan(values[i]) && isnan(a.cpu[i]);
        largest = fmax(largest, fabs((double)a.cpu[i]));
        if (!same_nan && !(difference <= worst)) {
            worst = isnan(difference) ? INFINITY : difference;
            at = i;
        }
        wrong += !same_nan && isnan(values[i]);
    }
    double error = largest > 0 ? worst / largest : worst;
    if (getenv("HARNESS_VERBOSE") != NULL) {
        printf("%s %s: %.3g\n", harness_act_name(h), what, error);
    }
    h->checks++;
    if (!(error <= tolerance)) {
        h->failures++;
        printf(
            "FAILED: %s %s: off by %.3g of the largest (allowed %.3g) at %lld of %lld: %.9g, expected %.9g; "
            "%lld NaN\n",
            harness_act_name(h), what, error, tolerance, (long long)at, (long long)a.count,
            (double)values[at], (double)a.cpu[at], (long long)wrong);
    }
    free(values);
    return error;
}

/* Two device arrays, bit for bit, over `count` elements from the given places. */
static inline void
harness_same_bits(harness *h, const char *what, harness_array a, int64_t a_from, harness_array b,
                  int64_t b_from, int64_t count)
{
    float *x = harness_download(h, &a), *y = harness_download(h, &b);
    int64_t different = 0, first = -1;
    for (int64_t i = 0; i < count; i++) {
        if (memcmp(&x[a_from + i], &y[b_from + i], sizeof(float)) != 0) {
            first = different++ == 0 ? i : first;
        }
    }
    h->checks++;
    if (different > 0) {
        h->failures++;
        printf("FAILED: %s %s: %lld of %lld bits differ, first at %lld: %.9g and %.9g\n", harness_act_name(h),
               what, (long long)different, (long long)count, (long long)first, (double)x[a_from + first],
               (double)y[b_from + first]);
    }
    free(x);
    free(y);
}

/* Frees the arrays of the test that is over, and reports what its kernels did wrong. */
static inline void
harness_reset(harness *h)
{
    harness_check(h, h->gpu.ops->finish(&h->gpu));
    for (int i = 0; i < h->array_count; i++) {
        free(h->arrays[i].cpu);
        h->gpu.ops->free(&h->gpu, h->arrays[i].gpu);
    }
    h->array_count = 0;
    mil_arena_rewind(&h->gpu_scratch, (mil_arena_mark){});
    mil_arena_rewind(&h->gpu_host, (mil_arena_mark){});
    mil_arena_rewind(&h->cpu_scratch, (mil_arena_mark){});
    mil_arena_rewind(&h->cpu_host, (mil_arena_mark){});
}

static inline void
harness_close(harness *h)
{
    harness_reset(h);
    h->gpu.ops->close(&h->gpu);
    mil_arena_release(&h->gpu_scratch);
    mil_arena_release(&h->gpu_host);
    mil_arena_release(&h->cpu_scratch);
    mil_arena_release(&h->cpu_host);
}

static inline int
harness_end(const harness *h, const char *name)
{
    printf("%s: %d checks, %d failures\n", name, h->checks, h->failures);
    return h->failures == 0 ? 0 : 1;
}

#endif
