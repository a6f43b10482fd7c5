"""Why a step of a probe failed, in words for the operator who has to mend it."""

from relay.core.stun import Method

_ADVICE = {
    300: "the server sends its clients to another one: probe that one",
    400: "the server finds the request malformed: see its log",
    401: "wrong or expired credentials: check username and password (or the relay secret), and both machines' clocks",
    403: "the server's policy refuses it: see its allowed and denied peers",
    420: "the server lacks a part of TURN that clients need: update it",
    437: "the server has no allocation where one should be, or an old one where none should be: probe again",
    438: "the server refuses the nonces it gives out: do several servers share this address?",
    440: "the server relays for no address family that was asked for: see its addresses",
    441: "the allocation belongs to another username: probe again",
    442: "the server relays no UDP: turn that on",
    443: "the server's allocation lacks the address family of the peer: see its addresses",
    486: "the server has as many allocations as its quota permits: wait until some end, or raise the quota",
    500: "something broke in the server: see its log",
    508: "the server has no port or socket left: widen its port range, raise its limit of open files, or take load off it",
}


class ProbeError(Exception):
    """A step failed: as text, what was found.

    Args:
        finding: what was found, as part of a sentence.
        advice: what to do about it.
        code: the error code of the server's answer, if there was one.
    """

    def __init__(self, finding: str, advice: str, code: int | None = None) -> None:
        super().__init__(finding)
        self.advice = advice
        self.code = code


class RefusedError(ProbeError):
    """The server answered with an error (RFC 8489 §14.8)."""

    def __init__(self, method: Method, code: int, phrase: str) -> None:
        words = f"{code} {printable(phrase)}".rstrip()
        advice = _ADVICE.get(code, "see the server's log")
        super().__init__(f"{TITLES[method]} answered with {words}", advice, code)
        self.code: int = code


class NoAnswerError(ProbeError):
    """Nothing that is an answer came in time."""


class UnreachableError(ProbeError):
    """This machine could not even send, or was told at once that nothing listens there."""


class NoRouteError(UnreachableError):
    """This machine has no address or no route of the family: it says nothing about the server."""


class BadAnswerError(ProbeError):
    """An answer that lacks what it must have, or isn't signed as it must be."""


TITLES = {
    Method.BINDING: "Binding",
    Method.ALLOCATE: "Allocate",
    Method.REFRESH: "Refresh",
    Method.CHANNEL_BIND: "ChannelBind",
}
"""Methods as the RFC spells them."""

_SHOWN_LENGTH = 100


def printable(text: str) -> str:
    """Make a server's text fit for a terminal: one that was hostile could steer it with control characters."""
    shown = ascii(text)[1:-1].replace("\\'", "'").replace("\\\\", "\\")
    return shown if len(shown) <= _SHOWN_LENGTH else f"{shown[:_SHOWN_LENGTH]}..."
