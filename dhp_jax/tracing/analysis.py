"""A whole network and its solved equations; networks cut out of it, and their proof."""

from collections.abc import Sequence
from dataclasses import dataclass, field
import logging
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax.core.plain import slice_axes
from dhp_jax.core.state import value_of, with_value
from dhp_jax.errors import ArgumentError, first_line
from dhp_jax.tracing import rules_of_sums  # noqa: F401  (registers rules, as what it imports)
from dhp_jax.tracing.flow import Axes, Flow
from dhp_jax.tracing.inputs import (
    abstract_inputs,
    check_no_batch,
    input_refused,
    looks_like_a_shape,
)
from dhp_jax.tracing.layer_sizes import resize, set_number
from dhp_jax.tracing.programs import (
    EVALUATION,
    TRAINING,
    Call,
    Context,
    Program,
    UntraceableError,
    default_call,
    failure,
    shape_of,
    trace_program,
    where_raised,
)
from dhp_jax.tracing.proof import Mismatch, check_restricted

logger = logging.getLogger(__name__)

MAX_PASSES = 20
Kept = list[list[np.ndarray]]  # of each axis of each array, a boolean mask


@dataclass(frozen=True)
class SizeRule:
    """A number that a module of the user's keeps, which is the size of an axis.

    Attributes:
      path: of the module.
      attribute: of the number, as `numbers_in` names it.
      atoms: the number is so many times how many of these are left; or
      axis: (array, axis), the number is how much of that is left.
      times: how many times, as heads of queries that share a key.
    """

    path: tuple[Any, ...]
    attribute: str
    atoms: tuple[int, ...] = ()
    axis: tuple[int, int] | None = None
    times: int = 1


@dataclass
class Analysis:
    """A whole network, its programs and the solved equations between their axes.

    Attributes:
      model: the network, in evaluation mode.
      call: how it is called.
      inputs: abstract arguments.
      programs: of evaluation and of training, where it can be traced so.
      flow: the equations of all of them.
      arrays: the axes of every array.
      sizes: numbers in modules of the user's that are cut with axes.
      untrainable: why there is no program of training; empty if there is one.
    """

    model: nnx.Module
    call: Call
    inputs: tuple[Any, ...]
    programs: dict[Context, Program]
    flow: Flow
    arrays: list[Axes]
    sizes: list[SizeRule] = field(default_factory=list)
    untrainable: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of the arrays."""
        return self.programs[EVALUATION].names

    @property
    def leaves(self) -> tuple[Any, ...]:
        """The arrays."""
        return self.programs[EVALUATION].arrays

    def kept(self, gone: frozenset[int]) -> Kept:
        """What is left of every axis of every array without some atoms."""
        return [
            [self.flow.kept(axis, gone, size) for axis, size in zip(axes, x.shape, strict=True)]
            for axes, x in zip(self.arrays, self.leaves, strict=True)
        ]

    def cut(self, gone: frozenset[int], *, abstract: bool = False) -> nnx.Module:
        """The network without some atoms, in evaluation mode, which is not proved yet."""
        program, kept = self.programs[EVALUATION], self.kept(gone)
        model = cut_model(program.graphdef, program.state, kept, abstract=abstract)
        own = nnx.iter_modules(model) if self.sizes else ()
        modules = {tuple(path): module for path, module in own}
        for rule in self.sizes:
            if rule.axis is None:
                kept_atoms = sum(self.flow.terms.root(atom) not in gone for atom in rule.atoms)
                left = rule.times * kept_atoms
            else:
                array, axis = rule.axis
                left = int(kept[array][axis].sum())
            set_number(modules[rule.path], rule.attribute, left)
        return model

    def trials(self) -> tuple[Context, ...]:
        """The modes whose programs differ: enough for trials, but not for the last proof."""
        texts = {  # without addresses of functions
            context: re.sub("0x[0-9a-f]+", "", str(program.closed))
            for context, program in self.programs.items()
        }
        same = texts.get(TRAINING) == texts[EVALUATION]
        return (EVALUATION,) if same else tuple(self.programs)

    def prove(
        self,
        gone: frozenset[int],
        pruned: nnx.Module | None = None,
        contexts: tuple[Context, ...] | None = None,
    ) -> frozenset[int]:
        """Raises unless a pruned network is the whole one without some atoms.

        Args:
          gone: atoms.
          pruned: the network; what `cut` makes if `None`.
          contexts: the modes that are compared; all if `None`.

        Returns:
          The atoms over which it renormalises.

        Raises:
          Mismatch: it is not.
        """
        mode = EVALUATION if pruned is None else None  # setting it goes through all modules
        pruned = self.cut(gone, abstract=True) if pruned is None else nnx.clone(pruned)
        notes: frozenset[int] = frozenset()
        for context in self.programs if contexts is None else contexts:
            program = self.programs[context]
            if context != mode:
                set_mode(pruned, context)
            mode = context
            try:
                small = trace_program(pruned, self.call, self.inputs)
            except Exception as error:  # whatever the code raises for such widths
                why = f"the forward pass fails after pruning: {first_line(error)[:160]}"
                raise Mismatch(why, where_raised(error)) from error
            notes |= check_restricted(self.flow, program.closed, small.closed, gone, context)
        return notes


def analyse(model: nnx.Module, inputs: Any, call: Call = default_call) -> Analysis:
    """Traces a network in evaluation and training mode and solves the equations of its axes.

    Args:
      model: left as it was.
      inputs: as for `dhp_jax.tracing.inputs.abstract_inputs`.
      call: a function of the model and the inputs.

    Raises:
      ValueError: the network does not take such inputs.
    """
    graphdef, state = nnx.split(model)
    whole = nnx.merge(graphdef, state, copy=True)
    whole.eval()
    given = abstract_inputs(inputs)
    if call is default_call:
        check_no_batch(model, inputs, "inputs")
    try:
        given, program = _first_program(whole, given, call)
    except UntraceableError:
        raise
    except Exception as error:  # whatever the network's code raises
        shapes = ", ".join(str(x.shape) for x in jax.tree.leaves(given))
        told = inputs if looks_like_a_shape(inputs) else shapes
        raise ValueError(input_refused(told, error, "inputs")) from error
    programs, untrainable = {EVALUATION: program}, ""
    trained = nnx.merge(program.graphdef, program.state, copy=True)
    trained.train()
    try:
        other = trace_program(trained, call, given)
        if other.names != program.names:
            raise ValueError("it has other arrays")
        programs[TRAINING] = other
    except Exception as error:  # whatever the network's code raises
        untrainable = first_line(error)
        logger.warning("the network cannot be traced in training mode: %s", untrainable)
    flow = Flow()
    arrays = array_axes(flow, program)
    solve(flow, programs, arrays)
    return Analysis(whole, call, given, programs, flow, arrays, untrainable=untrainable)


def _first_program(
    model: nnx.Module, inputs: tuple[Any, ...], call: Call
) -> tuple[tuple[Any, ...], Program]:
    """The program of evaluation; shapes of examples are of floats, or else of integers."""
    try:
        return inputs, trace_program(model, call, inputs)
    except UntraceableError:
        raise
    except Exception as error:  # whatever the network's code raises
        try:
            integers = jax.tree.map(as_integers, inputs)
            return integers, trace_program(model, call, integers)
        except Exception:  # the first error says more
            raise error from None


def as_integers(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """An abstract array of floats as one of integers."""
    return jax.ShapeDtypeStruct(x.shape, jnp.int32) if x.dtype == jnp.float32 else x


def array_axes(flow: Flow, program: Program) -> list[Axes]:
    """New atoms for every axis of every array but the states of random generators."""
    axes = []
    flat = nnx.to_flat_state(program.state)
    for number, ((_, leaf), x) in enumerate(zip(flat, program.arrays, strict=True)):
        stays = isinstance(leaf, nnx.RngState)
        axes.append(
            tuple(
                None if stays or size <= 1 else flow.fresh(("array", number, k), size)
                for k, size in enumerate(x.shape)
            )
        )
    return axes


def solve(flow: Flow, programs: dict[Context, Program], arrays: Sequence[Axes]) -> None:
    """States all equations until nothing changes."""
    (given,) = flow.fresh("input", 1)
    flow.terms.freeze(given, "it is that of an input of the network")
    for _ in range(MAX_PASSES):
        before = flow.terms.changes
        for context, program in programs.items():
            jaxpr = program.closed.jaxpr
            shapes = [shape_of(variable) for variable in jaxpr.invars[len(arrays) :]]
            inputs = [tuple(np.full(n, given) if n > 1 else None for n in x) for x in shapes]
            outputs = flow.run(jaxpr, [*arrays, *inputs], context)
            own = len(outputs) - len(arrays)
            for axes in outputs[:own]:
                for axis in axes:
                    flow.terms.freeze_axis(axis, "it is an output of the network")
            for after, axes in zip(outputs[own:], arrays, strict=True):
                for one, other in zip(after, axes, strict=True):
                    flow.terms.equal_axes(one, other, "the state that a call updates")
        if flow.terms.changes == before:
            return
    raise RuntimeError(f"the equations have no solution after {MAX_PASSES} passes")


def cut_model(
    graphdef: nnx.GraphDef, state: nnx.State, kept: Kept, *, abstract: bool = False
) -> nnx.Module:
    """A network with what is kept of its arrays, and the sizes of its layers to suit.

    Args:
      graphdef, state: the whole network.
      kept: by array, in the order of the flat state, and axis a boolean mask.
      abstract: whether the arrays become abstract ones.
    """
    cut, masks = [], {}
    for (path, leaf), own in zip(nnx.to_flat_state(state), kept, strict=True):
        value = value_of(leaf)
        if abstract and isinstance(leaf, nnx.Variable):  # NNX would not know a bare one as an array
            shape = tuple(int(mask.sum()) for mask in own)
            value = jax.ShapeDtypeStruct(shape, value.dtype)
        elif not all(mask.all() for mask in own):
            value = cut_array(value, own)
        cut.append((path, with_value(leaf, value)))
        masks[path] = own
    model = nnx.merge(graphdef, nnx.from_flat_state(cut), copy=True)
    modules = list(nnx.iter_modules(model))
    by_array = {  # of a variable that modules share there is one path
        id(value): masks[(*path, name)]
        for path, module in modules
        for name, value in vars(module).items()
        if (*path, name) in masks
    }
    for path, module in modules:
        own = {name: by_array[id(v)] for name, v in vars(module).items() if id(v) in by_array}
        try:
            resize(module, own)
        except Exception as error:  # whatever a function of the user's raises
            what = f"{type(module).__name__} {'.'.join(map(str, path))!r}"
            why = f"expected a function of tracing.resize that suits {what}; it fails: "
            raise ArgumentError("model", detail=why + failure(error)) from error
    return model


def cut_array(value: Any, kept: Sequence[np.ndarray]) -> Any:
    """The kept positions of every axis of an array, on the host; abstract ones stay abstract."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(int(mask.sum()) for mask in kept), value.dtype)
    return slice_axes(value, dict(enumerate(kept)))


def set_mode(model: nnx.Module, context: Context) -> None:
    """Puts a model in the mode of a context."""
    model.train() if context == TRAINING else model.eval()
