/* Arguments: type (bfloat16, float32), tokens, heads, groups, width. Standard input: queries, then keys and values in
 * cache order; output: the attention of one sequence's tokens over themselves. */
#include "attention/attention.c"
#include <stdio.h>

int main(int count, char **arguments) {
    const int64_t tokens = atoi(arguments[2]), heads = atoi(arguments[3]), groups = atoi(arguments[4]);
    const int64_t width = atoi(arguments[5]), all = heads * groups * width, own = heads * width;
    const size_t size = arguments[1][0] == 'b' ? 2 : 4;
    char *query = malloc(tokens * all * size), *keys = malloc(tokens * own * size), *values = malloc(tokens * own * size);
    char *output = malloc(tokens * all * size);
    if (count != 6 || fread(query, all * size, tokens, stdin) != (size_t)tokens) return 2;
    if (fread(keys, own * size, tokens, stdin) != (size_t)tokens) return 2;
    if (fread(values, own * size, tokens, stdin) != (size_t)tokens) return 2;
    int64_t *table = malloc((tokens / 16 + 1) * sizeof *table), zero = 0;
    for (int64_t i = 0; i <= tokens / 16; i++) table[i] = i;
    const struct batch b = {.count = 1, .table_stride = tokens / 16 + 1, .block_size = 16, .rows = &zero,
                            .lengths = &tokens, .contexts = &tokens, .sequences = &zero, .tables = table};
    const struct layer l = {.query = query, .keys = keys, .values = values, .output = output, .row_stride = all,
                            .head_stride = width, .heads = heads, .groups = groups, .key_width = width,
                            .value_width = width, .value_stride = width, .scaling = 0.125f};
    const int failed = size == 2 ? attend_bfloat16(&b, &l) : attend_float32(&b, &l);
    fwrite(output, size, tokens * all, stdout);
    return failed;
}
