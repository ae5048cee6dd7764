"""Metrics against closed forms and another way to the same number."""
import pytest
import torch
from torchvision.models import inception_v3

from tinyanl.metrics import (
    diversity,
    frechet_distance,
    inception,
    inception_score,
    nearest_similarity,
    precision_recall,
    psnr,
    retrieval,
)


def test_psnr_is_the_closed_form_averaged_over_pictures_and_clips():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), -0.02)])
    by_hand = [20, 40]  # 20 log10(2 / 0.2), 20 log10(2 / 0.02)
    assert psnr(x, y) == pytest.approx(sum(by_hand) / 2, abs=1e-4)
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


@pytest.mark.filterwarnings("ignore:5 samples of 8 features")
@pytest.mark.parametrize("n", [500, 5], ids=["full rank", "fewer samples than features"])
def test_frechet_distance_equals_the_published_formula_and_its_invariances(n):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(n, 8, generator=g) @ torch.randn(8, 8, generator=g)
    b = torch.randn(n + 1, 8, generator=g) @ torch.randn(8, 8, generator=g) + 1
    # FID's formula as published: the square root of the product itself, which is not symmetric,
    # through its eigenvalues
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


@pytest.mark.parametrize(
    "a, b, said",
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "two samples"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "equal width"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.nan), "NaN"),
    ],
)
def test_frechet_distance_refuses_what_has_no_answer(a, b, said):
    with pytest.raises(ValueError, match=said):
        frechet_distance(a, b)


def test_frechet_distance_is_pytorch_fids(recwarn):
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    g = torch.Generator().manual_seed(0)
    a = torch.randn(400, 32, generator=g)
    b = torch.randn(300, 32, generator=g) @ torch.randn(32, 32, generator=g) + 0.5
    sides = [x.double().numpy() for x in (a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))]
    expected = fid_score.calculate_frechet_distance(*sides)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert not [w for w in recwarn if "samples of" in str(w.message)]
    with pytest.warns(UserWarning, match="32 samples of 32 features"):
        frechet_distance(a[:32], b)


def test_frechet_distance_of_gaussians_whose_answer_is_known():
    g = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=g)).Q
    mean = torch.tensor([1.0, 0, 0, 2])
    a = torch.randn(200_000, 4, generator=g) * torch.tensor([1.0, 2, 3, 4]) @ turn
    b = torch.randn(200_000, 4, generator=g) * torch.tensor([2.0, 2, 1, 1]) @ turn + mean
    by_hand = (1 + 4) + (1 + 0 + 4 + 9)  # |mu|^2 + sum (s - s')^2
    assert frechet_distance(a, b) == pytest.approx(by_hand, rel=0.02)


def test_precision_and_recall_of_sets_that_overlap_by_hand():
    real = torch.tensor([[0.0], [1], [2], [10], [11], [12]])
    fake = torch.tensor([[0.5], [1.5], [50], [51], [52]])
    # two of five lie among the real ones, all of which are far from 50; of those, 0, 1 and 2 are
    # within 1 of 0.5 or 1.5
    assert precision_recall(real, fake, k=1) == pytest.approx((2 / 5, 3 / 6))
    assert precision_recall(real, real, k=1) == (1, 1)
    assert precision_recall(real, real + 1000, k=1) == (0, 0)
    with pytest.raises(ValueError, match="more than k = 5"):
        precision_recall(real, fake, k=5)


def test_diversity_is_the_mean_over_pairs():
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    pairs = torch.cosine_similarity(x[:, None], x[None], dim=-1)[~torch.eye(20, dtype=torch.bool)]
    assert diversity(x) == pytest.approx(1 - pairs.mean().item(), abs=1e-6)
    assert diversity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two samples"):
        diversity(x[:1])


def test_a_copy_is_found():
    training = torch.eye(4)
    found = nearest_similarity(torch.tensor([[0, 5.0, 0, 0], [1, 1, 0, 0]]), training)
    assert found.tolist() == pytest.approx([1, 0.5**0.5])


def test_inception_score_by_hand():
    sure = torch.full((4, 4), -50.0).fill_diagonal_(50)  # four classes, each certain: exp(log 4)
    assert inception_score(sure, splits=1) == pytest.approx((4, 0))
    assert inception_score(torch.zeros(10, 7), splits=2) == pytest.approx((1, 0))
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    kl = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert inception_score(p.log(), splits=1)[0] == pytest.approx(kl.exp().item())
    parts = inception_score(torch.cat([sure, torch.zeros(4, 4)]), splits=2)
    assert parts == pytest.approx((2.5, 1.5))
    with pytest.raises(ValueError, match="cannot be split"):
        inception_score(sure, splits=10)


def test_the_inception_of_fid_is_pytorch_fids_on_random_weights(monkeypatch):
    oracle = pytest.importorskip("pytorch_fid.inception")
    torch.manual_seed(0)
    options = {"num_classes": 1008, "aux_logits": False, "init_weights": False}
    state = inception_v3(weights=None, **options).state_dict()
    for name, x in state.items():
        if "running_var" in name:
            x.uniform_(0.05, 0.2)  # so that 94 layers let something through
        elif "running_mean" in name or name.endswith("bn.bias"):
            x.normal_(0, 0.1)
    monkeypatch.setattr(oracle, "load_state_dict_from_url", lambda *args, **kwargs: state)
    x = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        expected, = oracle.InceptionV3([3]).eval()(x)
        features, logits = inception(state)(2 * x - 1)
    expected = expected[:, :, 0, 0]
    atol = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=atol)
    torch.testing.assert_close(logits, features @ state["fc.weight"].T)
    assert features.std() > 0
