"""Follows the addresses and routes of this machine while the relay runs."""

from collections.abc import Callable, Mapping

from relay.actors.actor import FailureListener, TimedActor
from relay.actors.messages import OwnAddresses
from relay.config import Config
from relay.core.addresses import Family
from relay.logger import Logger
from relay.net.routes import own_addresses
from relay.ops.addresses import relay_addresses, relayed_hosts, unreachable, with_several_addresses
from relay.ops.clock import Clock
from relay.ops.totals import NotReady

LOOK_INTERVAL = 2.0
"""Seconds between two looks. A look takes 0.1 ms, or 1 ms with 200 addresses. The kernel's notifications would come at once,
but not in every sandbox, and routes would need a look as well."""

_log = Logger("relay.actors.addresses")


class AddressActor(TimedActor):
    """Looks at the addresses and routes of this machine, for actors that send and for the readiness of the relay.

    These actors have the addresses ``known`` at the start, and get changes by the function ``changed``. The function
    ``report`` receives the reasons why clients can't reach the relay, at each change.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the parts that an actor connects
        self,
        config: Config,
        hosts: Mapping[Family, str],
        known: OwnAddresses,
        changed: Callable[[OwnAddresses], None],
        report: Callable[[Mapping[NotReady, str]], None],
        clock: Clock,
        failed: FailureListener,
    ) -> None:
        super().__init__("addresses", failed)
        self._config = config
        self._hosts = hosts
        self._known = known
        self._changed = changed
        self._report = report
        self._clock = clock
        self._reasons: Mapping[NotReady, str] = {}
        self._has_failed = False

    def on_receive(self, _: object) -> None:
        """Look, and set the time of the next look."""
        try:
            self._follow_addresses()
            self._follow_reasons()
            self._has_failed = False
        except OSError as error:
            # The last state stays. For example, no descriptor is free.
            if not self._has_failed:
                _log.warning("can't read addresses and routes: changes are not noticed", error=str(error))
            self._has_failed = True
        self._inbox.wake_at(self._clock.monotonic() + LOOK_INTERVAL, self._clock)

    def _follow_addresses(self) -> None:
        before, own = self._known, own_addresses()
        # The public address stays among the hosts even if it goes: then the relay is not ready.
        now = OwnAddresses(
            relay_addresses(own, self._config, self._hosts),
            relayed_hosts(self._config, before.hosts),
            with_several_addresses(own, self._hosts),
        )
        if now == before:
            return
        self._changed(now)
        self._known = now
        arrived, gone = now.addresses - before.addresses, before.addresses - now.addresses
        if arrived or gone:
            _log.info("addresses of this machine changed", arrived=sorted(arrived), gone=sorted(gone))
        for family, host in now.hosts.items():
            if host != before.hosts[family]:
                _log.info("the public address came: relayed packets leave from it", address=host)

    def _follow_reasons(self) -> None:
        before, now = self._reasons, unreachable(self._config, self._known.hosts)
        if now == before:
            return
        self._report(now)
        self._reasons = now
        for reason in now.keys() - before.keys():
            _log.warning("clients can't reach the relay", reason=reason.value, mend=now[reason])
        for reason in before.keys() - now.keys():
            _log.info("clients can reach the relay again", reason=reason.value)
