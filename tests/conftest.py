"""What test modules share that is no network; see networks.py for those."""

import contextlib
import gc
import importlib.util
import os
from pathlib import Path
from unittest import mock

from filelock import FileLock
from flax import nnx
import jax
from jax.experimental.compilation_cache import compilation_cache as cache
import pytest
from runs import WARNINGS, carry_out, leave, leave_no_pages, noted_warnings

from dhp_jax import activity
from dhp_jax.budgets import timing
from dhp_jax.export.writers import NEEDS
from dhp_jax.pipeline import preparation

TESTS = Path(__file__).parent


# Files that take longest come first, so that all processes that test end at about the same time.
LONGEST = (
    *("pipeline/test_pipeline.py", "config/test_methods.py", "pipeline/test_own_networks.py"),
    *("models/test_families.py", "train/test_checkpoints.py", "budgets/test_gradual.py"),
    *("models/test_linen.py", "backend/test_backend.py", "tracing/test_awkward.py"),
    *("tracing/test_network.py", "pipeline/test_restoration_runs.py", "distributed/test_mesh.py"),
)


def pytest_collection_modifyitems(items):
    order = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish(session):
    """What was imported stays: looking for garbage leaves it out, and is rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_runtest_setup(item):
    """Without their packages tests of ONNX are skipped, but fail if they are what is asked for."""
    if not item.get_closest_marker("onnx"):
        return
    missing = [name for name in NEEDS["onnx"] if importlib.util.find_spec(name) is None]
    if missing:
        end = pytest.fail if item.config.option.markexpr == "onnx" else pytest.skip
        end(f"{' and '.join(missing)} not installed; `make test-onnx` runs this")


def shared(tmp_path_factory, worker_id):
    """A folder of the session that is one for all processes that test."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory, worker_id):
    """A program that is compiled again, by whatever process, comes from a file of the session.

    Processes that tests begin read and write there, too; nothing goes to the user's cache.
    """
    settings = {
        "jax_compilation_cache_dir": str(shared(tmp_path_factory, worker_id) / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    cache.reset_cache()


@pytest.fixture(scope="session", autouse=True)
def short_checks():
    """Runs time each network three times, and check the axes of equal networks once a session."""
    checked, check_axes = set(), preparation.check_axes

    def check_once(model, shape):
        graphdef, state = nnx.split(model)
        key = f"{graphdef} {jax.tree.map(lambda array: (array.shape, array.dtype), state)} {shape}"
        if key not in checked:
            check_axes(model, shape)
            checked.add(key)

    few = mock.patch.dict(timing.measure_latency.__kwdefaults__, seconds=0.0)
    with few, mock.patch.object(preparation, "check_axes", check_once):
        yield


FAST = "JAX_DISABLE_MOST_OPTIMIZATIONS"  # as an environment variable, processes heed it too
# Simpler generators of code, and one file of code a program: they compile in half the time.
SIMPLE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def pytest_configure(config):
    """`make test` generates code quickly; XLA asks for this once in the life of a process."""
    if config.option.markexpr != "slow":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {SIMPLE}"


def set_compiling(fast):
    if fast != os.environ.get(FAST, "False"):
        jax.clear_caches()
    os.environ[FAST] = fast
    jax.config.update(FAST.lower(), fast == "True")


@contextlib.contextmanager
def compiling(fast):
    """XLA compiles in half the time to slower programs, which round differently; or as ever.

    No program of the one kind is kept for the other.
    """
    before = os.environ.get(FAST, "False")
    set_compiling(str(fast))
    yield
    set_compiling(before)


@pytest.fixture(scope="session", autouse=True)
def fast_compilation_of_the_session(request):
    """`make test` compiles fast, here and in processes of its own; `make test-slow` as users do."""
    set_compiling(str(request.config.option.markexpr != "slow"))


@pytest.fixture(scope="module")
def fast_compilation():
    """Compiles fast in `make test-slow`, too."""
    with compiling(fast=True):
        yield


@pytest.fixture(scope="module")
def compiled_as_for_users():
    """Programs are optimized, because a test looks at them, or at bits that a run has left."""
    with compiling(fast=False):
        yield


@pytest.fixture(autouse=True)
def as_on_a_fast_machine(monkeypatch):
    """Nothing is told of what merely takes long here; tests that want it set another time."""
    monkeypatch.setattr(activity, "SILENT", 1e6)


MUCH = 3 * 2**30  # bytes that a process that tests may take before it lets programs go


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """Lets compiled programs go after a module if the process has become large (on Linux)."""
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MUCH:
        jax.clear_caches()


@pytest.fixture
def without_pages(monkeypatch):
    """Runs leave a summary alone, which takes less than pages, plots and latencies."""
    leave_no_pages(monkeypatch)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """What commands read of a run on digits, without the training: networks, configuration."""
    folder = tmp_path_factory.mktemp("digits_run")
    leave(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id):
    """The directory of a finished run of `runs.py`; tests copy it before they change it.

    All processes that test share it: the first that needs it carries it out.
    """
    folder = shared(tmp_path_factory, worker_id) / "finished"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            with noted_warnings(folder / WARNINGS):
                carry_out(folder / "run")
            (folder / "done").touch()
    return folder / "run"
