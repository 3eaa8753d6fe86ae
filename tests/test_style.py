"""The house: how dense the code is to read, and who imports whom."""

import ast
import io
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "minicode").rglob("*.py"))
METHOD = ["topk", "codebook", "model", "control"]
BESIDE = ["start", "notation"]  # what the method uses, in files of their own
COMMANDS = [
    "train_fsm",
    "train_text",
    "sample",
    "interpret",
    "ablate",
    "bench",
    "compare",
    "__main__",
]
BELOW_THE_METHOD = ["extension", "native", "gpu", "precision", "arguments", "processes", "options"]
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
F_STRING = getattr(tokenize, "FSTRING_START", None), getattr(tokenize, "FSTRING_END", None)


def n_tokens(text):
    """Python's own, without comments, indentation and line ends; an f-string is one."""
    n = 0
    inside = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == F_STRING[0]:  # from Python 3.12 on they come in parts
            n += inside == 0
            inside += 1
        elif token.type == F_STRING[1]:
            inside -= 1
        elif token.type not in LAYOUT and not inside:
            n += 1
    return n


def test_tokens_are_counted_alike_by_all_versions_of_python():
    assert n_tokens("x = f'{a + 1} {b!r:>{width}}'  # three\n\n") == 3
    assert n_tokens('def f(a):\n    """Doc."""\n    return a + 1\n') == 11


def test_code_is_not_dense():
    tokens = {}
    lines = {}
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        tokens[path] = n_tokens(text)
        lines[path] = text.splitlines()
        assert len(lines[path]) <= 400, path
        if tokens[path]:
            assert tokens[path] / len(lines[path]) <= 8.0, path
    total = sum(tokens.values())
    assert total <= 56_000
    assert total / sum(len(some) for some in lines.values()) <= 7.0
    full = sum(bool(line.strip()) for some in lines.values() for line in some)
    assert total / full <= 8.5
    assert sum(tokens[ROOT / "minicode" / f"{name}.py"] for name in METHOD) <= 6_700


@pytest.mark.parametrize("folder", ["minicode", "tests"])
def test_lines_and_functions_are_short(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert all(len(line) <= 100 for line in text.splitlines()), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, (path, node.name)


def test_the_scripts_of_the_page_are_short_and_its_network_a_few_screens():
    for path in (ROOT / "minicode").rglob("*.js"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= (250 if path.stem == "network" else 400), path
        assert all(len(line) <= 100 for line in lines), path


def names_its_encoding(call):
    """Whether a call that opens text says how it is written; the locale's way is another's."""
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    given = {keyword.arg for keyword in call.keywords}
    if name == "open" and isinstance(call.func, ast.Name):
        mode = call.args[1].value if len(call.args) > 1 else "r"
        return "b" in mode or "encoding" in given
    return "encoding" in given if name in ("read_text", "write_text") else "text" not in given


def test_every_text_file_names_its_encoding():
    tests = (ROOT / "tests").rglob("*.py")
    for path in [*FILES, *tests, ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert names_its_encoding(node), (path, node.lineno)


def module(path):
    """minicode/study/page.py as "study.page"."""
    return ".".join(path.relative_to(ROOT / "minicode").with_suffix("").parts)


def imports(path):
    """The modules of minicode that a file imports, wherever in it."""
    names = {module(other) for other in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "minicode":
            package = node.module.removeprefix("minicode").removeprefix(".")
            for alias in node.names:
                inside = f"{package}.{alias.name}" if package else alias.name
                found.add(inside if inside in names else package)
    return found


def test_imports_form_a_graph_without_circles_from_the_method_to_the_commands():
    graph = {module(path): imports(path) for path in FILES}
    order = list(TopologicalSorter(graph).static_order())  # CycleError if there is a circle
    assert [name for name in order if name in METHOD] == METHOD
    for name, others in graph.items():
        if name not in COMMANDS and name != "__init__":
            assert not others & set(COMMANDS), f"{name} imports a command"
    below = [f"runtime.{name}" for name in BELOW_THE_METHOD]
    for name in METHOD:
        room = {other for other in graph[name] if other not in METHOD + BESIDE}
        assert room <= set(below), f"{name} imports {room}"
    for name in below:
        assert graph[name] <= set(below), f"{name} imports {graph[name]}"


def test_commands_are_a_screen_long():
    for name in COMMANDS:
        text = (ROOT / "minicode" / f"{name}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 140, name
