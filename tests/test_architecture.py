"""Which package may import which, and no circle between modules, imports inside functions included.

docs/architecture.md has the same table and says why. Imports are read from the source; nothing is run.
"""

import ast
import graphlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

from hanokdiff import __main__ as listing

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_ti", "train_dreambooth", "train_lora", "train_hypernet", "sample", "clipscore")
COMMANDS = ("alert", "caption", "convert", "__main__")
BASICS = "axes chart device errors files images lock options pretrained seeding".split()  # hanokdiff/NAME.py
LIBRARY = {"basics", "models", "methods", "formats", "training", "scoring", "tiny", "commands"}
MAY_IMPORT = {  # room -> the other rooms that it may import; within a room modules may import each other
    "basics": set(),
    "models": {"basics"},
    "methods": {"basics", "models"},
    "formats": {"basics", "models", "methods"},
    "training": {"basics", "models"},
    "scoring": {"basics"},
    "tiny": {"basics", "models"},
    "tiny/build.py": {"basics", "models", "formats", "scoring", "tiny"},  # trains the tiny world's weights
    "commands": LIBRARY - {"commands"},  # alert.py, caption.py, convert.py, __main__.py
    "compare": LIBRARY,
    "bench": LIBRARY,
    "scripts": LIBRARY,
}
LATE = re.compile(r"\bimport_module$|^__import__$")
ALONE = {"scripts"}  # rooms whose modules may not import each other either


def modules(root: Path) -> dict[str, Path]:
    """The scripts at the top and the package's modules: dotted name -> file."""
    found = {}
    for path in [*root.glob("*.py"), *root.glob("hanokdiff/**/*.py")]:
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(path: Path, module: str) -> set[str]:
    """What a file imports, inside functions too: "a.b" of `import a.b`, "a.b.c" of `from a.b import c`."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and LATE.search(ast.unparse(node.func)):
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports; "hanokdiff.models" is the package's own __init__.py."""
    files, graph = modules(root), {}
    for module, path in files.items():
        names = imported_names(path, module)
        names |= {name.rpartition(".")[0] for name in names if name not in files}  # a function: its module
        graph[module] = {name for name in names if name in files} - {module}
    return graph


def room(module: str) -> str:
    """The line of MAY_IMPORT that a module belongs to."""
    top, *inner = module.split(".")
    if top != "hanokdiff":
        return "scripts"
    if module == "hanokdiff.tiny.build":
        return "tiny/build.py"
    if len(inner) == 1 and inner[0] in BASICS:
        return "basics"
    if len(inner) == 1 and inner[0].removesuffix("_words") in COMMANDS:  # alert_words.py belongs to alert.py
        return "commands"
    return inner[0] if inner else "basics"  # hanokdiff/__init__.py is empty


def forbidden(graph: dict[str, set[str]]) -> list[str]:
    """Every arrow that the table does not allow, as "from -> to"."""
    found = []
    for module, targets in graph.items():
        here = room(module)
        assert here in MAY_IMPORT, f"{module}: MAY_IMPORT and docs/architecture.md need a line for this room"
        allowed = MAY_IMPORT[here] | ({here} - ALONE)
        found += [f"{module} -> {target}" for target in targets if room(target) not in allowed]
    return sorted(found)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, or none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        return e.args[1]
    return []


def test_no_forbidden_import():
    assert forbidden(import_graph(ROOT)) == []


def test_no_circle():
    assert circle(import_graph(ROOT)) == []


def test_graph_is_whole():
    """An empty graph would pass the two tests above."""
    graph = import_graph(ROOT)
    assert {m for m in graph if room(m) == "scripts"} == set(SCRIPTS)
    assert set(MAY_IMPORT) == {room(module) for module in graph}
    assert not any(graph[m] for m, path in modules(ROOT).items() if path.name == "__init__.py")
    assert "hanokdiff.models.schedule" in graph["hanokdiff.models.samplers"]
    assert "hanokdiff.methods.lora" in graph["train_lora"]


@pytest.mark.parametrize("file, line, arrow", [
    ("hanokdiff/models/unet.py", "from hanokdiff.methods import lora", "unet -> hanokdiff.methods.lora"),
    ("hanokdiff/models/unet.py", "from ..methods.lora import LoRA", "models.unet -> hanokdiff.methods.lora"),
    ("hanokdiff/methods/lora.py", "def f():\n    import hanokdiff.formats.folder", "-> hanokdiff.formats"),
    ("hanokdiff/training/trainer.py", "from hanokdiff.tiny import world", "-> hanokdiff.tiny.world"),
    ("hanokdiff/scoring/clip.py", "import hanokdiff.models.unet as u", "-> hanokdiff.models.unet"),
    ("hanokdiff/files.py", "def f():\n    from hanokdiff.models.unet import UNet", "-> hanokdiff.models"),
    ("hanokdiff/bench/budget.py", "from hanokdiff.compare import plan", "-> hanokdiff.compare.plan"),
    ("hanokdiff/convert.py", "import importlib\nimportlib.import_module('sample')", "convert -> sample"),
    ("sample.py", "import train_lora", "sample -> train_lora"),
])  # fmt: skip
def test_forbidden_import_is_found(tmp_path, file, line, arrow):
    for module, path in modules(ROOT).items():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(f'"""{module}"""\n')
    assert forbidden(import_graph(tmp_path)) == []
    (tmp_path / file).write_text(line)
    (found,) = forbidden(import_graph(tmp_path))
    assert arrow in found


def test_late_circle_is_found(tmp_path):
    package = tmp_path / "hanokdiff" / "models"
    package.mkdir(parents=True)
    (package / "a.py").write_text("from hanokdiff.models.b import f")
    (package / "b.py").write_text("def f():\n    from .c import g")
    (package / "c.py").write_text("from hanokdiff.models import a")
    assert set(circle(import_graph(tmp_path))) == {f"hanokdiff.models.{m}" for m in "abc"}


def test_architecture_page_has_the_same_table():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    assert "no other room" in page
    rows = dict(re.findall(r"^\| `([\w/.]+?)/?` \| ([^|]*) \|", page, re.MULTILINE))
    table = {name: set(re.findall(r"`([\w/.]+?)/?`", cell)) for name, cell in rows.items()}
    assert table == MAY_IMPORT


def test_every_command_is_listed(capsys):
    """What runs as a program is what `python -m hanokdiff` lists; only compare runs its worker."""
    runs = {m for m, path in modules(ROOT).items() if "\nif __name__ ==" in path.read_text("utf-8")}
    runs = {m.removesuffix(".__main__") for m in runs} - {"hanokdiff", "hanokdiff.compare.worker"}
    assert {c.removesuffix(".py") for c in listing.COMMANDS} == runs
    assert listing.main([]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == len(listing.COMMANDS) and "README" in last
    for command, line in zip(listing.COMMANDS, lines, strict=True):
        start, _, said = line.partition(command)
        assert start == ("python " if command.endswith(".py") else "python -m ") and len(line) < 140
        assert said.strip() in listing.source(command).read_text("utf-8") and len(said.split()) > 4


def test_dependencies():
    """Only what pyproject.toml lists and brings with it; diffusers and peft in bench's comparison alone."""
    listed = {"torch", "transformers", "safetensors", "numpy", "PIL", "tqdm", "huggingface_hub", "tokenizers"}
    for module, path in modules(ROOT).items():
        used = {name.split(".")[0] for name in imported_names(path, module)}
        used -= {*sys.stdlib_module_names, "hanokdiff", *SCRIPTS, *listed}
        assert used <= ({"diffusers", "peft"} if module == "hanokdiff.bench.baseline" else set()), module


def test_everything_is_packaged():
    """Each folder of modules stands in pyproject's packages, each other file in its package data."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    package = ROOT / "hanokdiff"
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in package.rglob("*.py")}
    assert folders == set(setup["packages"])
    patterns = [(ROOT.joinpath(*name.split(".")), p) for name, p in setup["package-data"].items()]
    shipped = {file for home, globs in patterns for glob in globs for file in home.glob(glob)}
    files = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert files <= shipped
