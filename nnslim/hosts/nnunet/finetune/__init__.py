"""Fine-tune a model, slim or dense, with labels inside nnU-Net's trainer; the result is an ordinary model folder."""

from nnslim.hosts.nnunet.finetune.folder import finetune_folder
from nnslim.hosts.nnunet.finetune.settings import FinetuneSettings

__all__ = ["FinetuneSettings", "finetune_folder"]
