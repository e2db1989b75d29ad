"""Only regular files of a checkpoint are opened, and opening anything else does not wait."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from splitlearn_core import InvalidCheckpointError, load_split_model
from splitlearn_core.checkpoint.config_json import read_config
from splitlearn_core.checkpoint.files import open_regular, path_of, refuse_irregular
from splitlearn_core.checkpoint.manifest import read_manifest
from splitlearn_core.checkpoint.origin import sample_values
from splitlearn_core.checkpoint.safetensors_header import read_header
from splitlearn_core.checkpoint.torch_file import is_mappable, open_torch_file
from splitlearn_core.storage.durable_files import hash_file

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "a named pipe": lambda path: os.mkfifo(path, 0o600),
    "a folder": lambda path: path.mkdir(),
    "a socket": put_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "open_regular": open_regular,
    "unbuffered": lambda path: open_regular(path, buffering=0),
    "refuse_irregular": refuse_irregular,
    "a header": read_header,
    "a configuration": read_config,
    "a sample": sample_values,
    "a torch file": lambda path: open_torch_file(path, hint="none"),
    "a pickle": lambda path: open_torch_file(path, hint="none", allow_pickle=True),
    "its format": is_mappable,
    "a hash": hash_file,
}


def raised(function: Callable[[Path], object], path: Path) -> list[BaseException]:
    """Run a function in a thread that may hang, and return what it raised; nothing where it hangs."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function(path)
        except BaseException as error:  # noqa: BLE001  # looked at by the test
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    return errors


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_refused_by_what_it_is(tmp_path: Path, kind: str, reader: str) -> None:
    path = tmp_path / "file"
    KINDS[kind](path)
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    (error,) = raised(READERS[reader], path)
    assert isinstance(error, InvalidCheckpointError)
    assert str(path) in error.message
    assert f"is {kind}, where a regular file is needed" in error.message
    assert error.hint
    assert not before or len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_pipe_in_place_of_a_manifest_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "splitlearn.json")
    errors = raised(lambda _: [read_manifest(each) for each in (tmp_path,)], tmp_path)
    assert errors


def test_a_regular_file_is_read_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with open_regular(tmp_path / "link", buffering=0) as file:
        assert file.read() == b"abc"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent")


def test_a_library_opens_what_was_opened_and_not_what_took_its_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with open_regular(path) as file:
        again = path_of(file, path)
        path.unlink()
        os.mkfifo(path)
        if again == str(path):
            pytest.skip("this system has no paths of open files")
        assert Path(again).read_bytes() == b"abc"


def test_a_torch_file_that_is_mapped_outlives_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    torch.save({"a": torch.arange(5)}, path)
    tensors = open_torch_file(path, hint="none")
    path.unlink()
    assert torch.equal(tensors["a"], torch.arange(5))


def test_a_pipe_in_place_of_a_configuration_is_refused(llama: object, single: Path) -> None:
    (single / "config.json").unlink()
    os.mkfifo(single / "config.json")
    errors = raised(lambda path: load_split_model("llama", (2, 4), path), single)
    assert len(errors) == 1
