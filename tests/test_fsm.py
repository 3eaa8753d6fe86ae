"""The machine, and its measures against brute force."""

import itertools

import numpy as np
import pytest
import torch
from conftest import make_model

from minicode import FSM, GPT, GPTConfig
from minicode.codebook import codebooks
from minicode.study.machine import (
    control,
    copy_codes,
    first_transition_accuracy,
    jsd,
    next_state_probabilities,
    pairs,
    steer,
    transition_accuracy,
)


def test_sequences_follow_the_machine(fsm):
    tokens = fsm.sequences(np.random.default_rng(0), 200, 12)
    assert tokens.shape == (200, 12)
    assert tokens.dtype == np.int64
    assert (tokens[:, 0] == fsm.bos).all()
    states = fsm.decode(tokens[:, 1:])
    assert states.shape == (200, 5)
    assert states.min() >= 0
    assert fsm.allowed(states).all()
    assert set(states[:, 0]) == set(range(16))
    np.testing.assert_allclose(fsm.transition_matrix.sum(1), 1)
    assert ((fsm.transition_matrix > 0).sum(1) == 3).all()


def test_default_is_the_papers_machine():
    fsm = FSM()
    assert fsm.transition_matrix.shape == (100, 100)
    assert fsm.vocab_size == 11
    assert fsm.encode(38).tolist() == [3, 8]
    assert fsm.encode([7]).tolist() == [[0, 7]]
    assert fsm == FSM()
    assert fsm != FSM(seed=1)


@pytest.mark.parametrize("n_states, base", [(16, 4), (10, 10), (9, 2), (100, 10), (30, 3)])
def test_decode_undoes_encode(n_states, base):
    fsm = FSM(n_states, 2, base)
    states = np.arange(n_states).reshape(1, -1)
    assert (fsm.decode(fsm.encode(states).reshape(1, -1)) == states).all()


def test_decode_marks_what_is_no_state():
    fsm = FSM(90, 2, 10)
    assert fsm.decode([3, 8, 9, 0, 10, 1, 5]).tolist() == [38, -1, -1]
    states = np.array([38, -1, int(fsm.successors[0, 0])])
    assert fsm.allowed(states).tolist() == [False, False]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_loss_floor_against_enumeration_of_all_sequences(length):
    """A machine so small that all its sequences can be listed with their probabilities."""
    fsm = FSM(5, 2, 3)
    n = -(-length // fsm.digits)
    of_prefix = {}
    for states in itertools.product(range(5), repeat=n):
        p = 1 / 5
        for before, after in itertools.pairwise(states):
            p *= fsm.transition_matrix[before, after]
        digits = tuple(fsm.encode(np.array(states)).reshape(-1)[:length])
        of_prefix[digits] = of_prefix.get(digits, 0) + p
    entropy = -sum(p * np.log(p) for p in of_prefix.values() if p > 0)
    assert fsm.loss_floor(length) == pytest.approx(entropy / length, rel=1e-12)


class Perfect(torch.nn.Module):
    """Stands in for a GPT that knows the machine."""

    def __init__(self, fsm, block_size=12):
        super().__init__()
        self.fsm = fsm
        self.config = GPTConfig(block_size=block_size)
        self.device = torch.device("cpu")

    def forward(self, tokens):
        n, length = tokens.shape
        p = torch.full((n, length, self.fsm.vocab_size), 1e-9)
        for i, t in itertools.product(range(n), range(length)):
            self.add(p[i, t], tokens[i, : t + 1].numpy())
        return p.log(), None

    def add(self, p, tokens):
        """Adds to p (vocab_size) the probability of each token after a sequence."""
        fsm = self.fsm
        digits = fsm.encode(np.arange(fsm.n_states))
        whole, part = divmod(len(tokens) - 1, fsm.digits)
        end = 1 + whole * fsm.digits
        next_state = np.full(fsm.n_states, 1 / fsm.n_states)
        if whole:
            before = fsm.decode(tokens[end - fsm.digits : end])[0]
            next_state = fsm.transition_matrix[before]
        fits = (digits[:, :part] == tokens[end:]).all(1)
        for state in np.flatnonzero(fits):
            p[digits[state, part]] += next_state[state]


@pytest.mark.parametrize("machine", [FSM(16, 3, 4), FSM(27, 4, 3)], ids=["2 digits", "3 digits"])
def test_next_state_probabilities_of_a_perfect_model(machine):
    model = Perfect(machine)
    p = next_state_probabilities(machine, model)
    np.testing.assert_allclose(p, machine.transition_matrix, atol=1e-6)
    assert first_transition_accuracy(machine, model) == 1.0


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
        best = set(np.argsort(-probability)[:3])
        overlap += len(best & set(fsm.successors[s])) / 3
    assert first_transition_accuracy(fsm, model) == pytest.approx(overlap / 16)


def test_transition_accuracy_counts_the_allowed(fsm):
    class Script:
        config = GPTConfig(block_size=8)
        device = torch.device("cpu")

        def generate(self, start, n, generator):
            assert start.shape == (100, 1)
            assert (start == fsm.bos).all()
            assert n == 8
            second = fsm.successors[0, 0]
            third = fsm.successors[second, 1]
            bad = next(s for s in range(16) if s not in fsm.successors[third])
            row = torch.tensor([fsm.bos, *fsm.encode([0, second, third, bad]).reshape(-1)])
            return row.repeat(100, 1)

    assert transition_accuracy(fsm, Script()) == pytest.approx(2 / 3)


# -- control


@pytest.fixture
def small():
    """A machine small enough for all its pairs of states, forty times."""
    return FSM(9, 2, 3)


@pytest.fixture
def its_codes(small):
    """A model that is its codes: one layer, whose `block` codebook is the only way to the output.

    There is a code for every input, so that to force the codes of b is to be in b.
    """
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "codebooks": "block", "n_codes": 400}
    model = GPT(GPTConfig(vocab_size=4, block_size=8, **shape)).eval()
    runs = small.runs(range(9))
    every = [torch.cat((runs, torch.full((9, 1), digit)), dim=1) for digit in range(4)]
    codebook = codebooks(model)["block.0"]
    inputs = []
    hook = codebook.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad(), hook:
        model(torch.cat(every))
        values = inputs[0].flatten(0, 1)
        codebook.codes[0, : len(values)] = values
    return model


@pytest.mark.parametrize("sites", [["block.0"], []], ids=["forced", "left alone"])
def test_control_of_a_model_that_is_its_codes(small, its_codes, sites):
    free = next_state_probabilities(small, its_codes)
    follows = small.transition_matrix > 0
    expected = []
    for a, b in itertools.permutations(range(9), 2):
        acts_as = b if sites else a
        expected.append((free[acts_as] * follows[b]).sum())
    a, b = pairs(small)
    intervene = copy_codes(its_codes, sites)
    generator = torch.Generator().manual_seed(0)
    measured = []
    for _ in range(40):
        figures = control(small, its_codes, small.runs(a), b, intervene, generator)
        measured.append(figures["control"])
    assert np.mean(measured) == pytest.approx(np.mean(expected), abs=0.02)


def test_forced_distributions_of_a_model_that_is_its_codes(small, its_codes):
    """Its last digit read, a run is what its code is: so the next digit is as in b's own run."""
    a, b = pairs(small)
    for sites in (["block.0"], []):
        generator = torch.Generator().manual_seed(0)
        intervene = copy_codes(its_codes, sites)
        tokens, logits, _ = steer(small, its_codes, small.runs(a), b, intervene, generator)
        assert tokens.shape == (72, 1 + 2 * small.digits)
        assert logits.shape == (2, small.digits, 72, small.vocab_size)
        steered, own = logits[:, 0].softmax(-1)
        if sites:
            assert jsd(steered, own).mean().item() == pytest.approx(0, abs=1e-6)
        else:
            assert jsd(steered, own).mean() > 0.001


def test_divergence_against_its_definition():
    p = torch.tensor([0.5, 0.25, 0.25, 0.0])
    q = torch.tensor([0.1, 0.2, 0.3, 0.4])
    middle = [0.3, 0.225, 0.275, 0.2]
    expected = 0
    for row in (p, q):
        for x, m in zip(row.tolist(), middle):
            expected += x * np.log(x / m) / 2 if x else 0
    assert jsd(p, q).item() == pytest.approx(expected)
    assert jsd(q, p).item() == jsd(p, q).item()
    assert jsd(p, p).item() == 0
    disjoint = torch.eye(2)
    assert jsd(*disjoint).item() == pytest.approx(np.log(2))


# -- what is known of sequences


def test_labels_of_positions(fsm):
    tokens, kinds = fsm.labelled(np.random.default_rng(0), 3, 8)
    assert (tokens == fsm.held_out(np.random.default_rng(0), 3, 8)).all()
    for row in range(3):
        # 7 digits: three states, and the first of a fourth
        text = "".join("0123"[token] for token in tokens[row, 1:])
        expected = {
            "state": {2: text[:2], 4: text[2:4], 6: text[4:6]},
            "trigram": {i: f"{text[i - 3 : i - 1]} {text[i - 1]}" for i in (3, 5, 7)},
            "bigram": {i: text[i - 2 : i] for i in range(2, 8)},
            "digit": {i: text[i - 1] for i in range(1, 8)},
            "digit before": {i: f"{text[i - 2]} at place {2 - i % 2}" for i in range(2, 8)},
        }
        assert kinds.keys() == expected.keys()
        for kind, (labels, names) in kinds.items():
            found = {i: names[label] for i, label in enumerate(labels[row]) if label >= 0}
            assert found == expected[kind]


def test_prefixes_are_all_states_and_all_valid_first_digits(fsm):
    states, trigrams = fsm.prefixes()
    assert states.tolist() == fsm.runs(range(16)).tolist()
    valid = set()
    for s in range(16):
        for after in fsm.successors[s]:
            valid.add((fsm.bos, *fsm.encode(s), fsm.encode(after)[0]))
    assert len(trigrams) == len(valid)
    assert set(map(tuple, trigrams.tolist())) == valid


def test_prompts(fsm):
    assert fsm.prompt("").tolist() == [[4]]
    assert fsm.prompt("31 02").tolist() == [[4, 3, 1, 0, 2]]
    assert fsm.prompt("3102").tolist() == [[4, 3, 1, 0, 2]]
    for text in ("3x", "34", "310"):
        with pytest.raises(ValueError, match="not a list of states: they are 00 to 33"):
            fsm.prompt(text)
    with pytest.raises(ValueError, match="they are 00 to 89"):
        FSM(90).prompt("95")


def test_show(fsm):
    after = int(fsm.successors[7, 0])
    never = next(s for s in range(16) if s not in fsm.successors[after])
    tokens = np.array([4, *fsm.encode([7, after, never]).reshape(-1), 4, 1])
    assert fsm.show(tokens) == f"13 -> {fsm.name(after)} -x {fsm.name(never)} -x ??"
    assert fsm.show(tokens[:4]) == "13 .. " + fsm.name(after)[0]
    assert fsm.show(np.array([4, 2])) == " .. 2"
    assert fsm.show(np.array([4, 1, 3, 4])) == "13 .. BOS"


@pytest.mark.parametrize(
    "n_states, words", [(16, ["BOS", " 1", "3", " 0"]), (4, ["BOS", " 1", " 3", " 0"])]
)
def test_texts_have_a_space_before_each_state(n_states, words):
    assert FSM(n_states, 3, 4).texts(np.array([[4, 1, 3, 0]])) == [words]


# -- machines that are none


def test_saved_machine_is_checked(fsm):
    data = fsm.to_json()
    assert FSM.from_json(data) == fsm
    changes = [
        {"successors": data["successors"][1:]},
        {"successors": [[0, 0, 1]] * 16},
        {"successors": [[0, 1, 16]] * 16},
        {"successors": [[-1, 0, 1]] * 16},
        {"successors": [[0.5, 1, 2]] * 16},
        {"successors": None},
        {"n_edges": 2},
        {"n_states": 0},
        {"base": 4.0},
    ]
    for change in changes:
        with pytest.raises(ValueError):
            FSM.from_json({**data, **change})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"n_states": 1}, "n_states must be at least 2, not 1"),
        ({"n_states": 10_001}, "n_states must be below 10001, not 10001"),
        ({"base": 1}, "base must be at least 2, not 1"),
        ({"base": 37}, "base must be below 37, not 37"),
        ({"n_edges": 0}, "n_edges must be at least 1, not 0"),
        ({"n_edges": 101}, "a machine needs 101 different successors for each of its 100 states"),
        ({"successors": np.zeros((100, 10), int)}, "a machine needs 10 different successors"),
    ],
)
def test_impossible_machines(settings, words):
    with pytest.raises(ValueError, match=words):
        FSM(**settings)
