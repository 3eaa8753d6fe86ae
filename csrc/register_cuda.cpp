// On a GPU: minicode_native::topk_cuda.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "register.h"

namespace {
using minicode::prepare;
using minicode::Result;

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
}  // namespace

TORCH_LIBRARY_FRAGMENT(minicode_native, m) {
  m.def("topk_cuda(Tensor x, Tensor codes, Tensor scale, Tensor offset, int k, Tensor[] coarse) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(minicode_native, CUDA, m) { m.impl("topk_cuda", &topk_cuda); }
