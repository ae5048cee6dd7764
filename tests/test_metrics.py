"""Metrics against closed forms and another way to the same number."""
import pytest
import torch

from tinyanl.metrics import frechet_distance, psnr, retrieval


def test_psnr_is_the_closed_form_averaged_over_pictures_and_clips():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), -0.02)])
    assert psnr(x, y) == pytest.approx((20 + 40) / 2, abs=1e-4)  # 20 log10(2 / 0.2), 20 log10(2 / 0.02)
    assert psnr(x + 1, x + 1.5) == pytest.approx(106.0206)  # 1.5 is shown as 1: equal, at the cap


def test_retrieval_counts_the_pictures_nearest_to_their_own_text():
    texts = torch.eye(4)
    images = 3 * texts[[0, 1, 2, 3, 0]] + 0.1  # lengths do not matter
    assert retrieval(images, texts, torch.tensor([0, 1, 2, 3, 0])) == 1
    assert retrieval(images, texts, torch.tensor([0, 1, 2, 0, 1])) == pytest.approx(0.6)


def test_frechet_distance_is_the_closed_form_of_one_dimension():
    a = torch.randn(300, 1, generator=torch.Generator().manual_seed(0)) * 3 + 1
    b = torch.randn(200, 1, generator=torch.Generator().manual_seed(1)) * 0.5 - 2
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("n", [500, 5], ids=["full rank", "fewer samples than features"])
def test_frechet_distance_equals_the_published_formula_and_its_invariances(n):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(n, 8, generator=g) @ torch.randn(8, 8, generator=g)
    b = torch.randn(n + 1, 8, generator=g) @ torch.randn(8, 8, generator=g) + 1
    # FID's formula as published: the square root of the product itself, through its (not symmetric) eigenvalues
    product = torch.cov(a.T.double()) @ torch.cov(b.T.double())
    trace = torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()
    mean = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected = mean + torch.cov(a.T.double()).trace() + torch.cov(b.T.double()).trace() - 2 * trace
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(expected.item(), rel=1e-4)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-6)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    assert frechet_distance(a @ turn + 3, b @ turn + 3) == pytest.approx(distance, rel=1e-4)
    assert frechet_distance(2 * a, 2 * b) == pytest.approx(4 * distance, rel=1e-4)
    assert abs(frechet_distance(a, a)) < 1e-6 * distance


@pytest.mark.parametrize("a, b, said", [
    (torch.zeros(1, 3), torch.zeros(5, 3), "two samples"), (torch.zeros(5, 3), torch.zeros(5, 4), "equal width"),
    (torch.zeros(5, 3), torch.full((5, 3), torch.nan), "NaN")])
def test_frechet_distance_refuses_what_has_no_answer(a, b, said):
    with pytest.raises(ValueError, match=said):
        frechet_distance(a, b)
