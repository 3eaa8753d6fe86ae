"""Codebooks in Hugging Face models: tiny ones of many families, made on the spot."""

import copy

import pytest
import torch
from torch import nn

from minicode import attach, codebooks, detach, force, record, start_codebooks, use_codebooks
from minicode.hooks import find_sites

transformers = pytest.importorskip("transformers", reason="pip install '.[hf]' has the tests of it")

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {"head_dim": 16, "query_pre_attn_scalar": 16}
OLD = {name: LLAMA[name] for name in LLAMA if name not in ("num_key_value_heads",)}
FAMILIES = {
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3": {**LLAMA, "head_dim": 16},
    "Gemma": {**LLAMA, "head_dim": 16},
    "Gemma2": {**LLAMA, **WIDE},
    "Gemma3Text": {**LLAMA, **WIDE, "sliding_window": 4, "layer_types": None},
    "Olmo2": LLAMA,
    "Phi": LLAMA,
    "GPTNeoX": OLD,
    "GPT2": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeo": {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    },
    "OPT": {**OLD, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": {**OLD, "alibi": False},
}


def make(family="Llama", seed=0):
    torch.manual_seed(seed)
    settings = {k: v for k, v in FAMILIES[family].items() if v is not None}
    name = "Gemma3" if family == "Gemma3Text" else family
    config = getattr(transformers, f"{family}Config")(**settings)
    kind = {"GPT2": "GPT2LMHeadModel", "Gemma3": "Gemma3ForCausalLM"}
    model = getattr(transformers, kind.get(name, f"{name}ForCausalLM"))(config)
    for weight in model.parameters():  # far from where everything is zero
        nn.init.normal_(weight, std=0.3)
    return model.eval()


def make_tokens(n=3, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (n, length), generator=generator)


def logits(model, tokens, **more):
    with torch.no_grad():
        return model(tokens, **more).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_off_and_detached_are_bit_identical_and_on_is_not(family):
    model = make(family)
    tokens = make_tokens()
    dense = logits(model, tokens)
    names = set(model.state_dict())
    attach(model, n_codes=16, k=2)
    with record(model) as codes:
        assert not torch.equal(logits(model, tokens), dense)
    assert sorted(codes) == ["head.0", "head.1", "mlp.0", "mlp.1"]
    assert codes["head.1"].shape == (3, 7, 4, 2) and codes["mlp.1"].shape == (3, 7, 16, 2)
    for ids in codes.values():
        assert (ids[:, 0] == -1).all() and (ids[:, 1:] >= 0).all()
    use_codebooks(model, False)
    assert torch.equal(logits(model, tokens), dense)
    detach(model)
    assert torch.equal(logits(model, tokens), dense)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("site", ["head", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_site_that_gives_zero_leaves_the_rest_of_the_residual_stream(family, site):
    """It is as if the last map before it, or behind it, had no weights."""
    tokens = make_tokens()
    model = attach(make(family), site, layers=[1], n_codes=4, k=1, skip=0)
    with torch.no_grad():
        codebooks(model)[f"{site}.1"].codes.zero_()
    without = make(family)
    module = find_sites(without, site, [1])[site, 1]
    last = [part for part in module.modules() if getattr(part, "weight", None) is not None][-1]
    with torch.no_grad():
        last.weight.zero_()
        if site == "mlp" and last.bias is not None:
            last.bias.zero_()
    torch.testing.assert_close(logits(model, tokens), logits(without, tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_and_cached_equals_uncached(family):
    model = attach(make(family), n_codes=16, k=2)
    tokens = make_tokens(2, 6)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), tokens), dim=1)
    mask = (padded > 0).long()
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with force(model, ["mlp.1.2.3@2", "head.0.1.5@5", "head.1.2.7@8"]):
        with record(model) as codes:
            made = model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)[:, 6:]
        with record(model) as codes_padded:
            same = model.generate(padded, attention_mask=mask, **how)[:, 9:]
        grown = tokens
        for _ in range(5):
            grown = torch.cat((grown, logits(model, grown)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(made, grown[:, 6:])
    for site, ids in codes.items():
        assert ids.shape[1] == 10
        if family not in ("GPT2", "GPTNeo", "OPT"):  # these place padding differently in sums
            assert torch.equal(codes_padded[site][:, 3:], ids)
    assert (codes_padded["mlp.0"][:, :4] == -1).all()
    assert (codes["mlp.1"][:, 2, 2] == 3).any(-1).all()
    assert (codes["head.0"][:, 5, 1] == 5).any(-1).all()
    assert (codes["head.1"][:, 8, 2] == 7).any(-1).all()
    assert torch.equal(made, same)


def test_a_copy_has_codebooks_of_its_own():
    model = attach(make(), n_codes=16, k=2)
    tokens = make_tokens()
    before = logits(model, tokens)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, tokens), before)
    with torch.no_grad():
        for book in codebooks(other).values():
            book.codes.zero_()
    assert not torch.equal(logits(other, tokens), before)
    with force(other, "mlp.1.2.3@4"):
        logits(other, tokens[:, :6])
    dense = logits(make(), tokens)
    assert torch.equal(logits(detach(other), tokens), dense)
    assert torch.equal(logits(model, tokens), before)


def test_saved_and_loaded_with_its_codebooks(tmp_path):
    model = attach(make(), n_codes=16, k=2)
    tokens = make_tokens(8, 40)
    start_codebooks(model, tokens, generator=torch.Generator().manual_seed(0))
    wanted = logits(model, tokens)
    other = attach(make(seed=1), n_codes=16, k=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, tokens), wanted)

    model.save_pretrained(tmp_path)
    kind = transformers.AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(loaded, tokens), logits(make(), tokens))
    from safetensors.torch import load_file

    attach(loaded, n_codes=16, k=2)
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(loaded, tokens), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = attach(make().to(dtype), n_codes=16, k=2)
    tokens = make_tokens(8, 40)
    start_codebooks(model, tokens)
    assert {book.codes.dtype for book in codebooks(model).values()} == {torch.float32}
    found = logits(model, tokens)
    assert found.dtype == dtype and found.isfinite().all()
    model.to(dtype)  # the codes too
    with force(model, "mlp.1.2.3"), record(model) as codes:
        assert logits(model, tokens).dtype == dtype
    assert (codes["mlp.1"][:, 1:, 2] == 3).any(-1).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_and_usage_with_and_without_checkpointing(checkpointing):
    model = attach(make(), n_codes=16, k=2).train()
    assert all(book.training for book in codebooks(model).values())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = make_tokens()
    loss = model(tokens, labels=tokens, use_cache=False).loss
    pull = sum(book.autoencoding + book.commitment for book in codebooks(model).values())
    (loss + pull).backward()
    for book in codebooks(model).values():
        assert book.usage.sum() == 3 * 6 * book.groups * 2  # each row's first token is not counted
        assert book.codes.grad.abs().sum() > 0
    plain = attach(make(), n_codes=16, k=2).train()
    for book, other in zip(codebooks(plain).values(), codebooks(model).values()):
        book.load_state_dict(other.state_dict())
    loss = plain(tokens, labels=tokens, use_cache=False).loss
    pull = sum(book.autoencoding + book.commitment for book in codebooks(plain).values())
    (loss + pull).backward()
    for one, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad)


def test_errors_are_relative_to_the_variance_of_each_site():
    model = attach(make(), ["mlp"], n_codes=16, k=2, layers=1).train()
    book = codebooks(model)["mlp.1"]
    inputs = []
    book.register_forward_pre_hook(lambda book, arguments: inputs.append(arguments[0]))
    model(make_tokens())
    a = inputs[0][:, 1:].reshape(-1, 16, 2)
    q = book.sum_codes(book.ids[:, 1:]).reshape(-1, 16, 2)
    wanted = (a - q).square().mean() / a.var(0, correction=0).mean()
    torch.testing.assert_close(book.autoencoding, wanted)
    assert torch.equal(book.inputs, a)  # what passes through is not among them


def test_the_first_token_and_padding_are_left_alone_by_force():
    model = attach(make(), n_codes=16, k=2)
    tokens = make_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with force(model, "mlp.1.2.3"), record(model) as codes:
        logits(model, tokens, attention_mask=mask)
    hit = (codes["mlp.1"][..., 2, :] == 3).any(-1)  # (B, T)
    assert hit[0].tolist() == [False] * 4 + [True] * 3
    assert hit[1].tolist() == [False] + [True] * 6
    passed = {"mlp.1": codes["mlp.1"][:, 0]}
    with pytest.raises(ValueError, match="codes are 0 to 15, not -1 to"), force(model, passed):
        pass
    untouched = "no input has a position 0, but for those that pass through untouched"
    with pytest.raises(ValueError, match=untouched), force(model, "mlp.1.2.3@0"):
        logits(model, tokens)
    with pytest.raises(ValueError, match=r"an attention_mask \(3, 7\)"):
        logits(model, tokens, attention_mask=torch.ones(3, 1, 7, 7, dtype=torch.bool))


def test_what_can_not_be_attached_is_one_line():
    for model, sites, words in (
        (make(), "attn", "there is no site 'attn'; the sites are head, mlp"),
        (make(), {"mlp": "layers.*.ffn"}, r"mlp: this model has no module layers.\*.ffn"),
        (
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=96, d_model=8, d_ff=8, num_layers=1, num_heads=2)
            ),
            "mlp",
            "is no causal model of transformers",
        ),
        (
            transformers.BertForMaskedLM(
                transformers.BertConfig(**{**OLD, "num_hidden_layers": 1})
            ),
            "mlp",
            "BertForMaskedLM has no mlp where it is known to be",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            attach(model, sites)
        assert not codebooks(model)


def test_half_precision_counts_beyond_256():
    model = attach(make(), "mlp", n_codes=4, k=1, groups=1).bfloat16().train()
    book = codebooks(model)["mlp.0"]
    for _ in range(3):
        model(make_tokens(50, 20))
    assert book.usage.sum() == 3 * 50 * 19


def test_what_is_continued_from_a_cache_is_a_new_prompt_and_what_was_rejected_is_not_recorded():
    model = attach(make(), n_codes=16, k=2)
    tokens = make_tokens(1, 11)
    with torch.no_grad():
        wanted = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with record(model) as codes, torch.no_grad():
        out = model(tokens[:, :6], use_cache=True)
        cache = out["cache" if "cache" in out else "past_key_values"]
        name = "cache" if "cache" in out else "past_key_values"
        with force(model, "mlp.1.2.3", position="generated"):
            model(tokens[:, 6:], **{name: cache})
    hit = (codes["mlp.1"][0, :, 2] == 3).any(-1)
    assert hit[10] and codes["mlp.1"].shape[1] == 11
    assert wanted.shape == (1, 15)
    with record(model) as codes, torch.no_grad():
        model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
        cache = model(tokens[:, :6], use_cache=True)[name]
        for _ in range(2):  # the same prefix, continued twice
            model(tokens[:, 6:9], **{name: copy.deepcopy(cache)})
    assert codes["mlp.1"].shape[1] == 9


def test_reentrant_checkpointing_is_refused():
    model = attach(make(), n_codes=16, k=2).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    tokens = make_tokens()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(tokens, labels=tokens, use_cache=False)


def test_a_mask_by_position_and_parts_that_are_frozen():
    base = attach(make().model, n_codes=16, k=2)
    tokens = make_tokens(2, 6)
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    with record(base) as codes, torch.no_grad():
        base(tokens, mask)
    assert (codes["mlp.0"][:, :4] == -1).all() and (codes["mlp.0"][:, 4:] >= 0).all()
    base.train()
    base.layers[0].eval()
    start_codebooks(base, make_tokens(8, 40))
    assert base.training and not base.layers[0].mlp.training and base.layers[1].training


def test_models_that_see():
    """The text part of one that reads too; one that only sees, by pattern."""
    sizes = {name: OLD[name] for name in ("hidden_size", "intermediate_size")}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    sight = transformers.CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    text = transformers.LlamaConfig(**LLAMA)
    config = transformers.LlavaConfig(vision_config=sight, text_config=text, image_token_id=5)
    model = attach(transformers.LlavaForConditionalGeneration(config).eval(), n_codes=16, k=2)
    with record(model) as codes:
        logits(model, make_tokens() % 80 + 10)
    assert codes["mlp.1"].shape == (3, 7, 16, 2)
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **sizes))
    ends = (".mlp.fc2", "layer.0.output.dense")  # of transformers 5 and 4
    path = next(name for name, _ in model.named_modules() if name.endswith(ends))
    pattern = path.replace(".0.", ".*.")
    image = torch.randn(2, 3, 32, 32)
    dense = model.eval()(image).last_hidden_state
    attach(model, {"mlp": pattern}, n_codes=16, k=2)
    with record(model) as codes:
        model(image)
    assert codes["mlp.1"].shape == (2, 17, 16, 2)
    idle = next(code for code in range(16) if not (codes["mlp.1"][:, :, 3] == code).any())
    with force(model, f"mlp.1.3.{idle}@5"), record(model) as codes:
        model(image)
    hit = (codes["mlp.1"][:, :, 3] == idle).any(-1)
    assert hit[:, 5].all() and hit.sum() == 2
    assert torch.equal(detach(model)(image).last_hidden_state, dense)
