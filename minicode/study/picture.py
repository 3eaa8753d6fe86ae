"""A picture of the claim: a sequence with what its codes stand for, and again with others forced."""

from contextlib import ExitStack

import torch

from minicode.control import Code, record
from minicode.model import evaluating
from minicode.runtime.files import write
from minicode.study.detectors import best_labels
from minicode.study.figures import Drawing
from minicode.study.lookup import FITS
from minicode.study.machine import copy_codes, steer

WIDTH = 720  # of the picture, in pixels
LEFT = 76  # where the first token stands
GAP = 8  # between two states
HIGH = 34  # a cell
MOST_TOKENS = 12
MOST_ROWS = 3
WORDS = {"state": "state", "trigram": "state", "bigram": "digits", "digit": "digit"}


def picture(run, recording, kinds, path):
    """Draws a run on TokFSM to a file: left alone, and with the codes of another state forced."""
    fsm = run.fsm
    if not fsm:
        raise ValueError("--picture is of TokFSM; on text: minicode.sample --force-code topic:NAME")
    n_states = min(MOST_TOKENS, run.config.block_size - 1) // fsm.digits
    if n_states < 2:
        raise ValueError("--picture needs a block with room for two states")
    length = 1 + n_states * fsm.digits
    given = 1 + n_states // 2 * fsm.digits
    prompt = torch.from_numpy(recording.tokens[:1, :given])
    a = int(fsm.decode(prompt[0, 1:])[-1])
    shared = fsm.transition_matrix @ fsm.transition_matrix[a]
    b = int(shared.argmin())  # the fewest successors in common
    copy = copy_codes(run.model, run.sites())
    edits = []

    def intervene(tokens, b_run):
        edits.append(copy(tokens, b_run))
        return edits[-1]

    generator = torch.Generator(run.model.device).manual_seed(0)
    steered, _ = steer(fsm, run.model, prompt, [b], intervene, generator)
    sheet = Sheet(fsm, readable(recording, kinds), given, length)
    sheet.introduce(fsm)
    sheet.panel(f"Left alone in state {fsm.name(a)}", a, *go_on(run.model, prompt, length, []))
    forced = range(given - 1, given - 1 + fsm.digits)
    heading = f"The same, with the codes of state {fsm.name(b)} forced"
    sheet.panel(heading, b, *go_on(run.model, steered, length, edits), forced)
    write(path, sheet.svg())
    return {"picture": str(path), "state": fsm.name(a), "forced": fsm.name(b)}, f"wrote {path}"


def go_on(model, tokens, length, edits):
    """Continues tokens (1, T) under edits: tokens (1, length), and their codes as of `record`."""
    generator = torch.Generator(model.device).manual_seed(0)
    with ExitStack() as stack, evaluating(model):
        for edit in edits:
            stack.enter_context(edit())
        tokens = tokens.to(model.device)
        tokens = model.generate(tokens, length - tokens.shape[1], generator=generator)
        codes = stack.enter_context(record(model))
        model(tokens)
        return tokens[0].tolist(), dict(codes)


def readable(recording, kinds):
    """The columns (site, group) whose codes are labelled the most often: {column: {id: label}}."""
    labelled = {column: {} for column in recording.columns}
    often = dict.fromkeys(labelled, 0)
    for code, label, count in zip(recording.names, best_labels(recording, kinds), recording.count):
        if label and label[-1] >= FITS:
            column = code.site, code.group
            labelled[column][code.id] = label
            often[column] += count
    best = sorted(often, key=often.get)[-MOST_ROWS:]
    return {column: labels for column, labels in labelled.items() if column in best}


class Sheet(Drawing):
    """The picture: rows of cells, one above the other."""

    def __init__(self, fsm, rows, given, length):
        self.rows = rows
        self.fsm = fsm
        self.given = given
        self.bottom = 76
        self.step = (WIDTH - LEFT - GAP * (length // fsm.digits)) / (length - 1)
        height = self.bottom + 2 * (108 + (HIGH + 4) * len(rows))
        super().__init__("A sequence with its codes, and with others forced", WIDTH, height)

    def introduce(self, fsm):
        self.text(0, 18, "Reading a network by its codes, and steering it by forcing them", color="big")
        intro = (
            "The network reads digits. They are the states of a machine that walks from state to "
            "state, where only",
            f"{fsm.n_edges} of {fsm.n_states} may follow a state. Nobody told it of states; below each digit stands what its codes stand for.",
        )
        self.text(0, 42, intro[0])
        self.text(0, 60, intro[1])

    def x(self, position):
        """Of the cell of a token."""
        i = position - 1
        return LEFT + i * self.step + i // self.fsm.digits * GAP

    def cell(self, x, y, color):
        self.shape(f"M{x + 4:.1f} {y + 3}h{self.step - 10:.1f}v{HIGH - 6}h{10 - self.step:.1f}z", color, 6, "currentColor")

    def panel(self, heading, state, tokens, codes, forced=()):
        top = self.bottom
        fsm = self.fsm
        self.text(0, top + 14, heading, color="big")
        self.text(self.x(self.given), top + 14, "the network writes on")
        top += 24
        self.text(0, top + 20, "digits")
        for position in range(1, len(tokens)):
            middle = self.x(position) + self.step / 2 - 1
            color = "big c0" if position >= self.given else "big"
            self.text(middle, top + 20, fsm.vocabulary[tokens[position]], "middle", color)
        top += 30
        for (site, group), labels in self.rows.items():
            name, layer = site.split(".")
            self.text(0, top + 15, f"layer {layer}")
            self.text(0, top + 30, f"head {group}" if name == "head" else name.upper())
            for position in range(1, len(tokens)):
                of_token = codes[site][0, position, group].tolist()
                found = [labels[i] for i in of_token if i in labels]
                color = "forced" if position in forced else "tint" if found else "bare"
                self.cell(self.x(position), top, color)
                if found:
                    kind, text, *_ = found[0]
                    head, *rest = text.split()
                    lines = [f"{WORDS[kind]} {head}", *(f"then {digit}" for digit in rest)]
                    middle = self.x(position) + self.step / 2 - 1
                    for i, line in enumerate(lines):
                        self.text(middle, top + 21 - 6.5 * (len(lines) - 1) + 13 * i, line, "middle", "small on" if position in forced else "small label")
            top += HIGH + 4
        new = int(fsm.decode(tokens[self.given : self.given + fsm.digits])[0])
        may = " ".join(fsm.name(s) for s in fsm.successors[state][:10])
        right = "right" if fsm.transition_matrix[state, new] else "wrong"
        self.text(0, top + 18, f"What may follow {fsm.name(state)}: {may}. The network went on to {fsm.name(new)}: {right}.")
        self.bottom = top + 50
