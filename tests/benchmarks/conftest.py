"""The scripts of `benchmarks/` import one another by name, as when one of them is run."""

from __future__ import annotations

import sys

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
