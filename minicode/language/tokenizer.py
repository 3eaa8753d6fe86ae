"""Text as tokens and back; the documents of the user's own files."""

import re
from pathlib import Path

import numpy as np

PIECES = re.compile(r" ?\w+| ?[^\w\s]|\s+")  # every character is in one of them


SEPARATOR = (
    256  # between documents, and before the first; below it are the bytes, above it the pieces
)


LONGEST = 1 << 12  # bytes of a document; what is longer is cut at the end of a line or of a word


DOCUMENT = rb"""
    ( .{0,LONGEST}? (?= \r?\n\r?\n | \Z)  # up to a blank line, or to the end of the file;
    | .{1,LONGEST} (?= \n)                 # if that is too far, up to the end of a line,
    | .{1,LONGEST} (?= [ ])                # or of a word,
    | .{1,LONGEST} (?! [\x80-\xbf])        # or of a character
    | .{1,LONGEST} )                       # (what is no UTF-8 has none)
    (?: \r?\n\r?\n )?"""


class Tokenizer:
    """Tokens of a text, and back. `pieces`: the vocabulary beyond the bytes and the separator, a list of strings."""

    def __init__(self, pieces):
        self.pieces = list(pieces)
        self.ids = {piece: i for i, piece in enumerate(self.pieces, SEPARATOR + 1)}
        self.vocab_size = SEPARATOR + 1 + len(self.pieces)
        self.bytes = [bytes([i]) for i in range(SEPARATOR)] + [b"\n\n", *map(to_bytes, self.pieces)]
        self.sizes = np.array([len(b) for b in self.bytes])  # of each token, in bytes

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
        """The string of tokens; a separator is a blank line, and bytes that are no UTF-8 become question marks."""
        content = b"".join(self.bytes[token] for token in tokens)
        try:
            return content.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # a model may put any two bytes beside each other
            return content.decode("utf-8", "replace")


def to_bytes(text):
    """UTF-8; what a Python string may hold beyond it, surrogates that are alone, is kept too."""
    return text.encode("utf-8", "surrogatepass")


def list_files(paths):
    """The files that are named, and those in the folders that are, hidden ones left out."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"there is no file or folder {path}")
        inside = [
            p
            for p in path.rglob("*")
            if p.is_file() and "/." not in f"/{p.relative_to(path).as_posix()}"
        ]
        files += sorted(inside) if path.is_dir() else [path]
    if not (files := [path for path in files if path.stat().st_size]):
        raise ValueError(f"{' '.join(map(str, paths))}: there is no text, not a byte")
    return files


def split_file(path):
    """(offset, bytes) of each document of a file: what stands between blank lines, or, where that is too long, a part.

    A part ends before a line's end, before a space, or between two characters. The file is mapped, and not read as a whole.
    """
    document = re.compile(DOCUMENT.replace(b"LONGEST", b"%d" % LONGEST), re.DOTALL | re.VERBOSE)
    for match in document.finditer(np.memmap(path, mode="r")):
        yield match.start(), match[1]


def decode_utf8(path, offset, content):
    """The text of bytes that stand at an offset in a file; a ValueError where they are none."""
    if b"\0" in content:
        raise ValueError(
            f"{path} is no text: there is a zero byte at offset {offset + content.index(0)}"
        )
    try:
        return content.decode().removeprefix("" if offset else "\ufeff")
    except UnicodeDecodeError as error:
        at = error.start
        raise ValueError(
            f"{path} is not UTF-8: byte {content[at]:#04x} at offset {offset + at} ({error.reason})"
        ) from None
