"""What hostile code tries from inside a sandbox: one function an attack, which reports what it got.

It runs by itself there, with any Python from 3.7 on: ``python3 attacks.py NAME [ARGUMENTS as JSON]``. Each
line that it prints is a JSON value; what it claims is believed only where it admits to have failed.
"""

from __future__ import annotations

# ruff: noqa: SIM105, SIM115, SIM905, UP031 - it is short, and old Pythons run it too
import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
import signal
import socket
import struct
import sys
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

# Numbers that the C library gives no function for: (x86-64, arm64 and others of the common table).
NUMBERS = {
    "ptrace": (101, 117), "mount": (165, 40), "umount2": (166, 39), "unshare": (272, 97), "setns": (308, 268),
    "chroot": (161, 51), "pivot_root": (155, 41), "clone": (56, 220), "clone3": (435, 435), "bpf": (321, 280),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282), "perf_event_open": (298, 241), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "fsopen": (430, 430), "fsmount": (432, 432), "open_tree": (428, 428), "move_mount": (429, 429),
    "mount_setattr": (442, 442), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "reboot": (169, 142), "swapon": (167, 224),
    "quotactl": (179, 60), "syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "sethostname": (170, 161), "acct": (163, 89), "fanotify_init": (300, 262), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "memfd_create": (319, 279),
    "lookup_dcookie": (212, 18),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "socket": (41, 198), "ioctl": (16, 29),
    "setuid": (105, 146), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
}  # fmt: skip
COLUMN = 0 if platform.machine() == "x86_64" else 1
ATTACKS = {}


def attack(function):
    ATTACKS[function.__name__] = function
    return function


def call(name, *arguments):
    """``[result, errno]`` of a system call; ``None`` where this machine has none of that name."""
    number = NUMBERS[name][COLUMN]
    if number is None:
        return None
    given = [ctypes.c_long(part) if isinstance(part, int) else part for part in arguments]
    ctypes.set_errno(0)
    done = libc.syscall(ctypes.c_long(number), *given)
    return [done, ctypes.get_errno() if done < 0 else 0]


def tried(function, *arguments):
    """What a function gave, or the error's number."""
    try:
        return ["done", str(function(*arguments))[:200]]
    except OSError as error:
        return ["refused", error.errno]
    except Exception as error:
        return ["refused", repr(error)[:200]]


def apart(function, seconds=5.0):
    """How a child that calls ``function`` ended: ``[exit status or -signal, what it wrote]``."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            os.write(write, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(write)
    until = time.monotonic() + seconds
    status = None
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        status = None
        time.sleep(0.01)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as told:
        said = told.read(10_000).decode(errors="replace")
    return [-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), said]


# The kernel -----------------------------------------------------------------------------------


@attack
def calls():
    """System calls that reach out, each with arguments that would be good ones."""
    buffer = ctypes.create_string_buffer(4096)
    handle = struct.pack("IiQ", 8, 1, 2)
    found = {}

    def put(name, *arguments, **more):
        found[more.get("label", name)] = apart(lambda: call(name, *arguments))

    put("mount", b"none", b"/tmp", b"tmpfs", 0, None)
    put("mount", b"/", b"/tmp", None, 4096, None, label="mount --bind")
    put("mount", None, b"/", None, 32 | 4096, None, label="mount -o remount,rw")
    put("umount2", b"/proc", 2)
    for name, flag in (
        ("time", 0x80), ("mount", 0x20000), ("cgroup", 0x2000000), ("uts", 0x4000000), ("ipc", 0x8000000),
        ("user", 0x10000000), ("pid", 0x20000000), ("net", 0x40000000),
    ):  # fmt: skip
        put("unshare", flag, label="unshare " + name)
        if flag != 0x80:
            put("clone", flag | signal.SIGCHLD, 0, 0, 0, 0, label="clone " + name)
            put("clone", flag | signal.SIGCHLD | 1 << 40, 0, 0, 0, 0, label="clone high bits " + name)
    for flag in (0, 0x10000000):
        clone_arguments = struct.pack("11Q", flag, 0, 0, 0, signal.SIGCHLD, *[0] * 6)
        put("clone3", clone_arguments, len(clone_arguments), label=f"clone3 {flag:x}")

    def entered(pid):
        try:
            fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
        except OSError as error:
            return [-1, error.errno]
        return call("setns", fd, 0)

    found["setns"] = apart(lambda: entered(1))
    put("chroot", b"/tmp")
    put("pivot_root", b"/tmp", b"/tmp")
    put("name_to_handle_at", -100, b"/usr", ctypes.create_string_buffer(handle + b"\0" * 200), buffer, 0)
    put("open_by_handle_at", os.open("/", os.O_RDONLY), handle + b"\2\0\0\0\0\0\0\0", os.O_RDONLY)
    put("fsopen", b"tmpfs", 0)
    put("fsmount", 0, 0, 0)
    put("open_tree", -100, b"/usr", 1)
    put("move_mount", -100, b"/usr", -100, b"/tmp", 0)
    put("mount_setattr", -100, b"/", 0, buffer, 32)
    put("keyctl", 0, -3, 1)
    put("keyctl", 1, b"red", label="keyctl join session")
    put("add_key", b"user", b"red", b"secret", 6, -3)
    put("request_key", b"user", b"red", None, -3)
    put("bpf", 0, struct.pack("IIIII", 2, 4, 4, 1, 0) + b"\0" * 100, 72)
    put("io_uring_setup", 1, ctypes.create_string_buffer(200))
    put("userfaultfd", 1)
    put("perf_event_open", struct.pack("IIQ", 1, 112, 0) + b"\0" * 20 + struct.pack("Q", 0x61) + b"\0" * 80,
        0, -1, -1, 0)  # fmt: skip
    put("ptrace", 0, 0, 0, 0, label="ptrace traceme")
    put("ptrace", 16, 1, 0, 0, label="ptrace attach 1")
    put("ptrace", 0x4206, os.getppid(), 0, 0, label="ptrace seize")
    vector = struct.pack("QQ", ctypes.addressof(buffer), 16)
    put("process_vm_readv", os.getppid(), vector, 1, vector, 1, 0)
    put("process_vm_writev", os.getppid(), vector, 1, vector, 1, 0)
    put("kcmp", os.getpid(), 1, 0, 0, 0)
    put("pidfd_getfd", os.open("/dev/null", os.O_RDONLY), 0, 0)
    put("init_module", b"", 0, b"")
    put("finit_module", os.open("/dev/null", os.O_RDONLY), b"", 0)
    put("delete_module", b"ext4", 2048)
    put("kexec_load", 0, 0, None, 0)
    put("reboot", 0xFEE1DEAD, 672274793, 0, None)
    put("swapon", b"/tmp/swap", 0)
    put("quotactl", 0x80000100, None, 0, buffer)
    put("syslog", 3, buffer, 100)
    put("settimeofday", struct.pack("qq", 0, 0), None)
    put("clock_settime", 0, struct.pack("qq", 0, 0))
    put("sethostname", b"red", 3)
    put("acct", b"/tmp/acct")
    put("fanotify_init", 0, 0)
    put("lookup_dcookie", 1, buffer, 100)
    put("iopl", 3)
    put("ioperm", 0, 10, 1)
    put("modify_ldt", 0, buffer, 64)
    put("setuid", 0)
    return found


@attack
def families():
    """Sockets of every family and kind, also with bits that the kernel does not look at."""
    found = {}
    for family in range(0, 64):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            for high in (0, 1 << 32, -1 << 32):
                done = call("socket", family | high, kind, 0)
                if done[0] >= 0:
                    found.setdefault(str(family), []).append([kind, high])
                    os.close(done[0])
    return found


@attack
def raw():
    """Raw and packet sockets, and what names interfaces."""
    found = {"interfaces": [name for _, name in socket.if_nameindex()]}
    for name, family, kind, protocol in (
        ("icmp", socket.AF_INET, socket.SOCK_RAW, 1), ("raw6", socket.AF_INET6, socket.SOCK_RAW, 58),
        ("packet", 17, socket.SOCK_RAW, 0x0300), ("ping", socket.AF_INET, socket.SOCK_DGRAM, 1),
    ):  # fmt: skip
        found[name] = tried(socket.socket, family, kind, protocol)
    return found


@attack
def terminal():
    """Input pushed into a terminal."""
    _leader, follower = os.openpty()
    found = {}
    for name, request in (("TIOCSTI", 0x5412), ("TIOCLINUX", 0x541C)):
        for high in (0, 1 << 32, -1 << 32):
            found[f"{name} {high & 2**64 - 1:x}"] = call("ioctl", follower, request | high, b"\3x")
    found["tty"] = tried(open, "/dev/tty")
    return found


@attack
def foreign():
    """System calls in the calling conventions of 32 bits, on a machine of 64."""
    if platform.machine() != "x86_64":
        return {}

    def entered(code):
        flags, prot = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        place = mmap.mmap(-1, 4096, flags, prot)
        place.write(code)
        address = ctypes.addressof(ctypes.c_char.from_buffer(place))
        return ctypes.CFUNCTYPE(ctypes.c_long)(address)()

    getpid, ptrace = b"\xb8\x14\0\0\0\xcd\x80\xc3", b"\xb8\x1a\0\0\0\x31\xdb\xcd\x80\xc3"
    return {
        "i386 getpid": apart(lambda: entered(getpid)),
        "i386 ptrace": apart(lambda: entered(ptrace)),
        "x32 getpid": apart(lambda: libc.syscall(ctypes.c_long(0x40000000 | 39))),
        "x32 ptrace": apart(lambda: libc.syscall(ctypes.c_long(0x40000000 | 521), 0, 0, 0, 0)),
    }


@attack
def privileges():
    """What the kernel says of this process."""
    fields = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines() if ":" in line)
    names = [
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Uid",
        "Gid",
        "Groups",
    ]
    found = {name: fields[name].split() for name in names}
    found["ids"] = [os.getuid(), os.geteuid(), os.getgid(), os.getegid()]
    found["become root"] = tried(os.setuid, 0)
    found["open files"] = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
    found["environment"] = dict(os.environ)
    return found


@attack
def setuid(marker):
    """Programs that would make somebody else of who starts them."""
    import subprocess

    found = {}
    for folder in ("/usr/bin", "/usr/sbin", "/usr/lib"):
        for name in sorted(os.listdir(folder)):
            place = os.path.join(folder, name)
            try:
                mode = os.stat(place).st_mode
            except OSError:
                continue
            if mode & 0o6000 and os.path.isfile(place):
                found[place] = oct(mode)
    done = {}
    for command in (["su", "-c", "id -u"], ["mount", "-t", "tmpfs", "none", "/tmp"], ["passwd", "-S", "root"],
                    ["ping", "-V"], ["newgrp", "root"]):  # fmt: skip
        try:
            ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=5)
            done[command[0]] = [ran.returncode, ran.stdout.decode(errors="replace")[:100]]
        except (OSError, subprocess.TimeoutExpired) as error:
            done[command[0]] = [-1, repr(error)]
    own = "/tmp/own"
    with open(own, "wb") as sink:
        sink.write(open("/usr/bin/id", "rb").read())
    os.chmod(own, 0o6755)
    ran = subprocess.run([own, "-u"], capture_output=True)
    return {
        "there": found,
        "ran": done,
        "own": [ran.returncode, ran.stdout.decode().strip()],
        "marker": marker,
    }


# Files and processes of the host --------------------------------------------------------------


@attack
def files(paths, token):
    """Files of the host, by every way that may lead to them."""
    found, hits = {}, []
    roots = [
        "",
        "/proc/1/root",
        "/proc/self/root",
        "/proc/1/cwd",
        "/newroot",
        "/oldroot",
        "/..",
        "/mnt",
        "/work/" + "../" * 20,
    ]
    pids = [name for name in os.listdir("/proc") if name.isdigit()]
    roots += [f"/proc/{pid}/{what}" for pid in pids[:20] for what in ("root", "cwd")]
    for root in roots:
        for path in paths:
            place = root + path
            try:
                if os.path.isdir(place):
                    found[place] = sorted(os.listdir(place))[:5]
                    continue
                with open(place, "rb") as source:
                    content = source.read(4096)
            except OSError:
                continue
            found[place] = content[:60].decode(errors="replace")
            if token.encode() in content:
                hits.append(place)
    for folder, folders, names in os.walk("/"):
        if folder == "/":
            folders[:] = [name for name in folders if name not in ("usr", "proc")]
        hits += [os.path.join(folder, name) for name in names if token in name]
    mounts = [line.split(" - ") for line in open("/proc/self/mountinfo").read().splitlines()]
    kinds = sorted({(mount[0].split()[4], mount[1].split()[0]) for mount in mounts})
    return {"found": found, "hits": hits, "top": sorted(os.listdir("/")), "mounts": kinds}


@attack
def readonly():
    """Folders that are not this sandbox's, written to."""
    found = {}
    for place in (
        "/ /usr /usr/bin /usr/lib /usr/local /etc /etc/ssl /bin /lib /sbin /run /var /dev /proc /sys /root "
        "/home /opt /mnt /boot"
    ).split():
        found[place] = tried(open, place + "/red", "w")
    for place in ("/etc/passwd", "/etc/hosts", "/etc/ld.so.cache", "/etc/agentgym", "/usr/bin/id", "/bin/sh"):
        found[place] = tried(open, place, "r+")
        found["rm " + place] = tried(os.unlink, place)
        found["mv " + place] = tried(os.rename, place, "/tmp/red")
    return found


@attack
def settings():
    """The kernel's settings and switches, in /proc and /sys."""
    found = {}
    for place, text in (
        ("/proc/sys/kernel/core_pattern", "|/tmp/red %p"), ("/proc/sysrq-trigger", "h"),
        ("/proc/sys/kernel/modprobe", "/tmp/red"), ("/proc/sys/kernel/hostname", "red"),
        ("/proc/sys/vm/overcommit_memory", "1"), ("/proc/sys/vm/drop_caches", "1"),
        ("/proc/sys/kernel/randomize_va_space", "0"), ("/proc/sys/fs/suid_dumpable", "2"),
        ("/proc/sys/kernel/unprivileged_bpf_disabled", "0"), ("/proc/sys/user/max_user_namespaces", "100"),
        ("/proc/sys/net/ipv4/ip_forward", "1"), ("/proc/sys/kernel/pid_max", "100"),
        ("/proc/sys/fs/binfmt_misc/register", ":red:M::red::/tmp/red:"),
        ("/proc/self/oom_score_adj", "-1000"),
        ("/proc/1/oom_score_adj", "-1000"), ("/proc/self/uid_map", "0 0 1"), ("/proc/1/uid_map", "0 0 1"),
        ("/proc/self/loginuid", "0"), ("/proc/irq/default_smp_affinity", "1"), ("/proc/mtrr", "base=0"),
        ("/sys/kernel/uevent_helper", "/tmp/red"), ("/sys/power/state", "mem"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "-1"), ("/sys/fs/cgroup/cgroup.procs", "1"),
        ("/sys/kernel/debug/tracing/tracing_on", "1"), ("/sys/kernel/security/apparmor/.remove", "x"),
    ):  # fmt: skip
        try:
            with open(place, "w") as sink:
                sink.write(text)
            found[place] = ["done", ""]
        except OSError as error:
            found[place] = ["refused", error.errno]
    for place in ("/proc/kcore", "/proc/kmsg", "/proc/kpagecount", "/proc/vmallocinfo", "/proc/slabinfo",
                  "/sys/kernel/debug", "/sys/kernel/security", "/sys/firmware"):  # fmt: skip
        try:
            if os.path.isdir(place):
                if not os.listdir(place):
                    raise OSError(errno.ENOENT, "it is empty")
            else:
                fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
                os.read(fd, 10)
            found["read " + place] = ["done", ""]
        except OSError as error:
            found["read " + place] = ["refused", error.errno]
    return found


@attack
def devices():
    """Devices, and making some."""
    found = {}
    for name in (
        "mem kmem port kmsg kvm fuse loop0 loop-control vda sda nvme0n1 net/tun vhost-vsock vsock "
        "userfaultfd uinput autofs cuse snapshot hpet rtc0 input/event0 dri/card0 nvidia0 tty0 console"
    ).split():
        found[name] = tried(os.open, "/dev/" + name, os.O_RDWR | os.O_NONBLOCK)
    for name, device in (("mem", (1, 1)), ("vda", (254, 0)), ("kmsg", (1, 11)), ("kvm", (10, 232))):
        place = "/tmp/node-" + name

        def made(place=place, device=device):
            os.mknod(place, 0o600 | 0o020000, os.makedev(*device))
            return os.open(place, os.O_RDWR)

        found["mknod " + name] = tried(made)
    found["there"] = sorted(os.listdir("/dev"))
    return found


@attack
def kill(victims):
    """Signals to processes of the host."""
    found = {str(pid): tried(os.kill, pid, signal.SIGKILL) for pid in victims}
    pidfds = {}
    for pid in victims:
        done = call("pidfd_open", pid, 0)
        pidfds[str(pid)] = done
    seen = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGTERM):
        tried(os.kill, 1, number)
    pid = os.fork()
    if pid == 0:  # everything but this one's parent, which reports
        for other in range(2, 33_000):
            if other not in (os.getpid(), os.getppid()):
                tried(os.kill, other, signal.SIGKILL)
        os._exit(0)
    os.waitpid(pid, 0)
    return {"kill": found, "pidfd": pidfds, "seen": seen}


@attack
def everybody():
    """Kills all that it may, itself included."""
    if os.fork() == 0:
        time.sleep(30)
    os.kill(-1, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


@attack
def memories(victims):
    """The memory of other processes, by their files."""
    found = {}
    for pid in victims:
        for name in ("mem", "maps", "environ", "fd", "cwd", "exe"):
            place = "/proc/%d/%s" % (pid, name)
            found[place] = tried(
                os.listdir if name == "fd" else os.readlink if name in ("cwd", "exe") else open, place
            )
    return found


@attack
def crash():
    """Writes rubbish over the worker's memory."""
    done = []
    with open("/proc/1/maps") as places, open("/proc/1/mem", "r+b", buffering=0) as memory:
        for line in places:
            span, mode = line.split()[:2]
            if mode.startswith("rw"):
                start, end = (int(part, 16) for part in span.split("-"))
                try:
                    memory.seek(start)
                    memory.write(b"\xff" * min(end - start, 1 << 20))
                    done.append(span)
                except OSError:
                    pass
    time.sleep(0.2)
    return done


# The network ----------------------------------------------------------------------------------


@attack
def network(tcp, udp, tcp6, abstract, path, hosts):
    """Services of the host, each of which would note a visit."""
    found = {}

    def connected(family, kind, address, message=b"red"):
        with socket.socket(family, kind) as made:
            made.settimeout(1.0)
            made.connect(address)
            made.sendall(message)
        return "connected"

    for host in hosts:
        found["tcp " + host] = tried(connected, socket.AF_INET, socket.SOCK_STREAM, (host, tcp))
        found["udp " + host] = tried(connected, socket.AF_INET, socket.SOCK_DGRAM, (host, udp))
    found["tcp6"] = tried(connected, socket.AF_INET6, socket.SOCK_STREAM, ("::1", tcp6))
    found["abstract"] = tried(connected, socket.AF_UNIX, socket.SOCK_STREAM, "\0" + abstract)
    found["path"] = tried(connected, socket.AF_UNIX, socket.SOCK_STREAM, path)
    for place in (
        "/run/docker.sock",
        "/var/run/docker.sock",
        "/run/dbus/system_bus_socket",
        "/run/systemd/private",
    ):
        found[place] = tried(connected, socket.AF_UNIX, socket.SOCK_STREAM, place)
    found["dns"] = tried(socket.getaddrinfo, "pypi.org", 443)
    for host in ("1.1.1.1", "169.254.169.254", "255.255.255.255"):
        found["out " + host] = tried(connected, socket.AF_INET, socket.SOCK_STREAM, (host, 80))
        found["out udp " + host] = tried(connected, socket.AF_INET, socket.SOCK_DGRAM, (host, 53))
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as made:
            made.settimeout(1.0)
            made.bind((0, 0))
            found["netlink link up"] = [
                "sent",
                made.send(struct.pack("IHHII", 32, 16, 5, 1, 0) + struct.pack("BBHiII", 0, 0, 0, 1, 1, 1)),
            ]
            found["netlink link up"].append(struct.unpack("i", made.recv(4096)[16:20])[0])
    except OSError as error:
        found["netlink link up"] = ["refused", error.errno]
    return found


# Limits ---------------------------------------------------------------------------------------


@attack
def forks(seconds):
    """As many processes as can be, each of which makes more."""
    until = time.monotonic() + seconds
    read, write = os.pipe()
    os.set_blocking(write, False)
    while time.monotonic() < until:
        try:
            if os.fork() == 0:
                os.close(read)
                with contextlib.suppress(BlockingIOError):
                    os.write(write, b"x")
        except OSError:
            if os.getpid() < 0:
                break
            time.sleep(0.01)
    return None


@attack
def threads():
    """As many threads as can be."""
    made = 0
    try:
        while made < 5000:
            threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
            made += 1
    except (RuntimeError, OSError):
        pass
    print(json.dumps({"made": made}), flush=True)
    os._exit(0)


@attack
def memory(mib, seconds):
    """Memory in one process; says after each 16 MiB how much it has."""
    held = []
    for number in range(mib // 16):
        piece = bytearray(16 << 20)
        for at in range(0, len(piece), 4096):
            piece[at] = 1
        held.append(piece)
        if number % 4 == 3:
            print(json.dumps({"held": (number + 1) * 16}), flush=True)
    time.sleep(seconds)
    return {"held": len(held) * 16}


@attack
def many(count, mib, seconds):
    """Memory in several processes at once; says how many of them were left to end by themselves."""
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            try:
                piece = bytearray(mib << 20)
                for at in range(0, len(piece), 4096):
                    piece[at] = 1
                time.sleep(seconds)
            except MemoryError:
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    return {"whole": sum(os.waitpid(pid, 0)[1] == 0 for pid in pids)}


@attack
def heirs(count, mib, seconds):
    """Many processes that have the same memory, which is there once; says how many were left to end."""
    piece = bytearray(b"x" * (mib << 20))
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            time.sleep(seconds)
            os._exit(len(piece) >> 20 != mib)
        pids.append(pid)
    return {"whole": sum(os.waitpid(pid, 0)[1] == 0 for pid in pids)}


@attack
def shared(kind, mib):
    """Memory that is no process's: files in memory, System V segments, messages."""
    got = 0
    piece = b"x" * (1 << 20)
    try:
        if kind == "memfd":
            held = []
            while got < mib:
                done = call("memfd_create", b"red", 0)
                if done[0] < 0:
                    return {"got": got, "errno": done[1]}
                held.append(done[0])
                for _ in range(32):
                    os.write(done[0], piece)
                    got += 1
        elif kind == "sysv":
            libc.shmat.restype = ctypes.c_void_p
            while got < mib:
                done = call("shmget", 0, 32 << 20, 0o1600)
                if done[0] < 0:
                    return {"got": got, "errno": done[1]}
                place = libc.shmat(done[0], None, 0)
                if place in (None, 2**64 - 1):
                    return {"got": got, "errno": ctypes.get_errno()}
                ctypes.memset(place, 1, 32 << 20)
                libc.shmdt(ctypes.c_void_p(place))
                got += 32
        elif kind in ("anonymous", "zero"):
            # What is unmapped of shared memory stays, as long as a page of it is mapped.
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
            libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
            source = os.open("/dev/zero", os.O_RDWR) if kind == "zero" else -1
            while got < mib:
                place = libc.mmap(None, 16 << 20, 3, 1 if kind == "zero" else 0x21, source, 0)
                if place in (None, 2**64 - 1):
                    return {"got": got, "errno": ctypes.get_errno()}
                ctypes.memset(place, 1, 16 << 20)
                libc.munmap(place + 4096, (16 << 20) - 4096)
                got += 16
        elif kind == "unlinked":
            held = []
            while got < mib:
                sink = open("/tmp/red", "wb", buffering=0)
                os.unlink("/tmp/red")
                held.append(sink)
                for _ in range(16):
                    sink.write(piece)
                    got += 1
        else:
            with open(kind + "/red", "wb", buffering=0) as sink:
                while got < mib:
                    if sink.write(piece) < len(piece):
                        break
                    got += 1
    except OSError as error:
        return {"got": got, "errno": error.errno}
    return {"got": got, "errno": 0}


@attack
def disk(mib):
    """Disk by bytes, in many files and folders that can be written."""
    got = 0
    for folder in ("/work", "/tmp", "/dev/shm", "/var/tmp", "/run", "/dev", "/dev/mqueue"):
        for number in range(10_000):
            try:
                with open("%s/red%d" % (folder, number), "wb", buffering=0) as sink:
                    for _ in range(4):
                        got += sink.write(b"x" * (1 << 20))
            except OSError:
                break
            if got > mib << 20:
                return {"got": got}
    return {"got": got}


@attack
def sparse(gib):
    """A file with a hole."""
    with open("/work/sparse", "wb") as sink:
        return tried(os.truncate, sink.fileno(), gib << 30)


@attack
def inodes(most):
    """Empty files without end."""
    made = 0
    try:
        for folder in range(1000):
            os.mkdir("/work/i%d" % folder)
            for number in range(1000):
                os.close(os.open("/work/i%d/%d" % (folder, number), os.O_CREAT | os.O_WRONLY))
                made += 1
                if made > most:
                    return {"made": made}
    except OSError as error:
        return {"made": made, "errno": error.errno}


@attack
def spin(processes, seconds):
    """Processor time."""
    until = time.monotonic() + seconds
    for _ in range(processes - 1):
        if os.fork() == 0:
            break
    while time.monotonic() < until:
        pass
    return {"cpu": time.process_time()}


@attack
def bomb(mib):
    """An archive that becomes ``mib`` when it is unpacked; says how far that went."""
    import zipfile

    with zipfile.ZipFile("/tmp/bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number in range(mib // 16):
            archive.writestr("z%d" % number, b"\0" * (16 << 20))
    size = os.path.getsize("/tmp/bomb.zip")
    done = tried(lambda: zipfile.ZipFile("/tmp/bomb.zip").extractall("/work/bomb"))
    got = sum(os.path.getsize("/work/bomb/" + name) for name in os.listdir("/work/bomb"))
    return {"size": size, "done": done, "got": got}


# The worker and its host ----------------------------------------------------------------------


@attack
def flood(streams, mib, background=False):
    """Output without end."""
    if background and os.fork():
        return {"left": True}
    for _ in range(mib):
        for stream in streams:
            os.write(stream, b"y" * (1 << 20))
    os._exit(0)


def worker_ends():
    """Everything that may be the worker's way to its host, opened for writing."""
    found, own = [], [os.readlink("/proc/self/fd/%d" % fd) for fd in range(3)]
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        for fd in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9):
            try:
                place = "/proc/%d/fd/%d" % (pid, fd)
                if os.readlink(place).startswith(("pipe:", "socket:")) and os.readlink(place) not in own:
                    found.append(os.open(place, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:
                pass
    return found


@attack
def forge(kind, count):
    """Frames in the worker's name."""
    ends = worker_ends()
    for end in ends:
        try:
            fcntl.fcntl(end, 1031, 1 << 20)  # F_SETPIPE_SZ
        except OSError:
            pass

    def frame(letter, number, content, length=None):
        return letter + struct.pack(">II", number, len(content) if length is None else length) + content

    numbers = range(1, 400)
    ended = struct.pack(">5Q", 256, 0, 0, 0, 0)
    content = {
        "giant": lambda: frame(b"o", 1, b"", 0xFFFFFFFF),
        "unknown": lambda: frame(b"z", 1, b"x"),
        "half": lambda: frame(b"o", 1, b"x" * 100, 4 << 20),
        "stray": lambda: frame(b"o", 99_999_999, b"x" * 50_000),
        "empty": lambda: b"".join(frame(b"o", number, b"") for number in numbers),
        "output": lambda: b"".join(frame(b"o", number, b"forged\n" * 20) for number in numbers),
        "results": lambda: b"".join(
            frame(b"o", number, b"forged\n") + frame(b"x", number, ended) for number in numbers
        ),
        "rubbish": lambda: os.urandom(60_000),
        "refusals": lambda: b"".join(frame(b"f", number, b"forged") for number in numbers),
        "greeting": lambda: frame(b"h", 0, b"9.9"),
    }[kind]()
    written = 0
    until = time.monotonic() + 0.4
    for _ in range(count):
        for end in ends:
            try:
                written += os.write(end, content)
            except BlockingIOError:
                time.sleep(0.001)
            except OSError:
                pass
        if time.monotonic() > until:
            break
    return {"ends": len(ends), "written": written}


@attack
def steal():
    """What is sent to the worker, read before it."""
    got = 0
    ends = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if pid != os.getpid():
            with contextlib.suppress(OSError):
                ends.append(os.open("/proc/%d/fd/0" % pid, os.O_RDONLY | os.O_NONBLOCK))
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        for end in ends:
            with contextlib.suppress(OSError):
                got += len(os.read(end, 1 << 16))
    return {"got": got}


@attack
def hang(how):
    """A command that does not end."""
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_IGN)
    if how == "closed":
        for fd in range(3):
            os.close(fd)
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "left":  # a grandchild holds the output
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        os._exit(7)
    elif how == "reading":
        open("/tmp/hang%d" % os.getpid(), "w").close()
        os.mkfifo("/tmp/fifo%d" % os.getpid())
        open("/tmp/fifo%d" % os.getpid()).read()
    elif how == "busy":
        while True:
            pass
    time.sleep(1000)


@attack
def limits():
    """Limits of this process."""
    return {
        name: resource.getrlimit(getattr(resource, name))
        for name in dir(resource)
        if name.startswith("RLIMIT_")
    }


@attack
def watches():
    """Watchers of file systems without end; says how many, and keeps them."""
    made = 0
    while libc.inotify_init1(0) >= 0:
        made += 1
    print(json.dumps({"made": made}), flush=True)
    time.sleep(20)


@attack
def namespaces():
    """Namespaces that this process is in, as the host numbers them."""
    return {name: os.readlink("/proc/self/ns/" + name) for name in os.listdir("/proc/self/ns")}


@attack
def tree(kind):
    """Files that are hard to copy."""
    os.makedirs("/work/tree", exist_ok=True)
    os.chdir("/work/tree")
    if kind == "links":
        for name, target in (
            ("root", "/"), ("shadow", "/etc/shadow"), ("up", "../../../../etc/passwd"), ("here", "."),
            ("behind", "here/../../secret"), ("dangling", "nowhere"), ("itself", "itself"),
        ):  # fmt: skip
            os.symlink(target, name)
        open("secret", "w").write("inside")
    elif kind == "special":
        os.mkfifo("pipe")
        made = socket.socket(socket.AF_UNIX)
        made.bind("socket")
        open("setuid", "w").close()
        os.chmod("setuid", 0o6777)
        open("unreadable", "w").write("x")
        os.chmod("unreadable", 0)
    elif kind == "names":
        for name in (
            b"new\nline",
            b" space ",
            b"-rf",
            b"\xff\xfe",
            b"back\\slash",
            b"..x",
            b"...",
            b"\x1b[31m",
            "naïve".encode(),
        ):
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
    elif kind == "deep":
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
    elif kind == "sparse":
        with open("sparse", "wb") as sink:
            os.truncate(sink.fileno(), 60 << 20)
        for number in range(300):
            os.link("sparse", "sparse%d" % number)
    elif kind == "many":
        for number in range(11_000):
            os.close(os.open(str(number), os.O_CREAT | os.O_WRONLY))
    return True


@attack
def swap(target):
    """A folder that is now a folder, now a link out."""
    os.makedirs("/work/tree/a", exist_ok=True)
    open("/work/tree/a/file", "w").write("mine")
    os.symlink(target, "/work/tree-link")
    print(json.dumps("ready"), flush=True)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        libc.renameat2(-100, b"/work/tree/a", -100, b"/work/tree-link", 2)


if __name__ == "__main__":
    told = ATTACKS[sys.argv[1]](*json.loads(sys.argv[2] if len(sys.argv) > 2 else "[]"))
    print(json.dumps(told), flush=True)
