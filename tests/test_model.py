"""The transformer: sites, cache, and that codebooks come off and on."""

import pytest
import torch
from conftest import make_model, make_tokens

from minicode import GPT, GPTConfig, record
from minicode.codebook import codebooks, use_codebooks
from minicode.model import SITES, choose


def test_codebooks_by_name_in_the_order_of_the_pass(fsm):
    model = make_model()
    order = []
    for name, codebook in codebooks(model).items():
        codebook.register_forward_hook(lambda *_, name=name: order.append(name))
    model(make_tokens(fsm))
    assert order == list(codebooks(model))
    assert order == [f"{site}.{layer}" for layer in range(2) for site in SITES]


@pytest.mark.parametrize("site", SITES)
def test_each_site_alone(site, fsm):
    model = make_model(site)
    assert list(codebooks(model)) == [f"{site}.0", f"{site}.1"]
    with record(model) as codes:
        model(make_tokens(fsm))
    groups = 2 if site == "head" else 1
    assert codes[f"{site}.1"].shape == (3, 8, groups, 2)


def test_off_is_the_dense_model_and_on_again_is_as_before(fsm):
    model = make_model()
    dense = make_model("none")
    tokens = make_tokens(fsm)
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "codebook" not in k})
    with_codebooks, _ = model(tokens)
    use_codebooks(model, False)
    assert torch.equal(model(tokens)[0], dense(tokens)[0])
    use_codebooks(model, True)
    assert torch.equal(model(tokens)[0], with_codebooks)
    assert not torch.equal(dense(tokens)[0], with_codebooks)


@pytest.mark.parametrize("codebooks", ["none", "head,mlp", "head,attn,mlp_mid,mlp,block"])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.8, "top_k": 3}])
def test_cached_equals_uncached_generation(codebooks, settings, fsm):
    model = make_model(codebooks)
    tokens = make_tokens(fsm, n=16, length=3)
    generator = torch.Generator().manual_seed(1)
    cached = model.generate(tokens, 10, generator=generator, **settings)
    generator.manual_seed(1)
    for _ in range(10):
        logits, _ = model(tokens)
        new = choose(logits[:, -1], generator=generator, **settings)
        tokens = torch.cat((tokens, new), dim=1)
    assert torch.equal(cached, tokens)


def test_cached_logits_equal_those_of_one_pass(fsm):
    model = make_model("head,mlp")
    tokens = make_tokens(fsm)
    cache = {}
    parts = [model(part, cache=cache)[0] for part in tokens.split([3, 1, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens)[0])
    cache = {}
    model(tokens[:, :3], cache=cache)
    for several in (tokens[:, 3:5], tokens[:, 3:]):
        with pytest.raises(ValueError, match="one token at a time"):
            model(several, cache=cache)


def test_no_position_sees_the_future(fsm):
    model = make_model()
    tokens = make_tokens(fsm)
    changed = tokens.clone()
    changed[:, 5:] = (tokens[:, 5:] + 1) % 4
    torch.testing.assert_close(model(tokens)[0][:, :5], model(changed)[0][:, :5])


def test_loss_is_the_cross_entropy_of_the_logits(fsm):
    tokens = make_tokens(fsm, length=9)
    logits, loss = make_model()(tokens[:, :-1], tokens[:, 1:])
    wanted = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    torch.testing.assert_close(loss, wanted)


def test_logits_are_those_of_the_plain_formula(fsm):
    model = make_model("none")
    tokens = make_tokens(fsm)
    x = model.wte.weight[tokens] + model.wpe.weight[:8]
    future = torch.ones(8, 8, dtype=torch.bool).triu(1)
    for block in model.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(16, dim=-1)
        heads = []
        for one in (slice(0, 8), slice(8, 16)):
            scores = q[..., one] @ k[..., one].mT / 8**0.5
            share = scores.masked_fill(future, -torch.inf).softmax(-1)
            heads.append(share @ v[..., one])
        x = x + block.attn.c_proj(torch.cat(heads, dim=-1))
        x = x + block.mlp.c_proj(torch.nn.functional.gelu(block.mlp.c_fc(block.ln_2(x))))
    torch.testing.assert_close(model(tokens)[0], model.ln_f(x) @ model.lm_head.weight.T)


def test_tokens_are_drawn_by_their_probability_at_the_temperature():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(20_000, 1)
    for temperature, top_k, among in ((0.5, None, 4), (2.0, None, 4), (2.0, 2, 2), (1e-7, None, 1)):
        drawn = choose(logits, temperature, top_k, generator).flatten()
        wanted = torch.zeros(4)
        best = logits[0].topk(among).indices
        wanted[best] = (logits[0, best] / temperature).softmax(-1)
        share = drawn.bincount(minlength=4) / len(drawn)
        torch.testing.assert_close(share, wanted, rtol=0, atol=0.02)


def test_compiled_in_one_graph_gives_the_same_loss(fsm):
    tokens = make_tokens(fsm, length=9)
    model = make_model("head,mlp", k=1, similarity="distance")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted = model(tokens[:, :-1], tokens[:, 1:])[1]
    torch.testing.assert_close(compiled(tokens[:, :-1], tokens[:, 1:])[1], wanted)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"n_embd": 30, "n_head": 4}, r"n_embd \(30\) must be a multiple of n_head \(4\)"),
        (
            {"codebooks": "head,mpl"},
            "there is no site 'mpl'; the sites are head, attn, mlp_mid, mlp, block, or none",
        ),
        ({"n_layer": 0}, "n_layer must be at least 1, not 0"),
        ({"similarity": "cosin"}, "similarity must be one of cosine, distance, dot, not 'cosin'"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**settings)


def test_a_k_that_a_codebook_has_not():
    with pytest.raises(
        ValueError, match="k must be from 1 to the 16 codes of the codebook, not 300"
    ):
        GPT(GPTConfig(k=300))


def test_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="codebook"):
        GPTConfig(codebook="mlp")


def test_too_many_tokens(fsm):
    with pytest.raises(ValueError, match="13 tokens are more than the block_size of 12"):
        make_model()(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="the prompt leaves room for 8 tokens, not for 9"):
        make_model().generate(torch.zeros(1, 5, dtype=torch.long), 9)
