/* Which level of CPU runs, and what Python is told of the library.
 *
 *   qgraft_sources      the hash of the sources that this library was made from (sources.py)
 *   qgraft_level_name   the levels that this CPU has;  qgraft_use_level: the one to run
 */

#include <stdatomic.h>
#include <stddef.h>

#include "level.h"

#ifndef QGRAFT_SOURCES
#error "built without the hash of its sources, which setup.py gives"
#endif

enum { LEVELS = 5 };

const char *qgraft_sources(void) { return QGRAFT_SOURCES; }

/* Whether the compiler made levels of vectors. */
int qgraft_has_vectors(void) { return HAVE_X86_LEVELS; }

#if HAVE_X86_LEVELS
/* What gcc may use for x86-64-v3 and v4; gcc 11 does not know these names here. */
#define HAS __builtin_cpu_supports
static int has_v3(void) {
    return HAS("avx2") && HAS("fma") && HAS("f16c") && HAS("bmi") && HAS("bmi2") && HAS("lzcnt") && HAS("movbe");
}

static int has_v4(void) {
    return HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") && HAS("avx512vl");
}
#endif

/* The levels that this CPU has, plainest first; how many. */
static int levels_here(const Level *here[LEVELS]) {
    int count = 0;
    here[count++] = &qgraft_plain;
#if HAVE_X86_LEVELS
    __builtin_cpu_init();
    if (!has_v3()) return count;
    here[count++] = &qgraft_avx2;
    if (!has_v4()) return count;
    here[count++] = &qgraft_avx512;
    if (!HAS("avx512vnni")) return count;
    here[count++] = &qgraft_avx512_vnni;
    if (HAS("avx512bf16")) here[count++] = &qgraft_avx512_bf16;
#endif
    return count;
}

static _Atomic(const Level *) chosen; /* NULL: the best one, which two threads at once find alike */

const Level *qgraft_level(void) {
    const Level *level = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (!level) {
        const Level *here[LEVELS];
        level = here[levels_here(here) - 1];
        atomic_store_explicit(&chosen, level, memory_order_relaxed);
    }
    return level;
}

/* The name of the level at `index` of those that this CPU has, plainest first; NULL beyond the last. */
const char *qgraft_level_name(int index) {
    const Level *here[LEVELS];
    return index >= 0 && index < levels_here(here) ? here[index]->name : NULL;
}

/* Take the level at `index` from now on; no function may be running. 0, or -1 where there is none. */
int qgraft_use_level(int index) {
    const Level *here[LEVELS];
    if (index < 0 || index >= levels_here(here)) return -1;
    atomic_store_explicit(&chosen, here[index], memory_order_relaxed);
    return 0;
}
