"""Study the feature maps of a trained model: save them per layer, tell whether they cluster, draw the last layer's.

Example: ./run.sh scripts/11_map_study.py -m MODEL -i IMAGES -o maps
Writes maps/LAYER.npy (C, *patch; after norm and activation), clusters.csv and last_layer.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch


def study(model_folder: Path, images: Path, output: Path, seed: int) -> list[str]:
    """Run one real tile of the first image through the model; returns the table's lines.

    Raises:
        NNSlimError: the model or the images cannot be read, or the output exists.
    """
    from nnslim.files import whole_folder
    from nnslim.hosts.nnunet.cases.calibration_tiles import ImageTiles, Source, prepare_images
    from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model
    from nnslim.methods.sauron.feature_maps import feature_maps, save_maps
    from studies.map_study import clusterability, draw_maps, write_clusterability

    model = read_trained_model(model_folder)
    network = build_network(model)
    with prepare_images(Source.of(model), images, 1, seed=seed) as prepared:
        tile: torch.Tensor = next(iter(ImageTiles(prepared, 1, seed=seed)))
    maps = feature_maps(network, tile)
    rows = clusterability(maps, seed=seed)
    with whole_folder(output) as side:
        save_maps(maps, side / "maps")
        write_clusterability(rows, side / "clusters.csv")
        last = list(maps)[-1]
        draw_maps(maps[last], side / "last_layer.png", title=last)
    return [
        f"{row.layer}: {row.filters} filters, {row.clusters} clusters, silhouette {row.silhouette:.2f}, "
        f"redundant {row.redundant:.2f}, Hopkins {row.hopkins:.2f}"
        for row in rows
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True, help="trained model folder, pruned or not")
    parser.add_argument("-i", "--images", type=Path, required=True, help="folder of images as for prediction")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the image, the tile and the clusters")
    args = parser.parse_args()
    from nnslim.errors import NNSlimError

    try:
        for line in study(args.model, args.images, args.output, args.seed):
            print(line)
    except NNSlimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
