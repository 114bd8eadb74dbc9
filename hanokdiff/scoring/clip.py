"""Scores by CLIP: how well a picture fits a text, what it is recognised as, what it resembles.

    CLIP-T     cosine of a picture and a text, on three published scales (Hessel et al. 2021, CLIPScore)
    CLIP-I     mean cosine of a picture and reference pictures; the nearest of them; RefCLIPScore of both
    presence   which of several texts fits a picture best (Radford et al. 2021, zero-shot)

Shapes:  N pictures, M texts or references, d the width of CLIP's common space. Embeddings have length 1.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hanokdiff.device import to_device
from hanokdiff.files import read_json
from hanokdiff.pretrained import open_pretrained

TINY_CLIP = Path(__file__).parents[1] / "tiny" / "clip"  # of the drawn world
WHOLE = "a whole CLIP model (config.json, model.safetensors, vocab.json, merges.txt)"
EXAMPLE = "openai/clip-vit-base-patch32"  # what CLIPScore is published with
BATCH = 64  # pictures or texts that go through the model at once
MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, of all its CLIPs
STD = (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A CLIP model: the embedded one, a folder (config.json, weights, vocab.json, merges.txt) or a hub id."""

    def __init__(self, model: str | Path = TINY_CLIP, device: str = "cpu"):
        self.name, self.device = str(model), open_device(device)
        self.model, self.tokenizer, (self.mean, self.std) = open_model(model)
        self.model = self.model.float().eval().requires_grad_(False).to(self.device)
        self.size = self.model.config.vision_config.image_size  # pixels per side
        self.length = self.model.config.text_config.max_position_embeddings  # tokens, start and end included

    @torch.inference_mode()
    def images(self, images: Iterable[Image.Image]) -> Tensor:
        """(N, d) of N pictures of any size. A generator is fine: no more than a batch is held at a time."""
        images, embeddings = iter(images), [torch.empty(0, self.model.config.projection_dim)]
        while batch := list(islice(images, BATCH)):
            pixels = torch.stack([preprocess(i, self.size, self.mean, self.std) for i in batch])
            pixels = to_device(pixels, self.device)  # (B, 3, s, s)
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            embeddings.append(F.normalize(self.model.visual_projection(pooled), dim=-1).cpu())
        return torch.cat(embeddings)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(M, d) of M texts. Too long a text is cut, as CLIPScore does (truncate=True), with a warning."""
        ids = [self.tokenizer(t).input_ids for t in texts]  # ragged: start, words, end
        long = [(len(i), t) for i, t in zip(ids, texts, strict=True) if len(i) > self.length]
        if long:
            n, text = max(long)
            few = f"the {self.length} tokens that this CLIP reads"
            longest = f'the longest has {n}: "{text[:40]}..."'
            message = f"{len(long)} of {len(ids)} texts are longer than {few} ({longest})"
            warnings.warn(f"{message}; the rest is not scored: say it in fewer words", stacklevel=2)
        ids = [i if len(i) <= self.length else i[: self.length - 1] + i[-1:] for i in ids]
        batches = [self._texts(ids[i : i + BATCH]) for i in range(0, len(ids), BATCH)]
        return torch.cat([torch.empty(0, self.model.config.projection_dim), *batches])

    def _texts(self, ids: list[list[int]]) -> Tensor:
        ends = to_device(torch.tensor([len(i) - 1 for i in ids]), self.device)  # (B,)
        longest = max(map(len, ids))
        padded = torch.tensor([i + i[-1:] * (longest - len(i)) for i in ids])  # (B, L)
        padded = to_device(padded, self.device)
        states = self.model.text_model(input_ids=padded).last_hidden_state  # (B, L, width)
        # Pooled at the end token by position: transformers guesses it from an id in the config, which goes
        # wrong with a small vocabulary. Attention looks back only, so the padding behind it has no effect.
        pooled = states[torch.arange(len(ids), device=ends.device), ends]  # (B, width)
        return F.normalize(self.model.text_projection(pooled), dim=-1).cpu()


def preprocess(image: Image.Image, size: int, mean: Sequence = MEAN, std: Sequence = STD) -> Tensor:
    """(3, size, size) as OpenAI's CLIP makes it: short side to size, Pillow's bicubic, then the centre."""
    image = image.convert("RGB")
    w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    left, top = round((w - size) / 2), round((h - size) / 2)  # rounds a half to even, as torchvision does
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return torch.from_numpy((pixels - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)


def open_device(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as e:  # unknown name or no driver; not built in
        reason = str(e).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"device {device} cannot be used here ({reason}); use cpu") from None


def open_model(model: str | Path):
    """(CLIPModel, tokenizer, (mean, std)). A folder that exists comes first, then the hub."""
    how = dict(option="--clip", whole=WHOLE, example=EXAMPLE)
    clip, tokenizer = open_pretrained(model, "CLIPModel", "CLIPTokenizer", **how)
    words, vectors = len(tokenizer), clip.config.text_config.vocab_size
    if words > vectors:
        more = f"its tokenizer knows {words} words, its model {vectors}"
        raise ValueError(f"{model}: {more}; give files that belong together")
    return clip, tokenizer, mean_std(str(Path(model).expanduser()))


def mean_std(source: str) -> tuple[tuple, tuple]:
    """Of the pixels, from preprocessor_config.json where the model has one, else OpenAI's."""
    from transformers.utils import cached_file

    try:
        config = read_json(Path(cached_file(source, "preprocessor_config.json")))
    except OSError:
        return MEAN, STD
    values = config.get("image_mean", MEAN), config.get("image_std", STD)
    try:
        mean, std = (tuple(map(float, v)) for v in values)
    except (OverflowError, TypeError, ValueError):
        mean, std = (), ()
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0):
        raise ValueError(
            f"{source}: preprocessor_config.json has image_mean and image_std of {str(values)[:80]}"
        )
    return mean, std


@dataclass(frozen=True)
class Scale:
    """One way to publish a cosine: what is put before the text, and what is made of the cosine (N,)."""

    prefix: str
    of: Callable[[Tensor], Tensor]
    formula: str


SCALES = {
    "cosine": Scale("", lambda c: c, "cos(picture, text), nothing added"),
    "clipscore": Scale(
        "A photo depicts ", lambda c: 2.5 * c.clamp(min=0),
        '2.5 * max(cos, 0), text prefixed with "A photo depicts " (Hessel et al. 2021, jmhessel/clipscore)',
    ),
    "x100": Scale(  # torchmetrics takes the max after the mean; the same unless some cosine is negative
        "", lambda c: 100 * c.clamp(min=0), "100 * max(cos, 0), no prefix (torchmetrics)",
    ),
}  # fmt: skip


LIKENESS = {  # to reference pictures
    "clip_i": "mean over the references of cos(picture, reference); a picture is no reference of itself",
    "nearest": "largest of cos(picture, reference): 1 is a copy",
    "refclipscore": "2ab / (a + b), a = clipscore, b = max(nearest, 0) (Hessel et al. 2021, whose "
    "references are captions)",
}


def clip_t(images: Tensor, texts: Tensor) -> Tensor:
    """(N,) cosines of picture i (N, d) with text i (N, d), or with the one text (1, d)."""
    return (images * texts).sum(-1)


def scores(clip: Clip, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
    """Of each scale (N,) values: picture i of `images` (N, d) with texts[i]. Each text is read once."""
    unique = list(dict.fromkeys(texts))
    index = torch.tensor([unique.index(t) for t in texts])  # (N,)
    prefixes = dict.fromkeys(s.prefix for s in SCALES.values())
    embedded = {p: clip.texts([p + t for t in unique])[index] for p in prefixes}  # (N, d)
    return {name: s.of(clip_t(images, embedded[s.prefix])) for name, s in SCALES.items()}


def presence(images: Tensor, choices: Tensor) -> Tensor:
    """(N,) "recognised as": for each picture (N, d) the index of the choice (M, d) that fits it best."""
    return (images @ choices.T).argmax(-1)


def nearest(a: Tensor, b: Tensor) -> Tensor:
    """(N,) cosines of each row of a (N, d) with the most similar row of b (M, d), e.g. training photos."""
    return (a @ b.T).amax(-1)


def likeness(images: Tensor, references: Tensor, clipscore: Tensor, same: Tensor | None = None) -> dict:
    """(N,) clip_i, nearest and refclipscore of pictures (N, d), and `which` of the references (M, d).

    `same` (N, M) is true where a reference is the picture itself, which is then left out: real pictures
    against one another are the ceiling of clip_i."""
    cosines = images @ references.T  # (N, M)
    same = torch.zeros_like(cosines, dtype=torch.bool) if same is None else same
    if same.all(-1).any():
        only = f"the only reference ({len(references)} given) is the picture itself"
        raise ValueError(f"{only}; give at least one other")
    near, which = cosines.masked_fill(same, -2).max(-1)
    mean = cosines.masked_fill(same, 0).sum(-1) / (~same).sum(-1)
    return {"clip_i": mean, "nearest": near, "refclipscore": refclipscore(clipscore, near), "which": which}


def refclipscore(clipscore: Tensor, nearest: Tensor) -> Tensor:
    """(N,) harmonic mean of the two. The paper scores a caption of a picture against other captions; here a
    picture of a text is scored against other pictures. Only the first of the two is times 2.5, as there."""
    b = nearest.clamp(min=0)
    return 2 * clipscore * b / (clipscore + b).clamp(min=1e-12)
