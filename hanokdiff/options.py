"""argparse whose complaints are one sentence: a ValueError, which errors.report_errors prints."""

import argparse
import difflib
import re

TYPE_NAMES = {"int": "a whole number", "float": "a number"}


class Replace(argparse.Action):
    """--replace PHRASE, or --replace PHRASE WORD: WORD is then --token."""

    word: str | None = None

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.replace, self.word = (*values, None)[:2]


class Options(argparse.ArgumentParser):
    """argparse prints twenty lines of usage above the mistake and exits; this parser raises ValueError."""

    names: list[str] = []  # the running command's options: errors.memory_message proposes only these

    def __init__(self, *args, **kwargs):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, formatter_class=raw, allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        Options.names = Options.names or list(self._option_string_actions)
        args = super().parse_args(args, namespace)
        for word in (a.word for a in self._actions if isinstance(a, Replace) and a.word is not None):
            if isinstance(args.token, str) and args.token not in (self.get_default("token"), word):
                both = f'--replace names "{word}", but --token "{args.token}"'
                raise ValueError(f"{both}; leave one of them out")
            args.token = word
        return args

    def _get_nargs_pattern(self, action) -> str:
        """argparse's regular expression of an option's arguments: it has none for one or two."""
        return "(AA?)" if isinstance(action, Replace) else super()._get_nargs_pattern(action)

    def error(self, message: str):
        """Called by argparse with its own message, which is put in plainer words."""
        if m := re.fullmatch(r"argument (\S+): invalid (int|float) value: '(.*)'", message, re.DOTALL):
            message = f"{m[1]} is {m[3]}, but must be {TYPE_NAMES[m[2]]}"
        elif m := re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message, re.S):
            choices = m[3].replace("'", "")
            message = f"{m[1]} is {m[2]}, but must be one of {choices}"
        elif m := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
            near = difflib.get_close_matches(m[1].split("=")[0], self._option_string_actions, 1, 0.75)
            advice = f"did you mean {near[0]}?" if near else "see --help; what has spaces in it needs quotes"
            message = f"{m[1]} is not known here: {advice}"
        elif message == "argument --replace: expected 2 arguments":
            message = "--replace needs a phrase, and may name the word after it; see --help"
        elif re.search(r"expected .* arguments?$|required: ", message):
            message += "; see --help"
        raise ValueError(message.removeprefix("argument "))
