"""The measures against brute force, on examples small enough to check on paper."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokens

from minicode import force, load_run, record
from minicode.model import evaluating
from minicode.study.detectors import (
    Recording,
    agreement,
    best_labels,
    best_neurons,
    codes_against_neurons,
    detect,
    forced_distributions,
    matches,
    neurons,
    purity,
    record_codes,
)
from minicode.study.machine import add_mean_difference, control_study, interval, shift


def by_hand(codes, n_codes=4, site="mlp.0"):
    """A recording of one codebook: codes (n, T)."""
    model = SimpleNamespace(codebooks=lambda: {site: SimpleNamespace(n_codes=n_codes)})
    codes = np.array(codes)[..., None]
    return Recording(model, np.zeros(codes.shape[:2], dtype=int), codes, [(site, 0)])


def test_precision_recall_and_f1_by_hand():
    recording = by_hand([[0, 0, 0, 1], [1, 1, 2, 0]])
    labels = np.array([[0, 0, 1, 1], [-1, 1, -1, 0]])
    found = detect(recording, labels, ["a", "b"])
    # code 0 fires 4 times: 3 times on a (of 3), once on b (of 3); code 1 three times: twice on b, once on nothing
    assert found.precision[0].tolist() == [3 / 4, 1 / 4] and found.recall[0].tolist() == [1, 1 / 3]
    assert found.precision[1].tolist() == [0, 2 / 3] and found.recall[1].tolist() == [0, 2 / 3]
    assert found.f1[0, 0] == pytest.approx(6 / 7) and found.f1[1, 1] == pytest.approx(2 / 3)
    assert (
        found.f1.argmax(0).tolist() == [0, 1]
        and found.total.tolist() == [3, 3]
        and recording.count.tolist() == [4, 3, 1, 0]
    )
    best = best_labels(recording, {"letter": (labels, ["a", "b"])})
    assert [row and row[:2] for row in best] == [("letter", "a"), ("letter", "b"), None, None]


def test_best_label_is_that_of_the_highest_f1():
    recording = by_hand([[0, 0, 1, 1]])
    rough, fine = np.array([[0, 0, 0, 0]]), np.array([[-1, -1, 0, 0]])
    best = best_labels(recording, {"rough": (rough, ["all"]), "fine": (fine, ["end"])})
    assert best[0][:2] == ("rough", "all") and best[1] == ("fine", "end", 1, 1, 1)


def test_recording_is_what_record_says(fsm):
    model, tokens = make_model("head,mlp", k=2), make_tokens(fsm, n=70)
    recording = record_codes(model, tokens.numpy())
    with torch.no_grad(), record(model) as codes:
        model(tokens)
    stored = recording.codes
    assert stored.dtype == np.int16 and stored.shape == (70, 8, 12)
    columns = [(s, g) for s, ids in codes.items() for g in range(ids.shape[2]) for _ in range(2)]
    assert recording.columns == columns
    for column, (site, group) in enumerate(columns):
        assert (stored[..., column] == codes[site][:, :, group, column % 2].numpy()).all()
    number = recording.fired[3 * 8 + 5, 1]
    assert (recording.names[number].site, recording.names[number].group) == ("head.0", 0)
    assert (
        recording.names[number].id == codes["head.0"][3, 5, 0, 1]
        and recording.count.sum() == 70 * 8 * 12
    )
    places = recording.places(number, 4)
    assert 1 <= len(places) <= 4 and all(number in recording.fired[place] for place in places)


def test_neurons_against_all_thresholds():
    torch.manual_seed(0)
    values, labels = torch.randn(40, 5).round(decimals=1), torch.randint(-1, 3, (40,))
    wanted = [(0, 0.3), (1, 1.0), (2, 0.75), (2, 0.01)]
    for (label, recall), found in zip(wanted, best_neurons(values, labels, wanted)):
        best = 0.0
        for unit in torch.cat((values, -values), dim=1).T:
            reached = [
                t for t in unit if (unit[labels == label] >= t).float().mean() >= recall - 1e-6
            ]
            threshold = max(reached)  # the highest at which the recall is reached
            best = max(best, (labels[unit >= threshold] == label).float().mean().item())
        assert found == pytest.approx(best)


def test_neurons_are_the_hidden_layer_and_what_the_codebooks_replace(fsm):
    model, tokens = make_model("mlp", k=1), make_tokens(fsm)
    values, seen = neurons(model, tokens.numpy()), []
    model.h[1].mlp.c_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    assert values.shape == (24, 2 * (64 + 16))
    assert torch.equal(values[:, -80:-16], seen[0].flatten(0, 1))


def test_a_code_that_is_its_feature_beats_a_noisy_neuron(tiny_run):
    run = load_run(tiny_run)
    tokens, kinds = run.data.labelled(np.random.default_rng(0), 64, 12)
    result = codes_against_neurons(run, record_codes(run.model, tokens), [kinds["digit"]])
    assert len(result["points"]) == 4 and all(
        0 <= p <= 1 for point in result["points"] for p in point[:2]
    )
    assert result["code_precision"] == pytest.approx(
        np.mean([point[1] for point in result["points"]])
    )
    assert result["code_wins"] == np.mean([point[1] > point[0] for point in result["points"]])


def test_purity_against_one_prompt_at_a_time(fsm):
    model = make_model("head,mlp", k=1)
    for prompts in fsm.prefixes():
        for layer, share in enumerate(purity(model, prompts)):
            fires_on = {}
            for prompt in prompts:
                with torch.no_grad(), record(model) as codes:
                    model(prompt[None])
                fires_on.setdefault(codes[f"mlp.{layer}"][0, -1, 0, 0].item(), []).append(prompt)
            assert share == np.mean([len(where) == 1 for where in fires_on.values()])


def test_matches_by_hand():
    pieces = [["New", " Y", "ork", " is", " new"], ["", "York", " New", " Yorker", ""]]
    assert matches(pieces, re.compile("New (York)")).tolist() == [
        [-1, -1, 0, -1, -1],
        [-1, -1, -1, 0, -1],
    ]
    assert matches(pieces, re.compile("[Nn]ew")).tolist() == [
        [0, -1, -1, -1, 0],
        [-1, -1, 0, -1, -1],
    ]
    assert (
        matches(pieces, re.compile("(Old)? Y")).tolist()
        == matches(pieces, re.compile("x*")).tolist()
        == [[-1] * 5] * 2
    )


def test_words_of_states(fsm):
    assert fsm.texts(np.array([[4, 3, 1, 0, 2, 1]])) == [["BOS", " 3", "1", " 0", "2", " 1"]]
    assert matches(fsm.texts(np.array([[4, 3, 1, 1, 3]])), re.compile("1 1")).tolist() == [
        [-1, -1, -1, 0, -1]
    ]


def test_forced_distributions_against_force(fsm):
    model, tokens = make_model("head,mlp", k=2), make_tokens(fsm, n=20)
    recording = record_codes(model, tokens.numpy())
    numbers = [int(n) for n in np.flatnonzero(recording.count)[::7]]
    found, free = forced_distributions(recording, numbers, n_contexts=4)
    assert found.keys() == set(numbers)
    for number in numbers:
        positions = np.flatnonzero((recording.fired == number).any(1)) % 8
        last = min([p for p in positions if p >= 3], default=7)
        with evaluating(model), force(model, f"{recording.names[number]}@{last}"):
            p = model(tokens[:4, : last + 1])[0][:, -1].softmax(-1).mean(0)
        np.testing.assert_allclose(found[number], p, rtol=1e-4, atol=1e-6)
        free -= model(tokens[:4, : last + 1])[0][:, -1].softmax(-1).mean(0).detach().numpy() / len(
            numbers
        )
    np.testing.assert_allclose(free, 0, atol=1e-6)


def test_shift_is_nothing_for_zero_and_exact_otherwise(fsm):
    model, tokens, outputs = make_model("mlp"), make_tokens(fsm), []
    model.h[1].register_forward_hook(lambda m, args, out: outputs.append(out))
    delta = torch.randn(3, 16)
    with torch.no_grad():
        plain = model(tokens)[0]
        with shift(model.h[1], torch.zeros(3, 16), 4):
            assert torch.equal(model(tokens)[0], plain)
        with shift(model.h[1], delta, 4):
            model(tokens)
        assert torch.equal(model(tokens)[0], plain)
    # the shift's hook runs after the one that keeps the outputs, so look at what the next layer gets
    with torch.no_grad(), shift(model.h[0], delta, 4):
        model.h[1].register_forward_pre_hook(lambda m, args: outputs.append(args[0]))
        model(tokens)
    shifted = outputs[-2]
    with torch.no_grad():
        model(tokens)
    torch.testing.assert_close(
        shifted - outputs[-2], torch.zeros(3, 8, 16).index_add(1, torch.tensor([4]), delta[:, None])
    )


def test_mean_difference_of_a_state_and_itself_is_nothing(fsm):
    model = make_model("mlp")
    intervene = add_mean_difference(fsm, model, 0, np.random.default_rng(0))
    a = np.array([3, 9, 3])
    for b, moved in ((a, False), (np.array([3, 9, 4]), True)):
        edit = intervene(fsm.runs(a), fsm.runs(b))
        assert edit.args[1][:2].abs().max() == 0 and bool(edit.args[1][2].abs().max() > 0) == moved


def test_agreement_by_hand_and_with_oneself():
    one, other = by_hand([[0, 0, 1, 1, 1, 3]]), by_hand([[2, 2, 2, 0, 0, 1]])
    # 0: {0, 1} with 2: {0, 1, 2} is 2/3; 1: {2, 3, 4} with 0: {3, 4} is 2/3; 3: {5} with 1: {5} is 1
    assert agreement(one, other, np.random.default_rng(0))["mean_iou"] == pytest.approx(
        (2 / 3 + 2 / 3 + 1) / 3
    )
    assert agreement(one, one, np.random.default_rng(0))["mean_iou"] == 1


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
    assert result.keys() == sites | {
        "none",
        "all_mlp",
        "all",
        "random_code",
        "wrong_state",
        "shuffled",
        "mean_difference",
    }
    for way in result.values():
        for where in ("first", "inside"):
            row = way[where]
            assert (
                0 <= row["control"] <= 1
                and 0 <= row["jsd"] <= np.log(2)
                and row["kl"] >= 0
                and row["control_ci"] >= 0
            )
            assert row["normalised_jsd"] == pytest.approx(row["jsd"] / result["none"][where]["jsd"])
    assert result["mean_difference"]["layer"] in (0, 1)
    run.dense = None
    assert "mean_difference" not in control_study(run, n_pairs=30)
