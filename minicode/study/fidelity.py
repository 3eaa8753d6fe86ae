"""How well sums of codes stand for the activations in whose place they are."""

from contextlib import contextmanager

import torch

from minicode.codebook import codebooks


class Errors:
    """How often codes are chosen (G, C), and a codebook's fraction of variance unexplained (FVU).

    Of activations a and sums of codes q, over all passes added: sum |a - q|² / sum |a - mean(a)|².
    `add` is a forward hook of the codebook. Inputs that pass through untouched don't count.
    """

    def __init__(self):
        self.count = 0
        self.n = 0
        self.error = 0.0
        self.square = 0.0
        self.total = 0.0  # (G, d)

    def add(self, codebook, arguments, output):
        self.count += codebook.count(codebook.ids)
        kept = codebook.ids[..., 0, 0] >= 0
        a = codebook.activations(arguments[0][kept]).double()  # (N, G, d)
        q = codebook.sum_codes(codebook.ids[kept]).double()
        self.n += len(a)
        self.error += (a - q).square().sum().item()
        self.square += a.square().sum().item()
        self.total += a.sum(0)

    def fvu(self):
        spread = self.square - (self.total.square().sum() / self.n).item()
        return self.error / max(spread, 1e-30)


@contextmanager
def zeroed(model):
    """Within the block all codes are zero, so that every site passes on nothing: zero ablation."""
    books = codebooks(model).values()
    codes = [codebook.codes.data for codebook in books]
    try:
        for codebook in books:
            codebook.codes.data = torch.zeros_like(codebook.codes)
        yield
    finally:
        for codebook, own in zip(books, codes):
            codebook.codes.data = own
