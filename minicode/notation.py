"""How a code is written, as in the paper's tables.

mlp.LAYER.CODE, or head.LAYER.HEAD.CODE, or mlp.LAYER.GROUP.CODE where an MLP's codebook has groups;
in a model that gives its codebooks no names, the path of one and then the same: layers.0.book.CODE.
With @POSITION behind it where one position is meant: mlp.1.527, head.0.3.12@4, mlp.1.527@-1 (from
the end of the prompt).
"""

import re
from dataclasses import dataclass

from minicode.codebook import codebooks

# Site, and behind it group and code, or the code alone; position.
NOTATION = re.compile(r"(\w+(?:\.\w+)*)\.(\d{1,9})(?:@(-?\d{1,9}))?")


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
        books = codebooks(model)
        match = isinstance(text, str) and NOTATION.fullmatch(text)
        if not match or text in books:
            wanted = "mlp.LAYER.CODE or head.LAYER.HEAD.CODE, and @POSITION for one position"
            raise ValueError(f"{text!r} is not a code: write {wanted}, as in mlp.1.527@4")
        site, number, position = match.groups()
        group = None
        before, _, last = site.rpartition(".")
        if site not in books and before in books and re.fullmatch(r"\d{1,9}", last):
            site = before
            group = int(last)
        codebook = codebook_of(model, site, text)
        code = cls(site, group, int(number), None if position is None else int(position))
        part = "head" if site.startswith("head.") else "group"
        if (group is None) != (codebook.groups == 1):
            several = f"{site}.{part.upper()}.CODE, for it has {codebook.groups} {part}s"
            wanted = several if codebook.groups > 1 else f"{site}.CODE"
            raise ValueError(f"{text}: write {wanted}")
        numbers = {part: (group or 0, codebook.groups), "code": (code.id, codebook.n_codes)}
        for what, (value, n) in numbers.items():
            if value >= n:
                there_are = f"its {what}s are 0 to {n - 1}"
                raise ValueError(f"{text}: {site} has no {what} {value}; {there_are}")
        return code


def codes_of(site, codebook):
    """All codes of a codebook, group by group: G * C of them."""
    groups = range(codebook.groups) if codebook.groups > 1 else [None]
    return [Code(site, group, number) for group in groups for number in range(codebook.n_codes)]


def codebook_of(model, site, text):
    """The model's codebook of that name, or a ValueError."""
    found = codebooks(model)
    if site not in found:
        sites = ", ".join(found) or "no site at all"
        raise ValueError(f"{text}: this model has no codebook at {site}; it has them at {sites}")
    if not found[site].enabled:
        raise ValueError(f"{text}: the codebooks of this model are switched off")
    return found[site]
