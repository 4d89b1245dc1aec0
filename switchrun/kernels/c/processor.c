/* What a library is: of which sources, and which paths this processor and system can run. */
#include "native.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* The checksum of the sources, as the build has it: a library of others may take other arguments. */
API int native_sources(void) { return SOURCES; }

/* Bit 0 portable, 1 AVX2 with FMA, 2 AVX-512 F, BW, DQ and VL. */
API int64_t native_paths(void) {
    int64_t paths = 1;
#if defined(__x86_64__)
    unsigned a, b, c, d, saved, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return paths; /* OSXSAVE: the next instruction exists */
    unsigned fma = c >> 12 & c >> 28 & 1;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return paths;
    if (fma && b >> 5 & 1 && (saved & 0x06) == 0x06) paths |= 2;
    if (paths & 2 && b >> 16 & b >> 17 & b >> 30 & b >> 31 & 1 && (saved & 0xe6) == 0xe6) paths |= 4;
#endif
    return paths;
}
