"""The page of a run: report.html with its data in it."""

import json
from pathlib import Path

import numpy as np

from minicode.runtime.files import write
from minicode.study.detectors import forced_distributions
from minicode.study.lookup import FITS

TEMPLATE = Path(__file__).with_name("report.html")


def page(run, recording, labels, rows_of_measures, drawn):
    """What report.html shows, a dict for write_report:

    title, about   what the page is about: a name, a sentence or two
    measures       [[name, value, note], ...]: the table at the top
    figures        [{"svg": ..., "caption": ...}, ...]
    vocab          the text of every token
    group          n: a space after the first token and then after every n; 0: none
    tokens, length the evaluation set, as one list, and how many of them are a sequence
    codes          [[name, count, what it stands for, precision, recall, places, next], ...]:
                   places in `tokens`, and next, the most probable next tokens when it is forced,
                   [[token, probability], ...]
    fits           the least F1 at which a label is said to fit
    free           as next, when nothing is forced, averaged
    """
    after, free = forced_distributions(recording, np.flatnonzero(recording.count))
    codes = []
    for number, (code, best) in enumerate(zip(recording.names, labels)):
        label = precision = recall = None
        if best:
            kind, name, precision, recall, _ = best
            label = f"{kind} {name}"
        places = recording.places(number, 6).tolist()
        follow = top(after[number]) if places else []
        count = int(recording.count[number])
        codes.append([str(code), count, label, precision, recall, places, follow])
    n_tokens = f"{recording.tokens.size:,}"
    return {
        "title": str(run.folder),
        "about": f"{run.data}. Codes recorded on {n_tokens} tokens that it was not trained on.",
        "measures": rows_of_measures,
        "figures": [{"svg": svg, "caption": caption} for svg, caption in drawn.values()],
        "vocab": run.data.vocabulary,
        "group": run.data.group,
        "length": recording.tokens.shape[1],
        "tokens": recording.tokens.ravel().tolist(),
        "codes": codes,
        "fits": FITS,
        "free": top(free),
    }


def write_report(path, data):
    """Writes a run's page: report.html with the data of `page` in it, NaN as null."""
    data = json.loads(json.dumps(data), parse_constant=lambda name: None)
    # In a script, whatever stands in a corpus must end nothing.
    text = json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")
    write(path, TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text))


def top(p):
    """The five most probable tokens of a distribution: [[token, probability], ...]."""
    return [[int(token), round(float(p[token]), 4)] for token in np.argsort(-p)[:5]]
