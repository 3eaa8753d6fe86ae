"""Codebooks in modules that know nothing of them: plain ones, PyTorch's own, compiled, copied."""

import copy
import pickle

import pytest
import torch
from torch import nn

from minicode import (
    Codebook,
    attach,
    block,
    codebooks,
    detach,
    force,
    record,
    start_codebooks,
    use_codebooks,
)
from minicode.notation import Code


class Net(nn.Module):
    """Two layers of an MLP and a codebook behind each."""

    def __init__(self, d=8, n_codes=16, k=2, groups=2):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(2):
            book = Codebook(n_codes, d // groups, k, groups, similarity="distance")
            self.layers.append(nn.ModuleDict({"map": nn.Linear(d, d), "book": book}))

    def forward(self, x):
        for layer in self.layers:
            x = layer["book"](layer["map"](x).tanh())
        return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (2, 3, 5)])
def test_codes_are_recorded_in_the_shape_of_the_input_and_replayed(net, shape):
    x = torch.randn(*shape, 8)
    with record(net) as codes:
        before = net(x)
    assert list(codes) == ["layers.0.book", "layers.1.book"]
    ids = codes["layers.1.book"]
    assert ids.shape == (*shape, 2, 2)
    assert torch.equal(codebooks(net)["layers.1.book"].sum_codes(ids).flatten(-2), before)
    with force(net, "layers.1.book.1.7"), record(net) as codes:
        after = net(x)
    assert (codes["layers.1.book"][..., 1, :] == 7).any(-1).all()
    assert not torch.equal(before, after)
    with block(net, "layers.1.book.1.7"), record(net) as codes:
        net(x)
    assert not (codes["layers.1.book"][..., 1, :] == 7).any()
    assert torch.equal(net(x), before)


def test_what_was_recorded_changes_nothing_when_it_is_forced(net):
    x = torch.randn(5, 8)  # five sequences of one position each
    with record(net) as codes:
        before = net(x)
    with force(net, codes):
        assert torch.equal(net(x), before)


def test_positions_are_counted_behind_the_first_dimension(net):
    with force(net, "layers.0.book.1.7", position=4), record(net) as codes:
        net(torch.randn(3, 5, 8))
    hit = (codes["layers.0.book"][..., 1, :] == 7).any(-1)  # (3, 5)
    assert hit[:, 4].all() and not hit.all()
    with force(net, "layers.0.book.1.7@-1"), record(net) as codes:
        net(torch.randn(2, 3, 5, 8))
    assert (codes["layers.0.book"][:, 2, 4, 1, :] == 7).any(-1).all()
    never = pytest.raises(ValueError, match="no input has a position 5")
    with never, force(net, "layers.0.book.1.7@5"):
        net(torch.randn(3, 5, 8))


def test_names_are_paths(net):
    assert str(Code.parse("layers.0.book.1.7@3", net)) == "layers.0.book.1.7@3"
    for text, words in (
        ("layers.0.book.7", r"write layers.0.book.GROUP.CODE"),
        ("layers.2.book.1.7", "no codebook at layers.2.book"),
        ("layers.0.book.2.7", "layers.0.book has no group 2"),
        ("layers.0.book", "is not a code"),
    ):
        with pytest.raises(ValueError, match=words):
            Code.parse(text, net)
    alone = Codebook(16, 8, k=2)
    with force(alone, "codebook.3"), record(alone) as codes:
        alone(torch.randn(4, 8))
    assert (codes["codebook"] == 3).any(-1).all()
    with pytest.raises(ValueError, match="Linear holds no codebook"), record(nn.Linear(2, 2)):
        pass


def test_pytorchs_own_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    layer.linear2 = nn.Sequential(layer.linear2, Codebook(32, 8, k=2))
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    x = torch.randn(3, 6, 8)
    with record(encoder) as codes:
        before = encoder(x)
    assert [ids.shape for ids in codes.values()] == 2 * [(3, 6, 1, 2)]
    with force(encoder, "layers.1.linear2.1.5", position=2):
        after = encoder(x)
    changed = (before != after).any(-1)  # (3, 6)
    assert changed[:, 2].all() and not changed[:, [0, 1, 3, 4, 5]].any()


def test_compiled(net):
    """Recorded and forced after the first compiled call, as before it."""
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(3, 5, 8)
    before = compiled(x)
    for _ in range(2):
        with record(compiled) as codes:
            torch.testing.assert_close(compiled(x), before)
        assert codes["layers.1.book"].shape == (3, 5, 2, 2)
        with force(compiled, "layers.1.book.1.7"), record(compiled) as codes:
            compiled(x)
        assert (codes["layers.1.book"][..., 1, :] == 7).any(-1).all()
        torch.testing.assert_close(compiled(x), before)


def test_in_a_wrapper(net):
    wrapped = nn.DataParallel(net)
    with record(wrapped) as codes:
        wrapped(torch.randn(3, 5, 8))
    assert list(codes) == ["layers.0.book", "layers.1.book"]
    book = net.layers[0]["book"]
    for interferes in (record(net), force(net, "layers.0.book.1.7")):
        with interferes:
            replica = book._replicate_for_data_parallel()
            replica.codes = book.codes.detach()
            with pytest.raises(ValueError, match="not recorded or forced on several GPUs"):
                replica(torch.randn(3, 8))
            net(torch.randn(3, 8))


def test_a_copy_is_its_own_and_begins_anew(net):
    net.train()
    x = torch.randn(3, 5, 8)
    net(x).sum().backward()
    with force(net, "layers.1.book.1.7"), record(net) as codes:
        other = copy.deepcopy(net).eval()
        sent = pickle.loads(pickle.dumps(net)).eval()
        net(x)
        codes.clear()
        other(x)
        assert not codes
        net(x)
    net.eval()
    for model in (other, sent):
        assert torch.equal(model(x), net(x))
        with torch.no_grad():
            codebooks(model)["layers.1.book"].codes.zero_()
        assert not torch.equal(model(x), net(x))
    averaged = torch.optim.swa_utils.AveragedModel(net)
    assert torch.equal(averaged(x), net(x))


def test_all_codebooks_start_in_one_pass_each_on_what_those_before_make_of_the_sample(net):
    x = torch.randn(4, 32, 8)
    start_codebooks(net, x, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for layer in net.layers:
        x = layer["map"](x).tanh()
        book = Codebook(16, 4, 2, 2, similarity="distance").eval()
        book.start(x, generator=generator)
        assert torch.equal(layer["book"].codes, book.codes)
        x = book(x)
    assert all(book.enabled for book in codebooks(net).values())
    use_codebooks(net, False)
    with pytest.raises(ValueError, match="16 codes need as many inputs to start from, not 5"):
        start_codebooks(net, torch.randn(5, 8))
    unused = nn.ModuleDict({"net": net, "other": Codebook(4, 8)})
    unused.forward = net.forward
    with pytest.raises(ValueError, match="these codebooks were not reached: other"):
        start_codebooks(unused, torch.randn(32, 8))


# -- attach, by pattern


class Layer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.out = nn.Linear(d, d)
        self.ffn = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))

    def forward(self, x):
        return x + self.ffn(self.out(x))


class Stack(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.layers = nn.ModuleList(Layer(d) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_attach_by_pattern_and_detach():
    torch.manual_seed(0)
    stack = Stack().eval()
    x = torch.randn(3, 6, 32)
    dense = stack(x)
    names = set(stack.state_dict())
    places = {"head": "layers.*.out", "mlp": "layers.*.ffn"}
    assert attach(stack, places, n_codes=8, k={"head": 1, "mlp": 2}, groups=4, skip=2) is stack
    found = codebooks(stack)
    assert sorted(found) == [f"{site}.{layer}" for site in ("head", "mlp") for layer in range(3)]
    assert {book.groups for book in found.values()} == {4}
    assert not any(book.training for book in found.values())
    with record(stack) as codes:
        out = stack(x)
    assert torch.equal(out[:, :2], dense[:, :2]) and not (out[:, 2:] == dense[:, 2:]).any()
    assert (codes["mlp.1"][:, :2] == -1).all() and (codes["mlp.1"][:, 2:] >= 0).all()
    use_codebooks(stack, False)
    assert torch.equal(stack(x), dense)
    detach(stack)
    assert torch.equal(stack(x), dense)
    assert set(stack.state_dict()) == names and not codebooks(stack)
    with pytest.raises(ValueError, match="attach put no codebooks"):
        detach(stack)


@pytest.mark.parametrize(
    "sites, more, words",
    [
        ({"mlp": "layers.*.fnn"}, {}, r"mlp: this model has no module layers.\*.fnn"),
        ({"mlp": "layers.*.ffn.*"}, {}, r"layers.0.ffn.0 and layers.0.ffn.1"),
        ({"mlp": "layers.*.ffn.1"}, {}, "how wide is what ReLU gives"),
        ({"mlp": "layers.*.ffn"}, {"groups": 5}, r"groups \(5\) must divide the 32 dimensions"),
        ({"a": "layers.*.out", "b": "layers.*.out"}, {}, "b.0 and a.0 are the same module"),
        ({"mlp": "layers.*.ffn"}, {"layers": [3]}, "layers: this model has 0 to 2, not 3"),
        ({"mlp": "layers.*.ffn"}, {"k": {"head": 1}}, "has nothing for the site mlp"),
        ({"mlp": "layers.*.ffn"}, {"k": 9, "n_codes": 8}, "k must be from 1 to the 8 codes"),
        ("mlp", {}, "Stack is no causal model of transformers: name its modules by pattern"),
    ],
)
def test_what_can_not_be_attached_is_one_line_and_leaves_the_model_alone(sites, more, words):
    stack = Stack()
    x = torch.randn(2, 3, 32)
    dense = stack(x)
    with pytest.raises(ValueError, match=words):
        attach(stack, sites, **more)
    assert torch.equal(stack(x), dense) and not codebooks(stack)
    attach(stack, {"mlp": "layers.*.ffn"}, layers=[1])
    assert list(codebooks(stack)) == ["mlp.1"]
    with pytest.raises(ValueError, match="has codebooks already"):
        attach(stack, {"mlp": "layers.*.ffn"})


def test_attach_comes_before_compile():
    with pytest.raises(ValueError, match="attach before torch.compile"):
        attach(torch.compile(Stack()), {"mlp": "layers.*.ffn"})
    stack = Stack()
    stack.compile()
    with pytest.raises(ValueError, match="attach before torch.compile"):
        attach(stack, {"mlp": "layers.*.ffn"})
