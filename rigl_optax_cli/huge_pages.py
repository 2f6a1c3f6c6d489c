"""Memory of a step in pages of 2 MB: the first thing a script that trains does, before imports."""

import os
import platform
import sys

TUNABLE = "glibc.malloc.hugetlb=1"


def use() -> None:
    """Starts this process anew, as the same one, with large blocks of memory in huge pages.

    On the CPU, XLA asks for the temporaries of a step anew at each step, and glibc for pages of the
    system, which makes each of them at its first touch: a third of a step of MobileNet-v1 with
    pages of 4 kB, next to nothing with those of 2 MB (docs/condensed.md). The C library reads
    whether to ask for them when a process starts, hence the new start.

    Nothing is done where the environment says how memory is to be handled (`MALLOC_...`,
    `GLIBC_TUNABLES`, `LD_PRELOAD`), or where there is no glibc.
    """
    decided = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if platform.libc_ver()[0] == "glibc" and not any(n.startswith(decided) for n in os.environ):
        sys.stdout.flush()
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {"GLIBC_TUNABLES": TUNABLE})
