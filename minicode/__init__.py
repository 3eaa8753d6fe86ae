"""minicode: codebook features (Tamkin, Taufeeque, Goodman, arXiv 2310.17230), small enough to read in an afternoon."""

import importlib

_FILES = {
    "topk_codes": "topk", "Codebook": "codebook", "GPT": "model", "GPTConfig": "model", "record": "control",
    "force": "control", "block": "control", "FSM": "fsm", "load_run": "runtime.runs",
}  # fmt: skip
__all__ = list(_FILES)


def __getattr__(name):
    """Imports a public name when it is asked for, so that `python -m minicode.topk` runs a file not yet imported."""
    if name in _FILES:
        return getattr(importlib.import_module(f"minicode.{_FILES[name]}"), name)
    raise AttributeError(f"module 'minicode' has no attribute {name!r}")
