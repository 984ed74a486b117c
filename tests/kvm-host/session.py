"""One command, from the client's request to its exit status. Forked by server.py, which never looks back."""
import ctypes
import errno
import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import termios
import time

from pump import CHUNK, Pump, poll

OUTER = "/run/on-kvm/outer"  # the machine outside, all of it, coherent
CGROUP = "/sys/fs/cgroup/on-kvm"
REQUEST_TIMEOUT_S = 30
MS_BIND, MNT_DETACH = 4096, 2
libc = ctypes.CDLL(None, use_errno=True)


class Session:
    def __init__(self, control, stdin, stdout, stderr):
        self.control, self.sockets = control, (stdin, stdout, stderr)
        self.master = None
        self.half_message = b""
        for sock in (control, *self.sockets):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self):
        self.control.settimeout(REQUEST_TIMEOUT_S)
        size = struct.unpack(">I", self.receive(4))[0]
        request = json.loads(self.receive(size))
        self.control.settimeout(None)
        set_clock(request["time"])
        drop_stale_caches(request["stamp"])
        for path in request["shares"]:
            share(path)
        for path in (request["cwd"], os.path.dirname(request["argv"][0])):
            if path.startswith("/") and not os.path.isdir(path):
                share(path)
        self.cgroup = new_cgroup()
        self.spawn(request)
        try:
            self.send({"started": self.pid})
        except OSError:
            return self.kill_all()
        self.serve()

    def receive(self, size):
        data = b""
        while len(data) < size:
            part = self.control.recv(size - len(data))
            if not part:
                raise EOFError("client left before its request was complete")
            data += part
        return data

    def send(self, message):
        self.control.sendall(json.dumps(message).encode() + b"\n")

    def spawn(self, request):
        """Descriptors that are a terminal at the client become one pty here, the others a pipe each."""
        is_tty = request["tty"]
        slave = None
        if any(is_tty):
            self.master, slave = pty.openpty()
            set_window_size(self.master, request["winsize"])
        ends = []
        for fd in range(3):
            reader, writer = (os.dup(slave), os.dup(self.master)) if is_tty[fd] else os.pipe()
            ends.append((reader, writer) if fd == 0 or is_tty[fd] else (writer, reader))
        joined_reader, joined_writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            exec_command(request, [theirs for theirs, _ in ends], self.cgroup)
        # Until the command is in its own process group and cgroup, neither a signal nor kill_all would find it.
        os.close(joined_writer)
        os.read(joined_reader, 1)
        os.close(joined_reader)
        for theirs, _ in ends:
            os.close(theirs)
        if slave is not None:
            os.close(slave)
        self.pidfd = os.pidfd_open(self.pid)
        sockets = [sock.detach() for sock in self.sockets]
        self.stdin = Pump(sockets[0], ends[0][1], is_tty[0])
        self.outputs = [Pump(ends[fd][1], sockets[fd], is_tty[fd]) for fd in (1, 2)]
        if is_tty[1] and is_tty[2]:
            self.outputs.pop().close()  # a pty has one stream of output

    def serve(self):
        """Move bytes and obey the client until the command has ended."""
        while True:
            interests = [(self.control.fileno(), select.POLLIN), (self.pidfd, select.POLLIN)]
            for pump in (self.stdin, *self.outputs):
                interests += pump.interests()
            ready = poll(interests)
            for pump in (self.stdin, *self.outputs):
                pump.step(ready)
            if ready.get(self.control.fileno()) and not self.obey():
                return self.kill_all()
            if ready.get(self.pidfd):
                return self.finish()

    def obey(self):
        """The client's messages that are there; False when it is gone."""
        try:
            data = self.control.recv(CHUNK)
        except OSError:
            return False
        *lines, self.half_message = (self.half_message + data).split(b"\n")
        for message in map(json.loads, lines):
            if "winsize" in message and self.master is not None:
                set_window_size(self.master, message["winsize"])
            if "signal" in message:
                kill_group(self.pid, message["signal"])
        return bool(data)

    def kill_all(self):
        """The client died. The command's group goes first, then whatever of it made a session of its own."""
        kill_group(self.pid, signal.SIGKILL)
        write_file(f"{self.cgroup}/cgroup.kill", "1")
        os.waitpid(self.pid, 0)
        remove_empty_cgroups()

    def finish(self):
        status = os.waitpid(self.pid, 0)[1]
        self.stdin.close()
        for output in self.outputs:
            output.drain(self.control.fileno(), self.obey)
            output.detach_target()
        try:
            self.send({"exit": os.waitstatus_to_exitcode(status), "sent": [out.moved_len for out in self.outputs]})
        except OSError:
            pass  # the client left in the same moment
        self.control.close()
        while any(output.is_open for output in self.outputs):
            ready = poll([interest for output in self.outputs for interest in output.interests()])
            for output in self.outputs:
                output.step(ready)
        remove_empty_cgroups()


def exec_command(request, fds, cgroup):
    try:
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # Python had its own
        os.setsid()
        if any(request["tty"]):
            fcntl.ioctl(fds[request["tty"].index(True)], termios.TIOCSCTTY, 0)
        fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in fds]
        for fd in range(3):
            os.dup2(fds[fd], fd)
        write_file(f"{cgroup}/cgroup.procs", "0")
        os.closerange(3, 1024)  # and with it the pipe on which spawn waits
        os.umask(request["umask"])
        os.setgroups(request["groups"])
        os.setresgid(*[request["gid"]] * 3)
        os.setresuid(*[request["uid"]] * 3)
        os.chdir(request["cwd"].encode("latin-1"))
        argv = [arg.encode("latin-1") for arg in request["argv"]]
        env = {name.encode("latin-1"): value.encode("latin-1") for name, value in request["env"].items()}
        os.execvpe(argv[0], argv, env)
    except OSError as error:
        os.write(2, f"on-kvm: {request['argv'][0]}: {error.strerror} (in {request['cwd']})\n".encode("latin-1", "replace"))
        os._exit(127 if error.errno == errno.ENOENT else 126)
    finally:
        os._exit(125)


def share(path):
    """Put the outer machine's directory at its own path, as it is now, unless it is there."""
    path = path.encode("latin-1")
    outer = OUTER.encode() + path
    with open("/run/on-kvm/share.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.isdir(outer):
            return
        if os.path.isdir(path) and os.path.samefile(path, outer):
            return  # it, or a directory above it, is shared
        if os.path.ismount(path):
            libc.umount2(path, MNT_DETACH)  # an earlier directory of this name
        os.makedirs(path, exist_ok=True)
        if libc.mount(outer, path, None, MS_BIND, None) != 0:
            raise OSError(ctypes.get_errno(), "bind mount", path)


def drop_stale_caches(stamp):
    """The root's lower layer is cached without limit. The client's stamp changes with the outer machine's packages."""
    path = "/run/on-kvm/stamp"
    known = open(path).read() if os.path.exists(path) else stamp
    if known != stamp:
        write_file("/proc/sys/vm/drop_caches", "3")
    write_file(path, stamp)


def set_clock(now):
    """Emulated time lags: the clock chip counts whole seconds, and the outer machine may have been suspended. A request takes a while to
    get here, so a clock that is a little ahead of it is right."""
    if not 0 <= time.time() - now < 5:
        time.clock_settime(time.CLOCK_REALTIME, now)


def new_cgroup():
    path = f"{CGROUP}/{os.getpid()}"
    os.makedirs(path, exist_ok=True)
    return path


def remove_empty_cgroups():
    """This session's, and those that daemons of ended sessions have left. One of a running session is empty until its command joins."""
    for entry in os.scandir(CGROUP):
        if entry.name != str(os.getpid()) and os.path.exists(f"/proc/{entry.name}"):
            continue
        try:
            os.rmdir(entry.path)
        except OSError:
            pass  # in use, or a file of the kernel's


def write_file(path, text):
    with open(path, "w") as file:
        file.write(text)


def kill_group(pid, number):
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


def set_window_size(fd, winsize):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", *winsize, 0, 0))
