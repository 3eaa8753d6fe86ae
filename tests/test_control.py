"""Interventions: a no-op is one to the last bit, and every other one does exactly what it says."""

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokens

from minicode import Codebook, block, force, record
from minicode.codebook import codebooks, use_codebooks
from minicode.control import GENERATED
from minicode.notation import Code, codes_of


def run(model, tokens):
    """Logits, and the outputs of all codebooks."""
    outputs = {}
    hooks = [
        codebook.register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update({name: output})
        )
        for name, codebook in codebooks(model).items()
    ]
    logits = model(tokens)[0]
    for hook in hooks:
        hook.remove()
    return logits, outputs


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_forcing_the_active_codes_changes_nothing_to_the_last_bit(k, train_mode, fsm):
    model, tokens = make_model(k=k).train(train_mode), make_tokens(fsm)
    with record(model) as codes:
        before, _ = run(model, tokens)
    with force(model, {name: ids[:, 4] for name, ids in codes.items()}, position=4):
        after, _ = run(model, tokens)
    assert torch.equal(before, after)


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("name, text", [("mlp.1", "mlp.1.{}@4"), ("head.1", "head.1.1.{}@4")])
def test_forcing_another_changes_the_output_by_the_difference_of_the_codes(
    name, text, train_mode, fsm
):
    model, tokens = make_model("head,mlp", k=1).train(train_mode), make_tokens(fsm)
    group, codebook = (1 if name == "head.1" else 0), codebooks(model)[name]
    with record(model) as codes:
        _, before = run(model, tokens)
    old = codes[name][:, 4, group, 0]  # (B,)
    new = (int(old.max()) + 1) % codebook.n_codes
    with force(model, text.format(new)), record(model) as codes:
        _, after = run(model, tokens)
    assert (codes[name][:, 4, group, 0] == new).all()
    wanted = before[name].clone().unflatten(-1, (codebook.groups, -1))
    wanted[:, 4, group] += codebook.codes[group, new] - codebook.codes[group, old]
    torch.testing.assert_close(after[name], wanted.flatten(-2))
    untouched = [p for p in range(8) if p != 4]
    assert torch.equal(after[name][:, untouched], before[name][:, untouched])
    exact = after[name].unflatten(-1, (codebook.groups, -1))[:, 4, group]
    assert torch.equal(exact, codebook.codes[group, new].expand_as(exact))


def test_a_forced_code_takes_the_place_of_the_last(fsm):
    model, tokens = make_model("mlp", k=3), make_tokens(fsm, n=1)
    with record(model) as codes:
        model(tokens)
    best, second, third = codes["mlp.0"][0, 5, 0].tolist()
    spare, other = [c for c in range(32) if c not in (best, second, third)][:2]

    def chosen(*forced):
        with force(model, [f"mlp.0.{c}@5" for c in forced]), record(model) as codes:
            model(tokens)
        return codes["mlp.0"][0, 5, 0].tolist()

    assert chosen(spare) == [best, second, spare]
    assert chosen(spare, other) == [best, other, spare]
    assert chosen(third) == chosen(second, third) == [best, second, third]
    # The last is forced itself: the one before it yields. The same where two blocks force them.
    assert chosen(spare, third) == [best, spare, third]
    with force(model, f"mlp.0.{third}@5"):
        assert chosen(spare) == [best, spare, third]


@pytest.mark.parametrize("selection", ["pursuit", "nearest"])
def test_blocked_codes_are_as_if_they_were_not_there(selection, fsm):
    model, tokens = make_model("head,mlp", k=2, selection=selection), make_tokens(fsm)
    codebook = codebooks(model)["mlp.0"]
    inputs = []
    hook = codebook.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with record(model) as codes:
        model(tokens)
    hook.remove()
    free = codes["mlp.0"]
    first = free[0, 3, 0, 0].item()  # the strongest: those after it are chosen anew
    second = free[1, 2, 0, 1].item()
    without = [c for c in range(32) if c not in (first, second)]
    smaller = Codebook(30, 16, k=2, similarity="distance", selection=selection)
    smaller.codes.data = codebook.codes.data[:, without]
    wanted = torch.tensor(without)[smaller.search(inputs[0].unsqueeze(2))]
    with block(model, [f"mlp.0.{first}", f"mlp.0.{second}"]), record(model) as codes:
        model(tokens)
    assert torch.equal(codes["mlp.0"], wanted)
    assert not torch.equal(wanted, free)
    with block(model, f"mlp.0.{first}@3"), record(model) as codes:
        model(tokens)
    hit = (free == first).any(-1, keepdim=True) & (torch.arange(8) == 3).view(1, 8, 1, 1)
    assert not (codes["mlp.0"][:, 3] == first).any()
    assert torch.equal(codes["mlp.0"].masked_fill(hit, 0), free.masked_fill(hit, 0))


def test_blocking_what_is_not_chosen_changes_nothing_to_the_last_bit(fsm):
    model, tokens = make_model("mlp", k=2), make_tokens(fsm, n=1)
    with record(model) as codes:
        before = model(tokens)[0]
    idle = [c for c in range(32) if not (codes["mlp.0"] == c).any()]
    with block(model, [f"mlp.0.{c}" for c in idle]):
        assert torch.equal(model(tokens)[0], before)


def test_blocking_in_one_group_leaves_the_others_as_they_are(fsm):
    model, tokens = make_model("head", k=2), make_tokens(fsm)
    with record(model) as free:
        model(tokens)
    first = free["head.0"][0, 5, 1, 0].item()
    with block(model, f"head.0.1.{first}"), record(model) as codes:
        model(tokens)
    assert torch.equal(codes["head.0"][:, :, 0], free["head.0"][:, :, 0])
    assert not (codes["head.0"][:, :, 1] == first).any()


def test_all_but_k_codes_blocked(fsm):
    model = make_model("mlp", k=2)
    with block(model, [f"mlp.0.{c}" for c in range(30)]), record(model) as codes:
        model(make_tokens(fsm))
    assert (codes["mlp.0"].sort(-1).values == torch.tensor([30, 31])).all()


def test_positions_while_generating(fsm):
    model = make_model("mlp", k=1)
    prompt = make_tokens(fsm, n=2, length=4)
    with force(model, ["mlp.1.7@-1", "mlp.1.9@6"]), record(model) as codes:
        model.generate(prompt, 6, generator=torch.Generator().manual_seed(0))
    ids = codes["mlp.1"][..., 0, 0]  # (B, T)
    assert (ids[:, 3] == 7).all() and (ids[:, 6] == 9).all()
    others = [0, 1, 2, 4, 5, 7, 8]
    assert not (ids[:, others] == 7).any()
    with force(model, "mlp.1.5", position=GENERATED), record(model) as codes:
        model.generate(prompt, 6, generator=torch.Generator().manual_seed(0))
    ids = codes["mlp.1"][..., 0, 0]
    assert (ids[:, 3:] == 5).all() and not (ids[:, :3] == 5).any()


def test_cached_equals_uncached_under_control(fsm):
    model = make_model("head,mlp", k=2)
    tokens = make_tokens(fsm, n=8, length=3)
    with force(model, ["mlp.0.3", "head.1.0.2@5"]), block(model, "mlp.1.4"):
        cached = model.generate(tokens, 9, 0)
        for _ in range(9):
            new = model(tokens)[0][:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, new), dim=1)
    assert torch.equal(cached, tokens)


def test_leaving_a_block_restores_the_model(fsm):
    model, tokens = make_model(), make_tokens(fsm)
    before = model(tokens)[0]
    with pytest.raises(RuntimeError), force(model, "mlp.0.3"), block(model, "mlp.1.2"):
        raise RuntimeError
    with pytest.raises(ValueError), force(model, ["mlp.0.3", "mlp.0.99"]):
        pass
    assert torch.equal(model(tokens)[0], before)
    assert all(codebook.control is None for codebook in codebooks(model).values())


def test_positions_are_integers_of_any_kind(fsm):
    model, tokens = make_model("mlp", k=1), make_tokens(fsm)
    for position in (2, np.int64(2), torch.tensor(2), -6):
        with force(model, "mlp.0.7", position), record(model) as codes:
            model(tokens)
        assert (codes["mlp.0"][:, 2] == 7).all() and not (codes["mlp.0"][:, [0, 1, 3]] == 7).all()
    with force(model, "mlp.0.7", np.int64(0)), record(model) as codes:
        model(tokens)
    assert (codes["mlp.0"][:, 0] == 7).all() and not (codes["mlp.0"][:, 1:] == 7).all()
    for position in (slice(1, 2), 1.5, "all"):
        with pytest.raises(TypeError), force(model, "mlp.0.7", position):
            pass


def test_codes_for_each_sequence(fsm):
    model, tokens = make_model("head", k=1), make_tokens(fsm)
    ids = torch.tensor([[[1], [2]], [[3], [4]], [[5], [6]]])  # (B, G, k)
    with force(model, {"head.0": ids}, position=2), record(model) as codes:
        model(tokens)
    assert torch.equal(codes["head.0"][:, 2], ids)


def test_record_joins_cached_passes_and_begins_anew_without(fsm):
    model, prompt = make_model("head,mlp"), make_tokens(fsm, n=2, length=3)
    with record(model) as codes:
        tokens = model.generate(prompt, 5, 0)
        cached = {name: ids.clone() for name, ids in codes.items()}
        model(tokens[:, :-1])
    assert cached["mlp.0"].shape == (2, 7, 1, 2)
    assert all(torch.equal(codes[name], cached[name]) for name in codes)


def test_groups_of_an_mlp(fsm):
    model = make_model("head,mlp", k=3, k_head=1, k_mlp=2, groups_mlp=4)
    with record(model) as codes:
        model(make_tokens(fsm))
    assert codes["head.0"].shape == (3, 8, 2, 1)
    assert codes["mlp.1"].shape == (3, 8, 4, 2)
    assert str(Code.parse("mlp.1.3.31@2", model)) == "mlp.1.3.31@2"
    with force(model, "mlp.1.3.31@2"), record(model) as forced:
        model(make_tokens(fsm))
    assert (forced["mlp.1"][:, 2, 3] == 31).any(-1).all()
    assert torch.equal(forced["mlp.1"][:, 2, :3], codes["mlp.1"][:, 2, :3])
    for text, words in (
        ("mlp.1.31", "write mlp.1.GROUP.CODE, for it has 4 groups"),
        ("mlp.1.4.31", "mlp.1 has no group 4; its groups are 0 to 3"),
    ):
        with pytest.raises(ValueError, match=words):
            Code.parse(text, model)
    names = [str(code) for code in codes_of("mlp.1", codebooks(model)["mlp.1"])]
    assert len(names) == 4 * 32
    assert names[33] == "mlp.1.1.1"


def test_notation():
    model = make_model()
    for text in ("mlp.1.27", "head.0.1.7", "mlp_mid.0.3@4", "block.1.0@-1"):
        assert str(Code.parse(text, model)) == text


@pytest.mark.parametrize(
    "code, words",
    [
        ("mlp.1", r"'mlp.1' is not a code: write mlp.LAYER.CODE .* as in mlp.1.527@4"),
        ("mlp.1.-1", "is not a code"),
        ("mlp.1.5@x", "is not a code"),
        ("mlp.1.5@99999999999999999999", "is not a code"),
        ("mpl.1.5", "has no codebook at mpl.1; it has them at head.0, mlp.0"),
        ("mlp.7.5", "has no codebook at mlp.7; it has them at head.0, mlp.0"),
        ("attn.0.5", "has no codebook at attn.0; it has them at"),
        ("mlp.1.32", "mlp.1 has no code 32; its codes are 0 to 31"),
        ("head.0.2.1", "head.0 has no head 2; its heads are 0 to 1"),
        ("head.0.5", "write head.0.HEAD.CODE, for it has 2 heads"),
        ("mlp.0.1.5", "write mlp.0.CODE"),
        ({"mlp.1": [[-1]]}, "its codes are 0 to 31, not -1 to -1"),
        ({"mlp.1": [[1.0]]}, "ids must be whole numbers, at least one for each group"),
        ({"mlp.1": [[]]}, "ids must be whole numbers"),
        ({"head.0": [[1]]}, r"ids must be \(2, k\) or \(B, 2, k\)"),
        ({"mpl.1": [[1]]}, "no codebook at mpl.1"),
    ],
)
def test_codes_that_can_not_be_forced(code, words):
    with pytest.raises(ValueError, match=words), force(make_model("head,mlp"), code):
        pass


def test_contradictions(fsm):
    model, tokens = make_model("mlp", k=2), make_tokens(fsm, length=4)
    for forced, blocked in (
        ("mlp.0.3@2", "mlp.0.3"),
        ("mlp.0.3@-1", "mlp.0.3@3"),
        ("mlp.0.3", "mlp.0.3@0"),
    ):
        both = pytest.raises(ValueError, match="is both forced and blocked")
        with both, force(model, forced), block(model, blocked):
            model(tokens)
    for codes in (["mlp.0.1", "mlp.0.2", "mlp.0.3"], ["mlp.0.1", "mlp.0.2@-1", "mlp.0.3@3"]):
        too_many = "at most 2 codes can be forced at a site"
        with pytest.raises(ValueError, match=too_many), force(model, codes):
            model(tokens)
    for codes in (["mlp.0.1", "mlp.0.1@2", "mlp.0.3"], ["mlp.0.1@1", "mlp.0.2@1", "mlp.0.3@2"]):
        with force(model, codes):  # they never meet, or are the same
            model(tokens)
    with force(model, "mlp.0.3@2"), block(model, "mlp.0.3@1"):
        model(tokens)
    three = {"mlp.0": torch.zeros(3, 1, 1, dtype=torch.long)}
    unlike = pytest.raises(ValueError, match="codes for 3 sequences, but the input has 2")
    with unlike, force(model, three):
        model(make_tokens(fsm, n=2))
    too_many = pytest.raises(ValueError, match="at most 30 codes can be blocked")
    with too_many, block(model, [f"mlp.0.{c}" for c in range(31)]):
        model(tokens)
    use_codebooks(model, False)
    with pytest.raises(ValueError, match="switched off"), force(model, "mlp.0.3"):
        pass
    nowhere = pytest.raises(ValueError, match="it has them at no site at all")
    with nowhere, force(make_model("none"), "mlp.0.3"):
        pass


def test_an_intervention_that_never_acted_is_an_error(fsm):
    model = make_model("mlp")
    tokens = make_tokens(fsm, length=8)
    never = "mlp.0.3@9 had no effect: no input has a position 9"
    with pytest.raises(ValueError, match=never), force(model, "mlp.0.3@9"):
        model(tokens)
    before = "mlp.0.3@-9: position -9 is before the start of the prompt"
    with pytest.raises(ValueError, match=before), force(model, "mlp.0.3@-9"):
        model(tokens)
