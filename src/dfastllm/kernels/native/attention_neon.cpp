#include "attention_isa.h"

namespace dfk {
const AttentionOps attention_neon = neon::kAttentionOps;
}
