"""Mock metadata services of clouds, which respond as documented."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, TypeAlias

MAC = "02:29:96:8f:6a:2d"
TOKEN = "AQAEALPv-0tQZ=="


class Asked(NamedTuple):
    verb: str
    target: str
    headers: dict[str, str]


class Said(NamedTuple):
    status: int
    text: str = ""
    headers: tuple[tuple[str, str], ...] = ()


Cloud: TypeAlias = Callable[[Asked], Said]


class StandIn:
    """An HTTP server with the responses of a cloud."""

    def __init__(self, cloud: Cloud, at: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.asked: list[Asked] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                # A missing body after Content-Length would block the next request.
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked.append(Asked(self.command, self.path, {name.lower(): value for name, value in self.headers.items()}))
                said = cloud(asked[-1])
                self.send_response(said.status)
                for name, value in said.headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(said.text.encode())))
                self.end_headers()
                self.wfile.write(said.text.encode())

            do_GET = do_PUT = answer  # noqa: N815 - as it is called

            def log_message(self, *_: Any) -> None:  # noqa: ANN401 - as it is called
                pass

        self._server = ThreadingHTTPServer(at, Handler)
        self.at: tuple[str, int] = ("127.0.0.1", self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextlib.contextmanager
def standing_in(cloud: Cloud, at: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[StandIn]:
    """Serve the responses of a cloud."""
    server = StandIn(cloud, at)
    try:
        yield server
    finally:
        server.close()


def gce(ip4: str | None = "34.76.12.9", ip6: str | None = "2600:1900:4010:9c::1") -> Cloud:
    """Google: requires and returns its header; 404 or an empty body for missing values."""
    known = {"access-configs/0/external-ip": ip4, "ipv6s": ip6}
    flavor = (("Metadata-Flavor", "Google"), ("Server", "Metadata Server for VM"), ("Content-Type", "application/text"))

    def answer(asked: Asked) -> Said:
        if asked.headers.get("metadata-flavor") != "Google" or "x-forwarded-for" in asked.headers:
            return Said(403, "Missing Metadata-Flavor:Google header.", flavor)
        said = known.get(asked.target.removeprefix("/computeMetadata/v1/instance/network-interfaces/0/"))
        return Said(404, "<html>404</html>", flavor) if said is None else Said(200, said, flavor)

    return answer


def aws(ip4: str | None = "54.93.12.9", ip6: str | None = "2a05:d014:9c::1\n2a05:d014:9c::2", token: str = TOKEN) -> Cloud:
    """Amazon, with version 1 disabled: 401 without a token, 404 for missing values."""
    interface = f"network/interfaces/macs/{MAC}"
    known = {"public-ipv4": ip4, "mac": MAC, f"{interface}/ipv6s": ip6}

    def answer(asked: Asked) -> Said:
        if asked.target == "/latest/api/token":
            if asked.verb != "PUT":
                return Said(405)
            seconds = asked.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
            if not (seconds.isdigit() and 1 <= int(seconds) <= 21600) or "x-forwarded-for" in asked.headers:
                return Said(400)
            return Said(200, token, (("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", seconds),))
        if asked.headers.get("x-aws-ec2-metadata-token") != token:
            return Said(401)
        said = known.get(asked.target.removeprefix("/latest/meta-data/"))
        return Said(404) if said is None else Said(200, said)

    return answer


def azure(
    basic: tuple[str, ...] = (), standard: tuple[str, ...] = ("20.50.12.9", "2603:1020:9c::1"), private: str = "10.0.0.4"
) -> Cloud:
    """Azure: Basic SKU addresses in the interface, Standard SKU addresses in the load balancer."""
    interface = {
        "ipv4": {
            "ipAddress": [
                {"privateIpAddress": private, "publicIpAddress": each} for each in [*basic, ""] if ":" not in each
            ],
            "subnet": [{"address": "10.0.0.0", "prefix": "24"}],
        },
        "ipv6": {"ipAddress": [{"privateIpAddress": "fd00::4", "publicIpAddress": each} for each in basic if ":" in each]},
        "macAddress": "000D3AF806EC",
    }
    balancer = {
        "loadbalancer": {
            "publicIpAddresses": [{"frontendIpAddress": each, "privateIpAddress": private} for each in standard],
            "inboundRules": [
                {"frontendIpAddress": "50.0.0.1", "protocol": "tcp", "frontendPort": 80, "privateIpAddress": private}
            ],
            "outboundRules": [{"frontendIpAddress": "50.0.0.1", "privateIpAddress": private}],
        }
    }
    known = {
        "/metadata/instance/network": {"interface": [interface]},
        "/metadata/loadbalancer": balancer if standard else None,
    }

    def answer(asked: Asked) -> Said:
        path, _, query = asked.target.partition("?")
        if asked.headers.get("metadata") != "true" or "x-forwarded-for" in asked.headers:
            return Said(400, '{ "error": "Bad request: Required metadata header not specified" }')
        if "api-version=20" not in query:
            return Said(400, '{ "error": "Bad request: api-version is invalid or was not specified in the request." }')
        said = known.get(path)
        if said is None:
            return Said(404, '{ "error": "No load balancer metadata is found." }')
        return Said(200, json.dumps(said), (("Content-Type", "application/json; charset=utf-8"), ("Server", "IMDS")))

    return answer
