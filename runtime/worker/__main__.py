"""`python -P -m genie_dynamo.runtime.worker`: how embedded workers are started. People use `genie worker`."""
from __future__ import annotations

import argparse
import os
import sys

from genie_dynamo.core.errors import GenieError
from genie_dynamo.runtime.worker.main import WorkerOptions, run_worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="genie_dynamo.runtime.worker")
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--bind", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--op-library", action="append", default=[])
    parser.add_argument("--resident-quota-bytes", type=int)
    parser.add_argument("--dpdk-port")
    parser.add_argument("--lifeline-fd", type=int)
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--log-level", default="WARNING")
    arguments = parser.parse_args()
    try:
        run_worker(WorkerOptions(
            bind=arguments.bind, device=arguments.device, num_threads=arguments.threads,
            op_libraries=tuple(arguments.op_library), embedded=arguments.embedded,
            resident_quota_bytes=arguments.resident_quota_bytes, dpdk_port=arguments.dpdk_port,
            lifeline_fd=arguments.lifeline_fd, ready_fd=arguments.ready_fd, log_level=arguments.log_level,
        ))
    except GenieError as error:
        if arguments.ready_fd is not None:
            os.write(arguments.ready_fd, f"error {error}\n".encode())
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
