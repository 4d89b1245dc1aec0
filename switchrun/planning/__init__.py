"""What goes where, what it takes and what it costs, decided from headers alone: nothing here imports torch."""

from switchrun.planning.budgets import Budgets, resolve_budgets
from switchrun.planning.planner import make_plan
from switchrun.planning.types import Estimate, Placement, Plan, TierUse

__all__ = ["Budgets", "Estimate", "Placement", "Plan", "TierUse", "make_plan", "resolve_budgets"]
