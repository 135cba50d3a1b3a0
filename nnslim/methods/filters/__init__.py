"""Filters removed from a trained network by what their weights say: L1, FPGM, random."""

from nnslim.methods.base import Method, register_method
from nnslim.methods.filters.config import FiltersConfig
from nnslim.methods.filters.plan import fill_filters, fit_filters, plan_filters

register_method(Method("filters", FiltersConfig, plan_filters, fit_filters, fill=fill_filters))

__all__ = ["FiltersConfig", "fill_filters", "fit_filters", "plan_filters"]
