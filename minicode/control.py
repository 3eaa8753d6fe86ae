"""Reading and steering a network by its codes: record(model), force(model, codes), block(model, codes).

A code is written mlp.LAYER.CODE, or head.LAYER.HEAD.CODE, with @POSITION behind it where one position is
meant: mlp.1.527, head.0.3.12@4, mlp.1.527@-1 (from the end of the prompt). As in the paper's tables.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from minicode.model import SITES

NOTATION = re.compile(r"(?:head\.(\d+)\.(\d+)|(\w+)\.(\d+))\.(\d+)(?:@(-?\d+))?")


@dataclass(frozen=True)
class Code:
    """One code: `site` such as "mlp.1", `group` (the head; 0 elsewhere), `id`, `position` (None: everywhere)."""

    site: str
    group: int
    id: int
    position: int | None = None

    def __str__(self):
        head = f".{self.group}" if self.site.startswith("head") else ""
        return f"{self.site}{head}.{self.id}" + ("" if self.position is None else f"@{self.position}")

    @classmethod
    def parse(cls, text, model):
        """The code that the text names, if the model has it; else a ValueError that says what there is."""
        match = NOTATION.fullmatch(text)
        if not match:
            raise ValueError(
                f"{text!r} is not a code: write mlp.LAYER.CODE or head.LAYER.HEAD.CODE, "
                f"and @POSITION for one position, as in mlp.1.527@4"
            )
        head_layer, head, site, layer, number, position = match.groups()
        site, layer = ("head", head_layer) if head else (site, layer)
        if site not in SITES:
            raise ValueError(f"{text}: there is no site {site!r}; the sites are {', '.join(SITES)}")
        if site == "head" and not head:
            raise ValueError(f"{text}: a head's code needs its head: head.LAYER.HEAD.CODE, as in head.0.3.12")
        code = cls(f"{site}.{int(layer)}", int(head or 0), int(number), None if position is None else int(position))
        codebook = codebook_of(model, code.site, text)
        for what, value, n in (("head", code.group, codebook.groups), ("code", code.id, codebook.n_codes)):
            if value >= n:
                raise ValueError(f"{text}: {code.site} has no {what} {value}; its {what}s are 0 to {n - 1}")
        block_size = model.config.block_size
        if code.position is not None and not -block_size <= code.position < block_size:
            raise ValueError(f"{text}: a position is less than the block_size of {block_size}")
        return code


def codebook_of(model, site, text):
    """The model's codebook of that name, or a ValueError."""
    codebooks = model.codebooks()
    if site not in codebooks:
        has = f"it has them at {', '.join(codebooks)}" if codebooks else "it has none at all"
        raise ValueError(f"{text}: this model has no codebook at {site}; {has}")
    if not codebooks[site].enabled:
        raise ValueError(f"{text}: the codebooks of this model are switched off")
    return codebooks[site]


@contextmanager
def record(model):
    """Within the block, a dict of the codes that the last sequences chose: {"mlp.1": ids (B, T, G, k), ...}.

    G is the number of heads at the site head, else 1; best first. Passes with a cache are joined.

        with record(model) as codes:
            model(tokens)
        codes["head.0"][0, 5, 3]        # what head 3 of layer 0 chose at position 5: (k,)
    """
    codes = {}

    def keep(name):
        def hook(codebook, inputs, output):
            if codebook.enabled:
                past = [codes[name]] if model.span.start and name in codes else []
                codes[name] = torch.cat([*past, codebook.ids], dim=1)

        return hook

    hooks = [codebook.register_forward_hook(keep(name)) for name, codebook in model.codebooks().items()]
    try:
        yield codes
    finally:
        for hook in hooks:
            hook.remove()


def force(model, codes, position=None):
    """Within the block, these codes are active.

    codes is a code or a list of codes in the notation above, or a dict {"mlp.1": ids} with ids (G, k) for all
    sequences or (B, G, k) for each of them, as `record` gives them for one position. `position` is where those
    codes are forced that do not say so themselves: None means at every position.

    A forced code takes a slot among the k of its site. If it is chosen already nothing changes, to the last
    bit; else it takes the place of the weakest chosen code that is not forced itself. Blocks nest.
    Paper: section 4.3. Raises ValueError for codes that do not exist or more than k at a site, and on leaving
    the block if a position was never reached.
    """
    return _edit(model, codes, position, "force")


def block(model, codes, position=None):
    """Within the block, these codes are never chosen; the next best take their slots. Arguments as for `force`."""
    return _edit(model, codes, position, "block")


@dataclass(eq=False)
class _Edit:
    kind: str
    name: str  # as the user wrote it
    ids: torch.Tensor  # (B or 1, 1, G, 1)
    groups: torch.Tensor  # (G, 1) bool: the heads it is about
    position: int | slice | None
    reached: bool | None = None  # None until the model runs

    def where(self, model, ids):
        """The places in ids (B, T, G, k) that this edit is about: bool (1, T, G, 1)."""
        span = model.span
        if len(self.ids) not in (1, len(ids)):
            raise ValueError(f"{self.name}: there are codes for {len(self.ids)} sequences, but the input has {len(ids)}")
        at = torch.arange(span.start, span.stop, device=ids.device).view(1, -1, 1, 1)
        if self.position is None:
            return self.groups.expand(1, len(span), -1, 1)
        onwards = isinstance(self.position, slice)
        position = self.position.start if onwards else self.position
        if position < 0:
            position += model.prompt_length or span.stop
            if position < 0:
                raise ValueError(f"{self.name}@{self.position} is before the start of the prompt")
        self.reached = bool(self.reached) or position in span
        return ((at >= position) if onwards else (at == position)) & self.groups


class _Control:
    """The edits of one codebook, which asks here for its ids instead of searching."""

    def __init__(self, model, codebook):
        self.model, self.codebook, self.edits = model, codebook, []

    def __call__(self, a):
        codebook = self.codebook
        k = codebook.k
        forced = [edit for edit in self.edits if edit.kind == "force"]
        blocked = [edit for edit in self.edits if edit.kind == "block"]
        ids = codebook.search(a, extra=min(len(blocked), codebook.n_codes - k))  # (B, T, G, k + extra)
        bad = torch.zeros_like(ids, dtype=torch.bool)
        for edit in blocked:
            bad |= edit.where(self.model, ids) & (ids == edit.ids)
        ids = ids.gather(-1, bad.sort(dim=-1, stable=True).indices)[..., :k]
        places = [edit.where(self.model, ids) for edit in forced]
        held = torch.zeros_like(ids, dtype=torch.bool)  # slots that belong to forced codes
        for edit, place in zip(forced, places):
            held |= place & (ids == edit.ids)
        slots = torch.arange(k, device=ids.device)
        for edit, place in zip(forced, places):
            weakest = torch.where(held, -1, slots).amax(-1, keepdim=True)
            put = place & ~(ids == edit.ids).any(-1, keepdim=True) & (slots == weakest)
            ids = torch.where(put, edit.ids, ids)
            held |= put
        return ids

    def check(self):
        """At most k codes can be forced, all but k blocked, and none both, at each place."""
        codebook = self.codebook
        for position in [edit.position for edit in self.edits]:
            # An edit at many positions meets every other one somewhere.
            here = [edit for edit in self.edits if not isinstance(edit.position, int) or edit.position == position]
            for kind, most in (("force", codebook.k), ("block", codebook.n_codes - codebook.k)):
                of_kind = [edit for edit in here if edit.kind == kind]
                n = sum(edit.groups.int() for edit in of_kind).max() if of_kind else 0
                if n > most:
                    verb = {"force": "forced", "block": "blocked"}[kind]
                    raise ValueError(f"{of_kind[-1].name}: at most {most} codes can be {verb} at a site, not {n}")
            for one in here:
                for other in here:
                    if one.kind != other.kind and ((one.ids == other.ids) & one.groups & other.groups).any():
                        raise ValueError(f"{one.name} is both forced and blocked")


@contextmanager
def _edit(model, codes, position, kind):
    edits = _read(model, codes, position, kind)
    try:
        for codebook, edit in edits:
            codebook.control = codebook.control or _Control(model, codebook)
            codebook.control.edits.append(edit)
        for codebook, _ in edits:
            codebook.control.check()
        yield
        for _, edit in edits:
            if edit.reached is False:
                raise ValueError(f"{edit.name}@{edit.position} had no effect: no input was that long")
    finally:
        for codebook, edit in edits:
            if codebook.control and edit in codebook.control.edits:
                codebook.control.edits.remove(edit)
                codebook.control = codebook.control if codebook.control.edits else None


def _read(model, codes, position, kind):
    """The user's codes as (codebook, edit) pairs."""
    edits = []
    if isinstance(codes, dict):
        for site, ids in codes.items():
            codebook = codebook_of(model, site, site)
            ids = torch.as_tensor(ids, device=codebook.codes.device)
            if ids.dim() not in (2, 3) or ids.shape[-2] != codebook.groups:
                raise ValueError(f"{site}: ids must be ({codebook.groups}, k) or (B, {codebook.groups}, k), "
                                 f"not {tuple(ids.shape)}")
            if ids.numel() and not 0 <= ids.min() <= ids.max() < codebook.n_codes:
                raise ValueError(f"{site}: its codes are 0 to {codebook.n_codes - 1}, not {ids.min()} to {ids.max()}")
            ids = ids.view(-1, 1, *ids.shape[-2:])  # (B or 1, 1, G, k)
            groups = torch.ones(codebook.groups, 1, dtype=torch.bool, device=ids.device)
            edits += [(codebook, _Edit(kind, site, column, groups, position)) for column in ids.split(1, dim=-1)]
        return edits
    for text in dict.fromkeys([codes] if isinstance(codes, str) else codes):
        code = Code.parse(text, model)
        codebook = model.codebooks()[code.site]
        device = codebook.codes.device
        groups = (torch.arange(codebook.groups, device=device) == code.group).unsqueeze(-1)
        ids = torch.full((1, 1, codebook.groups, 1), code.id, device=device)
        where = position if code.position is None else code.position
        edits.append((codebook, _Edit(kind, text.split("@")[0], ids, groups, where)))
    return edits
