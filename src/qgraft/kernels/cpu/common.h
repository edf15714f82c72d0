/* Small things that every loop uses: inlining, bounds, fetching ahead. */

#ifndef QGRAFT_COMMON_H
#define QGRAFT_COMMON_H

#include <stdint.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
ALWAYS_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/* Bytes that are fetched ahead of a row's where few tokens make memory the limit: several short rows at once are no
 * pattern that a CPU fetches by itself. Beyond the end of the data nothing is fetched, and nothing is wrong. */
enum { PREFETCH_DISTANCE = 8192 };

/* Ask memory for what comes PREFETCH_DISTANCE behind these bytes, while they are multiplied. A row is too short for the
 * CPU to see that the next one follows: without this, products of one row of x with weights from memory took two to five
 * times as long. */
ALWAYS_INLINE void prefetch(const void *bytes, int64_t count) {
    for (int64_t j = 0; j < count; j += 64) __builtin_prefetch((const char *)bytes + PREFETCH_DISTANCE + j);
}

/* The same to the second-level cache, for loops that are done with a line before the first level has the next one: more of
 * them may be under way there. */
ALWAYS_INLINE void prefetch_second(const void *bytes, int64_t count) {
    for (int64_t j = 0; j < count; j += 64) __builtin_prefetch((const char *)bytes + PREFETCH_DISTANCE + j, 0, 2);
}

#endif
