"""What people see of a training under way, on rank 0 alone."""

import sys

from tqdm import tqdm

from minicode.runtime import processes


def bar(*what, leave=False, **how):
    """A bar on stderr where that is a terminal, else one that does not show."""
    return tqdm(*what, leave=leave, disable=processes.rank() > 0 or None, **how)


def say(text):
    """A line on stderr where no bar shows."""
    if processes.rank() == 0 and not sys.stderr.isatty():
        print(text, file=sys.stderr)


def show(steps_bar, session, loss):
    """After a step: moves the bar. Without one: a line at each twentieth of the steps."""
    done = session.step
    steps = session.config.steps
    if not steps_bar.disable:
        steps_bar.update()
        if done % 10 == 0:
            last = f"  (at {describe(session.metrics[-1])})" if session.metrics else ""
            steps_bar.set_postfix_str(f"loss {loss.item():.3f}{last}")
    elif done % max(1, steps // 20) == 0:
        step, seconds = session.paced
        pace = (session.seconds - seconds) / (done - step)
        left = tqdm.format_interval(pace * (steps - done))
        say(f"step {done:5} of {steps}  loss {loss.item():.3f}  about {left} left")


def describe(line):
    """A line of metrics for people."""
    codes = "dense"
    if "dead_code_fraction" in line:
        codes = f"live codes {1 - line['dead_code_fraction']:.0%}"
    name = "transition_accuracy" if "transition_accuracy" in line else "accuracy"
    accuracy = f"{name.replace('_', ' ')} {line[name]:.3f}"
    return f"step {line['step']:5}  loss {line['loss']:.4f}  {accuracy}  {codes}"
