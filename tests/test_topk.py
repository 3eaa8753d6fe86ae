"""The search against its definition, by the extension and by PyTorch."""

import os
import random
import threading
from contextlib import nullcontext

import pytest
import torch

from minicode import topk, topk_codes
from minicode.runtime import extension
from minicode.runtime.arguments import SIMILARITIES
from minicode.topk import definition


@pytest.fixture(
    params=["extension", "pytorch", "extension on cuda", "pytorch on cuda"], autouse=True
)
def backend(request, monkeypatch):
    """What is tested; on a GPU, whatever a test makes is made there."""
    name, device = request.param.split(" on ")[0], "cuda" if "cuda" in request.param else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    if name == "pytorch":
        monkeypatch.setattr(extension, "load", lambda: ((), "PyTorch is tested"))
    elif device not in extension.load()[0]:
        assert not os.environ.get("CI"), "CI must test the extension"
        pytest.skip(f"no extension here: {extension.load()[1]}")
    elif device == "cuda":  # for few rows too, for which PyTorch is used
        small = topk.in_pytorch
        monkeypatch.setattr(
            topk, "in_pytorch", lambda *args: (topk.native if args[2] <= 32 else small)(*args)
        )
    with torch.device(device) if device == "cuda" else nullcontext():
        yield name


SHAPES = [  # N, C, d, k
    (0, 5, 3, 2), (1, 1, 1, 1), (7, 5, 3, 5), (33, 100, 17, 8), (300, 37, 16, 1), (64, 513, 8, 200), (5, 1000, 128, 10),
]  # fmt: skip


def same_but_for_rounding(x, codes, k, similarity, scores, ids):
    """Ids equal the definition's, or their float64 scores are within float32 rounding of those."""
    wanted_scores, wanted = definition(x, codes, k, similarity)
    every = definition(x.double(), codes.double(), codes.shape[1], similarity)
    table = torch.empty_like(every[0]).scatter_(-1, every[1], every[0])  # score of each code
    size = (
        x.float().norm(dim=-1, keepdim=True) * codes.float().norm(dim=-1).amax()
        + codes.float().norm(dim=-1).amax() ** 2
    )
    slack = 1e-5 * size.clamp_min(1)
    assert ((table.gather(-1, ids) - table.gather(-1, wanted)).abs() <= slack).all()
    torch.testing.assert_close(
        scores, wanted_scores, rtol=1e-4, atol=float(slack.max()) if slack.numel() else 0
    )
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()  # no code twice


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("n, n_codes, dim, k", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition(n, n_codes, dim, k, similarity, dtype):
    torch.manual_seed(0)
    x, codes = torch.randn(2, n, dim).to(dtype), torch.randn(2, n_codes, dim).to(dtype)
    scores, ids = topk_codes(x.transpose(0, 1), codes, k, similarity)
    assert scores.dtype == torch.float32 and ids.dtype == torch.int64 and ids.shape == (n, 2, k)
    same_but_for_rounding(x, codes, k, similarity, scores.transpose(0, 1), ids.transpose(0, 1))


def random_cases(n):
    """Shapes and kinds of input, by a seed: sizes that are multiples of nothing, and inputs that are hard to rank."""
    draw = random.Random(0)
    for _ in range(n):
        n_codes = draw.choice([1, 2, 7, 31, 33, 100, 257, 300, 513, 1000])
        k = draw.choice([1, 1, 2, 5, 8, 16, 40, n_codes])
        shape = (
            draw.choice([1, 1, 2, 3]),
            draw.choice([0, 1, 5, 9, 33, 64, 100, 300]),
            n_codes,
            draw.choice([1, 2, 3, 16, 31, 33, 64, 100]),
        )
        yield (
            *shape,
            min(k, n_codes),
            draw.choice(SIMILARITIES),
            draw.choice(["plain", "common", "near", "scales", "equal"]),
        )


def make(kind, n_groups, n_rows, n_codes, dim, generator):
    x = torch.randn(n_groups, n_rows, dim, generator=generator)
    codes = torch.randn(n_groups, n_codes, dim, generator=generator)
    if kind == "common":  # far from the origin, all in one direction
        x, codes = x + 30, codes + 50
    elif kind == "near":  # codes that bfloat16 can't tell apart
        codes = codes[:, :1] + 1e-3 * codes
    elif kind == "scales":
        codes = codes * torch.logspace(-3, 3, n_codes).unsqueeze(-1)
    elif kind == "equal":
        codes = codes[:, torch.randint(max(1, n_codes // 3), (n_codes,), generator=generator)]
    return x, codes


def test_hundreds_of_random_shapes():
    generator = torch.Generator(torch.empty(0).device).manual_seed(0)
    for n_groups, n_rows, n_codes, dim, k, similarity, kind in random_cases(300):
        x, codes = make(kind, n_groups, n_rows, n_codes, dim, generator)
        scores, ids = topk_codes(x.transpose(0, 1), codes, k, similarity)
        same_but_for_rounding(x, codes, k, similarity, scores.transpose(0, 1), ids.transpose(0, 1))


@pytest.mark.parametrize("k", [1, 4])
def test_inputs_that_sit_on_the_error_bound(k):
    """A code that is the best in truth, and in bfloat16 lags behind by 98 % of what the bound allows.

    x is 1 everywhere, which bfloat16 holds. Beside 1 it holds nothing before 1 + 2h, h = 2^-8. The winner's
    coordinates lie below 1 + h and round down, those of 8 losers lie above and round up; one coordinate makes up for
    what they are ahead. Signs alternate, so that the means that are subtracted are 0.
    """
    dim, h = 64, 2.0**-8
    x = torch.ones(256, dim)
    x[1::2] = -1
    codes = 0.5 * torch.ones(4096, dim)
    codes[8::16] = -0.5
    codes[1:8] = codes[9] = 1 + 1.001 * h
    codes[1:8, 0] = codes[9, 0] = 1
    codes[3001] = 1 + 0.999 * h
    codes[3001, 0] = 1 + 2 * h
    scores, ids = topk_codes(x, codes, k, "dot")
    assert (ids[::2, 0] == 3001).all()
    same_but_for_rounding(x[None], codes[None], k, "dot", scores[None], ids[None])


def test_strided_inputs_and_expanded_ones():
    torch.manual_seed(0)
    x, codes = torch.randn(40, 2, 12, 100), torch.randn(24, 300, 2)
    for view, table in (
        (x[:, 0].mT, codes[::2, ::3, 0].mT),
        (x[::2, 1, ::2, ::5], codes[:20, :, 0].T),
        (x[:1, :1].expand(7, 2, 12, 100)[..., ::10], codes[:10, :, 1].T),
    ):
        scores, ids = topk_codes(view, table.contiguous(), 5, "distance")
        same = topk_codes(view.contiguous(), table, 5, "distance")
        assert torch.equal(ids, same[1]) and torch.equal(scores, same[0])


def test_more_scores_than_32_bits_can_count():
    x, codes = torch.randn(70_000, 2), torch.randn(33_000, 2)
    codes[32_999] = torch.tensor([1e4, 0.0])
    x[69_999] = torch.tensor([1.0, 0.0])
    _, ids = topk_codes(x, codes, 1, "dot")
    assert ids[69_999] == 32_999
    some = torch.randint(70_000, (50,))
    same_but_for_rounding(
        x[None, some],
        codes[None],
        1,
        "dot",
        *(t[None] for t in (topk_codes(x[some], codes, 1, "dot")[0], ids[some])),
    )


def test_the_same_whatever_the_number_of_threads_and_in_two_at_once():
    torch.manual_seed(0)
    x, codes = torch.randn(3, 300, 40), torch.randn(3, 1700, 40)  # enough for a coarse pass
    results, n_threads = {}, torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results[n] = [topk_codes(x[:, :rows].transpose(0, 1), codes, 3) for rows in (1, 300)]
    finally:
        torch.set_num_threads(n_threads)
    for n in (2, 5):
        assert all(
            torch.equal(a, b)
            for one, other in zip(results[1], results[n])
            for a, b in zip(one, other)
        )
    found = {}
    threads = [
        threading.Thread(
            target=lambda i=i: found.update({i: topk_codes(x.transpose(0, 1), codes, 3)})
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i][1], results[1][1][1]) for i in range(4))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_lower_id_first_among_equals(k):
    codes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    _, ids = topk_codes(torch.tensor([[1.0, 0.0]]), codes, k, "dot")
    assert ids.tolist() == [[1, 2, 4, 0, 3, 5][:k]]
    _, ids = topk_codes(
        torch.ones(256, 64), torch.ones(1024, 64), k
    )  # enough for every way of searching
    assert (ids == torch.arange(k)).all()
    _, ids = topk_codes(
        torch.full((20, 1), -1e-30),
        torch.full((9, 1), 1e-30) * (torch.arange(9.0)[:, None] % 2 == 0),
        k,
        "distance",
    )
    assert (ids == torch.arange(k)).all()  # -0 equals 0


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_non_finite_input_gives_valid_ids_and_nan_loses(similarity):
    codes = torch.randn(20, 4)
    codes[3] = torch.nan
    codes[5] = torch.inf
    x = torch.randn(6, 4)
    x[0], x[1, 2], x[2] = torch.nan, torch.inf, -torch.inf
    for x, codes in ((x, codes), (x.repeat(20, 1), codes), (x.repeat(20, 1), codes.repeat(20, 1))):
        for k in (1, 4, 20):
            scores, ids = topk_codes(x, codes, k, similarity)
            assert ((0 <= ids) & (ids < len(codes))).all() and not scores.isnan().any()
            assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
            assert (ids[0] == torch.arange(k)).all()  # all NaN: the lowest ids
        assert not (topk_codes(x[3:6], codes, 1, similarity)[1] % 20 == 3).any()


def test_a_zero_code_scores_zero_under_cosine():
    codes = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [3.0, 4.0]])
    scores, ids = topk_codes(torch.tensor([[1.0, 0.0]]), codes, 3)
    assert ids.tolist() == [[2, 0, 1]]
    torch.testing.assert_close(scores, torch.tensor([[0.6, 0.0, -1.0]]))


def test_extreme_norms_still_rank():
    codes = torch.randn(50, 8)
    scale = torch.tensor([1e-30, 1e30, 1.0, 1e20, 1e-20]).repeat(10).unsqueeze(-1)
    assert (topk_codes(codes, codes * scale, 1)[1] == topk_codes(codes, codes, 1)[1]).all()


def test_codes_too_small_for_a_norm_score_zero():
    codes = torch.tensor([[2e-39, -1e-39], [1.0, 0.0]])
    assert topk_codes(torch.tensor([[1.0, 0.5]]), codes, 1)[1].item() == 1
    assert topk_codes(torch.ones(1, 1), torch.full((1, 1), 1.18e-38))[0].item() == pytest.approx(
        1
    )  # just large enough
    assert topk_codes(torch.randn(3, 20).T[:, :1], torch.randn(7, 1), 2)[1].shape == (20, 2)


def the_same_where_matmul_may_use_bfloat16(x, codes, wanted):
    torch.set_float32_matmul_precision("medium")
    try:
        assert all(torch.equal(a, b) for a, b in zip(topk_codes(x, codes, 5), wanted))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_search_keeps_float32_under_autocast():
    x, codes = torch.randn(500, 64), torch.randn(300, 64)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert torch.equal(topk_codes(x, codes, 5)[0], topk_codes(x, codes, 5)[0].float())
        inside = topk_codes(x, codes, 5)
    outside = topk_codes(x, codes, 5)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside))
    the_same_where_matmul_may_use_bfloat16(x, codes, outside)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"),
    reason="this torch has no such setting",
)
def test_search_keeps_float32_where_matmul_may_not():
    x, codes, setting = torch.randn(500, 64), torch.randn(300, 64), torch.backends.cuda.matmul
    outside, before = topk_codes(x, codes, 5), setting.fp32_precision
    setting.fp32_precision = (
        "tf32"  # from here on torch.get_float32_matmul_precision() raises an error
    )
    try:
        assert all(torch.equal(a, b) for a, b in zip(topk_codes(x, codes, 5), outside))
        assert setting.fp32_precision == "tf32"
        one, other = topk.float32_throughout(), topk.float32_throughout()  # as in two threads
        one.__enter__(), other.__enter__(), one.__exit__(None, None, None)
        assert setting.fp32_precision == "ieee"
        other.__exit__(None, None, None)
        assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


def test_search_keeps_float32_with_a_torch_before_these_settings(monkeypatch):
    x, codes = torch.randn(50, 8), torch.randn(30, 8)
    wanted = topk_codes(x, codes, 5)
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul", raising=False)
    the_same_where_matmul_may_use_bfloat16(x, codes, wanted)


def test_opcheck(backend):
    for shape, k, similarity in (
        ((2, 9, 4), 1, "cosine"),
        ((1, 70, 5), 3, "distance"),
        ((1, 0, 2), 2, "dot"),
    ):
        x, codes = torch.randn(shape), torch.randn(shape[0], 300, shape[2])
        torch.library.opcheck(torch.ops.minicode.topk_codes, (x, codes, k, similarity))
        if backend == "extension" and not x.is_cuda:
            torch.library.opcheck(
                torch.ops.minicode_native.topk, (x, codes, k, SIMILARITIES.index(similarity), True)
            )


X, E = torch.zeros(3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((X, E, 0), ValueError, "k must be from 1 to the 5 codes"),
        ((X, E, 6), ValueError, "k must be from 1 to the 5 codes"),
        ((X, E, 1.0), TypeError, "k must be an int"),
        ((X, E[:, :3]), ValueError, r"x must be \(..., 3\)"),
        ((X, E.expand(2, 5, 4)), ValueError, r"x must be \(..., 2, 4\)"),
        ((X, E[0]), ValueError, r"codes must be \(C, d\) or \(G, C, d\)"),
        ((X.long(), E), TypeError, "x must be a tensor of float32"),
        ((X.tolist(), E), TypeError, "x must be a tensor"),
        ((X, E.to("meta")), ValueError, "x is on cpu but codes are on meta"),
        ((X, E, 1, "cosinus"), ValueError, "similarity must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        topk_codes(*arguments)
