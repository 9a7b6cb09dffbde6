"""Builds the extension module mambainllama._core from every C file under csrc.

Everything that can be declared lives in pyproject.toml; this file holds what setuptools cannot
declare: the list of sources, the probe for OpenMP, and a build step that compiles on all cores and
only what changed (each object keeps the compiler's list of the headers that it read).

Environment: CC and CFLAGS as usual; MIL_DEBUG=1 builds with assertions and without optimisation;
MIL_BUILD_JOBS limits the number of compilers that run at once.
"""

import hashlib
import os
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("MIL_DEBUG", "") not in ("", "0")
SOURCES = sorted(path.as_posix() for path in Path("csrc").rglob("*.c"))

# No -ffast-math and no -march=native: masks use infinities, results must repeat, and kernels for
# newer processors are picked at run time (csrc/cpu).
COMPILE_ARGS = [
    "-std=c11",
    *(["-O1", "-g", "-DMIL_DEBUG"] if DEBUG else ["-O3", "-g0"]),
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fopenmp",
    # Python and NumPy headers are not ours to warn about.
    "-Wno-missing-field-initializers",
    *(["-Werror"] if os.environ.get("MIL_WERROR", "") not in ("", "0") else []),
]
LINK_ARGS = ["-fopenmp"]


class BuildCore(build_ext):
    """build_ext that compiles in parallel and follows header changes."""

    def build_extension(self, ext):
        import numpy

        includes = ["csrc", numpy.get_include(), *ext.include_dirs]
        self.check_openmp()
        # Objects of another compiler, flags, Python or NumPy live in a folder of their own.
        compiler = shlex.join(self.compiler.compiler_so)
        recipe = [compiler, *ext.extra_compile_args, sys.version, numpy.__version__]
        key = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:12]
        temp = Path(self.build_temp) / key
        for source in ext.sources:
            (temp / source).parent.mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            target = temp / Path(source).with_suffix(".o")
            depfile = target.with_suffix(".d")
            if is_stale(target, depfile):
                depfile.unlink(missing_ok=True)
                started = time.time()
                self.compiler.compile(
                    [source],
                    output_dir=str(temp),
                    include_dirs=[*includes, *self.compiler.include_dirs],
                    extra_postargs=[*ext.extra_compile_args, "-MMD", "-MF", str(depfile)],
                )
                os.utime(target, (started, started))  # a source saved meanwhile is newer
            return str(target)

        jobs = int(os.environ.get("MIL_BUILD_JOBS", 0)) or usable_cores()
        with ThreadPoolExecutor(jobs) as pool:
            # The largest first, so that no long one is left to the end; linked in order of names.
            largest_first = sorted(ext.sources, key=os.path.getsize, reverse=True)
            objects = sorted(pool.map(compile_one, largest_first))

        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # Linked beside its place and renamed: a process that has the old one loaded keeps it whole.
        fresh = library.with_name(library.name + ".new")
        self.compiler.link_shared_object(objects, str(fresh), extra_postargs=ext.extra_link_args)
        os.replace(fresh, library)

    def check_openmp(self):
        """Stop with one plain line where the compiler has no OpenMP."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.c"
            probe.write_text(
                "#include <omp.h>\nint probe(void) { return omp_get_max_threads(); }\n"
            )
            try:
                self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=["-fopenmp"])
            except Exception as error:
                raise SystemExit(
                    f"setup.py: the C compiler ({self.compiler.compiler_so[0]}) does not run or "
                    "cannot compile OpenMP; install gcc, or clang with libomp, and set CC to it. "
                    f"It said: {error}"
                ) from None


def is_stale(target, depfile):
    """Whether an object is older than its source or than any header named in its depfile."""
    if not target.exists() or not depfile.exists():
        return True
    built = target.stat().st_mtime
    # "target.o: source.c header.h \\\n header.h"; our paths hold no spaces.
    for name in depfile.read_text().replace("\\\n", " ").partition(":")[2].split():
        if not os.path.exists(name) or os.path.getmtime(name) > built:
            return True
    return False


def usable_cores():
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


setup(
    ext_modules=[
        Extension(
            "mambainllama._core",
            sources=SOURCES,
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
        )
    ],
    cmdclass={"build_ext": BuildCore},
)
