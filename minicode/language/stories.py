"""Little stories made on the spot, by the grammar in stories.txt: ground truth for language.

There is no end to them, each is known by its number, and of each sentence the topic is known. They
are for language what TokFSM is for digits.
"""

import random
import re
from functools import cache
from itertools import islice
from pathlib import Path

SECTION = re.compile(r"^\[(.*)\]\n([^\[]*)", re.M)  # [title] and what stands below it
SLOT = re.compile(r"\{(\w+)\}|\(([^()]*\|[^()]*)\)")  # {word} or (one|another)
AN = re.compile(r"(?<=\b[Aa]) (?=[aeiou])")  # where an n is missing


class Stories:
    """The grammar in stories.txt: an endless list of stories, each known by its number."""

    def __init__(self):
        grammar = Path(__file__).with_name("stories.txt").read_text(encoding="utf-8")
        self.moods = []  # lines and ends of each
        self.topics = {}  # of each its words, beginnings, lines, ends, and other words
        self.mention = {}  # of each topic the pattern that mentions it
        self.about = {}  # and that of other words, which are often about it
        self.lines = {}  # what else there is, such as openings
        for title, body in SECTION.findall(grammar):
            parts = [part.splitlines() for part in body.strip().split("\n\n")]
            kind, _, name = title.partition(" ")
            if kind == "mood":
                self.moods.append(parts)
            elif kind == "topic":
                topic, pattern, about = re.split(": | / ", name)
                words, *sentences = parts
                self.topics[topic] = (read_words(words), *sentences)
                self.mention[topic] = one_of([pattern])
                self.about[topic] = one_of(about.split())
            else:
                self.lines[kind] = parts[0]
        self.words = read_words(self.lines["words"])
        self.people = []  # (name, kid, he, him, his)
        for line in self.lines["characters"]:
            kind, names = line.split(": ")
            self.people += [(name, *kind.split()) for name in names.split()]

    def story(self, number):
        """Story `number` as a list of (sentence, topic); the topic is None until it has come in.

        One story in eight has two topics: the second comes in after the first, and replaces it.
        """
        return self.tell(number, self.plan)

    def in_other_words(self, number):
        """A story whose sentences about its topic stand in no other, and don't name it."""
        return self.tell(number, self.plan_in_other_words)

    def tell(self, number, plan):
        """The story of this number with its people and words drawn; its patterns are a plan's."""
        rng = random.Random(number)
        words = dict(self.words)
        for end, person in zip(("", "2"), rng.sample(self.people, 2)):
            for slot, word in zip(("name", "kid", "he", "him", "his"), person):
                words[slot + end] = [word]
        story = []
        before = None
        for pattern, topic in list(plan(rng)):  # all of it, before a word is drawn
            if topic != before:
                words.update(self.topics[topic][0])
                before = topic
            sentence = AN.sub("n ", fill(pattern, words, rng))
            story.append((sentence, topic))
        return story

    def plan(self, rng):
        """The patterns of a story's sentences, in order: (pattern, topic)."""
        n_topics = 2 if rng.random() < 1 / 8 else 1
        topics = rng.sample(list(self.topics), n_topics)
        mood, mood_ends = rng.choice(self.moods)
        opening = rng.choice(self.lines["opening"])
        about = rng.sample(self.lines["about"], rng.choice((0, 1, 1, 2)))
        for pattern in (opening, *about):
            yield pattern, None
        others = iter(rng.sample(self.lines["shared"], 4) + rng.sample(mood, 4))
        for topic in topics:
            _, beginnings, own, ends, _ = self.topics[topic]
            lines = rng.sample(own, rng.randint(3, 5))
            lines += islice(others, rng.randint(1, 3))
            beginning = rng.choice(beginnings)
            for pattern in (beginning, *rng.sample(lines, len(lines))):
                yield pattern, topic
        yield rng.choice(rng.choice((ends, mood_ends))), topic

    def plan_in_other_words(self, rng):
        """An opening, and the sentences about a topic that are in no other plan."""
        topic = rng.choice(list(self.topics))
        *_, others = self.topics[topic]
        yield rng.choice(self.lines["opening"]), None
        for pattern in rng.sample(others, len(others)):
            yield pattern, topic


def fill(pattern, words, rng):
    """A pattern with its slots filled; what is drawn for a word stays, in `words`."""

    def draw(match):
        slot, choices = match.groups()
        if choices:
            return fill(rng.choice(choices.split("|")), words, rng)
        name = slot.lower()
        if len(words[name]) > 1:
            words[name] = [fill(rng.choice(words[name]), words, rng)]
        word = words[name][0]
        return word if slot == name else word[0].upper() + word[1:]

    return SLOT.sub(draw, pattern)


def one_of(patterns):
    """The pattern of a word that is one of these, in any case."""
    return re.compile(rf"(?<!\w)({'|'.join(patterns)})(?!\w)", re.I)


def read_words(lines):
    """Lines such as "color: red | blue" as a dict of lists."""
    words = {}
    for line in lines:
        name, choices = line.split(": ")
        words[name] = choices.split(" | ")
    return words


stories = cache(Stories)  # so that the grammar is read once
