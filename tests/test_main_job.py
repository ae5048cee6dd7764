"""The README's first command: are they flowers? Minutes long, so behind -m slow."""

from itertools import product
from pathlib import Path

import pytest
import torch

from tinyanl.data import scan
from tinyanl.encode import embed_pictures, embed_texts, encode
from tinyanl.flowers import BACKGROUNDS, COLOURS, KINDS, write
from tinyanl.models import has_bf16, load_run
from tinyanl.sample import sample, to_uint8
from tinyanl.train import split, train
from tinyanl.tune import tunable

FLOWERS = [
    f"a {colour} {kind} {stem}{words}"
    for kind in KINDS
    for colour, stem, words in product(COLOURS, ("", "on a stem "), BACKGROUNDS)
]
# the labels of all emoji but the flowers (emojibase-data, MIT), said in four of the ways that CLIP
# was trained on
LABELS = (Path(__file__).parent / "emoji_labels.txt").read_text().splitlines()
OTHERS = [
    form.format(label)
    for form in ("{}", "a {}", "a drawing of a {}", "a 3d icon of a {} on a white background")
    for label in LABELS
]


@torch.no_grad()
def share_of_flowers(run, cond, seeds):
    """The share of samples whose best caption, of all of the above, is a flower's."""
    samples = torch.cat([to_uint8(sample(run, cond, seed=seed)) for seed in range(seeds)])
    embeddings = embed_pictures(run.base, samples)
    flowers, others = (embed_texts(run.base, captions) for captions in (FLOWERS, OTHERS))
    return (
        ((embeddings @ flowers.T).amax(1) > (embeddings @ others.T).amax(1)).float().mean().item()
    )


@pytest.mark.slow
def test_samples_from_held_out_conditions_are_flowers_and_the_base_knows_none(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "tinyanl.models.has_bf16", has_bf16
    )  # as a user trains, not as conftest.py would
    data = tmp_path / "flowers"
    write(data)
    run = load_run(train(data, sample_every=400, out=tmp_path / "run"))
    paths = [picture.path for picture in scan(data, 64).pictures]
    _, held_ids = split(paths, seed=0)
    cond = run.condition(encode(run.base, [paths[i] for i in held_ids.tolist()])[1].flatten(0, 1))
    cond = cond[torch.arange(64) % len(cond)]
    trained = share_of_flowers(run, cond, seeds=4)
    run.model = tunable(run.base).to(run.base.device)  # fresh ones: the untouched base
    base = share_of_flowers(run, cond, seeds=1)
    print(f"flowers: {trained:.1%} of 256 samples, {base:.1%} of 64 from the untouched base")
    assert trained >= 0.8 and base <= 0.1
