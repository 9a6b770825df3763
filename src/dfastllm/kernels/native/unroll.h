// DFK_EACH(i, count): a loop over an array of registers. They stay in registers only when the loop is unrolled before GCC
// looks at arrays. DFK_ROLLED: a loop that stays one, where GCC would regroup the additions of an unrolled sum into a tree
// that does not fit the registers. DFK_INLINE: a function over such arrays, which must become part of its caller for them to
// be registers; Clang weighs a function's size and leaves the long ones out. GCC on x86 needs no word.
#pragma once

#if defined(__clang__) || defined(__aarch64__)
#define DFK_INLINE __attribute__((always_inline)) inline
#else
#define DFK_INLINE inline
#endif

#if defined(__clang__)
#define DFK_EACH(i, count) _Pragma("unroll") for (int i = 0; i < (count); ++i)
#define DFK_ROLLED
#else
#define DFK_EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); ++i)
#define DFK_ROLLED _Pragma("GCC unroll 1")
#endif
