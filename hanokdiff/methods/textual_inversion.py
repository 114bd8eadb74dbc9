"""Textual inversion: a new word (Gal et al. 2022, arXiv:2208.01618).

    v* = argmin_v  E || eps - eps_theta(x_t, t, words(v)) ||^2          equation 2: only v (n, D) learns

The rows of v lie beyond the vocabulary in a parameter of their own; the token table itself is never touched, so no
other word can move.  Two file formats: diffusers' .safetensors {word: (n, D)}, and the WebUI's .pt.
"""

import contextlib

import torch
from torch import Tensor, nn

from hanokdiff.models.tokens import MOST_VECTORS


class ExtendedEmbedding(nn.Module):
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
        x = self.base(ids.masked_fill(own, 0))  # (B, T, D)
        new = self.vectors().to(x.dtype)[(ids - self.first).clamp(0, len(self.rows) - 1)]
        return torch.where(own[..., None], new, x)


def token_embedding(sd) -> Tensor:
    """The model's own token table (vocabulary, D), with all the digits that are known of it."""
    weight = base_embedding(sd.text.encoder.embeddings.token_embedding).weight
    return getattr(weight, "master", weight)


def base_embedding(embedding: nn.Module) -> nn.Module:
    return embedding.base if isinstance(embedding, ExtendedEmbedding) else embedding


def insert(sd, word: str, vectors: Tensor) -> ExtendedEmbedding:
    """Give a pseudo word rows of its own, vectors (n, D), beyond the vocabulary and all rows already there."""
    if not 0 < len(vectors) <= MOST_VECTORS:
        raise ValueError(
            f'"{word}" is of {len(vectors)} vectors, but a prompt has room for 1 to {MOST_VECTORS}'
        )
    holder = sd.text.encoder.embeddings
    base, first = holder.token_embedding, len(token_embedding(sd))
    while isinstance(base, ExtendedEmbedding):
        first, base = max(first, base.first + len(base.rows)), base.base
    sd.text.add_word(word, list(range(first, first + len(vectors))))
    holder.token_embedding = ExtendedEmbedding(holder.token_embedding, vectors.to(sd.device), first)
    return holder.token_embedding


def remove(sd, word: str, rows: ExtendedEmbedding) -> None:
    """Take a word out again; the model is what it was, to the bit."""
    holder, name = sd.text.encoder.embeddings, "token_embedding"
    while getattr(holder, name) is not rows:
        holder, name = getattr(holder, name), "base"
    setattr(holder, name, rows.base)
    if sd.text.words.get(word, [-1])[0] == rows.first:  # else another has the word by now
        del sd.text.words[word]
    sd.text._cache.clear()


@contextlib.contextmanager
def folded_into_table(sd, rows: ExtendedEmbedding, ids: list[int]):
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


def initial_vectors(sd, words: str, n: int) -> Tensor:
    """n vectors (n, D) to begin with: the rows of these words' tokens, stretched over n as the WebUI does."""
    ids = sd.text._tokens(words)
    if not ids:
        raise ValueError(
            f'--init "{words}" has no token; give words that name the kind of thing, such as house'
        )
    return token_embedding(sd)[[ids[i * len(ids) // n] for i in range(n)]].detach().float().clone()


# ------------------------------------------------------------------------------------------------------- the file
