"""Evaluate predictions: `nnslim evaluate` with its options, or with a configuration of tucker-cnn.

Examples: ./run.sh scripts/04_eval.py -p PREDICTIONS -g REFERENCES -o metrics.csv
          ./run.sh scripts/04_eval.py configs/predict_config.yml
"""

from __future__ import annotations

from pathlib import Path

from tucker_cnn import nnslim, read_config, run

from nnslim.evaluation.label_files import label_files
from nnslim.running.machine import machine_threads


def evaluate(given: list[str]) -> None:
    """Do what tucker-cnn's script did with this configuration; further options are those of `nnslim evaluate`.

    Predictions are `<out_root>/<out_id>/<subject>/<class>.nii.gz`; references below `label_root` the same, or label
    maps `<subject>.nii.gz` with the numbers of TotalSegmentator's task total. Tolerance: 3 mm. The spacing is that of
    the files, not 1.5 mm for all, and empty classes follow nnslim's rules instead of scoring -1.
    """
    content = read_config(given[0], "out_root", "out_id", "label_root", "metric_csv_path")
    labels = Path(content["label_root"])
    arguments = ["-p", Path(content["out_root"]) / str(content["out_id"]), "-g", labels]
    arguments += ["-o", content["metric_csv_path"], "--tolerance", "3.0"]
    if labels.is_dir() and label_files(labels):
        arguments += ["-d", "total"]
    if "eval_workers" in content:
        # It was 32 threads by default; these are processes.
        arguments += ["--workers", max(1, min(int(content["eval_workers"]), machine_threads()))]
    nnslim("evaluate", *arguments, *given[1:])


if __name__ == "__main__":
    run("evaluate", evaluate)
