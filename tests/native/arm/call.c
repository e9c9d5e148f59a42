/* Calls one function on memory that is given. Standard input: the number of regions, the address and size of each, the
 * number of arguments, the arguments, and what the regions hold. Output: the result, and what they hold then. Compiled
 * with FUNCTION, its name, and IS_PLAIN if it is no entry point of CPU graphs. */
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>

#ifdef IS_PLAIN
int64_t FUNCTION(int64_t);
#else
int FUNCTION(const int64_t *arguments);
#endif

int main(void) {
    static int64_t regions[256][2], arguments[32];
    int64_t count, number;
    if (fread(&count, 8, 1, stdin) != 1 || fread(regions, 16, count, stdin) != (size_t)count) return 2;
    if (fread(&number, 8, 1, stdin) != 1 || fread(arguments, 8, number, stdin) != (size_t)number) return 2;
    for (int64_t i = 0; i < count; i++) {
        void *wanted = (void *)regions[i][0];
        if (mmap(wanted, regions[i][1], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != wanted)
            return 3;
        if (fread(wanted, 1, regions[i][1], stdin) != (size_t)regions[i][1]) return 4;
    }
#ifdef IS_PLAIN
    const int64_t result = FUNCTION(arguments[0]);
#else
    const int64_t result = FUNCTION(arguments);
#endif
    fwrite(&result, 8, 1, stdout);
    for (int64_t i = 0; i < count; i++) fwrite((void *)regions[i][0], 1, regions[i][1], stdout);
    return 0;
}
