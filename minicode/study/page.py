"""The page of a run: report.html with its data in it."""

import json
from pathlib import Path

import numpy as np

from minicode.runtime.files import write
from minicode.study.detectors import forced_distributions

TEMPLATE = Path(__file__).with_name("report.html")


UNSAFE = {
    ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"
}  # within a script, where a corpus must end nothing


def page(run, recording, labels, rows_of_measures, drawn, n_contexts=6):
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
        rows.append(
            [
                str(code),
                int(recording.count[number]),
                label,
                precision,
                recall,
                places,
                top(after.get(number)),
            ]
        )
    used = max(place // recording.tokens.shape[1] for row in rows for place in row[5])
    return {
        "title": str(run.folder), "about": f"{run.data}. Codes recorded on {recording.tokens.size:,} tokens that it was not trained on.",
        "measures": rows_of_measures,
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
