"""Runs killed at random moments and resumed; thousands by kills.py."""

import os
import random

import kills
import pytest

KILLS = int(os.environ.get("HANOKDIFF_KILLS", "1"))


@pytest.mark.parametrize("name", [n for n in kills.RUNS if n != "comparison"])
def test_killed_and_resumed_writes_the_very_tensors(tmp_path, name):
    options = "--steps 6 --images 2 --held-out 0 --save-every 2 --preview-every 0".split()
    options += ["--class-images", "2"] * (name != "textual inversion")
    tally = kills.killed(name, KILLS, tmp_path, seed=random.randrange(10**6), options=options)
    assert tally.kills == KILLS and not tally.lost + tally.different, tally
