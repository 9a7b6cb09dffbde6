/* The smallest test harness that says what failed where.
 *
 * A test is a function without arguments, listed in main.c. A failed check prints its line and the test goes on;
 * the process exits with 1 if any failed.
 */
#ifndef MIL_TEST_HARNESS_H
#define MIL_TEST_HARNESS_H

#include <stdbool.h>

#include "base/memory.h"
#include "base/status.h"
#include "device.h"

/* libgomp waits in ways that ThreadSanitizer cannot see, so under it teams have one thread and what is judged is
 * calls that run at the same time. */
#if defined(__SANITIZE_THREAD__)
#define TEST_TEAM 1
#else
#define TEST_TEAM 2
#endif

void
check(bool passed, const char *what, const char *file, int line);

#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)
#define CHECK_OK(expression) check_status((expression), MIL_OK, #expression, __FILE__, __LINE__)
#define CHECK_STATUS(expression, expected) \
    check_status((expression), (expected), #expression, __FILE__, __LINE__)

/* Also prints the message of an unexpected failure. */
void
check_status(mil_status got, mil_status expected, const char *what, const char *file, int line);

/* The message of the last failure holds `part`. */
#define CHECK_MESSAGE(part) \
    check(strstr(mil_message(), (part)) != NULL, "message holds " part, __FILE__, __LINE__)

/* `count` floats between -1 and 1 that repeat for the same seed; free with mil_free. */
float *
random_floats(int64_t count, unsigned seed);

#endif
