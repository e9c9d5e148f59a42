/* The calling convention of CPU graphs (cpu_graph.c): every argument, number or address, is one 64-bit integer. */
#pragma once
#include <stdint.h>
#include <string.h>

#define ADDRESS(i) ((void *)arguments_[i])
#define NUMBER(i) (arguments_[i])
#define FLOAT(i) float_of_bits(arguments_[i])

static inline float float_of_bits(int64_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Define `function`_call. STATUS_CALL is for functions that return a status, 0 for success. */
#define CALL(function, ...) DEFINE_CALL(function, function(__VA_ARGS__); return 0)
#define STATUS_CALL(function, ...) DEFINE_CALL(function, return function(__VA_ARGS__))
#define DEFINE_CALL(function, body) \
    int function##_call(const int64_t *arguments_) { body; }
