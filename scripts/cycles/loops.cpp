// The inner loops of the integer tiles between marks that llvm-mca reads: 32 inputs of R rows and C times 16 channels,
// as the walk over a panel repeats them. Compiled for one instruction set by its flags; see record.py, which reads from a
// mark's name how many products lie behind it.
#include "unroll.h"

// llvm-mca sees no loop: what turns eight times must lie there eight times.
#undef DFK_ROLLED
#define DFK_ROLLED _Pragma("GCC unroll 8")

#include "linear_tiles.h"

namespace dfk::DFK_ISA::tiles {

template <class Codes, int R> constexpr int kProducts = 32 * 16 * width<Codes>(R) * R;

// A comment in the assembly. Memory is what it is in order with.
#define DFK_MARK(text, number) asm volatile("# " text : : "i"(number) : "memory")

// A function with the loop's body in it.
#define DFK_LOOP(name, Codes, with_mins, R)                                                                       \
  void name##_##R(const Block& b, const Inputs<Codes, R>& in, const Starts<Codes, with_mins, R>& starts, int g) { \
    Outputs<R, width<Codes>(R)> y(b.tile);                                                                        \
    DFK_MARK("LLVM-MCA-BEGIN " #name "_" #R "_%c0", (kProducts<Codes, R>));                                       \
    add_group<Codes, with_mins, R, width<Codes>(R)>(b.data, b.table, b.mins, in, starts, g, y);                   \
    DFK_MARK("LLVM-MCA-END " #name "_" #R "_%c0", (kProducts<Codes, R>));                                         \
    y.finish();                                                                                                   \
  }

#define DFK_LOOPS(R)                                                                                              \
  DFK_LOOP(w8g, Bytes, false, R)                                                                                  \
  DFK_LOOP(w4g, Nibbles, false, R)                                                                                \
  DFK_LOOP(w4g_mins, Nibbles, true, R)                                                                            \
  DFK_LOOP(w6g, Sixes, false, R)

DFK_LOOPS(1)
#if defined(DFK_SIMD_DOT_TWICE)
DFK_LOOPS(4)
#elif defined(DFK_SIMD_DOT)
DFK_LOOPS(6)
#else  // the most rows that go together
DFK_LOOP(w8g, Bytes, false, 3)
DFK_LOOP(w4g, Nibbles, false, 5)
DFK_LOOP(w4g_mins, Nibbles, true, 5)
DFK_LOOP(w6g, Sixes, false, 5)
#endif

}  // namespace dfk::DFK_ISA::tiles
