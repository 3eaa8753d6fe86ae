// minicode_native::topk, for the CPU and, where the installed torch has it, CUDA: x (G, N, d), codes (G, C, d) to
// scores and ids (G, N, k), as topk.h says. minicode/runtime/arguments.py checks what users give it.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pthread.h>
#include <torch/library.h>
#ifdef MINICODE_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif
#include "topk.h"

namespace {
using Result = std::tuple<at::Tensor, at::Tensor>;

minicode::Search prepare(const at::Tensor& x, const at::Tensor& codes, int64_t k, int64_t similarity, Result& out) {
  TORCH_CHECK(x.dim() == 3 && codes.dim() == 3 && x.size(0) == codes.size(0) && x.size(2) == codes.size(2) && 1 <= k &&
              k <= codes.size(1) && codes.size(1) < (int64_t(1) << 31), "topk: shapes ", x.sizes(), codes.sizes(), " k ", k);
  TORCH_CHECK(x.scalar_type() == at::kFloat && codes.scalar_type() == at::kFloat && (x.stride(2) == 1 || x.size(2) == 1) && codes.is_contiguous(),
              "topk: x and codes must be float32, the rows of x and all of codes contiguous");
  const int64_t shape[] = {x.size(0), x.size(1), k};
  out = {at::empty(shape, x.options()), at::empty(shape, x.options().dtype(at::kLong))};
  return {x.const_data_ptr<float>(), x.stride(0), x.stride(1), codes.const_data_ptr<float>(), x.size(0), x.size(1),
          codes.size(1), x.size(2), k, minicode::Similarity(similarity), std::get<0>(out).mutable_data_ptr<float>(),
          std::get<1>(out).mutable_data_ptr<int64_t>()};
}

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

#ifdef MINICODE_CUDA
// coarse: empty, or x, codes, offset and twice_bound of a CoarsePass.
Result topk_cuda(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& offset, int64_t k,
                 at::TensorList coarse) {
  for (const at::Tensor& t : {scale, offset}) TORCH_CHECK(t.is_contiguous() && t.numel() == codes.size(0) * codes.size(1));
  const c10::cuda::CUDAGuard guard(x.device());
  Result out;
  const auto search = prepare(x, codes, k, minicode::dot, out);
  minicode::CoarsePass pass;
  at::Tensor lists, counts;
  if (!coarse.empty()) {
    const int64_t G = x.size(0), N = x.size(1), depth = coarse[0].size(2), width = coarse[1].size(1);
    const int64_t sizes[] = {G * N * depth, G * width * depth, G * width, G * N};
    TORCH_CHECK(coarse.size() == 4 && depth % 32 == 0 && depth >= x.size(2) && width % 128 == 0 && width >= codes.size(1));
    for (int i = 0; i < 4; i++) TORCH_CHECK(coarse[i].is_contiguous() && coarse[i].numel() == sizes[i]);
    lists = at::empty({G, N, pass.capacity}, x.options().dtype(at::kLong));
    counts = at::empty({G, N}, x.options().dtype(at::kInt));
    pass = {(const uint16_t*)coarse[0].const_data_ptr<at::BFloat16>(), (const uint16_t*)coarse[1].const_data_ptr<at::BFloat16>(),
            depth, width, coarse[2].const_data_ptr<float>(), coarse[3].const_data_ptr<float>(),
            (uint64_t*)lists.mutable_data_ptr<int64_t>(), counts.mutable_data_ptr<int>()};
  }
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  TORCH_CHECK(minicode::topk_cuda(search, scale.const_data_ptr<float>(), offset.const_data_ptr<float>(), pass, stream));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}
#endif
}  // namespace

TORCH_LIBRARY(minicode_native, m) {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  m.def("topk(Tensor x, Tensor codes, int k, int similarity, bool coarse) -> (Tensor, Tensor)");
  m.def("pursue(Tensor(a!) scores, Tensor offset, Tensor change, int k) -> (Tensor, Tensor)");
  m.def("topk_cuda(Tensor x, Tensor codes, Tensor scale, Tensor offset, int k, Tensor[] coarse) -> (Tensor, Tensor)");
  m.def("cpu_path() -> str", []() -> std::string { return minicode::cpu_path(); });
}
TORCH_LIBRARY_IMPL(minicode_native, CPU, m) {
  m.impl("topk", &topk_cpu);
  m.impl("pursue", &pursue_cpu);
}
#ifdef MINICODE_CUDA
TORCH_LIBRARY_IMPL(minicode_native, CUDA, m) { m.impl("topk_cuda", &topk_cuda); }
#endif
