"""Photos that are not square: sizes of about the same number of pixels, each batch of one size.

Aspect-ratio bucketing (NovelAI 2022, "Improvements on Stable Diffusion"): cropped to a square, a 3:1 photo
loses two thirds. The sizes are multiples of what the UNet can halve at every level; which size a step has is
a function of the step alone, and every size comes as often as its share of the photos says.
"""

import math
from collections.abc import Sequence

Size = tuple[int, int]  # width, height in pixels
LONGEST = 2.5  # the longer side at most so many times the shorter


def sizes(resolution: int, step: int) -> list[Size]:
    """The square, and for each other width in steps the largest height with at most as many pixels."""
    found = {(resolution, resolution)}
    if resolution % step == 0 and resolution >= 2 * step:
        for wide in range(step, 3 * resolution, step):
            high = resolution**2 // wide // step * step
            if high and max(wide, high) <= LONGEST * min(wide, high):
                found |= {(wide, high), (high, wide)}
    return sorted(found)


def nearest(size: Size, choices: Sequence[Size]) -> Size:
    """The choice of the most similar shape."""
    shape = math.log(size[0] / size[1])
    return min(choices, key=lambda c: (abs(math.log(c[0] / c[1]) - shape), c))


def cut(size: Size, into: Size) -> float:
    """The share of a picture that cropping to this shape takes away."""
    a, b = size[0] / size[1], into[0] / into[1]
    return 1 - min(a, b) / max(a, b)


class Turns:
    """Whose turn it is: of groups of n_0, n_1, ... photos the one that is furthest behind its share."""

    def __init__(self, counts: Sequence[int]):
        self.counts, self.used, self.turns = counts, [0] * len(counts), []

    def at(self, step: int) -> tuple[int, int]:
        """(group, how often it has had its turn before) of a step."""
        total = sum(self.counts)
        while len(self.turns) <= step:
            t = len(self.turns) + 1
            behind = [n * t / total - used for n, used in zip(self.counts, self.used, strict=True)]
            group = behind.index(max(behind))
            self.turns.append((group, self.used[group]))
            self.used[group] += 1
        return self.turns[step]
