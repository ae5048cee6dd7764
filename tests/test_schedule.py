"""The schedule and samplers, step for step against diffusers' set to LDM's conventions, and against
closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.testing import assert_close

from tinyanl.schedule import (
    add_noise,
    ddim,
    ddim_timesteps,
    ddpm,
    ldm_alpha_bar,
    min_snr_weights,
)

LDM = dict(
    num_train_timesteps=1000,
    beta_schedule="scaled_linear",
    beta_start=0.0015,
    beta_end=0.0195,
    clip_sample=False,
)


def fake_model(z, t):
    """Bounded, nonlinear and different at every t: no error in a step can hide."""
    return torch.tanh(z * 0.7 + 0.3) + 0.1 * torch.sin(t.view(-1, 1, 1, 1) / 37).to(z)


def noise(seed=0, dtype=torch.float64):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_alpha_bar_is_the_product_by_hand():
    product, expected = 1.0, []
    for i in range(1000):
        root = math.sqrt(0.0015) + i / 999 * (math.sqrt(0.0195) - math.sqrt(0.0015))
        product *= 1 - root**2
        expected.append(product)
    assert ldm_alpha_bar().dtype == torch.float64
    assert_close(
        ldm_alpha_bar(), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-10
    )


def test_add_noise_equals_diffusers_and_keeps_the_latents_type():
    z0, eps, t = noise(0, torch.float32), noise(1, torch.float32), torch.tensor([0, 999])
    ours = add_noise(z0, t, eps, ldm_alpha_bar())
    assert ours.dtype == torch.float32
    assert_close(ours, DDPMScheduler(**LDM).add_noise(z0, eps, t), atol=1e-5, rtol=1e-5)


def test_min_snr_weights_are_those_of_their_definition():
    """diffusers' training example: min(SNR, 5) / SNR for a model that predicts noise; at much noise
    they are 1, and where SNR is 100 they are 1/20."""
    alpha_bar = torch.tensor([100 / 101, 5 / 6, 0.5, 0.001], dtype=torch.float64)
    expected = torch.tensor([0.05, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert_close(min_snr_weights(alpha_bar), expected)
    snr = compute_snr(DDPMScheduler(**LDM), torch.arange(1000))
    theirs = torch.minimum(snr, torch.full_like(snr, 5)) / snr
    assert_close(min_snr_weights(ldm_alpha_bar()).float(), theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", [s for s in range(1, 1000) if 1000 % s == 0])
def test_timesteps_are_a_thousandth_apart_from_one_on(steps):
    assert ddim_timesteps(1000, steps).tolist() == [1 + i * 1000 // steps for i in range(steps)]


@pytest.mark.parametrize("steps", [0, -1, 3, 300, 999, 1000, 1001])
def test_step_counts_that_run_off_the_end_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps} must divide 1000.*50"):
        ddim_timesteps(1000, steps)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [5, 50])
def test_ddim_equals_diffusers_at_every_step(eta, steps):
    theirs = DDIMScheduler(
        **LDM, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
    )
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = (
        ldm_alpha_bar(),
        ldm_alpha_bar()[0],
    )  # float64, as LDM's
    theirs.set_timesteps(steps)
    z, generator, visited = noise(), torch.Generator().manual_seed(7), []
    ours = ddim(fake_model, noise(), ldm_alpha_bar(), steps, eta, torch.Generator().manual_seed(7))
    for t, (our_t, our_z, our_z0) in zip(theirs.timesteps.tolist(), ours, strict=True):
        step = theirs.step(fake_model(z, torch.full((2,), t)), t, z, eta=eta, generator=generator)
        z = step.prev_sample
        assert our_t == t
        assert_close(our_z0, step.pred_original_sample, atol=1e-9, rtol=1e-7)
        assert_close(our_z, z, atol=1e-9, rtol=1e-7)
        visited.append(t)
    assert len(visited) == steps and visited[-1] == 1


def test_ddpm_equals_diffusers_at_every_step():
    theirs = DDPMScheduler(**LDM, variance_type="fixed_small")
    theirs.alphas_cumprod = ldm_alpha_bar()
    theirs.one = torch.tensor(1.0, dtype=torch.float64)
    theirs.alphas = theirs.alphas_cumprod / torch.cat(
        [theirs.one.view(1), theirs.alphas_cumprod[:-1]]
    )
    theirs.betas = 1 - theirs.alphas
    theirs.set_timesteps(1000)
    z, generator = noise(), torch.Generator().manual_seed(7)
    ours = ddpm(fake_model, noise(), ldm_alpha_bar(), torch.Generator().manual_seed(7))
    for t, (our_t, our_z, our_z0) in zip(range(999, -1, -1), ours, strict=True):
        step = theirs.step(fake_model(z, torch.full((2,), t)), t, z, generator=generator)
        z = step.prev_sample
        assert our_t == t
        assert_close(our_z0, step.pred_original_sample, atol=1e-9, rtol=1e-6)
        assert_close(our_z, z, atol=1e-9, rtol=1e-6)


def gaussian_denoiser(mean, std):
    """The exact eps for data ~ N(mean, std^2): what a perfectly trained model would say."""
    alpha_bar = ldm_alpha_bar()

    def eps(z, t):
        a = alpha_bar[t[0]].item()
        return (1 - a) ** 0.5 * (z - a**0.5 * mean) / (a * std**2 + 1 - a)

    return eps


@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim eta 1"])
def test_an_exact_denoiser_gives_back_its_distribution(name):
    g = torch.Generator().manual_seed(0)
    z, alpha_bar, model = (
        torch.randn(4000, 1, 1, 1, generator=g),
        ldm_alpha_bar(),
        gaussian_denoiser(3.0, 0.5),
    )
    sampler = {
        "ddpm": lambda: ddpm(model, z, alpha_bar, g),
        "ddim": lambda: ddim(model, z, alpha_bar, 500),
        "ddim eta 1": lambda: ddim(model, z, alpha_bar, 500, 1.0, g),
    }[name]()
    *_, (t, z, z0) = sampler
    assert abs(z.mean().item() - 3) < 0.05 and abs(z.std().item() - 0.5) < 0.05


def test_ddim_moves_each_noise_along_the_exact_path():
    """Deterministic DDIM integrates an ODE to first order: a Gaussian keeps its quantiles from the
    first timestep to alpha_bar[0], with an error that halves as the steps double."""
    mean, std, alpha_bar, errors = 3.0, 0.5, ldm_alpha_bar(), []
    noise = torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    for steps in (125, 250, 500):
        *_, (_, z, _) = ddim(gaussian_denoiser(mean, std), noise, alpha_bar, steps)
        first, last = alpha_bar[ddim_timesteps(1000, steps)[-1]], alpha_bar[0]
        spread = ((last * std**2 + 1 - last) / (first * std**2 + 1 - first)).sqrt()
        exact = last.sqrt() * mean + spread * (noise - first.sqrt() * mean)
        errors.append((z - exact).abs().max().item())
    assert errors[-1] < 0.02 and all(1.8 < a / b < 2.1 for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_keep_their_type(dtype):
    z_T = noise(0, torch.float32).to(dtype)
    assert add_noise(z_T, torch.tensor([0, 999]), z_T, ldm_alpha_bar()).dtype == dtype
    for sampler in (
        ddim(fake_model, z_T, ldm_alpha_bar(), 2),
        ddim(fake_model, z_T, ldm_alpha_bar(), 2, 1.0),
        ddpm(fake_model, z_T, ldm_alpha_bar(steps=20)),
    ):
        assert all(z.dtype == z0.dtype == dtype for _, z, z0 in sampler)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_more_noise_than_a_step_leaves_room_for_is_refused(eta):
    with pytest.raises(ValueError, match="eta="):
        next(ddim(lambda z, t: z, torch.zeros(1, 3, 4, 4), ldm_alpha_bar(), 20, eta))


def test_samplers_build_no_graph():
    weight = torch.ones(1, requires_grad=True)
    *_, (_, z, _) = ddim(lambda z, t: z * weight, noise(), ldm_alpha_bar(), 2)
    assert not z.requires_grad
