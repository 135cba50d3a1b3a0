"""Study feature maps: do redundant filters cluster, and what do the maps of the last layer show? For docs/sauron.md.

./run.sh -m studies.map_study -m MODEL -i IMAGES -o maps
Writes maps/LAYER.npy (C, *patch; after norm and activation), clusters.csv and last_layer.png.

The questions are those of Valverde et al., arXiv 2209.13590: maps of a layer that form tight clusters hold redundant
filters, and after pruning the maps of the last layer can be read by eye.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from nnslim.errors import InputError
from nnslim.figures import new_figure, own_style, save_figure
from nnslim.files import whole_folder
from nnslim.hosts.nnunet.cases.calibration_tiles import ImageTiles
from nnslim.hosts.nnunet.cases.prepared_images import Source, prepare_images
from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model
from nnslim.methods.sauron.feature_maps import feature_maps, save_maps
from nnslim.tables import write_table
from studies.command import new_parser, run_command


@dataclass(frozen=True)
class Clusterability:
    """How much the maps of one layer cluster.

    Attributes:
        layer: the group of filters. filters: how many it has.
        clusters: number of k-means clusters with the best silhouette.
        silhouette: of these clusters, -1..1; above 0.5 is tight.
        redundant: share of filters that a cluster of several could lose: 1 - clusters / filters; 0 where the
            silhouette says that there are no clusters (at most 0.25).
        hopkins: Hopkins' statistic: 0.5 for maps that are spread evenly, near 1 for clusters.
    """

    layer: str
    filters: int
    clusters: int
    silhouette: float
    redundant: float
    hopkins: float


def load_maps(folder: Path) -> dict[str, np.ndarray]:
    """Return the maps that `save_maps` wrote.

    Raises:
        InputError: the folder holds none.
    """
    files = sorted(folder.glob("*.npy"))
    if not files:
        raise InputError(f"{folder} holds no feature maps (.npy)")
    return {path.stem: np.load(path) for path in files}


def clusterability(maps: Mapping[str, np.ndarray], *, seed: int = 0) -> list[Clusterability]:
    """Return how much the filters of each layer cluster; layers of fewer than four filters are left out.

    Maps are scaled to 0..1 each, as in the loss, and clustered by k-means for 2 to C - 1 clusters (at most 12 numbers,
    evenly spaced).
    """
    found = []
    for name, values in maps.items():
        if len(values) >= 4:
            found.append(_of_layer(name, _points(values), np.random.default_rng(seed)))
    return found


def _points(maps: np.ndarray) -> np.ndarray:
    """(C, *spatial) -> (C, dims): scaled, and turned into the few coordinates that hold all distances."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    low, high = flat.min(1, keepdims=True), flat.max(1, keepdims=True)
    flat = (flat - low) / np.where(high > low, high - low, 1)
    left, singular, _ = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    return left * singular


def _of_layer(name: str, points: np.ndarray, rng: np.random.Generator) -> Clusterability:
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    count, best = len(points), (1, 0.0)
    distinct = len(np.unique(points.round(9), axis=0))
    most = min(count - 1, distinct)
    for clusters in sorted({int(k) for k in np.linspace(2, most, 12)} if most >= 2 else ()):
        labels = KMeans(clusters, n_init=4, random_state=int(rng.integers(2**31))).fit_predict(points)
        score = float(silhouette_score(points, labels)) if len(set(labels)) > 1 else 0.0
        best = max(best, (clusters, score), key=lambda pair: pair[1])
    clusters, score = best
    redundant = 1 - clusters / count if score > 0.25 else 0.0
    return Clusterability(name, count, clusters, round(score, 4), round(redundant, 4), round(_hopkins(points, rng), 4))


def _hopkins(points: np.ndarray, rng: np.random.Generator) -> float:
    """Hopkins' statistic: nearest neighbours of random places against those of the points themselves."""
    count = len(points)
    spread = rng.uniform(points.min(0), points.max(0), points.shape)
    between = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(between, np.inf)
    own = between.min(1).sum()
    random = np.linalg.norm(spread[:, None] - points[None], axis=2).min(1).sum()
    return 0.5 if own + random == 0 or count < 2 else float(random / (own + random))


def write_clusterability(rows: Sequence[Clusterability], path: Path) -> None:
    """Write a CSV with one row per layer."""
    write_table([vars(row) for row in rows], path, [field.name for field in fields(Clusterability)])


@own_style
def draw_maps(maps: np.ndarray, path: Path, *, columns: int = 8, title: str = "") -> None:
    """Draw the middle slice of each map of a layer, each in its own grey scale.

    Args:
        maps: (C, *spatial), 2D or 3D. path: PNG, PDF or SVG.
    """
    slices = maps if maps.ndim == 3 else maps[:, :, :, maps.shape[3] // 2]
    rows = -(-len(slices) // columns)
    figure = new_figure((1.1 * columns, 1.3 * rows + 0.4))
    axes = np.atleast_1d(figure.subplots(rows, columns)).reshape(-1)
    for number, place in enumerate(axes):
        place.set_axis_off()
        if number < len(slices):
            place.imshow(slices[number], cmap="gray")
            place.set_title(str(number), fontsize=7)
    if title:
        figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True, help="trained model folder, pruned or not")
    parser.add_argument("-i", "--images", type=Path, required=True, help="folder of images as for prediction")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="chooses the image, the tile and the clusters (0)")
    args = parser.parse_args(arguments)
    model = read_trained_model(args.model)
    with prepare_images(Source.of(model), args.images, 1, seed=args.seed) as prepared:
        tile = next(iter(ImageTiles(prepared, 1, seed=args.seed)))
    maps = feature_maps(build_network(model), tile)
    rows = clusterability(maps, seed=args.seed)
    with whole_folder(args.output) as side:
        save_maps(maps, side / "maps")
        write_clusterability(rows, side / "clusters.csv")
        last = list(maps)[-1]
        draw_maps(maps[last], side / "last_layer.png", title=last)
    for row in rows:
        print(
            f"{row.layer}: {row.filters} filters, {row.clusters} clusters, silhouette {row.silhouette:.2f}, "
            f"redundant {row.redundant:.2f}, Hopkins {row.hopkins:.2f}"
        )


if __name__ == "__main__":
    run_command(main)
