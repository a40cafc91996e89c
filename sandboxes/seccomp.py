"""The system calls that code inside a sandbox cannot make, as a filter of the kernel's.

Invariant: whatever reaches beyond the sandbox's own files, processes and memory is answered "not permitted",
in the native calling convention and, because the others end the process, in every one. Ordinary programs
(shells, compilers, Python with threads, tests) notice nothing.
"""

from __future__ import annotations

import errno
import os
from functools import cache

from agentgym.errors import MissingDependency, SandboxFailed

DENIED = (
    "ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd keyctl add_key "
    "request_key bpf perf_event_open userfaultfd fanotify_init lookup_dcookie io_uring_setup "
    "io_uring_enter io_uring_register mount umount2 pivot_root move_mount open_tree open_tree_attr "
    "fsopen fsconfig fsmount fspick mount_setattr unshare setns chroot name_to_handle_at "
    "open_by_handle_at swapon swapoff reboot kexec_load kexec_file_load init_module finit_module "
    "delete_module create_module acct quotactl quotactl_fd nfsservctl uselib vhangup syslog sysfs "
    "_sysctl settimeofday clock_settime clock_adjtime adjtimex stime sethostname setdomainname iopl "
    "ioperm modify_ldt vm86 vm86old mbind set_mempolicy set_mempolicy_home_node migrate_pages "
    "move_pages "
)
"""Answered with EPERM; names with spaces between them."""

NAMESPACES = (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
"""``CLONE_NEW*``: time, mount, cgroup, uts, ipc, user, pid, net."""

FAMILIES = (1, 2, 10, 16)
"""Families of sockets that there are: unix, internet, and netlink, each in the sandbox's own namespaces. The
others reach the host's hardware, its kernel's rarely used corners, or (vsock) the machine that it runs on."""

UNCOUNTED = "memfd_create memfd_secret shmget msgget semget"
"""What holds memory that is no process's: it is not there where no control group counts it."""

SHARED = (0x2F, 0x21)
"""Bits of mmap's flags, and what they are for memory that is shared and of no file: it stays when nobody
maps it any more, and is then no process's either."""

TERMINAL = (0x5412, 0x541C)
"""``TIOCSTI`` and ``TIOCLINUX``: input pushed into somebody's terminal."""


@cache
def program(counted: bool = True) -> bytes:
    """The filter as the kernel takes it: Berkeley packet filter instructions, for this machine.

    Args:
        counted: Whether a control group counts the sandbox's memory.

    Raises:
        MissingDependency: pyseccomp is not installed.
        SandboxFailed: libseccomp, which it speaks to, is not.
    """
    try:
        import pyseccomp
    except ImportError as error:
        raise MissingDependency("pyseccomp", "code") from error
    except (OSError, RuntimeError) as error:
        raise SandboxFailed(
            f"libseccomp cannot be loaded: {error}", hint="apt-get install libseccomp2"
        ) from error

    made = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    refuse = pyseccomp.ERRNO(errno.EPERM)
    for name in DENIED.split():
        _add(made, refuse, name)
    # clone3 hides its flags in memory; libraries go back to clone when it is not there.
    _add(made, pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for flag in NAMESPACES[1:]:  # the first is a bit of clone's exit signal
        _add(made, refuse, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    low = 0xFFFFFFFF  # the kernel looks at these bits alone, and so must this: others could be set to pass
    absent = pyseccomp.ERRNO(errno.EAFNOSUPPORT)
    for family in range(max(FAMILIES)):
        if family not in FAMILIES:
            _add(made, absent, "socket", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, low, family))
    _add(made, absent, "socket", pyseccomp.Arg(0, pyseccomp.GT, max(FAMILIES)))
    if not counted:
        for name in UNCOUNTED.split():
            _add(made, pyseccomp.ERRNO(errno.ENOSYS), name)
        _add(made, refuse, "mmap", pyseccomp.Arg(3, pyseccomp.MASKED_EQ, *SHARED))
    for request in TERMINAL:
        _add(made, refuse, "ioctl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, low, request))
    fd = os.memfd_create("seccomp")
    with os.fdopen(fd, "rb+") as place:
        made.export_bpf(place)
        place.seek(0)
        return place.read()


def opened(counted: bool = True) -> int:
    """A file descriptor from which the filter is read, inheritable; the caller closes it."""
    fd = os.memfd_create("seccomp", 0)
    os.write(fd, program(counted))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _add(made: object, action: int, name: str, *arguments: object) -> None:
    """Add a rule; a system call that this libseccomp or architecture does not know cannot be made by name."""
    import pyseccomp

    if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) >= 0:
        made.add_rule(action, name, *arguments)  # type: ignore[attr-defined]
