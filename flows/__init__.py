"""The order of the stages, their branches and gates: nothing else."""

import contextlib

from tasks.environment import home, set_defaults

set_defaults()
with contextlib.suppress(OSError):  # Prefect makes its own folder, but not the one above; a run says what is wrong there
    home().mkdir(parents=True, exist_ok=True)
