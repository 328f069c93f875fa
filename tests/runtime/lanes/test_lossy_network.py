"""The tcp lane over a network whose kernel loses frames: what arrives is whole and comes once.

af_packet's driver sends past the filters that lose them; over the dpdk lane, ports lose frames (test_dpdk_lane.py).
"""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from genie_dynamo.runtime.lanes.native import to_tensor
from tests.runtime.lanes import networks
from tests.runtime.lanes.ends import Peer

pytestmark = pytest.mark.heavy


@pytest.fixture
def peer() -> Iterator[Peer]:
    if why := networks.why_no_loss():
        pytest.skip(why)
    other = Peer("tcp", "echo", apart=True)
    yield other
    other.close()


@pytest.mark.parametrize("one_in", [1000, 100])
def test_what_the_network_loses_is_sent_again(peer: Peer, one_in: int) -> None:
    assert peer.pair is not None
    networks.lose(peer.pair, one_in)
    seed = 0
    while networks.num_lost(peer.pair) == 0 or seed < 3:
        sent = torch.randint(256, (6_000_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        peer.channel.send([b"%d" % seed, sent.numpy()], digest=True)
        came = peer.channel.receive(60.0)
        assert came is not None
        assert came[0] == b"%d" % seed
        assert torch.equal(to_tensor(came[1][0]), sent)
        seed += 1
        assert seed < 40, "the kernel lost nothing"
    assert peer.channel.statistics()["arrived"] == seed
