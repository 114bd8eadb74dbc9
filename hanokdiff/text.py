"""Words to context: the library's CLIP tokenizer, our own CLIP text encoder (Radford et al. 2021, arXiv:2103.00020).

The pseudo word is cut out of the text before the tokenizer sees it.  CLIP's tokenizer fuses runs of punctuation: in
"*, fire" it sees one symbol "*,", which is not the "*" that was trained, and the prompt silently loses its subject.
Here the word is found as literal text and given its own ids, in training and in sampling alike.

Shapes:  B prompts;  T = 77 positions;  D the width (768 in SD 1.x, 1024 in SD 2.x).
"""

import re
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TextConfig:
    """The defaults are CLIP ViT-L/14's text tower, as in SD 1.x. Field names follow text_encoder/config.json."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, c: dict) -> "TextConfig":
        config = cls(**{k: c[k] for k in cls.__dataclass_fields__ if k in c})
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f'text encoder with activation "{config.hidden_act}": know only {", ".join(ACTIVATIONS)}')
        return config

    def to_json(self) -> dict:
        own = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **own,
                "bos_token_id": self.vocab_size - 2, "eos_token_id": self.vocab_size - 1,
                "pad_token_id": self.vocab_size - 1}  # fmt: skip


ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class Embeddings(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = nn.Embedding(c.max_position_embeddings, c.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class SelfAttention(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        width = c.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)      # (B, heads, T, D / heads)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.act = ACTIVATIONS[c.hidden_act]
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = SelfAttention(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))


class TextEncoder(nn.Module):
    """ids (B, T) -> context (B, T, D). Each position sees those before it; padding is not masked (SD never does)."""

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)


# ------------------------------------------------------------------------------------------------- the pseudo word


def word_pattern(word: str) -> re.Pattern:
    """Finds a pseudo word as literal text; one that starts or ends with a letter only at a word's boundary there, so
    that "sks" is not found in "asks", while "*" is found in "(*)" and "*,". Any case, any white space between words."""
    word = word.strip()
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return re.compile(before + r"\s+".join(map(re.escape, word.split())) + after, re.IGNORECASE)


def contains(text: str, word: str) -> bool:
    return bool(word_pattern(word).search(text))


class Text:
    """Prompts in, context out:  text(["a barn on fire", "*, fire"]) -> (B, 77, D) on the encoder's device.

    word            the pseudo word, cut out before the tokenizer; None: there is none
    literal_tokens  do not cut it out, so that "*," is one symbol as in other tools (to compare)
    """

    def __init__(self, encoder: TextEncoder, tokenizer, word: str | None = None, literal_tokens: bool = False):
        self.encoder, self.tokenizer, self.word, self.literal_tokens = encoder, tokenizer, word, literal_tokens
        self.length = encoder.config.max_position_embeddings
        self._told, self._known = set(), {}

    def ids(self, prompt: str) -> list[int]:
        """The 77 token ids of one prompt: begin, at most 75 words, end, padding."""
        parts, own = [prompt], []
        if self.word and not self.literal_tokens:
            parts, own = word_pattern(self.word).split(prompt), self._tokens(self.word)
        ids = self._tokens(parts[0])
        for part in parts[1:]:
            ids += own + self._tokens(part)
        room, t = self.length - 2, self.tokenizer
        if len(ids) > room and prompt not in self._told:
            self._told.add(prompt)
            lost = t.decode(ids[room:])
            warnings.warn(f'prompt of {len(ids)} tokens cut at {room}; lost: "{lost}"', stacklevel=2)
        ids = [t.bos_token_id, *ids[:room], t.eos_token_id]
        return ids + [t.pad_token_id] * (self.length - len(ids))

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text.strip() else []

    def __call__(self, prompts: list[str]) -> Tensor:
        if all(p in self._known for p in prompts):
            return torch.stack([self._known[p] for p in prompts])
        device = self.encoder.final_layer_norm.weight.device
        return self.encoder(torch.tensor([self.ids(p) for p in prompts], device=device))

    @torch.no_grad()
    def remember(self, prompts: list[str]) -> None:
        """Encode these prompts now and give the same context from then on: right while the encoder is frozen."""
        distinct = sorted(set(prompts) - self._known.keys())
        for k in range(0, len(distinct), 32):
            part = distinct[k : k + 32]
            self._known.update(zip(part, self(part), strict=True))

    def warn_without_word(self, prompts: list[str]) -> None:
        """Say so when a prompt does not use what was learnt."""
        for prompt in prompts:
            if self.word and not contains(prompt, self.word):
                message = f'the prompt "{prompt}" does not contain "{self.word}", the word that was learnt'
                warnings.warn(message, stacklevel=2)
