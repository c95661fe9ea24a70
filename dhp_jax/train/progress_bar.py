"""An observer of training that shows progress on a terminal, or line by line in a log."""

from collections.abc import Sequence
import sys
from typing import Any

from tqdm import tqdm

SHOWN = {
    "loss": ("loss", "{:.3f}"),
    "error": ("train error", "{:.1%}"),
    "psnr": ("train PSNR", "{:.2f} dB"),
    "test_error": ("test error", "{:.2%}"),
    "test_psnr": ("test PSNR", "{:.2f} dB"),
    "flops_ratio": ("FLOPs", "{:.1%}"),
    "params_ratio": ("params", "{:.1%}"),
    "examples_per_second": ("images/s", "{:.0f}"),
}


class ProgressBar:
    """Shows a bar for each phase: loss, error, the cost of what would survive, images a second.

    Where standard error is no terminal, it prints a line for each epoch.
    """

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
            disable=None,
            leave=True,
        )

    def step(self, count: int) -> None:
        self.bar.update(count)

    def record(self, values: dict[str, Any]) -> None:
        for name, (label, form) in SHOWN.items():
            if name in values:
                self.shown[label] = form.format(values[name])
        self.bar.set_postfix(self.shown)
        if self.bar.disable and any(name.startswith("test_") for name in values):
            shown = ", ".join(f"{label} {value}" for label, value in self.shown.items())
            position = f"epoch {values['epoch']}, step {values['step']} of {self.total}"
            print(f"{self.phase}: {position}: {shown}", file=sys.stderr, flush=True)

    def end(self) -> None:
        self.bar.total = self.bar.n  # a search that has met its budget is complete
        self.bar.close()
