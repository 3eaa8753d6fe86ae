"""A dataclass is the configuration: its fields, documented in place, become a command's flags."""

import argparse
from contextlib import contextmanager
from dataclasses import field, fields

from minicode.runtime import processes
from minicode.runtime.arguments import check_one_of, check_range

TOO_MUCH = {int: 2**63, float: 1e38}  # where an option has no limit of its own


def option(default, help, flag=True, section=None, **valid):
    """A dataclass field whose documentation is the help of its flag.

    flag     False: it is no flag; or how argparse reads it, where its type doesn't say
    section  heads this flag and those that follow, in a command's help
    valid    `least` (0 for a number), `below` and `choices`: what `check_options` lets pass
    """
    about = {"help": help, "flag": flag, "section": section, **valid}
    return field(default=default, metadata=about)


def check_options(config):
    """ValueError for a field whose value is of another type, no choice, or out of range."""
    for f in fields(config):
        value = getattr(config, f.name)
        valid = f.metadata
        if not isinstance(value, (int, float) if f.type is float else f.type):
            wanted = getattr(f.type, "__name__", f.type)
            raise ValueError(f"{f.name} must be of type {wanted}, not {value!r}")
        if "choices" in valid:
            check_one_of(f.name, value, valid["choices"])
        if f.type in TOO_MUCH:
            below = valid.get("below", TOO_MUCH[f.type])
            check_range(f.name, value, valid.get("least", 0), below)


def add_flags(parser, cls, preset):
    """The fields of a dataclass as flags; a preset may have other defaults."""
    group = parser
    for f in fields(cls):
        how = f.metadata["flag"]
        if f.metadata["section"]:
            group = parser.add_argument_group(f.metadata["section"])
        if not how:
            continue
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif how is True:
            how = {"type": f.type, "metavar": f.type.__name__}
        default = preset.get(f.name, f.default)
        text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
        flag = "--" + f.name.replace("_", "-")
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)


def given(args, cls):
    """The fields of cls that the command line names."""
    flags = [f.name for f in fields(cls) if f.metadata["flag"]]
    return {name: getattr(args, name) for name in flags if name in args}


class Parser(argparse.ArgumentParser):
    """A user's mistake ends the command with one line, by one process, and exit status 2."""

    def __init__(self, name, about):
        super().__init__(
            prog=f"python -m minicode.{name}",
            usage="%(prog)s [flags]",
            description=about,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def exit(self, status=0, message=None):
        super().exit(status, message if processes.rank() == 0 else None)

    def error(self, message, status=2):
        self.exit(status, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextmanager
    def user_errors(self, status=2):
        """A user's mistakes, and a memory or a number that is too small, end it in one line."""
        try:
            yield
        except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
            text = str(error) or "there is not enough memory"
            if isinstance(error, RuntimeError) and "alloc" not in text:
                raise
            self.error(text, status)
