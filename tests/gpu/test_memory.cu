/* Uploads: small ones, large ones (which several threads send in pieces), from odd addresses, and several at once. */
#include "harness.h"

#include <pthread.h>

static void
fill(unsigned char *bytes, size_t count, unsigned seed)
{
    for (size_t i = 0; i < count; i++) {
        bytes[i] = (unsigned char)((i * 2654435761u + seed) >> 13);
    }
}

typedef struct trip {
    const mil_ops *ops;
    size_t bytes, offset;
    mil_status status;
    bool same;
    char message[256];
} trip;

/* To the device and back, with one byte of margin on both sides that must not change. */
static void *
there_and_back(void *argument)
{
    trip *t = (trip *)argument;
    mil_context context = {};
    context.ops = t->ops;
    unsigned char *from = (unsigned char *)malloc(t->bytes + 64),
                  *back = (unsigned char *)malloc(t->bytes + 2);
    void *there = NULL;
    fill(from, t->bytes + 64, (unsigned)t->bytes);
    memset(back, 0xa5, t->bytes + 2);
    t->status = t->ops->alloc(&context, t->bytes + 2, &there);
    if (t->status == MIL_OK) {
        t->status = t->ops->copy(&context, there, back, t->bytes + 2);
    }
    if (t->status == MIL_OK) {
        t->status = t->ops->copy(&context, (char *)there + 1, from + t->offset, t->bytes);
    }
    if (t->status == MIL_OK) {
        memset(back, 0, t->bytes + 2);
        t->status = t->ops->copy(&context, back, there, t->bytes + 2);
    }
    t->same = t->status == MIL_OK && back[0] == 0xa5 && back[t->bytes + 1] == 0xa5 &&
              memcmp(back + 1, from + t->offset, t->bytes) == 0;
    if (t->status != MIL_OK) {
        snprintf(t->message, sizeof t->message, "%s", mil_message());
    }
    t->ops->free(&context, there);
    free(from);
    free(back);
    return NULL;
}

static void
judge(harness *h, const trip *t, const char *what)
{
    h->checks++;
    if (!t->same) {
        h->failures++;
        printf("FAILED: %s of %zu bytes from offset %zu: %s\n", what, t->bytes, t->offset,
               t->status == MIL_OK ? "other bytes came back" : t->message);
    }
}

int
main(void)
{
    enum { MIB = 1 << 20, THREADS = 3 };
    static harness h;
    harness_begin(&h, MIL_BF16);
    size_t sizes[] = {1,           4096,         8 * MIB - 1,  8 * MIB, 8 * MIB + 1,
                      9 * MIB + 7, 32 * MIB - 3, 32 * MIB + 5, 77 * MIB};
    for (size_t bytes : sizes) {
        for (size_t offset : {(size_t)0, (size_t)13}) {
            trip t = {h.gpu.ops, bytes, offset, MIL_OK, false, ""};
            there_and_back(&t);
            judge(&h, &t, "upload");
        }
    }
    trip trips[THREADS];
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        trips[i] = {h.gpu.ops, (size_t)(20 + 11 * i) * MIB + 1, (size_t)i, MIL_OK, false, ""};
        if (pthread_create(&threads[i], NULL, there_and_back, &trips[i]) != 0) {
            printf("FAILED: no thread\n");
            return 1;
        }
    }
    for (int i = 0; i < THREADS; i++) {
        (void)pthread_join(threads[i], NULL);
        judge(&h, &trips[i], "upload beside others");
    }
    harness_close(&h);
    return harness_end(&h, "memory");
}
