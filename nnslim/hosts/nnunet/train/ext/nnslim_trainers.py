"""nnslim's trainers for `nnUNetv2_train`: nnUNet_extTrainer names this directory, NNSLIM_TRAINING the settings."""

from __future__ import annotations

from nnslim.errors import ConfigError, nearest


def __getattr__(name: str) -> type:
    """Make a trainer when nnU-Net asks this module for it."""
    if name in trainer_names():
        return trainer_named(name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def trainer_names() -> dict[str, str]:
    """Return the trainers by name, and the nnU-Net trainer that a token-sparse Primus is made from; else nothing."""
    primus = {f"nnUNet_Primus_{size}": f"nnUNet_Primus_{size}_Trainer" for size in "SBML"}
    primus |= {
        f"nnUNet_Primus{kind}{size}": f"nnUNet_Primus{kind}{size}_Trainer" for kind in ("V2", "V3") for size in "SBML"
    }
    made = {f"{name}_TokenSparse_Trainer": base for name, base in primus.items()}
    others = ("nnUNet_UNETR_TokenSparse_Trainer", "nnUNetTrainerSauron", "nnUNetTrainerDAEFormer")
    return {**made, **dict.fromkeys((*others, "nnUNetTrainerWindow", "nnUNetTrainerWindow2D"), "")}


def trainer_named(name: str) -> type:
    """Return a trainer by the name of its class; its settings are those of NNSLIM_TRAINING.

    Raises:
        ConfigError: no trainer of that name. ModelError: this nnU-Net lacks the trainer that it is made from.
    """
    names = trainer_names()
    if name not in names:
        raise ConfigError(f"no trainer '{name}'; {nearest(name, names)}")
    # Imported here: each needs packages of its own.
    if name == "nnUNetTrainerSauron":
        from nnslim.hosts.nnunet.train.sauron_trainer import sauron_trainer_class

        return sauron_trainer_class()
    if name == "nnUNetTrainerDAEFormer":
        from nnslim.hosts.nnunet.train.daeformer_trainer import daeformer_trainer_class

        return daeformer_trainer_class()
    if name.startswith("nnUNetTrainerWindow"):
        from nnslim.hosts.nnunet.train.window_trainer import window_trainer_class

        return window_trainer_class(name=name)
    from nnslim.hosts.nnunet.model.trained_model import trainer_class
    from nnslim.hosts.nnunet.train.token_sparse_trainer import token_sparse_trainer_class, unetr_trainer_class

    return token_sparse_trainer_class(trainer_class(names[name]), name=name) if names[name] else unetr_trainer_class()
