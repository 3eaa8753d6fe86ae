"""The search against its definition."""

import pytest
import torch

from minicode import topk_codes
from minicode.topk import SIMILARITIES, definition

SHAPES = [  # N, C, d, k
    (0, 5, 3, 2), (1, 1, 1, 1), (7, 5, 3, 5), (33, 100, 17, 8), (300, 37, 16, 1), (64, 513, 8, 200), (5, 1000, 128, 10),
]  # fmt: skip


def same_but_for_rounding(x, codes, k, similarity, scores, ids):
    """Ids equal the definition's, or their float64 scores are within float32 rounding of those."""
    wanted_scores, wanted = definition(x, codes, k, similarity)
    every = definition(x.double(), codes.double(), codes.shape[1], similarity)
    table = torch.empty_like(every[0]).scatter_(-1, every[1], every[0])  # score of each code
    size = x.float().norm(dim=-1, keepdim=True) * codes.float().norm(dim=-1).amax() + codes.float().norm(dim=-1).amax() ** 2
    slack = 1e-5 * size.clamp_min(1)
    assert ((table.gather(-1, ids) - table.gather(-1, wanted)).abs() <= slack).all()
    torch.testing.assert_close(scores, wanted_scores, rtol=1e-4, atol=float(slack.max()) if slack.numel() else 0)
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


@pytest.mark.parametrize("k", [1, 3, 6])
def test_lower_id_first_among_equals(k):
    codes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    _, ids = topk_codes(torch.tensor([[1.0, 0.0]]), codes, k, "dot")
    assert ids.tolist() == [[1, 2, 4, 0, 3, 5][:k]]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_non_finite_input_gives_valid_ids_and_nan_loses(similarity):
    codes = torch.randn(20, 4)
    codes[3] = torch.nan
    codes[5] = torch.inf
    x = torch.randn(6, 4)
    x[0], x[1, 2], x[2] = torch.nan, torch.inf, -torch.inf
    for k in (1, 4, 20):
        scores, ids = topk_codes(x, codes, k, similarity)
        assert ((0 <= ids) & (ids < 20)).all() and not scores.isnan().any()
        assert (ids.sort(-1).values == ids.sort(-1).values.unique_consecutive(dim=-1)).all()
    assert 3 not in topk_codes(x[3:], codes, 1, similarity)[1]


def test_a_zero_code_scores_zero_under_cosine():
    codes = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [3.0, 4.0]])
    scores, ids = topk_codes(torch.tensor([[1.0, 0.0]]), codes, 3)
    assert ids.tolist() == [[2, 0, 1]]
    torch.testing.assert_close(scores, torch.tensor([[0.6, 0.0, -1.0]]))


def test_extreme_norms_still_rank():
    codes = torch.randn(50, 8)
    scale = torch.tensor([1e-30, 1e30, 1.0, 1e20, 1e-20]).repeat(10).unsqueeze(-1)
    assert (topk_codes(codes, codes * scale, 1)[1] == topk_codes(codes, codes, 1)[1]).all()


def test_search_keeps_float32_under_autocast():
    x, codes = torch.randn(500, 64), torch.randn(300, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(topk_codes(x, codes, 5)[0], topk_codes(x, codes, 5)[0].float())
        inside = topk_codes(x, codes, 5)
    assert all(torch.equal(a, b) for a, b in zip(inside, topk_codes(x, codes, 5)))


def test_opcheck():
    for k, similarity in ((1, "cosine"), (3, "distance")):
        torch.library.opcheck(torch.ops.minicode.topk_codes, (torch.randn(2, 9, 4), torch.randn(2, 7, 4), k, similarity))


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
