/* QMoE's dictionary, and encoding by it: the 65,536 likeliest sequences of 1 to 14 pairs of ternary digits.
 *
 * A digit is 0 with probability 0.885, 1 or 2 with 0.0575. Sequences come off a heap in the order of their
 * probability (float64), equal ones in the order of their pairs; each gets the next code and adds its nine extensions.
 * So every beginning of a codeword is one too, and `next` [words + 1, 9] finds it: a node is a code + 1, 0 the start.
 */
#include "native.h"
#include <stdlib.h>

#define WORDS 65536
#define PAIRS 14

/* `pairs` has each pair + 1 in four bits, the first highest: its order as a number is that of the sequences. */
struct word { double probability; uint64_t pairs; int32_t length, parent; };

INLINE int before(struct word a, struct word b) {
    return a.probability != b.probability ? a.probability > b.probability : a.pairs < b.pairs;
}

static void push(struct word *heap, int64_t *size, struct word word) {
    int64_t i = (*size)++;
    for (; i && before(word, heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = word;
}

static struct word pop(struct word *heap, int64_t *size) {
    struct word first = heap[0], last = heap[--*size];
    int64_t i = 0;
    for (int64_t child; (child = 2 * i + 1) < *size; i = child) {
        if (child + 1 < *size && before(heap[child + 1], heap[child])) child++;
        if (!before(heap[child], last)) break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return first;
}

/* A codeword as qmoe.c wants it, or 0 if it has more than three digits that are not zero. */
static uint32_t entry_of(struct word word) {
    uint32_t entry = (uint32_t)word.length * 2;
    int used = 0;
    for (int place = 0; place < 2 * word.length; place++) {
        int pair = (int)(word.pairs >> (4 * (PAIRS - 1 - place / 2)) & 15) - 1;
        uint32_t digit = (uint32_t)(place % 2 ? pair / 3 : pair % 3);
        if (!digit) continue;
        if (used == 3) return 0;
        entry |= (uint32_t)place << (5 + 5 * used) | digit << (20 + 2 * used);
        used++;
    }
    return entry;
}

/* Write table [65536], pairs [65536] and next [65537, 9]; returns 0, or 1 without memory, 2 if a word does not fit. */
API int64_t qmoe_dictionary(uint32_t *table, uint64_t *pairs, int32_t *next) {
    static const double p[3] = {0.885, 0.0575, 0.0575};
    struct word *heap = malloc(sizeof *heap * (9 * (WORDS + 1) + 1));
    if (!heap) return 1;
    int64_t size = 0, error = 0;
    memset(next, 0, sizeof *next * 9 * (WORDS + 1));
    push(heap, &size, (struct word){1, 0, 0, 0});
    for (int32_t node = 0; node <= WORDS; node++) {
        struct word word = pop(heap, &size);
        if (node) {
            table[node - 1] = entry_of(word);
            pairs[node - 1] = word.pairs;
            next[word.parent * 9 + (int)(word.pairs >> (4 * (PAIRS - word.length)) & 15) - 1] = node;
            if (!table[node - 1]) error = 2;
        }
        for (int s = 0; s < 9 && word.length < PAIRS; s++) {
            uint64_t longer = word.pairs | (uint64_t)(s + 1) << (4 * (PAIRS - 1 - word.length));
            push(heap, &size, (struct word){word.probability * (p[s / 3] * p[s % 3]), longer, word.length + 1, node});
        }
    }
    free(heap);
    return error;
}

/* Encode rows of digits (0, 1, 2; columns even) by the longest match; writes up to rows * columns / 2 codes and rows + 1
 * offsets, and returns the number of codes, or -1 for a digit that is none.
 */
API int64_t qmoe_encode(const uint8_t *digits, int64_t rows, int64_t columns, const int32_t *next, uint16_t *codes,
                        int32_t *offsets) {
    int64_t count = 0;
    offsets[0] = 0;
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t *at = digits + row * columns;
        int32_t node = 0;
        for (int64_t c = 0; c + 2 <= columns; c += 2) {
            if (at[c] > 2 || at[c + 1] > 2) return -1;
            int pair = at[c] + 3 * at[c + 1];
            int32_t longer = next[node * 9 + pair];
            if (!longer) { /* every single pair is a codeword */
                codes[count++] = (uint16_t)(node - 1);
                longer = next[pair];
            }
            node = longer;
        }
        if (node) codes[count++] = (uint16_t)(node - 1);
        offsets[row + 1] = (int32_t)count;
    }
    return count;
}
