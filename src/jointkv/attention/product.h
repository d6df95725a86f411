/* A matrix product in register tiles, of float32 rows on the left and stored numbers on the right. */
#ifndef JOINTKV_PRODUCT_H
#define JOINTKV_PRODUCT_H
#include "vectors.h"

/* A register tile has up to ROWS rows of 2 vectors, or WIDE rows of 4. The latter take fewer loads for the same work,
 * the former unpack fewer halves. */
#ifdef __AVX512F__
enum { ROWS = 12, WIDE = 6 };
#else
enum { ROWS = 6, WIDE = 3 };
#endif

/* Numbers that stand line after line, the first of them to be multiplied by `column` of the left; `next` is what will
 * be read after them, fetched meanwhile. */
typedef struct {
    const uint8_t *at, *next;
    int64_t lines, line, column;
} strip;

/* to [rows, vectors * WIDTH] (+)= left [rows, lines] x strips [lines, vectors * WIDTH]. */
typedef struct {
    const float *left;
    int64_t left_row;
    const strip *strips;
    int64_t num_strips, skip;
    float *to;
    int64_t to_row;
    int add;
} factors;

INLINE void multiply_tile(const factors *of, int rows, int vectors, enum dtype dtype)
{
    floats sum[ROWS][4] = {{{0}}};
    if (of->add)
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sum[r][v] = load_floats(of->to + r * of->to_row + v * WIDTH);
    for (int64_t s = 0; s < of->num_strips; s++) {
        const strip *strip = of->strips + s;
        const uint8_t *right = strip->at + of->skip, *next = strip->next + of->skip;
        const float *left = of->left + strip->column;
        int64_t left_row = of->left_row, line = strip->line;
        for (int64_t k = strip->lines; k; k--) {
            floats factor[ROWS];
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++)
                factor[r] = left[r * left_row] - (floats){0};
            __builtin_prefetch(next, 0, 2);
            if (vectors * WIDTH * size_of(dtype) > LINE)
                __builtin_prefetch(next + LINE, 0, 2);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                floats numbers = load(right + v * WIDTH * size_of(dtype), dtype);
                IN_REGISTER(numbers);
#pragma GCC unroll 12
                for (int r = 0; r < rows; r++)
                    sum[r][v] += factor[r] * numbers;
            }
            left++;
            right += line;
            next += line;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            store_floats(of->to + r * of->to_row + v * WIDTH, sum[r][v]);
}

/* Every shape of a register tile as code of its own. */
#define SHAPES(rows, dtype)                                                                                            \
    case rows * 8 + 1: multiply_tile(of, rows, 1, dtype); return;                                                      \
    case rows * 8 + 2: multiply_tile(of, rows, 2, dtype); return;
#define WIDE_SHAPES(rows, dtype)                                                                                       \
    SHAPES(rows, dtype)                                                                                                \
    case rows * 8 + 4: multiply_tile(of, rows, 4, dtype); return;
#ifdef __AVX512F__
#define ALL_SHAPES(dtype)                                                                                              \
    WIDE_SHAPES(1, dtype) WIDE_SHAPES(2, dtype) WIDE_SHAPES(3, dtype) WIDE_SHAPES(4, dtype) WIDE_SHAPES(5, dtype)      \
    WIDE_SHAPES(6, dtype) SHAPES(7, dtype) SHAPES(8, dtype) SHAPES(9, dtype) SHAPES(10, dtype) SHAPES(11, dtype)       \
    SHAPES(12, dtype)
#else
#define ALL_SHAPES(dtype)                                                                                              \
    WIDE_SHAPES(1, dtype) WIDE_SHAPES(2, dtype) WIDE_SHAPES(3, dtype) SHAPES(4, dtype) SHAPES(5, dtype)                \
    SHAPES(6, dtype)
#endif
#define MULTIPLY_SHAPE(name, dtype)                                                                                    \
    static void name(const factors *of, int rows, int vectors)                                                         \
    {                                                                                                                  \
        switch (rows * 8 + vectors) {                                                                                  \
            ALL_SHAPES(dtype)                                                                                          \
        }                                                                                                              \
    }
MULTIPLY_SHAPE(multiply_float32, FLOAT32)
MULTIPLY_SHAPE(multiply_bfloat16, BFLOAT16)
MULTIPLY_SHAPE(multiply_float16, FLOAT16)

typedef void multiplication(const factors *, int, int);
static multiplication *const multiplications[] = {
    [FLOAT32] = multiply_float32, [BFLOAT16] = multiply_bfloat16, [FLOAT16] = multiply_float16};

/* A product of any number of rows and `vectors`, by register tiles of rows as equal as can be. */
static void multiply(factors of, int64_t rows, int64_t vectors, enum dtype dtype)
{
    int64_t tall = dtype == FLOAT32 ? WIDE : ROWS, blocks = (rows + tall - 1) / tall;
    const float *left = of.left;
    float *to = of.to;
    for (int64_t block = 0; block < blocks; block++) {
        int64_t from = rows * block / blocks, height = rows * (block + 1) / blocks - from;
        int64_t most = height <= WIDE ? 4 : 2;
        of.left = left + from * of.left_row;
        for (int64_t done = 0, width; done < vectors; done += width) {
            width = vectors - done >= most ? most : vectors - done >= 2 ? 2 : 1;
            of.to = to + from * of.to_row + done * WIDTH;
            of.skip = done * WIDTH * size_of(dtype);
            multiplications[dtype](&of, height, width);
        }
    }
}

#endif
