"""`python -m maskpack`: the command line."""

import runpy

runpy.run_module("maskpack_cli.main", run_name="__main__")
