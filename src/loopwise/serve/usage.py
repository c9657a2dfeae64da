"""What answers have cost: tokens, loops, estimated arithmetic, memory."""

from collections.abc import Sequence
from typing import Any

from loopwise.engine.engine import Engine
from loopwise.models.accounting import count_flops
from loopwise.serve.voice import Voice


def usage(engine: Engine, voices: Sequence[Voice], *, prompt_tokens: int) -> dict[str, Any]:
    """OpenAI's usage, and beside it what only loops can tell.

    `reasoning_tokens` are the visible tokens of thought; loops are never counted there.
    """
    tokens = sum(len(voice.tokens) for voice in voices)
    loops = [count for voice in voices for count in voice.loops if count]
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "completion_tokens_details": {"reasoning_tokens": sum(voice.thought for voice in voices)},
        "loop": {
            "total": sum(loops),
            "mean": sum(loops) / len(loops) if loops else None,
            "max": max(loops, default=None),
            "flops": sum(flops(engine, voice) for voice in voices),
            "kv_bytes": sum(voice.kv_bytes for voice in voices),
        },
    }


def flops(engine: Engine, voice: Voice) -> float:
    """Estimated operations of one answer and its prompt, as if no page had been found and no draft made.

    Attention is counted at the mean context of each part. Under a policy that fills, a token that left early has run
    its other loops too.
    """
    config, most = engine.model.config, voice.knob.max_loops
    read = [most] * len(voice.prompt) if engine.policy.fills or not voice.prompt_loops else voice.prompt_loops
    cost = count_flops(config, context=(len(voice.prompt) + 1) // 2)
    prompt = float(cost.fixed * len(read) + cost.per_loop * sum(read))
    answer = count_flops(config, context=len(voice.prompt) + len(voice.tokens) // 2)
    # The first token leaves the prompt's last row, and forced ones (0 loops) enter as prompt rows do.
    rows = voice.loops[1:]
    ran = [most if engine.policy.fills else (count or most) for count in rows]
    return prompt + answer.fixed * len(ran) + answer.per_loop * sum(ran)
