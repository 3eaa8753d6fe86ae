"""The charts, as XML; and the page of a run, opened in a real browser without a window."""

import html
import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import pytest

from minicode.study.figures import bars, lines, scatter, ticks
from minicode.study.page import write_report

SVG = "{http://www.w3.org/2000/svg}"
NAN = float("nan")


# -- charts


def read(svg):
    """The chart's texts, and its numbers on the axis x or y with their places in pixels."""
    root = ET.fromstring(svg)
    texts = [
        (t.text or "", float(t.get("x")), float(t.get("y")), t.get("text-anchor"))
        for t in root.iter(SVG + "text")
    ]
    numbers = {anchor: {float(t.replace(",", "")): (x, y - 4.5 if anchor == "end" else y) for t, x, y, a in texts
                        if a == anchor and re.fullmatch(r"-?[\d,.]+", t)} for anchor in ("middle", "end")}  # fmt: skip
    return root, [t[0] for t in texts], numbers["middle"], numbers["end"]


def places(path):
    return [
        tuple(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", path.get("d"))
    ]


def titled(root, title):
    """The path with that title, and the one that follows it."""
    paths = list(root.iter(SVG + "path"))
    i = next(i for i, path in enumerate(paths) if path.findtext(SVG + "title") == title)
    return places(paths[i]), places(paths[i + 1]) if i + 1 < len(paths) else None


@pytest.mark.parametrize(
    "values", [[0, 1], [0.3, 0.7], [-5, 12.5], [1e-6, 3e-6], [99, 100], [0, 123456], [-3, -2], [7]]
)
def test_ticks_are_round_and_cover_the_data(values):
    found = ticks([NAN, None, *values])
    step = found[1] - found[0]
    assert 2 <= len(found) <= 8 and found == sorted(found)
    assert found[0] <= min(values) + 0.1 * step and found[-1] >= max(values) - 0.1 * step
    assert float(f"{step:.6e}"[0]) in (1, 2, 5) and all(
        abs(tick / step - round(tick / step)) < 1e-6 for tick in found
    )


def test_ticks_by_hand():
    assert ticks([0.02, 0.98]) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks([0, 1]) == [0, 1] and ticks([0, 3]) == [
        0,
        1,
        2,
        3,
    ]  # layers: whole numbers stay whole
    assert ticks([]) == [0, 1]


@pytest.mark.parametrize("horizontal", [False, True])
def test_bars_and_their_errors_are_where_the_axis_says(horizontal):
    svg = bars(["a", "b"], ["one", "two"], [[0.25, 1.0], [0.5, None]], [[0.125, 0], [0, 0]], title="t", cover=[1],
               horizontal=horizontal)  # fmt: skip
    root, texts, xs, ys = read(svg)
    axis, at = (xs, 0) if horizontal else (ys, 1)

    def pixel(value):
        return axis[0][at] + value * (axis[1][at] - axis[0][at])

    box, error = titled(root, "a, one: 0.25 ± 0.12")
    assert [corner[at] for corner in box] == pytest.approx(
        [pixel(0), pixel(0.25), pixel(0.25), pixel(0)], abs=0.11
    )
    assert [end[at] for end in error] == pytest.approx([pixel(0.125), pixel(0.375)], abs=0.11)
    across = [corner[1 - at] for corner in box]
    assert [end[1 - at] for end in error] == pytest.approx(
        [(min(across) + max(across)) / 2] * 2, abs=0.11
    )
    assert titled(root, "b, one: 1")[0] and "b, two" not in svg
    assert {"a", "b", "one", "two"} <= set(texts)


def test_lines_break_where_a_value_is_missing_and_the_reference_is_at_its_value():
    svg = lines(
        {"a": ([0, 1, 2, 3], [0, 0.5, NAN, 1.0])}, title="t", y="share", reference=(0.25, "chance")
    )
    root, texts, xs, ys = read(svg)
    line = next(
        path.get("d") for path in root.iter(SVG + "path") if path.get("stroke-width") == "2"
    )
    assert line.count("M") == 2 and line.count("L") == 1
    dashed = next(path for path in root.iter(SVG + "path") if path.get("stroke-dasharray") == "4 3")
    assert [y for _, y in places(dashed)] == pytest.approx(
        [ys[0][1] + 0.25 * (ys[1][1] - ys[0][1])] * 2, abs=0.11
    )
    assert "chance" in texts and "share" in texts and set(xs) == {0, 1, 2, 3}


def test_scatter_has_a_dot_a_point_and_larger_ones_with_labels():
    svg = scatter(
        [(0, 0), (1, 1), (0.5, NAN), (1, 0)],
        [0, 1, 1, 1],
        ["codes", "neurons"],
        ["", "", "", "seven"],
        title="t",
    )
    root, texts, _, _ = read(svg)
    dots = {
        path.get("stroke-width"): path.get("d")
        for path in root.iter(SVG + "path")
        if "h0" in path.get("d")
    }
    assert (
        svg.count("h0") == 3
        and dots["12"].count("h0") == 1
        and {"seven", "codes", "neurons"} <= set(texts)
    )


INF = float("inf")
CHARTS = {
    "nothing": [
        bars([], [], []),
        lines({}),
        scatter([]),
        bars([], [], [], horizontal=True),
        lines({}, reference=(0.1, "chance")),
    ],
    "missing": [
        bars(["a"], ["b"], [[NAN]], [[NAN]]),
        lines({"a": ([0, NAN], [NAN, None])}),
        scatter([(NAN, 1), (2, INF)]),
    ],
    "one value": [
        bars(["a"], ["b"], [[-3]]),
        bars(["a"], ["b"], [[0]]),
        lines({"a": ([5], [5])}),
        scatter([(1e-9, 0)]),
    ],
    "large": [
        scatter([(i / 7, i / 3) for i in range(3000)]),
        lines({"a": (range(3000), range(3000))}),
    ],
    "hostile": [
        bars(["<i>"], ["&amp;", '"'], [[1], [2]], title="<script>&\"'", x="<b>"),
        lines(
            {"<i>": ([0], [1]), "&": ([0], [1])},
            title="<script>&\"'",
            y="<b>",
            reference=(1, "<u>"),
        ),
        scatter([(0, 1)], labels=["<i>"], title="<script>&\"'", x="<b>", y="]]>"),
    ],
}


@pytest.mark.parametrize("name", CHARTS)
def test_charts_of_any_data_are_small_and_well_formed(name):
    for svg in CHARTS[name]:
        root = ET.fromstring(svg)
        assert len(svg) < 120_000 and "nan" not in svg.lower() and "inf" not in svg
        assert root.get("role") == "img" and root.get("aria-label") == root.findtext(SVG + "title")
        assert {e.tag.removeprefix(SVG) for e in root.iter()} == {
            "svg",
            "title",
            "style",
            "path",
            "text",
        }
        if name == "hostile":
            assert root.get("aria-label") == "<script>&\"'" and {"<i>", "<b>"} <= set(read(svg)[1])


# -- the page

VOCAB = [
    "0",
    "1",
    "2",
    "3",
    "B",
    "<script>window.hacked=1</script>",
    "</script>",
    "<img src=x onerror=window.hacked=1>",
    "\u2028&\n",
]


def make_data(**changes):
    """Two sequences of 7 tokens, and three codes of which one is dead."""
    return {
        "title": "runs/<b>tiny", "about": "about & more",
        "measures": [["accuracy", 0.5, "a note"], ["codes", 1234, None], ["nothing", NAN, ""]],
        "figures": [{"svg": bars(["a"], ["b"], [[1]], title="a chart"), "caption": "<i>caption"}],
        "vocab": VOCAB, "length": 7, "group": 2, "tokens": [4, 0, 1, 2, 3, 0, 2, 4, 5, 6, 7, 8, 1, 1],
        "codes": [
            ["mlp.0.2", 7, "state <b>01", 0.5, 1.0, [2, 10], [[1, 0.75], [7, 0.25]]],
            ["mlp.0.10", 3, None, None, None, [0, 6], [[0, 1.0]]],
            ["head.1.0.3", 0, None, None, None, [], []],
            ["mlp.1.1", 4, "state 11", 0.9, 0.9, [13], [[0, 1.0]]],
        ],
        "free": [[0, 0.6], [1, 0.3]],
        **changes,
    }  # fmt: skip


WATCH = """<head><script>
window.errors = [];
window.onerror = console.error = console.warn = (...message) => errors.push(message.join(" "));
addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));
</script>"""
RUN = """<script>
const $ = (selector) => document.querySelector(selector), all = (selector) => [...document.querySelectorAll(selector)];
const names = () => all("#codes tbody a").map((a) => a.textContent);
const until = async (ready) => { while (!ready()) await new Promise((next) => setTimeout(next, 5)); };
const press = (key) => $("body").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const open = async (name) => {
  const link = $(`a[href="#${name}"]`);
  link.focus();
  link.click();
  await until(() => $("#code h1")?.textContent === name);
};
const wide = () => document.documentElement.scrollWidth > innerWidth;
const list = () => until(() => !$("#run").hidden);
const type = (text) => { $("#search").value = text; $("#search").dispatchEvent(new Event("input")); };
(async () => { %s })().catch((error) => errors.push(String(error))).then((found) => {
  const result = document.createElement("pre");
  result.textContent = JSON.stringify({ found, errors });
  document.body.replaceChildren(result);
});
</script></body>"""


@pytest.fixture
def browse(tmp_path):
    """browse(data, script): what the script returns that a browser runs in the page; nothing may be complained of."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not browser:
        assert os.environ.get("CI") != "true", (
            "there is no browser, and the page must be tested in one"
        )
        pytest.skip("no browser on the PATH: chromium, chromium-browser or google-chrome")

    def run(data, script, address=""):
        page = tmp_path / "report.html"
        write_report(page, data)
        page.write_text(
            page.read_text().replace("<head>", WATCH, 1).replace("</body>", RUN % script)
        )
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/profile",
            "--window-size=500,900",
        ]
        command = [
            browser,
            *flags,
            "--virtual-time-budget=10000",
            "--dump-dom",
            page.as_uri() + address,
        ]
        done = subprocess.run(command, capture_output=True, timeout=60, text=True)
        result = re.search("<body><pre>(.*)</pre>", done.stdout, re.DOTALL)
        assert result, f"the script did not end: {done.stdout[-1000:]} {done.stderr[-1000:]}"
        result = json.loads(html.unescape(result[1]))
        assert result["errors"] == []
        return result["found"]

    return run


def test_the_run_is_shown(browse):
    found = browse(make_data(), """
        return { title: document.title, h1: $("h1").textContent, about: $("#about").textContent, names: names(),
                 measures: all("#measures tr").map((row) => [...row.cells].map((cell) => cell.textContent)),
                 svg: $("#figures svg title").textContent, caption: $("figcaption").textContent, found: $("#found").textContent,
                 row: [...$("#codes tbody tr").cells].map((cell) => cell.textContent), more: $("#more").hidden,
                 wide: wide() };""")  # fmt: skip
    assert (
        found["title"] == "runs/<b>tiny · minicode"
        and found["h1"] == "runs/<b>tiny"
        and found["about"] == "about & more"
    )
    assert found["measures"] == [
        ["accuracy", "0.500", "a note"],
        ["codes", "1,234", ""],
        ["nothing", "–", ""],
    ]
    assert (
        found["svg"] == "a chart"
        and found["caption"] == "<i>caption"
        and found["more"]
        and not found["wide"]
    )
    assert found["found"] == "4 of 4 codes" and found["names"] == [
        "mlp.1.1",
        "mlp.0.2",
        "mlp.0.10",
        "head.1.0.3",
    ]
    assert found["row"] == ["mlp.1.1", "4", "28.57 %", "state 11", "0.90", "0.90", "0.90"]


def test_the_list_filters_and_sorts(browse):
    found = browse(make_data(), """
        const result = [];
        const order = () => all("th[aria-sort]").map((th) => th.textContent + " " + th.ariaSort).join();
        const note = (what) => result.push([what, names().join(" "), order()]);
        const sort = (title) => all("th button").find((button) => button.textContent === title).click();
        for (const text of ["mlp.0", "STATE", "mlp.0 <b>", "none such", ""]) { type(text); note(text); }
        $("#site").value = "head.1.0"; $("#site").onchange(); note("site");
        $("#site").value = ""; $("#site").onchange();
        for (const title of ["Code", "Code", "Count", "Count", "Precision", "Stands for"]) { sort(title); note(title); }
        const sites = all("#site option").map((option) => option.value);
        return { result, focus: document.activeElement.textContent, sites };""")  # fmt: skip
    assert found["sites"] == ["", "head.1.0", "mlp.0", "mlp.1"] and found["focus"] == "Stands for"
    assert found["result"] == [
        ["mlp.0", "mlp.0.2 mlp.0.10", "F1 descending"],
        ["STATE", "mlp.1.1 mlp.0.2", "F1 descending"],
        ["mlp.0 <b>", "mlp.0.2", "F1 descending"],
        ["none such", "", "F1 descending"],
        ["", "mlp.1.1 mlp.0.2 mlp.0.10 head.1.0.3", "F1 descending"],
        ["site", "head.1.0.3", "F1 descending"],
        ["Code", "head.1.0.3 mlp.0.2 mlp.0.10 mlp.1.1", "Code ascending"],
        ["Code", "mlp.1.1 mlp.0.10 mlp.0.2 head.1.0.3", "Code descending"],
        ["Count", "mlp.0.2 mlp.1.1 mlp.0.10 head.1.0.3", "Count descending"],
        ["Count", "head.1.0.3 mlp.0.10 mlp.1.1 mlp.0.2", "Count ascending"],
        [
            "Precision",
            "mlp.1.1 mlp.0.2 mlp.0.10 head.1.0.3",
            "Precision descending",
        ],  # those without one come last
        ["Stands for", "mlp.0.2 mlp.1.1 mlp.0.10 head.1.0.3", "Stands for ascending"],
    ]


def test_a_codes_page_shows_its_contexts_and_leads_back(browse):
    found = browse(make_data(), """
        const contexts = () => all(".context").map((line) => [...line.children].map((part) => part.textContent));
        await open("mlp.0.2");
        const texts = (selector) => all(selector).map((element) => element.textContent);
        const first = { contexts: contexts(), facts: texts("#code dd"), label: $("#code strong").textContent,
                        run: $("#run").hidden, focus: document.activeElement.tagName, tokens: texts(".token"),
                        bars: texts(".bar"), address: location.hash, wide: wide() };
        press("Escape");
        await list();
        const back = { hidden: $("#code").hidden, focus: document.activeElement.textContent, address: location.hash };
        await open("mlp.0.10");
        const second = contexts();
        await open("mlp.1.1");
        history.back();
        await until(() => $("#code h1")?.textContent === "mlp.0.10");
        $("#code a").click();
        await list();
        await open("head.1.0.3");
        return { first, back, second, dead: $("#code").textContent };""")  # fmt: skip
    space = "\u2009"
    first = found["first"]
    assert first["contexts"] == [
        [f"B{space}0", "1", f"{space}23{space}02", "sequence 0, position 2"],
        [
            f"B{space}{VOCAB[5]}{VOCAB[6]}{space}",
            VOCAB[7],
            f"\u2028&↵{space}11",
            "sequence 1, position 3",
        ],
    ]
    assert (
        first["facts"] == ["7", "50.00 %", "0.50", "1.00", "0.67"]
        and first["label"] == "state <b>01"
    )
    assert (
        first["run"]
        and first["focus"] == "H1"
        and first["address"] == "#mlp.0.2"
        and not first["wide"]
    )
    assert first["tokens"] == ["1", VOCAB[7], "0"]
    assert first["bars"] == ["0.750", "0.300", "0.250", "below 0.300", "below 0.250", "0.600"]
    assert found["back"] == {"hidden": True, "focus": "mlp.0.2", "address": ""}
    assert found["second"] == [["", "B", f"{space}01{space}23{space}02", "sequence 0, position 0"],
                               [f"B{space}01{space}23{space}0", "2", "", "sequence 0, position 6"]]  # fmt: skip
    assert "dead: never chosen" in found["dead"] and "fires" not in found["dead"]


def test_an_address_opens_its_code_and_long_contexts_are_cut(browse):
    data = make_data(vocab=["a", "b"], group=0, length=100, tokens=[0] * 50 + [1] + [0] * 49)
    data["codes"] = [["mlp.1.527", 1, "b", 1.0, 1.0, [50], []], ["mlp.0.3", 1, "b", 0, 0, [50], []]]
    found = browse(data, """
        const parts = [...$(".context").children, $("#code h1"), ...all("#code a")];
        return parts.map((part) => part.textContent);
    """, "#mlp.1.527")  # fmt: skip
    assert found == [
        "…" + 24 * "a",
        "b",
        12 * "a" + "…",
        "sequence 0, position 50",
        "mlp.1.527",
        "← all codes",
        "mlp.0.3",
    ]


def test_a_hostile_corpus_stays_inert(browse, tmp_path):
    data = make_data(title="</script><script>window.hacked=1</script>", about="<!--<script>")
    data["codes"] = [
        ["mlp.0.1", 1, label, 1.0, 1.0, [10, 11], [[5, 0.5], [6, 0.4]]]
        for label in [*VOCAB[5:8], 300 * "x"]
    ]
    found = browse(data, """
        if (wide()) return "the page is wider than the window";
        const labels = all("#codes td:nth-child(4)").map((cell) => cell.textContent);
        const before = [labels, all("img").length, all("body script").length];
        await open("mlp.0.1");
        await new Promise((next) => setTimeout(next, 200));
        return [...before, wide(), window.hacked ?? null, all("img").length, $("#code").textContent, $("h1").textContent];""")  # fmt: skip
    labels, *counts, text, title = found
    assert (
        labels == [*VOCAB[5:8], 300 * "x"]
        and counts == [0, 3, False, None, 0]
        and title == data["title"]
    )
    assert all(word in text for word in VOCAB[5:8])


def test_ten_thousand_codes_make_a_small_page_with_few_rows(browse, tmp_path):
    many = [
        [
            f"mlp.{i // 5000}.{i % 5000}",
            i,
            f"state {i % 100:02}",
            0.5,
            i / 10_000,
            [i] * 6,
            [[0, 0.12345]] * 5,
        ]
        for i in range(10_000)
    ]
    data = make_data(codes=many, tokens=[i % 9 for i in range(70_000)])
    found = browse(data, """
        const count = () => all("#codes tbody tr").length, counts = [count()];
        $("#more").click(); counts.push(count());
        type("mlp.1.4999"); counts.push(count());
        await open("mlp.1.4999"); press("Escape"); await list(); counts.push(names().join());
        type(""); counts.push(count());
        return counts;""")  # fmt: skip
    assert found == [100, 200, 1, "mlp.1.4999", 100]
    assert (tmp_path / "report.html").stat().st_size < 10e6


def test_the_page_asks_for_nothing_else(tmp_path):
    write_report(tmp_path / "report.html", make_data(vocab=list("abcdefghi"), codes=[], figures=[]))
    page = (tmp_path / "report.html").read_text()
    assert "default-src 'none'" in page and "http-equiv" in page
    assert not re.search(r"https?:|\b(src|action)=|href=\W*\w|@import|url\(|fetch\(", page)
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]
