"""Estimate of the time that the rest of a run takes: its steps and evaluations."""

from lora_jax.config import Config
from lora_jax.report.usage import Clock
from lora_jax.train.evaluate import Evaluator


def seconds_left(evaluator: Evaluator, clock: Clock, step: int) -> tuple[float, bool]:
    """Estimate the seconds until the end, with `step` steps done and its evaluation still due. Also
    return False if the estimate omits evaluations because none has been timed yet.
    """
    config, took = evaluator.config, evaluator.took
    seconds = clock.remaining(config.train.total_steps - step)
    due = evaluations(config, step) if evaluator.held_out else 0
    answers = due_answers(evaluator, step)
    seconds += due * took.get("losses", 0.0) + answers * took.get("answers", 0.0)
    known = (not due or "losses" in took) and (not answers or "answers" in took)
    return seconds, known


def evaluations(config: Config, step: int) -> int:
    """Count the evaluations at steps from `step` on; the last step always has one."""
    return _multiples(step, config.train.total_steps, config.train.eval_every)


def due_answers(evaluator: Evaluator, step: int) -> int:
    """Count the answers generated from `step` on: all held-out prompts at the end and every
    eval.generate_every steps, samples at other evaluations.
    """
    settings, steps = evaluator.config.eval, evaluator.config.train.total_steps
    full = evaluator.count_answers(settings.generate_examples)
    times = _multiples(step, steps, settings.generate_every)
    others = max(0, evaluations(evaluator.config, step) - times)
    return times * full + others * evaluator.count_answers(settings.samples)


def _multiples(step: int, steps: int, every: int | None) -> int:
    """Count the multiples of `every` from `step` to `steps`, and the last step as one of them."""
    found = 0 if every is None else steps // every - (step - 1) // every
    return found + (every is None or steps % every != 0)
