"""The transformer: sites, cache, and that codebooks come off and on."""

import pytest
import torch
from conftest import make_model, make_tokens

from minicode import GPTConfig, record
from minicode.model import SITES


def test_codebooks_by_name_in_the_order_of_the_pass(fsm):
    model, order = make_model(), []
    for name, codebook in model.codebooks().items():
        codebook.register_forward_hook(lambda *_, name=name: order.append(name))
    model(make_tokens(fsm))
    assert (
        order
        == list(model.codebooks())
        == [f"{site}.{layer}" for layer in range(2) for site in SITES]
    )


@pytest.mark.parametrize("site", SITES)
def test_each_site_alone(site, fsm):
    model = make_model(site)
    assert list(model.codebooks()) == [f"{site}.0", f"{site}.1"]
    with record(model) as codes:
        model(make_tokens(fsm))
    groups = 2 if site == "head" else 1
    assert codes[f"{site}.1"].shape == (3, 8, groups, 2)


def test_off_is_the_dense_model_and_on_again_is_as_before(fsm):
    model, dense, tokens = make_model(), make_model("none"), make_tokens(fsm)
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "codebook" not in k})
    with_codebooks, _ = model(tokens)
    model.use_codebooks(False)
    assert torch.equal(model(tokens)[0], dense(tokens)[0])
    model.use_codebooks(True)
    assert torch.equal(model(tokens)[0], with_codebooks) and not torch.equal(
        dense(tokens)[0], with_codebooks
    )


@pytest.mark.parametrize("codebooks", ["none", "head,mlp", "head,attn,mlp_mid,mlp,block"])
def test_cached_equals_uncached_generation(codebooks, fsm):
    model, prompt = make_model(codebooks), make_tokens(fsm, n=16, length=3)
    for settings in ({"temperature": 0}, {"temperature": 0.8, "top_k": 3}):
        runs = [
            model.generate(
                prompt, 10, generator=torch.Generator().manual_seed(1), use_cache=cached, **settings
            )
            for cached in (True, False)
        ]
        assert torch.equal(*runs) and runs[0].shape == (16, 13)


def test_cached_logits_equal_in_parts_of_any_length(fsm):
    model, tokens, cache = make_model("head,mlp"), make_tokens(fsm), {}
    parts = [model(part, cache=cache)[0] for part in tokens.split([3, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens)[0])


def test_no_position_sees_the_future(fsm):
    model, tokens = make_model(), make_tokens(fsm)
    changed = tokens.clone()
    changed[:, 5:] = (tokens[:, 5:] + 1) % 4
    torch.testing.assert_close(model(tokens)[0][:, :5], model(changed)[0][:, :5])


def test_loss_is_the_cross_entropy_of_the_logits(fsm):
    tokens = make_tokens(fsm, length=9)
    logits, loss = make_model()(tokens[:, :-1], tokens[:, 1:])
    wanted = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    torch.testing.assert_close(loss, wanted)


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
        ({"k": 300}, r"k \(300\) is more than the 16 codes of a head codebook"),
        ({"n_layer": 0}, "n_layer must be at least 1, not 0"),
        ({"similarity": "cosin"}, "similarity must be one of cosine, distance, dot, not 'cosin'"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**settings)


def test_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="codebook"):
        GPTConfig(codebook="mlp")


def test_too_many_tokens(fsm):
    with pytest.raises(ValueError, match="13 tokens are more than the block_size of 12"):
        make_model()(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(
        ValueError,
        match="a prompt of 5 tokens leaves room for 8 more in the block of 12, not for 9",
    ):
        make_model().generate(torch.zeros(1, 5, dtype=torch.long), 9)
