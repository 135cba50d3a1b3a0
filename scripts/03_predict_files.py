"""Predict one image or a folder of images: the same as `nnslim predict`, with the same options.

Examples: python scripts/03_predict_files.py -i ct.nii.gz -o out --task total_fast
          python scripts/03_predict_files.py -i IMAGES -o OUT -m MODEL -c tucker-balanced
"""

from __future__ import annotations

import sys

from nnslim.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "predict")
    main()
