"""What goes where, what it takes and what it costs, decided from headers alone, without torch."""

from switchrun.planning.budgets import Budgets, resolve_budgets
from switchrun.planning.plan import Estimate, Placement, Plan, Tier, TierUse

# Not the planner: the command line must not wait for it before it says a word.
__all__ = ["Budgets", "Estimate", "Placement", "Plan", "Tier", "TierUse", "resolve_budgets"]
