/* Arguments: type (bfloat16, float32), rows, width. Standard input: x, y [rows, width] and a weight [width]. Output: the
 * RMS norm of x, then silu(x) * y. */
#include "elementwise.c"
#include <stdio.h>
#include <stdlib.h>

int main(int count, char **arguments) {
    const int64_t rows = atoi(arguments[2]), width = atoi(arguments[3]), all = rows * width;
    const size_t size = arguments[1][0] == 'b' ? 2 : 4;
    char *x = malloc(all * size), *y = malloc(all * size), *weight = malloc(width * size), *out = malloc(2 * all * size);
    if (count != 4 || fread(x, size, all, stdin) != (size_t)all || fread(y, size, all, stdin) != (size_t)all) return 2;
    if (fread(weight, size, width, stdin) != (size_t)width) return 2;
    void *product = out + all * size;
    if (size == 2) {
        rms_norm_bf16((bfloat16 *)out, (bfloat16 *)x, (bfloat16 *)weight, rows, width, 1e-6f, 0);
        silu_mul_bf16(product, (bfloat16 *)x, width, (bfloat16 *)y, width, rows, width);
    } else {
        rms_norm_f32((float *)out, (float *)x, (float *)weight, rows, width, 1e-6f, 0);
        silu_mul_f32(product, (float *)x, width, (float *)y, width, rows, width);
    }
    fwrite(out, size, 2 * all, stdout);
    return 0;
}
