"""`loopwise chat`: talk with a model."""

import contextlib
import difflib
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopwise.errors import ConfigError, InputError, UserError

if TYPE_CHECKING:
    from loopwise.cli.models import ChatConfig
    from loopwise.models.looped_lm import LoopedLM

CONFIG = "loopwise.cli.models:ChatConfig"
_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
_COMMANDS = {
    "/help": "show this list",
    "/loops N": "let each token run at most N loops",
    "/rule RULE": "leave early by RULE, such as hazard:0.6; /rule off runs every loop",
    "/show on|off": "tint tokens by their loops, or stop doing so",
    "/reset": "forget the conversation",
    "/exit": "leave (Ctrl-D does too; Ctrl-C stops a reply)",
}


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint or a run, or a hub id.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="How to answer.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before you speak.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines of User: and Assistant:, for models without a chat template.")
    ] = False,
    show_loops: Annotated[
        bool, typer.Option("--show-loops", help="Tint each token by its loops and say what that saved.")
    ] = False,
) -> None:
    """Talk with a model.

    Type a line and read the reply; /help lists what else can be typed. Ctrl-C stops a reply, Ctrl-D leaves. When the
    context is full, the oldest turns are forgotten, and it is said. Lines may come through a pipe.

    - `exit=hazard:0.6`, `max_loops=4`, `min_loops=2` say how many loops a token may take

    - `temperature=0.8 top_p=0.95 seed=1 max_tokens=200` choose the tokens
    """
    from loopwise.cli.models import ChatConfig, accept_any_text, load_model, read_settings

    config = read_settings(ChatConfig, words or [])
    accept_any_text()
    session = Session(
        load_model(model, dtype=config.dtype, device=config.device),
        model,
        config,
        system=system,
        plain=plain,
        show_loops=show_loops,
    )
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        session.greet()
    for line in lines(interactive):
        if not session.hear(line):
            break


def lines(interactive: bool) -> Any:
    """The user's lines, to the end of input.

    Raises:
        InputError: when a pipe brings something that is not UTF-8.
    """
    if interactive:
        # It gives input() a history and arrow keys, where there is one.
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")
    while True:
        try:
            yield input("\n> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        except UnicodeDecodeError as error:
            raise InputError(f"stdin is not UTF-8 text (byte {error.start}); convert it") from None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(Ctrl-D or /exit leaves)")


class Session:
    """A conversation: the messages so far, and how to answer the next one."""

    def __init__(
        self, model: "LoopedLM", name: str, config: "ChatConfig", *, system: str | None, plain: bool, show_loops: bool
    ) -> None:
        if model.tokenizer is None:
            raise InputError(
                f"{name} has no tokenizer.json, so it cannot read text; type: loopwise generate {name} ids=1,2,3"
            )
        if model.tokenizer.chat_template is None and not plain:
            raise InputError(
                f"{name} has no chat template: it is a base model that continues text; type: "
                f'loopwise generate {name} "...", or loopwise chat {name} --plain'
            )
        from loopwise.engine.write import Writer

        self.model = model
        self._writer = Writer(model)
        self.tokenizer = model.tokenizer
        self.name = name
        self.plain = plain
        self.show_loops = show_loops
        self.config = config
        self.opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []
        self._set(config)

    def greet(self) -> None:
        """One line on what this is."""
        print(f"{self.name} · {self._loops()} · /help lists what can be typed")

    def hear(self, line: str) -> bool:
        """Answer a line or do what it commands; False when it says goodbye. Mistakes are one line on stderr."""
        from loopwise.cli.models import note

        text = line.strip()
        try:
            if text.startswith("/"):
                return self._obey(*text.partition(" ")[::2])
            if text:
                self._answer(text)
        except UserError as error:
            note(f"error: {' '.join(str(error).split())}")
        return True

    def _obey(self, word: str, argument: str) -> bool:
        from loopwise.cli.models import note

        argument = argument.strip()
        known: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/loops": self._set_loops,
            "/rule": self._set_rule,
            "/show": self._set_show,
            "/reset": self._reset,
        }
        if word in ("/exit", "/quit"):
            return False
        if word not in known:
            near = difflib.get_close_matches(word, [*known, "/exit"], n=1)
            hint = f"; did you mean {near[0]}" if near else ""
            raise ConfigError(f"there is no command {word}{hint}; allowed: {', '.join(_COMMANDS)}")
        known[word](argument)
        if word in ("/loops", "/rule"):
            note(self._loops())
        return True

    def _help(self, argument: str) -> None:
        width = max(map(len, _COMMANDS))
        for usage, meaning in _COMMANDS.items():
            print(f"{usage:<{width}}  {meaning}")

    def _set_loops(self, argument: str) -> None:
        if argument:
            if not argument.isdecimal():
                raise ConfigError(f"/loops {argument}: give a whole number, for example /loops 3")
            self._set(replace(self.config, max_loops=int(argument)))

    def _set_rule(self, argument: str) -> None:
        if argument:
            self._set(replace(self.config, exit=None if argument == "off" else argument))

    def _set_show(self, argument: str) -> None:
        if argument not in ("on", "off"):
            raise ConfigError(f"/show {argument}: allowed are /show on and /show off")
        self.show_loops = argument == "on"

    def _reset(self, argument: str) -> None:
        self.messages.clear()

    def _loops(self) -> str:
        most = self.config.max_loops or self.model.config.loops
        rule = f"leaving early by {self.config.exit}" if self.config.exit else "every token runs them all"
        return f"{most} {'loop' if most == 1 else 'loops'}, {rule}"

    def _set(self, config: "ChatConfig") -> None:
        """Take new settings, once they are known to suit the model."""
        from loopwise.engine.checks import check_sampling
        from loopwise.loops.drivers import check_loops

        check_loops(self.model, config.max_loops or self.model.config.loops)
        check_sampling(self.model, config, policy=config.policy, prompt_depth=config.prompt_depth)
        self.config = config

    def _answer(self, text: str) -> None:
        from loopwise.cli.models import AnswerPrinter, loops_known, note, run

        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, dropped = self._fit(messages)
        stop = (*self.config.stop, f"\n{_ROLES['user']}:") if self.plain else self.config.stop
        with loops_known():
            config = replace(self.config, stop=stop)
            generation = self._writer.stream(prompt, config, policy=config.policy, prompt_depth=config.prompt_depth)
        if dropped:
            note(
                f"the context of {self.model.config.max_positions:,} tokens is full: forgot the oldest {turns(dropped)}"
            )
        printer = AnswerPrinter(generation, show_loops=self.show_loops)
        whole = run(generation, printer.push)
        done = generation.completion
        printer.finish(done)
        if not whole:
            note("(stopped)")
        elif done.finish_reason == "length":
            note(f"(cut at max_tokens={self.config.max_tokens})")
        elif done.finish_reason == "context":
            note(f"(cut: the context of {self.model.config.max_positions:,} tokens is full; /reset begins anew)")
        if not done.tokens:
            return
        reply = done.text or ""
        self.messages = [*messages, {"role": "assistant", "content": reply.strip() if self.plain else reply}]

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """The prompt's ids, and how many of the oldest turns had to go from `messages` to leave room for a reply."""
        most = self.model.config.max_positions
        room = min(self.config.max_tokens, most // 4)
        dropped = 0
        while True:
            ids = self._layout([*self.opening, *messages])
            if len(ids) + room <= most or len(messages) == 1:
                return ids, dropped
            # A turn is a message of the user and the reply to it.
            del messages[:2]
            dropped += 1

    def _layout(self, messages: list[dict[str, str]]) -> list[int]:
        if not self.plain:
            return self.tokenizer.chat(messages)
        said = [f"{_ROLES[message['role']]}: {message['content']}\n" for message in messages]
        return self.tokenizer.encode("".join(said) + f"{_ROLES['assistant']}:", add_special=True)


def turns(count: int) -> str:
    """A number of turns in words."""
    return "turn" if count == 1 else f"{count} turns"
