"""The CUDA kernels: they compile; and, run thread by thread on a CPU, they keep to the definition."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_topk import same_but_for_rounding

from minicode.topk import SIMILARITIES, scale_and_offset

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc here")
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_kernels_compile_alone(arch, tmp_path):
    command = ["nvcc", "-std=c++17", f"-arch={arch}", "-c", str(ROOT / "csrc" / "topk_cuda.cu"), "-o", str(tmp_path / "topk.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("there is no g++ here")
    library = tmp_path_factory.mktemp("cuda") / "kernels.so"
    command = [compiler, "-std=c++20", "-O2", "-w", "-shared", "-fPIC", "-pthread", "-x", "c++", f"-I{ROOT / 'csrc'}",
               str(ROOT / "tests" / "cuda_on_cpu.h"), "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).search
    function.restype = ctypes.c_bool
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [*[pointer] * 4, *[number] * 5, pointer, pointer]

    def run(x, codes, k, similarity):
        scores = torch.full((*x.shape[:2], k), 7.0)
        ids = torch.full((*x.shape[:2], k), -7)
        inputs = [tensor.contiguous() for tensor in (x, codes, *scale_and_offset(codes, similarity))]
        sizes = *x.shape[:2], codes.shape[1], x.shape[2], k
        done = function(*(tensor.data_ptr() for tensor in inputs), *sizes, scores.data_ptr(), ids.data_ptr())
        assert done == (k <= 32)
        return scores, ids

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
