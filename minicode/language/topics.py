"""Steering language by its codes: those that stand for a topic or a word, and what texts become when they are forced.

Paper, section 5.2. A topic's codes are found by their precision and recall on held-out text; forced while text is generated, they
make it be about the topic. The table that shows how far is kept with the run, as steering.json.
"""

import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minicode.control import GENERATED, Code, force
from minicode.model import evaluating
from minicode.runtime.files import read_json
from minicode.study.detectors import detect, matches, record_codes

N_SEQUENCES = 512  # that codes are recorded on
MOST, PER_HEAD = (
    12,
    4,
)  # codes that are forced, in all and in one codebook: more of them are surer, and worse English
NEAR = 16  # a word's codes are those that fire on so many tokens before it
PROMPTS = ("Once upon a time", "One day, a", "Long ago, in a land far away", "There was once a")
PAPER = {  # share of generations about the topic, in per cent: before, and with its codes forced
    "dragon": (2.5, 65), "slide": (2.5, 95), "friend": (42.5, 75), "flower": (0, 90), "fire": (2.5, 100), "royals": (40, 87.5), "baby": (0, 90),
}  # fmt: skip


def held_out(run):
    """Tokens (n, T) of a run's data that it was not trained on, and their labels."""
    return run.data.labelled(
        np.random.default_rng((run.config.seed, 3)), N_SEQUENCES, run.config.block_size
    )


def find_codes(recording, labels, names):
    """{name: its codes}: the MOST that detect the label best, by F1; PER_HEAD of a codebook at most, and none by chance."""
    found, result = detect(recording, labels, names), {}
    for i, name in enumerate(names):
        usable = (found.recall[:, i] >= 0.01) & (
            found.precision[:, i] >= 2 * found.total[i] / labels.size
        )
        chosen, per_head = [], Counter()
        for number in np.argsort(-found.f1[:, i], kind="stable"):
            code = recording.names[number]
            if usable[number] and per_head[code.site, code.group] < min(
                PER_HEAD, recording.model.codebooks()[code.site].k
            ):
                per_head[code.site, code.group] += 1
                chosen.append(str(code))
        result[name] = chosen[:MOST]
    return result


def near(rows, word):
    """Labels (n, T): 0 on the NEAR tokens up to each mention of a word, -1 elsewhere."""
    labels = matches(rows, re.compile(rf"\b{re.escape(word)}\b", re.I))
    for row, at in np.argwhere(labels == 0):
        labels[row, max(0, at - NEAR + 1) : at + 1] = 0
    return labels


def expand(run, text):
    """The codes that a --force-code means: itself, or those of topic:NAME or word:WORD."""
    kind, colon, name = text.partition(":")
    if not colon:
        return [text]
    topics = getattr(run.data, "topics", None)
    if topics is None or kind not in ("topic", "word"):
        raise ValueError(f"{text!r} is no code; on a run of text, topic:NAME and word:WORD are too")
    if kind == "topic" and name not in topics:
        raise ValueError(
            f"there is no topic {name!r}; "
            + (f"there are {', '.join(topics)}" if topics else "your own text has none: try word:")
        )
    run.sites()
    if kind == "topic" and (run.folder / "steering.json").exists():
        codes = read_json(
            run.folder / "steering.json",
            lambda table: [str(code) for code in table["topics"][name]["codes"]],
        )
    else:
        tokens, kinds = held_out(run)
        labels = (
            np.where(kinds["topic"][0] == topics.index(name), 0, -1)
            if kind == "topic"
            else near(run.data.texts(tokens), name)
        )
        if not (labels == 0).any():
            raise ValueError(f"{text}: it does not occur in the held-out text")
        codes = find_codes(record_codes(run.model, tokens), labels, [name])[name]
    if not codes:
        raise ValueError(f"{text}: no code stands for it")
    return codes


def perplexity_of(model, tokens, start):
    """Of tokens (n, T) from position `start` on, under a model."""
    with evaluating(model):
        logits, _ = model(tokens[:, :-1])
    return math.exp(
        F.cross_entropy(logits[:, start - 1 :].flatten(0, 1).float(), tokens[:, start:].flatten())
    )


def generate(run, prompt, codes, n_samples, seed, max_new_tokens):
    """Samples that continue a text, with codes forced: texts without the prompt, and their perplexity under the dense model."""
    tokens, generator = (
        run.data.prompt(prompt).repeat(n_samples, 1),
        torch.Generator(run.model.device).manual_seed(seed),
    )
    start, new = tokens.shape[1], min(max_new_tokens, run.config.block_size + 1 - tokens.shape[1])
    with force(run.model, codes, GENERATED):
        tokens = run.model.generate(tokens.to(run.model.device), new, generator=generator)
    judged = perplexity_of(run.dense or run.model, tokens, start)
    return [run.data.tokenizer.decode(row) for row in tokens[:, start:].tolist()], judged


def steering_table(run, recording, labels, names, n_samples=10, max_new_tokens=100, seed=0):
    """For every topic: the share of texts that mention it before and after its codes are forced, and with random codes.

    {"topics": {topic: {"before", "after", "random", "perplexity_before", "perplexity_after", "codes"}}, "mean": {...}},
    over PROMPTS, n_samples each; perplexities are those of the generated texts, under the dense model.
    """
    codes, rng, topics = find_codes(recording, labels, names), np.random.default_rng(seed), {}

    def sample(forced):
        samples, judged = zip(
            *(
                generate(run, prompt, forced, n_samples, seed + i, max_new_tokens)
                for i, prompt in enumerate(PROMPTS)
            )
        )
        return sum(samples, []), math.exp(np.mean(np.log(judged)))

    left_alone, perplexity_free = sample([])
    for name in tqdm(names, desc="steering", leave=False, disable=None):
        own = [Code.parse(code, run.model) for code in codes[name]]
        others = []  # as many of each head, but none of these
        for code in own:
            every = [replace(code, id=i) for i in range(run.model.codebooks()[code.site].n_codes)]
            free = [other for other in every if other not in own + others]
            others.append(free[rng.integers(len(free))])
        (after, perplexity), (random, _) = sample(codes[name]), sample(list(map(str, others)))
        samples = {"before": left_alone, "after": after, "random": random}
        shares = {
            when: float(np.mean([run.data.mentions(name, text) for text in some]))
            for when, some in samples.items()
        }
        topics[name] = {
            **shares,
            "perplexity_before": perplexity_free,
            "perplexity_after": perplexity,
            "codes": codes[name],
        }
    measures = [measure for measure in topics[names[0]] if measure != "codes"]
    return {
        "topics": topics,
        "mean": {m: float(np.mean([topic[m] for topic in topics.values()])) for m in measures},
    }


def describe(table):
    """The table for people, beside the paper's."""
    lines = [
        f"{'topic':10}{'before':>8}{'after':>8}{'random':>8}   perplexity before, after   paper: before, after"
    ]
    for name, row in [*table["topics"].items(), ("mean", table["mean"])]:
        paper = PAPER.get(
            name, tuple(np.mean(list(PAPER.values()), axis=0)) if name == "mean" else None
        )
        shares = "".join(f"{row[m]:8.1%}" for m in ("before", "after", "random"))
        beside = f"{paper[0]:20.1f} %{paper[1]:6.1f} %" if paper else ""
        lines.append(
            f"{name:10}{shares}{row['perplexity_before']:16.2f}{row['perplexity_after']:9.2f}{beside}"
        )
    return "\n".join(lines)
