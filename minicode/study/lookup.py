"""Codes looked up: those that detect a pattern; where one fires; those of another run."""

import re

import numpy as np

from minicode.notation import Code
from minicode.study.detectors import (
    agreement,
    agreement_on,
    best_labels,
    detect_one,
    forced_distributions,
    held_out,
    matches,
    record_codes,
    spread,
)

FITS = 0.5  # the least F1 at which a label is said to fit a code


def two_lines(kind, name):
    """A label in two short lines, such as "state 64" and "then 2"."""
    first, _, rest = name.partition(" ")
    if kind == "trigram":
        return f"state {first}", f"then {rest}"
    if kind == "digit before":
        return f"{first} before,", rest.removeprefix("at ")
    return kind, name


def search(run, recording, regex, precision=0.5, recall=0.1):
    """The codes that detect a regular expression so well, and the best three in any case."""
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise ValueError(f"--search {regex!r} is not a regular expression: {error}") from None
    found = detect_one(recording, matches(run.data.texts(recording.tokens), pattern) == 0)
    total = int(found.total)
    rows = []
    codes = []
    lines = ["code             precision  recall      F1"]
    for rank, i in enumerate(np.argsort(-found.f1, kind="stable")):
        row = {
            "code": str(recording.names[i]),
            "precision": found.precision[i].item(),
            "recall": found.recall[i].item(),
            "f1": found.f1[i].item(),
        }
        rows.append(row)
        remark = "   close, but below that"
        if row["precision"] >= precision and row["recall"] >= recall:
            codes.append(row)
            remark = ""
        if rank < 3 or not remark:
            figures = f"{row['precision']:10.3f}{row['recall']:8.3f}{row['f1']:8.3f}"
            lines.append(f"{row['code']:16}{figures}{remark}")
    least = f"precision >= {precision:g} and recall >= {recall:g}"
    about = (
        f"{regex!r} occurs {total} times in the {recording.tokens.size:,} held-out tokens that are "
        f"searched; {len(codes)} codes detect it with {least}"
    )
    if not total:
        lines = ["(the text is as --code shows it, with a space before each state or word)"]
    text = "\n".join([about, *lines[:41]])
    return {"search": regex, "matches": total, "codes": codes, "closest": rows[:3]}, text


def look_up(run, recording, kinds, code):
    """What one code stands for, and where it fires: at most 20 places, in context."""
    number = recording.names.index(Code(code.site, code.group, code.id))
    count = int(recording.count[number])
    nothing = ("", "none known", 0.0, 0.0, 0.0)
    kind, name, precision, recall, f1 = best_labels(recording, kinds)[number] or nothing
    texts = run.data.texts(recording.tokens)
    contexts = []
    for place in spread(recording.where[number], 20):
        row, at = divmod(int(place), recording.tokens.shape[1])
        before = "".join(texts[row][max(0, at - 8) : at])
        after = "".join(texts[row][at + 1 : at + 9])
        contexts.append(f"{before}[{texts[row][at]}]{after}")
    p = forced_distributions(recording, [number])[0][number]
    result = {
        "code": str(code),
        "count": count,
        "kind": kind,
        "label": name,
        "precision": precision,
        "recall": recall,
        "fits": f1 >= FITS,
        "contexts": contexts,
        "next": [[run.data.vocabulary[token], float(p[token])] for token in np.argsort(-p)[:10]],
    }
    size = recording.tokens.size
    text = [f"{code} fires at {count} of {size:,} positions ({count / size:.2%})"]
    if count:
        found = "stands for" if result["fits"] else "no label fits; nearest:"
        text.append(f"{found} {kind} {name}: precision {precision:.3f}, recall {recall:.3f}")
        text.append("in context:")
    text += [f"  {repr(context)[1:-1]}" for context in contexts]
    after = "  ".join(f"{word!r} {share:.2f}" for word, share in result["next"])
    return result, "\n".join([*text, f"when it is forced, next: {after}"])


def compare(run, recording, other):
    """Do the codes of another run on the same data fire where these do?"""
    if other.folder.resolve() == run.folder.resolve():
        raise ValueError(f"{other.folder} is the run itself: its codes agree")
    if other.data != run.data:
        raise ValueError(f"the runs in {run.folder} and {other.folder} are on different data")
    other.sites()
    theirs = record_codes(other.model, recording.tokens)
    result = {"with": str(other.folder), **agreement(recording, theirs, np.random.default_rng(0))}
    text = [
        f"codes against their nearest in {other.folder}: mean intersection over union "
        f"{result['mean_iou']:.3f} (by chance: {result['chance']:.3f}); weighted by how often they "
        f"fire {result['weighted_iou']:.3f} ({result['weighted_chance']:.3f})"
    ]
    result["labels"] = {}
    for kind, (labels, names) in held_out(run)[1].items():
        shared = result["labels"][kind] = agreement_on(recording, theirs, labels, names)
        text.append(f"of label {kind}, the two codes that detect it best: {shared:.3f}")
    return result, "\n".join(text)
