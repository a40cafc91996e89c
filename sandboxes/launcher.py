"""The process that starts bubblewrap sandboxes: small, long-lived, without rights, and the end of them all.

Invariants: it gives up root before anything else, and never gets it back, so no sandbox that it starts is
root on the host, whatever it is inside. What it mounts lies in a mount namespace of its own, so the kernel
removes it with the last of its processes; every sandbox dies with it, and it dies with its owner (the end of
a socket). Nothing that runs in a sandbox speaks to it.

It runs by itself: ``python3 -I -S -B launcher.py USER OWNER``. Requests come over a socket of sequenced
packets on file descriptor 0: a JSON object (or ``@``, and it is the first file's content) and file
descriptors beside it; each is answered by one. It tells of itself, too:
``{"ended": id, "status": …, "memory": …}`` when a sandbox's first process has ended.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import shutil
import signal
import socket
import stat
import sys
import time
from typing import Any

PLACE = "/mnt"
"""Where it mounts its own file system; it exists on every Linux, and only this process sees what is there."""

LONGEST = 1 << 17
HIGH = 64
"""Above the file descriptors that this process ever holds itself."""

GLANCE = 0.05
AGAIN = 0.005
IDLE = 0.5
"""Seconds between two looks at memory: usually, after one that found too much, and when nobody is watched."""

OWN, WHOLE = 0.2, 0.5
"""Most processor seconds that a look takes over one sandbox's shared pages, and over all sandboxes'."""

PAGE = resource.getpagesize()
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_NOSUID, MS_NODEV, MS_PRIVATE, MS_REC, MNT_DETACH = 2, 4, 1 << 18, 1 << 14, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4

DEEPEST = 400
"""How deep folders may lie in each other where they are copied: each holds two file descriptors."""

CAUTIOUS = os.O_NOFOLLOW | os.O_CLOEXEC
FOLDER = os.O_RDONLY | os.O_DIRECTORY | CAUTIOUS
CHANGED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EWOULDBLOCK, errno.EINVAL)
"""Errors of what has become something else since it was looked at."""

libc = ctypes.CDLL(None, use_errno=True)


class Launched:
    """One sandbox.

    Attributes:
        id: Its name.
        pid: Of bubblewrap's outer process, which nobody inside can reach.
        memory: Bytes that all its processes may hold; 0: somebody else counts.
        killed: How many of its processes were killed because they held too much.
        suspected: Whether it held too much at the last look.
    """

    def __init__(self, id: str, pid: int, memory: int) -> None:
        self.id, self.pid, self.memory, self.killed = id, pid, memory, 0
        self.suspected = False


class Launcher:
    """Serves one owner."""

    def __init__(self, owner: socket.socket, pid: int) -> None:
        self.owner, self.owned_by = owner, pid
        self.running: dict[str, Launched] = {}
        self.by_pid: dict[int, Launched] = {}
        self.next_look = 0.0
        self.first = 0

    def serve(self) -> None:
        """Answer until the owner goes away; then everything ends."""
        woken, waking = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(waking, False)
        signal.set_wakeup_fd(waking)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(self.owner, select.POLLIN)
        poll.register(woken, select.POLLIN)
        gone = -1
        with contextlib.suppress(AttributeError, OSError):  # an old Python or kernel has none
            gone = os.pidfd_open(self.owned_by)
            poll.register(gone, select.POLLIN)
        # Its end of the socket may live on in a child that it forked.
        while os.getppid() == self.owned_by:
            for fd, _ in poll.poll(self.patience()):
                if fd == gone:
                    return
                if fd == woken:
                    with contextlib.suppress(BlockingIOError):
                        os.read(woken, 4096)
                elif not self.answer():
                    return
            self.reap()
            self.look()

    def patience(self) -> int | None:
        """Milliseconds until memory is looked at again."""
        return max(1, int(1000 * (self.next_look - time.monotonic()))) if self.running else None

    def answer(self) -> bool:
        """Take one request; ``False`` when the owner is gone."""
        try:
            data, ancillary, _, _ = self.owner.recvmsg(LONGEST, 4096)
        except ConnectionError:
            return False
        if not data:
            return False
        fds: array.array[int] = array.array("i")
        for _, _, content in ancillary:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if data == b"@":  # too long for a packet
            with os.fdopen(fds.pop(0), "rb") as whole:
                data = whole.read()
        request = json.loads(data)
        try:
            told = getattr(self, "do_" + request.pop("do"))(fds=list(fds), **request)
        except Refused as error:
            told = {"refused": str(error)}
        except OSError as error:
            told = {"error": f"{error.filename or 'it failed'}: {error.strerror}"}
        except Exception as error:
            told = {"error": repr(error)}
        for fd in fds:
            os.close(fd)
        self.send(dict(told or {}, answer=True))
        return True

    def send(self, told: dict[str, Any]) -> None:
        """Tell the owner something; it always reads."""
        with contextlib.suppress(ConnectionError):
            self.owner.sendmsg([json.dumps(told).encode()])

    # Requests -------------------------------------------------------------------------------

    def do_make(self, fds: list[int], place: str, disk: int, inodes: int) -> None:
        """A file system for a sandbox's files, of ``disk`` bytes, with ``work`` and ``tmp`` in it."""
        path = os.path.join(PLACE, place)
        os.mkdir(path)
        options = f"size={disk},nr_inodes={inodes},mode=0700"
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, options)
        for name in ("work", "tmp"):
            os.mkdir(os.path.join(path, name))

    def do_drop(self, fds: list[int], place: str) -> None:
        """Unmount a sandbox's files; they are gone."""
        path = os.path.join(PLACE, place)
        libc.umount2(path.encode(), MNT_DETACH)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)

    def do_see(self, fds: list[int], place: str) -> dict[str, Any]:
        """Whether a folder is kept."""
        return {"there": os.path.isdir(os.path.join(PLACE, place))}

    def do_put(self, fds: list[int], name: str) -> None:
        """Keep a program or a file of ours, sent as a file descriptor."""
        path = os.path.join(PLACE, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as sink, os.fdopen(os.dup(fds[0]), "rb") as content:
            shutil.copyfileobj(content, sink)
        os.chmod(path, 0o555)

    def do_folder(self, fds: list[int], name: str) -> None:
        """Keep an empty folder of ours."""
        os.makedirs(os.path.join(PLACE, name), exist_ok=True)

    def do_link(self, fds: list[int], name: str, target: str) -> None:
        """Keep a link of ours."""
        os.symlink(target, os.path.join(PLACE, name))

    def do_start(
        self,
        fds: list[int],
        id: str,
        argv: list[str],
        limits: dict[str, int],
        memory: int,
        groups: list[str],
        kept: list[int],
    ) -> dict[str, Any]:
        """Start bubblewrap: standard streams are the first three file descriptors; ``kept`` ones stay open.

        ``{N}`` in an argument is the N-th file descriptor as the new process knows it; ``{place}`` is ours.
        """
        words = [word.replace("{place}", PLACE) for word in argv]
        for at, number in enumerate(kept):
            words = [word.replace("{" + str(number) + "}", str(3 + at)) for word in words]
        own = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                become(own, words, [*fds[:3], *(fds[number] for number in kept)], limits, groups)
            except OSError as error:
                os.write(2, f"cannot start: {error}\n".encode())
            finally:
                os._exit(126)
        launched = Launched(id, pid, memory)
        self.running[id] = self.by_pid[pid] = launched
        self.next_look = min(self.next_look or 0, time.monotonic() + GLANCE)
        return {"pid": pid}

    def do_stop(self, fds: list[int], id: str) -> None:
        """Kill a sandbox; its end is told as any other."""
        launched = self.running.get(id)
        if launched is not None:
            kill_group(launched.pid)
            os.kill(launched.pid, signal.SIGKILL)

    def do_copy(self, fds: list[int], source: str, target: str) -> None:
        """Copy a sandbox's files, or a folder of the host, into a sandbox's files."""
        try:
            copy(os.path.join(PLACE, source), os.path.join(PLACE, target))
        except OSError as error:
            # A sandbox's files fit into as much room again, unless the code inside sees that they do not.
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and not os.path.isabs(source):
                raise Refused("it holds more than it may") from error
            raise

    def do_unpack(self, fds: list[int], target: str) -> None:
        """Unpack an archive of the owner's into a sandbox's files."""
        import tarfile

        with os.fdopen(os.dup(fds[0]), "rb") as content, tarfile.open(fileobj=content, mode="r:") as archive:
            archive.extraction_filter = lambda member, path: member  # it was made by the owner
            archive.extractall(os.path.join(PLACE, target))

    # Ends -----------------------------------------------------------------------------------

    def reap(self) -> None:
        """Tell of sandboxes that ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            launched = self.by_pid.pop(pid, None)
            if launched is not None:
                del self.running[launched.id]
                kill_group(pid)
                code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                self.send({"ended": launched.id, "status": code, "memory": launched.killed})

    def look(self) -> None:
        """Kill the largest processes of sandboxes that hold too much memory.

        One look costs a pass over /proc, so looks take this process a fifth of a processor, or little more.
        What is found twice counts: a child that has yet to become another program has its parent's memory.
        """
        now = time.monotonic()
        if not self.running or now < self.next_look:
            return
        begun = time.process_time()
        watched = [launched for launched in self.running.values() if launched.memory]
        again = False
        if watched:
            children, held = processes()
            # The one for whom there was no time begins.
            self.first %= len(watched)
            for at, launched in enumerate(watched[self.first :] + watched[: self.first]):
                # Without bubblewrap's outer process: what it has to tell is how the others ended.
                there = {pid: held.get(pid, 0) for pid in descendants(launched.pid, children)[1:]}
                if sum(there.values()) <= launched.memory:
                    launched.suspected = False
                    continue
                left = WHOLE - (time.process_time() - begun)
                if left <= 0:
                    self.first += at
                    break
                found = relieve(launched.memory, there, min(OWN, left), launched.suspected)
                launched.killed += max(0, found)
                again = again or (found < 0)
                launched.suspected = found != 0
        pause = max(GLANCE if watched else IDLE, 4 * (time.process_time() - begun))
        self.next_look = time.monotonic() + (AGAIN if again else pause)


def become(parent: int, words: list[str], fds: list[int], limits: dict[str, int], groups: list[str]) -> None:
    """In the child: join control groups, set limits, and become bubblewrap, with ``fds`` as 0, 1, 2, ..."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it was asked to take this one along
        return
    # Two steps, as a number may be one of those that are still to be moved. Nothing else is inherited.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH) for fd in fds]
    for number, fd in enumerate(high):
        os.dup2(fd, number)
    os.closerange(len(fds), HIGH)
    for group in groups:
        with open(os.path.join(group, "cgroup.procs"), "w") as procs:
            procs.write("0")
    signal.set_wakeup_fd(-1)
    # What is ignored here would be ignored by every command inside: `kill` and `timeout` would do nothing.
    for signal_ in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_, signal.SIG_DFL)
    os.setsid()
    for name, most in limits.items():
        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    os.execve(words[0], words, {})


def kill_group(pid: int) -> None:
    """Kill what bubblewrap's outer process leads: the inner one may not yet die with it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def processes() -> tuple[dict[int, list[int]], dict[int, int]]:
    """Children by process, and bytes held by process, of the whole machine in one pass.

    Shared pages are counted once for each who maps them: what is held is never underestimated.
    """
    children: dict[int, list[int]] = {}
    held: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as place:
                    fields = place.read().rpartition(b")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(name))
            held[int(name)] = int(fields[21]) * PAGE
    return children, held


def relieve(most: int, held: dict[int, int], seconds: float, sure: bool) -> int:
    """Kill the largest of some processes until they hold ``most`` bytes together.

    A page that several of them share is counted once, which costs the more the more they map: a process that
    maps more than ``most`` by itself is not asked, and after ``seconds`` of this one's time none is. All that
    these map counts.

    Returns:
        How many were killed; -1: they hold too much, and nobody was killed, as it is not ``sure``.
    """
    until = time.process_time() + seconds
    total = killed = 0
    seen: list[tuple[int, int]] = []
    for pid in sorted(held, key=lambda pid: held[pid], reverse=True):
        share = held[pid]
        if share <= most and time.process_time() < until:
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/smaps_rollup", "rb") as place:
                share = int(place.read().partition(b"\nPss:")[2].split(None, 1)[0]) * 1024
        total += share
        seen.append((share, pid))
        if total > most and not sure:
            return -1
        while total > most:  # at once: it grows meanwhile
            largest = max(seen)
            seen.remove(largest)
            total -= largest[0]
            killed += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(largest[1], signal.SIGKILL)
    return killed


def descendants(pid: int, children: dict[int, list[int]]) -> list[int]:
    """A process and all below it."""
    found: list[int] = []
    rest = [pid]
    while rest:
        found.append(rest.pop())
        rest += children.get(found[-1], ())
    return found


class Refused(Exception):
    """What is in a sandbox's files makes a request impossible."""


def copy(source: str, target: str) -> None:
    """Copy what is in a folder into an empty one: files with their times, folders, links; holes stay holes.

    What is copied may change under this one's eyes, by the hand of code that hopes to be given another file
    of the host: folders are entered by file descriptors, no link is ever followed, and what is not there any
    more, or is something else by now, is left out.

    Raises:
        Refused: It lies deeper than :data:`DEEPEST`.
    """
    os.makedirs(target, exist_ok=True)
    reading = os.open(source, FOLDER)
    try:
        writing = os.open(target, FOLDER)
        try:
            copy_folder(reading, writing, "", 0, Copied(writing))
        finally:
            os.close(writing)
    finally:
        os.close(reading)


class Copied:
    """Files with several names, so that each is copied once.

    Args:
        root: The folder that is copied into, as a file descriptor.
    """

    def __init__(self, root: int) -> None:
        self.root = root
        self.names: dict[tuple[int, int], str] = {}


def copy_folder(reading: int, writing: int, path: str, depth: int, copied: Copied) -> None:
    """Copy what is in one folder into another; both are file descriptors, and ``path`` is their own."""
    if depth > DEEPEST:
        raise Refused(f"its folders lie in each other more than {DEEPEST} deep")
    for name in os.listdir(reading):
        inside = f"{path}/{name}" if path else name
        try:
            found = os.lstat(name, dir_fd=reading)
            if stat.S_ISDIR(found.st_mode):
                opened = os.open(name, FOLDER, dir_fd=reading)
            elif stat.S_ISREG(found.st_mode):
                # Not blocking: it may be a pipe by now, or leased by somebody who does not let it go.
                opened = os.open(name, os.O_RDONLY | CAUTIOUS | os.O_NONBLOCK, dir_fd=reading)
            elif stat.S_ISLNK(found.st_mode):
                os.symlink(os.readlink(name, dir_fd=reading), name, dir_fd=writing)
                continue
            else:
                continue
        except OSError as error:
            if error.errno in CHANGED:
                continue
            raise
        try:
            found = os.fstat(opened)
            mode = stat.S_IMODE(found.st_mode) & 0o777
            if stat.S_ISDIR(found.st_mode):
                os.mkdir(name, 0o700, dir_fd=writing)
                made = os.open(name, FOLDER, dir_fd=writing)
                try:
                    copy_folder(opened, made, inside, depth + 1, copied)
                    os.fchmod(made, mode | 0o700)
                finally:
                    os.close(made)
            elif stat.S_ISREG(found.st_mode):
                key = found.st_dev, found.st_ino
                if found.st_nlink > 1 and key in copied.names:
                    with contextlib.suppress(OSError):
                        os.link(copied.names[key], name, src_dir_fd=copied.root, dst_dir_fd=writing)
                        continue
                copied.names[key] = inside
                made = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | CAUTIOUS, 0o600, dir_fd=writing)
                try:
                    copy_content(opened, made, found)
                    os.fchmod(made, mode)
                    os.utime(made, ns=(found.st_atime_ns, found.st_mtime_ns))
                finally:
                    os.close(made)
        finally:
            os.close(opened)


def copy_content(reading: int, writing: int, found: os.stat_result) -> None:
    """Copy what was found of a file into an empty one, without its holes."""
    size, at = found.st_size, 0
    if found.st_blocks * 512 >= size:  # it has none
        while at < size and (done := os.sendfile(writing, reading, None, size - at)):
            at += done
        return
    while at < size:
        try:
            at = os.lseek(reading, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole to the end
                break
            raise
        until = min(size, os.lseek(reading, at, os.SEEK_HOLE))
        os.lseek(writing, at, os.SEEK_SET)
        while at < until:
            done = os.sendfile(writing, reading, at, until - at)
            if not done:  # it has become shorter
                return
            at += done
    os.ftruncate(writing, size)


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    """Mount, or raise ``OSError``."""
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def confine(uid: int) -> None:
    """Become an ordinary user in namespaces of one's own, where mounting is allowed and seen by nobody else.

    Args:
        uid: Whom to become; 0: whoever this is already.

    Raises:
        OSError: The kernel does not allow it.
    """
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    own, group = os.getuid(), os.getgid()
    if own == 0:
        raise OSError(errno.EPERM, "refused: sandboxes are never started as root")
    # Whoever changed its user may not write its own maps otherwise.
    libc.prctl(PR_SET_DUMPABLE, 1)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "user namespaces")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{own} {own} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open("/proc/self/" + name, "w") as place:
            place.write(text)
    # What a user may watch of file systems is counted for all its namespaces together: half is left to it.
    for name in ("instances", "watches"):
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/sys/fs/inotify/max_user_{name}") as place:
                most = int(place.read())
            with open(f"/proc/sys/user/max_inotify_{name}", "w") as place:
                place.write(str(most // 2))
    mount("none", "/", "none", MS_PRIVATE | MS_REC, "")
    mount("tmpfs", PLACE, "tmpfs", MS_NOSUID | MS_NODEV, "size=67108864,mode=0755")


def main(uid: int, pid: int) -> None:
    """Serve the owner, process ``pid``, at the other end of file descriptor 0."""
    owner = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o022)
    os.chdir("/")
    if uid:
        import tarfile  # noqa: F401 - while Python's own files can be read: they may be root's alone
    launcher = Launcher(owner, pid)
    try:
        confine(uid)
    except OSError as error:
        launcher.send({"error": f"{error.filename or ''}: {error.strerror}", "answer": True})
        return
    launcher.send({"answer": True, "uid": os.getuid()})
    launcher.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
