"""One dataclass is the configuration: its fields are documented in place and become a command's flags."""

import argparse
from contextlib import contextmanager
from dataclasses import field, fields

from minicode.runtime import processes


def option(default, help, flag={}, **valid):
    """A dataclass field whose documentation is the help of its flag; least, below and choices are what is valid.

    flag: how argparse reads it, where that does not follow from the field's type; None where it is no flag.
    """
    return field(default=default, metadata={"help": help, "flag": flag, **valid})


def number(text):
    return None if text == "none" else float(text)


def add_flags(parser, cls, preset={}):
    """The fields of a dataclass as flags; where a preset changes a default, the help says so."""
    for f in fields(cls):
        if (flag := f.metadata["flag"]) is not None:
            text = f"{f.metadata['help']} (default: {preset.get(f.name, f.default)})".replace(
                "%", "%%"
            )
            on_or_off = {"action": argparse.BooleanOptionalAction} if f.type is bool else {}
            how = flag or on_or_off or {"type": f.type, "metavar": f.type.__name__}
            parser.add_argument(
                "--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how
            )


def given(args, cls):
    """The fields of cls that the command line names."""
    return {
        f.name: getattr(args, f.name)
        for f in fields(cls)
        if f.metadata["flag"] is not None and f.name in args
    }


class Parser(argparse.ArgumentParser):
    """A user's mistake ends the command with one line, however many processes make it, and exit status 2."""

    def __init__(self, name, about):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"python -m minicode.{name}",
            description=about,
            allow_abbrev=False,
            formatter_class=layout,
        )

    def exit(self, status=0, message=None):
        super().exit(status, message if processes.rank() == 0 else None)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextmanager
    def user_errors(self):
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(str(error))
