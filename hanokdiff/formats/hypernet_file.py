"""Hypernetwork files: the WebUI's .pt."""

from pathlib import Path

import torch
from torch import Tensor

from hanokdiff.formats import embedding_file
from hanokdiff.formats.folder import ERRORS
from hanokdiff.formats.tensors import read_pt, write_pt
from hanokdiff.formats.validate import all_finite, whole_number
from hanokdiff.methods import hypernetwork
from hanokdiff.methods.inject import base_layer

WIDEST = 16_384  # the widest context that is believed
TOKEN = "hanokdiff_token="  # what stands before the pseudo word in a file's optional_info
WORDS = "hanokdiff_words"  # {word: vectors} that were trained beside the networks; the WebUI passes over it


def save_file(path: Path, spec: hypernetwork.HypernetConfig, nets: dict, metadata=None, words=None) -> None:
    """The WebUI's .pt: {width: (state dict of keys, of values), ...} and its settings. metadata: "step",
    "name", "info" (our pseudo word is kept there). words: vectors (n, D) that were trained beside the
    networks; they are for us, other tools read an embedding file."""
    metadata, dropout = metadata or {}, list(spec.dropout or (0.0,) * len(spec.layers))
    content: dict = {}
    for d, pair in sorted(nets.items()):
        if bad := [k for tensors in pair for k, t in tensors.items() if not torch.isfinite(t).all()]:
            raise ValueError(f"{path} was not written: {bad[0]} of width {d} is not finite; lower the rate")
        content[d] = tuple({k: t.detach().float().cpu().contiguous() for k, t in s.items()} for s in pair)
    if words:
        content[WORDS] = {w: embedding_file.check_vectors({w: v.cpu()}, w, path) for w, v in words.items()}
    content |= {
        "step": whole_number(metadata.get("step")),
        "name": str(metadata.get("name", path.stem)),
        "layer_structure": [int(x) if x == int(x) else float(x) for x in spec.layers],
        "activation_func": spec.activation,
        "is_layer_norm": spec.layer_norm,
        "weight_initialization": spec.weight_init,
        "sd_checkpoint": None,
        "sd_checkpoint_name": str(metadata["model"]) if "model" in metadata else None,
        "activate_output": spec.activate_output,
        "use_dropout": any(dropout),
        "dropout_structure": dropout,
        "last_layer_dropout": dropout[-2] != 0,
        "optional_info": metadata.get("info"),
    }
    write_pt(content, path)


def read_file(path: Path) -> tuple[hypernetwork.HypernetConfig, dict[int, tuple[dict, dict]], dict]:
    """A WebUI hypernetwork, the oldest kinds included: (spec, {width: (keys, values)}, the other entries)."""
    path = Path(path)
    content = read_pt(path, "hypernetwork")
    nets = {k: v for k, v in content.items() if isinstance(k, int)} if isinstance(content, dict) else {}
    if not nets or not all(0 < d <= WIDEST and is_pair(v) for d, v in nets.items()):
        none = "it has no pairs of networks under whole numbers (such as 768)"
        raise ValueError(f"{path} is not a hypernetwork: {none}")
    try:
        layers = tuple(content.get("layer_structure") or (1, 2, 1))
        dropout = content.get("dropout_structure")
        if dropout is None and content.get("use_dropout"):  # files from before it was written down
            last = 0.3 if content.get("last_layer_dropout") else 0.0
            dropout = [0.0] + [0.3] * (len(layers) - 3) + [last, 0.0]
        activation, initial = content.get("activation_func"), content.get("weight_initialization")
        norm, output = bool(content.get("is_layer_norm")), bool(content.get("activate_output", True))
        rest = (norm, tuple(dropout or ()), output, str(initial or "Normal"))
        spec = hypernetwork.HypernetConfig(layers, activation or "linear", *rest)
    except ERRORS as e:
        raise ValueError(f"{path} describes no network that is known here: {e}") from None

    def today(name: str) -> str:
        head, dot, rest = name.partition(".")
        return {"linear1": "linear.0", "linear2": "linear.1"}.get(head, head) + dot + rest

    pairs = {d: tuple({today(k): t for k, t in s.items()} for s in pair) for d, pair in nets.items()}
    for d, pair in pairs.items():
        with torch.device("meta"):
            wanted = hypernetwork.ResidualMLP(d, spec).state_dict()
        for tensors in pair:
            shapes, right = ({k: tuple(t.shape) for k, t in s.items()} for s in (tensors, wanted))
            if shapes != right:
                odd, structure = sorted(shapes.items() ^ right.items())[0], " ".join(f"{x:g}" for x in layers)
                unfit = f"{path}: width {d} does not fit layers {structure} ({odd[0]} {odd[1]})"
                raise ValueError(f"{unfit}; the file is damaged or of another kind")
            if not all(t.is_floating_point() and all_finite(t) for t in tensors.values()):
                raise ValueError(f"{path}: width {d} has a value that is not finite; take an earlier file")
    return spec, pairs, {k: v for k, v in content.items() if not isinstance(k, int)}


def is_pair(held) -> bool:
    """Whether these are two state dicts."""
    if not (isinstance(held, list | tuple) and len(held) == 2 and all(isinstance(s, dict) for s in held)):
        return False
    return all(isinstance(k, str) and isinstance(t, Tensor) for s in held for k, t in s.items())


def pseudo_word(metadata: dict) -> str | None:
    """The pseudo word that a file of ours was trained with."""
    info = metadata.get("optional_info")
    return info.removeprefix(TOKEN) if isinstance(info, str) and info.startswith(TOKEN) else None


def read_words(path: Path, metadata: dict) -> dict[str, Tensor]:
    """The words that a file of ours holds, and their vectors (n, D)."""
    words = metadata.get(WORDS) or {}
    if not isinstance(words, dict) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path}: {WORDS} names no words; the file is damaged")
    return {word: embedding_file.check_vectors({word: v}, word, path) for word, v in words.items()}


def state(hypernet: hypernetwork.Hypernetwork) -> dict[int, tuple[dict, dict]]:
    """Its tensors as `save_file` takes them."""
    return {int(d): tuple(f.state_dict() for f in pair) for d, pair in hypernet.pairs.items()}


def apply_file(sd, path: Path, strength: float = 1.0, log=print) -> tuple[hypernetwork.Hypernetwork, dict]:
    """Apply a file to the model: every width in it must be the model's. Words in it become the model's."""
    spec, nets, metadata = read_file(path)
    words = read_words(path, metadata)
    known = hypernetwork.dims(sd)["all"]
    if strange := [d for d in nets if d not in known]:
        made = {768: "SD 1.x", 1024: "SD 2.x"}.get(max(strange), "another architecture")
        own = f"{sd.name} attends to widths {', '.join(map(str, known))}"
        raise ValueError(f"{path} rewrites width {strange[0]} ({made}), but {own}")
    for word, vectors in words.items():
        embedding_file.apply(sd, path, word, vectors)
    hypernet = hypernetwork.Hypernetwork(spec, nets, strength)
    for d, pair in nets.items():
        for f, tensors in zip(hypernet.pairs[str(d)], pair, strict=True):
            f.load_state_dict(tensors)
    hypernetwork.insert(sd, hypernet.requires_grad_(False).eval())
    if log:
        layers = [sd.unet.get_submodule(path) for path, *_ in hypernetwork.kv_layers(sd)]
        count = sum(base_layer(layer).in_features in nets for layer in layers)
        bundled = f', and "{", ".join(words)}"' if words else ""
        widths = ", ".join(map(str, sorted(nets)))
        where = f"before {count} keys and values{bundled}"
        log(f"hypernetwork {path}: widths {widths}, {where}, strength {strength:g}")
    return hypernet, metadata
