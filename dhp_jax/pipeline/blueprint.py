"""How the unpruned network of a run is made: of a family, or by a function of the user's own."""

from collections.abc import Iterator, Mapping
import contextlib
from dataclasses import dataclass, replace
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from dhp_jax.activity import doing
from dhp_jax.artifact.description import ArtifactError, check_argument
from dhp_jax.artifact.weights import Weights, read_weights, take_weights
from dhp_jax.budgets.limits import keep_share
from dhp_jax.core.latent import latents
from dhp_jax.core.provenance import architecture_of
from dhp_jax.core.surgery import prune
from dhp_jax.errors import ArgumentError, ConfigError, FieldError, shown
from dhp_jax.models import registry
from dhp_jax.models.own import is_own
from dhp_jax.pipeline.setup import TaskSetup, argument_fields, known_arguments
from dhp_jax.pruned.fresh_weights import carry_kernels, reinitialize, take_arrays
from dhp_jax.pruned.gates import with_gates
from dhp_jax.tracing.explain import memory
from dhp_jax.tracing.inputs import outputs_of
from dhp_jax.tracing.network import install, traced
from dhp_jax.tracing.table import LatentTable

# Arguments of families that do not change what an ordinary network computes, after its training.
MAY_DIFFER = {
    *("embedding", "min_channels", "prune_classifier", "classifier_keep", "prune_upsampler"),
    *("dropout", "initial_scale", "dtype"),
}
BUILDING = "building the network"
LATENTS = {"embedding": None}  # of axes found by tracing


@dataclass(frozen=True)
class Blueprint:
    """How the unpruned network of a run is made.

    Attributes:
      name: of its family, or of a function of the user's own.
      arguments: of `dhp.models.build`.
      seed: of its initial weights.
      least: entries that every latent keeps at least, where they are found by tracing, or made
        by a function that takes no `min_channels`.
      share: of its entries, that every latent keeps at least.
      weights: that it starts from; `None` for fresh ones.
      table: of the latents that were found by tracing; `None` where it is made of latents.
      told: what latents were found, and the memory of the arrays that they generate.
    """

    name: str
    arguments: Mapping[str, Any]
    seed: int
    least: int = 4
    share: float = 0.0
    weights: Weights | None = None
    table: LatentTable | None = None
    told: str = ""

    @property
    def digest(self) -> str:
        """Of the weights; empty for fresh ones."""
        return "" if self.weights is None else self.weights.sha256

    def made(self) -> nnx.Module:
        """What its family or function makes."""
        return registry.build(self.name, **self.arguments, rngs=nnx.Rngs(self.seed))

    @doing(BUILDING)
    def ordinary(self) -> nnx.Module:
        """The network without latents."""
        model = prune(self.made())
        if self.weights is not None:
            take_weights(model, self.weights)
        return model

    @doing(BUILDING)
    def baseline(self) -> nnx.Module:
        """The network without latents, with the weights that its training begins with."""
        model = self.ordinary()
        if self.weights is None:
            self.refresh(model)
        return model

    def refresh(self, model: nnx.Module) -> None:
        """Gives a network without latents, pruned or not, its initial weights; in place.

        Those that a hypernetwork made are drawn anew. Where latents were found by tracing, they are
        what the user's own code has drawn.
        """
        if self.table is None:
            reinitialize(model, rngs=nnx.Rngs(self.seed))

    @doing(BUILDING)
    def build(self) -> nnx.Module:
        """The network of latents that a search begins with."""
        if self.table is not None:
            return self.of_trained(self.ordinary())
        model = self.made()
        if self.weights is not None:
            take_arrays(self.ordinary(), model)
        return self.with_floors(model)

    @doing(BUILDING)
    def of_trained(self, trained: nnx.Module) -> nnx.Module:
        """The network of latents with the weights of an ordinary one, which may change."""
        if self.table is None:
            model = self.made()
            carry_kernels(trained, model)
        else:
            model = install(
                self._with_arrays_of(trained),
                self.table,
                self.table.notes["generated"],
                min_channels=self.least,
                rngs=nnx.Rngs(self.seed),
            )
        return self.with_floors(model)

    @doing(BUILDING)
    def gated(self, trained: nnx.Module) -> nnx.Module:
        """The network of latents that are gates, with the weights of an ordinary one."""
        whole = self.of_trained if self.table is not None else self._with_arrays_of
        return self.with_floors(with_gates(whole(trained), rngs=nnx.Rngs(self.seed)))

    def with_floors(self, model: nnx.Module) -> nnx.Module:
        """Has the latents of a network, abstract or not, keep what they must; in place."""
        untold = self.table is None and "min_channels" not in self.arguments
        return keep_share(model, self.share, self.least if untold else 1)

    def _with_arrays_of(self, trained: nnx.Module) -> nnx.Module:
        """The ordinary network with the arrays of one that may be of another dtype."""
        model = self.ordinary()
        take_arrays(trained, model)
        return model


def begin(config: ConfigDict) -> Blueprint:
    """What can be said of a run's network before its data are read.

    Raises:
      ConfigError: no such function or weights, or arguments that it does not take.
    """
    arguments = dict(config.model)
    name, path = arguments.pop("name"), arguments.pop("weights", None)
    fields = argument_fields(config)
    for argument in arguments:
        if argument in fields:
            raise ConfigError(
                f"config.model.{argument}",
                detail=f"follows from config.{fields[argument]}, not given here",
            )
    with _named(config):
        for argument, value in arguments.items():
            check_argument(argument, value)  # before the training of a network that is not saved
        weights = None if path is None else read_weights(path)
        if is_own(name):
            registry.add_own(name, "name")
            follow = dict.fromkeys(registry.taken_by(name, fields))
            registry.check_arguments(name, _without_latents(name, arguments) | follow)
    made = Blueprint(name, arguments, config.seed, config.search.min_channels, weights=weights)
    made = replace(made, share=config.search.keep)
    if not is_own(name):
        made = replace(made, arguments=arguments | known_arguments(config))
        abstract(config, made)
    return made


@doing(BUILDING)
def complete(config: ConfigDict, begun: Blueprint, setup: TaskSetup) -> Blueprint:
    """How the network is made, with the arguments that follow from the data, and traced latents.

    Raises:
      ConfigError: the network does not suit the data, nothing of it can be pruned, or the weights
        are not its. What arguments of a family make no network, `abstract` tells.
    """
    follow = known_arguments(config) | setup.arguments
    name, given = begun.name, dict(begun.arguments)
    if not is_own(name):
        made = replace(begun, arguments=given | follow)
        if made.weights is not None:
            with _named(config):
                _check_arguments(made, made.weights)
                made.ordinary()
        return made
    own = _without_latents(name, given)
    arguments = own | {key: follow[key] for key in registry.taken_by(name, follow)}
    if "dtype" not in arguments and config.dtype != "float32":
        raise ConfigError("config.dtype", f"float32, for {name} takes no dtype", config.dtype)
    made = replace(begun, arguments=arguments)
    with _named(config):
        _check_outputs(made.made(), setup)
        options = {key: value for key, value in given.items() if key not in own}
        if latents(made.made()):
            for key, value in options.items():
                expected = f"none, for the latents of {name} are its own and it takes no {key}"
                raise ArgumentError(key, expected, shown(value))
            return made
        options = LATENTS | options
        rngs = nnx.Rngs(config.seed)
        net = traced(
            made.ordinary(), setup.input_shape, min_channels=made.least, rngs=rngs, **options
        )
    sizes = ", ".join(f"{key} {z.size}" for key, z in latents(net).items())
    return replace(made, table=architecture_of(net).axes, told=f"{sizes}. {memory(net)}")


def _check_arguments(made: Blueprint, weights: Weights) -> None:
    """Raises if a folder tells that its weights are of a network that computes something else."""
    if weights.family != made.name:
        return
    theirs = {**registry.absent(made.name), **weights.arguments}
    ours, theirs = (registry.with_defaults(made.name, of) for of in (made.arguments, theirs))
    for name in sorted(ours.keys() & theirs.keys() - MAY_DIFFER):
        if ours[name] != theirs[name]:
            expected = f"{shown(theirs[name])}, as the network in {weights.path.parent} has it"
            raise ArgumentError(name, expected, shown(ours[name]))


@doing(BUILDING)
def abstract(config: ConfigDict, made: Blueprint) -> nnx.Module:
    """The network of latents as shapes and dtypes; if latents were found by tracing with arrays."""
    with _named(config):
        if made.table is not None:
            return made.build()
        return made.with_floors(registry.build_abstract(made.name, **made.arguments))


@contextlib.contextmanager
def _named(config: ConfigDict) -> Iterator[None]:
    """An error in the block names the field of the configuration that it is about."""
    try:
        yield
    except FieldError as error:
        field = argument_fields(config).get(error.field, f"model.{error.field}")
        raise ConfigError.of(f"config.{field}", error) from error
    except ArtifactError as error:
        raise ConfigError("config.model.weights", detail=error.detail) from error
    except Exception as error:  # whatever a function of the user's may raise
        if not is_own(config.model.name):
            raise
        what = (str(error).splitlines() or [""])[0]
        detail = f"{config.model.name}: {type(error).__name__}: {what}"
        raise ConfigError("config.model.name", detail=detail) from error


def _without_latents(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those that are of latents found by tracing."""
    own = registry.taken_by(name, LATENTS)
    return {key: value for key, value in arguments.items() if key not in LATENTS or key in own}


def _check_outputs(model: nnx.Module, setup: TaskSetup) -> None:
    """Raises unless a network makes of an example what its task needs."""
    shape, told = setup.input_shape, setup.arguments
    scale = told.get("scale", 1)
    expected = (1, scale * shape[0], scale * shape[1], shape[2])
    if "num_classes" in told:
        expected = (1, told["num_classes"])
    model.eval()
    try:
        found = outputs_of(model, shape)
    except ValueError as error:
        raise ArgumentError("name", detail=str(error)) from error
    got = getattr(found, "shape", found)
    if got != expected:
        raise ArgumentError("name", f"outputs of shape {expected} for such data", shown(got))
