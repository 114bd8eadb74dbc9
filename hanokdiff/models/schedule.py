"""The noise schedule: how much picture and noise there is at each of 1000 timesteps (Ho et al. 2020).

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps          (DDPM, equation 4)

Stable Diffusion's betas are "scaled linear": the square roots go linearly from sqrt(0.00085) to sqrt(0.012).
The network predicts eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022; SD 2.x).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hanokdiff.device import to_device
from hanokdiff.models import config

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Schedule:
    """Field names follow scheduler/scheduler_config.json. `alpha_bar` (steps,) float32 lies on the CPU."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    steps_offset: int = 1
    timestep_spacing: str | None = None  # None: each sampler's own habit
    rescale_betas_zero_snr: bool = False  # the last timestep is noise alone
    alpha_bar: Tensor = field(init=False, repr=False, compare=False)
    _copies: dict = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self):
        config.check(self)
        power = {"scaled_linear": 0.5, "linear": 1.0}.get(self.beta_schedule)
        if power is None:
            known = "scaled_linear, linear"
            raise ValueError(f'beta_schedule "{self.beta_schedule}" is not known; known: {known}')
        if self.prediction_type not in PREDICTIONS:
            known = ", ".join(PREDICTIONS)
            raise ValueError(f'prediction_type "{self.prediction_type}" is not known; known: {known}')
        ends = (self.beta_start**power, self.beta_end**power)
        betas = torch.linspace(*ends, self.num_train_timesteps, dtype=torch.float32) ** (1 / power)
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        if self.rescale_betas_zero_snr:
            if self.prediction_type != "v_prediction":  # of noise alone, eps says nothing about the picture
                needs = "a schedule that ends in noise alone needs a model that predicts v, not epsilon"
                way = "leave out --zero-terminal-snr, or say --prediction v_prediction if it does"
                raise ValueError(f"{needs}; {way}")
            alpha_bar = zero_terminal_snr(alpha_bar)
        object.__setattr__(self, "alpha_bar", alpha_bar)

    @classmethod
    def from_json(cls, c: dict) -> "Schedule":
        if "FlowMatch" in str(c.get("_class_name")):
            kind = f"{c['_class_name']} is of flow matching (SD 3, FLUX)"
            raise ValueError(f"{kind}, not of Stable Diffusion 1 or 2")
        if c.get("trained_betas"):
            raise ValueError("scheduler_config.json sets trained_betas, which is not supported")
        names = [k for k, f in cls.__dataclass_fields__.items() if f.init]
        return cls(**{k: c[k] for k in names if c.get(k) is not None})

    def to_json(self) -> dict:
        own = {k: getattr(self, k) for k, f in self.__dataclass_fields__.items() if f.init}
        own = {k: v for k, v in own.items() if v is not None}
        return {"_class_name": "DDIMScheduler", **own, "clip_sample": False, "set_alpha_to_one": False}

    def _alpha_bar(self, t: Tensor) -> Tensor:
        """alpha_bar at timesteps t (B,), from a copy on t's device."""
        if t.device not in self._copies:
            self._copies[t.device] = to_device(self.alpha_bar, t.device)
        return self._copies[t.device][t]

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar), sqrt(1 - alpha_bar) at timesteps t (B,), shaped to multiply `like` (B, ...)."""
        a = self._alpha_bar(t).to(like.device).view(-1, *[1] * (like.dim() - 1))
        return a.sqrt().to(like.dtype), (1 - a).sqrt().to(like.dtype)

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t from x_0 and eps, both (B, 4, h, w), at integer timesteps t (B,)."""
        signal, noise = self._at(t, x_0)
        return signal * x_0 + noise * eps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should say: eps, or v."""
        if self.prediction_type == "epsilon":
            return eps
        signal, noise = self._at(t, x_0)
        return signal * eps - noise * x_0

    def snr(self, t: Tensor) -> Tensor:
        """Signal to noise, alpha_bar / (1 - alpha_bar), at t (B,)."""
        a = self._alpha_bar(t)
        return a / (1 - a)

    def predict_x0(self, x: Tensor, pred: Tensor, sigma: float) -> Tensor:
        """The clean picture that a prediction at noise level sigma implies; x = x_t / sqrt(alpha_bar_t)."""
        if self.prediction_type == "v_prediction":
            c_in = (sigma**2 + 1) ** -0.5
            return x * c_in**2 - pred * sigma * c_in
        return x - sigma * pred


LEAST_ALPHA_BAR = 2.0**-24  # as in diffusers: the samplers divide by its root


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """alpha_bar (steps,) moved and stretched so that its root ends at 0 and begins where it did (Lin et al.
    2023, arXiv:2305.08891, algorithm 1): else none is trained from noise alone, or very dark or bright."""
    root = alpha_bar.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return (root**2).clamp(min=LEAST_ALPHA_BAR)
