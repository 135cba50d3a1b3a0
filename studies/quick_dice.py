"""Dice on validation cases in native space, by stock nnU-Net in this process, and tables that grow row by row."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def validation_dice(
    folder: Path, fold: int, dataset: int, cases: int, checkpoint: str = "checkpoint_final.pth"
) -> tuple[np.ndarray, list[float], Any]:
    """Predict validation cases of a raw dataset, without mirroring, on the CPU.

    Args:
        folder: model folder. fold: of it, and of the dataset's splits_final.json.
        dataset: number in nnUNet_raw. cases: at most, the first ones.
    Returns:
        Dice (cases, labels); 1 where a label is absent in both. CPU seconds of each case. The predictor.
    """
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (fold,), checkpoint)
    raw = next(Path(os.environ["nnUNet_raw"]).glob(f"Dataset{dataset:03d}_*"))
    names = json.loads((raw / "splits_final.json").read_text())[fold]["val"][:cases]
    description = json.loads((raw / "dataset.json").read_text())
    ending, channels = description["file_ending"], len(description["channel_names"])
    scores, seconds, reader = [], [], SimpleITKIO()
    for name in names:
        files = [str(raw / "imagesTr" / f"{name}_{channel:04d}{ending}") for channel in range(channels)]
        image, properties = reader.read_images(files)
        truth = reader.read_seg(str(raw / "labelsTr" / f"{name}{ending}"))[0][0]
        started = time.process_time()
        found = predictor.predict_single_npy_array(image, properties, None, None, False)
        seconds.append(time.process_time() - started)
        labels = predictor.label_manager.foreground_labels
        scores.append([_dice(found == label, truth == label) for label in labels])
    return np.array(scores), seconds, predictor


def _dice(found: np.ndarray, truth: np.ndarray) -> float:
    total = found.sum() + truth.sum()
    return float(2 * (found & truth).sum() / total) if total else 1.0


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row, and the header before the first."""
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
