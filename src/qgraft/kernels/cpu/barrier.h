/* A barrier for threads that come to it every 20 microseconds. OpenMP's own either sleeps there, and waking takes as long,
 * or spins for milliseconds where another process has the core; this one spins for a moment and then sleeps.
 */

#ifndef QGRAFT_BARRIER_H
#define QGRAFT_BARRIER_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct {
    atomic_int arrived, rounds, asleep;
} Barrier;

/* Wait until all of `threads` threads have come here. */
static void barrier_wait(Barrier *barrier, int64_t threads) {
    enum { SPINS = 1000 }; /* some 10 microseconds */
    const int round = atomic_load(&barrier->rounds);
    if (atomic_fetch_add(&barrier->arrived, 1) + 1 == threads) {
        atomic_store(&barrier->arrived, 0);
        atomic_store(&barrier->rounds, round + 1);
#ifdef __linux__
        if (atomic_load(&barrier->asleep)) syscall(SYS_futex, &barrier->rounds, FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0);
#endif
        return;
    }
    for (int spins = 0; atomic_load(&barrier->rounds) == round; spins++) {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
#ifdef __linux__
        if (spins < SPINS) continue;
        atomic_fetch_add(&barrier->asleep, 1); /* returns at once where the round has changed meanwhile */
        syscall(SYS_futex, &barrier->rounds, FUTEX_WAIT_PRIVATE, round, NULL, NULL, 0);
        atomic_fetch_sub(&barrier->asleep, 1);
#endif
    }
}

#endif
