/* Vectors of floats in the notation of GCC and Clang, WIDTH at a time, and what a KV page may be made of. */
#ifndef JOINTKV_VECTORS_H
#define JOINTKV_VECTORS_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#define WIDTH 16
#else
#define WIDTH 8
#endif
#include "../core/floats.h"

enum { LINE = 64 };
enum dtype { FLOAT32, BFLOAT16, FLOAT16 };

typedef float eights __attribute__((vector_size(32)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t eight_words __attribute__((vector_size(32)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (eight_words){__VA_ARGS__})
#endif

/* Compilers would rather load a number again for each use, which takes more loads than a processor does at once. */
#ifdef __AVX__
#define IN_REGISTER(value) __asm__("" : "+v"(value))
#else
#define IN_REGISTER(value) (void)(value)
#endif

INLINE int64_t size_of(enum dtype dtype)
{
    return dtype == FLOAT32 ? 4 : 2;
}

INLINE floats load(const uint8_t *from, enum dtype dtype)
{
    floats value;
    halves half;
    if (dtype == FLOAT32) {
        memcpy(&value, from, sizeof value);
        return value;
    }
    memcpy(&half, from, sizeof half);
    return dtype == BFLOAT16 ? (floats)(__builtin_convertvector(half, words) << 16) : from_half(half);
}

INLINE floats load_floats(const float *from)
{
    return load((const uint8_t *)from, FLOAT32);
}

INLINE void store_floats(float *to, floats value)
{
    memcpy(to, &value, sizeof value);
}

/* Of WIDTH pairs of bfloat16 the first ones, and the second ones. */
INLINE floats first_of_pairs(const uint8_t *from)
{
    words pairs;
    memcpy(&pairs, from, sizeof pairs);
    return (floats)(pairs << 16);
}

INLINE floats second_of_pairs(const uint8_t *from)
{
    words pairs;
    memcpy(&pairs, from, sizeof pairs);
    return (floats)(pairs & (int32_t)0xffff0000);
}

/* 2^x for x <= 0 within 2e-7 of its size; 0 below -126; NaN stays NaN. */
INLINE floats power_of_two(floats x)
{
    floats shifted = x + 12582912.0f, rest = x - (shifted - 12582912.0f);
    floats sum = rest * 1.535336188319500e-4f + 1.339887440266574e-3f;
    sum = sum * rest + 9.618437357674640e-3f;
    sum = sum * rest + 5.550332471162809e-2f;
    sum = sum * rest + 2.402264791363012e-1f;
    sum = sum * rest + 6.931472028550421e-1f;
    sum = sum * rest + 1.0f;
    words power = (words)sum + ((words)shifted << 23);
    return (floats)(power & ~(words)(x < -126.0f));
}

INLINE floats larger(floats a, floats b)
{
    words pick = a > b;
    return (floats)((pick & (words)a) | (~pick & (words)b));
}

INLINE float sum_of(floats value)
{
    float sum = 0;
    for (int lane = 0; lane < WIDTH; lane++)
        sum += value[lane];
    return sum;
}

INLINE float largest_of(floats value)
{
    float most = value[0];
    for (int lane = 1; lane < WIDTH; lane++)
        most = value[lane] > most ? value[lane] : most;
    return most;
}

/* Eight rows of eight floats from lines `from_line` apart become columns at lines `to_line` apart. */
INLINE void transpose(const float *from, int64_t from_line, float *to, int64_t to_line)
{
    eights a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        memcpy(&a[i], from + i * from_line, sizeof *a);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = SHUFFLE(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        b[i + 1] = SHUFFLE(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        int top = (i & 1) + (i & 2) * 2;
        a[2 * i] = SHUFFLE(b[top], b[top + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        a[2 * i + 1] = SHUFFLE(b[top], b[top + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b[i] = SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        b[i + 4] = SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        memcpy(to + i * to_line, &b[i], sizeof *b);
}

#endif
