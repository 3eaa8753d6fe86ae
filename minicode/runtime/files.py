"""Files that appear whole or not at all, and are read without trust."""

import io
import json
import math
import os
import warnings
import zipfile
from contextlib import ExitStack, contextmanager, suppress

import torch

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


@contextmanager
def owned(folder):
    """A folder, made if need be, that is this process's alone within the block.

    The lock ends with the process, however that ends.
    """
    check_name(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        if fcntl:
            number = os.open(folder, os.O_RDONLY)
            held.callback(os.close, number)
            lock(number, folder)
        try:
            yield
        finally:
            with suppress(OSError):  # nothing came of it, if it is empty
                folder.rmdir()


def lock(number, folder):
    """ValueError where another process has the lock of a folder that is open as `number`."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is training in {folder}") from None
    except OSError:  # this file system has no locks
        pass


def check_name(folder):
    """ValueError for a name that torch can't open."""
    with reading(ascii(str(folder)), "has a name that is not UTF-8"):
        str(folder).encode()


@contextmanager
def reading(path, wrong="is damaged"):
    """Whatever goes wrong in the block is a ValueError that names the file, in one line."""
    try:
        yield
    except Exception as error:  # a hostile file may have any
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} {wrong}: {reason or type(error).__name__}") from None


def write(path, content):
    """Writes text or bytes: the file appears whole or not at all; until then the old one stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # whatever it is: nothing is written through a link
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk
        raise OSError(f"{path} could not be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path, data):
    buffer = io.BytesIO()
    torch.save(data, buffer)
    write(path, buffer.getvalue())


def read_tensors(path):
    """The dict in a file of tensors; ValueError if it is damaged, or would run code.

    The tensors stay on the disk until they are used, so that no size that it claims is believed.
    """
    with reading(path, "is damaged, or no file of tensors, and was not loaded"):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > path.stat().st_size or archive.testzip():
                raise ValueError("sizes or checksums")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(data, dict):
            raise ValueError("no dict")
        return data


def check_tensors(tensors, expected):
    """ValueError, by name, unless tensors are as expected (names, shapes, types), and finite."""
    if tensors.keys() != expected.keys():
        names = sorted(str(name) for name in tensors.keys() ^ expected.keys())
        raise ValueError(f"unknown or missing: {', '.join(names)}")
    for name, like in expected.items():
        tensor = tensors[name]
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
            raise ValueError(f"{name} is no plain tensor")
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        wanted = f"{tuple(like.shape)} {like.dtype}"
        if found != wanted:
            raise ValueError(f"{name} is {found}, not {wanted}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")


def read_json(path, build):
    """build(data) of a JSON file; anything wrong with it is a ValueError that names the file."""
    with reading(path):
        return build(json.loads(path.read_bytes()))


def figures(data):
    """data, if it is a dict of figures: finite numbers, none, or dicts of them."""
    for name, value in data.items():
        if isinstance(value, dict):
            figures(value)
        elif value is not None and (isinstance(value, bool) or not math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}")
    return data
