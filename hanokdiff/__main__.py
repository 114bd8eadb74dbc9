"""What can be run here, one line each."""

import ast
import sys
from pathlib import Path

from hanokdiff.errors import report_errors
from hanokdiff.options import Options

PACKAGE = Path(__file__).resolve().parent
COMMANDS = (
    "train_lora.py", "train_dreambooth.py", "train_hypernet.py", "train_ti.py", "sample.py", "clipscore.py",
    "hanokdiff.compare", "hanokdiff.caption", "hanokdiff.alert", "hanokdiff.convert", "hanokdiff.bench",
    "hanokdiff.bench.budget", "hanokdiff.bench.card", "hanokdiff.tiny.world", "hanokdiff.tiny.build",
)  # fmt: skip


def source(command: str) -> Path:
    """The file that runs. The scripts lie beside the package, where the repository was cloned."""
    if command.endswith(".py"):
        return PACKAGE.parent / command
    path = PACKAGE.parent.joinpath(*command.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def first_line(file: Path) -> str:
    """Of the file's docstring; nothing is imported."""
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0].rstrip(":.")


@report_errors
def main(argv=None) -> None:
    Options(prog="python -m hanokdiff", description=__doc__).parse_args(argv)
    for command in COMMANDS:
        if (file := source(command)).is_file():
            start = "python " if command.endswith(".py") else "python -m "
            print(f"{start + command:<33} {first_line(file)}")
    print("Each says with --help what it takes. README.md begins with two commands.")


if __name__ == "__main__":
    sys.exit(main())
