"""Little stories made on the spot, by the grammar in stories.txt: ground truth for language, as TokFSM has it for digits.

There is no end to them, each is known by its number, and of each the topic is known, sentence by sentence.
"""

import random
import re
from functools import cache
from pathlib import Path

SLOT = re.compile(r"\{(\w+)\}|\(([^()]*\|[^()]*)\)")  # {word} or (one|another)
AN = re.compile(r"(?<=\b[Aa]) (?=[aeiou])")  # where an n is missing


class Stories:
    """The grammar in stories.txt: an endless list of stories, each known by its number."""

    def __init__(self):
        text = re.sub(
            r"^#.*\n", "", Path(__file__).with_name("stories.txt").read_text(), flags=re.M
        )
        sections = dict(re.findall(r"^\[(.*)\]\n([^\[]*)", text, flags=re.M))
        paragraphs = {
            name: [part.split("\n") for part in re.split(r"\n\n+", body.strip())]
            for name, body in sections.items()
        }
        self.words = _words(paragraphs["words"][0])
        self.openings, self.about, self.shared = (
            paragraphs[name][0] for name in ("opening", "about", "shared")
        )
        self.people = [
            (name, kind.split())
            for kind, names in map(_halves, paragraphs["characters"][0])
            for name in names.split()
        ]
        self.moods = [value for name, value in paragraphs.items() if name.startswith("mood ")]
        self.topics, self.mention = {}, {}
        for name in paragraphs:
            if name.startswith("topic "):
                topic, pattern = _halves(name.removeprefix("topic "))
                self.topics[topic] = (_words(paragraphs[name][0]), *paragraphs[name][1:])
                self.mention[topic] = re.compile(
                    rf"\b({pattern})\b", re.I
                )  # what it is to mention the topic

    def story(self, number):
        """Story `number` as a list of (sentence, topic); the topic is None until it has come in.

        One story in eight has two topics: the second comes in after the first, and the topic is then the second.
        """
        rng = random.Random(number)
        words = dict(self.words)
        for end, (name, kind) in zip(("", "2"), rng.sample(self.people, 2)):
            words.update(
                zip(
                    [word + end for word in ("name", "kid", "he", "him", "his")],
                    [[word] for word in (name, *kind)],
                )
            )
        topics = rng.sample(list(self.topics), 2 if rng.random() < 1 / 8 else 1)
        mood, mood_end = rng.choice(self.moods)
        plan = [
            (line, None)
            for line in (
                rng.choice(self.openings),
                *rng.sample(self.about, rng.choice((0, 1, 1, 2))),
            )
        ]
        others = iter(rng.sample(self.shared, 4) + rng.sample(mood, 4))
        for topic in topics:
            _, begin, middle, end = self.topics[topic]
            lines = rng.sample(middle, rng.randint(3, 5)) + [
                next(others) for _ in range(rng.randint(1, 3))
            ]
            plan += [(line, topic) for line in (rng.choice(begin), *rng.sample(lines, len(lines)))]
        plan.append((rng.choice(rng.choice((end, mood_end))), topic))
        story, before = [], None
        for line, topic in plan:
            if topic != before:
                words.update(self.topics[topic][0])
            story.append((AN.sub("n ", self._fill(line, words, rng)), before := topic))
        return story

    def _fill(self, line, words, rng):
        """A pattern with its slots filled; what is drawn for a word stays, in `words`."""

        def draw(match):
            slot, choices = match.groups()
            if not slot:
                return self._fill(rng.choice(choices.split("|")), words, rng)
            name = slot.lower()
            if len(words[name]) > 1 or "{" in words[name][0]:
                words[name] = [self._fill(rng.choice(words[name]), words, rng)]
            value = words[name][0]
            return value if slot == name else value[0].upper() + value[1:]

        return SLOT.sub(draw, line)


def _halves(line):
    """The two sides of a colon."""
    left, right = line.split(":", 1)
    return left.strip(), right.strip()


def _words(lines):
    """Lines such as "color: red | blue" as a dict of lists."""
    return {name: re.split(r" *\| *", words) for name, words in map(_halves, lines)}


stories = cache(Stories)  # so that the grammar is read once
