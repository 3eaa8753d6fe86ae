"""Other methods beside codebooks: each finds what is there, and all are judged alike."""

import copy
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SIZE
from test_train import refusal

from minicode import compare, load_run
from minicode.study import detectors, figures, judge, machine, sparse
from minicode.study.features import (
    Features,
    activations,
    as_it_is,
    best_features,
    control_of,
    losses,
    put,
    replaced,
    sites,
    unexplained,
)
from minicode.study.methods import READ

# -- sparse autoencoders


def sums(rule, n, generator):
    """Sums (n, 24) of two of 32 directions each, and these."""
    directions = F.normalize(torch.randn(32, 24, generator=torch.Generator().manual_seed(1)), dim=1)
    shares = torch.rand(n, 32, generator=generator)
    there = shares >= shares.topk(2).values[:, -1:]
    if rule == "batchtopk":
        there = shares > 1 - 2 / 32  # of two on average
    strengths = there * (1 + torch.rand(n, 32, generator=generator))
    if rule == "abstopk":
        strengths *= torch.randn(n, 32, generator=generator).sign()
    return strengths @ directions, directions


@pytest.mark.parametrize("rule", ["topk", "abstopk", "batchtopk"])
def test_each_finds_the_directions_of_which_data_are_sums(rule, monkeypatch):
    monkeypatch.setattr(sparse, "RATE", 1e-2)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    one = sparse.SparseAutoencoder(rule, 64, 24, 2)
    sparse.train({"site": one}, 1000 * [lambda: {"site": sums(rule, 256, generator)[0]}])
    x, directions = sums(rule, 1000, generator)
    likeness = directions @ one.decoder[0].detach().T  # (32, 64)
    if rule == "abstopk":
        likeness = likeness.abs()
    found = likeness.amax(1)
    assert found.min() > 0.95, found
    q = one.eval()(x)
    assert (x - q).square().sum() < 0.1 * (x - x.mean(0)).square().sum()
    assert 1.8 < (one.strengths != 0).sum(-1).float().mean() < 2.2


def test_what_each_chooses():
    torch.manual_seed(0)
    x = torch.randn(50, 3, 12)  # (B, T, groups * dim)
    for rule in ("topk", "abstopk", "batchtopk"):
        one = sparse.SparseAutoencoder(rule, 10, 4, 2, groups=3)
        q = one(x)
        a = x.unflatten(-1, (3, 4))
        z = torch.zeros(50, 3, 3, 10).scatter_add(-1, one.ids, one.strengths)  # (B, T, G, C)
        scores = torch.einsum("btgd,gcd->btgc", a, one.encoder)
        if rule == "abstopk":
            least = scores.abs().topk(2).values[..., -1:]
            expected = scores.where(scores.abs() >= least, 0)
        elif rule == "topk":
            least = scores.topk(2).values[..., -1:]
            expected = scores.where(scores >= least, 0).relu()
        else:
            every = scores.flatten(0, 1).transpose(0, 1).flatten(1)  # (G, B * T * C)
            least = every.topk(50 * 3 * 2).values[:, -1:]
            expected = scores.where(scores >= least, 0)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(q, torch.einsum("btgc,gcd->btgd", z, one.decoder).flatten(-2))


def test_dead_features_learn_what_is_left():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    one = sparse.SparseAutoencoder("topk", 16, 8, 1)
    one.encoder.data[0, 3] *= 1e-3  # so that another is always better
    one.loss(x).backward()
    assert one.decoder.grad[0, 3].norm() == 0
    assert one.idle[0, 3] == 1
    one.idle[0, 3] = sparse.IDLE
    one.loss(x).backward()
    assert one.decoder.grad[0, 3].norm() > 0


# -- measures


def test_the_best_feature_is_that_of_the_best_threshold():
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 4, size=60)
    pairs = []
    for _ in range(5):
        at = np.sort(rng.permutation(60)[:30])
        pairs.append((at, rng.integers(1, 5, size=30) / 2))  # many are as strong as each other
    found = best_features(pairs, labels, 4)
    for label in range(4):
        f1 = []
        both = []
        for at, strength in pairs:
            for least in np.unique(strength):
                fires = at[strength >= least]
                right = (labels[fires] == label).sum()
                total = (labels == label).sum()
                f1.append(2 * right / (len(fires) + total))
                both.append(min(right / len(fires), right / total))
        precision, recall, best, highest = found[:, label]
        assert best == pytest.approx(max(f1)) == pytest.approx(2 / (1 / precision + 1 / recall))
        assert highest == pytest.approx(max(both))


@pytest.fixture(scope="module")
def run(tiny_run):
    return load_run(tiny_run)


@pytest.fixture(scope="module")
def tokens(run):
    return torch.from_numpy(run.fsm.sequences(np.random.default_rng(5), n=32, length=12))


def test_codes_are_the_features_of_a_network_of_codebooks(run, tokens):
    features = Features(run.model, tokens, replaced)
    recording = detectors.record_codes(run.model, tokens.numpy())
    assert (features.count[::2] == recording.count).all() and not features.count[1::2].any()
    for mine, theirs in zip(features.where[::2], recording.where):
        assert mine.tolist() == theirs.tolist()
    k = sum(book.groups * book.k for book in sites(run.model).values())
    assert features.figures() == {"chosen": k, "dead": pytest.approx((recording.count == 0).mean())}


def test_control_is_what_forcing_all_codes_does(run):
    fsm = run.fsm
    tokens, b = machine.draw_pairs(run, 50, np.random.default_rng(1))["inside"]
    copy_codes = machine.copy_codes(run.model, run.sites())
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    mine = control_of(fsm, run.model, replaced, tokens, b, generators[0])
    assert mine == machine.control(fsm, run.model, tokens, b, copy_codes, generators[1])["control"]


def test_a_network_that_is_read_stays_as_it_is(run, tokens):
    dense = run.dense
    before = {name: a.clone() for name, a in activations(dense, tokens).items()}
    model = copy.deepcopy(dense)
    make, learn = READ["k-means"]
    modules = make(run, 2)
    for name, book in modules.items():
        book.start(before[name])
    put(model, modules)
    for name, a in activations(model, tokens).items():
        assert torch.equal(a, before[name])
    assert 0 < unexplained(model, tokens, as_it_is) < 1
    found = losses(model, dense, tokens)
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:])[1].item()
        zero = found["loss_zero"]
        recovered = (zero - loss) / (zero - dense(tokens[:, :-1], tokens[:, 1:])[1].item())
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["recovered"] == pytest.approx(recovered, rel=1e-3)
    assert found["loss_one"] != found["loss"]
    same = losses(dense, dense, tokens)
    assert same["recovered"] == 1 and same["loss"] == pytest.approx(same["loss_one"])


def test_a_line_goes_through_its_points():
    svg = figures.lines({"a": [(1, 2.0), (2, 4.0)], "b": [(1, 0.0), (2, 1.0)]}, title="two")
    number = r"(\d+\.\d)"
    lines = re.findall(rf"M{number} {number}L{number} {number}", svg)
    (x1, a1, x2, a2), (x3, b1, x4, b2) = [[float(part) for part in line] for line in lines]
    assert x1 == x3 < x2 == x4
    assert a2 < a1 < b2 < b1  # the higher, the smaller: pixels count from the top
    assert b2 - a1 == pytest.approx(b1 - b2) == pytest.approx((a1 - a2) / 2)
    for text in ("a: 1, 2", "a: 2, 4", "b: 1, 0", "b: 2, 1"):
        assert f"<title>{text}</title>" in svg


# -- the command

ONLY = ["codebooks, pursuit", "TopK", "random codes", "neurons", "mean differences"]


SMALL = ["--train", *f"--n-states 16 --n-edges 3 --base 4 {SIZE} --batch-size 8".split()]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(detectors, "N_SEQUENCES", 32)
    monkeypatch.setattr(judge, "N_PAIRS", 20)


def test_the_tables_are_of_the_files(few, tmp_path, monkeypatch, capsys):
    flags = ["--out", str(tmp_path), "--seeds", "2", "--k", "1", "--only", *ONLY]
    small = [*SMALL, "--steps", "20"]
    compare.main([*flags, *small])
    printed = capsys.readouterr().out.splitlines()
    n_lines = len(judge.COLUMNS) * (3 + len(ONLY))
    tables = [line.split("|")[1:-1] for line in printed[-n_lines:] if line]
    for method in ONLY:
        name = compare.name(method, None if method in compare.WITHOUT_K else 1)
        files = [tmp_path / f"dense-{seed}" / f"{name}.json" for seed in range(2)]
        results = [json.loads(file.read_bytes()) for file in files]
        of_method = [row for row in tables if row[0].strip().startswith(method)]
        assert len(of_method) == len(judge.COLUMNS)
        for columns, row in zip(judge.COLUMNS, of_method):
            for column, cell in zip(columns, row[1:]):
                values = [seed[column] for seed in results if column in seed]
                expected = "-"
                if values:
                    lowest, highest = min(values), max(values)
                    expected = f"{np.mean(values):.3f} ({lowest:.3f} to {highest:.3f})"
                if len(values) == 1:  # agreement, of one pair
                    expected = f"{values[0]:.3f}"
                assert cell.strip() == expected
    assert {"mean_iou", "chance"} <= figures_of(tmp_path / "dense-1", "TopK-1").keys()

    monkeypatch.setattr(compare, "judge", lambda *args: pytest.fail("judged again"))
    monkeypatch.setattr(compare, "read", lambda *args: pytest.fail("trained again"))
    compare.main([*flags, "--figures", str(tmp_path / "figures"), *small])
    assert capsys.readouterr().out.splitlines()[-n_lines:] == printed[-n_lines:]
    for chart in "error", "readable":
        svg = (tmp_path / "figures" / f"{chart}.svg").read_text(encoding="utf-8")
        assert "TopK" in svg and "neurons" not in svg

    compare.network.cache_clear()
    flags += [*SMALL, "--steps", "21"]
    assert "has other settings" in refusal(compare.main, *flags, capsys=capsys)


def test_a_run_is_no_folder_of_runs(tiny_run, tmp_path, capsys):
    flags = ["--out", str(tiny_run), "--only", "neurons"]
    assert "is the folder of a run: runs over" in refusal(compare.main, *flags, capsys=capsys)
    assert not (tiny_run / "dense-0").exists()


def test_flags_for_all_networks_leave_each_row_its_own(few, tmp_path, capsys):
    flags = ["--seeds", "2", "--k", "2", "--only", "codebooks, pursuit", *SMALL, "--steps", "4"]
    others = ["--seed", "5", "--k", "3", "--codebooks", "head"]
    compare.main(["--out", str(tmp_path), *flags, *others])
    for seed in range(2):
        dense = load_run(tmp_path / f"dense-{seed}").config
        assert (dense.seed, dense.codebooks) == (seed, "none")
        codes = load_run(tmp_path / f"codebooks-pursuit-2-{seed}").config
        assert (codes.seed, codes.k) == (seed, 2)
    assert capsys.readouterr().err.count("has not learnt the machine") == 4


def figures_of(folder, name):
    return json.loads((folder / f"{name}.json").read_bytes())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--only", "magic"], "invalid choice: 'magic'"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--only", "codebooks, nearest", "--k", "1"], "k = 1, are those by pursuit"),
        (["--k", "0"], "--k must be at least 1"),
        (["--k", "2", "17"], "--k must be below 17, not 17"),
        (["--train", "--steps", "0"], "steps must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_line(flags, words, tmp_path, capsys):
    assert words in refusal(compare.main, "--out", str(tmp_path), *flags, capsys=capsys)
