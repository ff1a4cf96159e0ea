"""The protocols by name."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.protocols.at_scale import AT_SCALE
from experiments.protocols.fusionbench import FUSIONBENCH
from experiments.protocols.mergebench import MERGEBENCH
from experiments.protocols.mllm import MLLM
from experiments.protocols.protocol import Protocol

PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol for protocol in (MERGEBENCH, MLLM, AT_SCALE, FUSIONBENCH)
}
