"""torchrun over two nodes: two network namespaces joined by a virtual cable, each with an address of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.node import PRECISIONS, fit

ROOT = Path(__file__).resolve().parents[2]
TWO_NODES = r"""
set -e
ip link set lo up
ip link add first type veth peer name second
unshare -n sleep 200 &
other=$!
trap "kill $other" EXIT
for _ in $(seq 50); do [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ] && break; sleep 0.1; done
ip link set second netns $other
ip addr add 10.9.0.1/24 dev first
ip link set first up
nsenter -t $other -n ip link set lo up
nsenter -t $other -n ip addr add 10.9.0.2/24 dev second
nsenter -t $other -n ip link set second up
run="$PYTHON -m torch.distributed.run --nnodes 2 --nproc_per_node 1 --master_addr 10.9.0.1 --master_port 29511"
GLOO_SOCKET_IFNAME=second nsenter -t $other -n $run --node_rank 1 tests/helpers/node.py $OUT 10.9.0.1 &
node=$!
GLOO_SOCKET_IFNAME=first $run --node_rank 0 tests/helpers/node.py $OUT 10.9.0.2
wait $node
"""


def namespaces_refused() -> str:
    """Why this machine makes no network namespaces; empty where it does."""
    command = ["unshare", "-Urn", "sh", "-c", "ip link add first type veth peer name second"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return str(error)
    return tried.stderr.strip() if tried.returncode else ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_two_nodes_with_two_addresses_train_as_one_process_does(tmp_path: Path) -> None:
    if refused := namespaces_refused():
        pytest.skip(f"needs two network namespaces, which are refused here: {refused}")
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["unshare", "-Urn", "bash", "-c", TWO_NODES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    addresses = {path.name: path.read_text() for path in tmp_path.glob("* of 2")}
    assert addresses == {"0 of 2": "10.9.0.1", "1 of 2": "10.9.0.2"}
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    start = fit(1, "32-true", max_steps=0).state_dict()
    for precision in PRECISIONS:
        two, one = found[precision], fit(1, precision).state_dict()
        for name, value in one.items():
            if precision == "32-true":
                torch.testing.assert_close(two[name], value, atol=1e-6, rtol=0)
            moved, apart = (value.double() - start[name]).norm(), (value.double() - two[name]).norm()
            assert two[name].dtype == value.dtype
            assert apart < {"64-true": 1e-9, "16-mixed": 0.02, "16-true": 0.05}.get(precision, 0.2) * moved
