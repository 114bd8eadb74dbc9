"""Textual inversion files: .safetensors and the WebUI's .pt."""

import base64
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from hanokdiff.files import parse_json
from hanokdiff.formats.tensors import read_pt, read_safetensors, write_pt, write_tensors
from hanokdiff.formats.validate import all_finite, whole_number
from hanokdiff.methods import textual_inversion
from hanokdiff.models.tokens import MOST_VECTORS


def save_file(path: Path, word: str, vectors: Tensor, metadata: dict | None = None) -> None:
    """vectors (n, D) as diffusers' .safetensors or, by its ending, the WebUI's .pt, named by the word."""
    vectors = vectors.detach().float().cpu().contiguous()
    metadata = metadata or {}
    if not torch.isfinite(vectors).all():
        raise ValueError(f"{path} was not written: the vectors are not finite; lower the learning rate")
    if path.suffix == ".safetensors":
        write_tensors({word: vectors}, path, {k: str(v) for k, v in metadata.items()})
    elif path.suffix == ".pt":
        content = {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": vectors},
            "name": word,
            "step": whole_number(metadata.get("step")),
            "sd_checkpoint": None,
            "sd_checkpoint_name": str(metadata["model"]) if "model" in metadata else None,
        }
        write_pt(content, path)
    else:
        raise ValueError(f"{path}: an embedding's file ends in .safetensors or .pt, not {path.suffix!r}")


def read_file(path: Path) -> tuple[str, Tensor, dict]:
    """An embedding of any known layout: (word, vectors (n, D) float32, metadata). Where no word is in the
    file (kohya's, the paper's), it is the file's name; the WebUI goes by that even where there is one."""
    path, metadata = Path(path), {}
    if path.suffix.lower() in (".png", ".webp"):
        content = from_picture(path)
    elif path.suffix == ".safetensors":
        content, metadata = read_safetensors(path, "embedding")
    else:
        with torch.serialization.safe_globals([nn.ParameterDict]):  # in the paper's own files
            content = read_pt(path, "embedding")
    word, vectors = find_vectors(content, path)
    return word, check_vectors({word: vectors}, word, path), metadata


def from_picture(path: Path) -> dict:
    """The table in the WebUI's PNG of an embedding: its text sd-ti-embedding is JSON in base64."""
    if not path.is_file():
        raise ValueError(f"no embedding file at {path}")
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get("sd-ti-embedding")
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    if not isinstance(text, str):
        lost = "if it was stored in the pixels, or a website took the text away"
        without = f"{path} is a picture without an embedding in its text (sd-ti-embedding)"
        raise ValueError(f"{without}; {lost}, get the embedding's .pt or .safetensors")
    try:
        content = parse_json(base64.b64decode(text), path)
        param = {k: torch.tensor(v["TORCHTENSOR"]) for k, v in content["string_to_param"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as e:
        raise ValueError(f"{path}: the embedding in its text is damaged ({e!r}); fetch it again") from None
    return {"string_to_param": param, "name": content.get("name")}


def check_vectors(tensors: dict[str, Tensor], word: str, path: Path) -> Tensor:
    """The vectors (n, D) float32 of a word, from the one tensor in its file or in its part of a file."""
    vectors = find_vectors(tensors, path)[1]
    if vectors.dim() == 1:
        vectors = vectors[None]
    good = vectors.dim() == 2 and vectors.is_floating_point() and vectors.numel()
    if not (good and 0 < len(vectors) <= MOST_VECTORS):
        shape = f"{vectors.dtype} of shape {tuple(vectors.shape)}"
        raise ValueError(f"{path}: {word} is {shape}; an embedding has 1 to {MOST_VECTORS} vectors (n, D)")
    if not all_finite(vectors):
        raise ValueError(f"{path} has a value that is not finite; take an earlier file of that training")
    return vectors.detach().float()


def find_vectors(content, path: Path) -> tuple[str, Tensor]:
    """The one tensor in a file's content, and its word."""
    content = content if isinstance(content, dict) else {}
    param = content.get("string_to_param")
    if isinstance(param, dict | nn.Module):
        # the paper's own code saved an nn.ParameterDict
        tensors = param if isinstance(param, dict) else vars(param).get("_parameters")
        tensors = tensors if isinstance(tensors, dict) else {}
        if len(tensors) == 1:
            name = content.get("name")
            word = name if isinstance(name, str) and name else path.stem
            tensors = {word: next(iter(tensors.values()))}
    else:
        tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
        if "emb_params" in tensors:  # kohya
            tensors = {path.stem: tensors["emb_params"]}
    if {"clip_l", "clip_g"} & tensors.keys():
        raise ValueError(f"{path} is an embedding for SDXL (it holds clip_l, clip_g), which is not supported")
    if len(tensors) != 1 or not isinstance(next(iter(tensors.values())), Tensor):
        one = f"one tensor is expected, {len(tensors)} found"
        raise ValueError(f"{path} is not a textual inversion embedding: {one}")
    return next((str(k), v) for k, v in tensors.items())


def apply_file(sd, path: Path, word: str | None = None, log=print) -> tuple:
    """Add a file's word to the model, by the name in it or another."""
    own, vectors, _ = read_file(path)
    word = word or own
    embedding = apply(sd, path, word, vectors)
    if log:
        log(f'embedding {path}: "{word}", {len(vectors)} vector{"s" * (len(vectors) > 1)}')
    return word, embedding


def apply(sd, path: Path, word: str, vectors: Tensor) -> textual_inversion.ExtendedEmbedding:
    """Add a word with these vectors, which a file holds, to the model."""
    width = textual_inversion.token_embedding(sd).shape[1]
    if vectors.shape[1] != width:
        made = {768: "SD 1.x", 1024: "SD 2.x"}.get(vectors.shape[1], "another architecture")
        given = f"vectors of width {vectors.shape[1]} ({made})"
        raise ValueError(f"{path}: {given}, but {sd.name}'s words have {width}")
    try:
        return textual_inversion.insert(sd, word, vectors)
    except ValueError as e:  # a word that cannot be: no token, control characters
        raise ValueError(f"{path}: {e}") from None
