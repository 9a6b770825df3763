// DFK_EACH(i, count): a loop over an array of registers. They stay in registers only when the loop is unrolled before GCC
// looks at arrays.
#pragma once

#if defined(__clang__)
#define DFK_EACH(i, count) _Pragma("unroll") for (int i = 0; i < (count); ++i)
#else
#define DFK_EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); ++i)
#endif
