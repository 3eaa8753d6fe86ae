"""The network in the page as a reader touches it: prompts, codes forced and blocked, what comes."""

import json
from contextlib import ExitStack

import pytest
import torch
from conftest import make_model

from minicode import block, force, load_run
from minicode.language.text import Text
from minicode.model import evaluating
from minicode.sample import main as sample
from minicode.study.detectors import best_labels, chosen, held_out, record_codes
from minicode.study.page import page, weights

TOOLS = """
    const bars = (kind) => text(`#next .bar.${kind} b`).map(Number);
    const last = (row) => row.cells[row.cells.length - 1];
    const state = () => ({
      edits: text("#edits li"), prompt: $("#prompt").value, complaint: $("#complaint").textContent,
      free: bars("free"), forced: bars("forced"), title: $("#touch .panel h3").textContent,
      looks: all("#touch tbody tr").map((row) => last(row).className.split(" ").at(-1)),
      codes: all("#touch tbody tr").map((row) => last(row).firstChild.dataset.code),
    });
    const grid = (row, column) => $("#touch table").rows[row].cells[column].firstChild;
    const ask = (value) => {
      $("#touch .panel input").value = value;
      $("#touch .panel form button").click();
    };
    const written = async () => {
      await until(() => text("#written li, .machine #written p").every((line) => line.trim()));
      return [text("#written li"), text("#written p")];
    };
    const seen = { opened: state(), written: await written() };"""


@pytest.fixture(scope="module")
def run(tiny_run):
    return load_run(tiny_run)


@pytest.fixture(scope="module")
def data(run):
    tokens, kinds = held_out(run)
    recording = record_codes(run.model, tokens)
    labels = best_labels(recording, kinds)
    return {**page(run, recording, kinds, labels, {}, {}), "measures": []}


def expected(model, tokens, *edits):
    """The next token's distribution, as the page rounds it; edits are (force, codes, position)."""
    with ExitStack() as stack:
        for act, codes, position in edits:
            stack.enter_context(act(model, codes, position))
        stack.enter_context(evaluating(model))
        p = model(tokens)[0][0, -1].softmax(-1)
    return pytest.approx(p.tolist(), abs=0.00051)


def state_after(run, text):
    return {site: ids[0] for site, ids in chosen(run.model, run.fsm.prompt(text)).items()}


TOUCH = """
    $("#clear").click(); seen.cleared = state();
    type("#prompt", "3 10"); seen.typed = state();
    type("#prompt", "9"); seen.bad = state();
    type("#prompt", "31 02 31 02 31 02"); seen.long = state();
    type("#prompt", "3102");
    grid(3, 5).click(); seen.chip = state();
    $("#touch .panel li button").click(); seen.blocked = state();
    grid(6, 5).click(); ask("7"); seen.force = state();
    ask("8"); seen.many = state();
    ask("mlp.0.3"); seen.elsewhere = state();
    grid(0, 3).click(); ask("12"); seen.put = state();
    ask("x"); seen.nonsense = state();
    $("#edits button").click(); seen.removed = state();
    grid(3, 5).click();
    all("#touch .panel input")[1].value = "21";
    all("#touch .panel form button")[1].click(); seen.part = state();
    seen.focus = document.activeElement === grid(3, 5);
    $("#shows button").click(); seen.shown = state();
    seen.again = [await written()];
    $("#again").click(); seen.again.push(await written());
    seen.wide = wide();
    return seen;"""


def test_codes_and_states_are_put_in_and_taken_out(browse, run, data):
    seen = browse(data, TOOLS + TOUCH)
    model = run.model
    here, there = data["machine"]["demonstration"]
    tokens = run.fsm.prompt(here)
    for shown in (seen["opened"], seen["shown"]):
        assert shown["edits"] == [f"codes of {there} forced at position 2 ×"]
        assert shown["prompt"] == here
        assert shown["free"] == expected(model, tokens)
        assert shown["forced"] == expected(model, tokens, (force, state_after(run, there), 2))
        assert shown["looks"] == ["forced"] * 6
    assert seen["cleared"]["edits"] == []
    assert seen["cleared"]["forced"] == expected(model, tokens)
    assert seen["typed"]["free"] == expected(model, torch.tensor([[4, 3, 1, 0]]))
    assert seen["typed"]["title"] == "The state after 0 at position 3"
    assert seen["bad"]["complaint"] == "a prompt is states, from 00 to 33"
    assert seen["bad"]["free"] == seen["typed"]["free"]
    assert seen["long"]["complaint"].startswith("The network reads 12 tokens")
    assert seen["long"]["prompt"] == "31 02 31 02 31 0"
    check_edits(run, seen)
    check_written(run.fsm, seen, here, there)
    assert not seen["wide"]


def test_the_demonstration_is_that_of_the_command(tiny_run, data, capsys):
    sample(["--run", str(tiny_run), "--force-code", "--num-samples", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert data["machine"]["demonstration"] == [result["prompt"], result["state"]]


def check_edits(run, seen):
    model = run.model
    tokens = run.fsm.prompt("31 02")
    assert seen["chip"]["title"] == "mlp.0 after 2 at position 4"
    own = seen["chip"]["codes"][2]
    steps = [(block, own, 4)]
    assert seen["blocked"]["edits"] == [f"{own} blocked at position 4 ×"]
    assert seen["blocked"]["forced"] == expected(model, tokens, *steps)
    assert seen["blocked"]["free"] == expected(model, tokens)
    assert seen["blocked"]["codes"][2] != own
    steps.append((force, "mlp.1.7", 4))
    assert seen["force"]["forced"] == expected(model, tokens, *steps)
    assert seen["force"]["codes"][5] == "mlp.1.7"
    assert seen["many"]["complaint"] == "at most 1 codes can be forced at a place"
    assert "mlp.1 has no code mlp.0.3" in seen["elsewhere"]["complaint"]
    for name in ("many", "elsewhere"):
        assert {**seen[name], "complaint": ""} == seen["force"]
    steps.append((force, state_after(run, "12"), 2))
    assert seen["put"]["forced"] == expected(model, tokens, *steps)
    assert seen["nonsense"]["complaint"] == "a prompt is states, from 00 to 33"
    assert len(seen["nonsense"]["edits"]) == 3
    assert seen["removed"]["forced"] == expected(model, tokens, *steps[1:])
    steps.append((force, {"mlp.0": state_after(run, "21")["mlp.0"]}, 4))
    assert seen["part"]["edits"][-1] == "codes of 21 in mlp.0 forced at position 4 ×"
    assert seen["part"]["forced"] == expected(model, tokens, *steps[1:])
    assert seen["focus"]


def check_written(fsm, seen, here, there):
    """Eight texts a side, the same numbers drawn for both; how many follow is counted."""
    first, second = seen["again"]
    assert first == seen["written"] and first != second
    lines, notes = first
    assert len(lines) == 16
    names = [fsm.name(state) for state in range(fsm.n_states)]
    after = {name: fsm.successors[number] for number, name in enumerate(names)}
    begins = [line.split(" → ")[1] for line in lines]
    assert all(line.startswith(f"{here} → ") for line in lines)

    def follow(some, state):
        return sum(begin in names and names.index(begin) in after[state] for begin in some)

    counts = [
        ", ".join(f"{follow(some, state)} of 8 may follow {state}" for state in (here, there))
        for some in (begins[:8], begins[8:])
    ]
    assert notes[1::2] == counts
    assert notes[0] == f"{here} may be followed by {' '.join(names[s] for s in after[here])}"


WRITE = """
    const results = [];
    for (const [prompt, other, level] of %s) {
      const tokens = encode(prompt);
      const position = tokens.length - 1;
      const edits = other === null ? [] : [{ kind: "as", text: other, position }];
      const how = resolve(edits, tokens.length);
      results.push(goOn(readAll(tokens, how.resolved), how, 6, () => level));
    }
    return results;"""


def write_on(run, prompt, other, level, n=6):
    """Tokens after a prompt, each the one in which a share `level` of the probability ends.

    As `steer` does, the codes of another prompt are forced, until the next state is complete.
    """
    model = run.model
    tokens = run.fsm.prompt(prompt)
    there = None if other is None else run.fsm.prompt(other)
    edits = []
    for step in range(n):
        if there is not None and step < run.fsm.digits:
            codes = {site: ids[0] for site, ids in chosen(model, there).items()}
            edits.append((codes, tokens.shape[1] - 1))
        with ExitStack() as stack:
            for codes, position in edits:
                stack.enter_context(force(model, codes, position))
            stack.enter_context(evaluating(model))
            p = model(tokens)[0][0, -1].double().softmax(-1)
        new = int((p.cumsum(-1) <= level).sum())
        tokens = torch.cat((tokens, torch.tensor([[new]])), dim=1)
        if there is not None:
            there = torch.cat((there, torch.tensor([[new]])), dim=1)
    return tokens[0, -n:].tolist()


def test_what_is_written_is_as_the_demonstration_has_it(browse, run, data):
    prompts = [("31", "02", 0.5), ("3102", "12", 0.3), ("13", "33", 0.9), ("20", None, 0.5)]
    found = browse(data, WRITE % json.dumps(prompts))
    for prompt, tokens in zip(prompts, found):
        assert tokens == write_on(run, *prompt)


def test_the_codes_of_a_topic_and_a_text_as_prompt(browse, tmp_path):
    path = tmp_path / "text.txt"
    words = "The king's 2 dragons_ said: “né, no 東京!” \t and\n went; 🐉 x² café\u0301 ½ "
    path.write_text("\n\n".join(f"{words}{i}." for i in range(40)), encoding="utf-8")
    text = Text([str(path)], vocab=300)
    size = {"vocab_size": text.vocab_size, "block_size": 64}
    model = make_model("head", k=2, **size)
    prompts = ["", "The king", words, "zzz \n\n né 東 🐉", "  two  spaces", "a_b 12x"]
    codes = ["head.0.0.3", "head.1.1.5"]
    data = {
        "title": "run", "about": "", "measures": [], "figures": [], "vocab": text.vocabulary,
        "group": 0, "length": 2, "tokens": [256, 65], "codes": [], "left_out": 0, "fits": 0.5,
        "machine": None, "states": [], "network": weights(model), "prompt": "went;\nThe king said",
        "steered": [["king", codes]],
    }  # fmt: skip
    script = """
        const tokens = %s.map(encode);
        const texts = tokens.map(decode);
        const shown = text("#next .token");
        $("#clear").click(); seen.cleared = state();
        $("#shows button").click(); seen.shown = state();
        type("#prompt", $("#prompt").value); seen.typed = state();
        return { tokens, texts, shown, seen };"""
    found = browse(data, TOOLS + script % json.dumps(prompts))
    assert found["tokens"] == [text.prompt(prompt)[0].tolist() for prompt in prompts]
    assert found["texts"] == prompts
    tokens = text.prompt("went;\nThe king said")
    seen = found["seen"]
    for shown in (seen["opened"], seen["shown"], seen["typed"]):
        assert shown["prompt"] == "went;↵The king said"
        assert shown["edits"] == [f"{code} forced ×" for code in codes]
        assert (shown["looks"][0], shown["codes"][0]) == ("forced", codes[0])
        free = expected(model, tokens).expected
        forced = expected(model, tokens, (force, codes, "generated")).expected
        likely = sorted(zip(free, forced), key=max, reverse=True)[:10]
        assert [*zip(shown["free"], shown["forced"])] == [
            pytest.approx(p, abs=6e-4) for p in likely
        ]
    assert seen["cleared"]["edits"] == []
    assert seen["cleared"]["forced"] == seen["cleared"]["free"]
    assert len(seen["written"][0]) == 8
