"""What every verb of the command line stands in: the two consoles, sentences for failures, exit codes."""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from typer.core import TyperGroup

from emloc_ray.errors import ConfigError, EmlocError, refusal
from emloc_ray.text import listed, visible_controls

Arguments = ParamSpec("Arguments")
_PIPE_WIDTH = 200


def flag(*names: str, help: str, **options: Any) -> Any:
    """An option without a value, beside which ``--help`` names no type."""
    return typer.Option(*names, help=help, metavar="", **options)


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Config keys to override.")]
AcceptVersions = Annotated[bool, flag("--accept-versions", help="Keep what other versions finished.")]
Yes = Annotated[bool, flag("--yes", "-y", help="Redo and remove what a changed config says, without asking.")]


class _Console(Console):
    """Shows the control characters of what others wrote, which would steer the terminal. Goes silent where its reader has left
    (``emloc-ray keys | head``), so that a run reaches its end and exit code."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """As any console; rich's own moves of the cursor are segments of another kind."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible_controls(segment.text), segment.style)

    @property  # type: ignore[misc]  # rich's can be set, which nobody does
    def size(self) -> ConsoleDimensions:
        """As any console's; wide where no terminal, and nobody by COLUMNS, says how wide: rows in a pipe or a file stay whole."""
        said = self.is_terminal or "COLUMNS" in os.environ
        return super().size if said else ConsoleDimensions(_PIPE_WIDTH, super().size.height)

    def on_broken_pipe(self) -> None:
        """Writes nothing from now on, not even at exit, when Python flushes the rest."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


_IS_PIPED = sys.stdout is None or not sys.stdout.isatty()
# FORCE_COLOR asks a pipe for colours, not for bars, which move the cursor.
console = _Console(highlight=False, force_interactive=False if _IS_PIPED else None)
errors = _Console(stderr=True, highlight=False, soft_wrap=True)


class Verbs(TyperGroup):
    """Takes a config's key with dashes for what it is."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Ends with a sentence where an option is an override, or has underscores for hyphens."""
        from emloc_ray.io.runs.secret_values import without_secret

        verb = self.commands.get(next((argument for argument in args if not argument.startswith("-")), ""))
        parameters = [] if verb is None else verb.params
        own = {option for parameter in parameters for option in parameter.opts}
        takes_keys = any(parameter.name == "overrides" for parameter in parameters)
        for argument in args:
            key = re.match(r"--?(\w*[._][\w.]*)(=|$)", argument)
            if key is None:
                continue
            if (option := f"--{key[1].replace('_', '-')}") in own:
                sentence = f"--{key[1]} is no option: write {option}."
            elif not takes_keys:
                continue
            else:
                written = without_secret(argument.lstrip("-") if key[2] else f"{key[1]}=VALUE")
                sentence = f"--{key[1]} is a key of the config: write {written}, without dashes."
            errors.print(f"[red]Error:[/] {escape(sentence)}")
            raise typer.Exit(2)
        return super().parse_args(ctx, args)


def agrees(console: Console, sentences: Sequence[str]) -> bool:
    """Shows what would be redone or removed, and asks; without a terminal nobody is asked, and nobody agrees. Raises
    ConfigError where the answer is no."""
    if console.quiet or not (console.is_terminal and sys.stdin.isatty()):
        return False
    for sentence in sentences:
        console.print(f"[yellow]![/] {escape(sentence)}.", soft_wrap=True)
    if not typer.confirm("Go on?"):
        raise ConfigError("Nothing was changed.")
    return True


def same_command(options: Mapping[str, Any]) -> str:
    """What continues a command that was given these options: the same, without those that make what is finished again."""
    left_out = [name for name, key in (("--fresh", "fresh"), ("--from", "begin")) if options.get(key)]
    return f"the same command{f' without {listed(left_out)}' if left_out else ''}"


def sentence(error: EmlocError | OSError) -> str:
    """What a verb says of a failure."""
    return str(error) if isinstance(error, EmlocError) else f"{refusal(error)}."


def guarded(verb: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """A verb that turns a failure into a sentence on stderr and an exit code: 1 failed, 2 bad call, 130 or 143 stopped."""

    @functools.wraps(verb)
    def call(*arguments: Arguments.args, **options: Arguments.kwargs) -> None:
        try:
            verb(*arguments, **options)
        except (EmlocError, OSError) as error:
            from emloc_ray.io.runs.secret_values import hide_secrets

            for line in hide_secrets(sentence(error)).split("\n"):
                errors.print(f"[red]Error:[/] {escape(line)}")
            raise typer.Exit(getattr(error, "exit_code", 1)) from None
        except (KeyboardInterrupt, SystemExit) as error:  # Ray makes a SystemExit of SIGTERM
            if "fresh" in options or options.get("dry_run") is False:  # a verb that runs stages
                errors.print(f"Stopped. Finished stages stay; {same_command(options)} continues from there.")
            raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 143) from None

    return call
