"""Numbers that Python takes and we don't, tensors at the edge: the right result, or one line."""

import dataclasses
import math

import pytest
import torch
from conftest import TINY, make_model
from test_train import refusal
from torch import nn

from minicode import (
    FSM,
    Codebook,
    GPTConfig,
    attach,
    block,
    codebooks,
    force,
    load_run,
    record,
    start_codebooks,
    topk_codes,
    use_codebooks,
)
from minicode.ablate import main as ablate
from minicode.bench import main as bench
from minicode.interpret import main as interpret
from minicode.language.text import Text, perplexity
from minicode.runtime.runs import TrainConfig
from minicode.sample import main as sample
from minicode.train_fsm import main as train_fsm
from minicode.train_text import main as train_text

HUGE = "1" + 30 * "0"
DIGITS = 5000 * "9"  # more than Python turns into an int


# -- numbers


def numbers_of(*kinds):
    """(flag, value) for every flag of a number, and what none of them takes."""
    for kind in kinds:
        for field in dataclasses.fields(kind):
            if field.metadata["flag"] is not True or field.type not in (int, float):
                continue
            values = ["nan", "inf", "-inf", "1e999", "-1"]
            values += [HUGE, DIGITS] if field.type is int else ["1e39"]
            for value in values:
                yield field.name, f"--{field.name.replace('_', '-')}={value}"


@pytest.mark.parametrize(
    "command, kinds, more",
    [(train_fsm, [FSM, TrainConfig], TINY), (train_text, [Text], [])],  # whose others are the same
)
def test_every_number_of_a_training_command(command, kinds, more, tmp_path, capsys):
    folder = tmp_path / "run"
    for name, flag in numbers_of(*kinds):
        line = refusal(command, "--out", folder, *more, flag, capsys=capsys)
        assert name in line or flag.partition("=")[0] in line
    assert not folder.exists()


@pytest.mark.parametrize(
    "command, names",
    [
        (sample, ["num-samples", "max-new-tokens", "top-k", "temperature", "seed", "budget"]),
        (interpret, ["precision", "recall", "budget"]),
    ],
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", HUGE, "1e999", DIGITS])
def test_every_number_of_sample_and_interpret(command, names, value, tiny_run, capsys):
    for name in names:
        if name in ("temperature", "budget", "precision", "recall") and value == HUGE:
            continue  # a number like another
        line = refusal(command, "--run", tiny_run, f"--{name}={value}", capsys=capsys)
        assert name in line.replace("_", "-")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", DIGITS])
def test_every_number_of_ablate(value, tmp_path, capsys):
    out = ["--out", tmp_path, "--only", "the default"]
    for name in ("seeds", "steps"):
        line = refusal(ablate, *out, f"--{name}={value}", capsys=capsys)
        assert name in line
    assert "seeds must be below 1001" in refusal(ablate, f"--seeds={HUGE}", capsys=capsys)
    assert "steps must be below" in refusal(ablate, *out, f"--steps={HUGE}", capsys=capsys)


def test_bench_takes_no_number(capsys):
    assert "device" in refusal(bench, "--device", "nan", capsys=capsys)


NUMBERS = (math.nan, math.inf, -math.inf, -1, 1.5, 2**70)


@pytest.mark.parametrize("value", NUMBERS)
def test_every_number_of_the_library(value):
    x = torch.randn(6, 2)
    model = make_model("mlp")
    tokens = torch.randint(5, (2, 6))
    net = nn.Sequential(nn.Linear(2, 2))

    def made(**changes):
        return Codebook(**{"n_codes": 4, "dim": 2, **changes})

    calls = dict.fromkeys(("n_codes", "dim", "k", "groups"), made)
    calls |= {field.name: GPTConfig for field in dataclasses.fields(GPTConfig)}
    del calls["codebooks"], calls["selection"], calls["similarity"], calls["layer_norm"]
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=name):
            call(**{name: value})
    with pytest.raises((TypeError, ValueError), match="k must be"):
        topk_codes(x, x, k=value)
    for name in ("n_codes", "k", "groups", "skip"):
        with pytest.raises((TypeError, ValueError), match=name):
            attach(net, {"mlp": "0"}, **{name: value})
    with pytest.raises(ValueError, match="layers"):
        attach(net, {"mlp": "0"}, layers=[value])
    for name in ("max_new_tokens", "top_k"):
        with pytest.raises((TypeError, ValueError), match=name):
            model.generate(tokens, **{"max_new_tokens": 2, name: value})
    if value not in (1.5, 2**70):
        with pytest.raises(ValueError, match="temperature"):
            model.generate(tokens, 2, temperature=value)
    for edit in (force, block):
        with pytest.raises(ValueError, match="ids must be|its codes are"):
            edit(model, {"mlp.0": [[value]]}).__enter__()
        if value != -1:  # the last
            with pytest.raises((TypeError, ValueError), match="position"):
                edit(model, "mlp.0.3", position=value).__enter__()
        with pytest.raises(ValueError, match="not a code|no code|write mlp|no codebook"):
            edit(model, [f"mlp.0.{value}"]).__enter__()
    with pytest.raises(ValueError, match="is not a code"):
        force(model, [value]).__enter__()


@pytest.mark.parametrize("similarity", ["l2", None, math.nan])
def test_similarity_and_selection_are_refused_by_name(similarity):
    with pytest.raises(ValueError, match="similarity must be one of cosine, distance, dot"):
        Codebook(4, 2, similarity=similarity)
    with pytest.raises(ValueError, match="selection must be one of"):
        Codebook(4, 2, selection=similarity)


def test_perplexity_of_a_loss_that_no_float_holds():
    assert perplexity(1.5) == math.exp(1.5)
    assert 1e307 < perplexity(1e5) < math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize("lr", ["50", "1e30"])
def test_a_learning_rate_far_too_high_is_a_run_or_one_line(lr, tmp_path, capsys):
    size = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 16 --n-codes-head 8 --k 2"
    flags = f"{size} --steps 4 --batch-size 2 --vocab 300 --device cpu --lr {lr}".split()
    try:
        assert train_text(["--out", str(tmp_path / "run"), *flags]) == 0
        printed = capsys.readouterr().out
        assert all(len(line) < 120 for line in printed.splitlines() if "perplexity" in line)
        assert load_run(tmp_path / "run").summary["perplexity"] > 1e300
    except SystemExit as error:
        assert error.code == 1 and lr != "50"
        assert "try a lower --lr" in capsys.readouterr().err.strip().splitlines()[-1]


# -- tensors


@pytest.mark.parametrize("shape", [(2,), (1, 2), (0, 2), (0, 3, 2), (3, 0, 2), (2, 3, 5, 2)])
@pytest.mark.parametrize("n_codes, k", [(1, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize("how", [{}, {"relative": True}, {"layer_norm": True}])
def test_a_pass_of_any_shape(shape, n_codes, k, how):
    x = torch.randn(shape, requires_grad=True)
    book = Codebook(n_codes, 2, k, **how)
    net = nn.Sequential(book)
    optimizer = torch.optim.AdamW(book.parameters())
    with record(net) as codes:
        out = net(x)
    assert out.shape == x.shape
    assert codes["0"].shape == (*shape[:-1], 1, k)
    assert book.search(x.detach().unsqueeze(-2)).shape == codes["0"].shape
    (out.sum() + book.autoencoding + book.commitment).backward()
    assert book.codes.grad.isfinite().all()
    assert book.autoencoding.isfinite()
    assert book.usage.sum() == k * x.numel() / 2
    with force(net, "0.0"), record(net) as codes:
        net(x)
    assert (codes["0"] == 0).any(-1).all()
    if k < n_codes:
        with block(net, "0.0"), record(net) as codes:
            net(x)
        assert not (codes["0"] == 0).any()
    book.revive(optimizer)
    net(torch.zeros(0, 2))
    book.revive(optimizer)  # after an empty batch, from the one before
    assert book.codes.isfinite().all()
    if x.numel() / 2 < n_codes:
        with pytest.raises(ValueError, match=f"{n_codes} codes need as many inputs"):
            book.start(x)
    else:
        book.start(x)
        assert book.codes.isfinite().all()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20, 1e37])
def test_codes_come_from_numbers(value, k):
    x = torch.randn(50, 2)
    x[7] = value
    book = Codebook(20, 2, k)
    before = book.codes.clone()
    optimizer = torch.optim.AdamW(book.parameters())
    with pytest.raises(ValueError, match="numbers below 1e10"):
        book.start(x)
    book(x)
    with pytest.raises(ValueError, match="numbers below 1e10"):
        book.revive(optimizer)
    assert torch.equal(book.codes, before)
    assert book.search(x.unsqueeze(1)).max() < 20


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e9])
@pytest.mark.parametrize("k", [1, 3])
def test_codes_of_any_size(size, k):
    x = size * torch.randn(200, 2)
    book = Codebook(40, 2, k)
    book.start(x)
    assert book.codes.isfinite().all()
    assert (book(x) - x).abs().max() <= 5 * size
    with torch.no_grad():
        book.codes[:, 3:] = 1e15
        book.usage.zero_()
    book(x)
    book.revive(torch.optim.AdamW(book.parameters()))
    assert book.codes.abs().max() <= 10 * size


def test_what_is_no_float_is_refused_by_name():
    for x in (torch.ones(5, 2, dtype=torch.int64), torch.ones(5, 2).bool(), torch.ones(5, 2) * 1j):
        with pytest.raises(TypeError, match="a codebook's input must be a tensor of float32"):
            Codebook(4, 2)(x)
        with pytest.raises(TypeError, match="a codebook's input must be a tensor of float32"):
            Codebook(4, 2).start(x)


def test_searches_at_the_edge():
    x = torch.randn(6, 2)
    scores, ids = topk_codes(x[:0], x, 6)
    assert scores.shape == ids.shape == (0, 6)
    assert topk_codes(x, x, 6)[1].sort(-1).values.tolist() == 6 * [list(range(6))]
    with pytest.raises(ValueError, match=r"x must be \(..., 0, 2\)"):
        topk_codes(torch.zeros(3, 0, 2), torch.zeros(0, 4, 2))
    for selection in ("nearest", "pursuit"):
        closed = torch.ones(6, 6, dtype=torch.bool)
        closed[:, :2] = False
        assert (topk_codes(x, x, 2, selection=selection, blocked=closed)[1] < 2).all()
        assert (topk_codes(x * torch.nan, x, 2, selection=selection, blocked=~closed)[1] > 1).all()
        with pytest.raises(ValueError, match="at most 3 codes can be blocked: 3 must be left"):
            topk_codes(x, x, 3, selection=selection, blocked=closed)


def test_models_at_the_edge():
    model = make_model()
    tokens = torch.randint(5, (40, 6))
    for wrong in (tokens[:, :0], tokens[0], tokens[None]):
        for call in (model, lambda t: model.generate(t, 2), lambda t: start_codebooks(model, t)):
            with pytest.raises(ValueError, match=r"tokens must be \(B, T\), T at least 1"):
                call(wrong)
    assert model(tokens[:0])[0].shape == (0, 6, 5)
    assert model.generate(tokens[:0], 2).shape == (0, 8)
    assert model(tokens[:1, :1])[0].shape == (1, 1, 5)
    with force(model, "mlp.0.3"), block(model, "attn.0.1"):
        assert model(tokens[:0])[0].shape == (0, 6, 5)
    with pytest.raises(ValueError, match="codes need as many inputs to start from, not 0"):
        start_codebooks(model, tokens[:0])
    with pytest.raises(ValueError, match="Linear holds no codebook: there is nothing to start"):
        start_codebooks(nn.Linear(2, 2), torch.randn(5, 2))
    assert all(book.enabled for book in codebooks(model).values())


def test_a_batch_that_all_passes_through_adds_nothing_to_the_loss():
    net = nn.Sequential(nn.Linear(4, 4))
    attach(net, {"mlp": "0"}, n_codes=8, k=2, groups=1, skip=1).train()
    out = net(torch.randn(3, 1, 4))
    book = codebooks(net)["mlp.0"]
    (out.sum() + book.autoencoding + book.commitment).backward()
    assert book.autoencoding == book.commitment == 0
    use_codebooks(net, False)
    net(torch.randn(3, 2, 4))
    assert book.autoencoding == 0
