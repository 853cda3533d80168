"""Attack a program of one's own, and look whether others still get their answers.

    make attack        or        python -m benchmarks.attacks --list | NAME ...

The app runs under gunicorn with its embedded swarm and the bundled model. During each attack three bystanders, each at
a loopback address of its own, ask the same question over HTTP and WebSockets and look at /healthz: every answer must be
right and come within 10 s, /healthz within 1 s, unless an attack says otherwise. The log may have no traceback. Linux
only: elsewhere the loopback network has one address.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.attacks import access, crowds, swarm, work  # noqa: F401  they add their attacks to the list
from benchmarks.attacks.bystanders import ANSWER_LIMIT, Bystanders, right_answer
from benchmarks.attacks.target import ATTACKS, Attack, Target
from tests.support.processes import GUNICORN, running

SHOWN, LENGTH = 5, 600  # complaints of each attack, characters of each


def main() -> int:
    """Try what the command line names; the exit status is 1 if an attack succeeds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help="parts of names; default: all")
    parser.add_argument("--list", action="store_true", help="only tell the names")
    parser.add_argument("--log", type=Path, help="keep the app's log here")
    args = parser.parse_args()
    chosen = [attack for attack in ATTACKS if not args.names or any(name in attack.name for name in args.names)]
    if args.list:
        print("\n".join(attack.name for attack in chosen))
        return 0
    succeeded = 0
    chosen.sort(key=lambda attack: sorted(attack.settings.items()))  # a program for each group of the same settings
    for settings, group in itertools.groupby(chosen, key=lambda attack: attack.settings):
        left = list(group)
        while left:  # a program that gives no answers any more is started anew
            with tempfile.TemporaryDirectory() as directory:
                succeeded += try_while_it_lives(left, settings, args.log or Path(directory) / "log")
    print(f"{len(chosen) - succeeded} attacks failed, {succeeded} succeeded")
    return 1 if succeeded else 0


def try_while_it_lives(attacks: list[Attack], settings: Mapping[str, str], log: Path) -> int:
    """Try attacks on one program, and take from the list what was tried; return how many succeeded."""
    succeeded = 0
    with running(GUNICORN, log, **settings) as program:
        program.wait_ready()
        target = Target(program, settings.get("API_KEYS", ""))
        while attacks:
            succeeded += try_one(attacks.pop(0), target)
            try:
                right_answer(target.client)
            except AssertionError:
                break
    return succeeded


def try_one(attack: Attack, target: Target) -> bool:
    """Try an attack, tell what was seen, and return whether it succeeded."""
    logged, began = len(target.program.output), time.monotonic()
    with Bystanders(target.program.url, target.key, right_answer(target.client)) as bystanders:
        wrong = attack.run(target)
    complaints = [wrong] if wrong else []
    complaints += bystanders.verdict(attack.answer_limit or ANSWER_LIMIT)
    log = target.program.output[logged:]
    if "Traceback" in log:
        complaints.append(f"a traceback in the log: {log[log.index('Traceback') :]}")
    print(f"{'SUCCEEDED' if complaints else 'failed':9} {attack.name}: {time.monotonic() - began:.0f} s; {bystanders}")
    for complaint in complaints[:SHOWN]:
        print(f"    {complaint[:LENGTH]}")
    if len(complaints) > SHOWN:
        print(f"    and {len(complaints) - SHOWN} more")
    sys.stdout.flush()
    return bool(complaints)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Threads of the libraries below may hold the interpreter; everything that was started has been ended.
    os._exit(status)
