"""A picture of the claim: a sequence with what its codes stand for, and once more, steered."""

from contextlib import ExitStack

import numpy as np
import torch

from minicode.runtime.files import write
from minicode.study.detectors import best_labels, record_codes
from minicode.study.figures import Drawing
from minicode.study.lookup import FITS, two_lines
from minicode.study.machine import copy_codes, steer

# in pixels
WIDTH = 720
LEFT = 66  # of the first token
CELL = 61  # from one token to the next
GAP = 8  # between states
ROW = 42  # from one row of codes to the next
MOST_ROWS = 3
PANEL = 104 + ROW * MOST_ROWS
HEIGHT = 24 + 2 * PANEL

MOST_TOKENS = 10


def picture(run, recording, kinds, path):
    """Draws a run on TokFSM to a file: left alone, and with the codes of another state forced."""
    fsm = run.fsm
    if not fsm:
        raise ValueError("--picture is of TokFSM; on text: minicode.sample --force-code topic:NAME")
    # the first state is not shown: heads have nothing to look back at there
    n_states = min(fsm.digits + MOST_TOKENS, run.config.block_size - 1) // fsm.digits
    if n_states < 3:
        raise ValueError("--picture needs a block with room for three states")
    given = 1 + (n_states + 1) // 2 * fsm.digits
    prompt = torch.from_numpy(recording.tokens[:1, :given])
    a = fsm.decode(prompt[0, 1:])[-1]
    # the state whose successors are the least like those of a: what comes next tells them apart
    in_common = fsm.transition_matrix @ fsm.transition_matrix[a]
    b = in_common.argmin()
    generator = torch.Generator(run.model.device).manual_seed(0)

    def go_on(sites):
        """The sequence to its end, with its codes; b's codes are forced at these sites."""
        copy = copy_codes(run.model, sites)
        tokens, _, edits = steer(fsm, run.model, prompt, [b], copy, generator)
        n_new = 1 + n_states * fsm.digits - tokens.shape[1]
        with ExitStack() as stack:
            for edit in edits:
                stack.enter_context(edit())
            tokens = run.model.generate(tokens, n_new, generator=generator)
            return record_codes(run.model, tokens.cpu().numpy())

    sheet = Sheet(fsm, recording, best_labels(recording, kinds), given)
    sheet.panel(64, go_on([]), a, f"Left alone in state {fsm.name(a)}")
    heading = f"The same, but in orange the codes of state {fsm.name(b)} are forced"
    sheet.panel(64 + PANEL, go_on(run.sites()), b, heading, steered=True)
    write(path, sheet.svg())
    return {"picture": str(path)}, f"wrote {path}"


class Sheet(Drawing):
    """Panels, one below the other: digits, and below each what some of its codes stand for.

    recording, labels   by which the columns of codes are chosen that have the most to say
    given               tokens of the sequence that the network did not write
    """

    def __init__(self, fsm, recording, labels, given):
        super().__init__("Reading a network by its codes, and steering it", WIDTH, HEIGHT)
        self.fsm = fsm
        self.given = given
        self.labels = {}  # by the code's number: what it stands for, in two lines
        for number, label in enumerate(labels):
            if label and label[-1] >= FITS:
                kind, name, *_ = label
                self.labels[number] = two_lines(kind, name)
        # the columns of codes that have a label at the most positions
        often = np.isin(recording.fired, [*self.labels]).mean(0)
        self.columns = np.sort(np.argsort(-often)[:MOST_ROWS])
        places = f"the codes at {MOST_ROWS} places in the network stand for"
        self.text(0, 18, f"Below each digit: what {places} (empty: no label fits).")

    def panel(self, y, recording, state, heading, steered=False):
        """A sequence with its codes, and whether what follows its given part may follow a state.

        y           where its heading stands
        recording   the sequence, as record_codes has it
        state       what the network is in, or is made to act as if in
        steered     codes were forced at the last digit given, and at the new ones before the last
        """
        fsm = self.fsm
        tokens = recording.tokens[0]
        self.text(0, y, heading, look="big forced" if steered else "big ink")
        self.text(WIDTH - GAP, y, "written by the network", "end", "c0")
        for row, column in enumerate(self.columns):
            site, head = recording.columns[column]
            name = f"{site}.{head}" if site.startswith("head") else site
            self.text(0, y + 66 + ROW * row, name)
        for i, position in enumerate(range(1 + fsm.digits, len(tokens))):
            x = LEFT + CELL * i + GAP * (i // fsm.digits)
            after = position - self.given  # of the first new token
            look = "big c0" if after >= 0 else "big ink"
            digit = fsm.vocabulary[tokens[position]]
            self.text(x + CELL / 2, y + 32, digit, "middle", look)
            forced = steered and -1 <= after < fsm.digits - 1
            for row, number in enumerate(recording.fired[position, self.columns]):
                self.cell(x, y + 44 + ROW * row, number, forced)
        new = fsm.decode(tokens[self.given :])[0]
        right = "right" if new in fsm.successors[state] else "wrong"
        may = " ".join(map(fsm.name, fsm.successors[state][:10]))
        follow = f"{fsm.name(state)} may be followed by {may}"
        went_on = f"The network went on to {fsm.name(new)}: {right}."
        self.text(0, y + PANEL - 44, f"{follow}. {went_on}")

    def cell(self, x, y, number, forced):
        """What a code stands for, in two lines; empty where no label fits."""
        kind, name = self.labels.get(number, ("", ""))
        color = "tint" if name else "bare"
        ink = "ink"
        if forced:
            color = "forced"
            ink = "on"
        box = f"M{x + 5} {y + 4}h{CELL - 10}v{ROW - 12}h{10 - CELL}z"
        self.shape(box, f"{color} filled", 6)
        middle = x + CELL / 2
        self.text(middle, y + 15, kind, "middle", f"small {ink}")
        self.text(middle, y + 29, name, "middle", f"bold {ink}")
