"""Evaluate predictions: the same as `nnslim evaluate`, with the same options, or with a configuration of tucker-cnn.

Example: python scripts/04_eval.py -p PREDICTIONS -g REFERENCES -o metrics.csv
         python scripts/04_eval.py predict.yml
"""

from __future__ import annotations

import sys
from pathlib import Path

from nnslim.cli import main
from nnslim.errors import ConfigError
from nnslim.evaluation.tucker_cnn import legacy_arguments

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
