"""Schedule and samplers against diffusers' schedulers, which are the reference, roundings included."""

import math

import numpy as np
import pytest
import torch
from conftest import PAIRS, SCHEDULE, difference

from hanokdiff.models import samplers
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.models.schedule import Schedule

PREDICTIONS = ("epsilon", "v_prediction")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def scheduler(name: str, **more):
    import diffusers

    kind, own = PAIRS[name]
    return getattr(diffusers, kind).from_config({**SCHEDULE, **own, **more})


def test_alpha_bar_and_sigma_are_the_published_ones():
    s = Schedule()
    assert s.alpha_bar.shape == (1000,)
    assert s.alpha_bar[0].item() == pytest.approx(0.99914998, abs=1e-8)
    assert s.alpha_bar[999].item() == pytest.approx(0.00466010, abs=1e-8)
    sigma = ((1 - s.alpha_bar) / s.alpha_bar).sqrt()
    assert sigma[0].item() == pytest.approx(0.0291675, abs=1e-6)
    assert sigma[999].item() == pytest.approx(14.614643, abs=1e-5)
    assert torch.equal(s.alpha_bar, scheduler("ddim").alphas_cumprod)


@pytest.mark.parametrize("beta", ["scaled_linear", "linear"])
def test_noise_and_targets_equal_diffusers(beta):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler.from_config({**SCHEDULE, "beta_schedule": beta})
    g = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(5, 4, 8, 8, generator=g), torch.randn(5, 4, 8, 8, generator=g)
    t = torch.tensor([0, 1, 500, 998, 999])
    plain, v = Schedule(beta_schedule=beta), Schedule(beta_schedule=beta, prediction_type="v_prediction")
    assert difference(plain.add_noise(x_0, eps, t), theirs.add_noise(x_0, eps, t)) <= 1e-6
    assert plain.target(x_0, eps, t) is eps
    assert difference(v.target(x_0, eps, t), theirs.get_velocity(x_0, eps, t)) <= 1e-6
    a = theirs.alphas_cumprod[t]
    assert difference(plain.snr(t), a / (1 - a)) <= 1e-3
    assert (plain.snr(t).diff() < 0).all()


def test_schedule_round_trip_and_bad_values():
    s = Schedule(beta_end=0.013, prediction_type="v_prediction", timestep_spacing="trailing")
    assert Schedule.from_json({**s.to_json(), "skip_prk_steps": True, "trained_betas": None}) == s
    assert Schedule.from_json({}) == Schedule()
    with pytest.raises(ValueError, match='"cosine" is not known.*scaled_linear'):
        Schedule(beta_schedule="cosine")
    with pytest.raises(ValueError, match='"sample" is not known.*epsilon, v_prediction'):
        Schedule(prediction_type="sample")


@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", PAIRS)
def test_timesteps_equal_diffusers(name, spacing):
    """For every number of steps from 1 to 60, and some large ones."""
    s = Schedule(timestep_spacing=spacing)
    theirs = scheduler(name, **({"timestep_spacing": spacing} if spacing else {}))
    for steps in [*range(1, 61), 99, 100, 150, 333, 500]:
        theirs.set_timesteps(steps)
        sigmas, ts = samplers.sigmas_and_timesteps(name, s, steps)
        assert len(ts) == steps and len(sigmas) == steps + 1
        expected = theirs.timesteps.numpy()
        if np.issubdtype(expected.dtype, np.integer):
            assert ts == expected.tolist(), steps
        else:
            np.testing.assert_allclose(ts, expected, rtol=1e-5, atol=2e-2, err_msg=str(steps))
        if name != "ddim":
            np.testing.assert_allclose(sigmas, theirs.sigmas.numpy(), rtol=2e-5, err_msg=str(steps))


def test_the_lists_of_20_steps():
    """As published: what the WebUI and the papers print."""
    assert samplers.sigmas_and_timesteps("ddim", Schedule(), 20)[1] == [*range(951, 0, -50)]
    ts = samplers.sigmas_and_timesteps("dpmpp_2m", Schedule(), 20)[1]
    assert ts[:2] == [999, 949] and ts[-1] == 50
    karras = samplers.sigmas_and_timesteps("dpmpp_2m_karras", Schedule(), 20)[0]
    np.testing.assert_allclose(karras[:3], [14.61464, 11.72537, 9.34021], atol=1e-5)
    np.testing.assert_allclose(karras[-3:], [0.04848, 0.02917, 0], atol=1e-5)
    assert samplers.sigmas_and_timesteps("ddim", Schedule(), 20)[0][-1] == pytest.approx(0.0291675, abs=1e-6)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_levels_fall(name):
    for steps in (1, 2, 7, 20, 100):
        sigmas, ts = samplers.sigmas_and_timesteps(name, Schedule(), steps)
        assert all(a > b for a, b in zip(sigmas, sigmas[1:], strict=False)) and all(0 <= t <= 999 for t in ts)


def test_bad_values():
    with pytest.raises(ValueError, match='"plms" is not known; choose one of ddim, euler'):
        samplers.sigmas_and_timesteps("plms", Schedule(), 20)
    for steps in (0, -3, 1001):
        with pytest.raises(ValueError, match=f"steps is {steps}, but must be between 1 and 1000"):
            samplers.sigmas_and_timesteps("ddim", Schedule(), steps)
    with pytest.raises(ValueError, match='"odd" is not known.*leading, linspace, trailing'):
        samplers.sigmas_and_timesteps("ddim", Schedule(timestep_spacing="odd"), 20)


def network(x, t, context=None):
    """A smooth nonlinear stand-in for the UNet: every value depends on its neighbours and on t."""
    phase = torch.as_tensor(t, dtype=torch.float32).view(-1, 1, 1, 1) / 300
    return torch.tanh(1.3 * x + 0.5 * x.roll(1, -1) * torch.cos(phase)) * (0.6 + 0.3 * torch.sin(phase)) + 0.1


class Network:
    """The same as a sampler calls it: with one timestep for all pictures."""

    def __call__(self, x, t, context):
        assert t.shape == (1,)
        return network(x, t.expand(len(x)), None)


def picture():
    """Smooth latents of two pictures to begin with."""
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(x, (8, 8), mode="bilinear")


def streams():
    return [torch.Generator().manual_seed(s) for s in (11, 12)]


def theirs_final(s, steps: int, net=network, context=None, first=None, strength: float = 1.0):
    """The latents at the end; from `first` on as their img2img pipeline does it."""
    generators = streams()

    def noise():
        return torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])

    s.set_timesteps(steps)
    begin = 0 if first is None else steps - int(steps * strength)
    if hasattr(s, "set_begin_index"):
        s.set_begin_index(begin)
    start = s.timesteps[begin : begin + 1].repeat(2)
    x = noise() * s.init_noise_sigma if first is None else s.add_noise(first, noise(), start)
    for t in s.timesteps[begin:]:
        out = net(s.scale_model_input(x, t), t.expand(2), context)
        more = {"generator": generators} if "Ancestral" in type(s).__name__ else {}
        x = s.step(out, t, x, **more).prev_sample
    return x


def sample(plan, denoise, noise, first=0):
    """The latents after each step, as in StableDiffusion.sample, of a network that guesses x0 at once."""
    x, previous = first + noise() * plan.start, None
    for sigma, after, t in plan.steps:
        x0 = denoise(x, sigma, t)
        x, previous = plan.step(x, x0, sigma, after, previous, noise), (x0, sigma)
        yield x / math.sqrt(after**2 + 1)


def ours_final(name: str, schedule, steps: int, net=network, context=None, first=None, strength=1.0):
    generators = streams()
    if net is network:
        net, context = Network(), torch.zeros(2, 1, 1)
    sd = StableDiffusion(net, None, None, schedule, torch.device("cpu"), torch.float32)

    def noise():
        return torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])

    def denoise(x, sigma, t):
        return schedule.predict_x0(x, sd.guided(x, sigma, t, context, 1), sigma)

    plan = samplers.plan(name, schedule, steps, None if first is None else strength)
    seen = list(sample(plan, denoise, noise, 0 if first is None else first))
    assert len(seen) == (steps if first is None else samplers.img2img_steps(steps, strength))
    return seen[-1]


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 30, 47])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_final_latent_equals_diffusers(name, prediction, steps):
    ours = ours_final(name, Schedule(prediction_type=prediction), steps)
    assert difference(ours, theirs_final(scheduler(name, prediction_type=prediction), steps)) <= 1e-4
    assert ours.std() > 0.1 or steps == 1  # one step on linspace starts at t = 0, there and here


def comparable(name: str, spacing: str, steps: int) -> bool:
    """diffusers' DDIM always steps down by 1000 // n, even where the next time is another; we go there."""
    return name != "ddim" or spacing == "leading" or (spacing == "trailing" and 1000 % steps == 0)


SPACED = [(n, s, k) for n in PAIRS for s in ("leading", "linspace", "trailing") for k in (10, 20, 30)]


@pytest.mark.parametrize("name, spacing, steps", [case for case in SPACED if comparable(*case)])
def test_spacings(name, spacing, steps):
    ours = ours_final(name, Schedule(timestep_spacing=spacing), steps)
    theirs = theirs_final(scheduler(name, timestep_spacing=spacing), steps)
    assert difference(ours, theirs) <= 1e-4


@pytest.mark.parametrize("name", PAIRS)
def test_final_latent_with_the_unet(sd1, load, name):
    context = torch.randn(2, 77, 48, generator=torch.Generator().manual_seed(5))
    unet = sd1.pipeline.unet

    with torch.inference_mode():
        theirs = theirs_final(scheduler(name), 10, lambda x, t, c: unet(x, t, c).sample, context)
        ours = ours_final(name, Schedule(), 10, load(sd1).unet, context)
    assert difference(ours, theirs) <= 1e-4


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [10, 20, 30])
@pytest.mark.parametrize("strength", [None, 0.3, 0.75])
def test_euler_a_karras_is_k_diffusions(prediction, steps, strength):
    """diffusers has no Karras spacing for it: the textbook formula, written out; from a picture, too."""
    a = Schedule().alpha_bar.double()
    table = ((1 - a) / a).sqrt()
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (table[-1] ** (1 / 7) + ramp * (table[0] ** (1 / 7) - table[-1] ** (1 / 7))) ** 7
    sigmas = [*sigmas.tolist(), 0.0]
    generators, first = streams(), picture() if strength else None
    sigmas = sigmas[steps - int(steps * strength) :] if strength else sigmas
    x = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators]).double() * sigmas[0]
    x = x + first if strength else x
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        t = np.interp(math.log(sigma), table.log().numpy(), np.arange(1000))
        scale = math.sqrt(sigma**2 + 1)
        out = network((x / scale).float(), torch.tensor(t)).double()
        clean = x - sigma * out if prediction == "epsilon" else x / scale**2 - out * sigma / scale
        up = min(after, math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
        x = x + (x - clean) / sigma * (math.sqrt(after**2 - up**2) - sigma)
        if after > 0:
            x = x + up * torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
    schedule = Schedule(prediction_type=prediction)
    ours = ours_final("euler_a_karras", schedule, steps, first=first, strength=strength or 1.0)
    assert difference(ours, x.float()) <= 1e-4


def test_samplers_differ():
    """Each goes its own way: none is another under a second name."""
    ends = {name: ours_final(name, Schedule(), 10) for name in samplers.SAMPLERS}
    for a in ends:
        for b in ends:
            assert a == b or (ends[a] - ends[b]).abs().max() > 1e-3, (a, b)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("steps", [5, 20])
def test_arrives_where_the_network_points(name, steps):
    """A network that always says the same picture: every sampler ends there. DDIM leaves sigma 0.029."""
    g = torch.Generator().manual_seed(1)
    clean = torch.randn(2, 4, 8, 8, generator=g)
    plan = samplers.plan(name, Schedule(), steps)
    *_, x = sample(plan, lambda *_: clean, lambda: torch.randn(2, 4, 8, 8, generator=g))
    assert (x - clean).abs().max() < (0.2 if name == "ddim" else 1e-4)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_from_a_picture_equals_diffusers(name, prediction, strength):
    """Noised to where the last int(steps * strength) steps begin, at whole and at broken numbers of steps."""
    for steps in (4, 10, 23):
        schedule = Schedule(prediction_type=prediction)
        start = dict(first=picture(), strength=strength)
        theirs = theirs_final(scheduler(name, prediction_type=prediction), steps, **start)
        assert difference(ours_final(name, schedule, steps, **start), theirs) <= 1e-4, steps


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", PAIRS)
def test_from_a_picture_at_other_spacings(name, spacing):
    if comparable(name, spacing, 10):
        ours = ours_final(name, Schedule(timestep_spacing=spacing), 10, first=picture(), strength=0.6)
        theirs = theirs_final(scheduler(name, timestep_spacing=spacing), 10, first=picture(), strength=0.6)
        assert difference(ours, theirs) <= 1e-4


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_strength_is_how_far_from_the_picture(name):
    """One that always paints its own ends there; one that paints what it sees: the less, the nearer."""
    first, g = picture(), torch.Generator().manual_seed(1)
    plan = samplers.plan(name, Schedule(), 20, 0.5)
    *_, x = sample(plan, lambda *_: -first, lambda: torch.randn(first.shape, generator=g), first)
    assert (x + first).abs().max() < (0.2 if name == "ddim" else 1e-4)
    ends = [ours_final(name, Schedule(), 20, first=first, strength=s) for s in (0.1, 0.5, 1.0)]
    moved = [(end - first).abs().mean() for end in ends]
    assert moved[0] < moved[1] < moved[2] and moved[0] < 0.5 * moved[2], moved
    # one for all
    once = [ours_final(name, Schedule(), 20, first=f, strength=1.0) for f in (first, first[:1])]
    assert once[1].shape == once[0].shape and torch.equal(once[0][0], once[1][0])


@pytest.mark.parametrize("steps, strength, n", [
    (20, 0.75, 15), (20, 1.0, 20), (10, 0.3, 3), (10, 0.39, 3), (7, 0.5, 3), (1, 1.0, 1), (1000, 0.001, 1),
])  # fmt: skip
def test_steps_taken(steps, strength, n):
    assert samplers.img2img_steps(steps, strength) == n


@pytest.mark.parametrize("steps, strength", [
    (20, 0.0), (20, -0.5), (20, 1.01), (20, math.nan), (20, math.inf), (20, 0.049), (1, 0.99), (30, 0.03),
])  # fmt: skip
def test_strength_out_of_range(steps, strength):
    words = f"strength is {strength:g}: of {steps} steps it must leave at least one"
    with pytest.raises(ValueError, match=words):
        samplers.img2img_steps(steps, strength)
    with pytest.raises(ValueError, match="strength is"):
        samplers.plan("ddim", Schedule(), steps, strength)


def test_the_strength_that_is_advised_is_accepted():
    for steps in range(1, 1001):
        with pytest.raises(ValueError) as caught:
            samplers.img2img_steps(steps, 0)
        assert samplers.img2img_steps(steps, float(str(caught.value).split()[-3])) >= 1, steps
