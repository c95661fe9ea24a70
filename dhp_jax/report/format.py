"""The numbers of a run in words and tables."""

from collections.abc import Mapping
import json
import math
import os
import textwrap
from typing import Any

from dhp_jax.budgets.layer_table import COLUMNS, LABELS, percent
from dhp_jax.budgets.other_widths import advice
from dhp_jax.config.methods import METHODS
from dhp_jax.models.own import is_own
from dhp_jax.tasks.task import METRICS


def main_metric(values: Mapping[str, float]) -> str:
    """The metric of some that a task is judged by."""
    return "psnr" if "psnr" in values else "error"


def metrics_text(values: Mapping[str, float]) -> str:
    """Metrics for people: "2.00 %", or "24.93 dB, SSIM 0.6512"."""
    first = main_metric(values)
    shown = [METRICS[first].text(values[first])]
    others = [name for name in values if name not in (first, "loss")]
    return ", ".join(
        shown + [f"{METRICS[name].label} {METRICS[name].text(values[name])}" for name in others]
    )


def load_call(folder: str | os.PathLike, model: Mapping[str, Any]) -> str:
    """The Python that loads a network, whose function a user has to give if it is none of ours."""
    name = model.get("name")
    build = f", build={name.partition(':')[2]}" if is_own(name) else ""
    return f"dhp.load({json.dumps(str(folder), ensure_ascii=False)}{build})"


def in_words(shares: Mapping[str, float]) -> str:
    """Shares of a network's cost: "0.52 of the FLOPs and 0.6 of the params".

    Those that limit nothing are left out, if others do.
    """
    told = {name: share for name, share in shares.items() if share < 1} or shares
    return " and ".join(f"{share:g} of the {LABELS[name]}" for name, share in told.items())


def labelled(label: str, text: str, width: int) -> str:
    """A label and its text within `COLUMNS`, on more lines below each other where it is long."""
    return textwrap.fill(
        text,
        COLUMNS,
        initial_indent=f"{label:<{width}}  ",
        subsequent_indent=" " * (width + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def start_text(summary: Mapping[str, Any]) -> str:
    """What the smaller network of a run started from; nothing where its phases tell."""
    method, origin = METHODS[summary["method"]], summary.get("origin")
    if origin is None and summary["model"].get("weights"):
        return f"the weights in {summary['model']['weights']}"
    if origin is None:
        return "fresh weights" if method.fresh and method.prunes else ""
    count = origin["epochs"]
    spent = f"{count} epoch{'s' * (count != 1)}, {origin['steps']:,} updates"
    if method.fresh:
        return f"the channels kept by {origin['run']}, a search of {spent}; fresh weights"
    return f"the weights of {origin['run']}, trained for {spent}"


def compared_with(summary: Mapping[str, Any]) -> tuple[str, Mapping[str, float]] | None:
    """What a pruned network is compared with, and the test metrics of that; `None` if not known."""
    for name, title in (("unpruned", "unpruned"), ("given", "given weights")):
        if values := summary["test"].get(name):
            return title, values
    return None


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What is to be known of a run's phases."""
    found, phases = [], summary["phases"]
    if "search" in phases and not phases["search"]["met_budget"]:
        found.append("the search ended above its budget; the network was pruned to it anyway")
    return found + [
        f"{phase['skipped']} batches of the {name} phase were skipped: not finite"
        for name, phase in phases.items()
        if phase.get("skipped")
    ]


def timed_batches(summary: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of a summary's latency, one for each size of a batch."""
    latency = summary and summary.get("latency")
    return latency["batches"] if latency else []


def interval(share: float, count: int) -> str:
    """The 95 % interval of a share of examples, for people: "0.55 to 2.60 %"."""
    low, high = wilson(share, count)
    return f"{100 * low:.2f} to {100 * high:.2f} %"


def wilson(share: float, count: int) -> tuple[float, float]:
    """The ends of the 95 % confidence interval of a share that was found among some examples.

    References:
      E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    z2 = 1.959963984540054**2
    middle = share + z2 / (2 * count)
    reach = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * count)) / count)
    whole = 1 + z2 / count
    return max(0.0, (middle - reach) / whole), min(1.0, (middle + reach) / whole)


def upper_first(text: str) -> str:
    """Text that begins with a capital letter."""
    return text[:1].upper() + text[1:]


def with_quartiles(shares: Mapping[str, float]) -> str:
    """The median of shares, and their quartiles: "49.98 % (49.50 % to 50.25 %)"."""
    return "{} ({} to {})".format(*(percent(shares[name]) for name in ("median", "low", "high")))


def milliseconds(value: float) -> str:
    """A time for people, to three digits or the whole: "1.92 ms"."""
    return f"{value:#.3g} ms" if value < 99.95 else f"{value:,.0f} ms"


def loss_text(value: float) -> str:
    """A loss for people: "0.0478", "2,839", "1.10e+06"."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Time for people: "85 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def faster(row: Mapping[str, Any]) -> str:
    """The quartiles of a speed-up in words; if they lie on both sides of 1 there is none.

    Of a slower network it tells which `multiple_of` would help.
    """
    low, median, high = (row["speedup"][name] for name in ("low", "median", "high"))
    if low <= 1 <= high:
        return f"no difference beyond the noise ({low:.2f} to {high:.2f} times as fast)"
    if median > 1:
        return f"{median:.2f} times as fast ({low:.2f} to {high:.2f})"
    told = f"slower: takes {1 / median:.2f} times as long ({1 / high:.2f} to {1 / low:.2f})"
    return f"{told}; {advice(row['other_widths'])}" if "other_widths" in row else told
