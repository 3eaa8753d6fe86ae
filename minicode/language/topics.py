"""Steering language by its codes: those of a topic or a word, and what texts become by them.

Paper, section 5.2. A topic's codes are found by their precision and recall on held-out text; forced
while text is generated, they make it be about the topic.
"""

import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from minicode.control import GENERATED, Code, force
from minicode.language.stories import stories
from minicode.model import evaluating
from minicode.study.detectors import detect, matches, record_codes

N_SEQUENCES = 512  # that codes are recorded on
MOST = 12  # codes that are forced in all: more of them are surer, and worse English
PER_HEAD = 4  # and in one codebook
NEAR = 16  # a word's codes are those that fire on so many tokens before it
N_SAMPLES = 10  # texts that continue each of the prompts
PROMPTS = ("Once upon a time", "One day, a", "Long ago, in a land far away", "There was once a")


def held_out(run):
    """Tokens (n, T) of a run's data that it was not trained on, and their labels."""
    rng = np.random.default_rng((run.config.seed, 3))
    return run.data.labelled(rng, N_SEQUENCES, run.config.block_size)


# -- codes that stand for a topic or a word


def find_codes(recording, labels, names):
    """{name: its codes}: those that detect the label best, by F1, and twice as well as chance."""
    found = detect(recording, labels, names)
    result = {}
    for i, name in enumerate(names):
        chance = found.total[i] / labels.size
        usable = (found.recall[:, i] >= 0.01) & (found.precision[:, i] >= 2 * chance)
        best_first = np.argsort(-found.f1[:, i], kind="stable")
        codes = []
        per_head = Counter()
        for number in best_first[usable[best_first]]:
            code = recording.names[number]
            head = code.site, code.group
            if per_head[head] < min(PER_HEAD, recording.columns.count(head)):
                per_head[head] += 1
                codes.append(str(code))
        result[name] = codes[:MOST]
    return result


def mention(text):
    """The pattern by which topic:NAME or word:WORD is mentioned."""
    kind, name = text.split(":", 1)
    if kind == "topic":
        return stories().mention[name]
    return re.compile(rf"\b{re.escape(name)}\b", re.I)


def count_mentions(text, samples):
    """How many of the samples mention topic:NAME or word:WORD."""
    return sum(bool(mention(text).search(sample)) for sample in samples)


def near(rows, pattern):
    """Labels (n, T): 0 on the NEAR tokens up to the end of each match, -1 elsewhere."""
    labels = matches(rows, pattern)
    for row, at in np.argwhere(labels == 0):
        labels[row, max(0, at - NEAR + 1) : at + 1] = 0
    return labels


def expand(run, text):
    """The codes that a --force-code means: itself, or those of topic:NAME or word:WORD."""
    kind, _, name = text.partition(":")
    if kind not in ("topic", "word"):
        return [text]
    if not run.tokenizer:
        raise ValueError(f"{text}: only a run on text has topics and words")
    if kind == "topic" and name not in run.data.topics:
        there_are = ", ".join(run.data.topics) or "none of your own text: try word:"
        raise ValueError(f"there is no topic {name!r}; there are {there_are}")
    run.sites()
    tokens, kinds = held_out(run)
    if kind == "topic":
        labels, names = kinds["topic"]
    else:
        labels = near(run.data.texts(tokens), mention(text))
        names = [name]
    codes = find_codes(record_codes(run.model, tokens), labels, names)[name]
    if not codes:
        raise ValueError(f"{text}: no code stands for it, or it is not in the held-out text")
    return codes


# -- what texts become by them


def continuations(run, codes):
    """Texts that continue the PROMPTS with codes forced, without these, and their perplexity.

    That is under the dense model: the geometric mean over prompts.
    """
    model = run.model
    judge = run.dense or model
    texts = []
    losses = []
    for seed, prompt in enumerate(PROMPTS):
        tokens = run.data.prompt(prompt).repeat(N_SAMPLES, 1).to(model.device)
        start = tokens.shape[1]
        n_new = min(run.data.sample_length, run.config.block_size + 1 - start)
        generator = torch.Generator(model.device).manual_seed(seed)
        with force(model, codes, GENERATED):
            tokens = model.generate(tokens, n_new, generator=generator)
        texts += [run.tokenizer.decode(row) for row in tokens[:, start:].tolist()]
        targets = tokens[:, 1:].clone()
        targets[:, : start - 1] = -100  # F.cross_entropy leaves them out
        with evaluating(judge):
            _, loss = judge(tokens[:, :-1], targets)
        losses.append(loss.item())
    return texts, math.exp(np.mean(losses))


def random_others(model, codes, rng):
    """As many random codes of each head as there are in `codes`, but none of these."""
    others = []
    for text in codes:
        code = Code.parse(text, model)
        n_codes = model.codebooks()[code.site].n_codes
        every = [str(replace(code, id=i)) for i in range(n_codes)]
        free = [other for other in every if other not in codes + others]
        others.append(rng.choice(free))
    return others


def steering_table(run, recording, labels, names):
    """Shares of texts that mention each topic: left alone, with its codes, with random codes.

    {"topics": {topic: {"before", "after", "random", "perplexity_before", "perplexity_after",
    "codes"}}, "mean": {...}}, over PROMPTS, N_SAMPLES each. Perplexities are those of the texts,
    under the dense model.
    """
    codes = find_codes(recording, labels, names)
    rng = np.random.default_rng(0)
    left_alone, perplexity_before = continuations(run, [])
    topics = {}
    for name in tqdm(names, desc="steering", leave=False, disable=None):
        steered, perplexity_after = continuations(run, codes[name])
        at_random, _ = continuations(run, random_others(run.model, codes[name], rng))
        row = {"perplexity_before": perplexity_before, "perplexity_after": perplexity_after}
        for when, texts in ("before", left_alone), ("after", steered), ("random", at_random):
            row[when] = count_mentions(f"topic:{name}", texts) / len(texts)
        topics[name] = {**row, "codes": codes[name]}
    mean = {measure: np.mean([topics[name][measure] for name in names]) for measure in row}
    return {"topics": topics, "mean": mean}


def describe(table):
    """The table for people."""
    lines = [f"{'topic':10}{'before':>8}{'after':>8}{'random':>8}   perplexity before, after"]
    rows = {**table["topics"], "mean": table["mean"]}
    for name, row in rows.items():
        line = f"{name:10}{row['before']:8.1%}{row['after']:8.1%}{row['random']:8.1%}"
        lines.append(f"{line}{row['perplexity_before']:16.2f}{row['perplexity_after']:9.2f}")
    return "\n".join(lines)
