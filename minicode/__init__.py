"""minicode: codebook features (Tamkin, Taufeeque, Goodman, arXiv 2310.17230), small enough to read in an afternoon."""

from minicode.codebook import Codebook
from minicode.control import block, force, record
from minicode.fsm import FSM
from minicode.model import GPT, GPTConfig
from minicode.topk import topk_codes
from minicode.train import load_run

__all__ = ["topk_codes", "Codebook", "GPT", "GPTConfig", "FSM", "record", "force", "block", "load_run"]
