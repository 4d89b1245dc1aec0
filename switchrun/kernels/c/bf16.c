/* Products with a bfloat16 matrix: each weight is read once and widened on the fly. */
#include "native.h"

INLINE void unpack(struct matrix m, int64_t first, int64_t count, float *values) {
    const uint8_t *at = (const uint8_t *)m.codes + 2 * first;
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) {
        prefetch(at + 2 * c);
        store(values + c, from_bf16(at + 2 * c));
    }
    for (; c < count; c++) values[c] = bf16(at + 2 * c);
}

INLINE float dot(struct matrix m, int64_t first, int64_t count, const float *x) {
    const uint8_t *at = (const uint8_t *)m.codes + 2 * first;
    V sums[4] = {fill(0), fill(0), fill(0), fill(0)};
    int64_t c = 0;
    for (; c + 4 * LANES <= count; c += 4 * LANES) {
        prefetch(at + 2 * c);
        if (LANES == 16) prefetch(at + 2 * c + 64);
        UNROLL for (int i = 0; i < 4; i++) {
            int64_t k = c + i * LANES;
            sums[i] = madd(from_bf16(at + 2 * k), load(x + k), sums[i]);
        }
    }
    for (; c + LANES <= count; c += LANES) sums[0] = madd(from_bf16(at + 2 * c), load(x + c), sums[0]);
    float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    for (; c < count; c++) total += bf16(at + 2 * c) * x[c];
    return total;
}

API void bf16_product(const float *x, int64_t tokens, int64_t columns, float *y, int64_t rows, int64_t begin,
                      int64_t end, const void *weights) {
    product(x, tokens, columns, y, rows, begin, end, (struct matrix){weights, NULL}, unpack, dot);
}
