"""What pruning has made of a network of the user's: layers, cost, and time if that is asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
import textwrap
from typing import Any

from flax import nnx
import jax

from dhp_jax.budgets.latency import clock
from dhp_jax.budgets.layer_table import (
    COLUMNS,
    LABELS,
    change,
    layer_changes,
    percent,
    same_layers,
    short_layer_table,
)
from dhp_jax.budgets.other_widths import advice, time_other_widths
from dhp_jax.budgets.rounding import AUTO, multiples
from dhp_jax.budgets.selection import default_scores, selection
from dhp_jax.budgets.timing import check_batch, hardware
from dhp_jax.core.cost import Cost
from dhp_jax.core.latent import latents
from dhp_jax.core.provenance import architecture_of
from dhp_jax.tracing.counts import measure_cost
from dhp_jax.tracing.programs import Call


@dataclass(frozen=True)
class Summary:
    """A network before and after pruning; printed as a table.

    Attributes:
      before, after: their costs.
      batch: how many inputs a timed pass took; `None` if nothing was timed.
      ratio: quartiles of the time after as a share of the time before, over pairs of passes.
      other_widths: where it is slower, the same of networks of other `multiple_of`.
      uneven: if nothing was timed, latents whose number of survivors `multiple_of="auto"` would
        round here, with the multiple of each.

    Example:
      >>> print(dhp.summary(model, small, (32, 32, 3)))
    """

    before: Cost
    after: Cost
    batch: int | None = None
    ratio: Mapping[str, float] | None = None
    other_widths: Mapping[int | str, Mapping[str, float]] | None = None
    uneven: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        if self.before.layers and same_layers(self.before, self.after):
            lines += [short_layer_table(layer_changes(self.before, self.after)), ""]
        for name, label in LABELS.items():
            old, new = (getattr(cost, name) for cost in (self.before, self.after))
            unit = " bytes" if name == "activations" else ""
            share = f" ({percent(new / old)})" if old else ""
            lines.append(f"{label:<13}{change(old, new)}{unit}{share}")
        if self.ratio is not None:
            shown = "{median:.2f} of the time before ({low:.2f} to {high:.2f})".format(**self.ratio)
            lines.append(f"{'time':<13}{shown}, batch {self.batch}, {hardware()}")
        if self.other_widths is not None:
            lines.append(f"{'slower':<13}{advice(self.other_widths)}")
        if self.uneven:
            lines += textwrap.wrap(
                f"{len(self.uneven)} latents keep a number of channels that is no multiple of "
                f"{max(self.uneven.values())}. On {jax.default_backend()} such multiples were "
                f'faster on average: multiple_of="{AUTO}". batch=64 times both networks.',
                COLUMNS,
                initial_indent=f"{'widths':<13}",
                subsequent_indent=13 * " ",
            )
        return "\n".join(lines)

    __repr__ = __str__


def summary(
    model: nnx.Module,
    small: nnx.Module,
    inputs: Any = None,
    *,
    call: Call | None = None,
    batch: int | None = None,
) -> Summary:
    """Tells what pruning has made of a network, layer by layer and in all.

    Args:
      model: the network before pruning: with latents, traced or declared, or an ordinary one.
      small: the network after it.
      inputs: shape of one example, `(height, width, channels)`, or other inputs, as for
        `dhp.measure_cost`; `None` for those that `dhp.with_latents` was given.
      call: a function of the model and the inputs, where that is not `model(*inputs)`.
      batch: time both networks with so many examples, in turn, on this machine; arrays that are
        given here are repeated. Where the pruned one is slower and `model` has latents, networks
        of other `multiple_of` are timed too.

    Returns:
      The costs and times, which print as a table for a terminal.

    Raises:
      ValueError: inputs that the networks do not take; a `batch` that is no positive integer.

    Example:
      >>> print(dhp.summary(model, small, (32, 32, 3)))
      >>> print(dhp.summary(model, small, (32, 32, 3), batch=64))
    """
    table = architecture_of(model).axes
    call = call or (table and table.call)
    if inputs is None and table is not None:
        inputs = table.inputs
    if inputs is None:
        raise ValueError(
            "inputs: expected the shape of one example, such as (32, 32, 3), for a network that "
            "dhp.with_latents was not told it of; got None"
        )
    check_batch(batch)
    before, after = (measure_cost(network, inputs, call=call) for network in (model, small))
    if batch is None:
        return Summary(before, after, uneven=_uneven(model, before, after))
    timed = clock(model, inputs, batch, call)
    time, others = timed(small), None
    if time.ratio["low"] > 1 and latents(model):
        share = {"flops": after.flops / before.flops}
        select = selection(default_scores(model), share)
        tried = time_other_widths(model, before, timed, 1, lambda number: share, select)
        others = {number: found.ratio for number, found in tried.items()}
    return Summary(before, after, batch, time.ratio, others)


def _uneven(model: nnx.Module, before: Cost, after: Cost) -> dict[str, int]:
    """Latents that have lost entries and keep a number of them that "auto" would round."""
    if not latents(model) or not same_layers(before, after):
        return {}
    steps, found = multiples(model, AUTO), {}
    for old, new in zip(before.layers, after.layers, strict=True):
        match old.outputs.latents:
            case ((name, 1),) if not old.outputs.fixed:
                if new.outputs.full < old.outputs.full and new.outputs.full % steps.get(name, 1):
                    found[name] = steps[name]
    return found
