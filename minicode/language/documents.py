"""The documents of the user's own files: what stands between blank lines."""

import re
from pathlib import Path

import numpy as np

from minicode.runtime.progress import bar

HELD_OUT = 10  # one part in so many is never trained on
LONGEST = 1 << 12  # bytes of a document; what is longer is cut at the end of a line or of a word
DOCUMENT = rb"""
    ( .{0,LONGEST}? (?= \r?\n\r?\n | \Z)   # up to a blank line, or to the end of the file;
    | .{1,LONGEST} (?= \n)                 # if that is too far, up to the end of a line,
    | .{1,LONGEST} (?= [ ])                # or of a word,
    | .{1,LONGEST} (?! [\x80-\xbf])        # or of a character
    | .{1,LONGEST} )                       # (what is no UTF-8 has none)
    (?: \r?\n\r?\n )?"""


def read_documents(paths):
    """(text, whether it is held out) of each document of files and folders, from start to end.

    The last tenth is held out, but for what stands word for word in the part before it.
    """
    files = list_files(paths)
    total = sum(path.stat().st_size for path in files)
    seen = set()  # documents to train on, by their hash
    before = 0  # bytes of the files that are done
    with bar(total=total, unit="B", unit_scale=True, desc="reading") as progress:
        for path in files:
            for offset, content in split_file(path):
                text = decode_utf8(path, offset, content)
                end = before + offset + len(content)
                progress.update(end - progress.n)
                held_out = end > total * (1 - 1 / HELD_OUT)
                known = hash(content.strip())
                if not held_out:
                    seen.add(known)
                elif known in seen:
                    continue
                if text.strip():
                    yield text, held_out
            before += path.stat().st_size


def list_files(paths):
    """The files that are named, and those in folders that are, but for hidden and empty ones."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"there is no file or folder {path}")
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is a pipe or a device: save its text in a file, read twice")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            parts = file.relative_to(path).parts
            hidden = any(part.startswith(".") for part in parts)
            if file.is_file() and file.stat().st_size and not hidden:
                files.append(file)
    return files


def split_file(path):
    """(offset, bytes) of each document of a file, or, where it is too long, of each part of it.

    A part ends before a line's end, before a space, or between two characters. The file is mapped,
    and not read as a whole.
    """
    pattern = DOCUMENT.replace(b"LONGEST", b"%d" % LONGEST)
    for match in re.finditer(pattern, np.memmap(path, mode="r"), re.DOTALL | re.VERBOSE):
        yield match.start(), match[1]


def decode_utf8(path, offset, content):
    """The text of bytes that stand at an offset in a file; a ValueError where they are none."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        at = f"byte {content[error.start]:#04x} at offset {offset + error.start}"
        raise ValueError(f"{path} is not UTF-8: {at} ({error.reason})") from None
    return text.removeprefix("\ufeff")
