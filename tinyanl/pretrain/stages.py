"""Pretrain a small latent diffusion model and its CLIP, into one folder of weights in the released layout.

    python -m tinyanl.pretrain clip --data emoji more_flowers --out weights/mine
    python -m tinyanl.pretrain autoencoder --data emoji more_flowers --out weights/mine       CLIP is its critic
    python -m tinyanl.pretrain unet --data emoji --out weights/mine                           on its latents
    python -m tinyanl.pretrain families --data emoji --out .                                  ./faces, ./vehicles

What a data folder holds: art.py; a "label" is a class of the U-Net. Every tenth picture is kept from CLIP and the
autoencoder, for their figures, and FAMILIES from the U-Net, by "subgroup". A part that was stopped goes on; training/
shows what it can do; all randomness comes from (seed, step). B batch, N pictures, S picture side, C h w latent.
"""
import inspect
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.utils import save_image
from tqdm import tqdm

from .art import COLOURS, composite, read_art, say
from .codes import k_means
from .families import FAMILIES, place
from .merges import learn_merges, write_merges
from ..autoencoder import Autoencoder, Quantizer
from ..clip import CLIP
from ..metrics import frechet_distance, psnr, retrieval
from ..models import fingerprint, generator, pick_device
from ..runs import claim, command, load, save
from ..sample import denoise
from ..schedule import add_noise, ldm_alpha_bar
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..weights import load_checkpoint

SIZE, CONTEXT, MERGES, CODES = 64, 32, 1534, 16384  # pixels, tokens of a caption, merges, codes of the first stage
LEARNING_RATE, SAVE_EVERY, ALPHA_BAR = 1e-3, 500, ldm_alpha_bar()
show = lambda x, path, nrow=12: save_image(x, path, nrow=nrow, normalize=True, value_range=(-1, 1))
frozen = lambda kind, path: kind.from_checkpoint(load_checkpoint(path)).requires_grad_(False).to(pick_device())


def store(path: Path, parts: dict[str, nn.Module]) -> None:
    """Modules by prefix, in fp16, in the released container: CLIP's has no prefix and nothing around it."""
    state = {prefix + k: v.half().cpu() for prefix, part in parts.items() for k, v in part.state_dict().items()}
    save(state if "" in parts else {"state_dict": state | {"image_size": torch.tensor(SIZE)}}, path)


def fit(model: nn.Module, batch_of: Callable[[torch.Generator], tuple[Tensor, ...]], loss_of: Callable[..., Tensor],
        path: Path, steps: int, seed: int, fast: bool, **config: int | str) -> nn.Module:
    """Minimise loss_of(model, *batch_of(g)) by AdamW, one cycle of the learning rate -> averaged model, in fp16 values.
    `path` keeps the state; a run with the same settings goes on from it. ValueError: it has other settings."""
    device, model = pick_device(), model.to(pick_device())
    ema = AveragedModel(model, avg_fn=lambda old, new, n: old.lerp(new, 9 / (10 + n)))  # about the last ninth of a run
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.11, cycle_momentum=False)
    kept = {"model": model, "ema": ema, "optimizer": optimizer, "cycle": cycle}
    start, config = 0, {"steps": steps, "seed": seed, **config}
    if path.exists():
        state = load(path, {"config", "step", *kept})
        if state["config"] != config:
            raise ValueError(f"{path} was made with {state['config']}, not {config}: choose another --out")
        for name, thing in kept.items():
            thing.load_state_dict(state[name])
        start = state["step"]
    loss_of = torch.autocast(device.type, torch.bfloat16, enabled=fast)(torch.compile(loss_of) if fast else loss_of)
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(range(start, steps), path.stem, initial=start, total=steps)
    for step in bar:
        loss = loss_of(model, *(x.to(device) for x in batch_of(generator(seed, step))))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        ema.update_parameters(model)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save({"step": step + 1, "config": config, **{k: v.state_dict() for k, v in kept.items()}}, path)
    return ema.module.requires_grad_(False).half().float()


def clip(data: list[Path], out: Path, steps: int = 1500, batch: int = 256, seed: int = 0, fast: bool = False) -> dict:
    """CLIP's contrastive loss; a caption whose words are all in the description of another picture is no negative."""
    (train, held), figures = read_art(data).split(), {}
    facts = [say(row, colour, random.Random(0))[1] for row in train.rows for colour in COLOURS]
    write_merges(learn_merges(facts, MERGES), out / "merges.txt.gz")
    tokenizer = Tokenizer(out / "merges.txt.gz")

    def batch_of(g: torch.Generator) -> tuple[Tensor, ...]:
        x, index, behind = composite(train, batch, SIZE, g)
        dice = random.Random(torch.randint(2**31, (), generator=g).item())
        said, facts = zip(*(say(train.rows[i], colour, dice) for i, colour in zip(index.tolist(), behind)))
        words, facts = ([set(text.split()) for text in texts] for texts in (said, facts))
        true = torch.tensor([[some <= known for some in words] for known in facts])           # B pictures, B captions
        return x, tokenizer(list(said), CONTEXT, cut=True), true & ~torch.eye(batch, dtype=torch.bool)

    def loss_of(model: CLIP, x: Tensor, tokens: Tensor, also_true: Tensor) -> Tensor:
        images, texts = model.encode_image(model.normalize(x)).float(), model.encode_text(tokens).float()
        with torch.autocast(x.device.type, enabled=False):  # bf16 tells logits of 100 apart by halves
            logits = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * model.logit_scale.exp().clamp(max=100)
        logits, own = logits.masked_fill(also_true, -torch.inf), torch.arange(len(x), device=x.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    torch.manual_seed(seed)
    model = CLIP(SIZE, 8, 192, 6, CONTEXT, tokenizer.vocab_size, 128, 4, 128)
    model = fit(model, batch_of, loss_of, out / "training/clip.pt", steps, seed, fast, batch=batch,
                data=str(data)).cpu()
    store(out / "clip.pt", {"": model})
    for name, art in held.items():
        x, _, _ = composite(art, torch.arange(len(art.rows)), SIZE, generator(seed, steps))
        captions = [row["text"] or f"a {row['label']}" for row in art.rows]
        texts = sorted(set(captions))
        images, words = model.embed(x), F.normalize(model.encode_text(tokenizer(texts, CONTEXT, cut=True)), dim=-1)
        truth = torch.tensor([texts.index(caption) for caption in captions])
        figures[f"retrieval of {len(texts)} captions by {len(x)} {name}"] = retrieval(images, words, truth)
        every, k = slice(0, None, len(texts) // 8 + 1), min(12, len(x))
        show(x[(words[every] @ images.T).topk(k).indices.flatten()], out / f"training/clip {name}.png", nrow=k)
        print(f"the rows of 'clip {name}.png' are nearest to:", ", ".join(texts[every]))
    return figures


def autoencoder(data: list[Path], out: Path, steps: int = 2600, batch: int = 32, seed: int = 0,
                init: Path | None = None, fast: bool = False) -> dict:
    """VQ-f4 without a discriminator: |y - x| + 4 |y - x|^2 + a distance of CLIP's patch tokens + a penalty that keeps
    latents white. The codes come last, by k-means; until then the decoder sees noise as large as their spacing."""
    train, held = read_art(data).split()
    critic = frozen(CLIP, out / "clip.pt")
    whole = fingerprint(critic)
    critic.visual.transformer.resblocks = critic.visual.transformer.resblocks[:3]  # what comes after is not looked at
    torch.manual_seed(seed)
    model = Autoencoder.from_checkpoint(load_checkpoint(init / "ldm.ckpt")) if init else Autoencoder(32)
    model.quantize = Quantizer(CODES, dim=3).requires_grad_(False)

    def batch_of(g: torch.Generator) -> tuple[Tensor, ...]:
        x = composite(train, batch, SIZE, g)[0]
        return x, 0.06 * torch.randn(batch, 3, SIZE // 4, SIZE // 4, generator=g)  # latents have a variance of 1

    def look(x: Tensor) -> Tensor:
        return F.normalize(critic.visual.tokens(critic.normalize(x))[:, 1:].float(), dim=-1)

    def loss_of(model: Autoencoder, x: Tensor, noise: Tensor) -> Tensor:
        z = model.encode(x)
        y = model.decoder(model.post_quant_conv(z + noise)).float()
        points = z.float().movedim(1, -1).flatten(0, 2)                                       # Bhw C
        white = (torch.cov(points.T) - torch.eye(3, device=x.device)).square().sum() + points.mean(0).square().sum()
        unlike = (look(y) - look(x)).square().sum(-1).mean()
        return F.l1_loss(y, x) + 4 * F.mse_loss(y, x) + 0.1 * unlike + white

    model = fit(model, batch_of, loss_of, out / "training/autoencoder.pt", steps, seed, fast, batch=batch,
                critic=whole, init=str(init), data=str(data)).cpu()
    x, _, _ = composite(train, max(CODES // 256, min(1024, steps * batch)), SIZE, generator(seed, steps))
    latents = torch.cat([model.encode(part) for part in x.split(64)])                         # N C h w
    model.quantize.embedding.weight.copy_(k_means(latents.movedim(1, -1).flatten(0, 2), CODES))
    store(out / "ldm.ckpt", {"first_stage_model.": model})  # alone: a U-Net that was there knew other latents
    figures = {}
    for name, art in held.items():
        x = composite(art, torch.arange(len(art.rows)), SIZE, generator(seed, steps))[0]
        y = torch.cat([model.decode(model.encode(part)) for part in x.split(64)])
        figures[f"PSNR in dB, {len(x)} {name}"] = psnr(x, y)
        show(torch.cat([x[:12], y[:12]]), out / f"training/autoencoder {name}.png", nrow=min(12, len(x)))
    return figures


def unet(data: list[Path], out: Path, steps: int = 5500, batch: int = 128, seed: int = 0, looks: int = 32768,
         init: Path | None = None, fast: bool = False) -> dict:
    """A class-conditional denoiser of latents, `looks` of them, encoded once. Its loss has weights min(SNR, 5) / SNR
    (Hang et al. 2023); an eighth of the labels says "no class", the last row (all anew if `init` has other classes)."""
    art = read_art(data).where(lambda i, row: not row["subgroup"].startswith(tuple(FAMILIES.values())))
    device, first_stage, critic = pick_device(), frozen(Autoencoder, out / "ldm.ckpt"), frozen(CLIP, out / "clip.pt")
    names = sorted({row["label"] for row in art.rows})
    label_of, latents, labels = torch.tensor([names.index(row["label"]) for row in art.rows]), [], []
    for i in tqdm(range(0, looks, 64), "encoding", unit_scale=64, unit="img"):
        x, index, _ = composite(art, 64, SIZE, generator(seed, -1 - i))
        latents.append(first_stage.encode(x.to(device)).cpu())
        labels.append(label_of[index])
    latents, labels, snr = torch.cat(latents), torch.cat(labels), (ALPHA_BAR / (1 - ALPHA_BAR)).float()

    def batch_of(g: torch.Generator) -> tuple[Tensor, ...]:
        i, t = torch.randint(looks, (batch,), generator=g), torch.randint(1000, (batch,), generator=g)
        label = torch.where(torch.rand(batch, generator=g) < 1 / 8, len(names), labels[i])
        eps = torch.randn(latents[i].shape, generator=g)
        return add_noise(latents[i], t, eps, ALPHA_BAR), t, label, eps, snr[t].clamp(max=5) / snr[t]

    def loss_of(model: nn.ModuleDict, z_t: Tensor, t: Tensor, label: Tensor, eps: Tensor, weight: Tensor) -> Tensor:
        guess = model["unet"](z_t, t, model["classes"](label)[:, None]).float()
        return ((guess - eps).square().mean((1, 2, 3)) * weight).mean()

    torch.manual_seed(seed)
    classes, start = nn.Embedding(len(names) + 1, 128), load_checkpoint(init / "ldm.ckpt") if init else {}
    known = start.get("cond_stage_model.embedding.weight", classes.weight)
    classes.weight.data.copy_(known if known.shape == classes.weight.shape else classes.weight)
    model = nn.ModuleDict({"classes": classes, "unet": UNet.from_checkpoint(start) if init else
                           UNet(3, 3, 64, (1, 2, 3), 1, (False, True, True), 128)})
    model = fit(model, batch_of, loss_of, out / "training/unet.pt", steps, seed, fast, batch=batch, looks=looks,
                first_stage=fingerprint(first_stage), init=str(init), classes=";".join(names))
    store(out / "ldm.ckpt", {"first_stage_model.": first_stage, "model.diffusion_model.": model["unet"],
                             "cond_stage_model.embedding.": model["classes"]})
    network, none = torch.autocast(device.type, torch.bfloat16, enabled=fast)(model["unet"]), torch.tensor([len(names)])
    g, n = generator(seed, steps), min(5000, looks)

    def paint(labels: Tensor, guidance: float, steps: int) -> Tensor:
        """Labels (N,) -> pictures (N 3 S S) in [-1, 1] on the CPU, by DDIM with classifier-free guidance."""
        noise = torch.randn(len(labels), *latents.shape[1:], generator=g).to(device)
        bind = lambda label: lambda z, t: network(z, t, model["classes"](label)[:, None]).float()
        return denoise(bind, first_stage.decode, noise, labels.to(device), none.to(device), guidance, steps, 0.0, g, 64)

    (fresh, index, _), others = composite(art, n, SIZE, g), critic.embed(composite(art, n, SIZE, g)[0])
    shown = torch.randint(len(names), (min(96, looks),), generator=g)
    show(paint(shown, 3.5, 50), out / "training/unet.png")
    print("unet.png, row by row:", ", ".join(names[i] for i in shown))
    again = torch.cat([first_stage.decode(first_stage.encode(x.to(device))) for x in fresh.split(64)]).clamp(-1, 1)
    return {f"1000 x Frechet distance in CLIP space, {n} {name} and fresh pictures":
            1000 * frechet_distance(critic.embed(x), others)
            for name, x in (("fresh", fresh), ("reconstructed", again), ("sampled", paint(label_of[index], 1.0, 25)))}


def families(data: list[Path], out: Path, seed: int = 0) -> dict:
    """Write out/faces and out/vehicles, pictures with captions to transfer to, on the drawn flowers' backgrounds."""
    rows, found = read_art(data).rows, {}
    for name in ("faces", "vehicles"):
        found[name] = [row for row in rows if row["subgroup"].startswith(FAMILIES[name])]
        place(found[name], out / name, SIZE, seed)
    return {f"pictures in {out / name}": len(family) for name, family in found.items()}


def main(argv: list[str] | None = None) -> None:
    p = command("pretrain", __doc__)
    commands = p.add_subparsers(dest="part", required=True)
    parts = {part.__name__: part for part in (clip, autoencoder, unet, families)}
    helps = {"steps": "optimizer steps", "batch": "pictures a step", "looks": "latents", "seed": "of all randomness",
             "init": "folder of the ldm.ckpt to start from", "fast": "bf16 autocast and torch.compile"}
    for name, part in parts.items():
        one = commands.add_parser(name, description=part.__doc__)
        one.error = p.error
        one.add_argument("--data", type=Path, nargs="+", required=True, help="folders, drawn from equally often")
        one.add_argument("--out", type=Path, required=True, help="folder to write to")
        for flag, value in list(inspect.signature(part).parameters.items())[2:]:
            how = {"action": "store_true"} if flag == "fast" else {"type": int if value.annotation is int else Path}
            one.add_argument(f"--{flag}", **how, default=value.default, help=f"{helps[flag]} (default %(default)s)")
    args = vars(p.parse_args(argv))
    if min(args.get("steps", 1), args.get("batch", 1), args.get("looks", 2) - 1) < 1:
        p.error("--steps and --batch must be at least 1, --looks at least 2")
    with (mistakes_in_one_line(p, "stopped: the same command goes on from what was saved"),
          claim(args["out"])):
        for name, figure in parts[args.pop("part")](**args).items():
            print(f"{name}: {figure:.4g}")


if __name__ == "__main__":
    main()
