"""The configuration of tucker-cnn's evaluation script."""

from __future__ import annotations

from pathlib import Path

import yaml

from nnslim.errors import ConfigError
from nnslim.evaluation.workers import available_cpus

_NEEDED = ("out_root", "out_id", "label_root", "metric_csv_path")
_TOLERANCE = 3.0  # mm; tucker-cnn's


def legacy_arguments(path: Path) -> list[str]:
    """Return the arguments of `nnslim evaluate` that do what tucker-cnn's script did with this configuration.

    Predictions are `<out_root>/<out_id>/<subject>/<class>.nii.gz`, references below `label_root`; tolerance: 3 mm.
    Spacing is now the files', not 1.5 mm for all, and empty classes follow nnslim's rules instead of a score of -1.

    Raises:
        ConfigError: the file cannot be read, or a key is missing.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict) or (missing := [key for key in _NEEDED if key not in content]):
        lacking = ", ".join(missing) if isinstance(content, dict) else ", ".join(_NEEDED)
        raise ConfigError(f"{path}: the evaluation needs {lacking}; or give options: -p PRED -g GT -o metrics.csv")
    arguments = ["-p", str(Path(content["out_root"]) / str(content["out_id"])), "-g", str(content["label_root"])]
    arguments += ["-o", str(content["metric_csv_path"]), "--tolerance", str(_TOLERANCE)]
    if "eval_workers" in content:
        # It was 32 threads by default; these are processes.
        arguments += ["--workers", str(max(1, min(int(content["eval_workers"]), available_cpus())))]
    return arguments
