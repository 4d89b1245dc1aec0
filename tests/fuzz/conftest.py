"""How many examples: 100, or those of a campaign (`--hypothesis-profile campaign`)."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("campaign", max_examples=10_000, print_blob=True)
