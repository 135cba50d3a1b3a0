"""Token sparsity for vision transformer encoders: UNETR and Primus (Zhou et al., arXiv 2303.06522)."""

from nnslim.methods.base import Method, register_method
from nnslim.methods.token_sparse.config import TokenSparseConfig
from nnslim.methods.token_sparse.edit import TokenSparseEdit
from nnslim.methods.token_sparse.plan import fit_completion, plan_token_sparse, token_sparse_edits
from nnslim.methods.token_sparse.reduction import set_ratio

register_method(Method("token_sparse", TokenSparseConfig, plan_token_sparse, fit_completion))

__all__ = ["TokenSparseConfig", "TokenSparseEdit", "plan_token_sparse", "set_ratio", "token_sparse_edits"]
