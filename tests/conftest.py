"""What every test shares: test data, fixed random numbers, bfloat16, and thread counts."""

import os
import signal
from pathlib import Path

# Tests run teams larger than the machine; threads that spin while they wait then keep those that
# work from running. libgomp reads this when it is loaded, so it is set before anything else is
# imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell starts its background jobs deaf to SIGINT, and so would be the processes that tests
# interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared():
    """Folder of the shared checkpoints and data; without it the test is skipped, saying so."""
    folder = Path(os.environ.get("MAMBAINLLAMA_SHARED") or ROOT.parent / "shared")
    if not (folder / "models" / "story-llama").is_dir():
        pytest.skip(f"no shared data at {folder} (set MAMBAINLLAMA_SHARED)")
    return folder


@pytest.fixture
def rng():
    """Random numbers, the same in every run."""
    return np.random.default_rng(20240611)


class Bfloat16:
    """bfloat16 as bit patterns in uint16 arrays, rounded as csrc/base/dtype.h does."""

    @staticmethod
    def bits(values):
        """Bit patterns of the nearest bfloat16 numbers."""
        words = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (
            words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))
        ) >> np.uint32(16)
        quiet = (words >> np.uint32(16)) | np.uint32(0x40)
        return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)

    @staticmethod
    def values(bits):
        """The float32 numbers that the patterns stand for."""
        return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(
            np.float32
        )

    @classmethod
    def round(cls, values):
        """The nearest bfloat16 numbers, as float32."""
        return cls.values(cls.bits(values))


@pytest.fixture(scope="session")
def bf16():
    return Bfloat16


@pytest.fixture(params=[1, 2, 5], ids=lambda count: f"threads{count}")
def threads(request):
    """Run a test with several sizes of the thread team (more than the cores, too)."""
    from mambainllama import ops

    before = ops.get_threads()
    ops.set_threads(request.param)
    yield request.param
    ops.set_threads(before)


@pytest.fixture
def with_threads():
    """A function that sets the thread count; restored after the test."""
    from mambainllama import ops

    before = ops.get_threads()
    yield ops.set_threads
    ops.set_threads(before)
