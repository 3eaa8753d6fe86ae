import pytest
import torch
from answers import perplexity

from minicode.codebook import perplexity as of_counts


def test_perplexity():
    even = torch.arange(40) % 8
    assert perplexity(even, 8) == pytest.approx(8), "8 codes in even use are 8"
    what = "codes that are never chosen add nothing: 8, not 100"
    assert perplexity(even, 100) == pytest.approx(8), what
    assert perplexity(torch.full((5, 3), 7), 10) == pytest.approx(1), "one code alone is 1"
    generator = torch.Generator().manual_seed(3)
    ids = (50 * torch.rand(6, 20, 4, generator=generator) ** 3).long()
    wanted = of_counts(torch.bincount(ids.flatten(), minlength=50).float()).item()
    got = perplexity(ids, 50)
    assert isinstance(got, float), f"a float is asked for, not {type(got).__name__}"
    what = f"codes in uneven use: {got:.3f} instead of {wanted:.3f}"
    assert got == pytest.approx(wanted, rel=1e-4), what
