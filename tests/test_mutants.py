"""Small changes of the package that no other test noticed, a test for each, found by them."""

import json
import shutil
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from commands import flags
from parity import randomise
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.functional import pil_to_tensor

from tinyanl import augment, dataset, evaluate, flowers, loss
from tinyanl.data import open_rgb, scan, to_square
from tinyanl.dataset import curve_batch, training_batch
from tinyanl.encode import embed_texts, encode
from tinyanl.experiments.judge import class_of, pictures
from tinyanl.loss import denoising_loss
from tinyanl.masking import guided, mask_condition
from tinyanl.metrics import psnr
from tinyanl.models import EMBEDDED, Run, load_base, load_run, split
from tinyanl.runs import noting_signals
from tinyanl.sample import filmstrip, sample, to_uint8
from tinyanl.sample import main as sample_main
from tinyanl.schedule import ddim, ldm_alpha_bar
from tinyanl.train import cosine, train
from tinyanl.tune import DEAD, tunable
from tinyanl.unet import UNet

train_module = sys.modules["tinyanl.train"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "flowers"
    flowers.write(folder, 12)
    return folder


@pytest.fixture(scope="module")
def paths(data):
    return [picture.path for picture in scan(data, 64).pictures]


@pytest.fixture(scope="module")
def run_folder(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return train(data, steps=2, batch=4, sample_every=9, seed=3, out=out, device="cpu")


@pytest.fixture(scope="module")
def run(run_folder):
    return load_run(run_folder, device="cpu")


@pytest.fixture
def copy(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "copy")


def fresh_run(base):
    return Run(base, tunable(base), None, None, 1.0, {}, [])


def test_a_picture_meets_its_own_condition_any_time_and_normal_noise():
    n = torch.arange(20.0).view(10, 2)
    ids = torch.tensor([1, 2, 4, 7, 9])
    latents = n[..., None, None, None].expand(-1, -1, 3, 4, 4)
    cond = 1 + n[..., None].expand(-1, -1, 64)
    z0, c, t, eps, _ = training_batch(latents, cond, ids, 4000, 0.0, seed=1, step=7)
    kept = c.any(1)
    assert torch.equal(c[kept], 1 + z0[kept][:, 0, 0, :1].expand(-1, 64))
    assert t.min() < 10 and t.max() > 990
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02


def test_a_held_out_picture_meets_its_own_condition():
    latents, cond, ids = torch.randn(9, 2, 3, 4, 4), torch.randn(9, 2, 8), torch.tensor([0, 3, 8])
    _, c, _, eps, _ = curve_batch(latents, cond, ids)
    assert torch.equal(c[:4], cond[[0, 3, 8, 0], 0]) and abs(eps.std() - 1) < 0.1


def test_the_loss_by_hand(base):
    g, t = torch.Generator().manual_seed(0), torch.tensor([50, 800])
    z0, eps = torch.randn(2, 2, *base.latent_shape, generator=g)
    a = ldm_alpha_bar()[t].float().view(-1, 1, 1, 1)
    with torch.no_grad():
        guess = base.unet(a.sqrt() * z0 + (1 - a).sqrt() * eps, t, base.null.expand(2, -1, -1))
        found = denoising_loss(fresh_run(base), z0, torch.randn(2, 128), t, eps)
        trained_on = loss.Loss(fresh_run(base))(z0, torch.randn(2, 128), t, eps)
    errors = (guess - eps).square().mean((1, 2, 3))
    assert_close(found, errors.mean())
    snr = (a / (1 - a)).flatten()
    assert snr[0] > 5 > snr[1]
    assert_close(trained_on, (errors[0] * 5 / snr[0] + errors[1]) / 2)


def test_the_learning_rate_is_half_a_cosine():
    rates = [cosine(2.0, step, steps=8) for step in range(9)]
    assert rates[0] == 2 and rates[4] == pytest.approx(1) and rates[8] == pytest.approx(0)
    assert rates[2] == pytest.approx(1 + 2**-0.5)
    assert all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False))


def test_a_sample_is_the_end_of_ddim_on_a_masked_guided_condition(run):
    cond = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(5)
    z = torch.randn(2, *run.base.latent_shape, generator=g)
    model = guided(run.bind, mask_condition(cond, 0.3, g), torch.zeros(1, 128), 2.0)
    *_, (_, z, _) = ddim(model, z, ldm_alpha_bar(), 4, 0.5, g)
    expected = run.base.autoencoder.decode(z).clamp(-1, 1)
    assert torch.equal(sample(run, cond, 0.3, 2.0, 4, seed=5, eta=0.5), expected)


@pytest.mark.parametrize("what", ["like", "text", None])
def test_the_sample_command_draws_what_it_was_asked_for(
    run, run_folder, data, paths, tmp_path, what
):
    texts = ["a red rose", "a blue daisy"]
    words = []
    cond = torch.zeros(1, 128)
    if what == "like":
        words = ["--like", str(data)]
        cond = (encode(run.base, paths[:3])[1][:, 0] - run.mu) / run.sigma
    if what == "text":
        words = ["--text", *texts]
        cond = (embed_texts(run.base, texts) - run.mu_text) / run.sigma
    asked = flags(run=run_folder, n=3, steps=2, mask_rate=0.3, guidance=2, seed=5, device="cpu")
    sample_main([*asked, *words, "--out", str(tmp_path)])
    drawn = [pil_to_tensor(Image.open(tmp_path / f"{i:04d}.png")) for i in range(3)]
    expected = sample(run, cond[torch.arange(3) % len(cond)], 0.3, 2.0, 2, 5)
    assert torch.equal(torch.stack(drawn), to_uint8(expected))


def test_no_class_is_the_last_row_of_the_table(base):
    state = torch.load(EMBEDDED / "ldm.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(base.null[0, 0], state["cond_stage_model.embedding.weight"][-1].float())


def test_embeddings_are_those_of_the_picture_and_its_mirror_image(base, paths):
    x = to_square(open_rgb(paths[0]), 64)
    mirrored = base.clip.embed(torch.stack([x, x.flip(-1)]))
    assert_close(encode(base, paths[:1])[1][0], mirrored, atol=2e-3, rtol=0)


def test_the_log_has_the_errors_on_the_pictures_it_names(run, run_folder, paths):
    latents, embeddings = encode(run.base, paths)
    row = json.loads((run_folder / "log.jsonl").read_text().splitlines()[-1])
    for name, ids in zip(("training", "held_out"), split(range(12), 3), strict=True):
        batch = curve_batch(latents, run.condition(embeddings), ids)
        found = denoising_loss(run, *batch[:4]).item()
        assert row[name] == pytest.approx(found, rel=1e-4)


def test_the_first_step_of_adam_and_of_the_average_in_closed_form(data, tmp_path):
    """What starts at 0 moves by lr g / (|g| + eps), and the average by 1 - 1/10 of it."""
    out = train(data, steps=1, batch=4, lr=3e-3, out=tmp_path / "run", device="cpu")
    state = torch.load(out / "state.pt", weights_only=True)
    (group,) = state["optimizer"]["param_groups"]
    names = [name for name in state["live"] if not DEAD.search(name)]
    ids = dict(zip(names, group["params"], strict=True))
    zero_at_first = [name for name in names if "to_out" in name or "from_hidden" in name]
    assert zero_at_first
    for name in zero_at_first:
        average = state["optimizer"]["state"][ids[name]]["exp_avg"]
        gradient = average / (1 - group["betas"][0])  # the average was 0 before
        assert gradient.any()
        expected = -3e-3 * gradient / (gradient.abs() + group["eps"])
        assert_close(state["live"][name], expected, rtol=1e-3, atol=0)
        assert_close(state["ema"][name], 0.9 * state["live"][name])


def test_an_uncentred_run_has_no_centre(data, tmp_path):
    out = train(data, steps=1, batch=4, uncentred=True, out=tmp_path / "run", device="cpu")
    kept = torch.load(out / "adapter.pt", weights_only=True)
    assert not kept["mu"].any() and not kept["mu_text"].any()
    assert kept["sigma"] == pytest.approx(128**-0.5)


@pytest.mark.parametrize("change", [dict(batch=5), dict(lr=1e-3), dict(train_mask=0.2)])
def test_what_a_resumed_run_may_change_does_change(data, copy, change, monkeypatch):
    asked, batches, new = [], training_batch, dict(batch=4, lr=2e-3, train_mask=0.0) | change
    monkeypatch.setattr(
        dataset, "training_batch", lambda *args: asked.append(args[3:5]) or batches(*args)
    )
    train(data, steps=4, out=copy, resume=True, seed=3, device="cpu", sample_every=9, **new)
    # steps 2 and 3, and one that is drawn ahead
    assert asked == [(new["batch"], new["train_mask"])] * 3
    optimizer = torch.load(copy / "state.pt", weights_only=True)["optimizer"]
    assert optimizer["param_groups"][0]["lr"] == cosine(new["lr"], step=3, steps=4)


def test_an_adapter_whose_state_is_gone_is_not_replaced(data, copy):
    (copy / "state.pt").unlink()
    with pytest.raises(FileExistsError, match="no state.pt.*--overwrite"):
        train(data, steps=4, batch=4, seed=3, out=copy, resume=True, device="cpu")
    assert (copy / "adapter.pt").exists()


def test_a_second_ctrl_c_does_what_it_always_does():
    with pytest.raises(KeyboardInterrupt), noting_signals() as noted:
        signal.raise_signal(signal.SIGINT)
        assert noted == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it was swallowed")


def test_accumulate_and_checkpoint_reach_the_loss_and_the_unet(data, tmp_path, monkeypatch, base):
    sizes, loss_of = [], denoising_loss
    monkeypatch.setattr(base.unet, "checkpointing", False)
    monkeypatch.setattr(train_module, "load_base", lambda *args: base)
    monkeypatch.setattr(
        loss, "denoising_loss", lambda run, *own: sizes.append(len(own[0])) or loss_of(run, *own)
    )
    train(data, steps=2, batch=8, out=tmp_path / "run", device="cpu", accumulate=4, checkpoint=True)
    assert base.unet.checkpointing and sizes == [2] * 8 + [64] * 2


def test_the_embedded_weights_are_as_good_as_their_readme_says(base, paths):
    """28.4 dB and 0.122 on these flowers; with group norms of 32 groups, whatever the width, 13.2
    dB and 0.350."""
    x = torch.stack([to_square(open_rgb(path), 64) for path in paths])
    with torch.no_grad():
        z = base.autoencoder.encode(x)
        assert psnr(x, base.autoencoder.decode(z)) > 26
        batch = curve_batch(z[:, None], torch.zeros(12, 1, 128), torch.arange(12))
        assert denoising_loss(fresh_run(base), *batch[:4]) < 0.2


@pytest.mark.filterwarnings("ignore:.*samples of (128|64|3) features")
def test_diversity_within_a_condition_and_across_are_told_apart(base, paths):
    x = pictures(paths, 64)
    observers = evaluate.Observers(base)
    two = observers.observe(x[:2].repeat_interleave(16, 0))
    row = evaluate.measure(two, observers.observe(x), two["clip"])
    apart = 1 - F.cosine_similarity(two["clip"][0], two["clip"][16], dim=0).item()
    assert row["within"] == pytest.approx(0, abs=1e-5)
    assert row["across"] == pytest.approx(apart, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*samples of (128|64|3) features")
def test_an_ideal_painter_is_right_before_an_ideal_judge(run, data, paths, monkeypatch):
    """Rates, ids, captions and the run's own seed must all be where they belong for that."""
    x, asked = pictures(paths, 64), []
    truth = torch.tensor([class_of(picture.text) for picture in scan(data, 64).pictures])
    told = run.condition(encode(run.base, paths, latents=False)[1]).flatten(0, 1)

    def ideal(run, cond, rate, **how):
        i = torch.cdist(cond, told).argmin(1) // 2
        asked.append((set(i.tolist()), rate))
        return x[i] / 127.5 - 1

    def judge(view):
        i = torch.cdist(view.flatten(1), x.flatten(1) / 127.5 - 1).argmin(1)
        return view[:, :, 0, 0], F.one_hot(truth[i], 43)

    monkeypatch.setattr(evaluate, "sample", ideal)
    plan = evaluate.Plan((0.0, 0.5), 32)
    rows = evaluate.evaluate(run, x.repeat(3, 1, 1, 1)[:32], plan, judge=judge)
    train_ids, held_ids = (set(ids.tolist()) for ids in split(range(12), 3))
    assert [rate for _, rate in asked] == [0, 0.5] * 2
    sets = (train_ids, train_ids, held_ids, held_ids)
    assert all(ids <= own for (ids, _), own in zip(asked, sets, strict=True))
    for row in rows:
        assert row["right kind and colour"] == row["right kind"] == row["right colour"] == 1
    assert len(rows) == 4


def test_variations_have_their_mask_and_seed(run, paths):
    x, embeddings = augment.augment(run, paths[:3], per_image=2, mask_rate=0.3, steps=2, seed=4)
    expected = sample(run, run.condition(embeddings).repeat_interleave(2, 0), 0.3, steps=2, seed=4)
    assert torch.equal(x.flatten(0, 1), to_uint8(expected))


def test_variations_are_compared_with_other_classes_and_with_training_pictures(
    run, run_folder, paths, tmp_path
):
    for i in range(4):
        (tmp_path / "given" / "ab"[i % 2]).mkdir(exist_ok=True, parents=True)
        flowers.draw(i)[0].save(tmp_path / "given" / "ab"[i % 2] / f"flower {i}.png")
    given, more = tmp_path / "given", tmp_path / "more"
    augment.main(flags(run=run_folder, data=given, out=more, per_image=3, steps=2))
    rows = json.loads((more / "augment.json").read_text())["pictures"]

    def embed(files):
        return run.base.clip.embed(torch.stack([to_square(open_rgb(file), 64) for file in files]))

    ours, sources = embed([more / row["file"] for row in rows]), embed([row["of"] for row in rows])
    letter = torch.tensor([ord(row["file"][0]) for row in rows])
    other = (ours @ sources.T).masked_fill(letter[:, None] == letter, -2).amax(1)
    found = [row["like another class"] for row in rows]
    assert found == pytest.approx(other.tolist(), abs=5e-3)
    x = torch.stack([to_square(open_rgb(path), 64) for path in paths])[split(range(12), 3)[0]]
    copied = (ours @ run.base.clip.embed(torch.cat([x, x.flip(-1)])).T).amax(1)
    found = [row["like a training picture"] for row in rows]
    assert found == pytest.approx(copied.tolist(), abs=5e-3)


def test_a_base_without_classes_has_heads_of_32_channels(tmp_path):
    own = torch.load(EMBEDDED / "ldm.ckpt", weights_only=True)["state_dict"]
    channels = own["first_stage_model.post_quant_conv.weight"].shape[1]
    sizes = {"in_channels": channels, "out_channels": channels, "channels": 64, "mult": (1, 2)}
    unet = UNet(**sizes, attention=(False, True), context_dim=None, head_channels=32)
    randomise(unet)
    state = {"model.diffusion_model." + k: v for k, v in unet.state_dict().items()} | {
        "image_size": torch.tensor(64)
    }
    state |= {k: v for k, v in own.items() if k.startswith("first_stage_model.")}
    torch.save({"state_dict": state}, tmp_path / "ldm.ckpt")
    for name in ("clip.pt", "merges.txt.gz"):
        shutil.copy(EMBEDDED / name, tmp_path)
    base = load_base(tmp_path, "cpu")
    z, t = torch.randn(2, *base.latent_shape), torch.tensor([10, 900])
    with torch.no_grad():
        assert base.null is None
        assert torch.equal(fresh_run(base).bind(torch.randn(2, 128))(z, t), unet(z, t))


def changed_weights(folder, file, key):
    """A copy of the embedded weights with one tensor moved."""
    shutil.copytree(EMBEDDED, folder)
    top = torch.load(folder / file, weights_only=True)
    top.get("state_dict", top)[key] += 1
    torch.save(top, folder / file)
    return folder


def test_a_run_finds_the_weights_it_was_trained_on(data, tmp_path):
    weights = changed_weights(tmp_path / "weights", "ldm.ckpt", "model.diffusion_model.out.2.bias")
    out = train(data, weights=weights, steps=1, batch=2, out=tmp_path / "run", device="cpu")
    assert load_run(out, device="cpu").base.unet.out[2].bias.min() > 0.5


@pytest.mark.parametrize(
    "file, key, part",
    [
        ("ldm.ckpt", "first_stage_model.decoder.conv_out.bias", "autoencoder"),
        ("clip.pt", "ln_final.bias", "clip"),
    ],
)
def test_every_part_of_the_base_has_a_fingerprint(run_folder, tmp_path, file, key, part):
    with pytest.raises(ValueError, match=f"trained on another {part}"):
        load_run(run_folder, weights=changed_weights(tmp_path / "weights", file, key), device="cpu")


def test_the_filmstrip_has_a_column_for_each_label_and_a_row_for_each_picture():
    def flat(*values):
        return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    strip = filmstrip({"like": flat(10, 20, 30), "0": flat(110, 120, 130)})
    found = [[strip.getpixel((6 + 10 * i, 18 + 10 * j))[0] for i in range(2)] for j in range(3)]
    assert found == [[10, 110], [20, 120], [30, 130]]


def test_bytes_survive_the_way_to_floats_and_back():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(x / 127.5 - 1), x)


def test_the_middle_of_a_strip_is_kept(tmp_path):
    picture = Image.new("L", (400, 10))
    picture.paste(255, (195, 0, 205, 10))
    picture.save(tmp_path / "strip.png")
    assert (to_square(open_rgb(tmp_path / "strip.png"), 10) > 0.99).all()
