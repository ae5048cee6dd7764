"""Condition masks and guidance."""

import pytest
import torch
from torch.testing import assert_close

from tinyanl.masking import guided, mask_condition


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rate_zero_hides_nothing_and_rate_one_everything():
    cond = torch.randn(4, 512)
    assert torch.equal(mask_condition(cond, 0.0, seeded()), cond)
    assert torch.equal(mask_condition(cond, 1.0, seeded()), torch.zeros(4, 512))


def test_rate_zero_keeps_even_a_draw_of_exactly_zero(monkeypatch):
    monkeypatch.setattr(
        torch, "rand", lambda shape, **kw: torch.zeros(shape)
    )  # once in 2**24 draws, it happens
    assert torch.equal(mask_condition(torch.ones(2, 3), 0.0), torch.ones(2, 3))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_hidden_share_is_the_rate_and_the_rest_is_untouched(rate):
    cond = torch.randn(200, 512)
    masked = mask_condition(cond, rate, seeded())
    hidden = masked == 0
    assert abs(hidden.float().mean().item() - rate) < 5 * (rate * (1 - rate) / cond.numel()) ** 0.5
    assert torch.equal(masked[~hidden], cond[~hidden])
    assert (
        len({tuple(row.tolist()) for row in hidden[:20]}) == 20
    )  # each sample has a mask of its own


def test_a_seed_names_a_mask_and_each_sample_may_have_its_own_rate():
    cond = torch.ones(3, 400)
    assert torch.equal(mask_condition(cond, 0.3, seeded(1)), mask_condition(cond, 0.3, seeded(1)))
    assert not torch.equal(
        mask_condition(cond, 0.3, seeded(1)), mask_condition(cond, 0.3, seeded(2))
    )
    shares = mask_condition(cond, torch.tensor([[0.0], [0.5], [1.0]]), seeded()).mean(1)
    assert shares[0] == 1 and shares[2] == 0 and abs(shares[1] - 0.5) < 0.15


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_outside_0_to_1_is_an_error(rate):
    with pytest.raises(ValueError, match="mask rate"):
        mask_condition(torch.ones(1, 4), rate)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_guidance_follows_its_formula_in_one_batch(scale):
    batches = []

    def bind(cond):
        def model(z, t):
            batches.append(len(z))
            assert len(z) == len(t) == len(cond)
            return z * cond.sum(1).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1)

        return model

    z, t = torch.randn(3, 2, 4, 4), torch.tensor([1, 2, 3])
    cond, null = torch.randn(3, 8), torch.randn(1, 8)
    with_cond, without = bind(cond)(z, t), bind(null.expand(3, -1))(z, t)
    batches.clear()
    assert_close(guided(bind, cond, null, scale)(z, t), without + scale * (with_cond - without))
    assert batches == [3 if scale == 1 else 6]
