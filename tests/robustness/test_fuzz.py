"""Files made to attack, one by one, and some random ones; thousands by fuzz.py."""

import json
import os
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import fuzz
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import clipscore
from hanokdiff import caption
from hanokdiff.compare import results
from hanokdiff.errors import one_line
from hanokdiff.files import read_json
from hanokdiff.formats import embedding_file, hypernet_file, lora_file, single_file
from hanokdiff.formats.load import load_model
from hanokdiff.formats.tokenizer import load_tokenizer
from hanokdiff.images import read_photo
from hanokdiff.methods import textual_inversion
from hanokdiff.models.schedule import Schedule
from hanokdiff.models.text_encoder import TextConfig
from hanokdiff.models.unet import UNetConfig
from hanokdiff.models.vae import VAEConfig
from hanokdiff.scoring.clip import TINY_CLIP, open_model
from hanokdiff.training.dataset import photo_files, read_caption

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    fuzz.good_files(folder := tmp_path_factory.mktemp("fuzz"))
    return folder


@pytest.fixture(scope="module")
def sd(home):
    return load_model(str(home / "model"), "cpu", log=None)


def refused(work, *words) -> str:
    """A ValueError of one sentence with these words, in a moment."""
    start = time.process_time()
    with pytest.raises(ValueError) as e:
        work()
    said = one_line(e.value)
    assert all(str(w) in said for w in words) and "Traceback" not in said and len(said) < 1001, said
    assert time.process_time() - start < fuzz.SECONDS
    return said


def test_some_random_ones(home):
    table, wrong = fuzz.fuzz(home, first=1_000_000, count=int(os.environ.get("FUZZ", 240)))
    assert not wrong, wrong[:20]
    assert {line.split()[1] for line in table} == {"opened", "refused"}


def test_the_judge_notices(tmp_path, monkeypatch):
    """A fuzz that lets everything pass proves nothing."""
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)

    def judged(work):
        return fuzz.judged(work, tmp_path / "a.pt", tmp_path)

    def slow():
        start = time.process_time()
        while time.process_time() - start < 0.2:
            pass

    def raises(e):
        raise e

    assert judged(lambda: 1) == "opened" and judged(lambda: raises(ValueError("a.pt is odd"))) == "refused"
    assert judged(lambda: raises(ValueError("odd"))).startswith("does not name the file")
    assert "KeyError" in judged(lambda: raises(KeyError("a.pt"))) and "s of processor time" in judged(slow)


# ---------------------------------------------------------------------------------------------------- pickles

READ = {
    "model": lambda path, sd: single_file.read_file(path.rename(path.with_suffix(".ckpt"))),
    "LoRA": lambda path, sd: lora_file.apply_file(sd, path),
    "embedding": lambda path, sd: embedding_file.apply_file(sd, path),
    "hypernetwork": lambda path, sd: hypernet_file.apply_file(sd, path),
}
endless = []
endless.append(endless)
FALSE_TENSORS = {
    "strides of 0": torch.zeros(1).expand(10**6, 10**6),
    "no device": torch.empty(10**6, 10**6, device="meta"),
    "sparse": torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6), check_invariants=True),
    "in itself": endless,
}  # fmt: skip


@pytest.mark.parametrize("what", FALSE_TENSORS)
@pytest.mark.parametrize("kind", READ)
def test_tensors_that_are_not_in_the_file(tmp_path, sd, kind, what):
    for old in (False, True):
        held = {"a": FALSE_TENSORS[what], 48: ({"linear.0.weight": FALSE_TENSORS[what]}, {})}
        torch.save(held, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
        refused(lambda: READ[kind](tmp_path / "a.pt", sd), tmp_path)


@pytest.mark.parametrize("kind", READ)
def test_packed_pickles(tmp_path, sd, kind):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/data.pkl", b"\x80\x02" + b"N0" * 50_000_000 + b"N.")
        z.writestr("a/version", b"3\n")
    assert (tmp_path / "a.pt").stat().st_size < 500_000
    refused(lambda: READ[kind](tmp_path / "a.pt", sd), "is compressed, which torch never does")


def test_files_cut_short(home, tmp_path):
    """Of every kind and in every container: refused by name, wherever a download stopped."""
    readers = {read.__name__: (read, files) for read, files in fuzz.Readers(home).jobs}
    for kind in ("lora", "word", "hyper", "single"):
        read, files = readers[kind]
        for good in files:
            whole, cut = good.read_bytes(), tmp_path / good.name
            for keep in (0, 5, 100, len(whole) // 2, len(whole) - 1):
                cut.write_bytes(whole[:keep])
                refused(lambda read=read, cut=cut: read(cut), cut.name)
            cut.write_bytes(b"no such thing" * 100)
            refused(lambda read=read, cut=cut: read(cut), cut.name)


class Trap:
    def __reduce__(self):
        return os.system, ("touch sprung",)


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(tmp_path, sd, kind, zipped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Trap()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    refused(lambda: READ[kind](tmp_path / "a.pt", sd), "could be any code", "convert")
    assert not (tmp_path / "sprung").exists()
    torch.load(next(tmp_path.glob("a.*")), weights_only=False)  # the trap does work
    assert (tmp_path / "sprung").exists()


# ------------------------------------------------------------------------------------------------- the others


def test_headers_that_promise_terabytes(tmp_path, sd):
    entry = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    header = json.dumps({"a": entry}).encode()
    for raw in (struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", len(header)) + header + b"\0" * 8):
        (tmp_path / "a.safetensors").write_bytes(raw)
        for read in (lora_file.read_file, embedding_file.read_file, single_file.read_file):
            file = tmp_path / "a.safetensors"
            refused(lambda read=read, file=file: read(file), file, "cannot be read")


@pytest.mark.parametrize("raw", [b"[" * 100_000, b"9" * 5000, b"[]", b"null", b'"x"', b"\xff", b""])
def test_json_that_is_no_table(tmp_path, raw):
    (tmp_path / "a.json").write_bytes(raw)
    refused(lambda: read_json(tmp_path / "a.json"), tmp_path / "a.json")


def test_json_and_text_without_end(tmp_path):
    for name in ("a.json", "a.txt"):
        with open(tmp_path / name, "wb") as f:
            f.truncate(1 << 40)  # no byte of it is on the disk
    refused(lambda: read_json(tmp_path / "a.json"), "1,099,511,627,776 bytes")
    refused(lambda: read_caption(tmp_path / "a.txt"), "a.txt", "1,099,511,627,776 bytes")
    os.mkfifo(tmp_path / "pipe.png")
    files = lora_file.read_file, embedding_file.read_file, hypernet_file.read_file
    for read in (read_json, read_caption, read_photo, *files):
        refused(lambda read=read: read(tmp_path / "pipe.png"), "pipe.png")


NUMBERS = [
    (UNetConfig, dict(block_out_channels=(10**9,) * 4)), (UNetConfig, dict(layers_per_block=10**6)),
    (UNetConfig, dict(block_out_channels=(32,) * 10**5)), (UNetConfig, dict(heads=(0,) * 4)),
    (UNetConfig, dict(heads=(7,) * 4)), (UNetConfig, dict(norm_eps=float("nan"))),
    (UNetConfig, dict(norm_num_groups=0)), (UNetConfig, dict(in_channels="4")),
    (UNetConfig, dict(in_channels=4.0)), (VAEConfig, dict(scaling_factor=0)),
    (VAEConfig, dict(block_out_channels=(8,) * 60)),
    (VAEConfig, dict(scaling_factor=float("inf"))), (VAEConfig, dict(layers_per_block=True)),
    (TextConfig, dict(num_hidden_layers=10**6)), (TextConfig, dict(vocab_size=10**12)),
    (TextConfig, dict(num_attention_heads=5)), (TextConfig, dict(hidden_size=None)),
    (Schedule, dict(num_train_timesteps=10**12)), (Schedule, dict(num_train_timesteps=0)),
    (Schedule, dict(beta_start=-1.0)), (Schedule, dict(beta_end=10**400)), (Schedule, dict(beta_schedule=[])),
]  # fmt: skip


@pytest.mark.parametrize("config, wrong", NUMBERS)
def test_numbers_that_no_network_has(config, wrong):
    refused(lambda: config(**wrong), next(iter(wrong)).replace("num_attention_", ""))


def test_a_picture_that_is_a_program(tmp_path, monkeypatch):
    """Pillow would hand an EPS, whatever its name, to Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail(f"started {a}"))
    box = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) (w) file\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(box)
    assert Image.open(tmp_path / "a.png").format == "EPS"
    refused(lambda: read_photo(tmp_path / "a.png"), "'a.png' cannot be read")


def test_pictures_that_unpack_to_gigabytes(tmp_path):
    Image.new("1", (8, 8)).save(tmp_path / "a.png")
    raw = bytearray((tmp_path / "a.png").read_bytes())
    raw[16:24] = struct.pack(">II", 60_000, 60_000)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    (tmp_path / "a.png").write_bytes(raw)
    refused(lambda: read_photo(tmp_path / "a.png"), "'a.png'", "3600000000 pixels", "limit")


def test_text_in_a_picture(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a barn\nSteps: 20, Seed: " + "9" * 5000)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert clipscore.read_pictures([tmp_path / "a.png"])[0][str(tmp_path / "a.png")]["seed"] is None
    info.add_text("bomb", "x" * 60_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", pnginfo=info)
    refused(lambda: read_photo(tmp_path / "b.png"), "'b.png'")


@pytest.mark.parametrize("change", [
    lambda k, t: t.repeat(3) if k.endswith("alpha") else t,
    lambda k, t: t.int() if "down" in k else t,
    lambda k, t: torch.ones(*t.shape, 3, 3) if "up" in k else t,
    lambda k, t: t[:, :0] if "down" in k else t,
])  # fmt: skip
def test_shapes_of_a_lora(tmp_path, home, sd, change):
    good = load_file(home / "files" / "kohya.safetensors")
    save_file({k: change(k, t).contiguous() for k, t in good.items()}, tmp_path / "a.safetensors")
    refused(lambda: lora_file.apply_file(sd, tmp_path / "a.safetensors"), tmp_path / "a.safetensors")


def test_a_pattern_that_takes_for_ever(tmp_path, home, sd):
    good = load_file(home / "files" / "peft.safetensors")
    settings = {"unet.alpha_pattern": {r"((\w|\.)+)+x": 3}}
    save_file(good, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    refused(lambda: lora_file.read_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", "for ever")


def test_colours_and_tokenizer_of_a_judge(tmp_path):
    clip_copy(tmp_path)
    colours = tmp_path / "preprocessor_config.json"
    whole = colours.read_bytes()
    for wrong in ([0.5] * 150, ["", 1, 2], 3, [0, 0, 0], [float("nan")] * 3):
        colours.write_text(json.dumps({"image_std": wrong}))
        refused(lambda: open_model(tmp_path), tmp_path)
    colours.write_bytes(whole)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": "77"}))
    refused(lambda: open_model(tmp_path), tmp_path, "cannot be opened")


def test_weights_in_8_bits_are_read(tmp_path, home):
    save_file({"*": torch.ones(1, 8).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    assert embedding_file.read_file(tmp_path / "a.safetensors")[1].tolist() == [[1.0] * 8]


@pytest.mark.parametrize("word", ["a\x1b[2J", "a\nb", "\ud800", "x" * 3000])
def test_words_in_a_file(sd, word):
    refused(lambda: sd.text.add_word(word), "choose another pseudo word")


def test_an_embedding_for_no_word(tmp_path, sd):
    """Found by the fuzz: the message did not say which file."""
    path = tmp_path / "e.safetensors"
    save_file({"": torch.zeros(1, textual_inversion.token_embedding(sd).shape[1])}, path)
    with pytest.raises(ValueError, match=r"e.safetensors: \"\" has no token in this vocabulary"):
        embedding_file.apply_file(sd, path, log=None)


def test_a_folder_of_too_long_a_name():
    """Found by the fuzz: pathlib raises at what it cannot look up."""
    with pytest.raises(ValueError, match="--data x+: no such folder"):
        photo_files(Path("x" * 3000))


def test_messages_do_not_command_the_terminal():
    assert one_line(ValueError("a\n\x1b[2Jb\0 \x9bc")) == "a [2Jb c"
    assert len(one_line(ValueError("x" * 10**6))) < 1000


# --------------------------------------------------------------------------------------------- names as paths


@pytest.mark.parametrize("name, value", [
    ("folder", "cells/../../x"), ("folder", "/tmp"), ("folder", ".."), ("folder", None),
    ("scores", "../../x.json"), ("scores", 7), ("pictures", ".."),
])  # fmt: skip
def test_a_comparison_of_someone_else(tmp_path, home, name, value):
    manifest = json.loads((home / "files" / "manifest.json").read_text())
    results.read_manifest(home / "files")
    manifest["cells"][1][name] = value
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    refused(lambda: results.read_manifest(tmp_path), tmp_path / "manifest.json")


def test_scores_of_someone_else(tmp_path, home):
    manifest = json.loads((home / "files" / "manifest.json").read_text())
    (tmp_path / "cells" / "x").mkdir(parents=True)
    scores = tmp_path / "cells" / "x" / "scores-b.json"
    away = {"images": [{"file": "cells/x/pictures-a/../../../y.png"}]}
    wrong = (away, "is no picture of that cell"), ({}, "not what this version"), ({"images": 3}, "not")
    for content, words in wrong:
        scores.write_text(json.dumps(content))
        refused(lambda: results.write_report(tmp_path, manifest), tmp_path, words)


def test_a_tokenizer_that_names_other_files(tmp_path, home):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in (home / "model" / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    load_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "vocab_file": "/etc/passwd"}))
    refused(lambda: load_tokenizer(folder), folder / "tokenizer_config.json", "vocab_file")


def clip_copy(folder, **changes):
    for file in TINY_CLIP.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("changes", [
    dict(hidden_size=60_000), dict(num_hidden_layers=10**6), dict(num_hidden_layers=199),
    dict(vocab_size=10**12),
])  # fmt: skip
def test_a_judge_of_absurd_size(tmp_path, changes):
    clip_copy(tmp_path, **changes)
    refused(lambda: open_model(tmp_path), tmp_path, "config.json")


def test_shards_and_adapters_elsewhere(tmp_path):
    clip_copy(tmp_path)
    open_model(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"logit_scale": "../model.safetensors"}}))
    refused(lambda: open_model(tmp_path), index, "names no files beside it")
    index.unlink()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}')
    refused(lambda: open_model(tmp_path), "adapter_config.json")


def test_a_captioner_that_brings_code(tmp_path, monkeypatch):
    """transformers would ask whether to run it, and wait; nobody is asked."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = BlipConfig(
        text_config={**small, "vocab_size": 30, "encoder_hidden_size": 16, "projection_dim": 8},
        vision_config={**small, "image_size": 32, "projection_dim": 8},
    )
    BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Evil:\n    pass\n")
    evil = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(evil))
    refused(lambda: caption.open_blip(str(tmp_path)), tmp_path, "cannot be opened")
    assert not (tmp_path / "sprung").exists()
