"""Logs of runs that were killed."""

import pytest

from megatron_prepo import json_lines
from megatron_prepo.errors import UserError


@pytest.mark.parametrize("torn", [b'{"step": 1', b'{"text": "\xc3', b"\x00\x00\x00", b"{", b"12"])
def test_a_torn_last_line_is_left_out_with_a_warning(tmp_path, torn):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n' + torn)
    with pytest.warns(UserWarning, match="last line is torn"):
        assert json_lines.read(file) == [{"step": 0}]


def test_a_whole_last_line_counts_with_and_without_its_end(tmp_path, recwarn):
    file = tmp_path / "metrics.jsonl"
    for text in ('{"step": 0}\n{"step": 1}\n', '{"step": 0}\n{"step": 1}'):
        file.write_text(text)
        assert json_lines.read(file) == [{"step": 0}, {"step": 1}]
    file.write_text("")
    assert json_lines.read(file) == []
    assert not recwarn.list


@pytest.mark.parametrize("line", ["", "12", "[1]", '{"step": 1', "[" * 100_000])
def test_a_line_damaged_in_the_middle_is_named(tmp_path, line):
    file = tmp_path / "ledger.jsonl"
    file.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"ledger\.jsonl, line 2 is damaged"):
        json_lines.read(file)
