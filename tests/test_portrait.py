"""What the page holds of codes and of a run: against the recording, code by code."""

import json

import numpy as np
import pytest
import torch.nn.functional as F
from conftest import make_model, make_tokens

from minicode import load_run
from minicode.codebook import codebooks
from minicode.study import page as page_module
from minicode.study import portrait
from minicode.study.detectors import best_labels, by_merit, forced_distributions, record_codes
from minicode.study.page import page, write_report
from minicode.study.portrait import portraits

FIELDS = ["name", "count", "words", "precision", "recall", "places", "misses", "false_alarms"]
FIELDS += ["next", "near", "together"]


@pytest.fixture(scope="module")
def recording():
    from minicode import FSM

    return record_codes(make_model("head,mlp"), make_tokens(FSM(16, 3, 4), n=30).numpy())


@pytest.fixture(scope="module")
def kinds(recording):
    tokens = recording.tokens
    trigram = np.where(tokens == 1, 0, np.where(tokens == 2, 1, -1))
    return {"digit": (tokens, list("0123B")), "trigram": (trigram, ["10 1", "20 2"])}


@pytest.fixture(scope="module")
def labels(recording, kinds):
    return best_labels(recording, kinds)


def as_dicts(rows):
    return [dict(zip(FIELDS, row, strict=True)) for row in rows]


def test_codes_are_shown_in_their_order_with_where_they_fire_and_where_not(
    recording, kinds, labels
):
    ranked = by_merit(recording, labels)[:60]
    rows = as_dicts(portraits(recording, kinds, labels, ranked))
    shown = sorted(ranked.tolist())
    assert [row["name"] for row in rows] == [str(recording.names[number]) for number in shown]
    flat = recording.tokens.ravel()
    n_misses = 0
    for number, row in zip(shown, rows):
        fires = {*recording.where[number].tolist()}
        assert row["count"] == len(fires)
        assert len(row["places"]) == min(20, len(fires)) and {*row["places"]} <= fires
        if not fires:
            assert row["words"] is None
            continue
        kind, name, precision, recall, _ = labels[number]
        assert (row["precision"], row["recall"]) == (precision, recall)
        assert row["words"] == ("digit", name)
        there = {*np.flatnonzero(flat == "0123B".index(name)).tolist()}
        for places, all_of_them in (
            (row["misses"], there - fires),
            (row["false_alarms"], fires - there),
        ):
            assert len(places) == min(5, len(all_of_them)) and {*places} <= all_of_them
        n_misses += len(row["misses"])
    assert n_misses


def test_next_tokens_are_ranked_by_lift(recording, kinds, labels):
    ranked = by_merit(recording, labels)[:10]
    forced, free = forced_distributions(recording, ranked)
    rows = as_dicts(portraits(recording, kinds, labels, ranked))
    for number, row in zip(sorted(ranked.tolist()), rows):
        lift = (forced[number] + 1e-3) / (free[number] + 1e-3)
        tokens = [token for token in np.argsort(-lift) if lift[token] >= 1.01]
        assert [token for token, *_ in row["next"]] == tokens
        for token, p, left_alone, times in row["next"]:
            assert p == pytest.approx(forced[number][token], rel=1e-3)
            assert left_alone == pytest.approx(free[number][token], rel=1e-3)
            assert times == pytest.approx(lift[token], rel=1e-3)


def test_neighbours_by_cosine_and_by_where_they_fire(recording, kinds, labels):
    ranked = by_merit(recording, labels)[:60]
    rows = as_dicts(portraits(recording, kinds, labels, ranked))
    shown = sorted(ranked.tolist())
    names = recording.names
    books = codebooks(recording.model)
    for i, number in enumerate(shown):
        if not recording.count[number]:
            assert rows[i]["near"] == rows[i]["together"] == []
            continue
        one = names[number]
        fires = {*recording.where[number].tolist()}
        cosine = {}
        overlap = {}
        for j, other in enumerate(shown):
            two = names[other]
            if other == number or not recording.count[other]:
                continue
            also = {*recording.where[other].tolist()}
            overlap[j] = len(fires & also) / len(fires | also)
            if (one.site, one.group) == (two.site, two.group):
                codes = books[one.site].codes.detach()[one.group or 0]
                cosine[j] = F.cosine_similarity(codes[one.id], codes[two.id], dim=0).item()
        for found, values in ((rows[i]["near"], cosine), (rows[i]["together"], overlap)):
            best = sorted((value for value in values.values() if value > 0), reverse=True)[:5]
            assert [value for _, value in found] == pytest.approx(best, rel=1e-3, abs=1e-6)
            assert all(values[j] == pytest.approx(v, rel=1e-3, abs=1e-6) for j, v in found)


def test_of_large_models_only_the_best_codes_are_forced(recording, kinds, labels, monkeypatch):
    size = sum(weight.numel() for weight in recording.model.parameters())
    monkeypatch.setattr(portrait, "MOST_WORK", 3.5 * size * recording.tokens.shape[1])
    ranked = by_merit(recording, labels)
    rows = as_dicts(portraits(recording, kinds, labels, ranked))
    forced = {row["name"] for row in rows if row["next"]}
    assert forced == {str(recording.names[number]) for number in ranked[:3]}


def test_a_page_of_many_codes_holds_the_best_and_says_what_it_left_out(
    tiny_run, monkeypatch, tmp_path
):
    run = load_run(tiny_run)
    tokens, kinds = run.data.labelled(np.random.default_rng(0), 40, 12)
    recording = record_codes(run.model, tokens)
    labels = best_labels(recording, kinds)
    whole = page(run, recording, kinds, labels, {}, {})
    assert whole["network"] and not whole["states"] and whole["left_out"] == 0
    monkeypatch.setattr(page_module, "MOST_CODES", 20)
    monkeypatch.setattr(page_module, "MOST_CHOICES", 200)
    monkeypatch.setattr(page_module, "LIMIT", 1000)
    data = page(run, recording, kinds, labels, {}, {})
    assert data["network"] is None
    best = by_merit(recording, labels)[:20]
    names = [str(recording.names[number]) for number in sorted(best)]
    assert [code[0] for code in data["codes"]] == names
    assert data["left_out"] == len(recording.names) - 20
    fired = recording.fired.reshape(40, 12, -1)
    n_choices = 0
    for row, states in zip(fired, data["states"]):
        assert n_choices <= 200
        for numbers, state in zip(row, states):
            shown = [str(recording.names[n]) for n in numbers if n in best]
            assert [names[i] for i in state] == shown
            n_choices += len(state)
    assert n_choices > 200
    write_report(tmp_path / "report.html", {**data, "measures": []})
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = written.split('id="data">')[1].split("</script>")[0]
    assert json.loads(found)["codes"][3][0] == names[3]
