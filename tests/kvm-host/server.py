"""Accepts commands from tests/on-kvm inside the emulated KVM host. Started there by init as root.

A command has four TCP connections: control, stdin, stdout, stderr. So flow control of each stream is the kernel's, and a full stdout
cannot hold up a signal. Every connection opens with PREAMBLE_LEN bytes: key, session, role. This process only matches the four of a
session; a forked Session then owns the command.
"""
import os
import select
import socket
import sys
import time

from session import Session

PORT = 1024
KEY_LEN, SESSION_LEN = 32, 16
PREAMBLE_LEN = KEY_LEN + SESSION_LEN + 1
ROLES = (b"c", b"0", b"1", b"2")
PING = b"p"
ACCEPTED = b"+"  # the client may open its next connection
ATTACH_TIMEOUT_S = 15


class Server:
    def __init__(self, key):
        self.key = key
        self.listener = socket.create_server(("0.0.0.0", PORT), backlog=128)
        self.poller = select.poll()
        self.poller.register(self.listener, select.POLLIN)
        self.waiting = {}  # fd -> (connection, since): the preamble is not complete
        self.partial = {}  # session -> {role: connection, "since": time}
        self.children = set()

    def run(self):
        while True:
            events = self.poller.poll(1000)
            self.reap()
            for fd, _ in events:
                if fd == self.listener.fileno():
                    self.accept()
                else:
                    self.read_preamble(fd)
            self.forget_late()

    def reap(self):
        while self.children:
            pid = os.waitpid(-1, os.WNOHANG)[0]
            if pid == 0:
                return
            self.children.discard(pid)

    def accept(self):
        conn = self.listener.accept()[0]
        self.waiting[conn.fileno()] = (conn, time.monotonic())
        self.poller.register(conn, select.POLLIN)

    def read_preamble(self, fd):
        conn = self.waiting[fd][0]
        try:
            got = conn.recv(PREAMBLE_LEN, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            if 0 < len(got) < PREAMBLE_LEN:
                return
            preamble = conn.recv(PREAMBLE_LEN)  # and nothing of what follows
        except OSError:
            preamble = b""
        self.forget(fd)
        if preamble[:KEY_LEN] != self.key or not send(conn, ACCEPTED):
            conn.close()
        elif preamble[-1:] == PING:
            send(conn, b"%d\n" % len(self.children))
            conn.close()
        else:
            self.join(preamble[KEY_LEN:-1], preamble[-1:], conn)

    def join(self, name, role, conn):
        session = self.partial.setdefault(name, {"since": time.monotonic()})
        session[role] = conn
        if not all(role in session for role in ROLES):
            return
        del self.partial[name]
        pid = os.fork()
        if pid == 0:
            self.run_session([session[role] for role in ROLES])
        self.children.add(pid)
        for role in ROLES:
            session[role].close()

    def run_session(self, conns):
        status = 1
        try:
            os.setsid()
            self.listener.close()
            for conn in [conn for conn, _ in self.waiting.values()] + [
                    conn for session in self.partial.values() for key, conn in session.items() if key != "since"]:
                conn.close()
            Session(*conns).run()
            status = 0
        except BaseException as error:  # the console log is the one place left to say it
            print(f"on-kvm session: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)

    def forget(self, fd):
        self.poller.unregister(fd)
        del self.waiting[fd]

    def forget_late(self):
        deadline = time.monotonic() - ATTACH_TIMEOUT_S
        for fd, (conn, since) in list(self.waiting.items()):
            if since < deadline:
                self.forget(fd)
                conn.close()
        for name, session in list(self.partial.items()):
            if session["since"] < deadline:
                del self.partial[name]  # closes its connections


def send(conn, data):
    try:
        return conn.send(data) == len(data)
    except OSError:
        return False


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as key_file:
        server = Server(key_file.read(KEY_LEN))
    print("on-kvm: ready", flush=True)  # boot waits for it on the console
    server.run()
