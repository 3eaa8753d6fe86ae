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
import torch.nn.functional as F
from tqdm import tqdm

from minicode.control import GENERATED, Code, force
from minicode.language.stories import stories
from minicode.model import evaluating
from minicode.study.detectors import detect, matches, record_codes

N_SEQUENCES = 512  # that codes are recorded on
MOST = 12  # codes that are forced in all: more of them are surer, and worse English
PER_HEAD = 4  # and in one codebook
NEAR = 16  # a word's codes are those that fire on so many tokens before it
PROMPTS = ("Once upon a time", "One day, a", "Long ago, in a land far away", "There was once a")


def held_out(run):
    """Tokens (n, T) of a run's data that it was not trained on, and their labels."""
    rng = np.random.default_rng((run.config.seed, 3))
    return run.data.labelled(rng, N_SEQUENCES, run.config.block_size)


# -- codes that stand for a topic or a word


def find_codes(recording, labels, names):
    """{name: its codes}: those that detect the label best, by F1, and twice as well as chance."""
    found = detect(recording, labels, names)
    codebooks = recording.model.codebooks()
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
            if per_head[head] < min(PER_HEAD, codebooks[code.site].k):
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
    topics = run.data.topics
    if kind == "topic" and name not in topics:
        there_are = ", ".join(topics) or "none of your own text: try word:"
        raise ValueError(f"there is no topic {name!r}; there are {there_are}")
    run.sites()
    tokens, kinds = held_out(run)
    if kind == "topic":
        labels = np.where(kinds["topic"][0] == topics.index(name), 0, -1)
    else:
        labels = near(run.data.texts(tokens), mention(text))
    if not (labels == 0).any():
        raise ValueError(f"{text}: it does not occur in the held-out text")
    codes = find_codes(record_codes(run.model, tokens), labels, [name])[name]
    if not codes:
        raise ValueError(f"{text}: no code stands for it")
    return codes


# -- what texts become by them


def perplexity_of(model, tokens, start):
    """Of tokens (n, T) from position `start` on, under a model."""
    with evaluating(model):
        logits, _ = model(tokens[:, :-1])
    logits = logits[:, start - 1 :].flatten(0, 1).float()
    return math.exp(F.cross_entropy(logits, tokens[:, start:].flatten()))


def generate(run, prompt, codes, n_samples, seed, max_new_tokens):
    """Texts that continue a prompt with codes forced, and their perplexity under the dense model.

    The texts are without the prompt.
    """
    model = run.model
    tokens = run.data.prompt(prompt).repeat(n_samples, 1).to(model.device)
    start = tokens.shape[1]
    n_new = min(max_new_tokens, run.config.block_size + 1 - start)
    generator = torch.Generator(model.device).manual_seed(seed)
    with force(model, codes, GENERATED):
        tokens = model.generate(tokens, n_new, generator=generator)
    texts = [run.tokenizer.decode(row) for row in tokens[:, start:].tolist()]
    return texts, perplexity_of(run.dense or model, tokens, start)


def random_others(model, codes, rng):
    """As many random codes of each head as there are in `codes`, but none of these."""
    others = []
    for text in codes:
        code = Code.parse(text, model)
        n_codes = model.codebooks()[code.site].n_codes
        every = [str(replace(code, id=i)) for i in range(n_codes)]
        free = [other for other in every if other not in codes + others]
        others.append(free[rng.integers(len(free))])
    return others


def steering_table(run, recording, labels, names, n_samples=10, max_new_tokens=100, seed=0):
    """Shares of texts that mention each topic: left alone, with its codes, with random codes.

    {"topics": {topic: {"before", "after", "random", "perplexity_before", "perplexity_after",
    "codes"}}, "mean": {...}}, over PROMPTS, n_samples each. Perplexities are those of the texts,
    under the dense model.
    """
    codes = find_codes(recording, labels, names)
    rng = np.random.default_rng(seed)

    def sample(forced):
        """Texts, and their perplexity: the geometric mean over prompts."""
        texts = []
        perplexities = []
        for i, prompt in enumerate(PROMPTS):
            more, perplexity = generate(run, prompt, forced, n_samples, seed + i, max_new_tokens)
            texts += more
            perplexities.append(perplexity)
        return texts, math.exp(np.mean(np.log(perplexities)))

    left_alone, perplexity_before = sample([])
    topics = {}
    for name in tqdm(names, desc="steering", leave=False, disable=None):
        steered, perplexity_after = sample(codes[name])
        at_random, _ = sample(random_others(run.model, codes[name], rng))
        topics[name] = row = {}
        for when, texts in ("before", left_alone), ("after", steered), ("random", at_random):
            row[when] = count_mentions(f"topic:{name}", texts) / len(texts)
        row["perplexity_before"] = perplexity_before
        row["perplexity_after"] = perplexity_after
        row["codes"] = codes[name]
    measures = [measure for measure in row if measure != "codes"]
    mean = {m: float(np.mean([row[m] for row in topics.values()])) for m in measures}
    return {"topics": topics, "mean": mean}


def describe(table):
    """The table for people."""
    lines = [f"{'topic':10}{'before':>8}{'after':>8}{'random':>8}   perplexity before, after"]
    rows = {**table["topics"], "mean": table["mean"]}
    for name, row in rows.items():
        line = f"{name:10}{row['before']:8.1%}{row['after']:8.1%}{row['random']:8.1%}"
        lines.append(f"{line}{row['perplexity_before']:16.2f}{row['perplexity_after']:9.2f}")
    return "\n".join(lines)
