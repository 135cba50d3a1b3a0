"""A linear layer as two, and the structural edit that makes it so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nnslim.errors import SpecError
from nnslim.network.spec import ReplacingEdit, register_edit


class LowRankLinear(nn.Module):
    """first (I -> R), last (R -> O, with the bias); nothing lies between them."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        """Build the structure for `linear` (not modified), with weights allocated but not set.

        Raises:
            SpecError: no linear layer, or a rank outside 1..min(I, O).
        """
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise SpecError(f"low_rank: expected a linear layer, found {type(linear).__name__}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if not 1 <= rank <= min(self.in_features, self.out_features):
            raise SpecError(f"low_rank: rank {rank} is outside 1..{min(self.in_features, self.out_features)}")
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.first = nn.Linear(self.in_features, rank, bias=False, **like)
        self.last = nn.Linear(rank, self.out_features, bias=linear.bias is not None, **like)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return self.last(self.first(x))

    @torch.no_grad()
    def fill(self, linear: nn.Linear, basis: Tensor, mean: Tensor) -> None:
        """Set the weights to the layer's outputs projected on a basis.

        Args:
            linear: the dense layer. basis: (O, R) with orthonormal columns.
            mean: (O,) of W x; what the projection takes from it is put into the bias, where there is one.
        """
        weight = linear.weight.detach().double()
        basis, mean = basis.to(weight), mean.to(weight)
        self.first.weight.copy_(basis.T @ weight)
        self.last.weight.copy_(basis)
        if linear.bias is not None:
            self.last.bias.copy_(linear.bias.double() + mean - basis @ (basis.T @ mean))

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """Return the (O, I) matrix that the two stand for."""
        return self.last.weight @ self.first.weight


@register_edit
@dataclass(frozen=True)
class LowRankEdit(ReplacingEdit):
    """Replace one linear layer by two, `<name>.first` and `.last`.

    Attributes:
        layer: any of its names. rank: features between the two.
    """

    layer: str
    rank: int
    kind: ClassVar[str] = "low_rank"

    def made(self, dense: nn.Module, fill: bool) -> nn.Module:
        """Return the pair."""
        pair = LowRankLinear(dense, self.rank)
        if fill:
            left, _, _ = torch.linalg.svd(dense.weight.detach().double(), full_matrices=False)
            pair.fill(dense, left[:, : self.rank], left.new_zeros(len(left)))
        return pair
