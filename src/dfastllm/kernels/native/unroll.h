// DFK_EACH(i, count): a loop over an array of registers. They stay in registers only when the loop is unrolled before GCC
// looks at arrays. DFK_ROLLED: a loop that stays one, where GCC would regroup the additions of an unrolled sum into a tree
// that does not fit the registers.
#pragma once

#if defined(__clang__)
#define DFK_EACH(i, count) _Pragma("unroll") for (int i = 0; i < (count); ++i)
#define DFK_ROLLED
#else
#define DFK_EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); ++i)
#define DFK_ROLLED _Pragma("GCC unroll 1")
#endif
