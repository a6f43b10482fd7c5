"""Looks every locked package up in the advisories of the Python Package Index, by way of pip-audit.

Exit codes: 0 nothing is known against any, 1 there is, 3 it could not be found out of all. A service that knows nothing of a
package (a mirror without advisories) is of no more use than none: pip-audit finds "no known vulnerabilities" then; this one
says what it is.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final

from supply.pins import FOLDER

FOUND: Final = 1
UNKNOWN: Final = 3

_SECONDS: Final = 120


def main() -> None:
    """Audit, and say what was found."""
    parser = argparse.ArgumentParser(prog="python -m supply.audit", description=__doc__)
    parser.add_argument("--unknown-is-ok", action="store_true", help="exit with 0 if it can't be found out, but say so")
    options, passed_on = parser.parse_known_args()
    code = audit(["--require-hashes", "--disable-pip", *passed_on])
    if code == UNKNOWN and options.unknown_is_ok:
        code = 0
    sys.exit(code)


def audit(options: Sequence[str]) -> int:
    """Run pip-audit over all lock files, and give the exit code."""
    files = [option for path in sorted(FOLDER.glob("*.txt")) for option in ("--requirement", str(path))]
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", *files, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return judge(None, f"no answer in {_SECONDS} s")
    return judge(done.stdout, done.stderr)


def judge(report: str | None, errors: str) -> int:
    """Say what a report comes to.

    Args:
        report: as pip-audit writes it in JSON; None or anything else if it wrote none.
        errors: what it wrote beside.
    """
    try:
        packages: list[dict[str, Any]] = json.loads(report or "")["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = errors.strip().splitlines()
        _say_unknown("the advisory service can't be asked: " + (reason[-1] if reason else "no reason was given"))
        return UNKNOWN
    found = [(package, flaw) for package in packages for flaw in package.get("vulns", ())]
    for package, flaw in found:
        fixed = ", ".join(flaw.get("fix_versions", ())) or "no version yet"
        print(f"VULNERABLE: {package['name']} {package['version']}: {flaw['id']}, fixed in {fixed}")
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    if unknown:
        _say_unknown(f"the advisory service knows nothing of {len(unknown)} of {len(packages)} packages ({unknown[0]}, ...)")
    if found:
        return FOUND
    if unknown or not packages:
        return UNKNOWN
    print(f"audited: nothing is known against any of {len(packages)} packages")
    return 0


def _say_unknown(reason: str) -> None:
    print(f"NOT AUDITED: {reason}. Run `make audit` where it can be reached.", file=sys.stderr)


if __name__ == "__main__":
    main()
