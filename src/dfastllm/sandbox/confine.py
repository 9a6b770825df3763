"""Run as a script by `program`, never imported: takes from this process what a program of unknown origin must not have,
then becomes that program. Needs the standard library alone, as it is run without site packages.

    python -I -S -B confine.py LIMITS PROGRAM

LIMITS is JSON: {"cpu": seconds, "memory": bytes, "file": bytes, "files": number}. In this order: resource limits;
on Linux, Landlock (Linux 5.13 and later), which leaves the interpreter's own files to read and the working directory to
write; a filter of system calls, by which it opens no socket, starts no process, signals none and leaves no process
group. What the system does not have is left out: `program.guarantees` tries it.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from collections.abc import Sequence

__all__ = ["MACHINES", "close_calls", "close_files", "filter_of", "limit", "main", "readable"]

# struct seccomp_data: number at 0, architecture at 4, arguments from 16, eight bytes each.
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
THREAD = 0x00010000  # CLONE_THREAD
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2
# machine -> (AUDIT_ARCH, numbers of the system calls that are refused, clone, prlimit64)
MACHINES = {
    "x86_64": (
        0xC000003E,
        {
            "socket": 41, "socketpair": 53, "fork": 57, "vfork": 58, "kill": 62, "ptrace": 101, "setpgid": 109,
            "setsid": 112, "rt_sigqueueinfo": 129, "tkill": 200, "tgkill": 234, "unshare": 272,
            "rt_tgsigqueueinfo": 297, "process_vm_writev": 311, "pidfd_send_signal": 424, "io_uring_setup": 425,
        },
        56,
        302,
    ),
    "aarch64": (
        0xC00000B7,
        {
            "unshare": 97, "ptrace": 117, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138,
            "setpgid": 154, "setsid": 157, "socket": 198, "socketpair": 199, "rt_tgsigqueueinfo": 240,
            "process_vm_writev": 271, "pidfd_send_signal": 424, "io_uring_setup": 425,
        },
        220,
        261,
    ),
}  # fmt: skip
CLONE3 = 435
X32 = 0x40000000  # numbers from here on are of another ABI of x86_64

# Landlock: system calls, and rights by the version that brought them.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
PATH_BENEATH = 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | 1 << 15
O_PATH = 0o10000000


def limit(given: dict[str, int]) -> None:
    """The resource limits; ones that the system does not know, or has lower already, stay."""
    for name, value in (
        ("RLIMIT_CPU", given["cpu"]),
        ("RLIMIT_AS", given["memory"]),
        ("RLIMIT_FSIZE", given["file"]),
        ("RLIMIT_NOFILE", given["files"]),
        ("RLIMIT_CORE", 0),
    ):
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (lowest, lowest))
        except (ValueError, OSError):  # macOS has no limit of the address space
            continue


def readable(interpreter: str) -> list[str]:
    """What the interpreter needs: itself, its library, the system's libraries."""
    own = [interpreter, sys.base_prefix, os.path.dirname(os.path.dirname(interpreter))]
    # The base prefix is /usr where the system's interpreter runs: its library and no more of it.
    library = os.path.dirname(os.__file__)
    own = [library if path in ("/usr", "/") else path for path in own]
    return [*own, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom"]


def close_files(libc: ctypes.CDLL, interpreter: str) -> None:
    """Landlock, where there is one."""
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return
    every = sum(rights for since, rights in RIGHTS.items() if since <= version)
    handled = ctypes.create_string_buffer(struct.pack("=Q", every), 8)
    ruleset = libc.syscall(CREATE_RULESET, handled, ctypes.c_size_t(8), ctypes.c_uint(0))
    if ruleset < 0:
        return
    reads = EXECUTE | READ_FILE | READ_DIR
    for path, rights in ((os.getcwd(), every), *((path, reads) for path in readable(interpreter))):
        try:
            opened = os.open(path, O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = (rights if os.path.isdir(path) else rights & OF_FILES) & every
        if path == "/dev/null":
            allowed |= WRITE_FILE
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, opened), 12)
        libc.syscall(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), rule, ctypes.c_uint(0))
        os.close(opened)
    libc.syscall(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)


def filter_of(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter's instructions (code, jump if true, jump if false, operand); [] for a machine that is not known."""
    if machine not in MACHINES:
        return []
    audit, refused, clone, prlimit = MACHINES[machine]
    made = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if machine == "x86_64":
        made += [(0x35, 0, 1, X32), (RETURN, 0, 0, REFUSE | EPERM)]  # at least
    for number in refused.values():
        made += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | EPERM)]
    made += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, REFUSE | ENOSYS)]  # the C library then calls clone
    # clone makes threads only; prlimit64 sets limits of this process only.
    made += [(EQUAL, 0, 4, clone), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, THREAD), (RETURN, 0, 0, ALLOW)]
    made += [(RETURN, 0, 0, REFUSE | EPERM)]
    made += [(EQUAL, 0, 4, prlimit), (LOAD, 0, 0, 16), (EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW)]
    return [*made, (RETURN, 0, 0, REFUSE | EPERM), (RETURN, 0, 0, ALLOW)]


def close_calls(libc: ctypes.CDLL, instructions: Sequence[tuple[int, int, int, int]]) -> None:
    """The filter of system calls, where the system takes one."""
    if not instructions:
        return
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    kept = ctypes.create_string_buffer(packed, len(packed))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(kept)))
    libc.prctl(SECCOMP, FILTER, program, 0, 0)


def main(limits: str, program: str) -> None:
    interpreter = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        instructions = filter_of(platform.machine())
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        close_files(libc, interpreter)
        limit(json.loads(limits))
        close_calls(libc, instructions)
    else:
        limit(json.loads(limits))
    os.execv(interpreter, [interpreter, "-I", "-S", "-B", program])


if __name__ == "__main__":
    main(*sys.argv[1:])
