"""Textual inversion: a new word (Gal et al. 2022, arXiv:2208.01618).

    v* = argmin_v  E || eps - eps_theta(x_t, t, prompt(v)) ||^2         equation 2: only v (n, D) is trained

The rows of v lie beyond the vocabulary in a parameter of their own; the token table itself is never touched,
so no other word can move.  The file: formats/embedding_file.py.
"""

import contextlib
import warnings

import torch
from torch import Tensor, nn

from hanokdiff.methods.inject import base_layer, unwrap, wrap
from hanokdiff.models.tokens import MOST_VECTORS

TABLE = "embeddings.token_embedding"  # of the text encoder


class ExtendedEmbedding(nn.Module):
    """A token table (or an ExtendedEmbedding around one) with n more rows, whose ids begin at `first_id`.

    vectors     (n, D) fp32, the trained parameter
    hold_norm   keep each vector's initial norm: a vector that grows drowns the other words"""

    def __init__(self, base: nn.Module, vectors: Tensor, first_id: int, hold_norm: bool = False):
        super().__init__()
        self.base, self.first_id, self.hold_norm = base, first_id, hold_norm
        self.vectors = nn.Parameter(vectors.detach().float().clone())
        self.norms = self.vectors.detach().norm(dim=1, keepdim=True)

    def current(self) -> Tensor:
        """The vectors as they are used (n, D): with hold_norm, at their initial norm."""
        if not self.hold_norm:
            return self.vectors
        return self.vectors * (self.norms / self.vectors.norm(dim=1, keepdim=True))

    def forward(self, ids: Tensor) -> Tensor:
        # a product, not an index: the gradient of an index adds up in the order in which threads come
        rows = torch.arange(self.first_id, self.first_id + len(self.vectors), device=ids.device)
        chosen = ids[..., None] == rows  # (B, T, n)
        own = chosen.any(-1)
        x = self.base(ids.masked_fill(own, 0))  # (B, T, D)
        return torch.where(own[..., None], chosen.to(x.dtype) @ self.current().to(x.dtype), x)


def token_embedding(sd) -> Tensor:
    """The model's own token table (vocabulary, D), with all the digits that are known of it."""
    weight = base_layer(sd.text.encoder.embeddings.token_embedding).weight
    return getattr(weight, "master", weight)


def trainable(embedding: ExtendedEmbedding) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {"rows": embedding.vectors}


def insert(sd, word: str, vectors: Tensor) -> ExtendedEmbedding:
    """Give a pseudo word vectors of its own (n, D), with ids beyond the vocabulary and those added before."""
    if not 0 < len(vectors) <= MOST_VECTORS:
        room = f"a prompt has room for 1 to {MOST_VECTORS}"
        raise ValueError(f'"{word}" is of {len(vectors)} vectors, but {room}')
    embedding, first_id = sd.text.encoder.embeddings.token_embedding, len(token_embedding(sd))
    while isinstance(embedding, ExtendedEmbedding):
        first_id = max(first_id, embedding.first_id + len(embedding.vectors))
        embedding = embedding.base
    sd.text.add_word(word, list(range(first_id, first_id + len(vectors))))
    return wrap(sd.text.encoder, TABLE, lambda base: ExtendedEmbedding(base, vectors.to(sd.device), first_id))


def remove(sd, word: str, embedding: ExtendedEmbedding) -> None:
    """Take a word out again; the model is what it was, to the bit."""
    unwrap(sd.text.encoder, TABLE, embedding)
    if sd.text.words.get(word, [-1])[0] == embedding.first_id:  # else a later embedding has the word
        del sd.text.words[word]
    sd.text._cache.clear()


def find(sd, word: str) -> ExtendedEmbedding | None:
    """The embedding that holds a word's vectors, if it has any of its own."""
    embedding, first_id = sd.text.encoder.embeddings.token_embedding, sd.text.words.get(word, [-1])[0]
    while isinstance(embedding, ExtendedEmbedding) and embedding.first_id != first_id:
        embedding = embedding.base
    return embedding if isinstance(embedding, ExtendedEmbedding) else None


@contextlib.contextmanager
def folded_into_table(sd, embedding: ExtendedEmbedding, ids: list[int]):
    """Inside, the token table is a plain one that holds the vectors at `ids`: to save as a plain model."""
    embeddings, weight = sd.text.encoder.embeddings, embedding.base.weight
    exact = getattr(weight, "master", weight)  # what a file is written from
    changed = exact.detach().clone()
    changed[ids] = embedding.current().detach().to(changed)
    embedding.base.weight = nn.Parameter(changed, requires_grad=False)
    embeddings.token_embedding = embedding.base
    try:
        yield
    finally:
        embeddings.token_embedding, embedding.base.weight = embedding, weight


def initial_vectors(sd, words: str, n: int) -> Tensor:
    """n vectors (n, D) to begin with: the rows of these words' tokens, stretched over n as the WebUI does."""
    ids = sd.text._tokens(words)
    if not ids:
        way = "give words that name the kind of thing, such as house"
        raise ValueError(f'--init "{words}" has no token; {way}')
    if n == 1 < len(ids):
        first = sd.text.tokenizer.decode(ids[:1]).strip()
        alone = f'one vector of "{words}" starts as "{first}" alone'
        warnings.warn(f"{alone}; name one word: --init", stacklevel=2)
    return token_embedding(sd)[[ids[i * len(ids) // n] for i in range(n)]].detach().float().clone()
