"""Write a public data set as a raw nnU-Net dataset, perhaps with splits.

./run.sh scripts/15_convert_dataset.py btcv -i RawData/Training -o nnUNet_raw/Dataset120_BTCV
./run.sh scripts/15_convert_dataset.py brats -i Task01_BrainTumour -o nnUNet_raw/Dataset121_BraTS
./run.sh scripts/15_convert_dataset.py kits19 -i kits19/data -o nnUNet_raw/Dataset064_KiTS19
./run.sh scripts/15_convert_dataset.py acdc -i ACDC -o nnUNet_raw/Dataset027_ACDC
./run.sh scripts/15_convert_dataset.py synapse -i Synapse -o nnUNet_raw/Dataset122_Synapse --spacing 3 0.8 0.8
./run.sh scripts/15_convert_dataset.py totalseg -i DATASET -o nnUNet_raw/Dataset095_Organ --part organs
nnU-Net takes splits_final.json from the preprocessed folder: copy it there after nnUNetv2_plan_and_preprocess.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # studies/ is no installed package
from studies.command import new_parser, run_command
from studies.public_datasets import convert_acdc, convert_brats, convert_btcv, convert_kits19
from studies.synapse_dataset import convert_synapse
from studies.totalseg_dataset import convert_totalseg

_CONVERTERS = {"btcv": convert_btcv, "brats": convert_brats, "kits19": convert_kits19, "acdc": convert_acdc}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("dataset", choices=[*_CONVERTERS, "synapse", "totalseg"])
    parser.add_argument("-i", "--input", type=Path, required=True, help="downloaded folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--spacing", type=float, nargs=3, default=(1.0, 1.0, 1.0), help="synapse: mm of slices, rows, columns (1 1 1)"
    )
    parser.add_argument("--part", default="organs", help="totalseg: organs, vertebrae, cardiac, muscles, ribs, total")
    chosen = parser.parse_args()
    if chosen.dataset == "synapse":
        convert_synapse(chosen.input, chosen.output, chosen.spacing)
    elif chosen.dataset == "totalseg":
        convert_totalseg(chosen.input, chosen.output, chosen.part)
    else:
        _CONVERTERS[chosen.dataset](chosen.input, chosen.output)


if __name__ == "__main__":
    run_command(main)
