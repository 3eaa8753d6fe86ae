"""Codebooks in a model that was made without: attach(model, "head,mlp"), start_codebooks, detach.

The model stays its user's own: hooks send what comes to a site through a codebook there. A codebook
is a submodule of the module whose hook it is, so that the model's copies, its state_dict and its
device take it along.
"""

import inspect
import re
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from minicode.codebook import Codebook, Positions, codebooks
from minicode.model import evaluating
from minicode.runtime.arguments import whole
from minicode.runtime.progress import bar

# Where a block of a Hugging Face model has its sites. `head` is what goes into the projection of
# the attention's output, side by side for all heads; `mlp` is what comes out of the MLP.
PATHS = {
    "head": (
        "self_attn.o_proj",  # Llama, Mistral, Qwen, Gemma, OLMo, ...
        "attn.c_proj",  # GPT-2
        "attn.attention.out_proj",  # GPT-Neo
        "attention.dense",  # GPT-NeoX, Pythia
        "self_attention.dense",  # Bloom, Falcon
        "self_attn.dense",  # Phi
        "self_attn.out_proj",  # OPT
    ),
    "mlp": (
        "mlp.dense_4h_to_h",  # Bloom, whose MLP adds the residual stream; Falcon, GPT-NeoX
        "mlp",
        "fc2",  # OPT
    ),
}
GROUPS = 16  # of an MLP's codebook, where they divide its width


def attach(
    model,
    sites="head,mlp",
    layers=None,
    n_codes=1024,
    k=8,
    groups=None,
    similarity="distance",
    selection="pursuit",
    skip=None,
):
    """Puts codebooks into a model, by hooks, and returns the model.

    sites    of a causal model of Hugging Face transformers: head, mlp or both, as text. `head` has
             a codebook for each query head, on its output before the projection; `mlp` one on the
             MLP's output, in groups. Of any other model, modules by pattern of their paths, by the
             names that the sites are to have: {"mlp": "layers.*.ffn"}, where * stands for one part.
             A module's output goes through the codebook; for "head" what goes into it
    layers   those that get codebooks, as numbers from 0; None: all
    n_codes  and k, and groups: for all sites, or by site: {"head": 512, "mlp": 1024}
    groups   parts into which a site's width is cut, each with codes of its own. None: at "head" as
             many as there are heads, at "mlp" 16 where they divide the width, else 1
    skip     so many tokens at the start of each row go by untouched, and padding does: in many
             language models the first token's activations are hundreds of times larger than the
             others'. None: 1 in a causal model of transformers, 0 elsewhere

    The codebooks are named mlp.LAYER and so on. They are on, and their codes random, until
    `start_codebooks(model, tokens)`. ValueError for what the model doesn't have.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        raise ValueError("attach before torch.compile: a compiled model doesn't see new hooks")
    if codebooks(model):
        raise ValueError("this model has codebooks already: detach(model) takes them out")
    skip = skip and whole("skip", skip, least=0)
    how = {"similarity": similarity, "selection": selection, "relative": True}
    positions = Positions()
    positions.first = int(is_causal(model)) if skip is None else skip
    books = {}
    for (site, layer), module in find_sites(model, sites, layers).items():
        if module in books:
            raise ValueError(f"{site}.{layer} and {books[module].name} are the same module")
        width = width_of(model, module, site)
        parts = groups_of(model, site, width, groups)
        codebook = Codebook(of_site(n_codes, site), width // parts, of_site(k, site), parts, **how)
        codebook.name = f"{site}.{layer}"
        codebook.positions = positions
        books[module] = codebook.to(device_of(module, model)).train(module.training)
    install(model, books, positions)
    return model


def install(model, books, positions):
    """Hangs each codebook of {module: codebook} into its module, and hooks on both."""
    # The model, and what its user may call in its place: that without the last layer.
    parts = {model, getattr(model, "base_model", model)} if is_causal(model) else ()
    find = partial(find_positions, positions)
    handles = [part.register_forward_pre_hook(find, with_kwargs=True) for part in parts]
    for module, codebook in books.items():
        module.codebook = codebook
        if codebook.name.startswith("head."):
            handles.append(module.register_forward_pre_hook(through_input))
        else:
            handles.append(module.register_forward_hook(through_output))
    model.codebook_handles = handles


def detach(model):
    """Takes out the codebooks that `attach` put in; the model is as it was, to the last bit."""
    if not hasattr(model, "codebook_handles"):
        raise ValueError("attach put no codebooks into this model")
    for handle in model.codebook_handles:
        handle.remove()
    del model.codebook_handles
    for module in list(model.modules()):
        if isinstance(getattr(module, "codebook", None), Codebook):
            del module.codebook
    return model


def device_of(module, model):
    """Where a module's weights are, or, if it has none, its model's."""
    weights = next(module.parameters(), next(model.parameters()))
    if weights.is_meta:
        raise ValueError("attach before the weights are moved out of memory: these are gone")
    return weights.device


# -- the hooks: module-level functions, so that a copy of the model has them, with its own codebooks


def through_input(module, arguments):
    x, *others = arguments
    return (through(module.codebook, x), *others)


def through_output(module, arguments, output):
    if isinstance(output, tuple):
        return (through(module.codebook, output[0]), *output[1:])
    return through(module.codebook, output)


def through(codebook, x):
    """The codebook on x (B, T, d), or on (B * T, d), which OPT makes of it."""
    positions = codebook.positions
    if positions.number is None and positions.first and x.dim() > 2:
        number = torch.arange(x.shape[1:-1].numel(), device=x.device)
        positions.skip = (number < positions.first).expand(len(x), -1)
    if positions.number is not None and x.dim() == 2:
        return codebook(x.view(-1, positions.number.shape[1], x.shape[1])).view(x.shape)
    return codebook(x)


def find_positions(positions, module, arguments, named):
    """Before each pass: where its tokens stand in their sequences, by the mask and the cache."""
    if getattr(module, "_is_replica", False):
        raise ValueError("codebooks don't go through nn.DataParallel: DistributedDataParallel does")
    named = {**dict(zip(inspect.signature(module.forward).parameters, arguments)), **named}
    tokens = named.get("input_ids")
    tokens = named.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
        raise ValueError("codebooks need input_ids (B, T), or inputs_embeds (B, T, d)")
    n_rows, length = tokens.shape[:2]
    cache = next((x for x in named.values() if hasattr(x, "get_seq_length")), None)
    past = 0 if cache is None else int(cache.get_seq_length())
    mask = named.get("attention_mask")
    if mask is None:
        mask = torch.ones(n_rows, past + length, device=tokens.device)
    if not isinstance(mask, torch.Tensor) or mask.shape != (n_rows, past + length):
        wanted = f"({n_rows}, {past + length}), 1 for each token so far that is no padding"
        raise ValueError(
            f"codebooks need an attention_mask {wanted} (a static cache makes another of it)"
        )
    number = (mask.long().cumsum(-1) - 1).where(mask.bool(), -1)[:, past:]
    skip = number < positions.first
    positions.advance(number, past, skip if skip.any() else None)


# -- which modules


def find_sites(model, sites, layers):
    """{(site, layer): module} for the arguments of `attach`."""
    if isinstance(sites, dict):
        found = find_patterns(model, sites)
    else:
        names = sites.split(",") if isinstance(sites, str) else sites
        found = find_in_blocks(model, [name.strip() for name in names])
    there_are = {layer for _, layer in found}
    wanted = there_are if layers is None else layers
    wanted = [wanted] if isinstance(wanted, int) else wanted
    for layer in wanted:
        if layer not in there_are:
            raise ValueError(f"layers: this model has 0 to {max(there_are)}, not {layer}")
    return {place: module for place, module in found.items() if place[1] in wanted}


def find_in_blocks(model, sites):
    """The sites of a causal model of transformers."""
    by_pattern = 'name its modules by pattern, as in attach(model, {"mlp": "layers.*.ffn"})'
    if not is_causal(model):
        what = f"{type(model).__name__} is no causal model of transformers"
        raise ValueError(f"{what}: {by_pattern}")
    for site in sites:
        if site not in PATHS:
            raise ValueError(f"there is no site {site!r}; the sites are {', '.join(PATHS)}")
    n_layer = config_of(model).num_hidden_layers
    text = model.get_decoder() or model  # of a model that sees too, the part that reads
    lists = [m for m in text.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layer]
    found = {}
    for layer, block in enumerate(lists[0] if lists else ()):
        inside = dict(block.named_modules())
        for site in sites:
            path = next((path for path in PATHS[site] if path in inside), None)
            if path:
                found[site, layer] = inside[path]
    for site in sites:
        if site not in {name for name, _ in found}:
            where = f"{type(model).__name__} has no {site} where it is known to be"
            raise ValueError(f"{where}: {by_pattern}")
    return found


def find_patterns(model, patterns):
    """The sites that a user names by patterns of modules' paths; * is one part of a path."""
    modules = dict(model.named_modules())
    paths = {}
    for site, pattern in patterns.items():
        parts = re.escape(pattern).replace(r"\*", r"([^.]+)")
        whole_path = re.compile(rf"(?:.*\.)?{parts}")
        matches = list(filter(None, map(whole_path.fullmatch, modules)))
        if not matches:
            raise ValueError(f"{site}: this model has no module {pattern}")
        for number, match in enumerate(matches):
            digits = [part for part in match.groups() if part.isdigit()]
            place = site, int(digits[0]) if digits else number
            if place in paths:
                two = f"{paths[place]} and {match[0]}"
                raise ValueError(f"{site}: {pattern} is two modules of one layer, {two}")
            paths[place] = match[0]
    return {place: modules[path] for place, path in paths.items()}


def config_of(model):
    """The configuration of a model of transformers, of its text part if it has others; or None."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def is_causal(model):
    """Whether a model is one of transformers that reads tokens one after the other."""
    config = config_of(model)
    return hasattr(config, "vocab_size") and not config.is_encoder_decoder


def of_site(value, site):
    """An argument that may be one for each site."""
    if not isinstance(value, dict):
        return value
    if site not in value:
        raise ValueError(f"{value} has nothing for the site {site}")
    return value[site]


def width_in(module):
    """How wide a linear map's input is, or None; nx is GPT-2's name."""
    return getattr(module, "in_features", getattr(module, "nx", None))


def width_out(module):
    return getattr(module, "out_features", getattr(module, "nf", None))


def width_of(model, module, site):
    """How wide the activations of a site are."""
    size = width_in if site == "head" else width_out
    config = config_of(model)
    inside = [size(part) for part in module.modules() if size(part)]
    if size(module):
        return size(module)
    if config is not None:
        return config.hidden_size
    if not inside:
        raise ValueError(f"{site}: how wide is what {type(module).__name__} gives? name a Linear")
    return inside[-1]


def groups_of(model, site, width, groups):
    """Into how many parts a site's width is cut."""
    config = config_of(model)
    if site == "head" and config is not None:
        return config.num_attention_heads
    if groups is None:
        return GROUPS if site == "mlp" and width % GROUPS == 0 else 1
    groups = of_site(groups, site)
    if groups < 1 or width % groups:
        raise ValueError(f"groups ({groups}) must divide the {width} dimensions at {site}")
    return groups


# -- where codes begin


class _Done(Exception):
    """The last codebook is started: the rest of the pass is for nothing."""


@torch.no_grad()
def start_codebooks(model, *inputs, generator=None, **named):
    """Starts a model's codebooks by k-means, in one pass of model(*inputs, **named); they are on.

    Each is started as the pass comes to it: on what the codebooks before it make of the sample. The
    sample is one batch, best of 32 tokens for each code or more; what passes through untouched
    doesn't count. ValueError for fewer tokens than codes, a codebook that never came, or none.
    """
    waiting = {codebook: name for name, codebook in codebooks(model).items()}
    if not waiting:
        raise ValueError(f"{type(model).__name__} holds no codebook: there is nothing to start")
    were_on = {codebook: codebook.enabled for codebook in waiting}

    def start(codebook, arguments):
        if codebook in waiting:
            x = arguments[0]
            kept = codebook.positions.kept(x)
            codebook.start(x if kept is None else x[kept], generator=generator)
            codebook.enabled = True
            del waiting[codebook]
            progress.update()
            if not waiting:
                raise _Done

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        progress = stack.enter_context(bar(total=len(waiting), desc="k-means"))
        for codebook in waiting:
            stack.enter_context(codebook.register_forward_pre_hook(start))
        try:
            model(*inputs, **named)
            raise ValueError(f"these codebooks were not reached: {', '.join(waiting.values())}")
        except _Done:
            pass
        finally:
            for codebook, on in were_on.items():
                codebook.enabled = on or not waiting
