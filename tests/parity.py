"""Shared by the parity tests: random weights in which every tensor matters, and the error that is
compared."""

import torch
from torch import nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights by fan-in, norms around 1, biases around 0: nothing is zero, so nothing that is
    swapped goes unseen."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.state_dict().items():
        noise = torch.randn(p.shape, generator=g)
        one_d = (
            1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise
        )  # a norm's scale, or a bias
        p.copy_(noise / p[0].numel() ** 0.5 if p.dim() > 1 else one_d)
    return model


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def renamed(state: dict, rename) -> dict:
    """state under other names; rename(name, tensor) -> (name, tensor) or several of them."""
    out = {}
    for name, tensor in state.items():
        for new, value in rename(name, tensor):
            assert new not in out, f"{name} -> {new} twice"
            out[new] = value
    return out
