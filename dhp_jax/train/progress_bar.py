"""An observer of training that shows progress on a terminal, or line by line in a log."""

from collections.abc import Sequence
import logging
import sys
import textwrap
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

SHOWN = {  # the most important first: what does not fit beside a bar is left out whole
    "test_error": ("test error", "{:.2%}"),
    "test_psnr": ("test PSNR", "{:.2f} dB"),
    "flops_ratio": ("FLOPs", "{:.1%}"),
    "loss": ("loss", "{:.3f}"),
    "validation_error": ("validation error", "{:.2%}"),
    "validation_psnr": ("validation PSNR", "{:.2f} dB"),
    "examples_per_second": ("images/s", "{:.0f}"),
    "params_ratio": ("params", "{:.1%}"),
    "error": ("train error", "{:.1%}"),
    "psnr": ("train PSNR", "{:.2f} dB"),
}

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
CELLS = 6  # of the bar, at least


class ProgressBar:
    """Shows a bar for each phase: loss, error, the cost of what would survive, images a second.

    Where standard error is no terminal, it prints a line for each epoch; it always logs that.
    """

    def __init__(self) -> None:
        self.phase, self.bar = "", None
        self._forget()

    def _forget(self) -> None:
        self.told: set[str] = set()  # of what is done between steps
        self.waiting = False  # whether the bar shows it

    def begin(self, phase: str, steps: int, done: int, records: Sequence[dict[str, Any]]) -> None:
        self.phase, self.total, self.shown = phase, steps, {}
        if done:
            print(f"{phase}: going on from step {done}", file=sys.stderr, flush=True)
        self.bar = tqdm(
            total=steps,
            initial=done,
            desc=phase,
            unit="step",
            dynamic_ncols=True,
            bar_format=FORMAT,
            disable=None,
            leave=True,
        )
        self.begun = False
        self._forget()

    def wait(self, what: str, again: bool) -> None:
        """Shows what is done between steps beside the bar; elsewhere as a line, once a phase.

        `again` tells whether it was shown a second ago.
        """
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(textwrap.shorten(what, self._room(), placeholder=""))
            self.waiting = True
        elif not again and what not in self.told:
            print(f"{self.phase}: {what}" if self.phase else what, file=sys.stderr, flush=True)
            self.told.add(what)

    def step(self, count: int) -> None:
        if not self.begun and not self.bar.disable:  # the time that is left is that of steps
            self.bar.unpause()
        if self.waiting:
            self.bar.set_postfix_str(self._fitting(), refresh=False)
            self.waiting = False
        self.begun = True
        self.bar.update(count)

    def record(self, values: dict[str, Any]) -> None:
        for name, (label, form) in SHOWN.items():
            if name in values:
                self.shown[label] = form.format(values[name])
        self.shown = {
            label: self.shown[label] for label, _ in SHOWN.values() if label in self.shown
        }
        if not self.bar.disable:
            self.bar.set_postfix_str(self._fitting())
        if any(name.startswith("test_") for name in values):
            shown = ", ".join(f"{label} {value}" for label, value in self.shown.items())
            position = f"epoch {values['epoch']}, step {values['step']} of {self.total}"
            line = f"{self.phase}: {position}: {shown}"
            logger.debug("%s", line)
            if self.bar.disable:
                print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        if sys.exception() is None:  # and not at Ctrl-C or an error
            self.bar.total = self.bar.n  # a search that has met its budget is complete
        self.bar.close()
        self.phase = ""
        self._forget()

    def _fitting(self) -> str:
        """What is shown behind the bar: whole numbers, as many as the terminal is wide."""
        text = ""
        for label, value in self.shown.items():
            longer = f"{text}, {label}={value}" if text else f"{label}={value}"
            if len(longer) <= self._room():
                text = longer
        return text

    def _room(self) -> int:
        """How many characters fit behind the bar."""
        columns, _ = self.bar.dynamic_ncols(self.bar.fp)
        around = f"{self.phase}: 100%|| {self.total}/{self.total} [0:00:00<0:00:00, ]"
        return max(1, (columns or sys.maxsize) - 1 - len(around) - CELLS)
