"""Text as tokens, and back.

A token is a piece of text, most often a word with the space before it, or one byte of a piece that
the vocabulary does not hold. So nothing is lost: decode(encode(text)) == text. Between two
documents stands a token of its own:

    SEPARATOR Once _upon _a _time , ... SEPARATOR There _was _once ...      (_ is a space)
"""

import re

PIECES = re.compile(r" ?\w+| ?[^\w\s]|\s+")  # every character is in one of them
SEPARATOR = 256  # before each document; below it are the bytes, above it the pieces


class Tokenizer:
    """Tokens of a text, and back. `pieces`: the vocabulary beyond bytes and separator, strings."""

    separator = SEPARATOR
    most_tokens = 1 << 62  # in a sequence

    def __init__(self, pieces):
        self.ids = {piece: i for i, piece in enumerate(pieces, SEPARATOR + 1)}
        single_bytes = [bytes([i]) for i in range(SEPARATOR)]
        self.bytes = [*single_bytes, b"\n\n", *map(to_bytes, pieces)]  # of each token
        self.vocab_size = len(self.bytes)

    def encode(self, text):
        """The tokens of a string: a list of ints, none of them the separator."""
        tokens = []
        for piece in PIECES.findall(text):
            if piece in self.ids:
                tokens.append(self.ids[piece])
            else:
                tokens.extend(to_bytes(piece))
        return tokens

    def decode(self, tokens):
        """The string of tokens; a separator is a blank line, what is no UTF-8 question marks."""
        content = b"".join(self.bytes[token] for token in tokens)
        try:
            return content.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # a model may put any two bytes beside each other
            return content.decode("utf-8", "replace")


def to_bytes(text):
    """UTF-8; what a Python string may hold beyond it, surrogates that are alone, is kept too."""
    return text.encode("utf-8", "surrogatepass")
