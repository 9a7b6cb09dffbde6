"""The limit: how fast this machine's memory can be read by all threads.

libc's memchr looks for a byte that is not there: a loop of aligned vector loads and nothing else,
written by others and on every Linux. Each thread has its own contiguous part of a buffer many times
the size of the caches, in huge pages where the system gives them.
"""

import ctypes
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers import serve

ABSENT_BYTE = 7
memchr = ctypes.CDLL(None).memchr
memchr.restype = ctypes.c_void_p
memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

team = 1
buffer = np.empty(0, np.uint8)


def start(threads):
    global team
    team = threads
    return {"libc": libc_version()}


def libc_version():
    version = ctypes.CDLL(None).gnu_get_libc_version
    version.restype = ctypes.c_char_p
    return version().decode()


def load(megabytes):
    """NumPy asks for huge pages for buffers of this size; writing puts the pages there."""
    global buffer
    buffer = np.ones(megabytes << 20, np.uint8)


def read():
    """Bytes a second of reading the buffer once: the best of three, since it is a limit."""
    return max(read_once() for _ in range(3))


def read_once():
    share = buffer.size // team
    begin = threading.Barrier(team + 1)

    def search(address):
        begin.wait()
        assert memchr(address, ABSENT_BYTE, share) is None

    threads = [
        threading.Thread(target=search, args=(buffer.ctypes.data + i * share,)) for i in range(team)
    ]
    for thread in threads:
        thread.start()
    begin.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return share * team / (time.perf_counter() - started)


serve({"start": start, "load": load, "read": read})
