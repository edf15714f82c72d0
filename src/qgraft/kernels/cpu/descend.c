/* What descend.py calls: the loop of descend.h over all rows of a weight, shared out to threads. */

#include <stdint.h>

#include "common.h"
#include "level.h"

enum { ROWS_AT_A_TIME = 128 };

/* R, codes, steps, moved: [columns, rows]; H: [columns, columns], columns at most DESCENT_COLUMNS. Codes move in place, within
 * low..high; R stays. */
void qgraft_descend(const float *R, float *codes, const float *steps, const float *H, int64_t columns, int64_t rows, int low,
                    int high, float *moved, int threads) {
    const Level *level = qgraft_level();
    const Descent call = {R, codes, steps, H, columns, rows, low, high, moved};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows > ROWS_AT_A_TIME)
    for (int64_t first = 0; first < rows; first += ROWS_AT_A_TIME)
        level->descend(&call, first, smaller(rows, first + ROWS_AT_A_TIME));
}
