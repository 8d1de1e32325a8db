"""How a command begins and ends: its arguments, its errors and its interruption, in one line."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from attnserve_proto.starting import INTERRUPTED, MESSAGE, Interruptible

_ARGUMENTS = 2


class CommandError(Exception):
    """A command cannot go on; the message is one line that ends with what to do.

    Attributes:
        code: the exit code: 1, it failed; 2, what was given is wrong.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and where the options are explained."""

    def error(self, message: str) -> NoReturn:
        """End the process with 2."""
        self.exit(_ARGUMENTS, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def run(program: str, work: Callable[[], int]) -> int:
    """The exit code of a command's work; what goes wrong is said on standard error.

    Args:
        program: its name.
        work: gives the exit code.

    Returns:
        That of the work, or of its `CommandError`; 1 if the system refuses something or a reader
        of the output has gone; 130 after an interruption.
    """
    try:
        with Interruptible():
            code = work()
            sys.stdout.flush()
    except CommandError as error:
        _say(program, str(error))
        return error.code
    except KeyboardInterrupt:
        _say(program, MESSAGE)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read has gone; the interpreter would try to write again as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        _say(program, "there is not enough memory; ask for less at once")
        return 1
    except OSError as error:
        _say(program, f"{error}; look at that file or address, then run it again")
        return 1
    except Exception as error:
        # PyTorch makes errors of its own of an interruption that hits it while it loads a module.
        if not _was_interrupted(error):
            raise
        _say(program, MESSAGE)
        return INTERRUPTED
    return code


def _was_interrupted(error: BaseException) -> bool:
    """Whether an error came of a KeyboardInterrupt, however often it was wrapped."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if isinstance(each, KeyboardInterrupt):
            return True
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            left += [each.__cause__, each.__context__]
    return False


def _say(program: str, message: str) -> None:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
