"""Builds qtool/_native: CPU kernels always, CUDA kernels where nvcc and a CUDA build of PyTorch are present.

Without a compiler or without PyTorch the installation still succeeds; the pure-torch ops then run.
`python setup.py compile_cuda` compiles the CUDA sources to objects, as a check on machines without a GPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU_SOURCES = [f"qtool/csrc/{path.name}" for path in sorted((ROOT / "qtool" / "csrc").glob("*.cpp"))]
CUDA_SOURCES = [f"kernels_cuda/{path.name}" for path in sorted((ROOT / "kernels_cuda").glob("*.cu"))]
ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # PyTorch 2.11
SANITIZERS = ["-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all",
              "-fno-omit-frame-pointer"]
# Ampere and Hopper as machine code (8.6 and 8.9 run that of 8.0); newer GPUs compile the PTX when they load it
ARCHITECTURES = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
                 "-gencode=arch=compute_90,code=compute_90"]
HEADERS = [path.relative_to(ROOT).as_posix() for folder, pattern in (("qtool/csrc", "*.h"), ("qtool/csrc", "*.inc"),
                                                                     ("kernels_cuda", "*"))
           for path in sorted((ROOT / folder).glob(pattern))]


def torch_folder():
    try:
        import torch
    except ImportError:
        return None, False
    return Path(torch.__file__).parent, torch.version.cuda is not None


def nvcc_command(source, target, include):
    return ["nvcc", "-O3", "-std=c++20", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA", *ABI,
            *ARCHITECTURES, f"-I{include}", "-c", source, "-o", str(target)]


class BuildNative(build_ext):
    """An extension without a Python module in it: a library whose kernels register themselves when it is loaded.

    --sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer, for tests/sanitize.sh; a failure is an error then.
    """

    user_options = [*build_ext.user_options, ("sanitize", None, "build with the sanitizers of the compiler")]
    boolean_options = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self):
        super().initialize_options()
        self.sanitize = False

    def run(self):
        folder, cuda = torch_folder()
        if folder is None:
            print("qtool: PyTorch is not installed here, so no kernels are built; the pure-torch ops will run")
            return
        try:
            self.build_one(folder, cuda and shutil.which("nvcc") is not None)
        except (OSError, subprocess.CalledProcessError) as error:
            if self.sanitize:
                raise
            print(f"qtool: the kernels could not be built ({error}); the pure-torch ops will run", file=sys.stderr)

    def build_one(self, folder, cuda):
        compiler = os.environ.get("CXX", "g++")
        work = Path(self.build_temp).resolve() / "qtool"
        work.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath("qtool._native")).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # no contraction into fused multiply-add: every instruction set must give the same bits
        flags = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
                 "-Wno-psabi", *ABI, f"-I{folder / 'include'}"]
        sanitizers = SANITIZERS if self.sanitize else []
        flags += ["-O1", *sanitizers] if self.sanitize else []
        objects, running = [], []
        for source in CPU_SOURCES:
            objects.append(str(work / (Path(source).stem + ".o")))
            running.append(subprocess.Popen([compiler, *flags, "-c", source, "-o", objects[-1]], cwd=ROOT))
        for process in running:
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, compiler)
        libraries = [f"-L{folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        for source in CUDA_SOURCES if cuda else ():
            objects.append(str(work / (Path(source).stem + ".cu.o")))
            subprocess.run(nvcc_command(source, objects[-1], folder / "include"), check=True, cwd=ROOT)
        linker = compiler
        if cuda:  # nvcc links its runtime in, so that its version need not be the one that PyTorch brings
            linker = "nvcc"
            libraries.append("-ltorch_cuda")
        subprocess.run([linker, "-shared", *sanitizers, *objects, "-o", str(target), *libraries], check=True, cwd=ROOT)

    def get_outputs(self):
        target = self.get_ext_fullpath("qtool._native")
        return [target] if Path(target).exists() else []

    def copy_extensions_to_source(self):
        pass  # an in-place build already wrote the library where it belongs


class CompileCuda(Command):
    """Compile the CUDA sources only, to find their errors where no GPU is."""

    description = "compile kernels_cuda/*.cu to objects"
    user_options: list = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        folder, _ = torch_folder()
        if folder is None or shutil.which("nvcc") is None:
            sys.exit("compile_cuda needs PyTorch and nvcc")
        work = ROOT / "build" / "cuda"
        work.mkdir(parents=True, exist_ok=True)
        for source in CUDA_SOURCES:
            command = nvcc_command(source, work / (Path(source).stem + ".o"), folder / "include")
            subprocess.run(command, check=True, cwd=ROOT)
            print(f"compiled {source}")


setup(ext_modules=[Extension("qtool._native", CPU_SOURCES, depends=HEADERS, optional=True)],
      cmdclass={"build_ext": BuildNative, "compile_cuda": CompileCuda})
