"""A picture of the claim: a sequence with what its codes stand for, and once more, steered."""

from contextlib import ExitStack

import numpy as np
import torch

from minicode.runtime.files import write
from minicode.study.detectors import best_labels, record_codes
from minicode.study.figures import Drawing
from minicode.study.lookup import FITS
from minicode.study.machine import copy_codes, steer

WIDTH = 720  # of the picture, in pixels
LEFT = 66  # where the first token stands
CELL = 61  # from one token to the next
GAP = 8  # between states
ROW = 42  # from one row of codes to the next
MOST_ROWS = 3
MOST_TOKENS = 10


def picture(run, recording, kinds, path):
    """Draws a run on TokFSM to a file: left alone, and with the codes of another state forced."""
    fsm = run.fsm
    if not fsm:
        raise ValueError("--picture is of TokFSM; on text: minicode.sample --force-code topic:NAME")
    room = min(MOST_TOKENS + fsm.digits, run.config.block_size - 1)
    n_states = room // fsm.digits
    if n_states < 3:
        raise ValueError("--picture needs a block with room for three states")
    given = 1 + (n_states + 1) // 2 * fsm.digits
    prompt = torch.from_numpy(recording.tokens[:1, :given])
    a = fsm.decode(prompt[0, 1:])[-1]
    in_common = fsm.transition_matrix @ fsm.transition_matrix[a]
    b = in_common.argmin()
    generator = torch.Generator(run.model.device).manual_seed(0)
    copy = copy_codes(run.model, run.sites())
    edits = []

    def intervene(tokens, b_run):
        edits.append(copy(tokens, b_run))
        return edits[-1]

    def go_on(tokens):
        """The sequence to its end, with its codes, while they are edited."""
        n_new = 1 + n_states * fsm.digits - tokens.shape[1]
        with ExitStack() as stack:
            for edit in edits:
                stack.enter_context(edit())
            tokens = run.model.generate(tokens, n_new, generator=generator)
            return record_codes(run.model, tokens.cpu().numpy())

    sheet = Sheet(fsm, recording, best_labels(recording, kinds), given)
    sheet.panel(f"Left alone in state {fsm.name(a)}", go_on(prompt), a)
    steered, _ = steer(fsm, run.model, prompt, [b], intervene, generator)
    heading = f"The same, but in orange the codes of state {fsm.name(b)} are forced"
    sheet.panel(heading, go_on(steered), b, range(given - 1, given - 1 + fsm.digits))
    write(path, sheet.svg())
    return {"picture": str(path)}, f"wrote {path}"


class Sheet(Drawing):
    """Panels, one below the other: digits, and below each what some of its codes stand for."""

    def __init__(self, fsm, recording, labels, given):
        self.fsm = fsm
        self.labels = labels
        self.given = given
        self.y = 106
        fits = np.array([bool(label) and label[-1] >= FITS for label in labels])
        often = fits[recording.fired].mean(0)  # by column of codes
        self.columns = np.sort(np.argsort(-often)[:MOST_ROWS])
        self.fits = fits
        height = self.y + 2 * (ROW * len(self.columns) + 104) - 40
        super().__init__("A sequence with its codes, and with others forced", WIDTH, height)
        self.text(0, 18, "Reading a network by its codes, and steering it", color="big ink")
        walk = f"only {fsm.n_edges} of its {fsm.n_states} states may follow a state"
        self.text(0, 42, f"A network reads the digits of a machine that walks at random: {walk}.")
        about = (
            "It sees no states. Below each digit: what its codes stand for (empty: no label fits)."
        )
        self.text(0, 60, about)

    def panel(self, heading, recording, state, forced=()):
        fsm = self.fsm
        tokens = recording.tokens[0]
        self.text(0, self.y, heading, color="big forced" if forced else "big ink")
        self.text(WIDTH - GAP, self.y, "written by the network", "end", "c0")
        # the first state is not shown: heads have nothing to look back at there
        for i, position in enumerate(range(1 + fsm.digits, len(tokens))):
            x = LEFT + CELL * i + GAP * (i // fsm.digits)
            color = "big ink" if position < self.given else "big c0"
            digit = fsm.vocabulary[tokens[position]]
            self.text(x + CELL / 2, self.y + 32, digit, "middle", color)
            numbers = recording.fired[position, self.columns]
            for row, number in enumerate(numbers):
                self.cell(x, self.y + 44 + ROW * row, number, position in forced)
        self.y += 44
        for column in self.columns:
            site, group = recording.columns[column]
            name, layer = site.split(".")
            self.text(0, self.y + 15, f"layer {layer}")
            self.text(0, self.y + 30, f"head {group}" if name == "head" else name.upper())
            self.y += ROW
        new = fsm.decode(tokens[self.given : self.given + fsm.digits])[0]
        right = "right" if fsm.transition_matrix[state, new] > 0 else "wrong"
        may = " ".join(map(fsm.name, fsm.successors[state][:10]))
        end = f"{fsm.name(state)} may be followed by {may}. The network went on"
        self.text(0, self.y + 16, f"{end} to {fsm.name(new)}: {right}.")
        self.y += 60

    def cell(self, x, y, number, forced):
        """What a code stands for, in two lines."""
        fits = self.fits[number]
        color = "forced" if forced else "tint" if fits else "bare"
        corner = f"M{x + 5} {y + 4}h{CELL - 10}v{ROW - 12}h{10 - CELL}z"
        self.shape(corner, color, 6, "currentColor")
        if fits:
            kind, name, *_ = self.labels[number]
            if kind == "trigram":
                state, digit = name.split()
                kind = f"state {state}"
                name = f"then {digit}"
            ink = "on" if forced else "ink"
            self.text(x + CELL / 2, y + 15, kind, "middle", f"small {ink}")
            self.text(x + CELL / 2, y + 29, name, "middle", f"bold {ink}")
