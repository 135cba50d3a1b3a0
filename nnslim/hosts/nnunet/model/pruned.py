"""Models that a training made slim, as the start of a compression or training; each fold of a pruned one has its own
widths."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from nnslim.errors import ModelError
from nnslim.hosts.nnunet.model.slim_plans import spec_in_plans, with_architecture
from nnslim.hosts.nnunet.model.trained_model import TrainedModel, build_network
from nnslim.network.spec import Edit, SlimSpec
from nnslim.surgery.narrow import ElasticEdit, NarrowEdit, as_base, widths_of


def is_elastic(model: TrainedModel) -> bool:
    """Whether the weights of each fold decide its widths."""
    return any(isinstance(edit, ElasticEdit) for edit in spec_in_plans(model).edits)


def fold_widths(model: TrainedModel, fold: str) -> tuple[NarrowEdit, ...]:
    """Return the widths of one fold of an elastic model, of all its layers, as edits."""
    return tuple(NarrowEdit(name, *widths) for name, widths in widths_of(build_network(model, fold)).items())


def plans_for_fold(model: TrainedModel, fold: str) -> dict[str, Any]:
    """Return the plans of a model; of an elastic one with the widths of this fold, for a training to start from."""
    if not is_elastic(model):
        return copy.deepcopy(model.plans)
    others = [edit for edit in spec_in_plans(model).edits if not isinstance(edit, (NarrowEdit, ElasticEdit))]
    spec = SlimSpec((*others, *fold_widths(model, fold), ElasticEdit()))
    return with_architecture(model.plans, model.configuration, spec)


def trained_base(model: TrainedModel, network: nn.Module) -> tuple[nn.Module, tuple[Edit, ...]]:
    """Return the network of a model that a training made slim as a base to compress, and the edits that made it so.

    Args:
        model: pruned, or with `trained` edits alone. network: of its first fold, see `build_network`.
    Raises:
        ModelError: other edits made it slim, or its folds differ in width.
    """
    edits = spec_in_plans(model).edits
    if all(edit.trained for edit in edits):
        return as_base(network), edits
    if not {edit.kind for edit in edits} <= {"narrow", "elastic"}:
        raise ModelError(f"{model.path} is already a slim model; compress the model that it was made from")
    shapes = [{key: value.shape for key, value in weights.items()} for weights in model.weights]
    if any(other != shapes[0] for other in shapes):
        folds = ", ".join(model.checkpoints)
        raise ModelError(
            f"{model.path} is pruned, and its folds ({folds}) have widths of their own: compress one by one (-f FOLD)"
        )
    base = as_base(network)
    return base, tuple(NarrowEdit(name, *widths) for name, widths in widths_of(base).items())
