/* Products with a ternary matrix compressed as QMoE does: 16-bit codes of codewords of up to 28 digits, of which at
 * most three are not zero. Decoding is fused with the product; a row is decoded once for up to 4 * LANES tokens.
 *
 * A table entry: length in bits 0-4, three positions in bits 5-19, their three digits in bits 20-25. Digit 0 is a zero,
 * 1 the row's minimum, 2 its maximum. Codes, offsets and lengths are checked before anything is read by them.
 */
#include "native.h"

enum { FINE, BAD_OFFSETS, BAD_CODE, BAD_LENGTH };

struct qmoe { const uint32_t *table; int64_t words; const void *codes; int64_t count; const void *offsets, *extremes; };

#define LENGTH(entry) ((entry) & 31)
#define PLACE(entry, i) ((entry) >> (5 + 5 * (i)) & 31)
#define DIGIT(entry, i) ((entry) >> (20 + 2 * (i)) & 3)

/* Where a row's codes begin and end, and its three values (and a fourth, for table entries that are none). */
INLINE int row_of(struct qmoe m, int64_t row, int64_t *at, int64_t *end, float values[4]) {
    *at = (int32_t)u32((const uint8_t *)m.offsets + 4 * row);
    *end = (int32_t)u32((const uint8_t *)m.offsets + 4 * row + 4);
    values[0] = values[3] = 0;
    values[1] = bf16((const uint8_t *)m.extremes + 4 * row);
    values[2] = bf16((const uint8_t *)m.extremes + 4 * row + 2);
    return 0 <= *at && *at <= *end && *end <= m.count;
}

/* The next codeword, or an error that leaves the function. */
#define NEXT(entry)                                                          \
    uint16_t code = u16((const uint8_t *)m.codes + 2 * at);                  \
    if (code >= m.words) return BAD_CODE;                                    \
    uint32_t entry = m.table[code];                                          \
    if (LENGTH(entry) > columns - place) return BAD_LENGTH

static int row_of_one(struct qmoe m, int64_t row, int64_t columns, const float *x, float *y) {
    int64_t at, end, place = 0;
    float values[4], a = 0, b = 0, c = 0;
    if (!row_of(m, row, &at, &end, values)) return BAD_OFFSETS;
    for (; at < end; at++) {
        NEXT(entry);
        a += values[DIGIT(entry, 0)] * x[place + PLACE(entry, 0)];
        b += values[DIGIT(entry, 1)] * x[place + PLACE(entry, 1)];
        c += values[DIGIT(entry, 2)] * x[place + PLACE(entry, 2)];
        place += LENGTH(entry);
    }
    *y = a + b + c;
    return place == columns ? FINE : BAD_LENGTH;
}

/* `x` is [columns, stride], its tokens beside one another; `vectors` is a constant. */
INLINE int row_of_some(int vectors, struct qmoe m, int64_t row, int64_t columns, const float *x, int64_t stride, float *y) {
    int64_t at, end, place = 0;
    float values[4];
    V sums[4];
    UNROLL for (int v = 0; v < vectors; v++) sums[v] = fill(0);
    if (!row_of(m, row, &at, &end, values)) return BAD_OFFSETS;
    for (; at < end; at++) {
        NEXT(entry);
        UNROLL for (int i = 0; i < 3; i++) { /* without a branch: zeros are multiplied too */
            V value = fill(values[DIGIT(entry, i)]);
            const float *column = x + (place + PLACE(entry, i)) * stride;
            UNROLL for (int v = 0; v < vectors; v++) sums[v] = madd(value, load(column + v * LANES), sums[v]);
        }
        place += LENGTH(entry);
    }
    UNROLL for (int v = 0; v < vectors; v++) store(y + v * LANES, sums[v]);
    return place == columns ? FINE : BAD_LENGTH;
}

API int64_t qmoe_lanes(void) { return LANES; }

/* Put tokens beside one another: `to` [columns, stride], zeros beside them. Returns whether all values are finite: the
 * product skips zeros, but zero times infinity is none.
 */
API int64_t qmoe_beside(const float *x, int64_t tokens, int64_t columns, int64_t stride, float *to) {
    float sum = 0;
    for (int64_t c = 0; c < columns; c++) {
        for (int64_t t = 0; t < tokens; t++) {
            float value = x[t * columns + c];
            sum += value * 0;
            to[c * stride + t] = value;
        }
        for (int64_t t = tokens; t < stride; t++) to[c * stride + t] = 0;
    }
    return sum == 0;
}

/* y[tokens, rows] = x . W^T for rows begin..end. For one token `x` is [columns] and `stride` 1; for more it is
 * [columns, stride] with stride a multiple of LANES, zeros beside the tokens. A table entry's places are below its
 * length. Returns 0, or the first damaged row * 4 + what is wrong with it: 1 offsets, 2 a code, 3 the length.
 */
API int64_t qmoe_product(const float *x, int64_t tokens, int64_t columns, int64_t stride, float *y, int64_t rows,
                         int64_t begin, int64_t end, const uint32_t *table, int64_t words, const void *codes,
                         int64_t count, const void *offsets, const void *extremes) {
    struct qmoe m = {table, words, codes, count, offsets, extremes};
    float out[4 * LANES];
    for (int64_t row = begin; row < end; row++) {
        int error = FINE;
        if (tokens == 1) error = row_of_one(m, row, columns, x, y + row);
        for (int64_t t = 0; tokens > 1 && t < tokens && !error; t += 4 * LANES) {
            switch (least(4, (tokens - t + LANES - 1) / LANES)) {
            case 1: error = row_of_some(1, m, row, columns, x + t, stride, out); break;
            case 2: error = row_of_some(2, m, row, columns, x + t, stride, out); break;
            case 3: error = row_of_some(3, m, row, columns, x + t, stride, out); break;
            default: error = row_of_some(4, m, row, columns, x + t, stride, out);
            }
            for (int64_t i = 0; i < least(4 * LANES, tokens - t); i++) y[(t + i) * rows + row] = out[i];
        }
        if (error) return row * 4 + error;
    }
    return 0;
}

/* Rows begin..end as bfloat16 [end - begin, columns]; errors as above. */
API int64_t qmoe_unpack(uint16_t *matrix, int64_t columns, int64_t begin, int64_t end, const uint32_t *table,
                        int64_t words, const void *codes, int64_t count, const void *offsets, const void *extremes) {
    struct qmoe m = {table, words, codes, count, offsets, extremes};
    for (int64_t row = begin; row < end; row++) {
        int64_t at, stop, place = 0;
        float unused[4];
        if (!row_of(m, row, &at, &stop, unused)) return row * 4 + BAD_OFFSETS;
        uint16_t *to = matrix + (row - begin) * columns;
        if (columns) memset(to, 0, 2 * (size_t)columns);
        for (; at < stop; at++) {
            uint16_t code = u16((const uint8_t *)codes + 2 * at);
            if (code >= words) return row * 4 + BAD_CODE;
            uint32_t entry = table[code];
            if (LENGTH(entry) > columns - place) return row * 4 + BAD_LENGTH;
            for (int i = 0; i < 3 && DIGIT(entry, i); i++)
                to[place + PLACE(entry, i)] = u16((const uint8_t *)extremes + 4 * row + 2 * (DIGIT(entry, i) - 1));
            place += LENGTH(entry);
        }
        if (place != columns) return row * 4 + BAD_LENGTH;
    }
    return 0;
}
