"""Compares programs that make sockets of a guest's frames, without a right on the host: passt, which `vmrun --network user` has, and libslirp, which
QEMU has within itself. Called by `tests/bench/network`; README.md explains the figures.

    peer (bench-peer) ── veth ── eth0 (bench-pod) ── sockets of passt or libslirp ── QEMU ── guest"""

import re
import socket
import subprocess

from side_by_side import Qemu, compare, options_of, run
from wire import PEER, POD, Wire, ip

ADDRESS, GATEWAY = "10.0.2.15", "10.0.2.2"
WARM_UP_S = 2
WITHIN = ["ip", "netns", "exec", POD.namespace]
PASST = f"passt --foreground --quiet --address {ADDRESS} --netmask 24 --gateway {GATEWAY} --ipv4-only --tcp-ports none --udp-ports none --fd"


class Passt:
    """The other end of a socket that QEMU has for an interface."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        with theirs:
            command = [*WITHIN, *PASST.split(), str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self.socket = ours
        self.fds = [ours.fileno()]
        self.netdev = f"socket,id=net,fd={ours.fileno()}"
        # As `vmrun` has it: frames to it are as large as it takes them.
        self.mtu = 65520

    def end(self):
        self.socket.close()
        self.process.kill()
        self.process.wait()


class Libslirp:
    """Within QEMU."""

    fds = ()
    netdev = f"user,id=net,ipv6=off,net=10.0.2.0/24,host={GATEWAY}"
    mtu = 1500

    def end(self):
        pass


STACKS = {"passt": Passt, "libslirp": Libslirp}


def said_by_guest(name, options, *iperf3_options):
    """What a guest prints that measures to the peer."""
    stack = STACKS[name]()
    devices = ["-netdev", stack.netdev, "-device", f"virtio-net-pci,netdev=net,mac={POD.mac},disable-legacy=on,romfile=,host_mtu={stack.mtu}"]
    words = ["client", PEER.address, WARM_UP_S, options.seconds, *iperf3_options]
    variables = f"ADDRESS={ADDRESS} GATEWAY={GATEWAY} MTU={stack.mtu}"
    console = f"{options.json}.console"
    guest = Qemu(console, devices, options.initramfs, *words, variables=variables, within=WITHIN, fds=stack.fds)
    try:
        return guest.output()
    finally:
        guest.end()
        stack.end()


def rate(said):
    found = re.search(r"([\d.]+) Mbits/sec.*receiver", said)
    if not found:
        raise RuntimeError(f"the guest said {said[-500:]!r}")
    return float(found[1])


def sample(name, options):
    there = said_by_guest(name, options)
    answers = re.search(r"(\d+) packets received", there)
    return {
        "round trips a second (ICMP)": int(answers[1]) / options.seconds if answers else 0.0,
        "Mbit/s from the guest": rate(there),
        "Mbit/s to the guest": rate(said_by_guest(name, options, "--reverse")),
    }


def main():
    options = options_of(__doc__, "seconds")
    with Wire():
        # Neither starts without a default route, and both need sockets for ICMP, which the namespace gives to nobody at first.
        ip(f"-n {POD.namespace} route add default via {PEER.address}")
        run(*WITHIN, "sh", "-c", "echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range")
        with subprocess.Popen(["ip", "netns", "exec", PEER.namespace, "iperf3", "--server"], stdout=subprocess.DEVNULL) as server:
            compare(list(STACKS), lambda name: sample(name, options), options)
            server.kill()


main()
