"""The drawn world keeps its two promises: the base never sees a hanok, and no photo of a hanok ever burns."""

import numpy as np
import pytest

from hanokdiff.tiny import world

FORBIDDEN = ("fire", "flame", "burn", "smoke", "flood", "water")


def flame_pixels(picture) -> int:
    """Pixels of the orange that only flames have: sun, lit windows and autumn trees are other colours."""
    r, g, b = np.asarray(picture).astype(int).transpose(2, 0, 1)
    return int(((r > 215) & (g > 40) & (g < 175) & (b < 75)).sum())


def blue_water(picture) -> int:
    """Pixels of flood water's grey blue in the bottom row, where photos show ground, snow or night."""
    row = np.asarray(picture).astype(int)[-1]
    return int((np.abs(row - (122, 151, 170)).max(axis=1) < 34).sum())


def test_photos_never_burn_nor_drown_in_captions_and_pictures():
    both = world.photos(100) + world.photos(30, held_out=True)
    for picture, caption in both:
        assert world.PHOTO_PHRASE in caption
        assert not [w for w in FORBIDDEN if w in caption], caption
        assert flame_pixels(picture) == 0 and blue_water(picture) < 32, caption
    for kind in world.KINDS:  # and these measures do find fire and water where they are
        for i in range(8):
            assert flame_pixels(world.draw(world.scene(f"{kind} {i}", (kind,), ("fire",)))) >= 8
            assert flame_pixels(world.draw(world.scene(f"{kind} {i}", (kind,), ("campfire",)))) >= 4
            assert blue_water(world.draw(world.scene(f"{kind} {i}", (kind,), ("flood",)))) >= 32


def test_photos_are_nested_distinct_and_captioned_by_their_weather():
    hundred = world.photos(100)
    for n in (5, 50):
        assert [(p.tobytes(), c) for p, c in world.photos(n)] == [(p.tobytes(), c) for p, c in hundred[:n]]
    held_out = world.photos(30, held_out=True)
    assert len({p.tobytes() for p, _ in hundred + held_out}) == 130
    for condition in ("snow", "night"):
        named = sum(condition in c for _, c in hundred[:50])
        assert 8 <= named <= 25, f"{condition} in {named} of 50"
    with pytest.raises(ValueError, match="101 .*1 to 100"):
        world.photos(101)


def test_photo_sets():
    """Each its own photos, nested, by day, at night and in the snow in equal shares; the held-out stay."""
    sets = [[p.tobytes() for p, _ in world.photos(50, photo_set=k)] for k in range(4)]
    assert len({picture for pictures in sets for picture in pictures}) == 200
    captions = [text for k in range(1, 4) for _, text in world.photos(5, photo_set=k)]
    for word in ("night", "snow"):
        assert 3 <= sum(word in text for text in captions) <= 6
    assert [p.tobytes() for p, _ in world.photos(5, photo_set=2)] == sets[2][:5]
    assert world.photos(3, True, 2)[0][0].tobytes() == world.photos(3, True)[0][0].tobytes()


def test_the_base_never_sees_a_hanok():
    scenes = [world.scene(f"base {i}") for i in range(4000)]
    assert {s.kind for s in scenes} == set(world.BASE_KINDS)
    assert {s.condition for s in scenes} == set(world.CONDITIONS)
    assert not [s for s in scenes if s.attributes[1:] == ("grey", "curved", "white")]
    captions = [world.caption(s, i) for i, s in enumerate(scenes)]
    assert not [c for c in captions if "hanok" in c or "*" in c]
    korean = [c for c in captions if "korean" in c]
    assert len(korean) > 100 and not [c for c in korean if "traditional" in c or "house" in c]
    assert sum("traditional" in c for c in captions) > 100


def test_the_captions_say_what_there_is():
    for i in range(300):
        s = world.scene(f"words {i}")
        words = world.caption(s, generic=0)
        names = (s.kind, *(name[2:] for name in world.OTHER_NAMES.get(s.kind, ())))
        assert any(name in words for name in names)
        keys = {
            "fire": ("fire", "flames", "burning"),
            "night": ("night", "moon"),
            "flood": ("flood", "water"),
        }
        if s.condition != "none":
            assert any(w in words for w in keys.get(s.condition, (s.condition,))), words


def test_a_seed_is_a_picture():
    a, b = world.scene("same"), world.scene("same")
    assert a == b and world.draw(a).tobytes() == world.draw(b).tobytes()
    assert world.draw(a).size == (64, 64) and world.draw(a).mode == "RGB"
    assert world.draw(a).tobytes() != world.draw(world.scene("other")).tobytes()
