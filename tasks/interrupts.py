"""What ends a run from outside: Ctrl-C, and SIGTERM, which Prefect turns into an exception of its own inside a flow."""


def interrupts() -> tuple[type[BaseException], ...]:
    """Return the exceptions that mean it, for an `except` clause; a second of import that most commands never pay."""
    from prefect.exceptions import TerminationSignal

    return KeyboardInterrupt, TerminationSignal
