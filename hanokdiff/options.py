"""A parser of command lines whose every complaint is one sentence, told like all the others by cli.polite."""

import argparse
import difflib
import re

KINDS = {"int": "a whole number", "float": "a number"}


class Options(argparse.ArgumentParser):
    """argparse prints its usage, twenty lines of it, and hides the mistake below; this one raises ValueError."""

    names: list[str] = []  # of this command's options: what a message may propose

    def __init__(self, *args, **kwargs):
        super().__init__(
            *args, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs
        )

    def parse_args(self, args=None, namespace=None):
        Options.names = Options.names or list(self._option_string_actions)
        return super().parse_args(args, namespace)

    def error(self, message: str):
        if m := re.fullmatch(r"argument (\S+): invalid (int|float) value: '(.*)'", message, re.DOTALL):
            message = f"{m[1]} is {m[3]}, but must be {KINDS[m[2]]}"
        elif m := re.fullmatch(
            r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL
        ):
            message = f"{m[1]} is {m[2]}, but must be one of {m[3].replace(chr(39), '')}"
        elif m := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
            near = difflib.get_close_matches(m[1].split("=")[0], self._option_string_actions, 1, 0.75)
            known = f"did you mean {near[0]}?" if near else "see --help; what has spaces in it needs quotes"
            message = f"{m[1]} is not known here: {known}"
        elif re.search(r"expected .* arguments?$|required: ", message):
            message += "; see --help"
        raise ValueError(message.removeprefix("argument "))
