/* Coordinate descent on the codes of a block of columns (reference.py has the formulas): each row of the weight is a problem
 * of its own, so rows are the lanes of vectors. A tile of them stays in the first-level cache for all columns; a column
 * in which no row of the tile moves, as most do, costs one pass over its own numbers.
 */

#ifndef QGRAFT_DESCEND_H
#define QGRAFT_DESCEND_H

#include <stdint.h>
#include <string.h>

#include "common.h"
#include "level.h"

enum { DESCENT_LANES = 32 };

/* Move the codes of column k of a tile; how far each weight moves, and whether any does. */
static int descend_column(const Descent *d, int64_t k, int64_t lane, int64_t lanes, const float *R, float *moved) {
    float *codes = d->codes + k * d->rows + lane;
    const float *steps = d->steps + k * d->rows + lane, curvature = d->H[k * d->columns + k];
    const float low = (float)d->low, high = (float)d->high;
    float far = 0.0f;
    for (int64_t i = 0; i < lanes; i++) {
        const float slope = curvature * steps[i];
        const float inverse = __builtin_fabsf(slope) > 1e-30f ? 1.0f / slope : 0.0f;
        const float wanted = codes[i] - __builtin_rintf(R[i] * inverse);
        const float least = codes[i] < low ? codes[i] : low, most = wanted < high ? wanted : high;
        const float best = most > least ? most : least;
        moved[i] = (best - codes[i]) * steps[i];
        codes[i] = best;
        far += __builtin_fabsf(moved[i]);
    }
    return far > 0.0f;
}

/* Lanes first <= lane < last, all columns. */
static void descend(const Descent *d, int64_t first, int64_t last) {
    float R[DESCENT_COLUMNS][DESCENT_LANES], moved[DESCENT_LANES] = {0};
    for (int64_t lane = first; lane < last; lane += DESCENT_LANES) {
        const int64_t lanes = smaller(DESCENT_LANES, last - lane), bytes = lanes * (int64_t)sizeof(float);
        memset(R, 0, sizeof R);
        for (int64_t k = 0; k < d->columns; k++) memcpy(R[k], d->R + k * d->rows + lane, (size_t)bytes);
        for (int64_t k = 0; k < d->columns; k++) {
            const int any = descend_column(d, k, lane, lanes, R[k], moved);
            memcpy(d->moved + k * d->rows + lane, moved, (size_t)bytes);
            for (int64_t j = k + 1; any && j < d->columns; j++) {
                const float h = d->H[k * d->columns + j];
                for (int i = 0; i < DESCENT_LANES; i++) R[j][i] += h * moved[i];
            }
        }
    }
}

#endif
