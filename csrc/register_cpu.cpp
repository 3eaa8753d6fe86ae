// On a CPU: minicode_native::topk, and pursue.
#include <ATen/Parallel.h>
#include <pthread.h>

#include "register.h"

namespace {
using minicode::prepare;
using minicode::Result;

bool forked = false;  // in a forked child OpenMP would wait for threads that are not there

void parallel(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  forked ? body(0, n) : at::parallel_for(0, n, 1, body);
}

Result topk_cpu(const at::Tensor& x, const at::Tensor& codes, int64_t k, int64_t similarity, bool coarse) {
  Result out;
  minicode::topk_cpu(prepare(x, codes, k, similarity, out), parallel, forked ? 1 : at::get_num_threads(), coarse);
  return out;
}

Result pursue_cpu(at::Tensor& scores, const at::Tensor& offset, const at::Tensor& change, int64_t k) {
  TORCH_CHECK(scores.dim() == 3 && change.dim() == 3 && scores.size(0) == change.size(0) && scores.size(2) == change.size(1) &&
              scores.size(2) == change.size(2) && 1 <= k && k <= scores.size(2) && scores.size(2) < (int64_t(1) << 31),
              "pursue: shapes ", scores.sizes(), " ", change.sizes(), " k ", k);
  for (const at::Tensor& t : {scores, offset, change})
    TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous(), "pursue: all must be float32 and contiguous");
  TORCH_CHECK(offset.numel() == scores.size(0) * scores.size(2), "pursue: offset ", offset.sizes());
  const int64_t shape[] = {scores.size(0), scores.size(1), k};
  Result out = {at::empty(shape, scores.options()), at::empty(shape, scores.options().dtype(at::kLong))};
  minicode::pursue_cpu({scores.mutable_data_ptr<float>(), offset.const_data_ptr<float>(), change.const_data_ptr<float>(), scores.size(0), scores.size(1),
                        scores.size(2), k, std::get<0>(out).mutable_data_ptr<float>(), std::get<1>(out).mutable_data_ptr<int64_t>()},
                       parallel);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(minicode_native, m) {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  m.def("topk(Tensor x, Tensor codes, int k, int similarity, bool coarse) -> (Tensor, Tensor)");
  m.def("pursue(Tensor(a!) scores, Tensor offset, Tensor change, int k) -> (Tensor, Tensor)");
  m.def("cpu_path() -> str", &minicode::cpu_path);
  m.def("cpu_peak() -> (float, float)", []() -> std::tuple<double, double> {
    const minicode::Peak peak = minicode::cpu_peak(parallel, forked ? 1 : at::get_num_threads());
    return {peak.float32, peak.bytes};
  });
}
TORCH_LIBRARY_IMPL(minicode_native, CPU, m) {
  m.impl("topk", &topk_cpu);
  m.impl("pursue", &pursue_cpu);
}
