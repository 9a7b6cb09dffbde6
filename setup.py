"""Builds the extension modules: mambainllama._core from every C file under csrc, and, where a
CUDA toolkit is found, mambainllama._cuda from every file under kernels.

Everything that can be declared lives in pyproject.toml; this file holds what setuptools cannot
declare: the lists of sources, the probes for OpenMP and CUDA, and a build step that compiles on all
cores and only what changed (each object keeps the compiler's list of the headers that it read).

Environment: CC and CFLAGS as usual; MIL_DEBUG=1 builds with assertions and without optimisation;
MIL_BUILD_JOBS limits the number of compilers that run at once; MAMBAINLLAMA_CUDA=auto|0|1 says
whether _cuda is built (auto: where nvcc and cublasLt.h are there); CUDA_HOME is its toolkit;
MAMBAINLLAMA_CUDA_ARCHS lists the GPU architectures, "80;89;90a;100" for all that are supported
(otherwise: those of this machine's GPUs, or Hopper's).
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

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

CUDA_MODULE = "mambainllama._cuda"
CUDA_SOURCES = sorted(
    path.as_posix() for path in Path("kernels").glob("*") if path.suffix in (".c", ".cu")
)
HOST_FLAGS = "-Wall,-Wextra,-fPIC,-fvisibility=hidden"  # through nvcc to the host compiler
CUDA_HOST_ARGS = ["-O2", "-Xcompiler", HOST_FLAGS + ",-Wno-missing-field-initializers"]
CUDA_COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler",
    HOST_FLAGS,
    *(["-lineinfo"] if DEBUG else []),
    *(["-Werror", "all-warnings"] if os.environ.get("MIL_WERROR", "") not in ("", "0") else []),
]


class BuildCore(build_ext):
    """build_ext that compiles in parallel and follows header changes."""

    def build_extension(self, ext):
        if ext.name == CUDA_MODULE:
            self.build_cuda(ext)
        else:
            self.build_core(ext)

    def build_core(self, ext):
        import numpy

        includes = ["csrc", numpy.get_include(), *ext.include_dirs]
        self.check_openmp()
        # Objects of another compiler, flags, Python or NumPy live in a folder of their own.
        compiler = shlex.join(self.compiler.compiler_so)
        recipe = [compiler, *ext.extra_compile_args, sys.version, numpy.__version__]

        def compile_one(temp, source, target, depfile):
            self.compiler.compile(
                [source],
                output_dir=str(temp),
                include_dirs=[*includes, *self.compiler.include_dirs],
                extra_postargs=[*ext.extra_compile_args, "-MMD", "-MF", str(depfile)],
            )

        def link(objects, library):
            self.compiler.link_shared_object(objects, library, extra_postargs=ext.extra_link_args)

        self.compile_and_link(ext, recipe, compile_one, link)

    def build_cuda(self, ext):
        """nvcc for everything: it hands .c files to the host compiler and knows its libraries."""
        nvcc, cuda_includes = find_cuda()
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        includes = ["csrc", "kernels", *cuda_includes, sysconfig.get_paths()["include"]]
        flags = [*CUDA_COMPILE_ARGS, *architecture_flags()]

        def compile_one(temp, source, target, depfile):
            command = [nvcc, *flags] if source.endswith(".cu") else [nvcc, *CUDA_HOST_ARGS]
            for folder in includes:
                command += ["-I" if folder in ("csrc", "kernels") else "-isystem", folder]
            command += ["-MMD", "-MF", str(depfile), "-c", source, "-o", str(target)]
            run_or_stop(command)

        def link(objects, library):
            run_or_stop([nvcc, "-shared", "-cudart", "static", *objects, "-o", library, "-ldl"])

        self.compile_and_link(ext, [nvcc, version, *flags, *includes], compile_one, link)

    def compile_and_link(self, ext, recipe, compile_one, link):
        """Compiles what is stale, on all cores, and puts the linked module into its place."""
        key = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:12]
        temp = Path(self.build_temp) / key
        for source in ext.sources:
            (temp / source).parent.mkdir(parents=True, exist_ok=True)

        def compile_if_stale(source):
            target = temp / Path(source).with_suffix(".o")
            depfile = target.with_suffix(".d")
            if is_stale(target, depfile):
                depfile.unlink(missing_ok=True)
                started = time.time()
                compile_one(temp, source, target, depfile)
                os.utime(target, (started, started))  # a source saved meanwhile is newer
            return str(target)

        jobs = int(os.environ.get("MIL_BUILD_JOBS", 0)) or usable_cores()
        with ThreadPoolExecutor(jobs) as pool:
            # The largest first, so that no long one is left to the end; linked in order of names.
            largest_first = sorted(ext.sources, key=os.path.getsize, reverse=True)
            objects = sorted(pool.map(compile_if_stale, largest_first))

        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # Linked beside its place and renamed: a process that has the old one loaded keeps it whole.
        fresh = library.with_name(library.name + ".new")
        link(objects, str(fresh))
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


# ---- CUDA --------------------------------------------------------------------------------------


def find_cuda():
    """(nvcc, folders of headers beside its own), or None where something is missing."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    wheels = sorted(Path(sysconfig.get_paths()["purelib"], "nvidia").glob("*"))
    candidates = [Path(home) for home in homes if home] + [Path("/usr/local/cuda"), *wheels]
    nvcc = next((str(c / "bin/nvcc") for c in candidates if (c / "bin/nvcc").exists()), None)
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        return None
    own = Path(nvcc).resolve().parent.parent / "include"
    if (own / "cublasLt.h").exists():
        return nvcc, []
    for folder in [*(c / "include" for c in candidates), Path("/usr/include")]:
        if (folder / "cublasLt.h").exists():
            # /usr/include is searched anyway; named, it would come before the C++ library's own.
            return nvcc, [] if str(folder) == "/usr/include" else [str(folder)]
    return None


def cuda_extensions():
    """[_cuda] or [], as MAMBAINLLAMA_CUDA and this machine say."""
    word = os.environ.get("MAMBAINLLAMA_CUDA", "auto").lower()
    if word not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: MAMBAINLLAMA_CUDA={word!r}; expected auto, 0 or 1")
    if word == "0":
        return []
    found = find_cuda() is not None
    if word == "1" and not found:
        raise SystemExit(
            "setup.py: MAMBAINLLAMA_CUDA=1, but nvcc or cublasLt.h was not found; install a CUDA "
            "12.6+ toolkit, set CUDA_HOME to it, or pip install nvidia-cuda-nvcc nvidia-cublas"
        )
    # Where nobody insists, an old toolkit or compiler is no reason to have nothing at all.
    optional = word == "auto"
    return [Extension(CUDA_MODULE, sources=CUDA_SOURCES, optional=optional)] if found else []


def architecture_flags():
    """-gencode options of MAMBAINLLAMA_CUDA_ARCHS, of this machine's GPUs, or of Hopper."""
    words = os.environ.get("MAMBAINLLAMA_CUDA_ARCHS", "").replace(",", ";").split(";")
    words = [word.strip() for word in words if word.strip()] or gpus_here() or ["90"]
    # Hopper's own instructions exist under the name with the a.
    words = ["90a" if word == "90" else word for word in dict.fromkeys(words)]
    return [f"-gencode=arch=compute_{word},code=sm_{word}" for word in words]


def gpus_here():
    """Architectures of the GPUs that nvidia-smi sees and the kernels are for: ["90"]."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line.strip().replace(".", "") for line in out.stdout.splitlines()]
    known = [word for word in found if word.isdigit() and int(word) >= 80]  # products of bfloat16
    return known if out.returncode == 0 else []


def run_or_stop(command):
    """Runs a compiler; its own words, and one line of ours, where it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(result.stderr)
    if result.returncode != 0:
        raise CompileError(
            "no CUDA operators (MAMBAINLLAMA_CUDA=0 leaves them out, 1 insists on them), for this "
            f"failed: {shlex.join(command)}"
        )


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
        ),
        *cuda_extensions(),
    ],
    cmdclass={"build_ext": BuildCore},
)
