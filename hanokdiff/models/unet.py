"""The denoiser: Stable Diffusion's UNet (Rombach et al. 2022, arXiv:2112.10752), as a table of blocks.

It predicts the noise (or v) in a latent, given the timestep and the prompt's context.  Module names are the
names of the tensors in diffusers checkpoints, so loading one needs no mapping.  Nothing here knows how it is
trained: a LoRA replaces a Linear or Conv2d from outside, a hypernetwork wraps `to_k` and `to_v`.  memory.py
computes the same normal operations (norm + SiLU, GEGLU, convolution, attention) in less memory or time.

Shapes:  B pictures;  C channels of a level;  h x w the latent's size at that level;  N = h * w positions;
T tokens and D their width in the context;  E = 4 * C0 the width of the time embedding.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanokdiff.models import config, memory


@dataclass(frozen=True)
class UNetConfig:
    """The numbers that make one UNet; the defaults are SD 1.x. Names are those of diffusers' config.json."""

    sample_size: int = 64  # side of the latent it was trained at
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels attend, from down_block_types
    heads: tuple[int, ...] = (8, 8, 8, 8)  # attention heads per level
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    use_linear_projection: bool = False  # SD 2: Linear instead of a 1x1 convolution around the transformer
    upcast_attention: bool = False  # SD 2.1: attention in fp32 where fp16 would overflow
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    def __post_init__(self):
        config.check(self)
        config.check_heads(self.block_out_channels, self.heads)

    @classmethod
    def from_json(cls, c: dict) -> "UNetConfig":
        """Read diffusers' config. There `attention_head_dim` is, by an old slip, the NUMBER of heads."""
        if c.get("time_cond_proj_dim"):
            lcm = "a model distilled to take its guidance as an input (LCM), which is not supported"
            raise ValueError(f"time_cond_proj_dim is set: {lcm}; take the model that it was distilled from")
        known = {"CrossAttnDownBlock2D", "DownBlock2D"}
        if strange := [kind for kind in c["down_block_types"] if kind not in known]:
            raise ValueError(f"down_block_types has {strange[0]}, which no Stable Diffusion 1 or 2 has")
        n = len(c["block_out_channels"])
        heads = c.get("num_attention_heads") or c.get("attention_head_dim", 8)
        same = cls.__dataclass_fields__.keys() - {"block_out_channels", "attention", "heads"}
        return cls(
            block_out_channels=tuple(c["block_out_channels"]),
            attention=tuple("CrossAttn" in kind for kind in c["down_block_types"]),
            heads=tuple(heads) if isinstance(heads, list | tuple) else (heads,) * n,
            **{k: c[k] for k in same if c.get(k) is not None},
        )

    def to_json(self) -> dict:
        """The same numbers as diffusers writes them."""
        down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in self.attention]
        up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(self.attention)]
        blocks = {"down_block_types": down, "mid_block_type": "UNetMidBlock2DCrossAttn", "up_block_types": up}
        out: dict = {"_class_name": "UNet2DConditionModel"}
        for name, value in asdict(self).items():
            other = {"attention": blocks, "heads": {"attention_head_dim": list(self.heads)}}
            out |= other.get(name, {name: list(value) if isinstance(value, tuple) else value})
        out |= {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False}
        return {**out, "downsample_padding": 1, "mid_block_scale_factor": 1}


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """t (B,) -> (B, width): cosines then sines at geometric frequencies. Fractional t is welcome."""
    steps = torch.arange(width // 2, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(10_000) * steps / (width // 2))
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """Two convolutions around a residual; the time temb (B, E), after SiLU, is added between, or none."""

    def __init__(self, cin: int, cout: int, time: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps)
        self.conv1 = memory.Conv2d(cin, cout, 3, padding=1)
        if time is not None:
            self.time_emb_proj = nn.Linear(time, cout)
        self.norm2 = nn.GroupNorm(groups, cout, eps)
        self.conv2 = memory.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = memory.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(memory.norm_silu(self.norm1, x))  # (B, cout, h, w)
        if temb is not None:
            h = h + self.time_emb_proj(temb)[:, :, None, None]
        h = self.conv2(memory.norm_silu(self.norm2, h))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with several heads: self-attention, or cross-attention to the words (Vaswani
    et al. 2017, arXiv:1706.03762, equation 1)."""

    def __init__(self, width: int, context_width: int, heads: int, upcast: bool = False):
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list, for the checkpoint's name to_out.0

    def split_heads(self, a: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        return a.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, C) with keys and values (B, heads, T, C / heads) -> (B, N, C)."""
        q = self.split_heads(self.to_q(x))
        if self.upcast and q.dtype == torch.float16:  # SD 2.1: the products overflow; bf16 has fp32's range
            q, k, v = q.float(), k.float(), v.float()
        out = memory.attention(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, N, C)
        return self.to_out[0](out.to(x.dtype))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, C), context (B, T, D) -> (B, N, C); in self-attention the context is x itself."""
        return self.attend(x, self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context)))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return memory.geglu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention (attn1), cross-attention (attn2) and feed-forward (ff), each added to its input."""

    def __init__(self, width: int, heads: int, c: UNetConfig):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads, c.upcast_attention)
        self.attn2 = Attention(width, c.cross_attention_dim, heads, c.upcast_attention)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # (B, N, C), (B, T, D)
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer over the h w positions of the picture, added to it."""

    def __init__(self, width: int, heads: int, c: UNetConfig):
        super().__init__()
        self.linear = c.use_linear_projection
        project = nn.Linear if self.linear else lambda i, o: memory.Conv2d(i, o, 1)
        self.norm = nn.GroupNorm(c.norm_num_groups, width, 1e-6)
        self.proj_in = project(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, c)])
        self.proj_out = project(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # (B, C, h, w), (B, T, D)
        def tokens(a):  # (B, C, h, w) -> (B, N, C)
            return a.flatten(2).transpose(1, 2).contiguous()  # else each norm below would copy it

        def picture(a):  # (B, N, C) -> (B, C, h, w)
            return a.transpose(1, 2).unflatten(2, x.shape[-2:])

        y = self.norm(x)
        y = self.proj_in(tokens(y)) if self.linear else tokens(self.proj_in(y))
        y = self.transformer_blocks[0](y, context)
        return x + (picture(self.proj_out(y)) if self.linear else self.proj_out(picture(y)))


class Resample(nn.Module):
    """Half or double the size. The convolution has the checkpoint's name `conv`."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.conv = memory.Conv2d(width, width, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, size=None) -> Tensor:
        return self.conv(x if size is None else F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Module):
    """One level: resnets, each followed by a transformer where the level attends, then a resampler."""

    def __init__(self, widths_in, width, heads, resample: str | None, attends: bool, c: UNetConfig):
        super().__init__()
        time, groups, eps = 4 * c.block_out_channels[0], c.norm_num_groups, c.norm_eps
        self.resnets = nn.ModuleList(ResBlock(w, width, time, groups, eps) for w in widths_in)
        count = len(widths_in) - (resample == "mid")  # the middle block: resnet, transformer, resnet
        if attends:
            self.attentions = nn.ModuleList(SpatialTransformer(width, heads, c) for _ in range(count))
        if resample == "down":
            self.downsamplers = nn.ModuleList([Resample(width, 2)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Resample(width, 1)])

    def layers(self):
        """(resnet, transformer or None) in order."""
        return zip(self.resnets, getattr(self, "attentions", [None] * len(self.resnets)), strict=True)


class UNet(nn.Module):
    """x_t, t, context -> predicted noise (or v), in fp32; inside, the network computes in its own precision.

    x (B, 4, h, w) noisy latents, t (B,) or (1,) timesteps 0 to 999, context (B, T, D) from the text encoder
    -> (B, 4, h, w).  h and w may be any size: going up, each level takes the size of the one it mirrors."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = c = config
        chans, layers, last = c.block_out_channels, c.layers_per_block, len(c.block_out_channels) - 1
        self.time_embedding = TimeEmbedding(chans[0], 4 * chans[0])
        self.conv_in = memory.Conv2d(c.in_channels, chans[0], 3, padding=1)

        self.down_blocks, skips, width = nn.ModuleList(), [chans[0]], chans[0]
        levels = list(zip(chans, c.heads, c.attention, strict=True))
        for i, (ch, heads, attends) in enumerate(levels):
            ins = [width] + [ch] * (layers - 1)
            self.down_blocks.append(Block(ins, ch, heads, "down" if i < last else None, attends, c))
            skips += [ch] * (layers + (i < last))
            width = ch

        self.mid_block = Block([width, width], width, c.heads[-1], "mid", True, c)

        self.up_blocks = nn.ModuleList()
        for i, (ch, heads, attends) in enumerate(reversed(levels)):
            ins = []
            for _ in range(layers + 1):
                ins.append(width + skips.pop())
                width = ch
            self.up_blocks.append(Block(ins, ch, heads, "up" if i < last else None, attends, c))

        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, chans[0], c.norm_eps)
        self.conv_out = memory.Conv2d(chans[0], c.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        dtype = self.conv_norm_out.weight.dtype
        x, context = x.to(dtype), context.to(dtype)
        temb = timestep_embedding(t, self.config.block_out_channels[0]).to(dtype)
        temb = F.silu(self.time_embedding(temb))  # (B, E), as every resnet takes it

        x = self.conv_in(x)  # (B, C0, h, w)
        skips = [x]
        for block in self.down_blocks:
            for resnet, transformer in block.layers():
                x = resnet(x, temb)
                x = transformer(x, context) if transformer else x
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)  # (B, C, h / 2, w / 2)
                skips.append(x)

        first, second = self.mid_block.resnets
        x = second(self.mid_block.attentions[0](first(x, temb), context), temb)

        for block in self.up_blocks:
            for resnet, transformer in block.layers():
                x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
                x = transformer(x, context) if transformer else x
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, size=skips[-1].shape[-2:])
        return self.conv_out(memory.norm_silu(self.conv_norm_out, x)).float()  # (B, 4, h, w)
