"""The charts, as XML; and the page of a run, opened in a real browser without a window."""

import base64
import hashlib
import re
import xml.etree.ElementTree as ET

import pytest

from minicode.study.figures import bars, scatter, ticks
from minicode.study.page import write_report

SVG = "{http://www.w3.org/2000/svg}"
NAN = float("nan")


# -- charts


def paths(svg):
    return list(ET.fromstring(svg).iter(SVG + "path"))


def texts(svg):
    return [text.text for text in ET.fromstring(svg).iter(SVG + "text")]


def axis(svg, anchor):
    """Numbers on an axis with their places in pixels: {number: (x, y)}; y: "end", x: "middle"."""
    found = {}
    for text in ET.fromstring(svg).iter(SVG + "text"):
        if text.get("text-anchor") == anchor and re.fullmatch(r"-?[\d,.]+", text.text):
            x = float(text.get("x"))
            y = float(text.get("y"))
            found[float(text.text.replace(",", ""))] = (x, y - 4.5 if anchor == "end" else y)
    return found


def ends(path):
    """Where a horizontal line begins and ends, and its height: (x, x, y)."""
    found = re.fullmatch(r"M([\d.]+) ([\d.]+)H([\d.]+)", path.get("d"))
    x, y, end = map(float, found.groups())
    return x, end, y


def near(values):
    return pytest.approx(values, abs=0.11)


@pytest.mark.parametrize(
    "values", [[0, 1], [0.3, 0.7], [-5, 12.5], [1e-6, 3e-6], [99, 100], [0, 123456], [-3, -2], [7]]
)
def test_ticks_are_round_and_cover_the_data(values):
    found = ticks(values)
    step = found[1] - found[0]
    assert 2 <= len(found) <= 8
    assert found == sorted(found)
    assert found[0] <= min(0, *values, 0) + 0.1 * step
    assert found[-1] >= max(0, *values, 0) - 0.1 * step
    assert float(f"{step:.6e}"[0]) in (1, 2, 5)
    for tick in found:
        assert tick / step == pytest.approx(round(tick / step), abs=1e-6)


def test_ticks_by_hand():
    assert ticks([0.02, 0.98]) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks([]) == ticks([0, 1])
    assert ticks([3]) == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3])


def test_bars_and_their_errors_are_where_the_axis_says():
    svg = bars(
        ["a", "b"],
        {"one": [0.25, 1.0], "two": [0.5, 0.75]},
        {"one": [0.125, 0.0], "two": [0.0, 0.0]},
        title="t",
    )
    numbers = axis(svg, "middle")

    def pixel(value):
        return numbers[0][0] + value * (numbers[1][0] - numbers[0][0])

    drawn = paths(svg)
    notes = [path.findtext(SVG + "title", "") for path in drawn]
    first = notes.index("a, one: 0.25")
    assert notes[first + 1] == "± 0.12"
    bar = ends(drawn[first])
    error = ends(drawn[first + 1])
    assert bar[:2] == near([pixel(0), pixel(0.25)])
    assert error[:2] == near([pixel(0.125), pixel(0.375)])
    assert bar[2] == error[2]
    heights = {}
    for path, note in zip(drawn, notes):
        if ":" in note:
            heights[note] = ends(path)[2]
    assert sorted(heights, key=heights.get) == [
        "a, one: 0.25",
        "a, two: 0.5",
        "b, one: 1",
        "b, two: 0.75",
    ]
    assert {"a", "b", "one", "two"} <= set(texts(svg))


def test_bars_without_errors_have_no_lines_on_them():
    notes = [path.findtext(SVG + "title", "") for path in paths(bars(["a"], {"one": [0.5]}))]
    assert "a, one: 0.5" in notes
    assert not any("±" in note for note in notes)


def test_scatter_has_a_dot_a_point_where_the_axes_say_and_larger_ones_with_labels():
    points = [(0, 0), (1, 1), (1, 0)]
    svg = scatter(points, [0, 1, 1], ["", "", "seven"], title="t")
    x = axis(svg, "middle")
    y = axis(svg, "end")
    dots = []
    for path in paths(svg):
        if path.get("d").endswith("h0"):
            place = [float(number) for number in re.findall(r"[\d.]+", path.get("d"))[:2]]
            dots.append((place, path.get("stroke-width"), path.get("class")))
    assert dots == [
        (near([x[0][0], y[0][1]]), "5", "c0"),
        (near([x[1][0], y[1][1]]), "5", "c1"),
        (near([x[1][0], y[0][1]]), "12", "c1"),
    ]
    assert "seven" in texts(svg)


HOSTILE = {"title": "<script>&\"'", "x": "<b>"}
CHARTS = {
    "nothing": [
        bars([], {}),
        scatter([]),
    ],
    "one value": [
        bars(["a"], {"b": [-3]}),
        bars(["a"], {"b": [0]}),
        scatter([(1e-9, 0)]),
    ],
    "large": [
        scatter([(i / 7, i / 3) for i in range(1000)]),
    ],
    "hostile": [
        bars(["<i>"], {"&amp;": [1], "]]>": [2]}, **HOSTILE),
        scatter([(0, 1)], labels=["<i>"], y="]]>", **HOSTILE),
    ],
}


@pytest.mark.parametrize("name", CHARTS)
def test_charts_of_any_data_are_small_and_well_formed(name):
    for svg in CHARTS[name]:
        root = ET.fromstring(svg)
        assert len(svg) < 120_000
        assert "nan" not in svg.lower()
        assert "inf" not in svg
        assert root.get("role") == "img"
        assert root.get("aria-label") == root.findtext(SVG + "title")
        tags = {element.tag.removeprefix(SVG) for element in root.iter()}
        assert tags == {"svg", "title", "style", "path", "text"}
        if name == "hostile":
            assert root.get("aria-label") == HOSTILE["title"]
            assert {"<i>", "<b>", "]]>"} <= set(texts(svg))


# -- the page

VOCAB = ["0", "1", "2", "3", "B"]
VOCAB += ["<script>window.hacked=1</script>", "</script>", "<img src=x onerror=window.hacked=1>"]
VOCAB += ["\u2028&\n"]
SPACE = "\u2009"
NONE = [[], [], [], [], [], []]  # places, misses, false alarms, next, near, together


def make_data(**changes):
    """Two sequences of 7 tokens, and five codes: one is dead, one has a label that does not fit."""
    state = ["state", "<b>01"]
    next_tokens = [[1, 0.75, 0.25, 2.992], [7, 0.0125, 0.005, 2.25]]
    data = {
        "title": "runs/<b>tiny",
        "about": "about & more",
        "measures": [["accuracy", 0.5, "a note"], ["codes", 1234, None], ["nothing", NAN, ""]],
        "figures": [{"svg": bars(["a"], {"b": [1]}, title="a chart"), "caption": "<i>caption"}],
        "vocab": VOCAB,
        "length": 7,
        "group": 2,
        "tokens": [4, 0, 1, 2, 3, 0, 2, 4, 5, 6, 7, 8, 1, 1],
        "codes": [
            ["mlp.0.2", 7, state, 0.5, 1.0, [2, 10], [3], [11], next_tokens, [[1, 0.5]], [[3, 1]]],
            ["mlp.0.10", 3, None, None, None, [0, 6], [], [], [[0, 1.0, 0.5, 2]], [], []],
            ["head.1.0.3", 0, None, None, None, *NONE],
            ["mlp.1.1", 4, ["state", "11"], 0.9, 0.9, [13], *NONE[1:]],
            ["mlp.1.2", 2, ["state", "11"], 0.1, 0.2, [4], *NONE[1:]],
        ],
        "left_out": 0,
        "fits": 0.5,
        "machine": None,
        "steered": [],
        "prompt": "",
        "network": None,
        "states": [[[0, 3], [1, 3], [0, 4], [1, 0], [3], [0], [0, 1]], [[0]] * 7],
    }
    return {**data, **changes}


SHOWN = """
    const names = () => text("#list tbody a");
    const cells = (row) => [...row.cells].map((cell) => cell.textContent);
    const rows = (selector) => all(selector).map(cells);
    const run = {
      title: document.title, h1: $("h1").textContent, about: $("#about").textContent,
      measures: rows("#measures tr"), svg: $("#figures svg title").textContent,
      figure: text("figure h3, figcaption"), found: $("#found").textContent,
      rows: rows("#list tbody tr"), more: $("#more").hidden, wide: wide(),
      touch: $("#touch").hidden,
    };"""
LIST = """
    const lists = {};
    const note = (what) => { lists[what] = names().join(" "); };
    for (const words of ["mlp.0", "STATE", "mlp.0 <b>", "none such", ""]) {
      type("#search", words);
      note(words);
    }
    type("#site", "mlp.1"); note("site"); type("#site", "");
    type("#least", "0.6"); note("least"); type("#least", "0");
    $("#dead").click(); note("dead"); $("#dead").click();
    for (const order of ["count", "label", "name"]) { type("#order", order); note(order); }
    type("#order", "f1");
    const sites = all("#site option").map((option) => option.value);"""
CODE = """
    const list = () => until(() => !$("#run").hidden);
    const parts = (line) => [...line.children].map((part) => part.textContent);
    await open("mlp.0.2");
    const first = {
      contexts: all(".context").map(parts), heads: text("#code h2, #code h3"),
      facts: text("#code dd"), label: $("#code strong").textContent, run: $("#run").hidden,
      focus: document.activeElement.tagName, tokens: text("#code .token"), bars: text("#code .bar"),
      lifts: text("#code .next > .soft"), near: text("#code .plain li"),
      command: $("#code code").textContent, address: location.hash, wide: wide(),
    };
    key("Escape");
    await list();
    const focused = document.activeElement.textContent;
    const back = { hidden: $("#code").hidden, focus: focused, address: location.hash };
    await open("mlp.0.10");
    const second = all(".context").map(parts);
    key("ArrowRight");
    await until(() => $("#code h1").textContent === "head.1.0.3");
    const dead = $("#code").textContent;
    key("ArrowLeft");
    await until(() => $("#code h1").textContent === "mlp.0.10");
    $("#code a").click();
    await list();
    await open("mlp.1.2");
    const misfit = $("#code").textContent;"""
RETURN = "return { run, lists, sites, first, back, second, dead, misfit };"


def test_the_run_its_list_and_the_pages_of_its_codes(browse):
    found = browse(make_data(), SHOWN + LIST + CODE + RETURN)
    check_run(found["run"])
    check_lists(found)
    check_codes(found)


def check_run(run):
    assert run["title"] == "runs/<b>tiny · minicode"
    assert run["h1"] == "runs/<b>tiny"
    assert run["about"] == "about & more"
    assert run["svg"] == "a chart"
    assert run["figure"] == ["a chart", "<i>caption"]
    assert run["more"] and run["touch"]
    assert not run["wide"]
    assert run["measures"] == [
        ["accuracy", "0.500", "a note"],
        ["codes", "1,234", ""],
        ["nothing", "–", ""],
    ]
    assert run["found"] == "4 of 5 codes, 3 groups"
    misfit = f"B{SPACE}01{SPACE}23{SPACE}02nearest: state 11 (precision 0.10, recall 0.20)"
    assert run["rows"] == [
        ["state 11"],
        ["mlp.1.1", f"B{SPACE}{VOCAB[5]}{VOCAB[6]}{SPACE}{VOCAB[7]}\u2028&↵{SPACE}11"]
        + ["4", "0.90", "0.90", "0.90"],
        ["state <b>01"],
        ["mlp.0.2", f"B{SPACE}{VOCAB[5]}{VOCAB[6]}{SPACE}{VOCAB[7]}\u2028&↵{SPACE}11"]
        + ["7", "0.50", "1.00", "0.67"],
        ["no label fits"],
        ["mlp.1.2", misfit, "2", "0.10", "0.20", "0.13"],
        ["mlp.0.10", f"B{SPACE}01{SPACE}23{SPACE}02", "3", "–", "–", "–"],
    ]


def check_lists(found):
    assert found["sites"] == ["", "head.1.0", "mlp.0", "mlp.1"]
    assert found["lists"] == {
        "mlp.0": "mlp.0.2 mlp.0.10",
        "STATE": "mlp.1.1 mlp.0.2 mlp.1.2",
        "mlp.0 <b>": "mlp.0.2",
        "none such": "",
        "": "mlp.1.1 mlp.0.2 mlp.1.2 mlp.0.10",
        "site": "mlp.1.1 mlp.1.2",
        "least": "mlp.1.1 mlp.0.2",
        "dead": "mlp.1.1 mlp.0.2 mlp.1.2 mlp.0.10 head.1.0.3",
        # in each group
        "count": "mlp.0.2 mlp.1.1 mlp.0.10 mlp.1.2",
        "label": "mlp.0.2 mlp.1.1 mlp.0.10 mlp.1.2",
        "name": "mlp.0.2 mlp.1.1 mlp.0.10 mlp.1.2",
    }


def check_codes(found):
    first = found["first"]
    hostile = f"B{SPACE}{VOCAB[5]}{VOCAB[6]}{SPACE}"
    assert first["contexts"] == [
        [f"B{SPACE}0", "1", f"{SPACE}23{SPACE}02", "sequence 0, position 2"],
        [hostile, VOCAB[7], f"\u2028&↵{SPACE}11", "sequence 1, position 3"],
        [f"B{SPACE}01{SPACE}", "2", f"3{SPACE}02", "sequence 0, position 3"],
        [f"{hostile}{VOCAB[7]}", "\u2028&↵", f"{SPACE}11", "sequence 1, position 4"],
    ]
    assert first["heads"] == [
        "Where it fires",
        "state <b>01, but it does not fire",
        "It fires, but it is not state <b>01",
        "What it does",
        "Codes near it",
        "Nearest by cosine, at its place",
        "Most often there when it is (intersection over union)",
    ]
    assert first["facts"] == ["7", "50.00 %", "0.50", "1.00", "0.67"]
    assert first["label"] == "state <b>01"
    assert first["run"]
    assert first["focus"] == "H1"
    assert first["address"] == "#mlp.0.2"
    assert not first["wide"]
    assert first["tokens"] == ["1", VOCAB[7]]
    assert first["bars"] == ["0.2500", "0.7500", "0.0050", "0.0125"]
    assert first["lifts"] == ["× 2.99", "× 2.25"]
    assert first["near"] == ["mlp.0.10 no label fits 0.50", "mlp.1.1 state 11 1.00"]
    command = "python -m minicode.sample --run runs/<b>tiny --force-code mlp.0.2"
    assert first["command"] == command
    assert found["back"] == {"hidden": True, "focus": "mlp.0.2", "address": ""}
    assert found["second"] == [
        ["", "B", f"{SPACE}01{SPACE}23{SPACE}02", "sequence 0, position 0"],
        [f"B{SPACE}01{SPACE}23{SPACE}0", "2", "", "sequence 0, position 6"],
    ]
    assert "dead: never chosen" in found["dead"]
    assert "Where it fires" not in found["dead"]
    assert "no label fits; nearest: state 11 (precision 0.10, recall 0.20)" in found["misfit"]
    assert "stands for" not in found["misfit"]


READ = """
    const cells = (row) => [...row.cells].map((cell) => cell.textContent);
    const state = () => [$("#read h3").textContent, ...text("#read .state div")];
    const there = { tokens: text("#read thead th"), state: state(), wide: wide() };
    there.cells = all("#read tbody tr").map(cells);
    const lit = () => all("#read td").flatMap((cell, i) => (cell.matches(".lit") ? i : []));
    const chips = all("#read .chip");
    chips[0].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    const lights = [lit()];
    chips[1].focus();
    lights.push(lit(), all("#read [tabindex='0']").length);
    key("ArrowDown", document.activeElement);
    lights.push(lit(), document.activeElement.dataset.code);
    key("ArrowUp", document.activeElement); key("ArrowUp", document.activeElement);
    const focus = document.activeElement.textContent;
    document.activeElement.click();
    const second = state();
    $("#later").click();
    const later = [$("#number").value, text("#read thead th").join("|"), all("script, img").length];
    location.hash = "#read/0/4";
    await until(() => $("#number").value === "0");
    const linked = state();
    chips.length && all("#read .chip")[0].click();
    await until(() => !$("#code").hidden);
    return { there, lights, focus, second, later, linked, code: $("#code h1").textContent };"""


def test_a_sequence_is_read_by_pointing_and_by_keys(browse):
    found = browse(make_data(), READ)
    assert found["there"]["tokens"] == ["B", "0", "1", "2", "3", "0", "2"]
    assert found["there"]["cells"] == [
        ["mlp.0", "state<b>01", "10", "state<b>01", "10+1", "", "state<b>01", "state<b>01+1"],
        ["mlp.1", "state11", "state11", "2", "", "state11", "", ""],
    ]
    assert found["there"]["state"] == ["The state after 2 at position 6", "mlp.0state <b>0110"]
    assert not found["there"]["wide"]
    first = [0, 2, 3, 5, 6]  # of 14 cells; a corner stands before them
    second = [1, 3, 6]
    assert found["lights"][0] == [i + 1 for i in first]
    assert found["lights"][1:3] == [[i + 1 for i in second], 1]
    assert found["lights"][3:] == [[i + 1 for i in (7, 8, 11)], "mlp.1.1"]
    assert found["focus"] == "0"
    assert found["second"] == ["The state after 0 at position 1", "mlp.010", "mlp.1state 11"]
    assert found["later"] == ["1", "|".join([*VOCAB[4:8], "&↵", "1", "1"]), 4]
    assert found["linked"] == ["The state after 3 at position 4", "mlp.1state 11"]
    assert found["code"] == "mlp.0.2"


def test_an_address_opens_its_code_and_long_contexts_are_cut(browse):
    tokens = [0] * 50 + [1] + [0] * 49
    data = make_data(vocab=["a", "b"], group=0, length=100, tokens=tokens, states=[])
    data["codes"] = [["mlp.1.527", 1, ["b", "c"], 1.0, 1.0, [50], *NONE[1:]]]
    script = """
        const parts = [...$(".context").children, $("#code h1"), $("#code a")];
        return [...parts.map((part) => part.textContent), $("#read").hidden];"""
    context = ["…" + 24 * "a", "b", 12 * "a" + "…", "sequence 0, position 50"]
    found = browse(data, script, "#mlp.1.527")
    assert found == [*context, "mlp.1.527", "← all codes", True]


HOSTILE_PAGE = """
        const list = () => until(() => !$("#run").hidden);
        const names = () => text("#list tbody a");
        const rows = [names().length];
        const broad = [wide()];
        const labels = text("#list .group th").slice(0, 4);
        const tags = [all("img").length, all("body script").length];
        await open("mlp.0.1");
        await new Promise((next) => setTimeout(next, 200));
        broad.push(wide());
        tags.push(all("img").length);
        const code = $("#code").textContent;
        key("Escape"); await list();
        $("#more").click(); rows.push(names().length);
        type("#search", "mlp.1.4999"); rows.push(names().length);
        await open("mlp.1.4999"); key("Escape"); await list(); rows.push(names().join());
        type("#search", ""); rows.push(names().length, all("#list .group").length);
        const group = all("#list tbody")[4];
        rows.push(group.querySelector("button").textContent);
        group.querySelector("button").click();
        rows.push(group.querySelectorAll("a").length, group.querySelectorAll("button").length);
        rows.push([...group.querySelectorAll("a")].indexOf(document.activeElement));
        location.hash = "#read/1/4";
        await until(() => $("#number").value === "1");
        broad.push(wide());
        tags.push(all("img").length);
        const injected = document.createElement("script");
        injected.textContent = "window.hacked = 2";
        document.head.append(injected);
        await until(() => errors.length);
        const blocked = errors.splice(0);
        const hacked = window.hacked ?? null;
        return { blocked, rows, broad, labels, tags, code, hacked, title: $("h1").textContent };"""


def test_a_hostile_corpus_stays_inert_and_ten_thousand_codes_make_a_small_page(browse, tmp_path):
    title = "</script><script>window.hacked=1</script>"
    data = make_data(title=title, about="<!--<script>", tokens=[i % 9 for i in range(70_000)])
    hostile = [*VOCAB[5:8], 300 * "x"]
    near = [[[5, 0.5, 0.25, 2], [6, 0.4, 0.1, 4]], [], []]
    data["codes"] = [
        [f"mlp.0.{i}", 9, ["", label], 1.0, 1.0, [10, 11], [8], [9], *near]
        for i, label in enumerate(hostile)
    ]
    data["states"] = [[[0, 1, 2, 3]] * 7] * 2
    for i in range(10_000 - len(hostile)):
        words = ["state", f"{i % 100:02}"]
        rest = [20 * [i], 5 * [i], 5 * [i], 8 * [[0, 0.1234, 0.0567, 2.176]], *2 * [5 * [[i, 0.5]]]]
        data["codes"].append([f"mlp.1.{i}", i + 1, words, 0.5, 0.9, *rest])
    found = browse(data, HOSTILE_PAGE)
    assert found["labels"] == [f" {label}" for label in hostile]
    assert found["tags"] == [0, 3, 0, 0]
    assert found["broad"] == [False, False, False]
    assert found["hacked"] is None
    assert found["blocked"] == ["inline"]
    assert found["title"] == title
    assert all(word in found["code"] for word in VOCAB[5:7])
    shown = 4 + 3 * 36  # of each state three, in 40 groups
    assert found["rows"][:4] == [shown, shown + 3 * 40, 1, "mlp.1.4999"]
    assert found["rows"][4:] == [shown, 40, "97 more", 100, 0, 3]
    assert (tmp_path / "report.html").stat().st_size < 10e6


def test_the_page_asks_for_nothing_else_and_runs_no_other_script(tmp_path):
    write_report(tmp_path / "report.html", make_data(vocab=list("abcdefghi"), codes=[], figures=[]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    policy = re.search('http-equiv="Content-Security-Policy" content="(.*)"', page)[1]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.keys() == {"default-src", "style-src", "script-src"}
    assert rules["default-src"] == "'none'"
    script = re.search("<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    outside = r'https?:|\b(src|action)=|href="[^#]|@import|url\(|fetch\(|{{'
    assert not re.search(outside, page)
    assert not re.search(r"<[^>]* on\w+=", page.split("<script")[0])
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]
