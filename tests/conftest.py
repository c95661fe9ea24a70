"""What test modules share that is no network; see networks.py for those."""

import importlib.util
import os

from filelock import FileLock
import jax
from jax.experimental.compilation_cache import compilation_cache as cache
import pytest
from runs import carry_out, leave

from dhp_jax.export.writers import NEEDS


def pytest_runtest_setup(item):
    """Without their packages tests of ONNX are skipped, but fail if they are what is asked for."""
    if not item.get_closest_marker("onnx"):
        return
    missing = [name for name in NEEDS["onnx"] if importlib.util.find_spec(name) is None]
    if missing:
        end = pytest.fail if item.config.option.markexpr == "onnx" else pytest.skip
        end(f"{' and '.join(missing)} not installed; `make test-onnx` runs this")


@pytest.fixture(scope="session", autouse=True)
def compiled_apart(tmp_path_factory):
    """Runs keep what they compile here, in processes of their own too, not in the user's cache."""
    folder = str(tmp_path_factory.mktemp("compiled_apart"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    jax.config.update("jax_compilation_cache_dir", folder)


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory, worker_id):
    """Programs that are compiled again, as by a run that is started again, come from a file.

    All processes that test share them.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "compiled_once"
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_compilation_cache_max_size": 2**31,  # with a limit, files are locked
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    cache.reset_cache()


@pytest.fixture(scope="module")
def fast_compilation():
    """Compiles in less time to slower programs, which round differently: none of them is kept."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """What commands read of a run on digits, without the training: networks, configuration."""
    folder = tmp_path_factory.mktemp("digits_run")
    leave(folder)
    return folder


@pytest.fixture(scope="session")
def finished(compiled_once, tmp_path_factory, worker_id):
    """The directory of a finished run of `runs.py`; tests copy it before they change it.

    All processes that test share it: the first that needs it carries it out.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "finished"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            carry_out(folder / "run")
            (folder / "done").touch()
    return folder / "run"
