"""Reading and steering a network by its codes: record(model), force(model, codes), block(model, codes).

A code is written mlp.LAYER.CODE, or head.LAYER.HEAD.CODE, with @POSITION behind it where one position is
meant: mlp.1.527, head.0.3.12@4, mlp.1.527@-1 (from the end of the prompt). As in the paper's tables.
"""

import operator
import re
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from minicode.model import SITES, evaluating

GENERATED = "generated"  # the positions at which the tokens after the prompt are sampled
NOTATION = re.compile(
    r"(\w+)\.(\d+)(?:\.(\d+))?\.(\d+)(?:@(-?\d+))?"
)  # site, layer, head, code, position


@dataclass(frozen=True)
class Code:
    """One code: `site` such as "mlp.1", `group` (the head; 0 elsewhere), `id`, `position` (None: everywhere)."""

    site: str
    group: int
    id: int
    position: int | None = None

    def __str__(self):
        head = f".{self.group}" if self.site.startswith("head") else ""
        return f"{self.site}{head}.{self.id}" + (
            "" if self.position is None else f"@{self.position}"
        )

    @classmethod
    def parse(cls, text, model):
        """The code that the text names, if the model has it; else a ValueError that says what there is."""
        match = NOTATION.fullmatch(text)
        if not match:
            wanted = "write mlp.LAYER.CODE or head.LAYER.HEAD.CODE, and @POSITION for one position, as in mlp.1.527@4"
            raise ValueError(f"{text!r} is not a code: {wanted}")
        site, layer, head, number, position = match.groups()
        if site not in SITES:
            raise ValueError(f"{text}: there is no site {site!r}; the sites are {', '.join(SITES)}")
        if (site == "head") != bool(head):
            raise ValueError(
                f"{text}: a head's code, and no other, needs its head: head.LAYER.HEAD.CODE, as in head.0.3.12"
            )
        code = cls(
            f"{site}.{int(layer)}",
            int(head or 0),
            int(number),
            None if position is None else int(position),
        )
        codebook = codebook_of(model, code.site, text)
        for what, value, n in (
            ("head", code.group, codebook.groups),
            ("code", code.id, codebook.n_codes),
        ):
            if value >= n:
                raise ValueError(
                    f"{text}: {code.site} has no {what} {value}; its {what}s are 0 to {n - 1}"
                )
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

    G is the number of heads at the site head, else 1; best first. Passes with a cache are joined. So after the
    block codes["head.0"][0, 5, 3] is what head 3 of layer 0 chose at position 5 of the first sequence: (k,).
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
    """What every codebook chooses at the last position of tokens (B, T): {"mlp.1": ids (B, G, k), ...}."""
    with evaluating(model), record(model) as codes:
        model(tokens.to(model.device))
    return {site: ids[:, -1] for site, ids in codes.items()}


def random_codes(model, generator, codes):
    """Random codes in the place of those in a dict {"mlp.1": ids, ...}."""
    sizes = {site: codebook.n_codes for site, codebook in model.codebooks().items()}
    return {
        s: torch.randint(sizes[s], ids.shape, generator=generator, device=ids.device)
        for s, ids in codes.items()
    }


def force(model, codes, position=None):
    """Within the block, these codes are active.

    codes is a code or a list of codes in the notation above, or a dict {"mlp.1": ids} with ids (G, k) for all
    sequences or (B, G, k) for each of them, as `record` gives them for one position. `position` is where those
    codes are forced that do not say so themselves: None means at every position.

    If a forced code is chosen already nothing changes, to the last bit; else it takes the place of the weakest of
    the k chosen that is not forced itself. Blocks nest. Paper: section 4.3. Raises ValueError for codes that do not
    exist; when the model runs, for more than k at a place; and on leaving the block, for a position never reached.
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
    position: int | str | None
    reached: bool | None = None  # None until the model runs

    def where(self, model, ids):
        """The places in ids (B, T, G, k) that this edit is about: bool (1, T, G, 1)."""
        span, end = model.span, model.prompt_length or model.span.stop
        if len(self.ids) not in (1, len(ids)):
            raise ValueError(
                f"{self.name}: there are codes for {len(self.ids)} sequences, but the input has {len(ids)}"
            )
        onwards = self.position in (None, GENERATED)
        first = {None: 0, GENERATED: end - 1}[self.position] if onwards else self.position
        first += end if first < 0 else 0
        if first < 0:
            raise ValueError(f"{self.name}@{self.position} is before the start of the prompt")
        self.reached = bool(self.reached) or onwards or first in span
        at = torch.arange(span.start, span.stop, device=ids.device).view(1, -1, 1, 1)
        return ((at >= first) if onwards else (at == first)) & self.groups


class _Control:
    """The edits of one codebook, which asks here for its ids instead of searching."""

    def __init__(self, model, codebook):
        self.model, self.codebook, self.edits = model, codebook, []

    def __call__(self, a):
        k, n_codes = self.codebook.k, self.codebook.n_codes
        blocked = [edit for edit in self.edits if edit.kind == "block"]
        ids = self.codebook.search(a, extra=min(len(blocked), n_codes - k))  # (B, T, G, k + extra)
        bad = torch.zeros_like(ids, dtype=torch.bool)
        for edit in blocked:
            bad |= edit.where(self.model, ids) & (ids == edit.ids)
        if (bad.sum(-1) > ids.shape[-1] - k).any():
            raise ValueError(
                f"{blocked[-1].name}: at most {n_codes - k} codes can be blocked at a site"
            )
        ids = ids.gather(-1, bad.sort(dim=-1, stable=True).indices)[..., :k]
        forced = [
            (edit, edit.where(self.model, ids)) for edit in self.edits if edit.kind == "force"
        ]
        held = torch.zeros_like(ids, dtype=torch.bool)  # slots that belong to forced codes
        for edit, place in forced:
            held |= place & (ids == edit.ids)
            for other in blocked:
                if (place & other.where(self.model, ids) & (edit.ids == other.ids)).any():
                    raise ValueError(f"{edit.name} is both forced and blocked")
        slots = torch.arange(k, device=ids.device)
        for edit, place in forced:
            weakest = torch.where(held, -1, slots).amax(-1, keepdim=True)  # -1: all are held
            absent = place & ~(ids == edit.ids).any(-1, keepdim=True)
            if (absent & (weakest < 0)).any():
                raise ValueError(f"{edit.name}: at most {k} codes can be forced at a site")
            put = absent & (slots == weakest)
            ids, held = torch.where(put, edit.ids, ids), held | put
        return ids


@contextmanager
def _edit(model, codes, position, kind):
    edits = _read(model, codes, position, kind)
    try:
        for codebook, edit in edits:
            codebook.control = codebook.control or _Control(model, codebook)
            codebook.control.edits.append(edit)
        yield
        for _, edit in edits:
            if edit.reached is False:
                raise ValueError(
                    f"{edit.name}@{edit.position} had no effect: no input was that long"
                )
    finally:
        for codebook, edit in edits:
            codebook.control.edits.remove(edit)
            codebook.control = codebook.control if codebook.control.edits else None


def _read(model, codes, position, kind):
    """The user's codes as (codebook, edit) pairs."""
    edits, position = [], position if position in (None, GENERATED) else operator.index(position)
    tables = codes if isinstance(codes, dict) else {}
    for site, ids in tables.items():
        codebook = codebook_of(model, site, site)
        ids = torch.as_tensor(ids, device=codebook.codes.device)
        if ids.dim() not in (2, 3) or ids.shape[-2] != codebook.groups:
            wanted = f"({codebook.groups}, k) or (B, {codebook.groups}, k)"
            raise ValueError(f"{site}: ids must be {wanted}, not {tuple(ids.shape)}")
        if ids.numel() and not 0 <= ids.min() <= ids.max() < codebook.n_codes:
            raise ValueError(
                f"{site}: its codes are 0 to {codebook.n_codes - 1}, not {ids.min()} to {ids.max()}"
            )
        every = torch.ones(codebook.groups, 1, dtype=torch.bool, device=ids.device)
        columns = ids.view(-1, 1, *ids.shape[-2:]).split(1, dim=-1)  # k of (B or 1, 1, G, 1)
        edits += [(codebook, _Edit(kind, site, column, every, position)) for column in columns]
    for text in () if tables else dict.fromkeys([codes] if isinstance(codes, str) else codes):
        code = Code.parse(text, model)
        codebook = model.codebooks()[code.site]
        groups = torch.arange(codebook.groups, device=codebook.codes.device).unsqueeze(-1)  # (G, 1)
        ids = torch.full_like(groups, code.id).view(1, 1, -1, 1)
        where = position if code.position is None else code.position
        edits.append((codebook, _Edit(kind, text.split("@")[0], ids, groups == code.group, where)))
    return edits
