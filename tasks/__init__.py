"""One task per stage, and the one boundary between them and Accelerate."""

from tasks.environment import set_defaults

set_defaults()
