/* How a CPU graph (cpu_graph.c) calls a function: its arguments are 64-bit words, numbers and addresses alike. */
#pragma once
#include <stdint.h>
#include <string.h>

#define ADDRESS(i) ((void *)words_[i])
#define NUMBER(i) (words_[i])
#define FLOAT(i) float_of_word(words_[i])

static inline float float_of_word(int64_t word) {
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

/* Define `function`_call. The second form is for functions that return a status, 0 for success. */
#define CALL(function, ...) DEFINE_CALL(function, function(__VA_ARGS__); return 0)
#define STATUS_CALL(function, ...) DEFINE_CALL(function, return function(__VA_ARGS__))
#define DEFINE_CALL(function, body) \
    int function##_call(const int64_t *words_) { body; }
