"""A GPT with codebook sites: nanoGPT's shape, with a codebook wherever one is asked for.

site      where                                         sees
head      each head's output, before the projection     (B, T, n_head * head_dim), a codebook a head
attn      the attention block's output                  (B, T, n_embd)
mlp_mid   the MLP's hidden activation                   (B, T, 4 * n_embd)
mlp       the MLP block's output                        (B, T, n_embd)
block     the residual stream after the block           (B, T, n_embd)
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from minicode.codebook import Codebook, Positions, codebooks
from minicode.runtime.arguments import (
    SELECTIONS,
    SIMILARITIES,
    check_multiple,
    check_range,
    check_tokens,
    whole,
)
from minicode.runtime.options import check_options, option

# In the order in which a block runs through them.
SITES = ("head", "attn", "mlp_mid", "mlp", "block")


@dataclass
class GPTConfig:
    vocab_size: int = option(11, "tokens in the vocabulary", flag=False, least=1)
    block_size: int = option(128, "tokens in a sequence", section="the model", least=1)
    n_layer: int = option(2, "transformer blocks", least=1, below=10_001)
    n_head: int = option(4, "attention heads a block", least=1)
    n_embd: int = option(64, "dimensions of the residual stream", least=1)
    codebooks: str = option(
        "head,mlp",
        "sites with codebooks, of head,attn,mlp_mid,mlp,block; or none",
        section="its codebooks",
    )
    n_codes: int = option(960, "codes in a codebook", least=1)
    n_codes_head: int = option(16, "codes in the codebook of one head", least=1)
    k: int = option(1, "codes chosen at a site and position, by each codebook", least=1)
    k_head: int = option(0, "the same at the attention heads alone; 0: as --k")
    k_mlp: int = option(0, "the same at the MLPs alone, for each group; 0: as --k")
    groups_mlp: int = option(
        1,
        "groups of an MLP's codebook: its output is cut into so many parts, each with codes of its "
        "own (the paper's MLPs: 16 groups with k = 8, or one with k = 100)",
        least=1,
    )
    selection: str = option(
        "pursuit",
        "how k codes are chosen: pursuit, each next one for what is left over by those before it; "
        "or, as in the paper, the k nearest. The same for k = 1",
        choices=SELECTIONS,
    )
    similarity: str = option(
        "distance",
        "what a code is chosen by: distance, dot or, as in the paper, cosine",
        choices=SIMILARITIES,
    )
    layer_norm: bool = option(
        False,
        "a LayerNorm before each codebook: helps codes that start at random, not those of k-means",
    )

    def sites(self):
        """The sites that have codebooks, in the order of SITES."""
        names = [] if self.codebooks in ("", "none") else self.codebooks.split(",")
        for name in names:
            if name not in SITES:
                there_are = f"the sites are {', '.join(SITES)}, or none"
                raise ValueError(f"codebooks: there is no site {name!r}; {there_are}")
        return [site for site in SITES if site in names]

    def __post_init__(self):
        check_options(self)
        check_multiple("n_embd", self.n_embd, "n_head", self.n_head)
        check_multiple("n_embd", self.n_embd, "groups_mlp", self.groups_mlp)
        self.sites()

    def codebook(self, site, dim):
        """The codebook of a site of so many dimensions, or nothing at all."""
        if site not in self.sites():
            return nn.Identity()
        n_codes, k, groups = self.n_codes, self.k, 1
        if site == "head":
            n_codes, k, groups = self.n_codes_head, self.k_head or self.k, self.n_head
        elif site in ("mlp_mid", "mlp"):
            k, groups = self.k_mlp or self.k, self.groups_mlp
        return Codebook(
            n_codes, dim // groups, k, groups, self.similarity, self.layer_norm, self.selection
        )


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.head_codebook = config.codebook("head", config.n_embd)
        self.attn_codebook = config.codebook("attn", config.n_embd)

    def forward(self, x, cache=None):
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, d)
        q, *kv = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        if cache is not None:  # this layer's (k, v) of the positions before
            if self in cache:
                kv = [torch.cat(parts, dim=2) for parts in zip(cache[self], kv)]
            cache[self] = kv
        k, v = kv
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape == k.shape)
        y = y.transpose(1, 2).flatten(-2)  # (B, T, n_embd)
        return self.attn_codebook(self.c_proj(self.head_codebook(y)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.mlp_mid_codebook = config.codebook("mlp_mid", 4 * config.n_embd)
        self.mlp_codebook = config.codebook("mlp", config.n_embd)

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
        self.block_codebook = config.codebook("block", config.n_embd)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return self.block_codebook(x)


class GPT(nn.Module):
    """`GPT(config)(tokens, targets)` returns `(logits, loss)`, as nanoGPT's does.

    tokens, targets (B, T) int64; logits (B, T, vocab_size); loss: cross-entropy a token in nats,
    or None. cache: a dict, empty at first, that keeps the keys and values of each attention layer
    for what comes next, one token at a time.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.positions = Positions()
        for layer, block in enumerate(self.h):
            for path, codebook in codebooks(block).items():  # such as mlp.mlp_codebook
                site = path.rpartition(".")[-1].removesuffix("_codebook")
                codebook.name = f"{site}.{layer}"
                codebook.positions = self.positions
        # nanoGPT starts all at 0.02; at 64 dimensions that costs TokFSM half of its training.
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                std = 0.2 if name.startswith("w") else weight.shape[1] ** -0.5
                if name.endswith("c_proj.weight"):  # into the residual stream, 2 * n_layer times
                    std /= (2 * config.n_layer) ** 0.5
                nn.init.normal_(weight, std=std)

    @property
    def device(self):
        return self.wte.weight.device

    def hidden(self):
        """The modules that the hidden activations of the MLPs go into, layer by layer."""
        return [block.mlp.mlp_mid_codebook for block in self.h]

    def forward(self, tokens, targets=None, cache=None):
        past = cache[self.h[0].attn][0].shape[2] if cache else 0
        end = check_tokens(tokens, past, self.config.block_size)
        self.positions.advance(torch.arange(past, end).unsqueeze(0), past)
        x = self.wte(tokens) + self.wpe.weight[past:end]  # (B, T, n_embd)
        for block in self.h:
            x = block(x, cache)
        logits = self.lm_head(self.ln_f(x))  # (B, T, vocab_size)
        return logits, cross_entropy(logits, targets)

    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continues tokens (B, T) to (B, T + max_new_tokens); each step runs one position.

        temperature 0 takes the most probable token; top_k: drawn from so many, the most probable.
        """
        # The last token is not run through the model.
        room = max(0, self.config.block_size + 1 - tokens.shape[-1])
        if whole("max_new_tokens", max_new_tokens, least=0) > room:
            raise ValueError(f"the prompt leaves room for {room} tokens, not for {max_new_tokens}")
        cache = {}
        with evaluating(self):
            for _ in range(max_new_tokens):
                logits, _ = self(tokens[:, -1:] if cache else tokens, cache=cache)
                new = choose(logits[:, -1].float(), temperature, top_k, generator)
                tokens = torch.cat((tokens, new), dim=1)
        return tokens


def cross_entropy(logits, targets):
    """Of targets (B, T) under logits (B, T, vocab_size), in float32; None of no targets."""
    if targets is not None:
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def choose(logits, temperature=1.0, top_k=None, generator=None):
    """Samples a token (B, 1) from logits (B, vocab_size); temperature 0 takes the most probable."""
    check_range("temperature", temperature, least=0, below=1e38)
    if temperature < 1e-6:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        most = min(whole("top_k", top_k), logits.shape[-1])
        kth = logits.topk(most).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)


@contextmanager
def evaluating(model):
    """Within the block the model is in evaluation mode, without gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
