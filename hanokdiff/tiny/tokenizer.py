"""The tiny world's tokenizer: byte-pair encoding learnt from its captions, written in CLIP's format."""

import collections
import json
import re
from pathlib import Path

from hanokdiff.files import write_json
from hanokdiff.tiny import world


def learn_merges(captions: list[str], extra=("*,", "*.", "*)")) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016) over the captions' words, until every word is one token.

    `extra` are the fusions that the real vocabulary has and that swallow a pseudo word."""
    counts = collections.Counter(re.findall(r"[a-z]+|[^\sa-z]+", " ".join(captions)))
    words = {w: (*w[:-1], w[-1] + "</w>") for w in counts}
    merges = []
    while pairs := count_pairs(words, counts):
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        words = {w: merge(symbols, best) for w, symbols in words.items()}
    return merges + [(e[0], e[1] + "</w>") for e in extra]


def count_pairs(words, counts) -> collections.Counter:
    """How often each pair of neighbouring symbols occurs."""
    pairs = collections.Counter()
    for w, symbols in words.items():
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += counts[w]
    return pairs


def merge(symbols: tuple, pair: tuple) -> tuple:
    """The symbols with every occurrence of the pair fused."""
    out, i = [], 0
    while i < len(symbols):
        fused = symbols[i : i + 2] == pair
        out.append("".join(pair) if fused else symbols[i])
        i += 2 if fused else 1
    return tuple(out)


def byte_letters() -> list[str]:
    """One printable letter for each of the 256 bytes, as in GPT-2's and CLIP's vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt for CLIP. The end token has the highest id: CLIP pools its text there."""
    scenes = [world.scene(f"words {i}") for i in range(20_000)]
    captions = [world.caption(s) for s in scenes] + [c for _, c in world.photos(100)]
    merges = learn_merges(captions)
    letters = byte_letters()
    symbols = [*letters, *(x + "</w>" for x in letters), *("".join(m) for m in merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {s: i for i, s in enumerate(symbols)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "pad_token": end, "unk_token": end}
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    config = options | {"add_prefix_space": False} | special | {"errors": "replace"}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
