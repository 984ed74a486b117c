"""What the benches of the network are wired with."""

import subprocess
from typing import NamedTuple

from side_by_side import run


class Side(NamedTuple):
    """An end of the veth pair."""

    namespace: str
    interface: str
    address: str
    mac: str


PEER = Side("bench-peer", "peer0", "192.0.2.1", "02:00:00:00:00:01")
POD = Side("bench-pod", "eth0", "192.0.2.2", "02:00:00:00:00:02")


def ip(words):
    run("ip", *words.split())


class Wire:
    """Two namespaces and a veth pair between them."""

    def __enter__(self):
        for side in (PEER, POD):
            subprocess.run(["ip", "netns", "delete", side.namespace], stderr=subprocess.DEVNULL, check=False)
            ip(f"netns add {side.namespace}")
            ip(f"-n {side.namespace} link set lo up")
        ends = f"{PEER.interface} address {PEER.mac} type veth peer name {POD.interface} address {POD.mac} netns {POD.namespace}"
        ip(f"-n {PEER.namespace} link add {ends}")
        for side in (PEER, POD):
            ip(f"-n {side.namespace} addr add {side.address}/24 dev {side.interface}")
            ip(f"-n {side.namespace} link set {side.interface} up")
        return self

    def __exit__(self, *_):
        for side in (PEER, POD):
            ip(f"netns delete {side.namespace}")

    def carried(self):
        """Frames and bytes that the guest has received and sent, as the host's kernel carries them: a large segment is one."""
        directory = f"/sys/class/net/{POD.interface}/statistics"
        files = [f"{directory}/{side}_{unit}" for unit in ("packets", "bytes") for side in ("rx", "tx")]
        counts = [int(line) for line in run("ip", "netns", "exec", POD.namespace, "cat", *files).split()]
        return sum(counts[:2]), sum(counts[2:])
