"""The CUDA kernels compile, and keep to the definition when a CPU runs them thread by thread."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_topk import KINDS, make, same, same_but_for_rounding

from minicode.runtime.arguments import SIMILARITIES
from minicode.runtime.gpu import coarse_pass
from minicode.topk import scale_and_offset

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc here")
@pytest.mark.parametrize("name", ["topk_cuda", "topk_coarse"])
def test_kernels_compile_alone(name, tmp_path):
    command = ["nvcc", "-std=c++17", "-c", f"{ROOT}/csrc/{name}.cu", "-o", tmp_path / "topk.o"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (75, 80, 90)]
    result = subprocess.run([*command, "--threads=0"], capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """`search` of cuda_on_cpu.h, compiled."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("there is no g++ here")
    library = tmp_path_factory.mktemp("cuda") / "kernels.so"
    command = [compiler, "-std=c++20", "-O2", "-w", "-shared", "-fPIC", f"-I{ROOT}/csrc"]
    command += ["-x", "c++", f"{ROOT}/tests/cuda_on_cpu.h", "-o", str(library)]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).search
    function.restype = ctypes.c_bool
    function.argtypes = [ctypes.c_void_p] * 4
    return function


UNTOUCHED = -7


@pytest.fixture
def search(kernels):
    """The float32 kernel: scores and ids."""

    def search(x, codes, k, similarity):
        scale, offset = scale_and_offset(codes, similarity)
        return call(kernels, x, codes, scale, offset, k, torch.zeros(8, dtype=torch.int64))

    return search


@pytest.fixture
def coarse_search(kernels):
    """After the coarse pass: scores, ids, and how many candidates each row had, 0: it gave up."""

    def search(x, codes, k, similarity):
        scale, offset = scale_and_offset(codes, similarity)
        half_x, half_codes, plus, twice_bound = coarse_pass(x, codes, scale, offset)
        lists = torch.empty(*x.shape[:2], 128, dtype=torch.int64)
        counts = torch.full(x.shape[:2], UNTOUCHED, dtype=torch.int32)
        the_pass = torch.tensor(  # the fields of CoarsePass in csrc/topk.h
            [
                half_x.data_ptr(),
                half_codes.data_ptr(),
                half_x.shape[2],
                half_codes.shape[1],
                plus.data_ptr(),
                twice_bound.data_ptr(),
                lists.data_ptr(),
                counts.data_ptr(),
            ]
        )
        scores, ids = call(kernels, x, codes, scale, offset, k, the_pass)
        return scores, ids, counts

    return search


def call(kernels, x, codes, scale, offset, k, the_pass):
    n_groups, n_rows, dim = x.shape
    scores = torch.full((n_groups, n_rows, k), float(UNTOUCHED))
    ids = torch.full((n_groups, n_rows, k), UNTOUCHED)
    scale = scale.contiguous()
    offset = offset.contiguous()
    the_search = torch.tensor(  # the fields of Search in csrc/topk.h, all of eight bytes
        [
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            codes.data_ptr(),
            n_groups,
            n_rows,
            codes.shape[1],
            dim,
            k,
            SIMILARITIES.index("dot"),
            scores.data_ptr(),
            ids.data_ptr(),
        ]
    )
    arguments = (the_search, scale, offset, the_pass)
    done = kernels(*(tensor.data_ptr() for tensor in arguments))
    assert done == (k <= 32)
    return scores, ids


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    "n_groups, n_rows, n_codes, dim, k",
    [
        (1, 3, 5, 1, 1),
        (1, 3, 5, 7, 5),
        (2, 70, 131, 17, 1),
        (1, 130, 300, 33, 8),
        (2, 65, 129, 16, 32),
        (1, 1, 1, 4, 1),
    ],
)
def test_kernels_keep_to_the_definition(search, n_groups, n_rows, n_codes, dim, k, similarity):
    torch.manual_seed(0)
    x = torch.randn(n_groups, n_rows, dim)
    codes = torch.randn(n_groups, n_codes, dim)
    same_but_for_rounding(x, codes, k, similarity, *search(x, codes, k, similarity))


@pytest.mark.parametrize("k", [1, 3, 20])
def test_of_equal_scores_the_lower_id_comes_first(search, k):
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(1, 150, 1)  # 150 times each
    _, ids = search(torch.tensor([[[2.0, 1.0]]]), codes, k, "dot")
    assert ids[0, 0].tolist() == list(range(0, 2 * k, 2))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_nan_counts_as_minus_infinity(search, k):
    codes = torch.tensor([torch.nan, -torch.inf, 1, -torch.inf, torch.nan, 2]).view(1, 6, 1)
    _, ids = search(torch.ones(1, 1, 1), codes, k, "dot")
    assert ids.flatten().tolist() == [5, 2, 0, 1, 3][:k]


@pytest.mark.parametrize("k", [1, 3, 20])
def test_non_finite_input_gives_valid_ids(search, k):
    torch.manual_seed(0)
    codes = torch.randn(1, 40, 4)
    codes[0, ::2] = torch.nan
    codes[0, 1] = torch.inf
    x = torch.randn(1, 5, 4)
    x[0, 0] = torch.nan
    x[0, 1] = torch.inf
    scores, ids = search(x, codes, k, "cosine")
    assert ((ids >= 0) & (ids < 40)).all()
    assert not scores.isnan().any()
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    assert ids[0, 0].tolist() == list(range(k))  # nothing but NaN: the lowest ids


def test_many_codes_of_rising_score_overflow_no_list(search):
    codes = torch.arange(1000.0).view(1, 1000, 1)
    _, ids = search(torch.ones(1, 70, 1), codes, 32, "dot")
    assert (ids == torch.arange(999, 967, -1)).all()


def test_large_k_is_left_to_others(search):
    _, ids = search(torch.ones(1, 2, 1), torch.ones(1, 50, 1), 33, "dot")
    assert (ids == UNTOUCHED).all()


@pytest.mark.parametrize("k", [1, 4])
def test_strided_rows(search, coarse_search, k):
    x = torch.randn(60, 2, 3, 40)
    codes = torch.randn(3, 200, 18)
    view = x[:, 1, :, 1:19].transpose(0, 1)
    wanted = search(view.contiguous(), codes, k, "distance")
    assert same(search(view, codes, k, "distance"), wanted)
    assert same(coarse_search(view, codes, k, "distance")[:2], wanted)


@pytest.fixture
def candidates(search, coarse_search):
    """Asserts that the coarse pass finds what float32 finds; how many candidates each row had."""

    def candidates(x, codes, k, similarity):
        scores, ids, counts = coarse_search(x, codes, k, similarity)
        assert same((scores, ids), search(x, codes, k, similarity))
        assert ((counts == 0) | (counts >= k)).all()
        return counts

    return candidates


@pytest.mark.parametrize("kind", KINDS)
def test_the_coarse_pass_gives_the_same_bits(candidates, kind):
    generator = torch.Generator().manual_seed(0)
    given_up = []
    for n_groups, n_rows, n_codes, dim, k in [
        (2, 130, 300, 31, 1),
        (1, 33, 700, 70, 8),
        (3, 5, 257, 3, 1),
        (1, 40, 900, 128, 32),
    ]:
        for similarity in SIMILARITIES if k < 32 else ["cosine"]:
            x, codes = make(kind, n_groups, n_rows, n_codes, dim, generator)
            counts = candidates(x, codes, k, similarity)
            given_up.append((counts == 0).float().mean())
    most = 0.6 if kind == "scales" else 0.1  # else it is not the coarse pass that was tested
    assert sum(given_up) / len(given_up) <= most


@pytest.mark.parametrize("k", [1, 4])
def test_inputs_that_sit_on_the_error_bound(candidates, coarse_search, k):
    """As in test_topk.py: the best code lags behind by nearly what the bound allows.

    Every code has its opposite: a mean of 0.
    """
    dim = 64
    h = 2.0**-8
    x = torch.ones(1, 34, dim)
    x[0, 1::2] = -1
    codes = 0.5 * torch.ones(1, 256, dim)
    codes[0, 1:8] = codes[0, 9] = 1 + 1.001 * h
    codes[0, 1:8, 0] = codes[0, 9, 0] = 1
    codes[0, 150] = 1 + 0.999 * h
    codes[0, 150, 0] = 1 + 2 * h
    codes = torch.cat((codes, -codes), 1)
    counts = candidates(x, codes, k, "dot")
    assert (counts[0, ::2] > 0).all()
    _, ids, _ = coarse_search(x, codes, k, "dot")
    assert (ids[0, ::2, 0] == 150).all()


@pytest.mark.parametrize("k", [1, 6])
def test_candidates_are_the_codes_within_the_bound(candidates, k):
    torch.manual_seed(0)
    x = torch.randn(2, 50, 48)
    codes = torch.randn(2, 700, 48)
    scale, offset = scale_and_offset(codes, "distance")
    half_x, half_codes, plus, twice_bound = coarse_pass(x, codes, scale, offset)
    scores = half_x.float() @ half_codes.float().mT + plus.unsqueeze(1)  # (G, N, C)
    kth = scores.topk(k).values[..., -1]
    within = scores > (kth - twice_bound).unsqueeze(-1)
    counts = candidates(x, codes, k, "distance")
    assert (counts - within.sum(-1)).abs().float().mean() <= 0.02  # but for rounding


@pytest.mark.parametrize("k", [1, 5])
def test_coarse_rows_that_are_not_finite_or_too_large_are_left_to_float32(candidates, k):
    torch.manual_seed(0)
    x = torch.randn(2, 60, 20)
    codes = torch.randn(2, 200, 20)
    x[1, 3, 5] = torch.nan
    x[1, 4] = torch.inf
    x[1, 40] = 1e30
    x[1, 41] = 1e-30
    counts = candidates(x, codes, k, "cosine")
    assert (counts == 0).nonzero().tolist() == [[1, 3], [1, 4], [1, 40], [1, 41]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_code_that_is_not_finite_or_too_large_leaves_all_to_float32(candidates, value):
    torch.manual_seed(0)
    x = torch.randn(1, 60, 20)
    codes = torch.randn(1, 200, 20)
    assert (candidates(x, codes, 2, "distance") > 0).all()
    codes[0, 7, 2] = value
    assert (candidates(x, codes, 2, "distance") == 0).all()


@pytest.mark.parametrize("of_x, of_codes", [(1e-12, 1e-30), (1e10, 1e30)])
def test_products_out_of_range_are_left_to_float32(candidates, of_x, of_codes):
    """x·c is out of float32's range, x·c / |c| is not."""
    torch.manual_seed(0)
    x = torch.randn(1, 35, 20)
    codes = torch.randn(1, 200, 20)
    assert (candidates(x * of_x, codes * of_codes, 1, "cosine") == 0).all()


@pytest.mark.parametrize("k", [1, 6])
def test_a_list_that_stays_full_gives_its_row_up(candidates, k):
    """150 codes that bfloat16 can't tell apart, close to some of the rows, far from the others."""
    torch.manual_seed(0)
    x = torch.randn(1, 60, 24)
    codes = torch.randn(1, 700, 24)
    codes[0, 100:400:2] = codes[0, 100] + 1e-4 * torch.randn(150, 24)
    x[0, :30] += 2 * codes[0, 100]
    x[0, 30:] -= 2 * codes[0, 100]
    counts = candidates(x, codes, k, "cosine")
    assert (counts[0, :30] == 0).all()
    assert (counts[0, 30:] > 0).all()


@pytest.mark.parametrize("k", [1, 16, 32])
def test_coarse_scores_that_rise_from_code_to_code(candidates, k):
    """Every tile beats the one before: lists are cut again and again."""
    codes = torch.arange(1.0, 601).view(1, 600, 1) * torch.eye(1, 17)
    x = torch.rand(1, 50, 17) + 0.5
    assert (candidates(x, codes, k, "dot") > 0).all()
