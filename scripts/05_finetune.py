"""Fine-tune a slim model with labels: `nnslim finetune` with its options, or with a configuration of tucker-cnn.

Examples: ./run.sh scripts/05_finetune.py -m SLIM -d 4 -o FINETUNED -f 0 --device cuda
          ./run.sh scripts/05_finetune.py configs/finetune_baseline.yml --device cuda
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tucker_cnn import is_config, nnslim, read_config, run

from nnslim.errors import ConfigError, InputError
from nnslim.files import read_json_object

_TRAINER = "nnUNetTrainerNoMirroring"


def finetune(given: list[str]) -> None:
    """Compress the pretrained model, then train fold 0; further options are those of `nnslim finetune`.

    The compressed model is <nnUNet_results>/<dataset>/<trainer>__<plans>TuckerStart__3d_fullres, the trained one
    <trainer>__<plans>Tucker__3d_fullres beside it. Both are ordinary models, and stock nnU-Net predicts with them.
    """
    from nnslim.hosts.nnunet.cases.prepared_data import find_dataset

    content = read_config(given[0], "dataset_id", "pretrained_weights", "epochs", "learning_rate", "optimizer")
    weights, options = Path(content["pretrained_weights"]), given[1:]
    if not (results := os.environ.get("nnUNet_results")):
        raise ConfigError("the environment variable nnUNet_results is not set; nnU-Net writes its models there")
    if not weights.is_file() or not weights.parent.name.startswith("fold_"):
        raise InputError(f"pretrained_weights {weights}: expected a file fold_X/<checkpoint>.pth of a trained model")
    model, fold = weights.parents[1], weights.parent.name.removeprefix("fold_")
    plans = read_json_object(model / "plans.json").get("plans_name", "nnUNetPlans")
    place = Path(results) / find_dataset(content["dataset_id"])
    start, output = (place / f"{_TRAINER}__{plans}Tucker{end}__3d_fullres" for end in ("Start", ""))
    if not (content.get("tucker_config") or {}).get("apply_tucker", "tucker_config" in content):
        start = model
    elif not (start.is_dir() and "--continue" in options):
        slim = ["-m", model, "-f", fold, "-chk", weights.name, "-c", given[0], "--allow-slower"]
        nnslim("compress", *slim, "-o", start)
    arguments = ["-m", start, "-d", content["dataset_id"], "-o", output, "-f", "0", "-chk", weights.name]
    arguments += ["--trainer", _TRAINER, "--epochs", content["epochs"], "--learning-rate", content["learning_rate"]]
    arguments += ["--optimizer", "adamw" if content["optimizer"] == "adam" else content["optimizer"]]
    nnslim("finetune", *arguments, "--schedule", "constant", *options)


if __name__ == "__main__":
    if sys.argv[1:2] in (["-c"], ["--config"]) and is_config(sys.argv[2:]):  # tucker-cnn's script takes it so, too
        del sys.argv[1]
    run("finetune", finetune)
