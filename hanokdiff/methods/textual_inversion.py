"""Textual inversion: a new word (Gal et al. 2022, arXiv:2208.01618).

    v* = argmin_v  E || eps - eps_theta(x_t, t, words(v)) ||^2          equation 2: only v (n, D) learns

The rows of v lie beyond the vocabulary in a parameter of their own; the token table itself is never touched, so no
other word can move.  Two file formats: diffusers' .safetensors {word: (n, D)}, and the WebUI's .pt.
"""

import contextlib
from pathlib import Path

import torch
from torch import Tensor, nn

from hanokdiff.formats import folder as checkpoint

MOST = 75  # vectors: what a chunk of a prompt has room for


class Rows(nn.Module):
    """A token table (or Rows around one) with n rows more, whose ids begin at `first`.

    hold_norm   keep each vector's first length whatever is learnt: one that grows drowns the other words"""

    def __init__(self, base: nn.Module, vectors: Tensor, first: int, hold_norm: bool = False):
        super().__init__()
        self.base, self.first, self.hold_norm = base, first, hold_norm
        self.rows = nn.Parameter(vectors.detach().float().clone())
        self.norms = self.rows.detach().norm(dim=1, keepdim=True)

    def vectors(self) -> Tensor:
        """What the words are now (n, D)."""
        return self.rows * (self.norms / self.rows.norm(dim=1, keepdim=True)) if self.hold_norm else self.rows

    def forward(self, ids: Tensor) -> Tensor:
        own = (ids >= self.first) & (ids < self.first + len(self.rows))
        x = self.base(ids.masked_fill(own, 0))                                  # (B, T, D)
        new = self.vectors().to(x.dtype)[(ids - self.first).clamp(0, len(self.rows) - 1)]
        return torch.where(own[..., None], new, x)


def table(sd) -> Tensor:
    """The model's own token table (vocabulary, D), with all the digits that are known of it."""
    weight = innermost(sd.text.encoder.embeddings.token_embedding).weight
    return getattr(weight, "master", weight)


def innermost(embedding: nn.Module) -> nn.Module:
    return embedding.base if isinstance(embedding, Rows) else embedding


def insert(sd, word: str, vectors: Tensor) -> Rows:
    """Give a pseudo word rows of its own, vectors (n, D), beyond the vocabulary and all rows already there."""
    if not 0 < len(vectors) <= MOST:
        raise ValueError(f'"{word}" is of {len(vectors)} vectors, but a prompt has room for 1 to {MOST}')
    holder = sd.text.encoder.embeddings
    base, first = holder.token_embedding, len(table(sd))
    while isinstance(base, Rows):
        first, base = max(first, base.first + len(base.rows)), base.base
    sd.text.add_word(word, list(range(first, first + len(vectors))))
    holder.token_embedding = Rows(holder.token_embedding, vectors.to(sd.device), first)
    return holder.token_embedding


def remove(sd, word: str, rows: Rows) -> None:
    """Take a word out again; the model is what it was, to the bit."""
    holder, name = sd.text.encoder.embeddings, "token_embedding"
    while getattr(holder, name) is not rows:
        holder, name = getattr(holder, name), "base"
    setattr(holder, name, rows.base)
    if sd.text.words.get(word, [-1])[0] == rows.first:  # else another has the word by now
        del sd.text.words[word]
    sd.text._known.clear()


@contextlib.contextmanager
def folded(sd, rows: Rows, ids: list[int]):
    """For a while, the table of words without rows beyond it, theirs in the places `ids`: to save as a plain model."""
    embeddings, table_ = sd.text.encoder.embeddings, rows.base.weight
    exact = table_.master if hasattr(table_, "master") else table_  # what a file is written from
    changed = exact.detach().clone()
    changed[ids] = rows.vectors().detach().to(changed)
    rows.base.weight = nn.Parameter(changed, requires_grad=False)
    embeddings.token_embedding = rows.base
    try:
        yield
    finally:
        embeddings.token_embedding, rows.base.weight = rows, table_


def start(sd, words: str, n: int) -> Tensor:
    """n vectors (n, D) to begin with: the rows of these words' tokens, stretched over n as the WebUI does."""
    ids = sd.text._tokens(words)
    if not ids:
        raise ValueError(f'--init "{words}" has no token; give words that name the kind of thing, such as house')
    return table(sd)[[ids[i * len(ids) // n] for i in range(n)]].detach().float().clone()


# ------------------------------------------------------------------------------------------------------- the file


def write(path: Path, word: str, vectors: Tensor, metadata: dict | None = None) -> None:
    """vectors (n, D) as diffusers' .safetensors or, by the ending .pt, as the WebUI's. There, the word to write in a
    prompt is the file's name."""
    vectors = vectors.detach().float().cpu().contiguous()
    metadata = metadata or {}
    if not torch.isfinite(vectors).all():
        raise ValueError(f"{path} was not written: the vectors are not finite; lower the learning rate")
    if path.suffix == ".safetensors":
        checkpoint.write_tensors({word: vectors}, path, {k: str(v) for k, v in metadata.items()})
    elif path.suffix == ".pt":
        checkpoint.write_pt({
            "string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": word,
            "step": checkpoint.whole(metadata.get("step")), "sd_checkpoint": None,
            "sd_checkpoint_name": str(metadata["model"]) if "model" in metadata else None,
        }, path)  # fmt: skip
    else:
        raise ValueError(f"{path}: an embedding's file ends in .safetensors or .pt, not {path.suffix!r}")


def read(path: Path) -> tuple[str, Tensor, dict]:
    """An embedding of any known layout: (word, vectors (n, D) float32, metadata). Where there is no word in the file
    (kohya's, the paper's), the word is the file's name; the WebUI goes by that even where there is one."""
    path = Path(path)
    metadata: dict = {}
    if path.suffix == ".safetensors":
        content, metadata = checkpoint.read_safetensors(path, "embedding")
    else:
        with torch.serialization.safe_globals([nn.ParameterDict]):  # a table of tensors, in the paper's own files
            content = checkpoint.read_pt(path, "embedding")
    word, vectors = find(content, path)
    if vectors.dim() == 1:
        vectors = vectors[None]
    if vectors.dim() != 2 or not (vectors.is_floating_point() and 0 < len(vectors) <= MOST and vectors.numel()):
        raise ValueError(f"{path}: {word} is {vectors.dtype} of shape {tuple(vectors.shape)}; an embedding has 1 to "
                         f"{MOST} vectors (n, D)")  # fmt: skip
    if not checkpoint.finite(vectors):
        raise ValueError(f"{path} has a value that is not finite; take an earlier file of that training")
    return word, vectors.detach().float(), metadata


def find(content, path: Path) -> tuple[str, Tensor]:
    """The one tensor in a file's content, and its word."""
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict | nn.Module):
        param = content["string_to_param"]  # the paper's own code saved an nn.ParameterDict
        tensors = param if isinstance(param, dict) else vars(param).get("_parameters")
        tensors = tensors if isinstance(tensors, dict) else {}
        name = content.get("name")
        named = {name if isinstance(name, str) and name else path.stem: next(iter(tensors.values()), None)}
        tensors = named if len(tensors) == 1 else tensors
    else:
        tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
        if "emb_params" in tensors:  # kohya
            tensors = {path.stem: tensors["emb_params"]}
    if {"clip_l", "clip_g"} & tensors.keys():
        raise ValueError(f"{path} is an embedding for SDXL (it holds clip_l, clip_g), which is not supported")
    if len(tensors) != 1 or not isinstance(next(iter(tensors.values())), Tensor):
        raise ValueError(f"{path} is not a textual inversion embedding: one tensor is expected, {len(tensors)} found")
    return next((str(k), v) for k, v in tensors.items())


def load(sd, path: Path, word: str | None = None, say=print) -> tuple[str, Rows]:
    """Add a file's word to the model, by the name in it or another."""
    own, vectors, _ = read(path)
    width = table(sd).shape[1]
    if vectors.shape[1] != width:
        made = {768: "SD 1.x", 1024: "SD 2.x"}.get(vectors.shape[1], "another architecture")
        raise ValueError(f"{path}: vectors of width {vectors.shape[1]} ({made}), but {sd.name}'s words have {width}")
    word = word or own
    if say:
        say(f'embedding {path}: "{word}", {len(vectors)} vector{"s" * (len(vectors) > 1)}')
    try:
        return word, insert(sd, word, vectors)
    except ValueError as e:  # a word that cannot be: no token, control characters
        raise ValueError(f"{path}: {e}") from None
