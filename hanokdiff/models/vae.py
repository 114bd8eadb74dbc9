"""The autoencoder: pictures to latents and back (Kingma & Welling 2014), in Stable Diffusion's shape.

Diffusion happens on latents, 8 times smaller per side (4 in the tiny world) and 4 channels deep.  The encoder
gives a normal distribution per latent value; training draws from it anew at every step. Names: diffusers'.

Shapes:  B pictures of H x W pixels in [-1, 1];  h x w = H / f x W / f the latent;  C channels of a level.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanokdiff.models import config
from hanokdiff.models.unet import ResBlock


@dataclass(frozen=True)
class VAEConfig:
    """The defaults are Stable Diffusion 1.x and 2.x. Field names follow diffusers' vae/config.json."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # 1 / std of SD's latents: unit variance for the UNet (LDM appendix G)
    sample_size: int = 512  # pixels per side that it was trained at

    def __post_init__(self):
        config.check(self)

    @classmethod
    def from_json(cls, c: dict) -> "VAEConfig":
        known = {k: c[k] for k in cls.__dataclass_fields__ if c.get(k) is not None}
        return cls(**{**known, "block_out_channels": tuple(c["block_out_channels"])})

    def to_json(self) -> dict:
        n = len(self.block_out_channels)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
        kind = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "act_fn": "silu"}
        return {**kind, **blocks, **asdict(self), "block_out_channels": list(self.block_out_channels)}

    @property
    def factor(self) -> int:
        """Pixels per latent position, per side."""
        return 2 ** (len(self.block_out_channels) - 1)


EPS = 1e-6  # of every group norm in this file; the UNet's is 1e-5


class SelfAttention(nn.Module):
    """One head over all positions, in the middle of encoder and decoder."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h w, C)
        q, k, v = (to(y)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        y = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + y.transpose(1, 2).unflatten(2, x.shape[-2:])


class Middle(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(width, width, None, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([SelfAttention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Half the size. Padded at the right and bottom only: the checkpoints were trained so."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, cin: int, cout: int, layers: int, groups: int, resample: str | None):
        super().__init__()
        widths = [cin] + [cout] * (layers - 1)
        self.resnets = nn.ModuleList(ResBlock(width, cout, None, groups, EPS) for width in widths)
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(cout)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(cout)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())]:
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        chans, n, groups = c.block_out_channels, len(c.block_out_channels), c.norm_num_groups
        self.conv_in = nn.Conv2d(3, chans[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(chans[max(i - 1, 0)], chans[i], c.layers_per_block, groups, "down" if i < n - 1 else None)
            for i in range(n)
        )
        self.mid_block = Middle(chans[-1], c.norm_num_groups)
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, chans[-1], EPS)
        self.conv_out = nn.Conv2d(chans[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (B, C0, H, W)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))  # (B, 8, h, w)


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        chans, n, layers = c.block_out_channels[::-1], len(c.block_out_channels), c.layers_per_block + 1
        self.conv_in = nn.Conv2d(c.latent_channels, chans[0], 3, padding=1)
        self.mid_block = Middle(chans[0], c.norm_num_groups)
        self.up_blocks = nn.ModuleList(
            Level(chans[max(i - 1, 0)], chans[i], layers, c.norm_num_groups, "up" if i < n - 1 else None)
            for i in range(n)
        )
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, chans[-1], EPS)
        self.conv_out = nn.Conv2d(chans[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))  # (B, C, h, w)
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 3, H, W)


class VAE(nn.Module):
    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config, d = config, config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * d, 2 * d, 1)
        self.post_quant_conv = nn.Conv2d(d, d, 1)

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and std of the latents, each (B, 4, h, w), scaled for the UNet."""
        mean, log_var = self.quant_conv(self.encoder(pictures)).chunk(2, dim=1)
        std = torch.exp(0.5 * log_var.clamp(-30, 20))
        return mean * self.config.scaling_factor, std * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> pictures (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))
