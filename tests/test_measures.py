"""The measures against brute force, on examples small enough to check on paper."""

import re

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokens

from minicode import Codebook, force, load_run, record, start_codebooks
from minicode.codebook import codebooks
from minicode.model import evaluating
from minicode.study.detectors import (
    Recording,
    agreement,
    agreement_on,
    best_labels,
    best_neurons,
    codes_against_neurons,
    detect,
    forced_distributions,
    matches,
    neurons,
    purity,
    record_codes,
    spread,
)
from minicode.study.machine import (
    add_mean_difference,
    control_study,
    copy_codes,
    interval,
    shift,
    wrong_state,
)


def by_hand(codes):
    """A recording of one codebook of 4 codes: codes (n, T)."""
    codebook = Codebook(4, 1)
    codebook.name = "mlp.0"
    codes = np.array(codes)
    return Recording(codebook, np.zeros_like(codes), codes[..., None])


# -- what a code stands for


def test_precision_recall_and_f1_by_hand():
    recording = by_hand([[0, 0, 0, 1], [1, 1, 2, 0]])
    labels = np.array([[0, 0, 1, 1], [-1, 1, -1, 0]])
    found = detect(recording, labels, ["a", "b"])
    # Code 0 fires 4 times: 3 times on a (of 3), once on b (of 3).
    assert found.precision[0].tolist() == [3 / 4, 1 / 4]
    assert found.recall[0].tolist() == [1, 1 / 3]
    assert found.f1[0, 0] == pytest.approx(6 / 7)
    # Code 1 fires three times: twice on b, once on nothing.
    assert found.precision[1].tolist() == [0, 2 / 3]
    assert found.recall[1].tolist() == [0, 2 / 3]
    assert found.f1[1, 1] == pytest.approx(2 / 3)
    assert found.f1.argmax(0).tolist() == [0, 1]
    assert found.total.tolist() == [3, 3]
    assert recording.count.tolist() == [4, 3, 1, 0]
    best = best_labels(recording, {"letter": (labels, ["a", "b"])})
    assert [row and row[:2] for row in best] == [("letter", "a"), ("letter", "b"), None, None]


def test_a_code_that_fires_once_and_on_its_label_alone_is_a_perfect_detector():
    found = detect(by_hand([[0, 1, 1, 1]]), np.array([[0, -1, -1, -1]]), ["once"])
    assert [table[0].tolist() for table in found[:3]] == [[1], [1], [1]]


def test_best_label_is_that_of_the_highest_f1():
    recording = by_hand([[0, 0, 1, 1]])
    kinds = {
        "rough": (np.array([[0, 0, 0, 0]]), ["all"]),
        "fine": (np.array([[-1, -1, 0, 0]]), ["end"]),
        "none": (np.array([[-1, -1, -1, -1]]), []),
    }
    assert best_labels(recording, {"none": kinds["none"]}) == [None] * 4
    best = best_labels(recording, kinds)
    assert best[0][:2] == ("rough", "all")
    assert best[1] == ("fine", "end", 1, 1, 1)


def test_recording_is_what_record_says(fsm):
    model = make_model("head,mlp", k=2)
    tokens = make_tokens(fsm, n=70)
    recording = record_codes(model, tokens.numpy())
    with torch.no_grad(), record(model) as codes:
        model(tokens)
    stored = recording.codes
    assert stored.dtype == np.int32
    assert stored.shape == (70, 8, 12)
    columns = []
    for site, ids in codes.items():
        for group in range(ids.shape[2]):
            columns += [(site, group)] * 2
    assert recording.columns == columns
    for column, (site, group) in enumerate(columns):
        assert (stored[..., column] == codes[site][:, :, group, column % 2].numpy()).all()
    number = recording.fired[3 * 8 + 5, 1]
    name = recording.names[number]
    assert (name.site, name.group) == ("head.0", 0)
    assert name.id == codes["head.0"][3, 5, 0, 1]
    assert recording.count.sum() == 70 * 8 * 12
    places = spread(recording.where[number], 4)
    assert 1 <= len(places) <= 4
    assert all(number in recording.fired[place] for place in places)


def test_recording_leaves_out_what_is_switched_off(fsm):
    model = make_model("head,mlp", k=2)
    codebooks(model)["mlp.0"].enabled = False
    recording = record_codes(model, make_tokens(fsm).numpy())
    assert {site for site, _ in recording.columns} == {"head.0", "head.1", "mlp.1"}
    assert recording.codes.shape[-1] == len(recording.columns) == 10


def highest_precision(values, labels, label, recall):
    """Of all units, above or below the threshold at which they have the recall."""
    best = 0.0
    for unit in torch.cat((values, -values), dim=1).T:
        there = unit[labels == label]
        reached = [t for t in unit if (there >= t).float().mean() >= recall - 1e-6]
        fires = unit >= max(reached)
        best = max(best, (labels[fires] == label).float().mean().item())
    return best


def test_neurons_against_all_thresholds():
    torch.manual_seed(0)
    values = torch.randn(40, 5).round(decimals=1)
    labels = torch.randint(-1, 3, (40,))
    wanted = [(0, 0.3), (1, 1.0), (2, 0.75), (2, 0.01)]
    found = best_neurons(values, labels, wanted)
    expected = [highest_precision(values, labels, label, recall) for label, recall in wanted]
    assert found == pytest.approx(expected)


def test_neurons_are_the_hidden_layer_and_what_the_codebooks_replace(fsm):
    model = make_model("mlp", k=1)
    tokens = make_tokens(fsm)
    values = neurons(model, tokens.numpy())
    seen = []
    model.h[1].mlp.c_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    assert values.shape == (24, 2 * (64 + 16))
    assert torch.equal(values[:, -80:-16], seen[0].flatten(0, 1))


def test_neurons_of_many_sequences_are_those_of_each(fsm):
    model = make_model("mlp", k=1)
    tokens = make_tokens(fsm, n=70).numpy()
    torch.testing.assert_close(neurons(model, tokens)[-8:], neurons(model, tokens[-1:]))


def test_codes_against_neurons_sums_up_its_points(tiny_run):
    run = load_run(tiny_run)
    tokens, kinds = run.data.labelled(np.random.default_rng(0), 64, 12)
    result = codes_against_neurons(run, record_codes(run.model, tokens), [kinds["digit"]])
    assert {name for _, _, name in result["points"]} == set("0123")
    neuron, code = np.array([point[:2] for point in result["points"]]).T
    assert 0 <= min(*neuron, *code) <= max(*neuron, *code) <= 1
    assert result["neuron_precision"] == pytest.approx(neuron.mean())
    assert result["code_precision"] == pytest.approx(code.mean())
    assert result["code_wins"] == np.mean(code > neuron)


def test_codes_against_neurons_where_no_label_occurs(tiny_run):
    run = load_run(tiny_run)
    tokens, _ = run.data.labelled(np.random.default_rng(0), 4, 12)
    nothing = (np.full(tokens.shape, -1), ["never"])
    result = codes_against_neurons(run, record_codes(run.model, tokens), [nothing])
    assert result["points"] == []
    assert result["code_precision"] == result["neuron_precision"] == result["code_wins"] == 0


def test_purity_against_one_prompt_at_a_time(fsm):
    model = make_model("head,mlp", k=1)
    start_codebooks(model, make_tokens(fsm, n=20))  # those that begin at random are never pure
    for prompts in fsm.prefixes():
        fires = {"mlp.0": [], "mlp.1": []}
        for prompt in prompts:
            with torch.no_grad(), record(model) as codes:
                model(prompt[None])
            for site, ids in fires.items():
                ids.append(codes[site][0, -1, 0, 0].item())
        expected = [np.mean([ids.count(code) == 1 for code in set(ids)]) for ids in fires.values()]
        assert purity(model, prompts) == expected
        assert min(expected) > 0 and max(expected) < 1


NEW_YORK = [["New", " Y", "ork", " is", " new"], ["", "York", " New", " Yorker", ""]]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("New (York)", [[-1, -1, 0, -1, -1], [-1, -1, -1, 0, -1]]),
        ("[Nn]ew", [[0, -1, -1, -1, 0], [-1, -1, 0, -1, -1]]),
        ("(Old)? Y", [[-1] * 5] * 2),
        ("x*", [[-1] * 5] * 2),
    ],
)
def test_matches_by_hand(pattern, expected):
    assert matches(NEW_YORK, re.compile(pattern)).tolist() == expected


def test_words_of_states(fsm):
    assert fsm.texts(np.array([[4, 3, 1, 0, 2, 1]])) == [["BOS", " 3", "1", " 0", "2", " 1"]]
    found = matches(fsm.texts(np.array([[4, 3, 1, 1, 3]])), re.compile("1 1"))
    assert found.tolist() == [[-1, -1, -1, 0, -1]]


# -- what a code does


def test_forced_distributions_against_force(fsm):
    model = make_model("head,mlp", k=2)
    tokens = make_tokens(fsm, n=20)
    recording = record_codes(model, tokens.numpy())
    numbers = [int(number) for number in np.flatnonzero(recording.count)[::7]]
    found, free = forced_distributions(recording, numbers, n_contexts=4)
    assert found.keys() == free.keys() == set(numbers)
    for number in numbers:
        positions = np.flatnonzero((recording.fired == number).any(1)) % 8
        last = min([p for p in positions if p >= 3], default=7)
        contexts = tokens[:4, : last + 1]
        with evaluating(model):
            left_alone = model(contexts)[0][:, -1].softmax(-1).mean(0)
            with force(model, f"{recording.names[number]}@{last}"):
                p = model(contexts)[0][:, -1].softmax(-1).mean(0)
        np.testing.assert_allclose(found[number], p, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(free[number], left_alone, atol=1e-6)


# -- control


def test_shift_is_nothing_for_zero_and_exact_otherwise(fsm):
    model = make_model("mlp")
    tokens = make_tokens(fsm)
    delta = torch.randn(3, 16)
    reaches = []  # the second layer
    model.h[1].register_forward_pre_hook(lambda module, args: reaches.append(args[0]))
    with torch.no_grad():
        plain = model(tokens)[0]
        with shift(model.h[0], torch.zeros(3, 16), 4):
            assert torch.equal(model(tokens)[0], plain)
        with shift(model.h[0], delta, 4):
            assert not torch.equal(model(tokens)[0], plain)
        assert torch.equal(model(tokens)[0], plain)
    expected = torch.zeros(3, 8, 16)
    expected[:, 4] = delta
    torch.testing.assert_close(reaches[2] - reaches[3], expected)


def test_mean_difference_of_a_state_and_itself_is_nothing(fsm):
    model = make_model("mlp")
    intervene = add_mean_difference(fsm, model, 0, np.random.default_rng(0))
    a = fsm.runs([3, 9, 3])
    for b, moved in (([3, 9, 3], False), ([3, 9, 4], True)):
        _, delta, position = intervene(a, fsm.runs(b)).args
        assert position == 2
        assert delta[:2].abs().max() == 0
        assert bool(delta[2].abs().max() > 0) == moved


def test_mean_difference_is_that_of_the_layers_output(fsm):
    model = make_model("mlp")
    contexts = fsm.runs(np.random.default_rng(0).integers(16, size=8))
    outputs = []
    for state in (9, 3):
        tail = fsm.runs([state])[:, 1:].repeat(8, 1)
        hook = model.h[0].register_forward_hook(lambda *args: outputs.append(args[-1][:, -1]))
        with torch.no_grad(), hook:
            model(torch.cat((contexts, tail), dim=1))
    intervene = add_mean_difference(fsm, model, 0, np.random.default_rng(0))
    _, delta, _ = intervene(fsm.runs([3]), fsm.runs([9])).args
    torch.testing.assert_close(delta[0], outputs[0].mean(0) - outputs[1].mean(0))


def test_what_is_forced_in_the_place_of_the_codes_of_b(fsm):
    model = make_model("head,mlp", k=2)
    a = fsm.runs([1, 2, 3])
    b = fsm.runs([4, 5, 6])
    generator = torch.Generator().manual_seed(0)

    def forced(intervene):
        _, codes, position = intervene(a, b).args
        assert position == 2
        return codes

    sites = ["head.0", "mlp.1"]
    own = forced(copy_codes(model, sites))
    assert own.keys() == set(sites)
    drawn = forced(copy_codes(model, sites, random=generator))
    for site, ids in own.items():
        assert drawn[site].shape == ids.shape
        assert drawn[site].max() < codebooks(model)[site].n_codes
    wrong = forced(wrong_state(fsm, copy_codes(model, sites), np.random.default_rng(0)))
    offset = np.random.default_rng(0).integers(1, 16)
    b = fsm.runs((np.array([4, 5, 6]) + offset) % 16)
    others = forced(copy_codes(model, sites))
    for site in sites:
        assert torch.equal(wrong[site], others[site])


def test_interval_is_students():
    rows = [{"control": x} for x in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert interval(rows) == {
        "control": pytest.approx(0.3),
        "control_ci": pytest.approx(2.776 * 0.15811388 / 5**0.5),
    }


def test_control_study_has_every_control(tiny_run):
    run = load_run(tiny_run)
    result = control_study(run, n_pairs=30)
    sites = {"head.0", "mlp.0", "head.1", "mlp.1"}
    others = {"none", "all_mlp", "all", "random_code", "wrong_state", "mean_difference"}
    assert result.keys() == sites | others
    for way in result.values():
        for where in ("first", "inside"):
            row = way[where]
            assert 0 <= row["control"] <= 1
            assert 0 <= row["jsd"] <= np.log(2)
            assert row["control_ci"] >= 0
    run.dense = None
    assert "mean_difference" not in control_study(run, n_pairs=30)


# -- the seed question


def test_agreement_by_hand_and_with_oneself():
    one = by_hand([[0, 0, 1, 1, 1, 3]])
    other = by_hand([[2, 2, 2, 0, 0, 1]])
    # Code 0 at {0, 1}, with 2 at {0, 1, 2}: 2/3. Code 1 at {2, 3, 4}, with 0 at {3, 4}: 2/3.
    # Code 3 at {5}, with 1 at {5}: 1.
    expected = (2 / 3 + 2 / 3 + 1) / 3
    found = agreement(one, other, np.random.default_rng(0))
    assert found["mean_iou"] == pytest.approx(expected)
    weighted = (2 * 2 / 3 + 3 * 2 / 3 + 1 * 1) / 6
    assert found["weighted_iou"] == pytest.approx(weighted)
    same = agreement(one, one, np.random.default_rng(0))
    assert same["mean_iou"] == same["weighted_iou"] == 1


def test_agreement_on_labels_is_that_of_their_best_codes():
    one = by_hand([[0, 0, 1, 1, 1, 3]])
    other = by_hand([[2, 2, 2, 0, 0, 1]])
    labels = np.array([[0, 0, -1, -1, 2, 2]])  # 0: codes 0 and 2; 2: codes 3 and 1, both at {5}
    expected = (2 / 3 + 1) / 2
    assert agreement_on(one, other, labels, ["a", "b", "c"]) == pytest.approx(expected)
    assert agreement_on(one, one, labels, ["a", "b", "c"]) == 1
