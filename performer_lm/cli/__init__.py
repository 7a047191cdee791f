"""The command line: from argv to a checked config, from any ending to an exit code.

`main` is what the entry points call. In order: free text is quoted so that it arrives as typed (`argv`), every job of
the run or sweep is composed and mistakes are named (`compose`), each config is held against the constructors it names
(`schema`, `targets`), and only then does the first job start (`runner`). Nothing here imports torch or Lightning by
itself, so `--help` answers at once.
"""

from performer_lm.annotations import Section
from performer_lm.cli.argv import as_typed
from performer_lm.cli.errors import UsageError, usage_errors
from performer_lm.cli.runner import main
from performer_lm.cli.schema import check
from performer_lm.cli.sweeps import Sweep, sweep_folder

__all__ = ["Section", "Sweep", "UsageError", "as_typed", "check", "main", "sweep_folder", "usage_errors"]
