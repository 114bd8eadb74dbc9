"""The documents: links lead somewhere, pointers name code that is there, commands work as written.

The `python` lines of a document's ```bash blocks run in their order, in an empty folder, in this process,
by the script's main([...]), with 2 steps of training and sampling and one picture a prompt. A command ends
with exit code 0, or with 2 where its line says "exit code 2" (in Korean "종료 코드 2").

What a command needs is made first: PLACEHOLDERS, pictures, and the runs/METHOD of a script that is named.
Two languages with the same commands run them once.
"""

import ast
import importlib
import json
import re
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from hanokdiff.compare import __main__ as compare
from hanokdiff.compare import plan
from hanokdiff.formats.load import TINY_MODEL
from hanokdiff.tiny import world

ROOT = Path(__file__).resolve().parent.parent
READ = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])  # their links are followed
RUN = [doc for doc in READ if doc.parent in (ROOT, ROOT / "docs")]  # their commands are run
GUIDES = [ROOT / "docs" / f"guide{language}.md" for language in ("", ".ko")]
SKIPPED = ("pip ", "git ", "cd ", ". ", "ruff ", "torchrun ", "python -m venv ", "python -m pip ")
SKIPPED += ("python -m pytest ", "python -m hanokdiff.tiny.build ")  # this trains the tiny world, for an hour
SHORT = {
    "--steps": "2", "--batch-size": "2", "--images": "7", "--class-images": "2", "--n": "1",
    "--preview-every": "0", "--save-every": "0",
}  # fmt: skip
# PHOTOS is a folder of that name
PLACEHOLDERS = {"MODEL": str(TINY_MODEL), "openai/clip-vit-base-patch32": "tiny"}
FILES = {  # what FILE is after this option
    "--lora": "runs/lora/lora.safetensors",
    "--hypernet": "runs/hypernet/hypernet.pt",
    "--embedding": "runs/ti/embedding.safetensors",
    "--init-image": "FILE.png",
    "--class-prompts": str(world.CLASS_PROMPTS),
}


def name(doc: Path) -> str:
    return str(doc.relative_to(ROOT))


def prose(doc: Path) -> str:
    """The text without what Markdown takes literally."""
    return re.sub(r"^ *```.*?^ *```", "", doc.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(doc: Path) -> set[str]:
    """GitHub's names of the headings: in lower case, only letters, digits, - and _, a - for each space."""
    titles = re.findall(r"^#+ +(.*)$", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", prose(doc)), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", t.strip().lower()).replace(" ", "-") for t in titles]
    return {f"{a}-{plain[:i].count(a)}".removesuffix("-0") for i, a in enumerate(plain)}


@pytest.mark.parametrize("doc", READ, ids=name)
def test_links(doc):
    text = re.sub(r"`[^`\n]*`", "", prose(doc))
    found = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r'\b(?:src|href|srcset)="([^"\s]+)', text)
    for link in found:
        if re.match(r"[a-z]+:", link):  # https:, mailto:
            continue
        path, _, anchor = link.partition("#")
        target = (doc.parent / path).resolve() if path else doc
        assert target.is_relative_to(ROOT), f"{name(doc)}: {link} leads out of the repository"
        assert target.exists(), f"{name(doc)}: {link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name(doc)}: {link}: no such heading"


def defined(path: Path) -> set[str]:
    """Functions, classes and their methods, and what is assigned at the top, as in "LoRA.forward"."""
    out = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        out |= {t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            out.add(node.name)
            out |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return out


@pytest.mark.parametrize("doc", READ, ids=name)
def test_pointers(doc):
    """[lora.py](../hanokdiff/methods/lora.py): `insert`, `LoRA.forward`"""
    for path, names in re.findall(r"\]\(([^)\s]+\.py)\): ((?:`[^`]+`(?:, )?)+)", prose(doc)):
        known = defined(doc.parent / path)
        for pointer in re.findall(r"`([^`]+)`", names):
            assert pointer in known, f"{name(doc)}: {path} has no {pointer}"


def counts(doc: Path) -> list[int]:
    """Of headings, pictures, equations, links to code, rows of tables and bullets."""
    parts = (r"^#+ ", r"!\[", r"^\$\$$", r"\.py\)", r"^\|", r"^[*-] ")
    return [len(re.findall(part, prose(doc), re.MULTILINE)) for part in parts]


@pytest.mark.parametrize("korean", [d for d in READ if d.name.endswith(".ko.md")], ids=name)
def test_languages_have_the_same_parts(korean):
    """The same number of each part, and the same scripts in the same order."""
    english = korean.with_name(korean.name.replace(".ko.md", ".md"))
    assert counts(english) == counts(korean), counts.__doc__
    scripts = [[plain(c)[:2] for c in commands(d)] for d in (english, korean)]
    assert scripts[0] == scripts[1], f"{name(english)} and {name(korean)} show other commands"


@pytest.mark.parametrize("doc", sorted(ROOT.glob("docs/reading*.md")), ids=name)
def test_quoted_line_stands_in_the_loop(doc):
    """The answer to the question where noise is added."""
    (line,) = re.findall(r"`(x_t = [^`]+)`", doc.read_text("utf-8"))
    for method in plan.METHODS:
        assert line in (ROOT / f"train_{method}.py").read_text("utf-8")


def test_recipe_for_aihub(tmp_path, monkeypatch, capsys):
    """The guide's lines, the same in both languages, on zips as AI Hub's are described."""
    found = [re.findall(r"```python\n(.*?)```", d.read_text("utf-8"), re.DOTALL) for d in GUIDES]
    recipes = ["\n".join(line.partition(" #")[0].rstrip() for line in r.splitlines()) for (r,) in found]
    assert recipes[0] == recipes[1]
    monkeypatch.chdir(tmp_path)
    label = {"images": [{"장소": "북촌 한옥마을"}, {"시간": "야간", "날씨": ["눈"]}]}
    labels = {"a.json": label, "b.jpg.json": {"유형": "한옥"}, "c.json": {"유형": "아파트"},
              "d.json": {"유형": "한옥", "위치": "실내"}, "e.json": label}  # fmt: skip
    pictures = dict.fromkeys(("a.jpg", "b.jpg", "c.jpg", "d.jpg"))
    for name, files in (("VL_1.zip", labels), ("VS_1.zip", pictures)):
        folder = tmp_path / "DOWNLOAD" / "2.Validation"
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / name, "w") as z:
            for file, content in files.items():
                z.writestr(f"한옥/{file}", file if content is None else json.dumps(content))
    exec(recipes[0], {})
    assert "3 labels fit, 2 photos of them found, 2 captions in PHOTOS" in capsys.readouterr().out
    kept = {f.name: f.read_text() for f in Path("PHOTOS").iterdir()}
    assert kept == {"a.jpg": "a.jpg", "b.jpg": "b.jpg", "b.txt": "a building with a roof\n",
                    "a.txt": "a building with a roof at night in the snow\n"}  # fmt: skip


def commands(doc: Path) -> tuple[tuple[str, ...], ...]:
    """The commands of all ```bash blocks, in words; the last word is the exit code that its line expects."""
    out = []
    block_of = re.compile(r"^ *```(?:bash|sh)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
    for block in block_of.findall(doc.read_text("utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            code = "2" if re.search(r"#.*(exit code|종료 코드) 2", line) else "0"
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if words and words[-1] == ">":  # into a file
                    words.pop()
                elif word in ("&&", "||", ";", "|", "&"):
                    out += [(*words, code)] if words else []
                    words = []
                else:
                    words.append(word)
    return tuple(out)


def plain(command: tuple[str, ...]) -> list[str]:
    """Without variables set before it; `python3` is `python`."""
    words = list(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return [re.sub(r"^python3$", "python", words[0]), *words[1:]]


BY_COMMANDS: dict[tuple, list[Path]] = {}
for _doc in RUN:
    BY_COMMANDS.setdefault(commands(_doc), []).append(_doc)


@pytest.fixture(scope="session")
def first_runs(tmp_path_factory):
    """A function that makes runs/METHOD in the present folder, as train_METHOD.py does without arguments."""
    home, made = tmp_path_factory.mktemp("first"), set()

    def run(method: str) -> None:
        if method not in made:
            assert importlib.import_module(f"train_{method}").main(["--out", str(home / method)]) == 0
            made.add(method)
        shutil.copytree(home / method, Path("runs") / method)

    return run


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader's folder with a dozen captioned photos, and a short way through every training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", sys.modules["warnings"].showwarning)  # put back afterwards
    Path("PHOTOS").mkdir()
    for i, (image, caption) in enumerate(world.photos(12), 1):
        image.save(f"PHOTOS/{i:02}.jpg")
        Path(f"PHOTOS/{i:02}.txt").write_text(caption)
    for method in plan.METHODS:
        for column in importlib.import_module(f"train_{method}").DEFAULTS.values():
            for option, value in SHORT.items():
                if column.get(key := option[2:].replace("-", "_")):
                    monkeypatch.setitem(column, key, int(value))


def prepare(words: list[str], text: str, first_runs) -> list[str]:
    """The arguments with PLACEHOLDERS and FILES put in, after making the files that they name."""
    argv = []
    for before, word in zip(["", *words], words):
        word = SHORT.get(before, PLACEHOLDERS.get(word, word))
        if re.match(r"FILE\b", word):
            assert before in FILES, f"this test does not know which FILE is meant after {before}"
            word = word.replace("FILE", FILES[before], 1)
        elif re.fullmatch(r"[A-Z][A-Z_]+", word) and word != "PHOTOS":
            raise AssertionError(f"this test does not know the placeholder {word}: see PLACEHOLDERS")
        if (run := re.match(r"runs/(\w+)/", word)) and run[1] in plan.METHODS and not Path(run[0]).exists():
            assert f"train_{run[1]}.py" in text, f"{run[0]} is used, but train_{run[1]}.py is nowhere named"
            first_runs(run[1])
        if before == "--init-image" and not Path(word).exists():
            world.photos(1)[0][0].save(word)
        argv.append(word)
    return argv


def run(words: list[str], text: str, first_runs) -> int:
    """One command, through its main; returns the exit code."""
    script, *rest = words[2:] if words[1] == "-m" else words[1:]
    argv = prepare(rest, text, first_runs)
    if script == "hanokdiff.compare":  # tests/test_compare.py runs it
        compare.check(compare.options().parse_args(argv))
        return 0
    if script == "sample.py":
        argv += ["--n", "1", "--steps", "10" if "--init-image" in argv else "2"]
    elif script == "hanokdiff.caption" and {"--overwrite", "--blip"} & set(argv):
        argv += ["--dry-run"]  # opens no BLIP, which would have to be downloaded
    elif "--resume" in argv:  # as if it had been stopped
        method = script.removeprefix("train_").removesuffix(".py")
        artefact = Path(argv[argv.index("--resume") + 1]) / plan.METHODS[method]
        shutil.rmtree(artefact) if artefact.is_dir() else artefact.unlink()
    try:
        return importlib.import_module(script.removesuffix(".py")).main(argv) or 0
    except SystemExit as e:  # argparse
        return e.code or 0


@pytest.mark.parametrize("docs", BY_COMMANDS.values(), ids=lambda docs: "+".join(map(name, docs)))
def test_commands(docs, reader, first_runs, capsys):
    text = docs[0].read_text("utf-8")
    for *command, code in commands(docs[0]):
        words = plain(command)
        line = " ".join(words)
        if line.startswith("diff "):
            assert all((ROOT / file).is_file() for file in words[1:] if file[0] != "-"), line
        elif line.startswith("python ") and not f"{line} ".startswith(SKIPPED):
            done = run(words, text, first_runs)
            assert done == int(code), f"{name(docs[0])}: {line}\n{capsys.readouterr().err}"
        else:
            assert f"{line} ".startswith(SKIPPED), f"{name(docs[0])}: {line}: neither run nor in SKIPPED"
