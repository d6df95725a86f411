/* Compares pairs of KV pages: squared norms per token, whatever the order of the elements inside a page.
 *
 * A page is read as rows of LANES elements. Rows whose lanes belong to the same tokens share a pattern: they are added
 * up lane by lane, and only the LANES totals of a pattern are dealt out to tokens. Vectors are those of GCC and Clang,
 * WIDTH floats each, so that the totals of one pattern stay in registers.
 */
#include <float.h>
#define WIDTH 8
#include "elements.h"

/* The tables of `RowPatterns` in packed.py. A slot is a token of K or a token of V. */
typedef struct {
    int64_t elements, slots, patterns;
    const int32_t *slot;        /* [rows, LANES], the last row filled up */
    const int64_t *pattern_row; /* [patterns], a row that has the pattern */
    const int64_t *fold;        /* [patterns], a power of two: the slots repeat after so many lanes */
    const int64_t *first_run;   /* [patterns + 1], into the runs */
    const int64_t *run_row;     /* [runs] */
    const int64_t *run_length;  /* [runs], rows */
} row_patterns;

/* Squared norms of own - other, own, other; by lanes. */
typedef struct {
    floats apart[PARTS], own[PARTS], other[PARTS];
} totals;

INLINE void add_row(totals *to, const uint8_t *own, const uint8_t *other, enum dtype dtype)
{
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part += 2) {
        floats x[2], y[2];
        decode(x, own + part * WIDTH * size_of(dtype), dtype);
        decode(y, other + part * WIDTH * size_of(dtype), dtype);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            floats d = x[i] - y[i];
            to->apart[part + i] += d * d;
            to->own[part + i] += x[i] * x[i];
            to->other[part + i] += y[i] * y[i];
        }
    }
}

/* Adds the lanes' totals to the slots `sums [slots, 3]`. */
INLINE void deal_out(const totals *from, const int32_t *slot, int64_t fold, float *sums)
{
    float lanes[3][LANES];
    memcpy(lanes, from, sizeof lanes);
    for (int half = LANES / 2; half >= fold; half /= 2)
        for (int which = 0; which < 3; which++)
            for (int lane = 0; lane < half; lane++)
                lanes[which][lane] += lanes[which][lane + half];
    for (int lane = 0; lane < fold; lane++)
        for (int which = 0; which < 3; which++)
            sums[3 * slot[lane] + which] += lanes[which][lane];
}

/* A row of the page; `end` holds the last one where it has to be filled up with zeros. */
INLINE const uint8_t *row_of(const row_patterns *rows, const uint8_t *page, int64_t row, uint8_t *end, int64_t size)
{
    return filled_row(page + row * LANES * size, rows->elements - row * LANES, end, size);
}

/* The least squared difference of tokens that differ, of which these are the sums. */
INLINE float least(const float *sum, float resolution)
{
    float relative = resolution * sum[1];
    return relative > FLT_MIN ? relative : FLT_MIN;
}

/* Gives tokens that differ a difference above zero, although the squares of small numbers vanish. */
INLINE void keep_tiny(const row_patterns *rows, const uint8_t *own, const uint8_t *other, float resolution,
                      float *sums, enum dtype dtype)
{
    int64_t size = size_of(dtype);
    int lost = 0;
    for (int64_t slot = 0; slot < rows->slots; slot++)
        lost |= sums[3 * slot] < least(sums + 3 * slot, resolution);
    if (!lost || memcmp(own, other, rows->elements * size) == 0)
        return;
    uint8_t ends[2][LANES * 4];
    for (int64_t row = 0; row * LANES < rows->elements; row++) {
        const uint8_t *x = row_of(rows, own, row, ends[0], size), *y = row_of(rows, other, row, ends[1], size);
        if (memcmp(x, y, LANES * size) == 0)
            continue;
        for (int part = 0; part < PARTS; part += 2) {
            floats numbers[2][2];
            decode(numbers[0], x + part * WIDTH * size, dtype);
            decode(numbers[1], y + part * WIDTH * size, dtype);
            for (int lane = 0; lane < 2 * WIDTH; lane++) {
                float *sum = sums + 3 * rows->slot[row * LANES + part * WIDTH + lane];
                int differ = numbers[0][lane / WIDTH][lane % WIDTH] != numbers[1][lane / WIDTH][lane % WIDTH];
                if (differ && sum[0] < least(sum, resolution))
                    sum[0] = least(sum, resolution);
            }
        }
    }
}

/* `next`: the pages that come after these, fetched meanwhile: the processor foresees neither them nor the order in
 * which patterns read a page. */
INLINE void compare(const row_patterns *rows, const uint8_t *own, const uint8_t *other, const uint8_t *const next[2],
                    float resolution, float *sums, enum dtype dtype)
{
    int64_t stride = LANES * size_of(dtype), whole = rows->elements / LANES;
    memset(sums, 0, rows->slots * 3 * sizeof *sums);
    for (int64_t pattern = 0; pattern < rows->patterns; pattern++) {
        totals sum = {0};
        for (int64_t run = rows->first_run[pattern]; run < rows->first_run[pattern + 1]; run++) {
            int64_t row = rows->run_row[run], end = row + rows->run_length[run];
            for (; row < end; row++) {
                for (int64_t byte = row * stride; byte < (row + 1) * stride; byte += LINE) {
                    __builtin_prefetch(next[0] + byte);
                    __builtin_prefetch(next[1] + byte);
                }
                add_row(&sum, own + row * stride, other + row * stride, dtype);
            }
        }
        deal_out(&sum, rows->slot + rows->pattern_row[pattern] * LANES, rows->fold[pattern], sums);
    }
    if (whole * LANES < rows->elements) {
        totals sum = {0};
        uint8_t ends[2][LANES * 4];
        add_row(&sum, row_of(rows, own, whole, ends[0], size_of(dtype)),
                row_of(rows, other, whole, ends[1], size_of(dtype)), dtype);
        deal_out(&sum, rows->slot + whole * LANES, LANES, sums);
    }
    if (dtype == FLOAT8_E4M3FN)
        for (int64_t i = 0; i < rows->slots * 3; i++)
            sums[i] *= E4M3_SCALE * E4M3_SCALE;
    keep_tiny(rows, own, other, resolution, sums, dtype);
}

typedef void comparison(const row_patterns *, const uint8_t *, const uint8_t *, const uint8_t *const[2], float,
                        float *);

#define COMPARISON(dtype)                                                                                              \
    static void compare_##dtype(const row_patterns *rows, const uint8_t *own, const uint8_t *other,                    \
                                const uint8_t *const next[2], float resolution, float *sums)                           \
    {                                                                                                                  \
        compare(rows, own, other, next, resolution, sums, dtype);                                                      \
    }
EACH_DTYPE(COMPARISON)

#define ENTRY(dtype) [dtype] = compare_##dtype,
static comparison *const comparisons[] = {EACH_DTYPE(ENTRY)};

/* Writes `sums [pairs, layers, slots, 3]` for the pages `own [pairs]` and `other [pairs]` of every layer. */
void jointkv_pair_sums(const row_patterns *rows, const uint8_t *const *layers, int64_t num_layers, int64_t page_bytes,
                       int32_t dtype, const int64_t *own, const int64_t *other, int64_t pairs, float resolution,
                       float *sums, int32_t threads)
{
    int64_t items = pairs * num_layers;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < items; item++) {
        const uint8_t *pages[2][2];
        for (int ahead = 0; ahead < 2; ahead++) {
            int64_t of = item + ahead < items ? item + ahead : item;
            pages[ahead][0] = layers[of % num_layers] + own[of / num_layers] * page_bytes;
            pages[ahead][1] = layers[of % num_layers] + other[of / num_layers] * page_bytes;
        }
        comparisons[dtype](rows, pages[0][0], pages[0][1], pages[1], resolution, sums + item * rows->slots * 3);
    }
}
