"""Every measure of a run: interpret.json, report.html and the tables."""

import json

import numpy as np

from minicode.language import steering
from minicode.runtime.files import write
from minicode.study import figures
from minicode.study.detectors import (
    best_labels,
    by_merit,
    codes_against_neurons,
    detect,
    purity,
    usage,
)
from minicode.study.machine import control_study
from minicode.study.page import page, write_report

# What is compared, in words.
STEERED = {
    "before": "left alone",
    "after": "its codes forced",
    "random": "as many random codes forced",
    "logit_bias": "2 nats added to its words' logits",
}
WHERE = {"first": "at the first state", "inside": "inside a sequence"}
WAYS = {  # of control; any other is a site
    "none": "no codes (left alone)",
    "all_mlp": "codes of b, all MLPs",
    "all": "codes of b, all sites",
    "random_code": "random codes",
    "wrong_state": "codes of a wrong state",
    "mean_difference": "dense model, mean difference",
}


def study(run, recording, kinds, topics, budget, folder):
    """Every measure that there is for this run; its figures go to a folder too, if there is one.

    topics: those to steer to, at a cost of `budget`.
    """
    labels = best_labels(recording, kinds)
    detected = [kinds[kind] for kind in run.data.detected]
    detectors = codes_against_neurons(run, recording, detected)
    points = detectors.pop("points")
    result = {
        "run": str(run.folder),
        "tokens": recording.tokens.size,
        "usage": usage(recording.counts()),
        "detectors": detectors,
        "best_codes": best_codes(recording, labels),
    }
    if run.fsm:
        shares = [purity(run.model, prompts) for prompts in run.data.prefixes()]
        result["purity"] = dict(zip(("bigram", "trigram"), shares))
        found = detect(recording, *kinds["state"])
        best = np.minimum(found.precision, found.recall).max(0)
        detectors["states_with_code"] = float((best >= 0.95).mean())
        result["control"] = control_study(run)
    if topics:
        result["steering"] = steering.steering_table(run, topics, budget)
    drawn = draw(result, points)
    shown = {name: figure for name, figure in drawn.items() if tells(name, points)}
    write(run.folder / "interpret.json", json.dumps(result, indent=1))
    data = page(run, recording, kinds, labels, result, shown)
    write_report(run.folder / "report.html", {**data, "measures": measures(result)})
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (svg, _) in drawn.items():
            write(folder / f"{name}.svg", svg)
    return result, describe(result, run.folder)


def tells(name, points):
    """Whether a figure says something: not that of the detectors where all are level."""
    return name != "detectors" or not points or np.ptp([code for _, code, _ in points]) >= 0.1


def best_codes(recording, labels):
    """The best code of each label, by F1; of equals, those that fire the most. The first ten."""
    best = {}
    for number in by_merit(recording, labels):
        if labels[number]:
            best.setdefault(labels[number][:2], number)
    keys = ("code", "kind", "label", "precision", "recall", "f1")
    first = [*best.values()][:10]
    return [dict(zip(keys, (str(recording.names[number]), *labels[number]))) for number in first]


def draw(result, points):
    """The figures, by name: (svg, caption)."""
    svg = figures.scatter(
        points,
        title="Codes against neurons as detectors",
        x="precision of the best neuron",
        y="precision of the best code",
        diagonal=True,
    )
    caption = (
        "A point for each feature: the precision of the code that detects it best, and of the best "
        "neuron with its threshold at the same recall. Above the line the code is the better one."
    )
    drawn = {"detectors": (svg, caption)}
    if "control" in result:
        drawn["control"] = draw_control(result["control"])
    if "steering" in result:
        rows = result["steering"]["topics"]
        series = {}
        for way, text in STEERED.items():
            series[text] = [row[way] for row in rows.values()]
        text = {"title": "Steering by topic", "x": "share of texts that mention the topic"}
        svg = figures.bars(list(rows), series, **text)
        drawn["steering"] = (svg, "Generated texts that mention a topic, by what is forced.")
    return drawn


def in_words(control):
    """What control_study found, by what is forced in words: {words: {where: figures}}."""
    return {WAYS.get(way, f"codes of b at {way} only"): found for way, found in control.items()}


def draw_control(control):
    rows = in_words(control)
    series = {}
    errors = {}
    for where, text in WHERE.items():
        series[text] = [row[where]["control"] for row in rows.values()]
        errors[text] = [row[where]["control_ci"] for row in rows.values()]
    svg = figures.bars(
        list(rows),
        series,
        errors,
        title="Made to act as if in state b, by what is forced",
        x="share of next states that follow b",
    )
    caption = (
        "A run is in one state, and is made to act as if in another, b. How often does its next "
        "state follow b? What is forced comes from a run in b; random codes, and those of other "
        "states, must do no better than none at all."
    )
    return svg, caption


def measures(result):
    """The figures of a result as rows for people: (name, value, note)."""
    found = result["detectors"]
    rows = [
        (
            "code precision",
            f"{found['code_precision']:.3f}",
            "the best code of each feature, on average",
        ),
        (
            "neuron precision",
            f"{found['neuron_precision']:.3f}",
            "the best neuron of each, at the same recall",
        ),
        ("code wins", f"{found['code_wins']:.1%}", "features whose code is more precise"),
    ]
    if "states_with_code" in found:
        share = f"{found['states_with_code']:.1%}"
        rows.append(("states with a code", share, "precision and recall at least 0.95"))
    for kind, values in result.get("purity", {}).items():
        by_layer = " ".join(f"{value:.3f}" for value in values)
        rows.append((f"{kind} purity", by_layer, "MLP codes that fire on one only, by layer"))
    return rows


def describe(result, folder):
    """The tables for the terminal."""
    lines = [f"{result['run']}: codes recorded on {result['tokens']:,} held-out tokens", ""]
    lines.append("site        codes    dead  perplexity")
    for site, use in result["usage"].items():
        dead = f"{use['dead_code_fraction']:.1%}"
        lines.append(f"{site:10}{use['codes']:7}{dead:>8}{use['perplexity']:12.1f}")
    lines.append("")
    for name, value, note in measures(result):
        lines.append(f"{name:22}{value:>14}  {note}")
    if "control" in result:
        lines += ["", *describe_control(result["control"])]
    if "steering" in result:
        lines += ["", steering.describe(result["steering"])]
    lines += ["", f"{'best codes':42} precision  recall"]
    for row in result["best_codes"]:
        label = f"{row['kind']} {row['label']}"
        lines.append(f"{row['code']:18}{label:24}{row['precision']:10.3f}{row['recall']:8.3f}")
    files = f"all codes: {folder / 'report.html'}; every figure: {folder / 'interpret.json'}"
    return "\n".join([*lines, "", files])


def describe_control(control):
    columns = "".join(f"{text:>26}" for text in WHERE.values())
    yield f"{'made to act as in b by':30}{columns}"
    yield " " * 30 + 2 * f"{'control   +-     JSD':>26}"
    for text, row in in_words(control).items():
        line = f"{text:30}"
        for where in WHERE:
            found = row[where]
            line += f"{found['control']:12.3f} {found['control_ci']:.3f}   {found['jsd']:.3f}"
        yield line
