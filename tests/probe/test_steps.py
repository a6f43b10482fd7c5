"""The sequence, against the core's server on real sockets."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from relay.core.addresses import Family
from relay.core.attributes import ERROR_CODE, REALM, XOR_RELAYED_ADDRESS, ErrorValue
from relay.core.commands import Command, SendToClient, SendToPeer
from relay.core.credentials import Credential, integrity_key, mint
from relay.core.nonces import Nonces
from relay.core.stun import Malformed, Message, MessageClass, Method, decode, encode
from relay.probe.relayed import RelayedSteps
from relay.probe.results import Outcome, Report, Step, StepName
from relay.probe.steps import Probe, Settings
from relay.probe.target import Target
from relay.probe.transaction import Patience
from tests.probe.conftest import IMPATIENT, LOSSY, PATIENT, QUICK, Unwatched
from tests.probe.shell import PORTS, SECRET, Shell

Run = Callable[..., Report]


def outcomes(report: Report) -> list[tuple[str, Outcome]]:
    return [(step.label, step.outcome) for step in report.steps]


def step_of(report: Report, name: StepName) -> Step:
    return next(step for step in report.steps if step.name is name)


def response(command: Command, method: Method) -> Message | None:
    """The answer to a method that a command sends, if it is one."""
    message = decode(command.data) if isinstance(command, SendToClient) else Malformed.HEADER
    return message if isinstance(message, Message) and message.method == method else None


def test_all_steps_of_both_families_succeed(run: Run, families: tuple[Family, ...]) -> None:
    with Shell(families) as shell:
        report = run(shell)
        assert not shell.server.allocations.by_id
    expected = ["Binding", "Challenge", "Allocate"]
    for family in families:
        expected += [f"ChannelBind {family}", f"Peer path {family}", f"Packets {family}"]
    assert outcomes(report) == [(label, Outcome.OK) for label in (*expected, "Refresh")]
    assert report.allocated is not None
    assert tuple(report.allocated.relayed_addresses) == families
    assert report.allocated.lifetime == 600
    assert report.realm == "firezone"
    assert report.bound is not None
    assert 0 < report.bound.rtt < PATIENT.total
    for family in families:
        traffic = report.traffic[family]
        assert [tuple(way) for way in traffic.directions] == [(20, 20)] * 3
        assert 0 < traffic.rtts[0] <= traffic.rtts[-1] < QUICK.settle + 1


@pytest.mark.usefixtures("ipv6")
def test_a_server_is_probed_over_ipv6(run: Run, families: tuple[Family, ...]) -> None:
    with Shell(families) as shell:
        report = run(shell, family=Family.IPV6)
    assert not report.failures
    assert set(report.traffic) == set(families)


@pytest.mark.parametrize("served", [Family.IPV4, Family.IPV6])
def test_a_family_that_is_not_served_is_no_failure(run: Run, families: tuple[Family, ...], served: Family) -> None:
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


def test_without_credentials_the_rest_is_skipped(run: Run, families: tuple[Family, ...]) -> None:
    with Shell(families) as shell:
        report = run(shell, None)
    assert outcomes(report) == [("Binding", Outcome.OK), ("Challenge", Outcome.OK), ("Allocate", Outcome.SKIPPED)]
    assert "--relay-secret-file" in report.steps[-1].detail


@pytest.mark.parametrize("kind", ["wrong password", "expired"])
def test_credentials_that_are_refused_fail_at_allocate(run: Run, families: tuple[Family, ...], kind: str) -> None:
    expired = mint(SECRET, int(time.time()) - 10, "salt")
    credential = expired if kind == "expired" else Credential(f"{int(time.time()) + 60}:salt", "wrong")
    with Shell(families) as shell:
        report = run(shell, credential)
    [failed] = report.failures
    assert (failed.name, failed.code) == (StepName.ALLOCATE, 401)
    assert "credentials" in failed.advice


def test_a_silent_server_fails_within_the_time_it_is_given(run: Run, silent_port: int) -> None:
    started = time.monotonic()
    report = run(silent_port, patience=IMPATIENT)
    assert IMPATIENT.total <= time.monotonic() - started < 30
    assert outcomes(report) == [("Binding", Outcome.FAILED)]
    assert f"127.0.0.1:{silent_port}/udp" in report.steps[0].detail
    assert "firewall" in report.steps[0].advice


def test_a_closed_port_fails_at_once(run: Run, closed_port: int) -> None:
    started = time.monotonic()
    report = run(closed_port, patience=Patience(total=60))
    assert time.monotonic() - started < 30
    assert "nothing listens" in report.steps[0].detail


def test_the_first_address_that_answers_is_probed(families: tuple[Family, ...], silent_port: int) -> None:
    with Shell(families) as shell:
        server = ("127.0.0.1", shell.port)
        report = Probe(Settings(None, QUICK, Patience(rto=0.1, total=2)), Unwatched()).run(
            Target("relay.test", 3478), [("127.0.0.1", silent_port), server]
        )
    assert report.server == server
    assert not report.failures
    assert f"127.0.0.1:{silent_port}" in report.steps[0].detail


def test_a_peer_that_policy_refuses_is_no_failure_but_a_loop(run: Run, families: tuple[Family, ...]) -> None:
    with Shell(families, peers_allowed=False) as shell:
        report = run(shell)
    assert not report.failures
    for family in families:
        assert tuple(report.traffic[family].round_trip) == (20, 20)
        assert report.traffic[family].to_peer is None
    step = step_of(report, StepName.PEER_PATH)
    assert step.outcome is Outcome.SKIPPED
    assert "refused as a peer (403); looped through the relayed address" in step.detail


def test_a_loop_that_is_refused_too_fails(run: Run) -> None:
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


def test_a_peer_that_nothing_reaches_fails_the_peer_path_and_is_looped(run: Run) -> None:
    def firewall(command: Command) -> Iterable[Command]:
        if isinstance(command, SendToPeer) and command.peer[1] not in PORTS:
            return ()
        # 0x40 0x00: the first channel, which leads to the peer.
        if isinstance(command, SendToClient) and command.data.startswith(b"\x40\x00"):
            return ()
        return (command,)

    with Shell([Family.IPV4], edit=firewall) as shell:
        report = run(shell, pace=LOSSY)
    [failed] = report.failures
    assert failed.name is StepName.PEER_PATH
    assert "looped through the relayed address" in failed.detail
    assert "firewall" in failed.advice
    assert step_of(report, StepName.PACKETS).outcome is Outcome.OK
    assert tuple(report.traffic[Family.IPV4].round_trip) == (20, 20)


def test_a_server_that_swallows_loops_fails_at_packets(run: Run) -> None:
    def swallow(command: Command) -> Iterable[Command]:
        return () if isinstance(command, SendToPeer) else (command,)

    with Shell([Family.IPV4], peers_allowed=False, edit=swallow) as shell:
        report = run(shell, pace=LOSSY)
    [failed] = report.failures
    assert failed.name is StepName.PACKETS
    assert "own relayed addresses" in failed.advice


@pytest.mark.parametrize("lost", [1, 5])
def test_lost_packets_are_counted_for_each_way(run: Run, lost: int) -> None:
    dropped = 0

    def lossy(command: Command) -> Iterable[Command]:
        nonlocal dropped
        if isinstance(command, SendToPeer) and dropped < lost:
            dropped += 1
            return ()
        return (command,)

    with Shell([Family.IPV4], edit=lossy) as shell:
        report = run(shell, pace=LOSSY)
    traffic = report.traffic[Family.IPV4]
    assert [way.lost for way in traffic.directions] == [lost, 0, lost]
    assert len(traffic.rtts) == 20 - lost
    # One in twenty is tolerated, five are not.
    assert [step.name for step in report.failures] == ([StepName.PACKETS] if lost == 5 else [])


@pytest.mark.parametrize(("to_peer", "words"), [(True, "from client to peer"), (False, "from peer to client")])
def test_a_way_that_is_closed_is_named(run: Run, to_peer: bool, words: str) -> None:  # noqa: FBT001
    def one_way(command: Command) -> Iterable[Command]:
        channel_data = isinstance(command, SendToClient) and command.data[0] == 0x40
        return () if (isinstance(command, SendToPeer) if to_peer else channel_data) else (command,)

    with Shell([Family.IPV4], edit=one_way) as shell:
        report = run(shell, pace=LOSSY)
    [failed] = report.failures
    assert failed.name is StepName.PACKETS
    assert words in failed.advice


def test_a_stale_nonce_is_renewed(run: Run) -> None:
    renewed = False

    def renew(command: Command) -> Iterable[Command]:
        nonlocal renewed
        if not renewed and response(command, Method.ALLOCATE):
            renewed = True
            # The nonce on its way to the client is worth nothing from here on.
            shell.server._nonces = Nonces(shell.server._lifecycle._random)
        return (command,)

    with Shell([Family.IPV4], edit=renew) as shell:
        report = run(shell)
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
                # Of this transaction, but by someone who does not know the password.
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


def test_answers_that_prove_nothing_are_said_to_be_so(run: Run) -> None:
    def unsign(command: Command) -> Iterable[Command]:
        message = response(command, Method.ALLOCATE)
        if message is None or message.message_class is not MessageClass.SUCCESS or not isinstance(command, SendToClient):
            return (command,)
        return (command._replace(data=encode(MessageClass.SUCCESS, message.method, message.transaction_id, ())),)

    with Shell([Family.IPV4], edit=unsign) as shell:
        report = run(shell, patience=Patience(rto=0.1, total=3))
        # What was allocated all the same is deleted.
        assert not shell.server.allocations.by_id
    [failed] = report.failures
    assert failed.name is StepName.ALLOCATE
    assert "MESSAGE-INTEGRITY" in failed.detail


def test_a_server_that_asks_for_no_credentials_fails(run: Run) -> None:
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
def test_a_dual_allocation_that_is_refused_is_asked_for_in_parts(
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
        # The server must not keep what the client is told it does not have.
        for allocation in tuple(shell.server.allocations.by_id.values()):
            shell.server._lifecycle.free(allocation, next(iter(shell.server.counters.allocations_freed)))
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


def test_an_allocation_is_deleted_when_the_probe_is_interrupted(
    run: Run, monkeypatch: pytest.MonkeyPatch, families: tuple[Family, ...]
) -> None:
    def interrupt(_: RelayedSteps) -> None:
        assert shell.server.allocations.by_id
        raise KeyboardInterrupt

    monkeypatch.setattr(RelayedSteps, "take", interrupt)
    with Shell(families) as shell:
        with pytest.raises(KeyboardInterrupt):
            run(shell)
        assert not shell.server.allocations.by_id


def test_a_server_that_dies_on_the_way_fails_in_bounded_time(run: Run) -> None:
    def die(command: Command) -> Iterable[Command]:
        return () if response(command, Method.CHANNEL_BIND) or response(command, Method.REFRESH) else (command,)

    started = time.monotonic()
    with Shell([Family.IPV4], edit=die) as shell:
        report = run(shell, patience=IMPATIENT)
    assert time.monotonic() - started < 30
    assert [step.name for step in report.failures] == [StepName.CHANNEL_BIND, StepName.REFRESH]


def test_a_slow_pace_ends_early_when_nothing_comes_through(run: Run) -> None:
    def swallow(command: Command) -> Iterable[Command]:
        channel_data = isinstance(command, SendToClient) and command.data[0] == 0x40
        return () if isinstance(command, SendToPeer) or channel_data else (command,)

    started = time.monotonic()
    with Shell([Family.IPV4], edit=swallow) as shell:
        report = run(shell, pace=replace(LOSSY, count=10_000, rate=50))
    assert time.monotonic() - started < 60, "it would have been sending for 200 s"
    assert [step.name for step in report.failures] == [StepName.PEER_PATH, StepName.PACKETS]


def key_of(credential: Credential) -> bytes:
    return integrity_key(credential.username, "firezone", credential.password)
