"""The search against its definition, by the extension and by PyTorch."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from minicode import topk, topk_codes
from minicode.runtime import extension, gpu
from minicode.runtime.arguments import SIMILARITIES
from minicode.runtime.precision import float32_throughout
from minicode.topk import definition, pursuit_definition, scale_and_offset

BACKENDS = ["extension", "pytorch", "extension on cuda", "pytorch on cuda"]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    """What is tested; on a GPU, whatever a test makes is made there."""
    name = request.param.split(" on ")[0]
    device = "cuda" if "cuda" in request.param else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    if name == "pytorch":
        monkeypatch.setattr(extension, "load", lambda device: (False, "PyTorch is tested"))
    else:
        serves, why = extension.load(device)
        if not serves:
            assert not os.environ.get("CI"), "CI must test the extension"
            pytest.skip(f"no extension here: {why}")
        if device == "cuda":  # for few rows too
            monkeypatch.setattr(gpu, "serves", lambda x, k: k <= 32)
    with torch.device("cuda") if device == "cuda" else nullcontext():
        yield name


def pursue(x, codes, k, similarity="cosine", blocked=None):
    return topk_codes(x, codes, k, similarity, "pursuit", blocked)[1]


SHAPES = [  # N, C, d, k
    (0, 5, 3, 2),
    (1, 1, 1, 1),
    (7, 5, 3, 5),
    (33, 100, 17, 8),
    (300, 37, 16, 1),
    (64, 513, 8, 200),
    (5, 1000, 128, 10),
]
KINDS = ["plain", "common", "near", "scales", "equal"]


def make(kind, n_groups, n_rows, n_codes, dim, generator):
    """Rows and codes, of a kind that is easy to rank or hard."""
    x = torch.randn(n_groups, n_rows, dim, generator=generator)
    codes = torch.randn(n_groups, n_codes, dim, generator=generator)
    if kind == "common":  # far from the origin, all in one direction
        x += 30
        codes += 50
    elif kind == "near":  # codes that bfloat16 can't tell apart
        codes = codes[:, :1] + 1e-3 * codes
    elif kind == "scales":
        codes *= torch.logspace(-3, 3, n_codes).unsqueeze(-1)
    elif kind == "equal":
        which = torch.randint(max(1, n_codes // 3), (n_codes,), generator=generator)
        codes = codes[:, which]
    return x, codes


def same(found, wanted):
    """Scores and ids, to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(found, wanted))


def same_but_for_rounding(x, codes, k, similarity, scores, ids):
    """Ids equal the definition's, or their float64 scores are within float32 rounding of those."""
    wanted_scores, wanted_ids = definition(x, codes, k, similarity)
    scale, offset = scale_and_offset(codes, similarity)
    exact = (x.double() @ codes.double().mT) * scale + offset  # (G, N, C)
    longest = (length(codes) * scale.mT).amax(-2, keepdim=True)
    size = length(x) * longest + offset.abs().amax(-1, keepdim=True)  # (G, N, 1)
    slack = 1e-5 * size.clamp_min(1)
    assert ((exact.gather(-1, ids) - exact.gather(-1, wanted_ids)).abs() <= slack).all()
    assert ((scores - wanted_scores).abs() <= slack + 1e-4 * wanted_scores.abs()).all()
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()  # no code twice


def length(v):
    return v.float().norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("n, n_codes, dim, k", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition(n, n_codes, dim, k, similarity, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, n, dim).to(dtype)
    codes = torch.randn(2, n_codes, dim).to(dtype)
    scores, ids = topk_codes(x.transpose(0, 1), codes, k, similarity)
    assert scores.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert ids.shape == (n, 2, k)
    same_but_for_rounding(x, codes, k, similarity, scores.transpose(0, 1), ids.transpose(0, 1))


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, n_codes, dim, k", [(300, 64, 16, 8), (9, 200, 5, 4), (5, 7, 3, 7)])
def test_pursuit_equals_its_definition(n, n_codes, dim, k, similarity, dtype):
    """By the Gram matrix where there are many rows, by searching again where there are few."""
    torch.manual_seed(0)
    x = torch.randn(2, n, dim).to(dtype)
    codes = torch.randn(2, n_codes, dim).to(dtype)
    ids = pursue(x.transpose(0, 1), codes, k, similarity)
    assert ids.dtype == torch.int64
    assert ids.shape == (n, 2, k)
    ids = ids.transpose(0, 1)
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()  # no code twice
    wanted = pursuit_definition(x, codes, k, similarity)
    assert (ids == wanted).all(-1).float().mean() > 0.99  # but for near ties
    assert torch.equal(pursue(x[0], codes[0], k, similarity), ids[0])


def test_pursuit_step_by_step():
    codes = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    x = torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    # 3, 1: code 0 leaves 0, 1, which are codes 2 and 3, of which the lower; nothing is left, to
    # which 3 and 4 are as near. 2, 0: code 1 leaves nothing, code 2 leaves 0, -1: nearest is 4.
    assert pursue(x, codes, 3, "distance").tolist() == [[0, 2, 3], [1, 2, 4]]
    blocked = torch.zeros(2, 5, dtype=torch.bool)
    blocked[0, 0] = True  # then code 1, and 1, 1 is left
    assert pursue(x, codes, 2, "distance", blocked).tolist() == [[1, 2], [1, 2]]
    assert topk_codes(x, codes, 2, "distance")[1].tolist() == [[0, 1], [1, 0]]
    assert topk_codes(x, codes, 2, "distance", blocked=blocked)[1].tolist() == [[1, 2], [1, 0]]


def test_pursuit_of_many_rows_and_its_scores_are_for_what_was_left_over():
    """So many that they are searched in several chunks, the last one smaller."""
    torch.manual_seed(0)
    x = torch.randn(40_000, 4)
    codes = torch.randn(64, 4)
    scores, ids = topk_codes(x, codes, 3, "distance", "pursuit")
    left = x
    for step in range(3):
        chosen = codes[ids[:, step]]
        wanted = (left * chosen).sum(-1) - 0.5 * chosen.square().sum(-1)
        torch.testing.assert_close(scores[:, step], wanted, rtol=1e-4, atol=1e-4)
        left = left - chosen
    for rows in (slice(200), slice(-200, None)):
        wanted = pursuit_definition(x[None, rows], codes[None], 3, "distance")[0]
        assert (ids[rows] == wanted).all(-1).float().mean() > 0.99  # but for near ties


@pytest.mark.parametrize("selection", ["nearest", "pursuit"])
@pytest.mark.parametrize("some_are_blocked", [False, True])
def test_many_rows_are_searched_as_few_are(selection, some_are_blocked):
    torch.manual_seed(0)
    x = torch.randn(40_000, 4)
    codes = torch.randn(64, 4)
    blocked = torch.rand(40_000, 64) < 0.5 if some_are_blocked else None
    scores, ids = topk_codes(x, codes, 3, "distance", selection, blocked)
    for rows in (slice(200), slice(-200, None)):
        bad = blocked[rows] if some_are_blocked else None
        wanted, wanted_ids = topk_codes(x[rows], codes, 3, "distance", selection, bad)
        torch.testing.assert_close(scores[rows], wanted, rtol=1e-4, atol=1e-4)
        assert (ids[rows] == wanted_ids).all(-1).float().mean() > 0.99  # but for near ties


@pytest.mark.parametrize("n, k", [(50, 3), (2, 3)])
def test_pursuit_among_what_is_not_blocked(n, k):
    torch.manual_seed(0)
    x = torch.randn(n, 2, 6)
    codes = torch.randn(2, 40, 6)
    blocked = torch.rand(n, 2, 40) < 0.5
    ids = pursue(x, codes, k, "cosine", blocked)
    assert not blocked.gather(-1, ids).any()
    for row, group in ((0, 0), (1, 1)):
        free = (~blocked[row, group]).nonzero().flatten()
        alone = pursuit_definition(x[None, None, row, group], codes[None, group, free], k, "cosine")
        assert torch.equal(ids[row, group], free[alone.flatten()])


def test_pursuit_of_what_is_no_number():
    codes = torch.randn(9, 4)
    for value in (torch.nan, torch.inf, -torch.inf, 3e38):
        for table in (codes, codes * value):
            for n in (1, 30):
                ids = pursue(torch.full((n, 4), value), table, 5, "distance")
                assert ((ids >= 0) & (ids < 9)).all()
                assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    assert pursue(torch.empty(0, 4), codes, 3).shape == (0, 3)


@pytest.mark.parametrize("similarity", ["distance", "dot"])
@pytest.mark.parametrize("n_codes", [2, 5, 16, 63, 64, 65, 200])
def test_the_extensions_choices_are_those_of_the_loop_to_the_last_bit(n_codes, similarity, backend):
    """Whole vectors and what is left over; equal scores; sums that are no finite number."""
    torch.manual_seed(0)
    x = torch.randint(-4, 5, (2, 211, 7)).float()
    x[0, 7, 3] = torch.nan
    x[1, 8, 4] = torch.inf
    x[0, 9] = -torch.inf
    codes = torch.randint(-4, 5, (2, n_codes, 7)).float()
    codes[0, -1] = codes[0, 0]
    k = min(n_codes, 7)
    scores, ids = topk_codes(x.transpose(0, 1), codes, k, similarity, "pursuit")
    wanted = topk.pursue_in_chunks(x, codes, k, similarity)
    assert torch.equal(ids.transpose(0, 1), wanted[1])
    assert torch.equal(scores.transpose(0, 1), wanted[0])


def test_pursuit_of_one_code_is_the_search():
    x, codes = torch.randn(200, 8), torch.randn(60, 8)
    for similarity in SIMILARITIES:
        ids = topk_codes(x, codes, 1, similarity)[1]
        assert torch.equal(pursue(x, codes, 1, similarity), ids)


def test_hundreds_of_random_shapes():
    """Sizes that are multiples of nothing, and inputs that are hard to rank."""
    draw = random.Random(0)
    generator = torch.Generator(torch.empty(0).device).manual_seed(0)
    for _ in range(300):
        n_codes = draw.choice([1, 2, 7, 31, 33, 100, 257, 300, 513, 1000])
        k = min(n_codes, draw.choice([1, 1, 2, 5, 8, 16, 40, n_codes]))
        n_groups = draw.choice([1, 1, 2, 3])
        n_rows = draw.choice([0, 1, 5, 9, 33, 64, 100, 300])
        dim = draw.choice([1, 2, 3, 16, 31, 33, 64, 100])
        similarity = draw.choice(SIMILARITIES)
        x, codes = make(draw.choice(KINDS), n_groups, n_rows, n_codes, dim, generator)
        scores, ids = topk_codes(x.transpose(0, 1), codes, k, similarity)
        same_but_for_rounding(x, codes, k, similarity, scores.transpose(0, 1), ids.transpose(0, 1))


def on_the_bound_of_bfloat16():
    """Beside 1 bfloat16 holds nothing before 1 + 2h, h = 2^-8.

    The winner's coordinates lie below 1 + h and round down, those of 8 losers lie above and round
    up; one coordinate makes up for what they are ahead.
    """
    h = 2.0**-8
    winner = torch.full((64,), 1 + 0.999 * h)
    loser = torch.full((64,), 1 + 1.001 * h)
    winner[0] = 1 + 2 * h
    loser[0] = 1
    return winner, loser


def on_the_bound_of_bytes():
    """The largest coordinate makes a step 1: what lies below 10.5 is 10, what lies above is 11."""
    winner = torch.full((64,), 10.499)
    loser = torch.full((64,), 10.501)
    winner[:2] = torch.tensor([127.0, 11])
    loser[:2] = torch.tensor([127.0, 10])
    return winner, loser


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("make_codes", [on_the_bound_of_bfloat16, on_the_bound_of_bytes])
def test_inputs_that_sit_on_the_error_bound(make_codes, k):
    """The best code lags, once it is rounded, behind others by 97 % of what the bound allows.

    x is 1 everywhere, or -1, which is held exactly. The means that are subtracted are 0: those of
    rows, and of every eighth code.
    """
    winner, loser = make_codes()
    x = torch.ones(256, 64)
    x[1::2] = -1
    codes = 0.5 * torch.ones(4096, 64)
    codes[8::16] = -0.5
    codes[1:64:8] = loser
    codes[2:64:8] = -loser
    codes[3001] = winner
    codes[3002] = -winner
    scores, ids = topk_codes(x, codes, k, "dot")
    assert (ids[::2, 0] == 3001).all()
    assert (ids[1::2, 0] == 3002).all()
    same_but_for_rounding(x[None], codes[None], k, "dot", scores[None], ids[None])


@pytest.mark.parametrize("dim", [256, 2048])
def test_squares_that_are_taken_for_0(dim):
    """Where denormals are switched off, those of numbers near 1e-19."""
    torch.manual_seed(0)
    codes = torch.randn(1024, dim)
    right = torch.randint(1024, (300,))
    x = 2e-20 * (0.8 * codes[right] + 0.6 * torch.randn(300, dim))
    try:
        torch.set_flush_denormal(True)
        _, ids = topk_codes(x, codes, 1, "dot")
    finally:
        torch.set_flush_denormal(False)
    _, wanted = definition(x[None].double(), codes[None].double(), 1, "dot")
    assert torch.equal(ids, wanted[0])


def test_strided_inputs_and_expanded_ones():
    torch.manual_seed(0)
    x = torch.randn(40, 2, 12, 100)
    codes = torch.randn(24, 300, 2)
    for view, table in [
        (x[:, 0].mT, codes[::2, ::3, 0].mT),
        (x[::2, 1, ::2, ::5], codes[:20, :, 0].T),
        (x[:1, :1].expand(7, 2, 12, 100)[..., ::10], codes[:10, :, 1].T),
    ]:
        found = topk_codes(view, table.contiguous(), 5, "distance")
        assert same(found, topk_codes(view.contiguous(), table, 5, "distance"))


def test_more_scores_than_32_bits_can_count(backend):
    if backend == "pytorch":
        pytest.skip("PyTorch never holds more than 2^24 of them")
    x = torch.randn(70_000, 2)
    codes = torch.randn(33_000, 2)
    codes[32_999] = torch.tensor([1e4, 0.0])
    x[69_999] = torch.tensor([1.0, 0.0])
    _, ids = topk_codes(x, codes, 1, "dot")
    assert ids[69_999] == 32_999
    some = torch.randint(70_000, (50,))
    scores, _ = topk_codes(x[some], codes, 1, "dot")
    same_but_for_rounding(x[None, some], codes[None], 1, "dot", scores[None], ids[None, some])


def large_enough_for_a_coarse_pass():
    torch.manual_seed(0)
    return torch.randn(300, 3, 40), torch.randn(3, 1700, 40)


def test_the_same_whatever_the_number_of_threads():
    x, codes = large_enough_for_a_coarse_pass()
    n_threads = torch.get_num_threads()
    one_row = []
    all_rows = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            one_row.append(topk_codes(x[:1], codes, 3))
            all_rows.append(topk_codes(x, codes, 3))
    finally:
        torch.set_num_threads(n_threads)
    for results in (one_row, all_rows):
        assert same(results[0], results[1])
        assert same(results[0], results[2])


def test_the_same_in_several_threads_at_once():
    x, codes = large_enough_for_a_coarse_pass()
    wanted = topk_codes(x, codes, 3)
    with ThreadPoolExecutor(4) as pool:
        searches = [pool.submit(topk_codes, x, codes, 3) for _ in range(4)]
    for search in searches:
        assert same(search.result(), wanted)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_lower_id_first_among_equals(k):
    codes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    _, ids = topk_codes(torch.tensor([[1.0, 0.0]]), codes, k, "dot")
    assert ids.tolist() == [[1, 2, 4, 0, 3, 5][:k]]
    # Enough for every way of searching.
    _, ids = topk_codes(torch.ones(256, 64), torch.ones(1024, 64), k)
    assert (ids == torch.arange(k)).all()


@pytest.mark.parametrize("k", [1, 3, 6])
def test_minus_zero_equals_zero(k):
    x = torch.full((20, 1), -1e-30)
    codes = torch.zeros(9, 1)
    codes[::2] = 1e-30
    _, ids = topk_codes(x, codes, k, "distance")
    assert (ids == torch.arange(k)).all()


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_non_finite_input_gives_valid_ids_and_nan_loses(similarity):
    codes = torch.randn(20, 4)
    codes[3] = torch.nan
    codes[5] = torch.inf
    x = torch.randn(6, 4)
    x[0] = torch.nan
    x[1, 2] = torch.inf
    x[2] = -torch.inf
    for n_x, n_codes in [(1, 1), (20, 1), (20, 20)]:
        many_x = x.repeat(n_x, 1)
        table = codes.repeat(n_codes, 1)
        for k in (1, 4, 20):
            scores, ids = topk_codes(many_x, table, k, similarity)
            assert ((ids >= 0) & (ids < len(table))).all()
            assert not scores.isnan().any()
            assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
            assert (ids[0] == torch.arange(k)).all()  # all NaN: the lowest ids
        _, best = topk_codes(x[3:6], table, 1, similarity)
        assert not (best % 20 == 3).any()


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
    _, ids = topk_codes(torch.tensor([[1.0, 0.5]]), codes, 1)
    assert ids.item() == 1
    just_large_enough = torch.full((1, 1), 1.18e-38)
    scores, _ = topk_codes(torch.ones(1, 1), just_large_enough)
    assert scores.item() == pytest.approx(1)


def test_rows_of_one_number_that_are_apart():
    x = torch.randn(3, 20).T[:, :1]
    codes = torch.randn(7, 1)
    assert same(topk_codes(x, codes, 2), topk_codes(x.contiguous(), codes, 2))


def the_same_where_matmul_may_use_bfloat16(x, codes, wanted):
    torch.set_float32_matmul_precision("medium")
    try:
        assert same(topk_codes(x, codes, 5), wanted)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_search_keeps_float32_under_autocast():
    x = torch.randn(500, 64)
    codes = torch.randn(300, 64)
    outside = topk_codes(x, codes, 5)
    with torch.autocast(x.device.type, torch.bfloat16):
        inside = topk_codes(x, codes, 5)
    assert inside[0].dtype == torch.float32
    assert same(inside, outside)
    the_same_where_matmul_may_use_bfloat16(x, codes, outside)


has_new_setting = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@pytest.mark.skipif(not has_new_setting, reason="this torch has no such setting")
def test_search_keeps_float32_where_matmul_may_not():
    x = torch.randn(500, 64)
    codes = torch.randn(300, 64)
    wanted = topk_codes(x, codes, 5)
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"  # from here on torch's older calls raise errors
    try:
        assert same(topk_codes(x, codes, 5), wanted)
        assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(not has_new_setting, reason="this torch has no such setting")
def test_the_last_of_several_threads_restores_what_matmul_may(monkeypatch):
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    one = float32_throughout()
    other = float32_throughout()
    try:
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert setting.fp32_precision == "ieee"
        other.__exit__(None, None, None)
        assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before


def test_search_keeps_float32_with_a_torch_before_these_settings(monkeypatch):
    x = torch.randn(50, 8)
    codes = torch.randn(30, 8)
    wanted = topk_codes(x, codes, 5)
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul", raising=False)
    the_same_where_matmul_may_use_bfloat16(x, codes, wanted)


@pytest.mark.parametrize(
    "n_rows, dim, k, similarity", [(9, 4, 1, "cosine"), (70, 5, 3, "distance"), (0, 2, 2, "dot")]
)
def test_opcheck(backend, n_rows, dim, k, similarity):
    x = torch.randn(2, n_rows, dim)
    codes = torch.randn(2, 300, dim)
    torch.library.opcheck(torch.ops.minicode.topk_codes, (x, codes, k, similarity))
    torch.library.opcheck(torch.ops.minicode.topk_codes, (x, codes, k, similarity, "pursuit"))
    if backend == "extension" and not x.is_cuda:
        kind = SIMILARITIES.index(similarity)
        torch.library.opcheck(torch.ops.minicode_native.topk, (x, codes, k, kind, True))
        torch.library.opcheck(torch.ops.minicode_native.pursuit, (x, codes, k, kind))


X = torch.zeros(3, 4)
E = torch.zeros(5, 4)


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
        ((X, E, 1, "dot", "best"), ValueError, "selection must be one of pursuit, nearest"),
        ((X, E, 1, "dot", "nearest", X), TypeError, r"blocked must be a tensor of bool \(3, 5\)"),
        ((X, E, 1, "dot", "nearest", [True]), TypeError, "blocked must be a tensor of bool"),
        ((X, E, 1, "dot", "nearest", X.bool()), ValueError, r"blocked must be \(3, 5\), not"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        topk_codes(*arguments)
