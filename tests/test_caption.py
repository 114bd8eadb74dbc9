"""Captioning folders as people have them, by a tiny random BLIP in the real classes and files; no network."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import randomise
from PIL import Image
from safetensors.torch import load_file, save_file

import train_ti
from hanokdiff import caption
from hanokdiff.models.tokens import contains_word
from hanokdiff.training.dataset import Photo, load_photo, prepare_captions, read_caption

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "building", "house", "with", "roof",
    "tiled", "in", "the", "snow", "at", "night", "and", "trees", ",", "on", "top", "hat", "man", "near",
    "hills",
]  # fmt: skip
PHRASE = "a building with a roof"


@pytest.fixture(scope="session")
def blip(tmp_path_factory):
    """A folder with a BLIP as transformers saves it: 32 pixels, 1 layer, 27 words and, as in BLIP, 2 more."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("models") / "blip"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    small = dict(hidden_size=32, intermediate_size=32, projection_dim=16)
    small |= dict(num_hidden_layers=1, num_attention_heads=2)
    ids = dict(bos_token_id=len(WORDS), eos_token_id=2, sep_token_id=3, pad_token_id=0)
    text = small | ids | dict(vocab_size=len(WORDS) + 2, encoder_hidden_size=32, max_position_embeddings=64)
    config = BlipConfig(text_config=text, vision_config=dict(small, image_size=32, patch_size=16))
    network = randomise(BlipForConditionalGeneration(config), 1)
    special = [0, 1, 2, 4, -2, -1]
    network.text_decoder.cls.predictions.bias[special] = -99  # like a trained one: never generated
    network.save_pretrained(folder)
    try:
        images = BlipImageProcessor(size={"height": 32, "width": 32})
    except ImportError:  # no torchvision
        from transformers import BlipImageProcessorPil

        images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(images, BertTokenizer(str(folder / "vocab.txt"))).save_pretrained(folder)
    return folder


def open_tiny(blip, min_length=24, max_length=48, beams=1, dtype="auto"):
    return caption.Blip(str(blip), "cpu", dtype, min_length, max_length, beams)


def plain(n, size=(8, 8)):
    """Pictures of one colour each, all different."""
    g = torch.Generator().manual_seed(0)
    return [Image.new("RGB", size, tuple(c)) for c in torch.randint(0, 256, (n, 3), generator=g).tolist()]


def fill(folder, names, captions=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, plain(len(names))):
        image.save(folder / name)
    for name, text in (captions or {}).items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def texts(folder):
    return {f.name: f.read_text(encoding="utf-8") for f in folder.glob("*.txt")}


@pytest.fixture
def run(capsys):
    """The command line -> exit code, stdout, stderr."""

    def run_(folder, *args, blip="/nowhere/blip"):
        code = caption.main([str(folder), "--blip", str(blip), "--device", "cpu", *map(str, args)])
        return code, *capsys.readouterr()

    return run_


# -------------------------------------------------------------------------------------------------- BLIP


def test_pixels_and_captions_are_the_librarys(blip):
    from transformers import BlipProcessor

    processor, ours, seen = BlipProcessor.from_pretrained(blip), open_tiny(blip), set()
    noise = [Image.effect_noise(size, 90).convert("RGB") for size in ((40, 30), (7, 90), (32, 32))]
    for image in noise + plain(5, (50, 20)):
        inputs = processor(images=image, text="a picture of", return_tensors="pt")
        pixels = ours.pixels(image)
        assert pixels.std() < 3 and (inputs.pixel_values[0] - pixels).abs().max() < 1e-6
        ids = ours.model.generate(**inputs, min_length=24, max_length=48, num_beams=1, do_sample=False)
        text = processor.decode(ids[0], skip_special_tokens=True)
        assert text == "a picture of " + ours.generate([pixels], min_length=24)[0]
        seen.add(text)
    assert len(seen) > 4  # the model does look


def test_a_batch_says_what_each_photo_says_alone(blip):
    ours = open_tiny(blip)
    pixels = dict(enumerate(ours.pixels(image) for image in plain(12)))
    alone = [next(iter(ours.captions({i: p}))) for i, p in pixels.items()]
    assert list(ours.captions(pixels)) == alone


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(blip, dtype):
    ours = open_tiny(blip, dtype=dtype)
    assert {p.dtype for p in ours.model.parameters()} == {ours.dtype} != {torch.float32}
    assert all(len(text.split()) > 3 for _, text, _ in ours.captions({0: ours.pixels(plain(1)[0])}))


def test_lengths_and_beams_reach_the_model(blip):
    pixels = [open_tiny(blip).pixels(image) for image in plain(8)]

    def captions(min_length, **how):
        return open_tiny(blip, min_length, **how).generate(pixels, min_length=min_length)

    def tokens(text):  # start, a picture of, and then
        return 4 + len(re.findall(r"\w+|,", text))

    assert {tokens(t) for t in captions(8, max_length=8)} == {8}
    assert min(map(tokens, captions(0, max_length=48))) < 24 <= min(map(tokens, captions(24, max_length=48)))
    assert captions(24, max_length=48, beams=3) != captions(24, max_length=48)


def test_published_checkpoints_of_2022(blip, tmp_path):
    """A pickle, tied tensors stored twice, position ids among them; a vocabulary, no tokenizer.json."""
    tensors, bert = load_file(blip / "model.safetensors"), "text_decoder.bert.embeddings."
    tensors[bert + "position_ids"] = torch.arange(64)[None]
    tied_to = {"weight": bert + "word_embeddings.weight", "bias": "text_decoder.cls.predictions.bias"}
    for name, tied in tied_to.items():
        tensors["text_decoder.cls.predictions.decoder." + name] = tensors[tied].clone()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for name in ("config.json", "vocab.txt"):
        shutil.copy(blip / name, tmp_path)
    config = '{"do_lower_case": true, "tokenizer_class": "BertTokenizer"}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    models, image = (open_tiny(tmp_path), open_tiny(blip)), plain(1)[0]
    old, new = (m.generate([m.pixels(image)], min_length=24) for m in models)
    assert old == new


LOOPS = [
    "a man with a hat on top of a hat on top of a hat on top of",
    "a building with a roof and a building with a roof",
    "a roof roof roof",
    "snow on snow on snow on the hill",
    "a tree, a tree, a tree",
    "A Wall and a wall and a wall",
]
STRAIGHT = [
    "a black and white photo of a very very old house",
    "a man in a hat and a woman in a coat",
    "a house with a roof and a roof with a house",
    "a roof, roofs and roofing",
    "",
]


@pytest.mark.parametrize("text,loops", [(t, True) for t in LOOPS] + [(t, False) for t in STRAIGHT])
def test_what_a_loop_is(text, loops):
    assert bool(caption.LOOP.search(text)) == loops


def test_looping_captions_are_made_again(blip):
    ours = open_tiny(blip)
    pixels = dict(enumerate(ours.pixels(image) for image in plain(40)))
    first = ours.generate(list(pixels.values()), min_length=24)
    loops = [bool(caption.LOOP.search(text)) for text in first]
    assert 5 < sum(loops) < 35
    for (_, text, looped), before, loop in zip(ours.captions(pixels), first, loops, strict=True):
        assert looped == loop and text and not caption.LOOP.search(text)
        assert (text == before) == (not loop)


# ---------------------------------------------------------------------------------------------- the phrase


@pytest.mark.parametrize("text,became", [
    ("a building with a roof in the snow", "* in the snow"),
    ("there is A  Building\nwith a ROOF.", "there is *."),
    ("a building with a tiled roof", "*"),
    ("a house with a roof and trees", "* and trees"),
    ("an old korean-style home with the large tiled roof", "*"),
    ("the structure with a roof, and a house with a roof", "*, and *"),
    ("a photo of a man near a large building with a roof", "a photo of a man near *"),
])  # fmt: skip
def test_variants(text, became):
    assert caption.variants(PHRASE).sub("*", text) == became


@pytest.mark.parametrize("text", [
    "a building with roofs", "a building with a rooftop", "a building on a roof", "a temple with a roof",
    "building with a roof", "a building with a very old tiled roof",
    "a man in building with a roof", "a car and building with a roof",  # only adjectives may go
    "a burning building with a roof", "a building with a snow covered roof", "a flooded house with a roof",
])  # fmt: skip
def test_no_variants(text):
    assert not caption.variants(PHRASE).search(text)


def test_a_phrase_of_any_characters():
    assert caption.variants("(c++) 기와집?").sub("*", "the (C++)  기와집? at night") == "the * at night"
    assert caption.variants("a red vase").sub("*", "the small red vase on an old red vase") == "* on *"


# ---------------------------------------------------------------------------------------------- the folder


def odd_folder(folder):
    """Nine photos, and what people have beside them."""
    names = ["기와집 1.jpg", "b c.png", "a.jpg", "a.png", "bom.webp", "cp949.png", "empty.png", "utf16.png"]
    captions = {"bom.txt": "\ufeffa house with a tiled roof\r\nat night\r\n", "empty.txt": " \r\n"}
    captions["cp949.txt"] = "기와집, a building with a roof".encode("cp949")
    fill(folder, names, captions | {"utf16.txt": PHRASE.encode("utf-16")})
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def counts(out):
    """The closing line as numbers: outcome -> photos."""
    line = out.strip().splitlines()[-1]
    pairs = re.findall(r"(\d+) ([A-Za-z ]+) \('", line)
    numbers = {what: int(n) for n, what in pairs}
    assert int(re.search(r"(\d+) photos in", line)[1]) == sum(numbers.values()), line
    return numbers


def test_an_odd_folder(tmp_path, run, blip):
    folder = odd_folder(tmp_path / "내 사진 folder")
    before = files(folder)
    code, out, _ = run(folder, blip=blip)
    assert code == 0
    after = files(folder)
    # nothing that was there has changed
    assert before.items() - {("empty.txt", before["empty.txt"])} <= after.items()
    assert after.keys() - before.keys() == {"기와집 1.txt", "b c.txt", "a.txt"}
    for name in ("기와집 1.txt", "b c.txt", "a.txt", "empty.txt"):
        text, note = read_caption(folder / name)
        assert len(text.split()) > 3 and note == "" and after[name] == f"{text}\n".encode()
    got = counts(out)
    assert got.pop("captioned", 0) + got.pop("looped and captioned again", 0) == 4
    one = ("unreadable", "with an unreadable caption", "sharing the caption of one before")
    assert got == {"captioned before": 2, **dict.fromkeys(one, 1)}
    for words in (
        "skipped: 'broken.jpg' cannot be read", "sharing the caption of one before ('a.png')",
        "note: 1 captions in cp949 instead of UTF-8 ('cp949.txt')",
        "left alone: 'utf16.txt' is neither UTF-8 nor cp949",
    ):  # fmt: skip
        assert words in out
    for name in ("기와집 1.jpg", "a.png", "bom.webp", "cp949.png"):  # and training reads them
        text = read_caption((folder / name).with_suffix(".txt"))[0]
        assert load_photo(folder / name, [(8, 8)]).caption == text != ""


def test_the_caption_is_of_its_photo(tmp_path, run, blip):
    names = [f"{i}.png" for i in range(12)]
    fill(tmp_path, names)
    assert run(tmp_path, "--batch-size", 5, blip=blip)[0] == 0
    ours = open_tiny(blip)
    for name, image in zip(names, plain(12)):
        expected = next(iter(ours.captions({0: ours.pixels(image)})))[1]
        assert read_caption(tmp_path / name.replace("png", "txt"))[0] == expected
    assert len(set(texts(tmp_path).values())) > 8


def test_again_finds_nothing_to_do_and_opens_no_model(tmp_path, run, blip):
    fill(tmp_path, ["a.png", "b.png"])
    (tmp_path / "broken.jpg").write_bytes(b"")
    assert run(tmp_path, blip=blip)[0] == 0
    before = files(tmp_path)
    code, out, _ = run(tmp_path)  # where there is no model
    assert code == 0 and files(tmp_path) == before and counts(out) == {"captioned before": 2, "unreadable": 1}


def test_overwrite(tmp_path, run, blip):
    fill(tmp_path, ["a.png", "b.png"], {"a.txt": "mine", "b.txt": PHRASE.encode("utf-16")})
    code, out, _ = run(tmp_path, "--overwrite", blip=blip)
    assert code == 0 and "captioned before" not in out and len(texts(tmp_path)) == 2
    assert all("mine" not in t and len(t.split()) > 3 for t in texts(tmp_path).values())


def test_one_replace_for_captions_and_training():
    """A phrase, and the word after it or in --token; the folder before or after it."""
    argvs = (
        "photos --replace P W|--replace P W photos|photos --replace P --token W|photos --replace P W --exact"
    )
    for argv in argvs.split("|"):
        args = caption.options().parse_args(argv.split())
        assert (args.folder, args.replace, args.token) == (Path("photos"), "P", "W")
    parser = train_ti.options()
    for argv in ("--replace P W", "--replace P --token W", "--token W --replace P W"):
        args, given = parser.parse(argv.split()), parser.given(argv.split())
        assert (args.replace, args.token) == ("P", "W") and given == {"replace": "P", "token": "W"}
    assert parser.parse(["--replace", "P"]).token == caption.options().parse_args(["photos"]).token == "*"


@pytest.mark.parametrize("args", [(), ("--replace", PHRASE, "*"), ("--overwrite",)])
def test_dry_run(tmp_path, run, args):
    folder = odd_folder(tmp_path / "photos")
    before = files(folder)
    code, out, _ = run(folder, "--dry-run", *args)  # where there is no model
    assert code == 0 and files(folder) == before and "dry run, nothing written" in out
    assert counts(out)["to be captioned"] == (7 if "--overwrite" in args else 4)
    assert counts(out)["unreadable"] == 1
    if "--replace" in args:
        assert "1 x 'a house with a tiled roof' is to become '*'" in out
        assert "2 captions to be replaced" in out


def test_interrupted_and_resumed_is_undisturbed(tmp_path, run, blip, monkeypatch):
    names = [f"{i} 집.png" for i in range(10)]
    whole, cut = fill(tmp_path / "whole", names), fill(tmp_path / "cut", names)
    args = ("--batch-size", 4, "--replace", "on", "*", "--exact")
    assert run(whole, *args, blip=blip)[0] == 0
    captions, calls = caption.Blip.captions, []

    def interrupted(self, pixels):
        calls.append(pixels)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return captions(self, pixels)

    monkeypatch.setattr(caption.Blip, "captions", interrupted)
    code, out, err = run(cut, *args, blip=blip)
    assert code == 130 and "stopped" in err and counts(out)["not reached yet"] == 6
    assert len(texts(cut)) == 4 and not list(cut.glob("*.part"))
    assert run(cut, *args, blip=blip)[0] == 0
    assert [len(c) for c in calls] == [4, 4, 4, 2]  # the first four were not asked for again
    assert files(cut) == files(whole) and any("*" in t for t in texts(cut).values())


def test_a_caption_is_whole_or_not_there(tmp_path, run, blip, monkeypatch):
    fill(tmp_path, ["a.png"], {"a.txt": "mine"})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run(tmp_path, "--overwrite", blip=blip)
    assert code == 2 and "No space left" in err and texts(tmp_path) == {"a.txt": "mine"}


def test_nothing_said_is_not_written(tmp_path, run, blip, monkeypatch):
    fill(tmp_path, ["a.png"])
    monkeypatch.setattr(caption.Blip, "generate", lambda self, pixels, **how: [""] * len(pixels))
    code, out, _ = run(tmp_path, blip=blip)
    assert code == 0 and texts(tmp_path) == {} and counts(out) == {"about which BLIP said nothing": 1}


# ----------------------------------------------------------------------------------------- pseudo word


CAPTIONS = {
    "1.txt": f"{PHRASE} in the snow", "2.txt": "a house with a tiled roof",
    "3.txt": "기와집, A building with a roof".encode("cp949"),
    "4.txt": "\ufeffa tree\r\nin the rain\r\n", "5.txt": f"* and {PHRASE}\n",
}  # fmt: skip


def test_replace_needs_no_model_and_reports(tmp_path, run):
    fill(tmp_path, [f"{i}.png" for i in range(1, 6)], CAPTIONS)
    before = files(tmp_path)
    code, out, _ = run(tmp_path, "--replace", PHRASE, "*")
    assert code == 0
    after = files(tmp_path)
    assert [after[f"{i}.txt"] for i in (1, 2)] == [b"* in the snow\n", b"*\n"]
    assert after["3.txt"] == "기와집, *\n".encode()  # in UTF-8 now
    assert all(after[name] == before[name] for name in ("4.txt", "5.txt", "1.png"))
    for words in (
        "2 x 'a building with a roof' became '*'", "1 x 'a house with a tiled roof' became '*'",
        "not matched: '4.txt', 'a tree in the rain'", "3 captions replaced; 1 had '*' already; 1 not matched",
    ):  # fmt: skip
        assert words in out
    code, out, _ = run(tmp_path, "--replace", PHRASE, "*")  # again
    assert code == 0 and files(tmp_path) == after
    assert "0 captions replaced; 4 had '*' already; 1 not matched" in out


def test_a_word_that_holds_the_phrase_goes_in_once(tmp_path, run):
    fill(tmp_path, ["a.png"], {"a.txt": "a building at night"})
    for _ in range(2):
        assert run(tmp_path, "--replace", "building", r"sks building \1")[0] == 0
        assert texts(tmp_path) == {"a.txt": "a sks building \\1 at night\n"}


def test_exact_replacing_is_what_training_does(tmp_path, run):
    names = [f"{i}.png" for i in range(1, 5)]
    fill(tmp_path, names, CAPTIONS)
    photos = [Photo(n, None, read_caption(tmp_path / n.replace("png", "txt"))[0], "") for n in names]
    expected = prepare_captions(photos, "*", PHRASE, "", lambda _: None)
    code, out, _ = run(tmp_path, "--replace", PHRASE, "*", "--exact")
    assert code == 0 and "2 captions replaced; 0 had '*' already; 2 not matched" in out
    assert [read_caption(tmp_path / n.replace("png", "txt"))[0] for n in names] == expected
    again = [Photo(n, None, text, "") for n, text in zip(names, expected)]
    # and training takes them as they are
    assert prepare_captions(again, "*", PHRASE, "", lambda _: None) == expected


def test_captions_just_made_are_replaced_too(tmp_path, run, blip):
    fill(tmp_path, [f"{i}.png" for i in range(8)], {"0.txt": "a man with a hat"})
    code, out, _ = run(tmp_path, "--replace", "man", "sks", blip=blip)
    replaced = [t for t in texts(tmp_path).values() if contains_word(t, "sks")]
    assert code == 0 and texts(tmp_path)["0.txt"] == "a sks with a hat\n" and 2 < len(replaced) <= 8
    assert f"{len(replaced)} captions replaced" in out and not any(contains_word(t, "man") for t in replaced)


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("args,message", [
    (("--beams", "0"), "--beams is 0"),
    (("--min-length", "-1"), "--min-length is -1, but must be 0 or more"),
    (("--max-length", "4"), "--max-length is 4, but must be 8 or more"),
    (("--replace", " ", "*"), "needs a phrase and a word"),
    (("--replace", "a castle", "*", "--exact"), "no caption contains 'a castle', for example 'a tree'"),
])  # fmt: skip
def test_mistakes_change_nothing(tmp_path, run, args, message):
    """More: robustness/test_mistakes.py."""
    before = files(fill(tmp_path, ["a.png"], {"a.txt": "a tree"}))
    code, _, err = run(tmp_path, *args)
    assert code == 2 and message in err and err.count("\n") == 1 and files(tmp_path) == before


@pytest.mark.parametrize("args,message", [
    (("--blip", "/nowhere/blip"), "--blip /nowhere/blip: no such folder"),
    (("--blip", __file__), "not a folder; give one"),
    (("--blip", "nobody/nothing"), "nor a model from the hub .*; name a folder .*, or go online once"),
    (("--device", "warp"), 'device "warp" cannot be used'),
    (("--dtype", "fp64"), 'dtype "fp64" is not known'),
    (("--max-length", "65"), "--max-length 65 is more than the 64 tokens"),
])  # fmt: skip
def test_models_that_cannot_be_opened(tmp_path, run, blip, args, message):
    before = files(fill(tmp_path, ["a.png"]))
    code, out, err = run(tmp_path, *args, blip=blip)
    assert code == 2 and re.search(message, err) and err.count("\n") == 1
    assert files(tmp_path) == before and counts(out) == {"not reached yet": 1}


def no_tokenizer(folder):
    for f in ("vocab.txt", "tokenizer.json"):
        (folder / f).unlink()


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:3000])


def wrong_tensor(folder, shape=None):
    tensors = load_file(folder / "model.safetensors")
    del tensors["vision_model.post_layernorm.weight"]
    if shape:
        tensors["vision_model.post_layernorm.weight"] = torch.ones(shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def larger_vocabulary(folder):
    no_tokenizer(folder)
    (folder / "vocab.txt").write_text("\n".join([*WORDS, "one", "two", "three"]) + "\n")


@pytest.mark.parametrize("damage,message", [
    (lambda folder: (folder / "config.json").unlink(), "cannot be opened .*config.json is missing"),
    (no_tokenizer, "the tokenizer of .* does not fit it"),
    (cut_weights, "the folder cannot be opened"),
    (wrong_tensor, "is not a whole BLIP model: 1 tensors .* such as vision_model.post_layernorm.weight"),
    (lambda folder: wrong_tensor(folder, 31), "1 tensors .* such as vision_model.post_layernorm.weight"),
    (larger_vocabulary, "the tokenizer of .* does not fit it: it has 30 tokens"),
])  # fmt: skip
def test_damaged_models(tmp_path, run, blip, damage, message):
    copy = shutil.copytree(blip, tmp_path / "model")
    damage(copy)
    photos = fill(tmp_path / "photos", ["a.png"])
    code, _, err = run(photos, blip=copy)
    assert code == 2 and re.search(message, err) and err.count("\n") == 1 and texts(photos) == {}


def test_another_kind_of_model(tmp_path, run):
    photos = fill(tmp_path, ["a.png"])
    code, _, err = run(photos, blip=Path(caption.__file__).parent / "tiny" / "clip")
    assert code == 2 and "is not a whole BLIP model" in err and err.count("\n") == 1


def test_hundreds_of_photos(tmp_path, run, blip):
    fill(tmp_path, [f"{i:04}.bmp" for i in range(200)])
    start = time.perf_counter()
    code, out, _ = run(tmp_path, "--batch-size", 50, blip=blip)
    assert code == 0 and len(texts(tmp_path)) == 200 and time.perf_counter() - start < 60
    got = counts(out)
    assert got.keys() == {"captioned", "looped and captioned again"} and sum(got.values()) == 200
