"""Compiled programs are kept where they should be, and long compilations are told."""

from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache as cache
import jax.numpy as jnp
import pytest

from dhp_jax.backend import cache as backend_cache
from dhp_jax.backend.cache import keep_compiled, long_compilations
from dhp_jax.files import user_cache

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def settings():
    """JAX's settings, put back after the test."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    cache.reset_cache()


def compile_something(number):
    jax.jit(lambda x: jnp.sin(x) + number).lower(jnp.ones(3)).compile()


def test_compiled_programs_are_kept_in_a_folder_that_is_made(settings, tmp_path):
    folder = tmp_path / "new" / "cache"
    assert keep_compiled(folder) == folder
    compile_something(1.5)
    assert any(folder.iterdir())


def test_what_a_killed_process_left_keeps_no_later_program_from_being_kept(settings, tmp_path):
    keep_compiled(tmp_path)
    compile_something(5.5)
    whole = {path.name for path in tmp_path.glob("*-cache")}
    assert whole
    (tmp_path / "jit_half-0123-cache").write_bytes(b"the beginning of a program")
    cache.reset_cache()
    keep_compiled(tmp_path)
    assert {path.name for path in tmp_path.glob("*-cache")} == whole
    compile_something(6.5)
    assert {path.name for path in tmp_path.glob("*-cache")} > whole


def test_where_no_folder_can_be_the_default_is_left_out_and_another_refused(
    settings, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert keep_compiled() is None
    assert "file/dhp_jax/xla (Not a directory); compiled programs are not kept" in caplog.text
    with pytest.raises(
        ValueError, match=r"^compilation_cache: expected a folder .*Not a directory"
    ):
        keep_compiled(tmp_path / "file")


def test_off_keeps_nothing(settings, tmp_path):
    keep_compiled(tmp_path)
    assert keep_compiled("off") is None
    compile_something(2.5)
    assert not any(tmp_path.glob("*-cache"))


def test_a_folder_that_jax_was_told_stays(settings, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    assert keep_compiled() == tmp_path / "told"
    assert keep_compiled(tmp_path / "asked") == tmp_path / "asked"


def test_a_cache_that_jax_was_told_to_do_without_stays_off(settings, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_compiled() is None
    assert keep_compiled(tmp_path) == tmp_path


def test_the_default_is_in_the_users_cache_folder(settings, monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_compiled() == user_cache("xla") == tmp_path / "dhp_jax" / "xla"
    assert jax.config.jax_compilation_cache_max_size == 2**31
    assert keep_compiled("~/here") == Path.home() / "here"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache("xla") == Path.home() / ".cache" / "dhp_jax" / "xla"


def test_long_compilations_are_told_while_someone_listens(monkeypatch):
    monkeypatch.setattr(backend_cache, "LONG", -1.0)
    told = []
    with long_compilations(lambda *what: told.append(what)):
        compile_something(3.5)
    compile_something(4.5)
    ((seconds,),) = told
    assert seconds > 0


def test_short_compilations_are_not_told(monkeypatch):
    monkeypatch.setattr(backend_cache, "LONG", 1e6)
    told = []
    with long_compilations(lambda *what: told.append(what)):
        compile_something(5.5)
    assert told == []
