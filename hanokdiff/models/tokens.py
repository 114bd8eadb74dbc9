"""Prompts to context: transformers' CLIP tokenizer, the pseudo word, and the text encoder.

A pseudo word is cut out of the text before the tokenizer sees it.  CLIP's tokenizer fuses runs of
punctuation: in "*, fire" it sees one symbol "*,", which is not the "*" that was trained, and the prompt
silently loses its subject. Here, in training and sampling, the word is found as text and has its own ids.

Shapes:  B prompts;  T = 77 positions;  D the width (768 in SD 1.x, 1024 in SD 2.x);  k chunks of a prompt.
"""

import functools
import itertools
import math
import re
import warnings

import torch
from torch import Tensor

from hanokdiff.device import to_device
from hanokdiff.models.prompt import parse_emphasis, split_chunks
from hanokdiff.models.text_encoder import TextEncoder

MOST_VECTORS = 75  # of a pseudo word: a chunk of a prompt has room for no more
MAX_TOKENS = (75, 150, 225)  # of a caption in training: the choices of kohya's scripts


def word_pattern(word: str) -> re.Pattern:
    """Finds a pseudo word as literal text, in any case and white space; one that starts or ends with a letter
    only at a word's boundary there: "sks" not in "asks", while "*" is found in "(*)" and "*,"."""
    word = word.strip()
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return re.compile(before + r"\s+".join(map(re.escape, word.split())) + after, re.IGNORECASE)


def same_word(word: str) -> str:
    """One spelling of all those that are found as the same word."""
    return " ".join(word.lower().split())


def contains_word(text: str, word: str) -> bool:
    return bool(word_pattern(word).search(text))


HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
# in a text, chr(MARK + i) stands for the i-th pseudo word: private characters, in nobody's prompt
MARK = "\ue000"


class Text:
    """Texts in, context out, on the encoder's device.

        text(["a barn on fire", "*, fire"])         (B, 77, D)      captions: plain, cut at max_tokens with a
                                                                    warning; (B, 77 k, D) beyond 75
        text.prompts(["a barn, (fire:1.3)", long])  (B, 77 k, D)    prompts: emphasis, BREAK, any length

    words           pseudo word -> its token ids, cut out before the tokenizer (`add_word`)
    literal_tokens  do not cut them out, so that "*," is one symbol as in other tools (to compare)
    clip_skip       leave out the last n - 1 layers
    max_tokens      of a caption: 75, or 75 n to read it in n chunks, as prompts are read"""

    def __init__(self, encoder: TextEncoder, tokenizer, literal_tokens: bool = False, clip_skip: int = 1):
        self.encoder, self.tokenizer = encoder, tokenizer
        self.literal_tokens, self.clip_skip = literal_tokens, clip_skip
        self.length = encoder.config.max_position_embeddings
        self.max_tokens = self.length - 2
        self.words: dict[str, list[int]] = {}
        self._warned, self._cache = set(), {}

    def add_word(self, word: str, ids: list[int] | None = None) -> list[int]:
        """Make this a pseudo word, with ids of its own beyond the vocabulary or those it has alone."""
        if re.search("[\0-\x1f\x7f-\x9f\ud800-\udfff]", word):
            raise ValueError(f"{word[:40]!r} has control characters; choose another pseudo word")
        ids = ids or self._tokens(word)
        if not word.strip() or not ids:
            raise ValueError(f'"{word}" has no token in this vocabulary; choose another pseudo word')
        if len(ids) > self.length - 2:
            many = f"{word[:40]!r} has {len(ids)} tokens, more than the {self.length - 2} of a prompt"
            raise ValueError(f"{many}; choose another pseudo word")
        # the word given last replaces an earlier one; longest first
        others = {w: own for w, own in self.words.items() if same_word(w) != same_word(word)}
        self.words = dict(sorted({**others, word: ids}.items(), key=lambda item: -len(item[0])))
        self._cache.clear()
        return ids

    def skip(self, clip_skip: int) -> None:
        """Leave out the last clip_skip - 1 layers, but none of SD 2, trained without its last one."""
        layers = self.encoder.config.num_hidden_layers
        if not 1 <= clip_skip <= layers:
            has = f"the text encoder has {layers} layers: 1 to {layers}"
            raise ValueError(f"clip skip is {clip_skip}, but {has}")
        if clip_skip > 1 and self.encoder.config.hidden_size == 1024:
            message = "clip skip has no effect on SD 2, whose last layer is always left out"
            warnings.warn(message, stacklevel=2)
            clip_skip = 1
        self.clip_skip = clip_skip
        self._cache.clear()

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text.strip() else []

    def _mark(self, text: str) -> str:
        """Every pseudo word in the text becomes its private character."""
        if not self.literal_tokens:
            for i, word in enumerate(self.words):
                text = word_pattern(word).sub(chr(ord(MARK) + i), text)
        return text

    def _units(self, marked: str) -> list[list[int]]:
        """The ids of a marked text, token by token; those of a pseudo word stay together."""
        words, out = list(self.words.values()), []
        for part in re.split("([\ue000-\uf8ff])", marked):
            known = part and 0 <= ord(part[0]) - ord(MARK) < len(words)
            out += [words[ord(part) - ord(MARK)]] if known else [[i] for i in self._tokens(part)]
        return self._by_ids(out) if self.literal_tokens else out

    def _by_ids(self, units: list[list[int]]) -> list[list[int]]:
        """What other tools do: find a pseudo word by the ids that it has alone. In "*," there are none."""
        for word, ids in self.words.items():
            alone, i = [[i] for i in self._tokens(word)], 0
            while i + len(alone) <= len(units):
                if units[i : i + len(alone)] == alone:
                    units[i : i + len(alone)] = [ids]
                i += 1
        return units

    def ids(self, text: str) -> list[int]:
        """The 77 token ids of a caption, or of its first chunk: begin, at most 75 words, end, padding."""
        return self._caption(text)[0]

    def _caption(self, text: str) -> list[list[int]]:
        """The ids of a caption's chunks, 77 each."""
        units = self._units(self._mark(text))
        ids, room = sum(units, []), self.length - 2
        kept = [ids[:room]]
        if self.max_tokens > room:
            chunks = split_chunks([(unit, 1.0) for unit in units], room, self._tokens(",")[0])
            kept = [ids for ids, _ in chunks[: self.max_tokens // room]]
        if (count := sum(map(len, kept))) < len(ids) and text not in self._warned:
            self._warned.add(text)
            lost = self.tokenizer.decode([i for i in ids[count:] if i < len(self.tokenizer)])
            more = "; --max-tokens reads more" if self.max_tokens < MAX_TOKENS[-1] else ""
            warnings.warn(f'prompt of {len(ids)} tokens cut at {count}; lost: "{lost}"{more}', stacklevel=2)
        return [self._wrap(chunk) for chunk in kept]

    def _wrap(self, ids: list[int]) -> list[int]:
        t = self.tokenizer
        return [t.bos_token_id, *ids, t.eos_token_id] + [t.pad_token_id] * (self.length - len(ids) - 2)

    def chunks(self, prompt: str) -> list[tuple[list[int], list[float]]]:
        """A prompt as chunks of at most 75 ids with their weights."""
        units: list = []
        for piece in parse_emphasis(self._mark(prompt)):
            # an escaped \[V\] is found only now
            units += [(u, piece[1]) for u in self._units(self._mark(piece[0]))] if piece else [None]
        return split_chunks(units, self.length - 2, self._tokens(",")[0])

    def __call__(self, texts: list[str]) -> Tensor:
        known = self._cache
        if not all(p in known for p in texts):
            distinct = list(dict.fromkeys(texts))  # what a batch says twice is read once
            known = dict(zip(distinct, self._contexts(distinct), strict=True))
        # row by row: the gradient of one index adds up in the order in which threads come
        rows = [known[p] for p in texts]
        # of different lengths: repeated, which no softmax over the tokens notices; so each is read as in
        # sampling, whatever the others in its batch
        longest = math.lcm(*map(len, rows))
        rows = [row if len(row) == longest else row.repeat(longest // len(row), 1) for row in rows]
        return torch.stack(rows)

    def _contexts(self, texts: list[str]) -> list[Tensor]:
        """Of each caption (77 k, D), k its own."""
        chunks = [self._caption(p) for p in texts]
        z = self._encode([ids for own in chunks for ids in own])
        places = itertools.accumulate(map(len, chunks), initial=0)
        return [
            z[i] if len(own) == 1 else z[i : i + len(own)].flatten(0, 1) for i, own in zip(places, chunks)
        ]

    def _encode(self, ids: list[list[int]]) -> Tensor:
        device = self.encoder.final_layer_norm.weight.device
        return self.encoder(to_device(torch.tensor(ids), device), self.clip_skip)

    def prompts(self, prompts: list[str]) -> Tensor:
        """Context of prompts with emphasis: weights multiply the encoder's output, then each chunk gets its
        mean back (the WebUI's rule). Shorter prompts are filled with the chunk of the empty prompt."""
        cut = [self.chunks(p) for p in prompts]
        k = max(map(len, cut))
        rows = [chunk for chunks in cut for chunk in chunks + [([], [])] * (k - len(chunks))]
        z = self._encode([self._wrap(ids) for ids, _ in rows])  # (B k, 77, D)
        if any(w != 1 for _, weights in rows for w in weights):
            weights = [[1.0, *w] + [1.0] * (self.length - 1 - len(w)) for _, w in rows]
            weighted = z * to_device(torch.tensor(weights, dtype=z.dtype), z.device)[..., None]
            before, after = (a.float().mean((1, 2), keepdim=True) for a in (z, weighted))
            z = weighted * (before / after).to(z.dtype)
        return z.unflatten(0, (len(prompts), k)).flatten(1, 2)  # (B, 77 k, D)

    @torch.no_grad()
    def cache_prompts(self, texts: list[str]) -> None:
        """Encode these captions once and for all: right while the encoder is frozen."""
        distinct = sorted(set(texts) - self._cache.keys())
        for k in range(0, len(distinct), 32):
            part = distinct[k : k + 32]
            self._cache.update(zip(part, self._contexts(part), strict=True))

    def warn_without_word(self, prompts: list[str], negative: str = "") -> None:
        """Warn when a prompt does not contain the pseudo word; one in the negative prompt is in its place.
        And when it is in Korean, of which CLIP's vocabulary has only bytes."""
        words = [word for word in self.words if not contains_word(negative, word)]
        for prompt in prompts:
            rest = functools.reduce(lambda text, w: word_pattern(w).sub("", text), self.words, prompt)
            if HANGUL.search(rest):
                noise = "is in Korean, which this text encoder reads as noise; write it in English"
                message = f'the prompt "{prompt}" {noise}, or give a disaster alert to --alert'
                warnings.warn(message, stacklevel=2)
            if words and not any(contains_word(prompt, word) for word in words):
                trained = " or ".join(f'"{w}"' for w in words)
                message = f'the prompt "{prompt}" does not contain {trained}, the word that was trained'
                warnings.warn(message, stacklevel=2)
