#define DFK_PORTABLE
#include "attention_isa.h"

namespace dfk {
const AttentionOps attention_scalar = scalar::kAttentionOps;
}
