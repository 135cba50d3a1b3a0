"""Volumes of a case for the viewer in the report, and the viewer itself: NiiVue, from a package that ships it."""

from __future__ import annotations

import base64
import colorsys
import gzip
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from nnslim.errors import InputError

DIFFERENCES = {1: "dense only", 2: "slim only", 3: "another class"}
_MARGIN = 15.0  # mm around the labels where an image is cropped
_IN_NILEARN = Path("_assets", "js", "niivue.umd.js")  # since nilearn 0.14


@dataclass(frozen=True)
class Scene:
    """One case as it is shown.

    Attributes:
        name: case. role: why it is shown, for example "worst case".
        image: (X, Y, Z) intensities, axes towards right, anterior, superior.
        maps: name -> label map of that shape; "dense" and "slim", and "label" where there is one.
        affine: (4, 4), voxels to mm.
        dice: class -> Dice of slim against dense; NaN where neither has the class.
        note: remark for the reader, for example which channel is shown.
    """

    name: str
    role: str
    image: np.ndarray
    maps: Mapping[str, np.ndarray]
    affine: np.ndarray
    dice: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def spacing(self) -> tuple[float, ...]:
        """Millimetres per voxel along X, Y, Z."""
        return tuple(float(size) for size in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def different(self) -> np.ndarray:
        """Voxels where slim and dense differ."""
        return self.maps["dense"] != self.maps["slim"]

    @property
    def centre(self) -> tuple[int, int, int]:
        """The planes that cross the most voxels where slim and dense differ; the middle of the labels if none does."""
        wrong = self.different
        if wrong.any():
            x, y, z = (int(wrong.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3))
            return x, y, z
        marked = np.argwhere(self.maps["dense"] > 0)
        x, y, z = marked.mean(0).round().astype(int) if len(marked) else np.array(self.image.shape) // 2
        return int(x), int(y), int(z)


def find_niivue(path: Path | None = None) -> str:
    """Return NiiVue's single-file script, from `path` or else from the installed nilearn.

    Raises:
        InputError: there is none, or the file is something else; says how to get it.
    """
    if path is None:
        spec = importlib.util.find_spec("nilearn")
        path = Path(spec.origin).parent / _IN_NILEARN if spec is not None and spec.origin else None
        if path is None or not path.is_file():
            raise InputError(
                "the viewer needs NiiVue, which comes with nilearn 0.14 and later: pip install 'nnslim[report]'; or "
                "name the file niivue.umd.js of the npm package @niivue/niivue with --niivue; or leave out --viewer"
            )
    try:
        script = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a script: {error}") from error
    if "Niivue" not in script or "globalThis" not in script[:500]:
        raise InputError(f"{path} is not NiiVue's niivue.umd.js, the build that works inside a page")
    return script.replace("</script", "<\\/script")


def embed(scene: Scene, names: Mapping[int, str], limit: int) -> dict[str, Any]:
    """Return the volumes of a case as JSON values: gzipped NIfTI files in base64.

    The image is stored with 8 bits per voxel between its percentiles 0.5 and 99.5. Where it would be larger than the
    limit, all volumes are cropped around the labels.

    Args:
        names: label -> name.
        limit: bytes that the volumes may take in the page.
    Raises:
        InputError: they take more, cropped as well.
    """
    maps = {**scene.maps, "differences": _differences(scene)}
    box, note = (slice(None),) * 3, ""
    packed = _pack(scene, maps, box)
    if _size(packed) > limit:
        box = label_box(list(scene.maps.values()), scene.spacing)
        whole, packed = _size(packed), _pack(scene, maps, box)
        if _size(packed) > limit:
            raise InputError(
                f"case {scene.name}: the volumes take {_size(packed) / 1e6:.1f} MB in the page, cropped around the "
                f"labels, more than the {limit / 1e6:.1f} MB that --viewer-mb allows"
            )
        shape = "x".join(str(size) for size in scene.image[box].shape)
        note = f"cropped around the labels to {shape} voxels: whole, it would take {whole / 1e6:.1f} MB"
    highest = max(int(labels.max(initial=0)) for labels in scene.maps.values())
    return {
        "case": scene.name,
        "role": scene.role,
        "note": note,
        "image": packed["image"],
        "maps": [{"name": name, "data": packed[name]} for name in maps],
        "labels": colour_map({label: names.get(label, str(label)) for label in range(1, highest + 1)}),
        "differences": colour_map(DIFFERENCES, ((0, 183, 235), (255, 159, 28), (255, 79, 216))),
        "centre": [c - (side.start or 0) for c, side in zip(scene.centre, box, strict=True)],
    }


def colour_map(names: Mapping[int, str], colours: Sequence[tuple[int, int, int]] = ()) -> dict[str, Any]:
    """Return NiiVue's form of a label table: label 0 is transparent; colours far apart where none are given."""
    chosen = [(0, 0, 0)]
    for place in range(len(names)):
        hue, bright = (0.55 + place * 0.618034) % 1, (1.0, 0.75)[place // 8 % 2]
        given = colours[place] if place < len(colours) else None
        chosen.append(given or tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, bright)))
    return {
        **dict(zip("RGB", ([colour[part] for colour in chosen] for part in range(3)), strict=True)),
        "A": [0] + [255] * len(names),
        "I": [0, *names],
        "labels": ["", *names.values()],
    }


def label_box(maps: Sequence[np.ndarray], spacing: Sequence[float]) -> tuple[slice, ...]:
    """Return the box around all labels with a margin; the whole volume where there are none."""
    marked = np.any([labels > 0 for labels in maps], axis=0)
    if not marked.any():
        return (slice(None),) * marked.ndim
    box = []
    for axis, size in enumerate(marked.shape):
        there = np.flatnonzero(marked.any(axis=tuple(a for a in range(marked.ndim) if a != axis)))
        more = math.ceil(_MARGIN / spacing[axis])
        box.append(slice(max(0, int(there[0]) - more), min(size, int(there[-1]) + 1 + more)))
    return tuple(box)


def _differences(scene: Scene) -> np.ndarray:
    dense, slim = scene.maps["dense"], scene.maps["slim"]
    kinds = np.select([slim == 0, dense == 0], [1, 2], 3)
    return np.where(dense == slim, 0, kinds).astype(np.uint8)


def _pack(scene: Scene, maps: Mapping[str, np.ndarray], box: tuple[slice, ...]) -> dict[str, str]:
    affine = scene.affine.copy()
    affine[:3, 3] = nib.affines.apply_affine(scene.affine, [side.start or 0 for side in box])
    low, high = (float(value) for value in np.percentile(scene.image, (0.5, 99.5)))
    slope = (high - low) / 255 or 1.0
    grey = np.clip((scene.image[box] - low) / slope, 0, 255).round().astype(np.uint8)
    packed = {"image": _nifti(grey, affine, slope, low)}
    for name, labels in maps.items():
        kind = np.uint8 if labels.max(initial=0) < 256 else np.uint16
        packed[name] = _nifti(labels[box].astype(kind), affine)
    return packed


def _nifti(data: np.ndarray, affine: np.ndarray, slope: float = 1.0, offset: float = 0.0) -> str:
    image = nib.Nifti1Image(data, affine)
    image.header.set_slope_inter(slope, offset)
    image.header.set_xyzt_units("mm")
    return base64.b64encode(gzip.compress(image.to_bytes(), 6, mtime=0)).decode("ascii")


def _size(packed: Mapping[str, str]) -> int:
    return sum(len(text) for text in packed.values())
