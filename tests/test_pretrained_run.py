"""A folder of a Hugging Face model, through the commands: a run like any other."""

import json
import shutil

import pytest
import torch
from conftest import read_metrics
from test_train import refusal

from minicode import load_run, record
from minicode.codebook import codebooks
from minicode.interpret import main as interpret
from minicode.language.text import Text
from minicode.runtime.files import write
from minicode.sample import main as sample
from minicode.train import train_step
from minicode.train_text import main as train_text

transformers = pytest.importorskip("transformers", reason="pip install '.[hf]' has the tests of it")

TEXT = "The king has a crown. A queen walks by the sea, and the sea is loud.\n\n" * 4
SIZE = "--n-codes 24 --n-codes-head 8 --groups-mlp 4 --k 2 --block-size 24 --batch-size 4"
STEPS = "--steps 20 --eval-every 10 --device cpu"


def make_folder(folder):
    """A Llama of two layers, random, and a tokenizer of bytes and some pairs of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": 300, "special_tokens": ["<s>"], "initial_alphabet": alphabet}
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(**how, show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("hub"))
    text = folder / "text.txt"
    words = ["king", "queen", "sea", "crown", "loud", "walk", "by", "the", "and", "is"]
    generator = torch.Generator().manual_seed(0)
    with open(text, "w", encoding="utf-8") as file:
        for _ in range(400):
            some = torch.randint(len(words), (12,), generator=generator)
            file.write(" ".join(words[i] for i in some) + ".\n\n")
    return folder


def train(hub, out, *more):
    flags = ["--model", str(hub), "--data", str(hub / "text.txt"), "--out", str(out)]
    return train_text([*flags, *SIZE.split(), *STEPS.split(), *more])


@pytest.fixture(scope="module")
def run_folder(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "text"
    assert train(hub, folder) == 0
    return folder


def test_a_run_of_a_pretrained_model(hub, run_folder, capsys):
    run = load_run(run_folder)
    assert list(codebooks(run.model)) == ["head.0", "mlp.0", "head.1", "mlp.1"]
    assert run.config.n_layer == 2 and run.config.n_embd == 16
    lines = read_metrics(run_folder)
    assert [(line["step"], "sites" in line) for line in lines] == [
        (0, False),
        (0, True),
        (10, True),
        (20, True),
    ]
    summary = run.summary
    assert summary["dense"] == lines[0] and summary["started"] == lines[1]
    assert summary["twin"]["loss"] < summary["dense"]["loss"]
    assert summary["loss"] < summary["started"]["loss"] and summary["loss_zero"] > 0
    assert summary["codes_per_token"] == 2 * (2 * 2 + 4 * 2)
    assert 0 < summary["fvu"] < 1
    tokens = run.data.prompt("The king")
    dense = transformers.AutoModelForCausalLM.from_pretrained(hub).eval()
    with torch.no_grad():
        torch.testing.assert_close(run.dense(tokens)[0], dense(tokens).logits)
    with record(run.model) as codes:
        made = run.model.generate(tokens, 6, 0)
    assert codes["mlp.1"].shape[:2] == (1, made.shape[1] - 1)
    assert run.data.show(tokens[0].numpy()) == "The king"


def test_it_is_its_folder_alone(hub, run_folder, tmp_path):
    """A run's folder goes without the model's own, and resumes to the same bits."""
    away = shutil.copytree(run_folder, tmp_path / "away")
    assert load_run(away).model.generate(torch.tensor([[1]]), 3, 0).shape == (1, 4)
    resumed = tmp_path / "resumed"
    stopped = pytest.MonkeyPatch()
    steps = []

    def only_ten(model, forward, optimizer, config, step, data):
        steps.append(step)
        if step == 15:
            raise FloatingPointError("stopped by the test")
        return train_step(model, forward, optimizer, config, step, data)

    stopped.setattr("minicode.train.train_step", only_ten)
    with pytest.raises(SystemExit):
        train(hub, resumed)
    stopped.undo()
    assert steps[-1] == 15
    assert train(hub, resumed, "--resume") == 0
    one, other = (torch.load(f / "model.pt", weights_only=True) for f in (run_folder, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_twin_is_trained_on_the_very_same_batches(hub, run_folder, tmp_path):
    assert train(hub, tmp_path / "dense", "--codebooks", "none") == 0
    dense = load_run(tmp_path / "dense").summary
    twin = load_run(run_folder).summary["twin"]
    assert twin["loss"] == pytest.approx(dense["loss"], abs=1e-5)


def test_the_other_commands(run_folder, capsys):
    flags = ["--run", str(run_folder)]
    more = ["--prompt", "the king", "--num-samples", "2", "--max-new-tokens", "5", "--json"]
    sample([*flags, *more, "--force-code", "mlp.1.2.7"])
    result = json.loads(capsys.readouterr().out)
    assert all(text.startswith("the king") for text in result["samples"])
    sample([*flags, *more, "--force-code", "word:king"])
    assert "mentions" in json.loads(capsys.readouterr().out)
    interpret([*flags, "--search", "king", "--json"])
    assert json.loads(capsys.readouterr().out)["matches"] > 100
    interpret([*flags, "--code", "mlp.1.2.7"])
    assert "when it is forced, next:" in capsys.readouterr().out
    interpret(flags)
    assert "code precision" in capsys.readouterr().out
    assert (run_folder / "report.html").stat().st_size > 10_000


def test_what_is_no_model_is_one_line_and_leaves_no_folder(hub, tmp_path, capsys):
    def refused(folder, *more):
        out = tmp_path / "out"
        flags = ["--model", str(folder), "--data", str(hub / "text.txt"), "--out", str(out)]
        line = refusal(train_text, *flags, *SIZE.split(), *STEPS.split(), *more, capsys=capsys)
        assert not out.exists()
        return line

    def without(name):
        copy = shutil.copytree(hub, tmp_path / f"without-{name}")
        (copy / name).unlink()
        return copy

    assert "is no folder of a Hugging Face model" in refused(tmp_path / "nowhere")
    assert "it has no tokenizer.json" in refused(without("tokenizer.json"))
    assert "could not be read" in refused(without("model.safetensors"))
    other = shutil.copytree(hub, tmp_path / "t5")
    transformers.T5Config().save_pretrained(other)
    assert "could not be read as a causal model" in refused(other)
    assert "n_layer doesn't go with a pretrained model" in refused(hub, "--n-layer", "3")
    assert "there is no site 'attn'; the sites are head, mlp" in refused(hub, "--codebooks", "attn")
    assert "block_size must be below 65, not 65" in refused(hub, "--block-size", "65")
    assert "vocab doesn't go with a pretrained model" in refused(hub, "--vocab", "300")
    assert "layer_norm doesn't go with" in refused(hub, "--layer-norm")
    mamba = shutil.copytree(hub, tmp_path / "mamba")
    transformers.MambaConfig(num_hidden_layers=1).save_pretrained(mamba)
    assert "holds no transformer" in refused(mamba)


def test_no_code_in_a_folder_is_run(hub, tmp_path, capsys):
    folder = shutil.copytree(hub, tmp_path / "hostile")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config |= {"model_type": "evil", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    flags = ["--model", str(folder), "--data", str(hub / "text.txt")]
    assert "could not be read" in refusal(train_text, *flags, capsys=capsys)
    assert not (tmp_path / "ran").exists()


def test_codebooks_half_way_and_a_twin_that_is_kept(hub, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert train(hub, folder, "--dense-share", "0.5") == 0
    summary = load_run(folder).summary
    assert summary["dense"]["step"] == summary["started"]["step"] == 10
    monkeypatch.setattr("minicode.train_text.finetune_twin", None)  # it is there already
    assert train(hub, folder, "--dense-share", "0.5", "--resume") == 0
    assert load_run(folder).summary["twin"] == summary["twin"]


def test_ctrl_c_while_the_twin_is_trained_ends_in_one_line(hub, tmp_path, monkeypatch, capsys):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr("minicode.train_text.finetune_twin", interrupted)
    assert train(hub, tmp_path / "run") == 130
    assert capsys.readouterr().err.rstrip().endswith("stopped: --resume makes the table")


def test_the_models_own_folder_is_left_alone(hub, capsys):
    before = {path: path.read_bytes() for path in hub.iterdir()}
    flags = ["--model", hub, "--data", hub / "text.txt", "--overwrite"]
    for out in (hub, hub / "run"):
        line = refusal(train_text, *flags, "--out", out, capsys=capsys)
        assert "is in the folder of the model itself" in line
    assert {path: path.read_bytes() for path in hub.iterdir()} == before


def test_dropout_is_the_same_when_a_run_is_resumed(tmp_path, hub):
    folder = tmp_path / "gpt2"
    shutil.copytree(hub, folder)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)

    def run(out, *more):
        flags = ["--model", str(folder), "--data", str(hub / "text.txt"), "--out", str(out)]
        status = train_text([*flags, *SIZE.split(), *STEPS.split(), "--steps", "6", *more])
        assert status == 0
        return torch.load(out / "model.pt", weights_only=True)

    def die(model, forward, optimizer, config, step, data):
        if step == 4:
            raise FloatingPointError("stopped by the test")
        return train_step(model, forward, optimizer, config, step, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minicode.train.train_step", die)
        with pytest.raises(SystemExit):
            run(tmp_path / "b", "--checkpoint-every", "2")
    other = run(tmp_path / "b", "--checkpoint-every", "2", "--resume")
    one = run(tmp_path / "a", "--checkpoint-every", "2")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_tokens_of_a_large_vocabulary_are_kept_whole(tmp_path):
    """66,000 words, each a token: more than 16 bits can count."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{i}" for i in range(66_000)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0")
    fast.save_pretrained(tmp_path / "hub")
    transformers.LlamaConfig(vocab_size=66_000).save_pretrained(tmp_path / "hub")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"w{i} w1\n\n" for i in range(65_500, 65_999)), encoding="utf-8")
    own = Text([str(text)], model=str(tmp_path / "hub"))
    before = [part.tolist() for part in own.parts]
    assert max(map(max, before)) == 65_998
    (tmp_path / "pretrained").mkdir()
    for name, content in own.files().items():
        write(tmp_path / name, content)
    own.settle(tmp_path)
    assert [part.tolist() for part in own.parts] == before
