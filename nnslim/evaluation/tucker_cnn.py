"""The configuration of tucker-cnn's evaluation script."""

from __future__ import annotations

from pathlib import Path

from nnslim.errors import ConfigError
from nnslim.files import read_yaml
from nnslim.running.machine import machine_threads


def legacy_arguments(path: Path) -> list[str]:
    """Return the arguments of `nnslim evaluate` that do what tucker-cnn's script did with this configuration.

    Predictions are `<out_root>/<out_id>/<subject>/<class>.nii.gz`, references below `label_root`; tolerance: 3 mm.
    Spacing is now the files', not 1.5 mm for all, and empty classes follow nnslim's rules instead of a score of -1.

    Raises:
        ConfigError: the file cannot be read, or a key is missing.
    """
    content = read_yaml(path, ConfigError)
    needed = ("out_root", "out_id", "label_root", "metric_csv_path")
    if missing := [key for key in needed if not isinstance(content, dict) or key not in content]:
        needs = ", ".join(missing)
        raise ConfigError(f"{path}: the evaluation needs {needs}; or give options: -p PRED -g GT -o metrics.csv")
    arguments = ["-p", str(Path(content["out_root"]) / str(content["out_id"])), "-g", str(content["label_root"])]
    arguments += ["-o", str(content["metric_csv_path"]), "--tolerance", "3.0"]
    if "eval_workers" in content:
        # It was 32 threads by default; these are processes.
        arguments += ["--workers", str(max(1, min(int(content["eval_workers"]), machine_threads())))]
    return arguments
