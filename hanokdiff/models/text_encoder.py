"""CLIP's text encoder (Radford et al. 2021, arXiv:2103.00020), as in Stable Diffusion."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanokdiff.models import config


@dataclass(frozen=True)
class TextConfig:
    """The defaults are CLIP ViT-L/14's text tower, as in SD 1.x. Names are text_encoder/config.json's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        config.check(self)
        config.check_heads([self.hidden_size], [self.num_attention_heads])

    @classmethod
    def from_json(cls, c: dict) -> "TextConfig":
        config = cls(**{k: c[k] for k in cls.__dataclass_fields__ if k in c})
        if config.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f'text encoder with activation "{config.hidden_act}": know only {known}')
        return config

    def to_json(self) -> dict:
        own = {k: getattr(self, k) for k in self.__dataclass_fields__}
        kind = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
        start, end = self.vocab_size - 2, self.vocab_size - 1
        return {**kind, **own, "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}


ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


def embedding(rows: int, width: int) -> nn.Embedding:
    """With the usual numbers; none on the meta device, where drawing them imports torch's compiler."""
    weight = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=weight if weight.is_meta else weight.normal_())


class Embeddings(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.token_embedding = embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = embedding(c.max_position_embeddings, c.hidden_size)

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
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, D / heads)
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
    """ids (B, T) -> context (B, T, D). Each position sees those before it; padding is not masked (as SD)."""

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor, clip_skip: int = 1) -> Tensor:
        """`clip_skip` n leaves the last n - 1 layers out, as the WebUI counts; the norm stays."""
        x = self.embeddings(ids)
        for layer in self.encoder.layers[: len(self.encoder.layers) + 1 - clip_skip]:
            x = layer(x)
        return self.final_layer_norm(x)
