"""How far a slim network's logits, or the outputs of its stages, are from the dense network's, as a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnslim.compression.norms import NORMS
from nnslim.network.walk import LayerIndex
from nnslim.surgery.streaming import hooked

_SMOOTH = 1e-5


def distillation_loss(student: Tensor, teacher: Tensor, *, regions: bool = False) -> Tensor:
    """Return the cross-entropy of the student under the teacher's probabilities, plus one minus their soft Dice.

    The first term is the Kullback-Leibler divergence but for a constant (Hinton et al. 2015, temperature 1) and looks
    at every voxel alike; the second weighs every class alike, as nnU-Net's own Dice term does, so that a small organ
    counts as much as the background.

    Args:
        student: (B, C, *spatial) logits, with gradient.
        teacher: logits of the same shape, without.
        regions: channels are independent (nnU-Net's region-based training): sigmoid instead of softmax.
    Returns:
        Scalar; smallest, but not 0, where the student equals the teacher.
    """
    student, teacher = student.float(), teacher.detach().float()
    if regions:
        target, predicted = teacher.sigmoid(), student.sigmoid()
        entropy = functional.binary_cross_entropy_with_logits(student, target)
        classes = slice(0, None)
    else:
        target, predicted = teacher.softmax(1), student.softmax(1)
        entropy = -(target * student.log_softmax(1)).sum(1).mean()
        classes = slice(1, None)  # without background, as nnU-Net's Dice
    axes = [0, *range(2, student.ndim)]
    both = (predicted * target).sum(axes)[classes]
    total = (predicted.square() + target.square()).sum(axes)[classes]
    dice = (2 * both + _SMOOTH) / (total + _SMOOTH)
    return entropy + 1 - torch.mean(dice)


def stage_ends(network: nn.Module, tile: Tensor) -> list[str]:
    """Return the last norm layer of each resolution stage, in order of execution.

    Args:
        network: in eval mode. tile: (1, C, *patch).
    """
    ran: list[tuple[str, tuple[int, ...]]] = []
    names = [layer.name for layer in LayerIndex(network).of_type(*NORMS)]
    hooks = {n: lambda m, i, o, n=n: ran.append((n, tuple(o.shape[2:]))) for n in names}
    with hooked(network, {}, hooks), torch.no_grad():
        network(tile)
    following = [*ran[1:], ("", ())]
    return [name for (name, shape), (_, then) in zip(ran, following, strict=True) if shape != then]


def stage_loss(dense: nn.Module, slim: nn.Module, ends: Sequence[str], batch: Tensor) -> Tensor:
    """Return the squared error of the slim network's stages as a share of the dense outputs' variance, mean of stages.

    Args:
        ends: from `stage_ends`. batch: (B, C, *patch).
    """
    wanted: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    # Held by reference: the activation that works in place on them makes both the stage's outputs.
    with hooked(dense, {}, {n: lambda m, i, o, n=n: wanted.update({n: o}) for n in ends}), torch.no_grad():
        dense(batch)
    with hooked(slim, {}, {n: lambda m, i, o, n=n: found.update({n: o}) for n in ends}):
        slim(batch)
    targets = {name: output.float() for name, output in wanted.items()}
    parts = [(found[n].float() - t).square().mean() / t.var().clamp(min=1e-6) for n, t in targets.items()]
    return torch.stack(parts).mean()
