"""Free ports, below the range from which the system assigns them to outgoing connections."""

import socket

import pytest

from megatron_prepo.process import ports


def test_a_port_is_free_and_below_those_of_outgoing_connections():
    port = ports.free_port("127.0.0.1")
    assert ports.FIRST <= port <= ports.LAST < 30_000
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))


@pytest.mark.parametrize("host", ["::1", "::", "localhost"])
def test_hosts_of_either_family_have_ports(host):
    assert ports.FIRST <= ports.free_port(host) <= ports.LAST


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7", "no-such-host.invalid"])
def test_an_address_of_another_machine_has_none(host):
    with pytest.raises(OSError, match=r"assign requested|not known|name resolution"):
        ports.free_port(host)


def test_one_that_is_taken_is_passed_over(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        monkeypatch.setattr(ports, "FIRST", taken)
        monkeypatch.setattr(ports, "LAST", taken)
        with pytest.raises(OSError, match=f"between {taken} and {taken} is free on 127.0.0.1"):
            ports.free_port("127.0.0.1")
        monkeypatch.setattr(ports, "LAST", taken + 20)
        assert {ports.free_port("127.0.0.1") for _ in range(30)}.isdisjoint({taken})
