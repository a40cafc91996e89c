"""The worker inside a sandbox: runs commands and moves files for the host, over its standard streams.

Invariants: it waits for nobody (one loop over everything that is open, so a command that hangs holds up no
other); it keeps of a command's output what was asked for, reads on and counts the rest; and it imports
nothing but what Python's core holds, so that a sandbox is ready in milliseconds. It runs as the code that it
serves does, and is trusted as little.

It runs by itself, with any Python from 3.6 on: ``python3 -I -S -B guest.py [PROCESSES]``. Requests come as a
length (4 bytes, big endian) and a marshalled tuple; answers go as a kind (1 byte), the number of what they
answer (4), a length (4), and that many bytes. Nothing here is ever unmarshalled on the host.
"""

# ruff: noqa: SIM105 - contextlib is not loaded here

# The C cores of `signal` and `stat`: their Python shells cost milliseconds.
import _signal as signals  # type: ignore[import-not-found]
import _stat as stat
import errno
import marshal
import os
import posix
import select
import sys
import time

PIECE = 65536
TIMED_OUT = 1
FIONREAD = 0x541B
LARGEST_PIPE = 1 << 20


def hide() -> None:
    """Keep this process's memory and file descriptors from the commands, which are the same user's.

    What the host sends passes through here: tests, and what tells their report from a forged one.
    """
    try:
        import _ctypes  # its Python shell costs milliseconds
    except ImportError:
        return
    prctl = _ctypes.dlsym(_ctypes.dlopen(None, 2), "prctl")  # type: ignore[arg-type]
    _ctypes.call_function(prctl, (4, 0, 0, 0, 0))  # PR_SET_DUMPABLE


class Command:
    """A command that runs, and what is known of it."""

    def __init__(
        self, number: int, pid: int, pipes: "tuple[int, int, int]", until: float, started: float
    ) -> None:
        self.number, self.pid, self.until, self.started = number, pid, until, started
        self.stdin, self.stdout, self.stderr = pipes
        self.left = {b"o": 0, b"e": 0}
        self.cut = {b"o": 0, b"e": 0}
        # Bytes that are still to be read once it has ended.
        self.rest = {b"o": 0, b"e": 0}
        self.paced = False
        self.flags = 0
        self.pending: list[bytes] = []
        self.closing = False
        self.status: int | None = None


class Guest:
    """Serves one host."""

    def __init__(self) -> None:
        self.incoming = b""
        self.poll = select.poll()
        self.commands: dict[int, Command] = {}
        self.by_pid: dict[int, Command] = {}
        self.readers: dict[int, tuple[Command, bytes]] = {}
        self.writers: dict[int, Command] = {}
        # A child's end wakes the loop through this pipe.
        self.woken, waking = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(waking, False)
        signals.set_wakeup_fd(waking)
        signals.signal(signals.SIGCHLD, lambda *_: None)
        signals.signal(signals.SIGINT, signals.SIG_IGN)
        self.poll.register(0, select.POLLIN)
        self.poll.register(self.woken, select.POLLIN)

    def serve(self) -> None:
        """Answer until the host goes away."""
        self.send(b"h", 0, b"%d.%d" % sys.version_info[:2])
        while True:
            for fd, _ in self.poll.poll(self.patience()):
                if fd == 0:
                    if not self.receive():
                        return
                elif fd == self.woken:
                    try:
                        os.read(self.woken, PIECE)
                    except BlockingIOError:
                        pass
                elif fd in self.readers:
                    self.forward(fd)
                elif fd in self.writers:
                    self.feed(self.writers[fd])
            self.expire()
            self.reap()

    def patience(self) -> "int | None":
        """Milliseconds until the next deadline; ``None`` without one."""
        ends = [command.until for command in self.commands.values() if command.until]
        return max(0, int((min(ends) - time.monotonic()) * 1000) + 1) if ends else None

    def receive(self) -> bool:
        """Read what has come; ``False`` at the host's end."""
        piece = os.read(0, 1 << 20)
        if not piece:
            return False
        self.incoming += piece
        while len(self.incoming) >= 4:
            length = int.from_bytes(self.incoming[:4], "big")
            if len(self.incoming) < 4 + length:
                # A large request is gathered at once: byte strings that grow piece by piece take long.
                pieces, missing = [self.incoming], 4 + length - len(self.incoming)
                while missing:
                    piece = os.read(0, min(missing, 1 << 20))
                    if not piece:
                        return False
                    pieces.append(piece)
                    missing -= len(piece)
                self.incoming = b"".join(pieces)
            request = marshal.loads(self.incoming[4 : 4 + length])
            self.incoming = self.incoming[4 + length :]
            number = request[1]
            try:
                getattr(self, "do_" + request[0])(number, *request[2:])
            except OSError as error:
                self.send(b"f", number, os.fsencode(error.strerror or str(error)))
            except Exception as error:
                self.send(b"f", number, repr(error).encode("utf-8", "replace"))
        return True

    def send(self, kind: bytes, number: int, payload: bytes = b"") -> None:
        """Answer the host; it always reads."""
        data = kind + number.to_bytes(4, "big") + len(payload).to_bytes(4, "big") + payload
        while data:
            data = data[os.write(1, data) :]

    # Commands -------------------------------------------------------------------------------

    def do_exec(
        self,
        number: int,
        argv: "list[str]",
        cwd: str,
        env: "dict[str, str]",
        stdin: "bytes | None",
        seconds: float,
        limit: int,
    ) -> None:
        """Start a command.

        ``stdin`` is what it reads; of each stream ``limit`` bytes are kept. ``None``: its input stays open,
        and its output waits after ``limit`` bytes until more are asked for.
        """
        started = time.monotonic()
        pipes = []  # type: list[tuple[int, int]]
        try:
            for _ in range(3):
                pipes.append(os.pipe())
            pid = os.fork()
        except OSError:  # whoever used everything up gets the worker no more file descriptors than that
            for pipe in pipes:
                for end in pipe:
                    os.close(end)
            raise
        (input_end, into), (out, output_end), (err, error_end) = pipes
        if pid == 0:
            try:
                os.setsid()
                os.dup2(input_end, 0)
                os.dup2(output_end, 1)
                os.dup2(error_end, 2)
                signals.signal(signals.SIGINT, signals.SIG_DFL)
                signals.signal(signals.SIGPIPE, signals.SIG_DFL)
                signals.signal(signals.SIGCHLD, signals.SIG_DFL)
                signals.set_wakeup_fd(-1)
                os.chdir(cwd)
                execute(argv, env)
            except OSError as error:
                what = error.filename if isinstance(error.filename, str) else argv[0]
                os.write(2, os.fsencode(f"{what}: {error.strerror}\n"))
            finally:
                posix._exit(127)
        for end in (input_end, output_end, error_end):
            os.close(end)
        until = started + seconds if seconds else 0
        command = Command(number, pid, (into, out, err), until, started)
        command.left = {b"o": limit, b"e": limit}
        command.paced = stdin is None
        self.commands[number] = self.by_pid[pid] = command
        for fd, kind in ((out, b"o"), (err, b"e")):
            os.set_blocking(fd, False)
            self.readers[fd] = command, kind
            self.poll.register(fd, select.POLLIN)
        os.set_blocking(into, False)
        if stdin is not None:
            command.closing = True
        if stdin:
            command.pending.append(stdin)
        self.feed(command)

    def do_stdin(self, number: int, data: "bytes | None") -> None:
        """Send to a command's input; ``None`` closes it."""
        command = self.commands.get(number)
        if command is not None:
            if data is None:
                command.closing = True
            else:
                command.pending.append(data)
            self.feed(command)

    def do_more(self, number: int, wanted: bytes, count: int) -> None:
        """Go on with a command's output that waits."""
        command = self.commands.get(number)
        if command is not None:
            for fd, (owner, kind) in self.readers.items():
                if owner is command and kind == wanted:
                    if command.left[kind] <= 0:
                        self.poll.register(fd, select.POLLIN)
                    command.left[kind] += count
            if command.status is not None:
                self.finish(command)

    def do_signal(self, number: int, signal: int) -> None:
        """Send a signal to a command's process group."""
        command = self.commands.get(number)
        if command is not None:
            kill_group(command.pid, signal)
            if command.status is not None and signal == signals.SIGKILL:
                self.finish(command, wanted=False)

    def feed(self, command: Command) -> None:
        """Write what a command has not read yet."""
        fd = command.stdin
        if fd < 0:
            return
        try:
            while command.pending:
                done = os.write(fd, command.pending[0][:PIECE])
                command.pending[0] = command.pending[0][done:]
                if not command.pending[0]:
                    command.pending.pop(0)
        except BlockingIOError:
            if fd not in self.writers:
                self.writers[fd] = command
                self.poll.register(fd, select.POLLOUT)
            return
        except OSError:
            command.pending, command.closing = [], True
        if fd in self.writers:
            del self.writers[fd]
            self.poll.unregister(fd)
        if command.closing:
            os.close(fd)
            command.stdin = -1

    def forward(self, fd: int) -> bool:
        """Pass a piece of output on, as far as it is kept; ``False`` when there is none now."""
        command, kind = self.readers[fd]
        left = command.left[kind]
        if command.paced and left <= 0:
            return False
        size = min(PIECE, left) if command.paced else PIECE
        if command.status is not None:
            size = min(size, command.rest[kind])
        try:
            piece = os.read(fd, size)
        except BlockingIOError:
            return False
        if not piece:
            self.drop(fd)
            return False
        command.rest[kind] -= len(piece)
        if left > 0:
            self.send(kind, command.number, piece[:left])
        command.left[kind] = max(0, left - len(piece))
        command.cut[kind] += max(0, len(piece) - left)
        if command.paced and not command.left[kind]:
            self.poll.unregister(fd)
        return True

    def drop(self, fd: int) -> None:
        """Close an output; it may be one that waits."""
        command, kind = self.readers.pop(fd)
        if not command.paced or command.left[kind] > 0:
            self.poll.unregister(fd)
        os.close(fd)

    def expire(self) -> None:
        """Kill what is over its deadline."""
        now = time.monotonic()
        for command in self.commands.values():
            if command.until and now >= command.until:
                command.until = 0
                command.flags |= TIMED_OUT
                kill_group(command.pid, signals.SIGKILL)

    def reap(self) -> None:
        """Tell of commands that ended, and bury orphans."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            command = self.by_pid.pop(pid, None)
            if command is None:
                continue
            command.status = status
            for fd, kind in ((command.stdout, b"o"), (command.stderr, b"e")):
                if self.readers.get(fd, (None,))[0] is command:
                    command.rest[kind] = content(fd)
            self.finish(command)

    def finish(self, command: Command, wanted: bool = True) -> None:
        """Tell of a command that ended, once what it wrote was taken, as far as that is ``wanted``.

        What was in its pipes when it ended is its output; whatever it left running is not waited for, and
        what that writes is nobody's.
        """
        waits = False
        for fd, kind in ((command.stdout, b"o"), (command.stderr, b"e")):
            if self.readers.get(fd, (None,))[0] is not command:
                continue  # closed already, and its number may be another command's by now
            while wanted and fd in self.readers and self.forward(fd):
                pass
            if wanted and command.paced and command.left[kind] <= 0 < command.rest[kind]:
                waits = True  # there is more, and its host will ask for it
            elif fd in self.readers:
                self.drop(fd)
        if waits:
            return
        command.pending, command.closing = [], True
        self.feed(command)
        status = command.status or 0
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        took = int((time.monotonic() - command.started) * 1e6)
        told = (code + 256, command.flags, command.cut[b"o"], command.cut[b"e"], took)
        self.send(b"x", command.number, b"".join(value.to_bytes(8, "big") for value in told))
        del self.commands[command.number]

    # Files ----------------------------------------------------------------------------------

    def do_read(self, number: int, path: str, limit: int) -> None:
        """A regular file's content."""
        # Not blocking: a pipe that nobody writes to would hold up everything.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            if found.st_size > limit:
                raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, and {limit} are allowed")
            left = limit
            while left > 0:
                piece = os.read(fd, min(left, 1 << 20))
                if not piece:
                    break
                left -= len(piece)
                self.send(b"o", number, piece)
        finally:
            os.close(fd)
        self.send(b"k", number)

    def do_write(self, number: int, path: str, data: bytes, mode: int, first: bool) -> None:
        """Write a file, or add to it."""
        folder = os.path.dirname(path)
        if first and folder:
            os.makedirs(folder, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | (os.O_TRUNC if first else os.O_APPEND)
        fd = os.open(path, flags, mode)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            while data:
                data = data[os.write(fd, data) :]
            if first:
                os.fchmod(fd, mode)
        finally:
            os.close(fd)
        self.send(b"k", number)

    def do_link(self, number: int, target: str, path: str) -> None:
        """Make a symbolic link, in place of what is there."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        os.symlink(target, path)
        self.send(b"k", number)

    def do_folder(self, number: int, path: str, mode: int) -> None:
        """Make a folder and those above it."""
        os.makedirs(path, exist_ok=True)
        os.chmod(path, mode)
        self.send(b"k", number)

    def do_list(self, number: int, path: str, most: int) -> None:
        """What is in a folder, in all depths: kind, mode, size and relative name, NUL between them.

        At most ``most`` entries; the host counts them.
        """
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            kind = b"f" if stat.S_ISREG(found.st_mode) else b"l" if stat.S_ISLNK(found.st_mode) else b"?"
            self.send(b"o", number, b"%s %o %d \0" % (kind, found.st_mode & 0o777, found.st_size))
            self.send(b"k", number)
            return
        folders = [b""]
        listed: list[bytes] = []
        count = 0
        root = os.fsencode(path)
        while folders:
            inside = folders.pop()
            with os.scandir(os.path.join(root, inside) if inside else root) as entries:
                for entry in entries:
                    name = os.path.join(inside, entry.name) if inside else entry.name
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(found.st_mode):
                        kind = b"d"
                        folders.append(name)
                    elif stat.S_ISREG(found.st_mode):
                        kind = b"f"
                    elif stat.S_ISLNK(found.st_mode):
                        kind, name = b"l", name + b"\0" + os.readlink(os.path.join(root, name))
                    else:
                        continue
                    listed.append(b"%s %o %d %s\0" % (kind, found.st_mode & 0o777, found.st_size, name))
                    count += 1
                    if count > most:
                        folders = []
                        break
            if listed:
                self.send(b"o", number, b"".join(listed))
                listed = []
        self.send(b"k", number)


def execute(argv: "list[str]", env: "dict[str, str]") -> None:
    """Become a command, searched on the path; raises ``OSError``."""
    name = argv[0]
    if "/" in name:
        os.execve(name, argv, env)
    problem = OSError(errno.ENOENT, "command not found", name)
    for folder in env.get("PATH", "/usr/bin:/bin").split(":"):
        try:
            os.execve(folder + "/" + name, argv, env)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            problem = error
    raise problem


def content(fd: int) -> int:
    """How many bytes are in a pipe; where nobody can tell, the most that one holds."""
    try:
        import fcntl  # often a library of its own: not before it is needed

        return int.from_bytes(fcntl.ioctl(fd, FIONREAD, bytes(4)), sys.byteorder)
    except (ImportError, OSError):
        return LARGEST_PIPE


def kill_group(pid: int, signal: int) -> None:
    """Send a signal to the group that a command leads; one that is gone is no matter."""
    try:
        os.killpg(pid, signal)
    except OSError:
        try:
            os.kill(pid, signal)
        except OSError:
            pass


if __name__ == "__main__":
    hide()
    if len(sys.argv) > 1:
        import resource

        resource.setrlimit(resource.RLIMIT_NPROC, (int(sys.argv[1]), int(sys.argv[1])))
    GUEST = Guest()
    try:
        GUEST.serve()
    finally:
        for COMMAND in GUEST.commands.values():
            kill_group(COMMAND.pid, signals.SIGKILL)
