"""The machine, and its measures against brute force."""

import itertools

import numpy as np
import pytest
import torch
from conftest import make_model

from minicode import FSM, GPT, GPTConfig
from minicode.study.machine import (
    copy_codes,
    first_transition_accuracy,
    jsd,
    kl,
    next_state_probabilities,
    pairs,
    steer,
    transition_accuracy,
)


def test_sequences_follow_the_machine(fsm):
    tokens = fsm.sequences(np.random.default_rng(0), 200, 12)
    assert (
        tokens.shape == (200, 12) and tokens.dtype == np.int64 and (tokens[:, 0] == fsm.bos).all()
    )
    states = fsm.decode(tokens[:, 1:])
    assert states.shape == (200, 5) and states.min() >= 0 and fsm.allowed(states).all()
    assert set(states[:, 0]) == set(range(16))
    np.testing.assert_allclose(fsm.transition_matrix.sum(1), 1)
    assert ((fsm.transition_matrix > 0).sum(1) == 3).all()


def test_default_is_the_papers_machine():
    fsm = FSM()
    assert fsm.transition_matrix.shape == (100, 100) and fsm.vocab_size == 11
    assert fsm.encode(38).tolist() == [3, 8] and fsm.encode([7]).tolist() == [[0, 7]]
    assert FSM().to_json() == fsm.to_json() != FSM(seed=1).to_json()


@pytest.mark.parametrize("n_states, base", [(16, 4), (10, 10), (9, 2), (100, 10), (30, 3)])
def test_decode_undoes_encode(n_states, base):
    fsm = FSM(n_states, 2, base)
    states = np.arange(n_states).reshape(1, -1)
    assert (fsm.decode(fsm.encode(states).reshape(1, -1)) == states).all()


def test_decode_marks_what_is_no_state():
    fsm = FSM(90, 2, 10)
    assert fsm.decode([3, 8, 9, 0, 10, 1, 5]).tolist() == [38, -1, -1]
    assert fsm.allowed(np.array([38, -1, int(fsm.successors[0, 0])])).tolist() == [False, False]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_loss_floor_against_enumeration_of_all_sequences(length):
    """A machine of 5 states in base 3, whose sequences of up to 5 tokens can all be listed with their probabilities."""
    fsm = FSM(5, 2, 3)
    n = -(-length // fsm.digits)
    of_prefix = {}
    for states in itertools.product(range(5), repeat=n):
        p = 1 / 5
        for before, after in zip(states, states[1:]):
            p *= fsm.transition_matrix[before, after]
        digits = tuple(fsm.encode(np.array(states)).reshape(-1)[:length])
        of_prefix[digits] = of_prefix.get(digits, 0) + p
    entropy = -sum(p * np.log(p) for p in of_prefix.values() if p > 0)
    assert fsm.loss_floor(length) == pytest.approx(entropy / length, rel=1e-12)


class Perfect(torch.nn.Module):
    """Stands in for a GPT that knows the machine."""

    def __init__(self, fsm, block_size=12):
        super().__init__()
        self.fsm, self.config, self.device = (
            fsm,
            GPTConfig(block_size=block_size),
            torch.device("cpu"),
        )

    def forward(self, tokens):
        fsm, (n, length) = self.fsm, tokens.shape
        p = torch.full((n, length, fsm.vocab_size), 1e-9)
        digits = fsm.encode(np.arange(fsm.n_states))
        for i in range(n):
            for t in range(length):
                whole, part = divmod(t, fsm.digits)
                end = 1 + whole * fsm.digits
                before = fsm.decode(tokens[i, end - fsm.digits : end].numpy())[0] if whole else None
                row = (
                    fsm.transition_matrix[before]
                    if whole
                    else np.full(fsm.n_states, 1 / fsm.n_states)
                )
                fits = (digits[:, :part] == tokens[i, end : end + part].numpy()).all(1)
                for state in np.flatnonzero(fits):
                    p[i, t, digits[state, part]] += row[state]
        return p.log(), None


def test_next_state_probabilities_of_a_perfect_model(fsm):
    np.testing.assert_allclose(
        next_state_probabilities(fsm, Perfect(fsm)), fsm.transition_matrix, atol=1e-6
    )
    assert first_transition_accuracy(fsm, Perfect(fsm)) == 1.0


def test_three_digits_as_well():
    fsm = FSM(27, 4, 3)
    np.testing.assert_allclose(
        next_state_probabilities(fsm, Perfect(fsm)), fsm.transition_matrix, atol=1e-6
    )


def test_first_transition_accuracy_against_brute_force(fsm):
    model = make_model("head,mlp")
    overlap = 0
    for s in range(16):
        probability = np.zeros(16)
        for after in range(16):
            tokens = torch.tensor([[fsm.bos, *fsm.encode(s), *fsm.encode(after)]])
            with torch.no_grad():
                log_p = model(tokens)[0][0].log_softmax(-1)
            probability[after] = sum(log_p[2 + i, tokens[0, 3 + i]].item() for i in range(2))
        overlap += len(set(np.argsort(-probability)[:3]) & set(fsm.successors[s])) / 3
    assert first_transition_accuracy(fsm, model) == pytest.approx(overlap / 16)


def test_transition_accuracy_counts_the_allowed(fsm):
    class Script:
        config, device = GPTConfig(block_size=8), torch.device("cpu")

        def generate(self, start, n, generator):
            assert start.shape == (100, 1) and (start == fsm.bos).all() and n == 8
            good = [0, fsm.successors[0, 0], fsm.successors[fsm.successors[0, 0], 1]]
            bad = next(s for s in range(16) if s not in fsm.successors[good[-1]])
            row = torch.tensor([fsm.bos, *fsm.encode([*good, bad]).reshape(-1)])
            return row.repeat(100, 1)

    assert transition_accuracy(fsm, Script()) == pytest.approx(2 / 3)


def test_control_of_a_model_that_is_its_codes():
    """One layer whose `block` codebook is the only way from input to output: forcing b's codes is being in b."""
    torch.manual_seed(0)
    fsm = FSM(9, 2, 3)
    model = GPT(
        GPTConfig(
            vocab_size=4,
            block_size=8,
            n_layer=1,
            n_head=1,
            n_embd=8,
            codebooks="block",
            n_codes=400,
        )
    ).eval()
    runs = fsm.runs(range(9))
    every = torch.cat([torch.cat((runs, torch.full((9, 1), digit)), dim=1) for digit in range(4)])
    codebook, inputs = model.codebooks()["block.0"], []
    hook = codebook.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(every)
        hook.remove()
        with torch.no_grad():
            codebook.codes[0, : len(inputs[0])] = inputs[0]
    free = next_state_probabilities(fsm, model)
    expected = np.mean(
        [
            (free[b] * (fsm.transition_matrix[b] > 0)).sum()
            for b in range(9)
            for a in range(9)
            if a != b
        ]
    )
    (a, b), generator = pairs(fsm), torch.Generator().manual_seed(0)

    def control(sites):
        rows = [
            control(fsm, model, fsm.runs(a), b, copy_codes(model, sites), generator)
            for _ in range(40)
        ]
        return {name: np.mean([row[name] for row in rows]) for name in rows[0]}

    measured = control(["block.0"])["control"]
    assert measured == pytest.approx(expected, abs=0.02)
    others = np.mean(
        [
            (free[a] * (fsm.transition_matrix[b] > 0)).sum()
            for b in range(9)
            for a in range(9)
            if a != b
        ]
    )
    assert control([])["control"] == pytest.approx(others, abs=0.02)
    # Its last digit read, a run is what its code is: the distributions of the next digit agree, too.
    for sites, expected in (["block.0"], 0.0), ([], None):
        _, logits = steer(fsm, model, fsm.runs(a), b, copy_codes(model, sites), generator)
        (p, q), _ = (pair.softmax(-1) for pair in map(torch.stack, logits))
        assert (
            jsd(p, q).mean().item() == pytest.approx(expected, abs=1e-6)
            if sites
            else jsd(p, q).mean() > 0.001
        )


def test_divergences_against_their_definitions():
    p, q = torch.tensor([0.5, 0.25, 0.25, 0.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert kl(p, q).item() == pytest.approx(
        0.5 * np.log(5) + 0.25 * np.log(1.25) + 0.25 * np.log(0.25 / 0.3)
    )
    middle = [0.3, 0.225, 0.275, 0.2]
    expected = sum(x * np.log(x / m) for r in (p, q) for x, m in zip(r.tolist(), middle) if x) / 2
    assert jsd(p, q).item() == pytest.approx(expected) == jsd(q, p).item()
    assert jsd(p, p).item() == 0 and jsd(
        torch.tensor([1.0, 0]), torch.tensor([0, 1.0])
    ).item() == pytest.approx(np.log(2))


def test_labels_of_positions(fsm):
    tokens, kinds = fsm.labelled(np.random.default_rng(0), 3, 8)
    assert (tokens == fsm.held_out(np.random.default_rng(0), 3, 8)).all()
    for row, label in itertools.product(range(3), kinds):
        labels, names = kinds[label]
        text = "".join(
            "0123"[t] for t in tokens[row, 1:]
        )  # 7 digits: three states, and the first of a fourth
        expected = {"state": {2: text[:2], 4: text[2:4], 6: text[4:6]},
                    "trigram": {i: f"{text[i - 3 : i - 1]} {text[i - 1]}" for i in (3, 5, 7)},
                    "bigram": {i: text[i - 2 : i] for i in range(2, 8)},
                    "digit": {i: text[i - 1] for i in range(1, 8)}}[label]  # fmt: skip
        assert {i: names[n] for i, n in enumerate(labels[row]) if n >= 0} == expected


def test_prefixes_are_all_states_and_all_valid_first_digits(fsm):
    states, trigrams = fsm.prefixes()
    assert states.tolist() == fsm.runs(range(16)).tolist()
    valid = {
        (*fsm.encode(s), fsm.encode(after)[0]) for s in range(16) for after in fsm.successors[s]
    }
    assert len(trigrams) == len(valid) and set(map(tuple, trigrams[:, 1:].tolist())) == valid


def test_prompts(fsm):
    assert fsm.prompt("").tolist() == [[4]]
    assert fsm.prompt("31 02").tolist() == [[4, 3, 1, 0, 2]] == fsm.prompt("3102").tolist()
    for text, words in (
        ("3x", "write states as digits"),
        ("34", "write states as digits"),
        ("310", "not a list of states"),
    ):
        with pytest.raises(ValueError, match=words):
            fsm.prompt(text)
    with pytest.raises(ValueError, match="they are 00 to 89"):
        FSM(90).prompt("95")


def test_show(fsm):
    after = int(fsm.successors[7, 0])
    never = next(s for s in range(16) if s not in fsm.successors[after])
    tokens = np.array([4, *fsm.encode([7, after, never]).reshape(-1), 4, 1])
    assert fsm.show(tokens) == f"13 -> {fsm.name(after)} -x {fsm.name(never)} -x ??"
    assert (
        fsm.show(tokens[:4]) == "13 .. " + fsm.name(after)[0]
        and fsm.show(np.array([4, 2])) == " .. 2"
    )


def test_saved_machine_is_checked(fsm):
    data = fsm.to_json()
    assert (FSM.from_json(data).successors == fsm.successors).all()
    for change in ({"successors": data["successors"][1:]}, {"n_edges": 2}, {"successors": [[0, 0, 1]] * 16},
                   {"successors": [[0, 1, 16]] * 16}, {"successors": [[0.5, 1, 2]] * 16}):  # fmt: skip
        with pytest.raises(ValueError):
            FSM.from_json({**data, **change})


@pytest.mark.parametrize(
    "settings", [dict(n_states=1), dict(base=1), dict(base=37), dict(n_edges=0), dict(n_edges=101)]
)
def test_impossible_machines(settings):
    with pytest.raises(ValueError, match="a machine needs"):
        FSM(**settings)
