"""What texts become when a topic's codes are forced, beside what else could have done it."""

from dataclasses import replace

import numpy as np
import torch

from minicode.codebook import codebooks
from minicode.control import GENERATED, force
from minicode.language.text import perplexity
from minicode.language.topics import Effect, codes_of_topics
from minicode.model import evaluating
from minicode.notation import Code
from minicode.runtime.progress import bar

N_SAMPLES = 10  # stories that continue each of the prompts
PROMPTS = ("Once upon a time", "One day, a", "Long ago, in a land far away", "There was once a")
N_PASSAGES = 64  # held-out passages of your own text that are continued
GIVEN = 16  # tokens of each
N_RANDOM = 16  # sets of random codes, of which the one is taken that is nearest in surprise
BIAS = 2.0  # nats that the baseline adds to the logits of a topic's words
WAYS = ("before", "after", "random", "logit_bias")


def beginnings(run):
    """What texts begin with: tokens (n, T) of each lot, all of them held out."""
    if run.data.topics:
        return [run.data.prompt(text).repeat(N_SAMPLES, 1) for text in PROMPTS]
    given = min(GIVEN, run.config.block_size // 2)
    return [torch.from_numpy(run.data.passages(N_PASSAGES, given))]


def continuations(run, codes, words=()):
    """Texts that go on from the beginnings with codes forced, without these, and their perplexity.

    That is under the dense model: the geometric mean over lots. words: tokens to whose logits BIAS
    is added.
    """
    model = run.model
    judge = run.dense or model
    bias = torch.zeros(model.config.vocab_size, device=model.device)
    bias[list(words)] = BIAS
    texts = []
    losses = []
    for seed, tokens in enumerate(beginnings(run)):
        start = tokens.shape[1]
        n_new = min(run.data.sample_length, run.config.block_size + 1 - start)
        generator = torch.Generator(model.device).manual_seed(seed)
        biased = model.lm_head.register_forward_hook(lambda _, inputs, logits: logits + bias)
        with biased, force(model, codes, GENERATED):
            tokens = model.generate(tokens.to(model.device), n_new, generator=generator)
        texts += [run.tokenizer.decode(row) for row in tokens[:, start:].tolist()]
        targets = tokens[:, 1:].clone()
        targets[:, : start - 1] = -100  # F.cross_entropy leaves them out
        with evaluating(judge):
            _, loss = judge(tokens[:, :-1], targets)
        losses.append(loss.item())
    return texts, perplexity(np.mean(losses))


def random_codes(run, effect, codes, rng):
    """As many random codes of the same heads, none of them in `codes`.

    Of N_RANDOM sets it is the one that surprises the dense model the most nearly as they do.
    """
    wanted = effect.surprise(effect.after(codes))
    sets = {}
    for _ in range(N_RANDOM):
        others = []
        for text in codes:
            code = Code.parse(text, run.model)
            n_codes = codebooks(run.model)[code.site].n_codes
            every = [str(replace(code, id=i)) for i in range(n_codes)]
            new = [other for other in every if other not in codes + others]
            others.append(rng.choice(new).item())
        sets[abs(effect.surprise(effect.after(others)) - wanted)] = others
    return sets[min(sets)]


def shares_in_data(run, topics, most=512):
    """What steering can be compared with, {topic: a share}; None where there are no such texts.

    Of texts as long that follow one of the topic's words in the training text, the share that
    mention it.
    """
    length = min(run.data.sample_length, run.config.block_size)
    rng = np.random.default_rng(0)
    words = {topic: topic.tokens(run.tokenizer) for topic in topics}
    texts = {topic: [] for topic in topics}
    for _ in range(16):
        missing = [topic for topic in topics if len(texts[topic]) < most]
        if not missing:
            break
        rows = run.data.sequences(rng, most, 2 * length)
        for topic in missing:
            comes = np.isin(rows[:, :length], words[topic])
            for i in np.flatnonzero(comes.any(1)):
                start = comes[i].argmax() + 1
                text = run.tokenizer.decode(rows[i, start : start + length].tolist())
                texts[topic].append(text)
    shares = {}
    for topic, own in texts.items():
        shares[topic] = topic.count(own) / len(own) if own else None
    return shares


def steering_table(run, asked, budget):
    """Shares of texts that mention each topic: left alone, and by what is done to the model.

    {"topics": {name: {"before", "after", "random", "logit_bias", "in_data": shares,
    "perplexity_before" and so on: those of the texts under the dense model, "codes"}},
    "mean": {...}, "budget"}. "in_data" is of shares_in_data.
    """
    codes = codes_of_topics(run, asked, budget)
    effect = Effect(run)
    left_alone = continuations(run, [])
    in_data = shares_in_data(run, asked)
    topics = {}
    for topic in bar(asked, desc="steering"):
        row = steer(run, effect, topic, codes[topic], left_alone)
        topics[topic.title] = {"codes": codes[topic], "in_data": in_data[topic], **row}
    mean = {}
    for measure in topics[asked[0].title]:
        values = [row[measure] for row in topics.values() if row[measure] is not None]
        if measure != "codes":
            mean[measure] = np.mean(values) if values else None
    return {"topics": topics, "mean": mean, "budget": budget}


def steer(run, effect, topic, codes, left_alone):
    """A row of the table; left_alone: what `continuations` gives for no codes at all."""
    words = topic.tokens(run.tokenizer)
    words += topic.counted_tokens(run.data.vocabulary)
    others = random_codes(run, effect, codes, np.random.default_rng(0))
    made = {
        "before": left_alone,
        "after": continuations(run, codes),
        "random": continuations(run, others),
        "logit_bias": continuations(run, [], words),
    }
    row = {}
    for way, (texts, surprise) in made.items():
        row[way] = topic.count(texts) / len(texts)
        row[f"perplexity_{way}"] = surprise
    return row


def describe(table):
    """The table for people."""
    head = f"{'texts that mention':20}" + "".join(f"{way:>12}" for way in (*WAYS, "in_data"))
    lines = [f"{head}   perplexity: the first four; codes"]
    for name, row in [*table["topics"].items(), ("mean", table["mean"])]:
        shares = "".join(f"{row[way]:12.1%}" for way in WAYS)
        shares += f"{'-':>12}" if row["in_data"] is None else f"{row['in_data']:12.1%}"
        prices = "".join(f"{row[f'perplexity_{way}']:8.2f}" for way in WAYS)
        n_codes = f"{len(row['codes']):4}" if "codes" in row else ""
        lines.append(f"{name:20}{shares}   {prices}{n_codes}")
    return "\n".join(lines)
