"""`ringspan`: prefill a long document once, ask it any number of questions.

Exit statuses: 0 ok, 2 bad input, 1 anything else, 130 interrupted. An error is one line on stderr;
RINGSPAN_TRACEBACK=1 shows where it came from.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer
from typer.main import get_command

from ringspan.deploy.commands import bench, contexts
from ringspan.deploy.commands.ask import ask
from ringspan.deploy.commands.doctor import doctor
from ringspan.deploy.commands.options import spread_inputs
from ringspan.deploy.commands.plan import plan
from ringspan.deploy.commands.prefill import prefill
from ringspan.deploy.commands.serve import serve
from ringspan.deploy.commands.simulate import simulate
from ringspan.deploy.commands.status import status
from ringspan.deploy.commands.trace import trace
from ringspan.errors import RingspanError

app = typer.Typer(
    name="ringspan",
    help="Prefill long documents once over many devices, keep the KV, ask any number of questions.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("prefill")(prefill)
app.command("plan")(plan)
app.command("simulate")(simulate)
app.command("ask")(ask)
app.command("serve")(serve)
app.add_typer(contexts.app, name="contexts")
app.command("doctor")(doctor)
app.command("status")(status)
app.command("trace")(trace)
app.add_typer(bench.app, name="bench")

INTERRUPTED = 130


def run(arguments: Sequence[str]) -> int:
    """One command, as typed after `ringspan`; its exit status. Errors end as one line on stderr."""
    try:
        status = get_command(app).main(
            args=spread_inputs(arguments), prog_name="ringspan", standalone_mode=False
        )
        return status if isinstance(status, int) else 0
    except RingspanError as error:
        return _fail(str(error), error.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away (`ringspan ask ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        # typer's own usage errors, whichever click they come from: a vendored or an installed one
        usage = getattr(error, "format_message", None)
        if usage is not None:
            return _fail(f"{usage()} (see ringspan --help)", getattr(error, "exit_code", 2))
        return _fail(f"{type(error).__name__}: {error}", 1)


def _fail(text: str, status: int) -> int:
    if os.environ.get("RINGSPAN_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"ringspan: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return status


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
