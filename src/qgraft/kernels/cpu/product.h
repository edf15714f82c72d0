/* y = x W^T in float32: which of a level's loops multiplies so many rows of x. */

#ifndef QGRAFT_PRODUCT_H
#define QGRAFT_PRODUCT_H

#include <stdint.h>

#include "common.h"
#include "level.h"

enum { INT8_MANY = 8 }; /* rows of x, from which on panels are faster in 8 bits */

/* One block of y: at most `block_columns` of it, for at most `block_tokens` rows of x. */
ALWAYS_INLINE void multiply_block(const Level *level, const Product *part, int64_t m, const float *x) {
    if (m < level->many || !level->gemm) level->gemv(part, x);
    else level->gemm(part, x);
}

/* All of y. */
ALWAYS_INLINE void multiply(const Level *level, const Product *product, const float *x) {
    const int whole = product->m < level->many || !level->gemm;
    const int64_t columns = whole ? product->last - product->first : level->block_columns;
    const int64_t tokens = whole ? product->m : level->block_tokens;
    for (int64_t t = 0; t < product->m; t += tokens)
        for (int64_t r = product->first; r < product->last; r += columns) {
            Product part = *product;
            part.first = r, part.last = smaller(r + columns, product->last);
            part.m = smaller(tokens, product->m - t), part.y += t * product->rows;
            multiply_block(level, &part, product->m, x + t * product->columns);
        }
}

#endif
