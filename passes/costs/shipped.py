"""The fit that comes with the package: for processors on which nothing has been observed."""
from __future__ import annotations

import functools
import json
from importlib import resources

from genie_dynamo.passes.costs.fit import CostFit

_FILES = {"cpu": "cpu_fit.json"}


@functools.cache
def shipped_fit(kind: str) -> CostFit | None:
    """Corrections of the roofline for a kind of device ("cpu", "cuda"); None where none were observed.

    Source: the file says what was observed, where; tools/fit_costs.py writes it. They are factors of what calibration
    measures on the machine at hand, so they carry over as far as machines of a kind lose time to the same things.
    """
    name = _FILES.get(kind)
    if name is None:
        return None
    document = json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
    return CostFit.from_json({key: value for key, value in document.items() if key != "source"})
