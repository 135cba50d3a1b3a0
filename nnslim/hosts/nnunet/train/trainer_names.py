"""Training of token-sparse networks inside nnU-Net."""

from __future__ import annotations

from nnslim.methods.token_sparse.config import TokenSparseConfig


def trainer_names() -> dict[str, str]:
    """Return the token-sparse trainers and the nnU-Net trainer that each is made from (none for UNETR)."""
    primus = {f"nnUNet_Primus_{size}": f"nnUNet_Primus_{size}_Trainer" for size in "SBML"}
    second = {f"nnUNet_PrimusV2{size}": f"nnUNet_PrimusV2{size}_Trainer" for size in "SBML"}
    made = {f"{name}_TokenSparse_Trainer": base for name, base in (primus | second).items()}
    return {**made, "nnUNet_UNETR_TokenSparse_Trainer": ""}


def trainer_named(name: str, settings: TokenSparseConfig | None = None) -> type:
    """Return a token-sparse trainer by the name of its class, for `nnslim train` or any other caller.

    Args:
        settings: None to read them when a trainer is made: NNSLIM_TOKEN_SPARSE, else the preset token-sparse.
    Raises:
        ConfigError: no trainer of that name. ModelError: this nnU-Net lacks the trainer that it is made from.
    """
    from nnslim.errors import ConfigError, nearest
    from nnslim.hosts.nnunet.model.trained_model import trainer_class
    from nnslim.hosts.nnunet.train.token_sparse_trainer import token_sparse_trainer_class, unetr_trainer_class

    names = trainer_names()
    if name not in names:
        raise ConfigError(f"no token-sparse trainer '{name}'; {nearest(name, names)}")
    if not names[name]:
        return unetr_trainer_class(settings, name)
    return token_sparse_trainer_class(trainer_class(names[name]), settings, name)


__all__ = ["trainer_named", "trainer_names"]
