"""How far a slim network's logits are from the dense network's, as a loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

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
