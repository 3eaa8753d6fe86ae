"""A GPT with codebook sites: nanoGPT's shape, with a codebook wherever one is asked for.

site      where                                         sees
head      each head's output, before the projection     (B, T, n_head * head_dim), a codebook a head
attn      the attention block's output                  (B, T, n_embd)
mlp_mid   the MLP's hidden activation                   (B, T, 4 * n_embd)
mlp       the MLP block's output                        (B, T, n_embd)
block     the residual stream after the block           (B, T, n_embd)
"""

from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from minicode.codebook import Codebook
from minicode.runtime.options import number, option
from minicode.topk import SIMILARITIES

SITES = (
    "head",
    "attn",
    "mlp_mid",
    "mlp",
    "block",
)  # in the order in which a block runs through them


@dataclass
class GPTConfig:
    vocab_size: int = option(11, "tokens in the vocabulary", flag=None, least=1)
    block_size: int = option(128, "tokens in a sequence", least=1)
    n_layer: int = option(2, "transformer blocks", least=1)
    n_head: int = option(4, "attention heads a block", least=1)
    n_embd: int = option(64, "dimensions of the residual stream", least=1)
    codebooks: str = option(
        "head,mlp", "sites with codebooks, of head,attn,mlp_mid,mlp,block; or none"
    )
    n_codes: int = option(960, "codes in a codebook", least=1)
    n_codes_head: int = option(16, "codes in the codebook of one head", least=1)
    k: int = option(1, "codes chosen at a site and position", least=1)
    similarity: str = option(
        "distance",
        "what a code is chosen by: distance, dot or, as in the paper, cosine: accuracy 0.49",
        choices=SIMILARITIES,
    )
    decay: float | None = option(
        None, "codes are moving averages with this decay a step, such as 0.98; none: learnt by gradient",
        {"type": number, "metavar": "number"}, least=0, below=1,
    )  # fmt: skip
    layer_norm: bool = option(
        False,
        "a LayerNorm before each codebook: helps random codes, costs codes from k-means 3 points",
    )

    def sites(self):
        """The sites that have codebooks, in the order of SITES."""
        names = [] if self.codebooks in ("", "none") else self.codebooks.split(",")
        for name in names:
            if name not in SITES:
                raise ValueError(
                    f"codebooks: there is no site {name!r}; the sites are {', '.join(SITES)}, or none"
                )
        return [site for site in SITES if site in names]

    def __post_init__(self):
        for f in fields(self):
            value, valid = getattr(self, f.name), f.metadata
            if "choices" in valid and value not in valid["choices"]:
                raise ValueError(
                    f"{f.name} must be one of {', '.join(valid['choices'])}, not {value!r}"
                )
            if "least" in valid and value is not None and not value >= valid["least"]:
                raise ValueError(f"{f.name} must be at least {valid['least']}, not {value}")
            if "below" in valid and value is not None and not value < valid["below"]:
                raise ValueError(f"{f.name} must be below {valid['below']}, not {value}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        for site in self.sites():
            n_codes = self.n_codes_head if site == "head" else self.n_codes
            if self.k > n_codes:
                raise ValueError(
                    f"k ({self.k}) is more than the {n_codes} codes of a {site} codebook"
                )


def site(config, name, dim, groups=1):
    """The codebook of a site, or nothing at all."""
    if name not in config.sites():
        return nn.Identity()
    n_codes = config.n_codes_head if name == "head" else config.n_codes
    return Codebook(
        n_codes, dim // groups, config.k, groups, config.similarity, config.decay, config.layer_norm
    )


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.head_codebook = site(config, "head", config.n_embd, groups=config.n_head)
        self.attn_codebook = site(config, "attn", config.n_embd)

    def forward(self, x, cache=None):
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # (B, T, n_embd) each
        q, k, v = (
            y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in (q, k, v)
        )  # (B, H, T, d)
        if cache is not None:  # {layer: (k, v)} of the positions before
            if self in cache:
                k, v = (
                    torch.cat(pair, dim=2) for pair in zip(cache[self], (k, v))
                )  # (B, H, past + T, d)
            cache[self] = k, v
        new, seen = q.shape[2], k.shape[2]
        mask = (
            torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
            if seen > new
            else None
        )
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None
        )  # (B, H, T, d)
        y = self.head_codebook(y.transpose(1, 2).flatten(-2))  # (B, T, n_embd)
        return self.attn_codebook(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.mlp_mid_codebook = site(config, "mlp_mid", 4 * config.n_embd)
        self.mlp_codebook = site(config, "mlp", config.n_embd)

    def forward(self, x):
        x = self.mlp_mid_codebook(F.gelu(self.c_fc(x)))  # (B, T, 4 * n_embd)
        return self.mlp_codebook(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.block_codebook = site(config, "block", config.n_embd)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return self.block_codebook(x)


class GPT(nn.Module):
    """`GPT(config)(tokens, targets)` returns `(logits, loss)`, as nanoGPT's does.

    tokens, targets (B, T) int64; logits (B, T, vocab_size); loss: cross-entropy a token in nats, or None. cache: a dict,
    empty at first, that keeps the keys and values of each attention layer for the tokens that come next.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.span, self.prompt_length = (
            range(0),
            None,
        )  # for minicode.control: see forward and generate
        for name, parameter in self.named_parameters():
            if name.endswith(".codes") or parameter.dim() < 2:
                continue
            # nanoGPT starts everything at 0.02; at 64 dimensions that costs TokFSM half of its training.
            std = 0.2 if name.startswith("w") else parameter.shape[1] ** -0.5
            if name.endswith("c_proj.weight"):  # into the residual stream, 2 * n_layer times
                std /= (2 * config.n_layer) ** 0.5
            nn.init.normal_(parameter, std=std)

    def codebooks(self):
        """The codebooks by name, such as "mlp.1", in the order in which the network runs through them."""
        found = {}
        for name, module in self.named_modules():
            if isinstance(module, Codebook):
                _, layer, *_, attribute = name.split(".")
                found[f"{attribute.removesuffix('_codebook')}.{layer}"] = module
        return found

    @property
    def device(self):
        return self.wte.weight.device

    def use_codebooks(self, on):
        """Switches all codebooks on or off, in place; without them this is the dense model."""
        for codebook in self.codebooks().values():
            codebook.enabled = on

    def forward(self, tokens, targets=None, cache=None):
        past, n_tokens = (cache[self.h[0].attn][0].shape[2] if cache else 0), tokens.shape[1]
        if past + n_tokens > self.config.block_size:
            raise ValueError(
                f"{past + n_tokens} tokens are more than the block_size of {self.config.block_size}"
            )
        self.span = range(past, past + n_tokens)  # the positions of this call
        x = self.wte(tokens) + self.wpe.weight[past : past + n_tokens]  # (B, T, n_embd)
        for block in self.h:
            x = block(x, cache)
        logits = self.lm_head(self.ln_f(x))  # (B, T, vocab_size)
        return logits, None if targets is None else F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten()
        )

    def generate(
        self, tokens, max_new_tokens, temperature=1.0, top_k=None, generator=None, use_cache=True
    ):
        """Continues tokens (B, T) to (B, T + max_new_tokens), sampling at `temperature`; 0 takes the most probable.

        With the cache each step runs one position; without it, all of them: the same tokens, more slowly.
        """
        room = (
            self.config.block_size + 1 - tokens.shape[1]
        )  # the last token is not run through the model
        if max_new_tokens > room:
            size = f"a prompt of {tokens.shape[1]} tokens leaves room for {max(0, room)} more"
            raise ValueError(
                f"{size} in the block of {self.config.block_size}, not for {max_new_tokens}"
            )
        cache = {} if use_cache else None
        self.prompt_length = tokens.shape[
            1
        ]  # so that position -1 goes on meaning the prompt's last
        try:
            with evaluating(self):
                for _ in range(max_new_tokens):
                    logits, _ = self(tokens[:, -1:] if cache else tokens, cache=cache)
                    new = choose(logits[:, -1].float(), temperature, top_k, generator)
                    tokens = torch.cat((tokens, new), dim=1)
            return tokens
        finally:
            self.prompt_length = None


def choose(logits, temperature=1.0, top_k=None, generator=None):
    """Samples a token (B, 1) from logits (B, vocab_size); temperature 0 takes the most probable."""
    if temperature < 1e-6:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)


@contextmanager
def evaluating(model):
    """Within the block the model is in evaluation mode, without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
