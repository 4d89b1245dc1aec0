/* Products with a matrix in LLM.int8's row-wise form: int8 codes and one float32 a row, SCB / 127. */
#include "native.h"

INLINE void unpack(struct matrix m, int64_t first, int64_t count, float *values) {
    const int8_t *at = (const int8_t *)m.codes + first;
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) {
        prefetch(at + c);
        store(values + c, from_int8(at + c));
    }
    for (; c < count; c++) values[c] = at[c];
}

INLINE float dot(struct matrix m, int64_t first, int64_t count, const float *x) {
    const int8_t *at = (const int8_t *)m.codes + first;
    V sums[4] = {fill(0), fill(0), fill(0), fill(0)};
    int64_t c = 0;
    for (; c + 4 * LANES <= count; c += 4 * LANES) {
        prefetch(at + c);
        UNROLL for (int i = 0; i < 4; i++) {
            int64_t k = c + i * LANES;
            sums[i] = madd(from_int8(at + k), load(x + k), sums[i]);
        }
    }
    for (; c + LANES <= count; c += LANES) sums[0] = madd(from_int8(at + c), load(x + c), sums[0]);
    float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    for (; c < count; c++) total += at[c] * x[c];
    return total;
}

/* Scales multiply sums: exact in the codes, and a product less a weight. */
API void int8_product(const float *x, int64_t tokens, int64_t columns, float *y, int64_t rows, int64_t begin,
                      int64_t end, const void *codes, const float *scales) {
    product(x, tokens, columns, y, rows, begin, end, (struct matrix){codes, NULL}, unpack, dot);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t row = begin; row < end; row++) y[t * rows + row] *= scales[row];
}

API void int8_unpack(void *to, int64_t narrow, int64_t first, int64_t count, const void *codes) {
    unpack_to(to, narrow, first, count, (struct matrix){codes, NULL}, unpack);
}
