/* Statuses: messages are kept whole or cut, never across threads. */
#include "harness.h"

#include <pthread.h>
#include <string.h>

static mil_status
passes_up(mil_status first)
{
    MIL_TRY(first);
    return mil_fail(MIL_ERR_VALUE, "not reached on failure");
}

void
test_status_messages(void)
{
    CHECK_STATUS(mil_fail(MIL_ERR_SHAPE, "op: x has %d rows; expected %d", 3, 4), MIL_ERR_SHAPE);
    CHECK(strcmp(mil_message(), "op: x has 3 rows; expected 4") == 0);

    char longer[2 * MIL_MESSAGE_SIZE];
    memset(longer, 'a', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    CHECK_STATUS(mil_fail(MIL_ERR_IO, "%s", longer), MIL_ERR_IO);
    CHECK(strlen(mil_message()) == MIL_MESSAGE_SIZE - 1);

    CHECK_STATUS(passes_up(MIL_ERR_DTYPE), MIL_ERR_DTYPE);
    CHECK_STATUS(passes_up(MIL_OK), MIL_ERR_VALUE);

#define HAS_WORDS(code, words, base) CHECK(strcmp(mil_status_words(code), words) == 0);
    MIL_STATUS_LIST(HAS_WORDS)
#undef HAS_WORDS
    CHECK(strcmp(mil_status_words(MIL_OK), "ok") == 0);
    CHECK(strcmp(mil_status_words((mil_status)999), "unknown status") == 0);
}

static void *
fail_elsewhere(void *argument)
{
    (void)argument;
    CHECK(mil_message()[0] == '\0'); /* a fresh thread has no failure */
    CHECK_STATUS(mil_fail(MIL_ERR_VALUE, "from another thread"), MIL_ERR_VALUE);
    return NULL;
}

void
test_status_threads(void)
{
    CHECK_STATUS(mil_fail(MIL_ERR_VALUE, "from here"), MIL_ERR_VALUE);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, fail_elsewhere, NULL) == 0);
    pthread_join(thread, NULL);
    CHECK(strcmp(mil_message(), "from here") == 0);
}
