"""The subcommands: their options, and the call behind each. Heavy imports wait until a command runs."""
from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from genie_dynamo.cli.parser import Parser


def print_version() -> int:
    from importlib.metadata import version

    print(f"genie-dynamo {version('genie-dynamo')}")
    return 0


# ---------------------------------------------------------------- demo
def add_demo(parser: Parser, subparsers: Any) -> None:
    command = parser.add_command(
        subparsers, "demo", example="genie demo\ngenie demo --quick --json",
        help="sentence search with real MiniLM weights and generation with a cache on two embedded workers, "
             "compared with local eager")
    command.add_argument("--quick", action="store_true", help="fewer docstrings and tokens")
    command.add_argument("--docstrings", type=positive, metavar="N", help="how many docstrings to encode")
    command.add_argument("--tokens", type=positive, metavar="N", help="how many tokens to generate")
    command.add_argument("--json", action="store_true", help="facts as JSON on stdout; the rest goes to stderr")
    command.set_defaults(run=run_demo)


def run_demo(arguments: argparse.Namespace) -> int:
    import dataclasses

    from genie_dynamo import demo

    options = demo.DemoOptions(json=arguments.json)
    if arguments.quick:
        options = options.quick()
    given = {"num_docstrings": arguments.docstrings, "num_new_tokens": arguments.tokens}
    options = dataclasses.replace(options, **{name: n for name, n in given.items() if n is not None})
    return demo.run_demo(options)


# ---------------------------------------------------------------- doctor
def add_doctor(parser: Parser, subparsers: Any) -> None:
    command = parser.add_command(
        subparsers, "doctor",
        example="genie doctor\ngenie doctor --json\ngenie doctor --nic",
        help="versions, hardware and optional parts: what is usable here, and why the rest is not")
    command.add_argument("--nic", action="store_true",
                         help="what DPDK could use: NICs and their drivers, hugepages, IOMMU")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> int:
    from genie_dynamo import doctor, doctor_nic

    report = doctor_nic.examine() if arguments.nic else doctor.examine()
    print(json.dumps(report.to_json(), indent=2) if arguments.json else report)
    return 0 if report.ok else 1


# ---------------------------------------------------------------- lanes
def add_lanes(parser: Parser, subparsers: Any) -> None:
    command = parser.add_command(
        subparsers, "lanes", example="genie lanes\ngenie lanes --json",
        help="the ways that payload can take on this machine: which work, how fast they are, and why not the rest")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run_lanes)


def run_lanes(arguments: argparse.Namespace) -> int:
    from genie_dynamo.runtime.lanes.survey import survey

    rows = survey()
    if arguments.json:
        print(json.dumps({"lanes": [row.to_json() for row in rows]}, indent=2))
        return 0
    width = max(len(row.name) for row in rows)
    for row in rows:
        rate = f"{row.gb_per_s:7.2f} GB/s" if row.gb_per_s is not None else " " * 12
        print(f"{row.name:<{width}}  {'usable' if row.usable else 'off':<6}  {rate}  {row.reason}")
    return 0


# ---------------------------------------------------------------- patterns
def add_patterns(parser: Parser, subparsers: Any) -> None:
    command = parser.add_command(
        subparsers, "patterns", example="genie patterns\ngenie patterns --json",
        help="the patterns that read the meaning of a graph: built-in ones and those of installed packages")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run_patterns)


def run_patterns(arguments: argparse.Namespace) -> int:
    from genie_dynamo.passes.semantics.registry import REGISTRY

    statuses, broken = REGISTRY.statuses(), REGISTRY.broken_entry_points()
    if arguments.json:
        rows = [{"name": s.pattern.name, "version": s.pattern.version, "priority": s.pattern.priority,
                 "kinds": s.pattern.kinds, "anchors": s.pattern.anchors, "origin": s.pattern.origin,
                 "disabled": s.disabled} for s in statuses]
        print(json.dumps({"patterns": rows, "broken_entry_points": broken}, indent=2))
    else:
        print(f"{'pattern':<20}{'version':<9}{'priority':>8}  {'origin':<14}makes")
        for status in statuses:
            pattern, note = status.pattern, f"  disabled: {status.disabled}" if status.disabled else ""
            print(f"{pattern.name:<20}{pattern.version:<9}{pattern.priority:>8}  {pattern.origin:<14}"
                  f"{', '.join(pattern.kinds)}{note}")
        for name, reason in broken.items():
            print(f"{name:<20}cannot be loaded: {reason}")
    return 1 if broken else 0


# ---------------------------------------------------------------- explain
def add_explain(parser: Parser, subparsers: Any) -> None:
    command = parser.add_command(
        subparsers, "explain", example="genie explain train.py\ngenie explain --html plan.html serve.py --port 80",
        help="run a script and say where each graph that it compiled for genie runs, and why")
    command.add_argument("--html", metavar="FILE", help="also write a page to look at")
    command.add_argument("--json", action="store_true", help="print JSON; what the script prints goes to stderr")
    command.add_argument("script", help="a Python file")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    command.set_defaults(run=run_explain)


def run_explain(arguments: argparse.Namespace) -> int:
    from genie_dynamo.core.errors import ConfigError
    from genie_dynamo.explaining import explain_script

    if not Path(arguments.script).is_file():
        raise ConfigError(f"{arguments.script} is no file; give the path of a Python script")
    if arguments.html and not os.access(Path(arguments.html).resolve().parent, os.W_OK):
        raise ConfigError(f"--html {arguments.html}: its folder does not exist or cannot be written to")
    found = explain_script(arguments.script, arguments.arguments, quiet=arguments.json)
    if not found.graphs:
        raise ConfigError(f'{arguments.script} ran no graph on a worker; does it call torch.compile(..., '
                          'backend="genie") or genie.compile?')
    print(found.to_json() if arguments.json else found)
    if arguments.html:
        found.to_html(arguments.html)
    return 0


# ---------------------------------------------------------------- worker
def add_worker(parser: Parser, subparsers: Any) -> None:
    command = parser.add_command(
        subparsers, "worker",
        example="genie worker --bind tcp://127.0.0.1:5555\n"
                "genie worker --bind tcp://0.0.0.0:5555 --device cuda:0 --keys ~/genie-keys",
        help="serve this machine's processor or accelerator to clients until it is stopped")
    command.add_argument("--bind", required=True, metavar="ADDRESS",
                         help="where to listen: tcp://HOST:PORT or ipc:///PATH")
    command.add_argument("--device", type=device, default="cpu", metavar="DEVICE", help="cpu or cuda:N (default: cpu)")
    command.add_argument("--threads", type=positive, metavar="N", help="compute threads (default: all cores)")
    command.add_argument("--op-library", action="append", default=[], metavar="MODULE",
                         help="import this module, which registers torch.library ops; may be repeated")
    command.add_argument("--keys", metavar="DIR",
                         help="directory of `genie keygen`: this worker's key, and a *.key file for each client "
                              "that is let in")
    command.add_argument("--allow-anyone-on-the-network", action="store_true",
                         help="listen beyond this machine without keys: whoever connects can run computations")
    command.add_argument("--memory-limit-gib", type=positive_float, metavar="GIB",
                         help="memory of this process (default: the machine's)")
    command.add_argument("--resident-quota-gib", type=positive_float, metavar="GIB",
                         help="what one session may keep here between calls (default: 60 %% of the memory limit)")
    command.add_argument("--dpdk-port", metavar="PORT",
                         help="offer the dpdk lane on memif, af_packet:INTERFACE, af_xdp:INTERFACE or pci:ADDRESS")
    command.add_argument("--log-level", default="WARNING", metavar="LEVEL", type=str.upper,
                         choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
                         help="DEBUG, INFO, WARNING, ERROR or CRITICAL (default: WARNING)")
    command.set_defaults(run=run_worker)


def run_worker(arguments: argparse.Namespace) -> int:
    from genie_dynamo.runtime.worker.main import WorkerOptions
    from genie_dynamo.runtime.worker.main import run_worker as serve

    limit_gib, quota_gib = arguments.memory_limit_gib, arguments.resident_quota_gib
    serve(WorkerOptions(
        bind=arguments.bind, device=arguments.device, num_threads=arguments.threads,
        op_libraries=tuple(arguments.op_library), keys=arguments.keys,
        allow_unauthenticated=arguments.allow_anyone_on_the_network,
        memory_limit_bytes=None if limit_gib is None else int(limit_gib * 2**30),
        resident_quota_bytes=None if quota_gib is None else int(quota_gib * 2**30),
        dpdk_port=arguments.dpdk_port, log_level=arguments.log_level))
    return 0


# ---------------------------------------------------------------- workers
def add_workers(parser: Parser, subparsers: Any) -> None:
    command = parser.add_command(
        subparsers, "workers",
        example="genie workers tcp://10.0.0.2:5555 tcp://10.0.0.3:5555\ngenie workers --cluster cluster.yaml --json",
        help="ask running workers how they are; status 1 if one of them does not answer")
    command.add_argument("addresses", nargs="*", metavar="ADDRESS", help="tcp://HOST:PORT or ipc:///PATH")
    command.add_argument("--cluster", metavar="FILE", help="ask the workers that this cluster.yaml names")
    command.add_argument("--timeout-s", type=positive_float, default=5.0, metavar="SECONDS",
                         help="how long to wait for each (default: 5)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run_workers)


def run_workers(arguments: argparse.Namespace) -> int:
    from genie_dynamo.cli import workers

    if bool(arguments.addresses) == bool(arguments.cluster):
        raise workers.nothing_to_ask()
    rows = workers.ask(arguments.addresses, arguments.cluster, arguments.timeout_s)
    print(json.dumps({"workers": [row.to_json() for row in rows]}, indent=2) if arguments.json
          else workers.table_of(rows))
    return 0 if all(row.error is None for row in rows) else 1


# ---------------------------------------------------------------- keygen
def add_keygen(parser: Parser, subparsers: Any) -> None:
    command = parser.add_command(
        subparsers, "keygen", example="genie keygen ~/genie-keys",
        help="make the keys that a worker and a client need to talk across a network")
    command.add_argument("directory", metavar="DIR", help="where to write them; made if it is not there")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run_keygen)


def run_keygen(arguments: argparse.Namespace) -> int:
    from genie_dynamo.core.errors import ConfigError
    from genie_dynamo.runtime.security import generate_keys

    try:
        paths = [str(path) for path in generate_keys(arguments.directory)]
    except OSError as error:
        raise ConfigError(f"no keys were written to {arguments.directory}: {error.strerror}") from error
    if arguments.json:
        print(json.dumps({"files": paths}, indent=2))
        return 0
    for path in paths:
        print(f"wrote {path}")
    print(f"\nOn the worker's machine:  server.key_secret and client.key in one directory, then\n"
          f"    genie worker --bind tcp://0.0.0.0:5555 --keys {arguments.directory}\n"
          f"On the client's machine:  client.key_secret and server.key, named in cluster.yaml; keep the files "
          f"named *.key_secret to yourself.")
    return 0


# ---------------------------------------------------------------- values
def device(text: str) -> str:
    """The name of a device that a worker may own, for argparse; whether it is there shows when the worker starts."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda:N")
    return text


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number


def positive_float(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
