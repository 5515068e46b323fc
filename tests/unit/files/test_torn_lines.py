"""Logs of runs that were killed."""

import pytest

from megatron_prepo.errors import UserError
from megatron_prepo.files.atomic import read_lines


@pytest.mark.parametrize("torn", [b'{"step": 1', b'{"text": "\xc3', b"\x00\x00\x00", b"{", b""])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n' + torn)
    assert list(read_lines(file)) == [{"step": 0}]


@pytest.mark.parametrize("line", [b"", b'{"step": 1', b"[" * 100_000, b'"\xc3"', b"\x00" * 9])
def test_a_line_damaged_in_the_middle_is_named(tmp_path, line):
    file = tmp_path / "ledger.jsonl"
    file.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"ledger\.jsonl, line 2 is damaged"):
        list(read_lines(file))
