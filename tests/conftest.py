import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from minicode import FSM, GPT, GPTConfig
from minicode.runtime.runs import FILES, MADE_LATER
from minicode.study.page import write_report
from minicode.train_fsm import main as train_fsm
from minicode.train_text import main as train_text

torch.set_num_threads(1)  # the models here are far too small for two

SIZE = "--n-layer 2 --n-head 2 --n-embd 16 --block-size 12 --n-codes 32 --n-codes-head 8"
STEPS = "--steps 60 --batch-size 8 --eval-every 30 --checkpoint-every 20 --revive-every 5"
TINY = f"--n-states 16 --n-edges 3 --base 4 {SIZE} {STEPS} --device cpu".split()

# Of a finished run on TokFSM:
RUN_FILES = sorted({*FILES} - {"text.json", "tokens.bin", *MADE_LATER})


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run folder, trained in a second or two. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("runs") / "fsm"
    assert train_fsm(["--out", str(folder), *TINY]) == 0
    return folder


SMALL_TEXT = [
    "--n-layer=2", "--n-head=2", "--n-embd=16", "--block-size=32", "--n-codes-head=16", "--k=4",
    "--steps=60", "--batch-size=8", "--eval-every=60", "--device=cpu",
]  # fmt: skip


def train_small_text(folder, *flags):
    assert train_text(["--out", str(folder), *SMALL_TEXT, *map(str, flags)]) == 0
    return folder


@pytest.fixture(scope="session")
def stories_run(tmp_path_factory):
    """A run folder on stories. Tests copy it before they change it."""
    return train_small_text(tmp_path_factory.mktemp("stories") / "text")


@pytest.fixture
def fsm():
    return FSM(n_states=16, n_edges=3, base=4)


def make_model(codebooks="head,attn,mlp_mid,mlp,block", k=2, seed=0, **more):
    torch.manual_seed(seed)
    size = {"vocab_size": 5, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}
    settings = {**size, "n_codes": 32, "n_codes_head": 8, "codebooks": codebooks, "k": k, **more}
    return GPT(GPTConfig(**settings)).eval()


def make_tokens(fsm, n=3, length=8, seed=0):
    return torch.from_numpy(fsm.sequences(np.random.default_rng(seed), n, length))


def read_metrics(folder):
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


WATCH = """<head><script>
window.errors = [];
window.onerror = console.error = console.warn = (...message) => errors.push(message.join(" "));
addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));
</script>"""
SCRIPT = """
(async () => {
  const $ = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const text = (selector) => all(selector).map((element) => element.textContent);
  const until = async (ready) => {
    while (!ready()) await new Promise((next) => setTimeout(next, 5));
  };
  const key = (name, target = document.body) => {
    target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
  };
  const open = async (name) => {
    const link = $(`#list a[href="#${name}"]`) ?? $(`a[href="#${name}"]`);
    link.focus();
    link.click();
    await until(() => $("#code h1")?.textContent === name);
  };
  const wide = () => document.documentElement.scrollWidth > innerWidth;
  const type = (selector, words) => {
    $(selector).value = words;
    $(selector).dispatchEvent(new Event("input"));
    $(selector).dispatchEvent(new Event("change"));
  };
  %s
})().catch((error) => errors.push(String(error))).then((found) => {
  const result = document.createElement("pre");
  result.textContent = JSON.stringify({ found, errors });
  document.body.replaceChildren(result);
});
"""


def find_browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        assert os.environ.get("CI") != "true", "the page must be tested in a browser"
        pytest.skip(f"no browser on the PATH: {', '.join(names)}")
    return browser


@pytest.fixture
def browse(tmp_path):
    """browse(data, script): what the script returns in the page; nothing may be complained of."""
    browser = find_browser()

    def run(data, script, address=""):
        page = tmp_path / "report.html"
        write_report(page, data)
        script = SCRIPT % script
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        watched = page.read_text(encoding="utf-8").replace("<head>", WATCH, 1)
        watched = watched.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
        watched = watched.replace("</body>", f"<script>{script}</script></body>")
        page.write_text(watched, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
        flags += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=10000"]
        command = [browser, *flags, "--dump-dom", page.as_uri() + address]
        done = subprocess.run(command, capture_output=True, timeout=60, encoding="utf-8")
        result = re.search("<body[^>]*><pre>(.*)</pre>", done.stdout, re.DOTALL)
        assert result, f"the script did not end: {done.stdout[-1000:]} {done.stderr[-1000:]}"
        result = json.loads(html.unescape(result[1]))
        assert result["errors"] == []
        return result["found"]

    return run
