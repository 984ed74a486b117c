"""Measures the network of a VM and of QEMU in turn, round after round. Called by `tests/bench/network`; README.md explains the figures.

    peer (bench-peer) ── veth ── eth0 (bench-pod) ── tc ── TAP ── guest

The same wiring for both: `vmrun` makes its part of it itself, for QEMU it is made here. From guest to guest, the peer is one of the same kind,
joined to the other end of the veth pair."""

import ctypes
import json
import re
import socket
import threading
import time

from side_by_side import START_DEADLINE_S, Exits, Qemu, Vmrun, compare, options_of, run
from wire import PEER, POD, Wire, ip

ECHO_PORT = 7
WARM_UP_S = 2
CLONE_NEWNET = 0x40000000


def vmrun(options, vhost, side, *words):
    network = ["--network", f"netns:/run/netns/{side.namespace}"] + ["--vhost-net"] * vhost
    return Vmrun(side.namespace, network, options.rootfs, *words)


class WiredQemu(Qemu):
    """Joined to its side by a TAP interface, as `vmrun` joins its VMs."""

    TAP = "benchtap0"

    def __init__(self, options, vhost, side, *words):
        self.side = side
        ip(f"-n {side.namespace} tuntap add {self.TAP} mode tap vnet_hdr")
        ip(f"-n {side.namespace} link set {self.TAP} up")
        for source, target in ((side.interface, self.TAP), (self.TAP, side.interface)):
            run("tc", "-n", side.namespace, "qdisc", "add", "dev", source, "ingress")
            redirect = f"protocol all u32 match u8 0 0 action mirred egress redirect dev {target}"
            run("tc", "-n", side.namespace, "filter", "add", "dev", source, "parent", "ffff:", *redirect.split())
        devices = ["-netdev", f"tap,id=net,ifname={self.TAP},script=no,downscript=no,vhost={'on' if vhost else 'off'}"]
        devices += ["-device", f"virtio-net-pci,netdev=net,mac={side.mac},disable-legacy=on,romfile="]
        console, within = f"{options.json}.{side.namespace}.console", ["ip", "netns", "exec", side.namespace]
        super().__init__(console, devices, options.initramfs, *words, variables=f"ADDRESS={side.address}", within=within)

    def end(self):
        super().end()
        ip(f"-n {self.side.namespace} link delete {self.TAP}")
        run("tc", "-n", self.side.namespace, "qdisc", "delete", "dev", self.side.interface, "ingress")


SUBJECTS = {
    "vmrun": (vmrun, False),
    "QEMU": (WiredQemu, False),
    "vmrun, vhost-net": (vmrun, True),
    "QEMU, vhost-net": (WiredQemu, True),
}


def as_peer(work):
    """Does something in the peer's namespace, on a thread of its own."""
    result = []

    def entered():
        with open(f"/run/netns/{PEER.namespace}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        result.append(work())

    thread = threading.Thread(target=entered)
    thread.start()
    thread.join()
    if not result:
        raise RuntimeError("the work in the peer's namespace failed")
    return result[0]


def connect():
    client = socket.create_connection((POD.address, ECHO_PORT), timeout=START_DEADLINE_S)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def wait_for_guest():
    def dial():
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            try:
                with connect() as client:
                    client.sendall(b"x")
                    return client.recv(1)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    as_peer(dial)


def round_trips(seconds):
    """One byte there and back, again and again; how many in a second."""

    def echo():
        with connect() as client:
            count, began = 0, time.monotonic()
            while time.monotonic() < began + seconds:
                client.sendall(b"x")
                if client.recv(1) != b"x":
                    raise RuntimeError("the echo ended")
                count += 1
            return count / (time.monotonic() - began)

    return as_peer(echo)


def throughput(seconds, *options):
    """Mbit/s of one TCP connection, as the receiver counts them."""
    words = ["ip", "netns", "exec", PEER.namespace, "iperf3", "--client", POD.address, "--time", seconds, "--json", *options]
    return json.loads(run(*words))["end"]["sum_received"]["bits_per_second"] / 1e6


MEASURES = {
    "round trips a second": round_trips,
    "Mbit/s to the guest": throughput,
    "Mbit/s from the guest": lambda seconds: throughput(seconds, "--reverse"),
}


def from_guest(make, options, vhost):
    """What a second guest, in the peer's place, measures to the first."""
    guest = make(options, vhost, PEER, "client", POD.address, WARM_UP_S, options.seconds)
    try:
        said = guest.output()
    finally:
        guest.end()
    answers, rate = re.search(r"(\d+) packets received", said), re.search(r"([\d.]+) Mbits/sec.*receiver", said)
    if not answers or not rate:
        raise RuntimeError(f"the second guest said {said[-500:]!r}")
    return {
        "guest to guest: round trips a second": int(answers[1]) / options.seconds,
        "guest to guest: Mbit/s": float(rate[1]),
    }


def sample(name, options, wire, exits):
    """One start of a subject and all its measures."""
    make, vhost = SUBJECTS[name]
    subject = make(options, vhost, POD)
    try:
        wait_for_guest()
        # What is done for the first time is slow, on an emulated host above all.
        for take in MEASURES.values():
            take(WARM_UP_S)
        figures = {}
        for measure, take in MEASURES.items():
            counts, before = {}, wire.carried()
            with exits.counted(subject.pid, counts):
                figures[measure] = take(options.seconds)
            frames, size = (after - earlier for after, earlier in zip(wire.carried(), before))
            figures[f"{measure}: bytes for each frame"] = size / frames
            for kind, count in counts.items():
                figures[f"{measure}: {kind} for each frame"] = count / frames
        return figures | from_guest(make, options, vhost)
    finally:
        subject.end()


def main():
    options = options_of(__doc__, "seconds")
    with Wire() as wire, Exits() as exits:
        compare(list(SUBJECTS), lambda name: sample(name, options, wire, exits), options)


main()
