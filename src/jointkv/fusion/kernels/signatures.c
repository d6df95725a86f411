/* Signatures of KV blocks straight from their pages: products with random directions, and the norm, in one pass.
 *
 * The K, or V, of a page is read in runs, a run as rows of LANES elements: a run of all directions, 16 KiB, stays in the
 * first-level cache while the pages of a group pass. Two pages and COLUMNS directions are taken at
 * a time, so that what is read of the directions serves twice and the totals stay in registers.
 */
#include <math.h>
#define WIDTH 8
#include "elements.h"

enum { COLUMNS = 4, PAIR = 2, PAIRS = 8, GROUP = PAIR * PAIRS };

/* One side of the blocks, by layer; its elements lie in runs. `projection` is [tiles, rows, PARTS, COLUMNS, WIDTH]: the
 * last row of a run filled up with zeros, lanes as `decode` unpacks them. */
typedef struct {
    const uint8_t *const *layers;
    int64_t page_bytes, rows, runs;
    const int64_t *run_start, *run_length;
    const float *projection;
} block_side;

typedef struct {
    floats product[PAIR][COLUMNS], square[PAIR];
} totals;

INLINE void add_row(totals *to, const uint8_t *const from[PAIR], const float *projection, enum dtype dtype)
{
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part += 2) {
        floats x[PAIR][2];
#pragma GCC unroll 2
        for (int page = 0; page < PAIR; page++)
            decode(x[page], from[page] + part * WIDTH * size_of(dtype), dtype);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
#pragma GCC unroll 2
            for (int page = 0; page < PAIR; page++)
                to->square[page] += x[page][i] * x[page][i];
#pragma GCC unroll 4
            for (int column = 0; column < COLUMNS; column++) {
                floats direction;
                memcpy(&direction, projection + ((part + i) * COLUMNS + column) * WIDTH, sizeof direction);
#pragma GCC unroll 2
                for (int page = 0; page < PAIR; page++)
                    to->product[page][column] += x[page][i] * direction;
            }
        }
    }
}

INLINE float total(floats lanes)
{
    float sum = 0;
    for (int lane = 0; lane < WIDTH; lane++)
        sum += lanes[lane];
    return sum;
}

/* Adds one run of two pages, from `start` on. `next`: what is read after it, fetched meanwhile. */
INLINE void add_run(totals *to, const uint8_t *const start[PAIR], const uint8_t *const next[PAIR], int64_t length,
                    const float *projection, enum dtype dtype)
{
    totals sum = *to;
    int64_t size = size_of(dtype), row_bytes = LANES * size;
    const uint8_t *rows[PAIR] = {start[0], start[1]}, *fetched[PAIR] = {next[0], next[1]};
    int64_t left = length;
    for (; left >= LANES; left -= LANES, projection += COLUMNS * LANES) {
#pragma GCC unroll 2
        for (int page = 0; page < PAIR; page++)
            for (int64_t byte = 0; byte < row_bytes; byte += LINE)
                __builtin_prefetch(fetched[page] + byte);
        add_row(&sum, rows, projection, dtype);
#pragma GCC unroll 2
        for (int page = 0; page < PAIR; page++) {
            rows[page] += row_bytes;
            fetched[page] += row_bytes;
        }
    }
    *to = sum;
    if (left) {
        uint8_t ends[PAIR][LANES * 4];
        for (int page = 0; page < PAIR; page++)
            rows[page] = filled_row(rows[page], left, ends[page], size);
        add_row(to, rows, projection, dtype);
    }
}

typedef void adding(totals *, const uint8_t *const[PAIR], const uint8_t *const[PAIR], int64_t, const float *);

#define ADDING(dtype)                                                                                                  \
    static void add_##dtype(totals *to, const uint8_t *const start[PAIR], const uint8_t *const next[PAIR],             \
                            int64_t length, const float *projection)                                                   \
    {                                                                                                                  \
        add_run(to, start, next, length, projection, dtype);                                                           \
    }
EACH_DTYPE(ADDING)

#define ENTRY(dtype) [dtype] = add_##dtype,
static adding *const addings[] = {EACH_DTYPE(ENTRY)};

/* Sums over the pages of a group, two at a time; a run of the directions stays in the cache meanwhile. */
static void add_pages(totals sums[PAIRS], const block_side *side, const uint8_t *const pages[GROUP], int pairs,
                      const float *projection, enum dtype dtype)
{
    int64_t size = size_of(dtype);
    for (int64_t run = 0; run < side->runs; run++) {
        int64_t start = side->run_start[run], length = side->run_length[run];
        int64_t after = run + 1 < side->runs ? side->run_start[run + 1] : start;
        for (int pair = 0; pair < pairs; pair++) {
            const uint8_t *const *read = pages + pair * PAIR, *const *then = pair + 1 < pairs ? read + PAIR : pages;
            int64_t ahead = pair + 1 < pairs ? start : after;
            const uint8_t *from[PAIR] = {read[0] + start * size, read[1] + start * size};
            const uint8_t *next[PAIR] = {then[0] + ahead * size, then[1] + ahead * size};
            addings[dtype](sums + pair, from, next, length, projection);
        }
        projection += (length + LANES - 1) / LANES * LANES * COLUMNS;
    }
}

/* Writes `signatures [blocks, 2, layers, columns]` of the blocks in `pages [blocks]`. */
void jointkv_signatures(const block_side sides[2], int64_t num_layers, int32_t dtype, const int64_t *pages,
                        int64_t blocks, int64_t columns, float *signatures, int32_t threads)
{
    int64_t groups = (blocks + GROUP - 1) / GROUP, items = 2 * num_layers * groups;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < items; item++) {
        int64_t of = item / groups, first = item % groups * GROUP;
        int held = blocks - first < GROUP ? blocks - first : GROUP;
        const block_side *side = sides + of / num_layers;
        const uint8_t *read[GROUP];
        for (int i = 0; i < GROUP; i++)
            read[i] = side->layers[of % num_layers] + pages[first + (i < held ? i : 0)] * side->page_bytes;
        for (int64_t tile = 0; tile * COLUMNS < columns; tile++) {
            totals sums[PAIRS] = {0};
            const float *projection = side->projection + tile * side->rows * COLUMNS * LANES;
            add_pages(sums, side, read, (held + PAIR - 1) / PAIR, projection, dtype);
            for (int i = 0; i < held; i++) {
                const totals *sum = sums + i / PAIR;
                float norm = sqrtf(total(sum->square[i % PAIR]));
                float *to = signatures + ((first + i) * 2 * num_layers + of) * columns + tile * COLUMNS;
                for (int column = 0; column < COLUMNS && tile * COLUMNS + column < columns; column++)
                    to[column] = norm == 0 ? 0 : total(sum->product[i % PAIR][column]) / norm;
            }
        }
    }
}
