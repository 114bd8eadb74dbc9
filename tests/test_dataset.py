"""Photos as people really have them. Every odd file is made here, in tmp_path."""

import os
import re
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from hanokdiff.images import crop, read_photo
from hanokdiff.models.pipeline import to_tensor
from hanokdiff.models.tokens import contains_word as contains
from hanokdiff.models.vae import VAE, VAEConfig
from hanokdiff.tiny import world
from hanokdiff.training.dataset import LatentDataset, Photo, load_photos, prepare_captions, read_caption

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def quiet(_):
    pass


def near(a, b, by=6):
    return np.abs(np.subtract(a, b)).max() <= by


def two_halves(size=(40, 20)):
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def fill(folder, names, captions=None):
    for i, name in enumerate(names):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / name)
    for name, text in (captions or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be turned by 90 degrees clockwise
    path = tmp_path / f"a.{suffix}"
    two_halves().save(path, exif=exif)
    image, note = read_photo(path)
    assert image.size == (20, 40) and note == "rotated by EXIF"
    assert near(image.getpixel((10, 5)), RED) and near(image.getpixel((10, 35)), BLUE)  # left has become top


def test_upright_photo_is_left_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 1
    two_halves().save(tmp_path / "a.png", exif=exif)
    image, note = read_photo(tmp_path / "a.png")
    assert note == "" and image.tobytes() == two_halves().tobytes()


def test_garbage_below_transparency_becomes_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 255, 0, 0))
    image.paste((*RED, 255), (4, 0, 8, 8))
    image.putpixel((0, 0), (0, 0, 0, 128))
    image.save(tmp_path / "a.png")
    read, note = read_photo(tmp_path / "a.png")
    assert read.mode == "RGB" and "transparency" in note
    assert read.getpixel((2, 2)) == WHITE and read.getpixel((6, 2)) == RED
    assert near(read.getpixel((0, 0)), (127,) * 3, by=1)  # half black over white


def test_opaque_alpha_is_no_news(tmp_path):
    Image.new("RGBA", (8, 8), (*RED, 255)).save(tmp_path / "a.png")
    image, note = read_photo(tmp_path / "a.png")
    assert image.getpixel((0, 0)) == RED and note == ""


@pytest.mark.parametrize("mode,kept", [("LA", (90, 90, 90)), ("P", RED), ("RGB", RED), ("L", (90, 90, 90))])
def test_other_ways_to_be_transparent(tmp_path, mode, kept):
    """Grey with alpha; and palette, RGB, grey with one colour declared transparent (PNG's tRNS)."""
    hole, solid = {"LA": ((0, 0), (90, 255)), "P": (0, 1), "RGB": (BLUE, RED), "L": (0, 90)}[mode]
    image = Image.new(mode, (8, 8), hole)
    if mode == "P":
        image.putpalette([*BLUE, *RED])
    image.paste(solid, (4, 0, 8, 8))
    image.save(tmp_path / "a.png", **({} if mode == "LA" else {"transparency": hole}))
    read, note = read_photo(tmp_path / "a.png")
    assert read.getpixel((2, 2)) == WHITE and read.getpixel((6, 2)) == kept and "transparency" in note


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_contrast(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    read = np.asarray(read_photo(tmp_path / f"a.{suffix}")[0])
    assert read.shape == (64, 64, 3) and near(read[..., 0].astype(float), ramp / 257, by=0.51)
    assert read[32, 0, 0] == 128  # mid grey stays mid


def test_16_bit_grey_that_is_transparent(tmp_path):
    grey = np.full((8, 8), 25700, np.uint16)
    grey[:4] = 300
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=300)
    read, _ = read_photo(tmp_path / "a.png")
    assert read.getpixel((2, 2)) == WHITE and read.getpixel((2, 6)) == (100, 100, 100)


def test_32_bit_grey(tmp_path):
    Image.fromarray(np.full((8, 8), 32896, np.int32)).save(tmp_path / "a.tif")
    assert read_photo(tmp_path / "a.tif")[0].getpixel((0, 0)) == (128, 128, 128)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="float.tif.*8 or 16 bits"):
        read_photo(tmp_path / "float.tif")


@pytest.mark.parametrize("mode,name", [("CMYK", "a.jpg"), ("CMYK", "a.tif"), ("1", "a.png"), ("L", "a.gif")])
def test_other_modes_become_rgb(tmp_path, mode, name):
    two_halves().convert(mode).save(tmp_path / name)
    read, note = read_photo(tmp_path / name)
    expected = two_halves().convert(mode).convert("RGB")
    assert read.mode == "RGB" and note == "" and near(read.getpixel((4, 4)), expected.getpixel((4, 4)))
    assert near(read.getpixel((36, 4)), expected.getpixel((36, 4)))


@pytest.mark.parametrize("content", [b"", b"not a picture at all", None])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_unreadable_is_named(tmp_path, content, suffix):
    path = tmp_path / f"broken.{suffix}"
    Image.effect_noise((200, 200), 50).save(path)
    truncate(path) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"'broken.{suffix}' cannot be read: .+"):
        read_photo(path)


def test_fit_crops_and_never_squashes():
    """A circle in the middle of a very tall picture stays a circle; red above and below is cropped away."""
    tall = Image.new("RGB", (200, 1000), RED)
    tall.paste(WHITE, (0, 400, 200, 600))
    ImageDraw.Draw(tall).ellipse((20, 420, 180, 580), fill=BLUE)
    for image in (crop(tall, (64, 64)), crop(tall.rotate(90, expand=True), (64, 64)), crop(tall, (400, 400))):
        pixels = np.asarray(image).astype(int)
        assert image.size in {(64, 64), (400, 400)}
        assert (pixels[..., 2] > 200).all()  # no red: blue and white both have a full blue channel
        inside = pixels[..., 0] < 128
        across, down = inside.any(0).sum(), inside.any(1).sum()
        assert across == down == pytest.approx(0.8 * image.width, abs=2)
        assert crop(image, image.size).tobytes() == image.tobytes()  # the right size is left alone


@pytest.mark.parametrize("raw,text,notes", [
    ("\ufeff기와집 in snow\r\n".encode(), "기와집 in snow", ""),
    ("기와집\n  in snow\n".encode(), "기와집 in snow", ""),
    ("기와집 in snow".encode("cp949"), "기와집 in snow", "cp949"),
    (b"\xef\xbb\xbf \n", "", ""),
    (b"", "", ""),
])  # fmt: skip
def test_read_caption(tmp_path, raw, text, notes):
    (tmp_path / "a.txt").write_bytes(raw)
    read, note = read_caption(tmp_path / "a.txt")
    assert read == text and (notes in note if notes else note == "")


def test_caption_in_no_known_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("기와집".encode("utf-16"))
    with pytest.raises(ValueError, match="'a.txt' is neither UTF-8 nor cp949"):
        read_caption(tmp_path / "a.txt")


def test_order_is_the_same_on_every_machine(tmp_path):
    """A constant: the order must not follow Python's hash seed, version or platform."""
    fill(tmp_path, [f"{i}.png" for i in range(6)])
    order = "".join(p.name[0] for p in load_photos(tmp_path, 8, None, log=quiet)[0])
    assert order == "021435"


def test_order_is_nested_and_independent_of_listing(tmp_path, monkeypatch):
    fill(tmp_path, [f"{i:02}.png" for i in range(20)])
    names = [p.name for p in load_photos(tmp_path, 8, None, log=quiet)[0]]
    assert len(names) == 20 and names != sorted(names)
    for n in (1, 5, 19):
        assert [p.name for p in load_photos(tmp_path, 8, n, log=quiet)[0]] == names[:n]
    listing = type(tmp_path).iterdir
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: sorted(listing(self), reverse=True))
    assert [p.name for p in load_photos(tmp_path, 8, None, log=quiet)[0]] == names
    assert names[:4] == ["03.png", "06.png", "02.png", "04.png"]  # whatever the hash seed or the platform
    fill(tmp_path, ["new.png"])  # and one more photo leaves the others in their order
    assert [p.name for p in load_photos(tmp_path, 8, None, log=quiet)[0] if p.name != "new.png"] == names


def test_korean_names_in_either_normal_form(tmp_path):
    orders = []
    for form in ("NFC", "NFD"):
        folder = tmp_path / form
        folder.mkdir()
        names = [unicodedata.normalize(form, f"한옥 {i}.jpg") for i in range(8)]
        said = []
        fill(folder, names, {names[0].replace("jpg", "txt"): "기와집"})
        photos = load_photos(folder, 32, None, log=said.append)[0]
        assert [p.caption for p in photos if p.name == names[0]] == ["기와집"]
        orders.append([unicodedata.normalize("NFC", p.name) for p in photos])
        assert "8 enlarged ('" in said[-1] and photos[0].name in said[-1]
    assert orders[0] == orders[1]


def test_what_is_a_photo(tmp_path):
    names = ["a.JPG", "b.jpeg", "c.Png", "d.webp", "e.bmp", "f.tif", "g.TIFF", "h.gif"]
    fill(tmp_path, [*names, ".hidden.png"])
    (tmp_path / "sub").mkdir()
    fill(tmp_path / "sub", ["deep.png"])
    (tmp_path / "notes.md").write_text("no photo")
    assert sorted(p.name for p in load_photos(tmp_path, 8, None, log=quiet)[0]) == names


def test_photos_come_with_captions_and_a_summary(tmp_path):
    fill(tmp_path, ["a.png", "b.png", "c.png"], {"a.txt": "a house", "b.txt": ""})
    Image.new("RGBA", (4, 30), (0, 0, 0, 0)).save(tmp_path / "c.png")
    said = []
    photos = {p.name: p for p in load_photos(str(tmp_path), 8, None, log=said.append)[0]}
    assert {n: p.caption for n, p in photos.items()} == {"a.png": "a house", "b.png": None, "c.png": None}
    assert all(p.image.size == (8, 8) and p.image.mode == "RGB" for p in photos.values())
    assert photos["a.png"].changed == ""
    assert photos["c.png"].changed == "transparency laid over white, enlarged"
    done = "1 transparency laid over white ('c.png'); 1 enlarged ('c.png')"
    assert said[-1:] == [f"3 photos from {tmp_path}, 1 with captions; {done}"]


def test_unreadable_photo_is_named_and_the_run_goes_on(tmp_path):
    fill(tmp_path, [f"{i}.png" for i in range(6)])
    order = [p.name for p in load_photos(tmp_path, 8, None, log=quiet)[0]]
    Image.effect_noise((200, 200), 50).save(tmp_path / order[1])
    truncate(tmp_path / order[1])
    said = []
    photos = load_photos(tmp_path, 8, 3, log=said.append)[0]
    assert [p.name for p in photos] == [order[0], order[2], order[3]]  # it does not count toward the three
    assert f"'{order[1]}'" in said[0] and said[-1].endswith("1 unreadable") and len(said) == 2


def test_held_out_photos_are_the_last_ones(tmp_path):
    """Never among those to learn from, the same for every number of these, unreadable files passed over."""
    for i in range(9):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    names = [p.name for p in load_photos(tmp_path, 8, None, log=quiet)[0]]
    (tmp_path / names[-1]).write_bytes(b"broken")
    for images, held_out in ((3, 2), (3, 5), (None, 2), (6, 2)):
        photos, validation_photos = load_photos(tmp_path, 8, images, held_out, quiet)
        assert [p.name for p in validation_photos] == names[-2 : -2 - held_out : -1]
        assert [p.name for p in photos] == names[: images or 8 - held_out]
    with pytest.raises(ValueError, match="--images 6 and --held-out 3, but .* has 8 readable photos"):
        load_photos(tmp_path, 8, 6, 3, quiet)
    photos, validation_photos = load_photos(world.photos, 64, 5, 30, quiet)
    pictures, held = ({p.image.tobytes() for p in of} for of in (photos, validation_photos))
    assert (len(photos), len(validation_photos)) == (5, 30) and not pictures & held


def test_captions_in_other_encodings(tmp_path):
    """cp949 is read with a notice; a photo whose caption cannot be read is left out."""
    fill(tmp_path, ["a.png", "b.png"])
    (tmp_path / "b.txt").write_bytes("눈 내린 기와집".encode("cp949"))
    (tmp_path / "a.txt").write_bytes("집".encode("utf-16"))
    said = []
    photos = load_photos(tmp_path, 8, None, log=said.append)[0]
    assert [(p.name, p.caption) for p in photos] == [("b.png", "눈 내린 기와집")]
    assert "'a.txt'" in said[0] and re.search("1 .*cp949.*'b.png'", said[-1])


def test_refusals(tmp_path):
    for name in ("empty", "bad", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"?")
    fill(tmp_path / "two", ["a.png", "b.png"])
    (tmp_path / "two" / "c.png").write_bytes(b"?")
    wrong = [("missing", None, "no such folder"), ("two/a.png", None, "not a folder")]
    wrong += [("empty", None, "no pictures"), ("bad", None, "0 readable photos .and 1 unreadable.; add ph")]
    wrong += [("two", 3, "--images 3, .* 2 readable .*1 unr"), ("two", 0, "--images 0"), ("two", -1, "s -1")]
    for folder, images, message in wrong:
        with pytest.raises(ValueError, match=message):
            load_photos(tmp_path / folder, 8, images, log=quiet)[0]


def test_embedded_photos():
    said = []
    photos = load_photos(world.photos, 64, None, log=said.append)[0]
    assert len(photos) == 50 and all(p.caption and p.image.size == (64, 64) for p in photos)
    assert "50" in said[-1] and len(load_photos(world.photos, 32, 3, log=quiet)[0]) == 3
    for n in (0, 101):
        with pytest.raises(ValueError, match=str(n)):
            load_photos(world.photos, 64, n, log=quiet)[0]


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="such names are Linux only")
def test_file_name_that_is_not_unicode(tmp_path):
    """What unzip makes of a Korean archive: bytes in cp949, which Python holds as surrogates."""
    name = os.fsdecode("한옥.png".encode("cp949"))
    fill(tmp_path, [name])
    said = []
    (photo,) = load_photos(tmp_path, 64, None, log=said.append)[0]
    said[-1].encode("utf-8")  # can be printed
    assert photo.name == name


def photos_with(*captions):
    return [Photo(f"{i}.png", Image.new("RGB", (8, 8)), caption, "") for i, caption in enumerate(captions)]


@pytest.mark.parametrize("text,word,there", [
    ("a photo of sks", "sks", True), ("she asks", "sks", False), ("sks's roof", "sks", True),
    ("sks2", "sks", False), ("_sks", "sks", False), ("*, fire", "*", True), ("a*b", "*", True),
    ("a <hanok>.", "<hanok>", True), ("hanok", "<hanok>", False), ("a.b", "a*b", False), ("", "*", False),
])  # fmt: skip
def test_contains(text, word, there):
    assert contains(text, word) is there


def test_replace_in_any_case_and_its_count():
    said = []
    first = "A Building with a Roof, and a building  with\na roof in snow"
    photos = photos_with(first, "a * at dusk", "a building with a roofs")
    prompts = prepare_captions(photos, "*", "a building with a roof", "a photo of {token}", said.append)
    assert prompts == ["*, and * in snow", "a * at dusk", "a building with a roofs"]
    assert "2 times, in 1 of 3 captions" in said[0]
    assert said[1].startswith("1 of 3 captions lack '*'") and "roofs" in said[1] and len(said) == 2


def test_token_and_phrase_are_literal():
    """Neither is a regular expression, nor a template."""
    photos = photos_with("a (big) house.", "a xbigx houseX")
    prompts = prepare_captions(photos, r"\1<h>", "(big) house.", "{token}", quiet)
    assert prompts == [r"a \1<h>", "a xbigx houseX"]
    for nothing in ("", "  "):
        assert prepare_captions(photos_with("a * here"), "*", nothing, "{token}", quiet) == ["a * here"]


def test_photos_without_caption_get_the_default():
    said = []
    photos = photos_with(None, "sks in rain", None)
    prompts = prepare_captions(photos, "sks", "x", "a {odd} photo of {token}", said.append)
    assert prompts == ["a {odd} photo of sks", "sks in rain", "a {odd} photo of sks"]
    assert any("2 of 3 photos have no caption" in line for line in said)


def test_captions_without_the_word_are_refused():
    with pytest.raises(ValueError, match="'she asks'.*--replace.*--token"):
        prepare_captions(photos_with("she asks", None), "sks", "a house", "a photo of {token}", quiet)
    with pytest.raises(ValueError, match="'a house'.*--caption"):
        prepare_captions(photos_with(None), "sks", "x", "a house", quiet)


class FixedBatch:
    """Stand-in for run.Batch: the same draws every time."""

    def __init__(self, index, flips):
        self.index, self.flips = index, torch.tensor(flips)

    def photos(self, n):
        assert max(self.index) < n
        return self.index

    def uniform(self, name):
        assert name == "flip"
        return self.flips

    def normal(self, shape, name):
        assert name == "latent"
        return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VAE(VAEConfig((8, 16), 1, 4, 4, 1.0, 32)).requires_grad_(False)


@pytest.fixture(scope="module")
def pictures():
    r = np.random.default_rng(0)
    return [Image.fromarray(r.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(6)]


def test_to_tensor():
    t = to_tensor(two_halves((4, 2)))
    assert t.shape == (3, 2, 4) and t.dtype == torch.float32
    assert t[:, 0, 0].tolist() == [1, -1, -1] and t[:, 1, 3].tolist() == [-1, -1, 1]


@pytest.mark.parametrize("flip", [False, True])
def test_shots_are_mean_plus_std_times_noise(vae, pictures, flip):
    """Six photos are more than one chunk; the photo and the mirroring of each slot are its own."""
    dataset = LatentDataset(vae, pictures, list("abcdef"), flip)
    batch = FixedBatch([5, 0, 5, 2], [0.1, 0.9, 0.5, 0.49])
    latents, prompts = dataset[batch]
    assert len(dataset) == 6 and prompts == ["f", "a", "f", "c"]
    mirrored = [flip, False, False, flip]
    seen = [ImageOps.mirror(pictures[i]) if m else pictures[i] for i, m in zip([5, 0, 5, 2], mirrored)]
    mean, std = vae.encode(torch.stack([to_tensor(image) for image in seen]))
    assert latents.shape == (4, 4, 16, 16) and latents.dtype == torch.float32
    torch.testing.assert_close(latents, mean + std * batch.normal(mean.shape, "latent"))


def test_shots_can_be_trained_on(vae, pictures):
    """Not inference tensors, and without the VAE's graph."""
    trainable = VAE(vae.config)
    latents, _ = LatentDataset(trainable, pictures, ["x"] * 6)[FixedBatch([0, 1], [0.0, 0.0])]
    assert not latents.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (latents * weight).sum().backward()
    assert weight.grad.isfinite()


def test_shots_of_a_bf16_vae_are_float32(vae, pictures):
    half = VAE(vae.config).to(torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    coarse, fine = LatentDataset(half, pictures[:1], ["x"]), LatentDataset(vae, pictures[:1], ["x"])
    assert coarse.mean[0].dtype == coarse.std[0].dtype == torch.float32
    torch.testing.assert_close(coarse.mean[0], fine.mean[0], atol=0.1, rtol=0.1)
