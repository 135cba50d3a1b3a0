"""Evaluate predictions: the same as `nnslim evaluate`, with the same options, or with a configuration of tucker-cnn.

Example: python scripts/04_eval.py -p PREDICTIONS -g REFERENCES -o metrics.csv
         python scripts/04_eval.py predict.yml
"""

from __future__ import annotations

import sys
from pathlib import Path

from nnslim.cli import main
from nnslim.errors import ConfigError
from nnslim.files import read_yaml
from nnslim.running.machine import machine_threads


def legacy_arguments(path: Path) -> list[str]:
    """Return the arguments of `nnslim evaluate` that do what tucker-cnn's script did with this configuration.

    Predictions are `<out_root>/<out_id>/<subject>/<class>.nii.gz`, references below `label_root`; tolerance: 3 mm.
    The spacing is that of the files, not 1.5 mm for all, and empty classes follow nnslim's rules instead of scoring -1.

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


if __name__ == "__main__":
    given = sys.argv[1:]
    if len(given) == 1 and Path(given[0]).suffix in (".yml", ".yaml", ".json"):
        try:
            given = legacy_arguments(Path(given[0]))
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    sys.argv[1:] = ["evaluate", *given]
    main()
