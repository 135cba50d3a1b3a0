"""1x1 convolution, instance norm, leaky ReLU and further 1x1 convolutions in one pass over the input."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from nnslim.network.graph import matrix
from nnslim.running.native import LANES, WIDEST, Kernels, kernels

_NARROW = 64  # channels of z up to which the native kernel is used
_BLOCK = 2**20  # numbers of the wide tensor at a time: 4 MB, which stay in the cache
_BLOCK_CUDA = 2**25  # where kernels of 4 MB would be too short


@functools.cache
def has_triton() -> bool:
    """Return whether Triton, which comes with torch for CUDA on Linux, is there."""
    return importlib.util.find_spec("triton") is not None


class NormPass(nn.Module):
    """u_k = V_k act(norm(W z)) + c_k without the wide tensor W z ever being whole in memory.

    Instance norm needs the mean and the variance of each channel of y = W z over the voxels. They follow from the mean
    m and the covariance S of z: mean = W m, var = diag(W S W^T). So the norm is a scale and a shift of W's rows, known
    before y is computed; a bias of W cancels. What is left is done for a block of voxels at a time.

    Without W the norm acts on z itself.
    """

    def __init__(
        self,
        before: nn.Module | None,
        norm: nn.Module,
        slope: float,
        following: Sequence[nn.Module],
        *,
        keep: bool,
        in_place: bool = False,
    ) -> None:
        """Take the weights of the layers; they are copied.

        Args:
            before: pointwise convolution W, or None.
            norm: instance norm without running statistics.
            slope: of the activation for negative numbers; 1 for no activation.
            following: pointwise convolutions V_k of the activation's output.
            keep: whether the wide tensor is returned as well, after the others.
            in_place: nothing else uses the input, so it may be overwritten by the wide output.
        """
        super().__init__()
        weight = norm.weight
        channels = norm.num_features
        like = following[0].weight if following else (before.weight if before is not None else weight)
        options = {} if like is None else {"dtype": like.dtype, "device": like.device}
        self.eps, self.slope, self.keep, self.in_place = norm.eps, slope, keep, in_place
        self.outputs = len(following) + keep
        self._set("w", None if before is None else matrix(before).clone())
        self._padded: list[tuple[Tensor, ...]] | None = None
        self._set("gain", torch.ones(channels, **options) if weight is None else weight.detach().clone())
        self._set("offset", torch.zeros(channels, **options) if norm.bias is None else norm.bias.detach().clone())
        for number, conv in enumerate(following):
            self._set(f"v{number}", matrix(conv).t().contiguous())
            bias = conv.bias
            self._set(f"c{number}", None if bias is None else bias.detach().clone())

    def _set(self, name: str, value: Tensor | None) -> None:
        self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))

    @property
    def products(self) -> list[tuple[Tensor, Tensor | None]]:
        """V_k, (C', R_k), and c_k, (R_k,) or None, of each product."""
        return [(getattr(self, f"v{n}"), getattr(self, f"c{n}")) for n in range(self.outputs - self.keep)]

    @property
    def widths(self) -> list[int]:
        """The channels of each product."""
        return [v.shape[1] for v, _ in self.products]

    def extra_repr(self) -> str:
        before = "" if self.w is None else f"{self.w.shape[1]} -> "
        return f"{before}{len(self.gain)} -> {self.widths}{' and itself' if self.keep else ''}, slope={self.slope}"

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """(B, C, *spatial) -> one (B, R_k, *spatial) per V_k, then the wide (B, C', *spatial) where it is kept."""
        z = z.contiguous(memory_format=_layout(z))
        made = self.empty_outputs(z)
        if (native := self.native_kernels(z)) is not None:
            work = functools.partial(self._by_kernel, native)
        else:
            work = self._by_triton if self.fits_gpu(z) else self.by_torch
        for number in range(len(z)):
            work(_rows(z[number]), [_rows(out[number]) for out in made])
        return made

    def empty_outputs(self, z: Tensor) -> tuple[Tensor, ...]:
        """Return the uninitialised outputs of `forward`; a graph also learns its shapes from them."""
        made = [_empty(z, width) for width in self.widths]
        if self.keep:
            made.append(z if self.in_place and self.w is None else _empty(z, len(self.gain)))
        return tuple(made)

    def fits_gpu(self, z: Tensor) -> bool:
        """Return whether Triton's kernels can do this pass: only they save the wide tensor's way through memory."""
        known = z.device.type == "cuda" and z.dtype in (torch.float32, torch.float16, torch.bfloat16)
        if not known or self.w is None or isinstance(z, FakeTensor) or not has_triton():
            return False
        from nnslim.running.triton_pass import fits

        return fits(z.shape[1], self.widths)

    def _by_triton(self, z: Tensor, outs: list[Tensor]) -> None:
        """(N, C) rows of voxels -> the rows of each output, in place, by Triton's kernels."""
        from nnslim.running.triton_pass import moments, product

        mean, square = moments(z)
        scale, _ = self._scale_shift(mean, square)
        weight = (self.w * scale[:, None]).t().to(z.dtype)
        # From the weights as they are rounded: so the mean of a channel, which may be large, leaves nothing behind.
        shift = self.offset - (weight.double().t() @ mean).to(self.offset.dtype)
        if self.keep:
            torch.addmm(shift.to(z.dtype), z, weight, out=outs[-1])
            if self.slope != 1:
                nn.functional.leaky_relu_(outs[-1], self.slope)
        for (v, bias), out in zip(self.products, outs, strict=False):
            product(z, weight, shift, self.slope, v, bias, out)

    def native_kernels(self, z: Tensor) -> Kernels | None:
        """Return the native kernels where they can do this pass."""
        widths = (z.shape[1], len(self.gain))
        if z.device.type != "cpu" or z.dtype != torch.float32 or isinstance(z, FakeTensor) or self.slope > 1:
            return None
        if any(width % LANES or width > WIDEST for width in widths):
            return None
        wide = self.w is not None and self.w.shape[1] > _NARROW  # then the matrix products of torch's BLAS are as good
        return None if wide else kernels()

    def _by_kernel(self, native: Kernels, z: Tensor, outs: list[Tensor]) -> None:
        mean, square = native.moments(z, full=self.w is not None)
        scale, shift = self._scale_shift(mean, square)
        weight = None if self.w is None else (self.w * scale[:, None]).t().contiguous()
        if self._padded is None:
            self._padded = [_padded(v, v.new_zeros(v.shape[1]) if bias is None else bias) for v, bias in self.products]
        products = [(*pair, out) for pair, out in zip(self._padded, outs, strict=False)]
        native.norm_pass(z, weight, scale, shift, self.slope, products, outs[-1] if self.keep else None)

    def by_torch(self, z: Tensor, outs: list[Tensor]) -> None:
        """(N, C) rows of voxels -> the rows of each output, in place."""
        scale, shift = self.fold(z)
        weight = None if self.w is None else (self.w * scale[:, None]).t().to(z.dtype)
        scale, shift = scale.to(z.dtype), shift.to(z.dtype)  # of 16 bits under autocast
        wide = outs[-1] if self.keep else None
        block = max(64, _BLOCK // len(scale)) if z.device.type == "cpu" else len(z)
        buffer = None if wide is not None else z.new_empty((min(block, len(z)), len(scale)))
        for first in range(0, len(z), block):
            part = z[first : first + block]
            y = buffer[: len(part)] if wide is None else wide[first : first + block]
            if weight is not None:
                torch.addmm(shift, part, weight, out=y)
            else:
                torch.addcmul(shift, part, scale, out=y)
            if self.slope != 1:
                nn.functional.leaky_relu_(y, self.slope)
            for (v, bias), out in zip(self.products, outs, strict=False):
                target, v = out[first : first + block], v.to(z.dtype)
                if bias is None:
                    torch.mm(y, v, out=target)
                else:
                    torch.addmm(bias.to(z.dtype), y, v, out=target)

    def fold(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the shift of each wide channel: norm(y) = scale * y + shift, y = W z without bias."""
        return self._scale_shift(*_moments(z, full=self.w is not None))

    def _scale_shift(self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """From mean and covariance (or variances, without W) of z, both float64."""
        if self.w is not None:
            w = self.w.double()
            mean, square = w @ mean, ((w @ square) * w).sum(1)
        scale = self.gain.double() / (square.clamp(min=0) + self.eps).sqrt()
        return scale.to(self.gain.dtype), (self.offset.double() - scale * mean).to(self.gain.dtype)


def _moments(z: Tensor, full: bool) -> tuple[Tensor, Tensor]:
    """Return mean (C,) and covariance (C, C), or variances (C,) where not `full`, over the rows, in float64."""
    block = max(64, (_BLOCK if z.device.type == "cpu" else _BLOCK_CUDA) // z.shape[1])
    exact = z.dtype if z.dtype in (torch.float32, torch.float64) else torch.float32
    # Around the mean of the first block, because the difference of two large numbers would lose digits.
    pivot = z[:block].to(exact).mean(0)
    total = torch.zeros_like(pivot, dtype=torch.float64)
    square = torch.zeros((len(pivot),) * (1 + full), dtype=torch.float64, device=z.device)
    for first in range(0, len(z), block):
        part = z[first : first + block].to(exact) - pivot
        total += part.sum(0)
        with torch.autocast(z.device.type, enabled=False):  # it would multiply and sum in 16 bits
            square += part.t() @ part if full else part.square_().sum(0)
    mean = total / len(z)
    return mean + pivot, square / len(z) - (mean.outer(mean) if full else mean.square())


def _padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(nn.functional.pad(tensor, (0, -tensor.shape[-1] % LANES)).contiguous() for tensor in tensors)


def _layout(z: Tensor) -> torch.memory_format:
    return torch.channels_last if z.dim() == 4 else torch.channels_last_3d


def _empty(z: Tensor, channels: int) -> Tensor:
    shape = (len(z), channels, *z.shape[2:])
    return torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=_layout(z))


def _rows(tensor: Tensor) -> Tensor:
    """(C, *spatial), channels last in memory -> (N, C) view."""
    return tensor.movedim(0, -1).view(-1, tensor.shape[0])
