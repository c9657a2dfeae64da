"""`loopwise generate`: continue a prompt, spending loops where they are needed."""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopwise.errors import ConfigError, InputError, NotFoundError

if TYPE_CHECKING:
    from loopwise.cli.models import GenerateConfig
    from loopwise.engine.answer import Completion
    from loopwise.models.looped_lm import LoopedLM
    from loopwise.trace import LoopTrace

CONFIG = "loopwise.cli.models:GenerateConfig"
_ROUNDS = 3


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint or a run, or a hub id.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.")
    ] = None,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="How to continue it.", show_default=False)
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    show_loops: Annotated[
        bool, typer.Option("--show-loops", help="Tint each token by its loops and say what that saved.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure the speed beside full depth, the two taking turns.")
    ] = False,
    trace: Annotated[Path | None, typer.Option(help="Save what every loop thought of every token.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the same as one HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue a prompt, spending loops where they are needed.

    - `exit=hazard:0.6` (or delta:0.03, kl:5e-4, ...) lets each token leave as soon as that rule says so;
      `max_loops=4`, `min_loops=2` bound its loops

    - `temperature=0.8 top_p=0.95 seed=1 max_tokens=200 stop=END` choose the tokens

    - `policy=per_loop`, `dtype=bfloat16`, `device=cuda` say how to run; `ids=1,2,3` is a prompt without a tokenizer

    A prompt that looks like `key=value` goes in through - or --file, which both drop one line end at the end.
    """
    from loopwise.cli.models import GenerateConfig, accept_any_text, is_setting, load_model, read_settings

    given = [word for word in (prompt, *(words or ())) if word is not None]
    config = read_settings(GenerateConfig, [word for word in given if is_setting(word)])
    text = read_prompt([word for word in given if not is_setting(word)], file, config.ids)
    if as_json and show_loops:
        raise ConfigError("--json prints data and --show-loops colours; give one of them")
    if compare and config.exit is None:
        raise ConfigError("--compare needs an exit rule to compare with full depth; type for example exit=hazard:0.6")
    if trace is not None and config.n > 1:
        raise ConfigError(f"--trace saves one answer, and n={config.n}; type --page, or leave n out")
    accept_any_text()
    loaded = load_model(model, dtype=config.dtype, device=config.device)
    answers = answer(loaded, text, config, quiet=as_json, show_loops=show_loops)
    interrupted = answers[-1].interrupted
    if trace is not None or page is not None:
        keep(loaded, model, answers, config, trace=trace, page=page)
    found = [report(each) for each in answers]
    try:
        for each, facts in zip(answers, found, strict=True) if compare and not interrupted else ():
            facts["compare"] = measure(loaded, each, config)
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        typer.echo(json.dumps({"model": model} | (found[0] if config.n == 1 else {"samples": found})))
    else:
        remarks(loaded, answers, found, trace=trace, page=page)
    if interrupted:
        raise KeyboardInterrupt


def read_prompt(words: Sequence[str], file: Path | None, ids: tuple[int, ...] | None) -> "str | tuple[int, ...]":
    """The prompt, from whichever of its sources was given.

    Raises:
        InputError: when that is none or several of them, or its text is not UTF-8.
        NotFoundError: when the file is not there.
    """
    if len(words) > 1:
        raise InputError(f"{words[0]!r} and {words[1]!r} are two prompts; put one prompt into quotes")
    if (len(words) + (file is not None) + (ids is not None)) != 1:
        raise InputError('give one prompt: a text in quotes, - for stdin, --file PATH or ids=1,2,3; for example "Once"')
    if ids is not None:
        return ids
    try:
        if file is not None:
            text = file.read_bytes().decode()
        elif words[0] == "-":
            text = sys.stdin.read()
        else:
            return words[0]
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {file}; type the path of a text file") from None
    except IsADirectoryError:
        raise NotFoundError(f"{file} is a folder; type the path of a text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file or 'stdin'} is not UTF-8 text (byte {error.start}); convert it") from None
    return text.removesuffix("\n").removesuffix("\r")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer and what it was made with."""

    completion: "Completion"
    rule: str
    policy: str
    max_loops: int
    interrupted: bool


def answer(
    model: "LoopedLM", prompt: "str | Sequence[int]", config: "GenerateConfig", *, quiet: bool, show_loops: bool
) -> list[Answer]:
    """Answer as often as asked, showing each token as it comes; an interrupt ends it with what there is."""
    from loopwise.cli.models import AnswerPrinter, loops_known, run
    from loopwise.engine.write import Writer
    from loopwise.loops.drivers import check_loops

    check_loops(model, config.max_loops or model.config.loops)
    writer, answers = Writer(model), list[Answer]()
    for sample in range(config.n):
        with loops_known():
            generation = writer.stream(
                prompt, config, policy=config.policy, prompt_depth=config.prompt_depth, sample=sample
            )
        if config.n > 1 and not quiet:
            typer.echo(f"{'' if sample == 0 else chr(10)}== {sample + 1} of {config.n}")
        if quiet:
            interrupted = not run(generation, lambda emission: None)
        else:
            printer = AnswerPrinter(generation, show_loops=show_loops)
            printer.given(texts_of(model, generation.prompt))
            interrupted = not run(generation, printer.push)
            printer.finish(generation.completion)
        answers.append(
            Answer(
                completion=generation.completion,
                rule=str(generation.rule),
                policy=generation.policy,
                max_loops=generation.max_loops,
                interrupted=interrupted,
            )
        )
        if interrupted:
            break
    return answers


def texts_of(model: "LoopedLM", tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text."""
    from loopwise.hub.tokenizer import StreamDecoder

    if model.tokenizer is None:
        return [f"{token} " for token in tokens]
    decoder = StreamDecoder(model.tokenizer, skip_special=False)
    return [decoder.push(token) for token in tokens]


def report(answer: Answer) -> dict[str, Any]:
    """An answer as data for JSON. Times are in seconds, log-probabilities in nats."""
    done = answer.completion
    return {
        "text": done.text,
        "tokens": done.tokens,
        "loops": done.loops,
        "prompt_loops": done.prompt_loops,
        "logprobs": done.logprobs,
        "mean_loops": done.mean_loops if done.tokens else None,
        "max_loops": answer.max_loops,
        "rule": answer.rule,
        "policy": answer.policy,
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.prompt,
        "sample": done.sample,
        "seconds": done.seconds,
        "prompt_seconds": done.prompt_seconds,
        "tokens_per_second": done.tokens_per_second,
        "kv_bytes": done.kv_bytes,
    }


def measure(model: "LoopedLM", answer: Answer, config: "GenerateConfig") -> dict[str, Any] | None:
    """Tokens per second with the rule and at full depth, of equally many tokens, the two taking turns.

    None when there is only one token, which the prompt gives.
    """
    from loopwise.cli.models import loops_known
    from loopwise.engine.write import Writer

    done = answer.completion
    if len(done.tokens) < 2:
        return None
    same = replace(config, max_tokens=len(done.tokens), ignore_eos=True, stop=())
    sides = {
        "tokens_per_second": (Writer(model), same, answer.policy, config.prompt_depth),
        "full_depth_tokens_per_second": (Writer(model), replace(same, exit=None), "per_loop", "full"),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    with loops_known():
        for _ in range(_ROUNDS):
            for name, (writer, sampling, policy, depth) in sides.items():
                generation = writer.stream(done.prompt, sampling, policy=policy, prompt_depth=depth, sample=done.sample)
                for _emission in generation:
                    pass
                rates[name].append(generation.completion.tokens_per_second or 0.0)
    found = {name: statistics.median(each) for name, each in rates.items()}
    speedup = found["tokens_per_second"] / found["full_depth_tokens_per_second"]
    return {"rounds": _ROUNDS, "tokens": len(done.tokens), **found, "speedup": speedup}


def keep(
    model: "LoopedLM",
    name: str,
    answers: Sequence[Answer],
    config: "GenerateConfig",
    *,
    trace: Path | None,
    page: Path | None,
) -> None:
    """Save the trace, and the page made of it."""
    from loopwise.studio.page import write_page

    suggested = config.exit or ("delta:0.03" if model.gate is None else "hazard:0.6")
    traces = [record(model, name, answer, config) for answer in answers if answer.completion.tokens]
    if trace is not None and traces:
        traces[0].save(trace)
    if page is not None and traces:
        write_page(
            page,
            traces,
            title=f"{name}, loop by loop",
            intro="The tints show the loops that each token really ran. What every loop thought of a token was "
            "recorded afterwards, in one more pass over the finished text with all loops.",
            next_commands=[
                f"loopwise info {name}",
                f'loopwise generate {name} "..." exit={suggested} --show-loops --compare',
            ],
        )


def record(model: "LoopedLM", name: str, answer: Answer, config: "GenerateConfig") -> "LoopTrace":
    """The trace of one answer."""
    from loopwise.cli.models import loops_known
    from loopwise.engine.record import record_trace

    done = answer.completion
    with loops_known():
        return record_trace(
            model,
            done.prompt + done.tokens,
            prompt_length=len(done.prompt),
            loops=done.loops,
            max_loops=answer.max_loops,
            start=config.start,
            rule=answer.rule,
            policy=answer.policy,
            title=f"{name}, {answer.rule}" + (f", sample {done.sample + 1}" if config.n > 1 else ""),
            name=name,
        )


def remarks(
    model: "LoopedLM",
    answers: Sequence[Answer],
    found: Sequence[dict[str, Any]],
    *,
    trace: Path | None,
    page: Path | None,
) -> None:
    """What there is to say beside the answers, on stderr."""
    from loopwise.cli.models import note

    for answer, facts in zip(answers, found, strict=True):
        if answer.completion.finish_reason == "context":
            note(f"warning: the answer ends here because the context of {model.config.max_positions:,} tokens is full")
        if "compare" in facts:
            note(spoken(facts["compare"]))
    for path in (trace, page):
        if path is not None and answers[0].completion.tokens:
            note(f"wrote {path}")


def spoken(compared: dict[str, Any] | None) -> str:
    """A measured comparison in words."""
    if compared is None:
        return "nothing to compare: the only token came from the prompt; give max_tokens=32 or more"
    return (
        f"{compared['speedup']:.2f}x the speed of full depth: {compared['tokens_per_second']:.3g} against "
        f"{compared['full_depth_tokens_per_second']:.3g} tokens/s over {compared['tokens']} tokens, medians of "
        f"{compared['rounds']} rounds that took turns"
    )
