"""Tucker factorisation of trained convolutions (Weber et al., arXiv 2404.09683)."""

from nnslim.methods.base import Method, register_method
from nnslim.methods.tucker.config import TuckerConfig
from nnslim.methods.tucker.edit import TuckerEdit
from nnslim.methods.tucker.plan import plan_tucker

register_method(Method("tucker", TuckerConfig, plan_tucker))

__all__ = ["TuckerConfig", "TuckerEdit", "plan_tucker"]
