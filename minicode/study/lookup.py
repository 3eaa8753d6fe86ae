"""Codes looked up: those that detect a pattern; where one of them fires."""

import numpy as np

from minicode.control import Code
from minicode.study.detectors import best_labels, detect, forced_distributions, matches


def search(run, recording, pattern, args):
    """The codes that detect a pattern, best first."""
    found = detect(recording, matches(run.data.texts(recording.tokens), pattern), [pattern.pattern])
    good = np.flatnonzero(
        (found.precision[:, 0] >= args.precision) & (found.recall[:, 0] >= args.recall)
    )
    rows = [
        {
            "code": str(recording.names[i]),
            "precision": found.precision[i, 0],
            "recall": found.recall[i, 0],
            "f1": found.f1[i, 0],
        }
        for i in good[np.argsort(-found.f1[good, 0], kind="stable")]
    ]
    lines = [
        f"{row['code']:16}{row['precision']:10.3f}{row['recall']:8.3f}{row['f1']:8.3f}"
        for row in rows[:40]
    ]
    least = f"precision >= {args.precision:g} and recall >= {args.recall:g}"
    about = f"{pattern.pattern!r} occurs {found.total[0]} times in {recording.tokens.size:,} tokens; {len(rows)} codes detect it with {least}"
    table = [f"{'code':16}{'precision':>10}{'recall':>8}{'F1':>8}", *lines] if rows else []
    return {"search": pattern.pattern, "matches": int(found.total[0]), "codes": rows}, "\n".join(
        [about, *table]
    )


def look_up(run, recording, kinds, code, most=20, reach=8):
    """What one code stands for, and where it fires."""
    number = recording.names.index(Code(code.site, code.group, code.id))
    kind, name, precision, recall, _ = best_labels(recording, kinds)[number] or (
        "",
        "nothing known",
        0.0,
        0.0,
        0.0,
    )
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
    text = [
        f"{code} fires at {recording.count[number]} of {recording.tokens.size:,} positions ({share:.2%})"
    ]
    text += (
        [
            f"best described as {kind} {name}: precision {precision:.3f}, recall {recall:.3f}",
            "in context:",
        ]
        if contexts
        else []
    )
    text += [f"  {repr(context)[1:-1]}" for context in contexts]
    return result, "\n".join(
        [*text, "when it is forced, next: " + "  ".join(f"{word!r} {q:.2f}" for word, q in after)]
    )
