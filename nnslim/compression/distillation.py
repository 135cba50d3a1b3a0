"""What a slim network learns from the dense one: the answers of a teacher, losses, and norms in closed form."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnslim.network.walk import LayerIndex
from nnslim.running.engine import Settings, with_fallback
from nnslim.surgery.streaming import Tiles, hooked

Axes = tuple[int, ...]
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_NORMS = (nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
_FIXED = (_BATCH_NORM, nn.modules.dropout._DropoutNd)
_SMOOTH = 1e-5
_UNLIKELY = 1e-6


def mirrors(axes: Sequence[int] | None, most: int | None = None) -> list[Axes]:
    """Return the ways to mirror along any of the axes, () first.

    Args:
        axes: spatial axes, 0 the first.
        most: so many at most; of few, each axis is mirrored in as near to a half as can be.
    """
    found = [chosen for size in range(len(axes or ()) + 1) for chosen in itertools.combinations(axes or (), size)]
    if most is None or len(found) <= most:
        return found
    pairs = [(way, tuple(axis for axis in axes if axis not in way)) for way in found[: len(found) // 2 + 1]]
    return list(dict.fromkeys(way for pair in pairs for way in pair))[:most]


def flip(x: Tensor, axes: Axes) -> Tensor:
    """Return (B, C, *spatial) mirrored along spatial axes."""
    return x.flip([axis + 2 for axis in axes]) if axes else x


class FoldMean(nn.Module):
    """Mean logits of several networks, which is how nnU-Net joins the folds of a model."""

    def __init__(self, folds: Sequence[nn.Module]) -> None:
        super().__init__()
        self.folds = nn.ModuleList(folds)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, heads, *patch) for (B, C, *patch)."""
        return torch.stack([fold(x) for fold in self.folds]).mean(0)


@dataclass
class Teacher:
    """Answers of the dense network, without gradients.

    With mirror axes the answer is to a mirror image of the batch, turned back; which one is drawn for each step.
    Learned from over many steps this is the mean over all mirror images: what nnU-Net's test-time mirroring predicts,
    at the price of one forward pass.

    Attributes:
        dense: in eval mode.
        axes: spatial axes along which the model may be mirrored; none: it answers the batch as it is.
        half: compute in bfloat16. seed: decides the mirror image of each step.
    """

    dense: nn.Module
    axes: Sequence[int] = ()
    half: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._ways = mirrors(self.axes)
        self._engines: dict[torch.Size, nn.Module] = {}  # the faster engine of a CPU, where nothing is learned

    @torch.no_grad()
    def logits(self, batch: Tensor) -> Tensor:
        """Return logits (B, heads, *patch) of the batch as it is."""
        return self._logits(batch)

    @torch.no_grad()
    def answer(self, batch: Tensor, step: int) -> Tensor:
        """Return logits (B, heads, *patch) for step number `step`."""
        way = self._ways[int(np.random.default_rng((self.seed, step)).integers(len(self._ways)))]
        return flip(self._logits(flip(batch, way)), way)

    def _logits(self, batch: Tensor) -> Tensor:
        if self.half or batch.device.type != "cpu":
            with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.half):
                return self.dense(batch).float()
        if batch.shape not in self._engines:
            self._engines[batch.shape] = with_fallback(self.dense, tuple(batch.shape), Settings("eager"))[0]
        return self._engines[batch.shape](batch)


def to_training_mode(network: nn.Module) -> None:
    """Put a slim network into training mode, except for batch norms and dropout.

    The answers that it learns are those of the dense network in eval mode, and a batch of two patches says little about
    the means and variances of the data.
    """
    network.train()
    for module in network.modules():
        if isinstance(module, _FIXED):
            module.eval()


def as_logits(probabilities: Tensor, regions: bool) -> Tensor:
    """Return logits whose softmax over channels, or sigmoid for regions, are these (B, C, *spatial) probabilities."""
    return probabilities.logit(_UNLIKELY) if regions else probabilities.clamp_min(_UNLIKELY).log()


def distillation_loss(student: Tensor, teacher: Tensor, *, regions: bool = False) -> Tensor:
    """Return the cross-entropy of the student under the teacher's probabilities, plus one minus their soft Dice.

    The first term is the Kullback-Leibler divergence but for a constant (Hinton et al. 2015, temperature 1) and looks
    at every voxel alike; the second weighs every class alike, as nnU-Net's own Dice term does, so that a small organ
    counts as much as the background. The scalar is smallest, but not 0, where the student equals the teacher.

    Args:
        student, teacher: (B, C, *spatial) logits, the student's with gradient.
        regions: channels are independent (nnU-Net's region-based training): sigmoid instead of softmax.
    """
    student, teacher = student.float(), teacher.detach().float()
    if regions:
        target, predicted = teacher.sigmoid(), student.sigmoid()
        entropy = functional.binary_cross_entropy_with_logits(student, target)
    else:
        target, predicted = teacher.softmax(1), student.softmax(1)
        entropy = -(target * student.log_softmax(1)).sum(1).mean()
    classes = slice(0 if regions else 1, None)  # without background, as nnU-Net's Dice
    axes = [0, *range(2, student.ndim)]
    both = (predicted * target).sum(axes)[classes]
    total = (predicted.square() + target.square()).sum(axes)[classes]
    return entropy + 1 - torch.mean((2 * both + _SMOOTH) / (total + _SMOOTH))


def stage_ends(network: nn.Module, tile: Tensor) -> list[str]:
    """Return the last norm layer of each resolution stage, in order of execution; the tile is (1, C, *patch)."""
    ran: list[tuple[str, tuple[int, ...]]] = []
    names = [layer.name for layer in LayerIndex(network).of_type(*_NORMS, _BATCH_NORM)]
    hooks = {n: lambda m, i, o, n=n: ran.append((n, tuple(o.shape[2:]))) for n in names}
    with hooked(network, {}, hooks), torch.no_grad():
        network(tile)
    following = [*ran[1:], ("", ())]
    return [name for (name, shape), (_, then) in zip(ran, following, strict=True) if shape != then]


def stage_loss(dense: nn.Module, slim: nn.Module, ends: Sequence[str], batch: Tensor) -> Tensor:
    """Return the squared error of the slim network's stages as a share of the dense outputs' variance, mean of stages.

    `ends` are those of `stage_ends`, the batch is (B, C, *patch).
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


@torch.inference_mode()
def recalibrate_norms(dense: nn.Module, slim: nn.Module, tiles: Tiles) -> None:
    """Set the slim norms' affine weights, in place, so that their outputs are nearest to the dense ones'.

    For each channel the least-squares line from the slim norm's output to the dense norm's: an output that follows the
    dense one only partly is scaled down accordingly.
    One pass over the tiles. Batch norms are left alone: they do not normalise what they are given, so lines that are
    fitted to all of them at once add up (a network of 20 lost all that its fit had won). Both networks are in eval
    mode, on one device.
    """
    layers, others = LayerIndex(slim), LayerIndex(dense)
    found = [layer for layer in layers.of_type(*_NORMS) if layer.module.weight is not None and layer.name in others]
    norms = {layer.name: layer.module for layer in found}
    sums = {name: torch.zeros(5, len(norm.weight), dtype=torch.float64) for name, norm in norms.items()}
    counts = dict.fromkeys(norms, 0)
    wanted: dict[str, Tensor] = {}

    def compare(name: str, output: Tensor) -> None:
        u, v = (one.transpose(0, 1).flatten(1).double().cpu() for one in (output, wanted.pop(name)))
        sums[name] += torch.stack([u.sum(1), v.sum(1), (u * u).sum(1), (u * v).sum(1), (v * v).sum(1)])
        counts[name] += u.shape[1]

    for tile in tiles:
        tile = tile.to(next(dense.parameters()).device)
        # Copies, because activations work in place on what the norm puts out.
        with hooked(dense, {}, {n: lambda m, i, o, n=n: wanted.update({n: o.clone()}) for n in norms}):
            dense(tile)
        with hooked(slim, {}, {n: lambda m, i, o, n=n: compare(n, o) for n in norms}):
            slim(tile)
    for name, norm in norms.items():
        if counts[name]:
            u, v, uu, uv, _ = sums[name] / counts[name]
            slope = ((uv - u * v) / (uu - u * u).clamp(min=1e-12)).clamp(0.0, 2.0).to(norm.weight)
            shift = (v - slope.double().cpu() * u).to(norm.weight)
            norm.bias.copy_(norm.bias * slope + shift)
            norm.weight.copy_(norm.weight * slope)
