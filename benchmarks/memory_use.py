"""What Linux says about this process's memory."""

import contextlib
from pathlib import Path

STATUS = Path("/proc/self/status")


def read(key: str) -> int:
    """Bytes of one line of /proc/self/status, which counts kibibytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def resident_bytes() -> int:
    """Memory in use now, mapped files that were read included."""
    return read("VmRSS")


def peak_bytes() -> int:
    """The most that was ever in use, or since `reset_peak`."""
    return read("VmHWM")


def reset_peak() -> None:
    """Lets the peak start over (Linux: 5 into clear_refs), so that loading does not count."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
