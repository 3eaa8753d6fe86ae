// What the two registrations share: the only files that know torch. Each makes a library of its own, so that one can serve
// where the other can't be built. minicode/runtime/arguments.py checks what users give.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "topk.h"

namespace minicode {
using Result = std::tuple<at::Tensor, at::Tensor>;

// x (G, N, d), codes (G, C, d) as a search, and the tensors that it writes to: scores and ids (G, N, k), as topk.h says.
inline Search prepare(const at::Tensor& x, const at::Tensor& codes, int64_t k, int64_t similarity, Result& out) {
  TORCH_CHECK(x.dim() == 3 && codes.dim() == 3 && x.size(0) == codes.size(0) && x.size(2) == codes.size(2) && 1 <= k &&
              k <= codes.size(1) && codes.size(1) < (int64_t(1) << 31), "topk: shapes ", x.sizes(), codes.sizes(), " k ", k);
  TORCH_CHECK(x.scalar_type() == at::kFloat && codes.scalar_type() == at::kFloat && (x.stride(2) == 1 || x.size(2) == 1) && codes.is_contiguous(),
              "topk: x and codes must be float32, the rows of x and all of codes contiguous");
  const int64_t shape[] = {x.size(0), x.size(1), k};
  out = {at::empty(shape, x.options()), at::empty(shape, x.options().dtype(at::kLong))};
  return {x.const_data_ptr<float>(), x.stride(0), x.stride(1), codes.const_data_ptr<float>(), x.size(0), x.size(1),
          codes.size(1), x.size(2), k, Similarity(similarity), std::get<0>(out).mutable_data_ptr<float>(),
          std::get<1>(out).mutable_data_ptr<int64_t>()};
}
}  // namespace minicode
