"""Measure a model folder as on a board: one core, perhaps little memory; milliseconds, seconds per volume, peak memory.

./run.sh scripts/16_embedded_profile.py -m MODEL -i IMAGES -o profile.json --memory-mb 1500
The limit is on private memory of the process; where it does not suffice the answer is "fits": false, exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from nnslim.errors import NNSlimError
from nnslim.files import write_json
from studies.board_profile import ProfileJob, profile


def main() -> int:
    """Read the arguments and measure; 1 where the memory did not suffice, 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="model folder, dense or slim")
    parser.add_argument("-i", "--images", required=True, help="folder of images, as for prediction")
    parser.add_argument("-o", "--output", type=Path, help="JSON file; default: print only")
    parser.add_argument("-s", "--segmentations", help="folder for the segmentations; default: none are kept")
    parser.add_argument("--backend", nargs="+", default=["stock"], help="stock, eager, openvino; the first predicts")
    parser.add_argument("--precision", default="f32", help="f32, or int8 with openvino (f32)")
    parser.add_argument("--cases", type=int, default=5, help="images, at most (5)")
    parser.add_argument("--repeats", type=int, default=9, help="timed forward passes; the median counts (9)")
    parser.add_argument("--memory-mb", type=int, help="memory of the board, MiB; default: no limit")
    chosen = parser.parse_args()
    job = ProfileJob(
        chosen.model,
        chosen.images,
        chosen.segmentations,
        tuple(chosen.backend),
        chosen.precision,
        chosen.cases,
        chosen.repeats,
        chosen.memory_mb,
    )
    try:
        found = profile(job)
        if chosen.output is not None:
            write_json(chosen.output, found)
    except NNSlimError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2))
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
