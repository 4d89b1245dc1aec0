"""What goes where, what it takes and what it costs, decided from headers alone, without torch."""

from switchrun.planning.budgets import Budgets, resolve_budgets
from switchrun.planning.plan import Estimate, Placement, Plan, Tier, TierUse
from switchrun.planning.planner import make_plan

__all__ = ["Budgets", "Estimate", "Placement", "Plan", "Tier", "TierUse", "make_plan", "resolve_budgets"]
