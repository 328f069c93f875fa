"""The client of test_dpdk.py, in a process of its own: a GPT-2 whose payload takes the dpdk lane and nothing else.

    python -m tests.runtime.lanes.gpt2_over_dpdk PORT [WORKER_ADDRESS]

Prints one JSON object: what differed from eager, which lane was taken, how DPDK was started, which cores torch may use.
"""
from __future__ import annotations

import json
import os
import sys

import torch

import genie_dynamo as genie
from genie_dynamo.runtime.lanes import dpdk


def main(port: str, address: str | None) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    cores = os.sched_getaffinity(0)
    config = GPT2Config(n_layer=2, n_head=4, n_embd=128, vocab_size=1000, n_positions=64, bos_token_id=None,
                        eos_token_id=None, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(1000, (2, 24))
    with torch.no_grad():
        expected = model(tokens).logits
    genie.init(workers=1 if address is None else [address], dpdk_port=port, require_lane="dpdk", strict=True)
    compiled = torch.compile(model, backend="genie")
    with torch.no_grad():
        found = [compiled(tokens).logits for _ in range(3)]
    worker = next(iter(genie.get_stats()["workers"].values()))
    difference = max((one - expected).abs().max().item() for one in found)
    genie.shutdown()
    print(json.dumps({"difference": difference, "lane": worker["lane"], "dpdk": dpdk.facts(),
                      "same_cores": os.sched_getaffinity(0) == cores}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
