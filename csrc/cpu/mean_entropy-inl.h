// mean_entropy: the entropy of each frame from its state, averaged over the frames that count. Frames are summed in order, in double.
#pragma once
#include "cpu/row_stats-inl.h"

namespace fastee::cpu::FASTEE_ISA {
static void mean_entropy(const MeanEntropyArgs& a) {
  with_float(a.element, [&]<typename T>(const T*) FASTEE_LAMBDA {
    for (int64_t b = 0; b < a.rows; ++b) {
      double total = 0.0;
      int64_t frames = 0;
      for (int64_t t = 0; t < a.frames; ++t) {
        if (a.mask && !a.mask[b * a.mask_stride + t]) continue;
        const T* z = static_cast<const T*>(a.logits) + b * a.row_stride + t * a.frame_stride;
        total += finish(row_state<false>(z, a.classes, a.inverse_temperature), false).entropy;
        ++frames;
      }
      a.out[b] = static_cast<float>(total / static_cast<double>(frames));  // no frame: 0 / 0 = NaN
    }
  });
}
}  // namespace fastee::cpu::FASTEE_ISA
