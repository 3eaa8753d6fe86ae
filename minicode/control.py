"""Reading and steering a network by its codes: record(model), force(model, codes), block(...).

They work on any module that holds codebooks. The first dimension of a codebook's input counts the
sequences, those between it and the last their positions. How a code is written: notation.py.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from minicode.codebook import Codebook, codebooks
from minicode.notation import Code, codebook_of
from minicode.runtime.arguments import check_ids, whole

GENERATED = "generated"  # the positions at which the tokens after the prompt are sampled


@contextmanager
def record(model):
    """Within the block, the codes that the last sequences chose: {"mlp.1": ids (B, T, G, k), ...}.

    G is the number of heads, or of an MLP's groups, else 1; in the order of choice, the strongest
    first; -1 where inputs passed through untouched. (B, T) is the leading shape of the codebook's
    own input. So codes["head.0"][0, 5, 3] is what head 3 of layer 0 chose at position 5 of the
    first sequence: (k,). Passes with a cache are joined, but not as beam search reorders them.
    ValueError if the model has no codebook, or none was run.
    """
    codes = {}
    names = {codebook: name for name, codebook in codebooks(model).items()}
    if not names:
        raise ValueError(f"{type(model).__name__} holds no codebook: there is nothing to record")

    @torch.compiler.disable
    def listen(codebook):
        check_alone(codebook)
        name = names[codebook]
        past = codebook.positions.past
        before = [codes[name][:, :past]] if past and name in codes else []
        codes[name] = torch.cat([*before, codebook.ids], dim=1)

    for codebook in names:
        codebook.listeners.append(listen)
    try:
        yield codes
        if not codes and any(codebook.enabled for codebook in names):
            raise ValueError("nothing was recorded: within the block no codebook was run")
    finally:
        for codebook in names:
            codebook.listeners.remove(listen)


def check_alone(codebook):
    """A ValueError in a copy that nn.DataParallel made: what it chooses is a part of the whole."""
    if getattr(codebook, "_is_replica", False):
        raise ValueError("codes are not recorded or forced on several GPUs: use model.module")


def force(model, codes, position=None):
    """Within the block, these codes are active (paper, section 4.3).

    codes     a code or a list of codes in the notation above, or a dict {"mlp.1": ids} with ids
              (G, k) for all sequences or (B, G, k) for each, as `record` gives for one position
    position  of the codes that name none themselves; None: everywhere

    If a forced code is chosen already nothing changes, to the last bit; else it takes the place of
    the last of the k chosen that is not forced itself. Blocks nest. ValueError for codes that
    don't exist; when the model runs, for more than k at a place; and on leaving the block, for a
    position that was never reached.
    """
    return _edit(model, codes, position, "forced")


def block(model, codes, position=None):
    """Within the block, these codes are never chosen: the choice is made as if they weren't there.

    So the next best take their slots; where none of them was chosen nothing changes, to the last
    bit. Arguments as for `force`.
    """
    return _edit(model, codes, position, "blocked")


def places(positions, a):
    """Where the N inputs of one pass of a codebook stand: n_rows, row, number, prompt.

    There are n_rows sequences; of each input (N,): its sequence, its position there, and how many
    tokens the prompt of that has. Of a (..., G, d) what passes through untouched is gone.
    """
    skip = positions.skip
    shape = a.shape[:-2] if skip is None else skip.shape
    n_rows = shape[0] if shape else 1
    number = positions.number
    prompt = positions.prompt
    if number is None:  # the model does not say: as they come
        number = torch.arange(shape[1:].numel(), device=a.device).unsqueeze(0)
        prompt = torch.full_like(number[:, :1], number.numel())
    row = torch.arange(n_rows, device=number.device).unsqueeze(1)
    standing = torch.stack(torch.broadcast_tensors(row, number, prompt)).flatten(1)  # (3, B * T)
    if skip is not None:
        standing = standing[:, ~skip.flatten()]
    return n_rows, *standing.to(a.device)


@dataclass(eq=False)
class _Edit:
    kind: str  # forced or blocked
    codebook: Codebook
    name: str  # as the user wrote it
    ids: torch.Tensor  # (B or 1, G, 1), -1 in groups that it is not about
    position: int | str | None
    reached: bool | None = None  # whether any input had such a position; None before the first

    def at(self, n_rows, row, number, prompt):
        """This edit's ids (N, G, 1) at these places, -1 wherever it is not about one."""
        if len(self.ids) not in (1, n_rows):
            there_are = f"there are codes for {len(self.ids)} sequences"
            raise ValueError(f"{self.name}: {there_are}, but the input has {n_rows}")
        here = number >= 0
        if self.position == GENERATED:
            here = number >= prompt - 1
        elif self.position is not None:
            wanted = self.position + (prompt if self.position < 0 else 0)
            if self.position < 0 and (wanted < 0).any():
                where = f"position {self.position}"
                raise ValueError(f"{self.name}: {where} is before the start of the prompt")
            here = number == wanted
        self.reached = bool(self.reached or here.any())
        ids = self.ids.to(here.device).expand(n_rows, -1, -1)[row]
        return ids.where(here.view(-1, 1, 1), -1)

    def unreached(self):
        """Why this edit of a position had no effect."""
        reason = "there was no input"
        if self.position is not None:
            reason = f"no input has a position {self.position}"
        if self.codebook.positions.skip is not None:
            but = "those that pass through untouched (padding, and a row's first token)"
            reason += f", but for {but}"
        return reason


class _Control(list):
    """The edits of one codebook, which asks here for its ids instead of searching."""

    @torch.compiler.disable
    def __call__(self, codebook, a):
        """Ids (..., G, k) for a (..., G, d)."""
        check_alone(codebook)
        if not a.numel() and codebook.positions.skip is None:  # an empty batch
            return codebook.search(a)
        here = places(codebook.positions, a)
        rows = a.reshape(-1, *a.shape[-2:])  # (N, G, d)
        forced = {edit: edit.at(*here) for edit in self if edit.kind == "forced"}
        blocked = {edit: edit.at(*here) for edit in self if edit.kind == "blocked"}
        ids = put_in(choose(codebook, rows, blocked), forced)
        for edit, never in blocked.items():
            if (ids == never).any():
                raise ValueError(f"{edit.name} is both forced and blocked")
        return ids.view(*a.shape[:-1], codebook.k)


def choose(codebook, a, blocked):
    """Ids (N, G, k) for a (N, G, d): where one of them is blocked, all chosen anew, without it."""
    ids = codebook.search(a)
    hit = torch.zeros(ids.shape[:-1], dtype=torch.bool, device=a.device)  # (N, G)
    for never in blocked.values():
        hit |= (ids == never).any(-1)
    at = hit.any(-1)  # (N,)
    if at.any():
        codes = torch.arange(codebook.n_codes, device=a.device)
        closed = torch.zeros_like(hit[at]).unsqueeze(-1)
        for never in blocked.values():
            closed = closed | (codes == never[at])  # (n, G, C)
        again = codebook.search(a[at], closed)
        ids[at] = again.where(hit[at].unsqueeze(-1), ids[at])
    return ids


def put_in(ids, forced):
    """Ids (N, G, k) with each forced code that is absent in the place of the last not forced."""
    held = torch.zeros_like(ids, dtype=torch.bool)  # slots of forced codes
    for wanted in forced.values():
        held |= ids == wanted
    k = ids.shape[-1]
    slots = torch.arange(k, device=ids.device)
    for edit, wanted in forced.items():
        absent = (wanted >= 0) & ~(ids == wanted).any(-1, keepdim=True)
        last = slots.where(~held, -1).amax(-1, keepdim=True)  # -1: all are held
        if (absent & (last < 0)).any():
            raise ValueError(f"{edit.name}: at most {k} codes can be forced at a site")
        put = absent & (slots == last)
        ids = wanted.where(put, ids)
        held |= put
    return ids


@contextmanager
def _edit(model, codes, position, kind):
    if position not in (None, GENERATED):
        position = whole("position", position, least=-(2**63))
    edits = [_Edit(kind, *asked) for asked in _read(model, codes, position)]
    try:
        for edit in edits:
            edit.codebook.control = edit.codebook.control or _Control()
            edit.codebook.control.append(edit)
        yield
        for edit in edits:
            if edit.reached is False:
                raise ValueError(f"{edit.name} had no effect: {edit.unreached()}")
    finally:
        for edit in edits:
            edit.codebook.control.remove(edit)
            if not edit.codebook.control:
                edit.codebook.control = None


def _read(model, codes, position):
    """What an _Edit holds, for each of codes as text, or as a dict {"mlp.1": ids (B, G, k)}."""
    if isinstance(codes, dict):
        for site, ids in codes.items():
            codebook = codebook_of(model, site, site)
            ids = check_ids(site, ids, codebook.groups, codebook.n_codes)
            for column in ids.reshape(-1, *ids.shape[-2:]).split(1, dim=-1):
                yield codebook, site, column, position
        return
    for text in dict.fromkeys([codes] if isinstance(codes, str) else codes):
        code = Code.parse(text, model)
        codebook = codebook_of(model, code.site, text)
        ids = torch.full((1, codebook.groups, 1), -1)
        ids[0, code.group or 0] = code.id
        where = position if code.position is None else code.position
        yield codebook, text, ids, where
