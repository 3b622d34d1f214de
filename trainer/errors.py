"""The one exception a user is meant to see.

`UserError` is raised where a file, key or value is wrong and the user can mend it. Its text is ONE line that
names the file or key, the value, and the fix. `trainer.cli.run_main` prints it without a traceback and exits
with code 2. Anything else is a fault of ours and keeps its traceback.
"""

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request before the last step; the same command goes on
EXIT_HUNG = 76  # no rank made progress for watch.limit_s; the report names who the others waited for
EXIT_UNSTABLE = 77  # the run returned to earlier checkpoints too often; a person must look


class UserError(Exception):
    """A mistake that the user can mend; `str(error)` is one line: what, where, and the fix."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class SharedError(UserError):
    """The same mistake told on every rank at once: rank 0 alone prints it."""
