/* Where K and V of a page lie, and how to unpack them. */
#ifndef JOINTKV_PAGES_H
#define JOINTKV_PAGES_H
#include "vectors.h"

enum { MOST_TOKENS = 256, MOST_SIZE = 512, PAIRS = 16 };
/* K of one page and head: tokens x size by rows, size x tokens, or 16 tokens a group, [size / 2][token][2];
 * V is by rows in the first two, and [size / 16][token / 2][16][2] in the last. */
enum order { BY_ROWS, BY_COLUMNS, BY_PAIRS };

/* Fields as in cpu.py. Strides are in bytes. */
typedef struct {
    const uint8_t *keys, *values;
    int64_t key_page, key_head, key_line, value_page, value_head, value_line;
    int64_t tokens, key_size, value_size, heads, group;
    int32_t dtype, order;
} page_store;

INLINE int64_t padded(int64_t tokens)
{
    return (tokens + WIDTH - 1) / WIDTH * WIDTH;
}

/* K of a whole page and head as float32 by columns, lines of padded(tokens). What stands beyond the tokens is
 * anything. */
INLINE void unpack_keys(const page_store *store, const uint8_t *page, float *to, enum dtype dtype)
{
    int64_t columns = padded(store->tokens), size = store->key_size, tokens = store->tokens;
    if (store->order == BY_COLUMNS) {
        for (int64_t k = 0; k < size; k++) {
            uint8_t filled_up[MOST_TOKENS * 4];
            const uint8_t *line = page + k * store->key_line;
            if (columns != tokens)
                line = memcpy(filled_up, line, tokens * size_of(dtype));
            for (int64_t t = 0; t < columns; t += WIDTH)
                store_floats(to + k * columns + t, load(line + t * size_of(dtype), dtype));
        }
    } else if (store->order == BY_ROWS) {
        for (int64_t t = 0; t < columns; t += 8) {
            float rows[8 * MOST_SIZE];
            for (int64_t i = 0; i < 8; i++) {
                const uint8_t *row = page + (t + i < tokens ? t + i : tokens - 1) * store->key_line;
                for (int64_t k = 0; k < size; k += WIDTH)
                    store_floats(rows + i * size + k, load(row + k * size_of(dtype), dtype));
            }
            for (int64_t k = 0; k < size; k += 8)
                transpose(rows + k, size, to + k * columns + t, columns);
        }
    } else {
        for (int64_t t = 0; t < tokens; t += PAIRS)
            for (int64_t k = 0; k < size; k += 2)
                for (int64_t lane = 0; lane < PAIRS; lane += WIDTH) {
                    const uint8_t *pairs = page + ((t * size + k * PAIRS) / 2 + lane) * 4;
                    store_floats(to + k * columns + t + lane, first_of_pairs(pairs));
                    store_floats(to + (k + 1) * columns + t + lane, second_of_pairs(pairs));
                }
    }
}

/* V of the first `tokens` of a page and head as float32 by rows. */
INLINE void unpack_values(const page_store *store, const uint8_t *page, int64_t tokens, float *to, enum dtype dtype)
{
    int64_t size = store->value_size;
    if (store->order != BY_PAIRS) {
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t k = 0; k < size; k += WIDTH)
                store_floats(to + t * size + k, load(page + t * store->value_line + k * size_of(dtype), dtype));
        return;
    }
    for (int64_t t = 0; t < tokens; t += 2)
        for (int64_t k = 0; k < size; k += PAIRS)
            for (int64_t lane = 0; lane < PAIRS; lane += WIDTH) {
                const uint8_t *pairs = page + ((k * store->tokens + t * PAIRS) / 2 + lane) * 4;
                store_floats(to + t * size + k + lane, first_of_pairs(pairs));
                store_floats(to + (t + 1) * size + k + lane, second_of_pairs(pairs));
            }
}

#endif
