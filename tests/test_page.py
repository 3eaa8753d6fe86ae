"""The charts, as XML; and the page of a run, opened in a real browser without a window."""

import html
import json
import os
import re
import shutil
import subprocess
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


def make_data(**changes):
    """Two sequences of 7 tokens, and five codes: one is dead, one has a label that does not fit."""
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
            ["mlp.0.2", 7, "state <b>01", 0.5, 1.0, [2, 10], [[1, 0.75], [7, 0.25]]],
            ["mlp.0.10", 3, None, None, None, [0, 6], [[0, 1.0]]],
            ["head.1.0.3", 0, None, None, None, [], []],
            ["mlp.1.1", 4, "state 11", 0.9, 0.9, [13], [[0, 1.0]]],
            ["mlp.1.2", 2, "state 11", 0.1, 0.2, [4], [[0, 1.0]]],
        ],
        "fits": 0.5,
        "free": [[0, 0.6], [1, 0.3]],
    }
    return {**data, **changes}


WATCH = """<head><script>
window.errors = [];
window.onerror = console.error = console.warn = (...message) => errors.push(message.join(" "));
addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));
</script>"""
RUN = """<script>
const $ = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const text = (selector) => all(selector).map((element) => element.textContent);
const names = () => text("#codes tbody a");
const until = async (ready) => {
  while (!ready()) await new Promise((next) => setTimeout(next, 5));
};
const press = (key) => {
  $("body").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
};
const open = async (name) => {
  const link = $(`a[href="#${name}"]`);
  link.focus();
  link.click();
  await until(() => $("#code h1")?.textContent === name);
};
const wide = () => document.documentElement.scrollWidth > innerWidth;
const list = () => until(() => !$("#run").hidden);
const type = (words) => {
  $("#search").value = words;
  $("#search").dispatchEvent(new Event("input"));
};
(async () => { %s })().catch((error) => errors.push(String(error))).then((found) => {
  const result = document.createElement("pre");
  result.textContent = JSON.stringify({ found, errors });
  document.body.replaceChildren(result);
});
</script></body>"""


@pytest.fixture
def browse(tmp_path):
    """browse(data, script): what the script returns in the page; nothing may be complained of."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        assert os.environ.get("CI") != "true", "the page must be tested in a browser"
        pytest.skip(f"no browser on the PATH: {', '.join(names)}")

    def run(data, script, address=""):
        page = tmp_path / "report.html"
        write_report(page, data)
        watched = page.read_text(encoding="utf-8").replace("<head>", WATCH, 1)
        page.write_text(watched.replace("</body>", RUN % script), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
        flags += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=10000"]
        command = [browser, *flags, "--dump-dom", page.as_uri() + address]
        done = subprocess.run(command, capture_output=True, timeout=60, encoding="utf-8")
        result = re.search("<body><pre>(.*)</pre>", done.stdout, re.DOTALL)
        assert result, f"the script did not end: {done.stdout[-1000:]} {done.stderr[-1000:]}"
        result = json.loads(html.unescape(result[1]))
        assert result["errors"] == []
        return result["found"]

    return run


SHOWN = """
    const run = {
      title: document.title, h1: $("h1").textContent, about: $("#about").textContent,
      measures: all("#measures tr").map((row) => [...row.cells].map((cell) => cell.textContent)),
      svg: $("#figures svg title").textContent, caption: $("figcaption").textContent,
      found: $("#found").textContent, names: names(),
      row: [...$("#codes tbody tr").cells].map((cell) => cell.textContent),
      more: $("#more").hidden, wide: wide(), labels: text("#codes td:nth-child(4)"),
    };"""
LIST = """
    const lists = {};
    const order = () => all("th[aria-sort]").map((th) => th.textContent + " " + th.ariaSort).join();
    const note = (what) => { lists[what] = [names().join(" "), order()]; };
    const sort = (title) => all("th button").find((b) => b.textContent === title).click();
    const searches = ["mlp.0", "STATE", "mlp.0 <b>", "none such", ""];
    for (const words of searches) { type(words); note(words); }
    $("#site").value = "head.1.0"; $("#site").onchange(); note("site");
    $("#site").value = ""; $("#site").onchange();
    for (const title of ["Code", "Count", "Precision", "Stands for"]) { sort(title); note(title); }
    sort("Stands for"); note("turned");
    const focus = document.activeElement.textContent;
    const sites = all("#site option").map((option) => option.value);"""
CODE = """
    const parts = (line) => [...line.children].map((part) => part.textContent);
    const contexts = () => all(".context").map(parts);
    await open("mlp.0.2");
    const first = {
      contexts: contexts(), facts: text("#code dd"), label: $("#code strong").textContent,
      run: $("#run").hidden, focus: document.activeElement.tagName, tokens: text(".token"),
      bars: text(".bar"), address: location.hash, wide: wide(),
    };
    press("Escape");
    await list();
    const focused = document.activeElement.textContent;
    const back = { hidden: $("#code").hidden, focus: focused, address: location.hash };
    await open("mlp.0.10");
    const second = contexts();
    await open("mlp.1.1");
    const others = text("#code h2").at(-1);
    history.back();
    await until(() => $("#code h1")?.textContent === "mlp.0.10");
    $("#code a").click();
    await list();
    await open("head.1.0.3");
    const dead = $("#code").textContent;
    await open("mlp.1.2");
    const misfit = $("#code").textContent;"""
RETURN = "return { run, lists, focus, sites, first, back, second, others, dead, misfit };"


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
    assert run["caption"] == "<i>caption"
    assert run["more"]
    assert not run["wide"]
    assert run["measures"] == [
        ["accuracy", "0.500", "a note"],
        ["codes", "1,234", ""],
        ["nothing", "–", ""],
    ]
    assert run["found"] == "5 of 5 codes"
    assert run["names"] == ["mlp.1.1", "mlp.0.2", "mlp.1.2", "mlp.0.10", "head.1.0.3"]
    assert run["row"] == ["mlp.1.1", "4", "28.57 %", "state 11", "0.90", "0.90", "0.90"]
    misfit = "no label fits; nearest: state 11"
    dead = "dead: never chosen"
    assert run["labels"] == ["state 11", "state <b>01", misfit, "no label fits", dead]


def check_lists(found):
    assert found["sites"] == ["", "head.1.0", "mlp.0", "mlp.1"]
    assert found["focus"] == "Stands for"
    by_f1 = "F1 descending"
    assert found["lists"] == {
        "mlp.0": ["mlp.0.2 mlp.0.10", by_f1],
        "STATE": ["mlp.1.1 mlp.0.2 mlp.1.2", by_f1],
        "mlp.0 <b>": ["mlp.0.2", by_f1],
        "none such": ["", by_f1],
        "": ["mlp.1.1 mlp.0.2 mlp.1.2 mlp.0.10 head.1.0.3", by_f1],
        "site": ["head.1.0.3", by_f1],
        "Code": ["head.1.0.3 mlp.0.2 mlp.0.10 mlp.1.1 mlp.1.2", "Code ascending"],
        "Count": ["mlp.0.2 mlp.1.1 mlp.0.10 mlp.1.2 head.1.0.3", "Count descending"],
        # those without a precision, or a label, come last
        "Precision": ["mlp.1.1 mlp.0.2 mlp.1.2 mlp.0.10 head.1.0.3", "Precision descending"],
        "Stands for": ["mlp.0.2 mlp.1.1 mlp.1.2 mlp.0.10 head.1.0.3", "Stands for ascending"],
        "turned": ["mlp.1.1 mlp.1.2 mlp.0.2 mlp.0.10 head.1.0.3", "Stands for descending"],
    }


def check_codes(found):
    first = found["first"]
    assert first["contexts"] == [
        [f"B{SPACE}0", "1", f"{SPACE}23{SPACE}02", "sequence 0, position 2"],
        [
            f"B{SPACE}{VOCAB[5]}{VOCAB[6]}{SPACE}",
            VOCAB[7],
            f"\u2028&↵{SPACE}11",
            "sequence 1, position 3",
        ],
    ]
    assert first["facts"] == ["7", "50.00 %", "0.50", "1.00", "0.67"]
    assert first["label"] == "state <b>01"
    assert first["run"]
    assert first["focus"] == "H1"
    assert first["address"] == "#mlp.0.2"
    assert not first["wide"]
    assert first["tokens"] == ["1", VOCAB[7], "0"]
    assert first["bars"] == ["0.750", "0.300", "0.250", "below 0.300", "below 0.250", "0.600"]
    assert found["back"] == {"hidden": True, "focus": "mlp.0.2", "address": ""}
    assert found["second"] == [
        ["", "B", f"{SPACE}01{SPACE}23{SPACE}02", "sequence 0, position 0"],
        [f"B{SPACE}01{SPACE}23{SPACE}0", "2", "", "sequence 0, position 6"],
    ]
    assert found["others"] == "The next token"  # mlp.1.2 does not stand for the same: it fits badly
    assert "dead: never chosen" in found["dead"]
    assert "fires" not in found["dead"]
    assert "no label fits; nearest: state 11" in found["misfit"]
    assert "stands for" not in found["misfit"]


def test_an_address_opens_its_code_and_long_contexts_are_cut(browse):
    tokens = [0] * 50 + [1] + [0] * 49
    data = make_data(vocab=["a", "b"], group=0, length=100, tokens=tokens)
    data["codes"] = [["mlp.1.527", 1, "b", 1.0, 1.0, [50], []], ["mlp.0.3", 1, "b", 1, 1, [50], []]]
    script = """
        const parts = [...$(".context").children, $("#code h1"), ...all("#code a")];
        return parts.map((part) => part.textContent);"""
    context = ["…" + 24 * "a", "b", 12 * "a" + "…", "sequence 0, position 50"]
    assert browse(data, script, "#mlp.1.527") == [*context, "mlp.1.527", "← all codes", "mlp.0.3"]


def test_a_hostile_corpus_stays_inert_and_ten_thousand_codes_make_a_small_page(browse, tmp_path):
    title = "</script><script>window.hacked=1</script>"
    data = make_data(title=title, about="<!--<script>", tokens=[i % 9 for i in range(70_000)])
    hostile = [*VOCAB[5:8], 300 * "x"]
    data["codes"] = [
        [f"mlp.0.{i}", 1, label, 1.0, 1.0, [10, 11], [[5, 0.5], [6, 0.4]]]
        for i, label in enumerate(hostile)
    ]
    for i in range(10_000 - len(hostile)):
        places = [i] * 6
        data["codes"].append(
            [f"mlp.1.{i}", i, f"state {i % 100:02}", 0.5, 0.9, places, 5 * [[0, 0.1]]]
        )
    script = """
        const rows = [names().length];
        const broad = [wide()];
        const labels = text("#codes td:nth-child(4)").slice(0, 4);
        const tags = [all("img").length, all("body script").length];
        await open("mlp.0.1");
        await new Promise((next) => setTimeout(next, 200));
        broad.push(wide());
        tags.push(all("img").length);
        const code = $("#code").textContent;
        press("Escape"); await list();
        $("#more").click(); rows.push(names().length);
        type("mlp.1.4999"); rows.push(names().length);
        await open("mlp.1.4999"); press("Escape"); await list(); rows.push(names().join());
        type(""); rows.push(names().length);
        const hacked = window.hacked ?? null;
        return { rows, broad, labels, tags, code, hacked, title: $("h1").textContent };"""
    found = browse(data, script)
    assert found["labels"] == hostile
    assert found["tags"] == [0, 3, 0]
    assert found["broad"] == [False, False]
    assert found["hacked"] is None
    assert found["title"] == title
    assert all(word in found["code"] for word in VOCAB[5:7])
    assert found["rows"] == [100, 200, 1, "mlp.1.4999", 100]
    assert (tmp_path / "report.html").stat().st_size < 10e6


def test_the_page_asks_for_nothing_else(tmp_path):
    write_report(tmp_path / "report.html", make_data(vocab=list("abcdefghi"), codes=[], figures=[]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert "http-equiv" in page
    assert not re.search(r"https?:|\b(src|action)=|href=\W*\w|@import|url\(|fetch\(", page)
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]
