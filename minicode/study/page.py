"""The page of a run: report.html, with its style, its scripts and its data in it."""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np

from minicode.model import GPT
from minicode.runtime.files import write
from minicode.study.demonstration import far_state
from minicode.study.detectors import by_merit
from minicode.study.lookup import FITS
from minicode.study.portrait import portraits

FOLDER = Path(__file__).parent
SCRIPTS = (
    "data",
    "network",
    "sequence",
    "prompt",
    "touch",
    "written",
    "list",
    "code",
    "report",
)
LIMIT = 10_000_000  # bytes of a page
MOST_CODES = 8192  # that it shows: of more, those with the best labels
N_PROMPT = 16  # tokens of the prompt; of stories, with room for any topic:
OPENING = "Once upon a time, there was a girl named Lily. One day, Lily saw a"
MOST_CHOICES = 400_000  # codes at the positions of the sequences that it shows


def page(run, recording, kinds, labels, result, drawn):
    """What report.html shows, a dict for write_report; `measures` is added to it:

    title, about    what the page is about: a name, a sentence or two
    figures         [{"svg": ..., "caption": ...}, ...]
    vocab           the text of every token
    group           n: a space after the first token and then after every n; 0: none
    tokens, length  the evaluation set, as one list, and how many of them are a sequence
    codes           a list for each, as in portraits; and left_out: how many there are beyond them
    fits            the least F1 at which a label is said to fit
    machine         of TokFSM: its successors, and the states a, b of the demonstration
    steered         [[topic, [its codes, ...]], ...]
    prompt          what the network reads first
    network         the network itself, as in `weights`; None if it is not ours, or too large
    states          without a network: the codes at each position of the first sequences
    """
    ranked = by_merit(recording, labels)[:MOST_CODES]
    n_tokens = f"{recording.tokens.size:,}"
    topics = result.get("steering", {}).get("topics", {})
    data = {
        "title": str(run.folder),
        "about": f"{run.data}. Codes recorded on {n_tokens} tokens that it was not trained on.",
        "figures": [{"svg": svg, "caption": caption} for svg, caption in drawn.values()],
        "vocab": run.data.vocabulary,
        "group": run.data.group,
        "length": recording.tokens.shape[1],
        "tokens": recording.tokens.ravel().tolist(),
        "codes": portraits(recording, kinds, labels, ranked),
        "left_out": len(recording.names) - len(ranked),
        "fits": FITS,
        "machine": machine(run.fsm) if run.fsm else None,
        "steered": [[name, row["codes"]] for name, row in topics.items()],
        "prompt": OPENING if run.data.topics else run.data.show(recording.tokens[0, :N_PROMPT]),
        "network": None,
        "states": [],
    }
    if isinstance(run.model, GPT):
        network = weights(run.model)
        if len(as_json(data)) + len(as_json(network)) < LIMIT:
            return {**data, "network": network}
    return {**data, "states": states(recording, np.sort(ranked))}


def weights(model):
    """A GPT as network.js reads it; its numbers are float32, in base64."""
    parameters = dict(model.named_parameters())
    numbers = [
        weight.detach().cpu().numpy().astype("<f4").tobytes() for weight in parameters.values()
    ]
    return {
        "config": vars(model.config),
        "parameters": [[name, list(weight.shape)] for name, weight in parameters.items()],
        "numbers": base64.b64encode(b"".join(numbers)).decode(),
    }


def machine(fsm):
    """What the page knows of a machine, and what `sample --force-code` demonstrates on it."""
    rng = np.random.default_rng(0)
    a = rng.integers(fsm.n_states)
    return {
        "digits": fsm.digits,
        "states": [fsm.name(state) for state in range(fsm.n_states)],
        "successors": fsm.successors.tolist(),
        "demonstration": [fsm.name(a), fsm.name(far_state(fsm, a, rng))],
    }


def states(recording, shown):
    """The codes at each position of the first sequences, as places in `shown`: nested lists."""
    place = np.full(len(recording.names) + 1, -1)
    place[shown] = np.arange(len(shown))
    n, length = recording.tokens.shape
    found = []
    n_choices = 0
    for row in recording.fired.reshape(n, length, -1):
        found.append([at[at >= 0].tolist() for at in place[row]])
        n_choices += sum(map(len, found[-1]))
        if n_choices > MOST_CHOICES:
            break
    return found


def as_json(data):
    """Data for a script of the page: whatever stands in a corpus must end nothing. NaN as null."""
    data = json.loads(json.dumps(data), parse_constant=lambda name: None)
    return json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")


def write_report(path, data):
    """Writes a run's page, a file that needs no other: report.html, with the data of `page`."""
    script = "\n".join((FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "digest": digest,  # by which the browser knows the page's own script, and runs no other
        "style": (FOLDER / "report.css").read_text(encoding="utf-8"),
        "script": script,
        "data": as_json(data),
    }
    text = (FOLDER / "report.html").read_text(encoding="utf-8")
    for name, part in parts.items():  # the data last: it may hold anything
        text = text.replace("{{" + name + "}}", part)
    write(path, text)
