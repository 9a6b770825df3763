// Memory of the calling thread for the length of one task.
#pragma once

#include <cstddef>

namespace dfk {

// `bytes` of it, 64-byte aligned, contents arbitrary; kept between calls and freed when the thread ends. The next call
// of the same thread gives the same memory (or a larger piece): one user at a time.
char* thread_scratch(size_t bytes);

}  // namespace dfk
