"""minicode: codebook features, small enough to read in an afternoon.

The paper: Tamkin, Taufeeque, Goodman, arXiv 2310.17230.
"""

import importlib
import sys

from minicode.runtime import streams

if sys.argv[:1] == ["-m"] and "minicode" in " ".join(sys.orig_argv):
    streams.begin()  # this is a command of ours, and python -m is about to import its file

_FILES = {
    "topk_codes": "topk",
    "Codebook": "codebook",
    "GPT": "model",
    "GPTConfig": "model",
    "codebooks": "codebook",
    "use_codebooks": "codebook",
    "attach": "hooks",
    "detach": "hooks",
    "start_codebooks": "hooks",
    "record": "control",
    "force": "control",
    "block": "control",
    "FSM": "fsm",
    "load_run": "runtime.runs",
}
__all__ = list(_FILES)


def __dir__():
    return __all__


def __getattr__(name):
    """Imports a public name when it is asked for: `python -m minicode.topk` must run afresh."""
    if name in _FILES:
        return getattr(importlib.import_module(f"minicode.{_FILES[name]}"), name)
    raise AttributeError(f"module 'minicode' has no attribute {name!r}")
