"""A batch and its random numbers: functions of (seed, step, index), never of a generator that is used up.

So a resumed run needs no generator state and is bit-exact, a preview cannot disturb training, any split into
micro-batches or processes sees the same numbers, and two methods with one seed see the same photos and noise.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hanokdiff.device import to_device
from hanokdiff.seeding import seeded_generator


@dataclass(frozen=True)
class Batch:
    """Some indices of one step's global batch. B = the number of indices times the number of subsets.

    Every draw is made on the CPU, from a generator keyed by seed, step, index and the draw's name, and then
    copied to `device` without waiting for it."""

    seed: int | str
    step: int
    indices: range  # positions in the global batch
    size: int  # of the global batch
    subsets: tuple[str, ...] = ("",)  # DreamBooth has a second one, "class", with draws of its own
    device: torch.device | str = "cpu"

    def subset(self, *names: str) -> "Batch":
        """The same indices of another subset, or of several one after the other: subset("", "class")."""
        return replace(self, subsets=names)

    def _generators(self, name: str) -> list[torch.Generator]:
        keys = [(subset + name, i) for subset in self.subsets for i in self.indices]
        return [seeded_generator(self.seed, self.step, i, name) for name, i in keys]

    def photos(self, n: int) -> list[int]:
        """Which of n photos each index holds [B]: every epoch is a new permutation, with every photo once."""
        out = []
        for subset in self.subsets:
            for i in self.indices:
                epoch, place = divmod(self.step * self.size + i, n)
                order = torch.randperm(n, generator=seeded_generator(self.seed, subset + "epoch", epoch, n))
                out.append(order[place].item())
        return out

    def normal(self, shape, name: str = "noise") -> Tensor:
        """Standard normal numbers in the shape (B, ...)."""
        assert shape[0] == len(self.indices) * len(self.subsets), f"{tuple(shape)} for {self}"
        draws = [torch.randn(*shape[1:], generator=g) for g in self._generators(name)]
        return to_device(torch.stack(draws), self.device)

    def noise(self, shape, offset: float = 0.0) -> Tensor:
        """What is added to latents of this shape (B, C, h, w): standard normal numbers, and with `offset` one
        more for each whole channel, offset * N(0, 1), from which very dark and bright pictures are learnt
        (Guttenberg 2023, "Diffusion with offset noise")."""
        noise = self.normal(shape)
        return noise + offset * self.normal((*shape[:2], 1, 1), "offset") if offset else noise

    def timesteps(self, count: int) -> Tensor:
        """One timestep from 0 to count - 1 per index (B,)."""
        return to_device(self.integers(count, "timestep"), self.device)

    def integers(self, count: int, name: str) -> Tensor:
        """One whole number from 0 to count - 1 per index (B,), on the CPU."""
        return torch.cat([torch.randint(count, (1,), generator=g) for g in self._generators(name)])

    def uniform(self, name: str) -> Tensor:
        """One number in [0, 1) per index (B,), on the CPU."""
        return torch.cat([torch.rand(1, generator=g) for g in self._generators(name)])
