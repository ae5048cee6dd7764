"""Assembly: a weights folder becomes a frozen base, a run folder becomes a trained model.

The files of a weights folder are known by the keys inside them, never by name. One folder holds an
LDM (U-Net, first stage and class embedding, in one file or several), a CLIP and its BPE merges; the
embedded default in assets/emoji64 is such a folder.
B batch, C h w latent, D CLIP embedding width, M U-Net's context width, K condition tokens.
"""
import copy
import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .clip import CLIP
from .data import Picture, file_identity, scan
from .identify import build, candidates, inspect, null_class_warning, scale_factor
from .runs import load, one_line, say
from .tokenizer import Tokenizer
from .tune import load_trained, tunable, unet_of
from .unet import UNet, memory_format

EMBEDDED = Path(__file__).parent / "assets" / "emoji64"


@dataclass
class Base:
    """The frozen models.

    `null` (1 1 M) is the embedding of "no class", None where the U-Net takes no context. `size`:
    how many pixels wide pictures are. `bf16`: the U-Net and what is trained on it compute in bf16
    autocast."""

    unet: UNet
    autoencoder: Autoencoder
    clip: CLIP
    tokenizer: Tokenizer
    null: Tensor | None
    size: int
    device: torch.device
    name: str
    bf16: bool = False

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.size // self.autoencoder.factor
        return self.unet.in_channels, side, side

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the U-Net, the first stage and CLIP, which an adapter must find again to mean
        the same."""
        return {part: fingerprint(getattr(self, part)) for part in ("unet", "autoencoder", "clip")}

    @cached_property
    def rounded(self) -> "Base":
        """This base with a bf16 copy of its U-Net, made once. The base itself keeps its float32
        weights, as other runs may be trained on it; who needs it no longer lets go of it."""
        return replace(self, unet=round_to_bf16(self.unet))


def check_seed(seed: int) -> None:
    """ValueError: torch's generator on the CPU takes 32 bits of a seed, so 2**32 would repeat 0."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed} must be between 0 and {2**32 - 1}")


def generator(seed: int, step: int) -> torch.Generator:
    """The source of all randomness of a training step, on the CPU: a resumed run needs no random
    states."""
    check_seed(seed)
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def pick_device(device: str | None = None) -> torch.device:
    """The device named, else CUDA, else MPS, else the CPU. ValueError: it is not there."""
    found = "cpu"
    if torch.cuda.is_available():
        found = "cuda"
    elif torch.backends.mps.is_available():
        found = "mps"
    remedy = f"leave it out to use {found}"
    try:
        picked = torch.empty(0, device=device or found).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"device {device!r} is not there ({one_line(error)}): {remedy}") from error
    if picked.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device {device!r}: choose cuda, mps or cpu, or {remedy}")
    return picked


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16 by itself: CUDA from Ampere on, and CPUs with
    avx512_bf16, where training ANL is then twice as fast (169 against 87 embedded pictures a second
    on 2 cores). Elsewhere it would be slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public name for it
    return device.type == "cpu" and asked is not None and asked()


def load_base(weights: str | Path | None = None, device: str | None = None) -> Base:
    """Load and freeze the models of a weights folder (None: the embedded default).

    FileNotFoundError: no such folder. ValueError: a part is missing, there twice or unfit; it lists
    what was found."""
    folder = Path(weights or EMBEDDED)
    device = pick_device(device)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of weights: see weights.md for what "
                                "goes into one")
    files, seen = find_parts(folder)
    unet_path, state = files["unet"]
    unet, autoencoder, clip, tokenizer = (
        build(files[part][0], part, files[part][1])
        for part in ("unet", "autoencoder", "clip", "merges")
    )
    null = None
    if unet.context_dim is not None:
        null = null_class(unet, unet_path, files, folder).to(device)  # 1 1 M
    autoencoder.scale_factor = scale_factor(state)
    if tokenizer.vocab_size != clip.token_embedding.num_embeddings:
        raise ValueError(f"{files['merges'][0]} makes {tokenizer.vocab_size} tokens, "
                         f"{files['clip'][0].name} knows {clip.token_embedding.num_embeddings}: "
                         "the merges are cut short, or another CLIP's")
    for model in (unet, autoencoder, clip):
        model.requires_grad_(False).eval().to(device)
    unet.to(memory_format=memory_format(device))
    size = picture_size(unet_path, state, unet, autoencoder)
    name = "the embedded default emoji64" if weights is None else "; ".join(seen)
    return Base(unet, autoencoder, clip, tokenizer, null, size, device, name, has_bf16(device))


def find_parts(folder: Path) -> tuple[dict[str, tuple[Path, dict[str, Tensor]]], list[str]]:
    """Part -> the file of a weights folder that holds it and its tensors; and what every file is.

    Files lie in the folder itself or in diffusers' sub-folders. ValueError: a part is missing or
    there twice, or a file cannot be used."""
    files = {}
    seen = []
    wrong = []
    for path in candidates(folder):
        found, state = inspect(path)
        seen.append(f"{path.relative_to(folder)}: {found.name}")
        if found.problem:
            raise ValueError(f"{path}: {found.name}. {found.problem}")
        if warning := null_class_warning(state):
            say(f"warning    {path.name}: {warning}")
        for part in found.parts:
            if part in files:
                first = files[part][0].relative_to(folder)
                wrong.append(f"{part} is in both {first} and {path.relative_to(folder)}")
            files[part] = (path, state)
    for part in ("unet", "autoencoder", "clip", "merges"):
        if part not in files:
            wrong.append(f"{part} is missing")
    if wrong:
        raise ValueError(f"{folder}: {', '.join(wrong)}. Found: {'; '.join(seen) or 'nothing'}. "
                         "See weights.md")
    return files, seen


def null_class(unet: UNet, path: Path, files: dict, folder: Path) -> Tensor:
    """The embedding of "no class", (1 1 M) float32: the last of the classes'. ValueError: there are
    none, or they do not fit the U-Net, whose file is `path`."""
    if "classes" not in files:
        raise ValueError(f"{path}: its U-Net takes a class, but no file of {folder} embeds classes")
    classes = build(files["classes"][0], "classes", files["classes"][1])
    if classes.shape[1:] != (unet.context_dim,):
        raise ValueError(f"{files['classes'][0]} embeds classes as {tuple(classes.shape[1:])}, "
                         f"{path.name} takes {unet.context_dim} numbers: get the whole file, see "
                         "weights.md")
    return classes[-1:, None]


def picture_size(
    path: Path, state: dict[str, Tensor], unet: UNet, autoencoder: Autoencoder
) -> int:
    """How many pixels wide the pictures of a base are: what its U-Net's file says, or else 256 as
    in every released LDM. ValueError: it makes no sense with the other sizes."""
    channels = autoencoder.post_quant_conv.in_channels
    size = state.get("image_size", torch.tensor(256))
    if "latent_size" in state:
        size = state["latent_size"] * autoencoder.factor
    size = int(size) if size.numel() == 1 else 0
    if not 16 <= size <= 4096 or size % autoencoder.factor or unet.in_channels != channels:
        raise ValueError(f"{path}: pictures of {size} pixels, a first stage of {channels} channels "
                         f"and a U-Net of {unet.in_channels} do not go together: get the whole "
                         "file, see weights.md")
    return size


def fingerprint(model: nn.Module) -> str:
    """16 hex digits from the name, shape and 64 to 127 evenly spread values (or all) of every
    tensor, in float32."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        stride = max(1, tensor.numel() // 64)
        values = tensor.flatten()[::stride].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {values.tolist()}".encode())
    if getattr(model, "scale_factor", 1.0) != 1:  # of a first stage: its latents are others
        digest.update(f"scale_factor {model.scale_factor}".encode())
    return digest.hexdigest()[:16]


def round_to_bf16(module: nn.Module) -> nn.Module:
    """A copy whose linear maps and convolutions have their weights in bf16, as autocast would round
    them at every evaluation."""
    copies = {}
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d):
            for p in part.parameters(recurse=False):
                copies[id(p)] = nn.Parameter(p.detach().bfloat16(), requires_grad=False)
    return copy.deepcopy(module, copies)  # it takes these for the copies it has already made


def split(pictures: Sequence[Hashable], seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the held-out entries of a data set, both ascending.

    A tenth of the distinct pictures, at least one, is held out. A picture that has several captions
    stands in the list once for each of them: all its entries fall on the same side, as otherwise
    held-out pictures would be trained on. ValueError: fewer than two distinct pictures.
    """
    distinct = list(dict.fromkeys(pictures))
    if len(distinct) < 2:
        raise ValueError(f"{len(distinct)} readable picture: at least 2 are needed, one of them is "
                         "held out")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    held_out = {distinct[i] for i in order[: max(1, len(distinct) // 10)].tolist()}
    is_held_out = torch.tensor([picture in held_out for picture in pictures])  # N
    return (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]


def to_condition(embeddings: Tensor, mu: Tensor, sigma: float) -> Tensor:
    """Unit CLIP embeddings (... D) -> conditions (e - mu) / sigma (... D)."""
    return (embeddings - mu) / sigma


@dataclass
class Run:
    """A base with what was trained on it, and the centre and spread of the embeddings it was
    trained on. B batch, C h w latent, D CLIP embedding width, K tokens, M U-Net's context width."""

    base: Base
    model: nn.ModuleDict  # see tunable
    mu: Tensor  # (D,) mean unit image embedding of the training pictures
    mu_text: Tensor  # (D,) of their captions: CLIP's two towers have different centres
    sigma: float
    config: dict
    pictures: list[str]  # file names of its data set, in its folder, those held out too
    files: list[str] = field(default_factory=list)  # data.file_identity of each of them

    def condition(self, embeddings: Tensor, text: bool = False) -> Tensor:
        """Unit CLIP embeddings (B D) -> condition (e - mu) / sigma (B D), where 0 means "as the
        average picture". text: they are those of captions."""
        mu = self.mu_text if text else self.mu
        return to_condition(embeddings, mu, self.sigma).to(self.base.device)

    def bind(self, cond: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """cond (B D) -> model(z, t) -> eps in float32; what depends on cond alone is computed
        once."""
        device = self.base.device.type
        unet = unet_of(self.base, self.model)
        context = None
        extra = None
        with torch.autocast(device, torch.bfloat16, enabled=self.base.bf16):
            if "to_context" in self.model:
                tokens = self.model["to_context"](cond)  # B K*M
                context = tokens.view(len(cond), -1, unet.context_dim)  # B K M
            elif self.base.null is not None:
                context = self.base.null.expand(len(cond), -1, -1)  # B 1 M
            if "anls" in self.model:
                extra = self.model["anls"].bind(cond)

        def model(z: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=self.base.bf16):
                return unet(z, t, context, extra).float()

        return model

    def frozen(self) -> "Run":
        """This run, never to be trained again.

        Where the device computes in bf16, it works on copies whose weights are rounded once, as
        autocast would round them at every evaluation: the same numbers, 11 % faster (sampling on
        2 cores of a Xeon), and half the memory once nobody holds the base in float32.
        """
        self.model.requires_grad_(False)
        if not self.base.bf16:
            return self
        return replace(self, base=self.base.rounded, model=round_to_bf16(self.model))


class RunPictures(NamedTuple):
    """What a run was trained on and what it has not seen."""

    pictures: list[Picture]
    train_ids: Tensor  # indices into pictures
    held_ids: Tensor


def training_set(run: Run, data: str | Path | None = None) -> RunPictures:
    """The pictures of a run's data set, with those it was trained on and those held out.

    data: the folder that they lie in now, if it has moved since training. FileNotFoundError: it is
    not there. ValueError: its pictures are not the run's, by their names or by what is in the
    files, so that nobody can say which were held out.
    """
    folder = Path(data or run.config["data"])
    remedy = "Name the folder that has them as --trained-on, put them back, or train again"
    if not folder.exists():
        raise FileNotFoundError(f"{folder}, with this run's pictures, does not exist. {remedy}")
    pictures = scan(folder, run.base.size).pictures
    paths = [picture.path for picture in pictures]
    if [str(path.relative_to(folder)) for path in paths] != run.pictures:
        raise ValueError(f"{folder} does not have this run's {len(run.pictures)} pictures. "
                         f"{remedy}")
    pairs = zip(paths, run.files, strict=False)  # files is empty in adapters that did not keep it
    changed = [path.name for path, identity in pairs if file_identity(path) != identity]
    if changed:
        raise ValueError(f"{folder} has {len(changed)} other pictures under the names of this "
                         f"run's ({', '.join(changed[:3])} ...). {remedy}")
    return RunPictures(pictures, *split(paths, run.config["seed"]))


ADAPTER = {"config", "fingerprints", "trained", "mu", "mu_text", "sigma", "pictures"}  # its names


def load_run(run: str | Path, weights: str | Path | None = None, device: str | None = None) -> Run:
    """The trained model of a run folder, on its base (`weights`: where the base lies now, if it has
    moved).

    FileNotFoundError: no adapter.pt there, or no weights. ValueError: the base or CLIP is not the
    one it was trained on, or the file is damaged."""
    path = Path(run) / "adapter.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: --run takes a folder that "
                                "`python -m tinyanl.train` wrote")
    adapter = load(path, ADAPTER)
    weights = weights or adapter["config"].get("weights")
    if weights and not Path(weights).exists():
        raise FileNotFoundError(f"{path} was trained on the weights in {weights}, where nothing "
                                "is: name the folder that they lie in now as --weights")
    base = load_base(weights, device)
    check_fingerprints(base, adapter["fingerprints"], path)
    try:
        trained_run = assemble(base, adapter)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit its own config ({one_line(error)}): "
                         "train again") from error
    trained_run.model.to(base.device, memory_format=memory_format(base.device))
    return trained_run.frozen()


def check_fingerprints(base: Base, expected: dict[str, str], path: Path) -> None:
    """ValueError: the adapter at `path` was trained on other weights than `base` has."""
    for part, found in base.fingerprints().items():
        wanted = expected.get(part) if isinstance(expected, dict) else None
        if found != wanted:
            raise ValueError(f"{path} was trained on another {part} ({wanted}, here {found}): "
                             "give the folder with the right one as --weights")


def assemble(base: Base, adapter: dict) -> Run:
    """The run that an adapter.pt tells of. An error of some kind: it tells of none."""
    config = adapter["config"]
    with torch.device("meta"):  # its sizes may be lies: no memory before tensors have them
        model = tunable(base, config["tune"], config["tokens"], config["ratio"])
    load_trained(model, adapter["trained"])
    mu = adapter["mu"].view(base.clip.dim).float()
    mu_text = adapter["mu_text"].view(base.clip.dim).float()
    sigma = float(adapter["sigma"])
    if not sigma > 0:
        raise ValueError(f"sigma {sigma}")
    if not (mu + mu_text).isfinite().all():
        raise ValueError("a mean that is not finite")
    files = list(adapter.get("files", []))  # not kept before 2026-11-27
    return Run(base, model, mu, mu_text, sigma, config, list(adapter["pictures"]), files)
