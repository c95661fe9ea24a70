"""What a network costs, read from its program: FLOPs, params, activations of what survives."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dhp_jax.core.branches import Place
from dhp_jax.core.cost import Cost, LayerCost, Product, Width
from dhp_jax.core.latent import Axis, Latent, LatentVector, latents
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.state import path_name
from dhp_jax.tracing.analysis import as_integers, solve
from dhp_jax.tracing.flow import Axes, Flow
from dhp_jax.tracing.generated import ordinary
from dhp_jax.tracing.inputs import (
    abstract_inputs,
    check_input_shape,
    check_no_batch,
    input_refused,
    looks_like_a_shape,
    remember_inputs,
)
from dhp_jax.tracing.layer_terms import in_one, layer_terms
from dhp_jax.tracing.marks import (
    SUMMING,
    LayerCall,
    Operation,
    call_size,
    costly_operations,
    depends_on_widths,
    flops_of_an_element,
    has_arrays,
    is_activation,
    is_counted,
    last_calls,
    mark_calls,
    summed_axes,
    used_inputs,
)
from dhp_jax.tracing.programs import (
    EVALUATION,
    Call,
    Program,
    UntraceableError,
    default_call,
    is_literal,
    shape_of,
    trace_program,
    used_alone,
)
from dhp_jax.tracing.terms import TRUE
from dhp_jax.tracing.terms import Axis as TermAxis


def measure_cost(model: nnx.Module, input_shape: Any, *, call: Call | None = None) -> Cost:
    """Counts what a model costs by tracing one forward pass; nothing is computed.

    Every contraction and convolution counts, wherever it stands: in a loop as often as that runs,
    under `vmap` for all, of branches in the costliest. What nothing reads is not computed, and has
    no FLOPs, such as an output that `call` leaves out. Layers on latents and those that
    `layer_terms` is registered for have the FLOPs that are told there. Params are the arrays of
    `nnx.Param` that the pass reads, each once, if only for such an output or in any branch.

    Args:
      model: with latents or without; left as it was.
      input_shape: shape of one example without the batch axis, `(height, width, channels)`; or an
        array, an abstract array, or a tuple, list or dict of them, of which all examples count.
      call: a function of the model and the inputs, where that is not `model(*inputs)`; for a
        network of traced latents the one that it was made with.

    Returns:
      The cost: `.flops`, `.params`, `.activations` (bytes, see the module), `.layers`; and
      `.amounts(counts)` or `.shares(counts)` of what survives, by these names.

    Raises:
      ValueError: no shape of an example; the forward pass fails on such an input, for instance
        because it adds axes of latents of different lengths; a loop whose length is not known.

    Example:
      >>> cost = dhp.measure_cost(model, (32, 32, 3))
      >>> cost.flops, cost.params, cost.activations
      (41214592, 272474, 1605672)
    """
    table = architecture_of(model).axes
    if table is not None:
        call, plain = call or table.call or default_call, ordinary(model)
        count = _TracedCount(plain, input_shape, call, table)

        def recount(masks: Mapping[str, np.ndarray]) -> Cost:
            return measure_cost(table.cut(plain, masks)[0], input_shape, call=call)

        varies = depends_on_widths(count.program.closed.jaxpr)
        return replace(count.cost(), recount=recount if varies else None)
    call = call or default_call
    if latents(model):
        cost = _count_layers(model, input_shape, call)
        remember_inputs(model, input_shape, call)
        return cost
    return _TracedCount(model, input_shape, call, None).cost()


def _traced(
    model: nnx.Module, input_shape: Any, call: Call, is_layer: Callable[[nnx.Module], bool]
) -> tuple[Program, list[LayerCall], dict[Latent, str], frozenset[Any]]:
    """The program of evaluation with marks of layers, their calls, latents' names, what is read."""
    if looks_like_a_shape(input_shape):
        check_input_shape(input_shape)
        if call is default_call:
            check_no_batch(model, input_shape)
    inputs = abstract_inputs(input_shape)
    calls: list[LayerCall] = []
    names: dict[Latent, str] = {}

    def called(merged: nnx.Module, *given: Any) -> Any:
        calls.clear(), names.clear()
        names.update({latent: name for name, latent in latents(merged).items()})
        made = mark_calls(merged, is_layer)
        outputs = call(merged, *given)
        calls.extend(made)
        return outputs

    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, state, copy=True)
    model.eval()  # tracing the update of BatchNorm statistics is slow in deep networks
    first = None
    for given in (inputs, jax.tree.map(as_integers, inputs)):
        try:
            program = trace_program(model, called, given, as_written=False)
            return used_alone(program), calls, names, frozenset(used_inputs(program.closed.jaxpr))
        except UntraceableError:
            raise
        except (TypeError, ValueError) as error:
            first = first or error
    raise ValueError(input_refused(input_shape, first)) from first


# Networks whose layers say what they cost


def _count_layers(model: nnx.Module, input_shape: Any, call: Call) -> Cost:
    """The cost of a network of layers on latents, each of which says what a call of it costs."""
    program, calls, names, used = _traced(model, input_shape, call, is_counted)
    operations = list(costly_operations(program.closed.jaxpr))
    layers, seen, last = [], set[Any](), last_calls(operations, calls)
    for operation in operations:
        if operation.eqn.primitive.name == "layer_output":
            found = calls[operation.call]
            if is_activation(found.layer) and operation.call not in last:
                continue
            layers.append(_layer_cost(found, operation, names, seen))
        elif operation.call is None:
            product, ends = _contraction(operation, _full_widths)
            name, place = operation.eqn.primitive.name, operation.place
            layers.append(LayerCost("", name, *ends, (product,), (), (), place))
    layers += _other_params(program, calls, used)
    return Cost.of_calls(layers, {name: latent.size for latent, name in names.items()})


def _layer_cost(
    found: LayerCall, operation: Operation, names: Mapping[Latent, str], seen: set[Any]
) -> LayerCost:
    inputs, outputs, flops, params = layer_terms(found.layer, found.shape)
    params = _first_seen(found.layer, params, seen)
    inputs, outputs = _width(inputs, names), _width(outputs, names)
    runs = call_size(operation) // max(1, math.prod(found.shape))

    def terms(pair: tuple[int, ...], times: int) -> tuple[Product, ...]:
        per_pair, per_output, *fixed = pair
        products = (
            Product(per_pair * times, (inputs, outputs)),
            Product(per_output * times, (outputs,)),
            Product(sum(fixed)),
        )
        return tuple(product for product in products if product.factor)

    is_stored = any(flops) and not is_activation(found.layer)
    bytes_each = is_stored * found.nbytes // outputs.full
    return LayerCost(
        path=found.path,
        kind=type(found.layer).__name__,
        inputs=inputs,
        outputs=outputs,
        flops_terms=terms(flops, runs),
        params_terms=terms(params, 1),
        activations_terms=terms((0, bytes_each), runs),
        place=operation.place,
    )


def _first_seen(layer: nnx.Module, params: tuple[int, ...], seen: set[Any]) -> tuple[int, ...]:
    """The params of a layer without those of variables that are another's too, on the same axes."""
    axes = tuple(id(z) for z in vars(layer).values() if isinstance(z, Axis))
    own = {name: v for name, v in vars(layer).items() if isinstance(v, nnx.Param)} or {"": layer}
    known = {name for name, v in own.items() if (id(v), axes) in seen}
    seen |= {(id(v), axes) for v in own.values()}
    if known == own.keys():
        return (0, 0)
    kernels = own.keys() - {"bias", "scale"}  # these have one number an output
    pairs = 0 if kernels and kernels <= known else params[0]
    return (pairs, params[1] - len(known - kernels), *params[2:])


def _width(channels: Axis | int, names: Mapping[Latent, str]) -> Width:
    if isinstance(channels, int | np.integer):
        return Width(int(channels), int(channels))
    multiplicity = channels.multiplicity().items()
    return Width(channels.size, 0, tuple((names[latent], times) for latent, times in multiplicity))


def _other_params(
    program: Program, calls: list[LayerCall], used: frozenset[Any]
) -> list[LayerCost]:
    """Params that the pass reads and no layer has counted."""
    counted = {call.path for call in calls}
    flat = nnx.to_flat_state(program.state)
    layers = []
    for (path, leaf), variable in zip(flat, program.closed.jaxpr.invars, strict=False):
        name = path_name(path)
        owners = {"", *(name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))}
        on_latents = isinstance(leaf, LatentVector) or any(owner in counted for owner in owners)
        if isinstance(leaf, nnx.Param) and variable in used and not on_latents:
            layers.append(_params_only(name, type(leaf).__name__, Product(leaf.get_value().size)))
    return layers


def _params_only(path: str, kind: str, *products: Product) -> LayerCost:
    width = (Width(1, 1), *products[0].widths)[-1]
    return LayerCost(path, kind, width, width, (), products, ())


# Networks whose program says what they cost


class _TracedCount:
    """Counts of a program, in which widths are sums of survivors."""

    def __init__(self, model: nnx.Module, input_shape: Any, call: Call, table: Any):
        self.table = table
        self.program, self.calls, _, self.used = _traced(model, input_shape, call, has_arrays)
        self.flow: Flow | None = None
        self.owner: dict[int, str] = {}
        self._owners = functools.cache(self._owners)
        modules = nnx.iter_modules(model)
        self.holders = {path_name(path) for path, m in modules if isinstance(m, nnx.Dict)}
        if table is not None:
            self._solve()

    def _solve(self) -> None:
        """Which latent rules each term of the program; what the table has of none stays."""
        self.flow, first = Flow(), []
        for name, size in self.table.sizes.items():
            atoms = self.flow.terms.new(size).tolist()
            self.owner |= dict.fromkeys(atoms, name)
            first.append(atoms[0])
        arrays: list[Axes] = []
        for name, x in zip(self.program.names, self.program.arrays, strict=True):
            axes: list[TermAxis] = [None] * len(x.shape)
            for k, positions in self.table.places.get(name, {}).items():
                terms = np.array(first)[positions.owner] + positions.entry
                axes[k] = np.where(positions.owner < 0, TRUE, terms)
            arrays.append(tuple(axes))
        solve(self.flow, {EVALUATION: self.program}, arrays)

    def cost(self) -> Cost:
        """The sum over all calls of layers, and what belongs to none."""
        by_call: dict[tuple[int | str, Place], list[Operation]] = {}
        jaxpr, holders = self.program.closed.jaxpr, map(self._holder, self.program.names)
        owners = dict(zip(jaxpr.invars, holders, strict=False))
        operations = list(costly_operations(jaxpr, owners=owners))
        for operation in operations:
            key = operation.call
            if key is None or not self.calls[key].path:
                key = operation.owner or self._scope(operation) or key
            key = f"operation {len(by_call)}" if key is None else key
            by_call.setdefault((key, operation.place), []).append(operation)
        params, last, layers = self._params(), last_calls(operations, self.calls), []
        for (key, place), found in by_call.items():
            layer = replace(self._layer(key, found), place=place)
            if isinstance(key, int) and is_activation(self.calls[key].layer):
                if key not in last:
                    continue
                layer = replace(layer, activations_terms=())
            own = params.pop(layer.path, ())
            if own and not layer.flops_terms:
                layer = _params_only(layer.path, layer.kind, *own)
            if layer.flops_terms or own:
                layers.append(replace(layer, params_terms=own))
        layers += [_params_only(path, "Param", *own) for path, own in params.items()]
        return Cost.of_calls(layers, dict(self.table.sizes) if self.table else {})

    def _holder(self, name: str) -> str:
        """The mapping that holds an array, as for a module of `flax.linen`; else the array."""
        holder = name.rpartition(".")[0]
        return holder if holder in self.holders else name

    def _scope(self, operation: Operation) -> str | None:
        """The mapping of arrays that the scopes of an operation name, as `flax.linen` does."""
        scope = operation.scope
        runs = (".".join(scope[at:end]) for end in range(len(scope), 0, -1) for at in range(end))
        return next((run for run in runs if run in self.holders), None)

    def _layer(self, key: int | str, operations: list[Operation]) -> LayerCost:
        found = self.calls[key] if isinstance(key, int) else None
        flops, activations, ends = [], [], (Width(1, 1), Width(1, 1))
        for operation in operations:
            eqn, out = operation.eqn, operation.eqn.outvars[0]
            widths = self.widths(operation.context, out)
            if eqn.primitive.name in SUMMING:
                at = functools.partial(self.widths, operation.context)
                product, pair = _contraction(operation, at)
                ends = pair if not flops else ends
            else:
                each = flops_of_an_element(found)
                if not each:
                    continue
                product = Product(each * operation.times, sum(widths, ()))
                ends = (in_one(widths[-1:]),) * 2 if not flops else ends
            flops.append(product)
            nbytes = jnp.dtype(out.aval.dtype).itemsize
            activations.append(Product(nbytes * operation.times, sum(widths, ())))
        kind = type(found.layer).__name__ if found else operations[0].eqn.primitive.name
        path = found.path or kind if found else key  # the path of the whole network is ""
        return LayerCost(path, kind, *ends, tuple(flops), (), tuple(activations))

    def _params(self) -> dict[str, tuple[Product, ...]]:
        """By the path of its module the params that the program reads."""
        modules = ({call.path for call in self.calls} | self.holders) - {""}
        flat = nnx.to_flat_state(self.program.state)
        found: dict[str, tuple[Product, ...]] = {}
        for (path, leaf), variable in zip(flat, self.program.closed.jaxpr.invars, strict=False):
            name = path_name(path)
            layer = name.rpartition(".")[0]
            # The kernel of a layer that is not trained, as EDSR's mean shift, counts as well.
            is_weight = layer in modules and path[-1] in ("kernel", "bias")
            if (isinstance(leaf, nnx.Param) or is_weight) and variable in self.used:
                key = layer if layer in modules else name
                product = Product(1, sum(self.widths((), variable), ()))
                found[key] = (*found.get(key, ()), product)
        return found

    def widths(self, context: Any, atom: Any) -> list[tuple[Width, ...]]:
        """The width of each axis of a value: one, or several that are multiplied."""
        if self.flow is None or is_literal(atom):
            return _full_widths(atom)
        axes: Axes = self.flow.at[context, atom]
        return [self.width(axis, size) for axis, size in zip(axes, shape_of(atom), strict=True)]

    def _owners(self, term: int) -> tuple[str, ...]:
        return tuple(sorted(self.owner[a] for a in self.flow.terms.atoms(term) if a in self.owner))

    def width(self, axis: TermAxis, size: int) -> tuple[Width, ...]:
        """How many positions of an axis are left, by the survivors of latents.

        Where all positions are products of entries of the same latents, as of heads and features
        that a reshape merges, these are factors. Of other products one latent is counted.
        """
        if axis is None:
            return (Width(size, size),)
        sizes = self.table.sizes
        times = Counter(map(self._owners, self.flow.terms.roots(axis).tolist()))
        if len(times) == 1 and len(set(owners := next(iter(times)))) == len(owners) > 1:
            copies = size // math.prod(sizes[name] for name in owners)
            each = tuple(Width(sizes[name], 0, ((name, 1),)) for name in owners)
            return each if copies == 1 else (Width(copies, copies), *each)
        fixed, one = times.pop((), 0), Counter[str]()
        for owners, number in times.items():
            one[owners[0]] += number
        found = tuple((name, n / sizes[name]) for name, n in one.items())
        whole = tuple((name, int(n)) if n == int(n) else (name, n) for name, n in found)
        return (Width(size, fixed, whole),)


def _full_widths(atom: Any) -> list[tuple[Width, ...]]:
    """The width of each axis of a value of which nothing goes."""
    return [(Width(size, size),) for size in shape_of(atom)]


def _contraction(
    operation: Operation, widths_of: Callable[[Any], list[tuple[Width, ...]]]
) -> tuple[Product, tuple[Width, Width]]:
    """FLOPs of a contraction, and its widths of input and output, by the widths of values."""
    eqn = operation.eqn
    made = widths_of(eqn.outvars[0])
    side, axes = summed_axes(eqn)
    read = widths_of(eqn.invars[side])
    over = [read[k] for k in axes]
    if side:
        _, (out, into, *_), _ = eqn.params["dimension_numbers"]
        ends = in_one([read[into]]), in_one([read[out]])
    else:
        ends = in_one(over[:1]), in_one(made[-1:])
    return Product(operation.times, sum([*made, *over], ())), ends
