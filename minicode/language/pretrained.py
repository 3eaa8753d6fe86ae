"""A local Hugging Face model in the place of our own: its tokenizer, its weights, our codebooks.

Nothing is downloaded, and no code that a folder holds is run. transformers is imported here alone.
"""

import inspect
import re
from pathlib import Path

import torch
from torch import nn

from minicode.hooks import attach, find_sites, width_in
from minicode.model import GPT, cross_entropy
from minicode.runtime.arguments import check_tokens
from minicode.runtime.files import reading

FOLDER = "pretrained"  # in a run's folder: what is needed to build the model, but its weights
KEPT = re.compile(
    r"config\.json|generation_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\..*|merges\.txt|chat_template\.jinja"
)
SIZES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def from_folder(kind, folder, **how):
    """What transformers reads from a folder by one of its Auto classes; else a ValueError."""
    try:
        import transformers
    except ImportError:
        needs = "a pretrained model needs transformers: pip install 'minicode[hf]'"
        raise ValueError(needs) from None
    folder = Path(folder)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no folder of a Hugging Face model: it has no {name}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with reading(folder, "could not be read as a causal model of transformers"):
        read = getattr(transformers, kind).from_pretrained
        return read(folder, local_files_only=True, trust_remote_code=False, **how)


def small_files(folder):
    """{name: bytes} of what a run keeps of a model's folder: configuration and tokenizer."""
    paths = [path for path in sorted(Path(folder).iterdir()) if KEPT.fullmatch(path.name)]
    return {f"{FOLDER}/{path.name}": path.read_bytes() for path in paths}


def sizes(folder):
    """What a run's configuration says of the model, by the names of TrainConfig."""
    config = from_folder("AutoConfig", folder).get_text_config()
    found = {}
    for ours, theirs in SIZES.items():
        if not hasattr(config, theirs):
            raise ValueError(f"{folder} holds no transformer: its configuration has no {theirs}")
        found[ours] = getattr(config, theirs)
    return found


class PretrainedTokenizer:
    """The tokenizer in a folder, with the methods of ours; a token is a piece of text, or bytes."""

    def __init__(self, folder):
        config = from_folder("AutoConfig", folder).get_text_config()
        self.tokenizer = from_folder("AutoTokenizer", folder)
        self.vocab_size = config.vocab_size
        self.most_tokens = getattr(config, "max_position_embeddings", 1 << 62) + 1
        own = self.tokenizer
        ends = (own.bos_token_id, own.eos_token_id, own.pad_token_id)
        self.separator = next((token for token in ends if token is not None), 0)
        by_bytes = "ByteLevel" in repr(own.backend_tokenizer.decoder)
        texts = own.convert_ids_to_tokens(range(self.vocab_size))
        self.bytes = [to_bytes(text, by_bytes) for text in texts]
        for token in own.all_special_ids:
            if token < self.vocab_size:
                self.bytes[token] = b""
        self.bytes[self.separator] = b"\n\n"
        self.ids = {piece.decode(errors="replace"): i for i, piece in enumerate(self.bytes)}

        # SentencePiece puts a space before a text; then ours is one too many.
        self.adds_space = False
        self.adds_space = self.decode(self.encode("a")) == " a"

    def encode(self, text):
        """The tokens of a string; ValueError for one that the model doesn't have."""
        if self.adds_space:
            text = text.removeprefix(" ")
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if max(tokens, default=0) >= self.vocab_size:
            raise ValueError(
                f"the tokenizer has a token {max(tokens)}, but the model only {self.vocab_size}"
            )
        return tokens

    def decode(self, tokens):
        text = b"".join(self.bytes[token] for token in tokens).decode(errors="replace")
        return text.removeprefix(" ") if self.adds_space else text


# GPT-2's way to write any byte as a letter: {letter: byte}.
PLAIN = {*range(33, 127), *range(161, 173), *range(174, 256)}
OTHERS = sorted({*range(256)} - PLAIN)
BYTE_OF = {chr(byte): byte for byte in PLAIN}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


def to_bytes(text, by_bytes):
    """What a token of a vocabulary stands for; by_bytes: as GPT-2 writes it, else SentencePiece."""
    if text is None:
        return b""
    if by_bytes and all(letter in BYTE_OF for letter in text):
        return bytes(BYTE_OF[letter] for letter in text)
    single = BYTE_TOKEN.fullmatch(text)
    if single:
        return bytes.fromhex(single[1])
    return text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


class Pretrained(nn.Module):
    """A causal model of transformers with codebooks, in GPT's place: the same calls, and results.

    With weights it is the model that its folder holds, else one of its shape.
    """

    generate = GPT.generate

    def __init__(self, config, folder, weights=True):
        super().__init__()
        self.config = config
        if config.layer_norm:
            raise ValueError("layer_norm doesn't go with a pretrained model")
        if weights:
            kind = "AutoModelForCausalLM"
            self.model = from_folder(kind, folder, dtype=torch.float32, use_safetensors=True)
        else:
            from transformers import AutoModelForCausalLM

            shape = from_folder("AutoConfig", folder)
            self.model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        takes = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # before 5.24
        if config.sites():
            attach(
                self.model,
                ",".join(config.sites()),
                n_codes={"head": config.n_codes_head, "mlp": config.n_codes},
                k={"head": config.k_head or config.k, "mlp": config.k_mlp or config.k},
                groups=config.groups_mlp,
                similarity=config.similarity,
                selection=config.selection,
            )

    @property
    def device(self):
        return self.model.device

    @property
    def lm_head(self):
        return self.model.get_output_embeddings()

    def hidden(self):
        """The modules that the hidden activations of the MLPs go into, layer by layer."""
        mlps = find_sites(self.model, "mlp", None).values()
        return [[part for part in mlp.modules() if width_in(part)][-1] for mlp in mlps]

    def forward(self, tokens, targets=None, cache=None):
        n_past = cache["past"].get_seq_length() if cache else 0
        check_tokens(tokens, n_past, self.config.block_size)
        past = {self.cache_name: cache["past"]} if cache else {}
        found = self.model(tokens, use_cache=cache is not None, **past)
        if cache is not None:
            cache["past"] = found[self.cache_name]
        return found.logits, cross_entropy(found.logits, targets)  # (B, T, vocab_size)
