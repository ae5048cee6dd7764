"""What the stages of pretraining share: a training loop, and files of weights as released."""
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.utils import save_image
from tqdm import tqdm

from ..models import generator, pick_device
from ..runs import load, save
from ..weights import load_checkpoint

SIZE = 64  # pixels, side of every picture
WARM_UP = 0.11  # share of the steps in which the learning rate rises
SAVE_EVERY = 500  # steps


def recent_average(average: Tensor, weights: Tensor, updates: Tensor) -> Tensor:
    """A running mean over about the last ninth of all steps so far."""
    return average.lerp(weights, 9 / (10 + updates))


def restore(path: Path, config: dict, parts: dict) -> int:
    """Load the state that an earlier `fit` left in `path` into `parts` -> the steps it took.

    0 where there is no such file. ValueError: it was made with other settings."""
    if not path.exists():
        return 0
    state = load(path, {"config", "step", *parts})
    if state["config"] != config:
        raise ValueError(
            f"{path} was made with {state['config']}, not {config}: choose another --out"
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def fit(
    model: nn.Module,
    draw_batch: Callable[[torch.Generator], tuple[Tensor, ...]],
    loss_of: Callable[..., Tensor],
    path: Path,
    config: dict,
    fast: bool = False,
) -> nn.Module:
    """Minimise loss_of(model, *draw_batch(generator)) by AdamW, in one cycle of the learning rate.

    config: "steps", "seed", "lr", which is the highest learning rate, and what else decides the
    result. A call that was stopped goes on from the state in `path`, to the same result. fast: in
    bf16, compiled. Returns the averaged model with values that fp16 holds. ValueError: `path` has
    the state of other settings."""
    device = pick_device()
    model = model.to(device)
    average = AveragedModel(model, avg_fn=recent_average)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config["lr"], config["steps"], pct_start=WARM_UP, cycle_momentum=False
    )
    parts = {"model": model, "ema": average, "optimizer": optimizer, "cycle": cycle}
    start = restore(path, config, parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    if fast:
        loss_of = torch.compile(loss_of)

    steps = config["steps"]
    bar = tqdm(range(start, steps), path.stem, initial=start, total=steps)
    for step in bar:
        batch = [x.to(device) for x in draw_batch(generator(config["seed"], step))]
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            loss = loss_of(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        average.update_parameters(model)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            save({"step": step + 1, "config": config, **states}, path)
    return average.module.requires_grad_(False).half().float()


def fp16_state(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a model by their released names, in fp16, on the CPU."""
    return {prefix + name: x.half().cpu() for name, x in model.state_dict().items()}


def save_ldm(path: Path, parts: dict[str, nn.Module]) -> None:
    """Write the parts of a latent diffusion model, by their released names, to one file."""
    state = {}
    for name, part in parts.items():
        state |= fp16_state(part, f"{name}.")
    scale = torch.tensor(parts["first_stage_model"].scale_factor)
    save({"state_dict": {**state, "scale_factor": scale, "image_size": torch.tensor(SIZE)}}, path)


def load_frozen(kind: type[nn.Module], path: Path) -> nn.Module:
    """A model of this class (CLIP, Autoencoder) from a file of weights, on the device."""
    model = kind.from_checkpoint(load_checkpoint(path))
    return model.requires_grad_(False).to(pick_device())


def save_grid(x: Tensor, path: Path, columns: int = 12) -> None:
    """Write pictures (N 3 S S) in [-1, 1] as one picture."""
    save_image(x, path, nrow=columns, normalize=True, value_range=(-1, 1))
