"""hanokdiff on a card that is not there (fakecuda.py): what it is given to do, and where it is waited for."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import fakecuda
import pytest
import torch
from test_caption import blip  # noqa: F401

from hanokdiff.files import replacing

# Operations that a step of each script hands to the card at the embedded model, views included, when this was
# last changed: whoever needs fewer lowers them. At SD 1.5's size: test_budget.py.
OPERATIONS = {
    "train ti --micro-batch 1": 2719,
    "train dreambooth --class-images class --held-out 2": 2438,
    "train lora --targets attention --rank 4 --class-images 0": 2087,
    "train hypernet --widths all --class-images 0": 1865,
}
STEPS = 3  # of the sampler


@pytest.fixture(scope="module")
def seen(tmp_path_factory, pytestconfig, blip):  # noqa: F811
    """Case -> its parts -> what the spy saw. One process for all; the guard is built once for each torch."""
    if not (shutil.which("g++") and sys.platform == "linux"):
        pytest.skip("no g++ here to build the pretended card with")
    source = (fakecuda.HERE / "fakecuda.cpp").read_bytes() + torch.__version__.encode()
    guard = pytestconfig.cache.mkdir("card") / f"{hashlib.sha256(source).hexdigest()[:12]}.so"
    if not guard.exists():
        with replacing(guard) as aside:
            fakecuda.build_guard(aside)
    cases = [*OPERATIONS, f"sample --steps {STEPS}", "vae", "clip", f"blip {blip}", "mistakes"]
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])\nimport fakecuda; fakecuda.main()"
    command = [sys.executable, "-c", code, guard, tmp_path_factory.mktemp("card"), *cases]
    path = os.pathsep.join(map(str, (fakecuda.HERE.parent, fakecuda.HERE)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for case, parts in found.items():
        assert isinstance(parts, list), f"{case}: {parts}\n{done.stderr}"
    return {case.partition(" ")[0] if case not in OPERATIONS else case: p for case, p in found.items()}


@pytest.mark.parametrize("case", OPERATIONS)
def test_a_training_step_keeps_the_card_busy(seen, case):
    """Two steps, the first of which is logged: nothing else waits. All products are in bf16."""
    logged, plain = seen[case]
    print(f"{case}: {logged['operations']} operations, then {plain['operations']}")
    for step in (logged, plain):
        assert step["blocking"] == {} and step["products"]["bfloat16"] > 100
    look = 2 if "held-out" in case else 0  # at held-out photos: before it, and its loss
    # textual inversion logs the norm of its vectors as well
    assert look < sum(logged["waits"].values()) <= look + 2
    assert plain["waits"] == plain["not bf16"] == {}  # a hypernetwork's logged ratio is in fp32
    assert plain["operations"] == OPERATIONS[case]


def test_a_look_waits_for_the_steps_before_it(seen):
    """Else the time that the card still needs for them would be taken for the look's."""
    waits = list(seen["train dreambooth --class-images class --held-out 2"][0]["waits"])
    assert waits[0].startswith("synchronize at hanokdiff/training/trainer.py") and "validation.py" in waits[1]


def test_no_sampling_step_waits(seen):
    before, *steps, last = seen["sample"]
    assert len(steps) == STEPS - 1 and not any(step["waits"] or step["blocking"] for step in steps)
    assert before["waits"] == {} and all("formats/load.py" in place for place in before["blocking"])
    assert sum(last["waits"].values()) == 3 and last["blocking"] == {}  # decoded: finite? finite? to the host
    assert not any(part["not bf16"] for part in seen["sample"])


def test_encoding_scoring_and_captions(seen):
    """Only results are waited for: the autoencoder's, CLIP's of pictures and texts, BLIP's words."""
    ((vae,), (clip,), (blip,)) = (seen[name] for name in ("vae", "clip", "blip"))  # noqa: F811
    assert [sum(part["waits"].values()) for part in (vae, clip)] == [1, 2]
    assert vae["blocking"] == clip["blocking"] == {}
    assert vae["not bf16"] == blip["not bf16"] == {} and set(clip["products"]) == {"float32"}
    file = (fakecuda.HERE.parent / "hanokdiff/caption.py").read_text("utf-8").splitlines()
    for place in blip["blocking"]:  # transformers' own
        assert "self.model.generate(" in file[int(place.rpartition(":")[2]) - 1]


def test_mistakes_are_seen(seen):
    (found,) = seen["mistakes"]
    assert (sum(found["blocking"].values()), sum(found["waits"].values())) == (2, 2)
    assert found["products"] == {"float32": 1, "bfloat16": 1} and len(found["not bf16"]) == 1
