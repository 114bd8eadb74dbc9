"""Runs killed at random moments and resumed; thousands by kills.py."""

import os
import random

import kills

KILLS = int(os.environ.get("HANOKDIFF_KILLS", "2"))


def test_killed_and_resumed_writes_the_very_tensors(tmp_path):
    """DreamBooth, which writes most; kills.py itself: all four, and the comparison."""
    options = "--steps 6 --images 2 --held-out 0 --save-every 2 --preview-every 0 --class-images 2".split()
    tally = kills.killed("DreamBooth", KILLS, tmp_path, seed=random.randrange(10**6), options=options)
    assert tally.kills == KILLS and not tally.lost + tally.different, tally
