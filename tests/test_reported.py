"""Faults that users reported of other tools, as repository#number, tried here: wrong without a word."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import test_single_file
import torch
from PIL import Image, ImageCms, PngImagePlugin
from safetensors.torch import load_file, save_file
from test_scripts import refused

import clipscore
import sample
import train_lora
from hanokdiff import lock
from hanokdiff.formats import embedding_file, folder, lora_file, lora_names, single_file
from hanokdiff.formats.load import TINY_MODEL, load_model
from hanokdiff.formats.lora_names import UNET
from hanokdiff.formats.tensors import read_safetensors
from hanokdiff.images import read_photo
from hanokdiff.methods import lora, textual_inversion
from hanokdiff.methods.losses import min_snr_weight
from hanokdiff.models import memory, samplers
from hanokdiff.models.prompt_schedule import not_understood, plain_text
from hanokdiff.models.schedule import Schedule
from hanokdiff.models.text_encoder import TextEncoder
from hanokdiff.models.unet import UNet
from hanokdiff.training import prior
from hanokdiff.training.dataset import Captions, load_photos, prepare_captions
from hanokdiff.training.noise import Batch

COMMON = "--steps 2 --batch-size 2 --images 2 --preview-every 0 --class-images 0 --device cpu --out".split()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)
    yield tmp_path
    lock.release()


def changed_model(folder: str, file: str, change) -> Path:
    """The tiny model with one of its files' tensors changed."""
    shutil.copytree(TINY_MODEL, folder)
    path = Path(folder) / file
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return Path(folder)


small = test_single_file.small  # a fixture


# --------------------------------------------------------------------------------------- black pictures
# webui#7633, webui#15872, diffusers#2153, diffusers#6815


def test_a_decoder_that_overflows_fp16():
    """Decoded again in fp32: the picture that fp32 draws; the autoencoder is fp16 afterwards."""
    sd, exact = (load_model("tiny", "cpu", dtype, log=None) for dtype in ("fp16", "fp32"))
    for model in (sd, exact):
        with torch.no_grad():
            weight = model.vae.decoder.conv_in.weight
            weight.copy_(weight.float() * (6e4 / weight.float().abs().max()))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert not torch.isfinite(sd.vae.decode(latents.half())).all()
    apart = [x - y for x, y in zip(*(m.pictures(latents)[0].tobytes() for m in (sd, exact)), strict=True)]
    assert max(map(abs, apart)) <= 4 and sd.vae.decoder.conv_in.weight.dtype == torch.float16


def test_what_is_not_a_number_is_no_picture(monkeypatch, capsys):
    """Neither drawn, nor kept as a class picture."""
    sd = load_model("tiny", "cpu", log=None)
    with pytest.raises(ValueError, match="not a number.*--dtype fp32"):
        sd.pictures(torch.full((1, 4, 16, 16), torch.nan))
    monkeypatch.setattr(sd.vae, "decode", lambda x: torch.full((1, 3, 64, 64), torch.inf))
    with pytest.raises(ValueError, match="autoencoder of tiny makes no picture"):
        prior.pictures(sd, ["a house"], 1, 64, 0, Path("class"))
    assert not list(Path("class").rglob("*.png"))


def test_a_base_that_is_not_finite():
    def spoil(tensors):
        tensors["conv_out.bias"][0] = torch.nan

    bad = changed_model("bad", "unet/diffusion_pytorch_model.safetensors", spoil)
    with pytest.raises(ValueError, match=r"bad: unet.conv_out.bias has a value that is not finite"):
        load_model(str(bad), "cpu", log=None)


def test_pictures_of_one_colour_are_named(capsys):
    Path("p").mkdir()
    for i, colour in enumerate(("black", "black", "white")):
        Image.new("RGB", (64, 64), colour).save(f"p/{i}.png")
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 99).save("p/3.png")
    assert clipscore.main(["p", "--prompt", "a house"]) == 0
    assert "3 pictures are of one colour (such as p/0.png)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- another model
# diffusers#1429, peft#421, sd_dreambooth_extension#346


def attention(tensors):
    name = next(k for k in tensors if k.endswith("attn2.to_v.weight"))
    tensors[name] *= 1.5


def test_models_that_differ_in_anything_have_other_class_pictures(monkeypatch):
    tiny, unet = load_model("tiny", "cpu", log=None), "unet/diffusion_pytorch_model.safetensors"
    copy = shutil.copytree(TINY_MODEL, "copy")
    assert load_model(str(copy), "cpu", log=None).digest == tiny.digest  # the name does not matter
    others = [
        load_model(str(changed_model("other", unet, attention)), "cpu", log=None),
        load_model("tiny", "cpu", log=None, prediction="v_prediction"),
        load_model("tiny", "cpu", "bf16", log=None),
    ]
    seen = []
    monkeypatch.setattr(prior, "make_folder", lambda path, _: seen.append(path))
    monkeypatch.setattr(prior, "read", lambda file: (None, 0.0))
    for sd in (tiny, *others):
        monkeypatch.setattr(sd, "draw", lambda *_, **__: [None])
        monkeypatch.setattr(prior, "write_png", lambda *_: None)
        prior.pictures(sd, ["a house"], 1, 64, 0)
    assert len(set(seen)) == 4


def test_resumed_onto_another_base(monkeypatch, capsys):
    """Weights exchanged under the same name between two halves of a run."""
    unet = "unet/diffusion_pytorch_model.safetensors"
    base = shutil.copytree(TINY_MODEL, "base")
    argv = [*COMMON, "run", "--model", "base", "--data", "photos", "--token", "sks", "--rank", "2"]
    argv += ["--caption", "{token}", "--resolution", "64", "--save-every", "1"]
    Path("photos").mkdir()
    for i in range(2):
        Image.effect_mandelbrot((64, 64), (-2 + i, -1, 1, 1), 99).convert("RGB").save(f"photos/{i}.png")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_lora.Trainer, "_finish", lambda run: 1 / 0)
        train_lora.main(argv)
    shutil.rmtree(base)
    changed_model("base", unet, attention)
    refused(train_lora, ["--resume", "run"], ["base was"], capsys)
    assert train_lora.main(["--resume", "run", "--force"]) == 0


# --------------------------------------------------------------------------------- two processes, one run


def test_a_run_has_one_writer(capsys, monkeypatch):
    """While another process lives its folder is refused; after its kill it is taken over, with a notice."""
    Path("run").mkdir()
    code = "import time; from pathlib import Path; from hanokdiff import lock; lock.take(Path('run')); "
    code += "print('ready', flush=True); time.sleep(60)"
    root = str(Path(lock.__file__).parents[1])
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={"PYTHONPATH": root})
    try:
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(ValueError, match=f"written by process {child.pid} .*stop it"):
            lock.take(Path("run"))
    finally:
        child.kill()
        child.wait()
    lock.take(Path("run"))
    lock.take(Path("run"))  # by the same process: again
    assert f"taken over from process {child.pid}" in capsys.readouterr().out
    lock.release()
    assert not list(Path("run").iterdir())


def test_a_lock_of_another_machine(monkeypatch, capsys):
    """It cannot be asked: refused while there are signs of life, taken over after an hour without."""
    Path("run").mkdir()
    Path("run/lock.json").write_text(json.dumps({"pid": 1, "machine": "elsewhere", "started": None}))
    with pytest.raises(ValueError, match="process 1 on elsewhere"):
        lock.take(Path("run"))
    now = lock.time.time()
    monkeypatch.setattr(lock.time, "time", lambda: now + 3700)
    lock.take(Path("run"))
    assert "taken over" in capsys.readouterr().out


def test_torchrun_ends_with_our_sentence(monkeypatch, capsys):
    """Below its own traceback it prints what a failed process has left for it."""
    errors = pytest.importorskip("torch.distributed.elastic.multiprocessing.errors")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error.json")
    peer = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1")

    def left_alone(args):
        raise peer

    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setattr(train_lora.command_line, "check_training", left_alone)
        assert train_lora.main([]) == 2 and not Path("error.json").exists()
    assert capsys.readouterr().err == "error: another process has ended\n"
    refused(train_lora, ["--steps", "0", "--device", "cpu"], ["--steps is 0"], capsys)
    failure = errors.ProcessFailure(0, 1, 2, "error.json")
    said = errors.ChildFailedError("train_lora.py", {0: failure}).format_msg()
    assert "traceback : --steps is 0, but must be greater than 0\n" in said


def test_a_killed_process_leaves_no_semaphore():
    """Where processes are spawned (a Mac, Windows), tqdm's lock was one of the system's: named as leaked."""
    code = """
import multiprocessing, os
multiprocessing.set_start_method("spawn")
from tqdm import tqdm
from hanokdiff.errors import report_errors
@report_errors
def main(argv=None):
    next(iter(tqdm(range(2))))
    os.kill(os.getpid(), 9)
main()
"""
    root = str(Path(lock.__file__).parents[1])
    how = dict(capture_output=True, text=True, env={"PYTHONPATH": root}, timeout=60)
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert done.returncode == -9 and "leaked" not in done.stderr


# ------------------------------------------------------------------------------------------------ colours
# sd-scripts#2179


def matrix_profile(name: bytes, columns: list, gamma: float) -> bytes:
    """A minimal ICC v2 display profile: three primaries (D50) and one gamma."""

    def fixed(v: float) -> bytes:
        return round(v * 65536).to_bytes(4, "big", signed=True)

    def xyz(values) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    curve = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + b"\0\0"
    text = name + b"\0"
    described = b"desc\0\0\0\0" + len(text).to_bytes(4, "big") + text + b"\0" * (8 + 3 + 67)
    tags = {b"desc": described, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz((0.9642, 1.0, 0.8249))}
    tags |= {c + b"XYZ": xyz(v) for c, v in zip((b"r", b"g", b"b"), columns, strict=True)}
    tags |= {c + b"TRC": curve for c in (b"r", b"g", b"b")}
    table, data, place = len(tags).to_bytes(4, "big"), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += tag + (place + len(data)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        data += content
    head = (place + len(data)).to_bytes(4, "big") + b"\0\0\0\0" + bytes.fromhex("02400000") + b"mntrRGB XYZ "
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + xyz((0.9642, 1.0, 0.8249))[8:] + b"\0" * 48
    return head + table + data


ADOBE = matrix_profile(
    b"Adobe RGB (1998)",
    [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)], 2.19921875,
)  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_embedded_colour_profiles(mode):
    """(173, 62, 45) in Adobe RGB is (200, 60, 40) in sRGB; the issue's own pair."""
    colour = (173, 62, 45) + (255,) * (mode == "RGBA")
    Image.new(mode, (8, 8), colour).save("a.png", icc_profile=ADOBE)
    image, note = read_photo("a.png")
    assert max(abs(a - b) for a, b in zip(image.getpixel((0, 0)), (200, 60, 40), strict=True)) <= 2
    assert note == "colours converted from 'Adobe RGB (1998)'"


def test_other_profiles():
    """sRGB stays as it is, without a word; a broken one, or one for another kind of picture, is named."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc, colour, word in ((srgb, "RGB", ""), (b"nonsense", "RGB", "unread"), (ADOBE, "L", "not used")):
        image = Image.new(colour, (8, 8), 77 if colour == "L" else (173, 62, 45))
        image.save("a.png", icc_profile=icc)
        found, note = read_photo("a.png")
        assert found.tobytes() == image.convert("RGB").tobytes() and word in note and bool(word) == bool(note)


# ----------------------------------------------------------------------------------------------- captions
# kohya_ss#988, #927, #1370, #2209


def photo(name: str) -> None:
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 99).convert("RGB").save(name, "png")


def test_captions_by_any_name():
    """Another normal form, capitals, .caption, NAME.jpg.txt, metadata.jsonl; what fits none is named."""
    for name in (unicodedata.normalize("NFD", "한옥.png"), "a.png", "b.png", "C.PNG", "d.png", "e.png"):
        photo(name)
    Path(unicodedata.normalize("NFC", "한옥.txt")).write_text("sks one")
    Path("a.caption").write_text("sks two")
    Path("b.png.txt").write_text("sks three")
    Path("c.TXT").write_text("sks four")
    Path("metadata.jsonl").write_text('{"file_name": "d.png", "text": "sks\\nfive"}\n')
    Path("lost.txt").write_text("sks")
    said = []
    photos, _ = load_photos(Path(), 64, log=said.append)
    captions = {unicodedata.normalize("NFC", p.name): p.caption for p in photos}
    assert captions == {
        "한옥.png": "sks one", "a.png": "sks two", "b.png": "sks three", "C.PNG": "sks four",
        "d.png": "sks five", "e.png": None,
    }  # fmt: skip
    assert "1 captions fit no picture, such as 'lost.txt'" in "\n".join(said)


def test_a_shared_caption_and_names_as_captions():
    photo("house_by_night.png")
    Image.open("house_by_night.png").save("house_by_night.bmp")
    said = []
    photos, _ = load_photos(Path(), 64, log=said.append)
    assert prepare_captions(photos, "sks", "", "{token}, {name}", print) == ["sks, house by night"] * 2
    assert prepare_captions(photos, "sks", "house", "{name}", print) == ["sks by night"] * 2
    Path("house_by_night.txt").write_text("sks")
    load_photos(Path(), 64, log=said.append)
    assert any("two pictures share one caption: house_by_night" in line for line in said)
    assert Captions(Path()).file("house_by_night.bmp") == Path("house_by_night.txt")


def test_more_kinds_of_pictures_are_named():
    """Not passed over: .jxl, .dng, .jp2; of an animation the first frame is said to be taken."""
    photo("a.jxl")
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")]
    frames[0].save("b.gif", save_all=True, append_images=frames[1:])
    Path("c.dng").write_bytes(b"II*\0nothing")
    said = []
    photos, _ = load_photos(Path(), 64, log=said.append)
    assert sorted(p.name for p in photos) == ["a.jxl", "b.gif"] and "c.dng" in said[0]
    assert "first of its frames" in said[-1]


def test_kohyas_folders():
    """kohya-trainer#50: 10_sks house/ and 5_.../: the number is how often, the rest the caption of pictures
    without one."""
    for i, name in enumerate(("10_sks house", "5_sks gate", "notes")):
        Path("d", name).mkdir(parents=True)
        photo(f"d/{name}/{i}.png")
    Path("d/5_sks gate/1.txt").write_text("a gate by night")
    said = []
    photos, _ = load_photos(Path("d"), 64, log=said.append)
    assert sorted((p.name, p.caption) for p in photos) == [
        ("0.png", "sks house"), ("0.png", "sks house"), ("1.png", "a gate by night"),
    ]  # fmt: skip
    assert "3 with their folders' repeats" in said[-1]
    few, _ = load_photos(Path("d/5_sks gate"), 64, log=said.append)
    assert [p.caption for p in few] == ["a gate by night"]


# --------------------------------------------------------------------------------------- markup and notes


@pytest.mark.parametrize(("prompt", "words"), [
    ("(fire:1.3), a house", "fire, a house"),
    ("((snow)) BREAK [night]", "snow night"),
    ("[a barn:a castle:0.5] <lora:x:0.8>", "a castle"),
    ("a barn AND a fire :0.7", "a barn, a fire"),
    (r"a \(red\) house", "a (red) house"),
    ("a house", "a house"),
])  # fmt: skip
def test_clip_scores_words(prompt, words):
    assert plain_text(prompt) == words


def test_markup_is_not_scored(capsys):
    """The same picture, weighted and plain, has the same score, and a line says so."""
    photo("x.png")
    found = []
    for prompt in ("a ((house)), (fire:1.3)", "a house, fire"):
        assert clipscore.main(["x.png", "--prompt", prompt, "--json", "s.json"]) == 0
        found.append(json.loads(Path("s.json").read_text())["images"][0]["cosine"])
    assert found[0] == found[1] and capsys.readouterr().out.count("left out of 1 of 1 prompts") == 1


def test_notes_about_prompts():
    """A word in the negative prompt is in its place (diffusers#5327); Korean is noise to SD 1; odd sizes; one
    vector for two words (textual_inversion#158)."""
    sd = load_model("tiny", "cpu", log=None)
    sd.text.add_word("*")
    sd.text.add_word("bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.text.warn_without_word(["* in the snow"], negative="bad")
        sample.warn_of_size((64, 96), 64)
        textual_inversion.initial_vectors(sd, "house", 1)
    for call, word in (
        (lambda: sd.text.warn_without_word(["a house"], negative="bad"), 'does not contain "\\*"'),
        (lambda: sd.text.warn_without_word(["한옥 화재, *"]), "--alert"),
        (lambda: sample.warn_of_size((128, 64), 64), "doubled"),
        (lambda: textual_inversion.initial_vectors(sd, "a house", 1), 'starts as "a" alone'),
    ):
        with pytest.warns(UserWarning, match=word):
            call()


# --------------------------------------------------------------------------------------------- gradients


def test_gradients_in_channels_last(monkeypatch):
    """The recomputed GroupNorm + SiLU in a convolution's other layout: the same gradients."""
    torch.manual_seed(0)
    norm, conv = torch.nn.GroupNorm(4, 8), torch.nn.Conv2d(8, 8, 3, padding=1)
    x = torch.randn(2, 8, 6, 6)
    grads = []
    for on, layout in ((False, torch.contiguous_format), (True, torch.channels_last)):
        monkeypatch.setattr(memory, "ON_CPU", on)
        conv.to(memory_format=layout)
        given = x.clone(memory_format=layout).requires_grad_(True)
        (conv(memory.norm_silu(norm, given)) * torch.linspace(0, 1, 6)).sum().backward()
        grads.append([given.grad, *(p.grad.clone() for p in norm.parameters())])
        norm.zero_grad()
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------- files that were there and not read


def test_lora_in_the_original_numbering(sd1):
    """sd_dreambooth_extension#1380, webui#11963: every module by its old name is found again."""
    sd = load_model(str(sd1.folder), "cpu", log=None)
    ours = [n for n in lora.layers(sd) if n.startswith("lora_unet_")]
    resnet = {
        "conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
        "conv_shortcut": "skip_connection",
    }  # fmt: skip
    single = {
        "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding_linear_1",
        "time_embed_2": "time_embedding_linear_2", "middle_block_0": "mid_block_resnets_0",
        "middle_block_1": "mid_block_attentions_0", "middle_block_2": "mid_block_resnets_1",
    }  # fmt: skip
    per = sd.unet.config.layers_per_block

    def original(name: str) -> str:
        m = re.fullmatch(r"lora_unet_(down|up)_blocks_(\d)_(resnets|attentions)_(\d)_(.+)", name)
        if m:
            b, i, place = int(m[2]), int(m[4]), int(m[3] == "attentions")
            n = (1 + 3 * b + i) if m[1] == "down" else (3 * b + i)
            side = "input" if m[1] == "down" else "output"
            return f"lora_unet_{side}_blocks_{n}_{place}_{resnet.get(m[5], m[5])}"
        if m := re.fullmatch(r"lora_unet_down_blocks_(\d)_downsamplers_0_conv", name):
            return f"lora_unet_input_blocks_{3 * int(m[1]) + 3}_0_op"
        if m := re.fullmatch(r"lora_unet_up_blocks_(\d)_upsamplers_0_conv", name):
            return f"lora_unet_output_blocks_{3 * int(m[1]) + 2}_{1 if m[1] == '0' else 2}_conv"
        for old, new in single.items():
            if name == UNET + new or name.startswith(UNET + new + "_"):
                rest = name.removeprefix(UNET + new)
                return UNET + old + ("_" + resnet[rest[1:]] if rest[1:] in resnet else rest)
        raise AssertionError(name)

    assert per == 2 and len({original(n) for n in ours}) == len(ours) > 100
    for name in ours:
        assert lora_names.parse(f"{original(name)}.lora_down.weight") == (name, "down", "")
    for prefix in ("lora_te_0_transformer_text_model_", "lora_te1_text_model_", "lora_te1_"):
        key = f"{prefix}encoder_layers_0_mlp_fc1.lora_up.weight"
        assert lora_names.parse(key)[0] == "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(("key", "what"), [
    ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "SDXL"),
    ("lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_k.lora_down.weight", "SDXL"),
    ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux"),
    ("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight", "Flux"),
])  # fmt: skip
def test_a_refused_lora_is_told_what_it_is(key, what):
    save_file({key: torch.zeros(2, 2)}, "a.safetensors")
    with pytest.raises(ValueError, match=f"a LoRA for {what} .*only plain LoRA for Stable Diffusion 1 and 2"):
        lora_file.read_file(Path("a.safetensors"))


SD15 = [  # the published repository's kinds of files
    "model_index.json", "README.md", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
    *[f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "safety_checker")],
    *[f"{part}/diffusion_pytorch_model{v}{e}" for part in ("unet", "vae") for v in ("", ".fp16", ".non_ema")
      for e in (".safetensors", ".bin")],
    *[f"text_encoder/{n}" for n in ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")],
    "safety_checker/model.safetensors", "v1-5-pruned-emaonly.ckpt", "v1-5-pruned.safetensors",
]  # fmt: skip


def test_only_what_is_opened_is_fetched():
    """diffusers#1811, #2728, #10928: one file of each network, .bin where there is nothing else."""
    assert {n for n in folder.wanted_files(SD15) if not n.endswith("json")} == {
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }  # fmt: skip
    old = [n for n in SD15 if not n.endswith(".safetensors")]
    assert {n for n in folder.wanted_files(old) if n.endswith(".bin")} == {
        "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
    }  # fmt: skip
    parts = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    whole = [*parts, index, "unet/config.json"]
    assert set(folder.wanted_files(whole)) == set(whole)


def test_the_hub_is_asked_first(monkeypatch):
    """Listed, then fetched; without the hub what was fetched before."""
    asked = []

    def fetch(model, allow_patterns=None, local_files_only=False):
        asked.append(local_files_only or sorted(allow_patterns))
        return str(TINY_MODEL)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, model: SD15)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert folder.find_model("some/model") == TINY_MODEL and asked == [sorted(folder.wanted_files(SD15))]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert folder.find_model("some/model") == TINY_MODEL and asked[1:] == [True]


def test_sharded_and_named_variants():
    """diffusers#8898: a UNet in parts, and one under another variant's name, open as the plain one."""
    plain = load_model("tiny", "cpu", log=None)
    name, unet = "diffusion_pytorch_model", Path("parts/unet")
    shutil.copytree(TINY_MODEL, "parts")
    tensors = load_file(unet / f"{name}.safetensors")
    half = len(tensors) // 2
    where = {k: f"{name}-0000{1 + (i >= half)}-of-00002.safetensors" for i, k in enumerate(tensors)}
    for file in set(where.values()):
        save_file({k: tensors[k] for k, f in where.items() if f == file}, unet / file)
    (unet / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (unet / f"{name}.safetensors").unlink()
    assert load_model("parts", "cpu", log=None).digest == plain.digest
    shutil.copytree(TINY_MODEL, "variant")
    Path(f"variant/unet/{name}.safetensors").rename(f"variant/unet/{name}.non_ema.safetensors")
    assert load_model("variant", "cpu", log=None).digest == plain.digest
    for odd in ("../b", ["b"], None):
        (unet / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": odd}}))
        with pytest.raises(ValueError, match="names no files beside it"):
            load_model("parts", "cpu", log=None)


class ModelCheckpoint:
    """Such as the callback of pytorch_lightning whose class is a key in the official SD 1 checkpoints."""

    def __reduce__(self):
        return (type(self), (), {"best": torch.zeros(3), "path": Path("x")})

    def __setstate__(self, state):
        Path("ran").touch()


class Command:
    def __init__(self, call, argument):
        self.call, self.argument = call, argument

    def __reduce__(self):
        return (self.call, (self.argument,))


def test_official_checkpoints(small):
    """diffusers#8874: objects of unknown classes become inert, and nothing of them runs."""
    parts, tensors = small[False]
    extra = {"callbacks": {ModelCheckpoint: {"monitor": ModelCheckpoint()}}, "x": [ModelCheckpoint()]}
    torch.save({"state_dict": tensors, "global_step": 1, **extra}, "a.ckpt")
    unet, *_ = single_file.read_file("a.ckpt")
    assert torch.equal(unet.conv_in.weight, parts[0].conv_in.weight) and not Path("ran").exists()
    for call in (os.system, eval, exec, subprocess.getoutput):
        torch.save({"state_dict": tensors, "x": Command(call, "open('ran', 'w')")}, "b.ckpt")
        with pytest.raises(ValueError, match="needs more than tensors"):
            single_file.read_file("b.ckpt")
    assert not Path("ran").exists()


def test_plain_from_pretrained_opens_our_folders():
    """Under transformers 5 an fp16 folder fails in diffusers unless text_encoder/config.json says float32."""
    diffusers = pytest.importorskip("diffusers")
    sd = load_model("tiny", "cpu", log=None)
    parts = sd.unet, sd.vae, sd.text.encoder, sd.text.tokenizer, sd.schedule
    folder.save_folder(Path("m"), *parts, torch.float16)
    for where in ("m", str(TINY_MODEL)):
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(where, local_files_only=True)
        drawn = pipeline("a barn", num_inference_steps=1, height=64, width=64, output_type="np").images
        assert drawn.shape == (1, 64, 64, 3)
    config = Path("m/text_encoder/config.json")
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "dtype"}))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained("m", local_files_only=True)
    with pytest.raises(RuntimeError, match="dtype"):  # this line is what it takes
        pipeline("a barn", num_inference_steps=1, height=64, width=64)


def test_an_embedding_in_a_picture():
    """webui-forge-classic#626: the WebUI's PNG with an embedding in its text."""
    vectors = torch.randn(2, 72)
    text = json.dumps({"string_to_param": {"*": {"TORCHTENSOR": vectors.tolist()}}, "name": "house"})
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(text.encode()).decode())
    Image.new("RGB", (64, 64)).save("e.png", pnginfo=info)
    word, found, _ = embedding_file.read_file(Path("e.png"))
    assert word == "house" and torch.allclose(found, vectors)
    Image.new("RGB", (64, 64)).save("f.png")
    with pytest.raises(ValueError, match="without an embedding in its text"):
        embedding_file.read_file(Path("f.png"))


def test_a_distilled_unet_is_named():
    """diffusers#6790: an LCM's UNet."""
    config = Path(shutil.copytree(TINY_MODEL, "lcm")) / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"time_cond_proj_dim": 256}))
    with pytest.raises(ValueError, match="LCM"):
        load_model("lcm", "cpu", log=None)


# --------------------------------------------------------------------------------- asked for everywhere


def test_offset_noise():
    """noise + offset * one number per picture and channel; 0 is the plain noise, to the bit."""
    batch = Batch(0, 3, range(2), 2)
    plain, moved = batch.noise((2, 4, 8, 8)), batch.noise((2, 4, 8, 8), 0.1)
    assert torch.equal(plain, batch.normal((2, 4, 8, 8)))
    apart = moved - plain
    assert torch.allclose(apart, apart[..., :1, :1].expand_as(apart), atol=1e-6) and apart.abs().max() > 0
    assert torch.allclose(apart[..., 0, 0], 0.1 * batch.normal((2, 4, 1, 1), "offset")[..., 0, 0], atol=1e-6)


def test_zero_terminal_snr():
    """As diffusers rescales (arXiv:2305.08891, algorithm 1): the last step is noise alone."""
    diffusers = pytest.importorskip("diffusers")
    how = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    how["prediction_type"] = "v_prediction"
    theirs = diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True, **how).alphas_cumprod
    schedule = Schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = schedule.alpha_bar
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7) and ours[-1] == 2**-24
    with pytest.raises(ValueError, match="predicts v"):
        Schedule(rescale_betas_zero_snr=True)
    assert torch.equal(Schedule.from_json(schedule.to_json()).alpha_bar, ours)


def test_another_autoencoder(sd1, small):
    """--vae: a folder of diffusers, a model's, a file in the original layout; of other latents refused."""
    sd = load_model(str(sd1.folder), "cpu", log=None)
    with torch.no_grad():
        sd.vae.decoder.conv_out.bias += 1
    folder.save_folder(Path("m"), sd.unet, sd.vae, sd.text.encoder, sd.text.tokenizer, sd.schedule)
    for vae in ("m", "m/vae"):
        other = load_model(str(sd1.folder), "cpu", log=None, vae=vae)
        assert torch.equal(other.vae.decoder.conv_out.bias, sd.vae.decoder.conv_out.bias)
        assert torch.equal(other.unet.conv_in.weight, sd.unet.conv_in.weight)
    parts, tensors = small[False]
    prefix = single_file.FIRST_STAGE
    first = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    save_file({k: t.contiguous() for k, t in first.items()}, "vae.safetensors")
    torch.save({"state_dict": first}, "vae.ckpt")
    for vae in ("vae.safetensors", "vae.ckpt"):
        found = single_file.read_vae(Path(vae)).state_dict()
        assert all(torch.equal(found[k], t) for k, t in parts[1].state_dict().items())
    with pytest.raises(ValueError, match="--vae .* makes latents of 4 channels, 1/4"):
        load_model(str(sd1.folder), "cpu", log=None, vae=str(TINY_MODEL))
    with pytest.raises(ValueError, match="no such file"):
        load_model("tiny", "cpu", log=None, vae="nowhere")


LONG = " ".join(["a barn on fire"] * 40)  # 160 tokens, none a comma


def test_captions_over_75_tokens(sd1):
    """In chunks of 75, each between begin and end and read alone, by transformers' encoder; as sampling's
    prompt, and in a batch with a short caption the same as alone."""
    sd, pipeline = load_model(str(sd1.folder), "cpu", log=None), sd1.pipeline
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    ids = tokenizer(LONG, add_special_tokens=False).input_ids
    assert 150 < len(ids) < 225
    rows = [[tokenizer.bos_token_id, *ids[k : k + 75], tokenizer.eos_token_id] for k in (0, 75, 150)]
    rows = torch.tensor([row + [tokenizer.pad_token_id] * (77 - len(row)) for row in rows])
    expected = encoder(rows)[0].flatten(0, 1)  # (231, D)
    for most in (75, 150, 225):
        sd.text.max_tokens = most
        sd.text._warned.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            context = sd.text([LONG])[0]
        assert torch.allclose(context, expected[: most // 75 * 77], atol=1e-5)
        assert [f"cut at {most}" in str(w.message) for w in caught] == [True] * (most < 225)
    assert torch.equal(context, sd.text.prompts([LONG])[0])
    two, both = sd.text(["a barn " * 50, LONG]), sd.text(["a barn", LONG])
    assert two.shape[1] == 6 * 77 and both.shape[1] == 3 * 77
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([9])
    alone = sd.unet(x, t, sd.text(["a barn"]))
    assert torch.allclose(sd.unet(x, t, both[:1]), alone, atol=1e-5)
    assert not torch.allclose(sd.unet(x, t, both[1:]), alone, atol=1e-3)
    sd.text.cache_prompts(["a barn", LONG])
    assert torch.allclose(sd.text(["a barn", LONG]), both, atol=1e-6)


def test_long_captions_in_training(monkeypatch):
    """Trained on whole, noted in the file as kohya's scripts do; a word beyond the 75th token learns."""
    photo("p.png")
    Path("p.txt").write_text(LONG + " sks")
    argv = [*COMMON, "run", "--data", ".", "--token", "sks", "--resolution", "64", "--batch-size", "1"]
    argv[argv.index("--images") + 1] = "1"
    widths, seen = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda s, x, t, c: widths.append(c.shape[1]) or seen(s, x, t, c))
    assert train_lora.main([*argv, "--max-tokens", "225", "--vectors", "1", "--rank", "2"]) == 0
    assert set(widths) == {231}
    tensors, about = read_safetensors(Path("run/lora.safetensors"), "LoRA")
    sd = load_model("tiny", "cpu", log=None)
    start = textual_inversion.initial_vectors(sd, "a building with a roof", 1)
    assert about["ss_max_token_length"] == "225"
    assert not torch.equal(tensors["bundle_emb.sks.string_to_param.*"], start)


# ------------------------------------------------------------------------- a fresh look: docs/LOG.md lists it


def test_the_same_names_in_two_folders():
    """kohya_ss#547: holding out one of two pictures called 1.png took both away."""
    for name in ("10_sks house", "5_sks gate"):
        Path("d", name).mkdir(parents=True)
        for i in range(3):
            photo(f"d/{name}/{i}.png")
    photos, held_out = load_photos(Path("d"), 64, held_out=1, log=lambda _: None)
    assert len(held_out) == 1 and len({p.path for p in photos}) == 5
    assert held_out[0].path not in {p.path for p in photos}


def test_files_that_are_something_else(small):
    """webui#8123, diffusers#6713, ComfyUI#5729: named as what they are, not "damaged, fetch it again"."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4265146304\n"
    for name in ("a.safetensors", "a.ckpt", "a.jpg", "b.safetensors"):
        Path(name).write_text(pointer if name[0] == "a" else "<!DOCTYPE html><html><title>Log in</title>")
    tensors = {k: t.contiguous() for k, t in small[False][1].items()}
    save_file(tensors, "c.ckpt")
    torch.save({"state_dict": tensors}, "d.safetensors")
    torch.save({"state_dict": tensors}, "e.safetensors", _use_new_zipfile_serialization=False)
    told = {
        "a.safetensors": "a.safetensors cannot be read: it is a Git LFS pointer.*git lfs pull",
        "a.ckpt": "a Git LFS pointer", "b.safetensors": "a web page", "e.safetensors": "torch.save",
        "c.ckpt": "a .safetensors file by what is in it; give its name that ending",
        "d.safetensors": "what torch.save writes; end its name in .ckpt",
    }  # fmt: skip
    for name, words in told.items():
        with pytest.raises(ValueError, match=words):
            single_file.read_file(name)
    with pytest.raises(ValueError, match="'a.jpg' cannot be read: it is a Git LFS pointer"):
        read_photo("a.jpg")
    Path("f.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{" + bytes(40))
    with pytest.raises(ValueError, match="damaged or incomplete"):
        single_file.read_file("f.safetensors")


def test_clip_skip_in_training_and_a_strength_that_overflows(monkeypatch, capsys):
    """fast-stable-diffusion#653: the layer that is left out has no part in it; lora-scripts#417: trained
    without the last layer and drawn with it, silently. The finished run leaves no lock; too much of its
    LoRA draws nothing."""
    seen, forward = [], TextEncoder.forward
    spy = lambda s, ids, skip=1: seen.append(skip) or forward(s, ids, skip)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "forward", spy)
        how = "--rank 2 --clip-skip 2 --text-rank 0 --vectors 0"
        assert train_lora.main([*COMMON, "run", *how.split()]) == 0
    assert set(seen) == {2} and not Path("run/lock.json").exists() and not lock.held
    file = Path("run/lora.safetensors")
    assert sample.main(["*", "--lora", f"{file}:1e30", "--steps", "2", "--out", "p"]) == 2
    assert "not a number" in capsys.readouterr().err and not list(Path().rglob("p/*.png"))
    assert read_safetensors(file, "LoRA")[1]["ss_clip_skip"] == "2"
    sd = load_model("tiny", "cpu", log=None)
    with pytest.warns(UserWarning, match="trained with --clip-skip 2, and is used with 1"):
        lora_file.apply_file(sd, file)
    sd.text.skip(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_file.apply_file(sd, file)


@pytest.mark.parametrize(("prompt", "named"), [
    ("a cat++ in the snow", "t++ (InvokeAI"), ("an (old house)-- by night", ")-- (InvokeAI"),
    ("a guitar AND NOT brown", "AND NOT (what must not be there goes to --negative"),
])  # fmt: skip
def test_other_tools_prompts_are_named(prompt, named):
    """compel#5, webui#3747: drawn as text without a word."""
    assert [x.startswith(named) for x in not_understood(prompt)] == [True]
    assert not_understood("a well-known house - old, C++11, 1990--2000, red and white AND blue") == []


def test_captions_in_a_table():
    """diffusers#12038: a CSV beside the photos, with the columns of datasets' imagefolder or one's own."""
    for name in ("a.png", "b.png"):
        photo(name)
    Path("metadata.csv").write_text('file_name,text\ntrain/a.png,"sks, by night"\n')
    Path("captions.csv").write_text("image, caption\nB.PNG, sks in the snow\nc.png, lost\n")
    said = []
    photos, _ = load_photos(Path(), 64, log=said.append)
    assert {p.name: p.caption for p in photos} == {"a.png": "sks, by night", "b.png": "sks in the snow"}
    assert "1 captions fit no picture, such as 'c.png'" in "\n".join(said)
    Path("captions.csv").write_text("image,caption\na.png," + "x" * 200_000)
    with pytest.raises(ValueError, match="captions.csv is not a table"):
        load_photos(Path(), 64, log=said.append)


def test_what_was_met(monkeypatch):
    """sd-scripts#934: min-SNR for v at a last step of noise alone; nunchaku#245: a LoRA in fp8;
    forge#1604: a single step of each sampler; sd-scripts#1024: names of a compiled network are named."""
    schedule = Schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    weight = min_snr_weight(schedule, torch.tensor([0, 999]), 5.0)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    assert torch.allclose(weight, (snr.clamp(max=5) / (snr + 1))[[0, 999]], atol=1e-6) and weight[1] < 1e-6
    sd = load_model("tiny", "cpu", log=None)
    loras = lora.insert(sd, 2, 2.0, "attention", 0, 0)
    with torch.no_grad():
        for layer in loras.values():
            layer.up.fill_(0.25)
    lora_file.save_file(Path("a.safetensors"), loras, {})
    tensors = {k: t.to(torch.float8_e4m3fn) for k, t in load_file("a.safetensors").items()}
    save_file(tensors, "a.safetensors")
    again = load_model("tiny", "cpu", log=None)
    applied, _ = lora_file.apply_file(again, Path("a.safetensors"))
    name = next(iter(loras))
    assert torch.equal(applied[name].down, loras[name].down.to(torch.float8_e4m3fn).float())
    for sampler in samplers.SAMPLERS:
        for x in again.sample(["a barn"], [0], sampler=sampler, steps=1, size=(16, 16)):
            assert torch.isfinite(x).all()
    save_file({"_orig_mod." + k: t for k, t in tensors.items()}, "b.safetensors")
    with pytest.raises(ValueError, match="tensor _orig_mod.* is of no LoRA"):
        lora_file.read_file(Path("b.safetensors"))
