"""The main job on the embedded model: training, what a run leaves behind, loading, resuming, and
the command lines."""

import argparse
import gzip
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tinyanl import models
from tinyanl.data import scan, to_square
from tinyanl.dataset import Batch, TrainingData, curve_batch, training_batch
from tinyanl.encode import embed_texts, encode
from tinyanl.flowers import draw
from tinyanl.loss import curve_loss, denoising_loss
from tinyanl.models import EMBEDDED, Run, has_bf16, load_base, load_run, split
from tinyanl.options import add_options
from tinyanl.runs import join_processes
from tinyanl.sample import main as sample_main
from tinyanl.sample import sample
from tinyanl.train import Options, resume_command, train
from tinyanl.train import main as train_main
from tinyanl.tune import tunable

train_module, encode_module = sys.modules["tinyanl.train"], sys.modules["tinyanl.encode"]


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flowers")
    with open(folder / "metadata.jsonl", "w") as metadata:
        for i in range(12):
            picture, text = draw(i)
            picture.save(folder / f"{i}.png")
            metadata.write(json.dumps({"file": f"{i}.png", "text": text}) + "\n")
    return folder


@pytest.fixture(scope="module")
def run_folder(flowers, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "flowers"
    return train(flowers, steps=4, batch=4, sample_every=2, out=out, device="cpu")


@pytest.fixture(scope="module")
def whole(flowers, tmp_path_factory):
    return train(
        flowers,
        steps=5,
        batch=8,
        sample_every=9,
        out=tmp_path_factory.mktemp("whole") / "run",
        device="cpu",
    )


def fresh_run(base):
    torch.manual_seed(0)
    return Run(
        base, tunable(base), torch.zeros(base.clip.dim), torch.zeros(base.clip.dim), 1.0, {}, []
    )


def random_batch(base, n=2):
    g = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, n, *base.latent_shape, generator=g)
    return z0, torch.randn(n, base.clip.dim, generator=g), torch.arange(n) * 300 + 100, eps


def test_bf16_is_close_and_the_device_decides_on_it(base, monkeypatch):
    z0, cond, t, _ = random_batch(base)
    for tune in ("anl", "all"):
        model = tunable(base, tune)
        exact, quick = (
            Run(replace(base, bf16=on), model, None, None, 1.0, {}, []).bind(cond)(z0, t).detach()
            for on in (False, True)
        )
        assert quick.dtype == torch.float32 and 1e-5 < (quick - exact).norm() / exact.norm() < 0.03
    for native in (False, True):
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native, raising=False
        )
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation, native=native: native or including_emulation,
        )
        assert has_bf16(torch.device("cpu")) is native is has_bf16(torch.device("cuda"))
        assert not has_bf16(torch.device("mps"))


def test_base_is_frozen_in_eval_mode_and_float32(base):
    for model in (base.unet, base.autoencoder, base.clip):
        assert not model.training
        assert all(not p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    channels = base.autoencoder.post_quant_conv.in_channels
    sizes = (base.size, base.latent_shape, base.null.shape)
    assert sizes == (64, (channels, 16, 16), (1, 1, 128))


def test_only_anl_tensors_get_gradients(base):
    run = fresh_run(base)
    denoising_loss(run, *random_batch(base)).backward()
    assert all(
        p.grad is None for m in (base.unet, base.autoencoder, base.clip) for p in m.parameters()
    )
    assert any(p.grad.abs().max() > 0 for p in run.model.parameters())


def test_a_fresh_run_predicts_what_the_base_predicts(base):
    run, (z0, cond, t, _) = fresh_run(base), random_batch(base)
    with torch.no_grad():
        expected = base.unet(z0, t, base.null.expand(2, -1, -1))
        assert torch.equal(run.bind(cond)(z0, t), expected)


def test_two_pictures_are_overfitted(base, flowers):
    """At fixed noise and times the loss on two pictures falls far below what the frozen base
    reaches."""
    run, (_, _, t, eps) = fresh_run(base), random_batch(base)
    latents, embeddings = encode(base, [flowers / "0.png", flowers / "1.png"])
    batch = latents[:, 0], embeddings[:, 0] * base.clip.dim**0.5, t, eps
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-3)
    before = denoising_loss(run, *batch).item()
    for _ in range(60):
        loss = denoising_loss(run, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * before


def test_masks_all_ones_is_no_mask_and_rate_one_is_unconditional(run_folder):
    run = load_run(run_folder, device="cpu")
    cond = torch.randn(2, run.base.clip.dim, generator=torch.Generator().manual_seed(1))
    plain = sample(run, cond, steps=4)
    assert torch.equal(sample(run, cond, mask_rate=0.0, steps=4), plain)
    assert torch.equal(
        sample(run, cond, mask_rate=1.0, steps=4), sample(run, torch.zeros_like(cond), steps=4)
    )
    unconditional = sample(run, torch.zeros_like(cond), steps=4)
    assert_close(sample(run, cond, guidance=0.0, steps=4), unconditional, atol=1e-4, rtol=0)
    assert not torch.equal(sample(run, cond, mask_rate=0.5, steps=4), plain)


def test_samples_do_not_depend_on_the_batch_size(run_folder):
    run = load_run(run_folder, device="cpu")
    cond = torch.randn(3, run.base.clip.dim, generator=torch.Generator().manual_seed(1))
    x = sample(
        run, cond, steps=4, mask_rate=0.3, eta=0.0
    )  # with eta the noise is drawn batch by batch
    assert x.shape == (3, 3, 64, 64) and x.min() >= -1 and x.max() <= 1
    assert_close(sample(run, cond, steps=4, mask_rate=0.3, eta=0.0, batch=2), x, atol=1e-4, rtol=0)


def test_run_folder_holds_what_the_design_says(run_folder):
    assert {p.name for p in run_folder.iterdir()} == {
        "config.json",
        "adapter.pt",
        "state.pt",
        "log.jsonl",
        "samples",
        "filmstrip.png",
        "index.html",
        ".lock",
    }
    assert [p.name for p in sorted((run_folder / "samples").iterdir())] == [
        f"step_{s:06d}.png" for s in (0, 2, 4)
    ]
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4 and rows[-1]["loss"] > 0 and rows[-1]["held_out"] > 0
    adapter = torch.load(run_folder / "adapter.pt", weights_only=True)
    assert adapter["step"] == 4 and adapter["mu"].shape == (128,) and adapter["sigma"] > 0
    assert (
        Image.open(run_folder / "filmstrip.png").width == 4 * 66 + 2
    )  # the condition and three checkpoints


def test_the_condition_is_centred_with_unit_spread(run_folder, flowers, base):
    run = load_run(run_folder, device="cpu")
    paths = [picture.path for picture in scan(flowers, 64).pictures]
    train_ids, _ = split(paths, seed=0)
    cond = run.condition(encode(base, paths)[1])[train_ids]
    assert_close(cond.mean((0, 1)), torch.zeros(128), atol=1e-4, rtol=0)
    assert_close(cond.square().mean().sqrt().item(), 1.0, atol=1e-4, rtol=0)


def test_a_fresh_process_predicts_the_same_bit_for_bit(run_folder, base, tmp_path):
    code = """if True:
        import sys, torch
        from tinyanl import models
        models.has_bf16 = lambda device: False  # as in conftest.py
        run = models.load_run(sys.argv[1], device="cpu")
        z, cond, t = torch.load(sys.argv[2])
        with torch.no_grad():
            torch.save(run.bind(cond)(z, t), sys.argv[3])"""
    z, cond, t, _ = random_batch(base)
    torch.save((z, cond, t), tmp_path / "in.pt")
    subprocess.run(
        [sys.executable, "-c", code, run_folder, tmp_path / "in.pt", tmp_path / "out.pt"],
        check=True,
    )
    with torch.no_grad():
        expected = load_run(run_folder, device="cpu").bind(cond)(z, t)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def stopped_after(steps):
    """Ask training to stop, as Ctrl-C does, in the step before so many are done."""
    read_numbers = train_module.read_numbers
    seen = []

    def read_and_ask(loss, norm, stop, world):
        seen.append(loss)
        return read_numbers(loss, norm, stop or len(seen) == steps, world)

    return patch.object(train_module, "read_numbers", read_and_ask)


def test_resuming_gives_the_tensors_of_an_uninterrupted_run(flowers, tmp_path):
    settings = dict(batch=4, sample_every=100, save_every=2, device="cpu", seed=3)
    whole = train(flowers, steps=4, out=tmp_path / "whole", **settings)
    with stopped_after(2), pytest.raises(KeyboardInterrupt):
        train(flowers, steps=4, out=tmp_path / "halves", **settings)
    state = torch.load(tmp_path / "halves" / "state.pt", weights_only=True)
    assert state["step"] == 2
    halves = train(flowers, steps=4, out=tmp_path / "halves", resume=True, **settings)
    a, b = (torch.load(folder / "state.pt", weights_only=True) for folder in (whole, halves))
    for part in ("live", "ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])


def test_a_run_is_not_overwritten_or_resumed_with_other_arguments(run_folder, flowers):
    with pytest.raises(FileExistsError, match="--resume.*--overwrite"):
        train(flowers, steps=4, batch=4, out=run_folder, device="cpu")
    with pytest.raises(ValueError, match="tokens was 1, is 2"):
        train(flowers, steps=4, batch=4, tokens=2, out=run_folder, device="cpu", resume=True)


def test_dry_run_says_everything_and_writes_nothing(flowers, tmp_path, capsys):
    out = train(flowers, out=tmp_path / "run", device="cpu", dry_run=True)
    said = capsys.readouterr().out
    assert not out.exists()
    for words in (
        "12 pictures",
        "1 held out",
        "64 px",
        "3,409,920 parameters",
        "effective batch 32",
        "learning rate 0.003 (by a sweep",
        " s a step, ",
        " MB at most",
    ):
        assert words in said


def test_split_holds_out_a_tenth_and_at_least_one():
    for n, held in ((2, 1), (10, 1), (29, 2), (200, 20)):
        train_ids, held_ids = split(range(n), seed=0)
        assert len(held_ids) == held and sorted([*train_ids.tolist(), *held_ids.tolist()]) == list(
            range(n)
        )
    for alone in ["a"], ["a", "a"]:
        with pytest.raises(ValueError, match="at least 2"):
            split(alone, seed=0)


def test_the_split_of_distinct_pictures_is_a_seeded_permutation_as_ever():
    for n, seed in ((2, 0), (12, 3), (200, 7), (201, 2**32 - 1)):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        held = max(1, n // 10)
        train_ids, held_ids = split([f"{i}.png" for i in range(n)], seed)
        assert torch.equal(train_ids, order[held:].sort().values)
        assert torch.equal(held_ids, order[:held].sort().values)


def test_a_picture_of_five_captions_is_trained_on_or_held_out_as_a_whole():
    pictures = [f"{i // 5}.png" for i in range(200)]
    train_ids, held_ids = (ids.tolist() for ids in split(pictures, seed=0))
    assert len(held_ids) == 20 and sorted(train_ids + held_ids) == list(range(200))
    assert not {pictures[i] for i in train_ids} & {pictures[i] for i in held_ids}
    once = split([f"{i}.png" for i in range(40)], seed=0)[1]
    assert {pictures[i] for i in held_ids} == {f"{i}.png" for i in once.tolist()}


def test_batches_depend_on_seed_and_step_alone_and_drop_a_tenth_of_the_conditions():
    latents, cond, ids = (
        torch.randn(10, 2, 3, 4, 4),
        torch.ones(10, 2, 64),
        torch.tensor([1, 2, 4, 7, 9]),
    )
    a, b = (training_batch(latents, cond, ids, 4000, 0.0, seed=1, step=7) for _ in range(2))
    counts = torch.stack(
        [(a[0] == view).flatten(1).all(1).sum() for view in latents.flatten(0, 1)]
    ).view(10, 2)
    assert (counts[ids] > 300).all() and counts.sum() == 4000  # both views of those, and no other
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[2], training_batch(latents, cond, ids, 4000, 0.0, seed=1, step=8)[2])
    dropped = (a[1] == 0).all(1).float().mean().item()
    assert abs(dropped - 0.1) < 0.02 and (a[1].mean(1) % 1 == 0).all()  # each whole or gone
    partly = training_batch(latents, cond, ids, 4000, 0.5, seed=1, step=7)[1].mean(1)
    assert abs(((partly > 0) & (partly < 1)).float().mean().item() - 0.5) < 0.04


def test_curve_batch_is_always_the_same_and_covers_all_times():
    latents, cond, ids = torch.randn(9, 2, 3, 4, 4), torch.randn(9, 2, 8), torch.tensor([0, 3, 8])
    a, b = curve_batch(latents, cond, ids), curve_batch(latents, cond, ids)
    assert torch.equal(a[0][:4], latents[[0, 3, 8, 0], 0])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len(a[2].unique()) == 64 and a[2].min() < 16 and a[2].max() > 983


def test_what_memory_cannot_hold_is_mapped_and_goes_on_where_it_stopped(
    base, flowers, tmp_path, monkeypatch
):
    paths = [picture.path for picture in scan(flowers, 64).pictures]
    expected = encode(base, paths, batch=1)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(encode_module, "IN_MEMORY", 0)
    read, opened = [], encode_module.open_rgb

    def interrupted(path):
        read.append(path)
        if len(read) == 8:
            raise KeyboardInterrupt
        return opened(path)

    monkeypatch.setattr(encode_module, "open_rgb", interrupted)
    monkeypatch.setattr(encode_module, "SAVE_EVERY", 5)
    with pytest.raises(KeyboardInterrupt):
        encode(base, paths, batch=1, cache=tmp_path / "cache")
    mapped = encode(base, paths, batch=1, cache=tmp_path / "cache")
    assert read == [*paths[:8], *paths[5:]]
    assert all(torch.equal(a, b) for a, b in zip(mapped, expected, strict=True))
    again = encode(base, paths, cache=tmp_path / "cache")  # none is read
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert len(read) == 15
    os.utime(paths[3])  # another picture under an old name, for all that is known
    encode(base, paths, cache=tmp_path / "cache")
    assert len(read) == 15 + 12
    encode(base, paths[1:], cache=tmp_path / "cache")  # other pictures are
    assert len(read) == 15 + 12 + 11
    assert encode(base, paths, latents=False)[0] is None
    assert_close(encode(base, paths, latents=False)[1], expected[1])


def test_a_run_on_mapped_files_is_the_same(flowers, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "IN_MEMORY", 0)
    run = train(flowers, steps=5, batch=8, sample_every=9, out=tmp_path / "run", device="cpu")
    a, b = (torch.load(run / "adapter.pt", weights_only=True)["trained"] for run in (whole, run))
    latent = load_run(run, device="cpu").base.latent_shape
    assert (run / "cache/latents").stat().st_size == 12 * 2 * math.prod(latent) * 4
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_weights_folder_errors_list_what_was_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="weights.md"):
        load_base(tmp_path / "none")
    (tmp_path / "merges.txt.gz").write_bytes((EMBEDDED / "merges.txt.gz").read_bytes())
    with pytest.raises(
        ValueError,
        match="unet is missing, autoencoder is missing, clip is missing.*merges.txt.gz: BPE",
    ):
        load_base(tmp_path)
    for name in ("clip.pt", "ldm.ckpt"):
        (tmp_path / name).write_bytes((EMBEDDED / name).read_bytes())
    (tmp_path / "another-name.pt").write_bytes((EMBEDDED / "clip.pt").read_bytes())
    with pytest.raises(ValueError, match="clip is in both another-name.pt and clip.pt"):
        load_base(tmp_path)


def test_merges_of_another_clip_are_refused(tmp_path):
    for name in ("clip.pt", "ldm.ckpt"):
        (tmp_path / name).write_bytes((EMBEDDED / name).read_bytes())
    lines = gzip.decompress((EMBEDDED / "merges.txt.gz").read_bytes()).splitlines(keepends=True)
    (tmp_path / "merges.txt").write_bytes(b"".join(lines[:-10]))
    with pytest.raises(ValueError, match="merges.txt makes 2038 tokens, clip.pt knows 2048"):
        load_base(tmp_path)


def test_an_adapter_for_another_base_is_refused(run_folder, tmp_path):
    for name in ("clip.pt", "merges.txt.gz"):
        (tmp_path / name).write_bytes((EMBEDDED / name).read_bytes())
    checkpoint = torch.load(EMBEDDED / "ldm.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.diffusion_model.out.2.bias"] += 1
    torch.save(checkpoint, tmp_path / "ldm.ckpt")
    with pytest.raises(ValueError, match="trained on another unet"):
        load_run(run_folder, weights=tmp_path, device="cpu")


@pytest.mark.parametrize(
    "what", [["--like", "FLOWERS"], ["--text", "a red rose", "a blue daisy"], []]
)
def test_sample_command_writes_pictures_and_a_grid(run_folder, flowers, tmp_path, what):
    what = [str(flowers) if word == "FLOWERS" else word for word in what]
    sample_main(
        [
            "--run",
            str(run_folder),
            *what,
            "--n",
            "3",
            "--steps",
            "2",
            "--mask-rate",
            "0.3",
            "--guidance",
            "2",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ]
    )
    assert {p.name for p in tmp_path.iterdir()} == {
        "0000.png",
        "0001.png",
        "0002.png",
        "grid.png",
        "sample.json",
    }
    assert Image.open(tmp_path / "0000.png").size == (64, 64)


@pytest.mark.parametrize(
    "command, arguments, words",
    [
        (train_main, ["--data", "nowhere"], "nowhere does not exist"),
        (train_main, ["--data", ".", "--steps", "0"], "steps=0"),
        (sample_main, ["--run", "nowhere"], "adapter.pt does not exist"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_without_traceback(
    command, arguments, words, capsys
):
    with pytest.raises(SystemExit) as exit:
        command(arguments)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and words in said and said.count("\n") == 1


def test_texts_and_pictures_give_unit_embeddings(base, flowers):
    texts = embed_texts(base, ["a red rose", ""])
    _, pictures = encode(base, [flowers / "0.png"])
    assert_close(texts.norm(dim=-1), torch.ones(2))
    assert_close(pictures.norm(dim=-1), torch.ones(1, 2))


def test_captions_count_however_long_and_many_they_are(base, tmp_path):
    """Training takes their mean alone, so a caption beyond CLIP's context is cut: nobody mends 200
    of them by hand."""
    texts = [f"a red rose {'with green leaves ' * i}" for i in range(12)]
    data = tmp_path / "data"
    data.mkdir()
    lines = []
    for i, text in enumerate(texts):
        draw(i)[0].save(data / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "text": text}) + "\n")
    (data / "metadata.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match="context"):
        embed_texts(base, texts)
    out = train(data, steps=1, batch=2, sample_every=9, out=tmp_path / "run", device="cpu")
    kept = torch.load(out / "adapter.pt", weights_only=True)["mu_text"]
    ids = split(range(12), 0)[0].tolist()
    cut = [embed_texts(base, [texts[i]], cut=True) for i in ids]
    assert_close(kept, torch.cat(cut).mean(0))
    assert_close(embed_texts(base, texts, cut=True, batch=5)[ids], torch.cat(cut))


def test_cached_latents_are_those_of_the_pictures_and_their_mirror_images(base, flowers):
    latents, _ = encode(base, [flowers / "0.png"])
    x = to_square(Image.open(flowers / "0.png"), 64)
    with torch.no_grad():
        assert_close(
            latents[0], base.autoencoder.encode(torch.stack([x, x.flip(-1)])), atol=1e-5, rtol=1e-5
        )


def test_sample_command_numbers_its_folders_so_that_earlier_pictures_stay(run_folder):
    for _ in range(2):
        sample_main(["--run", str(run_folder), "--n", "1", "--steps", "2", "--device", "cpu"])
    assert (run_folder / "drawn_000" / "grid.png").exists() and (
        run_folder / "drawn_001" / "grid.png"
    ).exists()


PROCESSES = """if True:
    import sys
    from tinyanl import models, train
    models.has_bf16 = lambda device: False  # as in conftest.py
    train.main(sys.argv[1:])
"""


def moments(run):
    """AdamW's running mean of the gradients, which after one step is a tenth of the gradient."""
    state = torch.load(run / "state.pt", weights_only=True)["optimizer"]["state"]
    return [state[i]["exp_avg"] for i in sorted(state)]


def last_row(run):
    return json.loads((run / "log.jsonl").read_text().splitlines()[-1])


def same_first_step(one, other):
    """Two runs of one step whose sums were added in another order: loss and gradients agree to
    rounding. (Later tensors need not: AdamW divides one rounding by another.)"""
    assert_close(last_row(one)["loss"], last_row(other)["loss"], atol=0, rtol=1e-5)
    for a, b in zip(moments(one), moments(other), strict=True):
        assert_close(a, b, rtol=0, atol=1e-4 * a.abs().max().item())


@pytest.fixture(scope="module")
def first_step(flowers, tmp_path_factory):
    return train(
        flowers,
        steps=1,
        batch=8,
        sample_every=9,
        device="cpu",
        out=tmp_path_factory.mktemp("first") / "run",
    )


def test_a_batch_in_parts_trains_the_same(flowers, first_step, tmp_path):
    parts = train(
        flowers, steps=1, batch=8, sample_every=9, out=tmp_path / "run", device="cpu", accumulate=4
    )
    same_first_step(first_step, parts)


def test_two_processes_train_the_same_and_one_writes_and_resumes(
    flowers, first_step, whole, tmp_path
):
    (tmp_path / "two.py").write_text(PROCESSES)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]

    def both(steps, *flags):
        command = [
            *torchrun,
            tmp_path / "two.py",
            "--data",
            flowers,
            "--out",
            tmp_path / "run",
            "--device",
            "cpu",
            "--steps",
            str(steps),
            "--batch",
            "8",
            "--sample-every",
            "9",
            *flags,
        ]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )

    one = both(1)
    assert one.returncode == 0, one.stderr
    same_first_step(first_step, tmp_path / "run")
    for name in ("training", "held_out"):  # each process computed its share of the curve
        assert_close(
            last_row(tmp_path / "run")[name], last_row(first_step)[name], atol=0, rtol=1e-3
        )
    more = both(5, "--resume", "--accumulate", "2")
    assert more.returncode == 0, more.stderr
    assert "resumed    at step 1" in more.stdout and last_row(tmp_path / "run")["step"] == 5
    assert (one.stdout + more.stdout).count("base  ") == 2  # a run each, said by one of the two
    assert "effective batch 8 in 2 parts" in one.stdout
    assert "effective batch 8 in 4 parts" in more.stdout
    assert_close(
        last_row(tmp_path / "run")["held_out"], last_row(whole)["held_out"], atol=0, rtol=0.02
    )
    mistake = both(9)
    assert mistake.returncode != 0
    assert mistake.stderr.count("already has a config.json") == 1  # said once, not by each


def test_a_batch_that_does_not_split_is_refused(flowers, tmp_path):
    with pytest.raises(ValueError, match="batch=8 does not split into 3 equal parts"):
        train(flowers, steps=1, batch=8, out=tmp_path / "run", accumulate=3)


def test_checkpointing_trains_to_the_same_bits(flowers, tmp_path):
    runs = [
        train(flowers, steps=2, batch=4, out=tmp_path / str(on), checkpoint=on)
        for on in (False, True)
    ]
    plain, again = (torch.load(run / "adapter.pt")["trained"] for run in runs)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_rounding_the_frozen_weights_once_trains_to_the_same_bits(flowers, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "has_bf16", lambda device: True)
    settings = dict(steps=2, batch=4, sample_every=9, device="cpu")
    once = train(flowers, out=tmp_path / "once", **settings)
    monkeypatch.setattr(models.Base, "rounded", property(lambda base: base))
    every_time = train(flowers, out=tmp_path / "every", **settings)
    a, b = (torch.load(run / "adapter.pt", weights_only=True) for run in (once, every_time))
    assert_close(a["trained"], b["trained"], rtol=0, atol=0)
    assert a["fingerprints"] == b["fingerprints"]


def test_a_run_inside_its_data_is_refused(flowers, tmp_path, monkeypatch):
    monkeypatch.chdir(flowers)
    with pytest.raises(ValueError, match="lies inside the data folder.*--out outside"):
        train(".")
    assert not (flowers / "runs").exists()


def test_running_out_of_memory_is_one_line_with_a_remedy(flowers, tmp_path, monkeypatch, capsys):
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):

        def full(*args, error=error):
            raise error

        monkeypatch.setattr(train_module, "gradients", full)
        out = tmp_path / type(error).__name__
        with pytest.raises(SystemExit) as stop:
            train_main(["--data", str(flowers), "--out", str(out), "--device", "cpu"])
        said = [line for line in capsys.readouterr().err.split("\n") if "out of memory" in line]
        assert stop.value.code == 2 and len(said) == 1
        assert "--accumulate" in said[0] and "--checkpoint" in said[0] and "--batch" in said[0]


def test_an_empty_world_size_is_one_process_and_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    assert join_processes() == (0, 1)
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "2"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--nproc-per-node 2"):
        join_processes()


def test_the_shares_of_a_curve_add_up_to_its_mean(base):
    run, (z0, cond, t, eps) = fresh_run(base), random_batch(base, 3)
    batch = Batch(z0, cond, t, eps, torch.arange(3))
    whole = curve_loss(run, batch)
    for world in (2, 4):  # one process may have nothing to do
        parts = [curve_loss(run, batch, rank, world) for rank in range(world)]
        assert_close(sum(parts), whole)


def test_the_next_batch_is_drawn_before_the_numbers_of_a_step_are_read(
    flowers, tmp_path, monkeypatch
):
    """A GPU is waited for once a step, when its loss is read: until then the CPU must have
    drawn."""
    events = []
    batches, numbers = TrainingData.batch, train_module.read_numbers

    def drawn(self, step, *args):
        events.append(f"draw {step}")
        return batches(self, step, *args)

    def read(*args):
        events.append("read")
        return numbers(*args)

    monkeypatch.setattr(TrainingData, "batch", drawn)
    monkeypatch.setattr(train_module, "read_numbers", read)
    train(flowers, steps=2, batch=4, sample_every=9, out=tmp_path / "run", device="cpu")
    assert events == ["draw 0", "draw 1", "read", "draw 2", "read"]


def test_the_page_says_a_command_that_resumes_the_very_run(flowers, tmp_path):
    options = Options(data=flowers, steps=7, tokens=2, out=tmp_path / "a run", uncentred=True)
    command = shlex.split(resume_command(options))
    assert command[:3] == ["python", "-m", "tinyanl.train"]
    parser = add_options(argparse.ArgumentParser(), Options)
    again = Options(**vars(parser.parse_args(command[3:])))
    assert again == replace(options, resume=True)


def test_flags_beside_options_are_refused_and_not_ignored(flowers, tmp_path):
    with pytest.raises(TypeError, match="steps"):
        train(Options(data=flowers, out=tmp_path / "run"), steps=5)
    assert not (tmp_path / "run").exists()
