"""Codebook against the plain formula, and what it does to its codes."""

import copy

import pytest
import torch
import torch.nn.functional as F

from minicode import Codebook
from minicode.codebook import perplexity
from minicode.topk import definition, pursuit_definition


def plain(a, codes, k, similarity, selection):
    """The method in a few lines: a (N, G, d), codes (G, C, d)."""
    problem = a.detach().transpose(0, 1), codes.detach(), k, similarity
    ids = pursuit_definition(*problem)  # (G, N, k)
    if selection == "nearest":
        ids = definition(*problem)[1]
    q = torch.stack([codes[g][ids[g]].sum(1) for g in range(len(codes))], dim=1)  # (N, G, d)
    return q, q + (a - a.detach())


@pytest.mark.parametrize("selection", ["pursuit", "nearest"])
@pytest.mark.parametrize("similarity", ["cosine", "distance"])
@pytest.mark.parametrize(
    "k, groups, layer_norm",
    [(1, 1, False), (1, 4, False), (3, 1, False), (3, 4, False), (3, 2, True)],
)
def test_output_losses_and_gradients_equal_autograd_of_the_plain_formula(
    k, groups, layer_norm, similarity, selection
):
    torch.manual_seed(0)
    book = Codebook(11, 6, k, groups, similarity, layer_norm, selection)
    x = torch.randn(5, 7, groups * 6, requires_grad=True)
    weight = torch.randn(5, 7, groups * 6)
    out = book(x)
    loss = (out * weight).sum() + 2 * book.autoencoding + 3 * book.commitment
    got = torch.autograd.grad(loss, (x, book.codes))

    a = x.view(35, groups, 6)
    if layer_norm:
        a = (a - a.mean(-1, keepdim=True)) / (a.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    q, plain_out = plain(a, book.codes, k, similarity, selection)
    torch.testing.assert_close(out.view(35, groups, 6), plain_out)
    torch.testing.assert_close(book.autoencoding, F.mse_loss(q, a))
    plain_loss = (plain_out.view(5, 7, -1) * weight).sum()
    plain_loss = plain_loss + 2 * F.mse_loss(q, a.detach())
    plain_loss = plain_loss + 3 * F.mse_loss(a, q.detach())
    for one, other in zip(got, torch.autograd.grad(plain_loss, (x, book.codes))):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(35,), (5, 7), (1,), (1, 1)])
def test_relative_errors_are_shares_of_the_variance(shape):
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(*shape, 2 * 6)
    book = Codebook(11, 6, groups=2, relative=True)
    error = F.mse_loss(book(x), x)
    rows = x.view(-1, 12)
    scale = rows.var(0, correction=0).mean() if len(rows) > 1 else rows.square().mean()
    torch.testing.assert_close(book.autoencoding, error / scale)
    torch.testing.assert_close(book.commitment, error / scale)


def test_straight_through_hands_the_gradient_on_unchanged():
    book = Codebook(9, 4)
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(3, 4)
    (book(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_output_is_the_sum_of_codes_to_the_last_bit():
    book = Codebook(9, 4, k=2)
    out = book(torch.randn(3, 4))
    for row, ids in zip(out, book.ids[:, 0]):
        assert torch.equal(row, book.codes[0, ids[0]] + book.codes[0, ids[1]])


def test_gradient_accumulation_adds_up():
    book = Codebook(9, 4)
    x = torch.randn(8, 4)
    for part in (x, x[:4], x[4:]):
        book(part)
        (book.autoencoding * len(part)).backward()
        if part is x:
            whole = book.codes.grad.clone()
            book.codes.grad = None
    torch.testing.assert_close(book.codes.grad, whole)


def test_start_finds_separate_clusters_and_rare_ones():
    torch.manual_seed(0)
    centres = 100 * torch.randn(30, 2, 4)
    # 28 of the 30 clusters have one member.
    which = torch.cat((torch.arange(30), torch.randint(2, (3000,))))
    book = Codebook(40, 4, groups=2, similarity="distance")
    book.start((centres[which] + 0.01 * torch.randn(len(which), 2, 4)).flatten(1))
    q = book.eval()(centres.flatten(1)).view(30, 2, 4)
    assert (q - centres).abs().max() < 0.1


def test_each_code_starts_at_the_mean_of_what_it_is_nearest_to():
    torch.manual_seed(0)
    x = torch.randn(300, 2, 3)
    book = Codebook(5, 3, groups=2)
    book.start(x.flatten(1), rounds=50)
    ids = book.search(x).squeeze(-1)
    for group in range(2):
        for code in range(5):
            mean = x[ids[:, group] == code, group].mean(0)
            torch.testing.assert_close(book.codes[group, code], mean)


def test_codes_that_are_nearest_to_nothing_stay_on_an_input():
    few = torch.tensor([[1.0, 2.0], [5.0, 6.0], [-3.0, 4.0]])
    book = Codebook(8, 2)
    book.start(few.repeat(20, 1))
    assert all((few == code).all(-1).any() for code in book.codes[0])


def test_start_with_k_codes_a_choice_sums_to_the_data():
    torch.manual_seed(0)
    x = 3 + torch.randn(2000, 8)
    book = Codebook(30, 8, k=4)
    book.start(x)
    assert (book.eval()(x) - x).square().mean() < 1


@torch.no_grad()
@pytest.mark.parametrize("selection", ["pursuit", "nearest"])
def test_each_fit_of_the_start_is_near_least_squares_and_lowers_the_error(selection):
    torch.manual_seed(0)
    x = torch.randn(2000, 2, 8)
    book = Codebook(30, 8, k=4, groups=2, similarity="distance", selection=selection).eval()
    book.start(x.flatten(1), rounds=0)
    book.codes[1, 7] += 1000.0  # never chosen: it stays
    error = []
    for _ in range(6):
        ids = book.search(x)  # (N, G, k)
        error.append((x - book.sum_codes(ids)).square().mean().item())
        chosen = F.one_hot(ids[:, 1], 30).sum(1).float()  # S (N, C) of the second group
        used = chosen.sum(0) > 0
        before = book.codes[1].clone()
        book._fit(x, ids)
        best = torch.linalg.lstsq(chosen[:, used], x[:, 1]).solution
        least = (chosen[:, used] @ best - x[:, 1]).square().mean()
        rest = [
            (chosen @ codes - x[:, 1]).square().mean() - least for codes in (before, book.codes[1])
        ]
        assert rest[1] < 0.05 * rest[0] + 1e-4
        assert torch.equal(book.codes[1, ~used], before[~used])
    assert used.sum() == 29
    assert error == sorted(error, reverse=True) and error[-1] < 0.6 * error[0]


@pytest.mark.parametrize("passes_through", [False, True])
def test_refit_is_least_squares_held_back(passes_through):
    """With S how often each code was chosen: (SᵀS + hold) move = Sᵀ(a - q), a group at a time."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 2 * 3)
    book = Codebook(5, 3, k=2, groups=2, similarity="distance")
    if passes_through:
        book.positions.skip = torch.rand(4, 6) < 0.3
    book(x)
    before = book.codes.detach().clone()
    book.refit(hold=7.0)
    kept = torch.ones(4, 6, dtype=torch.bool) if not passes_through else ~book.positions.skip
    rows = x[kept].view(-1, 2, 3)
    for group in range(2):
        uses = F.one_hot(book.ids[kept][:, group], 5).sum(1).float()  # (N, C)
        left = rows[:, group] - uses @ before[group]
        move = torch.linalg.solve(uses.T @ uses + 7 * torch.eye(5), uses.T @ left)
        assert move.abs().max() > 0.1
        torch.testing.assert_close(book.codes[group] - before[group], move, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_start_and_training_in_every_type(dtype):
    torch.manual_seed(0)
    book = Codebook(20, 4, k=2, groups=2, similarity="distance").to(dtype)
    x = torch.randn(500, 8, dtype=dtype)
    book.start(x)
    loss = (book(x) - x).square().mean()
    assert loss < 0.2
    loss.backward()
    # In half precision counts would end at 256, and codes hardly move.
    own = torch.float64 if dtype == torch.float64 else torch.float32
    assert book.codes.dtype == book.codes.grad.dtype == book.usage.dtype == own
    assert (book.usage.sum(1) == 1000).all()


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES)
def default(request):
    """torch's default type."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_every_type_and_every_default(dtype, default):
    """Started, trained, revived and evaluated, by inputs of any type, under autocast or not."""
    torch.manual_seed(0)
    for x_dtype in DTYPES:
        for autocast in (False, True):
            book = Codebook(20, 4, k=2, groups=2, relative=True)
            if dtype:
                book.to(dtype)
            assert book.codes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            x = torch.randn(300, 8, dtype=x_dtype)
            optimizer = torch.optim.AdamW(book.parameters())
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                book.start(x)
                out = book(x)
                loss = out.float().square().mean() + book.autoencoding + book.commitment
                loss.backward()
                optimizer.step()
                book.revive(optimizer)
                book(x)
                assert book.eval()(x).dtype == out.dtype == x_dtype
            assert (book.usage.sum(1) == 600).all()
            assert (book(x) - x).float().square().mean() < 0.3
            assert book.autoencoding == 0


def test_terms_of_the_loss_are_zero_where_nothing_is_learnt():
    x = torch.randn(9, 4)
    book = Codebook(6, 4)

    def terms():
        found = book.autoencoding, book.commitment
        assert all(isinstance(term, torch.Tensor) and term.shape == () for term in found)
        return [term.item() for term in found]

    assert terms() == [0, 0]
    total = book.autoencoding
    total += 3  # in place: another codebook's is its own
    assert Codebook(6, 4).autoencoding == 0
    for off in (lambda: book.eval()(x), lambda: switched_off(book)(x), lambda: book(x[:0])):
        book.enabled = True
        book.train()
        book(x)
        assert min(terms()) > 0
        assert copy.deepcopy(book).autoencoding == 0
        off()
        assert terms() == [0, 0]
        (book.autoencoding + book.codes.sum()).backward()
    with torch.device("meta"):
        book = Codebook(6, 4)
    book.to_empty(device="cpu")
    assert terms() == [0, 0]


def switched_off(book):
    book.enabled = False
    return book


def test_the_default_is_the_nearest_code():
    book = Codebook(2, 2)
    book.codes.data = torch.tensor([[[1.0, 0.0], [9.0, 1.0]]])
    book(torch.tensor([[1.0, 0.1]]))
    assert book.ids.item() == 0  # by cosine it is 1
    assert book.similarity == "distance"


@pytest.mark.parametrize("shape", [(40,), (4, 10), (2, 4, 5)])
def test_start_takes_any_leading_shape(shape):
    x = torch.randn(40, 4)
    one, other = Codebook(8, 2, groups=2), Codebook(8, 2, groups=2)
    one.start(x, generator=torch.Generator().manual_seed(0))
    other.start(x.view(*shape, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.codes, other.codes)


def test_pursuit_rebuilds_better_than_the_nearest():
    torch.manual_seed(0)
    x = torch.randn(3000, 8)
    error = {}
    for selection in ("pursuit", "nearest"):
        book = Codebook(64, 8, k=4, similarity="distance", selection=selection).eval()
        book.start(x, generator=torch.Generator().manual_seed(0))
        error[selection] = (book(x) - x).square().mean().item()
    assert error["pursuit"] < 0.6 * error["nearest"]


def test_dead_codes_are_revived_with_their_moments():
    torch.manual_seed(0)
    book = Codebook(8, 2, groups=2, similarity="distance")
    with torch.no_grad():
        book.codes[:, 4:] += 1000.0  # four codes of each group that nothing will choose
    optimizer = torch.optim.AdamW([book.codes], lr=1e-3)
    x = torch.randn(200, 4)
    book(x)
    (book.autoencoding + book(x).sum()).backward()
    optimizer.step()
    moments = optimizer.state[book.codes]
    moments["exp_avg"].fill_(1.0)
    alive = book.codes[:, :4].clone()
    assert book.revive(optimizer) == 8
    assert torch.equal(book.codes[:, :4], alive) and book.codes.abs().max() < 100
    for code in book.codes[0, 4:].data:  # each is one of the inputs now
        assert (x.view(-1, 2, 2)[:, 0] == code).all(-1).any()
    assert len(book.codes[0].unique(dim=0)) == 8  # no two on the same
    assert (moments["exp_avg"][:, 4:] == 0).all() and (moments["exp_avg"][:, :4] == 1).all()
    assert book.usage.sum() == 0
    assert book.revive(optimizer) == 0  # nothing was chosen since


@torch.no_grad()
def test_codes_are_revived_on_what_the_others_leave_for_a_last_one():
    book = Codebook(3, 2, k=2, similarity="distance")
    book.codes.data = torch.tensor([[[4.0, 0.0], [0.0, 1.0], [900.0, 900.0]]])
    x = torch.tensor([[4.0, 3.0]] * 5)  # 4, 0 is chosen first, and 0, 3 is left
    book(x)
    assert book.revive(torch.optim.AdamW([book.codes])) == 1
    assert torch.equal(book.codes[0, 2], torch.tensor([0.0, 3.0]))
    assert torch.equal(book(x), x)


def test_nothing_dead_nothing_changes():
    book = Codebook(2, 2, similarity="distance")
    book.codes.data = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    book(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    before = book.codes.clone()
    assert book.revive(torch.optim.AdamW([book.codes])) == 0
    assert torch.equal(book.codes, before)


def test_evaluation_changes_nothing():
    book = Codebook(6, 3)
    book(torch.randn(9, 3))
    before = {name: value.clone() for name, value in book.state_dict().items()}
    book.eval()
    book(torch.randn(50, 3))
    assert all(torch.equal(value, before[name]) for name, value in book.state_dict().items())
    assert book.usage.sum() == 9


def test_usage_is_counted_and_saved():
    book = Codebook(6, 3, k=2, groups=2)
    for _ in range(3):
        book(torch.randn(10, 6))
    assert book.usage.sum(-1).tolist() == [60, 60]
    other = Codebook(6, 3, k=2, groups=2)
    book.enabled = False
    other.load_state_dict(book.state_dict())
    assert torch.equal(other.usage, book.usage) and not other.enabled


def test_perplexity():
    counts = torch.tensor([[5.0, 5.0, 5.0, 5.0], [7.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(perplexity(counts), torch.tensor([4.0, 1.0, 2.0]))
    torch.testing.assert_close(perplexity(counts[2]), torch.tensor(2.0))
    torch.testing.assert_close(perplexity(counts[:, None]), torch.tensor([[4.0], [1.0], [2.0]]))


def test_float32_inside_autocast():
    book = Codebook(50, 16, k=4)
    x = torch.randn(20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = book(x)
    assert torch.equal(out, book(x))
    assert book(x.bfloat16()).dtype == torch.bfloat16


def test_bad_sizes():
    with pytest.raises(ValueError, match="k must be from 1 to the 4 codes"):
        Codebook(4, 2, k=5)
    with pytest.raises(ValueError, match="selection must be one of pursuit, nearest, not 'best'"):
        Codebook(4, 2, selection="best")
    with pytest.raises(ValueError, match="8 codes need as many inputs"):
        Codebook(8, 2).start(torch.randn(7, 2))


def test_near_copies_are_merged_and_the_most_frequent_stays():
    torch.manual_seed(0)
    book = Codebook(n_codes=12, dim=4, groups=2)
    apart = 5 * torch.randn(2, 12, 4)
    codes = apart.clone()
    codes[0, 3] = codes[0, 1] + 0.01
    codes[0, 7] = codes[0, 3] + 0.012  # a chain: nearest to 3, which is nearest to 1
    codes[1, 2] = codes[1, 5] + 0.01
    codes[1, 9] = codes[1, 8] + 0.01  # never chosen
    book.codes.data = codes.clone()
    book.usage[:] = 10
    book.usage[0, [1, 3, 7]] = torch.tensor([9.0, 30, 8])
    book.usage[1, [2, 5]] = torch.tensor([1.0, 2])
    book.usage[1, 9] = 0
    book.merge()
    expected = codes.clone()
    expected[0, [1, 7]] = codes[0, 3]
    expected[1, 2] = codes[1, 5]
    assert torch.equal(book.codes, expected)
    assert book.search(codes[0, 7].expand(1, 2, 4))[0, 0, 0] == 1  # the lowest id of three copies

    sums = Codebook(n_codes=12, dim=4, groups=2, k=2)
    sums.codes.data = codes.clone()
    sums.usage[:] = 10
    sums.merge()
    assert torch.equal(sums.codes, codes)  # of which a copy could be chosen beside the code


def test_merging_goes_no_further_than_the_limit():
    """A row of codes, each near to the next: one does not become a copy of the other end."""
    apart = 100 * torch.arange(1.0, 41)
    row = torch.arange(10.0) ** 1.1  # the distances grow
    book = Codebook(n_codes=50, dim=1)
    book.codes.data = torch.cat((apart, row)).view(1, 50, 1)
    book.usage[:] = torch.arange(50, 0, -1.0)
    before = book.codes.clone()
    book.merge(0.03)
    moved = (book.codes - before).abs()
    assert 0 < moved.max() < 3


def test_gradients_by_torch_func():
    torch.manual_seed(0)
    book = Codebook(20, 6, k=3, groups=2).eval()
    x = torch.randn(5, 12)

    def loss(codes):
        return torch.func.functional_call(book, {"codes": codes}, (x,)).square().sum()

    book(x).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(book.codes.detach()), book.codes.grad)
