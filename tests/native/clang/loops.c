/* Every kind of parallel loop that the kernels have: each adds 1 to its place of `done`, by any thread. */
#include <stdint.h>

void rising(int32_t *done, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) done[i]++;
}

void rising_by_three(int32_t *done, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < (int)count; i += 3)
        for (int j = i; j < i + 3 && j < count; j++) done[j]++;
}

void falling(int32_t *done, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int64_t i = count - 1; i >= 0; i--) done[i]++;
}

void of_two_loops(int32_t *done, int64_t count) {
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < 1; j++) done[i + j]++;
}

void handed_out(int32_t *done, int64_t count) {
#pragma omp parallel if (count > 3)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) done[i]++;
#pragma omp for schedule(dynamic, 2)
        for (int64_t i = count - 1; i >= 0; i--) done[i]++;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) done[i]--;
    }
}

/* The inner region is of one thread; each outer iteration does all of it. */
void nested(int32_t *done, int64_t count) {
    const int64_t rows = count / 8;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
#pragma omp parallel for schedule(static) if (rows < 0)
        for (int64_t i = 0; i < 8; i++) done[row * 8 + i]++;
    }
    for (int64_t i = rows * 8; i < count; i++) done[i]++;
}

void reduced(int32_t *done, int64_t count) {
    int bits = 0;
#pragma omp parallel reduction(| : bits)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) bits |= 1 << i % 16;
    }
    const int wanted = count < 16 ? (1 << count) - 1 : 0xffff;
    for (int64_t i = 0; i < count; i++) done[i] += bits == wanted;
}

/* More variables than fit in registers. */
void with_many_variables(int32_t *done, int64_t count) {
    int64_t a = 1, b = 2, c = 3, d = 4, e = 5, f = 6, g = 7, h = 8, k = 9, l = 10, m = 11, n = 12;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) done[i] += a + b + c + d + e + f + g + h + k + l + m + n == 78;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < 1; i++) a++, b++, c++, d++, e++, f++, g++, h++, k++, l++, m++, n++;
    }
    if (a + b + c + d + e + f + g + h + k + l + m + n != 90) done[0] = -1;
}
