"""A progress bar for a terminal: an observer of training."""

from typing import Any

from tqdm import tqdm


class ProgressBar:
    """One bar a phase: loss, errors, what would survive, and images a second."""

    def begin(self, phase: str, steps: int) -> None:
        self.bar = tqdm(total=steps, desc=phase, unit="step", dynamic_ncols=True)
        self.shown: dict[str, str] = {}

    def step(self) -> None:
        self.bar.update()

    def record(self, values: dict[str, Any]) -> None:
        for name, (label, form) in SHOWN.items():
            if name in values:
                self.shown[label] = form.format(values[name])
        self.bar.set_postfix(self.shown)

    def end(self) -> None:
        self.bar.total = self.bar.n  # a search that has met its budget is complete
        self.bar.close()


SHOWN = {
    "loss": ("loss", "{:.3f}"),
    "error": ("train error", "{:.1%}"),
    "test_error": ("test error", "{:.2%}"),
    "flops_ratio": ("FLOPs", "{:.1%}"),
    "params_ratio": ("params", "{:.1%}"),
    "examples_per_second": ("images/s", "{:.0f}"),
}
