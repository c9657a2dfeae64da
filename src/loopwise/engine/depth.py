"""How deep a prompt is read.

full  every position of a prompt runs all permitted loops; exits apply to generated tokens. What a prompt leaves behind
      depends on no exit rule, so requests of different efforts share it.
exit  a prompt's position is a position like any other: it stops where the rule stops it. Under `last_exited` that
      saves its remaining loops, under `per_loop` it fills its planes. Answers can be found again as prompts, since
      nothing tells them apart; the rule is part of what a page is.
"""

from typing import Literal

from loopwise.errors import ConfigError
from loopwise.loops.exits import ExitRule
from loopwise.models.looped_lm import LoopedLM

PromptDepth = Literal["full", "exit"]
_DEPTHS: tuple[PromptDepth, ...] = ("full", "exit")


def check_prompt_depth(depth: str) -> PromptDepth:
    """The prompt depth of this name.

    Raises:
        ConfigError: when there is none.
    """
    for allowed in _DEPTHS:
        if depth == allowed:
            return allowed
    raise ConfigError(f"prompt_depth={depth!r}: allowed are {', '.join(_DEPTHS)}")


def check_rule_in_prompts(model: LoopedLM, rule: ExitRule) -> None:
    """Refuse rules that cannot judge the positions of a prompt while they run beside each other.

    Raises:
        ConfigError: a budget, or a rule that reads what a coda makes of earlier positions that have not stopped.
    """
    if "allowance" in rule.needs:
        raise ConfigError(
            f"exit rule {rule} spends a budget token by token, and a prompt's positions run together; "
            'type prompt_depth="full", or the rule within the budget alone'
        )
    if "logits" in rule.needs and len(model.coda):
        raise ConfigError(
            f"exit rule {rule} reads predictions, and this model's coda looks at earlier positions, which may not have "
            'stopped yet; type prompt_depth="full", or a rule such as delta:0.03, which reads states only'
        )
