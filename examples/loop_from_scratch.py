"""A looped language model, trained on text from nothing, in one flat file.

    python examples/loop_from_scratch.py [STEPS]

What `loopwise train` does in many files stands here in one, without anything between you and torch but the model
itself: a block of two layers that is applied four times, an exit gate, and the expected loss over loops. The text is
the Python library that every machine has; a token is a byte. About a minute on two cores.
"""

import math
import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F

from loopwise import LoopedLM, LoopedLMConfig

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
LOOPS, WIDTH, ROWS, CONTEXT, RATE, BETA = 4, 96, 8, 96, 5e-3, 0.1

torch.manual_seed(0)

# Text: the library's modules one after the other, the last twentieth held out.
library = Path(sysconfig.get_paths()["stdlib"])
text = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
cut = len(data) * 19 // 20
train, held_out = data[:cut], data[cut:]


def draw(source: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows of CONTEXT tokens and one more, from places that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(source) - CONTEXT, (ROWS,), generator=generator)
    return torch.stack([source[place : place + CONTEXT + 1] for place in places]).long()


# Model: state <- norm(core(state)), LOOPS times; the head and the gate read the state after every loop.
model = LoopedLM(
    LoopedLMConfig(
        vocab_size=256,
        width=WIDTH,
        heads=2,
        kv_heads=2,
        head_width=WIDTH // 2,
        mlp_width=256,
        core_layers=2,
        loops=LOOPS,
        trained_loops=(1, LOOPS),
        anytime=True,
        max_positions=512,
        norm="pre_branch",
        loop_norm=True,
        final_norm=False,
        gate=True,
    )
)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name != "embed.weight":
            # Branches are added 2 * layers * loops times, so what writes to the state starts small.
            writes = name.endswith(("out.weight", "down.weight"))
            parameter.normal_(std=(2 / (5 * WIDTH)) ** 0.5 / ((2 * 2 * LOOPS) ** 0.5 if writes else 1))
    model.gate.weight.zero_()
    model.gate.bias.zero_()
optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {LOOPS} loops, {STEPS} steps")


def run(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (LOOPS, ROWS, CONTEXT) of the next token after every loop, and the gate's chances of stopping there."""
    context = model.encode(tokens[:, :-1])
    state = model.initial_state(context)
    losses, hazards = [], []
    for loop in range(1, LOOPS + 1):
        state = model.step(state, context, loop)
        logits = model.readout(state, context)
        losses.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(ROWS, -1))
        hazards.append(model.hazard(state))
    return torch.stack(losses), torch.stack(hazards)


def exit_shares(hazards: torch.Tensor) -> torch.Tensor:
    """p_r = hazard_r * (chance of still being there); the last loop takes what is left."""
    left, shares = torch.ones_like(hazards[0]), []
    for hazard in hazards[:-1]:
        shares.append(left * hazard)
        left = left * (1 - hazard)
    return torch.stack([*shares, left])


for step in range(STEPS):
    losses, hazards = run(draw(train, seed=step))
    if step < STEPS // 2:
        # Every loop counts alike at first: a gate that may choose at once chooses loop 1 and starves the others.
        loss = losses.mean()
    else:
        shares = exit_shares(hazards)
        entropy = -(shares * shares.clamp_min(1e-9).log()).sum(0)
        loss = ((shares * losses).sum(0) - BETA * entropy).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    done = step / STEPS
    optimizer.param_groups[0]["lr"] = RATE * min(1.0, 20 * (done + 1 / STEPS), 3 * (1 - done))
    optimizer.step()
    optimizer.zero_grad()
    if step % max(1, STEPS // 10) == 0 or step == STEPS - 1:
        by_loop = " ".join(f"{value:.3f}" for value in losses.detach().mean((1, 2)).tolist())
        print(f"step {step + 1:4d}  loss by loop {by_loop}", flush=True)

# What is a loop worth on text that was held out, and where would the gate leave?
with torch.no_grad():
    found = [run(draw(held_out, seed=seed)) for seed in range(4)]
    losses = torch.stack([losses.mean((1, 2)) for losses, _ in found]).mean(0)
    shares = torch.stack([exit_shares(hazards).mean((1, 2)) for _, hazards in found]).mean(0)
print("\nloops  held-out bits per byte  gate leaves here")
for loop in range(LOOPS):
    print(f"{loop + 1:5d}  {losses[loop] / math.log(2):22.3f}  {shares[loop]:16.0%}")

# And what does it write? A byte at a time, with every byte seen again: slow, and nothing to get wrong.
tokens = torch.tensor([list(b"def ")])
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    for _ in range(min(200, STEPS)):
        logits = model(tokens[:, -CONTEXT:], loops=LOOPS).logits[:, -1]
        drawn = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], dim=1)
print("\n" + bytes(tokens[0].tolist()).decode("utf-8", "replace"))
