"""Ways to tune: which tensors train, what the context is, and that a run of each is what its
adapter gives back."""

from types import SimpleNamespace

import pytest
import torch

from tinyanl import models, train
from tinyanl.flowers import draw
from tinyanl.models import Run, load_run
from tinyanl.sample import sample
from tinyanl.tune import DEAD, TUNES, depths, trained, tunable
from tinyanl.unet import UNet


@pytest.fixture(scope="module")
def cin256():
    """The paper's U-Net, without numbers."""
    with torch.device("meta"):
        return SimpleNamespace(unet=UNet(), clip=SimpleNamespace(dim=512), name="cin256-v2")


def count(tensors):
    return sum(p.numel() for p in tensors.values())


def test_the_papers_count_is_that_of_the_transformer_blocks(cin256):
    own = trained(tunable(cin256, "attention"))
    assert count(own) == 169_550_400  # "169M of 400M"
    assert count({k: p for k, p in own.items() if DEAD.search(k)}) == 13_353_600
    assert {k.split(".transformer_blocks")[0] for k in own if "transformer_blocks" in k} == {
        k.rsplit(".", 2)[0] for k in own if "proj_in" in k
    }


def test_every_way_trains_what_it_says(cin256):
    counts = {tune: count(trained(tunable(cin256, tune))) for tune in TUNES}
    assert counts["all"] == counts["scratch"] == 400_920_579
    assert (
        counts["deep"] + counts["shallow"] == counts["all"]
        and min(counts["deep"], counts["shallow"]) > 0
    )
    assert counts["uncond"] == 126_960_000
    names = trained(tunable(cin256, "deep"))
    assert {name.split(".")[2] for name in names if "input_blocks" in name} == {
        str(i) for i in range(7, 12)
    }
    assert {name.split(".")[2] for name in names if "output_blocks" in name} == {
        str(i) for i in range(6)
    }
    assert any("middle_block" in name for name in names) and not any(
        "time_embed" in name for name in names
    )
    assert set(depths(cin256.unet).values()) == {0, 1 / 3, 2 / 3, 1}


def test_a_map_stands_in_front_where_widths_differ_or_there_are_more_tokens(cin256):
    assert not list(tunable(cin256, "attention")["to_context"].parameters())
    assert tunable(cin256, "all", tokens=4)["to_context"].weight.shape == (4 * 512, 512)
    cin256 = SimpleNamespace(unet=cin256.unet, clip=SimpleNamespace(dim=768), name="cin256-v2")
    assert tunable(cin256, "all")["to_context"].weight.shape == (512, 768)


@pytest.mark.parametrize("tune", ["attention", "all", "scratch", "deep", "shallow", "uncond"])
def test_a_unet_without_transformers_can_be_tuned_by_anl_alone(tune):
    with torch.device("meta"):
        faces = SimpleNamespace(
            unet=UNet(
                channels=32,
                mult=(1, 2),
                attention=(False, True),
                context_dim=None,
                head_channels=32,
            ),
            clip=SimpleNamespace(dim=512),
            name="celeba256",
        )
    with pytest.raises(
        ValueError,
        match=f"tune='{tune}' needs a U-Net with transformer blocks.*celeba256.*choose anl",
    ):
        tunable(faces, tune)
    assert trained(tunable(faces, "anl"))


@pytest.mark.parametrize("tune", TUNES)
def test_training_moves_these_tensors_alone_and_the_run_comes_back(
    tune, base, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "load_base", lambda *args: base)
    monkeypatch.setattr(train, "draw", lambda *args: None)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        draw(i)[0].save(data / f"{i}.png")
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    tokens = 2 if tune == "attention" else 1
    out = train.train(
        data, tune=tune, tokens=tokens, steps=2, batch=2, out=tmp_path / "run", device="cpu"
    )
    assert all(
        torch.equal(v, before[k]) for k, v in base.unet.state_dict().items()
    )  # the base itself stays
    run = load_run(out, device="cpu")
    names = trained(tunable(base, tune, tokens))
    if tune not in ("anl", "scratch"):
        moved = {
            f"unet.{k}"
            for k, v in run.model["unet"].state_dict().items()
            if not torch.equal(v, before[k])
        }
        dead = {k for k in names if tokens == 1 and DEAD.search(k)}
        assert moved == {k for k in names if k.startswith("unet.")} - dead
    cond, z = torch.randn(2, 128), torch.randn(2, *base.latent_shape)
    t = torch.tensor([10, 900])
    eps = run.bind(cond)(z, t)
    assert (tune == "uncond") == torch.equal(
        eps, run.bind(-cond)(z, t)
    )  # all others see the condition
    train.train(
        data, tune=tune, tokens=tokens, steps=2, batch=2, out=out, resume=True, device="cpu"
    )
    assert torch.equal(load_run(out, device="cpu").bind(cond)(z, t), eps)
    assert sample(run, cond, steps=2).shape == (2, 3, 64, 64)
    monkeypatch.setattr(models, "has_bf16", lambda device: True)
    rounded = load_run(
        out, device="cpu"
    )  # once, to what autocast makes of the weights at every evaluation
    assert rounded.bind(cond)(z, t).dtype == torch.float32
    assert {
        p.dtype
        for run in (rounded.base.unet, rounded.model)
        for name, p in run.named_parameters()
        if p.dim() > 1
    } == {torch.bfloat16}
    monkeypatch.setattr(Run, "frozen", lambda run: run)
    with torch.no_grad():
        assert torch.equal(rounded.bind(cond)(z, t), load_run(out, device="cpu").bind(cond)(z, t))


def test_dead_tensors_have_no_gradient(base):
    torch.manual_seed(
        0
    )  # fresh weights: in trained ones a saturated softmax may leave a live tensor next to nothing
    run = Run(base, tunable(base, "scratch"), None, None, 1.0, {}, [])
    run.bind(torch.randn(2, 128))(
        torch.randn(2, *base.latent_shape), torch.tensor([10, 900])
    ).square().mean().backward()
    for name, p in trained(run.model).items():
        if DEAD.search(name):
            assert p.grad is None, name
        else:
            assert p.grad.abs().max() > 1e-7, name
