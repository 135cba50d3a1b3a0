"""Tucker factorisation of trained convolutions (Weber et al., arXiv 2404.09683)."""

from nnslim.methods.base import Method, register_method
from nnslim.methods.tucker.config import FitConfig, TuckerConfig
from nnslim.methods.tucker.edit import TuckerEdit, weight_errors
from nnslim.methods.tucker.error_grid import survey_ranks
from nnslim.methods.tucker.fit_chains import fit_tucker_network
from nnslim.methods.tucker.plan import plan_tucker

register_method(Method("tucker", TuckerConfig, plan_tucker, fit_tucker_network, weight_errors, survey=survey_ranks))

__all__ = ["FitConfig", "TuckerConfig", "TuckerEdit", "fit_tucker_network", "plan_tucker"]
