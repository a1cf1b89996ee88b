"""Compiles the inner loops of coding when a wheel is built, or the project installed; without a compiler it goes on."""

import importlib.util
import os
import platform
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("maskpack", "codecs", "native")


class Native(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the library to what is built; MASKPACK_PURE=1 leaves it out, for the wheel that fits everywhere."""
        folder = Path(self.root) / FOLDER
        spec = importlib.util.spec_from_file_location("native_build", folder / "build.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        library = None if os.environ.get("MASKPACK_PURE") == "1" else module.build(folder)
        if library is None:
            self.app.display_warning("the inner loops are not compiled: masks will decode more slowly")
            return
        # a universal interpreter of macOS builds for this machine's processor alone
        own = sysconfig.get_platform().replace("universal2", platform.machine())
        name = os.environ.get("MASKPACK_PLATFORM") or own
        build_data["artifacts"].append(f"/{FOLDER.as_posix()}/{library.name}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{name.replace('-', '_').replace('.', '_')}"
