"""Pretraining CLIP: which caption is which picture's? (Radford et al. 2021, arXiv 2103.00020)

B batch, N pictures, M captions, L tokens, S picture side, D embedding width.
"""
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip import CLIP
from ..metrics import retrieval
from ..models import generator
from ..runs import save
from ..tokenizer import Tokenizer
from .art import COLOURS, Art, caption, composite, description, name_of, read_art
from .merges import learn_merges, write_merges
from .training import SIZE, fit, fp16_state, save_grid

CONTEXT = 32  # tokens of a caption, start and end included
MERGES = 1534  # with 512 bytes, start and end: a vocabulary of 2048
SIZES = {
    "patch": 8,
    "vision_width": 192,
    "vision_layers": 6,
    "text_width": 128,
    "text_layers": 4,
    "dim": 128,
}


def learn_tokenizer(art: Art, path: Path) -> Tokenizer:
    """Merges of all words that captions of these pictures may have, written to `path`."""
    texts = [description(row, colour) for row in art.rows for colour in COLOURS]
    write_merges(learn_merges(texts, MERGES), path)
    return Tokenizer(path)


def also_true(captions: list[str], descriptions: list[str]) -> Tensor:
    """(B B) bool: picture i may have caption j as well as its own. Such a pair is no negative pair:
    all words of the caption are in the description of the picture."""
    words = [set(text.split()) for text in captions]
    known = [set(text.split()) for text in descriptions]
    true = torch.tensor([[some <= all_words for some in words] for all_words in known])
    return true & ~torch.eye(len(captions), dtype=torch.bool)


def contrastive_loss(model: CLIP, x: Tensor, tokens: Tensor, excluded: Tensor) -> Tensor:
    """Cross-entropy of picture to caption and of caption to picture, less the excluded pairs.

    x (B 3 S S) in [-1, 1], tokens (B L), excluded (B B) bool: a row for each picture."""
    images = model.encode_image(model.normalize(x)).float()  # B D
    texts = model.encode_text(tokens).float()  # B D
    with torch.autocast(x.device.type, enabled=False):  # bf16 tells logits of 100 apart by 0.5
        scale = model.logit_scale.exp().clamp(max=100)
        logits = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * scale  # B B
    logits = logits.masked_fill(excluded, -torch.inf)
    truth = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def show_nearest(
    model: CLIP, tokenizer: Tokenizer, art: Art, x: Tensor, path: Path
) -> tuple[int, float]:
    """Pictures x (N 3 S S) of art -> the number of their captions, and the share of them that are
    nearest to their own. The pictures nearest to some captions are drawn in `path`, in rows."""
    captions = [name_of(row) for row in art.rows]
    texts = sorted(set(captions))
    images = model.embed(x)  # N D
    words = F.normalize(model.encode_text(tokenizer(texts, CONTEXT, cut=True)), dim=-1)  # M D
    truth = torch.tensor([texts.index(text) for text in captions])
    every = len(texts) // 8 + 1
    columns = min(12, len(x))
    nearest = (words[::every] @ images.T).topk(columns).indices.flatten()
    save_grid(x[nearest], path, columns)
    print(f"the rows of '{path.name}' are nearest to:", ", ".join(texts[::every]))
    return len(texts), retrieval(images, words, truth)


def train_clip(
    data: list[Path], out: Path, steps: int, batch: int, lr: float, seed: int, fast: bool
) -> dict[str, float]:
    """Train CLIP with its contrastive loss, less the pairs that are true by chance."""
    art, held_out = read_art(data).split()
    tokenizer = learn_tokenizer(art, out / "merges.txt.gz")

    def draw_batch(g: torch.Generator) -> tuple[Tensor, ...]:
        x, index, colours = composite(art, batch, SIZE, g)
        dice = random.Random(torch.randint(2**31, (), generator=g).item())
        rows = [art.rows[i] for i in index.tolist()]
        captions = [caption(row, colour, dice) for row, colour in zip(rows, colours, strict=True)]
        known = [description(row, colour) for row, colour in zip(rows, colours, strict=True)]
        return x, tokenizer(captions, CONTEXT, cut=True), also_true(captions, known)

    torch.manual_seed(seed)
    vocabulary = tokenizer.vocab_size
    model = CLIP(resolution=SIZE, context_length=CONTEXT, vocab_size=vocabulary, **SIZES)
    config = {"steps": steps, "seed": seed, "batch": batch, "lr": lr, "data": str(data)}
    model = fit(model, draw_batch, contrastive_loss, out / "training/clip.pt", config, fast).cpu()
    save(fp16_state(model), out / "clip.pt")

    figures = {}
    for name, part in held_out.items():
        x, _, _ = composite(part, torch.arange(len(part.rows)), SIZE, generator(seed, steps))
        path = out / f"training/clip {name}.png"
        captions, share = show_nearest(model, tokenizer, part, x, path)
        figures[f"retrieval of {captions} captions by {len(x)} {name}"] = share
    return figures
