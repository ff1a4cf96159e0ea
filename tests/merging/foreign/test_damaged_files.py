"""Readers of weights, side files and data: whatever the bytes are, a value or one kind of error."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from mergesearch.merging.checkpoints.adapter_settings import read_settings
from mergesearch.merging.checkpoints.model_config import check_config
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.safetensors_header import HEADER_LIMIT, read_header
from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.foreign.datasets_folder import data_files, read_arrow
from mergesearch.merging.foreign.library import library_errors
from mergesearch.merging.foreign.own_json import read_own_json, with_checksum
from mergesearch.merging.foreign.shown import MESSAGE_LIMIT, printable
from mergesearch.merging.tensors.layout import natural_key
from tests.fuzz import data_files as data_kind
from tests.fuzz import side_files, weights

#: The most characters that paths add to a message.
PATHS = 400
SEEDS = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
KINDS = {kind.KIND: kind for kind in (weights, side_files, data_kind)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        KINDS[kind].prepare(folder)
    return folders


@pytest.mark.parametrize("kind", KINDS)
@SEEDS
@given(seed=st.integers(0, 2**32))
def test_damaged_files_are_read_or_refused_in_one_line(
    prepared: dict[str, Path], tmp_path: Path, kind: str, seed: int
) -> None:
    KINDS[kind].check(prepared[kind], tmp_path / "scratch", seed)


def refusal(file: Path) -> str:
    """The message with which a header is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    message = str(caught.value)
    assert printable(message) == message
    assert len(message) <= MESSAGE_LIMIT + PATHS
    return message


def write(file: Path, header: Any, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(start: int, stop: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    size = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": size, "data_offsets": [start, stop]}


_ONE = json.dumps(entry(0, 8)).encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 8)}, "overlaps with another tensor"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, "overlaps with another tensor"),
        ({"a": entry(4, 8)}, "leaves a gap"),
        (b'{"a": ' + _ONE + b', "a": ' + _ONE + b"}", "received 'a' twice"),
        (b'{"a": 3, "a": ' + _ONE + b"}", "received 'a' twice"),
        (b'{"a": ' + _ONE[:-1] + b', "dtype": "F32"}}', "received 'dtype' twice"),
        ({"a": entry(0, 8, [2.0])}, r"whole numbers, received [2.0]"),
        ({"a": entry(0, 8, ["2"])}, "whole numbers, received ['2']"),
        ({"a": entry(0, 8, [True, 2])}, "whole numbers, received [True, 2]"),
        ({"a": entry(0, 8, [-2, -1])}, "whole numbers, received [-2, -1]"),
        ({"a": entry(0, 8, [1] * 5000 + [2])}, "at most 64 whole numbers, received a list of 5001"),
        ({"a": entry(0, 0, [0, 1 << 62, 1 << 62])}, "the file is damaged"),
        ({"a": entry(0, 8, [10**400])}, "received 8"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}', "finite"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1e400]}}', "two whole numbers"),
        ({"a": entry(0, 8, None, "F8_E4M3")}, "received unknown dtype F8_E4M3"),
        ({"a": entry(0, 8, None, ["F32"])}, "unknown dtype a list of 1"),
        (b'{"a":' * 100_000, "nested too deeply"),
        ({"x" * 100_000: entry(0, 8)}, "at most 1000 characters, received 100000"),
        (b'{"a\\ud800": ' + _ONE + b"}", "lone surrogate"),
        ({"\x1b[2J": 3}, r"'\x1b[2J'"),
        ({"a\x07": entry(0, 8)}, r"can be printed, received 'a\x07'"),
        ({"__metadata__": {"a": 1}, "a": entry(0, 8)}, "__metadata__: expected texts"),
        (json.dumps({"a": entry(0, 8)}).encode("utf-16"), "broken JSON"),
        (b"1" * 5000, "broken JSON"),
    ],
)
def test_headers_that_the_format_forbids(tmp_path: Path, header: Any, message: str) -> None:
    assert message in refusal(write(tmp_path / "x.safetensors", header))


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", HEADER_LIMIT + 1))
        stream.truncate(HEADER_LIMIT + 100)
    assert f"at most {HEADER_LIMIT} bytes" in refusal(file)


_SIZES = st.integers(-1, 3)
_ENTRIES = st.dictionaries(
    st.sampled_from(["a", "b", "c:d", "__metadata__"]),
    st.builds(
        lambda shape, start, more, dtype: entry(start, start + more, shape, dtype),
        st.lists(_SIZES, max_size=3),
        st.integers(-1, 16),
        st.integers(0, 16),
        st.sampled_from(["F32", "U8", "I64"]),
    ),
    max_size=4,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(header=_ENTRIES, size=st.integers(0, 24))
def test_what_is_accepted_is_what_the_library_accepts(
    tmp_path: Path, header: dict[str, Any], size: int
) -> None:
    file = write(tmp_path / "x.safetensors", header, bytes(size))
    try:
        theirs = {name: info["shape"] for name, info in deserialize(file.read_bytes())}
    except SafetensorError:
        refusal(file)
        return
    assert {name: list(info.shape) for name, info in read_header(file).items()} == theirs


def test_names_may_hold_colons_and_orders_may_differ(tmp_path: Path) -> None:
    header = {"b:1": entry(4, 8), "a": entry(0, 4), "empty": entry(4, 4, [0, 7])}
    found = read_header(write(tmp_path / "x.safetensors", header))
    assert [*found] == ["b:1", "a", "empty"]


def test_odd_digits_in_names_have_an_order() -> None:
    assert sorted(["²", "a10", "a9"], key=natural_key) == ["a9", "a10", "²"]  # int("²") fails


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": 3}, "modules_to_save: expected a list, received 3"),
        ({"modules_to_save": [1]}, "modules_to_save: 0: expected a text"),
        ({"auto_mapping": [1]}, "auto_mapping: expected a mapping"),
        ({"use_rslora": "no"}, "use_rslora: expected true or false, received 'no'"),
        ({"rank_pattern": {"(": 2}}, "expected regular expressions, received '('"),
        ({"rank_pattern": {"(a+)+": 2}}, "at most two repetitions"),
        ({"alpha_pattern": [8]}, "alpha_pattern: expected a mapping"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights: a list of 1"),
        ({"peft_type": ["LORA"]}, "received a list of 1"),
        ({"\x1b" * 1000: 1}, r"received \x1b"),
    ],
)
def test_settings_of_adapters_have_types(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **change}))
    with pytest.raises(CheckpointError) as caught:
        read_settings(tmp_path)
    assert message in str(caught.value)
    assert printable(str(caught.value)) == str(caught.value)


def test_an_adapter_of_itself_is_refused(tmp_path: Path) -> None:
    settings_of = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings_of))
    write(tmp_path / "adapter_model.safetensors", {}, b"")
    with pytest.raises(CheckpointError, match="received two adapters"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": ["llama"]}, "model_type: expected a text, received a list of 1"),
        ({"model_type": "a\x1b[2J"}, r"can be printed, received 'a\x1b[2J'"),
        ({"architectures": 1}, "architectures: expected a list"),
        ({"text_config": 5}, "text_config: expected a mapping"),
        ({"text_config": {"vocab_size": "9"}}, "text_config: vocab_size: expected a whole number"),
        ({"id2label": [1]}, "id2label: expected a mapping"),
        ({"label2id": {"a": 1.5}}, "label2id: a: expected a whole number"),
    ],
)
def test_settings_of_models_have_types(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_config(config, "config.json")
    assert message in str(caught.value)
    check_config(dict.fromkeys(config), "config.json")  # null stands for none


def test_shards_lie_in_the_folder_and_hold_what_the_index_says(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", {"a": entry(0, 8)})
    index = tmp_path / "model.safetensors.index.json"

    def refused(text: str) -> str:
        index.write_text(text)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(str(tmp_path))
        return str(caught.value)

    assert "shard '../one.safetensors' in its folder" in refused(
        '{"weight_map": {"a": "../one.safetensors"}}'
    )
    assert "received no such file" in refused(json.dumps({"weight_map": {"a": "b" * 300}}))
    assert "weight_map: a: expected a text" in refused('{"weight_map": {"a": 1}}')
    assert "'a' twice" in refused(
        '{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}'
    )
    assert "expected tensor 'b'" in refused(
        '{"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}'
    )
    assert "byte order mark" in refused('\ufeff{"weight_map": {"a": "one.safetensors"}}')


def test_files_of_our_own_are_whole_or_none(tmp_path: Path) -> None:
    file = tmp_path / "sheet.json"
    assert read_own_json(file) is None
    file.write_text(json.dumps(with_checksum({"angle": 0.51})))
    assert read_own_json(file) == {"angle": 0.51}
    file.write_text(file.read_text().replace("0.51", "0.91"))
    assert read_own_json(file) is None
    file.write_text('{"angle": 0.5}')  # of an earlier version
    assert read_own_json(file) == {"angle": 0.5}


def test_folders_of_datasets_name_files_of_their_own(tmp_path: Path) -> None:
    for name in ("../x.arrow", "missing.arrow", "a" * 300):
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(InputError, match="expected names of files in its folder"):
            data_files(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": [3]}')
    with pytest.raises(InputError, match="_data_files: 0: expected a mapping"):
        data_files(tmp_path)
    (tmp_path / "x.arrow").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="expected an Arrow file"):
        read_arrow(tmp_path / "x.arrow")


def test_a_lack_of_memory_is_not_the_files_fault() -> None:
    with pytest.raises(MemoryError), library_errors("f", "a model"):
        raise MemoryError
    with (
        pytest.raises(InputError, match=r"f: expected a model, received Exception: a b"),
        library_errors("f", "a model"),
    ):
        raise Exception("a\n b")
