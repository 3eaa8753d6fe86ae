"""Reading and steering a network by its codes: record(model), force(model, codes), block(...).

As in the paper's tables, a code is written mlp.LAYER.CODE, or head.LAYER.HEAD.CODE, or
mlp.LAYER.GROUP.CODE where an MLP's codebook has groups, with @POSITION behind it where one position
is meant: mlp.1.527, head.0.3.12@4, mlp.1.527@-1 (from the end of the prompt).
"""

import operator
import re
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from minicode.model import evaluating

GENERATED = "generated"  # the positions at which the tokens after the prompt are sampled
# Site, group, code, position.
NOTATION = re.compile(r"(\w+\.\d+)(?:\.(\d+))?\.(\d+)(?:@(-?\d{1,9}))?")


@dataclass(frozen=True)
class Code:
    """One code, such as mlp.1.527@4."""

    site: str  # such as "mlp.1"
    group: int | None  # the head, or the MLP's group; None where the site has but one codebook
    id: int
    position: int | None = None  # None: everywhere

    def __str__(self):
        group = "" if self.group is None else f".{self.group}"
        place = "" if self.position is None else f"@{self.position}"
        return f"{self.site}{group}.{self.id}{place}"

    @classmethod
    def parse(cls, text, model):
        """The code that a text names, if the model has it; else a ValueError that says what is."""
        match = NOTATION.fullmatch(text)
        if not match:
            wanted = "mlp.LAYER.CODE or head.LAYER.HEAD.CODE, and @POSITION for one position"
            raise ValueError(f"{text!r} is not a code: write {wanted}, as in mlp.1.527@4")
        site, *numbers = match.groups()
        codebook = codebook_of(model, site, text)
        group, number, position = (None if part is None else int(part) for part in numbers)
        part = "head" if site.startswith("head.") else "group"
        if (group is None) != (codebook.groups == 1):
            several = f"{site}.{part.upper()}.CODE, for it has {codebook.groups} {part}s"
            wanted = several if codebook.groups > 1 else f"{site}.CODE"
            raise ValueError(f"{text}: write {wanted}")
        for what, value, n in (
            (part, group or 0, codebook.groups),
            ("code", number, codebook.n_codes),
        ):
            if value >= n:
                there_are = f"its {what}s are 0 to {n - 1}"
                raise ValueError(f"{text}: {site} has no {what} {value}; {there_are}")
        return cls(site, group, number, position)


def codes_of(site, codebook):
    """All codes of a codebook, group by group: G * C of them."""
    groups = range(codebook.groups) if codebook.groups > 1 else [None]
    return [Code(site, group, number) for group in groups for number in range(codebook.n_codes)]


def codebook_of(model, site, text):
    """The model's codebook of that name, or a ValueError."""
    codebooks = model.codebooks()
    if site not in codebooks:
        sites = ", ".join(codebooks) or "no site at all"
        raise ValueError(f"{text}: this model has no codebook at {site}; it has them at {sites}")
    if not codebooks[site].enabled:
        raise ValueError(f"{text}: the codebooks of this model are switched off")
    return codebooks[site]


@contextmanager
def record(model):
    """Within the block, the codes that the last sequences chose: {"mlp.1": ids (B, T, G, k), ...}.

    G is the number of heads, or of an MLP's groups, else 1; in the order of choice, the strongest
    first. Passes with a cache are joined. So codes["head.0"][0, 5, 3] is what head 3 of layer 0
    chose at position 5 of the first sequence: (k,).
    """
    codes = {}

    def keep(name, codebook, inputs, output):
        if codebook.enabled:
            past = [codes[name]] if model.span.start and name in codes else []
            codes[name] = torch.cat([*past, codebook.ids], dim=1)

    with ExitStack() as stack:
        for name, codebook in model.codebooks().items():
            stack.enter_context(codebook.register_forward_hook(partial(keep, name)))
        yield codes


def chosen(model, tokens):
    """What every codebook chooses at the end of tokens (B, T): {"mlp.1": ids (B, G, k), ...}."""
    with evaluating(model), record(model) as codes:
        model(tokens.to(model.device))
    return {site: ids[:, -1] for site, ids in codes.items()}


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


@dataclass(eq=False)
class _Edit:
    kind: str  # forced or blocked
    name: str  # as the user wrote it
    ids: torch.Tensor  # (B or 1, 1, G, 1), -1 in groups that it is not about
    position: int | str | None
    reached: bool | None = None  # whether any input had such a position; None before the first

    def where(self, model, a):
        """The places of a (B, T, G, d) that this edit is about: bool (B or 1, T, G, 1)."""
        if len(self.ids) not in (1, len(a)):
            there_are = f"there are codes for {len(self.ids)} sequences"
            raise ValueError(f"{self.name}: {there_are}, but the input has {len(a)}")
        span = model.span  # the positions of this pass
        start, stop = 0, span.stop
        if self.position == GENERATED:
            start = model.prompt_length - 1
        elif self.position is not None:
            start = self.position + (model.prompt_length if self.position < 0 else 0)
            stop = start + 1
        if start < 0:
            where = f"position {self.position}"
            raise ValueError(f"{self.name}: {where} is before the start of the prompt")
        self.reached = bool(self.reached) or (start < span.stop and stop > span.start)
        at = torch.arange(span.start, span.stop, device=a.device).view(1, -1, 1, 1)
        return (at >= start) & (at < stop) & (self.ids >= 0)


class _Control:
    """The edits of one codebook, which asks here for its ids instead of searching."""

    def __init__(self, model, codebook):
        self.model = model
        self.codebook = codebook
        self.edits = []

    def __call__(self, a):
        """Ids (B, T, G, k) for a (B, T, G, d)."""
        places = {edit: edit.where(self.model, a) for edit in self.edits}
        forced = {edit: place for edit, place in places.items() if edit.kind == "forced"}
        blocked = {edit: place for edit, place in places.items() if edit.kind == "blocked"}
        ids = self.choose_again(a, self.codebook.search(a), blocked)
        ids = self.put_in(ids, forced)
        for edit, place in blocked.items():
            if (place & (ids == edit.ids)).any():
                raise ValueError(f"{edit.name} is both forced and blocked")
        return ids

    def choose_again(self, a, ids, blocked):
        """Wherever a blocked code was chosen, all codes are chosen anew, without it."""
        hit = torch.zeros(ids.shape[:-1], dtype=torch.bool, device=a.device)  # (B, T, G)
        for edit, place in blocked.items():
            hit |= (place & (ids == edit.ids)).any(-1)
        at = hit.any(-1)  # (B, T), n of them true
        if not at.any():
            return ids
        numbers = torch.arange(self.codebook.n_codes, device=a.device)
        never = torch.zeros(1, dtype=torch.bool, device=a.device)
        for edit, place in blocked.items():
            never = never | (place & (numbers == edit.ids)).expand(*hit.shape, -1)[at]  # (n, G, C)
            if ((~never).sum(-1) < self.codebook.k).any():
                most = self.codebook.n_codes - self.codebook.k
                raise ValueError(f"{edit.name}: at most {most} codes can be blocked at a site")
        again = ids.clone()
        again[at] = self.codebook.search(a[at], never)
        return again.where(hit.unsqueeze(-1), ids)

    def put_in(self, ids, forced):
        """Each forced code that is absent takes the place of the last that is not forced."""
        held = torch.zeros_like(ids, dtype=torch.bool)  # slots of forced codes
        for edit, place in forced.items():
            held |= place & (ids == edit.ids)
        slots = torch.arange(self.codebook.k, device=ids.device)
        for edit, place in forced.items():
            absent = place & ~(ids == edit.ids).any(-1, keepdim=True)
            last = slots.where(~held, -1).amax(-1, keepdim=True)  # -1: all are held
            if (absent & (last < 0)).any():
                most = self.codebook.k
                raise ValueError(f"{edit.name}: at most {most} codes can be forced at a site")
            put = absent & (slots == last)
            ids = edit.ids.where(put, ids)
            held |= put
        return ids


@contextmanager
def _edit(model, codes, position, kind):
    if position not in (None, GENERATED):
        position = operator.index(position)
    read = _read_ids if isinstance(codes, dict) else _read_names
    edits = [(book, _Edit(kind, *edit)) for book, *edit in read(model, codes, position)]
    try:
        for codebook, edit in edits:
            codebook.control = codebook.control or _Control(model, codebook)
            codebook.control.edits.append(edit)
        yield
        for _, edit in edits:
            if edit.reached is False:
                reached = f"no input has a position {edit.position}"
                raise ValueError(f"{edit.name} had no effect: {reached}")
    finally:
        for codebook, edit in edits:
            codebook.control.edits.remove(edit)
            if not codebook.control.edits:
                codebook.control = None


def _read_names(model, codes, position):
    """A code or a list of codes, as text: a codebook, and what an _Edit holds, for each."""
    for text in dict.fromkeys([codes] if isinstance(codes, str) else codes):
        code = Code.parse(text, model)
        codebook = model.codebooks()[code.site]
        device = codebook.codes.device
        ids = torch.full((1, 1, codebook.groups, 1), -1, device=device)
        ids[0, 0, code.group or 0] = code.id
        where = position if code.position is None else code.position
        yield codebook, text, ids, where


def _read_ids(model, codes, position):
    """A dict {"mlp.1": ids (G, k) or (B, G, k)}: a codebook, and what an _Edit holds, for each."""
    for site, ids in codes.items():
        codebook = codebook_of(model, site, site)
        ids = torch.as_tensor(ids, device=codebook.codes.device)
        if ids.dim() not in (2, 3) or ids.shape[-2] != codebook.groups:
            wanted = f"({codebook.groups}, k) or (B, {codebook.groups}, k)"
            raise ValueError(f"{site}: ids must be {wanted}, not {tuple(ids.shape)}")
        if ids.is_floating_point() or not ids.shape[-1]:
            raise ValueError(f"{site}: ids must be whole numbers, at least one for each group")
        most = codebook.n_codes - 1
        if ids.numel() and not 0 <= ids.min() <= ids.max() <= most:
            found = f"{ids.min()} to {ids.max()}"
            raise ValueError(f"{site}: its codes are 0 to {most}, not {found}")
        for column in ids.view(-1, 1, *ids.shape[-2:]).split(1, dim=-1):
            yield codebook, site, column, position
