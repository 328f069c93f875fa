"""`python -m bench NAME [--quick] [--out FILE] [--threads 1|2]`: measure, print a table, write JSON.

Exit code 0: everything that was asked for was measured (targets may have been missed); 1: something was not.
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from bench import report
from bench.harness import Case, Settings

BENCHES = ("tiny_call", "resident_mlp", "gpt2_forward", "training_step", "parameter_check", "inductor_forward",
           "worker_memory", "control_cpu", "waiting_client_cpu", "semantics", "semantics_time", "costs", "placement",
           "bytes_moved", "pipeline", "decode", "lanes", "beside_uploads", "device")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Benches of genie-dynamo; see bench/README.md.",
        epilog="example: python -m bench tiny_call --threads 1 --out results.json")
    parser.add_argument("names", nargs="+", metavar="NAME", choices=(*BENCHES, "compression", "dpdk", "peers", "all"),
                        help=f"{', '.join(BENCHES)}; all: all of these; compression: needs root; "
                        "dpdk: needs DPDK; peers: other frameworks")
    parser.add_argument("--quick", action="store_true", help="few samples, one transport: does it work?")
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--threads", type=int, action="append", metavar="N",
                        help="threads of local sides and workers; may be repeated (default: 1 and 2; quick: 1)")
    parser.add_argument("--cores", choices=("both", "free", "one"), default="both",
                        help="tiny_call, resident_mlp, peers: on free cores, all on one core, or both (default)")
    parser.add_argument("--backend", default="genie", help="another torch.compile backend in place of genie")
    parser.add_argument("--peers-python", default=os.environ.get("BENCH_PEERS_PYTHON", sys.executable),
                        help="interpreter that has the peers' packages (also BENCH_PEERS_PYTHON)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    names = [name for given in args.names for name in (BENCHES if given == "all" else (given,))]
    settings = Settings(
        quick=args.quick, threads=tuple(args.threads or ((1,) if args.quick else (1, 2))), cores=args.cores,
        backend=args.backend, peers_python=args.peers_python)
    host = report.host_facts()
    print(f"{host['cpu_model']}, {host['cores_usable']} cores, Linux {host['kernel']}, Python {host['python']}, "
          f"torch {host['versions']['torch']}, load {host['load_average'][0]:.2f}", flush=True)
    if args.backend != "genie":
        print(f'NOTE: backend "{args.backend}" runs in genie\'s place; what is called genie below is not genie')
    cases: list[Case] = []
    failures: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            for case in importlib.import_module(f"bench.{name}").run(settings):
                cases.append(case)
                print(report.table(case), flush=True)
        except Exception as exc:                  # the other benches still run; the exit code tells
            traceback.print_exc()
            failures[name] = f"{type(exc).__name__}: {exc}"
    print(report.summary(cases))
    for name, why in failures.items():
        print(f"  NOT MEASURED  {name}: {why.splitlines()[0]:.200}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report.to_json(cases, failures, settings, host), indent=1) + "\n")
        print(f"\nwrote {args.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
