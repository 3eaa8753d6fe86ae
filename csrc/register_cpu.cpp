// On a CPU: minicode_native::topk and pursuit.
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

Result pursuit_cpu(const at::Tensor& x, const at::Tensor& codes, int64_t k, int64_t similarity) {
  Result out;
  minicode::pursuit_cpu(prepare(x, codes, k, similarity, out), parallel);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(minicode_native, m) {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  m.def("topk(Tensor x, Tensor codes, int k, int similarity, bool coarse) -> (Tensor, Tensor)");
  m.def("pursuit(Tensor x, Tensor codes, int k, int similarity) -> (Tensor, Tensor)");
  m.def("cpu_path() -> str", &minicode::cpu_path);
  m.def("cpu_peak() -> (float, float)", []() -> std::tuple<double, double> {
    const minicode::Peak peak = minicode::cpu_peak(parallel, forked ? 1 : at::get_num_threads());
    return {peak.float32, peak.bytes};
  });
}
TORCH_LIBRARY_IMPL(minicode_native, CPU, m) {
  m.impl("topk", &topk_cpu);
  m.impl("pursuit", &pursuit_cpu);
}
