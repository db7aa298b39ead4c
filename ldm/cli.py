"""What every script shares: flags without abbreviations, one `error:` line, and the exit codes."""

import argparse
import difflib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from ldm.errors import LdmError, MachineError, SettingError

EXIT_BUG = 1
EXIT_INTERRUPTED = 130
MAX_MESSAGE = 300


def printable(text: str, limit: int | None = MAX_MESSAGE) -> str:
    """`text` on one line for a terminal: control, bidirectional and surrogate characters escaped, cut at `limit`."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def nearest(name: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)` for the most similar known name, or an empty text."""
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def number(setting: str, read: Callable[[str], int], text: str) -> int:
    """What a flag says. Raises SettingError, which names the setting, where `read` raises ValueError."""
    try:
        return read(text)
    except ValueError as error:
        raise SettingError(f"{setting}: {error}") from None


def warn(message: str) -> None:
    """Print one `warning:` line on stderr."""
    print(f"warning: {printable(message)}", file=sys.stderr)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with `--debug`, without abbreviated flags; its complaint is one `error:` line with the nearest flag."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})  # type: ignore[arg-type]  # argparse takes many kinds
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")  # `run` reads it

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flag = unknown.split()[0].split("=")[0]
            flags = [name for action in self._actions for name in action.option_strings]
            message = f"{flag}: no such flag{nearest(flag, flags)}; see --help"
        else:
            message = f"{message.removeprefix('argument ')}; see --help"
        print(f"error: {printable(message)}", file=sys.stderr)
        raise SystemExit(2)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and end the process with the exit code of what happened.

    `--debug` or LDM_DEBUG=1 shows the traceback. A bug saves its traceback to a file and names it.
    """
    debug = "--debug" in sys.argv or os.environ.get("LDM_DEBUG") == "1"
    try:
        code = main() or 0
        sys.stdout.flush()
    except LdmError as error:
        code = error.exit_code
        report(str(error), debug)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        print("stopped", file=sys.stderr)
    except BrokenPipeError:
        # The reader of our stdout has gone (`| head`): not an error of ours, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except MemoryError:
        code = MachineError.exit_code
        report("memory: not enough for this run; use a smaller size or fewer images at once", debug)
    except OSError as error:
        code = MachineError.exit_code
        report(
            f"{error.filename or 'system'}: {error.strerror or error}; check the path, its rights and the disk", debug
        )
    except Exception:
        code = EXIT_BUG
        with tempfile.NamedTemporaryFile("w", prefix="ldm-", suffix=".txt", delete=False) as file:
            file.write(traceback.format_exc())
        report(f"ldm: a bug in this program; please report it with the file {file.name}", debug)
    sys.exit(code)


def report(message: str, debug: bool) -> None:
    """Print one `error:` line, behind the current traceback where `debug` is asked for."""
    if debug:
        traceback.print_exc()
    print(f"error: {printable(message)}", file=sys.stderr)
