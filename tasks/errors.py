"""Every deliberate stop of the pipeline, each with its own exit code; anything else is a bug and keeps its traceback.

PipelineError            1
├── ProfileError         2    a setting is wrong or two of them contradict each other; mostly before a run was opened
├── ContractBroken       3    the data violates its contract
├── JobFailed            4    a training, evaluation, merge or export job exited non-zero
│   └── MachineUnfit     4    the job cannot even start here: no job environment, no disk, a busy port
├── DriftHalted          5    reward, KL or entropy left its corridor
├── GateFailed           6    the candidate is not good enough, or not shown to be
├── ReleaseFailed        7    the candidate is good, but could not be made the champion, or is not served
├── BudgetExceeded       8    the run would cost, or has cost, more than its budget
├── RunDied              1    a run's process ended without a word; a sweep found it
└── RunCancelled       130    someone stopped the run
"""

from typing import Any


class PipelineError(Exception):
    """A stop that the pipeline means; its text names the setting or rows, the value, what follows and the way out."""

    exit_code = 1


class ProfileError(PipelineError):
    """A setting is wrong, or two settings contradict each other."""

    exit_code = 2


class ContractBroken(PipelineError):
    """The data violates its contract; nothing was trained on it."""

    exit_code = 3


class JobFailed(PipelineError):
    """A job exited non-zero; the text has the root cause of the first failing rank and the log's path.

    `cause` is its class (tasks/failures.py), which decides whether the stage is tried again.
    """

    exit_code = 4

    def __init__(self, text: str, cause: str = "bug"):
        super().__init__(text)
        self.cause = cause


class MachineUnfit(JobFailed):
    """This machine cannot run the job: no job environment, no disk space, a busy port."""


class DriftHalted(PipelineError):
    """A monitored series left its corridor and stayed out; the text says which, when and by how much.

    `last_good` is `{"checkpoint", "step", "left"}` of the last checkpoint inside the corridors, where one was kept.
    """

    exit_code = 5

    def __init__(self, text: str, last_good: dict[str, Any] | None = None):
        super().__init__(text)
        self.last_good = last_good


class GateFailed(PipelineError):
    """The candidate did not pass its gate; the text has every claim that did not hold, with its numbers.

    `inconclusive`: nothing was shown against the candidate either, there were too few rows to tell.
    """

    exit_code = 6

    def __init__(self, text: str, inconclusive: bool = False):
        super().__init__(text)
        self.inconclusive = inconclusive


class ReleaseFailed(PipelineError):
    """A release could not be made or taken back, or is not what the server serves; the text says what is in force."""

    exit_code = 7


class BudgetExceeded(PipelineError):
    """The run would cost, or has cost, more than its budget; what is built is kept."""

    exit_code = 8


class RunDied(PipelineError):
    """A run's process ended without a word: SIGKILL, power, a lost node. A sweep speaks for it."""


class RunCancelled(PipelineError):
    """Someone stopped the run; its job was ended with all its descendants."""

    exit_code = 130
