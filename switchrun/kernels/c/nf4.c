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
    return VALUES[element & 1 ? codes[element >> 1] & 15 : codes[element >> 1] >> 4];
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
        prefetch(codes + (at >> 1));
        for (; at < stop && at % LANES; at++) values[at - first] = value_of(codes, at) * scale;
        for (; at + LANES <= stop; at += LANES) store(values + (at - first), mul(values_of(codes + (at >> 1)), fill(scale)));
        for (; at < stop; at++) values[at - first] = value_of(codes, at) * scale;
    }
}

/* The product of a part of a block, without its scale. */
INLINE float part(const uint8_t *codes, int64_t at, int64_t stop, const float *x) {
    V sums = fill(0);
    float rest = 0;
    for (; at < stop && at % LANES; at++) rest += value_of(codes, at) * *x++;
    for (; at + LANES <= stop; at += LANES, x += LANES) sums = madd(values_of(codes + (at >> 1)), load(x), sums);
    for (; at < stop; at++) rest += value_of(codes, at) * *x++;
    return rest + sum(sums);
}

INLINE float dot(struct matrix m, int64_t first, int64_t count, const float *x) {
    int64_t end = first + count, whole = least(end, (first + BLOCK - 1) / BLOCK * BLOCK), last = end / BLOCK * BLOCK;
    float total = first < whole ? part(m.codes, first, whole, x) * scale_of(m, first) : 0;
    const uint8_t *codes = (const uint8_t *)m.codes + (whole >> 1), *scales = (const uint8_t *)m.scales + whole / BLOCK * 2;
    x += whole - first;
    V sums = fill(0);
    for (int64_t at = whole; at < last; at += BLOCK, codes += BLOCK / 2, scales += 2, x += BLOCK) {
        V block = mul(values_of(codes), load(x));
        prefetch(codes);
        UNROLL for (int i = LANES; i < BLOCK; i += LANES) block = madd(values_of(codes + i / 2), load(x + i), block);
        sums = madd(block, fill(bf16(scales)), sums);
    }
    if (whole < end && last < end) total += part(m.codes, last, end, x) * scale_of(m, last);
    return total + sum(sums);
}

API void nf4_product(const float *x, int64_t tokens, int64_t columns, float *y, int64_t rows, int64_t begin,
                     int64_t end, const void *codes, const void *scales) {
    product(x, tokens, columns, y, rows, begin, end, (struct matrix){codes, scales}, unpack, dot);
}

API void nf4_unpack(void *to, int64_t narrow, int64_t first, int64_t count, const void *codes, const void *scales) {
    unpack_to(to, narrow, first, count, (struct matrix){codes, scales}, unpack);
}

/* Quantise `count` elements that begin a block, to bitsandbytes' bytes: a whole block is multiplied by the inverse of
 * its absmax, one cut short is divided and its absmax never 0. A code is the number of midpoints below the value.
 */
API void nf4_quantise(const float *values, int64_t count, uint8_t *codes, float *absmax) {
    float midpoints[15];
    for (int m = 0; m < 15; m++) midpoints[m] = (VALUES[m] + VALUES[m + 1]) / 2;
    for (int64_t at = 0; at < count; at += BLOCK, codes += BLOCK / 2) {
        int64_t width = least(BLOCK, count - at);
        float block[BLOCK] = {0}, largest, scale;
        int32_t bits[BLOCK], found[BLOCK], most = 0;
        memcpy(block, values + at, 4 * (size_t)width);
        memcpy(bits, block, sizeof bits);
        for (int i = 0; i < BLOCK; i++) most = (bits[i] & 0x7fffffff) > most ? bits[i] & 0x7fffffff : most;
        memcpy(&largest, &most, 4);
        if (width == BLOCK) {
            scale = 1 / (largest < 1e-38f ? 1e-38f : largest);
            for (int i = 0; i < BLOCK; i++) block[i] *= scale;
        } else {
            if (largest < 1e-38f) largest = 1e-38f;
            for (int i = 0; i < BLOCK; i++) block[i] /= largest;
        }
        absmax[at / BLOCK] = largest;
        for (int i = 0; i < BLOCK; i++) {
            found[i] = 0;
            UNROLL for (int m = 0; m < 15; m++) found[i] += block[i] > midpoints[m];
        }
        for (int i = 0; i < (width + 1) / 2; i++) codes[i] = (uint8_t)(found[2 * i] << 4 | found[2 * i + 1]);
    }
}
