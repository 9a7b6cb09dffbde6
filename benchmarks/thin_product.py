"""Products of 1 to 16 rows with weights that come from memory: the heart of decoding and verifying.

One row does two operations with each weight it reads, so memory is the limit, and the first figure
is the share of this machine's read bandwidth that a product reaches. Further rows meet the same
weights while they pass: the second figure is what each number of rows costs relative to one. Shapes
are those of the layers of Llamas of 1 and 8 billion parameters.
"""

from __future__ import annotations

import contextlib
import sys

from peers import interleave, start
from report import Report, arguments, middle, ratio, spread

COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
SHAPES = ((2048, 2048), (2048, 8192), (8192, 2048), (4096, 14336))  # in, out
DTYPES = ("bfloat16", "float32", "float16")
OURS, LIMIT = "products", "memory"


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of " + ", ".join(DTYPES))
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    dtypes = options.dtypes.split(",")
    if unknown := sorted(set(dtypes) - set(DTYPES)):
        parser.error(f"--dtypes: {unknown[0]} is none of {', '.join(DTYPES)}")
    report = Report("thin_product", "Products of few rows", options)
    for dtype in dtypes:
        measure(report, dtype)
    report.finish()
    return 0


def measure(report: Report, dtype: str) -> None:
    options = report.options
    megabytes = 64 if options.quick else 512
    rows, raw = [], {}
    for width, out in SHAPES[:2] if options.quick else SHAPES:
        product = {"dtype": dtype, "width": width, "out": out, "megabytes": megabytes}
        wanted = {OURS: ("products", product), LIMIT: ("memory", {"megabytes": megabytes})}
        with contextlib.ExitStack() as stack:
            peers = start(stack, wanted, options.threads, {}, report.absent)
            report.heard(peers)
            size = peers[OURS]("weight_bytes")
            seconds = {count: [] for count in COUNTS}
            limit = []
            for _, order in interleave((LIMIT, *COUNTS), options.rounds):
                for what in order:
                    if what == LIMIT:
                        limit.append(size / peers[LIMIT]("read"))
                    else:
                        seconds[what].append(peers[OURS]("multiply", rows=what, passes=2))
        one = seconds[1]
        speed = f"{size / middle(one) / 1e9:.1f} GB/s ± {100 * spread(one):.0f} %"
        share = f"{100 * ratio(limit, one):.0f} %"
        costs = [f"{ratio(seconds[count], one):.2f}" for count in COUNTS[1:]]
        rows.append([f"{width} to {out}", speed, share, *costs])
        raw[f"{width}x{out}"] = {"bytes": size, "limit": limit, "seconds": seconds}
    report.section(
        f"{dtype} weights: speed of one row's product, its share of the memory's, and the time of "
        "more rows relative to one",
        ["in, out", "1 row", "of limit", *(f"{count} rows" for count in COUNTS[1:])],
        rows,
        **raw,
    )


if __name__ == "__main__":
    sys.exit(main())
