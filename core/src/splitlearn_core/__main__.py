"""``python -m splitlearn_core``: the command line."""

from splitlearn_core.cli.main import main

main()
