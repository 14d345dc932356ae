"""The three ways a run can end that are nobody's bug, each with its exit code. The command prints the sentence, no traceback."""


class DecantError(Exception):
    """A problem with one clear sentence: what is wrong, where, and what to do."""

    exit_code = 1


class GateFailed(DecantError):
    """Work was done but a gate (parity, accuracy budget, self-test, lint) did not hold."""

    exit_code = 1


class UserError(DecantError):
    """The recipe, an argument or the data is wrong."""

    exit_code = 2


class EnvironmentFailed(DecantError):
    """The machine lacks something: a package, a GPU, disk, memory."""

    exit_code = 3
