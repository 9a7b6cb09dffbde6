"""The limit: how fast this machine's memory can be read by all threads.

The best of two ways: libc's memchr for a byte that is not there, a loop of aligned vector loads in
one stream, written by others; and read.c's four and eight streams a thread, which read up to half
as fast again where one stream waits at each page. Each thread has its own contiguous part of a
buffer many times the size of the caches, in huge pages where the system gives them. Without a C
compiler memchr is all there is, which the table then says.
"""

import ctypes
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers import serve

ABSENT_BYTE = 7
STREAMS = (4, 8)
LINE = 64

team = 1
buffer = np.empty(0, np.uint8)
ways = {}


def start(threads):
    global team
    team = threads
    libc = ctypes.CDLL(None)
    libc.gnu_get_libc_version.restype = ctypes.c_char_p
    libc.memchr.restype = ctypes.c_void_p
    libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

    def search(address, size):
        assert libc.memchr(address, ABSENT_BYTE, size) is None

    ways["memchr"] = search
    streams = compiled_streams()
    for count in STREAMS if streams else ():
        ways[f"{count} streams"] = lambda address, size, n=count: streams(address, size, n)
    return {"libc": libc.gnu_get_libc_version().decode(), "limit": "best of " + ", ".join(ways)}


def compiled_streams():
    """read.c's function, or None without a compiler."""
    source = Path(__file__).with_name("read.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read.so"
        options = ["-O3", "-march=native", "-shared", "-fPIC", "-o", str(library)]
        try:
            subprocess.run(
                [*shlex.split(os.environ.get("CC", "cc")), *options, str(source)],
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        function = ctypes.CDLL(str(library)).read_streams
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def load(megabytes):
    """NumPy asks for huge pages for buffers of this size; writing puts the pages there."""
    global buffer
    buffer = np.ones((megabytes << 20) + LINE, np.uint8)
    buffer = buffer[-buffer.ctypes.data % LINE :]


def read():
    """Bytes a second of reading the buffer once: the best of all ways, since it is a limit."""
    return max(read_once(way) for way in ways.values() for _ in range(2))


def read_once(way):
    share = buffer.size // team // LINE * LINE
    begin = threading.Barrier(team + 1)

    def work(address):
        begin.wait()
        way(address, share)

    threads = [
        threading.Thread(target=work, args=(buffer.ctypes.data + i * share,)) for i in range(team)
    ]
    for thread in threads:
        thread.start()
    begin.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return share * team / (time.perf_counter() - started)


serve({"start": start, "load": load, "read": read})
