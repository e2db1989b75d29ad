"""The command line: parse, one call, one print.

These names are for packages that add commands (entry-point group ``splitlearn.commands``).
"""

from splitlearn_core.cli.main import CommandGroup
from splitlearn_core.cli.shared_options import json_option, print_json, split_option, styled, table, usage_errors

__all__ = ["CommandGroup", "json_option", "print_json", "split_option", "styled", "table", "usage_errors"]
