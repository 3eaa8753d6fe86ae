"""python -m minicode.interpret: what the codes of a run stand for, how well, and what they do when they are forced.

    python -m minicode.interpret                         every measure: tables, interpret.json, report.html to look at
    python -m minicode.interpret --search 'New (York)'   the codes that fire where a pattern, or its bracket, ends
    python -m minicode.interpret --code mlp.1.527        where a code fires, in context
"""

import json
import re
from pathlib import Path

import numpy as np
import torch

from minicode import figures, topics
from minicode.codebook import perplexity
from minicode.control import Code
from minicode.measures import (
    agreement, best_labels, codes_against_neurons, control_study, detect, forced_distributions, matches, purity, record_codes,
)  # fmt: skip
from minicode.run import Parser, latest_run, load_run, write, write_array

TEMPLATE = Path(__file__).with_name("report.html")
UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}  # within a script, where a corpus must end nothing


def main(argv=None):
    parser = Parser("interpret", __doc__)
    parser.add_argument("--run", type=Path, help="folder of the run (default: the newest in runs/)")
    parser.add_argument("--search", metavar="REGEX", help="list the codes that detect where the pattern, or its first bracket, ends")
    parser.add_argument("--precision", type=float, default=0.5, help="the least that --search lists (default: 0.5)")
    parser.add_argument("--recall", type=float, default=0.1, help="the least that --search lists (default: 0.1)")
    parser.add_argument("--code", help="list where this code fires")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="another run on the same data: do its codes agree?")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write the figures there too, as SVG files")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    with parser.user_errors():
        run = load_run(args.run or latest_run())
        other = load_run(args.compare) if args.compare else None
        for each in filter(None, (run, other)):
            each.sites()
        if other and other.data != run.data:
            raise ValueError(f"the runs in {run.folder} and {other.folder} are on different data")
        if other and other.config.block_size < run.config.block_size:
            raise ValueError(f"the block of {other.folder} is shorter than that of {run.folder}: compare them the other way round")
        try:
            pattern = re.compile(args.search) if args.search is not None else None
        except re.error as error:
            raise ValueError(f"--search {args.search!r} is not a regular expression: {error}") from None
        wanted = Code.parse(args.code, run.model) if args.code else None
        tokens, kinds = topics.held_out(run)
        recording = record_codes(run.model, tokens)
        if args.figures:
            args.figures.mkdir(parents=True, exist_ok=True)
        if pattern is not None:
            result, text = search(run, recording, pattern, args)
        elif wanted:
            result, text = look_up(run, recording, kinds, wanted)
        else:
            result, text = study(run, recording, kinds, other, args.figures)
    print(json.dumps(result) if args.json else text)


def search(run, recording, pattern, args):
    """The codes that detect a pattern, best first."""
    found = detect(recording, matches(run.data.texts(recording.tokens), pattern), [pattern.pattern])
    good = np.flatnonzero((found.precision[:, 0] >= args.precision) & (found.recall[:, 0] >= args.recall))
    rows = [
        {"code": str(recording.names[i]), "precision": found.precision[i, 0], "recall": found.recall[i, 0], "f1": found.f1[i, 0]}
        for i in good[np.argsort(-found.f1[good, 0], kind="stable")]
    ]
    lines = [f"{row['code']:16}{row['precision']:10.3f}{row['recall']:8.3f}{row['f1']:8.3f}" for row in rows[:40]]
    least = f"precision >= {args.precision:g} and recall >= {args.recall:g}"
    about = f"{pattern.pattern!r} occurs {found.total[0]} times in {recording.tokens.size:,} tokens; {len(rows)} codes detect it with {least}"
    table = [f"{'code':16}{'precision':>10}{'recall':>8}{'F1':>8}", *lines] if rows else []
    return {"search": pattern.pattern, "matches": int(found.total[0]), "codes": rows}, "\n".join([about, *table])


def look_up(run, recording, kinds, code, most=20, reach=8):
    """What one code stands for, and where it fires."""
    number = recording.names.index(Code(code.site, code.group, code.id))
    kind, name, precision, recall, _ = best_labels(recording, kinds)[number] or ("", "nothing known", 0.0, 0.0, 0.0)
    rows, contexts, words = run.data.texts(recording.tokens), [], run.data.vocabulary
    for place in recording.places(number, most):
        row, at = divmod(int(place), recording.tokens.shape[1])
        before, after = rows[row][max(0, at - reach) : at], rows[row][at + 1 : at + 1 + reach]
        contexts.append(f"{''.join(before)}[{rows[row][at]}]{''.join(after)}")
    p = forced_distributions(recording, [number])[0][number]
    after = [[words[t], float(p[t])] for t in np.argsort(-p)[:10]]
    result = {"code": str(code), "count": int(recording.count[number]), "kind": kind, "label": name, "precision": precision,
              "recall": recall, "contexts": contexts, "next": after}  # fmt: skip
    share = recording.count[number] / recording.tokens.size
    text = [f"{code} fires at {recording.count[number]} of {recording.tokens.size:,} positions ({share:.2%})"]
    text += [f"best described as {kind} {name}: precision {precision:.3f}, recall {recall:.3f}", "in context:"] if contexts else []
    text += [f"  {repr(context)[1:-1]}" for context in contexts]
    return result, "\n".join([*text, "when it is forced, next: " + "  ".join(f"{word!r} {q:.2f}" for word, q in after)])


def study(run, recording, kinds, other, folder):
    """Every measure that there is for this run: interpret.json, report.html and the tables."""
    data = run.data
    result = {"run": str(run.folder), "tokens": int(recording.tokens.size), "usage": usage(recording)}
    detectors = result["detectors"] = codes_against_neurons(run, recording, [kinds[kind] for kind in data.detected])
    points, labels = detectors.pop("points"), best_labels(recording, kinds)
    if run.fsm:
        result["purity"] = dict(zip(("bigram", "trigram"), (purity(run.model, prompts) for prompts in data.prefixes())))
        found = detect(recording, *kinds["state"])
        detectors["states_with_code"] = float((np.minimum(found.precision, found.recall).max(0) >= 0.95).mean())
        result["control"] = control_study(run)
    if "topic" in kinds and run.config.block_size >= 16:  # room for the prompts, and something after them
        result["steering"] = topics.steering_table(run, recording, *kinds["topic"])
        write(run.folder / "steering.json", json.dumps(result["steering"], indent=1))
    best = sorted((i for i, label in enumerate(labels) if label), key=lambda i: -labels[i][-1])[:10]
    names = ("kind", "label", "precision", "recall", "f1")
    result["best_codes"] = [{"code": str(recording.names[i]), **dict(zip(names, labels[i]))} for i in best]
    if other:
        theirs = record_codes(other.model, recording.tokens)
        result["seeds"] = {"with": str(other.folder), **agreement(recording, theirs, np.random.default_rng(0))}
    drawn = draw(result, points)
    for name, array in ("codes.npy", recording.codes), ("tokens.npy", recording.tokens):
        write_array(run.folder / name, array)
    write(run.folder / "interpret.json", json.dumps(result, indent=1))
    write_report(run.folder / "report.html", page(run, recording, labels, result, drawn))
    for name, (svg, _) in drawn.items() if folder else ():
        write(folder / f"{name}.svg", svg)
    return result, describe(result, run.folder)


def usage(recording):
    """By site: the share of codes that never fire here, and the perplexity: as many codes in even use."""
    sites, counts = {}, torch.from_numpy(recording.count).double()
    for site in dict(recording.columns):
        c = recording.model.codebooks()[site]
        here, counts = counts[: c.groups * c.n_codes].view(c.groups, -1), counts[c.groups * c.n_codes :]
        dead = (here == 0).double().mean().item()
        sites[site] = {"dead_code_fraction": dead, "perplexity": perplexity(here).mean().item(), "codes": here.numel()}
    return sites


def draw(result, points):
    """The figures, by name: (svg, caption)."""
    sites, drawn = result["usage"], {}
    alive = [[round(u["codes"] * (1 - u["dead_code_fraction"])) for u in sites.values()], [u["codes"] for u in sites.values()]]
    svg = figures.bars(list(sites), ["fire", "there are"], alive, title="Codes in use, by site", y="codes")
    about = f"How many of the codes of a site fire at least once in {result['tokens']:,} tokens."
    drawn["usage"] = svg, f"{about} At a site head.L: of all heads of layer L."
    if "purity" in result:
        names, values = list(result["purity"]), list(result["purity"].values())
        layers = [f"layer {i}" for i in range(len(values[0]))]
        svg = figures.bars(layers, names, values, title="Purity of MLP codes, by layer", y="purity", cover=(0, 1))
        drawn["purity"] = svg, "Share of the MLP's codes in use that fire on one bigram (a state) or trigram (a state and a digit) only."
    svg = figures.scatter([p[:2] for p in points], title="Codes against neurons as detectors", x="precision of the best neuron",
                          y="precision of the best code", diagonal=True, cover=(0, 1))  # fmt: skip
    drawn["detectors"] = svg, (
        "A point for each feature: the precision of the code that detects it best, and of the best neuron with its threshold "
        "at the same recall. Above the line the code is the better detector."
    )
    if "control" in result:
        ways, wheres = list(result["control"]), ["first", "inside"]
        values, errors = ([[result["control"][w][where][name] for w in ways] for where in wheres] for name in ("control", "control_ci"))
        svg = figures.bars(ways, wheres, values, errors, title="Control, by what is forced", x="control", horizontal=True, cover=(0, 1))
        drawn["control"] = svg, (
            "Share of next states that follow the state b, after an intervention in a run that is in another state: at its first "
            "state, and inside a long sequence. Random and wrong codes must do no better than nothing at all (none)."
        )
    if "steering" in result:
        rows = result["steering"]["topics"]
        shares = [[row[measure] for row in rows.values()] for measure in ("before", "after", "random")]
        svg = figures.bars(list(rows), ["before", "after", "random codes"], shares, horizontal=True, cover=(0, 1),
                           title="Steering by topic", x="share of texts that mention the topic")  # fmt: skip
        drawn["steering"] = svg, "Generated texts that mention a topic: left alone, with its codes forced, and with as many random codes."
    return drawn


def page(run, recording, labels, result, drawn, n_contexts=6):
    """What report.html shows, a dict for write_report:

    title, about   what the page is about: a name, a sentence or two
    measures       [[name, value, note], ...]: the table at the top
    figures        [{"svg": ..., "caption": ...}, ...]
    vocab, group   the text of every token; group n: a space after the first token and then after every n; 0: none
    tokens, length the evaluation set, as one list, and how many of them are a sequence
    codes          [[name, count, what it stands for, precision, recall, places, next], ...]: places in `tokens`, and
                   next, the most probable next tokens when it is forced, [[token, probability], ...]
    free           the same when nothing is forced, averaged
    """
    alive = np.flatnonzero(recording.count)
    after, free = forced_distributions(recording, alive)
    rows = []
    for number, (code, best) in enumerate(zip(recording.names, labels)):
        kind, name, precision, recall, _ = best or (None, None, None, None, None)
        label = f"{kind} {name}" if best else None
        places = recording.places(number, n_contexts).tolist()
        rows.append([str(code), int(recording.count[number]), label, precision, recall, places, top(after.get(number))])
    used = max(place // recording.tokens.shape[1] for row in rows for place in row[5])
    return {
        "title": str(run.folder), "about": f"{run.data}. Codes recorded on {recording.tokens.size:,} tokens that it was not trained on.",
        "measures": measures(result),
        "figures": [{"svg": svg, "caption": caption} for svg, caption in drawn.values()], "vocab": run.data.vocabulary, "group": run.data.group,
        "length": recording.tokens.shape[1], "tokens": recording.tokens[: used + 1].ravel().tolist(), "codes": rows,
        "free": top(free),
    }  # fmt: skip


def write_report(path, data):
    """Writes the page of a run: report.html with the data of `page` in it, NaN as null. It asks for nothing else."""
    data = json.loads(json.dumps(data), parse_constant=lambda name: None)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(UNSAFE)
    write(path, TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text))


def top(p, n=5):
    """The n most probable tokens of a distribution: [[token, probability], ...]."""
    return [] if p is None else [[int(t), round(float(p[t]), 4)] for t in np.argsort(-p)[:n]]


def measures(result):
    """The figures of a result as rows for people: (name, value, note)."""
    d = result["detectors"]
    rows = [["code precision", f"{d['code_precision']:.3f}", "the best code of each feature, on average"],
            ["neuron precision", f"{d['neuron_precision']:.3f}", "the best neuron of each, at the same recall"],
            ["code wins", f"{d['code_wins']:.1%}", "share of features where the code is more precise"]]  # fmt: skip
    if "states_with_code" in d:
        rows.append(["states with a code", f"{d['states_with_code']:.1%}", "precision and recall at least 0.95"])
    for kind, values in result.get("purity", {}).items():
        rows.append([f"{kind} purity", " ".join(f"{v:.3f}" for v in values), "by layer"])
    if "seeds" in result:
        rows.append(["agreement of seeds", f"{result['seeds']['mean_iou']:.3f}", f"mean IoU; by chance {result['seeds']['chance']:.3f}"])
    return rows


def describe(result, folder):
    """The tables for the terminal."""
    lines = [f"{result['run']}: codes recorded on {result['tokens']:,} tokens", "", f"{'site':10}{'codes':>7}{'dead':>8}{'perplexity':>12}"]
    lines += [f"{site:10}{u['codes']:7}{u['dead_code_fraction']:8.1%}{u['perplexity']:12.1f}" for site, u in result["usage"].items()]
    lines += ["", *(f"{name:22}{value:>14}  {note}" for name, value, note in measures(result))]
    if "control" in result:
        n = "control   +-     JSD"
        lines += ["", f"{'forced':18}{'at the first state':>22}{'inside a sequence':>24}", f"{'':18}{n:>22}{n:>24}"]
        for way, where in result["control"].items():
            cells = (f"{w['control']:.3f} {w['control_ci']:.3f}   {w['jsd']:.3f}" for w in (where["first"], where["inside"]))
            lines.append(f"{way:18}" + "  ".join(f"{cell:>22}" for cell in cells))
    if "steering" in result:
        lines += ["", topics.describe(result["steering"])]
    lines += ["", f"{'best codes':18}{'':24}{'precision':>10}{'recall':>8}"]
    lines += [f"{r['code']:18}{r['kind'] + ' ' + r['label']:24}{r['precision']:10.3f}{r['recall']:8.3f}" for r in result["best_codes"]]
    return "\n".join([*lines, "", f"figures and all codes: {folder / 'report.html'}; every figure: {folder / 'interpret.json'}"])


if __name__ == "__main__":
    main()
