#!/usr/bin/env python3
"""Write passes/semantics/learned/weights.npz: the classifier of regions, trained on what patterns were tuned with.

    python tools/train_classifier.py            captures some 160 architectures (about 15 minutes), trains, prints
                                                how it does on families that it never saw

The examples are kept in build/, and used again with --examples.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bench.semantics_classifier import HEADER, Examples, examples_of, joined, leave_one_out, trained  # noqa: E402
from bench.semantics_held_out import HELD_OUT  # noqa: E402
from bench.semantics_optimizers import OPTIMIZERS  # noqa: E402
from bench.semantics_samples import (  # noqa: E402
    DECODED,
    all_names,
    decode_samples,
    forward_samples,
    labelled_samples,
    optimizer_samples,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, help="a file of an earlier run; captures nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "passes" / "semantics" / "learned" / "weights.npz")
    arguments = parser.parse_args()
    examples = _read(arguments.examples) if arguments.examples else _captured()
    network = trained(examples.only(~examples.held_out))
    arguments.out.write_bytes(network.to_bytes())
    print(f"{arguments.out}: {int((~examples.held_out).sum())} examples, {arguments.out.stat().st_size} bytes")
    print(HEADER)
    for row in leave_one_out(examples):
        print(row)
    return 0


def _captured() -> Examples:
    torch.set_num_threads(1)
    names = (*all_names(), *HELD_OUT)
    sources = (forward_samples(names), labelled_samples(names), decode_samples(DECODED),
               optimizer_samples(tuple(OPTIMIZERS)))
    examples = joined(part for source in sources for part in examples_of(source))
    kept = ROOT / "build" / "classifier_examples.npz"
    kept.parent.mkdir(exist_ok=True)
    np.savez_compressed(kept, **{name: getattr(examples, name) for name in Examples.__slots__})
    return examples


def _read(path: Path) -> Examples:
    with np.load(path, allow_pickle=False) as data:
        return Examples(**{name: data[name] for name in Examples.__slots__})


if __name__ == "__main__":
    sys.exit(main())
