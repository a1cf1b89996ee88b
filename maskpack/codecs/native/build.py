"""Compiles the inner loops into a shared library: python maskpack/codecs/native/build.py (and on installation)."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
COMPILERS = ("cc", "gcc", "clang")


def build(folder: Path, *flags: str) -> Path | None:
    """Compile the loops into a folder and return the library, or None where there is no compiler that can.

    `CC` names another compiler, `CFLAGS` has more flags.
    """
    source, target = Path(__file__).with_name("loops.c"), folder / f"loops{SUFFIX}"
    named = os.environ.get("CC")
    compilers = [shlex.split(named)] if named else [[name] for name in COMPILERS if shutil.which(name)]
    for compiler in compilers:
        own = ["-O3", "-std=c11", "-ffp-contract=off", "-shared", *([] if SUFFIX == ".dll" else ["-fPIC"]), *flags]
        own += shlex.split(os.environ.get("CFLAGS", ""))
        try:
            subprocess.run([*compiler, *own, str(source), "-o", str(target)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return target
    return None


if __name__ == "__main__":
    sys.exit(0 if build(Path(__file__).parent) else "no C compiler was found that takes loops.c; coding stays in numpy")
