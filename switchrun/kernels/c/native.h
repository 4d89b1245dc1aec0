/* What the kernels share: vectors of LANES floats, and a product of unpacked rows.
 *
 * Every source is compiled once for each path (AVX-512, AVX2, portable), into a library of its own; which one is
 * loaded is decided in libraries.py. Sums are in float32. Matrices may begin at any address.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))
#define API __attribute__((visibility("default")))
#define AHEAD 2048 /* bytes */
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

INLINE uint16_t u16(const void *p) { uint16_t v; memcpy(&v, p, 2); return v; }
INLINE uint32_t u32(const void *p) { uint32_t v; memcpy(&v, p, 4); return v; }
INLINE float bf16(const void *p) { uint32_t bits = (uint32_t)u16(p) << 16; float v; memcpy(&v, &bits, 4); return v; }
/* Ask for what will be read soon; an address beyond the matrix does no harm. The processor's own guess stops at a page. */
INLINE void prefetch(const void *p) { __builtin_prefetch((const void *)((uintptr_t)p + AHEAD)); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#define LANES 16
#define TOKENS 4 /* of a tile: 16 sums and what is multiplied fit the 32 registers */
typedef __m512 V;
INLINE V load(const float *p) { return _mm512_loadu_ps(p); }
INLINE V fill(float value) { return _mm512_set1_ps(value); }
INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V madd(V a, V b, V sum) { return _mm512_fmadd_ps(a, b, sum); }
INLINE float sum(V a) { return _mm512_reduce_add_ps(a); }
INLINE void store(float *p, V a) { _mm512_storeu_ps(p, a); }
INLINE V from_bf16(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16));
}
INLINE V from_int8(const void *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p))); }

#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
#define TOKENS 2 /* 8 sums in 16 registers */
typedef __m256 V;
INLINE V load(const float *p) { return _mm256_loadu_ps(p); }
INLINE V fill(float value) { return _mm256_set1_ps(value); }
INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
INLINE V madd(V a, V b, V sum) { return _mm256_fmadd_ps(a, b, sum); }
INLINE float sum(V a) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE void store(float *p, V a) { _mm256_storeu_ps(p, a); }
INLINE V from_bf16(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
INLINE V from_int8(const void *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p))); }

#else
#define LANES 4 /* registers of SSE2 and NEON, by the compilers' own vectors */
#define TOKENS 2
typedef float V __attribute__((vector_size(16)));
INLINE V load(const float *p) { V v; memcpy(&v, p, sizeof v); return v; }
INLINE V fill(float value) { return (V){value, value, value, value}; }
INLINE V add(V a, V b) { return a + b; }
INLINE V mul(V a, V b) { return a * b; }
INLINE V madd(V a, V b, V sum) { return a * b + sum; }
INLINE float sum(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
INLINE void store(float *p, V a) { memcpy(p, &a, sizeof a); }
INLINE V from_bf16(const void *p) {
    uint16_t v __attribute__((vector_size(8)));
    uint32_t wide __attribute__((vector_size(16)));
    memcpy(&v, p, sizeof v);
    wide = __builtin_convertvector(v, __typeof__(wide)) << 16;
    return (V)wide;
}
INLINE V from_int8(const void *p) {
    int8_t v __attribute__((vector_size(4)));
    int32_t wide __attribute__((vector_size(16)));
    memcpy(&v, p, sizeof v);
    wide = __builtin_convertvector(v, __typeof__(wide));
    return __builtin_convertvector(wide, V);
}
#endif

/* A matrix of any format; its elements are numbered row after row. */
struct matrix { const void *codes, *scales; };
typedef void (*Unpack)(struct matrix, int64_t first, int64_t count, float *values);
typedef float (*Dot)(struct matrix, int64_t first, int64_t count, const float *x);

#define PANEL 4    /* rows unpacked at a time */
#define CHUNK 1088 /* columns unpacked at a time, at most: with as much of x, they stay in the first cache */

/* Add the products of some unpacked rows and `count` tokens, a constant. */
INLINE void tile(int count, const float *x, int64_t stride, int64_t width, float (*panel)[CHUNK], int64_t used,
                 float *y, int64_t rows) {
    V sums[PANEL][TOKENS];
    UNROLL for (int i = 0; i < PANEL; i++)
        UNROLL for (int t = 0; t < count; t++) sums[i][t] = fill(0);
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) {
        V values[TOKENS];
        UNROLL for (int t = 0; t < count; t++) values[t] = load(x + t * stride + c);
        UNROLL for (int i = 0; i < PANEL; i++) {
            V weight = load(panel[i] + c);
            UNROLL for (int t = 0; t < count; t++) sums[i][t] = madd(weight, values[t], sums[i][t]);
        }
    }
    UNROLL for (int t = 0; t < count; t++) {
        float total[PANEL];
        UNROLL for (int i = 0; i < PANEL; i++) total[i] = sum(sums[i][t]);
        for (int64_t i = 0; i < used; i++) {
            for (int64_t k = c; k < width; k++) total[i] += panel[i][k] * x[t * stride + k];
            y[t * rows + i] += total[i];
        }
    }
}

/* y[tokens, rows] = x[tokens, columns] . W^T for rows begin..end: one token row by row, several by unpacked panels. */
INLINE void product(const float *x, int64_t tokens, int64_t columns, float *y, int64_t rows, int64_t begin, int64_t end,
                    struct matrix weights, Unpack unpack, Dot dot) {
    if (tokens == 1) {
        for (int64_t row = begin; row < end; row++) y[row] = dot(weights, row * columns, columns, x);
        return;
    }
    int64_t chunks = (columns + CHUNK - 1) / CHUNK, step = chunks ? (columns / chunks + 63) / 64 * 64 : 0;
    float panel[PANEL][CHUNK];
    memset(panel, 0, sizeof panel);
    for (int64_t row = begin; row < end; row += PANEL) {
        int64_t used = least(PANEL, end - row);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t i = 0; i < used; i++) y[t * rows + row + i] = 0;
        for (int64_t c = 0; c < columns; c += step) {
            int64_t width = least(step, columns - c), t = 0;
            for (int64_t i = 0; i < used; i++) unpack(weights, (row + i) * columns + c, width, panel[i]);
            for (; t + TOKENS <= tokens; t += TOKENS)
                tile(TOKENS, x + t * columns + c, columns, width, panel, used, y + t * rows + row, rows);
            for (; t < tokens; t++) tile(1, x + t * columns + c, columns, width, panel, used, y + t * rows + row, rows);
        }
    }
}

/* Elements first..first + count in float32, or rounded to bfloat16: rows that torch multiplies with many tokens. */
INLINE void unpack_to(void *to, int64_t narrow, int64_t first, int64_t count, struct matrix weights, Unpack unpack) {
    if (!narrow) unpack(weights, first, count, to);
    for (int64_t at = 0; narrow && at < count; at += CHUNK) {
        float values[CHUNK];
        uint16_t *target = (uint16_t *)to + at;
        int64_t width = least(CHUNK, count - at);
        unpack(weights, first + at, width, values);
        for (int64_t i = 0; i < width; i++) {
            uint32_t bits;
            memcpy(&bits, values + i, 4);
            target[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
    }
}
