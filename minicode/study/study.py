"""Every measure of a run: interpret.json, report.html and the tables."""

import json

import numpy as np
import torch

from minicode.codebook import perplexity
from minicode.language import topics
from minicode.runtime.files import write, write_array
from minicode.study import figures
from minicode.study.detectors import (
    agreement,
    best_labels,
    codes_against_neurons,
    detect,
    purity,
    record_codes,
)
from minicode.study.machine import control_study
from minicode.study.page import page, write_report


def study(run, recording, kinds, other, folder):
    """Every measure that there is for this run: interpret.json, report.html and the tables."""
    data = run.data
    result = {
        "run": str(run.folder),
        "tokens": int(recording.tokens.size),
        "usage": usage(recording),
    }
    detectors = result["detectors"] = codes_against_neurons(
        run, recording, [kinds[kind] for kind in data.detected]
    )
    points, labels = detectors.pop("points"), best_labels(recording, kinds)
    if run.fsm:
        result["purity"] = dict(
            zip(("bigram", "trigram"), (purity(run.model, prompts) for prompts in data.prefixes()))
        )
        found = detect(recording, *kinds["state"])
        detectors["states_with_code"] = float(
            (np.minimum(found.precision, found.recall).max(0) >= 0.95).mean()
        )
        result["control"] = control_study(run)
    if (
        "topic" in kinds and run.config.block_size >= 16
    ):  # room for the prompts, and something after them
        result["steering"] = topics.steering_table(run, recording, *kinds["topic"])
        write(run.folder / "steering.json", json.dumps(result["steering"], indent=1))
    best = sorted((i for i, label in enumerate(labels) if label), key=lambda i: -labels[i][-1])[:10]
    names = ("kind", "label", "precision", "recall", "f1")
    result["best_codes"] = [
        {"code": str(recording.names[i]), **dict(zip(names, labels[i]))} for i in best
    ]
    if other:
        theirs = record_codes(other.model, recording.tokens)
        result["seeds"] = {
            "with": str(other.folder),
            **agreement(recording, theirs, np.random.default_rng(0)),
        }
    drawn = draw(result, points)
    for name, array in ("codes.npy", recording.codes), ("tokens.npy", recording.tokens):
        write_array(run.folder / name, array)
    write(run.folder / "interpret.json", json.dumps(result, indent=1))
    write_report(run.folder / "report.html", page(run, recording, labels, measures(result), drawn))
    for name, (svg, _) in drawn.items() if folder else ():
        write(folder / f"{name}.svg", svg)
    return result, describe(result, run.folder)


def usage(recording):
    """By site: the share of codes that never fire here, and the perplexity: as many codes in even use."""
    sites, counts = {}, torch.from_numpy(recording.count).double()
    for site in dict(recording.columns):
        c = recording.model.codebooks()[site]
        here, counts = (
            counts[: c.groups * c.n_codes].view(c.groups, -1),
            counts[c.groups * c.n_codes :],
        )
        dead = (here == 0).double().mean().item()
        sites[site] = {
            "dead_code_fraction": dead,
            "perplexity": perplexity(here).mean().item(),
            "codes": here.numel(),
        }
    return sites


def draw(result, points):
    """The figures, by name: (svg, caption)."""
    sites, drawn = result["usage"], {}
    alive = [
        [round(u["codes"] * (1 - u["dead_code_fraction"])) for u in sites.values()],
        [u["codes"] for u in sites.values()],
    ]
    svg = figures.bars(
        list(sites), ["fire", "there are"], alive, title="Codes in use, by site", y="codes"
    )
    about = f"How many of the codes of a site fire at least once in {result['tokens']:,} tokens."
    drawn["usage"] = svg, f"{about} At a site head.L: of all heads of layer L."
    if "purity" in result:
        names, values = list(result["purity"]), list(result["purity"].values())
        layers = [f"layer {i}" for i in range(len(values[0]))]
        svg = figures.bars(
            layers, names, values, title="Purity of MLP codes, by layer", y="purity", cover=(0, 1)
        )
        drawn["purity"] = (
            svg,
            "Share of the MLP's codes in use that fire on one bigram (a state) or trigram (a state and a digit) only.",
        )
    svg = figures.scatter([p[:2] for p in points], title="Codes against neurons as detectors", x="precision of the best neuron",
                          y="precision of the best code", diagonal=True, cover=(0, 1))  # fmt: skip
    drawn["detectors"] = (
        svg,
        (
            "A point for each feature: the precision of the code that detects it best, and of the best neuron with its threshold "
            "at the same recall. Above the line the code is the better detector."
        ),
    )
    if "control" in result:
        ways, wheres = list(result["control"]), ["first", "inside"]
        values, errors = (
            [[result["control"][w][where][name] for w in ways] for where in wheres]
            for name in ("control", "control_ci")
        )
        svg = figures.bars(
            ways,
            wheres,
            values,
            errors,
            title="Control, by what is forced",
            x="control",
            horizontal=True,
            cover=(0, 1),
        )
        drawn["control"] = (
            svg,
            (
                "Share of next states that follow the state b, after an intervention in a run that is in another state: at its first "
                "state, and inside a long sequence. Random and wrong codes must do no better than nothing at all (none)."
            ),
        )
    if "steering" in result:
        rows = result["steering"]["topics"]
        shares = [
            [row[measure] for row in rows.values()] for measure in ("before", "after", "random")
        ]
        svg = figures.bars(list(rows), ["before", "after", "random codes"], shares, horizontal=True, cover=(0, 1),
                           title="Steering by topic", x="share of texts that mention the topic")  # fmt: skip
        drawn["steering"] = (
            svg,
            "Generated texts that mention a topic: left alone, with its codes forced, and with as many random codes.",
        )
    return drawn


def measures(result):
    """The figures of a result as rows for people: (name, value, note)."""
    d = result["detectors"]
    rows = [["code precision", f"{d['code_precision']:.3f}", "the best code of each feature, on average"],
            ["neuron precision", f"{d['neuron_precision']:.3f}", "the best neuron of each, at the same recall"],
            ["code wins", f"{d['code_wins']:.1%}", "share of features where the code is more precise"]]  # fmt: skip
    if "states_with_code" in d:
        rows.append(
            [
                "states with a code",
                f"{d['states_with_code']:.1%}",
                "precision and recall at least 0.95",
            ]
        )
    for kind, values in result.get("purity", {}).items():
        rows.append([f"{kind} purity", " ".join(f"{v:.3f}" for v in values), "by layer"])
    if "seeds" in result:
        rows.append(
            [
                "agreement of seeds",
                f"{result['seeds']['mean_iou']:.3f}",
                f"mean IoU; by chance {result['seeds']['chance']:.3f}",
            ]
        )
    return rows


def describe(result, folder):
    """The tables for the terminal."""
    lines = [
        f"{result['run']}: codes recorded on {result['tokens']:,} tokens",
        "",
        f"{'site':10}{'codes':>7}{'dead':>8}{'perplexity':>12}",
    ]
    lines += [
        f"{site:10}{u['codes']:7}{u['dead_code_fraction']:8.1%}{u['perplexity']:12.1f}"
        for site, u in result["usage"].items()
    ]
    lines += ["", *(f"{name:22}{value:>14}  {note}" for name, value, note in measures(result))]
    if "control" in result:
        n = "control   +-     JSD"
        lines += [
            "",
            f"{'forced':18}{'at the first state':>22}{'inside a sequence':>24}",
            f"{'':18}{n:>22}{n:>24}",
        ]
        for way, where in result["control"].items():
            cells = (
                f"{w['control']:.3f} {w['control_ci']:.3f}   {w['jsd']:.3f}"
                for w in (where["first"], where["inside"])
            )
            lines.append(f"{way:18}" + "  ".join(f"{cell:>22}" for cell in cells))
    if "steering" in result:
        lines += ["", topics.describe(result["steering"])]
    lines += ["", f"{'best codes':18}{'':24}{'precision':>10}{'recall':>8}"]
    lines += [
        f"{r['code']:18}{r['kind'] + ' ' + r['label']:24}{r['precision']:10.3f}{r['recall']:8.3f}"
        for r in result["best_codes"]
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"figures and all codes: {folder / 'report.html'}; every figure: {folder / 'interpret.json'}",
        ]
    )
