"""The sequence, against the core's server on real sockets."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from relay.core.addresses import Family
from relay.core.attributes import ERROR_CODE, LIFETIME, NONCE, REALM, XOR_RELAYED_ADDRESS, ErrorValue
from relay.core.commands import Command, SendToClient, SendToPeer
from relay.core.credentials import Credential, integrity_key, mint
from relay.core.stun import Malformed, Message, MessageClass, Method, decode, encode
from relay.core.timestamp import Timestamp
from relay.net.endpoint import Endpoint
from relay.tools.probe.report import Outcome, Report, Step, StepName
from relay.tools.probe.steps import probe
from tests.support.probe import IMPATIENT, LOSSY, PATIENT, QUICK, SILENT, unwatched
from tests.support.shell import PORTS, SECRET, Shell

Run = Callable[..., Report]


def outcomes(report: Report) -> list[tuple[str, Outcome]]:
    return [(step.label, step.outcome) for step in report.steps]


def step_of(report: Report, name: StepName) -> Step:
    return next(step for step in report.steps if step.name is name)


def response(command: Command, method: Method) -> Message | None:
    """Return the response to a method in a command, if any."""
    message = decode(command.data) if isinstance(command, SendToClient) else Malformed.HEADER
    return message if isinstance(message, Message) and message.method == method else None


def test_all_steps_of_both_families_succeed(run: Run, families: tuple[Family, ...]) -> None:
    with Shell(families) as shell:
        report = run(shell)
        assert not shell.server.allocations.by_id
    expected = ["Binding", "Challenge", "Allocate"]
    for family in families:
        expected += [f"ChannelBind {family}", f"Peer path {family}", f"Packets {family}", f"Path MTU {family}"]
    assert outcomes(report) == [(label, Outcome.OK) for label in (*expected, "Refresh")]
    assert report.allocated is not None
    assert tuple(report.allocated.relayed_addresses) == families
    assert report.allocated.lifetime == 600
    assert report.realm == "firezone"
    assert report.binding_rtt is not None
    assert 0 < report.binding_rtt < PATIENT
    for family in families:
        traffic = report.traffic[family]
        assert [tuple(way) for way in traffic.directions] == [(20, 20)] * 3
        assert report.path_mtu[family] == 9001
        assert 0 < traffic.rtts[0] <= traffic.rtts[-1] < QUICK.settle + 1


@pytest.mark.usefixtures("ipv6")
def test_a_server_is_probed_over_ipv6(run: Run, families: tuple[Family, ...]) -> None:
    with Shell(families) as shell:
        report = run(shell, family=Family.IPV6)
    assert not report.failures
    assert set(report.traffic) == set(families)


@pytest.mark.parametrize("served", [Family.IPV4, Family.IPV6])
def test_an_unserved_family_is_not_a_failure(run: Run, families: tuple[Family, ...], served: Family) -> None:
    if served not in families:
        pytest.skip("this machine has no IPv6")
    with Shell([served]) as shell:
        report = run(shell, family=served)
        assert shell.server.counters.allocations_made == 1
    assert not report.failures
    other = Family.IPV6 if served is Family.IPV4 else Family.IPV4
    assert report.allocated is not None
    assert report.allocated.missing_families == {other: 440}
    assert f"{other}: not served (440)" in step_of(report, StepName.ALLOCATE).detail


def test_without_credentials_later_steps_are_skipped(run: Run, families: tuple[Family, ...]) -> None:
    with Shell(families) as shell:
        report = run(shell, None)
    assert outcomes(report) == [("Binding", Outcome.OK), ("Challenge", Outcome.OK), ("Allocate", Outcome.SKIPPED)]
    assert "--relay-secret-file" in report.steps[-1].detail


@pytest.mark.parametrize("kind", ["wrong password", "expired"])
def test_rejected_credentials_fail_at_allocate(run: Run, families: tuple[Family, ...], kind: str) -> None:
    expired = mint(SECRET, int(time.time()) - 10, "salt")
    credential = expired if kind == "expired" else Credential(f"{int(time.time()) + 60}:salt", "wrong")
    with Shell(families) as shell:
        report = run(shell, credential)
    [failed] = report.failures
    assert (failed.name, failed.code) == (StepName.ALLOCATE, 401)
    assert "credentials" in failed.advice


def test_a_silent_server_fails_within_the_timeout(run: Run, silent_port: int) -> None:
    started = time.monotonic()
    report = run(silent_port, timeout=IMPATIENT)
    assert IMPATIENT <= time.monotonic() - started < 30
    assert outcomes(report) == [("Binding", Outcome.FAILED)]
    assert f"127.0.0.1:{silent_port}/udp" in report.steps[0].detail
    assert "firewall" in report.steps[0].advice


def test_a_closed_port_fails_at_once(run: Run, closed_port: int) -> None:
    started = time.monotonic()
    report = run(closed_port, timeout=60)
    assert time.monotonic() - started < 30
    assert "nothing listens" in report.steps[0].detail


def test_the_first_responding_address_is_probed(families: tuple[Family, ...], silent_port: int) -> None:
    with Shell(families) as shell:
        server = ("127.0.0.1", shell.port)
        addresses = [("127.0.0.1", silent_port), server]
        report = probe(Endpoint("relay.test", 3478), addresses, None, QUICK, IMPATIENT, unwatched)
    assert report.server == server
    assert not report.failures
    assert f"127.0.0.1:{silent_port}" in report.steps[0].detail


def test_a_peer_forbidden_by_policy_falls_back_to_a_loop(run: Run, families: tuple[Family, ...]) -> None:
    with Shell(families, peers_allowed=False) as shell:
        report = run(shell)
    assert not report.failures
    for family in families:
        assert tuple(report.traffic[family].round_trip) == (20, 20)
        assert report.traffic[family].to_peer is None
    step = step_of(report, StepName.PEER_PATH)
    assert step.outcome is Outcome.SKIPPED
    assert "as a peer (403); looped through the relayed address" in step.detail


def test_a_rejected_loop_fails(run: Run) -> None:
    with Shell([Family.IPV4], peers_allowed=False, loops_allowed=False) as shell:
        report = run(shell)
        assert not shell.server.allocations.by_id
    assert outcomes(report)[3:] == [
        ("Peer path IPv4", Outcome.SKIPPED),
        ("ChannelBind IPv4", Outcome.FAILED),
        ("Packets IPv4", Outcome.SKIPPED),
        ("Refresh", Outcome.OK),
    ]
    assert report.failures[0].code == 403


def test_an_unreachable_peer_fails_the_peer_path_and_is_looped(run: Run) -> None:
    def firewall(command: Command) -> Iterable[Command]:
        if isinstance(command, SendToPeer) and command.peer[1] not in PORTS:
            return ()
        # 0x4000: the first channel, bound to the peer.
        if isinstance(command, SendToClient) and command.data.startswith(b"\x40\x00"):
            return ()
        return (command,)

    with Shell([Family.IPV4], edit=firewall) as shell:
        report = run(shell, plan=LOSSY)
    [failed] = report.failures
    assert failed.name is StepName.PEER_PATH
    assert "looped through the relayed address" in failed.detail
    assert "firewall" in failed.advice
    assert step_of(report, StepName.PACKETS).outcome is Outcome.OK
    assert tuple(report.traffic[Family.IPV4].round_trip) == (20, 20)


def test_the_probe_of_a_server_that_announces_a_wrong_address_names_the_option(run: Run, credential: Credential) -> None:
    def announce(command: Command) -> Iterable[Command]:
        message = response(command, Method.ALLOCATE)
        address = message and message.get(XOR_RELAYED_ADDRESS)
        if message is None or address is None or not isinstance(command, SendToClient):
            return () if isinstance(command, SendToPeer) else (command,)
        # Nothing listens there.
        values = ((XOR_RELAYED_ADDRESS, ("127.0.0.99", address[1])), (LIFETIME, 600))
        data = encode(message.message_class, message.method, message.transaction_id, values, key=key_of(credential))
        return (command._replace(data=data),)

    with Shell([Family.IPV4], edit=announce) as shell:
        report = run(shell, plan=SILENT)
    failed = report.failures[0]
    assert failed.name is StepName.PEER_PATH
    assert failed.advice == (
        "the server announces 127.0.0.99, but responds at 127.0.0.1: give it --public-ip4-addr 127.0.0.1"
    )


def test_a_server_dropping_loops_fails_at_packets(run: Run) -> None:
    def swallow(command: Command) -> Iterable[Command]:
        return () if isinstance(command, SendToClient) and command.data[0] >= 64 else (command,)

    with Shell([Family.IPV4], peers_allowed=False, edit=swallow) as shell:
        report = run(shell, plan=SILENT)
    [failed] = report.failures
    assert failed.name is StepName.PACKETS
    assert "own relayed address" in failed.advice
    assert "NAT without hairpin" in failed.advice


@pytest.mark.parametrize("lost", [1, 5])
def test_lost_packets_are_counted_per_direction(run: Run, lost: int) -> None:
    dropped = 0

    def lossy(command: Command) -> Iterable[Command]:
        nonlocal dropped
        if isinstance(command, SendToPeer) and dropped < lost:
            dropped += 1
            return ()
        return (command,)

    with Shell([Family.IPV4], edit=lossy) as shell:
        report = run(shell, plan=LOSSY)
    traffic = report.traffic[Family.IPV4]
    assert [way.lost for way in traffic.directions] == [lost, 0, lost]
    assert len(traffic.rtts) == 20 - lost
    # A loss of 1 in 20 is tolerated, a loss of 5 is not.
    assert [step.name for step in report.failures] == ([StepName.PACKETS] if lost == 5 else [])


@pytest.mark.parametrize(("to_peer", "words"), [(True, "reached the peer"), (False, "reached the client")])
def test_a_blocked_direction_is_reported(run: Run, to_peer: bool, words: str) -> None:  # noqa: FBT001
    def one_way(command: Command) -> Iterable[Command]:
        channel_data = isinstance(command, SendToClient) and command.data[0] == 0x40
        return () if (isinstance(command, SendToPeer) if to_peer else channel_data) else (command,)

    with Shell([Family.IPV4], edit=one_way) as shell:
        report = run(shell, plan=LOSSY)
    [failed] = report.failures
    assert failed.name is StepName.PACKETS
    assert words in failed.advice


def test_a_stale_nonce_is_renewed(run: Run) -> None:
    renewed = False

    def renew(command: Command) -> Iterable[Command]:
        nonlocal renewed
        challenge = response(command, Method.ALLOCATE)
        if renewed or challenge is None or not isinstance(command, SendToClient):
            return (command,)
        renewed = True
        # The server did not issue this nonce to this client.
        attributes = ((ERROR_CODE, ErrorValue(401, "")), (REALM, "firezone"), (NONCE, b"A" * 16))
        return (command._replace(data=encode(MessageClass.ERROR, Method.ALLOCATE, challenge.transaction_id, attributes)),)

    with Shell([Family.IPV4], edit=renew) as shell:
        report = run(shell)
        assert shell.server.counters.errors[Method.ALLOCATE, 438] >= 1
    assert renewed
    assert not report.failures


def test_stray_and_forged_datagrams_are_ignored(run: Run) -> None:
    def hostile(command: Command) -> Iterable[Command]:
        if not isinstance(command, SendToClient):
            yield replace_payload(command) if isinstance(command, SendToPeer) else command
            yield command
            return
        message = decode(command.data)
        junk = [b"", b"\xff" * 40, command.data[:-3], b"\x40\x00\xff\xff", b"\x40\x00\x00\x01x", b"\x7f\xff\x00\x00"]
        if isinstance(message, Message):
            relayed = ((XOR_RELAYED_ADDRESS, ("203.0.113.66", 666)), (ERROR_CODE, ErrorValue(437, "gone")))
            junk += [
                encode(MessageClass.SUCCESS, message.method, b"not the same", relayed),
                encode(MessageClass.REQUEST, message.method, message.transaction_id, ()),
                encode(MessageClass.SUCCESS, Method.REFRESH ^ 1, message.transaction_id, relayed),
            ]
            if message.integrity_at is not None:
                # With the transaction id, but without the password.
                junk += [
                    encode(each, message.method, message.transaction_id, relayed, key=key)
                    for each in (MessageClass.SUCCESS, MessageClass.ERROR)
                    for key in (None, b"guess")
                ]
        else:
            yield command  # a packet twice counts once
        for each in junk:
            yield SendToClient(each, command.client)
        yield command

    def replace_payload(command: SendToPeer) -> SendToPeer:
        return command._replace(data=bytes(len(command.data)))

    with Shell([Family.IPV4], edit=hostile) as shell:
        report = run(shell)
    assert not report.failures
    assert [tuple(way) for way in report.traffic[Family.IPV4].directions] == [(20, 20)] * 3


def test_responses_without_integrity_are_reported(run: Run) -> None:
    def unsign(command: Command) -> Iterable[Command]:
        message = response(command, Method.ALLOCATE)
        if message is None or message.message_class is not MessageClass.SUCCESS or not isinstance(command, SendToClient):
            return (command,)
        return (command._replace(data=encode(MessageClass.SUCCESS, message.method, message.transaction_id, ())),)

    with Shell([Family.IPV4], edit=unsign) as shell:
        report = run(shell, timeout=IMPATIENT)
        # The probe deletes the allocation.
        assert not shell.server.allocations.by_id
    [failed] = report.failures
    assert failed.name is StepName.ALLOCATE
    assert "MESSAGE-INTEGRITY" in failed.detail


def test_a_server_without_authentication_fails(run: Run) -> None:
    def open_to_all(command: Command) -> Iterable[Command]:
        message = response(command, Method.ALLOCATE) or response(command, Method.REFRESH)
        if message is None or not isinstance(command, SendToClient):
            return (command,)
        return (command._replace(data=encode(MessageClass.SUCCESS, message.method, message.transaction_id, ())),)

    with Shell([Family.IPV4], edit=open_to_all) as shell:
        report = run(shell)
    assert outcomes(report)[1:] == [("Challenge", Outcome.FAILED), ("Refresh", Outcome.OK)]
    assert "anyone can relay" in report.failures[0].advice


def test_a_challenge_needs_realm_and_nonce(run: Run) -> None:
    def strip(command: Command) -> Iterable[Command]:
        message = response(command, Method.ALLOCATE)
        if message is None or not isinstance(command, SendToClient):
            return (command,)
        attributes = ((ERROR_CODE, ErrorValue(401, "")), (REALM, "firezone"))
        return (command._replace(data=encode(MessageClass.ERROR, message.method, message.transaction_id, attributes)),)

    with Shell([Family.IPV4], edit=strip) as shell:
        report = run(shell)
    [failed] = report.failures
    assert failed.name is StepName.CHALLENGE
    assert "NONCE" in failed.detail


@pytest.mark.parametrize("code", [400, 420, 486])
def test_a_rejected_dual_allocation_is_requested_per_family(
    run: Run, credential: Credential, families: tuple[Family, ...], code: int
) -> None:
    refused = 0

    def refuse(command: Command) -> Iterable[Command]:
        nonlocal refused
        message = response(command, Method.ALLOCATE)
        if message is None or message.message_class is not MessageClass.SUCCESS or refused:
            return (command,)
        refused += 1
        assert isinstance(command, SendToClient)
        # The server must not keep an allocation after an error response.
        for allocation in tuple(shell.server.allocations.by_id):
            shell.server.handle_allocation_failed(allocation, Timestamp(time.monotonic(), time.time()))
        error = ((ERROR_CODE, ErrorValue(code, "no")),)
        key = key_of(credential)
        return (command._replace(data=encode(MessageClass.ERROR, message.method, message.transaction_id, error, key=key)),)

    with Shell(families, edit=refuse) as shell:
        report = run(shell)
    if code == 486:
        [failed] = report.failures
        assert (failed.name, failed.code) == (StepName.ALLOCATE, 486)
        assert "quota" in failed.advice
    else:
        assert report.allocated is not None
        assert Family.IPV4 in report.allocated.relayed_addresses


def test_an_interrupted_probe_deletes_its_allocation(credential: Credential, families: tuple[Family, ...]) -> None:
    def interrupt(_: Report, step: Step) -> None:
        if step.name is StepName.CHANNEL_BIND:
            assert shell.server.allocations.by_id
            raise KeyboardInterrupt

    with Shell(families) as shell:
        server = ("127.0.0.1", shell.port)
        with pytest.raises(KeyboardInterrupt):
            probe(Endpoint(*server), [server], credential, QUICK, PATIENT, interrupt)
        assert not shell.server.allocations.by_id


def test_a_server_dying_during_the_probe_fails_within_the_timeout(run: Run) -> None:
    def die(command: Command) -> Iterable[Command]:
        return () if response(command, Method.CHANNEL_BIND) or response(command, Method.REFRESH) else (command,)

    started = time.monotonic()
    with Shell([Family.IPV4], edit=die) as shell:
        report = run(shell, timeout=IMPATIENT)
    assert time.monotonic() - started < 30
    assert [step.name for step in report.failures] == [StepName.CHANNEL_BIND, StepName.REFRESH]


def test_a_slow_pace_ends_early_without_packets(run: Run) -> None:
    def swallow(command: Command) -> Iterable[Command]:
        channel_data = isinstance(command, SendToClient) and command.data[0] == 0x40
        return () if isinstance(command, SendToPeer) or channel_data else (command,)

    started = time.monotonic()
    with Shell([Family.IPV4], edit=swallow) as shell:
        report = run(shell, plan=replace(SILENT, count=10_000, rate=50))
    assert time.monotonic() - started < 60, "it would have been sending for 200 s"
    assert [step.name for step in report.failures] == [StepName.PEER_PATH, StepName.PACKETS]


def key_of(credential: Credential) -> bytes:
    return integrity_key(credential.username, "firezone", credential.password)
