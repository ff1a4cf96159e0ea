#!/usr/bin/env python3
"""Asks the autoscaler of the Ray cluster on this node for CPUs, then becomes a command.

``request-cpus 4x8 COMMAND ...`` asks for four bundles of 8 CPUs, ``2x8+1`` for two of 8 CPUs and a
GPU. The driver takes the nodes that there are and never waits for more: by itself an autoscaler
would see no demand and add nothing. What is asked for stays asked for until the cluster ends; nodes
join the study as they come.
"""

from __future__ import annotations

import os
import re
import sys
from typing import NoReturn


def bundles(text: str) -> list[dict[str, float]]:
    """The bundles that ``COUNTxCPUS`` or ``COUNTxCPUS+GPUS`` stands for.

    Raises:
        ValueError: If it is neither.
    """
    found = re.fullmatch(r"(\d+)x(\d+)(?:\+(\d+))?", text)
    if found is None:
        raise ValueError(
            f"expected COUNTxCPUS or COUNTxCPUS+GPUS, for example 4x8, received {text!r}"
        )
    count, cpus, gpus = (int(number or 0) for number in found.groups())
    bundle = {name: float(amount) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    return [dict(bundle) for _ in range(count)]


def request(wanted: list[dict[str, float]]) -> None:
    """Leave the request with the cluster that this node belongs to."""
    import ray
    from ray.autoscaler.sdk import request_resources

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    request_resources(bundles=wanted)
    ray.shutdown()


def main() -> NoReturn:
    if len(sys.argv) < 3:
        sys.exit(refusal("expected COUNTxCPUS COMMAND [ARGUMENT ...], received too little"))
    try:
        wanted = bundles(sys.argv[1])
    except ValueError as error:
        sys.exit(refusal(str(error)))
    request(wanted)
    os.execvp(sys.argv[2], sys.argv[2:])  # so that the command gets the signals


def refusal(text: str) -> int:
    """Say what is wrong; the exit code of wrong input."""
    print(f"request-cpus: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
