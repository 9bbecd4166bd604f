"""What ends a run from outside: Ctrl-C, and SIGTERM, which Prefect turns into an exception of its own inside a flow."""

from prefect.exceptions import TerminationSignal

INTERRUPTS = (KeyboardInterrupt, TerminationSignal)
