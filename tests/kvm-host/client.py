"""Local half of tests/on-kvm: runs one command in the emulated KVM host as if it ran here.

client.py --version           print what a host booted from these files is called
client.py --ping SECONDS      print how many commands run there; exit 1 when it does not answer
client.py -- CMD ARG...       run CMD there, booting the host with ./boot when it does not answer
"""
import fcntl
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import tty

HERE = os.path.dirname(os.path.realpath(__file__))
CHECKOUT = os.path.dirname(os.path.dirname(HERE))
HOME = os.environ.get("HOME", "/root")
CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or HOME + "/.cache", "vmrun")
STATE = CACHE + "/kvm-host/state" + ("-icount" if os.environ.get("VMRUN_KVM_ICOUNT") else "")
START_TIMEOUT_S = 30
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
EXIT_NO_HOST = 125
KEY_LEN, PING, ACCEPTED = 32, "p", b"+"  # server.py


class NoHost(Exception):
    """The emulated host did not take the command."""


def connect(session, roles, timeout_s):
    """A connection for each role. One at a time: QEMU's port forward has a backlog of one, and a SYN it drops costs a second."""
    try:
        with open(STATE + "/port") as port, open(STATE + "/key", "rb") as key:
            preamble = key.read(KEY_LEN) + session
            address = ("127.0.0.1", int(port.read()))
            if roles != PING:
                fcntl.flock(port, fcntl.LOCK_EX)
            return [connect_one(address, preamble + role.encode(), timeout_s) for role in roles]
    except (OSError, ValueError) as error:
        raise NoHost(str(error)) from error


def connect_one(address, preamble, timeout_s):
    conn = socket.create_connection(address, timeout_s)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    conn.sendall(preamble)
    if conn.recv(1) != ACCEPTED:
        raise OSError("the emulated host refused the connection")
    return conn


def ping(timeout_s):
    try:
        [conn] = connect(b"0" * 16, PING, timeout_s)
        count = conn.makefile().readline().strip()
    except (NoHost, OSError):
        return 1
    print(count, flush=True)
    return 0 if count else 1


def version():
    digest = hashlib.sha256(os.environ.get("VMRUN_KVM_MEMORY_MIB", "").encode())
    for name in ("boot", "init", "server.py", "session.py", "pump.py"):
        with open(f"{HERE}/{name}", "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()[:16]


def is_current():
    try:
        with open(STATE + "/version") as file:
            return file.read().strip() == version()
    except OSError:
        return False


def boot():
    result = subprocess.run([HERE + "/boot"], stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno())
    if result.returncode != 0:
        print("on-kvm: no host with a usable KVM could be had (see above)", file=sys.stderr)
        sys.exit(EXIT_NO_HOST)


class Command:
    def __init__(self, argv):
        self.argv = argv
        # A job in the background of a terminal must not touch it: reading would stop it.
        foreground = os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
        self.is_tty = [foreground and os.isatty(fd) for fd in range(3)]
        self.reads_stdin = foreground or not os.isatty(0)
        self.lock = threading.Lock()

    def start(self):
        session = os.urandom(8).hex().encode()
        self.control, *self.streams = connect(session, "c012", START_TIMEOUT_S)
        request = json.dumps(self.request()).encode()
        try:
            self.control.sendall(struct.pack(">I", len(request)) + request)
            self.replies = self.control.makefile("rb")
            if b"started" not in self.replies.readline():
                raise NoHost("it closed the connection")
        except OSError as error:
            raise NoHost(f"it did not start the command within {START_TIMEOUT_S} s: {error}") from error
        for conn in (self.control, *self.streams):
            conn.settimeout(None)

    def request(self):
        umask = os.umask(0)
        os.umask(umask)
        return {
            "argv": [text(os.fsencode(arg)) for arg in self.argv], "cwd": text(os.getcwdb()),
            "env": {text(name): text(value) for name, value in os.environb.items()},
            "uid": os.geteuid(), "gid": os.getegid(), "groups": os.getgroups(), "umask": umask,
            "tty": self.is_tty, "winsize": window_size(), "time": time.time(), "stamp": stamp(), "shares": shares(),
        }

    def run(self):
        """Exit status of the command."""
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: self.send({"signal": number}))
        saved = None
        if self.is_tty[0]:
            signal.signal(signal.SIGWINCH, lambda *_: self.send({"winsize": window_size()}))
            saved = termios.tcgetattr(0)
            tty.setraw(0)
        try:
            outputs = [threading.Thread(target=self.copy_output, args=(fd,), daemon=True) for fd in (1, 2)]
            self.received, self.is_unread = [0, 0, 0], False
            for thread in outputs:
                thread.start()
            threading.Thread(target=self.copy_stdin, daemon=True).start()
            reply = self.replies.readline()
            for thread in outputs:
                thread.join()
        finally:
            if saved is not None:
                termios.tcsetattr(0, termios.TCSADRAIN, saved)
        return self.status(reply)

    def status(self, reply):
        if not reply:
            print("on-kvm: the emulated host went away while the command ran", file=sys.stderr)
            return EXIT_NO_HOST
        end = json.loads(reply)
        if not self.is_unread and sum(end["sent"]) != sum(self.received):
            print(f"on-kvm: output lost: {end['sent']} bytes sent, {self.received} received", file=sys.stderr)
            return EXIT_NO_HOST
        return 128 - end["exit"] if end["exit"] < 0 else end["exit"]

    def send(self, message):
        try:
            self.control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # it has ended

    def copy_output(self, fd):
        conn = self.streams[fd]
        try:
            while data := conn.recv(1 << 17):
                self.received[fd] += len(data)
                while data:
                    data = data[os.write(fd, data):]
        except OSError:
            self.is_unread = True  # nobody reads ours: closing the connection makes the command see a broken pipe
        conn.close()

    def copy_stdin(self):
        conn = self.streams[0]
        try:
            while self.reads_stdin and (data := os.read(0, 1 << 16)):
                conn.sendall(data)
        except OSError:
            os.close(0)  # the command has closed its stdin: whoever writes into ours gets a broken pipe
        conn.close()


def text(data):
    return data.decode("latin-1")  # any bytes, one to one


def window_size():
    try:
        return struct.unpack("HHHH", fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))[:2]
    except OSError:
        return (24, 80)


def stamp():
    """Changes when packages of this machine do."""
    paths = ("/var/lib/dpkg/status", "/etc", "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/local/bin", "/opt")
    return " ".join(str(os.stat(path).st_mtime_ns) for path in paths if os.path.exists(path))


def shares():
    """Directories the command must see as they are here, at this moment."""
    wanted = [CHECKOUT, toplevel(os.getcwd()), CACHE, os.environ.get("CARGO_HOME") or HOME + "/.cargo",
              os.environ.get("CARGO_TARGET_DIR", ""), *os.environ.get("VMRUN_KVM_SHARE", "").split(":")]
    return sorted({text(os.fsencode(path)) for path in map(os.path.realpath, filter(None, wanted)) if os.path.isdir(path) and path != "/"})


def toplevel(path):
    while path != "/":
        if os.path.exists(path + "/.git"):
            return path
        path = os.path.dirname(path)
    return ""


def main():
    if sys.argv[1] == "--ping":
        return ping(float(sys.argv[2]))
    if sys.argv[1] == "--version":
        print(version())
        return 0
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback when ^C comes before the command runs
    command = Command(sys.argv[2:])
    try:
        if not is_current():
            boot()
        command.start()
    except NoHost:
        boot()
        try:
            command.start()
        except NoHost as error:
            print(f"on-kvm: the emulated host was booted and does not take commands: {error}", file=sys.stderr)
            return EXIT_NO_HOST
    return command.run()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the stdin thread may be blocked in a read
