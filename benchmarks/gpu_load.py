"""Loading on a GPU: from `mil.load` to the first token, beside reading the files and copying them.

    python benchmarks/gpu_load.py [--model 8b-mamba2 | --checkpoint DIR] [--rounds 2] [--cold]

A checkpoint of the model with random weights is written first (16 GB for 8B), and removed at the
end. Each measurement has a process of its own. Ours begins after the import of the package and
holds everything else: making the CUDA context, mapping the files, uploading, and the first token of
a short prompt, for which kernels are loaded. The reference reads the same files by one thread into
a pinned buffer of 64 MiB and copies that to the device, one after the other, with the context made
before. Files are in the page cache; --cold drops them from there first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = list(range(1, 17))


def weights(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def write(folder: str, name: str) -> dict:
    import gpu_models

    begin = time.perf_counter()
    count = gpu_models.write(name, folder)
    return {"bytes": count, "seconds": time.perf_counter() - begin}


def drop_from_cache(folder: str) -> None:
    for path in weights(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ours(folder: str) -> dict:
    import mambainllama as mil

    begin = time.perf_counter()
    model = mil.load(folder, device="cuda")
    loaded = time.perf_counter()
    mil.generate(model, [PROMPT], max_new_tokens=1, stop=[])
    end = time.perf_counter()
    mil.generate(model, [PROMPT], max_new_tokens=1, stop=[])
    return {
        "seconds": end - begin,
        "load_seconds": loaded - begin,
        "first_token_seconds": end - loaded,
        "second_time_seconds": time.perf_counter() - end,
    }


def reference(folder: str) -> dict:
    import torch

    begin = time.perf_counter()
    buffer = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(buffer, device="cuda")
    torch.cuda.synchronize()
    made = time.perf_counter() - begin
    view, reading, copying, total = memoryview(buffer.numpy()), 0.0, 0.0, 0
    for path in weights(folder):
        with open(path, "rb", buffering=0) as file:
            while True:
                begin = time.perf_counter()
                count = file.readinto(view)
                reading += time.perf_counter() - begin
                if not count:
                    break
                begin = time.perf_counter()
                there[:count].copy_(buffer[:count])
                torch.cuda.synchronize()
                copying += time.perf_counter() - begin
                total += count
    return {
        "seconds": reading + copying,
        "reading_seconds": reading,
        "copying_seconds": copying,
        "context_seconds": made,
        "bytes": total,
    }


def child(command: str, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--child", command, *arguments], capture_output=True, text=True
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"absent": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(folder: str, rounds: int, cold: bool, **labels) -> None:
    """One JSON line a measurement, the reference and ours in turns."""
    for dropped in (False, True) if cold else (False,):
        for _ in range(1 if dropped else rounds):
            for who in ("reference", "ours"):
                if dropped:
                    drop_from_cache(folder)
                found = {"kind": "load", "who": who, "cold": dropped, **labels}
                print(json.dumps({**found, **child(who, folder)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="8b-mamba2")
    parser.add_argument("--folder", help="where to write the checkpoint (a temporary folder)")
    parser.add_argument("--checkpoint", help="one that is there already, instead")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cold", action="store_true", help="also with files not in the page cache")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        command, *arguments = options.child
        print(json.dumps(globals()[command](*arguments)))
        return
    if options.checkpoint:
        measure(options.checkpoint, options.rounds, options.cold, model=options.checkpoint)
        return
    parent = tempfile.mkdtemp(prefix="mambainllama-load-", dir=options.folder)
    folder = os.path.join(parent, options.model)
    try:
        print(
            json.dumps({"kind": "checkpoint", **child("write", folder, options.model)}), flush=True
        )
        measure(folder, options.rounds, options.cold, model=options.model)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


if __name__ == "__main__":
    main()
