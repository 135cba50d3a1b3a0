"""Dice on validation cases in native space, by stock nnU-Net in this process."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnslim.evaluation.overlap import dice_per_label


def validation_dice(folder: Path, fold: int, dataset: int, cases: int) -> tuple[np.ndarray, list[float], Any]:
    """Predict validation cases of a raw dataset, without mirroring, on the CPU.

    Args:
        folder: model folder. fold: of the model, and of the dataset's splits_final.json.
        dataset: number in nnUNet_raw. cases: at most, the first ones.
    Returns:
        Dice (cases, labels); 1 where a label is absent in both. CPU seconds of each case. The predictor.
    """
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (fold,), "checkpoint_final.pth")
    raw = raw_dataset(dataset)
    names = json.loads((raw / "splits_final.json").read_text())[fold]["val"][:cases]
    description = json.loads((raw / "dataset.json").read_text())
    ending, channels = description["file_ending"], len(description["channel_names"])
    scores, seconds, reader = [], [], SimpleITKIO()
    for name in names:
        files = [str(raw / "imagesTr" / f"{name}_{channel:04d}{ending}") for channel in range(channels)]
        image, properties = reader.read_images(files)
        truth = reader.read_seg(str(raw / "labelsTr" / f"{name}{ending}"))[0][0].astype(np.int64)
        started = time.process_time()
        found = predictor.predict_single_npy_array(image, properties, None, None, False)
        seconds.append(time.process_time() - started)
        scores.append(list(dice_per_label(found, truth, predictor.label_manager.foreground_labels).values()))
    return np.nan_to_num(np.array(scores), nan=1.0), seconds, predictor


def dice_columns(scores: np.ndarray, seconds: list[float]) -> dict[str, Any]:
    """Return what `validation_dice` found as columns of a table."""
    return {
        "dice": round(float(scores.mean()), 4),
        "dice_by_class": " ".join(f"{value:.4f}" for value in scores.mean(axis=0)),
        "cases": len(scores),
        "cpu_seconds_per_case": round(float(np.median(seconds)), 3),
    }


def raw_dataset(number: int) -> Path:
    """Return the folder of a dataset in nnUNet_raw."""
    return next(Path(os.environ["nnUNet_raw"]).glob(f"Dataset{number:03d}_*"))
