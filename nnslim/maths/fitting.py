"""Data-aware Tucker factors: the chain whose *output* is nearest to the dense layer's, not the one whose weights are.

Minimised over chains W~ of the given ranks, with L the metric of the outputs and x, y the centred patches and outputs:

    E || L (y - W~ x) ||^2  +  ridge * mean(diag S) * || L (W - W~) ||_F^2,      S = E[x x^T]

Only the moments S and E[y x^T] enter. x may come from an already compressed network and y from the dense one, so each
layer also corrects, as far as it can, what the layers before it lost (arXiv 2511.04494 for the metric; SVD-LLM,
2403.07378, and AA-SVD, 2604.02119, for the sequential update).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnslim.maths.lowrank import TuckerFactors, leading_eigenvectors, mode_products, one_thread, partial_tucker
from nnslim.maths.moments import LinearView


@dataclass(frozen=True)
class Problem:
    """One layer's least-squares problem, ridge included.

    Attributes:
        kernel: (O, I, taps) weights that the ridge pulls towards, float64.
        view: how rows of x and y are laid out.
        xx: (columns, columns) S + ridge. yx: (rows, columns) E[y x^T] + ridge * W.
        metric: (O, O) diagonal, positive: L.
        total: E || L y ||^2 + ridge * || L W ||^2, the error of a layer whose output is always the mean.
    """

    kernel: Tensor
    view: LinearView
    xx: Tensor
    yx: Tensor
    metric: Tensor
    total: float


def as_rows(kernel: Tensor, view: LinearView) -> Tensor:
    """Return (O, I, taps) as the matrix (rows, columns) of the linear view."""
    return kernel.transpose(1, 2).flatten(0, 1) if view.transposed else kernel.flatten(1)


def make_problem(
    kernel: Tensor, view: LinearView, xx: Tensor, yx: Tensor, variance_y: Tensor, metric: Tensor, ridge: float
) -> Problem:
    """Combine moments and weights into a problem.

    Args:
        kernel: (O, I, *K) dense weights. view: of that layer.
        xx, yx, variance_y: centred moments, see `Moments`. metric: (O, O).
        ridge: share of the mean variance of x that is added to every direction, e.g. 1e-3.
    """
    weight = kernel.detach().to("cpu", torch.float64).flatten(2)
    size = max(ridge, 1e-10) * float(xx.diagonal().mean()) + 1e-12  # few samples leave xx singular
    target = yx + size * as_rows(weight, view)
    total = float((metric.square().sum(0) * variance_y.unflatten(0, (view.outputs, -1)).sum(1)).sum())
    total += size * float((metric @ weight.flatten(1)).square().sum())
    return Problem(weight, view, _damped(xx, max(ridge, 1e-10)), target, metric, total)


def solve_dense(problem: Problem) -> Tensor:
    """Return the best unfactored kernel, (O, I, taps)."""
    rows = torch.cholesky_solve(problem.yx.T, torch.linalg.cholesky(problem.xx)).T
    return _as_kernel(rows, problem.view)


def separable_metric(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the channel part (I, I) and the tap part (K, K) whose Kronecker product stands for the patch covariance.

    The tap part is the identity for a transposed convolution, whose patches are single voxels.
    """
    view = problem.view
    if view.transposed:
        return problem.xx, torch.eye(view.taps, dtype=torch.float64)
    blocks = problem.xx.view(view.inputs, view.taps, view.inputs, view.taps)
    channels = torch.einsum("ikjk->ij", blocks) / view.taps
    taps = torch.einsum("ikil->kl", blocks) / channels.trace()
    return channels, taps


def whitened(kernel: Tensor, channels: Tensor, taps: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a kernel in units of output error, for patches of covariance channels x taps.

    Args:
        kernel: (O, I, *K). channels: (I, I). taps: (K, K). metric: (O, O), diagonal.
    Returns:
        (O, I, taps) kernel whose squared entries add up to output error, and the square roots of channels and taps.
    """
    with one_thread():
        root, tap_root = _square_root(channels), _square_root(taps)
    weight = kernel.detach().to("cpu", torch.float64).flatten(2)
    return mode_products(weight, [metric, root, tap_root]), root, tap_root


def fit_tucker(problem: Problem, ranks: tuple[int | None, int | None], *, sweeps: int = 3) -> TuckerFactors:
    """Return the factors that minimise the output error.

    HOOI in the metric of `separable_metric`; then, in turn, the best output factor and core for the input factor
    (reduced-rank regression, exact), and the best input factor for those (conjugate gradients on the exact quadratic).
    The core is solved last. For a transposed convolution the start is already exact.

    Args:
        problem: moments, metric and ridge. ranks: (R_out, R_in); None leaves that side whole.
        sweeps: alternating sweeps at most.
    Returns:
        TuckerFactors with float64 tensors; the factors are not orthonormal, and a whole side has the identity. `error`
        is the relative output error sqrt(E|L(y - W~x)|^2 / E|Ly|^2), with the ridge terms in both.
    """
    view = problem.view
    inputs = torch.eye(view.inputs, dtype=torch.float64)
    if ranks[1] is not None and ranks[1] < view.inputs:
        kernel, root, _ = whitened(solve_dense(problem), *separable_metric(problem), problem.metric)
        start = partial_tucker(kernel, (ranks[0] or view.outputs, ranks[1]))
        inputs = torch.linalg.solve(root, start.in_)
    elif ranks[1] is None:
        sweeps = 0
    best = _output_and_core(problem, inputs, ranks[0])
    for _ in range(0 if view.transposed else sweeps):
        found = _output_and_core(problem, _input_factor(problem, best), ranks[0])
        if found.error >= best.error * (1 - 1e-4):
            return min(best, found, key=lambda item: item.error)
        best = found
    return best


def fit_by_channels(
    kernel: Tensor, channels: Tensor, taps: Tensor, metric: Tensor, ranks: tuple[int | None, int | None]
) -> TuckerFactors:
    """Return factors by HOOI that takes the patch covariance, too large for memory, as the product channels x taps.

    Args:
        kernel: (O, I, taps), float64. channels: (I, I). taps: (K, K). metric: (O, O).
        ranks: (R_out, R_in), None leaves that side whole.
    """
    scaled, root, tap_root = whitened(kernel, _damped(channels), _damped(taps), metric)
    found = partial_tucker(scaled, (ranks[0] or kernel.shape[0], ranks[1] or kernel.shape[1]))
    core = torch.linalg.solve(tap_root, found.core.transpose(1, 2)).transpose(1, 2)
    sides = [torch.linalg.solve(metric, found.out), torch.linalg.solve(root, found.in_)]
    for mode, rank in enumerate(ranks):
        if rank is None:
            core, sides[mode] = mode_products(core, [sides[mode]], [mode]), torch.eye(len(sides[mode])).double()
    return TuckerFactors(sides[0], core.contiguous(), sides[1].contiguous(), found.error)


def project_kernel(kernel: Tensor, channels: Tensor, factor: Tensor) -> Tensor:
    """Return the kernel (O, R, taps) on z = factor^T x that is nearest to the kernel on x, for x of that covariance."""
    seen = channels @ factor
    return torch.einsum("oik,ib,bc->ock", kernel, seen, torch.linalg.inv(factor.T @ seen))


def _damped(matrix: Tensor, share: float = 1e-4) -> Tensor:
    made = matrix.clone()
    made.diagonal().add_(share * float(matrix.diagonal().mean()) + 1e-12)
    return made


def _square_root(matrix: Tensor) -> Tensor:
    """Return the root of a symmetric positive matrix; directions that rounding made negative count as tiny."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = 1e-12 * values[-1].clamp(min=1e-300)
    return (vectors * values.clamp(min=floor).pow(0.5)) @ vectors.T


def _as_kernel(rows: Tensor, view: LinearView) -> Tensor:
    if view.transposed:
        return rows.unflatten(0, (view.outputs, view.taps)).transpose(1, 2).contiguous()
    return rows.unflatten(1, (view.inputs, view.taps))


def _output_and_core(problem: Problem, inputs: Tensor, rank: int | None) -> TuckerFactors:
    """Return the best output factor and core for a given input factor: reduced-rank regression in closed form."""
    view = problem.view
    yx = problem.metric @ _as_kernel(problem.yx, view).flatten(1)  # (O, I * taps)
    cross = mode_products(yx.unflatten(1, (view.inputs, view.taps)), [inputs], [1], transpose=True)
    if view.transposed:
        inner = inputs.T @ problem.xx @ inputs  # (b, b)
        cross = cross.transpose(1, 2)  # (o, taps, b): the last axis is the regressors'
    else:
        half = (inputs.T @ problem.xx.view(view.inputs, -1)).view(-1, view.taps, view.inputs, view.taps)
        inner = torch.einsum("bkil,ic->bkcl", half, inputs).flatten(2).flatten(0, 1)
        cross = cross.flatten(1)[:, None]
    factor = torch.linalg.cholesky(_damped(inner, 1e-10))
    whitened = torch.linalg.solve_triangular(factor, cross.flatten(0, 1).T, upper=False).T.reshape(cross.shape)
    with one_thread():
        gram = whitened.flatten(1) @ whitened.flatten(1).T
        out = leading_eigenvectors(gram, rank or view.outputs)
    captured = float(torch.einsum("oa,op,pa->", out, gram, out))
    core = torch.einsum("oa,otr->atr", out, cross)
    core = torch.cholesky_solve(core.flatten(0, 1).T, factor).T.reshape(core.shape)
    core = core.transpose(1, 2) if view.transposed else core[:, 0].unflatten(1, (inputs.shape[1], view.taps))
    error = max(0.0, 1 - captured / problem.total) ** 0.5 if problem.total else 0.0
    out = torch.linalg.solve(problem.metric, out)
    if rank is None:  # the identity, not a rotation of it
        core, out = mode_products(core, [out], [0]), torch.eye(view.outputs, dtype=torch.float64)
    return TuckerFactors(out, core.contiguous(), inputs, error)


def _input_factor(problem: Problem, factors: TuckerFactors, *, steps: int = 12) -> Tensor:
    """Return the best input factor for a given output factor and core, by preconditioned conjugate gradients."""
    view, core = problem.view, factors.core
    weighted = problem.metric @ factors.out  # (O, a)
    gram = weighted.T @ weighted
    yx = (weighted.T @ (problem.metric @ problem.yx)).unflatten(1, (view.inputs, view.taps))
    gram_core = torch.einsum("ac,cbk->abk", gram, core)

    def hessian(factor: Tensor) -> Tensor:  # of the error, which is quadratic: applied, never formed
        wide = torch.einsum("abk,ib->aik", core, factor).flatten(1) @ problem.xx
        return torch.einsum("aik,abk->ib", wide.unflatten(1, (view.inputs, view.taps)), gram_core)

    channels, taps = separable_metric(problem)
    small = torch.einsum("abk,kl,acl->bc", core, taps, gram_core)
    left = torch.linalg.cholesky(_damped(channels, 1e-10))
    right = torch.linalg.cholesky(_damped((small + small.T) / 2, 1e-10))

    def precondition(residual: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(residual, left).T, right).T

    found = factors.in_
    residual = torch.einsum("aik,abk->ib", yx, core) - hessian(found)
    step = precondition(residual)
    rate = float((residual * step).sum())
    for _ in range(steps):
        if rate <= 1e-20 * problem.total:
            break
        curved = hessian(step)
        length = rate / float((step * curved).sum())
        found = found + length * step
        residual = residual - length * curved
        direction = precondition(residual)
        fresh = float((residual * direction).sum())
        step, rate = direction + fresh / rate * step, fresh
    # Coordinates of unit variance: well conditioned for float32 and for training that follows.
    root = left.T @ found
    return torch.linalg.solve_triangular(left.T, torch.linalg.qr(root)[0], upper=True)
