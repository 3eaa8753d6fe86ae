"""The page of a run, to look at: minicode/report.html with the data filled in. One file, which asks for nothing else."""

import json
from pathlib import Path

from minicode.run import write

TEMPLATE = Path(__file__).with_name("report.html")
UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}  # within a script, where a corpus must end nothing


def write_report(path, data):
    """Writes the page about a run.

    data: a dict that goes into the page as JSON, NaN as null:
    title, about   what the page is about: a name, a sentence or two
    measures       [[name, value, note], ...]: the table at the top
    figures        [{"svg": ..., "caption": ...}, ...]
    vocab, group   the text of every token; group n: a space after the first token and then after every n; 0: none
    tokens, length the evaluation set, as one list, and how many of them are a sequence
    codes          [[name, count, what it stands for, precision, recall, places, next], ...]: places in `tokens`, and
                   next, the most probable next tokens when it is forced, [[token, probability], ...]
    free           the same when nothing is forced, averaged
    """
    data = json.loads(json.dumps(data), parse_constant=lambda name: None)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(UNSAFE)
    write(path, TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text))
