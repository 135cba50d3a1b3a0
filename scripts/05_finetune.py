"""Fine-tune a slim model with labels: the same as `nnslim finetune`, with the same options.

Example: python scripts/05_finetune.py -m SLIM -d 4 -o FINETUNED -f 0 --device cuda
"""

from __future__ import annotations

import sys

from nnslim.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "finetune")
    main()
