"""The CUDA kernels: they compile; on a CPU, thread by thread, and on a GPU if there is one, they keep to the definition."""

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_topk import make, same_but_for_rounding

from minicode import topk_codes
from minicode.runtime import extension
from minicode.runtime.gpu import coarse_pass
from minicode.topk import SIMILARITIES, scale_and_offset

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc here")
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["topk_cuda", "topk_coarse"])
def test_kernels_compile_alone(name, arch, tmp_path):
    command = [
        "nvcc",
        "-std=c++17",
        f"-arch={arch}",
        "-c",
        str(ROOT / "csrc" / f"{name}.cu"),
        "-o",
        str(tmp_path / "topk.o"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("there is no g++ here")
    library = tmp_path_factory.mktemp("cuda") / "kernels.so"
    command = [compiler, "-std=c++20", "-O2", "-w", "-shared", "-fPIC", "-x", "c++", f"-I{ROOT / 'csrc'}",
               str(ROOT / "tests" / "cuda_on_cpu.h"), "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).search
    function.restype = ctypes.c_bool
    function.argtypes = [ctypes.c_void_p] * 4

    def run(x, codes, k, similarity, coarse=False):
        """Scores and ids; with a coarse pass also how many candidates it left to each row, 0 where it gave up."""
        scores, ids = torch.full((*x.shape[:2], k), 7.0), torch.full((*x.shape[:2], k), -7)
        scale, offset = scale_and_offset(codes, similarity)
        inputs = coarse_pass(x, codes, scale, offset) if coarse else []
        lists, counts = (
            torch.empty(*x.shape[:2], 128, dtype=torch.int64),
            torch.full(x.shape[:2], -7, dtype=torch.int32),
        )
        pointers = [tensor.data_ptr() for tensor in (*inputs, lists, counts)]
        # The fields of Search and CoarsePass in csrc/topk.h, all of eight bytes.
        sizes = *x.shape[:2], *codes.shape[1:], k, 2
        numbers = torch.tensor(
            [
                x.data_ptr(),
                *x.stride()[:2],
                codes.data_ptr(),
                *sizes,
                scores.data_ptr(),
                ids.data_ptr(),
            ]
        )
        more = torch.tensor(
            [*pointers[:2], inputs[0].shape[2], inputs[1].shape[1], *pointers[2:]]
            if coarse
            else [0] * 8
        )
        done = function(
            numbers.data_ptr(),
            scale.contiguous().data_ptr(),
            offset.contiguous().data_ptr(),
            more.data_ptr(),
        )
        assert done == (k <= 32)
        return (scores, ids, counts) if coarse else (scores, ids)

    return run


@pytest.mark.parametrize("n_groups, n_rows, n_codes, dim, k", [
    (1, 3, 5, 1, 1), (1, 3, 5, 7, 5), (2, 70, 131, 17, 1), (1, 130, 300, 33, 8), (2, 65, 129, 16, 32), (1, 1, 1, 4, 1),
])  # fmt: skip
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_kernels_keep_to_the_definition(search, n_groups, n_rows, n_codes, dim, k, similarity):
    torch.manual_seed(0)
    x, codes = torch.randn(n_groups, n_rows, dim), torch.randn(n_groups, n_codes, dim)
    same_but_for_rounding(x, codes, k, similarity, *search(x, codes, k, similarity))


@pytest.mark.parametrize("k", [1, 3, 20])
def test_equal_scores_nan_and_infinity(search, k):
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(1, 150, 1)  # 150 times each
    _, ids = search(torch.tensor([[[2.0, 1.0]]]), codes, k, "dot")
    assert ids[0, 0].tolist() == list(range(0, 2 * k, 2))
    codes = torch.tensor([torch.nan, -torch.inf, 1, -torch.inf, torch.nan, 2]).view(1, 6, 1)
    assert (
        search(torch.ones(1, 1, 1), codes, 5, "dot")[1].flatten()[:k].tolist()
        == [5, 2, 0, 1, 3][:k]
    )
    codes = torch.randn(1, 40, 4)
    codes[0, ::2] = torch.nan
    codes[0, 1] = torch.inf
    x = torch.randn(1, 5, 4)
    x[0, 0], x[0, 1] = torch.nan, torch.inf
    scores, ids = search(x, codes, k, "cosine")
    assert ((0 <= ids) & (ids < 40)).all() and not scores.isnan().any()
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    assert ids[0, 0].tolist() == list(range(k))  # nothing but NaN: the lowest ids


def test_many_codes_of_rising_score_overflow_no_list(search):
    codes = torch.arange(1000.0).view(1, 1000, 1)
    _, ids = search(torch.ones(1, 70, 1), codes, 32, "dot")
    assert (ids == torch.arange(999, 967, -1)).all()


def test_large_k_is_left_to_others(search):
    assert search(torch.ones(1, 2, 1), torch.ones(1, 50, 1), 33, "dot")[1][0, 0, 0] == -7


def test_strided_rows(search):
    x, codes = torch.randn(60, 2, 3, 40), torch.randn(3, 200, 18)
    view = x[:, 1, :, 1:19].transpose(0, 1)
    for k in (1, 4):
        same = search(view.contiguous(), codes, k, "distance")
        for coarse in (False, True):
            assert all(
                torch.equal(a, b) for a, b in zip(same, search(view, codes, k, "distance", coarse))
            )


def same_bits(search, x, codes, k, similarity):
    """The coarse pass finds what the float32 kernel finds; returns how many candidates it had for each row."""
    scores, ids, counts = search(x, codes, k, similarity, coarse=True)
    plain = search(x, codes, k, similarity)
    assert torch.equal(ids, plain[1]) and torch.equal(scores, plain[0])
    assert ((counts == 0) | (counts >= k)).all()
    return counts


@pytest.mark.parametrize("kind", ["plain", "common", "near", "scales", "equal"])
def test_the_coarse_pass_gives_the_same_bits(search, kind):
    generator = torch.Generator().manual_seed(0)
    given_up = []
    for n_groups, n_rows, n_codes, dim, k in (
        (2, 130, 300, 31, 1),
        (1, 33, 700, 70, 8),
        (3, 5, 257, 3, 1),
        (1, 40, 900, 128, 32),
    ):
        for similarity in SIMILARITIES[: 1 if k == 32 else 3]:
            x, codes = make(kind, n_groups, n_rows, n_codes, dim, generator)
            given_up.append((same_bits(search, x, codes, k, similarity) == 0).float().mean())
    assert sum(given_up) / len(given_up) <= (
        0.6 if kind == "scales" else 0.1
    )  # it is the coarse pass that was tested


@pytest.mark.parametrize("k", [1, 4])
def test_inputs_that_sit_on_the_error_bound(search, k):
    """As in test_topk.py: the best code lags behind by nearly what the bound allows. Every code has its opposite: a mean of 0."""
    dim, h = 64, 2.0**-8
    x = torch.ones(1, 34, dim)
    x[0, 1::2] = -1
    codes = 0.5 * torch.ones(1, 256, dim)
    codes[0, 1:8] = codes[0, 9] = 1 + 1.001 * h
    codes[0, 1:8, 0] = codes[0, 9, 0] = 1
    codes[0, 150] = 1 + 0.999 * h
    codes[0, 150, 0] = 1 + 2 * h
    codes = torch.cat((codes, -codes), 1)
    counts = same_bits(search, x, codes, k, "dot")
    assert (search(x, codes, k, "dot", coarse=True)[1][0, ::2, 0] == 150).all() and (
        counts[0, ::2] > 0
    ).all()


@pytest.mark.parametrize("k", [1, 6])
def test_candidates_are_the_codes_within_the_bound(search, k):
    torch.manual_seed(0)
    x, codes = torch.randn(2, 50, 48), torch.randn(2, 700, 48)
    half_x, half_codes, offset, twice_bound = coarse_pass(
        x, codes, *scale_and_offset(codes, "distance")
    )
    scores = half_x.float() @ half_codes.float().mT + offset.unsqueeze(1)
    wanted = (scores > scores.topk(k).values[..., -1:] - twice_bound.unsqueeze(-1)).sum(-1)
    counts = search(x, codes, k, "distance", coarse=True)[2]
    assert (counts - wanted).abs().float().mean() <= 0.02  # but for rounding


def test_coarse_rows_that_are_not_finite_or_too_large_are_left_to_float32(search):
    torch.manual_seed(0)
    x, codes = torch.randn(2, 60, 20), torch.randn(2, 200, 20)
    x[1, 3, 5], x[1, 4], x[1, 40], x[1, 41] = torch.nan, torch.inf, 1e30, 1e-30
    for k in (1, 5):
        counts = same_bits(search, x, codes, k, "cosine")
        assert (counts == 0).nonzero().tolist() == [[1, 3], [1, 4], [1, 40], [1, 41]]
    x, codes = x[1:], codes[1:]
    for value in (torch.nan, torch.inf, 1e30):
        codes[0, 7, 2] = value
        assert (same_bits(search, x, codes, 2, "distance") == 0).all()
    codes[0, 7, 2] = 0
    for one, other in ((1e-12, 1e-30), (1e10, 1e30)):  # x·c is out of range, x·c / |c| is not
        counts = same_bits(search, x[:, 5:40] * one, codes * other, 1, "cosine")
        assert (counts == 0).all()


def test_a_list_that_stays_full_gives_its_row_up(search):
    """150 codes that bfloat16 can't tell apart, close to some of the rows and far from the others."""
    torch.manual_seed(0)
    x, codes = torch.randn(1, 60, 24), torch.randn(1, 700, 24)
    codes[0, 100:400:2] = codes[0, 100] + 1e-4 * torch.randn(150, 24)
    x[0, :30] += 2 * codes[0, 100]
    x[0, 30:] -= 2 * codes[0, 100]
    for k in (1, 6):
        counts = same_bits(search, x, codes, k, "cosine")[0]
        assert (counts[:30] == 0).all() and (counts[30:] > 0).all()


def test_coarse_scores_that_rise_from_code_to_code(search):
    """Every tile beats the one before: lists are cut again and again."""
    codes = torch.arange(1.0, 601).view(1, 600, 1) * torch.eye(1, 17)
    x = torch.rand(1, 50, 17) + 0.5
    for k in (1, 16, 32):
        assert (same_bits(search, x, codes, k, "dot") > 0).all()


@pytest.fixture
def gpu():
    """The kernel as torch's operator, on a real GPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    if extension.load()[0] == ("cpu",):
        pytest.skip("there is no nvcc that fits torch")
    assert "cuda" in extension.load()[0], extension.load()[1]

    def arguments(x, codes, k, similarity, coarse):
        scale, offset = scale_and_offset(codes, similarity)
        return (
            x,
            codes,
            scale.contiguous(),
            offset.contiguous(),
            k,
            coarse_pass(x, codes, scale, offset) if coarse else [],
        )

    return arguments


def has_tensor_cores(device="cuda"):
    return torch.cuda.get_device_capability(device) >= (8, 0)


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_gpu_random_shapes(gpu):
    draw, generator, topk_cuda = (
        random.Random(0),
        torch.Generator().manual_seed(0),
        torch.ops.minicode_native.topk_cuda,
    )
    for _ in range(60):
        n_groups, n_rows = draw.choice([1, 1, 2, 5]), draw.choice([1, 31, 33, 127, 128, 129, 1000])
        n_codes, dim = (
            draw.choice([33, 127, 128, 129, 1000, 3001]),
            draw.choice([1, 7, 16, 32, 33, 96, 128, 257]),
        )
        k, similarity = draw.choice([1, 1, 2, 8, 32]), draw.choice(SIMILARITIES)
        kind = draw.choice(["plain", "common", "near", "scales", "equal"])
        x, codes = (
            tensor.cuda() for tensor in make(kind, n_groups, n_rows, n_codes, dim, generator)
        )
        wanted = topk_cuda(*gpu(x, codes, k, similarity, False))
        same_but_for_rounding(x, codes, k, similarity, *wanted)
        if has_tensor_cores():
            case = (kind, n_groups, n_rows, n_codes, dim, k, similarity)
            assert same(topk_cuda(*gpu(x, codes, k, similarity, True)), wanted), case
            some = x[:, ::2, : dim // 2 + 1]  # rows that are not contiguous, nor aligned
            part = codes[..., : dim // 2 + 1].contiguous()
            results = [
                topk_cuda(*gpu(some, part, k, similarity, coarse)) for coarse in (False, True)
            ]
            assert same(*results), case


@pytest.mark.parametrize("k", [1, 5])
def test_gpu_rows_that_are_not_finite(gpu, k):
    torch.manual_seed(0)
    x, codes = torch.randn(2, 300, 40, device="cuda"), torch.randn(2, 500, 40, device="cuda")
    x[1, 3, 5], x[1, 4], x[1, 40], x[0, 41] = torch.nan, torch.inf, 1e30, 1e-30
    scores, ids = torch.ops.minicode_native.topk_cuda(
        *gpu(x, codes, k, "cosine", has_tensor_cores())
    )
    assert same(
        (scores, ids), torch.ops.minicode_native.topk_cuda(*gpu(x, codes, k, "cosine", False))
    )
    assert (
        ids[1, 3].tolist() == list(range(k)) and (scores[1, 3] == -torch.inf).all()
    )  # nothing but NaN


@pytest.mark.parametrize("k", [1, 8])
def test_gpu_large_searches(gpu, k):
    """Sizes for which topk_codes takes the tensor cores; on the stream that is current, and in a graph: nothing waits."""
    x, codes = torch.randn(16384, 64, device="cuda"), torch.randn(8192, 64, device="cuda")
    wanted = [
        t[0]
        for t in torch.ops.minicode_native.topk_cuda(*gpu(x[None], codes[None], k, "cosine", False))
    ]
    assert same(topk_codes(x, codes, k), wanted)
    torch.cuda.synchronize()
    stream, late = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what does not wait for this stream sees zeros
        late.copy_(x)
        found = topk_codes(late, codes, k)
    stream.synchronize()
    assert same(found, wanted)
    graph, late = torch.cuda.CUDAGraph(), torch.randn_like(x)
    with torch.cuda.graph(graph):  # an error if anything synchronises
        found = topk_codes(late, codes, k)
    late.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert same(found, wanted)


def test_gpu_more_scores_than_32_bits_can_count(gpu):
    x, codes = torch.randn(70_000, 16, device="cuda"), torch.randn(33_000, 16, device="cuda")
    wanted = torch.ops.minicode_native.topk_cuda(*gpu(x[None], codes[None], 1, "dot", False))
    assert same(topk_codes(x, codes, 1, "dot"), [t[0] for t in wanted])
    same_but_for_rounding(x[None, -50:], codes[None], 1, "dot", *(t[:, -50:] for t in wanted))


def test_gpu_second_device(gpu):
    if torch.cuda.device_count() < 2 or torch.cuda.get_device_capability(
        0
    ) != torch.cuda.get_device_capability(1):
        pytest.skip("there are no two GPUs of one kind here")
    x, codes = torch.randn(600, 64), torch.randn(2000, 64)
    on_first, on_second = (
        topk_codes(x.to(device), codes.to(device), 3) for device in ("cuda:0", "cuda:1")
    )
    assert torch.cuda.current_device() == 0 and on_second[0].device.index == 1
    assert same([t.cpu() for t in on_first], [t.cpu() for t in on_second])


def test_gpu_opcheck(gpu):
    for shape, k, similarity in (
        ((2, 9, 4), 1, "cosine"),
        ((1, 700, 33), 3, "distance"),
        ((1, 0, 2), 2, "dot"),
    ):
        x, codes = (
            torch.randn(shape, device="cuda"),
            torch.randn(shape[0], 300, shape[2], device="cuda"),
        )
        torch.library.opcheck(torch.ops.minicode.topk_codes, (x, codes, k, similarity))
        torch.library.opcheck(
            torch.ops.minicode_native.topk_cuda,
            gpu(x, codes, k, similarity, shape[1] > 0 and has_tensor_cores()),
        )
