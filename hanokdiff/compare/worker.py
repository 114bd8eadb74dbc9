"""A worker of hanokdiff/compare/workers.py: it trains, draws and scores what its parent names, until its
input ends."""

import json
import os
import signal
import sys
from contextlib import redirect_stdout

from hanokdiff.compare import __main__ as compare
from hanokdiff.compare import plan, workers
from hanokdiff.errors import one_line
from hanokdiff.files import read_json


def main() -> None:
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")

    def say(**content) -> None:
        answer.write(json.dumps(content) + "\n")
        answer.flush()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it is ignored
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            args = compare.options().parse_args(json.loads(sys.stdin.readline()))
            compare.check(args)
            context, manifest = plan.prepare(args), read_json(args.out / "manifest.json", 1 << 30)
            groups = workers.trainings(manifest["cells"])
            for line in sys.stdin:
                workers.do(context, args.out, manifest["settings"]["drawing"], groups[int(line)])
                say(done=int(line))
    except KeyboardInterrupt:
        say(stopped=True)
    except (ValueError, OSError, MemoryError) as e:
        say(error=one_line(e))


if __name__ == "__main__":
    main()
