"""Damaged and hostile files, by the thousand, into every reader.

    python tests/robustness/fuzz.py --files 20000

A case is a number: it chooses a reader, a good file, and what happens to it, so that `--first N --files 1`
repeats case N alone.  Whatever the file holds, the reader opens it or raises a ValueError or OSError that
names it; it takes at most SECONDS of a processor and MEMORY more than it had, and it never hangs or dies.
The cases run in a child process with RLIMIT_AS, which a hang or a crash costs nothing but that child.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import select
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from PIL import Image, PngImagePlugin

import clipscore
import train_lora
from hanokdiff import convert
from hanokdiff.compare import results, run
from hanokdiff.errors import one_line
from hanokdiff.files import write_json
from hanokdiff.formats import embedding_file, hypernet_file, lora_file, single_file
from hanokdiff.formats.folder import save_folder
from hanokdiff.formats.load import TINY_MODEL, load_model
from hanokdiff.formats.tensors import read_tensors, write_tensors
from hanokdiff.formats.tokenizer import load_tokenizer
from hanokdiff.images import ORIENTATION, read_photo
from hanokdiff.methods import hypernetwork, lora, textual_inversion
from hanokdiff.methods.inject import base_layer
from hanokdiff.models.schedule import Schedule
from hanokdiff.models.text_encoder import TextConfig, TextEncoder
from hanokdiff.models.unet import UNet, UNetConfig
from hanokdiff.models.vae import VAE, VAEConfig
from hanokdiff.scoring.clip import TINY_CLIP, Clip, scores
from hanokdiff.training import prior
from hanokdiff.training.args import check_training
from hanokdiff.training.dataset import read_caption

# processor time; resident bytes and address space more than before
SECONDS, MEMORY, ADDRESSES = (5, 1 << 30, 4 << 30)

# --------------------------------------------------------------------------------------------- the good files


def small_model():
    words = load_tokenizer(TINY_MODEL / "tokenizer")
    levels = dict(block_out_channels=(32, 64), attention=(True, False), heads=(8, 8))
    unet = UNetConfig(8, **levels, layers_per_block=1, cross_attention_dim=64)
    configs = unet, VAEConfig((32, 64), 1, sample_size=16), TextConfig(len(words), 64, 96, 2, 1)
    torch.manual_seed(2)  # a case is the same in every process; with 0 and 1 the weights draw no picture
    return [kind(c).eval() for kind, c in zip((UNet, VAE, TextEncoder), configs, strict=True)], words


def pictures(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 4), dtype=np.uint8)
    image, exif, info = Image.fromarray(noise[..., :3]), Image.Exif(), PngImagePlugin.PngInfo()
    exif[ORIENTATION] = 6
    info.add_text("parameters", "a barn\nSteps: 20, Sampler: ddim, Seed: 3, Size: 8x8", zip=True)
    Image.fromarray(noise).save(folder / "a.png", pnginfo=info)
    image.save(folder / "plain.png", pnginfo=info)
    image.convert("P").save(folder / "palette.gif", transparency=3)
    Image.fromarray(noise[..., :2].copy().view("<u2")[..., 0]).save(folder / "deep.tif")
    for name in ("a.jpg", "a.webp", "a.tiff"):
        image.save(folder / name, exif=exif)
    image.save(folder / "a.bmp")


def small_files(folder: Path, sd) -> None:
    """LoRAs, embeddings, hypernetworks in every container, captions, and a run's files."""
    names = list(lora.layers(sd))[:3]
    weights = [base_layer(net.get_submodule(path)).weight for net, path in map(lora.layers(sd).get, names)]
    loras = {}
    for n, w in zip(names, weights, strict=True):
        up = torch.randn(len(w), 2, *[1] * (w.dim() - 2))
        loras[n] = {"down": torch.randn(2, *w.shape[1:]), "up": up, "alpha": torch.tensor(2.0)}
    lora_file.save_file(folder / "kohya.safetensors", loras, {"ss_network_dim": "2", "hanokdiff_token": "*"})
    settings = {"lora_adapter_metadata": '{"unet.lora_alpha": 4}'}
    lora_file.save_diffusers_file(folder / "peft.safetensors", loras, settings)
    torch.save(read_tensors(folder / "kohya.safetensors"), folder / "lora.bin")
    vectors = torch.randn(2, sd.text.encoder.config.hidden_size)
    embedding_file.save_file(folder / "word.safetensors", "*", vectors, {"step": "3"})
    embedding_file.save_file(folder / "word.pt", "*", vectors)
    torch.save(torch.load(folder / "word.pt"), folder / "zipped.pt")
    spec, width = hypernetwork.HypernetConfig((1, 2, 1), "relu", True), sd.unet.config.cross_attention_dim
    pair = tuple(hypernetwork.ResidualMLP(width, spec).state_dict() for _ in range(2))
    about = {"step": 3, "info": hypernet_file.TOKEN + "*"}
    hypernet_file.save_file(folder / "hyper.pt", spec, {width: pair}, about)
    torch.save(torch.load(folder / "hyper.pt"), folder / "hyperzip.pt")
    (folder / "caption.txt").write_text("a building with a roof on fire")
    (folder / "cp949.txt").write_bytes("눈 오는 한옥".encode("cp949"))
    (folder / "prompts.txt").write_text("a house\na house in the snow\n")
    args = train_lora.options().parse(["--steps", "5"])
    (folder / "config.json").write_text(json.dumps({**vars(args), "photos": "0123"}))
    cell = {"pictures": "pictures-a", "scores": "scores-b.json"}
    cells = [{"name": n, "folder": f"cells/{n}", **cell} for n in "xy"]
    (folder / "manifest.json").write_text(json.dumps({"settings": {}, "cells": cells}))
    write_json(folder / "log.jsonl", {"step": 1, "seconds": 0.5})


def good_files(home: Path) -> None:
    (networks, words), schedule = small_model(), Schedule()
    save_folder(home / "model", *networks, words, schedule)
    write_json(home / "model" / "hanokdiff.json", {"token": "*"})
    shutil.copytree(TINY_CLIP, home / "clip")
    for name in ("pictures", "files", "single"):
        (home / name).mkdir()
    pictures(home / "pictures")
    sd = load_model(str(home / "model"), "cpu", log=None)
    small_files(home / "files", sd)
    single_file.save_file(home / "single" / "a.safetensors", *networks, schedule)
    tensors = read_tensors(home / "single" / "a.safetensors")
    write_tensors(tensors, home / "single" / "bare.safetensors")
    torch.save({"state_dict": dict(tensors), "global_step": 5}, home / "single" / "a.ckpt")
    torch.save(dict(tensors), home / "single" / "old.ckpt", _use_new_zipfile_serialization=False)


# ------------------------------------------------------------------------------------------------ the readers


class Readers:
    """Each takes the path of a file and opens it the way a command does."""

    def __init__(self, home: Path):
        self.home, self.sd = home, load_model(str(home / "model"), "cpu", log=None)
        self.out = home / "out"
        files = home / "files"
        kinds = {
            self.photo: sorted((home / "pictures").iterdir()),
            self.text: [files / n for n in ("caption.txt", "cp949.txt", "prompts.txt")],
            self.lora: [files / n for n in ("kohya.safetensors", "peft.safetensors", "lora.bin")],
            self.word: [files / n for n in ("word.safetensors", "word.pt", "zipped.pt")],
            self.hyper: [files / n for n in ("hyper.pt", "hyperzip.pt")],
            self.single: sorted((home / "single").iterdir()),
            self.folder: sorted(f for f in (home / "model").rglob("*") if f.is_file()),
            self.clip: sorted((home / "clip").iterdir()),
            self.config: [files / "config.json"],
            self.manifest: [files / "manifest.json"],
            self.log: [files / "log.jsonl"],
            self.convert: [f for f in sorted(files.iterdir()) if f.suffix in (".safetensors", ".pt", ".bin")],
        }
        self.jobs = list(kinds.items())

    def photo(self, file):
        read_photo(file)
        with contextlib.redirect_stderr(io.StringIO()):
            clipscore.read_pictures([file])

    def text(self, file):
        read_caption(file)
        prior.prompts(["* on fire"], "*", "a house", file)

    def lora(self, file):
        loras, metadata = lora_file.apply_file(self.sd, file, log=None)
        lora.remove(self.sd, loras)
        self.known(metadata.get("hanokdiff_token"))

    def known(self, word):
        """What sample.py does with a word that came in a file; a refusal names the word."""
        with contextlib.suppress(ValueError):
            if word:
                self.sd.text.add_word(word)
        self.sd.text.words.clear()

    def word(self, file):
        textual_inversion.remove(self.sd, *embedding_file.apply_file(self.sd, file, log=None))

    def hyper(self, file):
        net, metadata = hypernet_file.apply_file(self.sd, file, log=None)
        hypernetwork.remove(self.sd, net)
        self.known(hypernet_file.pseudo_word(metadata))

    def single(self, file):
        single_file.read_file(file)

    def folder(self, file):
        with self.beside(file, self.home / "model") as folder:
            sd = load_model(str(folder), "cpu", log=None)
            sd.draw(["a barn, (fire:1.3)"], [0], steps=2, size=(16, 16))

    def clip(self, file):
        with self.beside(file, self.home / "clip") as folder:
            clip = Clip(folder)
            scores(clip, clip.images([Image.new("RGB", (64, 64))]), ["a barn"])

    @contextlib.contextmanager
    def beside(self, file: Path, whole: Path):
        """The folder of a whole model, this file in the place of the one of its name."""
        folder = file.parents[len(file.relative_to(self.out).parts) - 2]
        for other in whole.rglob("*"):
            if other.is_file() and not (mine := folder / other.relative_to(whole)).exists():
                mine.parent.mkdir(parents=True, exist_ok=True)
                mine.symlink_to(other)
        yield folder

    def config(self, file):
        args = train_lora.options().parse(["--resume", str(file.parent)])
        args.alpha = args.rank if args.alpha is None else args.alpha  # as train_lora.py has it
        check_training(args)

    def manifest(self, file):
        results.read_manifest(file.parent)

    def log(self, file):
        run.read_lines(file)

    def convert(self, file):
        pickled = file.name.startswith(("word", "hyper", "zipped"))
        out = self.out / ("out.pt" if pickled else "out.safetensors")
        with contextlib.redirect_stdout(io.StringIO()):
            convert.main.__wrapped__([str(file), str(out), "--overwrite"])


# ------------------------------------------------------------------------------------------------- the damage

ODD = [
    None, True, False, -1, 0, 1, 2, 3, 1e308, -1e-308, 10**9, 2**31, 2**63, 10**30, float("nan"),
    float("inf"), "", "x", "F16", "F8_E4M3", "BOOL", "U8", "C64", "../../x", "/etc/passwd", "\x1b[2J\n",
    "\ud800", "가" * 3000, [], {}, [[]], [0, 0], [1, 10**12], [10**9] * 9, [0.5] * 3, {"a": {}}, "{" * 3000,
]  # fmt: skip


def bend(value, r: random.Random):
    """One place in JSON-like data becomes another type, is doubled, renamed or lost."""
    if isinstance(value, dict | list) and value and r.random() < 0.9:
        key = r.choice(list(value) if isinstance(value, dict) else range(len(value)))
        what = r.random()
        if what < 0.75:
            value[key] = bend(value[key], r)
        elif what < 0.85:
            del value[key]
        elif isinstance(value, dict):
            value[r.choice([key + "x", "", "\n", "../x", key * 300])] = value.pop(key)
        else:
            value *= r.choice([2, 50])
        return value
    if isinstance(value, int | float) and r.random() < 0.4:
        return r.choice([value * 2, -value, value + 1, value * 1000, value / 3, str(value), value * 10**6])
    return copy.deepcopy(r.choice(ODD))  # the next case may bend it


def bend_json(raw: bytes, r: random.Random) -> bytes:
    if r.random() < 0.1:
        deep = [b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000]
        return r.choice([*deep, b"null", b"[]", b"", b"{}", b'{"a": 1e999}'])
    text = json.dumps(bend(json.loads(raw), r), ensure_ascii=r.random() < 0.5)
    return text.encode(r.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"]), "surrogatepass")


def bend_header(raw: bytes, r: random.Random) -> bytes:
    """safetensors: the length of the header, or what it says."""
    size = struct.unpack("<Q", raw[:8])[0]
    if r.random() < 0.2:
        other = r.choice([0, 1, size - 1, size + 1, 2**63, 2**40, 99_999_999, len(raw)])
        return struct.pack("<Q", other) + raw[8:]
    head = json.loads(raw[8 : 8 + size])
    if r.random() < 0.5:
        for _ in range(r.choice([1, 1, 3])):
            head = bend(head, r)
    else:  # consistent: some tensor's numbers are read as another dtype or shape
        key = r.choice([k for k in head if k != "__metadata__"])
        width = {"F64": 8, "F32": 4, "F16": 2}.get(head[key]["dtype"], 4)
        head[key]["dtype"] = r.choice({8: ["I64", "C64"], 4: ["I32", "U32"], 2: ["I16", "BF16"]}[width])
        shape = head[key]["shape"]
        head[key]["shape"] = r.choice([shape, shape[::-1], [1, *shape]])
    head = json.dumps(head).encode()
    return struct.pack("<Q", len(head)) + head + raw[8 + size :]


def bend_zip(raw: bytes, r: random.Random) -> bytes:
    """torch's container: an entry damaged, packed, renamed, doubled or lost."""
    out, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(raw))
    names = source.namelist()
    chosen, what = r.choice([*names, *[n for n in names if n.endswith("data.pkl")] * 5]), r.random()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        warnings.simplefilter("ignore")
        for name in names:
            content, packed, new = source.read(name), zipfile.ZIP_STORED, name
            if name == chosen:
                content = bend_bytes(content, r) if what < 0.6 else content
                packed = zipfile.ZIP_DEFLATED if 0.6 < what < 0.7 else packed
                new = r.choice(["../x", "/x", "x", names[0]]) if 0.7 < what < 0.8 else name
                if 0.8 < what < 0.9:
                    target.writestr(new, content[: len(content) // 2])
                if what > 0.9:
                    continue
            target.writestr(zipfile.ZipInfo(new), content, packed)
    return out.getvalue()


def bend_text(raw: bytes, r: random.Random) -> bytes:
    if r.random() >= 0.7:
        return bend_bytes(raw, r)
    text = raw.decode("utf-8", "replace")
    return r.choice([
        text.encode("utf-16"), text.encode("utf-32"), b"\xef\xbb\xbf" + raw, b"\0" + raw, raw + b"\0",
        raw * 100_000, text.encode("cp949", "replace"), b"\xff" * 50, b"", b"\r" * 100, b"\x1b[2J" + raw,
        "🔥 한옥 *\r\n".encode(), b"\xed\xa0\x80" + raw, "a " * 100_000 + "\n", b"(" * 9000,
        "*\u202e\u200d\ue000 a\u0301".encode(),
    ])  # fmt: skip


def bend_bytes(raw: bytes, r: random.Random) -> bytes:
    """What a bad disk, a stopped download or a patient attacker does."""
    b = bytearray(raw)
    for _ in range(r.choice([1, 1, 1, 2, 5, 20])):
        # often at the beginning, where the headers are
        at = r.randrange(min(len(b), r.choice([16, 64, 500, len(b) or 1]))) if b else 0
        what = r.randrange(8)
        if what == 0 and b:
            b[at] ^= 1 << r.randrange(8)
        elif what == 1 and b:
            b[at] = r.randrange(256)
        elif what == 2 and r.random() < 0.5:
            del b[r.randrange(len(b) + 1) :]
        elif what == 3:
            del b[at : at + r.choice([1, 4, 100])]
        elif what == 4:
            b[at:at] = b[at : at + r.choice([1, 8, 200])]
        elif what == 5:
            number = r.choice([2**32 - 1, 2**31 - 1, 0, 65_535, 70_000])
            b[at : at + 4] = struct.pack(r.choice("<>") + "I", number)
        elif what == 6:
            b[at : at + 8] = struct.pack(r.choice("<>") + "Q", r.choice([2**64 - 1, 2**63, 2**40, 10**6]))
        else:
            b[at:at] = r.randbytes(r.choice([1, 20]))
    return bytes(b)


def damage(raw: bytes, name: str, r: random.Random) -> bytes:
    special = {".json": bend_json, ".safetensors": bend_header, ".txt": bend_text, ".jsonl": bend_text}
    bender = bend_zip if raw[:2] == b"PK" else special.get(Path(name).suffix, bend_bytes)
    bender = bender if r.random() < 0.7 else bend_bytes
    out = bender(raw, r)
    return out.encode() if isinstance(out, str) else out


# -------------------------------------------------------------------------------------------------- the cases


def case(readers: Readers, number: int) -> tuple[str, str]:
    """(what was opened, what came of it): "opened", "refused", or what is wrong."""
    r = random.Random(f"case {number}")
    reader, files = readers.jobs[number % len(readers.jobs)]
    file = r.choice(files)
    shutil.rmtree(readers.out, ignore_errors=True)
    whole = next((d for d in ("model", "clip") if (readers.home / d) in file.parents), None)
    place = readers.out / "case" / (file.relative_to(readers.home / whole) if whole else file.name)
    place.parent.mkdir(parents=True)
    place.write_bytes(damage(file.read_bytes(), file.name, r))
    return f"{reader.__name__} {file.name}", judged(lambda: reader(place), place, readers.out)


def judged(work, file: Path, out: Path) -> str:
    start = time.process_time()
    try:
        work()
        said = "opened"
    except (ValueError, OSError) as e:
        # an option
        named = any(str(n) in str(e) for n in (file, file.name, out / "case")) or str(e).startswith("--")
        line, wrong = one_line(e), f"does not name the file: {type(e).__name__}: "
        said = "refused" if named and "\n" not in line else wrong + line[:300]
    except Exception as e:
        place = e.__traceback__
        while place.tb_next:
            place = place.tb_next
        file = Path(place.tb_frame.f_code.co_filename).name
        said = f"{type(e).__name__} from {file}:{place.tb_lineno}: {str(e)[:200]!r}"
    used = time.process_time() - start
    return said if used < SECONDS else f"{used:.1f} s of processor time ({said})"


def status(name: str) -> int:
    """Bytes that this process has: "VmSize" of addresses, "VmHWM" resident at most."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def child(readers: Readers, numbers: range, pipe: int) -> None:
    import resource  # not on Windows

    before = status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    for number in numbers:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        what, said = case(readers, number)
        if (more := status("VmHWM") - before) > MEMORY:
            said = f"{more >> 20} MiB ({said})"
        os.write(pipe, json.dumps([number, what, said]).encode() + b"\n")


def answers(pipe: int, pid: int) -> bool:
    """Whether the child has said something more or has ended; False if it hangs: after a minute it waits for
    something, or computes without an end. On a busy machine it may have to wait for a processor."""
    start = processor_seconds(pid)[0]
    while not select.select([pipe], [], [], 12 * SECONDS)[0]:
        used, state = processor_seconds(pid)
        if state not in "RD" or used - start > 12 * SECONDS:
            return False
    return True


def processor_seconds(pid: int) -> tuple[float, str]:
    """What a process has computed for, and its state: R runs or is ready to, D reads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0]


def batch(readers: Readers, numbers: range) -> list:
    """The results of these cases as far as a child came; the last one may be that it hung or died."""
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            child(readers, numbers, send)
        finally:
            os._exit(0)
    os.close(send)
    got = b""
    while answers(receive, pid) and (part := os.read(receive, 1 << 16)):
        got += part
    rows = [json.loads(line) for line in got.decode().splitlines()]
    os.close(receive)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)
    code = os.waitpid(pid, 0)[1]
    if len(rows) < len(numbers):
        rows.append([numbers[len(rows)], "?", f"hung, or died with status {code}"])
    return rows


def fuzz(home: Path, first: int, count: int, log=None) -> tuple[Counter, list]:
    """Cases made of the good files in `home`: ({"reader: outcome": cases}, what went wrong)."""
    torch.set_num_threads(1)
    table, wrong, done, numbers = Counter(), [], 0, range(first, first + count)
    readers = Readers(home)
    while done < count:
        rows = batch(readers, numbers[done : done + 2000])
        done += len(rows)
        for number, what, said in rows:
            table[f"{what.split()[0]:9}{said if said in ('opened', 'refused') else 'WRONG'}"] += 1
            if said not in ("opened", "refused"):
                wrong.append((number, what, said))
                if log:
                    log(f"case {number}, {what}: {said}")
    return table, wrong


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--files", type=int, default=1000, help="damaged files in all (default: 1000)")
    p.add_argument("--first", type=int, default=0, help="the number of the first case (default: 0)")
    args = p.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        good_files(Path(folder))
        table, wrong = fuzz(Path(folder), args.first, args.files, log=lambda line: print(line, flush=True))
    print(*(f"{count:7}  {what}" for what, count in sorted(table.items())), sep="\n")
    print(f"{args.files} files in {time.perf_counter() - start:.0f} s, {len(wrong)} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
