#!/usr/bin/env python3
"""Write passes/costs/cpu_fit.json: what corrects the roofline where nothing was observed on the machine itself.

    python -m bench costs && python tools/fit_costs.py

Reads the observations that `python -m bench costs` keeps, all models, of one machine and thread count.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch

from genie_dynamo.core.observations import read_parquet
from genie_dynamo.passes.costs.fit import fit_costs
from genie_dynamo.runtime import calibration

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("observations", nargs="?", type=Path, default=ROOT / "build" / "observed_costs.parquet")
    parser.add_argument("--out", type=Path, default=ROOT / "passes" / "costs" / "cpu_fit.json")
    arguments = parser.parse_args()
    rows = read_parquet(arguments.observations)
    torch.set_num_threads(1)
    hardware = calibration.finish(calibration.measure(torch.device("cpu"), 1))
    fit = fit_costs(rows, hardware)
    models = Counter(row.model for row in rows)
    document = {"source": f"{len(rows)} observations of {len(models)} models on {hardware.name}, "
                          f"{hardware.num_threads} thread(s); tools/fit_costs.py", **_rounded(fit.to_json())}
    arguments.out.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(f"{arguments.out}: {document['source']}, {arguments.out.stat().st_size} bytes")
    return 0


def _rounded(data: dict[str, object]) -> dict[str, object]:
    text = json.dumps(data)
    return dict(json.loads(text, parse_float=lambda number: float(f"{float(number):.4g}")))


if __name__ == "__main__":
    sys.exit(main())
