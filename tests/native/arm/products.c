/* Arguments: type (bfloat16, float16, float32), kernel, T, N, K. Standard input: inputs, weight, bias; output: outputs. */
#include "products/matmul.c"
#include <stdio.h>

int main(int count, char **arguments) {
    const int64_t rows = atoi(arguments[3]), outputs = atoi(arguments[4]), width = atoi(arguments[5]);
    const char type = arguments[1][0] == 'b' ? 'b' : arguments[1][5] == '1' ? 'h' : 'f', kernel = arguments[2][0];
    const size_t size = type == 'f' ? 4 : 2;
    char *x = malloc(rows * width * size), *w = malloc(outputs * width * size), *b = malloc(outputs * size);
    char *y = malloc(rows * outputs * size);
    if (count != 6 || fread(x, width * size, rows, stdin) != (size_t)rows) return 2;
    if (fread(w, width * size, outputs, stdin) != (size_t)outputs) return 2;
    if (fread(b, size, outputs, stdin) != (size_t)outputs) return 2;
#define RUN(name) (kernel == 'f' ? few_##name : panels_##name)(x, w, b, y, rows, outputs, width, width, width)
    const int failed = type == 'b' ? RUN(bfloat16) : type == 'h' ? RUN(float16) : RUN(float32);
    fwrite(y, size, rows * outputs, stdout);
    return failed;
}
