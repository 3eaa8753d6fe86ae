"""The CUDA kernels on a GPU: the answers of the definition, and nothing waits for anything."""

import random

import pytest
import torch
from test_topk import KINDS, make, same, same_but_for_rounding

from minicode import topk_codes
from minicode.runtime import extension
from minicode.runtime.arguments import SIMILARITIES
from minicode.runtime.gpu import coarse_pass
from minicode.topk import scale_and_offset


@pytest.fixture
def gpu():
    """The kernels as torch's operator: a function from a search to its arguments."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    serves, why = extension.load("cuda")
    if "there is no nvcc" in why:
        pytest.skip(why)
    assert serves, why

    def arguments(x, codes, k, similarity, coarse=False):
        scale, offset = scale_and_offset(codes, similarity)
        halves = coarse_pass(x, codes, scale, offset) if coarse else []
        return x, codes, scale.contiguous(), offset.contiguous(), k, halves

    return arguments


@pytest.fixture
def gpu_search(gpu):
    def search(x, codes, k, similarity, coarse=False):
        return torch.ops.minicode_native.topk_cuda(*gpu(x, codes, k, similarity, coarse))

    return search


def has_tensor_cores():
    return torch.cuda.get_device_capability() >= (8, 0)


def test_gpu_random_shapes(gpu_search):
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        n_groups = draw.choice([1, 1, 2, 5])
        n_rows = draw.choice([1, 31, 33, 127, 128, 129, 1000])
        n_codes = draw.choice([33, 127, 128, 129, 1000, 3001])
        dim = draw.choice([1, 7, 16, 32, 33, 96, 128, 257])
        k = draw.choice([1, 1, 2, 8, 32])
        similarity = draw.choice(SIMILARITIES)
        kind = draw.choice(KINDS)
        x, codes = make(kind, n_groups, n_rows, n_codes, dim, generator)
        x = x.cuda()
        codes = codes.cuda()
        wanted = gpu_search(x, codes, k, similarity)
        same_but_for_rounding(x, codes, k, similarity, *wanted)
        if has_tensor_cores():
            case = (kind, n_groups, n_rows, n_codes, dim, k, similarity)
            assert same(gpu_search(x, codes, k, similarity, coarse=True), wanted), case
            some = x[:, ::2, : dim // 2 + 1]  # rows that are not contiguous, nor aligned
            part = codes[..., : dim // 2 + 1].contiguous()
            wanted = gpu_search(some, part, k, similarity)
            assert same(gpu_search(some, part, k, similarity, coarse=True), wanted), case


@pytest.mark.parametrize("k", [1, 5])
def test_gpu_rows_that_are_not_finite(gpu_search, k):
    torch.manual_seed(0)
    x = torch.randn(2, 300, 40, device="cuda")
    codes = torch.randn(2, 500, 40, device="cuda")
    x[1, 3, 5] = torch.nan
    x[1, 4] = torch.inf
    x[1, 40] = 1e30
    x[0, 41] = 1e-30
    scores, ids = gpu_search(x, codes, k, "cosine", has_tensor_cores())
    assert same((scores, ids), gpu_search(x, codes, k, "cosine"))
    assert ids[1, 3].tolist() == list(range(k))  # nothing but NaN
    assert (scores[1, 3] == -torch.inf).all()


@pytest.fixture
def large(gpu_search):
    """large(k): x and codes that topk_codes takes to tensor cores, and what float32 finds."""

    def large(k):
        x = torch.randn(16384, 64, device="cuda")
        codes = torch.randn(8192, 64, device="cuda")
        scores, ids = gpu_search(x[None], codes[None], k, "cosine")
        return x, codes, (scores[0], ids[0])

    return large


@pytest.mark.parametrize("k", [1, 8])
def test_gpu_large_searches(large, k):
    x, codes, wanted = large(k)
    assert same(topk_codes(x, codes, k), wanted)


@pytest.mark.parametrize("k", [1, 8])
def test_gpu_on_the_stream_that_is_current(large, k):
    x, codes, wanted = large(k)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what does not wait for this stream sees zeros
        late.copy_(x)
        found = topk_codes(late, codes, k)
    stream.synchronize()
    assert same(found, wanted)


@pytest.mark.parametrize("k", [1, 8])
def test_gpu_in_a_graph(large, k):
    x, codes, wanted = large(k)
    late = torch.randn_like(x)
    topk_codes(late, codes, k)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # an error if anything synchronises
        found = topk_codes(late, codes, k)
    late.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert same(found, wanted)


def test_gpu_more_scores_than_32_bits_can_count(gpu_search):
    x = torch.randn(70_000, 16, device="cuda")
    codes = torch.randn(33_000, 16, device="cuda")
    scores, ids = gpu_search(x[None], codes[None], 1, "dot")
    assert same(topk_codes(x, codes, 1, "dot"), (scores[0], ids[0]))
    same_but_for_rounding(x[None, -50:], codes[None], 1, "dot", scores[:, -50:], ids[:, -50:])


def test_gpu_second_device(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("there are no two GPUs here")
    if torch.cuda.get_device_capability(0) != torch.cuda.get_device_capability(1):
        pytest.skip("the two GPUs are not of one kind")
    x = torch.randn(600, 64)
    codes = torch.randn(2000, 64)
    on_first = topk_codes(x.to("cuda:0"), codes.to("cuda:0"), 3)
    on_second = topk_codes(x.to("cuda:1"), codes.to("cuda:1"), 3)
    assert torch.cuda.current_device() == 0
    assert on_second[0].device.index == 1
    assert same([t.cpu() for t in on_first], [t.cpu() for t in on_second])


@pytest.mark.parametrize(
    "n_groups, n_rows, dim, k, similarity",
    [(2, 9, 4, 1, "cosine"), (1, 700, 33, 3, "distance"), (1, 0, 2, 2, "dot")],
)
def test_gpu_opcheck(gpu, n_groups, n_rows, dim, k, similarity):
    x = torch.randn(n_groups, n_rows, dim, device="cuda")
    codes = torch.randn(n_groups, 300, dim, device="cuda")
    torch.library.opcheck(torch.ops.minicode.topk_codes, (x, codes, k, similarity))
    coarse = n_rows > 0 and has_tensor_cores()
    arguments = gpu(x, codes, k, similarity, coarse)
    torch.library.opcheck(torch.ops.minicode_native.topk_cuda, arguments)
