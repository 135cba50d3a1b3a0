"""Low-rank linear layers of transformers, by what their outputs are on data (DRONE, Chen et al., NeurIPS 2021)."""

from nnslim.methods.base import Method, register_method
from nnslim.methods.linear.config import LinearConfig
from nnslim.methods.linear.edit import LowRankEdit, LowRankLinear
from nnslim.methods.linear.plan import fit_linear, linear_weight_errors, plan_linear

register_method(Method("linear", LinearConfig, plan_linear, fit_linear, linear_weight_errors))

__all__ = ["LinearConfig", "LowRankEdit", "LowRankLinear", "fit_linear", "plan_linear"]
