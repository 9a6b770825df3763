#include "attention_isa.h"

namespace dfk {
const AttentionOps attention_avx2 = avx2::kAttentionOps;
}
