"""The README's examples, run as they stand, with a model and data put in where a reader would put theirs."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.heavy


def example(which: str, language: str = "python") -> str:
    """The one code block that holds these words."""
    blocks = [block for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if which in block]
    assert len(blocks) == 1
    return str(blocks[0])


def run_as_script(program: str, folder: Path) -> str:
    """What it prints. A process of its own, as a reader's script is; strict, so that nothing runs locally."""
    script = folder / "script.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=200,
                          env=os.environ | {"GENIE_STRICT": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_inference(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=64)).eval()
    model.save_pretrained(tmp_path / "my-model")
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    program = ("import torch\nids = torch.arange(20).view(2, 10)\nmask = torch.ones_like(ids)\n" + example("AutoModel")
               + "\ntorch.save(states, 'states.pt')\nimport genie_dynamo\nprint(genie_dynamo.get_stats()['calls'])\n")
    assert run_as_script(program, tmp_path).split()[-1] == "1"
    torch.testing.assert_close(torch.load(tmp_path / "states.pt"), expected, rtol=1e-5, atol=1e-5)


def test_training(tmp_path: Path) -> None:
    before = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
batches = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(3)]
"""
    after = "\nprint(torch.cat([p.detach().flatten() for p in model.parameters()]).double().sum().item())\n"
    program = before + example("genie.compile") + "\ncalls = genie.get_stats()['calls']\nprint(calls)\n" + after
    eager = re.sub(r"genie\.compile\((.*)\)\n", r"\1\n", example("genie.compile"))
    eager = re.sub(r"(?m)^(import genie.*|genie\.init.*|print.*)$", "", eager)
    assert "genie" not in eager
    *_, calls, found = run_as_script(program, tmp_path).split()
    expected, = run_as_script(before + eager + after, tmp_path).split()
    assert int(calls) == 6                      # a forward and a backward for each batch
    assert float(found) == pytest.approx(float(expected), abs=1e-5)


def test_workers_of_your_own(tmp_path: Path) -> None:
    commands = [line.split("#")[0].split() for line in README.splitlines()
                if line.startswith(("genie keygen ", "genie worker --bind "))]
    keygen, serve = ([sys.executable, "-m", "genie_dynamo.cli", *command[1:]] for command in commands)
    subprocess.run(keygen, cwd=tmp_path, check=True, timeout=60, stdout=subprocess.DEVNULL)
    serve[serve.index("tcp://0.0.0.0:5555")] = "tcp://0.0.0.0:*"
    worker = subprocess.Popen(serve, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        address = re.search(r" at (\S+) on cpu", worker.stdout.readline())
        assert address is not None
        cluster = yaml.safe_load(example("client_key", "yaml"))
        cluster["workers"][0]["address"] = address[1].replace("0.0.0.0", "127.0.0.1")
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
        call, = re.findall(r'^genie\.init\(cluster="cluster\.yaml"\)$', README, re.MULTILINE)
        program = ("import torch, genie_dynamo as genie\n" + call + "\n"
                   "print(torch.compile(lambda x: x + 1, backend='genie')(torch.ones(2)).tolist())\n"
                   "print(genie.get_stats()['calls'])\n")
        assert run_as_script(program, tmp_path).split("\n")[:2] == ["[2.0, 2.0]", "1"]
    finally:
        worker.kill()
        worker.communicate()
