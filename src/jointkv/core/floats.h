/* Vectors of WIDTH floats, which the including file defines as 8 or 16, in the notation of GCC and Clang; and floats of
 * 16 bits. */
#ifndef JOINTKV_FLOATS_H
#define JOINTKV_FLOATS_H
#include <stdint.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian processors"
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

/* The processor's own conversion reads subnormals at full speed, and right where a library has made the processor
 * read subnormal floats as zero; the other branch shifts them into the normal range and back for the same reasons. */
INLINE floats from_half(halves half)
{
#if WIDTH == 16 && defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps((__m256i)half);
#elif WIDTH == 8 && defined(__F16C__)
    return (floats)_mm256_cvtph_ps((__m128i)half);
#else
    words bits = __builtin_convertvector(half, words);
    words magnitude = bits & 0x7fff, sign = (bits >> 15) << 31;
    words subnormal = magnitude < 0x0400, not_finite = magnitude >= 0x7c00;
    words wide = (magnitude << 13) + (112 << 23);
    floats value = (floats)(wide + (subnormal & (1 << 23))) - (floats)(subnormal & (113 << 23));
    return (floats)((words)value | sign | (not_finite & 0x7f800000));
#endif
}

#endif
