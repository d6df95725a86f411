/* Elements of KV pages as vectors of WIDTH floats, which the including file defines; rows of LANES elements. */
#ifndef JOINTKV_ELEMENTS_H
#define JOINTKV_ELEMENTS_H
#include <string.h>
#include "../../core/floats.h"

enum { LANES = 32, PARTS = LANES / WIDTH, LINE = 64 };

/* In the order of `PACKED_DTYPES`. */
enum dtype { FLOAT32, BFLOAT16, FLOAT16, FLOAT8_E4M3FN, FLOAT8_E5M2 };
#define EACH_DTYPE(make) make(FLOAT32) make(BFLOAT16) make(FLOAT16) make(FLOAT8_E4M3FN) make(FLOAT8_E5M2)

/* `byte`: of float8_e4m3fn, in the upper half. The result lacks the factor E4M3_SCALE; its NaN stays a NaN. */
INLINE floats from_e4m3(halves byte)
{
    typedef int16_t signed_halves __attribute__((vector_size(2 * WIDTH)));
    halves half = (halves)((signed_halves)byte >> 1) & 0xbf80;
    return from_half(half | (halves)((half | 0x8000) == 0xbf80));
}
#define E4M3_SCALE 256.0f

/* Two parts of a row. Types that are unpacked from the two halves of a larger word come as the elements of even number
 * and those of odd number; `lane_order` in packed.py says so too. */
INLINE void decode(floats to[2], const uint8_t *from, enum dtype dtype)
{
    words word;
    halves half[2];
    switch (dtype) {
    case FLOAT32:
        memcpy(to, from, sizeof *to);
        memcpy(to + 1, from + sizeof *to, sizeof *to);
        return;
    case FLOAT16:
        memcpy(half, from, sizeof half);
        to[0] = from_half(half[0]);
        to[1] = from_half(half[1]);
        return;
    case BFLOAT16:
        memcpy(&word, from, sizeof word);
        to[0] = (floats)(word << 16);
        to[1] = (floats)(word & (int32_t)0xffff0000);
        return;
    default:
        memcpy(half, from, sizeof *half);
        half[1] = half[0] & 0xff00;
        half[0] = half[0] << 8;
        to[0] = dtype == FLOAT8_E4M3FN ? from_e4m3(half[0]) : from_half(half[0]);
        to[1] = dtype == FLOAT8_E4M3FN ? from_e4m3(half[1]) : from_half(half[1]);
    }
}

INLINE int64_t size_of(enum dtype dtype)
{
    return dtype == FLOAT32 ? 4 : dtype == BFLOAT16 || dtype == FLOAT16 ? 2 : 1;
}

/* The row of `left` elements and more that begins at `from`, or in `end` what is left of it and zeros. */
INLINE const uint8_t *filled_row(const uint8_t *from, int64_t left, uint8_t *end, int64_t size)
{
    if (left >= LANES)
        return from;
    memset(end, 0, LANES * size);
    return memcpy(end, from, left * size);
}

#endif
