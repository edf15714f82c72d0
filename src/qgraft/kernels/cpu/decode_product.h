/* A product of a step of decode.c: some columns of y = x W^T for rows of x, as the layer computes. */

#ifndef QGRAFT_DECODE_PRODUCT_H
#define QGRAFT_DECODE_PRODUCT_H

#include <stdint.h>

#include "common.h"
#include "decode_thread.h"
#include "formats.h"
#include "level.h"
#include "product.h"

/* Of the weights `number` of several that lie one behind the other, 0 for the only ones. */
static Product product_of(const Linear *linear, int64_t number, int64_t first, int64_t last, int64_t rows, float *y) {
    const int64_t stride = row_bytes((int)linear->format, linear->columns);
    return (Product){(int)linear->format, linear->data + number * linear->rows * stride,
                     linear->scales ? linear->scales + number * linear->rows : NULL, stride, linear->rows, linear->columns,
                     first, last, rows, y, NULL};
}

/* The product with W, by the codes of x. */
static void multiply_codes(const Thread *thread, Product product, const float *x) {
    const Level *level = thread->level;
    const int panels = product.m >= INT8_MANY && level->gemm_int8_panels;
    const int64_t rows = product.m, most = panels ? level->block_tokens : rows;
    QuantizedX codes = thread->codes;
    codes.groups = groups_of(product.columns);
    for (int64_t t = 0; t < rows; t += most, product.y += most * product.rows) {
        product.m = smaller(most, rows - t);
        for (int64_t i = 0; i < product.m; i++)
            level->quantize_x(product.format, x + (t + i) * product.columns, product.columns, i, &codes);
        if (panels) level->gemm_int8_panels(&product, &codes);
        else level->gemm_int8(&product, &codes);
    }
}

static void multiply_rows(const Thread *thread, int int8, const Product *product, const float *x) {
    if (int8) multiply_codes(thread, *product, x);
    else multiply(thread->level, product, x);
}

#endif
