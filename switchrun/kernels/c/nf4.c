/* Products with a matrix in NF4, as bitsandbytes stores it: the matrix is one long row, two codes a byte (the first in
 * the high bits), a bfloat16 scale for every 64 elements. A block may run from one row into the next.
 */
#include "native.h"

#define BLOCK 64

static const float VALUES[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

INLINE float value_of(const uint8_t *codes, int64_t element) {
    return VALUES[element & 1 ? codes[element / 2] & 15 : codes[element / 2] >> 4];
}

/* The values of LANES codes. A code is brought to the low bits of its lane; what lies above them is ignored. */
#if LANES == 16
INLINE V values_of(const uint8_t *at) {
    const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    __m512i codes = _mm512_set1_epi32((int)u32(at));
    codes = _mm512_mask_broadcastd_epi32(codes, 0xff00, _mm_cvtsi32_si128((int)u32(at + 4)));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(codes, shifts), load(VALUES));
}
#elif LANES == 8
INLINE V values_of(const uint8_t *at) {
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32((int)u32(at)), shifts);
    V low = _mm256_permutevar8x32_ps(load(VALUES), codes), high = _mm256_permutevar8x32_ps(load(VALUES + 8), codes);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
#else
INLINE V values_of(const uint8_t *at) {
    return (V){VALUES[at[0] >> 4], VALUES[at[0] & 15], VALUES[at[1] >> 4], VALUES[at[1] & 15]};
}
#endif

INLINE float scale_of(struct matrix m, int64_t element) {
    return bf16((const uint8_t *)m.scales + 2 * (element / BLOCK));
}

INLINE void unpack(struct matrix m, int64_t first, int64_t count, float *values) {
    const uint8_t *codes = m.codes;
    for (int64_t at = first, end = first + count; at < end;) {
        int64_t stop = least(end, (at / BLOCK + 1) * BLOCK);
        float scale = scale_of(m, at);
        for (; at < stop && at % LANES; at++) values[at - first] = value_of(codes, at) * scale;
        for (; at + LANES <= stop; at += LANES) store(values + (at - first), mul(values_of(codes + at / 2), fill(scale)));
        for (; at < stop; at++) values[at - first] = value_of(codes, at) * scale;
    }
}

INLINE float dot(struct matrix m, int64_t first, int64_t count, const float *x) {
    const uint8_t *codes = m.codes;
    V sums = fill(0);
    float total = 0;
    for (int64_t at = first, end = first + count; at < end;) {
        float scale = scale_of(m, at);
        V part = fill(0);
        if (at % BLOCK == 0 && end - at >= BLOCK) {
            UNROLL for (int i = 0; i < BLOCK; i += LANES)
                part = madd(values_of(codes + (at + i) / 2), load(x + (at - first) + i), part);
            at += BLOCK;
        } else {
            int64_t stop = least(end, (at / BLOCK + 1) * BLOCK);
            float rest = 0;
            for (; at < stop && at % LANES; at++) rest += value_of(codes, at) * x[at - first];
            for (; at + LANES <= stop; at += LANES) part = madd(values_of(codes + at / 2), load(x + (at - first)), part);
            for (; at < stop; at++) rest += value_of(codes, at) * x[at - first];
            total += rest * scale;
        }
        sums = madd(part, fill(scale), sums);
    }
    return total + sum(sums);
}

API void nf4_product(const float *x, int64_t tokens, int64_t columns, float *y, int64_t rows, int64_t begin,
                     int64_t end, const void *codes, const void *scales) {
    product(x, tokens, columns, y, rows, begin, end, (struct matrix){codes, scales}, unpack, dot);
}
