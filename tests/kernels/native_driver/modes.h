// What the driver does; each returns its exit status.
#pragma once

#include <cstdint>

namespace driver {

int rows();                                    // golden rows
int fuzz(uint64_t seed, int64_t count);        // random shapes against the law
int regions(int64_t count);                    // many tiny regions of the thread pool, from several callers

}  // namespace driver
