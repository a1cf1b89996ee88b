"""`python -m maskpack`: the command line."""

from maskpack_cli.main import main

main()
