"""What ends a run's process from outside: Ctrl-C, SIGTERM, which Prefect turns into an exception of its own, a suspension."""


def interrupts() -> tuple[type[BaseException], ...]:
    """Return the exceptions that mean it, for an `except` clause; a second of import that most commands never pay."""
    from prefect.exceptions import TerminationSignal

    return KeyboardInterrupt, TerminationSignal


def suspension() -> type[BaseException]:
    """Return what Prefect raises to end the process of a suspended run, which goes on in another one."""
    from prefect.exceptions import Pause

    return Pause
